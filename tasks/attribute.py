"""Tasks of attribution."""

from __future__ import annotations

from prefect.artifacts import create_table_artifact

from rise_ops.attribution import attribute
from rise_ops.card import escaped, escaped_whole
from rise_ops.config import CurationConfig
from rise_ops.filters import RowFilter
from rise_ops.hashing import fingerprint
from rise_ops.report_text import strongest
from rise_ops.session import ad_hoc_queries, open_corpus
from rise_ops.store import Store
from tasks.policy import GPU, S3, Json, stage
from tasks.progress import stage_progress

_SHOWN = 50


@stage("attribute", tags=[GPU, S3])
def attribute_queries(
    store_uri: str,
    config: CurationConfig,
    queries: str | None,
    text: str | None,
    prompt: str | None,
    k: int,
    source: str | None,
    label: str | None,
    version: int | None,
    rescore: int | None,
    tokens: bool = False,
) -> Json:
    """Find the top and bottom rows of each query and store them under the hash of the answer."""
    store = Store(store_uri)
    rows = ad_hoc_queries(config, queries=queries, text=text, prompt=prompt)
    only = RowFilter.parse(source=source, label=label)
    number = open_corpus(store, config, number=version).version
    found = attribute(
        store, config, rows, k=k, version=number, only=only, rescore=rescore, tokens=tokens, progress=stage_progress()
    )
    answer = [attribution.to_json(bottom=True) for attribution in found]
    corpus = {"name": config.corpus.name, "version": number}
    asked = {"source": source, "label": label, "rescore": rescore}
    document = {"format_version": 1, "k": k, "corpus": corpus, "where": asked, "queries": answer}
    key = f"attributions/{fingerprint(document)}.json"
    store.create_json(key, document)
    return {"queries": len(answer), "outputs": [key]}


@stage("show-attribution")
def publish_hits(store_uri: str, key: str) -> Json:
    """Show the best hits as a Prefect artifact, whose cells are Markdown."""
    answer = Store(store_uri).get_json(key)["queries"]
    table = [
        {
            "query": escaped(item["query"]),
            "score": round(hit["score"], 4),
            "source": escaped_whole(hit["source_uri"]),
            "row": hit["source_row"],
            "text": escaped(hit["text"]),
            **{name: _strongest(hit[name]) for name in ("tokens", "query_tokens") if hit.get(name)},
        }
        for item in answer
        for hit in item["hits"]
    ]
    create_table_artifact(table[:_SHOWN], key="attribution", description=f"{len(answer)} queries, {len(table)} hits")
    return {"hits": len(table)}


def _strongest(tokens: list[Json]) -> str:
    return ", ".join(f"{escaped(text)} {score:+.4f}" for text, score in strongest(tokens))
