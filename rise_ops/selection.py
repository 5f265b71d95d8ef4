"""Selection: value, rank and fate of every row, with the reason.

Value is Σ_target weight · score. Rules work in this order, and the first by which a row goes is its reason:

1. no_prediction: rows of fewer than two tokens have no value.
2. exclude by pattern, then by target (`rise_ops.exclusion`), whatever the value.
3. keep.min_value; keep.min_percentile: of the rows that have a value and are not excluded, the ⌊p % of their number⌋
   worst ones go.
4. near_duplicates: of nearly parallel signatures the best row stays (`rise_ops.near_duplicates`).
5. An order: by value (ties by doc_id, then by place), by chance (`rise_ops.sampling`), or by distance
   (`rise_ops.diversity`).
6. per_source, per_label and the budget are filled from that order (`rise_ops.quotas`): minima first, then each next
   row, until the budget would be exceeded.

    runs/<run_id>/decisions.parquet   doc_id, block_id, block_row, source_uri, source_row, tokens, label,
                                      score_<target>…, error_<target>…, value, value_error, rank, kept, reason, rule,
                                      duplicate_of; in corpus order

`error_<target>` is there where the scores have it; `value_error` = √Σ (weight · error)², null where an error is not
known. `rank` is the place in the order: by value of all rows that have one, otherwise of the rows that were put in
the order. `duplicate_of` is the doc_id of the row that stayed.

Rows stream from the scores into a local file and a file of sort keys; `rise_ops.ranking` sorts these on disk, and the
fates are joined to the rows as both are read once more. Memory is set by `limits.memory`, and no result depends on
it; disk takes about the size of the decisions and 200 bytes a row. An object that stands in the corpus twice has its
rows twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from rise_ops.config import SelectionConfig
from rise_ops.corpus import CorpusVersion, Placements
from rise_ops.counters import count
from rise_ops.errors import ConfigError, IntegrityError, SelectionError
from rise_ops.exclusion import TIE, TargetExclusions
from rise_ops.heap import steady_heap
from rise_ops.memory import SelectMemory, index_share, select_memory
from rise_ops.ordering import RECORD, Indexed, diversified, sampled, with_duplicates
from rise_ops.parts import Part
from rise_ops.progress import Progress, silent
from rise_ops.quotas import fill_order
from rise_ops.ranking import Fates, Records, Sorter, append, by_value, has_value, read_records, values_of
from rise_ops.row_groups import RowFacts
from rise_ops.runs import decisions_key
from rise_ops.scratch import Column, Scratch
from rise_ops.selection_rules import KEPT, Rules, Tally
from rise_ops.spool import spool
from rise_ops.store import Store
from rise_ops.tables import TableWriter, iter_file
from rise_ops.valuation import Aggregate, count_queries, iter_part_scores

DEFAULT_LABEL = "label"
"""Column that is the label where `selection.per_label` names none."""
_GROUP_ROWS = 8_192
_HELPERS = ("item", "pattern", "source_group", "label_group")
"""Columns of the local file that decisions do not have."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Selection:
    """What was decided, in numbers."""

    rows: int
    kept: int
    tokens: int
    tokens_kept: int
    reasons: dict[str, int]
    """Rows by reason."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """What each rule took: step, reason, rule (configuration key), rows, tokens; in the order of the rules."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The scored rows of a corpus version, and how they are valued."""

    version: CorpusVersion
    parts: Sequence[Part]
    """In order."""
    targets: Sequence[str]
    weights: Mapping[str, float]
    aggregate: Aggregate
    identity: str | None = None
    """The index; near_duplicates and diversity look into it."""
    sources: Sequence[str] = ()
    """`corpus.sources`: what a source is by pattern."""


def decide(store: Store, version: CorpusVersion, *, run_id: str, parts: Sequence[Part],
           weights: Mapping[str, float], targets: Sequence[str], aggregate: Aggregate, selection: SelectionConfig,
           memory: int, identity: str | None = None, sources: Sequence[str] = (),
           progress: Progress = silent) -> Selection:  # fmt: skip
    """Decide on all rows and store the decisions.

    Parameters
    ----------
    parts
        The scored parts, in order.
    memory
        Bytes that selection may take.
    identity
        The index that was scored.
    sources
        `corpus.sources`.
    progress
        Of the search for near-duplicates and the order by distance.

    Raises
    ------
    SelectionError
        Nothing is left to keep, or a minimum cannot be met.
    ConfigError
        The corpus has no such column.
    LimitError
        `memory` is too small.
    IntegrityError
        The parts do not cover the version's rows.
    """
    scored = Scored(version, parts, targets, weights, aggregate, identity, sources)
    with spool() as folder:
        decider = _Decider(store, scored, selection, Path(folder), memory=memory, progress=progress)
        found = decider.decide()
        store.create_from_file(decisions_key(run_id), decider.write())
    count("rows", found.rows)
    return found


def preview(store: Store, scored: Scored, selection: SelectionConfig, *, memory: int) -> Selection:
    """What `decide` would decide; writes nothing to the store. Raises what it raises."""
    with spool() as folder:
        return _Decider(store, scored, selection, Path(folder), memory=memory, progress=silent).decide()


class _Decider:
    """One selection, in a folder."""

    def __init__(self, store: Store, scored: Scored, selection: SelectionConfig, folder: Path, *, memory: int,
                 progress: Progress) -> None:  # fmt: skip
        steady_heap()
        self._store, self._scored, self._selection, self._folder = store, scored, selection, folder
        self._rules = Rules(selection, uris=[entry.uri for entry in scored.version.sources], sources=scored.sources)
        self._facts = _facts(store, scored.version, selection, self._rules)
        self._plan = _plan(store, scored, memory=memory, contents=bool(self._facts))
        self._tally = Tally(self._rules)
        self._index = self._opened(memory, progress)
        self._scratch = Scratch(folder, memory - index_share(memory))
        self._leaders: npt.NDArray[np.int64] | None = None
        self._names: Column | None = None
        self._best = 0.0, 0
        """Value and tokens of the best row."""
        self._fates = Fates(folder, capacity=self._plan.sort_rows)
        self._rows = folder / "rows.parquet"
        self._order = folder / "order"

    def _opened(self, memory: int, progress: Progress) -> Indexed | None:
        if self._selection.near_duplicates is None and self._selection.diversity is None:
            return None
        if self._scored.identity is None:
            raise ValueError("near_duplicates and diversity need the identity of the index")
        blocks = [block for part in self._scored.parts for block in part.blocks]
        return Indexed(self._store, self._scored.identity, blocks, index_share(memory), self._folder, progress)

    def decide(self) -> Selection:
        """All steps but the writing of the decisions."""
        exclusions = TargetExclusions(self._rules.targets, self._folder, capacity=self._plan.sort_rows)
        rows, valued, items = self._spool(exclusions)
        if rows != self._scored.version.rows:
            version = self._scored.version
            raise IntegrityError(
                f"corpus {version.corpus} version {version.version} has {version.rows:,} rows, the scores cover "
                f"{rows:,}; the store is damaged, `curate verify` tells where"
            )
        if not valued:
            raise SelectionError(f"none of the {rows:,} rows has 2 tokens, so none can be valued")
        exclusions.settle(valued)
        sorter, open_rows = self._keyed(exclusions, items)
        pieces = self._above_percentile(self._ranked(sorter.runs()), open_rows)
        if self._selection.near_duplicates is not None:
            assert self._index is not None
            priority = self._scratch.column("priority", (items,), np.uint64)
            pieces, self._leaders = with_duplicates(
                pieces, self._selection.near_duplicates, self._index, priority, code=self._rules.near_duplicate
            )
        self._fill(self._ordered(pieces), rows)
        tally = self._tally
        return Selection(
            rows=rows,
            kept=int(tally.rows[KEPT]),
            tokens=int(tally.tokens.sum()),
            tokens_kept=int(tally.tokens[KEPT]),
            reasons=tally.reasons(),
            steps=tally.steps(),
        )

    def _spool(self, exclusions: TargetExclusions) -> tuple[int, int, int]:
        """Write the rows to a local file. Returns their number, that of those with a value, and that of the index."""
        rows = valued = items = 0
        with TableWriter(self._rows, compression="lz4", group_rows=_GROUP_ROWS) as writer:
            for frame in self._valued_rows():
                exclusions.see(frame, rows)
                writer.write(frame.to_arrow())
                rows += frame.height
                valued += frame.height - frame["value"].null_count()
                items = int(frame["item"][-1]) + 1
        return rows, valued, items

    def _valued_rows(self) -> Iterator[pl.DataFrame]:
        """Scores joined with places, labels and values, a slice at a time, in corpus order."""
        scored, rules = self._scored, self._rules
        items = 0
        placements = Placements(self._store, scored.version)
        frames = iter_part_scores(self._store, scored.parts, scored.targets, scored.aggregate,
                                  rows=self._plan.slice_rows)  # fmt: skip
        for frame in frames:
            blocks = frame["block_id"].unique(maintain_order=True).to_list()
            places = placements.of(blocks)
            errors = [name for name in frame.columns if name.startswith("error_")]
            numbered = frame.with_columns(item=pl.int_range(items, items + pl.len(), dtype=pl.UInt64))
            items += frame.height
            placed = numbered.join(places, on=["block_id", "block_row"], how="left", maintain_order="left_right")
            placed = self._with_facts(placed, blocks).with_columns(
                value=_value(scored.weights), value_error=_value_error(scored.weights, errors)
            )
            sources, labels = rules.source_groups, rules.label_groups
            groups = {
                "source_group": 0 if sources is None else sources.numbers(placed["source_uri"]),
                "label_group": 0 if labels is None else labels.numbers(placed["label"]),
            }
            yield placed.with_columns(
                pl.lit(numbers, pl.UInt32).alias(name) if isinstance(numbers, int) else numbers.alias(name)
                for name, numbers in groups.items()
            ).select(
                "doc_id", "block_id", "block_row", "source_uri", "source_row", "tokens", "label",
                *(f"score_{name}" for name in scored.targets), *errors, "value", "value_error", *_HELPERS,
            )  # fmt: skip

    def _with_facts(self, frame: pl.DataFrame, blocks: Sequence[str]) -> pl.DataFrame:
        if not self._facts:
            return frame.with_columns(label=pl.lit(None, pl.String), pattern=pl.lit(0, pl.UInt16))
        facts = self._facts.of(blocks)
        return frame.join(facts, on=["block_id", "block_row"], how="left", maintain_order="left")

    def _keyed(self, exclusions: TargetExclusions, items: int) -> tuple[Sorter, int]:
        """Give every row a key and, where it goes by an exclusion or the lowest value, a code.

        Returns what sorts them, and the number of rows that have a value and are not excluded.
        """
        rules, selection = self._rules, self._selection
        sorter = Sorter(self._folder / "keys", RECORD, capacity=self._plan.sort_rows)
        if selection.near_duplicates is not None:
            self._names = self._scratch.column("names", (items, 32), np.uint8)
        # values are compared as they are stored, in 32 bits: a row of value 0.1 is not below 0.1
        lowest = pl.Series([selection.keep.min_value or 0.0]).cast(pl.Float32).to_numpy()[0]
        columns = dict.fromkeys(["doc_id", "tokens", "value", *_HELPERS, *exclusions.columns])
        first = open_rows = 0
        for frame in iter_file(self._rows, columns=list(columns), rows=self._plan.slice_rows):
            records = _records(frame, first)
            codes = exclusions.codes(frame, first)
            patterns = frame["pattern"].to_numpy()
            codes = np.where(patterns > 0, patterns, codes)
            valued = has_value(records)
            codes[~valued] = rules.no_prediction
            open_rows += int((codes == 0).sum())
            if rules.min_value:
                codes[(codes == 0) & (frame["value"].fill_null(0.0).to_numpy() < lowest)] = rules.min_value
            records["code"] = codes
            sorter.add(records)
            if self._names is not None:
                self._name(frame)
            first += frame.height
        return sorter, open_rows

    def _name(self, frame: pl.DataFrame) -> None:
        """Keep the doc_ids of rows of the index."""
        assert self._names is not None
        names = bytes.fromhex("".join(frame["doc_id"].to_list()))
        self._names.put(frame["item"].cast(pl.Int64).to_numpy(), np.frombuffer(names, np.uint8).reshape(-1, 32))

    def _above_percentile(self, pieces: Iterator[Records], open_rows: int) -> Iterator[Records]:
        """Give the worst rows a code; they come last."""
        percentile = self._selection.keep.min_percentile
        stay = open_rows - (0 if percentile is None else int(Fraction(str(percentile)) * open_rows / 100))
        seen = 0
        for records in pieces:
            counted = (records["code"] == 0) | (records["code"] == (self._rules.min_value or 0))
            places = seen + np.cumsum(counted)
            worst = (records["code"] == 0) & (places > stay)
            records["code"] = np.where(worst, self._rules.min_percentile, records["code"])
            seen = int(places[-1])
            yield records

    def _ranked(self, pieces: Iterator[Records]) -> Iterator[Records]:
        """Number the rows that have a value."""
        done = 0
        for records in pieces:
            if not done:
                self._best = float(values_of(records[:1])[0]), int(records["tokens"][0])
            records["rank"] = np.where(has_value(records), np.arange(done + 1, done + 1 + len(records)), 0)
            done += len(records)
            yield records

    def _ordered(self, pieces: Iterator[Records]) -> Iterator[Records]:
        """Write the undecided rows to a file in the order in which they are taken, and give them out."""
        selection = self._selection
        if selection.sample is not None:
            pieces = sampled(pieces, selection.sample, self._folder / "draw", capacity=self._plan.sort_rows,
                             code=self._rules.not_sampled)  # fmt: skip
        self._order.touch()
        for records in pieces:
            decided = records["code"] != 0
            if selection.diversity is not None:
                records["rank"] = np.where(decided, 0, records["rank"])
            self._note(records[decided])
            append(self._order, records[~decided])
            yield records[~decided]

    def _fill(self, undecided: Iterator[Records], rows: int) -> None:
        """Fill quotas and budget, and note what becomes of each row."""
        partitions, limits = self._rules.partitions, self._rules.limits(rows)
        left = tokens = largest = 0
        for records in undecided:
            left, tokens = left + len(records), tokens + int(records["tokens"].sum(dtype=np.int64))
            largest = max(largest, int(records["tokens"].max(initial=0)))
            for partition in partitions:
                partition.count(records)
        if not left:
            raise SelectionError(self._nothing_kept(rows))
        if self._selection.diversity is not None:
            assert self._index is not None
            diversified(self._order, self._selection.diversity, self._index, limits,
                        whole=bool(partitions) or self._rules.unit == "tokens")  # fmt: skip
        filled, path = fill_order(
            lambda: read_records(self._order, RECORD), partitions, limits, rows=left, tokens=tokens, largest=largest,
            unit=self._rules.unit, folder=self._folder,
        )  # fmt: skip
        if not filled.exact:
            _logger.warning(
                "quotas leave no play: fractions are of %d %s, which is at most a row a group more than what is kept",
                filled.total, self._rules.unit,
            )  # fmt: skip
        with path.open("rb") as codes:
            for records in read_records(self._order, RECORD):
                records["code"] = np.fromfile(codes, np.uint16, len(records))
                self._note(records)
        if not filled.rows:
            raise SelectionError(self._nothing_kept(rows))

    def _note(self, records: Records) -> None:
        self._tally.add(records["code"], records["tokens"])
        self._fates.add(records["row"], records["rank"], records["code"])

    def _nothing_kept(self, rows: int) -> str:
        value, tokens = self._best
        return (
            f"the selection keeps none of {rows:,} rows: the best one has value {value:.4g} and {tokens:,} tokens; "
            f"of all, {self._tally.text()}"
        )

    def write(self) -> Path:
        """The decisions, in a local file: rows and fates both come in corpus order."""
        reasons = pa.array([rule.reason for rule in self._rules.all], pa.large_string())
        keys = pa.array([rule.rule for rule in self._rules.all], pa.large_string())
        path = self._folder / "decisions.parquet"
        with TableWriter(path, group_rows=_GROUP_ROWS) as writer:
            for frame in iter_file(self._rows, rows=_GROUP_ROWS):
                fates = self._fates.take(frame.height)
                ranks, codes = fates["rank"], pa.array(fates["code"])
                duplicates = np.zeros(len(fates), np.bool_)
                if self._rules.near_duplicate:
                    duplicates = fates["code"] == self._rules.near_duplicate
                writer.write(
                    frame.drop(_HELPERS)
                    .to_arrow()
                    .append_column("rank", pa.array(ranks, pa.uint32(), mask=ranks == 0))
                    .append_column("kept", pa.array(fates["code"] == KEPT))
                    .append_column("reason", reasons.take(codes))
                    .append_column("rule", keys.take(codes))
                    .append_column("duplicate_of", self._stayed(frame["item"], duplicates))
                )
        self._rows.unlink()
        return path

    def _stayed(self, items: pl.Series, duplicates: npt.NDArray[np.bool_]) -> pa.Array:
        """doc_ids of the rows that stayed for the duplicates; of a row's further places its own."""
        found: list[str | None] = [None] * len(items)
        places = np.flatnonzero(duplicates)
        if len(places) and self._leaders is not None and self._names is not None:
            own = items.cast(pl.Int64).to_numpy()[places]
            leaders = self._leaders[own]
            names = self._names.take(np.where(leaders < 0, own, leaders)).tobytes().hex()
            for number, place in enumerate(places.tolist()):
                found[place] = names[64 * number : 64 * number + 64]
        return pa.array(found, pa.large_string())


def _facts(store: Store, version: CorpusVersion, selection: SelectionConfig, rules: Rules) -> RowFacts:
    """What is to be read of the rows' contents.

    Raises
    ------
    ConfigError
        The corpus has no such column.
    """
    asked = {f"selection.exclude[{number}].field": each.field for number, each in enumerate(selection.exclude)
             if each.pattern is not None and each.field not in ("text", "prompt")}  # fmt: skip
    label = DEFAULT_LABEL if selection.per_label is None else selection.per_label.field
    if selection.per_label is not None:
        asked["selection.per_label.field"] = label
    for key, name in asked.items():
        if name not in version.fields:
            known = ", ".join(list(version.fields)[:10]) or "none"
            raise ConfigError(f"{key}: corpus {version.corpus} has no column '{name}'; it has {known}")
    return RowFacts(store, label if label in version.fields else None, rules.patterns)


def _plan(store: Store, scored: Scored, *, memory: int, contents: bool) -> SelectMemory:
    queries = count_queries(store, scored.parts) if scored.aggregate == "rrf" else 0
    plan = select_memory(
        memory, rows=scored.version.rows, queries=queries, aggregate=scored.aggregate, contents=contents
    )
    _logger.info("%s", plan.plan.text)
    return plan


def _value(weights: Mapping[str, float]) -> pl.Expr:
    """Σ weight · score; null for rows that have no scores."""
    terms = [pl.lit(weight) * pl.col(f"score_{name}") for name, weight in weights.items()]
    terms = terms or [pl.when(pl.col("chunks") > 0).then(pl.lit(0.0))]
    return pl.sum_horizontal(terms, ignore_nulls=False).cast(pl.Float32)


def _value_error(weights: Mapping[str, float], errors: Iterable[str]) -> pl.Expr:
    """√Σ (weight · error)²; null where an error is not known."""
    if not weights or not {f"error_{name}" for name in weights} <= set(errors):
        return pl.lit(None, pl.Float32)
    terms = [(pl.lit(weight) * pl.col(f"error_{name}")) ** 2 for name, weight in weights.items()]
    return pl.sum_horizontal(terms, ignore_nulls=False).sqrt().cast(pl.Float32)


def _records(frame: pl.DataFrame, first: int) -> Records:
    """Keys of rows, by value; the first has this place."""
    records = np.zeros(frame.height, RECORD)
    values = frame["value"]
    ties = frame.select(TIE)["tie"].to_numpy()
    by_value(records, values.fill_null(0.0).to_numpy(), values.is_not_null().to_numpy(), ties)
    records["row"] = np.arange(first, first + frame.height, dtype=np.uint64)
    records["item"], records["tokens"] = frame["item"].to_numpy(), frame["tokens"].to_numpy()
    records["source"], records["label"] = frame["source_group"].to_numpy(), frame["label_group"].to_numpy()
    return records
