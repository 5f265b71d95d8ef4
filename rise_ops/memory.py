"""How `limits.memory` is spent: one plan a stage, made before the stage works.

A plan says how much a stage holds at a time and what that takes at most, beside the libraries' own resident
memory and, where a stage computes signatures, the model's weights. `limits.memory` is for a whole stage: where
`runner.workers` tasks of it run at the same time, each gets its part. A stage that cannot work within its part is
refused before it begins.

Plans know the configuration, not the corpus: a larger corpus takes longer and more disk, not more memory. (What is
kept for each source object and each block, some hundred bytes, is not planned for.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rise_ops.blocks import MAX_BYTES, MAX_ROWS
from rise_ops.config import CurationConfig, LimitsConfig
from rise_ops.errors import LimitError

MIB = 2**20
TILE_ROWS = 176
"""Rows whose scores are looked at at a time are a multiple of these."""
RRF_DEPTH = 10_000
"""Best rows of each query that reciprocal-rank fusion looks at."""
RANK_BYTES = 160
"""Bytes of a row while it is ranked; measured 75 to 95, and what follows takes some at the same time."""
EXTREMES = 50
"""Rows kept at either end of each query: enough for the evaluation protocol's largest K."""
FRESH_ROWS = 512
"""Rows that are computed at a time beside copied ones."""
UPLOAD_BYTES = 64 * MIB
"""Largest object that is written in one request, from memory."""

_CHUNKS_AHEAD = 4
_IDLE = 64 * MIB  # threads, allocators, code that is loaded on first use
_CHUNK_BYTES = 16 * MIB
_BLOCK_COPIES = 8  # a block's rows as Python strings of up to 4 bytes a sign, as Arrow columns, as a file
_POLARS_IDLE = 96 * MIB  # the same, with Polars' joins and readers
_READER_BYTES = 48 * MIB  # a decoded batch of table rows, and some megabytes of it as Python values
_CONTENT_COPIES = 6  # a block's file, its columns in Arrow, one of them as Python strings of up to 4 bytes a sign
_SLICE_BYTES = 1_536  # a row of decisions: its columns in Polars, joined with its place, and written
_FUSED_BYTES = 64  # one of a query's best rows, merged and sorted by place
CODE_ROWS = 32
"""Signatures that are rotated at a time."""
CODE_TILE_ROWS = 1_024
"""Codes that are unpacked and multiplied at a time."""
_ROTATED_BYTES = 48  # an entry of these: float32, padded to a power of two, in five buffers
_BATCH_BYTES = 48 * MIB  # rows that are decided together: which of them are candidates of each other, their codes
_PAIR_BYTES = 40  # an entry of two signatures whose cosine is computed: float16, float32, squares, products, four more
_TILE_BYTES = 24 * MIB  # vectors of a tile, float16 and float32
_CANDIDATE_BYTES = 40  # a candidate of k-centre: its row, place, norm and nearest centre, sorted
_JSON_COPIES = 8  # JSON text, its values in Python, Arrow columns, compressed pages


@dataclass(frozen=True, slots=True)
class StageMemory:
    """What a stage takes at most."""

    stage: str
    bytes: int
    """Working memory of all its tasks together."""
    text: str
    """One line for people."""


@dataclass(frozen=True, slots=True)
class ScanMemory:
    """How an index is read."""

    chunks: int
    """Chunks in memory at a time."""
    piece_rows: int
    """Rows whose scores are looked at at a time; a multiple of TILE_ROWS."""


@dataclass(frozen=True, slots=True)
class ValueMemory:
    """One task of valuation."""

    plan: StageMemory
    scan: ScanMemory


@dataclass(frozen=True, slots=True)
class CodesMemory:
    """A search over codes."""

    plan: StageMemory
    blocks: int
    """Blocks of codes in memory at a time."""


@dataclass(frozen=True, slots=True)
class SelectMemory:
    """Selection, one task."""

    plan: StageMemory
    slice_rows: int
    """Rows that are joined with their places at a time."""
    sort_rows: int
    """Rows that are sorted at a time."""


@dataclass(frozen=True, slots=True)
class DuplicatesMemory:
    """The search for near-duplicates, one task."""

    plan: StageMemory
    chunks: int
    """Chunks in memory at a time."""
    pairs: int
    """Pairs whose cosine is computed at a time."""
    columns: int
    """Bytes for codes and tables; what is beyond them is in files."""


@dataclass(frozen=True, slots=True)
class DiversityMemory:
    """Greedy k-centre, one task."""

    plan: StageMemory
    chunks: int
    """Chunks in memory at a time."""


@dataclass(frozen=True, slots=True)
class ExportMemory:
    """Export, one task."""

    plan: StageMemory
    slice_rows: int
    """Decisions that are read at a time."""
    row_bytes: int
    """Rows that are decoded at a time, in bytes of their content; always one row."""
    group_bytes: int
    """JSON of the rows of a row group."""


def task_limits(config: CurationConfig) -> LimitsConfig:
    """The limits of one of the tasks that run at the same time."""
    return config.limits.model_copy(update={"memory": int(config.limits.memory) // config.runner.workers})


def ingest_memory(memory: int, *, tasks: int = 1) -> StageMemory:
    """Plan for reading source objects: a batch of rows becomes values, a block of rows is held and written.

    How large a block may become is part of the format (`blocks.MAX_BYTES`): ids must not depend on memory.

    Parameters
    ----------
    memory
        Bytes of one task.
    tasks
        Tasks at the same time; for the text.

    Raises
    ------
    LimitError
        A block of the largest size does not fit.
    """
    need = _IDLE + _BLOCK_COPIES * MAX_BYTES + _READER_BYTES
    _refuse("ingest", need, memory, tasks)
    return _plan("ingest", f"a block of at most {MAX_BYTES // MIB} MiB, a batch of rows", need, memory, tasks)


def blocks_at_once(memory: int, *, dim: int) -> int:
    """Blocks of signatures that a task of the index may hold: two where they take a quarter of its memory at most.

    Then the last block is written and the next one read while one is computed.
    """
    return 2 if 8 * _block_bytes(dim) <= memory else 1


def _block_bytes(dim: int) -> int:
    """The signatures of a block, and the chunks of it that are being written."""
    return 2 * (MAX_ROWS + FRESH_ROWS) * dim + 2 * max(_CHUNK_BYTES, 2 * dim)


def sketch_memory(memory: int, *, dim: int, tasks: int = 1) -> tuple[StageMemory, int]:
    """Plan for computing signatures, and the bytes that are left for micro-batches (`signatures.plan_memory`).

    Raises
    ------
    LimitError
        The signatures of a block leave no room.
    """
    blocks = blocks_at_once(memory, dim=dim)
    result = blocks * _block_bytes(dim) + (blocks - 1) * _BLOCK_COPIES * MAX_BYTES
    need = _IDLE + result
    _refuse("sketch", need + 16 * MIB, memory, tasks, remedy="use a smaller sketch")
    rest = memory - need
    text = (
        f"{blocks} x {MAX_ROWS:,} signatures of {dim:,} take {_mib(result)} MiB, micro-batches {_mib(rest)} MiB beside "
        "the model"
    )
    return _plan("sketch", text, memory, memory, tasks), rest


def value_memory(memory: int, *, queries: int, dim: int, aggregate: str, extremes: int = EXTREMES,
                 tasks: int = 1) -> ValueMemory:  # fmt: skip
    """Plan for scoring: the queries, some chunks of the index and their scores, copies of a piece's scores, extremes.

    Raises
    ------
    LimitError
        So many queries do not fit.
    """
    chunk = max(_CHUNK_BYTES, 2 * dim) + 4 * queries * min(MAX_ROWS, -(-_CHUNK_BYTES // (2 * dim)))
    kept = queries * ((RRF_DEPTH if aggregate == "rrf" else extremes) + extremes)
    fixed = _IDLE + 12 * queries * dim + 40 * kept + 32 * MIB
    tile = 20 * queries * TILE_ROWS
    _refuse("value", fixed + chunk + tile, memory, tasks, remedy="use fewer queries")
    rest = memory - fixed
    chunks = max(1, min(_CHUNKS_AHEAD, rest // (2 * chunk)))
    tiles = max(1, min(MAX_ROWS // TILE_ROWS, 8, (rest - chunks * chunk) // tile))
    need = fixed + chunks * chunk + tiles * tile
    text = f"{queries:,} queries of {dim:,}, {chunks} chunks of {_mib(chunk)} MiB, {tiles * TILE_ROWS:,} rows at a time"
    return ValueMemory(_plan("value", text, need, memory, tasks), ScanMemory(chunks, tiles * TILE_ROWS))


def codes_memory(memory: int, *, queries: int, dim: int, bits: int, kept: int, threads: int) -> CodesMemory:
    """Plan for a search over codes: the queries, unpacked codes, their products, some blocks of codes.

    Parameters
    ----------
    kept
        Candidates of a query, at both ends together.
    threads
        That multiply.

    Raises
    ------
    LimitError
        So many queries do not fit.
    """
    block = MAX_ROWS * (bits // 8 + 16)
    held = queries * (12 * dim + 9 * bits + 40 * kept)
    tiles = (threads + 2) * CODE_TILE_ROWS
    work = _ROTATED_BYTES * CODE_ROWS * dim + tiles * (bits + bits // 8) + 12 * tiles * queries
    need = _IDLE + held + work + 256 * dim + 32 * MIB
    _refuse("search", need + block, memory, 1, remedy="use fewer queries")
    blocks = max(1, min(8, (memory - need) // block))
    text = f"{queries:,} queries of {bits:,}, {blocks} blocks of codes of {_mib(block)} MiB"
    return CodesMemory(_plan("search", text, need + blocks * block, memory, 1), blocks)


def select_memory(memory: int, *, rows: int, queries: int, aggregate: str, contents: bool = False) -> SelectMemory:
    """Plan for ranking: decisions stream by in slices, keys are sorted a part at a time.

    Parameters
    ----------
    rows
        Of the corpus, for the text.
    queries
        Of all targets; with `rrf` each has RRF_DEPTH best rows in memory.
    contents
        Whether blocks are read, too, for labels and patterns.

    Raises
    ------
    LimitError
        Not even the smallest slice fits.
    """
    fused = _FUSED_BYTES * queries * RRF_DEPTH if aggregate == "rrf" else 0
    fused += _CONTENT_COPIES * MAX_BYTES if contents else 0
    smallest = 1_024
    least = _POLARS_IDLE + max(fused + smallest * _SLICE_BYTES, UPLOAD_BYTES)
    _refuse("select", least, memory, 1, remedy="use fewer queries, or another aggregate" if aggregate == "rrf" else "")
    slices = max(smallest, min(32_768, (memory - _POLARS_IDLE - fused) // 2 // _SLICE_BYTES))
    sorts = (memory - _POLARS_IDLE) * 3 // 4 // RANK_BYTES
    need = max(least, _POLARS_IDLE + max(fused + slices * _SLICE_BYTES, min(rows, sorts) * RANK_BYTES))
    passes = max(1, -(-rows // sorts))
    text = f"{rows:,} rows in {passes:,} {'pass' if passes == 1 else 'passes'} of {min(rows, sorts):,}"
    return SelectMemory(_plan("select", text, need, memory, 1), slices, sorts)


def index_share(memory: int) -> int:
    """What of a selection's memory its searches in the index get; the rest is for what is held beside them."""
    return memory // 4 * 3


def duplicates_memory(memory: int, *, dim: int) -> DuplicatesMemory:
    """Plan for removing near-duplicates: chunks that are coded, pairs that are compared, codes and tables.

    Raises
    ------
    LimitError
        A chunk leaves no room.
    """
    chunk = max(_CHUNK_BYTES, 2 * dim)
    fixed = _IDLE + _ROTATED_BYTES * CODE_ROWS * dim + _BATCH_BYTES
    pair = _PAIR_BYTES * dim
    least = fixed + chunk + pair
    _refuse("near_duplicates", least, memory, 1, remedy="use a smaller sketch")
    rest = memory - fixed
    chunks = 1 if rest < 6 * chunk else 2 if rest < 12 * chunk else 3
    pairs = max(1, min(4_096, 64 * MIB // pair, (rest - chunks * chunk) // 2 // pair))
    columns = max(0, rest - chunks * chunk - pairs * pair)
    text = (
        f"{chunks} chunks of {_mib(chunk)} MiB, {pairs:,} pairs of {dim:,} at a time, codes and tables "
        f"up to {_mib(columns)} MiB in memory"
    )
    return DuplicatesMemory(_plan("near_duplicates", text, memory, memory, 1), chunks, pairs, columns)


def diversity_memory(memory: int, *, candidates: int, dim: int, width: int, pool: int) -> DiversityMemory:
    """Plan for ordering by distance: chunks that are gathered, a pool of the farthest rows, a number for each row.

    Parameters
    ----------
    candidates
        Rows that are put in order: each takes some bytes.
    dim, width
        Of the signatures, and of the vectors that are compared.
    pool
        Rows that are compared with each other at a time.

    Raises
    ------
    LimitError
        So many candidates do not fit.
    """
    chunk = max(_CHUNK_BYTES, 2 * dim)
    gather = _ROTATED_BYTES * CODE_ROWS * dim + chunk
    compare = 12 * pool * width + 4 * pool * (pool + 1_024) + _TILE_BYTES
    fixed = _IDLE + _CANDIDATE_BYTES * candidates
    least = fixed + max(gather, compare)
    _refuse("diversity", least, memory, 1, remedy="use fewer candidates (selection.diversity.candidates)")
    chunks = 2 if memory >= fixed + gather + 2 * chunk else 1
    need = max(least, fixed + gather + (chunks - 1) * chunk)
    text = f"{candidates:,} candidates of {width:,}, {pool:,} of them with each other at a time"
    return DiversityMemory(_plan("diversity", text, need, memory, 1), chunks)


def export_memory(memory: int) -> ExportMemory:
    """Plan for publishing: a slice of decisions, a block, some of its rows as values, a row group.

    Raises
    ------
    LimitError
        A block of the largest size does not fit.
    """
    group = max(MIB, min(16 * MIB, (memory - _POLARS_IDLE - UPLOAD_BYTES) // (2 * _JSON_COPIES)))
    rows = max(MIB, group // 4)
    need = _POLARS_IDLE + max(_BLOCK_COPIES * MAX_BYTES + _JSON_COPIES * rows, _JSON_COPIES * group + UPLOAD_BYTES)
    _refuse("export", need, memory, 1)
    slices = max(1_024, min(8_192, memory // (32 * 1_024)))
    text = f"{slices:,} decisions, blocks of at most {MAX_BYTES // MIB} MiB, row groups of {_mib(group)} MiB"
    return ExportMemory(_plan("export", text, need, memory, 1), slices, rows, group)


def stage_memory(config: CurationConfig, *, rows: int, queries: int) -> dict[str, StageMemory]:
    """The plans of all stages of a run.

    Raises
    ------
    LimitError
        A stage cannot work within `limits.memory`.
    """
    memory, tasks, dim = int(config.limits.memory), config.runner.workers, config.sketch.dim
    part, aggregate = memory // tasks, config.aggregate
    plans = [ingest_memory(part, tasks=tasks), sketch_memory(part, dim=dim, tasks=tasks)[0]]
    if config.targets:
        scan = value_memory(part, queries=queries, dim=dim, aggregate=aggregate, tasks=tasks)
        select = select_memory(memory, rows=rows, queries=queries, aggregate=aggregate, contents=True)
        plans += [scan.plan, select.plan, export_memory(memory).plan]
        if config.selection.near_duplicates is not None:
            plans.append(duplicates_memory(index_share(memory), dim=dim).plan)
    return {plan.stage: plan for plan in plans}


def as_json(plans: Mapping[str, StageMemory]) -> dict[str, Any]:
    """`{stage: {bytes, text}}`."""
    return {name: {"bytes": plan.bytes, "text": plan.text} for name, plan in plans.items()}


def _plan(stage: str, text: str, need: int, memory: int, tasks: int) -> StageMemory:
    several = f"{tasks} tasks, each " if tasks > 1 else ""
    return StageMemory(stage, need * tasks, f"{stage}: {several}{text}, at most {_mib(need)} of {_mib(memory)} MiB")


def _refuse(stage: str, need: int, memory: int, tasks: int, *, remedy: str = "") -> None:
    if need <= memory:
        return
    each = f" for each of {tasks} tasks (runner.workers)" if tasks > 1 else ""
    ways = [f"raise limits.memory to {_mib(need * tasks)}MiB", "lower runner.workers" if tasks > 1 else "", remedy]
    raise LimitError(
        f"{stage} needs {_mib(need)} MiB of working memory{each}, limits.memory allows {_mib(memory)} MiB; "
        + ", or ".join(way for way in ways if way)
    )


def _mib(size: int) -> str:
    return f"{-(-size // MIB):,}"
