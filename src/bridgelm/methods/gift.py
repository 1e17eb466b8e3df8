"""GIFT (arXiv 2601.09233): SFT towards the base's distribution with the demonstration's token raised in it.

    t = softmax( log p_base + beta onehot(y_t) ),      minimise  - sum_k t_k log pi_k  a token
    p_base = (1 - smooth) p + smooth / V + 1e-10,      p of a frozen copy of the start

The gradient in the logits is pi_k - t_k. At beta = 20 a token gets e^20 = 4.9e8 times its base probability: t is the
token alone unless the base gives it less than about 1e-8, so that only tokens which surprise the base utterly are
softened (at the floor of 1e-10 their target is 5 %). beta -> infinity is `sft`; beta = 0 holds the policy at its start.
The formulas are those of the official code, zzy1127/GIFT.

Trap: the base is read at the full vocabulary, at every token: a second forward pass, and a second head. And as nearly
all targets are one-hot at the default, GIFT beside `sft` is a test of a few tokens a demonstration: look at
`gift/nll` (SFT's own loss) beside `loss/nll` before reading anything into a difference.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method, mean_over, sft_rows
from bridgelm.model.policy import Policy
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row

FLOOR = 1e-10  # added to the base's probabilities (official code)


@final
class Gift(Method):
    tier = "checked"
    form = Form(data="demos", demo="t_k - pi_k over the vocabulary", rollout="0", controller="none", models="reference")
    needs = frozenset({"demos"})

    def setup(self, policy: Policy) -> None:
        if "reference" not in policy.groups:
            policy.fork("reference")
        policy.optimiser("theta")

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        return sft_rows(data, roll, self.run)

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        if "nll" not in batch:
            return {}
        assert live.cross_BT is not None
        return {"nll": batch.weight["nll"] * live.cross_BT}

    def target(self, logq_NV: Tensor, token_N: Tensor) -> Tensor:
        o = self.options
        base_NV = (1 - o.smooth) * logq_NV.exp() + o.smooth / logq_NV.shape[1] + FLOOR
        raised_NV = base_NV.log()
        raised_NV[torch.arange(len(token_N), device=token_N.device), token_N] += o.beta
        return raised_NV.softmax(-1)

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        found = policy.grad(self.terms, batch, {"nll": 1.0}, soft=("reference", self.target))
        return {"grad_norm/theta": policy.apply("theta", found.theta), "loss/nll": found.losses["nll"],
                "gift/nll": -mean_over(batch, "nll", found.logps)}  # plain SFT's loss on the same demonstrations
