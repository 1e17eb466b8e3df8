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

Controls of that bracket (`third`), which leave (1) as it is. Without a shadow: `rl` keeps grad_w J_RL(theta, w) alone,
as if theta^ were an RL optimum, and `sft` nothing, as if theta^ were theta. `frozen` leaves theta^ at its start. Two
placebos: `noise` of the bracket's norm, and `permuted`, the bracket with the advantages dealt out to other answers.

Trap: with w on the matrices of a full-rank theta, theta and theta + w reach the same set of models, and the rest points
are those of plain joint mixing. A positive gain then measures a shadow that lags, not cooperation.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from bridgelm import dist
from bridgelm.config.run_config import RunConfig
from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Gradients, Method, credited, rl_coef, rl_setup, rl_terms, sft_rows, sft_terms
from bridgelm.methods.shadow import OF_SHADOW, copy_streams, gradient_or_last, keep_gradient, length, rename, shares
from bridgelm.model import grads
from bridgelm.model.policy import Grads, Policy
from bridgelm.objective import credit, losses, shadow_diagnostics
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row, Verdict

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
        self.vanished = 0
        self.shadowed = options.third not in ("rl", "sft")
        self.sampled: Metrics = {}  # what this step's rollouts of the shadow say

    def setup(self, policy: Policy) -> None:
        o = self.options
        rl_setup(policy, o.rl)
        policy.add_w(o.rank, o.alpha, o.modules, o.exclusive)
        if self.shadowed:
            policy.fork("shadow")
            keep_gradient(policy, o)
        policy.optimiser("theta")
        if self.shadowed and o.third != "frozen":
            shared = o.shadow_step == "shared_moments" and self.run.optim.adam
            kind, source = ("shared_moments", "theta") if shared else ("sgd", None)
            policy.optimiser("shadow", kind=kind, moments_of=source)
        policy.optimiser("w", lr=o.beta)

    # -- rows: the joint policy's rollouts teach theta, w and (unless it samples its own) the shadow -------------------

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        rows = roll.groups(data)
        shadow = self.shadow_rows(rows, roll, step)
        rows = credited(rows, roll, self.options.rl, self.run)
        if self.options.shadow_rollouts == "own":
            rows += [rename(row, OF_SHADOW) for row in credited(shadow, roll, self.options.rl, self.run)]
        elif self.shadowed:
            rows = [copy_streams(row, OF_SHADOW) for row in rows]
        if self.options.third == "permuted":
            rows = deal_out(rows, self.draws("permuted", step))
        return rows + sft_rows(data, roll, self.run)

    def shadow_rows(self, rows: list[Row], roll: Roller, step: int) -> list[Row]:
        """Rollouts of the shadow on the same problems: to learn from, or now and then for an honest gain."""
        self.sampled = {}
        every = self.options.shadow_every if self.options.shadow_rollouts == "own" else self.options.probe_every
        if not every or step % every:
            return []
        problems = list({row.group: row.problem for row in rows}.values())
        sampled = roll(problems, at="shadow")
        joint, alone = ([r.reward for r in part if r.verdict is not Verdict.ERROR] for part in (rows, sampled))
        if alone:
            self.sampled["shadow_reward"] = float(np.mean(alone))
        if joint and alone:
            self.sampled["gain_honest"] = float(np.mean(joint) - np.mean(alone))
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
        elif self.options.ratio == "taper":
            out = {"shadow": losses.pg_taper(live.logp_BT, batch.old_BT, weight)}
        else:
            out = {"shadow": losses.pg_truncate(live.logp_BT, batch.old_BT, weight, self.options.ratio_cap)}
        if "shadow_kl" in batch:
            out["shadow_kl"] = losses.kl_k3(live.logp_BT, batch.ref_BT, batch.weight["shadow_kl"])
        return out

    # -- the update ------------------------------------------------------------------------------------------------

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        lam = self.lam(step)
        sft = policy.grad(self.terms, batch, {"nll": 1.0})
        pull = length(policy, sft)
        policy.park(sft.theta)
        rl = policy.grad(self.terms, batch, rl_coef(self.options.rl))
        found = shares(pull, length(policy, rl), lam)
        resync = self.resyncs(step)
        again = dict(rl.theta) if resync else {}
        joint = grads.blend((1 - lam, sft.theta), (lam, rl.theta))  # each is as large as the model: both are used up
        placebo = self.placebo(policy, batch, "live")
        if resync:
            policy.copy("theta", "shadow")
        norm = policy.apply("theta", joint)                                            # (1)
        policy.park(joint)  # the shadow's step is bounded by it
        if resync:  # the one-step reading: theta^ is theta and one step of RL, and w's gradient is taken there
            policy.apply("shadow", again, beside=joint)
        # Still the snapshot: the gradients at the shadow do not depend on theta, and w has not moved.
        shadow = (gradient_or_last(policy, self.options, step, lambda: self.at_shadow(policy, batch))
                  if self.shadowed else self.instead(rl))
        placebo_shadow = self.placebo(policy, batch, "shadow")
        if not resync and shadow.theta and "shadow" in policy.optimisers:  # it may rest, stay, or not be there
            policy.apply("shadow", shadow.theta, beside=joint)                         # (2)
        gain = grads.mix((1.0, rl.w), (-1.0, shadow.w))
        bracket = self.bracket(gain, placebo, placebo_shadow, step)  # the gain's gradient, but for the two placebos
        policy.apply("w", grads.mix((1 - lam, sft.w), (lam, bracket)))                 # (3)
        found |= self.diagnostics(policy, batch, sft, rl, shadow, gain)
        if bracket is not gain:
            found["norm_placebo"] = grads.norm(bracket)
        values = sft.losses | rl.losses | shadow.losses
        return {"grad_norm/theta": norm, "bridge/lambda": lam,
                **{f"loss/{name}": values[name] for name in ("nll", "pg", "shadow") if name in values},
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

    # -- what a control puts in the place of the bracket of (3) ----------------------------------------------------

    def at_shadow(self, policy: Policy, batch: Batch) -> Grads:
        return policy.grad(self.shadow_terms, batch, self.shadow_coef(), at="shadow")

    def instead(self, rl: Grads) -> Grads:
        """Two controls have no shadow: its gradient of w is taken to be zero (`rl`), or that at theta (`sft`)."""
        return Grads({}, grads.mix((1.0 if self.options.third == "sft" else 0.0, rl.w)), {}, {})

    def placebo(self, policy: Policy, batch: Batch, at: str) -> grads.Gradient:
        """For `permuted`: w's RL gradient at a point, by advantages that are not the answers' own."""
        if self.options.third != "permuted":
            return {}
        dealt = with_placebo(batch)
        if at == "shadow":
            return self.at_shadow(policy, dealt).w
        return policy.grad(self.terms, dealt, rl_coef(self.options.rl)).w

    def bracket(self, gain: grads.Gradient, placebo: grads.Gradient, placebo_shadow: grads.Gradient,
                step: int) -> grads.Gradient:
        if self.options.third == "noise":
            return noise_like(gain, self.draws("noise", step))
        return grads.mix((1.0, placebo), (-1.0, placebo_shadow)) if self.options.third == "permuted" else gain

    def draws(self, what: str, step: int) -> np.random.Generator:
        """The same in a resumed run."""
        return np.random.default_rng((self.run.seed, step, zlib.crc32(what.encode())))

    # -- what to watch ---------------------------------------------------------------------------------------------

    def diagnostics(self, policy: Policy, batch: Batch, sft: Grads, rl: Grads, shadow: Grads,
                    gain: grads.Gradient) -> Metrics:
        """The three terms of w's gradient, how far the shadow goes, and what its log-probs say of the gain."""
        sizes = {"norm_sft": grads.norm(sft.w), "norm_rl": grads.norm(rl.w), "norm_third": grads.norm(gain)}
        moves = {f"{name}_move": policy.optimisers[name].moved for name in ("theta", "shadow")
                 if name in policy.optimisers and (name == "theta" or shadow.theta)}
        if not self.shadowed:
            return sizes | moves
        sizes["norm_shadow"] = grads.norm(shadow.w)
        least = min(sizes["norm_shadow"], sizes["norm_third"])  # the third term, and the bracket of (3) that it is in
        nothing = least <= 1e-3 * max(sizes["norm_rl"], sizes["norm_sft"], 1e-30)
        self.vanished = self.vanished + 1 if nothing else 0
        found = sizes | moves | self.sampled
        if self.options.shadow_rollouts == "own":
            return found
        clips, rl_options = self.options.ratio == "clip", self.options.rl
        low, high = (1 - rl_options.clip_low, 1 + rl_options.clip_high) if clips else (0.0, self.options.ratio_cap)
        return found | shadow_diagnostics.diagnose(batch.rows, shadow.logps, low, high)

    def warnings(self, metrics: Metrics) -> list[str]:
        """What a user should know about this step, said once by the trainer."""
        out = []
        if self.vanished >= PATIENCE:
            out.append(f"BRIDGE's third term has done nothing for {PATIENCE} steps: either it is zero (the shadow sits "
                       "at its RL optimum or stopped learning; w repeats theta's own gradient), or it cancels the RL "
                       "term (the shadow is where theta is; w follows SFT alone)")
        theta = metrics["bridge/theta_move"]
        shadow = metrics.get("bridge/shadow_move", math.inf)  # that of a control may be meant to stay, or be missing
        if shadow < 1e-3 * theta and metrics["bridge/norm_shadow"] > 0:  # no gradient: nothing to say about its step
            out.append("BRIDGE's shadow hardly moves (under a thousandth of theta's step): the cooperative gain is not "
                       "measured against RL; use shadow_step = 'shared_moments'")
        if metrics.get("bridge/ess", 1.0) < shadow_diagnostics.RELIABLE:
            out.append(f"BRIDGE's shadow has left the rollouts' policy (effective sample size under "
                       f"{shadow_diagnostics.RELIABLE:.0%}): the gain by importance weights is not reliable; set "
                       "probe_every")
        return out

    def state(self) -> dict[str, Any]:
        return {"vanished": self.vanished}

    def load(self, state: Mapping[str, Any]) -> None:
        self.vanished = state["vanished"]


def deal_out(rows: list[Row], draws: np.random.Generator) -> list[Row]:
    """Adds the stream `placebo`: the advantage of some row of the step, each handed out once, flat groups included."""
    out, with_one = list(rows), [i for i, row in enumerate(rows) if "pg" in row.streams]
    for i, giver in zip(with_one, draws.permutation(with_one), strict=True):
        stream, advantage = rows[i].streams["pg"], rows[giver].streams["pg"].weight[0]
        out[i] = rows[i].with_stream("placebo", advantage, stream.norm, stream.constant, stream.mask)
    return out


def with_placebo(batch: Batch) -> Batch:
    """The placebo in the place of the advantages; masks, and with them the counts, stay."""
    rows = (replace(row, streams={**row.streams, **dict.fromkeys(("pg", "shadow"), row.streams["placebo"])})
            if "placebo" in row.streams else row for row in batch.rows)
    return replace(batch, rows=tuple(rows))


def noise_like(gradient: grads.Gradient, draws: np.random.Generator) -> grads.Gradient:
    """Gaussian noise of a gradient's norm."""
    noise, counts = {}, grads.rows(gradient)
    for name, g in gradient.items():
        whole = draws.standard_normal((counts[name], *g.shape[1:]))
        noise[name] = torch.from_numpy(whole if len(g) == len(whole) else whole[slice(*dist.bounds(len(whole)))]).to(g)
    return grads.mix((grads.norm(gradient) / grads.norm(noise), noise))
