"""How a large tensor is put away while it is not used: in pinned host memory, or in bfloat16. Rounding to bfloat16 is
stochastic, so that steps far below its spacing add up in the mean. `placement.py` says which tensors are put away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PIECE = 2**24  # how many elements are rounded at once


def to_host(t: Tensor) -> Tensor:
    """A copy in pinned host memory, which is read back fast. A tensor that is not on a GPU lies in host memory already
    and is returned as it is."""
    if t.device.type != "cuda":
        return t
    return torch.empty_like(t, device="cpu", pin_memory=True).copy_(t)


@dataclass
class Noise:
    """Random words for rounding. They depend on the seed, on how many tensors were rounded before, and on the place of
    an element in the whole tensor: each rank draws for its rows what a single process draws for them."""

    seed: int
    first_row: Callable[[str], int] = lambda name: 0  # where this rank's shard of a weight begins
    count: int = 0  # how many tensors were rounded so far

    def words(self, name: str, t: Tensor) -> tuple[Tensor, Tensor]:
        """A random word for each row of a matrix, and one for each column."""
        keys = np.random.SeedSequence((self.seed, self.count)).generate_state(2).view(np.int32).tolist()
        self.count += 1
        first = self.first_row(name)
        ranges = (range(first, first + len(t)), range(t.shape[1]))
        rows, columns = (torch.arange(r.start, r.stop, dtype=torch.int32, device=t.device) for r in ranges)
        return mixed(rows.add_(keys[0]))[:, None], mixed(columns.add_(keys[1]))


def mixed(words: Tensor) -> Tensor:
    """Mixes the 32 bits of each word, in place, so that every bit comes to depend on all of them (the last step of
    MurmurHash3)."""
    for shift, factor in ((16, 0x85EBCA6B - 2**32), (13, 0xC2B2AE35 - 2**32), (16, 1)):
        words.bitwise_xor_((words >> shift).bitwise_and_(2**(32 - shift) - 1)).mul_(factor)
    return words


def rounded(t: Tensor, name: str, noise: Noise) -> Tensor:
    """A tensor in bfloat16, rounded up or down with the probabilities that make the mean exact: the sixteen bits that
    are cut off are added to sixteen random ones, and the carry goes to the bits that stay."""
    out = torch.empty_like(t, dtype=torch.bfloat16)
    matrix, target = (x.flatten(1) if x.dim() > 1 else x[:, None] for x in (t, out))
    rows, columns = noise.words(name, matrix)
    at_once = max(1, PIECE // max(1, matrix.shape[1]))
    for part, into, words in zip(*(x.split(at_once) for x in (matrix, target, rows)), strict=True):
        bits = mixed(words + columns).bitwise_and_(2**16 - 1).add_(part.float().view(torch.int32))
        into.copy_(bits.bitwise_and_(-(2**16)).view(torch.float32))
    return out
