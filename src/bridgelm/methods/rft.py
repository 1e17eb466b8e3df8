"""Rejection-sampling fine-tuning: the policy answers the training problems and imitates its own right answers.

    maximise  sum over kept answers of log pi(y | x) / their tokens,     kept = verified, distinct, at most N a problem

One loop of many papers: STaR (arXiv 2203.14465) keeps an answer a problem, RFT (2308.01825) all distinct ones, RAFT
(2304.06767) the best of each group, ReST-EM (2312.06585) at most ten a problem. With `refresh_every` = 1 the answers
are the live policy's, of this very step. With n > 1, every n steps it answers the problems of n steps at once, and what
is kept is dealt out to them: between RAFT's small batches and offline RFT at n = all steps.

At `refresh_every` = 1, without `unique` and a maximum, and over = "all", the gradient is that of grpo with advantages
1[right], that is, without a baseline (and at temperature 1).

Trap: without a baseline, a problem that the policy always solves teaches most: what is likely becomes likelier, entropy
falls, and what it never solves teaches nothing. An answer counts as right by its end alone, so lucky reasoning is
imitated as well. One that was right but cut off at the limit teaches not to stop: rollout.mask_overlong leaves it out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, final

import numpy as np
from torch import Tensor

from bridgelm.config.run_config import RunConfig
from bridgelm.data.cursors import ById, Data
from bridgelm.methods.base import Form, Method, descend, sft_terms
from bridgelm.model.policy import Policy
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row, Verdict

Answer = tuple[str, int, list[int]]  # problem, length of the prompt, ids of prompt and answer: it goes through JSON


@final
class Rft(Method):
    tier = "derived"
    form = Form(data="rollouts, the right ones kept", demo="0", rollout="1[right] / kept tokens", controller="none",
                models="none")

    def __init__(self, options: Any, run: RunConfig) -> None:
        super().__init__(options, run)
        self.parts: list[list[Answer]] = []  # what this step and the next ones are going to be taught
        self.measured: Metrics = {}

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        o, aside = self.options, []
        self.measured = {}
        if step % o.refresh_every == 0:
            ahead = min(o.refresh_every, self.run.steps - step)
            drawn = roll(data.problems(self.run.rollout.prompts * ahead))
            kept = self.keep(drawn)
            self.parts = [[answer(drawn[i]) for i in kept[k * len(kept) // ahead:(k + 1) * len(kept) // ahead]]
                          for k in range(ahead)]
            self.measured = measure(drawn, kept)
            # Rollouts teach nothing themselves: what is kept becomes rows of its own. The others may count as tokens.
            counted = {i for i, row in enumerate(drawn) if o.over == "all" and self.usable(row)} - set(kept)
            aside = [row.with_stream("nll", 0.0, mask=row.drawn & (i in counted)) for i, row in enumerate(drawn)]
        chosen, self.parts = self.parts[0], self.parts[1:]
        self.measured["rft/taught"] = float(len(chosen))
        return aside + taught(chosen, data)

    def usable(self, row: Row) -> bool:
        return row.verdict is not Verdict.ERROR and (row.finished or not self.run.rollout.mask_overlong)

    def keep(self, rows: list[Row]) -> list[int]:
        """Which rows are right: of equal answers the first, and no more than `max_per_problem` of a problem."""
        o, seen, count = self.options, set(), Counter[str]()
        kept = []
        for i, row in enumerate(rows):
            problem, name = row.problem.id, (row.problem.id, row.ids.tobytes())
            full = bool(o.max_per_problem) and count[problem] >= o.max_per_problem
            if row.verdict is Verdict.CORRECT and self.usable(row) and not full and not (o.unique and name in seen):
                seen.add(name)
                count[problem] += 1
                kept.append(i)
        return kept

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return sft_terms(batch, live)

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        if not batch.counts.get("nll"):  # nothing to imitate: Adam's momentum does not move theta either
            return {"grad_norm/theta": 0.0, "loss/nll": 0.0} | self.measured
        return descend(policy, batch, self.terms, {"nll": 1.0}) | self.measured

    def warnings(self, metrics: Metrics) -> list[str]:
        if metrics.get("rft/solved") != 0.0:
            return []
        return ["no answer of a whole step was right, and `rft` learns from right ones alone: begin with a stage of "
                "`sft`, or take easier problems"]

    def state(self) -> dict[str, Any]:
        return {"parts": self.parts}

    def load(self, state: Mapping[str, Any]) -> None:
        self.parts = [[(problem, start, ids) for problem, start, ids in part] for part in state["parts"]]


def answer(row: Row) -> Answer:
    return row.problem.id, int((~row.own).sum()), row.ids.tolist()


def taught(answers: list[Answer], data: Data) -> list[Row]:
    """Rows to imitate: at temperature 1 as demonstrations are, whatever they were drawn at."""
    problems = ById(data.splits.train) if answers else {}
    return [Row(np.array(ids, dtype=np.int64), np.arange(len(ids)) >= start, "demo", problems[name])
            .with_stream("nll", 1.0) for name, start, ids in answers]


def measure(drawn: list[Row], kept: list[int]) -> Metrics:
    right = [row for row in drawn if row.verdict is Verdict.CORRECT]
    found = {"right": float(len(right)), "kept": float(len(kept)),
             "solved": float(len({row.group for row in right})),
             "groups": float(len({row.group for row in drawn}))}
    return {"rft/kept": found["kept"] / max(1.0, found["right"]), "rft/solved": found["solved"] / found["groups"]}
