"""Tests A, B, C and D through the shipped code: closed forms that BRIDGE must reach, and what it says on the way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from checks import CHECKS, Code, bisect, rest_z
from exact import LAMBDAS, Quadratic, Stub, TwoPrompts, bridge_walk, logit, run_config, sigmoid, walk
from ratios import (
    ANSWERS,
    RATIO_CHECKS,
    documented_bias,
    exact_gradient,
    logp_2,
    prob,
    row,
    shadow_gradient,
    token_probs,
    token_ratio_gradient,
)
from ratios import method as bridge_of

from bridgelm.methods.bridge import Bridge
from bridgelm.methods.joint import Joint


@pytest.mark.parametrize("name", CHECKS | RATIO_CHECKS)
def test_shipped_code(name: str) -> None:
    (CHECKS | RATIO_CHECKS)[name](Code())


# -- the numbers that the checks lean on -------------------------------------------------------------------------------


def test_bilevel_limit_of_the_quadratic() -> None:
    """As lambda -> 1 the penalised rest tends to the bilevel solution, with an error O(1 - lambda)."""
    for rest in (1e-2, 1e-3, 1e-4):
        theta, _, w = Quadratic().rest(1 - rest)
        assert abs(w - 1.2) < 0.25 * rest and abs(theta - 2.4) < 0.13 * rest
    assert Quadratic().rest(0.99)[2] == pytest.approx(1.197581, abs=6e-7)
    path = bridge_walk(Code().bridge, Quadratic(), 0.99, 2000, lr=0.3, settle=1e-15)
    assert path.end == pytest.approx(Quadratic().rest(0.99), abs=1e-9)


def test_printed_numbers_of_two_prompts() -> None:
    printed = {0.3: 1.581792, 0.5: 1.329971, 0.7: 1.163128, 0.9: 1.046192, 0.99: 1.004327}
    p = TwoPrompts()
    for lam, z in printed.items():
        assert rest_z(p, lam) == pytest.approx(z, abs=6e-7)
    w = printed[0.5] - math.log(4)
    assert w == pytest.approx(-0.056323, abs=6e-7)
    assert p.rl(math.log(4), w)[0] == pytest.approx(0.610536, abs=6e-7)
    assert p.rl(1.0, 0.0)[0] == pytest.approx(math.log((1 + math.e) / 2), abs=1e-15)  # V = .620115
    assert p.rl(1.0, 0.0)[0] == pytest.approx(0.620115, abs=6e-7)


def test_no_conflict_no_trade() -> None:
    """Where the expert already answers as the RL optimum does, z = 1 / tau at every lambda."""
    p = TwoPrompts(q1=sigmoid(1.0))
    for lam in LAMBDAS:
        end = bridge_walk(Code().bridge, p, lam, 1500, lr=4.0, settle=1e-14).end
        assert end == pytest.approx((math.log(4), math.log(4), 1 - math.log(4)), abs=1e-9)


def joint_rest(problem: object, lam: float, steps: int, lr: float) -> tuple[float, float]:
    """The real `joint` at the mu that is this lambda; w does not exist for it."""
    config = run_config({"name": "joint", "mu": (1 - lam) / lam}, steps, lr)
    method, policy = Joint(config.method, config), Stub(problem, lr)
    method.setup(policy)  # type: ignore[arg-type]
    path = walk(method, policy, steps, settle=1e-15)
    return float(path.end[0]), path.policy.problem.rl(float(path.end[0]), 0.0)[0]


def test_naive_mix_trades_worse_than_bridge() -> None:
    """One theta for both prompts must compromise. At lambda 1/2: .609677 against BRIDGE's .610536, whose prompt 2 is
    also exactly the expert's."""
    p = TwoPrompts()
    for lam in LAMBDAS:
        theta, reward = joint_rest(p, lam, 2000, 4.0)

        def slope(x: float, lam: float = lam) -> float:
            return (1 - lam) * p.sft(x, 0.0)[1] + lam * p.rl(x, 0.0)[1]

        assert theta == pytest.approx(bisect(slope, -4.0, 6.0), abs=1e-9)
        mixed = (1 - lam) * p.sft(theta, 0.0)[0] + lam * reward
        w = rest_z(p, lam) - math.log(4)
        assert (1 - lam) * p.sft(math.log(4), w)[0] + lam * p.rl(math.log(4), w)[0] > mixed
        if lam == 0.5:
            assert (theta, reward) == pytest.approx((1.345407, 0.609677), abs=6e-7)


def test_preset_paper_has_the_same_rest() -> None:
    """Clip, plain shadow step and GRPO's scale touch estimates and step sizes, not the equations."""
    for lam in LAMBDAS:
        end = bridge_walk(Code().bridge, Quadratic(), lam, 500, lr=0.3, settle=1e-14, preset="paper").end
        assert end == pytest.approx(Quadratic().rest(lam), abs=1e-9)


def test_size_of_the_token_ratio_bias(capsys: pytest.CaptureFixture[str]) -> None:
    """The two-token case, pinned: the bias is real, and these are its numbers for the documentation."""
    exact, bias = exact_gradient(), documented_bias(0.0)
    with capsys.disabled():
        print(f"\ntwo tokens: exact gradient {exact.round(6)}, bias of the token ratio {bias.round(6)}")
    assert exact == pytest.approx([-0.088981, 0.073834, 0.104687], abs=1e-6)
    assert bias == pytest.approx([0.057255, -0.024943, 0.021450], abs=1e-6)  # 64 % of the first: not a small matter
    assert token_ratio_gradient(Code(), 0.0, 10.0) == pytest.approx(exact + bias, abs=1e-15)


def test_the_state_of_the_count_survives_a_resume() -> None:
    config = run_config({"name": "bridge"})
    method = Bridge(config.method, config)
    method.vanished = 37
    again = Bridge(config.method, config)
    again.load(method.state())
    assert again.vanished == 37 and again.state() == method.state()


DOCUMENTED = {  # the table of docs/bridge.md, section 4: estimator -> its mean at baseline 0 and at .1
    "no ratio": ({}, (0.05, 0.02), (0.08, 0.026)),
    "token ratio, no cap": ({"ratio_cap": 1e9}, (0.125, 0.032), (0.125, 0.032)),
    "taper": ({"ratio": "taper"}, (0.05, 0.02), (0.065, 0.0212)),
    "token ratio, cap 2": ({}, (0.1, 0.032), (0.105, 0.032)),
    "clip": ({"ratio": "clip"}, (0.0, 0.0), (-0.0125, 0.0)),
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_table_of_the_documentation(name: str) -> None:
    """Reward 1 for (1, 1) alone; joint .2 then .5, shadow .5 then .8. Logits: first token; second after 0, after 1."""
    joint, shadow = np.array([logit(0.2), 0.0, 0.0]), np.array([0.0, 0.0, logit(0.8)])
    options, *wanted = DOCUMENTED[name]
    term = "nll" if name == "no ratio" else "shadow"
    for baseline, mean in zip((0.0, 0.1), wanted):
        rows = [
            row(a, list(np.log(token_probs(joint, a)))).with_stream(
                term, prob(joint, a) * ((a == (1, 1)) - baseline), "constant", 0.25
            )
            for a in ANSWERS
        ]
        logits = torch.tensor(shadow, requires_grad=True)
        found = shadow_gradient(bridge_of(Code(), **options), rows, logits, logp_2, term).numpy()
        assert found[[0, 2]] == pytest.approx(mean, abs=1e-12)
