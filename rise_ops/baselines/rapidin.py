"""RapidIn: gradients of all parameters, shuffled, sign-flipped and folded (Lin et al., 2024, arXiv 2405.11724).

Of each text the gradient of the mean loss with respect to every parameter, one backward pass a text. Each parameter's
gradient is divided by its own length (the paper's layer-wise normalisation), and all are laid one behind the other,
with zeros at the end up to a multiple of the width. This vector of N numbers is shuffled in rounds: laid out as a
matrix, its rows are permuted; laid out as another one, its columns. Then signs are flipped at random, and each run of
N / width numbers is added up. Influence is the inner product of two such vectors.

Shuffling moves every entry to the same place for all texts. So the rounds are done once, on the places: what is kept of
them is the run that each entry goes to, and a text's gradients are added to their runs parameter by parameter. That is
the same sum in another order, and no flat copy of the gradient is made. Vectors are scaled to unit length before they
are stored as float16, which the paper leaves out: the layer-wise normalisation makes their lengths nearly equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from rise_ops.baselines.base import Float32Array, Need, Query, Setting, VectorMethod
from rise_ops.baselines.language import Tokens, backward_bytes, batches, differentiable, token_losses, tokenized
from rise_ops.compare_config import RapidInMethod

_FLOOR = 1e-12


class Folding:
    """Where each entry of a vector goes, and with which sign.

    Parameters
    ----------
    entries
        Length of the vector.
    width
        Numbers that it is folded to.
    shuffles
        Rounds, each of rows and of columns.
    seed
        Of permutations and signs.
    """

    def __init__(self, entries: int, width: int, *, shuffles: int, seed: int) -> None:
        step = -(-entries // width)
        while len(sides := _sides(step * width)) == 0:  # a length that cannot be laid out as a matrix
            step += 1
        generator = torch.Generator().manual_seed(seed)
        rounds = []
        for _ in range(shuffles):
            for dim in (0, 1):
                side = sides[int(torch.randint(len(sides), (), generator=generator))]
                order = torch.randperm(side, generator=generator)
                rounds.append((dim, (side, -1) if dim == 0 else (-1, side), order))
        # where an entry ends up is where the rounds, undone from the last to the first, bring the run that is there
        runs = torch.arange(width, dtype=torch.int32).repeat_interleave(step)
        for dim, shape, order in reversed(rounds):
            runs = runs.view(shape).index_select(dim, order.argsort()).flatten()
        self.width = width
        self.runs = runs[:entries].clone()
        """int32 [entries]: the number that each entry is added to."""
        self.signs = (
            torch.randint(0, 2, (step * width,), generator=generator, dtype=torch.int8)[:entries].mul_(2).sub_(1)
        )
        """int8 [entries]: +1 or −1."""

    def to(self, device: torch.device) -> None:
        """Move to the model's device."""
        self.runs, self.signs = self.runs.to(device), self.signs.to(device)


class RapidIn(VectorMethod):
    """Folded full-parameter gradients.

    Parameters
    ----------
    setting, config
        With fewer parameters than its width, the width is the largest power of two below their number.
    """

    paper = "arXiv 2405.11724"
    draws = True
    differentiates = True

    def __init__(self, setting: Setting, config: RapidInMethod) -> None:
        super().__init__(setting)
        self._config = config

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return min(self._config.width, 1 << (self.setting.shape.parameters.bit_length() - 1))

    def need(self) -> Need:
        """Gradients, runs and signs of all parameters, a backward pass, vectors of a batch and of all queries."""
        shape, tokens = self.setting.shape, self._config.max_tokens
        entries = shape.parameters
        largest = 2 * 4 * shape.vocab_size * shape.hidden_dim  # a parameter's gradient, normalised and with its signs
        need = (4 + 4 + 1) * entries + largest + backward_bytes(shape, tokens) + self.vector_bytes()
        return Need(need, f"the gradient of {entries:,} parameters, a place and a sign for each, {tokens:,} tokens")

    def load(self) -> None:
        """The model, and where its parameters' gradients go."""
        super().load()
        entries = sum(each.numel() for each in self.trunk.model.parameters())
        self._folding = Folding(entries, self.width, shuffles=self._config.shuffles, seed=self.setting.seed)
        self._folding.to(self.trunk.device)

    def query_vectors(self, queries: Sequence[Query]) -> Float32Array:
        """Unit vectors; zeros for a text that predicts nothing."""
        texts = tokenized(self.trunk, queries, max_tokens=self._config.max_tokens)
        found = np.zeros((len(texts), self.width), np.float32)
        with differentiable(self.trunk):
            for place, each in enumerate(texts):
                if each.counted:
                    found[place] = self._one(each)
        return found

    def _one(self, text: Tokens) -> npt.NDArray[np.float32]:
        """The folded gradient of one text."""
        (batch,) = batches(self.trunk, [text])
        parameters = list(self.trunk.model.parameters())
        loss = token_losses(self.trunk, batch).sum() / batch.counts.sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        folded, start = torch.zeros(self.width, device=self.trunk.device), 0
        for parameter, gradient in zip(parameters, gradients, strict=True):
            stop = start + parameter.numel()
            if gradient is not None:
                flat = gradient.float().flatten()
                flat = flat / torch.linalg.vector_norm(flat).clamp_min(_FLOOR) * self._folding.signs[start:stop]
                folded.index_add_(0, self._folding.runs[start:stop], flat)
            start = stop
        return torch.nn.functional.normalize(folded, dim=0).cpu().numpy()


def _sides(entries: int) -> list[int]:
    """Divisors between the third and two thirds of the digits of a number."""
    low, high = entries ** (1 / 3), entries ** (2 / 3)
    found = {
        side for small in range(1, int(entries**0.5) + 1) if entries % small == 0 for side in (small, entries // small)
    }
    return sorted(side for side in found if low <= side <= high)
