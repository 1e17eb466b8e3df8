"""RL with verifiable rewards from the base model on ("RL-zero"): group-relative policy optimisation.

    maximise  J_RL = E_{x, y_i ~ pi_old} [ sum_t min(rho_t A_i, clip(rho_t, 1 - low, 1 + high) A_i) ]
                     - kl_coef KL(pi || ref)
    A_i = r_i - mean_group(r)      (divided by the group's std with `rl.std`, as in GRPO as first published)

`rl.aggregate` chooses the denominator: all own tokens of the global batch (DAPO), a mean per answer (GRPO), or a
constant length (Dr. GRPO). A token whose advantage is 0 still counts in it.

Trap: dividing by the group's std gives groups with one right answer in eight the weight of groups with four.
"""

from __future__ import annotations

from typing import final

from torch import Tensor

from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method, descend, rl_coef, rl_rows, rl_setup, rl_terms
from bridgelm.model.policy import Policy
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row


@final
class Grpo(Method):
    tier = "checked"
    form = Form(data="rollouts", demo="0", rollout="PPO (.2/.28)", controller="none",
                models="none; reference with rl.kl_coef")
    def setup(self, policy: Policy) -> None:
        rl_setup(policy, self.options.rl)
        policy.optimiser("theta")

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        return rl_rows(data, roll, self.options.rl, self.run)

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return rl_terms(batch, live, self.options.rl)

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        return descend(policy, batch, self.terms, rl_coef(self.options.rl))
