"""SFT that keeps its tie to the start: the f-divergence losses of "Implicit Reward as the Bridge" (arXiv 2507.00018).

    minimise  - E_demo[ log pi ] + E_pi[ g(h) ],      h = log pi - log pi_start of a token,   r = beta h

    total variation     g = 0                              plain SFT
    Pearson chi2        g = (beta / 4) h^2                 weight of a demonstration token  1 - (beta / 2) h
    squared Hellinger   g = (1 / beta) r^2 / (1 - r)       weight  2 - 1 / (1 - r)^2

From the imitation game max_r min_pi E_demo[r] - E_pi[f*(r)] + beta KL(pi, start) with the implicit reward r = beta h:
total variation has f*(r) = r, which cancels the KL term, so that nothing bounds SFT. The other two keep it (f* is
r + r^2/4 and r/(1 - r)). This is a derivation, not the paper's printed forms. E_pi is estimated on the demonstrations'
tokens (as inverse Q-learning does), which makes the weights above; with `penalty = "own"` on rollouts, as
rho g(h) with rho = pi / pi_old, whose gradient is that of each token's expectation given its prefix.

Trap: Hellinger's r must stay below 1, where the loss ends. From `limit` on, g goes on as a straight line: the pull back
is then constant, never none. And the paper's first remedy is a smaller rate, with no loss of its own: compare at equal
rates.
"""

from __future__ import annotations

from typing import final

from torch import Tensor

from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method, mean_over, sft_rows
from bridgelm.model.policy import Policy
from bridgelm.objective import losses
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row


@final
class FdivSft(Method):
    tier = "derived"
    form = Form(data="demos; rollouts with penalty = own", demo="1 - (beta/2) log(pi/start)", rollout="0",
                controller="none", models="reference")
    needs = frozenset({"demos"})

    def setup(self, policy: Policy) -> None:
        if self.options.divergence != "total_variation" and "reference" not in policy.groups:
            policy.fork("reference")
        policy.optimiser("theta")

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        o, rows = self.options, sft_rows(data, roll, self.run)
        if o.penalty == "own":
            own = roll.reference(roll(data.problems(self.run.rollout.prompts)))
            return rows + [row.with_stream("tie", 1.0) for row in own]
        return rows if o.divergence == "total_variation" else roll.reference(rows)

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        o, logp_BT, out = self.options, live.logp_BT, {}
        if "nll" in batch:
            out["nll"] = losses.nll(logp_BT, batch.weight["nll"])
            if o.penalty == "demos" and o.divergence != "total_variation":
                out["nll"] = out["nll"] + batch.weight["nll"] * self.penalty(logp_BT - batch.ref_BT)
        if "tie" in batch:
            ratio = (logp_BT - batch.old_BT).exp()  # 1, and the gradient of the tokens' own probability
            out["tie"] = batch.weight["tie"] * ratio * self.penalty(logp_BT - batch.ref_BT)
        return out

    def penalty(self, h_BT: Tensor) -> Tensor:
        """g, with the KL term in it; it is 0 with slope 0 at the start."""
        o = self.options
        if o.divergence == "pearson":
            return 0.25 * o.beta * h_BT**2
        r_BT = o.beta * h_BT
        inside_BT = r_BT.clamp(max=o.limit)
        slope = 1 / (1 - o.limit) ** 2 - 1
        return (inside_BT**2 / (1 - inside_BT) + slope * (r_BT - inside_BT)) / o.beta

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        coef = {"nll": 1.0, "tie": 1.0} if self.options.penalty == "own" else {"nll": 1.0}
        found = policy.grad(self.terms, batch, coef)
        metrics = {"grad_norm/theta": policy.apply("theta", found.theta),
                   "fdiv/nll": -mean_over(batch, "nll", found.logps),  # plain SFT's loss on the same demonstrations
                   **{f"loss/{name}": value for name, value in found.losses.items()}}
        tied = "tie" if self.options.penalty == "own" else "nll"
        moved = {i: found.logps[i] - row.ref_logps for i, row in enumerate(batch.rows)
                 if tied in row.streams and row.ref_logps is not None}
        return metrics | ({"fdiv/log_ratio": mean_over(batch, tied, moved)} if moved else {})
