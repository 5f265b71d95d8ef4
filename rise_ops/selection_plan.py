"""What a selection would do, before it is paid for: the same decisions as a run's, from the scores in the store.

Nothing is estimated. Where the store lacks what a run would compute first, the preview says what that is. With
`near_duplicates` or `diversity` the preview reads the signatures, as a run does.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rise_ops.config import CurationConfig
from rise_ops.corpus import CorpusVersion
from rise_ops.decided import preview_once
from rise_ops.errors import DamagedError
from rise_ops.parts import cut_parts, missing_parts, valuation_id
from rise_ops.selection import Scored
from rise_ops.session import block_rows
from rise_ops.store import Store
from rise_ops.targets import read_queries, target_id

Json = dict[str, Any]


def preview_selection(store: Store, config: CurationConfig, version: CorpusVersion | None, identity: str, *,
                      changed: bool, missing: int) -> Json:  # fmt: skip
    """`selection` with what each rule would take and what is kept, or `selection_unknown` with the reason.

    Parameters
    ----------
    version
        The corpus' current version, if there is one.
    identity
        The index.
    changed
        Whether the sources are not what they were in that version.
    missing
        Blocks that the index lacks.

    Raises
    ------
    SelectionError, ConfigError, LimitError
        What a run would raise.
    """
    if not config.targets:
        return {"selection_unknown": "no targets are configured"}
    if version is None or changed:
        return {"selection_unknown": "the sources are not what was ingested; `curate value` takes them in"}
    if missing:
        return {"selection_unknown": f"the index lacks blocks of the corpus ({missing:,}); `curate value` fills it"}
    targets = {
        name: target_id(identity, read_queries(target, limits=config.limits)) for name, target in config.targets.items()
    }
    parts = cut_parts(valuation_id(identity, targets, config.aggregate), block_rows(store, version))
    lacking = len(missing_parts(store, parts))
    if lacking:
        return {
            "selection_unknown": f"{lacking:,} of {len(parts):,} parts of the corpus have no scores for these targets "
            "yet; `curate value` computes them"
        }
    scored = Scored(
        version, parts, list(config.targets), config.weights, config.aggregate, identity, config.corpus.sources
    )
    try:
        found = preview_once(store, scored, config.selection, memory=int(config.limits.memory))
    except DamagedError as error:
        return {"selection_unknown": f"{error}"}
    return {"selection": asdict(found)}
