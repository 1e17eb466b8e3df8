"""Advantages from rewards; and schedules, that of the learning rate among them. Pure functions on numpy arrays
and rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bridgelm.types import Norm, Row, Verdict


def groups_of(rows: Sequence[Row]) -> list[list[int]]:
    """Indices of the rows of each group, in order of first appearance. Rows the grader failed on are left out."""
    found: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        if row.kind == "rollout":
            found.setdefault(row.group, [])
            if row.verdict is not Verdict.ERROR:
                found[row.group].append(i)
    return list(found.values())


def centre(rewards_G: np.ndarray) -> np.ndarray:
    """Exactly zero for equal rewards: the mean of six times 0.1 is not quite 0.1."""
    return rewards_G - rewards_G.mean() if np.ptp(rewards_G) else np.zeros_like(rewards_G)


def zscore(rewards_G: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    return centre(rewards_G) / (rewards_G.std(ddof=0) + eps)


def leave_one_out(rewards_G: np.ndarray) -> np.ndarray:
    """Each reward less the mean of the others: the baseline is independent of the sample, so products stay unbiased."""
    n = len(rewards_G)
    return centre(rewards_G) * n / (n - 1)


def with_advantages(rows: Sequence[Row], std: bool = False, norm: Norm = "token", constant: float = 1.0,
                    mask_overlong: bool = False, name: str = "pg") -> list[Row]:
    """Adds the policy-gradient stream. A zero advantage still counts in the denominator; failed grades do not, nor do
    groups with fewer than two graded samples."""
    out = list(rows)
    for group in groups_of(rows):
        if len(group) < 2:
            continue
        rewards = np.array([rows[i].reward for i in group], dtype=np.float64)
        advantages = zscore(rewards) if std else centre(rewards)
        for i, advantage in zip(group, advantages, strict=True):
            if not (mask_overlong and not rows[i].finished):
                out[i] = rows[i].with_stream(name, advantage, norm, constant)
    return out


def group_advantages(rows: Sequence[Row], std: bool = False,
                     baseline: Callable[[Row], bool] | None = None) -> dict[int, float]:
    """The advantage of every graded row, by index, in groups with two or more of them. `baseline` says whose rewards
    the group's mean and deviation are taken over: all of them unless given; without any the group is left out."""
    found: dict[int, float] = {}
    for group in groups_of(rows):
        rewards = np.array([rows[i].reward for i in group], dtype=np.float64)
        base = rewards if baseline is None else rewards[[baseline(rows[i]) for i in group]]
        if len(group) < 2 or not len(base):
            continue
        first = base[0]  # exactly zero for equal rewards
        advantages = rewards - (first + (base - first).mean())
        if std and np.ptp(base):  # a part of a group that is flat has no deviation to divide the others by
            advantages = advantages / (base.std(ddof=0) + 1e-6)
        found |= dict(zip(group, advantages.tolist(), strict=True))
    return found


def mean_rewards(rows: Sequence[Row]) -> dict[int, float]:
    """The mean reward of each group that has graded rows; exact for equal rewards, as the mean of six times 0.1 is not
    quite 0.1."""
    graded: dict[int, list[float]] = {}
    for row in rows:
        if row.verdict is not Verdict.ERROR:
            graded.setdefault(row.group, []).append(row.reward)
    return {group: r[0] + float(np.mean([x - r[0] for x in r])) for group, r in graded.items()}


def spread(rows: Sequence[Row]) -> dict[int, bool]:
    """Whether a group's rewards differ, which is what it can teach with."""
    return {rows[g[0]].group: len({rows[i].reward for i in g}) > 1 for g in groups_of(rows) if g}


def means(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean of each name's values; a name without values is left out."""
    return {name: float(np.mean(v)) for name, v in values.items() if v.size}


def schedule(kind: str, start: float, end: float, progress: float) -> float:
    """A value between start (progress 0) and end (progress 1)."""
    progress = min(max(progress, 0.0), 1.0)
    if kind == "constant":
        return start
    share = progress if kind == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
    return start + (end - start) * share


def warm_cosine(step: int, warmup: int, decay: int, peak: float, valley: float) -> float:
    """Rises from 0 to `peak` in `warmup` steps, falls along a cosine to `valley` in `decay` more, and stays there."""
    if step < warmup:
        return peak * step / warmup
    return schedule("cosine", peak, valley, (step - warmup) / decay if step < warmup + decay else 1.0)


def rate_factor(kind: str, warmup: int, final: float, step: int, steps: int) -> float:
    """What the learning rate is multiplied with at this step (counted from 0)."""
    if step < warmup:
        return (step + 1) / warmup
    return schedule(kind, 1.0, final, (step - warmup) / max(1, steps - warmup - 1))
