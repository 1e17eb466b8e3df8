"""RL, and SFT in between on the problems that it failed (ReLIFT, arXiv 2506.07527).

    each step:                   theta += a grad J_RL(theta); the problems whose rollouts all failed enter a buffer
    when it holds `size`:        the newest leave it;  theta += a_SFT grad [ mean log pi(y*) over their demo tokens ]

The SFT step comes after the RL step, at the new theta, with an Adam of its own. The buffer is part of a checkpoint.

Our reading: a problem that fails again while it waits stands in the buffer twice; of several demonstrations one is
drawn when the problem leaves. A problem fails where its pass rate (share of graded rollouts that are correct) is not
above `pass_rate`; one without demonstrations or without a graded rollout never enters. The newest go first, so what was
left over may wait for ever.

Trap: with an Adam of its own the SFT step is a full one whatever the size of its loss, and its moments are as old as
the last buffer. How much SFT there is follows from `size` and from how often the policy fails: watch `relift/sft`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
from torch import Tensor

from bridgelm.config.run_config import RunConfig
from bridgelm.data import hints
from bridgelm.data.cursors import ById, Data
from bridgelm.methods.base import Form, Method, rl_coef, rl_rows, rl_setup, rl_terms, sft_terms
from bridgelm.model.policy import Policy
from bridgelm.objective import credit
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Problem, Row, Verdict


@final
class Relift(Method):
    tier = "derived"
    form = Form(data="rollouts; demos of failed problems when enough wait", demo="1, an Adam of its own",
                rollout="PPO", controller="a buffer's filling", models="none")
    needs = frozenset({"paired_demos"})

    def __init__(self, options: Any, run: RunConfig) -> None:
        super().__init__(options, run)
        self.size = options.size or run.batch.demos
        self.buffer: list[str] = []  # ids of failed problems, the newest first
        self.problems: dict[str, Problem] = {}  # of the training set, by id
        self.failed = 0.0  # share of the last step's problems

    def setup(self, policy: Policy) -> None:
        rl_setup(policy, self.options.rl)
        policy.optimiser("theta")
        policy.optimiser("theta_sft", "theta", lr=self.options.sft_lr)

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        rows = rl_rows(data, roll, self.options.rl, self.run)
        groups = [[rows[i] for i in group] for group in credit.groups_of(rows) if group]
        failed = [group[0].problem.id for group in groups if self.fails(group)]
        self.failed = len(failed) / max(1, len(groups))
        self.buffer = failed + self.buffer
        if len(self.buffer) < self.size:
            return rows
        chosen, self.buffer = self.buffer[:self.size], self.buffer[self.size:]
        self.problems = self.problems or ById(data.splits.train)
        for i, name in enumerate(chosen):
            problem = self.problems[name]
            demo = hints.pick(problem, self.run.seed, step, i)
            assert demo is not None
            rows.append(roll.demo(problem, demo).with_stream("nll", 1.0))
        return rows

    def fails(self, group: list[Row]) -> bool:
        passed = float(np.mean([row.verdict is Verdict.CORRECT for row in group]))
        return bool(group[0].problem.demos) and passed <= self.options.pass_rate

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return rl_terms(batch, live, self.options.rl) | sft_terms(batch, live)

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        rl = policy.grad(self.terms, batch, rl_coef(self.options.rl))
        found = {"grad_norm/theta": policy.apply("theta", rl.theta)}
        found |= {f"loss/{name}": value for name, value in rl.losses.items()}
        imitates = batch.counts.get("nll", 0.0) > 0
        if imitates:
            sft = policy.grad(self.terms, batch, {"nll": 1.0})
            found |= {"grad_norm/sft": policy.apply("theta_sft", sft.theta), "loss/nll": sft.losses["nll"]}
        return found | {"relift/sft": float(imitates), "relift/failed": self.failed,
                        "relift/buffer": float(len(self.buffer))}

    def state(self) -> dict[str, Any]:
        return {"buffer": list(self.buffer)}

    def load(self, state: Mapping[str, Any]) -> None:
        self.buffer = list(state["buffer"])
