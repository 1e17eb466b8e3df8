"""Shuffle-R1 round any method with rollouts: which of its answers are trained on, and how often (arXiv 2508.05612).

    pairs of a group of 2N:  (best, worst), (2nd best, 2nd worst), ... by advantage; the first `keep` of them stay   (1)
    S times:  draw K/S of the batch's K kept pairs without replacement, in proportion to (|A_1| + |A_2|)^power       (2)
    a pair's two answers count as often in the wrapped method's loss as the pair was drawn, in the denominator too   (3)

Advantages stay those of the full group. The size of the batch stays that of the kept pairs: what flat groups would have
taken goes to pairs that are far apart, each at most S times. `rollout.group` is 2N: as many answers are sampled and
paid for as by the wrapped method alone. S = 1 is (1) alone; with `keep` = 1 too it is the wrapped method.

Our reading: (3) is a weight, where the official code copies rows: the same loss for fewer passes. Where too few pairs
have a weight the others fill the draws up evenly (the code would stop there); of an odd number of answers the middle
one is a pair by itself. With `rollout.updates` > 1 whole groups are dealt out, with all their times.

Trap: the draws are not corrected for: the gradient is biased towards groups whose rewards are far apart, on purpose.
And with binary rewards (1) only counts: which of the right answers is the best one is the order that they came in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import numpy as np
from torch import Tensor

from bridgelm.config.run_config import RunConfig
from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method
from bridgelm.model.policy import Policy
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row

Pair = tuple[int, ...]


@final
class ShuffleR1(Method):
    tier = "checked"
    form = Form(data="the wrapped method's", demo="the wrapped method's", rollout="the wrapped method's x times drawn",
                controller="best with worst; pairs drawn by |A|", models="the wrapped method's")

    def __init__(self, options: Any, run: RunConfig) -> None:
        from bridgelm.methods import build  # this file is in it

        super().__init__(options, run)
        self.inner = build(options.method, run)
        self.needs = self.inner.needs  # type: ignore[misc]
        self.measured: Metrics = {}

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        rows = self.inner.gather(data, roll, step)
        size = {i: advantage(row) for i, row in enumerate(rows)
                if row.kind == "rollout" and row.at == "live" and "pg" in row.streams}
        groups: dict[int, list[int]] = {}
        for i in size:
            groups.setdefault(rows[i].group, []).append(i)
        kept = [pair for group in groups.values()
                for pair in first(pairs(group, [size[i] for i in group]), self.options.keep)]                      # (1)
        if not kept:
            self.measured = {}
            return rows
        weights = np.array([self.weight([size[i] for i in pair]) for pair in kept]) ** self.options.power
        times = drawn(weights, self.options.draws, np.random.default_rng((self.run.seed, step, 3)))                # (2)
        count = dict.fromkeys(size, 0.0) | {i: float(n) for pair, n in zip(kept, times, strict=True) for i in pair}
        total = sum(count.values())
        self.measured = {
            "shuffle_r1/distinct": float(np.mean(times > 0)), "shuffle_r1/most": float(times.max()),
            "shuffle_r1/advantage": sum(n * abs(size[i]) for i, n in count.items()) / total,
            "shuffle_r1/advantage_all": float(np.mean(np.abs(list(size.values()))))}
        return [replace(row, times=row.times * count[i]) if i in count else row for i, row in enumerate(rows)]     # (3)

    def weight(self, advantages: Sequence[float]) -> float:
        kinds: dict[str, Callable[[], float]] = {
            "sum": lambda: sum(map(abs, advantages)), "max": lambda: max(map(abs, advantages)),
            "positive": lambda: abs(max(advantages))}
        return kinds[self.options.weight]()

    # -- the rest is the wrapped method's ------------------------------------------------------------------------------

    def setup(self, policy: Policy) -> None:
        self.inner.setup(policy)

    def probe(self, batch: Batch) -> Mapping[str, Any]:
        return self.inner.probe(batch)

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return self.inner.terms(batch, live)

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        return self.inner.update(policy, batch, step) | self.measured

    def rate(self, step: int) -> float:
        return self.inner.rate(step)

    def warnings(self, metrics: Metrics) -> list[str]:
        return self.inner.warnings(metrics)

    def deploy(self, policy: Policy, accuracy: Callable[[], float]) -> Metrics:
        return self.inner.deploy(policy, accuracy)

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        return self.inner.tables()

    def state(self) -> dict[str, Any]:
        return self.inner.state()

    def load(self, state: Mapping[str, Any]) -> None:
        self.inner.load(state)


def advantage(row: Row) -> float:
    """The advantage of an answer: the mean over its tokens, where the wrapped method weighs them apart."""
    stream = row.streams["pg"]
    return float((stream.weight * stream.mask).sum() / max(1, stream.mask.sum()))


def pairs(members: Sequence[int], advantages: Sequence[float]) -> list[Pair]:
    """Best with worst, second best with second worst, and so on; ties stay in the order they came in."""
    order = [members[k] for k in sorted(range(len(members)), key=lambda k: -advantages[k])]
    half = len(order) // 2
    middle = [(order[half],)] if len(order) % 2 else []
    return [*zip(order[:half], order[::-1][:half], strict=True), *middle]


def first(found: Sequence[Pair], keep: float) -> Sequence[Pair]:
    return found[:max(1, int(keep * len(found) + 1e-9))]


def drawn(weights_K: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each pair is drawn: `draws` samples without replacement, K in all.

    The smallest of exponential numbers over weights come first: one after the other in proportion to their weights."""
    total = len(weights_K)
    times = np.zeros(total, dtype=np.int64)
    for s in range(draws):
        with np.errstate(divide="ignore"):
            key = rng.exponential(size=total) / weights_K
        chosen = np.lexsort((rng.random(total), key))[:total // draws + (s < total % draws)]
        times[chosen] += 1
    return times
