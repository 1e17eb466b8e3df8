"""Naive alternation, a baseline of the BRIDGE paper (its Algorithm 1): an RL step, then an SFT step, on one theta.

    theta += a_RL grad J_RL(theta);   then, at the new theta,   theta += a_SFT grad J_SFT(theta)

Readings left open by the paper are options: how often the SFT step comes (`every`), one Adam or two, and whether the
two steps are full or half ones. Two Adams remove the scales of the two losses, and two full steps travel further an
iteration than joint's one.

Trap: both alone can explain a difference to joint mixing; compare at `half_steps` and with one optimiser as well.
"""

from __future__ import annotations

from typing import final

from torch import Tensor

from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method, rl_coef, rl_rows, rl_setup, rl_terms, sft_rows, sft_terms
from bridgelm.model.policy import Policy
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row


@final
class Alternate(Method):
    tier = "derived"
    form = Form(data="rollouts, then demos", demo="1", rollout="PPO", controller="one after the other",
                models="none")
    needs = frozenset({"demos"})

    def setup(self, policy: Policy) -> None:
        rl_setup(policy, self.options.rl)
        size = 0.5 if self.options.half_steps else 1.0
        policy.optimiser("theta", lr=size * self.run.optim.lr)
        if self.options.optimisers == "two":
            policy.optimiser("theta_sft", "theta", lr=size * (self.options.sft_lr or self.run.optim.lr))

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        rows = rl_rows(data, roll, self.options.rl, self.run)
        return rows + sft_rows(data, roll, self.run) if self.imitates(step) else rows

    def imitates(self, step: int) -> bool:
        return (step + 1) % self.options.every == 0

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return rl_terms(batch, live, self.options.rl) | sft_terms(batch, live)

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        rl = policy.grad(self.terms, batch, rl_coef(self.options.rl))
        metrics = {"grad_norm/theta": policy.apply("theta", rl.theta), "loss/pg": rl.losses["pg"]}
        rl.theta.clear()  # as large as the model
        if self.imitates(step):
            sft = policy.grad(self.terms, batch, {"nll": 1.0})
            second = "theta_sft" if self.options.optimisers == "two" else "theta"
            metrics |= {"grad_norm/sft": policy.apply(second, sft.theta), "loss/nll": sft.losses["nll"]}
        return metrics
