"""Rejected rows of a run: written out, counted by reason, and held against `limits.bad_rows`.

    quarantine/<run_id>/rejected.parquet   source_uri, source_row, reason, raw, error

The file is written before the limit is judged, so that a refused run leaves all that is needed to correct
its sources. It is streamed from the records, a batch at a time.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from rise_ops.blocks import FORMAT_KEY
from rise_ops.config import LimitsConfig
from rise_ops.corpus import SourceEntry
from rise_ops.errors import BadRowsError, SourceError
from rise_ops.objects import places_key
from rise_ops.spool import spool
from rise_ops.store import Store
from rise_ops.tables import iter_table

QUARANTINE_FORMAT = 1
_BATCH_ROWS = 8192
_EXAMPLES = 6
_EXAMPLE_CHARACTERS = 200
_REJECTED = pa.schema(
    [
        ("source_uri", pa.large_string()),
        ("source_row", pa.int64()),
        ("reason", pa.large_string()),
        ("raw", pa.large_string()),
        ("error", pa.large_string()),
    ],
    metadata={FORMAT_KEY: str(QUARANTINE_FORMAT)},
)


_logger = logging.getLogger(__name__)


def quarantine_key(run_id: str) -> str:
    """Where a run's rejected rows are in the store."""
    return f"quarantine/{run_id}/rejected.parquet"


def check_rows(store: Store, entries: Sequence[SourceEntry], *, corpus: str, run_id: str, limits: LimitsConfig) -> None:
    """Write the rejected rows of a corpus out and refuse it where there are too many, or no good ones.

    Parameters
    ----------
    store
        Holds the records, takes the file.
    entries
        All sources of the version.
    corpus
        Its name, for messages.
    run_id
        Whose quarantine it is.
    limits
        `bad_rows`: a fraction of all rows where below 1, else a number of rows.

    Raises
    ------
    BadRowsError
        With counts by reason and the first row of each.
    SourceError
        There are no rows.
    """
    rows = sum(entry.rows for entry in entries)
    rejected = sum(entry.rejected for entry in entries)
    if rejected:
        counts, examples = _write(store, entries, run_id=run_id)
        limit, total = limits.bad_rows, rows + rejected
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in counts.most_common())
        _logger.info("%d of %d rows are in quarantine (%s): %s", rejected, total, kinds,
                     store.url(quarantine_key(run_id)))  # fmt: skip
        if rejected > limit if limit >= 1 else rejected > limit * total:
            raise BadRowsError(_summary(store, counts, examples, total=total, limit=limit, run_id=run_id))
    if not rows:
        raise SourceError(
            f"corpus {corpus} has no rows: {len(entries):,} objects, {rejected:,} rejected rows; check corpus.sources"
        )


def _write(store: Store, entries: Sequence[SourceEntry], *, run_id: str) -> tuple[Counter[str], list[str]]:
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    with spool() as folder:
        path = folder / "rejected.parquet"
        with pq.ParquetWriter(path, _REJECTED, compression="zstd") as writer:
            for entry in entries:
                if not entry.rejected:
                    continue
                for frame in _rejected(store, entry):
                    counts.update(frame["error"].to_list())
                    for error, reason in frame.unique("error", keep="first").select("error", "reason").iter_rows():
                        examples.setdefault(error, f"{entry.uri} {reason}"[:_EXAMPLE_CHARACTERS])
                    writer.write_table(pa.table(frame.to_arrow()).cast(_REJECTED))
        store.create_from_file(quarantine_key(run_id), path)
    return counts, [examples[error] for error, _ in counts.most_common(_EXAMPLES)]


def _rejected(store: Store, entry: SourceEntry) -> Iterator[pl.DataFrame]:
    """The rejected rows of one object, a batch at a time."""
    columns = _REJECTED.names[1:]
    for places in iter_table(store, places_key(entry.record), columns=columns, rows=_BATCH_ROWS):
        found = places.filter(pl.col("reason").is_not_null())
        if found.height:
            yield found.select(pl.lit(entry.uri).alias("source_uri"), *columns)


def _summary(
    store: Store, counts: Counter[str], examples: Sequence[str], *, total: int, limit: float, run_id: str
) -> str:
    rejected = counts.total()
    allowed = f"{limit:,.0f} rows" if limit >= 1 else f"{limit * 100:g} %"
    kinds = ", ".join(f"{count:,} {error}" for error, count in counts.most_common())
    share = f"{rejected:,} of {total:,} rows rejected ({rejected / total * 100:.3g} %)"
    return "\n".join(
        [
            f"{share}, limits.bad_rows is {allowed}: {kinds}",
            *(f"  {example}" for example in examples),
            f"All of them: {store.url(quarantine_key(run_id))}",
            "Correct the sources, or raise limits.bad_rows.",
        ]
    )
