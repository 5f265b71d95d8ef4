"""Methods side by side: the same rows, queries, model and labels through each of them, with what each costs.

    comparisons/<comparison_id>/<method_id>.json    what one method gave, written once

`comparison_id` covers the rows (the snapshot), the queries with their columns, the model, the label, K and dilutions;
`method_id` the method with its parameters and seed. So a comparison that is stopped goes on where it was, and another
method added later costs itself only. Timings are those of when a method was measured.

A method is refused, not tried, where it says that it needs more working memory than `limits.memory`.

**Dilution.** With a dilution F, all rows that are not positive stay and of the positive ones every F-th, drawn by a
hash of their content: F times as much hay for each needle. For queries that want different values, each value is
thinned for its own queries only.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from rise_ops.baselines.base import ROWS, Method, Query, Rows, Setting
from rise_ops.baselines.registry import METHODS, open_method
from rise_ops.baselines.zeroth_order import checkpoint_config
from rise_ops.blocks import read_block, read_doc_ids
from rise_ops.compare_config import CompareConfig, MethodConfig, RiseMethod, ZerothOrderMethod
from rise_ops.config import CurationConfig
from rise_ops.corpus import CorpusVersion
from rise_ops.errors import ConfigError, LimitError
from rise_ops.evaluation import Label, label_column, mean_figures, query_figures, wanted_labels
from rise_ops.hashing import fingerprint
from rise_ops.machine import measured_on, memory_now, memory_peak
from rise_ops.model_files import model_fingerprint
from rise_ops.model_shape import model_settings, model_shape
from rise_ops.placement import stored_quantization
from rise_ops.progress import Progress, silent
from rise_ops.scratch import Scratch
from rise_ops.session import block_rows
from rise_ops.signatures import ESTIMATOR_VERSION
from rise_ops.spool import spool
from rise_ops.store import Store
from rise_ops.targets import read_queries
from rise_ops.trunk import load_trunk

FORMAT_VERSION = 1
METHODS_VERSION = 1
"""Raised when a method of the same name and parameters would give other scores."""

_SEED_STEP = 1_000
_SCRATCH_BYTES = 64 * 2**20
"""Of an index that is in memory, so that a method's peak is what it works with; the rest is in a file."""

Json = dict[str, Any]
Float32Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Material:
    """What methods are compared on."""

    blocks: tuple[str, ...]
    rows: int
    queries: tuple[Query, ...]
    wanted: tuple[str, ...]
    """Of each query: the label of positive rows."""
    identity: str
    """The comparison's id."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is counted once for all methods."""

    rows: int
    tokens: int
    """Under the model's tokenizer."""
    text_bytes: int
    positives: dict[str, int]
    """Rows by the label that some query wants."""


@dataclass(slots=True)
class Outcome:
    """What one method gave."""

    load_seconds: float
    index_seconds: float
    query_seconds: float
    index_bytes: int
    loaded_bytes: int | None
    """Memory of the process when all was loaded: resident, or allocated on the GPU."""
    peak_bytes: int | None
    """The same at its highest."""
    parameters: Json
    """As they were, `auto` replaced by what was chosen."""
    settings: dict[str, Json] = field(default_factory=dict)
    """By dilution: rows, positives, top_k as in an evaluation."""


class StoreRows:
    """The texts of blocks, read anew every time."""

    def __init__(self, store: Store, blocks: Sequence[str], rows: int) -> None:
        self._store, self._blocks, self._rows = store, blocks, rows

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[list[str]]:
        for block in self._blocks:
            texts = read_block(self._store, block, columns=("text",))["text"]
            for start in range(0, len(texts), ROWS):
                yield texts[start : start + ROWS].to_list()


def open_material(store: Store, config: CurationConfig, version: CorpusVersion) -> Material:
    """Rows, queries and labels of a comparison.

    Raises
    ------
    ConfigError
        There is no such target, or a query has not the label.
    SourceError
        Queries cannot be read.
    """
    compare = config.compare
    names = compare.targets or tuple(config.targets)
    unknown = [name for name in names if name not in config.targets]
    if unknown or not names:
        known = ", ".join(config.targets) or "none"
        raise ConfigError(f"compare.targets: {unknown[0] if unknown else '(empty)'} is not a target; known: {known}")
    found = [row for name in names for row in read_queries(config.targets[name], limits=config.limits)]
    columns = [row.columns for row in found]
    sizes = block_rows(store, version)
    identity = fingerprint(
        {
            "rows": version.snapshot_id,
            "queries": [[row.doc_id, meta] for row, meta in zip(found, columns, strict=True)],
            "model": model_fingerprint(config.model),
            "device": [config.model.device, config.model.dtype],
            "label": compare.label,
            "k": sorted(compare.k),
            "dilute": sorted(compare.dilute),
            "versions": [METHODS_VERSION, ESTIMATOR_VERSION],
        }
    )
    return Material(
        blocks=tuple(sizes),
        rows=sum(sizes.values()),
        queries=tuple(Query(row.text, row.prompt) for row in found),
        wanted=tuple(wanted_labels(columns, Label.parse(compare.label))),
        identity=identity,
    )


def count_facts(store: Store, config: CurationConfig, material: Material, *, progress: Progress = silent) -> Facts:
    """Tokens, bytes and positive rows of the material.

    Raises
    ------
    ConfigError
        No row is positive for any query.
    ModelError
        The model cannot be loaded.
    """
    label, trunk = Label.parse(config.compare.label), load_trunk(config.model)
    positives = dict.fromkeys(sorted(set(material.wanted)), 0)
    rows = tokens = size = 0
    for block in material.blocks:
        frame = read_block(store, block, columns=("text", "text_field", "meta"))
        labels = label_column(frame, label.field)
        for name, count in labels.drop_nulls().value_counts().iter_rows():
            if name in positives:
                positives[name] += count
        tokens += sum(len(each.ids) for each in trunk.encode(frame["text"].to_list()))
        size += int(frame["text"].str.len_bytes().sum())
        rows += len(frame)
        progress(rows, material.rows)
    if not any(positives.values()):
        raise ConfigError(
            f"compare.label {config.compare.label}: no row is positive for any query; queries want "
            + ", ".join(f"'{name[:40]}'" for name in list(positives)[:5])
        )
    return Facts(rows, tokens, size, positives)


def setting_of(config: CurationConfig, material: Material, facts: Facts, *, scratch: Scratch, seed: int) -> Setting:
    """What a method works with; `seed` counts runs, from 0, which is the configured sketch's own seed."""
    return Setting(
        model=config.model,
        sketch=config.sketch,
        shape=model_shape(config.model),
        scratch=scratch,
        memory=int(config.limits.memory),
        rows=material.rows,
        text_bytes=facts.text_bytes,
        queries=len(material.queries),
        seed=config.sketch.seed + _SEED_STEP * seed,
    )


def method_seeds(method: MethodConfig, compare: CompareConfig) -> range:
    """Numbers of a method's runs: one where it draws nothing."""
    return range((method.seeds or compare.seeds) if METHODS[method.method].draws else 1)


def method_key(material: Material, config: CurationConfig, method: MethodConfig, seed: int) -> str:
    """Where a method's outcome is in the store; what does not bear on it is left out."""
    own = method.model_dump(mode="json", exclude={"name", "seeds"})
    sketch = config.sketch.fingerprint if isinstance(method, RiseMethod) else None
    tuning = config.tuning.fingerprint if isinstance(method, RiseMethod) and method.temperature == "auto" else None
    models = method.checkpoints if isinstance(method, ZerothOrderMethod) else ()
    checkpoints = [model_fingerprint(checkpoint_config(config.model, name)) for name in models]
    identity = fingerprint([own, sketch, tuning, checkpoints, config.sketch.seed + _SEED_STEP * seed])
    return f"comparisons/{material.identity}/{identity}.json"


def run_method(store: Store, config: CurationConfig, material: Material, facts: Facts, method: MethodConfig, *,
               seed: int, progress: Progress = silent) -> Outcome:  # fmt: skip
    """Run one method, in this process.

    Raises
    ------
    LimitError
        It needs more memory than there is.
    CurationError
        Whatever the method meets.
    """
    compare, rows = config.compare, StoreRows(store, material.blocks, material.rows)
    with spool() as folder:
        scratch = Scratch(folder, _SCRATCH_BYTES)
        opened = open_method(method, setting_of(config, material, facts, scratch=scratch, seed=seed))
        refuse_infeasible(opened, method.method)
        load_seconds, _ = _timed(opened.load)
        loaded = memory_now()
        index_seconds, stored = _timed(partial(opened.build, rows, progress=progress))
        ranking = Ranking(store, material, compare, facts)
        query_seconds = ranking.take(_clocked(opened, rows, material.queries))
        return Outcome(
            load_seconds=round(load_seconds, 3),
            index_seconds=round(index_seconds, 3),
            query_seconds=round(query_seconds, 3),
            index_bytes=int(stored),
            loaded_bytes=loaded,
            peak_bytes=memory_peak(),
            parameters=method.model_dump(mode="json", exclude={"name", "seeds", "method"}),
            settings=ranking.figures(),
        )


def refuse_infeasible(method: Method, name: str) -> None:
    """Raise where a method needs more working memory than it may take, or gradients that the model does not have.

    Raises
    ------
    LimitError
        With what says so.
    """
    model = method.setting.model
    if method.differentiates and not (model.is_plain and stored_quantization(model_settings(model)) is None):
        raise LimitError(
            f"{name} computes gradients of the model's weights in one process on one device; leave out "
            "model.device_map, quantization, tensor_parallel and backend for it, and take a checkpoint that is not "
            "quantised"
        )
    need, memory = method.need(), method.setting.memory
    if need.bytes > memory:
        raise LimitError(
            f"{name} needs {need.bytes / 2**20:,.0f} MiB of working memory ({need.text}); limits.memory "
            f"allows {memory / 2**20:,.0f} MiB"
        )


def _timed(work: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def _clocked(method: Method, rows: Rows, queries: Sequence[Query]) -> Iterator[tuple[float, Float32Array]]:
    """Each batch of scores with the seconds that it took, without what is done with it here."""
    batches = iter(method.scores(rows, queries))
    while True:
        started = time.perf_counter()
        scores = next(batches, None)
        seconds = time.perf_counter() - started
        if scores is None:
            return
        yield seconds, scores


class Ranking:
    """The highest and lowest rows of each query under each dilution, and the figures of the protocol.

    Parameters
    ----------
    store
        Where rows and their labels are.
    material, compare, facts
        Of the comparison.
    """

    def __init__(self, store: Store, material: Material, compare: CompareConfig, facts: Facts) -> None:
        self._compare, self._facts = compare, facts
        self._values = sorted(set(material.wanted))
        self._want = np.array([self._values.index(each) for each in material.wanted])
        self._labels = _label_codes(store, material, Label.parse(compare.label).field, self._values)
        diluted = any(each > 1 for each in compare.dilute)
        self._places = _places(store, material, self._labels) if diluted else None
        shape = (len(compare.dilute), len(material.queries), max(compare.k))
        self._ends = {side: (np.full(shape, np.nan, np.float32), np.zeros(shape, np.int64)) for side in (-1, 1)}

    def take(self, batches: Iterator[tuple[float, Float32Array]]) -> float:
        """Take the scores of all rows, in order, with the seconds of each batch. Returns their sum.

        Rows without a score (NaN) are passed over.
        """
        start, total = 0, 0.0
        for seconds, scores in batches:
            total += seconds
            stop = start + len(scores)
            rows = np.arange(start, stop)
            for number, factor in enumerate(self._compare.dilute):
                own = np.where(self._allowed(factor, start, stop), scores, np.float32(np.nan)).T
                for side in (-1, 1):
                    self._merge(side, number, side * own, rows)
            start = stop
        if start != self._facts.rows:
            raise ConfigError(f"a method scored {start:,} of {self._facts.rows:,} rows")
        return total

    def figures(self) -> dict[str, Json]:
        """By dilution: rows and positives that a query sees, at least, and the protocol's figures by K."""
        return {f"{factor:g}": self._figures(number, factor) for number, factor in enumerate(self._compare.dilute)}

    def _allowed(self, factor: float, start: int, stop: int) -> Mask:
        """[rows, queries]: which rows each query sees."""
        if self._places is None or factor == 1:
            return np.ones((stop - start, 1), bool)
        keep = np.array([_kept(self._facts.positives[value], factor) for value in self._values])
        labels, places = self._labels[start:stop], self._places[start:stop]
        thinned = places >= keep[np.maximum(labels, 0)]
        return np.asarray(~(thinned[:, None] & (labels[:, None] == self._want)))

    def _merge(self, side: int, number: int, keys: Float32Array, rows: npt.NDArray[np.int64]) -> None:
        """Keep the smallest keys; of equal ones the first rows."""
        best_keys, best_rows = (each[number] for each in self._ends[side])
        both = np.concatenate([best_keys, keys], axis=1)
        names = np.concatenate([best_rows, np.broadcast_to(rows, keys.shape)], axis=1)
        order = np.argsort(both, axis=1, kind="stable")[:, : best_keys.shape[1]]  # NaN comes last
        best_keys[:], best_rows[:] = np.take_along_axis(both, order, 1), np.take_along_axis(names, order, 1)

    def _figures(self, number: int, factor: float) -> Json:
        found: dict[int, list[tuple[float, float | None, float]]] = {k: [] for k in self._compare.k}
        for query, want in enumerate(self._want):
            top, bottom = (self._end(side, number, query) for side in (-1, 1))
            for k in self._compare.k:
                best = top[:k]
                worst = bottom[~np.isin(bottom, best)][:k][::-1]
                relevant = self._labels[np.concatenate([best, worst])] == want
                found[k].append(query_figures(relevant, len(best)))
        positives = {value: _kept(count, factor) for value, count in self._facts.positives.items()}
        fewest = min(positives, key=lambda value: positives[value])
        lost = self._facts.positives[fewest] - positives[fewest]
        return {
            "rows": self._facts.rows - lost,
            "positives": positives[fewest],
            "top_k": {str(k): mean_figures(each) for k, each in sorted(found.items())},
        }

    def _end(self, side: int, number: int, query: int) -> npt.NDArray[np.int64]:
        keys, rows = (each[number, query] for each in self._ends[side])
        return np.asarray(rows[~np.isnan(keys)])


def _kept(positives: int, factor: float) -> int:
    """Positive rows that stay under a dilution: at least one of those that are there."""
    return min(positives, max(1, round(positives / factor)))


def _label_codes(store: Store, material: Material, field_: str, values: Sequence[str]) -> npt.NDArray[np.int32]:
    """Of each row the number of its label among those that are wanted, or -1."""
    numbers: Mapping[str | None, int] = {value: number for number, value in enumerate(values)}
    parts = [np.empty(0, np.int32)]
    for block in material.blocks:
        labels = label_column(read_block(store, block, columns=("text", "text_field", "meta")), field_)
        parts.append(np.array([numbers.get(label, -1) for label in labels.to_list()], np.int32))
    return np.concatenate(parts)


def _places(store: Store, material: Material, labels: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Of each row with a wanted label its place among its fellows, by a hash of its content; 0 for others."""
    places, start = np.zeros(len(labels), np.int64), 0
    hashes = np.zeros(len(labels), np.uint64)
    for block in material.blocks:
        docs = read_doc_ids(store, block)
        hashes[start : start + len(docs)] = [
            int.from_bytes(hashlib.sha256(b"dilute:" + doc.encode()).digest()[:8], "big") for doc in docs
        ]
        start += len(docs)
    for value in range(labels.max(initial=-1) + 1):
        own = np.flatnonzero(labels == value)
        places[own[np.argsort(hashes[own], kind="stable")]] = np.arange(len(own))
    return places


def outcome_record(outcome: Outcome, *, device: str) -> Json:
    """As it is stored."""
    return {"format_version": FORMAT_VERSION, **asdict(outcome), **measured_on(device)}
