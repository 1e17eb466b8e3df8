"""SRFT (arXiv 2506.19767): three losses in every step, imitation and own successes weighed by the policy's entropy.

    minimise  w_S NLL(demo)  -  A f(p) on the demo (as in `luffy`)  -  sum over own answers of w_R log pi, if right,
                                                                       or of -log pi, if wrong
    w_S = .5 sg exp(-H),    w_R = .1 sg exp(H),    H = mean entropy of the policy over the tokens of that row
    A = r - mean of r over the group, demonstration included;    f(p) = p / (p + .1), with its gradient

The sums over tokens of the last two are divided by one count (rows times a constant length), the first by the tokens of
demonstrations. Own answers enter by log pi, not by a ratio, and have a reward of +1 or -1 in place of an advantage.

Our reading: that of an independent reproduction (TsinghuaC3I/Unify-Post-Training), entropy per sequence and the weights
as the paper has them. The authors' public code is said to weigh imitation by exp(+H), token by token: `sft_sign` and
`entropy_of`. Groups have `rollout.group` own answers and the demonstration beside them, as in `luffy`.

Trap: own answers are not centred. Where all pass they are imitated; where all fail they are pushed away without bound,
at a weight of 1 against .1 exp(H). With several updates a batch nothing corrects for the policy that drew them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method, experts
from bridgelm.model.policy import Grads, Policy
from bridgelm.objective import credit, losses
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row, Verdict


@final
class Srft(Method):
    tier = "derived"
    form = Form(data="rollouts + a demo in each group", demo=".5e^-H + A .1p/(p + .1)^2",
                rollout=".1e^H right, -1 wrong", controller="entropy H", models="none")
    needs = frozenset({"paired_demos"})

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        own = roll.groups(data)
        return self.credited(own + experts(own, roll, self.run, step, self.options.demos))

    def credited(self, rows: Sequence[Row]) -> list[Row]:
        """`own` and `pg` (the demonstration's RL loss) stand on every member, for one denominator; `nll` on demos."""
        o, rollout, out = self.options, self.run.rollout, list(rows)
        for i, advantage in credit.group_advantages(rows, o.std).items():
            row, expert = rows[i], rows[i].at == "expert"
            if rollout.mask_overlong and not row.finished:
                continue
            sign = 1.0 if row.verdict is Verdict.CORRECT else -1.0
            weights = {"pg": advantage, "own": 0.0} if expert else {"pg": 0.0, "own": sign}
            for name, weight in weights.items():
                row = row.with_stream(name, weight, o.aggregate, rollout.max_new_tokens, row.own)
            row = row.with_stream("nll", 1.0, mask=row.own) if expert else row
            out[i] = row.with_stream("entropy", 1.0, mask=row.own) if o.entropy else row
        return out

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        o, logp_BT, weight, out = self.options, live.logp_BT, batch.weight, {}
        if not batch.weight.keys() & {"pg", "own", "nll", "entropy"}:
            return out
        assert live.entropy_BT is not None, "asked for in `update`"
        h_BT = self.spread(live.entropy_BT.detach(), batch.own_BT)
        if "nll" in batch:
            sign = -1.0 if o.sft_sign == "minus" else 1.0
            out["nll"] = losses.nll(logp_BT, weight["nll"] * o.sft * (sign * h_BT).exp())
        if "pg" in batch:
            out["pg"] = losses.shaped(logp_BT, weight["pg"], o.shape)
        if "own" in batch:
            out["own"] = losses.nll(logp_BT, torch.where(weight["own"] > 0, o.right * h_BT.exp(), 1.0) * weight["own"])
        if "entropy" in batch:
            out["entropy"] = -weight["entropy"] * live.entropy_BT
        return out

    def spread(self, entropy_BT: Tensor, own_BT: Tensor) -> Tensor:
        """H of each token: its own, or its row's mean, which no cut into micro-batches changes."""
        if self.options.entropy_of == "token":
            return entropy_BT
        return (entropy_BT.sum(1) / own_BT.sum(1).clamp(min=1))[:, None].expand_as(entropy_BT)

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        o = self.options
        coef = {"nll": 1.0, "pg": 1.0, "own": 1.0} | ({"entropy": o.entropy} if o.entropy else {})
        found = policy.grad(self.terms, batch, coef, entropy=True)
        metrics = {"grad_norm/theta": policy.apply("theta", found.theta)}
        return metrics | {f"loss/{name}": value for name, value in found.losses.items()} | self.told(batch, found)

    def told(self, batch: Batch, found: Grads) -> Metrics:
        """Mean entropies a row and what becomes of them, with the sequence's H whatever `entropy_of` says."""
        o = self.options
        mean = {i: h[batch.rows[i].own].mean() for i, h in found.entropies.items()}
        demos = {i: row for i, row in enumerate(batch.rows) if "nll" in row.streams}
        demo = np.array([mean[i] for i in demos if i in mean])
        right = np.array([h for i, h in mean.items()
                          if i not in demos and batch.rows[i].verdict is Verdict.CORRECT])
        sign = -1.0 if o.sft_sign == "minus" else 1.0
        return {f"srft/{name}": value for name, value in credit.means({
            "entropy_demo": demo, "sft_weight": o.sft * np.exp(sign * demo), "entropy_right": right,
            "right_weight": o.right * np.exp(right), "demo_reward": np.array([row.reward for row in demos.values()]),
            "demo_advantage": np.array([row.streams["pg"].weight[row.own][0] for row in demos.values()])}).items()}
