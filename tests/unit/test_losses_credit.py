"""Losses and credit against closed forms and slow, obvious versions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgelm.objective import credit, losses
from bridgelm.types import Problem, Row, Verdict

PROBLEM = Problem("p", ({"role": "user", "content": "?"},))


def rows_of(*groups: list[float | None], finished: bool = True) -> list[Row]:
    """Rows of groups by reward; None is a failed grade."""
    return [Row(np.arange(4), np.arange(4) >= 2, "rollout", PROBLEM, g, reward=0.0 if r is None else r,
                verdict=Verdict.ERROR if r is None else Verdict.CORRECT, finished=finished)
            for g, rewards in enumerate(groups) for r in rewards]


def advantages(rows: list[Row]) -> list[float | None]:
    return [float(r.streams["pg"].weight[-1]) if "pg" in r.streams else None for r in rows]


def slope(loss: Any, logp: torch.Tensor) -> list[float]:
    logp = logp.clone().requires_grad_()
    loss(logp).sum().backward()
    assert logp.grad is not None
    return logp.grad.tolist()


OLD = torch.tensor([-1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
LOGP = OLD + torch.tensor([0.1, 0.5, -0.5, 0.0], dtype=torch.float64)  # ratios 1.11, 1.65, .61, 1


def test_nll() -> None:
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0])
    assert slope(lambda x: losses.nll(x, weight), LOGP) == [-1.0, -2.0, 0.0, -1.0]


def test_prob_weight() -> None:
    """p at alpha = 1, 1 for what is likelier than alpha, nothing that underflows, and no gradient of its own."""
    logp = torch.tensor([0.0, -1.0, -5.0, -2000.0], dtype=torch.float64, requires_grad=True)
    assert losses.prob_weight(logp).tolist() == pytest.approx([1.0, math.exp(-1), math.exp(-5), 0.0])
    assert losses.prob_weight(logp, 0.1).tolist() == pytest.approx([1.0, 1.0, 10 * math.exp(-5), 0.0])
    assert losses.prob_weight(logp, 1e-300).tolist() == pytest.approx([1.0, 1.0, 1.0, 0.0])
    assert not losses.prob_weight(logp).requires_grad
    assert slope(lambda x: losses.nll(x, losses.prob_weight(x, 0.1)), logp.detach())[2] == pytest.approx(
        -10 * math.exp(-5))


def test_token_weight() -> None:
    """Constants, by a token's probability; nothing of them is differentiated."""
    logp = torch.log(torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)).requires_grad_()
    wanted = {"plain": [1.0, 1.0, 1.0], "phi": [0.0, 0.25, 0.09], "p": [1.0, 0.5, 0.1]}
    for kind, values in wanted.items():
        found = losses.token_weight(logp, kind).expand(3)
        assert found.tolist() == pytest.approx(values)
        assert not found.requires_grad


def test_plain_and_shaped_surrogates() -> None:
    """-A rho keeps its gradient wherever rho is; -A p / (p + g) has A g p / (p + g)^2."""
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    ratio = (LOGP - OLD).exp()
    assert losses.pg(LOGP, OLD, weight).tolist() == pytest.approx((-weight * ratio).tolist())
    assert slope(lambda x: losses.pg(x, OLD, weight), LOGP) == pytest.approx((-weight * ratio).tolist())
    p = LOGP.exp()
    assert losses.shaped(LOGP, weight, 0.1).tolist() == pytest.approx((-weight * p / (p + 0.1)).tolist())
    assert slope(lambda x: losses.shaped(x, weight, 0.1), LOGP) == pytest.approx(
        (-weight * 0.1 * p / (p + 0.1) ** 2).tolist())


def test_clip() -> None:
    """The slow version of PPO's rule: a token keeps its gradient A rho unless it has gone too far already."""
    for advantage in (1.0, -2.0):
        weight = torch.full_like(LOGP, advantage)
        value = losses.pg_clip(LOGP, OLD, weight, 0.2, 0.28)
        wanted, slopes = [], []
        for x, old in zip(LOGP.tolist(), OLD.tolist(), strict=True):
            rho = math.exp(x - old)
            bounded = min(max(rho, 0.8), 1.28)
            wanted.append(-min(advantage * rho, advantage * bounded))
            gone = (advantage > 0 and rho > 1.28) or (advantage < 0 and rho < 0.8)
            slopes.append(0.0 if gone else -advantage * rho)
        assert value.tolist() == pytest.approx(wanted)
        assert slope(lambda x, w=weight: losses.pg_clip(x, OLD, w, 0.2, 0.28), LOGP) == pytest.approx(slopes)


def test_truncate_has_a_constant_ratio() -> None:
    """The gradient is A min(rho, cap) grad log pi: nothing flows through the ratio, under the cap or over it."""
    weight = torch.tensor([1.0, 3.0, -2.0, 0.0], dtype=torch.float64)
    wanted = [-w * min(math.exp(x + 1), 1.3) for w, x in zip(weight.tolist(), LOGP.tolist(), strict=True)]
    assert slope(lambda x: losses.pg_truncate(x, OLD, weight, 1.3), LOGP) == pytest.approx(wanted)
    old = OLD.clone().requires_grad_()
    logp = LOGP.clone().requires_grad_()
    losses.pg_truncate(logp, old.detach(), weight, 1.3).sum().backward()
    assert old.grad is None


def test_taper_pulls_at_full_weight_and_pushes_by_the_ratio_up_to_one() -> None:
    weight = torch.tensor([1.0, -3.0, -2.0, 0.5], dtype=torch.float64)  # ratios 1.11, 1.65, .61, 1
    wanted = [-w * (1.0 if w > 0 else min(math.exp(x + 1), 1.0)) for w, x in zip(weight.tolist(), LOGP.tolist())]
    assert slope(lambda x: losses.pg_taper(x, OLD, weight), LOGP) == pytest.approx(wanted)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=6), st.lists(st.floats(-3, 3), min_size=2, max_size=6))
def test_k3(a: list[float], b: list[float]) -> None:
    n = min(len(a), len(b))
    p, q = (torch.log_softmax(torch.tensor(x[:n], dtype=torch.float64), -1) for x in (a, b))
    k3 = losses.kl_k3(p, q, torch.ones(n, dtype=torch.float64))
    assert (k3 >= -1e-12).all()
    exact = float((p.exp() * (p - q)).sum())
    assert float((p.exp() * k3).sum()) == pytest.approx(exact, abs=1e-9)  # unbiased under pi


def test_on_policy_gradients_agree() -> None:
    """With pi = pi_old, clip, truncation and the plain score-function gradient are one thing."""
    weight = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    plain = (-weight).tolist()
    assert slope(lambda x: losses.pg_clip(x, OLD, weight, 0.2, 0.28), OLD) == pytest.approx(plain)
    assert slope(lambda x: losses.pg_truncate(x, OLD, weight, 2.0), OLD) == pytest.approx(plain)
    assert slope(lambda x: losses.pg_taper(x, OLD, weight), OLD) == pytest.approx(plain)


# -- credit ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -0.3, 1e9, 1 / 3])
@pytest.mark.parametrize("n", [2, 3, 6, 7, 64])
def test_equal_rewards_are_worth_exactly_nothing(value: float, n: int) -> None:
    rewards = np.full(n, value)
    for function in (credit.centre, credit.zscore, credit.leave_one_out):
        assert not function(rewards).any()


def test_centre_zscore_and_leave_one_out() -> None:
    rewards = np.array([1.0, 0.0, 0.0, 0.0])
    assert credit.centre(rewards).tolist() == [0.75, -0.25, -0.25, -0.25]
    assert credit.zscore(rewards, 0.0) == pytest.approx(np.array([3, -1, -1, -1]) / math.sqrt(3))
    wanted = [r - (rewards.sum() - r) / 3 for r in rewards]
    assert credit.leave_one_out(rewards) == pytest.approx(wanted)


def test_grader_errors_leave_the_group() -> None:
    rows = credit.with_advantages(rows_of([1.0, None, 0.0, 0.0], [None, 1.0], [None, None], [1.0, 0.0]))
    third = 1 / 3
    assert advantages(rows) == [pytest.approx(2 * third), None, pytest.approx(-third), pytest.approx(-third),
                                None, None, None, None, 0.5, -0.5]


def test_groups_may_come_interleaved() -> None:
    a, b = rows_of([1.0, 0.0], [1.0, 1.0])[:2], rows_of([1.0, 0.0], [1.0, 1.0])[2:]
    rows = credit.with_advantages([a[0], b[0], a[1], b[1]])
    assert advantages(rows) == [0.5, 0.0, -0.5, 0.0]


def test_overlong_answers_are_masked_but_keep_their_part_in_the_baseline() -> None:
    rows = rows_of([1.0, 0.0, 0.0, 0.0])
    rows[3] = rows_of([0.0], finished=False)[0]
    assert advantages(credit.with_advantages(rows, mask_overlong=True)) == [0.75, -0.25, -0.25, None]
    assert advantages(credit.with_advantages(rows)) == [0.75, -0.25, -0.25, -0.25]


def test_spread() -> None:
    assert credit.spread(rows_of([1.0, 0.0], [1.0, 1.0], [None, 1.0], [None, None])) == {0: True, 1: False, 2: False}


def test_schedules() -> None:
    assert [credit.schedule("linear", 1.0, 0.0, p) for p in (-1, 0, 0.25, 1, 2)] == [1, 1, 0.75, 0, 0]
    assert [credit.schedule("cosine", 1.0, 0.0, p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert credit.schedule("constant", 3.0, 0.0, 0.7) == 3.0
    rates = [credit.rate_factor("linear", 2, 0.0, step, 6) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 2 / 3, 1 / 3, 0.0])
