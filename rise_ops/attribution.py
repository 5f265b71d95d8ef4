"""Attribution: which rows of the corpus made the model say something.

For each query the rows with the highest influence (training on them made the text likelier) and, if asked,
the lowest (made it less likely), with their text and where they stand in the sources. Exact (`rise_ops.search`): every
row of the index is scored, in one pass for all queries; or faster, over the codes of the index.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from rise_ops.alive import alive_if_possible
from rise_ops.code_search import search_codes
from rise_ops.config import CurationConfig, SimHashConfig
from rise_ops.corpus import CorpusVersion, Placements, read_block
from rise_ops.filters import EVERY_ROW, RowFilter
from rise_ops.memory import value_memory
from rise_ops.progress import Progress, silent
from rise_ops.rows import CanonicalRow
from rise_ops.scan import BLOCK_SHIFT, DEFAULT_MEMORY
from rise_ops.search import Found, Wanted, search
from rise_ops.session import open_indexed, open_queries, open_signer
from rise_ops.signatures import Signer
from rise_ops.store import Store
from rise_ops.targets import Target
from rise_ops.token_influence import GAP_CAUSES, TOLERANCE, Explained, Tokens, explain_scores
from rise_ops.trunk import pick_device
from rise_ops.tuning import settled

_BLOCKS_AT_ONCE = 32
_LOCATED = ("doc_id", "text", "source_uri", "source_row")
_OF_HITS = ("doc_id", "score", "source_uri", "source_row", "text")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hit:
    """A row and its influence on a query."""

    doc_id: str
    score: float
    """Inner product of unit signatures, in [−1, 1]; positive lowers the query's loss."""
    source_uri: str
    source_row: int
    text: str
    tokens: Tokens | None = None
    """What each token of the row adds to the score, where asked for (`rise_ops.token_influence`)."""
    query_tokens: Tokens | None = None
    """What each token of the query adds to it, another sum of the same score."""
    tokens_gap: float | None = None
    """How far the two sums are from the score, at most."""


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
              bottom: bool = True, version: int | None = None, only: RowFilter = EVERY_ROW, rescore: int | None = None,
              tokens: bool = False, progress: Progress = silent) -> list[Attribution]:  # fmt: skip
    """The k most and least influential rows of the configured corpus, for each query.

    Parameters
    ----------
    bottom
        Find the least influential ones, too.
    version
        Version of the corpus; the current one where None.
    only
        Sources and labels that are searched.
    rescore
        Where given, the codes of the index are searched instead of its signatures (`rise_ops.code_search`).
    tokens
        Say of each hit which tokens of it and of the query carry the score; the model reads the hits again.

    Raises
    ------
    ConfigError
        There is no such version, source or column.
    SourceError, ModelError
        Nothing was ingested, or the corpus is not wholly in the index of this model and sketch, or there are no codes.
    """
    with alive_if_possible(store, "attribution"):
        config = settled(store, config)
        indexed = open_indexed(store, config, version=version)
        target = open_queries(store, config, indexed.index_id, rows)
        codes = None if rescore is None else (config.simhash or SimHashConfig(), rescore)
        extremes = find_extremes(
            store, indexed.index_id, indexed.blocks, {"queries": target}, k=k, bottom=bottom,
            wanted=only.wanted(store, indexed.version), codes=codes,
            device="cpu" if codes is None else pick_device(config.model.device),
            memory=int(config.limits.memory), progress=progress,
        )  # fmt: skip
        found = explain(store, indexed.version, indexed.blocks, target, extremes, only=only)
        return with_tokens(found, target, signer=open_signer(store, config)) if tokens else found


def with_tokens(found: Sequence[Attribution], target: Target, *, signer: Signer,
                longest: int | None = None) -> list[Attribution]:  # fmt: skip
    """The attributions of a target's queries, their hits with the influence of tokens.

    Sums that are further from the scores than `rise_ops.token_influence.TOLERANCE` are logged as a warning.

    Parameters
    ----------
    longest
        Characters beyond which a row, or all rows of a query, go without.

    Raises
    ------
    ModelError, LimitError
        As `rise_ops.token_influence.explain_scores`.
    """

    answer = [
        _with_tokens(item, signature, signer=signer, longest=longest)
        for item, signature in zip(found, target.signature, strict=True)
    ]
    gaps = [hit.tokens_gap for item in answer for hit in (*item.hits, *item.bottom) if hit.tokens_gap is not None]
    wrong = sum(gap > TOLERANCE for gap in gaps)
    if wrong:
        _logger.warning(
            "the tokens' parts add up to another score for %d of %d hits, %.4f off at most: %s",
            wrong,
            len(gaps),
            max(gaps),
            GAP_CAUSES,
        )
    return answer


def _with_tokens(
    item: Attribution, signature: npt.NDArray[np.float32], *, signer: Signer, longest: int | None
) -> Attribution:
    hits = [*item.hits, *item.bottom]
    fits = [longest is None or max(len(hit.text), len(item.query)) <= longest for hit in hits]
    texts = [hit.text for hit, fit in zip(hits, fits, strict=True) if fit]
    parts = explain_scores(signer, texts, query=item.query, prompt=item.prompt, signature=signature)
    told = [_told(hit, next(parts)) if fit else hit for hit, fit in zip(hits, fits, strict=True)]
    return replace(item, hits=told[: len(item.hits)], bottom=told[len(item.hits) :])


def _told(hit: Hit, part: Explained) -> Hit:
    return replace(hit, tokens=part.tokens, query_tokens=part.query_tokens, tokens_gap=part.gap(hit.score))


def find_extremes(store: Store, identity: str, blocks: Sequence[str], targets: Mapping[str, Target], *, k: int,
                  bottom: bool = True, wanted: Wanted | None = None, codes: tuple[SimHashConfig, int] | None = None,
                  device: torch.device | str = "cpu", memory: int | None = None,
                  progress: Progress = silent) -> pl.DataFrame:  # fmt: skip
    """The k highest and lowest rows of each query: target, query, side, rank, block, block_row, score.

    Parameters
    ----------
    bottom
        Find the lowest, too.
    wanted
        Rows that are searched; all where None.
    codes
        Search these codes, and score so many times k rows of what they find from the signatures.
    device
        Where codes are multiplied.
    memory
        Bytes that the search may take.

    Raises
    ------
    LimitError
        So many queries do not fit in `memory`.
    """
    stacked = np.concatenate([target.signature for target in targets.values()])
    k_bottom = k if bottom else 0
    if codes is not None:
        config, rescore = codes
        ends = search_codes(store, identity, blocks, stacked, config, k=k, k_bottom=k_bottom, rescore=rescore,
                            wanted=wanted, device=device, memory=memory or 2**30, progress=progress)  # fmt: skip
    else:
        count, dim = stacked.shape
        plan = None if memory is None else value_memory(memory, queries=count, dim=dim, aggregate="mean", extremes=k)
        ends = search(store, identity, blocks, stacked, k=k, k_bottom=k_bottom, wanted=wanted,
                      memory=DEFAULT_MEMORY if plan is None else plan.scan, progress=progress)  # fmt: skip
    names = [name for name, target in targets.items() for _ in range(len(target.queries))]
    numbers = [number for target in targets.values() for number in range(len(target.queries))]
    return pl.concat(
        _end_frame(side, names, numbers, found) for side, found in zip(("top", "bottom"), ends, strict=True)
    )


def _end_frame(side: str, names: Sequence[str], numbers: Sequence[int], found: Found) -> pl.DataFrame:
    width, held = found.rows.shape[1], found.rows.ravel()
    return pl.DataFrame(
        {
            "target": pl.Series(names, dtype=pl.String).gather(np.repeat(np.arange(len(names)), width)),
            "query": np.repeat(np.asarray(numbers, np.uint32), width),
            "side": pl.repeat(side, held.size, eager=True),
            "rank": np.tile(np.arange(1, width + 1, dtype=np.uint32), len(names)),
            "block": (held >> BLOCK_SHIFT).astype(np.uint32),
            "block_row": (held & ((1 << BLOCK_SHIFT) - 1)).astype(np.uint32),
            "score": found.scores.ravel(),
        }
    )


def explain(store: Store, version: CorpusVersion, blocks: Sequence[str], target: Target,
            extremes: pl.DataFrame, *, only: RowFilter = EVERY_ROW) -> list[Attribution]:  # fmt: skip
    """Texts and places for the extremes of one target."""
    rows = locate(store, version, blocks, extremes, only=only)
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


def locate(store: Store, version: CorpusVersion, blocks: Sequence[str], rows: pl.DataFrame, *,
           only: RowFilter = EVERY_ROW) -> pl.DataFrame:  # fmt: skip
    """Add doc_id, text, source_uri and source_row to rows named by (block, block_row).

    A row that stands in several objects is given the first place, by URI and row, of those that were searched.
    """
    uris = [entry.uri for entry in version.sources if only.matches(entry.uri)]
    searched = pl.lit(value=True) if only.source is None else pl.col("source_uri").is_in(uris)
    placements = Placements(store, version)
    wanted = rows.select("block", "block_row").unique().sort("block", "block_row")
    parts = wanted.partition_by("block", maintain_order=True)
    located = []
    for start in range(0, len(parts), _BLOCKS_AT_ONCE):  # objects hold many blocks: ask for their places together
        some = [(blocks[part["block"][0]], part) for part in parts[start : start + _BLOCKS_AT_ONCE]]
        found = pl.concat([_content(store, block_id, part) for block_id, part in some])
        first = (
            placements.of(block_id for block_id, _ in some)
            .filter(searched)
            .join(found, on=["block_id", "block_row"], how="semi")
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
    return [Hit(**row) for row in rows.select(*_OF_HITS).iter_rows(named=True)]


def _hit_json(hit: Hit) -> dict[str, Any]:
    names = Hit.__slots__ if hit.tokens is not None else _OF_HITS
    return {name: value for name, value in asdict(hit).items() if name in names}
