"""Supervised fine-tuning on demonstrations.

    maximise  J_SFT = E_{(x, y) in demos} [ log pi(y | x) ]

The loss is the mean over all demonstration tokens of the global batch, counted before it is cut into micro-batches:
a mean of micro-batch means is one of the two bugs that spoilt the SFT baselines of many papers (arXiv 2604.23747).

Trap: a demonstration that is cut off teaches the model never to stop. Over-long ones are refused, never truncated.
"""

from __future__ import annotations

from typing import final

from torch import Tensor

from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method, descend, sft_rows, sft_terms
from bridgelm.model.policy import Policy
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row


@final
class Sft(Method):
    tier = "checked"
    form = Form(data="demos", demo="1", rollout="0", controller="none", models="none")
    needs = frozenset({"demos"})

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        return sft_rows(data, roll, self.run)

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return sft_terms(batch, live)

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        return descend(policy, batch, self.terms, {"nll": 1.0})
