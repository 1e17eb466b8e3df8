"""RL, and in turn SFT on the demonstrations of the problems that it cannot solve (arXiv 2507.07562, interleaved arm).

    theta += a_RL grad J_RL(theta)                               on all rollouts of the step
    every K steps, at the new theta:
    theta += a_SFT grad sum_{x in F} log pi(y*_x | x) / tokens   F: problems of the last K steps that no rollout solved

One demonstration a problem, drawn anew each time; at most `batch.demos` of F, the newest. Nothing failed: no SFT step.

Our reading: the study says that SFT is done where all rollouts fail, in turn with RL, and gives no numbers. We keep the
turns: a step of each by itself, on one theta. `alternate` takes any demonstration instead of the failed problems' ones,
a gate by problem puts both losses into one gradient, and ReLIFT waits until a buffer of failures is full.

Trap: a problem whose demonstration is over the policy's head stays in F for ever, and SFT then trains on the same hard
few. `interleaved/failed` should fall; where it does not, look at what those demonstrations are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
from torch import Tensor

from bridgelm.config.run_config import RunConfig
from bridgelm.data.cursors import ById, Data
from bridgelm.methods.base import Form, Method, rl_coef, rl_rows, rl_setup, rl_terms, sft_terms
from bridgelm.model.policy import Policy
from bridgelm.objective import credit
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Problem, Row, Verdict


@final
class Interleaved(Method):
    tier = "derived"
    form = Form(data="rollouts, then demos of failed problems", demo="1[all rollouts wrong]", rollout="PPO",
                controller="SFT step every K RL steps", models="none")
    needs = frozenset({"paired_demos"})

    def __init__(self, options: Any, run: RunConfig) -> None:
        super().__init__(options, run)
        self.failed: list[str] = []  # ids of the problems since the last SFT step, the newest last
        self.measured: Metrics = {}

    def setup(self, policy: Policy) -> None:
        rl_setup(policy, self.options.rl)
        policy.optimiser("theta")
        if self.options.optimisers == "two":
            policy.optimiser("theta_sft", "theta", lr=self.options.sft_lr)

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        rows = rl_rows(data, roll, self.options.rl, self.run)
        found = unsolved(rows)
        new = [problem.id for problem in found if problem.demos]
        self.failed = [name for name in self.failed if name not in new] + new
        self.measured = {"interleaved/failed": len(found) / max(1, len(credit.groups_of(rows)))}
        if (step + 1) % self.options.every:
            return rows
        chosen = self.failed[-self.run.batch.demos * self.run.rollout.updates:]
        self.failed = []
        self.measured["interleaved/demos"] = len(chosen)
        known = ById(data.splits.train)
        draws = np.random.default_rng((self.run.seed, step, 1))
        pairs = [(known[name], known[name].demos[draws.integers(len(known[name].demos))]) for name in chosen]
        return rows + [roll.demo(problem, demo).with_stream("nll", 1.0) for problem, demo in pairs]

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return rl_terms(batch, live, self.options.rl) | sft_terms(batch, live)

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        rl = policy.grad(self.terms, batch, rl_coef(self.options.rl))
        metrics = {"grad_norm/theta": policy.apply("theta", rl.theta), "loss/pg": rl.losses["pg"], **self.measured}
        if "nll" in batch.counts:  # Adam would go on by its momentum where there is nothing to imitate
            sft = policy.grad(self.terms, batch, {"nll": 1.0})
            second = "theta_sft" if self.options.optimisers == "two" else "theta"
            metrics |= {"grad_norm/sft": policy.apply(second, sft.theta), "loss/nll": sft.losses["nll"]}
        return metrics

    def state(self) -> dict[str, Any]:
        return {"failed": self.failed}

    def load(self, state: Mapping[str, Any]) -> None:
        self.failed = list(state["failed"])


def unsolved(rows: Sequence[Row]) -> list[Problem]:
    """Problems with graded rollouts, all of them wrong."""
    groups = [[rows[i] for i in group] for group in credit.groups_of(rows)]
    return [group[0].problem for group in groups if group and all(row.verdict is Verdict.WRONG for row in group)]
