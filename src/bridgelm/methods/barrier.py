"""Barrier: towards the best fit of the demonstrations among the policies that are best by reward; no shadow, no w.

    theta += a P (g_S + nu g_R) / (1 + eta)                                  g_S, g_R: gradients of J_SFT and J_RL
    nu = max(0, eta sqrt(n_S / n_R) - c / n_R),    c = <g_S, g_R>,  n_S = <g_S, g_S>,  n_R = <g_R, g_R>

<g, h> = g' P h with P the metric of theta's Adam (its second moments before the step). Before the division by 1 + eta
the first-order gain in reward is <g_R, g_S + nu g_R> >= eta sqrt(n_S n_R), with equality where nu > 0: demonstrations
may take what costs no reward, and never stop RL. The scales of both losses cancel. As
eta -> 0 what is left is PCGrad's projection, of g_S alone. Where c is near 0 this is `joint` with mu = 1 / eta: the
metric log_nu_over_eta says how much more it is than that.

The square of a noisy gradient counts its noise. n is therefore 4 <g(A), g(B)> of two half-batches, each an independent
estimate of half the gradient; c has independent noise as it is. c, n_S and n_R are running means, this step included.
When n_R cannot be told from zero (under two standard errors of its mean), nothing is measured: the last measured nu is
held (eta before there is one), but where hardly any answer is right RL has nothing to say yet: the step is SFT alone.
The code minimises losses L = -J: both gradients change sign, and c, n_S, n_R do not.

Trap: an RL optimum and an all-fail start both have n_R near zero; `low` tells them apart, by reward. The divisor is
constant because nu grows as g_R vanishes: divided by 1 + nu, the step would vanish too, where the RL optima are met.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

from torch import Tensor

from bridgelm.config.run_config import RunConfig
from bridgelm.data.cursors import Data
from bridgelm.errors import UserError
from bridgelm.methods.base import Form, Gradients, Method, rl_coef, rl_rows, rl_setup, rl_terms, sft_rows, sft_terms
from bridgelm.model import batching, grads
from bridgelm.model.policy import Policy, Terms
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row, Verdict

SUMS = ("c", "n_sft", "n_rl", "n_rl_squared", "weight", "weight_squared")


@final
class Barrier(Method):
    tier = "experimental"
    gradients = Gradients(2, 3, 3)
    form = Form(data="rollouts + demos", demo="1/(1 + eta)", rollout="nu PPO/(1 + eta)",
                controller="nu from <g_SFT, g_RL> and two half-batches", models="none")
    needs = frozenset({"demos"})

    def __init__(self, options: Any, run: RunConfig) -> None:
        super().__init__(options, run)
        if min(run.batch.demos, run.rollout.prompts // run.rollout.updates) < 2:
            raise UserError("method 'barrier' compares two half-batches: it needs batch.demos >= 2 and at least 2 "
                            "rollout.prompts for each of rollout.updates")
        self.nu = min(options.eta, options.cap)  # the last measured one; at first, RL weighs eta
        self.sums = dict.fromkeys(SUMS, 0.0)

    def setup(self, policy: Policy) -> None:
        rl_setup(policy, self.options.rl)
        policy.optimiser("theta")

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        return rl_rows(data, roll, self.options.rl, self.run) + sft_rows(data, roll, self.run)

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return rl_terms(batch, live, self.options.rl) | sft_terms(batch, live)

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        halves = batching.halves(in_fixed_order(batch))
        sft, n_sft, losses = measure(policy, self.terms, halves, {"nll": 1.0})
        rl, n_rl, more = measure(policy, self.terms, halves, rl_coef(self.options.rl))
        c = policy.dot(sft, rl, metric="theta")
        error = 0.0
        if self.metric_is_ripe(policy):
            c, n_sft, n_rl, error = self.averaged(c, n_sft, n_rl)
        nu, held = self.weigh(c, n_sft, n_rl, error, mean_reward(batch))
        whole = 1 + self.options.eta  # where nu > 0 the sum is about as large as g_S: no larger divisor is needed
        norm = policy.apply("theta", grads.blend((1 / whole, sft), (nu / whole, rl)))
        found = {"nu": nu, "held": float(held), "n_sft": n_sft, "n_rl": n_rl}
        if min(n_sft, n_rl) > 0:
            found["conflict"] = c / (math.sqrt(n_sft) * math.sqrt(n_rl))  # a cosine: below 0 they disagree
        if nu > 0:
            found["log_nu_over_eta"] = math.log(nu / self.options.eta)
        return {"grad_norm/theta": norm, **{f"loss/{name}": value for name, value in (losses | more).items()},
                **{f"barrier/{name}": value for name, value in found.items()}}

    def metric_is_ripe(self, policy: Policy) -> bool:
        """Whether this step's products can be averaged with others. Before Adam's first step there is no P, and the P
        of a handful of gradients gives products ten times those that follow, which would stay in the means for long:
        such steps go by their own. Plain SGD has one metric throughout."""
        if self.run.optim.kind == "sgd":
            return True
        taken = max((float(s["step"]) for s in policy.optimisers["theta"].optimiser.state.values()), default=0.0)
        return taken >= (1 / (1 - self.options.decay) - 1e-9 if self.options.decay < 1 else 1)

    def averaged(self, c: float, n_sft: float, n_rl: float) -> tuple[float, float, float, float]:
        """Running means with this step in them, and the standard error of the one of n_R. A mean of one step (always,
        with decay 0) has no error to be known."""
        now = dict(zip(SUMS, (c, n_sft, n_rl, n_rl * n_rl, 1.0, 1.0), strict=True))
        decay = self.options.decay
        fade = {key: decay**2 if key == "weight_squared" else decay for key in SUMS}
        self.sums = {key: fade[key] * self.sums[key] + now[key] for key in SUMS}
        weight = self.sums["weight"]
        c, n_sft, n_rl, square = (self.sums[key] / weight for key in ("c", "n_sft", "n_rl", "n_rl_squared"))
        share = self.sums["weight_squared"] / weight**2  # one over the effective number of steps
        variance = max(0.0, square - n_rl * n_rl)
        return c, n_sft, n_rl, math.sqrt(variance * share / (1 - share)) if share < 1 else 0.0

    def weigh(self, c: float, n_sft: float, n_rl: float, error: float, reward: float) -> tuple[float, bool]:
        """nu of this step, and whether it is not measured but held (or 0, see `low`)."""
        o = self.options
        if n_rl > 0 and n_rl >= 2 * error:
            wanted = o.eta * math.sqrt(max(0.0, n_sft)) * math.sqrt(n_rl)
            self.nu = min(o.cap, max(0.0, (wanted - c) / n_rl))
            return self.nu, False
        return (0.0 if reward < o.low else self.nu), True

    def state(self) -> dict[str, Any]:
        return {"nu": self.nu, "sums": self.sums}

    def load(self, state: Mapping[str, Any]) -> None:
        self.nu, self.sums = state["nu"], dict(state["sums"])


def measure(policy: Policy, terms: Terms, halves: tuple[Batch, Batch],
            coef: Mapping[str, float]) -> tuple[grads.Gradient, float, Metrics]:
    """Gradient of the batch, its squared norm without the part that is noise, and the terms' losses."""
    a, b = (policy.grad(terms, half, coef) for half in halves)
    square = 4 * policy.dot(a.theta, b.theta, metric="theta")  # each is half of the gradient
    return grads.blend((1.0, a.theta), (1.0, b.theta)), square, {name: a.losses[name] + b.losses[name] for name in coef}


def in_fixed_order(batch: Batch) -> Batch:
    """The halves must not depend on the order of the rows. Demonstrations go by a checksum, which knows nothing of
    what they are about: in an alphabetical order the halves would resemble each other."""
    rows = sorted(batch.rows, key=lambda row: (row.at, row.group, zlib.crc32(row.ids.tobytes())))
    return replace(batch, rows=tuple(rows))


def mean_reward(batch: Batch) -> float:
    """The mean reward of the graded rollouts; NaN if there are none."""
    rewards = [row.reward for row in batch.rows
               if row.kind == "rollout" and row.at == "live" and row.verdict is not Verdict.ERROR]
    return math.fsum(rewards) / len(rewards) if rewards else math.nan
