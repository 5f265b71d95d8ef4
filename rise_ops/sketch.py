"""CountSketch, and the three tables of a signature.

`CS(x)[b(i)] += s(i)·x[i]`: a random linear map from `n_in` to `n_out` numbers that keeps inner products in
expectation. Tables come from a CPU `torch.Generator`, so one seed gives the same map on every device; they
are stored with every index all the same, because PyTorch does not promise its random streams across
releases.

On disk (`SketchTables.save`): a Zarr v3 group of six arrays `{h,g,r}_{buckets,signs}`, int32 and int8, each
one uncompressed chunk, with attributes `format_version`, `widths` and `sha256`.

Does not hold the residual or the channels: see `rise_ops.support` and `rise_ops.head`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rise_ops.config import SketchConfig
from rise_ops.errors import IntegrityError, MissingObjectError
from rise_ops.store import zarr_errors

if TYPE_CHECKING:
    from rise_ops.store import Store

FORMAT_VERSION = 1
_FACTORS = ("g", "h", "r")


@dataclass(frozen=True, slots=True, eq=False)
class CountSketch:
    """A linear map given by a bucket and a sign for every input."""

    buckets: torch.Tensor
    """int64 [n_in]: where each input goes, in [0, n_out)."""
    signs: torch.Tensor
    """int8 [n_in]: −1 or +1."""
    n_out: int
    """Width of the output."""

    @classmethod
    def from_seed(cls, n_in: int, n_out: int, seed: int) -> CountSketch:
        """Draw the tables: first all buckets, then all signs, from one CPU generator."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        buckets = torch.randint(0, n_out, (n_in,), generator=generator)
        signs = torch.randint(0, 2, (n_in,), generator=generator) * 2 - 1
        return cls(buckets, signs.to(torch.int8), n_out)

    @property
    def n_in(self) -> int:
        """Length of the input."""
        return self.buckets.numel()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Sketch the last axis: [..., n_in] → [..., n_out], in the dtype and on the device of `x`."""
        out = x.new_zeros((*x.shape[:-1], self.n_out))
        return out.index_add_(-1, self.buckets.to(x.device), x * self.signs.to(x.device, x.dtype))

    def matrix(self, *, device: torch.device | str = "cpu") -> torch.Tensor:
        """The same map as a dense float32 matrix [n_in, n_out]: faster where n_in is a hidden width."""
        dense = torch.zeros(self.n_in, self.n_out)
        dense[torch.arange(self.n_in), self.buckets] = self.signs.float()
        return dense.to(device)


def column_codes(sketch: CountSketch) -> np.ndarray[Any, np.dtype[np.int32]]:
    """A sketch in one number an input, int32 [n_in]: twice the bucket, and one more where the sign is +1."""
    return (2 * sketch.buckets + (sketch.signs > 0)).to("cpu", torch.int32).numpy()


@dataclass(frozen=True, slots=True, eq=False)
class SketchTables:
    """The sketches of hidden states (h), back-projected residuals (g) and residuals (r)."""

    h: CountSketch
    """Hidden states: hidden_dim → dim_h."""
    g: CountSketch
    """Back-projected residuals `Wᵀ r`: hidden_dim → dim_g."""
    r: CountSketch
    """Residuals: vocab_size → dim_r."""

    @classmethod
    def from_config(cls, config: SketchConfig, *, hidden_dim: int, vocab_size: int) -> SketchTables:
        """Draw the tables of a configuration: seeds `seed`, `seed + 1`, `seed + 2` for h, g, r."""
        return cls(
            CountSketch.from_seed(hidden_dim, config.dim_h, config.seed),
            CountSketch.from_seed(hidden_dim, config.dim_g, config.seed + 1),
            CountSketch.from_seed(vocab_size, config.dim_r, config.seed + 2),
        )

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """The six arrays as they are stored, by name in sorted order."""
        found: dict[str, np.ndarray[Any, Any]] = {}
        for name in _FACTORS:
            sketch: CountSketch = getattr(self, name)
            found[f"{name}_buckets"] = sketch.buckets.cpu().numpy().astype(np.int32)
            found[f"{name}_signs"] = sketch.signs.cpu().numpy().astype(np.int8)
        return found

    @property
    def widths(self) -> dict[str, int]:
        """Output width of each sketch, by name."""
        return {name: getattr(self, name).n_out for name in _FACTORS}

    @property
    def sha256(self) -> str:
        """Hash over names, widths and little-endian bytes of the six arrays, in hexadecimal."""
        digest = hashlib.sha256()
        for name, array in self.arrays().items():
            digest.update(name.encode())
            digest.update(np.int64(self.widths[name[0]]).astype("<i8").tobytes())
            digest.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"SketchTables(widths={self.widths}, sha256={self.sha256[:12]})"

    def save(self, store: Store, key: str) -> None:
        """Write the tables under `key`, unless equal ones are there.

        A write that was cut off is completed by the next one.

        Raises
        ------
        IntegrityError
            Other tables are stored there.
        StoreError, TransientError
        """
        if not store.exists(f"{key}/zarr.json"):
            store.checked(key, lambda: self._write(store, key))
        found = load_tables(store, key)
        if found.sha256 != self.sha256:
            raise IntegrityError(
                f"{store.url(key)} holds other sketch tables ({found.sha256[:12]}) than this configuration draws "
                f"({self.sha256[:12]}); load the stored ones, or build into a new index"
            )

    def _write(self, store: Store, key: str) -> None:
        import zarr
        from zarr.errors import ContainsArrayError

        attributes: dict[str, Any] = {"format_version": FORMAT_VERSION, "widths": self.widths, "sha256": self.sha256}
        with zarr_errors(store, key):
            for name, array in self.arrays().items():
                # A store of its own for each array: creating one below a group would write the group's metadata.
                place = store.zarr(f"{key}/{name}")
                try:
                    target = zarr.create_array(
                        place,
                        shape=array.shape,
                        dtype=array.dtype,
                        chunks=array.shape,
                        compressors=None,
                        # One that no table holds: a chunk that went missing must not read as data.
                        fill_value=0 if name.endswith("_signs") else -1,
                    )
                except ContainsArrayError:  # left by a write that was cut off
                    target = zarr.open_array(place, mode="r+")
                target[:] = array
            zarr.open_group(store.zarr(key), mode="a", zarr_format=3, attributes=attributes)


def load_tables(store: Store, key: str) -> SketchTables:
    """Read the tables stored under `key`.

    Raises
    ------
    MissingObjectError
        There are none, or their write has not come to its end.
    IntegrityError
        They do not match their checksum, or were written in a newer format.
    StoreError, TransientError
    """
    if not store.exists(f"{key}/zarr.json"):
        raise MissingObjectError(f"{store.url(key)} is not in the store; index the corpus first")
    return store.checked(key, lambda: _load(store, key))


def _load(store: Store, key: str) -> SketchTables:
    import zarr

    with zarr_errors(store, key):
        group = zarr.open_group(store.zarr(key, read_only=True), mode="r", zarr_format=3)
    attributes = dict(group.attrs)
    if int(str(attributes.get("format_version", 0))) > FORMAT_VERSION:
        raise IntegrityError(
            f"{store.url(key)} has format version {attributes['format_version']}, this program reads up to "
            f"{FORMAT_VERSION}; upgrade it"
        )
    try:
        with zarr_errors(store, key):
            tables = SketchTables(**{name: _read_sketch(group, name, attributes["widths"]) for name in _FACTORS})
        expected = attributes["sha256"]
    except KeyError as error:
        raise IntegrityError(f"{store.url(key)} lacks {error}; delete the index and build it again") from error
    if tables.sha256 != expected:
        raise IntegrityError(f"{store.url(key)} does not match its checksum; delete the index and build it again")
    return tables


def _read_sketch(group: Any, name: str, widths: Any) -> CountSketch:
    buckets = torch.from_numpy(np.asarray(group[f"{name}_buckets"][:], dtype=np.int64))
    signs = torch.from_numpy(np.asarray(group[f"{name}_signs"][:], dtype=np.int8))
    return CountSketch(buckets, signs, int(widths[name]))
