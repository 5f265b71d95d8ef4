"""Signatures of rows and queries: tokenize, chunk, run the trunk, read out, average.

A row's signature is the mean of its chunk signatures (each rounded to float16 first), scaled to unit length and
stored as float16. Chunks run in length-sorted micro-batches (`rise_ops.chunking`) whose size follows from a
memory budget by the plain model in `rise_ops.sign_memory`; logits are bounded separately. At no time are the float32
signatures of more than one micro-batch in memory, except sums of rows of several chunks, and of those at most
`MemoryPlan.pending_rows`.

The result does not depend on the company of a row beyond rounding: in float32 to a cosine of 0.9999 or better;
in 16-bit, and at low temperatures, single rows move more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from rise_ops.chunking import Chunk, plan_batches, row_chunks
from rise_ops.config import SketchConfig
from rise_ops.errors import LimitError, ModelError, SourceError
from rise_ops.progress import Progress, silent
from rise_ops.sign_memory import MemoryPlan, plan_memory, plan_shape
from rise_ops.sketch import SketchTables, load_tables
from rise_ops.trunk import Encoded, Trunk

__all__ = [
    "ESTIMATOR_VERSION",
    "MemoryPlan",
    "RowSignatures",
    "Signer",
    "TokenScores",
    "load_tables",
    "plan_memory",
    "plan_shape",
]

ESTIMATOR_VERSION = 1
"""Raised when the same model, configuration and text would give another signature."""

_FLOOR = 1e-8
_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class RowSignatures:
    """Signatures of some rows, in their order."""

    signature: np.ndarray[Any, np.dtype[np.float16]]
    """float16 [rows, dim] of unit length; zero where `chunks` is 0."""
    tokens: np.ndarray[Any, np.dtype[np.int32]]
    """int32 [rows]: tokens of each row."""
    chunks: np.ndarray[Any, np.dtype[np.int32]]
    """int32 [rows]: chunks of each row; 0 for fewer than two tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """What each token of one text adds to the inner products of its signature with some vectors."""

    encoded: Encoded
    scores: np.ndarray[Any, np.dtype[np.float64]]
    """float64 [vectors, tokens], at the token that is predicted; overlapping windows add up."""
    signature: np.ndarray[Any, np.dtype[np.float32]]
    """float32 [dim]: the text's signature, computed again, rounded to float16; zero where it predicts nothing."""


class Signer:
    """Turns texts into signatures under one model and one sketch configuration.

    Parameters
    ----------
    trunk
        The model.
    sketch
        What to sketch.
    tables
        The tables of an index; drawn from `sketch.seed` unless given.
    memory
        Working memory in bytes, beside the model's weights and the result.

    Raises
    ------
    LimitError
        `memory` is too small for one chunk.
    ModelError
        The tables belong to another model.
    """

    halvings = 0
    """How often the device ran out of memory and the micro-batch was halved."""

    def __init__(self, trunk: Trunk, sketch: SketchConfig, *, tables: SketchTables | None = None, memory: int) -> None:
        self.trunk = trunk
        self.sketch = sketch
        self.plan = plan_memory(trunk, sketch, memory=memory)
        self._head = trunk.head(sketch, tables, max_logit_bytes=self.plan.logit_bytes)
        self.tables = self._head.tables
        self._max_chunks = self.plan.chunks

    def __repr__(self) -> str:
        return f"Signer({self.trunk!r}, {self.sketch!r}, {self.plan!r})"

    def rows(self, texts: Sequence[str], *, progress: Progress = silent) -> RowSignatures:
        """Signatures of whole texts.

        Parameters
        ----------
        texts
            Rows as trained on.
        progress
            Called with chunks done and their total, after every micro-batch.

        Raises
        ------
        ModelError
            A token or a signature the model cannot have.
        LimitError
            One chunk alone does not fit on the device.
        """
        return self.encoded_rows(self.trunk.encode(texts), progress=progress)

    def encoded_rows(self, encoded: Sequence[Encoded], *, progress: Progress = silent) -> RowSignatures:
        """`rows` of what `Trunk.encode` has made of the texts, perhaps in another thread."""
        chunks = [row_chunks(row, len(found.ids)) for row, found in enumerate(encoded)]
        return self._sign(encoded, chunks, progress=progress)

    def queries(
        self, texts: Sequence[str], prompts: Sequence[str | None], *, progress: Progress = silent
    ) -> RowSignatures:
        """Signatures of queries; where a prompt is given, only what follows it counts.

        Parameters
        ----------
        texts
            Whole queries, prompt included.
        prompts
            The beginning of each text that is its prompt; None or empty where it has none.

        Raises
        ------
        SourceError
            A prompt is not the beginning of its text.
        ModelError, LimitError
            As `rows`.
        """
        for index, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
            if prompt and not text.startswith(prompt):
                raise SourceError(f"query {index}: its prompt is not the beginning of its text; correct the query file")
        encoded = self.trunk.encode(texts, offsets=True)
        chunks = [self.trunk.query_chunks(row, found, prompts[row]) for row, found in enumerate(encoded)]
        return self._sign(encoded, chunks, progress=progress)

    def token_scores(
        self,
        texts: Sequence[str],
        vectors: np.ndarray[Any, np.dtype[np.float32]],
        *,
        prompts: Sequence[str | None] | None = None,
    ) -> list[TokenScores]:
        """Split the inner products of each text's signature with vectors [K, dim] over the text's tokens.

        Holds float64 [K, tokens] and float32 [dim] for each text; take few at a time.

        Parameters
        ----------
        prompts
            The beginning of each text that does not count, as for `queries`.

        Raises
        ------
        ModelError, LimitError
            As `rows`.
        """
        encoded = self.trunk.encode(texts, offsets=True)
        prompts = prompts or [None] * len(texts)
        chunks = [
            chunk for row, found in enumerate(encoded) for chunk in self.trunk.query_chunks(row, found, prompts[row])
        ]
        scores = [np.zeros((len(vectors), len(found.ids)), np.float64) for found in encoded]
        wanted = torch.from_numpy(np.ascontiguousarray(vectors, np.float32)).to(self.trunk.device)
        totals = torch.zeros(len(texts), self.sketch.dim, device=self.trunk.device)
        lengths = [len(chunk) for chunk in chunks]
        for batch in plan_batches(lengths, max_tokens=self.plan.tokens, max_chunks=self.plan.chunks):
            todo = [chunks[index] for index in batch]
            computed = self._in_parts(todo, lambda part: self._chunk_contributions(part, encoded, wanted))
            for part, (found, signatures) in computed:
                for chunk, shares in zip(part, found, strict=True):
                    scores[chunk.row][:, chunk.start + 1 : chunk.stop] += shares[:, : len(chunk) - 1]
                totals.index_add_(0, torch.tensor([chunk.row for chunk in part], device=totals.device), signatures)
        norms = torch.linalg.vector_norm(totals, dim=1, keepdim=True).clamp_min(_FLOOR)
        if not all(np.isfinite(each).all() for each in scores) or not bool(norms.isfinite().all()):
            raise ModelError("a text has no finite signature: the model overflows; set model.dtype to float32")
        rounded = (totals / norms).half().float().cpu().numpy()
        return [
            TokenScores(found, each / norm, signature)
            for found, each, norm, signature in zip(encoded, scores, norms.cpu().double().numpy(), rounded, strict=True)
        ]

    @torch.inference_mode()
    def _chunk_contributions(
        self, batch: Sequence[Chunk], encoded: Sequence[Encoded], vectors: torch.Tensor
    ) -> tuple[np.ndarray[Any, np.dtype[np.float32]], torch.Tensor]:
        """Contributions float32 [chunks, vectors, positions], and signatures as `_chunk_signatures` gives them."""
        hidden, ids, lengths, starts = self._read(batch, encoded)
        found, signatures = self._head.contributions(hidden, ids, lengths, vectors, loss_start=starts)
        return found.cpu().numpy(), signatures.half().float()

    def _sign(
        self, encoded: Sequence[Encoded], chunks: Sequence[Sequence[Chunk]], *, progress: Progress
    ) -> RowSignatures:
        result = RowSignatures(
            np.zeros((len(encoded), self.sketch.dim), np.float16),
            np.array([len(found.ids) for found in encoded], np.int32),
            np.array([len(found) for found in chunks], np.int32),
        )
        done, total = 0, int(result.chunks.sum())
        for group in _groups(result.chunks, self.plan.pending_rows):
            todo = [chunk for row in group for chunk in chunks[row]]
            sums = _RowSums(result, group, device=self.trunk.device)
            lengths = [len(chunk) for chunk in todo]
            for batch in plan_batches(lengths, max_tokens=self.plan.tokens, max_chunks=self.plan.chunks):
                self._run([todo[index] for index in batch], encoded, sums)
                done += len(batch)
                progress(done, total)
            sums.finish()
        return result

    def _run(self, batch: Sequence[Chunk], encoded: Sequence[Encoded], sums: _RowSums) -> None:
        """Add the signatures of one micro-batch."""
        for part, signatures in self._in_parts(batch, lambda part: self._chunk_signatures(part, encoded)):
            sums.add([chunk.row for chunk in part], signatures)

    def _in_parts(
        self, batch: Sequence[Chunk], compute: Callable[[Sequence[Chunk]], _T]
    ) -> Iterator[tuple[Sequence[Chunk], _T]]:
        """One micro-batch; where the device runs out of memory, in smaller parts from then on."""
        start = 0
        while start < len(batch):
            part = batch[start : start + self._max_chunks]
            try:
                found = compute(part)
            except torch.OutOfMemoryError as error:
                self._halve(part, error)
                continue
            yield part, found
            start += len(part)

    def _halve(self, part: Sequence[Chunk], error: BaseException) -> None:
        """Go on with half as many chunks at a time."""
        if len(part) == 1:
            raise LimitError(
                f"{self.trunk.device} has no memory for one chunk of {len(part[0])} tokens; free some, or use "
                "a smaller model or dtype bfloat16"
            ) from error
        self._max_chunks = len(part) // 2
        self.halvings += 1
        _logger.warning(
            "%s ran out of memory at %d chunks of %d tokens; going on with %d chunks at a time",
            self.trunk.device,
            len(part),
            len(part[0]),
            self._max_chunks,
        )
        torch.cuda.empty_cache()

    @torch.inference_mode()
    def _chunk_signatures(self, batch: Sequence[Chunk], encoded: Sequence[Encoded]) -> torch.Tensor:
        """Chunk signatures rounded to float16, as float32 [chunks, dim]."""
        hidden, ids, lengths, starts = self._read(batch, encoded)
        return self._head.signatures(hidden, ids, lengths, loss_start=starts).half().float()

    def _read(
        self, batch: Sequence[Chunk], encoded: Sequence[Encoded]
    ) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
        """Hidden states, token ids, lengths and starts of the loss of some chunks."""
        lengths = [len(chunk) for chunk in batch]
        padded = np.zeros((len(batch), max(lengths)), np.int64)
        for slot, chunk in enumerate(batch):
            padded[slot, : len(chunk)] = encoded[chunk.row].ids[chunk.start : chunk.stop]
        ids = torch.from_numpy(padded).to(self.trunk.device)
        return self.trunk.hidden_states(ids, lengths), ids, lengths, [chunk.loss_start for chunk in batch]


class _RowSums:
    """Row signatures from chunk signatures: rows of one chunk at once, others when all theirs are in."""

    def __init__(self, result: RowSignatures, group: Sequence[int], *, device: torch.device) -> None:
        self._result = result
        self._several = [row for row in group if result.chunks[row] > 1]
        self._slots = {row: slot for slot, row in enumerate(self._several)}
        self._sums = torch.zeros(len(self._several), result.signature.shape[1], device=device)

    @torch.inference_mode()
    def add(self, rows: Sequence[int], signatures: torch.Tensor) -> None:
        """Take the signatures [chunks, dim] of chunks of these rows."""
        single = [index for index, row in enumerate(rows) if row not in self._slots]
        if len(single) == len(rows):
            self._store(rows, signatures)
            return
        several = [index for index, row in enumerate(rows) if row in self._slots]
        slots = torch.tensor([self._slots[rows[index]] for index in several], device=signatures.device)
        self._sums.index_add_(0, slots, signatures[torch.tensor(several, device=signatures.device)])
        if single:
            part = signatures[torch.tensor(single, device=signatures.device)]
            self._store([rows[index] for index in single], part)

    @torch.inference_mode()
    def finish(self) -> None:
        """Store the rows of several chunks, in parts: the scaled copy must not double the sums."""
        for start in range(0, len(self._several), 256):
            self._store(self._several[start : start + 256], self._sums[start : start + 256])

    def _store(self, rows: Sequence[int], signatures: torch.Tensor) -> None:
        norms = torch.linalg.vector_norm(signatures, dim=1, keepdim=True)
        scaled = (signatures / norms.clamp_min(_FLOOR)).half().cpu().numpy()
        broken = (~norms.isfinite()).squeeze(1).nonzero().squeeze(1).tolist()
        if broken:
            raise ModelError(
                f"row {rows[broken[0]]} of the batch has no finite signature: the model overflows on it; "
                "set model.dtype to bfloat16 or float32"
            )
        self._result.signature[list(rows)] = scaled


def _groups(chunks: np.ndarray[Any, np.dtype[np.int32]], pending_rows: int) -> Iterator[range]:
    """Runs of rows with at most `pending_rows` rows of several chunks each."""
    start, several = 0, 0
    for row, count in enumerate(chunks):
        if count > 1 and several == pending_rows:
            yield range(start, row)
            start, several = row, 0
        several += int(count > 1)
    if start < len(chunks):
        yield range(start, len(chunks))
