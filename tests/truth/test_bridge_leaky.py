"""bridge_leaky: its rest points, its path and its agreement statistic, each against an independent answer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checks import close
from exact import NOTHING, Path, Quadratic, Shipped, Stub, bridge_walk, run_config, walk
from mutation import Mutant, mutants
from ratios import WithLogps, row
from transformer import (
    all_logps,
    bridge_method,
    build,
    build_policy,
    flat,
    gradients,
    make_batch,
    make_rows,
    merged,
    wide_norm,
)

from bridgelm.methods import bridge, bridge_leaky, shadow
from bridgelm.methods.bridge import Bridge
from bridgelm.methods.bridge_leaky import BridgeLeaky, halves
from bridgelm.model import batching
from bridgelm.model.policy import Grads
from bridgelm.types import Batch, Row, Verdict

TWO_GROUPS = batching.make_batch([row((1,), [0.0], 1.0, group) for group in (0, 1)])


@pytest.fixture(autouse=True)
def _wide_norm() -> Iterator[None]:
    with wide_norm():
        yield


def method_of(steps: int = 10, lr: float = 0.1, optim: Any = None, **options: Any) -> Any:
    config = run_config({"name": "bridge_leaky", **options}, steps, lr, optim=optim or {})
    return BridgeLeaky(config.method, config)


# -- closed forms ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curved(Quadratic):
    """J_RL curves by h in theta: -h (theta - a w)^2 / 2 - c w^2 / 2 + d w."""

    h: float = 1.0

    def rl(self, theta: float, w: float) -> tuple[float, float, float]:
        e = theta - self.a * w
        value = -0.5 * self.h * e**2 - 0.5 * self.c * w**2 + self.d * w
        return value, -self.h * e, self.h * self.a * e - self.c * w + self.d

    def leaky_rest(self, lam: float, lr: float, rho: float) -> tuple[float, float, float]:
        """The three conditions of rest, solved as linear equations in (theta, shadow, w)."""
        a, h = self.a, self.h
        conditions = [
            ([-(1 - lam) - lam * h, 0.0, lam * h * a], -(1 - lam) * self.t),
            ([rho, -lr * h - rho, lr * h * a], 0.0),
            ([lam * h * a, -lam * h * a, -(1 - lam) * self.b], -(1 - lam) * self.b * self.u),
        ]
        found = np.linalg.solve(np.array([c[0] for c in conditions]), np.array([c[1] for c in conditions]))
        return found[0], found[1], found[2]


class Halves(Stub):
    """Each half of two groups has its own share of the exact RL gradient; `splits[k]` is the first's in step k."""

    def __init__(self, *args: Any, splits: list[float] | None = None, **more: Any) -> None:
        super().__init__(*args, **more)
        self.splits, self.step = splits or [0.5], 0

    def grad(self, terms: Any, batch: Batch, coef: dict[str, float], at: str = "live") -> Grads:
        found = super().grad(terms, batch, coef, at)
        if "nll" in coef:
            return found
        (group,) = {r.group for r in batch.rows}
        first = self.splits[min(self.step, len(self.splits) - 1)]
        part = (1 - first) if group else first
        losses = {name: part * value for name, value in found.losses.items()}
        return Grads(*({"x": part * g["x"]} for g in (found.theta, found.w)), losses, {})


def leaky_walk(
    problem: Any,
    lam: float,
    rho: float,
    steps: int,
    lr: float = 0.1,
    splits: list[float] | None = None,
    start: tuple[float, float] = (0.0, 0.0),
    settle: float = 0.0,
    **options: Any,
) -> Path:
    method = method_of(steps, lr, **{"lambda": lam, "leak": rho, **options})
    policy = Halves(problem, lr, *start, splits=splits)
    method.setup(policy)
    path = Path([policy.point], policy, method)
    for step in range(steps):
        policy.step = step
        path.metrics.append(method.update(policy, TWO_GROUPS, step))
        path.points.append(policy.point)
        if any(not abs(x) < 1e6 for x in policy.point):
            break
        if settle and np.max(np.abs(np.subtract(*path.points[-2:]))) < settle:
            break
    return path


def test_printed_rest() -> None:
    end = leaky_walk(Quadratic(), 0.5, 1 / 15, 2000, settle=1e-15).end
    close(end, (2.318182, 1.909091, 0.818182), 6e-7, "the printed rest")
    close(end, Quadratic().rest(0.5, r=0.6), 1e-12, "the rest of a re-sync with r = .1 / (.1 + 1/15)")


def test_rests() -> None:
    """A leak is a re-sync in disguise: the formula of the re-sync with r = alpha h / (alpha h + rho)."""
    for lam in (0.1, 0.5, 0.9):
        for rho, h in ((0.0, 1.0), (0.05, 1.0), (1 / 15, 0.5), (0.3, 1.0)):
            problem = Curved(h=h, u=0.3)
            end = leaky_walk(problem, lam, rho, 600, lr=0.3, settle=1e-12, beta=0.2).end
            close(end, problem.leaky_rest(lam, 0.3, rho), 1e-9, f"lambda {lam}, rho {rho}, h {h}")
            if h == 1.0:
                close(end, problem.rest(lam, r=0.3 / (0.3 + rho)), 1e-9, f"the formula at {lam}, {rho}")


def numbers(
    problem: Any, lam: float, rho: float, steps: int, lr: float, beta: float, q: list[float],
    start: tuple[float, float], shadow_every: int = 1
) -> list[tuple[float, float, float]]:
    """Equations (1) to (3) in plain numbers, all from one snapshot; (2) and its part of h in every so many steps."""
    theta, w = start
    shadow, h_w = theta, 0.0
    points = [(theta, shadow, w)]
    for k in range(steps):
        _, s_theta, s_w = problem.sft(theta, w)
        _, r_theta, r_w = problem.rl(theta, w)
        now = k % shadow_every == 0
        _, h_theta, h_w = problem.rl(shadow, w) if now else (0.0, 0.0, h_w)
        new = (
            theta + lr * ((1 - lam) * s_theta + lam * r_theta),
            shadow + now * (lr * h_theta + rho * (theta - shadow)),
            w + q[k] * beta * ((1 - lam) * s_w + lam * (r_w - h_w)),
        )
        theta, shadow, w = new
        points.append(new)
    return points


def test_path_with_equal_halves() -> None:
    for lam, rho, beta in ((0.3, 0.2, 0.02), (0.5, 1 / 15, 0.1), (0.9, 1.0, 0.3), (0.6, 0.0, 0.1)):
        start = (-0.5, 0.25)
        path = leaky_walk(Curved(u=0.4, h=0.7), lam, rho, 12, beta=beta, start=start)
        wanted = numbers(Curved(u=0.4, h=0.7), lam, rho, 12, 0.1, beta, [1.0] * 12, start)
        close(path.points, wanted, 1e-14, f"lambda {lam}, rho {rho}")
        assert [m["bridge/agreement"] for m in path.metrics] == [1.0] * 12, "equal halves agree exactly"
        close([m["bridge/lambda"] for m in path.metrics], lam, 0.0, "the logged lambda")


def test_path_of_a_resting_shadow() -> None:
    problem, start = Curved(u=0.4, h=0.7), (-0.5, 0.25)
    path = leaky_walk(problem, 0.4, 0.2, 12, start=start, shadow_every=3)
    close(path.points, numbers(problem, 0.4, 0.2, 12, 0.1, 0.1, [1.0] * 12, start, 3), 1e-14, "every third step")
    assert sum(e[:2] == ("grad", "shadow") for e in path.policy.log) == 4 * 2, "two halves in each fourth of the steps"


def test_path_with_unequal_halves() -> None:
    """w's rate is multiplied by the clipped ratio of two running means, here by a slow sum over all steps so far."""
    rng, decay, lam, rho = np.random.default_rng(0), 0.8, 0.4, 0.1
    splits = [*rng.uniform(0.1, 0.9, 10), 3.0, *rng.uniform(0.2, 0.8, 10)]
    steps, problem, start, q = len(splits), Quadratic(u=0.4), (-0.5, 0.25), []
    seen: list[tuple[float, float]] = []
    for k in range(steps):  # h of each step from the path so far, whose q's are known
        theta, shadow, w = numbers(problem, lam, rho, k, 0.1, 0.1, q, start)[-1]
        h = problem.rl(theta, w)[2] - problem.rl(shadow, w)[2]
        a, b = splits[k] * h, (1 - splits[k]) * h
        if h:  # in the first step the shadow is theta: there is no third term yet
            seen.append((a * b, 0.5 * (a * a + b * b)))
        ages = np.arange(len(seen))[::-1]
        weights = (1 - decay) * decay**ages
        weights[:1] = decay ** ages[:1]  # the means start at their first values
        product, size = (float(weights @ [s[i] for s in seen]) if seen else 1.0 for i in (0, 1))
        q.append(min(max(product / size, 0.0), 1.0))
    assert min(q) == 0.0 and max(q[1:]) > 0.5 and sum(0 < x < 1 for x in q) > 3, "all sides of the clip are met"
    path = leaky_walk(problem, lam, rho, steps, splits=splits, start=start, agreement_decay=decay)
    close([m["bridge/agreement"] for m in path.metrics], q, 1e-12, "the agreement")
    close(path.points, numbers(problem, lam, rho, steps, 0.1, 0.1, q, start), 1e-13, "the path")


def test_without_a_third_term() -> None:
    """Agreement stays what it was where there is nothing to compare: no third term, or but one group."""
    method = method_of()
    method.product, method.size = 0.3, 0.6
    policy = Halves(Quadratic(), 0.1, splits=[0.9])
    method.setup(policy)
    assert method.update(policy, TWO_GROUPS, 0)["bridge/agreement"] == 0.5, "the shadow is theta: h is 0"
    assert (method.product, method.size) == (0.3, 0.6)
    policy.groups["shadow"].copy_(policy.groups["theta"] + 1e-7)
    method.update(policy, TWO_GROUPS, 0)
    assert (method.product, method.size) == (0.3, 0.6), "rounding is no third term"
    policy.groups["shadow"].fill_(0.7)
    one = batching.make_batch(TWO_GROUPS.rows[:1])
    policy.splits = [1.0]
    assert method.update(policy, one, 1)["bridge/agreement"] == 0.5, "one group"
    assert method_of().agreement == 1.0, "the start"
    policy.splits = [0.9]
    assert method.update(policy, TWO_GROUPS, 2)["bridge/agreement"] != 0.5


def test_order_of_calls() -> None:
    """Every gradient at the snapshot's point; the leak is towards theta before its step."""
    path = leaky_walk(Quadratic(), 0.3, 0.2, 3, start=(0.3, 0.2))
    log = path.policy.log
    assert len(log) % 3 == 0
    for k in range(3):
        part = log[k * len(log) // 3 : (k + 1) * len(log) // 3]
        assert [e[1] for e in part if e[0] == "apply"] == ["theta", "shadow", "w"]
        for entry in part:
            if entry[0] == "grad":
                close(entry[3], path.points[k], 0.0, f"the snapshot at {entry[2]}")


def test_without_a_leak_it_is_bridge() -> None:
    for lam in (0.2, 0.5, 0.8):
        own = leaky_walk(Quadratic(), lam, 0.0, 40, beta=0.07, start=(0.4, 0.1)).points
        plain = bridge_walk(bridge, Quadratic(), lam, 40, theta=0.4, w=0.1, beta=0.07).points
        assert own == plain, "to the bit"
        adam = {"kind": "adamw", "clip": 0.2, "weight_decay": 0.01}
        runs = []
        for name, cls in (("bridge", Bridge), ("bridge_leaky", BridgeLeaky)):
            leak = {"leak": 0.0} if name == "bridge_leaky" else {}
            config = run_config({"name": name, "lambda": lam, "beta": 0.02, **leak}, 40, optim=adam)
            method, policy = cls(config.method, config), Shipped(Quadratic(), config.optim, 0.4, 0.1)
            method.setup(policy)
            runs.append(walk(method, policy, 40).points)  # one gradient for the whole batch: no rows, no halves
        assert runs[0] == runs[1], "Adam, clipped"


# -- the agreement statistic and one update on a transformer -----------------------------------------------------------

LAM, RHO, LR, BETA, CAP = 0.3, 0.2, 0.05, 0.02, 1.05
RL = {"kl_coef": 0.3}


def without(rows: list[Row], group: int) -> list[Row]:
    """The same rows and counts, with no weight on the rollouts of a group."""
    out = []
    for r in rows:
        if r.kind == "rollout" and r.group == group:
            for name, s in r.streams.items():
                r = r.with_stream(name, 0.0, s.norm, s.constant, s.mask)
        out.append(r)
    return out


def advantages(rows: list[Row], values: Any) -> list[Row]:
    out, values = [], iter(values)
    for r in rows:
        if r.kind == "rollout":
            value = float(next(values))
            r = r.with_stream("pg", value).with_stream("shadow", value)
        out.append(r)
    return out


def ready(lr: float = LR, beta: float = BETA, **options: Any) -> tuple[Any, Any]:
    policy = build_policy(lr=lr)
    merged_options = {"lambda": LAM, "leak": RHO, "beta": beta, "ratio_cap": CAP, "rl": RL, **options}
    method = method_of(**merged_options)
    for name, rate in (("theta", lr), ("shadow", lr), ("w", beta)):
        policy.optimiser(name, lr=rate)
    return method, policy


def test_updates_on_a_transformer() -> None:
    """Two updates, each against the equations with gradients by hand, group by group, at the snapshot."""
    for ratio in ("truncate", "taper"):
        two_updates(ratio)


def two_updates(ratio: str) -> None:
    method, policy = ready(agreement_decay=0.6, ratio=ratio)
    start, by = make_rows(policy), bridge_method(ratio_cap=CAP, ratio=ratio)
    product = size = 0.0
    for step, values in enumerate(((0.8, -1.1, 0.5, -0.4), (0.2, 1.0, -0.6, 0.9))):
        rows = advantages(start, values)
        names = {"live": {"pg": 1.0, "kl": 0.3}, "shadow": {"shadow": 1.0, "shadow_kl": 0.3}}
        half = [{at: gradients(policy, without(rows, 1 - g), names[at], at, by) for at in names} for g in (0, 1)]
        a, b = (flat(h["live"]["w"]) - flat(h["shadow"]["w"]) for h in half)
        keep = 0.6 if step else 0.0
        product = keep * product + (1 - keep) * float(a @ b)
        size = keep * size + (1 - keep) * float(a @ a + b @ b) / 2
        q = min(max(product / size, 0.0), 1.0)
        sft = gradients(policy, rows, {"nll": 1.0}, "live", by)
        rl, shadow = (gradients(policy, rows, names[at], at, by) for at in names)
        logps = all_logps(build(), merged(policy, "shadow"), rows)
        rho = np.exp([float((lp.detach().numpy() - r.old_logps)[r.own].sum()) for r, lp in zip(rows, logps)
                      if r.old_logps is not None])  # fmt: skip
        ess = rho.sum() ** 2 / (rho**2).sum() / len(rho)
        theta0, shadow0, w0 = (flat(policy.groups[g].flat()) for g in ("theta", "shadow", "w"))
        wanted = {
            "theta": theta0 - LR * ((1 - LAM) * flat(sft["theta"]) + LAM * flat(rl["theta"])),
            "shadow": shadow0 - LR * flat(shadow["theta"]) + RHO * (theta0 - shadow0),
            "w": w0 - q * BETA * ((1 - LAM) * flat(sft["w"]) + LAM * (flat(rl["w"]) - flat(shadow["w"]))),
        }
        random_order = [rows[i] for i in (3, 6, 0, 2, 5, 1, 4)]
        found = method.update(policy, make_batch(random_order), step)
        close(found["bridge/agreement"], q, 1e-10, "the agreement")
        close(found["bridge/norm_third"], np.linalg.norm(a + b), 1e-10, "the third term")
        for group, value in wanted.items():
            close(flat(policy.groups[group].flat()), value, 1e-12, f"{group} after update {step}")
        assert 0.01 < q < 0.99, f"the check needs an agreement between the ends, not {q}"
        close(found["bridge/ess"], ess, 1e-12, "the effective sample size")


def test_equal_halves_agree_and_noise_does_not() -> None:
    method, policy = ready(lr=1e-12, beta=1e-12, agreement_decay=0.97)
    rows = make_rows(policy)
    twins = [r for r in rows if r.kind == "demo" or r.group == 0]
    twins += [Row(r.ids, r.own, r.kind, r.problem, 1, r.at, r.temperature, r.old_logps, r.ref_logps, r.reward,
                  r.verdict, streams=r.streams) for r in twins if r.kind == "rollout"]  # fmt: skip
    assert method.update(policy, make_batch(twins), 0)["bridge/agreement"] == pytest.approx(1.0, abs=1e-12)
    product = size = 0.0
    for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):  # noise is a third term whose halves turn without each other
        method, policy = ready(lr=1e-12, beta=1e-12, rl={}, ratio="truncate")  # odd in the advantage
        rows = advantages(make_rows(policy, on_policy=True), np.repeat(signs, 2) * (0.8, -1.1, 0.5, -0.4))
        method.update(policy, make_batch(rows), 0)
        assert method.size > 1e-4
        product, size = product + method.product, size + method.size
    assert abs(product) < 1e-12 * size


def test_agreement_is_signal_over_signal_and_noise() -> None:
    """Halves s / 2 + noise, in 300 numbers: |s / 2|^2 / (|s / 2|^2 + noise^2), through the real update."""

    class Noisy(Stub):
        def __init__(self, signal: float) -> None:
            super().__init__(None, 1e-9)
            self.signal, self.rng = signal, torch.Generator().manual_seed(1)
            self.groups["theta"] = torch.zeros(300, dtype=torch.float64)

        def add_w(self, *args: Any, **more: Any) -> None:
            self.groups["w"] = torch.zeros(300, dtype=torch.float64)

        def apply(self, name: str, *_: Any, **__: Any) -> float:
            return 0.0

        def grad(self, terms: Any, batch: Batch, coef: Any, at: str = "live") -> Grads:
            zero = torch.zeros(300, dtype=torch.float64)
            noise = torch.randn(300, generator=self.rng, dtype=torch.float64) + 0.5 * self.signal
            return Grads({"x": zero}, {"x": noise if "pg" in coef else zero}, dict.fromkeys(coef, 0.0), {})

    for signal in (0.0, 1.0, 2.0, 8.0):
        method = method_of(agreement_decay=0.95)
        policy = Noisy(signal)
        method.setup(policy)
        for step in range(150):
            found = method.update(policy, TWO_GROUPS, step)
        wanted = (signal / 2) ** 2 / ((signal / 2) ** 2 + 1)
        assert found["bridge/agreement"] == pytest.approx(wanted, abs=0.04)


def test_halves_of_any_order() -> None:
    """The same halves however the rows come; no group in both; the counts are those of the whole batch."""
    rows = [row((1, i), [0.0, 0.0], 1.0, group).with_stream("pg", 1.0) for i, group in enumerate((0, 0, 1, 2, 2, 3, 4))]
    rows += [row((1,), [0.0]).with_stream("nll", 1.0) for _ in range(2)]
    rows[-2:] = [Row(r.ids, r.own, "demo", r.problem, streams=r.streams) for r in rows[-2:]]
    for order in (range(9), (5, 0, 8, 2, 3, 6, 1, 7, 4), (6, 2, 4, 5, 3, 7, 1, 0, 8)):
        batch = batching.make_batch([rows[i] for i in order])
        found = halves(batch)
        assert [sorted(int(r.ids[2]) for r in half.rows) for half in found] == [[0, 1, 3, 4, 6], [2, 5]]
        assert all(half.counts == batch.counts == {"pg": 14.0, "nll": 2.0} for half in found)
    (whole,) = halves(batching.make_batch(rows[7:]))
    assert whole.rows == (), "no rollouts, one part"


# -- wrong versions ----------------------------------------------------------------------------------------------------

MUTANTS = mutants(
    bridge_leaky,
    # (1), (2) and (3)
    Mutant("term", "BridgeLeaky.update", 1, by=test_path_with_equal_halves),  # lambda for 1 - lambda, in (1)
    Mutant("term", "BridgeLeaky.update", 3, by=test_path_with_equal_halves),  # and in (3)
    Mutant("sign", "BridgeLeaky.update", 1, by=test_rests),  # the shadow's part added
    Mutant("snapshot", "BridgeLeaky.at_shadow", by=test_path_with_equal_halves),  # the shadow's gradient at theta
    Mutant("drop", "BridgeLeaky.update", "lean 1", by=test_printed_rest),
    Mutant("swap", "BridgeLeaky.update", "lean", by=test_printed_rest),  # theta leaks
    Mutant("late", "BridgeLeaky.update", "lean", by=test_path_with_equal_halves),  # to the new theta
    Mutant("branch", "BridgeLeaky.update", 0, by=test_path_of_a_resting_shadow),  # a resting shadow leaks
    Mutant("late", "BridgeLeaky.update", 9, by=test_order_of_calls),
    Mutant("drop", "BridgeLeaky.update", "beside 1", by=test_path_with_equal_halves),  # the shadow never moves
    Mutant("drop", "BridgeLeaky.update", "beside 2", by=test_without_a_leak_it_is_bridge),
    Mutant("constant", "BridgeLeaky.setup", "adam", to=False, by=test_without_a_leak_it_is_bridge),
    Mutant("drop", "shadow_setup", "lr 1", by=test_path_with_equal_halves, of=shadow),  # w at theta's rate
    Mutant("constant", "shadow_terms", "ratio_cap", to=1e9, by=test_updates_on_a_transformer, of=shadow),
    Mutant("branch", "shadow_terms", 5, by=test_updates_on_a_transformer, of=shadow),  # no taper
    Mutant("branch", "shadow_terms", "shadow_kl 1", by=test_updates_on_a_transformer, of=shadow),
    # (4)
    Mutant("drop", "BridgeLeaky.update", "rate 1", by=test_path_with_unequal_halves),
    Mutant("clip", "BridgeLeaky.agreement", 3, by=test_path_with_unequal_halves),
    Mutant("constant", "BridgeLeaky.agreement", "1.0 1", to=0.0, by=test_without_a_third_term),
    Mutant("sign", "BridgeLeaky.compare", 0, by=test_path_with_unequal_halves),
    Mutant("term", "BridgeLeaky.compare", 1, by=test_path_with_equal_halves),  # twice the size
    Mutant("term", "BridgeLeaky.compare", 2, by=test_path_with_unequal_halves),  # the size of one half
    Mutant("term", "BridgeLeaky.compare", 13, by=test_path_with_unequal_halves),  # the decay the other way
    Mutant("branch", "BridgeLeaky.compare", 4, by=test_path_with_unequal_halves),  # means that start at 0
    Mutant("branch", "BridgeLeaky.compare", 2, by=test_without_a_third_term),
    Mutant("constant", "ROUNDING", to=0.0, by=test_without_a_third_term),
    Mutant("compare", "BridgeLeaky.compare", 0, by=test_path_with_unequal_halves),  # two halves are too few
    Mutant("drop", "grad_by_parts", "add_ 2", by=test_path_with_equal_halves),
    Mutant("drop", "grad_by_parts", "mix 1", by=test_path_with_equal_halves),
    Mutant("drop", "grad_by_parts", "logps 1", by=test_updates_on_a_transformer),
    Mutant("constant", "halves", "group", to=0, by=test_halves_of_any_order),  # halves by position
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()


# -- what is said ------------------------------------------------------------------------------------------------------


def test_warnings() -> None:
    for wanted, fires in ((0.9, False), (0.35, False), (0.25, True)):
        n = 40
        x = max(np.roots([wanted * n - 1, -2 * (n - 1), wanted * n * (n - 1) - (n - 1) ** 2]))
        rows = [row((i % 2,), [-3.0], float(i % 2), 0) for i in range(n)]
        policy = WithLogps(Quadratic(), 0.1, theta=1.0)
        method = method_of()
        method.setup(policy)
        policy.rows = {i: np.array([0.0, -3.0 + (math.log(x) if i == 5 else 0.0)]) for i in range(n)}
        found = method.update(policy, batching.make_batch(rows), 0)
        assert found["bridge/ess"] == pytest.approx(wanted, abs=1e-12)
        assert any("effective sample size" in text for text in method.warnings(found)) == fires
    for rate, fires in ((1e-5, True), (1e-2, False)):
        method, policy = method_of(), Stub(Quadratic(), 0.1, theta=1.0)
        method.setup(policy)
        policy.optimisers["shadow"].lr *= rate
        said = walk(method, policy, 2).warned
        assert [any("hardly moves" in text for text in texts) for texts in said] == [fires] * 2
    quiet = SimpleNamespace(sft=Quadratic().sft, rl=lambda theta, w: (0.0, 0.0, 0.0))
    method, policy = method_of(), Stub(quiet, 0.1, theta=1.0)
    method.setup(policy)
    assert walk(method, policy, 2).warned == [[], []]


def test_the_shadows_own_rollouts() -> None:
    """Sampled every third step, on the problems of the step, counted without what the grader failed on, not learnt."""
    joint = [row((1,), [0.0], reward, group) for group, reward in ((0, 1.0), (0, 0.0), (1, 1.0), (1, 1.0))]
    asked = []

    def roll(problems: Any, at: str = "live") -> list[Row]:
        asked.append((len(problems), at))
        rows = [row((1,), [0.0], reward, 7) for reward in (1.0, 0.0, 0.0, 0.0)]
        failed = Row(rows[0].ids, rows[0].own, "rollout", rows[0].problem, 8, reward=0.0, verdict=Verdict.ERROR)
        return [*rows, failed]

    roll.groups = lambda data: joint  # type: ignore[attr-defined]
    data = SimpleNamespace(demos=lambda n: [])
    method = method_of(probe_every=3)
    policy = Stub(Quadratic(), 0.1)
    method.setup(policy)
    for step in range(5):
        rows = method.gather(data, roll, step)
        assert len(rows) == 4 and all(set(r.streams) == {"pg", "shadow"} for r in rows)
        found = method.update(policy, NOTHING, step)
        here = {k: v for k, v in found.items() if k in ("bridge/gain_honest", "bridge/shadow_reward")}
        assert here == ({} if step % 3 else {"bridge/gain_honest": 0.5, "bridge/shadow_reward": 0.25})
    assert asked == [(2, "shadow")] * 2
