"""What each method's step is when RL has nothing to say: all groups pass, or all fail. A method adds its line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bridgelm.model import grads
from bridgelm.model.policy import Grads, Policy

Wanted = dict[str, grads.Gradient]


def of_theta(share: float, sft: Grads) -> Wanted:
    return {"theta": grads.mix((share, sft.theta))}


def of_bridge(share: float, sft: Grads, policy: Policy) -> Wanted:
    """theta and w follow SFT; the shadow, where there is one, stays (but for a leak)."""
    out = {**of_theta(share, sft), "w": grads.mix((share, sft.w))}
    if "shadow" in policy.groups:
        out["shadow"] = {k: torch.zeros_like(g) for k, g in policy.groups["shadow"].zeros().items()}
    return out


def joint(mu: float, sft: Grads) -> Wanted:
    return of_theta(mu / (1 + mu), sft)


def wrapped(method: Any, sft: Grads, policy: Policy, step: int) -> Wanted:
    return LIMITS.get(method.inner.options.name, lambda *_: {})(method.inner, sft, policy, step)


# Terms beside `nll` that stay where RL's advantages are zero: their gradients are in `sft` below.
STAY: dict[str, tuple[str, ...]] = {
    "srft": ("own",),  # right answers are imitated, wrong ones pushed away
    "prefix_rft": ("hybrid",),  # a continuation's reward has no baseline
}

LIMITS: dict[str, Callable[[Any, Grads, Policy, int], Wanted]] = {
    "joint": lambda method, sft, policy, step: joint(method.mu(step), sft),
    "chord": lambda method, sft, policy, step: of_theta(method.mu(step), sft),
    "srft": lambda method, sft, policy, step: of_theta(1.0, sft),
    # The prior is above the start, by more than the first step may go.
    "gac": lambda method, sft, policy, step: of_theta(method.options.start + method.options.cap, sft),
    "token_lead": lambda method, sft, policy, step: joint(method.options.mu, sft),
    "barrier": lambda method, sft, policy, step: of_theta(1 / (1 + method.options.eta), sft),
    "bridge": lambda method, sft, policy, step: of_bridge(1 - method.lam(0), sft, policy),
    "bridge_leaky": lambda method, sft, policy, step: of_bridge(1 - method.options.lam, sft, policy),
    "bridge_dial": lambda method, sft, policy, step: of_bridge(1 - method.lam, sft, policy),
    "trapo": lambda method, sft, policy, step: of_theta(1.0, sft),  # of the prefixes, if the prompts failed
    "sasr": lambda method, sft, policy, step: of_theta(method.p if method.imitating else 0.0, sft),
    "amft": lambda method, sft, policy, step: of_theta(method.mu, sft),
    "rft": lambda method, sft, policy, step: of_theta(1.0, sft),  # of the right answers, if there are any
    "fdiv_sft": lambda method, sft, policy, step: {"theta": {}},  # no reward enters its step, so nothing is compared
    # The RL step does not move, so SFT follows from the same point.
    # With demonstrations of failed problems only; nothing at all where all pass.
    "interleaved": lambda method, sft, policy, step: {"theta_sft": sft.theta},
    "data_mixing": lambda method, sft, policy, step: of_theta(1.0, sft),
    "shuffle_r1": wrapped,
    "gta": lambda method, sft, policy, step: of_theta(1.0, sft),
    "alternate": lambda method, sft, policy, step: {"theta_sft": sft.theta},
    # Where the gate never closes there is no SFT row, and no gradient of one.
    "hpt": lambda method, sft, policy, step: of_theta(1.0, sft),
    "uft": lambda method, sft, policy, step: of_theta(method.options.hint, sft),
    "relift": lambda method, sft, policy, step: {"theta_sft": sft.theta},
    "prefix_rft": lambda method, sft, policy, step: of_theta(1.0, sft),
}
