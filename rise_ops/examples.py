"""Examples for people: rows by which a selection is judged, and what some queries attribute to.

    runs/<run_id>/examples.json   {best, worst, cut: {kept, dropped}, dropped: {<reason>: rows},
                                   near_duplicates: [{size, stayed, dropped}],
                                   queries: [{target, query, prompt, top, bottom}], evaluation}

`best` and `worst` are the ends of the corpus by value; `cut` has the last rows that were kept and the first that
another budget would keep, in the order of the run; `dropped` the best rows that went for each other reason;
`near_duplicates` the largest groups, with the row that stayed for them (`rise_ops.judged_rows` chooses them).
Texts are cut to TEXT_CHARACTERS; the whole text is in the block. Where the model could be opened, hits of queries have
`tokens` and `query_tokens`, cut like their texts: `{text, start, end, score}`, parts of the hit's score
(`rise_ops.token_influence`); `tokens_beyond` and `query_tokens_beyond` are the parts behind the cut, `tokens_gap` is
how far the sums are from the score. Rows and queries of more than LONGEST characters go without.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import polars as pl

from rise_ops.attribution import Attribution, Hit, explain, with_tokens
from rise_ops.corpus import CorpusVersion
from rise_ops.errors import LimitError, ModelError
from rise_ops.judged_rows import TEXT_CHARACTERS, judged_rows
from rise_ops.parts import Part
from rise_ops.runs import decisions_key
from rise_ops.signatures import Signer
from rise_ops.store import Store
from rise_ops.tables import iter_table
from rise_ops.targets import Target, read_target
from rise_ops.token_influence import LONGEST, Tokens, cut_tokens
from rise_ops.valuation import read_extremes

FORMAT_VERSION = 1
QUERIES = 5
"""Queries shown of each target: the first ones."""
HITS = 5
_ROWS_AT_ONCE = 65_536

Json = dict[str, Any]

_logger = logging.getLogger(__name__)


def examples_key(run_id: str) -> str:
    """Key of a run's examples."""
    return f"runs/{run_id}/examples.json"


def write_examples(store: Store, version: CorpusVersion, blocks: Sequence[str], *, run_id: str,
                   targets: Mapping[str, str], parts: Sequence[Part], evaluation: Json | None,
                   signer: Callable[[], Signer] | None = None) -> str:  # fmt: skip
    """Collect and store a run's examples. Returns their key.

    Parameters
    ----------
    targets
        Target name to target id.
    parts
        The scored parts, in order.
    signer
        Opens the model that the index is of, for the influence of tokens; without it, or where it fails, there is none.
    """
    nearest = read_extremes(store, parts, k=HITS, where=pl.col("query") < QUERIES)
    queries = []
    for name, target in targets.items():
        opened = read_target(store, target).head(QUERIES)
        found = explain(store, version, blocks, opened, nearest.filter(pl.col("target") == name))
        queries += [_query(name, attribution) for attribution in _with_tokens(found, opened, signer)]
    hits = [hit for query in queries for hit in (*query["top"], *query["bottom"])]
    kept = _kept(store, run_id, {(hit["source_uri"], hit["source_row"]) for hit in hits})
    for hit in hits:
        hit["kept"] = kept[hit["source_uri"], hit["source_row"]]
    store.create_json(
        examples_key(run_id),
        {
            "format_version": FORMAT_VERSION,
            **judged_rows(store, run_id),
            "queries": queries,
            "evaluation": evaluation,
        },
    )
    return examples_key(run_id)


def _with_tokens(found: list[Attribution], target: Target, signer: Callable[[], Signer] | None) -> list[Attribution]:
    if signer is None:
        return found
    try:
        return with_tokens(found, target, signer=signer(), longest=LONGEST)
    except (ModelError, LimitError) as error:
        _logger.warning("examples go without the influence of tokens: %s", error)
        return found


def _query(target: str, attribution: Attribution) -> Json:
    return {
        "target": target,
        "query": attribution.query[:TEXT_CHARACTERS],
        "prompt": attribution.prompt,
        "top": [_hit(hit) for hit in attribution.hits],
        "bottom": [_hit(hit) for hit in attribution.bottom],
    }


def _hit(hit: Hit) -> Json:
    return {
        "doc_id": hit.doc_id,
        "score": hit.score,
        "source_uri": hit.source_uri,
        "source_row": hit.source_row,
        "text": hit.text[:TEXT_CHARACTERS],
        **_tokens("tokens", hit.tokens),
        **_tokens("query_tokens", hit.query_tokens),
        **({} if hit.tokens_gap is None else {"tokens_gap": hit.tokens_gap}),
    }


def _tokens(name: str, tokens: Tokens | None) -> Json:
    if tokens is None:
        return {}
    shown, beyond = cut_tokens(tokens, TEXT_CHARACTERS)
    return {name: [asdict(token) for token in shown], f"{name}_beyond": beyond}


def _kept(store: Store, run_id: str, places: set[tuple[str, int]]) -> dict[tuple[str, int], bool]:
    """Fate of rows by place: copies of a text may differ in it."""
    columns = ["source_uri", "source_row", "kept"]
    wanted = pl.DataFrame(sorted(places), schema={"source_uri": pl.String, "source_row": pl.Int64}, orient="row")
    found = [
        frame.join(wanted, on=columns[:2], how="semi")
        for frame in iter_table(store, decisions_key(run_id), columns=columns, rows=_ROWS_AT_ONCE)
    ]
    return {(uri, row): kept for frame in found for uri, row, kept in frame.iter_rows()}
