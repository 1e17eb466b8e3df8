"""BRIDGE: cooperative SFT and RL as a bilevel problem (arXiv 2509.06948).

    max_w J_SFT(theta*(w), w)   with   theta*(w) = argmax_theta J_RL(theta, w)

solved by a first-order penalty method. theta^ is the shadow, a copy that follows J_RL alone; all gradients are taken at
one snapshot (theta_k, theta^_k, w_k):

    theta  += a [ (1 - l) grad_theta J_SFT(theta, w) + l grad_theta J_RL(theta, w) ]                          (1)
    theta^ += a grad_theta J_RL(theta^, w)                                                                    (2)
    w      += b [ (1 - l) grad_w J_SFT(theta, w) + l ( grad_w J_RL(theta, w) - grad_w J_RL(theta^, w) ) ]     (3)

The last bracket of (3) is the gradient of the cooperative gain J_RL(theta, w) - J_RL(theta^, w). Deployed: theta with w
merged. The code minimises losses L = -J, so every `+=` is a descent step and the signs inside the brackets stay.

Our reading: the shadow is persistent, learns from the joint policy's rollouts, and is corrected by token ratios. The
preset `paper` clips those ratios (PPO), steps the shadow with plain SGD and divides advantages by each group's
deviation, as GRPO does; `repaired`, the default, truncates them, gives the shadow theta's second moments, and only
centres rewards, so that advantages have one scale for both policies and the same one as in every other method.

Bias of the truncated token ratio: it stands in for the ratio of the whole prefix and is capped at `ratio_cap`. It is
exact for answers of one token under the cap; docs/bridge.md works a two-token case.

The controls of that bracket (`third`) are in `bridge_controls.py`.

Trap: with w on the matrices of a full-rank theta, theta and theta + w reach the same set of models, and the rest points
are those of plain joint mixing. A positive gain then measures a shadow that lags, not cooperation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor

from bridgelm.config.run_config import RunConfig
from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Gradients, Method, rl_coef, rl_terms, sft_terms
from bridgelm.methods.bridge_controls import Third
from bridgelm.methods.shadow import (
    diagnostics,
    gradient_or_last,
    has_left,
    is_still,
    preconditioned_norm,
    report,
    shadow_coef,
    shadow_gather,
    shadow_setup,
    shadow_terms,
    shares,
)
from bridgelm.model import grads
from bridgelm.model.policy import Grads, Policy
from bridgelm.objective import credit, shadow_diagnostics
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row

PATIENCE = 50  # steps without a third term before saying so


@final
class Bridge(Method):
    tier = "derived"
    gradients = Gradients(1, 2, 2, parked=1, elsewhere=2)
    form = Form(data="rollouts + demos", demo="1 - lambda", rollout="lambda PPO; w: less the shadow's",
                controller="lambda constant or linear", models="shadow, low-rank w")
    needs = frozenset({"demos"})

    def __init__(self, options: Any, run: RunConfig) -> None:
        super().__init__(options, run)
        self.third = Third(options.third, run.seed)
        self.vanished = 0  # steps in a row without a third term
        self.sampled: Metrics = {}  # of the shadow's own rollouts, in steps that have some

    def setup(self, policy: Policy) -> None:
        o = self.options
        shared = o.shadow_step == "shared_moments" and self.run.optim.adam
        shadow_setup(policy, o, shared, o.exclusive, self.third.has_shadow, self.third.moves_shadow)

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        """The joint policy's rollouts teach theta, w and (unless it samples its own) the shadow."""
        o, third = self.options, self.third
        rows, self.sampled = shadow_gather(data, roll, o, self.run, step, third.has_shadow, o.shadow_rollouts == "own")
        return third.dealt(rows, step)

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return rl_terms(batch, live, self.options.rl) | sft_terms(batch, live)

    def shadow_terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return shadow_terms(batch, live, self.options)

    # -- the update ------------------------------------------------------------------------------------------------

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        lam = self.lam(step)
        sft = policy.grad(self.terms, batch, {"nll": 1.0})
        pull = preconditioned_norm(policy, sft)
        policy.park(sft.theta)
        rl = self.at_theta(policy, batch)
        found = {"lambda": lam} | shares(pull, preconditioned_norm(policy, rl), lam)
        resync = self.resyncs(step)
        again = dict(rl.theta) if resync else {}
        joint = grads.blend((1 - lam, sft.theta), (lam, rl.theta))  # each is as large as the model: both are used up
        placebo = self.third.placebo(batch, lambda dealt: self.at_theta(policy, dealt))
        if resync:
            policy.copy("theta", "shadow")
        norm = policy.apply("theta", joint)                                            # (1)
        policy.park(joint)  # the shadow's step is bounded by it
        if resync:  # the one-step reading: theta^ is theta and one step of RL, and w's gradient is taken there
            policy.apply("shadow", again, beside=joint)
        # Still the snapshot: the gradients at the shadow do not depend on theta, and w has not moved.
        shadow = (gradient_or_last(policy, self.options, step, lambda: self.at_shadow(policy, batch))
                  if self.third.has_shadow else self.third.without_shadow(rl))
        placebo_shadow = self.third.placebo(batch, lambda dealt: self.at_shadow(policy, dealt))
        if self.third.moves_shadow and not resync and shadow.theta:  # there is none in a step where it rests
            policy.apply("shadow", shadow.theta, beside=joint)                         # (2)
        gain = grads.mix((1.0, rl.w), (-1.0, shadow.w))
        bracket = self.third.bracket(gain, placebo, placebo_shadow, step)
        policy.apply("w", grads.mix((1 - lam, sft.w), (lam, bracket)))                 # (3)
        found |= self.sampled | diagnostics(policy, self.options, batch.rows, sft, rl, shadow, gain)
        self.vanished = self.vanished + 1 if vanishes(found) else 0
        if bracket is not gain:
            found["norm_placebo"] = grads.norm(bracket)
        return report(sft, rl, shadow, norm, found)

    def at_theta(self, policy: Policy, batch: Batch) -> Grads:
        return policy.grad(self.terms, batch, rl_coef(self.options.rl))

    def at_shadow(self, policy: Policy, batch: Batch) -> Grads:
        return policy.grad(self.shadow_terms, batch, shadow_coef(self.options.rl), at="shadow")

    def resyncs(self, step: int) -> bool:
        return self.options.resync_every > 0 and step % self.options.resync_every == 0

    def lam(self, step: int) -> float:
        o = self.options
        if o.lambda_start is None:
            return o.lam
        return credit.schedule("linear", o.lambda_start, o.lam, step / max(1, self.run.steps - 1))

    def warnings(self, metrics: Metrics) -> list[str]:
        out = []
        if self.vanished >= PATIENCE:
            out.append(f"BRIDGE's third term has done nothing for {PATIENCE} steps: either it is zero (the shadow sits "
                       "at its RL optimum or stopped learning; w repeats theta's own gradient), or it cancels the RL "
                       "term (the shadow is where theta is; w follows SFT alone)")
        if is_still(metrics):
            out.append("BRIDGE's shadow hardly moves (under a thousandth of theta's step): the cooperative gain is not "
                       "measured against RL; use shadow_step = 'shared_moments'")
        if has_left(metrics):
            out.append(f"BRIDGE's shadow has left the rollouts' policy (effective sample size under "
                       f"{shadow_diagnostics.RELIABLE:.0%}): the gain by importance weights is not reliable; set "
                       "probe_every")
        return out

    def state(self) -> dict[str, Any]:
        return {"vanished": self.vanished}

    def load(self, state: Mapping[str, Any]) -> None:
        self.vanished = state["vanished"]


def vanishes(found: Metrics) -> bool:
    """Whether nothing is left of the third term: of the shadow's gradient, or of the bracket of (3) that it is in."""
    return "norm_shadow" in found and min(found["norm_shadow"], found["norm_third"]) <= 1e-3 * max(
        found["norm_rl"], found["norm_sft"], 1e-30)
