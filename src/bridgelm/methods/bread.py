"""GRPO, with a search for the shortest helpful prefix where all rollouts fail (BREAD, arXiv 2506.17211).

    a group has a success:  GRPO on it
    else:  y* is cut into at most 10 episodes; search by halves for the fewest of them from which the success rate of a
           group of rollouts lies in [low, high];  GRPO on that group too, on the tokens that follow the prefix

The prefix is context and has no loss. As the policy improves, fewer groups fail and prefixes become shorter.

Our reading: the rate at an episode is that of one new group. Too low a rate asks for more episodes; one in the range or
above it for fewer; of the groups in the range the one with the fewest is used, and if there is none, nothing is. The
failed group stays as well: its advantages are 0, its tokens count. `reuse` = false draws a new group in place of the
one that was chosen for its rate. Whole answers are graded. Episodes end with sentences or lines where there are any;
else they are equal numbers of tokens.

Every search takes the same number of calls of the roller, empty ones included, so that ranks stay together. Its
rollouts are in the ledger and in `bread/extra`.

Trap: at equal steps this has up to 1 + log2(10) times grpo's rollouts on failed problems. Compare at equal rollouts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from torch import Tensor

from bridgelm.config.run_config import RunConfig
from bridgelm.data import hints
from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method, credited, descend, rl_coef, rl_setup, rl_terms
from bridgelm.model.policy import Policy
from bridgelm.objective import credit
from bridgelm.rollout.roller import NOTHING, Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Problem, Row, Verdict


@dataclass
class Search:
    """One failed problem: more than `low` episodes are needed, `high` are enough or all that there are."""

    problem: Problem
    answer: np.ndarray
    ends: list[int]  # tokens up to the end of each episode
    low: int = 0
    high: int = 0
    found: list[Row] = field(default_factory=list)  # the group from the fewest episodes so far, in the range
    used: np.ndarray = field(default_factory=lambda: NOTHING)  # its prefix

    def __post_init__(self) -> None:
        self.high = len(self.ends)  # all episodes leave the policy nothing to solve: they are never tried

    @property
    def going(self) -> bool:
        return self.high - self.low > 1

    @property
    def episodes(self) -> int:
        return (self.low + self.high) // 2

    @property
    def prefix(self) -> np.ndarray:
        return self.answer[:self.ends[self.episodes - 1]]


@final
class Bread(Method):
    tier = "derived"
    form = Form(data="rollouts; more from a prefix if all fail", demo="0", rollout="PPO",
                controller="search of the prefix by halves", models="none")
    needs = frozenset({"paired_demos"})

    def __init__(self, options: Any, run: RunConfig) -> None:
        super().__init__(options, run)
        self.measured: Metrics = {}

    def setup(self, policy: Policy) -> None:
        rl_setup(policy, self.options.rl)
        policy.optimiser("theta")

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        rows, before = roll.groups(data), roll.policy.ledger.rollouts
        groups = [[rows[i] for i in group] for group in credit.groups_of(rows) if group]
        failed = [group[0] for group in groups if rate(group) == 0]
        searches = [search for row in failed if (search := self.search(roll, row, step))]
        for _ in range(math.ceil(math.log2(self.options.episodes))):
            self.halve(roll, [search for search in searches if search.going])
        chosen = [search for search in searches if search.found]
        if not self.options.reuse:
            fresh = groups_from(roll, [(search.problem, search.used) for search in chosen])
            for search, group in zip(chosen, fresh, strict=True):
                search.found = group
        self.measured = {"bread/failed": len(failed) / max(1, len(groups)),
                         "bread/extra": float(roll.policy.ledger.rollouts - before)}
        if failed:
            self.measured["bread/rescued"] = len(chosen) / len(failed)
        if chosen:
            self.measured["bread/prefix"] = float(np.mean([len(s.used) / (len(s.answer) - 1) for s in chosen]))
        return credited(rows + [row for search in chosen for row in search.found], roll, self.options.rl, self.run)

    def search(self, roll: Roller, row: Row, step: int) -> Search | None:
        demo = hints.pick(row.problem, self.run.seed, step, row.group)
        if demo is None:
            return None
        answer, room = hints.written(roll.chat, row.problem, demo), self.run.rollout.max_new_tokens
        ends = hints.cuts(roll.chat, answer, self.options.episodes)
        short = sum(end < room for end in ends)  # a longer prefix would fill the answer: like the whole, never tried
        return Search(row.problem, answer, ends[:short + 1])

    def halve(self, roll: Roller, searches: list[Search]) -> None:
        """One group for each from the middle of what is left."""
        middle = groups_from(roll, [(search.problem, search.prefix) for search in searches])
        for search, group in zip(searches, middle, strict=True):
            graded = [row for row in group if row.verdict is not Verdict.ERROR]
            if not graded or rate(graded) < self.options.low:
                search.low = search.episodes
                continue
            if rate(graded) <= self.options.high:
                search.found, search.used = group, search.prefix
            search.high = search.episodes

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return rl_terms(batch, live, self.options.rl)

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        return descend(policy, batch, self.terms, rl_coef(self.options.rl)) | self.measured


def rate(group: list[Row]) -> float:
    return float(np.mean([row.verdict is Verdict.CORRECT for row in group]))


def groups_from(roll: Roller, pairs: list[tuple[Problem, np.ndarray]]) -> list[list[Row]]:
    """A group of rollouts for each problem, from its prefix."""
    size = roll.config.rollout.group
    rows = roll([problem for problem, _ in pairs], prefixes=[prefix for _, prefix in pairs for _ in range(size)])
    return [rows[i:i + size] for i in range(0, len(rows), size)]
