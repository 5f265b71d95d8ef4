"""Examples for people: the best and worst rows of a run, and what some queries attribute to.

    runs/<run_id>/examples.json   {best, worst, queries: [{target, query, prompt, top, bottom}], evaluation}

Texts are cut to TEXT_CHARACTERS; the whole text is in the block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from rise_ops.attribution import Attribution, Hit, explain
from rise_ops.corpus import CorpusVersion, read_block
from rise_ops.parts import Part
from rise_ops.selection import decisions_key
from rise_ops.store import Store
from rise_ops.tables import iter_table
from rise_ops.targets import read_target
from rise_ops.valuation import read_extremes

FORMAT_VERSION = 1
ROWS = 10
QUERIES = 5
"""Queries shown of each target: the first ones."""
HITS = 5
TEXT_CHARACTERS = 2_000
_ROWS_AT_ONCE = 65_536

Json = dict[str, Any]


def examples_key(run_id: str) -> str:
    """Key of a run's examples."""
    return f"runs/{run_id}/examples.json"


def write_examples(store: Store, version: CorpusVersion, blocks: Sequence[str], *, run_id: str,
                   targets: Mapping[str, str], parts: Sequence[Part], evaluation: Json | None) -> str:  # fmt: skip
    """Collect and store a run's examples. Returns their key.

    Parameters
    ----------
    targets
        Target name to target id.
    parts
        The scored parts, in order.
    """
    best, worst = _edges(store, run_id)
    nearest = read_extremes(store, parts, k=HITS, where=pl.col("query") < QUERIES)
    queries = []
    for name, target in targets.items():
        opened = read_target(store, target).head(QUERIES)
        found = explain(store, version, blocks, opened, nearest.filter(pl.col("target") == name))
        queries += [_query(name, attribution) for attribution in found]
    hits = [hit for query in queries for hit in (*query["top"], *query["bottom"])]
    kept = _kept(store, run_id, {(hit["source_uri"], hit["source_row"]) for hit in hits})
    for hit in hits:
        hit["kept"] = kept[hit["source_uri"], hit["source_row"]]
    store.create_json(
        examples_key(run_id),
        {
            "format_version": FORMAT_VERSION,
            "best": best,
            "worst": worst,
            "queries": queries,
            "evaluation": evaluation,
        },
    )
    return examples_key(run_id)


def _edges(store: Store, run_id: str) -> tuple[list[Json], list[Json]]:
    """The highest and lowest valued rows."""
    decisions = store.scan_parquet([decisions_key(run_id)])
    key = decisions_key(run_id)
    ranked = store.collected(key, lambda: decisions.select(pl.col("rank").max()).collect().item())
    columns = ["doc_id", "value", "rank", "kept", "source_uri", "source_row", "block_id", "block_row"]
    edges = decisions.filter((pl.col("rank") <= ROWS) | (pl.col("rank") > ranked - ROWS)).select(columns).sort("rank")
    rows = store.collected(key, lambda: edges.collect(engine="streaming"))
    texts = {
        (block, row): read_block(store, block, columns=["text"])["text"][row]
        for block, row in rows.select("block_id", "block_row").iter_rows()
    }
    items: list[Json] = [
        {
            **{name: row[name] for name in columns[:6]},
            "text": texts[row["block_id"], row["block_row"]][:TEXT_CHARACTERS],
        }
        for row in rows.iter_rows(named=True)
    ]
    return items[:ROWS], items[::-1][:ROWS]


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
    }


def _kept(store: Store, run_id: str, places: set[tuple[str, int]]) -> dict[tuple[str, int], bool]:
    """Fate of rows by place: copies of a text may differ in it."""
    columns = ["source_uri", "source_row", "kept"]
    wanted = pl.DataFrame(sorted(places), schema={"source_uri": pl.String, "source_row": pl.Int64}, orient="row")
    found = [
        frame.join(wanted, on=columns[:2], how="semi")
        for frame in iter_table(store, decisions_key(run_id), columns=columns, rows=_ROWS_AT_ONCE)
    ]
    return {(uri, row): kept for frame in found for uri, row, kept in frame.iter_rows()}
