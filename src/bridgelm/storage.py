"""Where large tensors lie while they are not used: in host memory, or in bfloat16, rounded stochastically, so that
steps far below its spacing add up in the mean. An optimiser steps them one after the other, each brought to the device
in full precision and put back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bridgelm import optim


def to_host(t: Tensor) -> Tensor:
    """Pinned, so that the way back is fast. What is no GPU's is there already."""
    if t.device.type != "cuda":
        return t
    return torch.empty_like(t, device="cpu", pin_memory=True).copy_(t)


def rounded(t: Tensor, generator: torch.Generator) -> Tensor:
    """To bfloat16, up or down with the probabilities that make the mean exact: the sixteen bits that are cut off, and
    as many at random, carry into those that stay."""
    bits = t.float().view(torch.int32)
    noise = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=t.device, generator=generator)
    return noise.add_(bits).bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)


@dataclass(frozen=True)
class Form:
    """How tensors lie between uses."""

    dtype: torch.dtype | None = None  # None: as they are used
    host: bool = False

    def lay(self, t: Tensor, generator: torch.Generator) -> Tensor:
        if self.dtype == torch.bfloat16 and t.is_floating_point() and not t.is_meta:
            t = rounded(t, generator)
        elif self.dtype is not None and t.is_floating_point():
            t = t.to(self.dtype)
        return to_host(t) if self.host else t


PLAIN = Form()


@torch.no_grad()
def step(optimiser: torch.optim.Optimizer, gradients: Iterable[tuple[Tensor, Tensor]], weights: Form, moments: Form,
         dtype: torch.dtype, generator: torch.Generator) -> float:
    """One step of every (weight, gradient); the norm of what the optimiser's state says that it moved."""
    total = 0.0
    for p, gradient in gradients:
        p.data = p.data.to(gradient.device, dtype)
        state = optimiser.state[p]
        for key, value in state.items():
            if _large(value):
                state[key] = value.to(gradient.device, dtype if value.dtype == torch.bfloat16 else value.dtype)
        p.grad = gradient
        optimiser.step()
        p.grad = None
        total += optim.square_of_step(optimiser, p)
        p.data = weights.lay(p.data, generator)
        for key, value in state.items():
            if _large(value):
                state[key] = moments.lay(value, generator)
    return total**0.5


def _large(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
