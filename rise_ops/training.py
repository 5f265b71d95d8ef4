"""Continued pretraining: a plain loop that gives the same weights for the same rows, configuration and seed.

Rows are token ids, an end-of-text token behind each where the tokenizer has one. Each epoch puts them in an order of
its own, drawn by the seed, and cuts the stream of all of them into sequences of `context` tokens; the last one may be
shorter. The loss is the mean cross-entropy of the predicted tokens of a step's sequences. AdamW (arXiv 1711.05101)
with betas 0.9 and 0.95, decay of matrices only, a linear rise and then a cosine (arXiv 1608.03983) that ends at 0, the
gradient's norm clipped. Weights and optimizer are float32 and dropout is off, so nothing is drawn but the order of
rows: on a CPU two runs with as many threads are equal to the bit, also where one was interrupted. Kernels of a GPU may
add in another order.

    <folder>/<step>.safetensors    weights and optimizer after so many steps
    <folder>/<step>.json           losses so far, and the checksum of the other; written last

Checkpoints are for going on after an interruption, and are removed with the end of the training. In memory are all
token ids (4 bytes each), and weights, gradients and two moments (16 bytes a parameter).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors

from rise_ops.checksums import stored_crc32c
from rise_ops.compare_config import ClosedLoopConfig
from rise_ops.config import ModelConfig
from rise_ops.errors import IntegrityError, MissingObjectError, ModelError
from rise_ops.progress import Progress, silent
from rise_ops.shapes import Checksum
from rise_ops.spool import spool
from rise_ops.store import Store
from rise_ops.trunk import Trunk, load_trunk

CHECKPOINT_FORMAT = 1

_BETAS = (0.9, 0.95)
_LOGIT_BYTES = 256 * 2**20
"""Of a forward pass; the sequences of a step go through the model in as many passes as that takes."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
_NOTHING = -1
"""Fills up the last sequence."""

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Token ids of all rows, one after the other."""

    ids: Int32Array
    ends: npt.NDArray[np.int64]
    """Of each row: one past its last id."""

    @classmethod
    def of(cls, rows: Iterable[Int32Array], *, eos: int | None) -> TokenRows:
        """Rows with `eos` behind each that does not end with it."""
        parts: list[Int32Array] = []
        for ids in rows:
            closed = eos is None or (len(ids) > 0 and ids[-1] == eos)
            parts.append(ids if closed else np.append(ids, np.int32(eos or 0)).astype(np.int32))
        sizes = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return cls(np.concatenate([np.empty(0, np.int32), *parts]), sizes)

    def sequences(self, context: int, *, seed: int, epoch: int) -> Int32Array:
        """[sequences, context] of an epoch; the last one is filled up with −1."""
        order = np.random.default_rng([1, seed, epoch]).permutation(len(self.ends))
        starts = np.concatenate([[0], self.ends[:-1]])
        stream = np.concatenate([self.ids[starts[row] : self.ends[row]] for row in order.tolist()])
        found = np.full((-(-len(stream) // context), context), _NOTHING, np.int32)
        found.reshape(-1)[: len(stream)] = stream
        return found


@dataclass(frozen=True, slots=True)
class Training:
    """What a training was."""

    steps: int
    tokens: int
    """Read in all epochs, end-of-text tokens included."""
    losses: list[float]
    """Of each step, before it, in nats a token."""


def fresh_trunk(config: ModelConfig) -> Trunk:
    """A copy of the configured model in float32 that may be changed; the process' own one stays as it is.

    Raises
    ------
    ModelError, LimitError
        As `rise_ops.trunk.load_trunk`; or its weights are quantised.
    """
    trunk = load_trunk(config)
    if trunk.engine.is_rounded:
        raise ModelError(f"model {trunk.name} is quantised and cannot be trained; take a checkpoint that is not")
    model, tokenizer = copy.deepcopy(trunk.model).float(), copy.deepcopy(trunk.tokenizer)
    return Trunk(model, tokenizer, name=trunk.name, fingerprint=trunk.fingerprint)


def encoded_rows(trunk: Trunk, texts: Iterable[Sequence[str]]) -> TokenRows:
    """Token ids of texts, which come in batches."""
    encoded = (each.ids for batch in texts for each in trunk.encode(batch))
    eos = trunk.tokenizer.eos_token_id
    return TokenRows.of(encoded, eos=None if eos is None else int(eos))


def learning_rate(step: int, steps: int, config: ClosedLoopConfig) -> float:
    """Of a step, counted from 0: rises over the first part of the steps, then falls as half a cosine."""
    rising = int(config.warmup * steps)
    if step < rising:
        return config.learning_rate * (step + 1) / rising
    return config.learning_rate * (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


def train(trunk: Trunk, rows: TokenRows, config: ClosedLoopConfig, *, seed: int,
          checkpoints: Checkpoints | None = None, progress: Progress = silent) -> Training:  # fmt: skip
    """Train a model on rows, going on from the latest checkpoint if there is one.

    Parameters
    ----------
    trunk
        Whose model is changed, such as `fresh_trunk` gives.
    progress
        Counts steps.

    Raises
    ------
    ModelError
        The loss is not finite any more, or the model reads fewer tokens than `context`.
    """
    if trunk.max_positions is not None and config.context > trunk.max_positions:
        raise ModelError(
            f"closed_loop.context is {config.context}, model {trunk.name} reads {trunk.max_positions} tokens; give less"
        )
    per_epoch = -(-len(rows.ids) // (config.context * config.batch))
    steps = config.epochs * per_epoch
    trunk.model.requires_grad_(True)
    optimizer = _optimizer(trunk.model, config)
    losses = checkpoints.restore(trunk.model, optimizer) if checkpoints else []
    for step, sequences in _batches(rows, config, seed=seed, first=len(losses), per_epoch=per_epoch):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, config)
        losses.append(_step(trunk, optimizer, sequences, clip=config.clip))
        if not math.isfinite(losses[-1]):
            raise ModelError(
                f"training of {trunk.name} diverged: the loss of step {step + 1} of {steps} is {losses[-1]}; lower "
                "closed_loop.learning_rate"
            )
        if checkpoints and (step + 1) % config.checkpoint_steps == 0 and step + 1 < steps:
            checkpoints.save(trunk.model, optimizer, losses)
        progress(step + 1, steps)
    trunk.model.requires_grad_(False)
    return Training(steps, config.epochs * len(rows.ids), losses)


def _batches(rows: TokenRows, config: ClosedLoopConfig, *, seed: int, first: int, per_epoch: int,
             ) -> Iterator[tuple[int, torch.Tensor]]:  # fmt: skip
    """(step, its sequences) from step `first` on."""
    for epoch in range(first // per_epoch, config.epochs):
        sequences = rows.sequences(config.context, seed=seed, epoch=epoch)
        for place in range(max(0, first - epoch * per_epoch), per_epoch):
            own = sequences[place * config.batch : (place + 1) * config.batch]
            yield epoch * per_epoch + place, torch.from_numpy(own.astype(np.int64))


def _optimizer(model: Any, config: ClosedLoopConfig) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    matrices = [each for each in parameters if each.ndim >= 2]
    others = [each for each in parameters if each.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=_BETAS, foreach=False)


def _step(trunk: Trunk, optimizer: torch.optim.AdamW, sequences: torch.Tensor, *, clip: float) -> float:
    """One step of the optimizer. Returns the loss before it."""
    counted = max(1, int((sequences[:, 1:] != _NOTHING).sum()))
    at_once = max(1, _LOGIT_BYTES // (4 * trunk.vocab_size * sequences.shape[1]))
    total = 0.0
    with torch.enable_grad():
        for part in sequences.to(trunk.device).split(at_once):
            logits = trunk.model(input_ids=part.clamp_min(0), use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), part[:, 1:].flatten(), ignore_index=_NOTHING, reduction="sum"
            )
            (loss / counted).backward()
            total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(trunk.model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total / counted


@dataclass(frozen=True, slots=True)
class CheckpointShape:
    """<folder>/<step>.json."""

    losses: list[float]
    crc32c: Checksum


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The states of one training, below a folder of the store; the latest complete one counts."""

    store: Store
    folder: str

    def save(self, model: Any, optimizer: torch.optim.AdamW, losses: Sequence[float]) -> None:
        """Keep the state after the steps whose losses these are, and then none before it."""
        older, name = self._names(), f"{self.folder}/{len(losses):08d}"
        self.store.delete([f"{name}.safetensors"])  # what an interrupted training left there, which may differ
        with spool() as folder:
            path = folder / "state.safetensors"
            safetensors.save_file(_state(model, optimizer), path)
            self.store.create_from_file(f"{name}.safetensors", path)
        record = {"format_version": CHECKPOINT_FORMAT, "losses": list(losses)}
        self.store.create_json(f"{name}.json", {**record, "crc32c": stored_crc32c(self.store, f"{name}.safetensors")})
        self._remove(older)

    def restore(self, model: Any, optimizer: torch.optim.AdamW) -> list[float]:
        """Load the latest complete state, if there is one. Returns the losses of its steps."""
        for name in reversed(self._names()):
            key = f"{self.folder}/{name}"
            try:
                record = self.store.get_json(f"{key}.json", format_version=CHECKPOINT_FORMAT, shape=CheckpointShape)
                if stored_crc32c(self.store, f"{key}.safetensors") == record["crc32c"]:
                    _load(
                        model, optimizer, safetensors.load(self.store.get(f"{key}.safetensors")), len(record["losses"])
                    )
                    return [float(loss) for loss in record["losses"]]
            except (MissingObjectError, IntegrityError, SafetensorError):
                continue  # the one before is as good
        return []

    def clear(self) -> None:
        """Remove all states."""
        self._remove(self._names())

    def _names(self) -> list[str]:
        """Steps of which something is there, ascending."""
        return sorted({name.partition(".")[0] for name in self.store.children(self.folder)})

    def _remove(self, names: Sequence[str]) -> None:
        for ending in ("json", "safetensors"):  # what vouches for the other first
            if names:
                self.store.delete([f"{self.folder}/{name}.{ending}" for name in names])


def _state(model: Any, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        found[f"weight/{name}"] = parameter.detach().contiguous()
        for moment in _MOMENTS:
            found[f"{moment}/{name}"] = optimizer.state[parameter][moment].contiguous()
    return found


@torch.no_grad()
def _load(model: Any, optimizer: torch.optim.AdamW, state: dict[str, torch.Tensor], steps: int) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(state[f"weight/{name}"])
        moments = {moment: state[f"{moment}/{name}"].to(parameter.device) for moment in _MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **moments}
