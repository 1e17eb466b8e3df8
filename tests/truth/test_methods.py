"""The baselines' equations on closed forms: joint, alternation, stages; and the KL term."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from exact import Quadratic, Stub, bridge_walk, run_config, walk
from mutation import Mutant, mutants
from transformer import bridge_method, build_policy, make_batch, make_rows, wide_norm

from bridgelm.methods import METHODS, alternate, bridge, joint
from bridgelm.model import batching
from bridgelm.objective import losses
from bridgelm.types import Problem, Row

Q = Quadratic()


@pytest.fixture(autouse=True)
def _wide_norm() -> Iterator[None]:
    with wide_norm():
        yield


def method_walk(options: dict[str, Any], steps: int, lr: float = 0.1, theta: float = 0.3) -> Any:
    config = run_config(options, steps, lr)
    method = METHODS[options["name"]](config.method, config)
    policy = Stub(Q, lr, theta)
    method.setup(policy)
    return walk(method, policy, steps)


def thetas(path: Any) -> list[float]:
    return [p[0] for p in path.points]


# -- joint -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [1 / 9, 0.5, 1.0, 3.0, 9.0])
def test_joint_is_bridges_theta(mu: float) -> None:
    """At lambda = 1 / (1 + mu): J_RL weighs that in joint and lambda in (1); with w held at 0 the two take the same
    steps. lambda = mu / (1 + mu) would be the mix turned round."""
    mixed = thetas(method_walk({"name": "joint", "mu": mu}, 12))
    same = thetas(bridge_walk(bridge, Q, 1 / (1 + mu), 12, theta=0.3, beta=1e-300))
    assert mixed == pytest.approx(same, abs=1e-15)
    assert mixed[1] - mixed[0] == pytest.approx(0.1 * (Q.rl(0.3, 0)[1] + mu * Q.sft(0.3, 0)[1]) / (1 + mu), abs=1e-15)
    if mu != 1.0:
        turned = thetas(bridge_walk(bridge, Q, mu / (1 + mu), 12, theta=0.3, beta=1e-300))
        assert max(abs(a - b) for a, b in zip(mixed, turned)) > 0.05
    plain = thetas(method_walk({"name": "joint", "mu": mu, "normalise": False}, 1))
    assert plain[1] - plain[0] == pytest.approx(0.1 * (Q.rl(0.3, 0)[1] + mu * Q.sft(0.3, 0)[1]), abs=1e-15)


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 1.25), ("cosine", 1.25), ("constant", 2.0)])
def test_schedule_of_mu_ends_where_it_should(schedule: str, middle: float) -> None:
    path = method_walk({"name": "joint", "mu": 2.0, "mu_end": 0.5, "schedule": schedule}, 11)
    found = [m["joint/mu"] for m in path.metrics]
    assert found[0] == 2.0 and found[5] == pytest.approx(middle)
    assert found[-1] == pytest.approx(2.0 if schedule == "constant" else 0.5)
    quarter = {"linear": 2 - 1.5 * 0.2, "cosine": 2 - 1.5 * 0.5 * (1 - math.cos(0.2 * math.pi)), "constant": 2.0}
    assert found[2] == pytest.approx(quarter[schedule])


def test_schedule_of_lambda_ends_where_it_should() -> None:
    path = bridge_walk(bridge, Q, 0.8, 5, lambda_start=0.0)
    assert [m["bridge/lambda"] for m in path.metrics] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8], abs=1e-15)
    assert bridge_walk(bridge, Q, 0.8, 1, lambda_start=0.1).metrics[0]["bridge/lambda"] == 0.1  # one step: its start


# -- alternation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "a_rl", "a_sft"), [
    ({}, 0.1, 0.1), ({"sft_lr": 0.03}, 0.1, 0.03), ({"half_steps": True, "sft_lr": 0.03}, 0.05, 0.015),
    ({"half_steps": True}, 0.05, 0.05), ({"optimisers": "one", "half_steps": True}, 0.05, 0.05)])
@pytest.mark.parametrize("every", [1, 3])
def test_alternation(options: dict[str, Any], a_rl: float, a_sft: float, every: int) -> None:
    path = method_walk({"name": "alternate", "every": every, **options}, 7)
    theta, wanted = 0.3, [0.3]
    for step in range(7):
        theta += a_rl * Q.rl(theta, 0.0)[1]
        if (step + 1) % every == 0:
            theta += a_sft * Q.sft(theta, 0.0)[1]
        wanted.append(theta)
    assert thetas(path) == pytest.approx(wanted, abs=1e-15)
    first = [entry[:2] for entry in path.policy.log[: 4 if every == 1 else 2]]
    second = "theta" if options.get("optimisers") == "one" else "theta_sft"
    assert first == [("grad", "pg"), ("apply", "theta"), ("grad", "nll"), ("apply", second)][: len(first)]


def test_alternation_rests_off_joint_by_its_order() -> None:
    """Two full steps, SFT last: it rests at t / (2 - alpha), nearer the demonstrations than the even mix t / 2."""
    for lr in (0.1, 0.3):
        end = thetas(method_walk({"name": "alternate"}, 400, lr))[-1]
        assert end == pytest.approx(Q.t / (2 - lr), abs=1e-12) and end > Q.t / 2


def test_sft_and_grpo_alone() -> None:
    assert thetas(method_walk({"name": "sft"}, 200))[-1] == pytest.approx(Q.t, abs=1e-8)
    assert thetas(method_walk({"name": "grpo"}, 200))[-1] == pytest.approx(0.0, abs=1e-8)


# -- stages ------------------------------------------------------------------------------------------------------------


class NoData:
    def problems(self, n: int) -> list[Problem]:
        return []

    def demos(self, n: int) -> list[Any]:
        return []


def roller(policy: Any) -> Any:
    return SimpleNamespace(policy=policy, groups=lambda data: [], reference=lambda rows: rows, teacher=None)


def stages(*found: dict[str, Any], steps: int, **optim: Any) -> Any:
    config = run_config({"name": "sequence", "stages": list(found)}, steps, 0.2, optim={"kind": "adamw", **optim})
    return METHODS["sequence"](config.method, config)


def test_a_new_stage_has_its_own_rate_schedule_and_optimiser() -> None:
    method = stages({"method": {"name": "sft"}, "steps": 3, "lr": 0.04, "schedule": "linear"},
                    {"method": {"name": "grpo"}, "lr": 0.01, "schedule": "constant"}, steps=5, final=0.5)
    policy = build_policy(kind="adamw")
    del policy.groups["w"], policy.groups["shadow"], policy.groups["reference"]
    method.setup(policy)
    seen, optimisers = [], []
    for step in range(5):
        method.gather(NoData(), roller(policy), step)
        policy.factor = method.rate(step)
        named = policy.optimisers["theta"]
        policy.apply("theta", {n: torch.ones_like(t) for n, t in policy.groups["theta"].flat().items()})
        seen.append((method.phase, named.optimiser.param_groups[0]["lr"]))
        optimisers.append(named.optimiser)
    assert [phase for phase, _ in seen] == ["sft"] * 3 + ["grpo"] * 2
    assert [rate for _, rate in seen] == pytest.approx([0.04, 0.03, 0.02, 0.01, 0.01])
    assert optimisers[0] is optimisers[2] and optimisers[3] is optimisers[4] and optimisers[2] is not optimisers[3]
    state = optimisers[3].state[policy.optimisers["theta"].optimiser.param_groups[0]["params"][0]]
    assert float(state["step"]) == 2, "the moments of the stage before are gone"


def test_an_optimiser_can_be_kept() -> None:
    method = stages({"method": {"name": "sft"}, "steps": 1},
                    {"method": {"name": "grpo"}, "lr": 0.01, "fresh_optimiser": False}, steps=2)
    policy = build_policy(kind="adamw")
    del policy.groups["w"], policy.groups["shadow"], policy.groups["reference"]
    method.setup(policy)
    first = policy.optimisers["theta"].optimiser
    method.gather(NoData(), roller(policy), 1)
    assert policy.optimisers["theta"].optimiser is first and policy.optimisers["theta"].lr == 0.01


def test_a_bridge_stage_leaves_one_merged_theta() -> None:
    """w goes into theta without a change of the policy; shadow and reference go; the next stage starts its own."""
    method = stages({"method": {"name": "bridge", "rank": 3, "alpha": 5.0}, "steps": 1},
                    {"method": {"name": "grpo", "rl": {"kl_coef": 0.1}}}, steps=2)
    policy = build_policy(kind="adamw")  # in the midst of that stage: w, shadow and reference are away from their start
    before = {n: w.clone() for n, w in policy.weights().items()}
    method.gather(NoData(), roller(policy), 1)
    assert set(policy.groups) == {"theta", "reference"} and set(policy.optimisers) == {"theta"}
    for n, w in policy.weights().items():
        assert torch.allclose(w, before[n], rtol=0, atol=1e-15)
    for n, w in policy.weights("reference").items():
        assert torch.allclose(w, before[n], rtol=0, atol=1e-15), "the reference is the stage's own start"


def test_warnings_of_a_stage_are_said() -> None:
    method = stages({"method": {"name": "bridge"}, "steps": 1}, {"method": {"name": "grpo"}}, steps=2)
    method.stages[0].vanished = 50
    metrics = {"bridge/theta_move": 1.0, "bridge/shadow_move": 1.0, "bridge/norm_shadow": 1.0}
    assert any("third term" in text for text in method.warnings(metrics))


# -- the KL term -------------------------------------------------------------------------------------------------------

PI, REF = np.array([0.3, -0.4, 0.9]), np.array([0.1, 0.5, -0.2])


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum())


def kl_by_enumeration(logits: np.ndarray, reference: np.ndarray) -> tuple[float, np.ndarray]:
    """Value and gradient of the term over all actions of pi, each with its probability."""
    p, ref = np.exp(log_softmax(logits)), log_softmax(reference)
    rows = [
        Row(np.array([0, a]), np.array([False, True]), "rollout", Problem("p", ()), ref_logps=np.array([0.0, ref[a]]),
            old_logps=np.zeros(2)).with_stream("kl", p[a], "constant", 1 / 3)
        for a in range(3)
    ]
    micro = batching.collate(rows, torch.float64, torch.device("cpu"), {})
    z = torch.tensor(logits, requires_grad=True)
    logp_BT = torch.stack([torch.stack([torch.zeros((), dtype=z.dtype), torch.log_softmax(z, 0)[a]]) for a in range(3)])
    summed = (losses.kl_k3(logp_BT, micro.ref_BT, micro.weight["kl"]) * micro.scale["kl"]).sum()
    value = summed / batching.make_batch(rows).counts["kl"]
    return float(value.detach()), torch.autograd.grad(value, z)[0].numpy()


def test_kl_is_exact_in_value_and_its_gradient_is_the_forward_kls() -> None:
    """k3 has the value of KL(pi | ref) but, as a loss on sampled tokens, the gradient of KL(ref | pi): near the
    reference the two agree to first order. Documented, not hidden."""
    log_pi, log_ref = log_softmax(PI), log_softmax(REF)
    value, gradient = kl_by_enumeration(PI, REF)
    assert value == pytest.approx(float(np.exp(log_pi) @ (log_pi - log_ref)), abs=1e-15)
    assert gradient == pytest.approx(np.exp(log_pi) - np.exp(log_ref), abs=1e-15)
    reverse = np.exp(log_pi) * (log_pi - log_ref - value)
    assert np.abs(gradient - reverse).max() > 0.02
    small = 1e-4
    near = kl_by_enumeration(REF + small * PI, REF)[1]
    log_near = log_softmax(REF + small * PI)
    exact = np.exp(log_near) * (log_near - log_ref - np.exp(log_near) @ (log_near - log_ref))
    assert near == pytest.approx(exact, abs=1e-8) and np.abs(near).max() > 1e-5


def test_kl_is_nothing_at_the_start() -> None:
    assert kl_by_enumeration(REF, REF)[0] == 0.0
    assert np.abs(kl_by_enumeration(REF, REF)[1]).max() < 1e-16


@pytest.mark.parametrize("lora", [False, True])
def test_kl_of_a_real_policy_at_its_start(lora: bool) -> None:
    """A fresh BRIDGE (B = 0, shadow = theta = reference) has no KL and no gradient of it; a step later it has both."""
    policy = build_policy(lora=lora)
    for name in ("w", "shadow", "reference"):
        del policy.groups[name]
    method = bridge_method(rank=2)
    method.setup(policy)
    rows = make_rows(policy, on_policy=True)
    for terms, coef, at in ((method.terms, {"kl": 1.0}, "live"), (method.shadow_terms, {"shadow_kl": 1.0}, "shadow")):
        found = policy.grad(terms, make_batch(rows), coef, at=at)
        assert abs(sum(found.losses.values())) < 1e-14
        assert max(float(g.abs().max()) for part in (found.theta, found.w) for g in part.values()) < 1e-13
    method.update(policy, make_batch(rows), 0)
    moved = policy.grad(method.terms, make_batch(rows), {"kl": 1.0})
    assert moved.losses["kl"] > 1e-8
    assert max(float(g.abs().max()) for g in moved.theta.values()) > 1e-5


MUTANTS = [
    *mutants(
        joint,
        Mutant("term", "Joint.update", 4, by=partial(test_joint_is_bridges_theta, 3.0)),  # SFT as much as RL
        Mutant("sign", "Joint.update", 0, by=partial(test_joint_is_bridges_theta, 3.0)),
        Mutant("branch", "Joint.update", "normalise 0", by=partial(test_joint_is_bridges_theta, 3.0)),
        Mutant("branch", "Joint.mu", "mu_end 0", by=partial(test_schedule_of_mu_ends_where_it_should, "linear", 1.25)),
        Mutant("term", "Joint.mu", "steps 0", by=partial(test_schedule_of_mu_ends_where_it_should, "linear", 1.25)),
    ),
    *mutants(
        alternate,
        Mutant("branch", "Alternate.setup", "half_steps 1",
               by=partial(test_alternation, {"half_steps": True}, 0.05, 0.05, 1)),
        Mutant("mask", "Alternate.setup", "sft_lr 0", by=partial(test_alternation, {"sft_lr": 0.03}, 0.1, 0.03, 1)),
        Mutant("term", "Alternate.imitates", 0, by=partial(test_alternation, {}, 0.1, 0.1, 3)),
        Mutant("compare", "Alternate.imitates", by=partial(test_alternation, {}, 0.1, 0.1, 3)),
        Mutant("branch", "Alternate.update", "two 3", by=partial(test_alternation, {}, 0.1, 0.1, 1)),
    ),
    *mutants(
        losses,
        Mutant("swap", "kl_k3", 0, by=test_kl_is_exact_in_value_and_its_gradient_is_the_forward_kls),
        Mutant("term", "kl_k3", "exp 2", by=test_kl_is_exact_in_value_and_its_gradient_is_the_forward_kls),
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()
