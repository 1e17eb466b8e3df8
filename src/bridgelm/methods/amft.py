"""AMFT (arXiv 2508.06944): SFT and RL mixed by a weight that follows validation reward and entropy.

Its authors asked for a withdrawal (arXiv v3, 10 Oct 2025: under investigation for possible academic misconduct). The
idea is here; its numbers are no targets.

    minimise  (1 - mu) L_RL + mu L_SFT
    mu  <-  clip( mu + eta s + eta_H sign (H* - H), mu_min, mu_max )     s every `every` steps, H in each; then the step
    s   =  cos(g_val, g_SFT) - cos(g_val, g_RL)      (`inner`: lr <g_val, g_SFT - g_RL>, dU/dmu of one step ahead)

U is mean reward on validation problems and g_val = -grad U, from rollouts of theta on them, by group advantages. All
gradients are of one theta. H is the mean of -log pi over the tokens that theta drew in the step, H* that of the first
rollouts after the warm-up. `adam` takes the inner products in Adam's metric, in which theta moves. The validation
problems are those that no look at the validation set uses, so that neither the curve nor the choice of weights sees
them.

Our reading: no critic; L_RL is the clipped surrogate on group advantages. The raw inner product is of the size of the
rate and moves nothing: the cosines take its place. The paper's text turns the entropy's sign against its equation;
`equation` is followed. The released code, a skeleton that does not run, ascends validation loss on demonstrations
instead: nothing is taken from it but its settings.

Trap: a validation group of equal rewards has no gradient, and a look at few problems is mostly noise. Hold
`amft/signal` against its spread over the looks before believing mu.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

import numpy as np
from torch import Tensor

from bridgelm.config.run_config import RunConfig
from bridgelm.data.cursors import Data
from bridgelm.errors import UserError
from bridgelm.methods.base import (
    Form,
    Gradients,
    Method,
    descend,
    rl_coef,
    rl_rows,
    rl_setup,
    rl_terms,
    sft_rows,
    sft_terms,
)
from bridgelm.model import grads
from bridgelm.model.grads import Gradient
from bridgelm.model.policy import Policy
from bridgelm.objective import credit, losses
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Problem, Row


@final
class Amft(Method):
    tier = "derived"
    gradients = Gradients(2, 3, 3)
    form = Form(data="rollouts + demos; at times rollouts on validation problems", demo="mu", rollout="(1 - mu) PPO",
                controller="mu by <g_val, g_SFT - g_RL> and entropy", models="none; reference with rl.kl_coef")
    needs = frozenset({"demos", "val"})

    def __init__(self, options: Any, run: RunConfig) -> None:
        super().__init__(options, run)
        self.first = round(options.warmup * run.steps)  # the first step after the warm-up
        self.mu: float = options.mu
        self.target: float | None = options.target_entropy

    def setup(self, policy: Policy) -> None:
        rl_setup(policy, self.options.rl)
        policy.optimiser("theta")

    # -- rows and losses -------------------------------------------------------------------------------------------

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        problems = self.unseen(data)
        rows = sft_rows(data, roll, self.run)
        if step >= self.first:
            rows = rl_rows(data, roll, self.options.rl, self.run) + rows
            if (step - self.first) % self.options.every == 0:
                rows += valued(roll(drawn(data, problems, self.options.problems)))
        return rows

    def unseen(self, data: Data) -> dict[str, Problem]:
        """The validation problems that no look at the validation set uses."""
        looked, there = self.run.eval.problems, data.splits.validation
        if len(there) <= looked:
            raise UserError(f"eval.problems: all {len(there)} validation problems are looked at, and method 'amft' "
                            "moves mu by others; set it to less, or give more in data.validation")
        return {problem.id: problem for problem in there[looked:]}

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        out = rl_terms(batch, live, self.options.rl) | sft_terms(batch, live)
        if "val" in batch:  # of the policy that drew them: the ratio is 1
            out["val"] = losses.nll(live.logp_BT, batch.weight["val"])
        return out

    # -- the update ------------------------------------------------------------------------------------------------

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        rl = self.options.rl
        if step < self.first:
            return descend(policy, batch, self.terms, {"nll": 1.0})
        found = self.follow_entropy(batch)
        if "val" not in batch.counts:
            self.move(found["entropy_pull"])
            step_taken = descend(policy, batch, self.terms, rl_coef(rl, 1 - self.mu) | {"nll": self.mu})
        else:
            g_val, g_sft = (policy.grad(self.terms, batch, {name: 1.0}) for name in ("val", "nll"))
            g_rl = policy.grad(self.terms, batch, rl_coef(rl))
            found |= self.look(policy, g_val.theta, g_sft.theta, g_rl.theta)
            signal = found["inner"] if self.options.signal == "inner" else found["signal"]
            self.move(self.options.eta * signal + found["entropy_pull"])
            joint = grads.blend((1 - self.mu, g_rl.theta), (self.mu, g_sft.theta))
            step_taken = {"grad_norm/theta": policy.apply("theta", joint), "loss/nll": g_sft.losses["nll"],
                          "loss/pg": g_rl.losses["pg"]}
            found |= reward_of(batch)
        return step_taken | {f"amft/{name}": value for name, value in found.items()} | {"amft/mu": self.mu}

    def move(self, by: float) -> None:
        self.mu = min(max(self.mu + by, self.options.mu_min), self.options.mu_max)

    def follow_entropy(self, batch: Batch) -> Metrics:
        """H by the log-probs of what was drawn, and what it adds to mu."""
        o = self.options
        rows = [row for row in batch.kind("rollout") if row.at == "live" and row.old_logps is not None]
        surprise = sum(float(-row.old_logps[row.drawn].sum()) for row in rows)  # type: ignore[index]
        entropy = surprise / max(1, sum(int(row.drawn.sum()) for row in rows))
        self.target = entropy if self.target is None else self.target
        sign = 1.0 if o.entropy_sign == "equation" else -1.0
        return {"entropy": entropy, "target": self.target,
                "entropy_pull": o.eta_entropy * sign * (self.target - entropy)}

    def look(self, policy: Policy, g_val: Gradient, g_sft: Gradient, g_rl: Gradient) -> Metrics:
        """What a step with more imitation does to validation reward, raw and free of scale."""
        metric = "theta" if self.options.metric == "adam" else None
        rate = policy.optimisers["theta"].lr * policy.factor
        by_sft, by_rl = (policy.dot(g_val, g, metric) for g in (g_sft, g_rl))
        size_val, size_sft, size_rl = (policy.dot(g, g, metric) ** 0.5 for g in (g_val, g_sft, g_rl))
        cos_sft, cos_rl = over(by_sft, size_val * size_sft), over(by_rl, size_val * size_rl)
        conflict = over(policy.dot(g_sft, g_rl, metric), size_sft * size_rl)
        return {"signal": cos_sft - cos_rl, "cos_sft": cos_sft, "cos_rl": cos_rl, "cos_sft_rl": conflict,
                "inner": rate * (by_sft - by_rl)}

    def state(self) -> dict[str, Any]:
        return {"mu": self.mu, "target": self.target}

    def load(self, state: Mapping[str, Any]) -> None:
        self.mu, self.target = state["mu"], state["target"]


def over(a: float, b: float) -> float:
    """A gradient of zero points nowhere."""
    return a / b if b else 0.0


def drawn(data: Data, problems: Mapping[str, Problem], n: int) -> list[Problem]:
    """The next `n` of `problems` on the validation cursor, or as many as there are."""
    out: list[Problem] = []
    while len(out) < min(n, len(problems)):
        out += [problem for problem in data.val(1) if problem.id in problems]
    return out


def valued(rows: list[Row]) -> list[Row]:
    """Rollouts on validation problems, with the stream whose gradient is that of mean reward, unbiased."""
    out = [replace(row, at="val") for row in rows]
    for group in credit.groups_of(rows):
        if len(group) > 1:
            rewards = np.array([rows[i].reward for i in group], dtype=np.float64)
            for i, advantage in zip(group, credit.leave_one_out(rewards), strict=True):
                out[i] = out[i].with_stream("val", advantage, "constant", 1.0)
    return out


def reward_of(batch: Batch) -> Metrics:
    rewards = [row.reward for row in batch.rows if "val" in row.streams]
    return {"val_reward": float(sum(rewards)) / max(1, len(rewards))}
