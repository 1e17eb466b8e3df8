"""SASR (arXiv 2505.13026): after a warm-up, a step imitates or reinforces, by how far imitation's gradient has faded.

    warm-up     L_SFT, and G_warm = || grad L_SFT || of its last step
    then        p = G_last / (G_last + gamma G_warm),   G_last = || grad L_SFT || of the last step that imitated
    `sampled`   one draw a ~ U(0, 1) a step:  a < p: a step of L_SFT, which renews G_last;  else a step of L_GRPO
    `blend`     a step of  p L_SFT + (1 - p) L_GRPO,  which renews G_last

Norms are of all of theta's gradient, before clipping, of a mean over tokens in both phases. At the hand-over
p = 1 / (1 + gamma). The draw is seeded by the run's seed and the step. With rl.kl_coef the reference is the
warm-started policy. Problems are sampled in GRPO steps only: so many steps make fewer rollouts than those of others.

Our reading: no official code is to be had; the rule is that of a third party's script, which cites the paper's
Algorithm 1. `blend`, and a G of GRPO's own last gradient in place of G_warm (`denominator`), are an explainer's. The
paper's split of tokens at the median advantage is not used: advantages are z-scored, as in that script.

Trap: G_last is as old as the last SFT step. Where p is small it stays what it was, and so does p: `probe_every`
measures it again without a step, and `floor` bounds p from below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
from torch import Tensor

from bridgelm.config.run_config import RunConfig
from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method, rl_coef, rl_rows, rl_setup, rl_terms, sft_rows, sft_terms
from bridgelm.model import grads
from bridgelm.model.policy import Policy
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row

DRAW = 2505  # of the branch: its stream of random numbers is nobody else's


@final
class Sasr(Method):
    tier = "derived"
    form = Form(data="demos, then demos or rollouts", demo="1 or 0; blend: p", rollout="PPO or 0; blend: (1 - p) PPO",
                controller="p = G_SFT/(G_SFT + gamma G_warm)", models="reference: the warm-started policy")
    needs = frozenset({"demos"})

    def __init__(self, options: Any, run: RunConfig) -> None:
        super().__init__(options, run)
        self.first = max(1, round(options.warmup * run.steps))  # the first step after the warm-up
        self.last = self.warm = self.grpo = 0.0  # norms: G_last, G_warm, and of the last GRPO gradient
        self.age = 0  # steps since G_last was measured
        self.owns_reference = False
        self.p, self.imitating, self.reinforcing = 1.0, True, False  # of the present step

    def setup(self, policy: Policy) -> None:
        self.owns_reference = self.options.rl.kl_coef > 0 and "reference" not in policy.groups
        rl_setup(policy, self.options.rl)
        policy.optimiser("theta")

    # -- the controller --------------------------------------------------------------------------------------------

    def share(self) -> float:
        """p, of the next step."""
        other = self.warm if self.options.denominator == "warmup" or not self.grpo else self.grpo
        below = self.last + self.options.gamma * other
        return max(self.options.floor, self.last / below if below else 0.0)

    def imitates(self, step: int) -> bool:
        """The same after a resume."""
        if step < self.first or self.options.rule == "blend":
            return True
        return bool(np.random.default_rng([self.run.seed % 2**63, step, DRAW]).random() < self.share())

    # -- rows and losses -------------------------------------------------------------------------------------------

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        if step == self.first and self.owns_reference:
            roll.policy.copy("theta", "reference")
        self.p, self.imitating = 1.0 if step < self.first else self.share(), self.imitates(step)
        self.reinforcing = step >= self.first and (self.options.rule == "blend" or not self.imitating)
        measuring = self.imitating or 0 < self.options.probe_every <= self.age + 1
        self.age = 0 if measuring else self.age + 1
        rows = rl_rows(data, roll, self.options.rl, self.run) if self.reinforcing else []
        return rows + (sft_rows(data, roll, self.run) if measuring else [])

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return rl_terms(batch, live, self.options.rl) | sft_terms(batch, live)

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        found: Metrics = {"sasr/p": self.p, "sasr/imitates": float(self.imitating), "sasr/age": float(self.age)}
        parts = []
        if "nll" in batch.counts:
            sft = policy.grad(self.terms, batch, {"nll": 1.0})
            self.last = grads.norm(sft.theta)
            self.warm = self.last if step < self.first else self.warm
            found["loss/nll"] = sft.losses["nll"]
            if self.imitating:  # or it was measured only
                parts.append((self.p, sft.theta))
        if self.reinforcing:
            rl = policy.grad(self.terms, batch, rl_coef(self.options.rl))
            self.grpo = grads.norm(rl.theta) or self.grpo
            found |= {f"loss/{name}": value for name, value in rl.losses.items()}
            parts.append((1 - self.p, rl.theta))
        gradient = grads.mix(*parts) if len(parts) > 1 else parts[0][1]  # one branch has the whole step
        return found | {"grad_norm/theta": policy.apply("theta", gradient), "sasr/norm_sft": self.last,
                        "sasr/norm_warm": self.warm, "sasr/norm_grpo": self.grpo}

    def state(self) -> dict[str, Any]:
        return {"last": self.last, "warm": self.warm, "grpo": self.grpo, "age": self.age}

    def load(self, state: Mapping[str, Any]) -> None:
        self.last, self.warm, self.grpo, self.age = (state[key] for key in ("last", "warm", "grpo", "age"))
