"""Named groups of trainable tensors: whole matrices, or low-rank terms s B A on some of them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bridgelm.model.grads import Gradient
from bridgelm.model.placement import AT_HAND, Placement


@dataclass
class Group:
    """Trainable tensors by the name of the weight: whole matrices in `full`, and pairs (A, B) of low-rank terms in
    `low`."""

    full: dict[str, Tensor] = field(default_factory=dict)
    low: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    scale: float = 1.0
    placement: Placement = AT_HAND  # where its tensors lie between uses
    points: frozenset[str] = frozenset()  # where it is part of the weights; none: everywhere but in the reference

    def flat(self) -> Gradient:
        """All tensors by a name of their own: the weight's name, or NAME:A and NAME:B of a low-rank term."""
        pairs = {f"{name}:{side}": t for name, ab in self.low.items() for side, t in zip("AB", ab, strict=True)}
        return {**self.full, **pairs}

    def clone(self) -> Group:
        def copy(t: Tensor) -> Tensor:
            return t.detach().clone().requires_grad_()
        return Group({n: copy(t) for n, t in self.full.items()},
                     {n: (copy(a), copy(b)) for n, (a, b) in self.low.items()}, self.scale)

    def delta(self, name: str) -> Tensor:
        """The low-rank term s B A of a weight, as a new tensor of the weight's shape."""
        a, b = self.low[name]
        return (b.detach() @ a.detach()).mul_(self.scale)

    def zeros(self) -> Gradient:
        """An empty gradient of the group."""
        return {name: self.placement.zeros(t) for name, t in self.flat().items()}

    def collect(self, into: Gradient, name: str, g: Tensor) -> None:
        """Adds G = dL/dW of one weight to the gradients of what the weight is made of: G itself for a whole matrix,
        s B^T G for A, and s G A^T for B."""
        if name in self.full:
            into[name] += g
        if name in self.low:
            a, b = self.low[name]
            into[f"{name}:A"] += self.scale * (b.detach().T @ g)
            into[f"{name}:B"] += self.scale * (g @ a.detach().T)


def low_rank(shapes: Mapping[str, torch.Size], rank: int, alpha: float, dtype: torch.dtype, device: torch.device,
             seed: int, salt: str) -> Group:
    """Low-rank terms at LoRA's usual start: A is uniform and B is zero, so that the term is zero but has a gradient."""
    low = {}
    for name, (rows, columns) in shapes.items():
        generator = torch.Generator().manual_seed(seed + zlib.crc32(f"{salt}/{name}".encode()))
        a = (torch.rand(rank, columns, generator=generator, dtype=dtype) * 2 - 1) / columns**0.5
        b = torch.zeros(rows, rank, dtype=dtype)
        low[name] = (a.to(device).requires_grad_(), b.to(device).requires_grad_())
    return Group(low=low, scale=alpha / rank)


def trainable(groups: Iterable[Group]) -> set[str]:
    """The names of all weights that some group has a part in."""
    return {name for group in groups for name in (*group.full, *group.low)}


def stacked(groups: Iterable[Group]) -> dict[str, tuple[Tensor, Tensor]]:
    """The sum of several groups' low-rank terms as one term (A, B) for each matrix, of the rank that theirs add up to:
    A = [A1; A2] and B = [s1 B1, s2 B2], which contains the scales."""
    groups = list(groups)
    out = {}
    for name in dict.fromkeys(name for group in groups for name in group.low):
        parts = [(a.detach(), group.scale * b.detach()) for group in groups if name in group.low
                 for a, b in (group.low[name],)]
        out[name] = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], 1)
    return out
