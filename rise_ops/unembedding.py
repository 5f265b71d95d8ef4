"""The weight of an LM head, in one piece or in shards on several devices, and the products with it.

    z = W h (+ bias, × logit scale, soft-capped)        s = z / temperature

Products are computed where a shard lies, in float32 whatever the weights are. `logits` and `scaled` hold all V columns;
`candidates` takes a slice of the vocabulary at a time and keeps each row's largest entries: `[tokens, V]` logits are
then never whole, neither in memory nor on their way between devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from rise_ops.errors import ModelError
from rise_ops.support import Candidates, merge, top_entries

Top = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""Finds, in float32 [N, V], at least the k largest entries of each row and where they are."""


@dataclass(frozen=True, slots=True, eq=False)
class _Shard:
    """Some consecutive rows of the weight."""

    weight: torch.Tensor
    """[V_s, D]."""
    bias: torch.Tensor | None
    """float32 [V_s]."""
    start: int
    """The first row's vocabulary entry."""

    def slices(self, width: int) -> Iterator[_Shard]:
        """Views of `width` rows at most."""
        for start in range(0, self.weight.shape[0], width):
            rows = slice(start, start + width)
            bias = None if self.bias is None else self.bias[rows]
            yield _Shard(self.weight[rows], bias, self.start + start)


class Unembedding:
    """The LM head's weight and what is done to its logits.

    Parameters
    ----------
    weight
        [V, D], any floating dtype, on the device to compute on; or its shards [V_s, D] in the vocabulary's order, each
        on a device of its own choice. Results are on the device of the first.
    bias
        [V], wherever it is.
    logit_scale, soft_cap
        As for `rise_ops.head.ReadoutHead`.

    Raises
    ------
    ModelError
        Shards or bias do not fit together.
    """

    def __init__(
        self,
        weight: torch.Tensor | Sequence[torch.Tensor],
        *,
        bias: torch.Tensor | None = None,
        logit_scale: float = 1.0,
        soft_cap: float | None = None,
    ) -> None:
        parts = [weight] if isinstance(weight, torch.Tensor) else list(weight)
        shapes = [list(part.shape) for part in parts]
        if not parts or any(len(shape) != 2 or shape[1] != shapes[0][-1] for shape in shapes):
            raise ModelError(
                f"an LM head cannot have parts of shapes {shapes}; each is [rows of the vocabulary, width]"
            )
        sizes = [part.shape[0] for part in parts]
        if bias is not None and list(bias.shape) != [sum(sizes)]:
            raise ModelError(f"a bias of shape {list(bias.shape)} does not fit an LM head of {sum(sizes)} entries")
        self.vocab_size, self.hidden_dim = sum(sizes), parts[0].shape[1]
        self.device = parts[0].device
        self.longest = max(sizes)
        """Rows of the largest shard."""
        self.logit_scale = float(logit_scale)
        self.soft_cap = None if soft_cap is None else float(soft_cap)
        biases = [None] * len(parts) if bias is None else bias.detach().split(sizes)
        self._shards = []
        start = 0
        for part, each in zip(parts, biases, strict=True):
            own = None if each is None else each.to(part.device, torch.float32)
            self._shards.append(_Shard(_computable(part.detach()), own, start))
            start += part.shape[0]

    @property
    def shards(self) -> int:
        """How many pieces the weight is in."""
        return len(self._shards)

    def projected(self, matrix: torch.Tensor) -> torch.Tensor:
        """`W · matrix`, float32 [V, n], of `matrix` [D, n]: each shard's part is computed where it lies."""
        parts = []
        for shard in self._shards:
            local = matrix.to(shard.weight.device)
            parts += [(block.float() @ local).to(self.device) for block in shard.weight.split(8192)]
        return torch.cat(parts)

    def logits(self, hidden: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of the model, in float32: [N, D] → [N, V]; written into `out` [≥ N, V] where given."""
        rows = hidden.shape[0]
        target = None if out is None else out[:rows]
        if len(self._shards) == 1:
            return self._logits(hidden, self._shards[0], target)
        whole = torch.empty(rows, self.vocab_size, device=self.device) if target is None else target
        for shard in self._shards:
            whole[:, shard.start : shard.start + shard.weight.shape[0]] = self._logits(hidden, shard, None)
        return whole

    def scaled(self, hidden: torch.Tensor, temperature: float, *, out: torch.Tensor) -> torch.Tensor:
        """Logits divided by the temperature, float32 [N, V], in `out` [≥ N, V]; of a weight in one piece."""
        (shard,) = self._shards
        return self._scaled(hidden, shard, temperature, out[: hidden.shape[0]])

    def candidates(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        *,
        count: int,
        temperature: float,
        width: int,
        top: Top = top_entries,
    ) -> Candidates:
        """The `count` largest logits of each row, divided by the temperature, and those of the next tokens.

        The same as from whole rows of logits; where entries at the end are equal, any of them.

        Parameters
        ----------
        hidden
            [N, D] states.
        targets
            int64 [N] next tokens.
        count
            At most V.
        width
            Columns of logits at a time, at most.
        """
        found: Candidates | None = None
        for shard in self._shards:
            local, own = hidden.to(shard.weight.device), targets.to(shard.weight.device)
            for part in shard.slices(width):
                new = self._candidates(local, own, part, count, temperature, top)
                new = Candidates(*(each.to(self.device) for each in (new.values, new.tokens, new.own)))
                found = new if found is None else merge(found, new, count)
        assert found is not None
        # One slice alone may have brought more, or in no order.
        return merge(found, None, count)

    def _candidates(
        self, hidden: torch.Tensor, targets: torch.Tensor, part: _Shard, count: int, temperature: float, top: Top
    ) -> Candidates:
        """Those of one slice; the own logit is −∞ where the next token is not in it."""
        scaled = self._scaled(hidden, part, temperature, None)
        values, columns = top(scaled, min(count, scaled.shape[1]))
        places = targets - part.start
        inside = (places >= 0) & (places < scaled.shape[1])
        own = scaled.gather(1, places.clamp(0, scaled.shape[1] - 1)[:, None]).squeeze(1)
        return Candidates(values, columns + part.start, own.masked_fill(~inside, -torch.inf))

    def _logits(self, hidden: torch.Tensor, shard: _Shard, out: torch.Tensor | None) -> torch.Tensor:
        weight = shard.weight
        states = hidden.to(weight.device, weight.dtype)
        if weight.dtype == torch.float32:
            z = torch.mm(states, weight.t(), out=out)
        else:
            z = torch.mm(states, weight.t(), out_dtype=torch.float32, out=out)
        if shard.bias is not None:
            z.add_(shard.bias)
        if self.logit_scale != 1.0:
            z.mul_(self.logit_scale)
        if self.soft_cap is not None:
            z.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return z

    def _scaled(
        self, hidden: torch.Tensor, shard: _Shard, temperature: float, out: torch.Tensor | None
    ) -> torch.Tensor:
        if shard.weight.dtype != torch.float32 or shard.bias is not None or self.soft_cap is not None:
            return self._logits(hidden, shard, out).div_(temperature)
        # the factor on D numbers, not on V
        return torch.mm(hidden.float() * (self.logit_scale / temperature), shard.weight.t(), out=out)


def _computable(weight: torch.Tensor) -> torch.Tensor:
    """CPUs have no matrix product of 16-bit factors with a float32 result."""
    return weight.float() if weight.device.type == "cpu" else weight
