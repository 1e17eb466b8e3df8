"""An engine of its own samples from probabilities that are a little off the trainer's: other kernels, another order of
sums, another precision. What it drew is then off-policy.

With p the trainer's and q the engine's probability of a drawn token, E_q[min(c, p / q) f] stands in for E_p[f]:
truncated importance sampling, token by token, its variance bounded by c at the cost of a bias where p / q > c (Yao et
al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; c = 2 there). Every stream on drawn
tokens is such an expectation. Its mask and so its denominator stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bridgelm.types import Metrics, Row


def corrected(rows: Sequence[Row], cap: float) -> list[Row]:
    """The streams' weights times min(cap, p / q) on drawn tokens; a cap of 0 leaves them as they are."""
    return [row if row.mismatch is None or cap == 0 else _corrected(row, row.mismatch, cap) for row in rows]


def _corrected(row: Row, mismatch: np.ndarray, cap: float) -> Row:
    factor = np.where(row.drawn, np.exp(np.minimum(mismatch, np.log(cap))), 1.0)
    return replace(row, streams={name: replace(stream, weight=stream.weight * factor)
                                 for name, stream in row.streams.items()})


def measured(rows: Sequence[Row], cap: float) -> Metrics:
    """What d = log p - log q says over all drawn tokens: the mean and the largest |d|, KL(q || p) a token (e^d - 1 - d,
    which is never negative), and the share of tokens whose weight was cut."""
    gaps = [row.mismatch[row.drawn] for row in rows if row.mismatch is not None]
    d = np.concatenate([*gaps, np.empty(0)])
    if not d.size:
        return {}
    return {"engine/mismatch_mean": float(np.abs(d).mean()), "engine/mismatch_max": float(np.abs(d).max()),
            "engine/mismatch_kl": float(np.mean(np.expm1(d) - d)),
            "engine/truncated": float(np.mean(d > np.log(cap))) if cap else 0.0}


def warnings(found: Metrics, level: float) -> list[str]:
    """What a user should be told; the numbers are in the metrics, so that each text is said once."""
    if found.get("engine/mismatch_kl", 0.0) <= level:
        return []
    return [f"engine and trainer disagree by more than rollout.mismatch_warning = {level:g} (engine/mismatch_kl): look "
            "at engine/truncated, give both the same precision (model.dtype), and see docs/engines.md"]
