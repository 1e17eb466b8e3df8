"""A removable guide: theta + w leads part of the rollouts, theta learns from all of them and is deployed alone.

Ours. A share of each problem's samples comes from the guide pi_{theta+w}, the rest from pi_theta:

    theta += a grad [ sum over own samples of A log pi_theta + sum over guided ones of A f(pi_theta) ] / tokens    (1)
    w     += b [ (1 - l) grad_w J_SFT(theta + w) + l E_guide[ (R - R_theta) grad_w log pi_{theta+w} ]
                 - kappa grad_w KL(pi_{theta+w} || pi_theta) ]                                                     (2)
    gain   = mean over problems of (mean R of the guided samples - mean R of theta's own)                          (3)
    share  = share_0 at first; after `warmup` steps share_0 max(0, M) / (largest M so far), M the gain's mean      (4)

A is the reward less its mean over both halves of the group, and `tokens` are those of both. For A > 0, A f(p) is
A p / (p + shape), differentiated through p (LUFFY, arXiv 2504.14945); for A < 0 it is A sg(min(rho, cap)) log p with
rho = pi_theta / pi_guide. R_theta, the mean reward of theta's own samples of the problem, does not depend on the guided
ones: it costs (2) no bias, while the mean of both halves would. KL is (log pi_guide - log pi_theta)^2 / 2 a token (k2).
Its gradient is that of each token's KL given its prefix; that the guide also chooses prefixes is left out.

theta gets no SFT gradient, and both gradients are of one snapshot. The style of the demonstrations reaches theta only
through guided samples that were rewarded, so theta cannot cancel w, and (3) is a real difference of two policies.

Trap: the exact ratio pi_theta / pi_guide gives a guided success the least weight where theta fails most. The shaped
weight is biased on purpose, and is still only p / shape on tokens that theta hardly ever says: a guide that strays too
far gains and teaches nothing. Hold the gain against `reward`, which is theta's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import numpy as np
from torch import Tensor

from bridgelm.config.run_config import RunConfig
from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method, rl_terms, sft_rows, sft_terms
from bridgelm.model.policy import Policy
from bridgelm.objective import credit, losses
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row, Verdict


@final
class Guide(Method):
    tier = "experimental"
    form = Form(data="rollouts of theta and of theta + w; demos for w", demo="0; w: 1 - lambda",
                rollout="PPO; guided: A .1p/(p + .1)^2", controller="guide's share by its gain",
                models="low-rank w, removed")
    needs = frozenset({"demos"})

    def __init__(self, options: Any, run: RunConfig) -> None:
        super().__init__(options, run)
        self.mean = self.peak = 0.0  # running mean of the gain and its largest value: a new w does nothing yet
        self.measured: Metrics = {}

    def setup(self, policy: Policy) -> None:
        o = self.options
        policy.add_w(o.rank, o.alpha, o.modules, points=("guide",))
        policy.optimiser("theta")
        policy.optimiser("w", lr=o.beta)

    # -- rows: as many as every other method has, in two halves --------------------------------------------------------

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        rollout, share = self.run.rollout, self.share(step)
        guided = min(max(round(share * rollout.group), 1), rollout.group - 1)
        problems = data.problems(rollout.prompts)
        own = roll(problems, group=rollout.group - guided)
        led = roll(problems, group=guided, at="guide")
        shift = led[0].group - own[0].group  # both halves of a problem are one group
        theta = roll.policy.score(led)
        led = [replace(row, group=row.group - shift, ref_logps=logp) for row, logp in zip(led, theta, strict=True)]
        self.measured = {"guide/share": share} | self.measure(own, led)
        return self.credited(own, led) + sft_rows(data, roll, self.run)

    def share(self, step: int) -> float:                                                                          # (4)
        """The share of each group that follows the guide; at least one sample does, or its gain would stay unknown."""
        if step < self.options.warmup:
            return self.options.share
        return self.options.share * max(self.mean, 0.0) / self.peak if self.peak > 0 else 0.0

    def measure(self, own: Sequence[Row], led: Sequence[Row]) -> Metrics:
        theta, guide = credit.mean_rewards(own), credit.mean_rewards(led)
        pairs = np.array([(theta[group], guide[group]) for group in theta if group in guide]).reshape(-1, 2)
        found = {"guide/kl": float(np.mean(np.concatenate([half_square(row) for row in led])))}
        if len(pairs):
            gains = pairs[:, 1] - pairs[:, 0]                                                                     # (3)
            gain, decay = float(gains.mean()), self.options.decay
            self.mean = decay * self.mean + (1 - decay) * gain
            self.peak = max(self.peak, self.mean)
            found |= {"guide/gain": gain, "guide/theta_reward": float(pairs[:, 0].mean()),
                      "guide/guide_reward": float(pairs[:, 1].mean())}
            if len(gains) > 1:
                found["guide/gain_se"] = float(gains.std(ddof=1) / math.sqrt(len(gains)))
        return found | {"guide/gain_mean": self.mean}

    def credited(self, own: Sequence[Row], led: Sequence[Row]) -> list[Row]:
        rl, rollout = self.options.rl, self.run.rollout
        norm, length = rl.aggregate, rollout.max_new_tokens
        theta, rows = credit.mean_rewards(own), list(own)
        for row in led:
            row = row.with_stream("tie", 1.0, norm, length)
            used = row.verdict is not Verdict.ERROR and (row.finished or not rollout.mask_overlong)
            if used and row.group in theta:  # raw rewards: a deviation would make each group's gain one of its own
                row = row.with_stream("lead", row.reward - theta[row.group], norm, length)
            rows.append(row)
        rows = credit.with_advantages(rows, rl.std, norm, length, rollout.mask_overlong)
        return [one_denominator(row) for row in rows]

    # -- losses: `pg` and `guided` are theta's, at theta; the rest is w's, at theta + w --------------------------------

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        o, logp_BT, weight = self.options, live.logp_BT, batch.weight
        out = rl_terms(batch, live, o.rl) | sft_terms(batch, live)
        if "guided" in batch:
            failures = losses.pg_truncate(logp_BT, batch.old_BT, weight["guided"].clamp(max=0), o.ratio_cap)
            out["guided"] = losses.shaped(logp_BT, weight["guided"].clamp(min=0), o.shape) + failures
        if "lead" in batch:
            out["lead"] = losses.pg_clip(logp_BT, batch.old_BT, weight["lead"], o.rl.clip_low, o.rl.clip_high)
        if "tie" in batch:
            out["tie"] = weight["tie"] * 0.5 * (logp_BT - batch.ref_BT) ** 2
        return out

    # -- the update ------------------------------------------------------------------------------------------------

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        o = self.options
        of_w = {name: c for name, c in {"nll": 1 - o.lam, "lead": o.lam, "tie": o.kappa}.items() if c > 0}
        guide = policy.grad(self.terms, batch, of_w, at="guide")
        guide.theta.clear()  # theta learns at w = 0, and a gradient of theta is as large as the model
        theta = policy.grad(self.terms, batch, {"pg": 1.0, "guided": 1.0})
        found = {"grad_norm/theta": policy.apply("theta", theta.theta)}                                           # (1)
        found["grad_norm/w"] = policy.apply("w", guide.w)                                                         # (2)
        return found | {f"loss/{name}": value for name, value in (theta.losses | guide.losses).items()} | self.measured

    def warnings(self, metrics: Metrics) -> list[str]:
        if metrics.get("guide/share") != 0.0:
            return []
        return ["the guide gains nothing over theta: one sample a group follows it until it does, and the rest is what "
                "`grpo` does; look at guide/gain, and at guide/kl: a small one is a guide that does not move (raise "
                "method.beta), a large one a guide that is led astray (raise method.kappa or method.lambda)"]

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean, "peak": self.peak}

    def load(self, state: Mapping[str, Any]) -> None:
        self.mean, self.peak = state["mean"], state["peak"]


def half_square(row: Row) -> np.ndarray:
    assert row.old_logps is not None
    assert row.ref_logps is not None
    return 0.5 * (row.old_logps - row.ref_logps)[row.drawn] ** 2


def one_denominator(row: Row) -> Row:
    """Either half also carries the other half's stream, with weight 0: (1) divides both by the tokens of both."""
    if "pg" not in row.streams:
        return row
    stream = row.streams["pg"]
    nothing = replace(stream, weight=np.zeros(stream.mask.shape))
    pair = (nothing, stream) if row.at == "guide" else (stream, nothing)
    return replace(row, streams={**row.streams, "pg": pair[0], "guided": pair[1]})
