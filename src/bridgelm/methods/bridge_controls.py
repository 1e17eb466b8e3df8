"""Controls of BRIDGE's third term: what stands in the place of the bracket of (3). They leave (1) as it is.

Without a shadow: `rl` keeps grad_w J_RL(theta, w) alone, as if theta^ were an RL optimum, and `sft` nothing, as if
theta^ were theta. `frozen` leaves theta^ at its start. Two placebos: `noise` of the bracket's norm, and `permuted`, the
bracket with the advantages dealt out to other answers. `gain` is the method itself, (2) and (3) as they are.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from bridgelm import dist
from bridgelm.model import grads
from bridgelm.model.grads import Gradient
from bridgelm.model.policy import Grads
from bridgelm.types import Batch, Row


class Third:
    """What the option `third` makes of the third term."""

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.seed = kind, seed
        self.has_shadow = kind not in ("rl", "sft")
        self.moves_shadow = self.has_shadow and kind != "frozen"

    def dealt(self, rows: list[Row], step: int) -> list[Row]:
        """Adds the stream `placebo` for the control `permuted`."""
        return deal_out(rows, self.draws(step)) if self.kind == "permuted" else rows

    def without_shadow(self, rl: Grads) -> Grads:
        """The shadow's gradient of w is taken to be zero (`rl`), or that at theta (`sft`)."""
        return Grads({}, grads.mix((1.0 if self.kind == "sft" else 0.0, rl.w)), {}, {})

    def placebo(self, batch: Batch, gradient: Callable[[Batch], Grads]) -> Gradient:
        """w's RL gradient at a point by advantages that are not the answers' own, for the control `permuted`."""
        return gradient(with_placebo(batch)).w if self.kind == "permuted" else {}

    def bracket(self, gain: Gradient, placebo: Gradient, placebo_shadow: Gradient, step: int) -> Gradient:
        """The gradient of the gain, but for the two placebos."""
        if self.kind == "noise":
            return noise_like(gain, self.draws(step))
        return grads.mix((1.0, placebo), (-1.0, placebo_shadow)) if self.kind == "permuted" else gain

    def draws(self, step: int) -> np.random.Generator:
        """The random draws, which are the same in a resumed run."""
        return np.random.default_rng((self.seed, step, zlib.crc32(self.kind.encode())))


def deal_out(rows: list[Row], draws: np.random.Generator) -> list[Row]:
    """Adds the stream `placebo`: the advantage of some row of the step, each handed out once, flat groups included."""
    out, with_one = list(rows), [i for i, row in enumerate(rows) if "pg" in row.streams]
    for i, giver in zip(with_one, draws.permutation(with_one), strict=True):
        stream, advantage = rows[i].streams["pg"], rows[giver].streams["pg"].weight[0]
        out[i] = rows[i].with_stream("placebo", advantage, stream.norm, stream.constant, stream.mask)
    return out


def with_placebo(batch: Batch) -> Batch:
    """The placebo in the place of the advantages; masks, and with them the counts, stay."""
    rows = (replace(row, streams={**row.streams, **dict.fromkeys(("pg", "shadow"), row.streams["placebo"])})
            if "placebo" in row.streams else row for row in batch.rows)
    return replace(batch, rows=tuple(rows))


def noise_like(gradient: Gradient, draws: np.random.Generator) -> Gradient:
    """Gaussian noise of a gradient's norm."""
    noise, counts = {}, grads.rows(gradient)
    for name, g in gradient.items():
        whole = draws.standard_normal((counts[name], *g.shape[1:]))
        noise[name] = torch.from_numpy(whole if len(g) == len(whole) else whole[slice(*dist.bounds(len(whole)))]).to(g)
    return grads.mix((grads.norm(gradient) / grads.norm(noise), noise))
