"""SASR: its controller against plain arithmetic on a quadratic whose norms are known, its draws against their odds; and
mutants."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checks import close
from exact import Quadratic, Shipped, Stub, run_config
from mutants import Swaps, mutate

from bridgelm.config.run_config import OptimConfig
from bridgelm.methods import sasr as sasr_module
from bridgelm.model import batching
from bridgelm.types import Problem, Row, Verdict

PROBLEM = Problem("p", ())
LR = 0.05


def one_row(kind: Any, reward: float = math.nan) -> Row:
    verdict = None if kind == "demo" else Verdict.CORRECT if reward else Verdict.WRONG
    own = np.array([False, True])
    return Row(np.array([0, 1]), own, kind, PROBLEM, 0, "live", old_logps=np.zeros(2), reward=reward, verdict=verdict)


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


def run(module: ModuleType, steps: int, policy: Any = None, seed: int = 0, resume: bool = False, **options: Any) -> Any:
    plain = {"rl": {"kl_coef": 0.0}, **options}
    config = run_config({"name": "sasr", **plain}, steps, LR, seed=seed)
    policy = policy or NoPenalty(Quadratic(), LR, theta=0.0)
    method = module.Sasr(config.method, config)
    method.setup(policy)
    data, roll = SimpleNamespace(demos=lambda n: [(PROBLEM, None)] * n), FakeRoller(policy)
    out = SimpleNamespace(metrics=[], thetas=[policy.point[0]], roll=roll, method=method, policy=policy)
    for step in range(steps):
        if resume:
            state, method = method.state(), module.Sasr(config.method, config)
            method.load(state)
        rows = method.gather(data, roll, step)
        out.metrics.append(method.update(policy, batching.make_batch(rows), step))
        out.thetas.append(policy.point[0])
    return out


# SFT of the quadratic pulls to 3, RL to 0 (w = 0): gradients 3 - theta and -theta.


def trace(module: ModuleType) -> None:
    """Every p, norm and step, from the branch that was taken on."""
    for gamma, floor, denominator, probe in ((1.0, 0.0, "warmup", 0), (3.0, 0.0, "grpo", 0), (8.0, 0.2, "warmup", 2)):
        options = {"gamma": gamma, "floor": floor, "denominator": denominator, "probe_every": probe, "warmup": 0.1}
        found = run(module, 60, **options)
        theta, last, warm, rl, age = 0.0, 0.0, 0.0, 0.0, 0
        for step, m in enumerate(found.metrics):
            other = rl if denominator == "grpo" and rl else warm
            p = 1.0 if step < 6 else max(floor, last / (last + gamma * other))
            close(m["sasr/p"], p, 1e-15, f"p of step {step}")
            if step == 6:
                close(p, max(floor, 1 / (1 + gamma)), 1e-15, "p at the hand-over")
            draw = np.random.default_rng([0, step, module.DRAW]).random()
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
        imitated = [bool(m["sasr/imitates"]) for m in found.metrics]
        assert 6 < sum(imitated) < 60
        assert found.roll.asked == 60 - sum(imitated), "problems are sampled in GRPO steps only"


def grpo_leaves_the_norm(module: ModuleType) -> None:
    found = run(module, 80, gamma=5.0)
    pairs = [(a, b) for a, b in zip(found.metrics[8:], found.metrics[9:], strict=False) if not b["sasr/imitates"]]
    assert len(pairs) > 20
    assert all(a["sasr/norm_sft"] == b["sasr/norm_sft"] for a, b in pairs), "to the bit"
    assert all(a["sasr/p"] == b["sasr/p"] for a, b in pairs if not a["sasr/imitates"]), "so p stays as well"


def frequencies(module: ModuleType) -> None:
    """With norms that stay, SFT is drawn 1 / (1 + gamma) of the time."""
    for gamma in (0.5, 3.0):
        found = run(module, 700, Stub(Constant(), 0.0), gamma=gamma, warmup=0.001)
        drawn = [m["sasr/imitates"] for m in found.metrics[2:]]
        p = 1 / (1 + gamma)
        assert abs(np.mean(drawn) - p) < 4 * math.sqrt(p * (1 - p) / len(drawn)), (gamma, np.mean(drawn))
        lag = np.corrcoef(drawn[1:], drawn[:-1])[0, 1]
        assert abs(lag) < 4 / math.sqrt(len(drawn)), "steps are independent"


def one_draw_for_all(module: ModuleType) -> None:
    """Two ranks, and a run that was resumed in every step, take the same branches; another seed takes others."""
    branches = [
        [m["sasr/imitates"] for m in run(module, 60, seed=seed, resume=resume).metrics]
        for seed, resume in ((0, False), (0, False), (0, True), (1, False))
    ]
    assert branches[0] == branches[1] == branches[2] != branches[3]


def blend(module: ModuleType) -> None:
    found = run(module, 30, rule="blend", gamma=2.0, warmup=0.1)
    theta, last, warm = 0.0, 0.0, 0.0
    for step in range(30):
        p = 1.0 if step < 3 else last / (last + 2.0 * warm)
        last = abs(3 - theta)
        warm = last if step < 3 else warm
        theta += LR * (p * (3 - theta) + (1 - p) * -theta)
        close(found.metrics[step]["sasr/p"], p, 1e-15, f"p of step {step}")
        close(found.thetas[step + 1], theta, 1e-14, f"theta after step {step}")
    assert found.roll.asked == 27, "a blend samples in every step after the warm-up"


def before_clipping(module: ModuleType) -> None:
    """The real policy with a clip that always binds: steps are small, norms are not."""
    policy = Shipped(Quadratic(), OptimConfig.model_validate({"kind": "sgd", "lr": LR, "clip": 0.1}))
    found = run(module, 10, policy, warmup=0.3)
    close([m["sasr/norm_sft"] for m in found.metrics[:3]], [3 - 0.1 * LR * k for k in range(3)], 1e-6, "norms")
    close(found.metrics[3]["sasr/p"], 0.5, 1e-15, "1 / (1 + gamma)")


def reference(module: ModuleType) -> None:
    found = run(module, 20, rl={"kl_coef": 0.1}, warmup=0.25)
    close(float(found.policy.groups["reference"]), found.thetas[5], 0.0, "the warm-started policy")
    assert found.thetas[5] not in (found.thetas[0], found.thetas[-1])
    kept = NoPenalty(Quadratic(), LR)
    kept.groups["reference"] = kept.groups["theta"] - 1.0  # of an earlier stage, to be kept
    close(float(run(module, 20, kept, rl={"kl_coef": 0.1}).policy.groups["reference"]), -1.0, 0.0, "another's")


CHECKS: dict[str, Callable[[ModuleType], None]] = {
    f.__name__: f
    for f in (trace, grpo_leaves_the_norm, frequencies, one_draw_for_all, blend, before_clipping, reference)
}

MUTANTS: dict[str, tuple[Swaps, str]] = {
    "gamma_on_the_other": ((("self.last + self.options.gamma * other", "self.options.gamma * self.last + other"),),
                           "trace"),
    "no_floor": ((("max(self.options.floor, self.last / below if below else 0.0)", "self.last / below"),), "trace"),
    "denominator_ignored": ((('if self.options.denominator == "warmup" or', "if True or"),), "trace"),
    "warm_follows": ((("self.last if step < self.first else self.warm", "self.last"),), "trace"),
    "norm_of_grpo": ((("self.grpo = grads.norm(rl.theta)", "self.last = self.grpo = grads.norm(rl.theta)"),),
                     "grpo_leaves_the_norm"),
    "branches_swapped": ((("random() < self.share()", "random() >= self.share()"),), "trace"),
    "always_sft": ((("random() < self.share()", "random() < 1.0"),), "frequencies"),
    "one_draw_a_run": ((("2**63, step, DRAW]", "2**63, 0, DRAW]"),), "frequencies"),
    "global_draw": ((("np.random.default_rng([self.run.seed % 2**63, step, DRAW]).random()", "np.random.random()"),),
                    "one_draw_for_all"),
    "seed_ignored": ((("[self.run.seed % 2**63, step, DRAW]", "[0, step, DRAW]"),), "one_draw_for_all"),
    "probe_steps": ((("if self.imitating:  # or it was measured only", "if True:"),), "trace"),
    "never_probes": ((("0 < self.options.probe_every <= self.age + 1", "False"),), "trace"),
    "blend_swapped": ((("parts.append((self.p, sft.theta))", "parts.append((1 - self.p, sft.theta))"),
                       ("parts.append((1 - self.p, rl.theta))", "parts.append((self.p, rl.theta))")), "blend"),
    "branch_scaled": ((("grads.mix(*parts) if len(parts) > 1 else parts[0][1]", "grads.mix(*parts)"),), "trace"),
    "clipped_norm": ((("self.last = grads.norm(sft.theta)", "self.last = min(grads.norm(sft.theta), 0.1)"),),
                     "before_clipping"),
    "reference_of_the_start": ((('roll.policy.copy("theta", "reference")', "pass"),), "reference"),
    "anyones_reference": (((' and "reference" not in policy.groups', ""),), "reference"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_the_shipped_method(name: str) -> None:
    CHECKS[name](sasr_module)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_seen(name: str) -> None:
    swaps, check = MUTANTS[name]
    with pytest.raises(AssertionError):
        CHECKS[check](mutate(sasr_module, swaps, name))
