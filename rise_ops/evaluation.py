"""The paper's evaluation protocol, on rows that carry a label.

For each query and each K: take the K highest and the K lowest scored rows; on these 2K rows compute auPRC
(average precision) and auROC against the labels, and precision@K on the top K; average over queries
(arXiv 2604.16197, section 5). A row is positive for a query when its field has the wanted value, or, with
no value given, the query's own value of that field.

With fewer than 2K scored rows, none counts twice. auROC is left out for a query whose rows are all of one
class, where it is not defined. Rows too short to be scored, and further copies of an object, do not count.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from heapq import nsmallest
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from rise_ops.alive import alive_if_possible
from rise_ops.attribution import find_extremes
from rise_ops.config import CurationConfig
from rise_ops.corpus import CorpusVersion, read_block
from rise_ops.errors import ConfigError, SelectionError
from rise_ops.filters import as_label
from rise_ops.parts import Part
from rise_ops.progress import Progress, silent
from rise_ops.session import open_indexed, open_target
from rise_ops.store import Store
from rise_ops.targets import Target, read_target
from rise_ops.tuning import settled
from rise_ops.valuation import read_extremes

DEFAULT_LABEL = "label"
DEFAULT_KS = (5, 10, 50)

_COLUMNS = ["text", "text_field", "meta"]
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Label:
    """What makes a row positive: a field, and the value it must have (None: the query's own)."""

    field: str
    value: str | None = None

    @classmethod
    def parse(cls, text: str) -> Label:
        """`FIELD` or `FIELD=VALUE`."""
        name, equals, value = text.partition("=")
        if not name:
            raise ConfigError(f"--label {text}: write it as FIELD or FIELD=VALUE")
        return cls(name, value if equals else None)


@dataclass(slots=True)
class LabelCounts:
    """Rows by their value of a field, as text."""

    rows: int
    """Of the corpus."""
    wanted: dict[str, int]
    """By the values that were asked for."""
    first: list[str]
    """The first values in alphabetical order, for messages; none where no row has the field."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of the protocol."""

    rows: int
    positives: int
    """Rows that are positive for at least one query."""
    queries: int
    top_k: dict[str, dict[str, float | None]]
    """K as text → auprc, auroc, precision."""


def average_precision(relevant: npt.NDArray[np.bool_]) -> float:
    """Average precision of a ranking, best first; 0 where nothing is relevant."""
    hits = np.flatnonzero(relevant)
    if len(hits) == 0:
        return 0.0
    return float(np.mean(np.arange(1, len(hits) + 1) / (hits + 1)))


def roc_area(relevant: npt.NDArray[np.bool_]) -> float | None:
    """Area under the ROC curve of a ranking, best first: the share of (relevant, other) pairs in order."""
    positives = int(relevant.sum())
    negatives = len(relevant) - positives
    if positives == 0 or negatives == 0:
        return None
    ranks = np.flatnonzero(relevant)
    ahead = ranks - np.arange(positives)
    return float(1 - ahead.sum() / (positives * negatives))


def evaluate(store: Store, blocks: Sequence[str], extremes: pl.DataFrame, target: Target, *, label: Label,
             ks: Sequence[int], counts: LabelCounts | None = None) -> Evaluation:  # fmt: skip
    """Figures for one target.

    Parameters
    ----------
    blocks
        The corpus' blocks, in order.
    extremes
        `merge_extremes` of this target, with at least max(ks) rows on each side.
    counts
        `count_labels` of the field and at least the wanted values, if they are known.

    Raises
    ------
    ConfigError
        No row has the field or the given value, or a query has not the field and no value is given.
    SelectionError
        No row was scored.
    """
    wanted = _wanted(target, label)
    counts = count_labels(store, blocks, label.field, wanted) if counts is None else counts
    _refuse_unlabelled(label, counts)
    if extremes.is_empty():
        raise SelectionError("no row of the corpus has 2 tokens, so none was scored")
    labels = _labels(store, blocks, extremes, label.field)
    figures: dict[int, list[tuple[float, float | None, float]]] = {k: [] for k in ks}
    for query, group in labels.partition_by("query", as_dict=True).items():
        want = wanted[int(query[0])]
        top = group.filter(pl.col("side") == "top").sort("rank")
        bottom = group.filter(pl.col("side") == "bottom").sort("rank")
        for k in ks:
            figures[k].append(_figures(top, bottom, want, k))
    return Evaluation(
        rows=counts.rows,
        positives=sum(counts.wanted.get(value, 0) for value in set(wanted)),
        queries=len(wanted),
        top_k={str(k): mean_figures(values) for k, values in figures.items()},
    )


def evaluate_corpus(store: Store, config: CurationConfig, name: str, *, label: Label, ks: Sequence[int],
                    progress: Progress = silent) -> Evaluation:  # fmt: skip
    """The protocol for one configured target, on the indexed corpus.

    Raises
    ------
    ConfigError, SourceError, ModelError
        The target or the label does not exist, or the corpus is not wholly indexed.
    """
    if name not in config.targets:
        raise ConfigError(f"--target {name}: not a target; known: {', '.join(config.targets) or 'none'}")
    with alive_if_possible(store, "evaluation"):
        config = settled(store, config)
        indexed = open_indexed(store, config)
        target = open_target(store, config, indexed.index_id, name)
        extremes = find_extremes(store, indexed.index_id, indexed.blocks, {name: target}, k=max(ks), progress=progress)
        return evaluate(store, indexed.blocks, extremes, target, label=label, ks=ks)


def evaluate_run(store: Store, version: CorpusVersion, blocks: Sequence[str], targets: Mapping[str, str],
                 parts: Sequence[Part]) -> dict[str, dict[str, Any]] | None:  # fmt: skip
    """The protocol for every target whose queries all carry a `label`, where the corpus has that column too.

    Returns the figures by target; None where there are none.
    """
    labelled = {}
    if DEFAULT_LABEL in version.fields:
        opened = {name: read_target(store, target_id) for name, target_id in targets.items()}
        labelled = {name: target for name, target in opened.items() if _has_labels(target)}
    label = Label(DEFAULT_LABEL)
    wanted = {value for target in labelled.values() for value in _wanted(target, label)}
    counts = count_labels(store, blocks, DEFAULT_LABEL, wanted) if labelled else None
    if counts is None or not counts.first:
        return None
    found = {}
    for name, target in labelled.items():
        merged = read_extremes(store, parts, k=max(DEFAULT_KS), where=pl.col("target") == name)
        figures = evaluate(store, blocks, merged, target, label=label, ks=DEFAULT_KS, counts=counts)
        found[name] = asdict(figures)
    return found


def _has_labels(target: Target) -> bool:
    return all(json.loads(meta).get(DEFAULT_LABEL) is not None for meta in target.queries["meta"].to_list())


def _refuse_unlabelled(label: Label, counts: LabelCounts) -> None:
    if not counts.first:
        raise ConfigError(f"--label {label.field}: no row of the corpus has this field")
    if label.value is not None and not counts.wanted.get(label.value):
        known = ", ".join(value[:40] for value in counts.first)
        raise ConfigError(f"--label {label.field}={label.value}: no row has this value; rows have: {known}")


def _figures(top: pl.DataFrame, bottom: pl.DataFrame, want: str, k: int) -> tuple[float, float | None, float]:
    best = top.head(k)
    worst = bottom.join(best, on=["block", "block_row"], how="anti", maintain_order="left").head(k).reverse()
    ranked = pl.concat([best["label"], worst["label"]])
    relevant = (ranked == want).fill_null(value=False).to_numpy()
    return query_figures(relevant, best.height)


def query_figures(relevant: npt.NDArray[np.bool_], best: int) -> tuple[float, float | None, float]:
    """(auPRC, auROC, precision) of one query: of its highest and then its lowest rows, `best` of which are highest."""
    precision = float(relevant[:best].mean()) if best else 0.0
    return average_precision(relevant), roc_area(relevant), precision


def mean_figures(values: Sequence[tuple[float, float | None, float]]) -> dict[str, float | None]:
    """Means over queries of (auprc, auroc, precision); auROC over those that have one."""
    areas = [area for _, area, _ in values if area is not None]
    return {
        "auprc": float(np.mean([value[0] for value in values])),
        "auroc": float(np.mean(areas)) if areas else None,
        "precision": float(np.mean([value[2] for value in values])),
    }


def _wanted(target: Target, label: Label) -> list[str]:
    return wanted_labels([json.loads(meta) for meta in target.queries["meta"].to_list()], label)


def wanted_labels(queries: Sequence[Mapping[str, Any]], label: Label) -> list[str]:
    """What label a row must have to be positive, for each query with its columns.

    Raises
    ------
    ConfigError
        A query has not the field and no value is given.
    """
    if label.value is not None:
        return [label.value] * len(queries)
    values = []
    for number, columns in enumerate(queries, 1):
        own = columns.get(label.field)
        if own is None:
            raise ConfigError(
                f"--label {label.field}: query {number} has no '{label.field}'; give the value as {label.field}=VALUE"
            )
        values.append(str(as_label(own)))
    return values


def label_column(frame: pl.DataFrame, field: str) -> pl.Series:
    """The field of each row as text; null where a row has none."""

    def pick(row: Mapping[str, Any]) -> str | None:
        if row["text_field"] == field:
            return str(row["text"])
        value = json.loads(row["meta"]).get(field)
        return as_label(value)

    return pl.Series("label", [pick(row) for row in frame.iter_rows(named=True)], dtype=pl.String)


def count_labels(store: Store, blocks: Sequence[str], field: str, wanted: Iterable[str]) -> LabelCounts:
    """Count the rows with some values of a field; a field may have as many values as there are rows."""
    counts = LabelCounts(0, dict.fromkeys(wanted, 0), [])
    for block_id in blocks:
        labels = label_column(read_block(store, block_id, columns=_COLUMNS), field)
        counts.rows += len(labels)
        found = dict(labels.drop_nulls().value_counts().iter_rows())
        for value in counts.wanted.keys() & found.keys():
            counts.wanted[value] += found[value]
        counts.first = nsmallest(_SHOWN, {*counts.first, *found})
    return counts


def _labels(store: Store, blocks: Sequence[str], extremes: pl.DataFrame, field: str) -> pl.DataFrame:
    """The extremes with the label of each row."""
    hits = extremes.select("block", "block_row").unique().sort("block", "block_row")
    parts = []
    for part in hits.partition_by("block", maintain_order=True):
        content = read_block(store, blocks[part["block"][0]], columns=_COLUMNS)
        parts.append(part.with_columns(label_column(content[part["block_row"].to_list()], field)))
    return extremes.join(pl.concat(parts), on=["block", "block_row"], how="left")
