"""GAC (arXiv 2605.26184): CHORD's token weights, and a mixing weight that follows the noise of both losses.

    minimise  mu L_SFT + (1 - mu) L_GRPO,      L_SFT as in `chord` (p(1 - p), or plain)
    raw   = (target D + s_r) / (D + s_s + s_r)
    s_r   = variance over sampled answers of their mean advantage
    s_s   = variance over demonstrations of their mean negative log-prob, a tenth of them left out at either end
    D     = mean over all rows of the mean over their tokens of (c_s - c_r)^2,
            c_s = -p(1 - p) (plain: -1),    c_r = -A on sampled tokens and 0 on those of demonstrations
    near  = clip(decay mu + (1 - decay) raw, low, high)                    mu: that of the update before
    mu   <- mu + what the cap lets through of (1 - blend) prior + blend near - mu,   then clipped to low..high

The least mean square error of the mixed gradient gives raw, were s_r, s_s and D the gradients' variances and squared
distance; here they are stand-ins made of coefficients. They are running means with the same decay, taken anew every
`refresh` updates by scoring the whole batch. The prior is `chord`'s schedule.

Our reading: the official code's, in which D is not normalised (its README says z-normalised) and the target is constant
(a KL controller of it is mentioned, and not to be found). Its trimmed variance is each rank's own; ours is global.

Trap: at the defaults mu rests at 99 % prior and 1 % estimate, (1 - blend) against blend (1 - decay), and statistics of
.99 that are taken every ten updates lag by a thousand. Hold gac/mu against gac/prior before crediting gac/raw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
from torch import Tensor

from bridgelm.config.run_config import RunConfig
from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method, rl_coef, rl_rows, rl_setup, rl_terms, sft_rows
from bridgelm.model.policy import Policy
from bridgelm.objective import credit, losses
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row

EPS = 1e-8  # the official code's, of variances and of the denominator


@final
class Gac(Method):
    tier = "checked"
    form = Form(data="rollouts + demos", demo="mu p(1 - p)", rollout="(1 - mu) PPO",
                controller="mu: noise estimate + cosine prior, cap .01", models="none; reference with rl.kl_coef")
    needs = frozenset({"demos"})

    def __init__(self, options: Any, run: RunConfig) -> None:
        super().__init__(options, run)
        self.mu, self.updates = options.start, 0
        self.means: dict[str, float] = {}

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
        if self.updates % self.options.refresh == 0:
            self.look(policy, batch)
        self.updates += 1
        told = self.steer(step)
        found = policy.grad(self.terms, batch, rl_coef(self.options.rl, 1 - self.mu) | {"nll": self.mu})
        return {"grad_norm/theta": policy.apply("theta", found.theta),
                **{f"loss/{name}": value for name, value in found.losses.items()},
                **{f"gac/{name}": value for name, value in (told | self.means).items()}}

    def look(self, policy: Policy, batch: Batch) -> None:
        """Running means of the three statistics, with this batch's in them."""
        rows = [row for row in batch.rows if {"pg", "nll"} & row.streams.keys()]
        now = statistics(rows, policy.score(rows), self.options.tokens == "phi", self.options.trim)
        decay = self.options.decay
        self.means = {name: decay * self.means[name] + (1 - decay) * x if self.means else x for name, x in now.items()}

    def steer(self, step: int) -> Metrics:
        """Moves mu. The prior pulls and so does the estimate; neither by more than the cap."""
        o, s_rl, s_sft, apart = self.options, *(self.means[name] for name in ("s_rl", "s_sft", "apart"))
        prior = credit.warm_cosine(step, o.warmup, o.decay_steps, o.prior, o.prior_end)
        raw = (o.target * apart + s_rl) / (apart + s_sft + s_rl + EPS)
        near = clip(o.decay * self.mu + (1 - o.decay) * raw, o.low, o.high)
        wanted = (1 - o.blend) * prior + o.blend * near
        self.mu = clip(self.mu + clip(wanted - self.mu, -o.cap, o.cap), o.low, o.high)
        return {"mu": self.mu, "prior": prior, "raw": raw, "wanted": wanted}

    def state(self) -> dict[str, Any]:
        return {"mu": self.mu, "updates": self.updates, "means": dict(self.means)}

    def load(self, state: Mapping[str, Any]) -> None:
        self.mu, self.updates, self.means = state["mu"], state["updates"], dict(state["means"])


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def statistics(rows: Sequence[Row], logps: Sequence[np.ndarray], phi: bool, trim: float) -> dict[str, float]:
    """Every row is one number in each, whatever its length."""
    advantages, nlls, apart = [], [], []
    for row, logp in zip(rows, logps, strict=True):
        sampled = "pg" in row.streams
        stream = row.streams["pg" if sampled else "nll"]
        p = np.exp(logp[stream.mask])
        c_s = -p * (1 - p) if phi else -np.ones_like(p)
        c_r = -stream.weight[stream.mask] if sampled else np.zeros_like(p)
        apart.append(np.mean((c_s - c_r) ** 2))
        if sampled:
            advantages.append(stream.weight[stream.mask].mean())
        else:
            nlls.append(-logp[stream.mask].mean())
    return {"s_rl": variance(np.array(advantages)),
            "s_sft": variance(trimmed(np.array(nlls), trim)),
            "apart": credit.means({"apart": np.array(apart)}).get("apart", 0.0)}


def trimmed(values: np.ndarray, share: float) -> np.ndarray:
    """The values without that share at either end; fewer than four values are left as they are."""
    drop = int(len(values) * share) if len(values) >= 4 else 0
    return np.sort(values)[drop:len(values) - drop]


def variance(values: np.ndarray) -> float:
    return max(float(values.var()), EPS) if values.size else 0.0
