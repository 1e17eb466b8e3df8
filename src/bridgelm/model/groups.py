"""Named groups of trainable tensors: whole matrices, or low-rank terms s B A on some of them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bridgelm.model.grads import Gradient


@dataclass
class Group:
    """Trainable tensors by weight name: `full` matrices, and pairs (A, B) of a low-rank term."""

    full: dict[str, Tensor] = field(default_factory=dict)
    low: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    scale: float = 1.0
    gradients: dict[str, Any] = field(default_factory=dict)  # their dtype and device, where the tensors' are others

    def flat(self) -> Gradient:
        pairs = {f"{name}:{side}": t for name, ab in self.low.items() for side, t in zip("AB", ab, strict=True)}
        return {**self.full, **pairs}

    def clone(self) -> Group:
        def copy(t: Tensor) -> Tensor:
            return t.detach().clone().requires_grad_()
        return Group({n: copy(t) for n, t in self.full.items()},
                     {n: (copy(a), copy(b)) for n, (a, b) in self.low.items()}, self.scale)

    def delta(self, name: str) -> Tensor:
        a, b = self.low[name]
        return (b.detach() @ a.detach()).mul_(self.scale)  # a tensor of its own, as large as a weight

    def zeros(self) -> Gradient:
        return {name: torch.zeros_like(t, requires_grad=False, **self.gradients) for name, t in self.flat().items()}

    def collect(self, into: Gradient, name: str, g: Tensor) -> None:
        """From G = dL/dW of one weight to the gradients of what it is made of: G, s G A^T and s B^T G."""
        if name in self.full:
            into[name] += g
        if name in self.low:
            a, b = self.low[name]
            into[f"{name}:A"] += self.scale * (b.detach().T @ g)
            into[f"{name}:B"] += self.scale * (g @ a.detach().T)


def low_rank(shapes: Mapping[str, torch.Size], rank: int, alpha: float, dtype: torch.dtype, device: torch.device,
             seed: int, salt: str) -> Group:
    """LoRA's usual start: A uniform, B zero, so that the term is zero but has a gradient."""
    low = {}
    for name, (rows, columns) in shapes.items():
        generator = torch.Generator().manual_seed(seed + zlib.crc32(f"{salt}/{name}".encode()))
        a = (torch.rand(rank, columns, generator=generator, dtype=dtype) * 2 - 1) / columns**0.5
        b = torch.zeros(rows, rank, dtype=dtype)
        low[name] = (a.to(device).requires_grad_(), b.to(device).requires_grad_())
    return Group(low=low, scale=alpha / rank)


def trainable(groups: Iterable[Group]) -> set[str]:
    return {name for group in groups for name in (*group.full, *group.low)}


def stacked(groups: Iterable[Group]) -> dict[str, tuple[Tensor, Tensor]]:
    """The sum of low-rank terms as one term (A, B) a matrix, its rank the sum of theirs: [A1; A2] and [s1 B1, s2 B2].
    The scales are in B."""
    groups = list(groups)
    out = {}
    for name in dict.fromkeys(name for group in groups for name in group.low):
        parts = [(a.detach(), group.scale * b.detach()) for group in groups if name in group.low
                 for a, b in (group.low[name],)]
        out[name] = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], 1)
    return out
