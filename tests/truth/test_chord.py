"""CHORD's mix in loops over tokens, its schedule against the official one, and where it becomes grpo, sft and joint."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from checks import close
from mutation import Mutant, mutants
from table import Hands, Table, data, log_probs, method_of, row, slope, thetas, tokens, update

from bridgelm.errors import UserError
from bridgelm.methods import METHODS, chord
from bridgelm.methods.chord import Chord
from bridgelm.model import batching
from bridgelm.objective import credit, losses
from bridgelm.types import Live, Row

NOW, OLD = thetas(1)
RL = {"std": True, "clip_low": 0.2, "clip_high": 0.2}


def rollouts() -> list[Row]:
    rewards = {0: (1.0, 0.0, 0.0), 1: (0.0, 1.0), 2: (1.0, 1.0)}
    answers = iter(([0, 1, 2], [0, 1], [1, 2, 2, 0, 1], [2, 0], [1, 1, 1], [0, 2], [2, 2, 1, 0, 0]))
    return [row(next(answers), r, group, OLD) for group, given in rewards.items() for r in given]


def demos() -> list[Row]:
    return [row(ids, math.nan, -1, kind="demo") for ids in ([0, 2, 1, 1], [1, 0, 0, 2, 2, 1], [2, 1])]


FACTORS: dict[str, Callable[[float], float]] = {"plain": lambda p: 1.0, "phi": lambda p: p * (1 - p), "p": lambda p: p}


def by_hand(kind: str, mu: float) -> tuple[np.ndarray, float, float]:
    """Ascent direction, and both losses with their weights."""
    rl, sft = np.zeros_like(NOW), np.zeros_like(NOW)
    value, rows, words, below = {"pg": 0.0, "nll": 0.0}, rollouts(), 0, 0
    for r in rows:
        group = [x.reward for x in rows if x.group == r.group]
        mean = sum(group) / len(group)
        a = (r.reward - mean) / (math.sqrt(sum((x - mean) ** 2 for x in group) / len(group)) + 1e-6)
        for t in tokens(r):
            words += 1
            ratio = math.exp(log_probs(NOW, r)[t] - log_probs(OLD, r)[t])
            bounded = min(max(ratio, 0.8), 1.2)
            value["pg"] -= min(a * ratio, a * bounded)
            if a * ratio <= a * bounded:
                rl += a * ratio * slope(NOW, r, t)
    for r in demos():
        for t in tokens(r):
            below += 1
            p = math.exp(log_probs(NOW, r)[t])
            value["nll"] -= FACTORS[kind](p) * math.log(p)
            sft += FACTORS[kind](p) * slope(NOW, r, t)
    return (1 - mu) * rl / words + mu * sft / below, (1 - mu) * value["pg"] / words, mu * value["nll"] / below


def ready(name: str = "chord", **options: Any) -> tuple[Any, Table]:
    method, policy = method_of(METHODS[name], name, **options), Table(NOW)
    method.setup(policy)
    return method, policy


def stepped(method: Any, policy: Table, rows: list[Row] | None = None, step: int = 0) -> dict[str, float]:
    hands = Hands(policy, rollouts() if rows is None else rows)
    return update(method, policy, method.gather(data(demos()), hands, step), step)


@pytest.mark.parametrize("mu", [0.1, 0.7])
@pytest.mark.parametrize("kind", FACTORS)
def test_equations(kind: str, mu: float) -> None:
    method, policy = ready(tokens=kind, mu=mu)
    found = stepped(method, policy)
    wanted, pg, nll = by_hand(kind, mu)
    close(policy.applied, wanted, 1e-14, "the step")
    close([found["loss/pg"], found["loss/nll"]], [pg, nll], 1e-14, "losses")
    close(found["chord/p"], np.mean([math.exp(log_probs(NOW, r)[t]) for r in demos() for t in tokens(r)]), 1e-15)
    assert found["chord/mu"] == mu


def test_ends() -> None:
    """mu = 0 is grpo, plain mu = 1 is sft, plain mu = m / (1 + m) is joint at m, and mu 0 reads no demonstration."""
    for mu, name, options, read in ((0.0, "grpo", {"rl": RL}, {"pg"}), (1.0, "sft", {}, {"nll"}),
                                    (0.6 / 1.6, "joint", {"rl": RL, "mu": 0.6}, {"pg", "nll"})):
        (method, policy), (theirs, same) = ready(tokens="plain", mu=mu), ready(name, **options)
        stepped(method, policy)
        stepped(theirs, same)
        close(policy.applied, same.applied, 1e-16, f"mu {mu} against {name}")
        assert set(policy.coef) == read and np.abs(policy.applied).max() > 1e-3


def official_schedule(step: int, warmup: int, decay: int, peak: float, valley: float) -> float:
    if step < warmup:
        return step / warmup * peak
    if step >= warmup + decay:
        return valley
    return (peak - valley) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / decay)) + valley


def test_schedule() -> None:
    """The paper's numbers, and every step of the presets."""
    for preset, numbers in {"phi": (0, 0, 0.1, 0.1), "mu": (0, 200, 0.9, 0.05), "both": (200, 400, 0.5, 0.02)}.items():
        method, _ = ready(preset=preset)
        for step in range(700):
            close(method.mu(step), official_schedule(step, *numbers), 1e-15, f"{preset} at {step}")
    for step, value in {0: 0.0, 100: 0.25, 200: 0.5, 400: 0.26, 600: 0.02}.items():
        close(method.mu(step), value, 1e-15, f"both at {step}, as printed")
    for step in (50, 300):
        method, policy = ready(preset="both")
        assert stepped(method, policy, step=step)["chord/mu"] == method.mu(step)
        close(policy.applied, by_hand("phi", method.mu(step))[0], 1e-14, "both at once: the schedule and p(1 - p)")
    assert ready(preset="mu", mu=0.4, decay=10)[0].mu(0) == 0.4, "a key wins over the preset"


@pytest.mark.parametrize("kind", FACTORS)
def test_only_through_log_pi(kind: str) -> None:
    """The weight is a constant: the slope of the term in log p is -weight, not the derivative of weight x log p."""
    method, p = ready(tokens=kind)[0], np.array([1.0, 1e-5, 0.1, 0.5, 0.9, 1.0])
    r = row([0] * 6, kind="demo").with_stream("nll", 0.7)  # as a stream may say
    micro = batching.collate([r], torch.float64, torch.device("cpu"), {})
    leaf = torch.tensor(np.log(p)[None], requires_grad=True)
    value = method.terms(micro, Live(leaf))["nll"]
    (g,) = torch.autograd.grad(value[0, 1:].sum(), leaf)
    close(-g[0, 1:], [0.7 * FACTORS[kind](x) for x in p[1:]], 1e-15, "the weight alone")
    close(value[0, 1:].detach(), [-0.7 * FACTORS[kind](x) * math.log(x) for x in p[1:]], 1e-15, "the value")


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_flat_groups(reward: float) -> None:
    """All pass or all fail: mu of the weighted SFT gradient and nothing else."""
    method, policy = ready(mu=0.3)
    stepped(method, policy, [row([0, i % 3, 1], reward, i // 6, OLD) for i in range(12)])
    close(policy.applied, 0.3 * by_hand("phi", 1.0)[0], 1e-15)


def test_reference() -> None:
    method, policy = ready(mu=0.25, rl={"kl_coef": 0.4})
    stepped(method, policy)
    assert "reference" in policy.groups
    close([policy.coef["pg"], policy.coef["kl"], policy.coef["nll"]], [0.75, 0.3, 0.25], 1e-16)


MUTANTS = mutants(
    chord,
    Mutant("term", "Chord.update", 2, by=partial(test_equations, "phi", 0.7)),  # RL in full
    Mutant("term", "Chord.terms", "nll 1", by=partial(test_only_through_log_pi, "p")),
    Mutant("compare", "Chord.update", 0, by=test_ends),  # coefficients of 0 are read all the same
    Mutant("branch", "Chord.mu", "mu_end 0", by=test_schedule),
    Mutant("term", "token_weight", 0, by=partial(test_equations, "phi", 0.1), of=losses),
    Mutant("detach", "prob_weight", by=partial(test_only_through_log_pi, "p"), of=losses),
    Mutant("term", "warm_cosine", 4, by=test_schedule, of=credit),  # the cosine starts with the warm-up
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()


def test_a_mix_without_a_way_is_refused() -> None:
    with pytest.raises(UserError, match=r"mu_end differs from mu.*set decay"):
        ready(mu=0.3, mu_end=0.1)
    assert Chord.needs == {"demos"}
