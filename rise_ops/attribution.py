"""Attribution: which rows of the corpus made the model say something.

For each query the rows with the highest influence (training on them made the text likelier) and, if asked,
the lowest (made it less likely), with their text and where they stand in the sources. Exact: every row of
the index is scored, in one pass for all queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from rise_ops.alive import alive_if_possible
from rise_ops.config import CurationConfig
from rise_ops.corpus import CorpusVersion, placements, read_block
from rise_ops.progress import Progress, silent
from rise_ops.rows import CanonicalRow
from rise_ops.scan import Extremes, score_blocks
from rise_ops.session import open_indexed, open_queries
from rise_ops.store import Store
from rise_ops.targets import Target
from rise_ops.valuation import extremes_frames, merge_extremes

_BLOCKS_AT_ONCE = 32
_LOCATED = ("doc_id", "text", "source_uri", "source_row")


@dataclass(frozen=True, slots=True)
class Hit:
    """A row and its influence on a query."""

    doc_id: str
    score: float
    """Inner product of unit signatures, in [−1, 1]; positive lowers the query's loss."""
    source_uri: str
    source_row: int
    text: str


@dataclass(frozen=True, slots=True)
class Attribution:
    """One query with the rows that matter most to it."""

    query: str
    prompt: str | None
    hits: list[Hit]
    """Highest influence first."""
    bottom: list[Hit]
    """Lowest influence first."""

    def to_json(self, *, bottom: bool) -> dict[str, Any]:
        """The command line's JSON form."""
        value: dict[str, Any] = {"query": self.query, "hits": [_hit_json(hit) for hit in self.hits]}
        if self.prompt is not None:
            value["prompt"] = self.prompt
        if bottom:
            value["bottom"] = [_hit_json(hit) for hit in self.bottom]
        return value


def attribute(store: Store, config: CurationConfig, rows: Sequence[CanonicalRow], *, k: int,
              progress: Progress = silent) -> list[Attribution]:  # fmt: skip
    """The k most and least influential rows of the configured corpus, for each query.

    Raises
    ------
    SourceError, ModelError
        Nothing was ingested, or the corpus is not wholly in the index of this model and sketch.
    """
    with alive_if_possible(store, "attribution"):
        indexed = open_indexed(store, config)
        target = open_queries(store, config, indexed.index_id, rows)
        extremes = find_extremes(store, indexed.index_id, indexed.blocks, {"queries": target}, k=k, progress=progress)
        return explain(store, indexed.version, indexed.blocks, target, extremes)


def find_extremes(store: Store, identity: str, blocks: Sequence[str], targets: Mapping[str, Target], *, k: int,
                  progress: Progress = silent) -> pl.DataFrame:  # fmt: skip
    """The k highest and lowest rows of each query: target, query, side, block, block_row, score, rank."""
    stacked = np.concatenate([target.signature for target in targets.values()])
    extremes = Extremes(k)
    for _ in score_blocks(store, identity, blocks, stacked, extremes=extremes, progress=progress):
        pass
    return merge_extremes(pl.concat(extremes_frames(extremes, targets)).lazy(), k=k)


def explain(store: Store, version: CorpusVersion, blocks: Sequence[str], target: Target,
            extremes: pl.DataFrame) -> list[Attribution]:  # fmt: skip
    """Texts and places for the extremes of one target."""
    rows = locate(store, version, blocks, extremes)
    found = []
    for query, (text, prompt) in enumerate(target.queries.select("text", "prompt").iter_rows()):
        mine = rows.filter(pl.col("query") == query).sort("rank")
        found.append(
            Attribution(
                query=text,
                prompt=prompt,
                hits=_hits(mine.filter(pl.col("side") == "top")),
                bottom=_hits(mine.filter(pl.col("side") == "bottom")),
            )
        )
    return found


def locate(store: Store, version: CorpusVersion, blocks: Sequence[str], rows: pl.DataFrame) -> pl.DataFrame:
    """Add doc_id, text, source_uri and source_row to rows named by (block, block_row).

    A row that stands in several objects is given the first place, by URI and row.
    """
    wanted = rows.select("block", "block_row").unique().sort("block", "block_row")
    parts = wanted.partition_by("block", maintain_order=True)
    located = []
    for start in range(0, len(parts), _BLOCKS_AT_ONCE):  # objects hold many blocks: ask for their places together
        some = [(blocks[part["block"][0]], part) for part in parts[start : start + _BLOCKS_AT_ONCE]]
        found = pl.concat([_content(store, block_id, part) for block_id, part in some])
        places = placements(store, version, [block_id for block_id, _ in some])
        first = (
            places.join(found, on=["block_id", "block_row"], how="semi")
            .sort("source_uri", "source_row")
            .unique(["block_id", "block_row"], keep="first")
        )
        located.append(found.join(first, on=["block_id", "block_row"], how="left").drop("block_id"))
    empty = rows.select("block", "block_row").clear().with_columns(pl.lit("").alias(name) for name in _LOCATED[:3])
    located.append(empty.with_columns(pl.lit(0, pl.Int64).alias(_LOCATED[3])))
    return rows.join(pl.concat(located), on=["block", "block_row"], how="left", maintain_order="left")


def _content(store: Store, block_id: str, rows: pl.DataFrame) -> pl.DataFrame:
    content = read_block(store, block_id, columns=["doc_id", "text", "prompt"]).drop("prompt")
    return rows.with_columns(block_id=pl.lit(block_id)).hstack(content[rows["block_row"].to_list()])


def _hits(rows: pl.DataFrame) -> list[Hit]:
    return [Hit(**row) for row in rows.select(*Hit.__slots__).iter_rows(named=True)]


def _hit_json(hit: Hit) -> dict[str, Any]:
    return {name: getattr(hit, name) for name in Hit.__slots__}
