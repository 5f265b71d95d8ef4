"""SimHash codes: the signs of a random rotation of a signature, one bit each.

A rotation is two rounds of random signs and a Walsh-Hadamard transform of the vector, padded with zeros to a power of
two: R = H D₂ H D₁ / n, orthogonal, in O(n log n) (Ailon and Chazelle, 2009; two rounds as in Andoni et al., 2015,
because one leaves sparse vectors sparse). `bits` of its coordinates, drawn without replacement, are kept; where a
rotation has fewer, several independent ones follow each other.

For a unit vector x and any q the coordinates z of √n·R behave like those of a Gaussian projection, so
`E[sign(z_i(x)) · z_i(q)] = √(2/π) ⟨x, q⟩`, and

    ⟨x, q⟩ ≈ √(π/2) / bits · Σ_i sign(z_i(x)) · z_i(q)

is unbiased and linear in q: the score of a mean query is the mean of the scores. Its standard error is at most
`√((π/2 ‖q‖² − ⟨x, q⟩²) / bits)`: 0.0138 for unit vectors at 8,192 bits. (Quantising one side only: Plan and Vershynin,
2013; Jacques et al., 2013.)
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rise_ops.errors import IntegrityError
from rise_ops.hashing import fingerprint
from rise_ops.memory import CODE_ROWS

VERSION = 1
"""Raised when the same seed would give other codes."""
_FACTOR = 32

Float32Array = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class SimHash:
    """The random part of the codes.

    Parameters
    ----------
    signs
        int8 [rotations, 2, n]: the signs of both rounds; n is a power of two, at least `dim`.
    picks
        int64 [bits]: coordinates that are kept, numbered over all rotations.
    dim
        Length of the signatures.
    """

    signs: npt.NDArray[np.int8]
    picks: npt.NDArray[np.int64]
    dim: int

    @classmethod
    def from_seed(cls, dim: int, bits: int, seed: int) -> SimHash:
        """Draw them from a CPU generator. They are kept with the codes: PyTorch does not promise its streams."""
        n = 1 << max(1, (dim - 1).bit_length())
        rotations = -(-bits // n)
        generator = torch.Generator(device="cpu").manual_seed(seed)
        signs = torch.randint(0, 2, (rotations, 2, n), generator=generator, dtype=torch.int8) * 2 - 1
        picks = torch.cat([torch.randperm(n, generator=generator) + n * number for number in range(rotations)])
        kept = picks[:bits] if rotations == 1 else picks[torch.randperm(rotations * n, generator=generator)[:bits]]
        return cls(signs.numpy(), kept.numpy(), dim)

    @property
    def bits(self) -> int:
        """Length of a code."""
        return len(self.picks)

    @property
    def identity(self) -> str:
        """SHA-256 over everything that decides on the codes."""
        return fingerprint([VERSION, self.dim, self.signs.shape[2], self.picks.tolist(), self.signs.tobytes().hex()])

    def project(self, x: npt.NDArray[Any] | torch.Tensor, *, device: torch.device | str = "cpu") -> Float32Array:
        """The kept coordinates of √n·R x: [rows, dim] → float32 [rows, bits]."""
        found = np.empty((len(x), self.bits), np.float32)
        for start, rotated in self._parts(x, torch.device(device)):
            found[start : start + len(rotated)] = rotated.cpu().numpy()
        return found

    def codes(self, x: npt.NDArray[Any] | torch.Tensor, *, device: torch.device | str = "cpu") -> Codes:
        """Sign bits, 1 for a positive coordinate, most significant first: [rows, dim] → uint8 [rows, bits/8]."""
        found = np.empty((len(x), -(-self.bits // 8)), np.uint8)
        for start, rotated in self._parts(x, torch.device(device)):
            found[start : start + len(rotated)] = np.packbits((rotated > 0).cpu().numpy(), axis=1)
        return found

    def _parts(self, x: npt.NDArray[Any] | torch.Tensor, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
        for start in range(0, len(x), CODE_ROWS):
            some = x[start : start + CODE_ROWS]
            # a copy, because torch takes no read-only memory
            part = some if isinstance(some, torch.Tensor) else torch.from_numpy(some.copy())
            yield start, self._rotated(part, device)

    @torch.inference_mode()
    def _rotated(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        rotations, _, n = self.signs.shape
        signs = torch.from_numpy(self.signs).to(device, torch.float32)
        padded = torch.zeros(len(x), 1, n, device=device)
        padded[:, 0, : self.dim] = x.to(device, torch.float32)
        once = hadamard((padded * signs[:, 0]).view(-1, n)).view(-1, rotations, n)
        twice = hadamard((once * signs[:, 1]).view(-1, n)).view(-1, rotations * n)
        return twice[:, torch.from_numpy(self.picks).to(device)] / math.sqrt(n)

    def to_bytes(self) -> bytes:
        """As an `.npz` of `signs`, `picks` and `dim`."""
        buffer = io.BytesIO()
        np.savez(buffer, signs=self.signs, picks=self.picks, dim=np.int64(self.dim))
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str) -> SimHash:
        """Read `to_bytes`.

        Raises
        ------
        IntegrityError
            It is not such a file.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as found:
                made = cls(found["signs"], found["picks"], int(found["dim"]))
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise IntegrityError(f"{where} does not hold the parameters of SimHash codes ({error})") from error
        shape = made.signs.shape
        fits = len(shape) == 3 and shape[1] == 2 and shape[2] >= made.dim > 0 and shape[2].bit_count() == 1
        if not fits or made.picks.ndim != 1 or not _within(made.picks, shape[0] * shape[2]):
            raise IntegrityError(f"{where} holds parameters of SimHash codes that do not fit each other")
        return made


def _within(picks: npt.NDArray[np.int64], size: int) -> bool:
    return len(picks) > 0 and int(picks.min()) >= 0 and int(picks.max()) < size


def scale(bits: int) -> float:
    """What sums of `sign(z(x)) · z(q)` are multiplied by to estimate ⟨x, q⟩."""
    return math.sqrt(math.pi / 2) / bits


def standard_error(bits: int, *, query_norm: float = 1.0) -> float:
    """Largest standard error of the estimate."""
    return math.sqrt(math.pi / 2 / bits) * query_norm


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Walsh-Hadamard transform of rows, not normalised: [rows, n] → [rows, n], n a power of two.

    The transform of size a·b is the Kronecker product of those of size a and b, so it is done as products with small
    dense matrices, which BLAS does faster than butterflies.
    """
    rows, n = x.shape
    done = 1
    while done < n:
        size = min(_FACTOR, n // done)
        matrix = _matrix(size).to(x.device)
        if done == 1:  # one large product, not many with a vector
            x = (x.reshape(-1, size) @ matrix).reshape(rows, n)
        else:
            x = (matrix @ x.reshape(rows, n // (done * size), size, done)).reshape(rows, n)
        done *= size
    return x


@cache
def _matrix(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
