"""BRIDGE with a leaky shadow, and a w that moves as far as its third term can be trusted.

theta^ is the shadow, P the diagonal metric of theta's Adam (the identity under SGD). All gradients are taken at one
snapshot (theta_k, theta^_k, w_k):

    theta  += a P [ (1 - l) grad_theta J_SFT(theta, w) + l grad_theta J_RL(theta, w) ]                            (1)
    theta^ += a P grad_theta J_RL(theta^, w) + rho (theta - theta^)                                               (2)
    w      += q b P [ (1 - l) grad_w J_SFT(theta, w) + l h ],    h = grad_w J_RL(theta, w) - grad_w J_RL(theta^, w)  (3)
    q       = clip( mean of <h_A, h_B> / mean of (|h_A|^2 + |h_B|^2) / 2, 0, 1 )                                  (4)

h_A and h_B come from the two halves of the step's groups, the means run over steps. q tends to 1 where h is the same in
both halves and to 0 where it is noise; it multiplies w's rate, since a smaller gradient is no smaller step under Adam.
The code minimises losses L = -J, so every `+=` is a descent step and the signs inside the brackets stay.

Why a leak, and `ratio = taper`: a shadow that never returns leaves the rollouts' policy after some ten steps, and its
ratios then say little. By ratios alone nothing calls it back; tapered, rewarded tokens always do. Ours, not the
paper's: BRIDGE as published has rho = 0 and q = 1.

Trap: a leak is a re-sync in disguise. Where J_RL curves by c, a share r = a c / (a c + rho) of the third term is left
at rest, so a large leak at a small rate leaves none of it and w learns what theta learns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

from torch import Tensor

from bridgelm.config.run_config import RunConfig
from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Gradients, Method, rl_coef, rl_terms, sft_terms
from bridgelm.methods.shadow import (
    diagnostics,
    gradient_or_last,
    preconditioned_norm,
    report,
    shadow_coef,
    shadow_gather,
    shadow_setup,
    shadow_terms,
    shadow_warnings,
    shares,
)
from bridgelm.model import batching, grads
from bridgelm.model.policy import Grads, Policy
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row

ROUNDING = 1e-5  # a third term this small beside RL's own is what the difference of equal float32 gradients leaves


@final
class BridgeLeaky(Method):
    tier = "experimental"
    gradients = Gradients(1, 3, 3, parked=1, elsewhere=3)
    form = Form(data="rollouts + demos", demo="1 - lambda", rollout="lambda PPO; w: less the shadow's",
                controller="w's rate by the agreement of half-batches", models="leaky shadow, low-rank w")
    needs = frozenset({"demos"})

    def __init__(self, options: Any, run: RunConfig) -> None:
        super().__init__(options, run)
        self.product = self.size = 0.0  # the running means of (4)
        self.sampled: Metrics = {}  # of the shadow's own rollouts, in steps that have some

    @property
    def agreement(self) -> float:
        return min(max(self.product / self.size, 0.0), 1.0) if self.size else 1.0

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
        o, lam, parts = self.options, self.options.lam, halves(batch)
        sft = policy.grad(self.terms, batch, {"nll": 1.0})
        pull = preconditioned_norm(policy, sft)
        policy.park(sft.theta)
        rl, rl_w = grad_by_parts(policy, self.terms, parts, rl_coef(o.rl))
        found = shares(pull, preconditioned_norm(policy, rl), lam)
        joint = grads.blend((1 - lam, sft.theta), (lam, rl.theta))  # each is as large as the model: both are used up
        shadow = gradient_or_last(policy, o, step, lambda: self.at_shadow(policy, parts, rl_w))
        if shadow.theta:
            policy.lean("shadow", "theta", o.leak)  # before theta's step, after the shadow's gradient: the snapshot
        norm = policy.apply("theta", joint)                                                              # (1)
        if shadow.theta:
            policy.apply("shadow", shadow.theta, beside=joint)                                           # (2)
        gain = grads.mix((1.0, rl.w), (-1.0, shadow.w))
        policy.apply("w", grads.mix((1 - lam, sft.w), (lam, gain)), rate=self.agreement)                 # (3)
        rows = [row for part in parts for row in part.rows]
        found |= diagnostics(policy, o, rows, sft, rl, shadow, gain)
        found |= {"lambda": lam, "agreement": self.agreement, **self.sampled}
        return report(sft, rl, shadow, norm, found)

    def at_shadow(self, policy: Policy, parts: list[Batch], rl_w: list[grads.Gradient]) -> Grads:
        shadow, shadow_w = grad_by_parts(policy, self.shadow_terms, parts, shadow_coef(self.options.rl), at="shadow")
        self.compare(policy, rl_w, shadow_w)
        return shadow

    def compare(self, policy: Policy, rl_w: list[grads.Gradient], shadow_w: list[grads.Gradient]) -> None:
        """(4). Without two halves, or without a third term in either, there is nothing new to know."""
        if len(rl_w) < 2:
            return
        a, b = (grads.mix((1.0, rl), (-1.0, shadow)) for rl, shadow in zip(rl_w, shadow_w, strict=True))
        product, size = policy.dot(a, b), 0.5 * (policy.dot(a, a) + policy.dot(b, b))
        if size > ROUNDING**2 * sum(policy.dot(rl, rl) for rl in rl_w):
            keep = self.options.agreement_decay if self.size else 0.0  # the means start at their first values
            self.product = keep * self.product + (1 - keep) * product
            self.size = keep * self.size + (1 - keep) * size

    def warnings(self, metrics: Metrics) -> list[str]:
        return shadow_warnings("bridge_leaky", metrics, "the cooperative gain")

    def state(self) -> dict[str, Any]:
        return {"product": self.product, "size": self.size}

    def load(self, state: Mapping[str, Any]) -> None:
        self.product, self.size = state["product"], state["size"]


def halves(batch: Batch) -> list[Batch]:
    """The rollouts in two halves that share no group, the same ones in whatever order the rows come; one part if there
    is but one group."""
    rollouts = sorted((row for row in batch.rows if row.kind == "rollout"), key=lambda row: (row.at, row.group))
    rest = replace(batch, rows=tuple(rollouts))
    return [half for half in batching.halves(rest) if half.rows] or [rest]


def grad_by_parts(policy: Policy, terms: Any, parts: list[Batch], coef: Mapping[str, float],
                  at: str = "live") -> tuple[Grads, list[grads.Gradient]]:
    """The gradient of all parts together, added up in place, and w's of each. Log-probs count through the parts."""
    whole = policy.grad(terms, parts[0], coef, at=at)
    each, start = [whole.w], len(parts[0].rows)
    for part in parts[1:]:
        found = policy.grad(terms, part, coef, at=at)
        each.append(found.w)
        for name in whole.theta:
            whole.theta[name].add_(found.theta.pop(name))
        whole.w = grads.mix((1.0, whole.w), (1.0, found.w))
        whole.losses = {name: value + found.losses[name] for name, value in whole.losses.items()}
        whole.logps |= {start + i: logp for i, logp in found.logps.items()}
        start += len(part.rows)
    return whole, each
