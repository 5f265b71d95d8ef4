"""Arms of the closed loop: who chooses which rows, all with the same budget of tokens.

    loops/<loop_id>/arms/<arm>-<seed>.parquet    block_id, block_row, doc_id, tokens; in the order of taking

- rise: the highest value first, as selection ranks (ties by doc_id, then by place); lowest: the lowest value first.
- random: another permutation for each seed.
- bm25: the highest mean BM25 score over the queries of the targets with a positive weight.
- length: the most tokens first.

From that order each row that still fits into the budget is taken; one that does not is passed over. Nothing else is
left out: no rule of `selection` counts here. Rows without a value (fewer than two tokens) take no part in any arm, and
of an object that stands in the corpus twice each row is there once.

In memory are, of all rows, about 200 bytes each, and for bm25 the inverted index (`rise_ops.baselines.bm25`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rise_ops.baselines.base import Query, Setting
from rise_ops.baselines.bm25 import Bm25
from rise_ops.blocks import parquet_bytes, read_stored, read_texts
from rise_ops.compare_config import Arm, Bm25Method, ClosedLoopConfig
from rise_ops.comparison import StoreRows, refuse_infeasible
from rise_ops.config import CurationConfig
from rise_ops.errors import ConfigError
from rise_ops.exclusion import TIE
from rise_ops.model_shape import model_shape
from rise_ops.runs import decisions_key
from rise_ops.scratch import Scratch
from rise_ops.spool import spool
from rise_ops.store import Store
from rise_ops.targets import read_queries

if TYPE_CHECKING:
    import polars as pl

ARM_FORMAT = 1
COLUMNS = ("block_id", "block_row", "doc_id", "tokens")

Json = dict[str, Any]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Candidates:
    """The rows that arms choose from."""

    frame: pl.DataFrame
    """COLUMNS, value, tie; in the corpus' order."""

    @property
    def tokens(self) -> Int64Array:
        """Of each row."""
        return self.frame["tokens"].cast(int).to_numpy()


def arm_key(loop_id: str, arm: str, seed: int) -> str:
    """Where an arm's rows are in the store."""
    return f"loops/{loop_id}/arms/{arm}-{seed}.parquet"


def read_candidates(store: Store, run_id: str) -> Candidates:
    """The rows of a run that have a value, each once.

    Raises
    ------
    MissingObjectError, IntegrityError
        The run's decisions are not there, or damaged.
    """
    import polars as pl

    key = decisions_key(run_id)
    rows = store.scan_parquet([key]).select(*COLUMNS, "value", TIE).filter(pl.col("value").is_not_null())
    unique = rows.unique(["block_id", "block_row"], keep="first", maintain_order=True)
    return Candidates(store.collected(key, unique.collect))


def refuse_budget(candidates: Candidates, tokens: int) -> None:
    """Raise where a budget leaves nothing to choose.

    Raises
    ------
    ConfigError
        The rows have no more tokens than the budget, or none of them fits into it.
    """
    sizes = candidates.tokens
    if tokens >= sizes.sum():
        raise ConfigError(
            f"closed_loop.tokens is {tokens:,}, but the {len(sizes):,} rows have {sizes.sum():,} tokens, so all arms "
            "would take the same rows; give a smaller budget"
        )
    if tokens < sizes.min():
        raise ConfigError(
            f"closed_loop.tokens is {tokens:,}, but the shortest row has {sizes.min():,}; give a larger budget"
        )


def refuse_seen(candidates: Candidates, held_out: Mapping[str, Collection[str]]) -> None:
    """Raise where texts that are held out are rows of the corpus.

    Parameters
    ----------
    held_out
        doc_ids by the name of the set.

    Raises
    ------
    ConfigError
        Naming the set.
    """
    import polars as pl

    for name, texts in held_out.items():
        seen = candidates.frame.select(pl.col("doc_id").is_in(list(texts)).sum()).item()
        if seen:
            raise ConfigError(
                f"closed_loop.held_out.{name}: {seen:,} rows of the corpus are texts of this set, and an arm could "
                "train on them; take them out of one of both"
            )


def take(order: Int64Array, tokens: Int64Array, budget: int) -> Int64Array:
    """Rows in their order, each that fits into what is left of the budget.

    Parameters
    ----------
    order
        Numbers of rows, the first to be taken first.
    tokens
        Of every row, by its number.
    """
    smallest, left, taken = int(tokens.min()), budget, []
    for row in order.tolist():
        if tokens[row] <= left:
            taken.append(row)
            left -= int(tokens[row])
        if left < smallest:
            break
    return np.asarray(taken, np.int64)


def order_of(arm: Arm, candidates: Candidates, *, seed: int, relevance: Float32Array | None = None) -> Int64Array:
    """Numbers of all rows in the order in which an arm takes them.

    Parameters
    ----------
    seed
        Only of random.
    relevance
        Of each row; only of bm25, which needs it.
    """
    ties = candidates.frame["tie"].to_numpy()
    if arm == "random":
        return np.random.default_rng([0, seed]).permutation(len(ties))
    if arm == "bm25":
        assert relevance is not None
        keys: npt.NDArray[np.generic] = -relevance
    elif arm == "length":
        keys = -candidates.tokens
    else:
        values = candidates.frame["value"].to_numpy()
        keys = -values if arm == "rise" else values
    return np.lexsort((ties, keys))  # stable: of equal ones the earlier place


def positive_queries(config: CurationConfig) -> list[Query]:
    """The queries of the targets with a positive weight.

    Raises
    ------
    ConfigError
        There is no such target.
    """
    names = [name for name, weight in config.weights.items() if weight > 0]
    if not names:
        raise ConfigError("closed_loop.arms: bm25 needs a target with a positive weight; give one under `value`")
    rows = [row for name in names for row in read_queries(config.targets[name], limits=config.limits)]
    return [Query(row.text, row.prompt) for row in rows]


def mean_relevance(store: Store, config: CurationConfig, candidates: Candidates, blocks: Mapping[str, int],
                   ) -> Float32Array:  # fmt: skip
    """Mean BM25 score of each candidate over `positive_queries`.

    Parameters
    ----------
    blocks
        Rows of each block of the corpus, in order.

    Raises
    ------
    ConfigError
        No target has a positive weight.
    LimitError
        The inverted index needs more than `limits.memory`.
    """
    queries, memory = positive_queries(config), int(config.limits.memory)
    rows = StoreRows(store, list(blocks), sum(blocks.values()))
    size = sum(len(text.encode()) for texts in rows for text in texts)
    with spool() as folder:
        setting = Setting(config.model, config.sketch, model_shape(config.model), Scratch(folder, memory // 4), memory,
                          len(rows), size, len(queries), seed=0)  # fmt: skip
        method = Bm25(setting, Bm25Method(method="bm25"))
        refuse_infeasible(method, "bm25")
        method.build(rows)
        means = np.concatenate([scores.mean(axis=1) for scores in method.scores(rows, queries)])
    starts = dict(zip(blocks, np.cumsum([0, *blocks.values()]).tolist(), strict=False))
    places = candidates.frame["block_id"].replace_strict(starts).to_numpy() + candidates.frame["block_row"].to_numpy()
    return np.asarray(means[places], np.float32)


def write_arms(store: Store, config: CurationConfig, loop: ClosedLoopConfig, candidates: Candidates, *, loop_id: str,
               blocks: Mapping[str, int]) -> Json:  # fmt: skip
    """Choose and store the rows of every arm and seed. Returns {arm-seed: {arm, seed, rows, tokens}}.

    Parameters
    ----------
    blocks
        Rows of each block of the corpus, in order.

    Raises
    ------
    ConfigError
        The budget leaves nothing to choose.
    """
    refuse_budget(candidates, loop.tokens)
    relevance = mean_relevance(store, config, candidates, blocks) if "bm25" in loop.arms else None
    found: Json = {}
    for arm in loop.arms:
        for seed in range(loop.seeds):
            if arm == "random" or seed == 0:
                order = order_of(arm, candidates, seed=seed, relevance=relevance)
                rows = take(order, candidates.tokens, loop.tokens)
            chosen = candidates.frame[rows].select(COLUMNS)
            _write(store, arm_key(loop_id, arm, seed), chosen)
            total = int(chosen["tokens"].cast(int).sum())
            found[f"{arm}-{seed}"] = {"arm": arm, "seed": seed, "rows": chosen.height, "tokens": total}
    return found


def _write(store: Store, key: str, chosen: pl.DataFrame) -> None:
    import pyarrow as pa

    kinds = (pa.large_string(), pa.uint32(), pa.large_string(), pa.int32())
    schema = pa.schema(list(zip(COLUMNS, kinds, strict=True)))
    columns = {name: chosen[name].to_list() for name in COLUMNS}
    store.create(key, parquet_bytes(columns, schema, format_version=ARM_FORMAT))


def read_arm(store: Store, loop_id: str, arm: str, seed: int) -> pl.DataFrame:
    """COLUMNS of the rows of an arm, in the order in which they were taken.

    Raises
    ------
    MissingObjectError, IntegrityError
        They are not there, or damaged.
    """
    return read_stored(store, arm_key(loop_id, arm, seed), columns=COLUMNS, known_format=ARM_FORMAT)


def arm_texts(store: Store, rows: pl.DataFrame) -> Iterator[list[str]]:
    """Texts of the rows of an arm, one block of the corpus at a time."""
    for (block_id,), part in rows.partition_by("block_id", as_dict=True, maintain_order=True).items():
        texts = read_texts(store, str(block_id))
        yield [texts[row] for row in part["block_row"].to_list()]
