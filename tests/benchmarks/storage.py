"""Blocks of an index written and read, beside raw files and raw requests for the same bytes.

    python -m tests.benchmarks.storage [--places local s3] [--mib 96] [--dim 24576] [--repeat 5] [--folder FOLDER]

Written: `write_block`, with the reading back that its checksums are taken of, and without; beside it `np.save` of the
same signatures (local) or a PUT of each chunk, one after the other (S3). Read: `read_chunk` of all chunks, with their
checksums and without; beside it a copy out of a memory map of the `.npy` file into a buffer that is used again (local)
and a GET of each chunk by the client, as many at a time. First for chunks of several sizes, then for several chunks at
a time. All ways take turns; a ratio is the median of the ratios of neighbours, above 1 where ours is faster.

Local files stay in the page cache. S3 is `tests.servers` on loopback: Ceph's radosgw with its disk in memory, which
shares the machine's cores. CHUNK_BYTES is part of the format: it is changed here to measure, never to write an index.

Measured on 2 cores, that others used as well where nothing else is said (obstore 0.12, radosgw 16; blocks of 96 MiB):

- Chunk shape: from 4 to 32 MiB no size is better everywhere. Written to S3, the ratio to raw PUTs is 0.98 to 1.09; read
  from there one at a time, to raw GETs, 0.76 to 0.97; mapped from disk, to a copy out of a memory map, 0.99 to 1.77. So
  16 MiB stays.
- Written through zarr, two chunks at a time, a block came to 0.06 of `np.save` and 0.46 of raw PUTs. As bytes of the
  rows: 0.68 and 0.86 two at a time, 0.85 and 1.01 four at a time, 0.47 and 0.94 eight at a time. Without reading back
  1.31 and 1.38: the checksum of what is stored costs a third of the rate on local disk, a quarter on S3.
- Read from local disk, fresh memory and copies cost more than all else (two cores that nothing else used): one chunk at
  a time 1,759 MiB/s, mapped 8,204 MiB/s, checked both; copied out of a memory map, unchecked, 5,451; the client's GET,
  unchecked, 1,479. Two at a time 2,569 and 12,135; more gain nothing.
- Read from S3 the checksum costs up to a quarter, and two to four chunks at a time are 1.3 times as fast as one. A
  buffer that is used again gains nothing there: the client's own memory is fresh.
- Client: obstore for S3; on local disk for writing only.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import obstore

from rise_ops import index
from rise_ops.checksums import crc32c
from rise_ops.connections import obstore_options
from rise_ops.heap import steady_heap
from rise_ops.signatures import RowSignatures
from rise_ops.store import Store
from rise_ops.threads import ContextPool
from tests import servers

IDENTITY = "0" * 64
CHUNK_MIB = (4, 8, 16, 32)
AT_ONCE = (1, 2, 4, 8)
_BASES = ("raw PUTs", "np.save", "raw GETs", "memory map")

Seconds = dict[str, list[float]]
Ways = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Place:
    """Where blocks are stored."""

    name: str
    store: Store
    client: Any
    """The client of the same root, bare."""
    clean: Callable[[], object]
    """Frees what deleted objects take."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", nargs="+", choices=["local", "s3"], default=["local", "s3"])
    parser.add_argument("--mib", type=int, default=96, help="signatures of a block")
    parser.add_argument("--dim", type=int, default=24_576)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="for files; default: the system's temporary folder")
    options = parser.parse_args()
    steady_heap()
    signatures = _signatures(options.mib * 2**20 // (2 * options.dim), options.dim)
    size = signatures.signature.nbytes / 2**20
    sys.stdout.write(f"{platform.platform()}, {os.cpu_count()} cores, obstore {obstore.__version__}; blocks of "
                     f"{size:.0f} MiB, rows of {2 * options.dim:,} bytes, median of {options.repeat}\n")  # fmt: skip
    for place in options.places:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder, prefix="storage-")))
            at = _local(folder) if place == "local" else _s3(folder, stack)
            _print(f"{at.name}: write", size, _written(at, signatures, folder, options.repeat))
            _print(f"{at.name}: read", size, _read(at, signatures, folder, options.repeat))


def _signatures(rows: int, dim: int) -> RowSignatures:
    """Random bits: nothing here looks at what they mean."""
    bits = np.random.default_rng(0).integers(0, 2**16, (rows, dim), dtype=np.uint16)
    return RowSignatures(bits.view(np.float16), np.ones(rows, np.int32), np.ones(rows, np.int32))


def _local(folder: Path) -> Place:
    root = folder / "store"
    root.mkdir()
    return Place("local", Store(str(root)), obstore.store.LocalStore(str(root)), lambda: None)


def _s3(folder: Path, stack: ExitStack) -> Place:
    kind = servers.available()[0]
    server = stack.enter_context(servers.running(kind, folder))
    stack.enter_context(mock.patch.dict(os.environ, server.environment))
    uri = "s3://storage"
    import s3fs

    s3fs.S3FileSystem().mkdir("storage")
    # radosgw keeps what was deleted for two hours, and its disk is small
    collect = ["radosgw-admin", "-c", str(folder / "ceph.conf"), "gc", "process", "--include-all"]
    clean = partial(subprocess.run, collect, check=True, capture_output=True) if kind == "radosgw" else lambda: None
    client = obstore.store.from_url(uri, **obstore_options(uri, tries=1))
    return Place(f"S3 ({kind})", Store(uri), client, clean)


def _settings(*, default: int) -> list[tuple[int, int]]:
    """MiB of a chunk, and chunks at a time: first the one varies, then the other."""
    at_once = [(index.CHUNK_BYTES // 2**20, count) for count in AT_ONCE if count != default]
    return [*((mib, default) for mib in CHUNK_MIB), *at_once]


def _written(place: Place, signatures: RowSignatures, folder: Path, repeat: int) -> dict[tuple[int, int], Seconds]:
    rows, dim = signatures.signature.shape
    found = {}
    for mib, count in _settings(default=index.CHUNKS_AT_ONCE):
        with mock.patch.multiple(index, CHUNK_BYTES=mib * 2**20, CHUNKS_AT_ONCE=count):
            step = index._chunking(rows, dim)[0]
            ways: Ways = {
                "ours": partial(_write, place.store, signatures),
                "unchecked": partial(_write, place.store, signatures, checked=False),
                "raw PUTs": partial(_put_all, place.client, signatures, step),
            }
            if place.store.is_local:
                ways["np.save"] = partial(np.save, folder / "rows.npy", signatures.signature)
            found[mib, count] = _in_turn(ways, repeat, after=partial(_empty, place))
    return found


def _read(place: Place, signatures: RowSignatures, folder: Path, repeat: int) -> dict[tuple[int, int], Seconds]:
    np.save(folder / "rows.npy", signatures.signature)
    found = {}
    for mib, count in _settings(default=1):
        with mock.patch.object(index, "CHUNK_BYTES", mib * 2**20):
            record = _write(place.store, signatures)
        keys = [f"indexes/{IDENTITY}/blocks/{record.block_id}.zarr/signature/c/{chunk}/0"
                for chunk in range(-(-record.rows // record.chunk_rows))]  # fmt: skip
        ways: Ways = {
            "ours": partial(_read_all, place.store, record, len(keys), count),
            "mapped": partial(_read_all, place.store, record, len(keys), count, mapped=True),
            "unchecked": partial(_read_all, place.store, record, len(keys), count, checked=False),
            "raw GETs": partial(_get_all, place.client, keys, count),
        }
        if place.store.is_local:
            ways["memory map"] = partial(_copy_map, folder / "rows.npy", record.chunk_rows)
        found[mib, count] = _in_turn(ways, repeat)
        _empty(place)
    return found


def _write(store: Store, signatures: RowSignatures, *, checked: bool = True) -> index.BlockRecord:
    sums = index.checksums if checked else lambda store, group_key: {}
    with mock.patch.object(index, "checksums", sums):
        return index.write_block(store, IDENTITY, uuid.uuid4().hex, signatures, seconds=0.0, producer={})


def _put_all(client: Any, signatures: RowSignatures, step: int) -> None:
    name = uuid.uuid4().hex
    for start in range(0, len(signatures.signature), step):
        part = signatures.signature[start : start + step]
        obstore.put(client, f"raw/{name}/{start}", part.data.cast("B"), mode="create", use_multipart=False)


def _read_all(store: Store, record: index.BlockRecord, chunks: int, count: int, *, checked: bool = True,
              mapped: bool = False) -> None:  # fmt: skip
    """`mapped`: where the system has them, not into fresh memory."""

    def read(chunk: int) -> None:
        if mapped:
            rows, check = index.map_chunk(store, IDENTITY, record, chunk)
            check(crc32c(rows.data.cast("B")))
        else:
            index.read_chunk(store, IDENTITY, record, chunk)

    with ExitStack() as stack:
        if not checked:
            record = replace(record, crc32c=dict.fromkeys(record.crc32c, 0))
            stack.enter_context(mock.patch.object(index, "crc32c", return_value=0))
        _at_once(read, range(chunks), count)


def _get_all(client: Any, keys: list[str], count: int) -> None:
    _at_once(lambda key: memoryview(obstore.get(client, key).bytes()), keys, count)


def _at_once(read: Callable[[Any], object], items: Iterable[Any], count: int) -> None:
    with ContextPool(count) as pool:
        for _ in pool.ahead(read, items, count):
            pass


def _copy_map(path: Path, step: int) -> None:
    mapped = np.load(path, mmap_mode="r")
    buffer = np.empty((step, mapped.shape[1]), mapped.dtype)
    for start in range(0, len(mapped), step):
        part = mapped[start : start + step]
        np.copyto(buffer[: len(part)], part)


def _empty(place: Place) -> None:
    place.store.delete([key for key, _ in place.store.list("")])
    place.clean()


def _in_turn(ways: Ways, repeat: int, *, after: Callable[[], object] = lambda: None) -> Seconds:
    """Seconds of each, taken in turn, so that what else the machine does meets all alike."""
    seconds: Seconds = {way: [] for way in ways}
    for _ in range(repeat):
        for way, work in ways.items():
            started = time.perf_counter()
            work()
            seconds[way].append(time.perf_counter() - started)
        after()
    return seconds


def _print(title: str, mib: float, found: dict[tuple[int, int], Seconds]) -> None:
    ways = list(next(iter(found.values())))
    bases = [way for way in ways if way in _BASES]
    ours = [way for way in ways if way not in _BASES]
    columns = ["chunk MiB", "at a time", *(f"{way} MiB/s" for way in ways)]
    columns += [f"{way} : {base}" for base in bases for way in ours]
    sys.stdout.write(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n")
    for (chunk, count), seconds in found.items():
        cells = [f"{chunk}", f"{count}", *(f"{mib / statistics.median(seconds[way]):,.0f}" for way in ways)]
        cells += [
            f"{statistics.median(b / s for b, s in zip(seconds[base], seconds[way], strict=True)):.2f}"
            for base in bases
            for way in ours
        ]
        sys.stdout.write(f"| {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main()
