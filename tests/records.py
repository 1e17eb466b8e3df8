"""What the tests that every method is put through need to know of it: a record a method. A method adds its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bridgelm.model import grads
from bridgelm.model.policy import Grads, Policy

Wanted = dict[str, grads.Gradient]
Options = dict[str, Any]


@dataclass(frozen=True)
class Record:
    options: Options  # under which something happens in a few steps on the tiny world
    # Settings of the recorded trajectories by what is put behind the method's name; None: the options above, as NAME.
    golden: Mapping[str, Options] | None = None
    golden_sections: Options = field(default_factory=dict)  # of the configuration, beside the method
    kept: tuple[str, ...] = ()  # how the metrics begin that a trajectory keeps, beside those that all have
    # What its step is when RL has nothing to say, all groups pass or all fail; None: nothing at all.
    limit: Callable[[Any, Grads, Policy, int], Wanted] | None = None
    stay: tuple[str, ...] = ()  # terms beside `nll` that stay then
    late: bool = False  # its first two steps have no rollouts


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
    limit = RECORDS[method.inner.options.name].limit
    return limit(method.inner, sft, policy, step) if limit else {}


RECORDS: dict[str, Record] = {
    "sft": Record({}),
    "grpo": Record({}, golden={"": {}, "kl_std": {"rl": {"kl_coef": 0.1, "std": True, "aggregate": "row"}}}),
    "joint": Record(
        {"mu": 0.5, "mu_end": 0.1, "schedule": "cosine"},
        golden={"": {"mu": 0.5, "mu_end": 0.1, "schedule": "linear"}},
        limit=lambda method, sft, policy, step: joint(method.mu(step), sft)),
    # The RL step does not move, so SFT follows from the same point.
    "alternate": Record({}, limit=lambda method, sft, policy, step: {"theta_sft": sft.theta}),
    "barrier": Record({}, limit=lambda method, sft, policy, step: of_theta(1 / (1 + method.options.eta), sft)),
    "bridge": Record(
        {"rank": 2, "alpha": 4.0, "probe_every": 2},
        golden={"": {"rank": 2, "alpha": 4.0},
                "paper": {"rank": 2, "alpha": 4.0, "preset": "paper"},
                "exclusive": {"rank": 2, "alpha": 4.0, "exclusive": True, "modules": "mlp"}},
        limit=lambda method, sft, policy, step: of_bridge(1 - method.lam(0), sft, policy)),
    "bridge_leaky": Record(
        {"rank": 2, "alpha": 4.0, "probe_every": 2, "agreement_decay": 0.5},
        golden={"": {"rank": 2, "alpha": 4.0}},
        limit=lambda method, sft, policy, step: of_bridge(1 - method.options.lam, sft, policy)),
    "bridge_dial": Record(
        {"rank": 2, "alpha": 4.0, "probe_every": 2, "eta": 0.5, "scales": [0.0, 1.5]},
        golden={"": {"rank": 2, "alpha": 4.0, "eta": 0.5}},
        limit=lambda method, sft, policy, step: of_bridge(1 - method.lam, sft, policy)),
    "sequence": Record(
        {"stages": [{"method": {"name": "sft"}, "steps": 2, "lr": 0.02}, {"method": {"name": "grpo"}}]},
        golden={"": {"stages": [{"method": {"name": "sft"}, "steps": 1}, {"method": {"name": "grpo"}}]}},
        late=True),
    "token_lead": Record(
        {"mu": 0.5},
        golden={"": {}},
        limit=lambda method, sft, policy, step: joint(method.options.mu, sft)),
    "guide": Record(
        {"rank": 2, "alpha": 4.0, "warmup": 1, "kappa": 0.1},
        golden={"": {"rank": 2, "alpha": 4.0, "warmup": 1}}),
    "dft": Record({}),
    # The same.
    "interleaved": Record({}, limit=lambda method, sft, policy, step: {"theta_sft": sft.theta}),
    # With demonstrations of failed problems only; nothing at all where all pass.
    "data_mixing": Record(
        {"buffer": 20},
        golden={"": {"buffer": 20, "rl_weight": 0.5}},
        limit=lambda method, sft, policy, step: of_theta(1.0, sft)),
    "shuffle_r1": Record({"draws": 3, "keep": 1.0}, golden={"": {"draws": 3}}, limit=wrapped),
    "trapo": Record(
        {"entropy_coef": 0.0},
        golden={"": {}},
        limit=lambda method, sft, policy, step: of_theta(1.0, sft)),  # of the prefixes, if the prompts failed
    # With the draws of seed 0: SFT in the second step, GRPO after it.
    "sasr": Record(
        {"warmup": 0.25, "gamma": 9.0, "rl": {"kl_coef": 0.0}},
        golden={"": {"warmup": 0.34, "gamma": 12.0}},
        limit=lambda method, sft, policy, step: of_theta(method.p if method.imitating else 0.0, sft),
        late=True),
    "amft": Record(
        {"warmup": 0.25, "every": 1, "problems": 2, "eta": 0.1, "eta_entropy": 0.0},
        golden={"": {"warmup": 0.34, "every": 2, "problems": 2, "eta": 0.1}},
        limit=lambda method, sft, policy, step: of_theta(method.mu, sft),
        late=True),
    "luffy": Record({}),
    # `own`: right answers are imitated, wrong ones pushed away.
    "srft": Record(
        {"entropy": 0.0},
        golden={"": {}},
        limit=lambda method, sft, policy, step: of_theta(1.0, sft),
        stay=("own",)),
    "chord": Record(
        {"mu": 0.6, "mu_end": 0.1, "decay": 4},
        golden={"": {"preset": "both", "warmup": 1, "decay": 2}},
        limit=lambda method, sft, policy, step: of_theta(method.mu(step), sft)),
    # The prior is above the start, by more than the first step may go.
    "gac": Record(
        {"refresh": 2, "decay": 0.5, "warmup": 0, "decay_steps": 4},
        golden={"": {"refresh": 2, "decay": 0.5, "warmup": 0, "decay_steps": 2}},
        limit=lambda method, sft, policy, step: of_theta(method.options.start + method.options.cap, sft)),
    "kdrl": Record({"beta": 0.5, "delta": 0.1, "beta_min": 0.1, "clamp": 2.0}),
    "pear": Record({}),
    "staged": Record(
        {"target_entropy": 2.2, "probe": 6, "rounds": 1, "lengths": [{"length": 0.5}, {"length": 1.0}]},
        golden={"": {"target_entropy": 1.0, "probe": 6, "lengths": [{"length": 0.5}, {"length": 1.0}]}}),
    "gta": Record(
        {"open": "", "close": "", "format": "", "rl": {"kl_coef": 0.0}},
        golden={"": {"open": "", "close": "", "format": ""}},
        limit=lambda method, sft, policy, step: of_theta(1.0, sft)),
    # Where the gate never closes there is no SFT row, and no gradient of one.
    "hpt": Record(
        {"gamma": 0.25, "sft": 0.5},
        golden={"": {"gamma": 0.5, "sft": 0.3}, "soft": {"gate": "soft"}},
        limit=lambda method, sft, policy, step: of_theta(1.0, sft)),
    "relift": Record(
        {"size": 2, "pass_rate": 0.3},
        golden={"": {"size": 1, "pass_rate": 0.5}},
        limit=lambda method, sft, policy, step: {"theta_sft": sft.theta}),
    "uft": Record(
        {"until": 1.0, "hint": 0.1},
        limit=lambda method, sft, policy, step: of_theta(method.options.hint, sft)),
    # `hybrid`: a continuation's reward has no baseline.
    "prefix_rft": Record({"cut": 0.5}, limit=lambda method, sft, policy, step: of_theta(1.0, sft), stay=("hybrid",)),
    # Of the recorded answers, no group of four fails.
    "bread": Record({"episodes": 4}, golden_sections={"rollout": {"prompts": 6, "group": 2, "max_new_tokens": 6}}),
    "lspo": Record({"rank": 2, "alpha": 4.0, "fit_steps": 2, "beta": 0.05}),
    "rft": Record(
        {},
        limit=lambda method, sft, policy, step: of_theta(1.0, sft)),  # of the right answers, if there are any
    "fdiv_sft": Record(
        {"beta": 0.5},
        limit=lambda method, sft, policy, step: {"theta": {}}),  # no reward enters its step, so nothing is compared
    "gift": Record({"beta": 3.0}),
}
