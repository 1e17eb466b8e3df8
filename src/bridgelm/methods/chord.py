"""CHORD (arXiv 2508.11408): one loss with a scheduled mixing weight, and demonstration tokens weighed by p(1 - p).

    minimise  (1 - mu) L_GRPO + mu L_SFT,      L_SFT = - mean over demonstration tokens of  phi log pi
    mu(s) = mu s / warmup                                                            s < warmup
          = mu_end + (mu - mu_end) (1 + cos(pi (s - warmup) / decay)) / 2            s < warmup + decay
          = mu_end                                                                   after that
    phi = 1 (`plain`), p (1 - p) (`phi`), p (`p`, as in DFT), with p = pi(token) a constant

Steps s count from 0. The presets: `phi` has mu = .1 throughout and p(1 - p), `mu` goes from .9 to .05 with plain SFT,
`both` is the official example. Demonstrations need not be of the problems that are sampled. mu = 0 is `grpo`, plain
mu = 1 is `sft`, and plain mu = m / (1 + m) is `joint` at m.

Our reading: each loss is a mean over its own tokens of the global batch; mu is then the mix, whatever the lengths.

Trap: p(1 - p) is at most 1/4, and 0 at both ends: mu = .1 there is nearer to a fortieth of plain SFT, and a token that
the policy never says is never learnt. A mu of one preset says nothing about another.
"""

from __future__ import annotations

from typing import final

import numpy as np
from torch import Tensor

from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method, rl_coef, rl_rows, rl_setup, rl_terms, sft_rows
from bridgelm.model.policy import Policy
from bridgelm.objective import credit, losses
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row


@final
class Chord(Method):
    tier = "checked"
    form = Form(data="rollouts + demos", demo="mu p(1 - p); mu; mu p", rollout="(1 - mu) PPO",
                controller="mu: warm-up, cosine, valley", models="none; reference with rl.kl_coef")
    needs = frozenset({"demos"})

    def setup(self, policy: Policy) -> None:
        rl_setup(policy, self.options.rl)
        policy.optimiser("theta")

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        return rl_rows(data, roll, self.options.rl, self.run) + sft_rows(data, roll, self.run)

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        out = rl_terms(batch, live, self.options.rl)
        if "nll" in batch:
            weight = losses.token_weight(live.logp_BT, self.options.tokens)
            out["nll"] = losses.nll(live.logp_BT, batch.weight["nll"] * weight)
        return out

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        mu = self.mu(step)
        coef = rl_coef(self.options.rl, 1 - mu) | {"nll": mu}
        found = policy.grad(self.terms, batch, {name: c for name, c in coef.items() if c > 0})
        p = [np.exp(found.logps[i][row.own]) for i, row in enumerate(batch.rows)
             if "nll" in row.streams and i in found.logps]
        said = credit.means({"p": np.concatenate([*p, np.empty(0)])})
        return {"grad_norm/theta": policy.apply("theta", found.theta), "chord/mu": mu,
                **{f"loss/{name}": value for name, value in found.losses.items()},
                **{f"chord/{name}": value for name, value in said.items()}}

    def mu(self, step: int) -> float:
        o = self.options
        return credit.warm_cosine(step, o.warmup, o.decay, o.mu, o.mu if o.mu_end is None else o.mu_end)
