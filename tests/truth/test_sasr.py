"""SASR: its controller against plain arithmetic on a quadratic whose norms are known, its draws against their odds."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checks import close
from exact import Quadratic, Shipped, Stub, run_config
from mutation import Mutant, mutants

from bridgelm.config.run_config import OptimConfig
from bridgelm.methods import sasr
from bridgelm.model import batching
from bridgelm.types import Problem, Row, Verdict

LR = 0.05


def one_row(kind: Any, reward: float = math.nan) -> Row:
    verdict = None if kind == "demo" else Verdict.CORRECT if reward else Verdict.WRONG
    return Row(np.array([0, 1]), np.array([False, True]), kind, Problem("p", ()), 0, "live", old_logps=np.zeros(2),
               reward=reward, verdict=verdict)


class FakeRoller:
    """A group with one right answer of two whenever it is asked; counts how often that is."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.asked = policy, 0

    def groups(self, data: Any) -> list[Row]:
        self.asked += 1
        return [one_row("rollout", 1.0), one_row("rollout", 0.0)]

    def demo(self, problem: Any, demo: Any) -> Row:
        return one_row("demo")

    def reference(self, rows: list[Row]) -> list[Row]:
        return [replace(row, ref_logps=np.zeros(2)) for row in rows]


class Constant:
    """Gradients that do not change: norms 3 (SFT) and 1.5 (RL), whatever theta."""

    def sft(self, theta: float, w: float) -> tuple[float, float, float]:
        return 3 * theta, 3.0, 0.0

    def rl(self, theta: float, w: float) -> tuple[float, float, float]:
        return -1.5 * theta, -1.5, 0.0


class NoPenalty(Stub):
    """The closed forms know no KL term."""

    def grad(self, terms: Any, batch: Any, coef: Any, at: str = "live") -> Any:
        return super().grad(terms, batch, {name: c for name, c in coef.items() if name != "kl"}, at)


def run(steps: int, policy: Any = None, seed: int = 0, resume: bool = False, **options: Any) -> Any:
    config = run_config({"name": "sasr", "rl": {"kl_coef": 0.0}, **options}, steps, LR, seed=seed)
    policy = policy or NoPenalty(Quadratic(), LR, theta=0.0)
    method = sasr.Sasr(config.method, config)
    method.setup(policy)
    data, roll = SimpleNamespace(demos=lambda n: [(None, None)] * n), FakeRoller(policy)
    out = SimpleNamespace(metrics=[], thetas=[policy.point[0]], roll=roll, policy=policy)
    for step in range(steps):
        if resume:
            state, method = method.state(), sasr.Sasr(config.method, config)
            method.load(state)
        out.metrics.append(method.update(policy, batching.make_batch(method.gather(data, roll, step)), step))
        out.thetas.append(policy.point[0])
    return out


# SFT of the quadratic pulls to 3, RL to 0 (w = 0): gradients 3 - theta and -theta.


@pytest.mark.parametrize(("gamma", "floor", "denominator", "probe"), [
    (1.0, 0.0, "warmup", 0), (3.0, 0.0, "grpo", 0), (8.0, 0.2, "warmup", 2)])
def test_trace(gamma: float, floor: float, denominator: str, probe: int) -> None:
    """Every p, norm and step, from the branch that was taken on."""
    found = run(60, gamma=gamma, floor=floor, denominator=denominator, probe_every=probe, warmup=0.1)
    theta, last, warm, rl, age = 0.0, 0.0, 0.0, 0.0, 0
    for step, m in enumerate(found.metrics):
        other = rl if denominator == "grpo" and rl else warm
        p = 1.0 if step < 6 else max(floor, last / (last + gamma * other))
        close(m["sasr/p"], p, 1e-15, f"p of step {step}")
        if step == 6:
            close(p, max(floor, 1 / (1 + gamma)), 1e-15, "p at the hand-over")
        draw = np.random.default_rng([0, step, sasr.DRAW]).random()
        assert m["sasr/imitates"] == float(step < 6 or draw < p), step
        if m["sasr/imitates"]:
            last, age = abs(3 - theta), 0
            warm = last if step < 6 else warm
            theta += LR * (3 - theta)
        else:
            age += 1
            if probe and age == probe:
                last, age = abs(3 - theta), 0
            rl = abs(theta)
            theta += LR * -theta
        close(found.thetas[step + 1], theta, 1e-14, f"theta after step {step}")
        close([m["sasr/norm_sft"], m["sasr/norm_warm"], m["sasr/age"]], [last, warm, age], 1e-14, f"step {step}")
    imitated = sum(m["sasr/imitates"] for m in found.metrics)
    assert 6 < imitated < 60 and found.roll.asked == 60 - imitated, "problems are sampled in GRPO steps only"


def test_frequencies() -> None:
    """With norms that stay, SFT is drawn 1 / (1 + gamma) of the time."""
    for gamma in (0.5, 3.0):
        found = run(700, Stub(Constant(), 0.0), gamma=gamma, warmup=0.001)
        drawn = [m["sasr/imitates"] for m in found.metrics[2:]]
        p = 1 / (1 + gamma)
        assert abs(np.mean(drawn) - p) < 4 * math.sqrt(p * (1 - p) / len(drawn)), (gamma, np.mean(drawn))
        assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 4 / math.sqrt(len(drawn)), "steps are independent"


def test_one_draw_for_all() -> None:
    """Two ranks, and a run that was resumed in every step, take the same branches; another seed takes others."""
    branches = [[m["sasr/imitates"] for m in run(60, seed=seed, resume=resume).metrics]
                for seed, resume in ((0, False), (0, False), (0, True), (1, False))]
    assert branches[0] == branches[1] == branches[2] != branches[3]


def test_blend() -> None:
    found = run(30, rule="blend", gamma=2.0, warmup=0.1)
    theta, last, warm = 0.0, 0.0, 0.0
    for step in range(30):
        p = 1.0 if step < 3 else last / (last + 2.0 * warm)
        last = abs(3 - theta)
        warm = last if step < 3 else warm
        theta += LR * (p * (3 - theta) + (1 - p) * -theta)
        close(found.metrics[step]["sasr/p"], p, 1e-15, f"p of step {step}")
        close(found.thetas[step + 1], theta, 1e-14, f"theta after step {step}")
    assert found.roll.asked == 27, "a blend samples in every step after the warm-up"


def test_before_clipping() -> None:
    """The real policy with a clip that always binds: steps are small, norms are not."""
    policy = Shipped(Quadratic(), OptimConfig.model_validate({"kind": "sgd", "lr": LR, "clip": 0.1}))
    found = run(10, policy, warmup=0.3)
    close([m["sasr/norm_sft"] for m in found.metrics[:3]], [3 - 0.1 * LR * k for k in range(3)], 1e-6, "norms")
    close(found.metrics[3]["sasr/p"], 0.5, 1e-15, "1 / (1 + gamma)")


def test_reference() -> None:
    found = run(20, rl={"kl_coef": 0.1}, warmup=0.25)
    close(float(found.policy.groups["reference"]), found.thetas[5], 0.0, "the warm-started policy")
    assert found.thetas[5] not in (found.thetas[0], found.thetas[-1])
    kept = NoPenalty(Quadratic(), LR)
    kept.groups["reference"] = kept.groups["theta"] - 1.0  # of an earlier stage, to be kept
    close(float(run(20, kept, rl={"kl_coef": 0.1}).policy.groups["reference"]), -1.0, 0.0, "another's")


MUTANTS = mutants(
    sasr,
    Mutant("term", "Sasr.share", "gamma 1", by=partial(test_trace, 3.0, 0.0, "grpo", 0)),
    Mutant("constant", "Sasr.share", "floor", to=0.0, by=partial(test_trace, 8.0, 0.2, "warmup", 2)),
    Mutant("branch", "Sasr.share", "denominator 0", by=partial(test_trace, 3.0, 0.0, "grpo", 0)),
    Mutant("compare", "Sasr.imitates", "random 1", by=test_frequencies),
    Mutant("branch", "Sasr.update", "first 0", by=partial(test_trace, 8.0, 0.2, "warmup", 2)),
    Mutant("branch", "Sasr.update", "imitating 0", by=partial(test_trace, 8.0, 0.2, "warmup", 2)),
    Mutant("drop", "Sasr.gather", "copy 1", by=test_reference),
    Mutant("mask", "Sasr.setup", "kl_coef 1", by=test_reference),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()
