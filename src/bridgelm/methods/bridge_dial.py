"""BRIDGE whose lambda is turned by reward: the shadow says whether more or less imitation would raise it.

theta^ is the shadow, D = theta - theta^, P the diagonal metric of theta's Adam (the identity under SGD). All gradients
are taken at one snapshot (theta_k, theta^_k, w_k), with the lambda l_k that the steps before left:

    theta  += a P [ (1 - l) grad_theta J_SFT(theta, w) + l grad_theta J_RL(theta, w) ]                            (1)
    theta^ += a P grad_theta J_RL(theta^, w) + rho D                                                              (2)
    w      += b P [ (1 - l) grad_w J_SFT(theta, w) + l ( grad_w J_RL(theta, w) - grad_w J_RL(theta^, w) ) ]       (3)
    logit l -= eta clip(z, -1, 1),   |logit l| <= limit,   z = mean of x_g / its standard error over the groups g   (4)
    x_g     = sum over g's own tokens of A ( log pi_theta - log pi_theta^ )  =  <grad_theta J_RL of g, D> + O(|D|^2)

What theta would be with a little less lambda lies along D, second derivatives aside: (1) and (2) share P, the clip
factor and the momentum's decay, so D is what imitation has added. z > 0: the way from the shadow to theta raises
reward, so more imitation does, and lambda falls. x_g needs no pass of its own. z asks about reward alone, also where
J_RL has a KL term. The code minimises losses L = -J, so every `+=` is a descent step and the signs inside stay.

Deployed: theta^ + c D with w, c by validation among `scales` and 1. Ours, not the paper's: BRIDGE has a fixed lambda.

Trap: z is of first order in D. A shadow that has left the rollouts' policy makes it a number about nothing; watch
`bridge/ess` and raise the leak. And where J_RL is concave, lambda ends at its upper limit: in RL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import numpy as np
from torch import Tensor

from bridgelm.config.run_config import RunConfig
from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Gradients, Method, rl_coef, rl_terms, sft_terms
from bridgelm.methods.shadow import (
    diagnostics,
    preconditioned_norm,
    report,
    shadow_coef,
    shadow_gather,
    shadow_setup,
    shadow_terms,
    shadow_warnings,
    shares,
)
from bridgelm.model import grads
from bridgelm.model.policy import Policy
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row


@final
class BridgeDial(Method):
    tier = "experimental"
    gradients = Gradients(1, 2, 2, parked=1, elsewhere=2)
    form = Form(data="rollouts + demos", demo="1 - lambda", rollout="lambda PPO; w: less the shadow's",
                controller="lambda by the slope of reward along theta - shadow", models="leaky shadow, low-rank w")
    needs = frozenset({"demos"})

    def __init__(self, options: Any, run: RunConfig) -> None:
        super().__init__(options, run)
        self.logit = self.bound(logit(options.lam))
        self.sampled: Metrics = {}  # of the shadow's own rollouts, in steps that have some

    @property
    def lam(self) -> float:
        return 0.5 * (1 + math.tanh(0.5 * self.logit))

    def bound(self, value: float) -> float:
        return min(max(value, -self.options.limit), self.options.limit)

    def setup(self, policy: Policy) -> None:
        shadow_setup(policy, self.options, shared=self.run.optim.adam)

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        rows, self.sampled = shadow_gather(data, roll, self.options, self.run, step)
        return rows

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return rl_terms(batch, live, self.options.rl) | sft_terms(batch, live)

    def shadow_terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return shadow_terms(batch, live, self.options)

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        o, lam = self.options, self.lam
        sft = policy.grad(self.terms, batch, {"nll": 1.0})
        pull = preconditioned_norm(policy, sft)
        policy.park(sft.theta)
        rl = policy.grad(self.terms, batch, rl_coef(o.rl))
        found = shares(pull, preconditioned_norm(policy, rl), lam)
        joint = grads.blend((1 - lam, sft.theta), (lam, rl.theta))  # each is as large as the model: both are used up
        shadow = policy.grad(self.shadow_terms, batch, shadow_coef(o.rl), at="shadow")
        # D was made by the steps before, so it knows nothing of these rollouts: on rollouts that it had been fitted to,
        # z would find that theta is better on them whatever it is elsewhere.
        z = alignment(batch.rows, rl.logps, shadow.logps)
        policy.lean("shadow", "theta", o.leak)  # before theta's step, and after the shadow's gradient: the snapshot
        norm = policy.apply("theta", joint)                                                              # (1)
        policy.apply("shadow", shadow.theta, clip_as="theta", beside=joint)                              # (2)
        gain = grads.mix((1.0, rl.w), (-1.0, shadow.w))
        policy.apply("w", grads.mix((1 - lam, sft.w), (lam, gain)))                                      # (3)
        self.logit = self.bound(self.logit - o.eta * min(max(z, -1.0), 1.0))                             # (4)
        found |= diagnostics(policy, o, batch.rows, sft, rl, shadow, gain)
        found |= {"lambda": lam, **self.sampled}
        return report(sft, rl, shadow, norm, found) | {"dial/z": z, "dial/lambda": lam}

    def warnings(self, metrics: Metrics) -> list[str]:
        return shadow_warnings("bridge_dial", metrics, "what turns lambda")

    def deploy(self, policy: Policy, accuracy: Callable[[], float]) -> Metrics:
        """theta^ + c (theta - theta^), the best by validation; of equals the nearest to the theta that was trained."""
        policy.fork("trained")

        def place(c: float) -> None:
            policy.copy("shadow", "theta")
            policy.lean("theta", "trained", c)

        found: dict[float, float] = {}
        for c in sorted({*self.options.scales, 1.0}):
            place(c)
            found[c] = accuracy()
        best = min(found, key=lambda c: (-found[c], abs(c - 1), c))
        place(best)
        del policy.groups["trained"]
        return {"dial/scale": best, **{f"dial/accuracy_at_{c:g}": value for c, value in found.items()}}

    def state(self) -> dict[str, Any]:
        return {"logit": self.logit}

    def load(self, state: Mapping[str, Any]) -> None:
        self.logit = state["logit"]


def logit(p: float) -> float:
    if p in (0.0, 1.0):
        return math.copysign(math.inf, p - 0.5)
    return math.log(p / (1 - p))


def by_group(rows: Sequence[Row], live: Mapping[int, np.ndarray], shadow: Mapping[int, np.ndarray]) -> list[float]:
    """x_g of (4). Rows whose every advantage is 0 were not passed through the model and add nothing, but their groups
    count; groups that the grader left no two answers of have no stream and do not."""
    found: dict[tuple[str, int], float] = {}
    for i, row in enumerate(rows):
        if (stream := row.streams.get("pg")) is None:
            continue
        x = 0.0
        if i in live and i in shadow:
            length = max(1, stream.mask.sum()) if stream.norm == "row" else 1  # the common denominator cancels in z
            x = float((stream.weight * (live[i] - shadow[i]))[stream.mask].sum()) / length
        found[row.at, row.group] = found.get((row.at, row.group), 0.0) + x
    return list(found.values())


def alignment(rows: Sequence[Row], live: Mapping[int, np.ndarray], shadow: Mapping[int, np.ndarray]) -> float:
    """z of (4); 0 where it has no standard error."""
    x = np.array(by_group(rows, live, shadow))
    error = float(np.std(x, ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else 0.0
    return float(np.mean(x)) / error if error > 0 else 0.0
