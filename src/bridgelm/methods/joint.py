"""Joint SFT and RL on one set of weights: the "SFT+RL" baseline of the BRIDGE paper.

    maximise  J_RL + mu J_SFT        (both divided by 1 + mu with `normalise`, so that mu moves the mix, not the step)

mu is constant, linear or cosine from `mu` to `mu_end`. At mu = 1 this is BRIDGE's theta update with lambda = 1/2 and no
w, up to a factor that Adam does not see.

Trap: each term is divided by its own global count before mu is applied; otherwise the mix depends on lengths.
"""

from __future__ import annotations

from typing import final

from torch import Tensor

from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method, descend, rl_coef, rl_rows, rl_setup, rl_terms, sft_rows, sft_terms
from bridgelm.model.policy import Policy
from bridgelm.objective import credit
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row


@final
class Joint(Method):
    tier = "derived"
    form = Form(data="rollouts + demos", demo="mu/(1 + mu)", rollout="PPO/(1 + mu)",
                controller="mu constant, linear or cosine", models="none")
    needs = frozenset({"demos"})

    def setup(self, policy: Policy) -> None:
        rl_setup(policy, self.options.rl)
        policy.optimiser("theta")

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        return rl_rows(data, roll, self.options.rl, self.run) + sft_rows(data, roll, self.run)

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return rl_terms(batch, live, self.options.rl) | sft_terms(batch, live)

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        mu = self.mu(step)
        scale = 1.0 / (1.0 + mu) if self.options.normalise else 1.0
        coef = rl_coef(self.options.rl, scale) | {"nll": scale * mu}
        return descend(policy, batch, self.terms, coef) | {"joint/mu": mu}

    def mu(self, step: int) -> float:
        o = self.options
        end = o.mu if o.mu_end is None else o.mu_end
        return credit.schedule(o.schedule, o.mu, end, step / max(1, self.run.steps - 1))
