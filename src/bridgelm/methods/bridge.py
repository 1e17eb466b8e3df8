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

Trap: with w on the matrices of a full-rank theta, theta and theta + w reach the same set of models, and the rest points
are those of plain joint mixing. A positive gain then measures a shadow that lags, not cooperation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

import numpy as np
from torch import Tensor

from bridgelm import cooperation, credit, grads, losses
from bridgelm.config import RunConfig
from bridgelm.data import Data
from bridgelm.methods.base import Method, credited, rl_coef, rl_setup, rl_terms, sft_rows, sft_terms
from bridgelm.policy import Grads, Policy
from bridgelm.rollout import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row, Verdict

OF_SHADOW = {"pg": "shadow", "kl": "shadow_kl"}  # the shadow's name of each stream of the RL term
PATIENCE = 50  # steps without a third term before saying so


@final
class Bridge(Method):
    needs = frozenset({"demos"})

    def __init__(self, options: Any, run: RunConfig) -> None:
        super().__init__(options, run)
        self.vanished, self.honest = 0, math.nan

    def setup(self, policy: Policy) -> None:
        o = self.options
        rl_setup(policy, o.rl)
        policy.add_w(o.rank, o.alpha, o.modules, o.exclusive)
        policy.fork("shadow")
        policy.optimiser("theta")
        shared = o.shadow_step == "shared_moments" and self.run.optim.kind == "adamw"
        policy.optimiser("shadow", kind="shared_moments" if shared else "sgd", moments_of="theta" if shared else None)
        policy.optimiser("w", lr=o.beta)

    # -- rows: the joint policy's rollouts teach theta, w and (unless it samples its own) the shadow -------------------

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        rows = roll.groups(data)
        shadow = self.shadow_rows(rows, roll, step)
        rows = credited(rows, roll, self.options.rl, self.run)
        if self.options.shadow_rollouts == "own":
            rows += [rename(row, OF_SHADOW) for row in credited(shadow, roll, self.options.rl, self.run)]
        else:
            rows = [copy_streams(row, OF_SHADOW) for row in rows]
        return rows + sft_rows(data, roll, self.run)

    def shadow_rows(self, rows: list[Row], roll: Roller, step: int) -> list[Row]:
        """Rollouts of the shadow on the same problems: to learn from, or now and then for an honest gain."""
        every = 1 if self.options.shadow_rollouts == "own" else self.options.probe_every
        if not every or step % every:
            return []
        problems = list({row.group: row.problem for row in rows}.values())
        sampled = roll(problems, at="shadow")
        joint, alone = ([r.reward for r in part if r.verdict is not Verdict.ERROR] for part in (rows, sampled))
        self.honest = float(np.mean(joint) - np.mean(alone)) if joint and alone else math.nan
        return sampled

    # -- losses ----------------------------------------------------------------------------------------------------

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return rl_terms(batch, live, self.options.rl) | sft_terms(batch, live)

    def shadow_terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        """J_RL at the shadow, from samples of the joint policy."""
        if "shadow" not in batch:
            return {}
        rl, weight = self.options.rl, batch.weight["shadow"]
        if self.options.ratio == "clip":
            out = {"shadow": losses.pg_clip(live.logp_BT, batch.old_BT, weight, rl.clip_low, rl.clip_high)}
        else:
            out = {"shadow": losses.pg_truncate(live.logp_BT, batch.old_BT, weight, self.options.ratio_cap)}
        if "shadow_kl" in batch:
            out["shadow_kl"] = losses.kl_k3(live.logp_BT, batch.ref_BT, batch.weight["shadow_kl"])
        return out

    # -- the update ------------------------------------------------------------------------------------------------

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        lam = self.lam(step)
        sft = policy.grad(self.terms, batch, {"nll": 1.0})
        rl = policy.grad(self.terms, batch, rl_coef(self.options.rl))
        found = self.shares(policy, sft, rl, lam)
        joint = grads.mix((1 - lam, sft.theta), (lam, rl.theta))
        sft.theta.clear()  # a gradient of theta is as large as the model: none is kept longer than needed
        if resync := self.resyncs(step):
            policy.copy("theta", "shadow")
        norm = policy.apply("theta", joint)                                            # (1)
        joint.clear()
        if resync:  # the one-step reading: theta^ is theta and one step of RL, and w's gradient is taken there
            policy.apply("shadow", rl.theta)
        rl.theta.clear()
        # Still the snapshot: the gradients at the shadow do not depend on theta, and w has not moved.
        shadow = policy.grad(self.shadow_terms, batch, self.shadow_coef(), at="shadow")
        if not resync:
            policy.apply("shadow", shadow.theta)                                       # (2)
        gain = grads.mix((1.0, rl.w), (-1.0, shadow.w))
        policy.apply("w", grads.mix((1 - lam, sft.w), (lam, gain)))                    # (3)
        found |= self.diagnostics(policy, batch, sft, rl, shadow, gain)
        return {"grad_norm/theta": norm, "loss/nll": sft.losses["nll"], "loss/pg": rl.losses["pg"],
                "loss/shadow": shadow.losses["shadow"], "bridge/lambda": lam,
                **{f"bridge/{name}": value for name, value in found.items() if not math.isnan(value)}}

    def resyncs(self, step: int) -> bool:
        return self.options.resync_every > 0 and step % self.options.resync_every == 0

    def shadow_coef(self) -> dict[str, float]:
        return {OF_SHADOW[name]: c for name, c in rl_coef(self.options.rl).items()}

    def lam(self, step: int) -> float:
        o = self.options
        if o.lambda_start is None:
            return o.lam
        return credit.schedule("linear", o.lambda_start, o.lam, step / max(1, self.run.steps - 1))

    # -- what to watch ---------------------------------------------------------------------------------------------

    def shares(self, policy: Policy, sft: Grads, rl: Grads, lam: float) -> Metrics:
        """How much of theta's step comes from either teacher, in the metric that Adam steps in."""
        pull = (1 - lam) * grads.norm(policy.precondition("theta", sft.theta))
        push = lam * grads.norm(policy.precondition("theta", rl.theta))
        return {"share_sft": pull / max(pull + push, 1e-30), "share_rl": push / max(pull + push, 1e-30)}

    def diagnostics(self, policy: Policy, batch: Batch, sft: Grads, rl: Grads, shadow: Grads,
                    gain: grads.Gradient) -> Metrics:
        """The three terms of w's gradient, how far the shadow goes, and what its log-probs say of the gain."""
        sizes = {"norm_sft": grads.norm(sft.w), "norm_rl": grads.norm(rl.w), "norm_shadow": grads.norm(shadow.w),
                 "norm_third": grads.norm(gain)}
        least = min(sizes["norm_shadow"], sizes["norm_third"])  # the third term, and the bracket of (3) that it is in
        nothing = least <= 1e-3 * max(sizes["norm_rl"], sizes["norm_sft"], 1e-30)
        self.vanished = self.vanished + 1 if nothing else 0
        honest, self.honest = self.honest, math.nan
        moves = {"theta_move": policy.optimisers["theta"].moved, "shadow_move": policy.optimisers["shadow"].moved}
        found = sizes | moves | {"gain_honest": honest}
        if self.options.shadow_rollouts == "own":
            return found
        truncates, rl_options = self.options.ratio == "truncate", self.options.rl
        low, high = (0.0, self.options.ratio_cap) if truncates else (1 - rl_options.clip_low, 1 + rl_options.clip_high)
        return found | cooperation.diagnose(batch.rows, shadow.logps, low, high)

    def warnings(self, metrics: Metrics) -> list[str]:
        """What a user should know about this step, said once by the trainer."""
        out = []
        if self.vanished >= PATIENCE:
            out.append(f"BRIDGE's third term has done nothing for {PATIENCE} steps: either it is zero (the shadow sits "
                       "at its RL optimum or stopped learning; w repeats theta's own gradient), or it cancels the RL "
                       "term (the shadow is where theta is; w follows SFT alone)")
        theta, shadow = metrics["bridge/theta_move"], metrics["bridge/shadow_move"]
        if metrics["bridge/norm_shadow"] > 0 and shadow < 1e-3 * theta:  # no gradient: nothing to say about its step
            out.append("BRIDGE's shadow hardly moves (under a thousandth of theta's step): the cooperative gain is not "
                       "measured against RL; use shadow_step = 'shared_moments'")
        if metrics.get("bridge/ess", 1.0) < cooperation.RELIABLE:
            out.append(f"BRIDGE's shadow has left the rollouts' policy (effective sample size under "
                       f"{cooperation.RELIABLE:.0%}): the gain by importance weights is not reliable; set probe_every")
        return out

    def state(self) -> dict[str, Any]:
        return {"vanished": self.vanished}

    def load(self, state: Mapping[str, Any]) -> None:
        self.vanished = state["vanished"]


def copy_streams(row: Row, names: Mapping[str, str]) -> Row:
    return replace(row, streams={**row.streams, **rename(row, names).streams})


def rename(row: Row, names: Mapping[str, str]) -> Row:
    return replace(row, streams={names.get(name, name): stream for name, stream in row.streams.items()})
