"""Dynamic fine-tuning (DFT, arXiv 2508.05629): SFT in which each token weighs its own probability.

    minimise  - sum_t sg(p_t) log p_t / tokens,      p_t = pi(y_t | x, y_<t)

SFT's gradient is a policy gradient whose reward is 1/p on the demonstration's token: it is largest where the policy
believes least. The weight p takes that factor out. sg stops the gradient: the weight is a number, not a loss of its
own. With `weights_of = "reference"`, p is that of a frozen copy of the start (PriFT, arXiv 2606.09396).

Trap: p log p without the stop-gradient is another method: its slope is p (1 + log p), which pushes every token below
p = 1/e further down. And the weight of a demonstration that the policy cannot say at all is nothing: on demonstrations
beyond the policy's reach, or with one right token a row, plain SFT learns more. The product of a sentence's p
underflows; weights are of tokens.
"""

from __future__ import annotations

from typing import final

import numpy as np
from torch import Tensor

from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method, mean_over, sft_rows
from bridgelm.model.policy import Policy
from bridgelm.objective import losses
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row


@final
class Dft(Method):
    tier = "checked"
    form = Form(data="demos", demo="p", rollout="0", controller="none", models="none; reference with weights_of")
    needs = frozenset({"demos"})

    def setup(self, policy: Policy) -> None:
        if self.options.weights_of == "reference" and "reference" not in policy.groups:
            policy.fork("reference")
        policy.optimiser("theta")

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        rows = sft_rows(data, roll, self.run)
        return roll.reference(rows) if self.options.weights_of == "reference" else rows

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        if "nll" not in batch:
            return {}
        of = batch.ref_BT if self.options.weights_of == "reference" else live.logp_BT
        return {"nll": losses.nll(live.logp_BT, batch.weight["nll"] * losses.prob_weight(of))}

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        found = policy.grad(self.terms, batch, {"nll": 1.0})
        return {"grad_norm/theta": policy.apply("theta", found.theta), "loss/nll": found.losses["nll"],
                "dft/nll": -mean_over(batch, "nll", found.logps),  # plain SFT's loss on the same demonstrations
                "dft/prob": mean_over(batch, "nll", {i: np.exp(logp) for i, logp in found.logps.items()})}
