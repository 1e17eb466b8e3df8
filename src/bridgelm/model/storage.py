"""Where large tensors lie while they are not used: in host memory, or in bfloat16, rounded stochastically, so that
steps far below its spacing add up in the mean. An optimiser steps them one after the other, each brought to the device
in full precision and put back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bridgelm.model import grads, optim

PIECE = 2**24  # elements that are rounded at once


def to_host(t: Tensor) -> Tensor:
    """Pinned, so that the way back is fast. What is no GPU's is there already."""
    if t.device.type != "cuda":
        return t
    return torch.empty_like(t, device="cpu", pin_memory=True).copy_(t)


@dataclass
class Noise:
    """Random words for rounding. They follow from the seed, how many tensors were rounded before, and where an element
    lies in the whole tensor: each rank draws for its rows what one process draws for them."""

    seed: int
    first_row: Callable[[str], int] = lambda name: 0  # of this rank's part of a weight
    count: int = 0

    def words(self, name: str, t: Tensor) -> tuple[Tensor, Tensor]:
        """For each row, and each column, of a matrix."""
        keys = np.random.SeedSequence((self.seed, self.count)).generate_state(2).view(np.int32).tolist()
        self.count += 1
        first = self.first_row(name)
        ranges = (range(first, first + len(t)), range(t.shape[1]))
        rows, columns = (torch.arange(r.start, r.stop, dtype=torch.int32, device=t.device) for r in ranges)
        return mixed(rows.add_(keys[0]))[:, None], mixed(columns.add_(keys[1]))


def mixed(words: Tensor) -> Tensor:
    """In place: each bit of a word of 32 comes to depend on all of them (the last step of MurmurHash3)."""
    for shift, factor in ((16, 0x85EBCA6B - 2**32), (13, 0xC2B2AE35 - 2**32), (16, 1)):
        words.bitwise_xor_((words >> shift).bitwise_and_(2**(32 - shift) - 1)).mul_(factor)
    return words


def rounded(t: Tensor, name: str, noise: Noise) -> Tensor:
    """To bfloat16, up or down with the probabilities that make the mean exact: the sixteen bits that are cut off, and
    as many at random, carry into those that stay."""
    out = torch.empty_like(t, dtype=torch.bfloat16)
    matrix, target = (x.flatten(1) if x.dim() > 1 else x[:, None] for x in (t, out))
    rows, columns = noise.words(name, matrix)
    at_once = max(1, PIECE // max(1, matrix.shape[1]))
    for part, into, words in zip(*(x.split(at_once) for x in (matrix, target, rows)), strict=True):
        bits = mixed(words + columns).bitwise_and_(2**16 - 1).add_(part.float().view(torch.int32))
        into.copy_(bits.bitwise_and_(-(2**16)).view(torch.float32))
    return out


@dataclass(frozen=True)
class Form:
    """How tensors lie between uses."""

    dtype: torch.dtype | None = None  # None: as they are used
    host: bool = False

    def lay(self, t: Tensor, name: str, noise: Noise) -> Tensor:
        if self.dtype == torch.bfloat16 and t.is_floating_point() and not t.is_meta:
            t = rounded(t, name, noise)
        elif self.dtype is not None and t.is_floating_point():
            t = t.to(self.dtype)
        return to_host(t) if self.host else t


PLAIN = Form()


@torch.no_grad()
def step(optimiser: torch.optim.Optimizer, parts: Iterable[tuple[str, Tensor, Tensor]], weights: Form, moments: Form,
         dtype: torch.dtype, noise: Noise) -> float:
    """One step of every (name, weight, gradient); the norm of what the optimiser's state says that it moved."""
    squares = {}
    for name, p, gradient in parts:
        p.data = p.data.to(gradient.device, dtype)
        state = optimiser.state[p]
        for key, value in state.items():
            if _large(value):
                state[key] = value.to(gradient.device, dtype if value.dtype == torch.bfloat16 else value.dtype)
        p.grad = gradient
        optimiser.step()
        p.grad = None
        squares[name] = optim.square_of_step(optimiser, p)
        p.data = weights.lay(p.data, name, noise)
        for key, value in sorted(state.items()):  # rounding draws in this order, in a resumed run as well
            if _large(value):
                state[key] = moments.lay(value, name, noise)
    return math.sqrt(grads.total(squares))


def _large(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
