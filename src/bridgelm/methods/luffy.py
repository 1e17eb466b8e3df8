"""LUFFY (arXiv 2504.14945): a demonstration is one more graded member of every group, with a shaped off-policy weight.

    maximise  1/Z [ sum over own answers, tokens of A rho  +  sum over demonstrations, tokens of A f(p) ]
    A = r - mean of r over all members,    rho = pi / pi_old,    f(p) = p / (p + gamma),    p = pi(token)

f has its gradient through p: a demonstration's token weighs A gamma p / (p + gamma)^2 on grad log pi, at most A / 4 (at
p = gamma). Own tokens are not clipped (`clip`), and the author's probability of a demonstration's token counts as 1. No
standard deviation; Z is rows times a constant length (Dr. GRPO), and one for both sums. Where all n - 1 own answers
fail, the mean is 1/n and the demonstration's A is (n - 1)/n; where all succeed, all A are 0: imitation fades by itself.

Our reading: a group has `rollout.group` own answers and the demonstration beside them, so that every method samples as
often. The paper's seven and one is `rollout.group = 7`. A problem without a demonstration has an ordinary group.

Trap: A / 4 is the peak, at p = .1. A token that the policy gives 1e-4 weighs A / 1000: what it cannot nearly say
already is not learnt. And `rollout.refill` would replace the all-fail groups, which demonstrations are for: refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
from torch import Tensor

from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method, experts, rl_coef, rl_setup, rl_terms, with_kl
from bridgelm.model.policy import Grads, Policy
from bridgelm.objective import credit, losses
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row, Verdict


@final
class Luffy(Method):
    tier = "checked"
    form = Form(data="rollouts + a demo in each group", demo="A .1p/(p + .1)^2", rollout="PG (mixed-group A)",
                controller="A of the demo", models="none; reference with rl.kl_coef")
    needs = frozenset({"paired_demos"})

    def setup(self, policy: Policy) -> None:
        rl_setup(policy, self.options.rl)
        policy.optimiser("theta")

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        own = roll.groups(data)
        rows = self.credited(own + experts(own, roll, self.run, step, self.options.demos))
        return with_kl(rows, roll, self.options.rl, self.run)

    def credited(self, rows: Sequence[Row]) -> list[Row]:
        """Every member carries both streams, one of them with weight 0: both sums have the same denominator."""
        o, rollout, out = self.options, self.run.rollout, list(rows)
        own = (lambda row: row.at != "expert") if o.baseline == "own" else None
        for i, advantage in credit.group_advantages(rows, o.rl.std, own).items():
            row = rows[i]
            if rollout.mask_overlong and not row.finished:
                continue
            pair = {"pg": 0.0, "demo": advantage} if row.at == "expert" else {"pg": advantage, "demo": 0.0}
            for name, weight in pair.items():
                row = row.with_stream(name, weight, o.rl.aggregate, rollout.max_new_tokens, row.own)
            out[i] = row.with_stream("entropy", 1.0, mask=row.own) if o.entropy else row
        return out

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        o, logp_BT = self.options, live.logp_BT
        out = rl_terms(batch, live, o.rl)
        if "pg" in batch and not o.clip:
            out["pg"] = losses.pg(logp_BT, batch.old_BT, batch.weight["pg"])
        if "demo" in batch:
            out["demo"] = losses.shaped(logp_BT, batch.weight["demo"], o.shape)
        if "entropy" in batch and live.entropy_BT is not None:
            out["entropy"] = -batch.weight["entropy"] * live.entropy_BT
        return out

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        o = self.options
        coef = rl_coef(o.rl) | {"demo": 1.0} | ({"entropy": o.entropy} if o.entropy else {})
        found = policy.grad(self.terms, batch, coef, entropy=bool(o.entropy))
        metrics = {"grad_norm/theta": policy.apply("theta", found.theta)}
        return metrics | {f"loss/{name}": value for name, value in found.losses.items()} | self.told(batch, found)

    def told(self, batch: Batch, found: Grads) -> Metrics:
        """How much there is to learn from demonstrations. `p` is over the tokens of those that teach (A is not 0)."""
        scored = [(i, row) for i, row in enumerate(batch.rows) if "demo" in row.streams]
        demos = [(i, row) for i, row in scored if row.at == "expert"]
        won: dict[int, bool] = {}
        for _, row in scored:
            if row.at != "expert":
                won[row.group] = won.get(row.group, False) or row.verdict is Verdict.CORRECT
        logps = [found.logps[i][row.own] for i, row in demos if row.streams["demo"].weight.any()]
        p = np.exp(np.concatenate([*logps, np.empty(0)]))
        advantages = [float(row.streams["demo"].weight[row.own][0]) for _, row in demos]
        return {f"luffy/{name}": value for name, value in credit.means({
            "demo_reward": np.array([row.reward for _, row in demos]), "demo_advantage": np.array(advantages), "p": p,
            "weight": self.options.shape * p / (p + self.options.shape) ** 2,
            "all_fail": np.array([not w for w in won.values()])}).items()}
