"""The barrier: against constrained optima, slow running means, and inner products taken by plain autograd.

A `Field` is a policy of one vector under plain SGD, whose half-batches have half of the gradient each, and noise of
their own.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from exact import NOTHING, Shipped, run_config
from mutation import Mutant, mutants
from torch import Tensor
from transformer import PROBLEM, all_logps, build, make_rows, spread

from bridgelm.config.run_config import OptimConfig
from bridgelm.errors import UserError
from bridgelm.ledger import Ledger
from bridgelm.methods import barrier
from bridgelm.methods.joint import Joint
from bridgelm.model import batching
from bridgelm.model.groups import Group
from bridgelm.model.policy import Grads, Policy
from bridgelm.types import Batch, Row, Verdict

pytestmark = pytest.mark.usefixtures("wide_norms")

Vector = np.ndarray
# -- problems and policies ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plane:
    """J_RL = -(a theta - b)^2 / 2 is best on a plane, J_SFT = -(theta - t)' H (theta - t) / 2 at one point off it."""

    a: tuple[float, ...] = (1.0, 2.0, -1.0)
    b: float = 1.0
    h: tuple[float, ...] = (1.0, 0.5, 2.0)
    t: tuple[float, ...] = (2.0, 1.0, -1.0)
    scale_sft: float = 1.0
    scale_rl: float = 1.0

    def sft(self, x: Vector) -> tuple[float, Vector]:
        """J and its gradient."""
        off = x - self.t
        return -0.5 * self.scale_sft * off @ (self.h * off), -self.scale_sft * (self.h * off)

    def rl(self, x: Vector) -> tuple[float, Vector]:
        e = float(np.dot(self.a, x)) - self.b
        return -0.5 * self.scale_rl * e**2, -self.scale_rl * e * np.array(self.a)

    def best_fit(self) -> Vector:
        """The best by J_SFT of the best by J_RL: H (theta - t) + m a = 0 and a theta = b."""
        a, n = np.array(self.a), len(self.a)
        system = np.block([[np.diag(self.h), a[:, None]], [a[None], np.zeros((1, 1))]])
        return np.linalg.solve(system, np.append(np.multiply(self.h, self.t), self.b))[:n]

    def mixed(self, mu: float) -> Vector:
        """Where J_RL + mu J_SFT is best."""
        a = np.array(self.a)
        return np.linalg.solve(mu * np.diag(self.h) + np.outer(a, a), mu * np.multiply(self.h, self.t) + self.b * a)


@dataclass(frozen=True)
class Slopes:
    """Two gradients that are the same everywhere."""

    g_sft: Vector
    g_rl: Vector

    def sft(self, x: Vector) -> tuple[float, Vector]:
        return float(self.g_sft @ x), self.g_sft

    def rl(self, x: Vector) -> tuple[float, Vector]:
        return float(self.g_rl @ x), self.g_rl


def loss_of(problem: Any, x: Vector, coef: Mapping[str, float], parts: int) -> tuple[Vector, dict[str, float]]:
    of = {"nll": problem.sft, "pg": problem.rl}
    found = {name: of[name](x) for name in coef}
    gradient = sum((-c / parts * found[name][1] for name, c in coef.items()), np.zeros(len(x)))
    return gradient, {name: -c / parts * found[name][0] for name, c in coef.items()}


class Field:
    """`parts` is how many half-batches make the gradient: two for the barrier, one for methods that take it whole."""

    def __init__(self, problem: Any, lr: float, theta: Any, parts: int = 2, metric: Vector | None = None,
                 noise: Callable[[], Vector] | None = None) -> None:
        self.problem, self.lr, self.parts, self.noise, self.metric = problem, lr, parts, noise, metric
        self.theta = np.array(theta, dtype=float)
        self.seen: list[tuple[str, Vector]] = []  # every gradient handed out, of the loss
        self.applied: list[Vector] = []

    def optimiser(self, name: str) -> None:
        assert name == "theta"

    def grad(self, terms: Any, batch: Batch, coef: dict[str, float], at: str = "live") -> Grads:
        gradient, losses = loss_of(self.problem, self.theta, coef, self.parts)
        if self.noise:
            gradient = gradient + self.noise()
        self.seen.append(("+".join(coef), gradient))
        return Grads({"x": torch.tensor(gradient)}, {}, losses, {})

    def apply(self, name: str, gradient: dict[str, Tensor]) -> float:
        self.applied.append(gradient["x"].numpy().copy())
        self.theta = self.theta - self.lr * gradient["x"].numpy()
        return float(gradient["x"].norm())

    def dot(self, g: dict[str, Tensor], h: dict[str, Tensor], metric: str | None = None) -> float:
        p = np.ones(len(self.theta)) if metric != "theta" or self.metric is None else self.metric
        return float(np.sum(g["x"].numpy() * p * h["x"].numpy()))


class Adam(Shipped):
    """The same on the real policy, with its real Adam."""

    def __init__(self, problem: Any, config: OptimConfig, theta: Any) -> None:
        super().__init__(problem, config)
        self.live.groups = {"theta": Group({"x": torch.tensor(theta, dtype=torch.float64).requires_grad_()})}

    @property
    def theta(self) -> Vector:
        return self.groups["theta"].full["x"].detach().numpy().copy()

    def grad(self, terms: Any, batch: Batch, coef: Any, at: str = "live", entropy: bool = False) -> Grads:
        gradient, losses = loss_of(self.problem, self.theta, coef, 2)
        return Grads({"x": torch.tensor(gradient)}, {}, losses, {})


class Scripted(Field):
    """One number, whose gradients are written down: of SFT and RL, on either half, step by step."""

    def __init__(self, script: list[tuple[float, float, float, float]]) -> None:
        super().__init__(None, 0.1, [0.0])
        self.script = [g for four in script for g in four]

    def grad(self, terms: Any, batch: Batch, coef: dict[str, float], at: str = "live") -> Grads:
        return Grads({"x": torch.tensor([self.script.pop(0)], dtype=torch.float64)}, {}, dict.fromkeys(coef, 0.0), {})


def method_of(steps: int = 10, optim: Mapping[str, Any] | None = None, **options: Any) -> Any:
    config = run_config({"name": "barrier", **options}, steps, optim=dict(optim or {}))
    return barrier.Barrier(config.method, config)


def walk(method: Any, policy: Any, steps: int, batches: Any = None) -> tuple[np.ndarray, list[dict[str, float]]]:
    method.setup(policy)
    points, metrics = [policy.theta], []
    for step in range(steps):
        metrics.append(method.update(policy, batches(step) if batches else NOTHING, step))
        assert all(math.isfinite(value) for value in metrics[-1].values()), metrics[-1]
        points.append(policy.theta)
    return np.array(points), metrics


EXACT = {"decay": 0.0, "cap": 1e12}  # no memory and no cap that is met
ETAS = (0.3, 1.0, 3.0)


# -- the closed form ---------------------------------------------------------------------------------------------------


def slid(lr: float, steps: int, eta: float = 1.0, start: Any = (0.0, 0.0, 0.0)) -> Vector:
    return walk(method_of(eta=eta, **EXACT), Field(Plane(), lr, start), steps)[0]


def gaps(points: Vector) -> tuple[float, float]:
    """The worst distance to the best fit and to the plane, over the last fifth."""
    last = points[-len(points) // 5 :]
    far = np.linalg.norm(last - Plane().best_fit(), axis=1).max()
    return float(far), float(np.abs(last @ Plane().a - Plane().b).max())


@pytest.mark.parametrize("eta", ETAS)
def test_the_direction_leads_to_the_best_fit_of_the_best_by_reward(eta: float) -> None:
    """It ends within O(alpha): half the rate, half the distance."""
    rates = (0.04, 0.02) if eta > 1 else (0.04, 0.02, 0.01)
    found = [gaps(slid(lr, int(14 * (1 + eta) / lr), eta)) for lr in rates]
    for (far, off), (nearer, less) in pairwise(found):
        assert nearer == pytest.approx(far / 2, rel=0.25) and less == pytest.approx(off / 2, rel=0.25)
    assert found[0][0] < 0.04 * 2 and found[0][1] < 0.04 * 5


def test_divided_by_its_sum_the_step_would_stop_where_it_meets_the_plane() -> None:
    """Why the divisor is constant, and not 1 + nu: the step ends on the plane, and not at the best fit, at any rate."""
    class Divided(Field):
        def apply(self, name: str, gradient: dict[str, Tensor]) -> float:
            return super().apply(name, {"x": 2 / (1 + method.nu) * gradient["x"]})

    for lr in (0.02, 0.01):
        method = method_of(**EXACT)
        far, off = gaps(walk(method, Divided(Plane(), lr, (0.0, 0.0, 0.0)), int(16 / lr))[0])
        assert off < 1e-4 and far == pytest.approx(1.5736, abs=2e-3)


def test_no_fixed_mix_gets_there() -> None:
    """joint rests off the plane by an amount that its rate has no part in; at a mu so small that this matters little,
    it has not arrived along the plane when the barrier has."""
    problem, steps, lr = Plane(), 2800, 0.01
    best = problem.best_fit()
    far, off = gaps(slid(lr, steps))
    for mu in 10.0 ** np.arange(-3, 4):
        rest, config = problem.mixed(mu), run_config({"name": "joint", "mu": float(mu)})
        for rate in (lr, lr / 2):  # the real joint stays where it is put
            points, _ = walk(Joint(config.method, config), Field(problem, rate, rest, parts=1), 20)
            assert np.abs(points - rest).max() < 1e-12
        misses, violation = float(np.linalg.norm(rest - best)), float(rest @ problem.a - problem.b)
        assert violation > 4e-4
        still = gaps(slid(min(lr, lr * violation / off / 2), 100, start=best))
        assert still[0] < misses and still[1] < violation, f"some rate of the barrier beats mu {mu}"
        if misses < 2 * far:
            points, _ = walk(Joint(config.method, config), Field(problem, lr, (0.0, 0.0, 0.0), parts=1), steps)
            assert gaps(points)[0] > 2 * far, f"mu {mu} has arrived"


# -- scales ------------------------------------------------------------------------------------------------------------

SCALES = [(s, r) for s in (1e-3, 1.0, 1e3) for r in (1e-3, 1.0, 1e3)]


def test_scales() -> None:
    """The direction of the step does not know the losses' units, and nu measures one in the other."""
    rng = np.random.default_rng(3)
    for decay in (0.0, 0.9):
        for theta in rng.normal(size=(4, 3)):
            first = None
            for s, r in SCALES:
                problem = Plane(scale_sft=s, scale_rl=r)
                policy = Field(problem, 1e-15, theta, metric=np.array([0.5, 2.0, 1.0]))
                _, metrics = walk(method_of(decay=decay, cap=1e12), policy, 3)
                directions = np.array([g / np.linalg.norm(g) for g in policy.applied])
                found = (directions, [m["barrier/nu"] * r / s for m in metrics])
                first = first or found
                assert np.allclose(found[0], first[0], rtol=0, atol=1e-9), (s, r)
                assert np.allclose(found[1], first[1], rtol=1e-8), (s, r)


# -- the gain in reward ------------------------------------------------------------------------------------------------


def test_gain() -> None:
    """<g_R, g_S + nu g_R> >= eta sqrt(n_S n_R), with equality where nu > 0; and the step is what was said."""
    rng = np.random.default_rng(0)
    kinds = set()
    for i in range(120):
        eta, size = ETAS[i % 3], int(rng.integers(1, 6))
        g_sft = rng.normal(size=size) * 10 ** rng.uniform(-2, 2)
        g_rl = rng.normal(size=size) + rng.choice([-1.5, 0.0, 1.5]) * g_sft / np.linalg.norm(g_sft)
        g_rl *= 10 ** rng.uniform(-2, 2)
        metric = rng.uniform(0.1, 10, size)
        policy = Field(Slopes(g_sft, g_rl), 0.1, np.zeros(size), metric=metric)
        points, (found,) = walk(method_of(eta=eta, **EXACT), policy, 1)
        n_sft, n_rl, c = (float(np.sum(u * metric * v)) for u, v in ((g_sft, g_sft), (g_rl, g_rl), (g_sft, g_rl)))
        nu, wanted = found["barrier/nu"], eta * math.sqrt(n_sft * n_rl)
        gained = float(np.sum(g_rl * metric * (g_sft + nu * g_rl)))
        assert gained >= wanted * (1 - 1e-9)
        if nu > 0:
            assert gained == pytest.approx(wanted, rel=1e-9)
            assert found["barrier/log_nu_over_eta"] == pytest.approx(math.log(nu / eta), abs=1e-12)
        kinds.add((nu > 0, c > 0))
        assert found["barrier/conflict"] == pytest.approx(c / math.sqrt(n_sft * n_rl), rel=1e-12)
        assert (found["barrier/n_sft"], found["barrier/n_rl"]) == pytest.approx((n_sft, n_rl), rel=1e-12)
        step = (g_sft + nu * g_rl) / (1 + eta)  # J rises along it
        assert points[1] - points[0] == pytest.approx(0.1 * step, rel=1e-12)
        assert found["grad_norm/theta"] == pytest.approx(float(np.linalg.norm(step)), rel=1e-12)
        one_sided = g_sft - min(0.0, c) / n_rl * g_rl  # PCGrad, of g_S alone
        policy = Field(Slopes(g_sft, g_rl), 0.1, np.zeros(size), metric=metric)
        points, (found,) = walk(method_of(eta=1e-13, **EXACT), policy, 1)
        left = (points[1] - points[0]) / 0.1
        assert left == pytest.approx(one_sided, rel=1e-7, abs=1e-9 * float(np.linalg.norm(g_sft)))
    assert kinds == {(True, True), (True, False), (False, True)}, "conflict always needs RL's help"


def test_losses_are_those_of_the_whole_batch() -> None:
    problem, theta = Plane(), np.array([0.3, -0.2, 0.5])
    _, (found,) = walk(method_of(), Field(problem, 0.1, theta), 1)
    assert found["loss/nll"] == pytest.approx(-problem.sft(theta)[0], rel=1e-14)
    assert found["loss/pg"] == pytest.approx(-problem.rl(theta)[0], rel=1e-14)


# -- noise -------------------------------------------------------------------------------------------------------------


def slowly(raw: list[tuple[float, float, float]], decay: float, eta: float,
           cap: float) -> list[tuple[float, float, float, float, bool]]:
    """c, n_S, n_R, nu and held of each step, every mean from all the steps before it anew."""
    nu, out = min(eta, cap), []
    for k in range(1, len(raw) + 1):
        weights = decay ** np.arange(k - 1, -1, -1.0)
        weights /= weights.sum()
        c, n_sft, n_rl = weights @ np.array(raw[:k])
        steps = 1 / float(np.sum(weights**2))  # effective number
        spread = float(weights @ (np.array(raw[:k])[:, 2] - n_rl) ** 2)
        error = math.sqrt(spread / (steps - 1)) if steps > 1 + 1e-9 else 0.0
        held = n_rl <= 0 or n_rl < 2 * error
        if not held:
            nu = min(cap, max(0.0, eta * math.sqrt(max(0.0, n_sft) / n_rl) - c / n_rl))
        out.append((c, n_sft, n_rl, nu, held))
    return out


def raw_of(policy: Field) -> list[tuple[float, float, float]]:
    """c, n_S and n_R of each step from the gradients that the policy handed out."""
    out = []
    for i in range(0, len(policy.seen), 4):
        assert [name for name, _ in policy.seen[i : i + 4]] == ["nll", "nll", "pg", "pg"]
        (_, a), (_, b), (_, p), (_, q) = policy.seen[i : i + 4]
        out.append((float((a + b) @ (p + q)), 4 * float(a @ b), 4 * float(p @ q)))
    return out


def noisy(size: float, seed: int, theta: Any = (0.0, 0.0, 0.0), lr: float = 0.02) -> Field:
    rng = np.random.default_rng(seed)
    return Field(Plane(), lr, theta, noise=lambda: size * rng.normal(size=3))


def test_means() -> None:
    kinds = set()
    for decay, eta, cap, size in ((0.9, 1, 20, 0.4), (0.5, 0.4, 3, 0.6), (1, 1, 50, 0.6), (0, 1, 9, 0.4)):
        policy = noisy(size, 1)
        _, found = walk(method_of(decay=float(decay), eta=float(eta), cap=float(cap)), policy, 120)
        wanted = slowly(raw_of(policy), decay, eta, cap)
        kinds |= {(held, nu == cap) for *_, nu, held in wanted}
        for now, (c, n_sft, n_rl, nu, held) in zip(found, wanted, strict=True):
            assert now["barrier/held"] == held
            values = now["barrier/nu"], now["barrier/n_sft"], now["barrier/n_rl"]
            assert values == pytest.approx((nu, n_sft, n_rl), rel=1e-7, abs=1e-11)
            assert ("barrier/conflict" in now) == (min(n_sft, n_rl) > 0)
            if "barrier/conflict" in now:
                assert now["barrier/conflict"] == pytest.approx(c / math.sqrt(n_sft * n_rl), rel=1e-7)
    assert len(kinds) == 4, "held and not, at the cap and under it: all are to be seen"


def test_the_square_of_a_noisy_gradient_is_unbiased() -> None:
    """Over many draws at one point n_S and n_R are the squares without the noise's part, which is six times theirs."""
    theta, size = np.array([0.5, 0.2, 0.0]), 0.8
    policy = noisy(size, 7, theta, lr=0.0)
    walk(method_of(), policy, 2500)
    raw = np.array(raw_of(policy))
    (_, g_sft), (_, g_rl) = Plane().sft(theta), Plane().rl(theta)
    truth = np.array([g_sft @ g_rl, g_sft @ g_sft, g_rl @ g_rl])
    assert np.all(np.abs(raw.mean(0) - truth) < 4 * raw.std(0) / math.sqrt(len(raw)))
    plain = [np.sum((p + q) ** 2) for (_, p), (_, q) in zip(policy.seen[2::4], policy.seen[3::4])]
    assert np.mean(plain) > 5 * truth[2]


# -- when nothing is measured ------------------------------------------------------------------------------------------


def graded(*rewards: float, failed: int = 0) -> Batch:
    """Two groups, demonstrations, and answers that the grader failed on (their reward must not count)."""
    rows = [Row(np.array([1, 2]), np.array([False, True]), "rollout", PROBLEM, i % 2, reward=r,
                verdict=Verdict.CORRECT if r > 0.5 else Verdict.WRONG) for i, r in enumerate(rewards)]
    rows += [Row(np.array([3]), np.array([True]), "rollout", PROBLEM, 5, reward=1.0, verdict=Verdict.ERROR)] * failed
    rows += [Row(np.array([4]), np.array([True]), "rollout", PROBLEM, 6, at="elsewhere", reward=1.0,
                 verdict=Verdict.CORRECT)]
    return batching.make_batch([*rows, Row(np.array([7, 8]), np.array([False, True]), "demo", PROBLEM)])


def run_script(script: list[Any], batches: list[Batch], **options: Any) -> list[Any]:
    """nu and held of each step."""
    _, found = walk(method_of(**options), Scripted(script), len(script), lambda step: batches[step])
    return [(m["barrier/nu"], m["barrier/held"]) for m in found]


GOOD, POOR = graded(1.0, 0.0, 1.0, 0.0), graded(0.0, 0.0, 0.0, 0.1, failed=3)  # mean .025 of the graded ones
MEASURED = (1.0, 1.0, -0.25, -0.25)  # n_S = 4, n_R = .25, c = -1: nu = eta 4 + 4
AGAINST = (1.0, 1.0, 0.5, -0.5)  # n_R = -1
FLAT = (1.0, 1.0, 0.0, 0.0)


def test_low() -> None:
    exact = {"decay": 0.0, "eta": 0.5}
    good, poor, none = GOOD, POOR, batching.make_batch([])
    # Before anything is measured RL weighs eta; then the last measured nu is held; and nothing solved means SFT alone,
    # which is not remembered.
    assert run_script([AGAINST, FLAT, AGAINST, FLAT], [good, good, poor, none], **exact) == [
        (0.5, 1), (0.5, 1), (0.0, 1), (0.5, 1)]
    script = [MEASURED, AGAINST, FLAT, FLAT, AGAINST, FLAT, MEASURED]
    assert run_script(script, [good, good, good, poor, poor, none, poor], **exact) == [
        (6.0, 0), (6.0, 1), (6.0, 1), (0.0, 1), (0.0, 1), (6.0, 1), (6.0, 0)]
    assert run_script([MEASURED], [poor], **exact, cap=5.0) == [(5.0, 0)]
    assert run_script([FLAT], [good], eta=7.0, cap=5.0) == [(5.0, 1)]
    # n_S below zero counts as zero, and agreement then asks for no RL at all; conflict still does.
    assert run_script([(1.0, -0.5, 0.5, 0.5), (-1.0, 0.5, 0.5, 0.5)], [good, good], **exact) == [(0.0, 0), (0.5, 0)]
    # The mean of the graded rewards of the live weights, against `low` itself.
    assert run_script([FLAT], [poor], decay=0.0, low=0.0251)[0][0] == 0.0
    assert run_script([FLAT], [poor], decay=0.0, low=0.0249)[0][0] == 1.0


def test_hold() -> None:
    """With memory: n_R = 1, then far below; the mean is over zero and yet under two of its errors."""
    # n_S = 4, n_R = 1, c = 2: nu = 4 - 2. The third n_R is -.25: the mean .539, its error .429.
    for third, held in ((-0.125, True), (-0.375, True), (0.45, False)):
        script = [(1.0, 1.0, 0.5, 0.5), (1.0, 1.0, 0.5, 0.5), (1.0, 1.0, 0.5, third)]
        found = run_script(script, [GOOD] * 3, decay=0.9, eta=2.0)
        assert found[:2] == [(2.0, 0), (2.0, 0)] and found[2][1] == held
        assert (found[2][0] == 2.0) == held and found[2][0] == pytest.approx(2.0, abs=0.2)


def test_tiny_numbers() -> None:
    """Nothing overflows into a NaN: squares that underflow, and quotients past the largest number."""
    for g_sft in (0.0, 1e-200, 1e-160, 1.0, 1e150):
        for g_rl in (0.0, 1e-200, 2.5e-162, 1e-160, 1.0, 1e150):
            for sign in (1.0, -1.0):
                script = [(g_sft, g_sft, sign * g_rl, sign * g_rl)] * 2
                for nu, _ in run_script(script, [GOOD] * 2, decay=0.0):
                    assert 0 <= nu <= 100.0, (g_sft, g_rl, nu)


# -- the first step ----------------------------------------------------------------------------------------------------


def test_first_step() -> None:
    """Adam has no moments yet: that step goes by its own plain products, and no mean remembers them. P of the second
    step is one over the size of the first gradient. The means begin when P is made of as many gradients as they are."""
    problem, start, eps = Plane(), np.array([0.1, 0.3, 0.0]), 1e-3
    method = method_of(decay=0.5, cap=1e9, optim={"kind": "adamw", "eps": eps, "lr": 0.05})
    policy = Adam(problem, method.run.optim, start)
    points, found = walk(method, policy, 5)
    squares: list[Vector] = []
    sums, weight = np.zeros(3), 0.0
    for k in range(5):
        (_, g_sft), (_, g_rl) = problem.sft(points[k]), problem.rl(points[k])
        second = sum((0.001 * 0.999 ** (k - 1 - i) * g for i, g in enumerate(squares)), np.zeros(3))
        p = 1 / (np.sqrt(second / (1 - 0.999**k)) + eps) if k else np.ones(3)
        p[second == 0] = 0.0 if k else 1.0  # nothing is known of a coordinate without a gradient so far
        now = np.array([np.sum(u * p * v) for u, v in ((g_sft, g_rl), (g_sft, g_sft), (g_rl, g_rl))])
        if k >= 2:
            sums, weight = 0.5 * sums + now, 0.5 * weight + 1
        c, n_sft, n_rl = sums / weight if weight else now
        assert (found[k]["barrier/n_sft"], found[k]["barrier/n_rl"]) == pytest.approx((n_sft, n_rl), rel=1e-9), k
        assert found[k]["barrier/conflict"] == pytest.approx(c / math.sqrt(n_sft * n_rl), rel=1e-9), k
        nu = found[k]["barrier/nu"]
        if not found[k]["barrier/held"]:
            assert nu == pytest.approx(max(0.0, math.sqrt(n_sft / n_rl) - c / n_rl), rel=1e-9), k
        squares.append(((g_sft + nu * g_rl) / 2) ** 2)
    policy = Field(problem, 0.01, start)  # plain SGD has one metric throughout: its first step is remembered
    _, found = walk(method_of(decay=0.9, cap=1e9), policy, 2)
    raw = raw_of(policy)
    assert found[1]["barrier/n_rl"] == pytest.approx((0.9 * raw[0][2] + raw[1][2]) / 1.9, rel=1e-12)


# -- state -------------------------------------------------------------------------------------------------------------


def test_resumed() -> None:
    whole = walk(method_of(), noisy(0.3, 2), 30)[1]
    policy = noisy(0.3, 2)
    first = method_of()
    walk(first, policy, 17)
    again = method_of()
    again.load(json.loads(json.dumps(first.state())))
    kept = json.dumps(first.state())
    assert walk(again, policy, 13)[1] == whole[17:]
    assert json.dumps(first.state()) == kept, "two methods that share their sums"


def test_one_half_alone_is_refused() -> None:
    for sections in ({"batch": {"demos": 1}}, {"rollout": {"prompts": 1}}, {"rollout": {"prompts": 3, "updates": 2}}):
        config = run_config({"name": "barrier"}, **sections)
        with pytest.raises(UserError, match="half-batches"):
            barrier.Barrier(config.method, config)


# -- the real policy on a transformer ----------------------------------------------------------------------------------

KL = 0.3


def transformer_policy() -> Policy:
    optim = {"kind": "adamw", "lr": 0.01, "clip": None, "eps": 1e-3}
    policy = Policy(build(), OptimConfig.model_validate(optim), Ledger(1), micro_tokens=24, seed=5)
    policy.fork("reference")
    spread(policy, "reference", 0.05, 1)
    return policy


def by_autograd(policy: Policy, rows: list[Row], kinds: list[Row]) -> dict[str, Tensor]:
    """Gradient of the loss over `rows`, whose means are over all of `kinds`: no masks, no streams but their weights."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in policy.groups["theta"].full.items()}
    demo_tokens = sum(int(row.own.sum()) for row in kinds if row.kind == "demo")
    tokens = sum(int(row.own.sum()) for row in kinds if row.kind == "rollout")
    total = torch.zeros((), dtype=torch.float64)
    for row, logp in zip(rows, all_logps(build(), leaves, rows), strict=True):
        for t in np.flatnonzero(row.own):
            if row.kind == "demo":
                total = total - logp[t] / demo_tokens
                continue
            assert row.old_logps is not None and row.ref_logps is not None
            advantage, ratio = float(row.streams["pg"].weight[t]), (logp[t] - row.old_logps[t]).exp()
            bounded = torch.minimum(advantage * ratio, advantage * ratio.clamp(0.8, 1.28))
            apart = row.ref_logps[t] - logp[t]
            total = total + (-bounded + KL * (apart.exp() - 1 - apart)) / tokens
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), found)}


def inner(p: dict[str, Tensor], g: dict[str, Tensor], h: dict[str, Tensor]) -> float:
    return sum(float((p[n] * g[n] * h[n]).sum()) for n in g)


def test_transformer() -> None:
    """c, n_S and n_R of two steps, the second in Adam's metric, against products of gradients by plain autograd; and
    the step. Groups and demonstrations are dealt out in turn: groups by number, demonstrations by checksum."""
    policy = transformer_policy()
    rows = [replace(row, group=-1) if row.kind == "demo" else row for row in make_rows(policy)]
    rollouts, demos = ([row for row in rows if row.kind == kind] for kind in ("rollout", "demo"))
    demos.sort(key=lambda row: zlib.crc32(row.ids.tobytes()))
    halves = [[row for row in rollouts if row.group == i] + demos[i::2] for i in (0, 1)]
    assert [len(half) for half in halves] == [4, 3]
    method = method_of(decay=0.0, cap=1e9, optim={"kind": "adamw"}, rl={"kl_coef": KL})
    seen: list[Any] = []
    weigh = method.weigh
    method.weigh = lambda *values: (seen.append(values), weigh(*values))[1]
    method.setup(policy)
    second: dict[str, Tensor] | None = None
    for step in range(2):
        parts = {kind: [by_autograd(policy, [row for row in half if row.kind == kind], rows) for half in halves]
                 for kind in ("demo", "rollout")}
        full = {kind: {n: a[n] + b[n] for n in a} for kind, (a, b) in parts.items()}
        one = {n: torch.ones_like(t) for n, t in full["demo"].items()}
        p = one if second is None else {n: 1 / (v.sqrt() + 1e-3) for n, v in second.items()}
        wanted = inner(p, full["demo"], full["rollout"]), *(4 * inner(p, *parts[kind]) for kind in ("demo", "rollout"))
        shuffled = [demos[i] for i in (1, 0, 2)] + rollouts[::-1] if step else rows
        before = {n: t.detach().clone() for n, t in policy.groups["theta"].full.items()}
        found = method.update(policy, batching.make_batch(shuffled), step)
        assert seen[-1][:3] == pytest.approx(wanted, rel=1e-9), f"step {step}"
        assert seen[-1][4] == 0.5, "the mean reward"
        nu = found["barrier/nu"]
        mixed = {n: (g + nu * full["rollout"][n]) / 2 for n, g in full["demo"].items()}
        if second is None:  # Adam's first step is the sign of its gradient, but for epsilon
            second = {n: g**2 for n, g in mixed.items()}
            for n, t in policy.groups["theta"].full.items():
                assert torch.allclose(t, before[n] - 0.01 * mixed[n] / (mixed[n].abs() + 1e-3), rtol=0, atol=1e-12)
        assert found["grad_norm/theta"] == pytest.approx(math.sqrt(inner(one, mixed, mixed)), rel=1e-9)


def test_halves_without_rows() -> None:
    """One group, one demonstration, only one of the two, nothing at all: no estimate, and no crash."""
    rows = make_rows(transformer_policy())
    for chosen in (rows[:2] + rows[4:5], rows[:4], rows[4:], [rows[0]], []):
        policy, method = transformer_policy(), method_of(optim={"kind": "adamw"}, rl={"kl_coef": KL})
        method.setup(policy)
        for step in range(2):
            found = method.update(policy, batching.make_batch(chosen), step)
            assert all(math.isfinite(value) for value in found.values()), found
            groups = len({row.group for row in chosen if row.kind == "rollout"})
            assert found["barrier/nu"] >= 0 and (groups == 2 or found["barrier/held"] == 1)
        assert all(t.isfinite().all() for t in policy.tensors().values())


# -- mutants ----------------------------------------------------------------------------------------------------------


MUTANTS = mutants(
    barrier,
    Mutant("sign", "Barrier.weigh", by=test_gain),  # of c
    Mutant("term", "Barrier.weigh", "eta 0", by=test_gain),
    Mutant("clip", "Barrier.weigh", "cap 0", by=test_means),
    Mutant("mask", "Barrier.weigh", 1, by=test_hold),  # whatever its error
    Mutant("term", "Barrier.update", "eta 0", by=test_gain),  # no division
    Mutant("term", "measure", "theta 1", by=test_gain),  # not four times
    Mutant("denominator", "Barrier.averaged", 0, by=test_means),
    Mutant("mask", "mean_reward", "ERROR 0", by=test_low),
    Mutant("branch", "Barrier.metric_is_ripe", 0, by=test_first_step),
    Mutant("instead", "Barrier.update", "in_fixed_order", to="replace", by=test_transformer),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()
