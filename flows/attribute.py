"""The flow `attribute`: which rows of the indexed corpus made the model say something.

`curate attribute` asks the library directly; this is the same question as a deployment, answered into the
store and a Prefect artifact.
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.hooks import FLOW_OPTIONS, run_name
from flows.runners import dispatcher
from rise_ops.config import CurationConfig
from tasks.attribute import attribute_queries, publish_hits
from tasks.dispatch import run_all


@flow(name="attribute", flow_run_name=lambda: run_name("attribute"), **FLOW_OPTIONS)
def attribute(
    config: CurationConfig,
    queries: str | None = None,
    text: str | None = None,
    prompt: str | None = None,
    k: int = 10,
    source: str | None = None,
    label: str | None = None,
    version: int | None = None,
    rescore: int | None = None,
    tokens: bool = False,
) -> dict[str, Any]:
    """Attribute queries of a file, or one text. Returns where the hits are in the store.

    Parameters
    ----------
    source, label, version
        Where rows are searched: a source object or glob, FIELD=VALUE, a version of the corpus.
    rescore
        Where given, codes are searched, and so many times k rows are scored from the index.
    tokens
        Also say which tokens of the hits and of the queries carry the scores.
    """
    with dispatcher(config) as runner:
        asked = {"queries": queries, "text": text, "prompt": prompt, "k": k, "tokens": tokens}
        where = {"source": source, "label": label, "version": version, "rescore": rescore}
        call = {"config": config, **asked, **where}
        (found,) = run_all(runner, attribute_queries, [call], store_uri=config.store)
        run_all(runner, publish_hits, [{"key": found["outputs"][0]}], store_uri=config.store)
    return found
