"""What methods with a shadow share: setup, rest, losses and measurements; its step is in `model/optim.py`. A shadow is
a copy of theta that follows J_RL alone; it learns from the joint policy's rollouts, corrected by token ratios.
Functions only: the equations stand in each method's own file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from bridgelm.config.options import PolicyGradient, Shadowed
from bridgelm.config.run_config import RunConfig
from bridgelm.data.cursors import Data
from bridgelm.methods.base import credited, rl_coef, rl_setup, sft_rows
from bridgelm.model import grads
from bridgelm.model.policy import Grads, Policy
from bridgelm.objective import losses, shadow_diagnostics
from bridgelm.rollout.roller import Roller
from bridgelm.types import Live, Metrics, Micro, Row, Verdict

OF_SHADOW = {"pg": "shadow", "kl": "shadow_kl"}  # the shadow's name of each stream of the RL term
STILL = 1e-3  # share of theta's step under which the shadow's own step counts as none


def shadow_setup(policy: Policy, o: Shadowed, shared: bool, exclusive: bool = False, has_shadow: bool = True,
                 moves: bool = True) -> None:
    """theta, w and the shadow. With `shared`, the shadow steps in theta's metric: equal gradients then move both
    equally. A control may be without a shadow, or have one that never `moves`."""
    rl_setup(policy, o.rl)
    policy.add_w(o.rank, o.alpha, o.modules, exclusive)
    if has_shadow:
        policy.fork("shadow")
        keep_gradient(policy, o)
    policy.optimiser("theta")
    if moves:
        kind, source = ("shared_moments", "theta") if shared else ("sgd", None)
        policy.optimiser("shadow", kind=kind, moments_of=source)
    policy.optimiser("w", lr=o.beta)


# -- a shadow that rests ---------------------------------------------------------------------------------------------

LAST = "shadow_w"  # its last gradient of w: a group, so that checkpoints carry it


def keep_gradient(policy: Policy, o: Shadowed) -> None:
    if o.shadow_every > 1:
        policy.fork(LAST, "w")


def gradient_or_last(policy: Policy, o: Shadowed, step: int, gradient: Callable[[], Grads]) -> Grads:
    """The gradient at the shadow; in a step where the shadow rests, w's part of the last one and nothing else."""
    if o.shadow_every == 1:
        return gradient()
    last = {name: t.detach() for name, t in policy.groups[LAST].flat().items()}
    if step % o.shadow_every:
        return Grads({}, last, {}, {})
    found = gradient()
    for name, t in last.items():
        t.copy_(found.w[name])
    return found


# -- rows ----------------------------------------------------------------------------------------------------------

def shadow_gather(data: Data, roll: Roller, o: Shadowed, run: RunConfig, step: int, has_shadow: bool = True,
                  own: bool = False) -> tuple[list[Row], Metrics]:
    """The joint policy's rollouts, which teach the shadow too unless it has its `own`, and demonstrations; and what the
    shadow's own rollouts say, in the steps where it is sampled."""
    rows = roll.groups(data)
    of_shadow, found = sample_shadow(rows, roll, o.shadow_every if own else o.probe_every, step)
    rows = credited(rows, roll, o.rl, run)
    if own:
        rows += [rename(row, OF_SHADOW) for row in credited(of_shadow, roll, o.rl, run)]
    elif has_shadow:
        rows = [copy_streams(row, OF_SHADOW) for row in rows]
    return rows + sft_rows(data, roll, run), found


def sample_shadow(rows: list[Row], roll: Roller, every: int, step: int) -> tuple[list[Row], Metrics]:
    """Now and then (`every` so many steps; 0: never) the shadow answers the same problems: its rollouts, their mean
    reward, and a gain without importance weights."""
    if not every or step % every:
        return [], {}
    problems = list({row.group: row.problem for row in rows}.values())
    sampled, found = roll(problems, at="shadow"), Metrics()
    joint, alone = ([r.reward for r in part if r.verdict is not Verdict.ERROR] for part in (rows, sampled))
    if alone:
        found["shadow_reward"] = float(np.mean(alone))
    if joint and alone:
        found["gain_honest"] = float(np.mean(joint) - np.mean(alone))
    return sampled, found


def copy_streams(row: Row, names: Mapping[str, str]) -> Row:
    return replace(row, streams={**row.streams, **rename(row, names).streams})


def rename(row: Row, names: Mapping[str, str]) -> Row:
    return replace(row, streams={names.get(name, name): stream for name, stream in row.streams.items()})


# -- losses --------------------------------------------------------------------------------------------------------

def shadow_terms(batch: Micro, live: Live, o: Shadowed) -> dict[str, Tensor]:
    """J_RL at the shadow, from samples of the joint policy, by token ratios that are clipped, tapered or truncated."""
    if "shadow" not in batch:
        return {}
    weight = batch.weight["shadow"]
    if o.ratio == "clip":
        out = {"shadow": losses.pg_clip(live.logp_BT, batch.old_BT, weight, o.rl.clip_low, o.rl.clip_high)}
    elif o.ratio == "taper":
        out = {"shadow": losses.pg_taper(live.logp_BT, batch.old_BT, weight)}
    else:
        out = {"shadow": losses.pg_truncate(live.logp_BT, batch.old_BT, weight, o.ratio_cap)}
    if "shadow_kl" in batch:
        out["shadow_kl"] = losses.kl_k3(live.logp_BT, batch.ref_BT, batch.weight["shadow_kl"])
    return out


def shadow_coef(rl: PolicyGradient) -> dict[str, float]:
    return {OF_SHADOW[name]: c for name, c in rl_coef(rl).items()}


# -- what to watch -------------------------------------------------------------------------------------------------

def preconditioned_norm(policy: Policy, found: Grads) -> float:
    """The norm of a gradient of theta in the metric that Adam steps in, tensor by tensor, since a copy is as large as
    the model."""
    return math.hypot(*(grads.norm(policy.precondition("theta", {name: g})) for name, g in found.theta.items()))


def shares(sft: float, rl: float, lam: float) -> Metrics:
    """How much of theta's step comes from either teacher, by the norms of their gradients."""
    pull, push = (1 - lam) * sft, lam * rl
    return {"share_sft": pull / max(pull + push, 1e-30), "share_rl": push / max(pull + push, 1e-30)}


def diagnostics(policy: Policy, o: Shadowed, rows: Sequence[Row], sft: Grads, rl: Grads, shadow: Grads,
                gain: grads.Gradient) -> Metrics:
    """The terms of w's gradient, how far theta and the shadow step, and what the shadow's log-probs on `rows` say."""
    norms = {"sft": sft.w, "rl": rl.w, "third": gain, **({"shadow": shadow.w} if "shadow" in policy.groups else {})}
    moved = [name for name in ("theta", "shadow") if name in policy.optimisers and (name == "theta" or shadow.theta)]
    low, high = (1 - o.rl.clip_low, 1 + o.rl.clip_high) if o.ratio == "clip" else (0.0, o.ratio_cap)
    return {**{f"norm_{name}": grads.norm(gradient) for name, gradient in norms.items()},
            **{f"{name}_move": policy.optimisers[name].moved for name in moved},
            **shadow_diagnostics.diagnose(rows, shadow.logps, low, high)}


def report(sft: Grads, rl: Grads, shadow: Grads, norm: float, found: Metrics) -> Metrics:
    """The metrics of an update, those of the shadow under the names that every report knows."""
    return {"grad_norm/theta": norm, "loss/nll": sft.losses["nll"], "loss/pg": rl.losses["pg"],
            **{f"loss/{name}": value for name, value in shadow.losses.items() if name == "shadow"},
            **{f"bridge/{name}": value for name, value in found.items() if not math.isnan(value)}}


def is_still(metrics: Metrics) -> bool:
    """Whether the shadow's step is next to none beside theta's. That of a control may be meant to stay, or be missing;
    without a gradient there is nothing to say about its step."""
    theta, shadow = metrics["bridge/theta_move"], metrics.get("bridge/shadow_move", math.inf)
    return shadow < STILL * theta and metrics["bridge/norm_shadow"] > 0


def has_left(metrics: Metrics) -> bool:
    """Whether the shadow is too far from the policy of the rollouts for their ratios to say anything."""
    return metrics.get("bridge/ess", 1.0) < shadow_diagnostics.RELIABLE


def shadow_warnings(name: str, metrics: Metrics, use: str) -> list[str]:
    """What a user should know about the shadow, said once by the trainer. `use`: what the method needs it for."""
    out = []
    if is_still(metrics):
        out.append(f"{name}'s shadow hardly moves by itself (under a thousandth of theta's step): {use} is not "
                   "measured against RL")
    if has_left(metrics):
        out.append(f"{name}'s shadow has left the rollouts' policy (effective sample size under "
                   f"{shadow_diagnostics.RELIABLE:.0%}): {use} is not reliable; raise leak")
    return out
