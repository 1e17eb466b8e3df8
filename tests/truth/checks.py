"""What must hold of BRIDGE, as functions of its module: run on the shipped code they pass, on each mutant one fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from exact import LAMBDAS, OneSum, Quadratic, Stub, TwoPrompts, bridge_walk, reference_walk, run_config, walk

from bridgelm import cooperation, losses
from bridgelm.methods import bridge, joint


@dataclass(frozen=True)
class Code:
    """The modules under test; a mutant replaces one of them."""

    bridge: ModuleType = bridge
    joint: ModuleType = joint
    losses: ModuleType = losses
    cooperation: ModuleType = cooperation


def close(found: Any, wanted: Any, tolerance: float, what: str = "") -> None:
    gap = float(np.max(np.abs(np.asarray(found, dtype=float) - np.asarray(wanted, dtype=float))))
    assert gap <= tolerance, f"{what}: {found} is not {wanted} (off by {gap:.3g})"  # NaN fails too


# -- test A: the scalar quadratic --------------------------------------------------------------------------------------

TRACE = [(0, 0, 0), (0.15, 0, 0), (0.285, 0, 0.015), (0.408, 0.003, 0.04275), (0.521475, 0.01125, 0.0811125)]
PRINTED = {
    0.1: (0.428571, 2.785714),
    0.3: (0.818182, 2.590909),
    0.5: (1.0, 2.5),
    0.7: (1.105263, 2.447368),
    0.9: (1.173913, 2.413043),
}


def trace(code: Code) -> None:
    close(bridge_walk(code.bridge, Quadratic(), 0.5, 4).points, TRACE, 1e-15, "the first four steps")


def fixed_points(code: Code) -> None:
    for lam in LAMBDAS:
        path = bridge_walk(code.bridge, Quadratic(), lam, 500, lr=0.3, settle=1e-14, limit=1e6)
        close(path.end, Quadratic().rest(lam), 1e-9, f"rest at lambda {lam}")
        close((path.end[2], path.end[0]), PRINTED[lam], 6e-7, f"printed rest at lambda {lam}")
        close(path.end[1], 2 * path.end[2], 1e-9, "the shadow at its own optimum, a w")


def w_frozen(code: Code) -> None:
    """With beta next to nothing, w stays at 0, theta at (1 - lambda) t and the shadow at its RL optimum."""
    for lam in LAMBDAS:
        path = bridge_walk(code.bridge, Quadratic(), lam, 500, lr=0.3, theta=1.0, beta=1e-300, settle=1e-15, limit=1e6)
        close(path.end, (3 * (1 - lam), 0.0, 0.0), 1e-9, f"w frozen at lambda {lam}")


def every_option_of_the_step(code: Code) -> None:
    """Step by step against the reference: beta apart from alpha, re-sync, a moving lambda, another start."""
    steps = 12
    for lam, beta, resync, start in (
        (0.3, 0.02, 0, None),
        (0.7, 0.3, 1, None),
        (0.5, 0.1, 3, None),
        (0.1, 0.05, 5, 0.9),
        (0.9, None, 2, 0.2),
        (0.6, 0.2, 0, 0.0),
    ):
        options = {"lambda_start": start, "resync_every": resync} | ({"beta": beta} if beta else {})
        path = bridge_walk(code.bridge, Quadratic(u=0.4), lam, steps, theta=-0.5, w=0.25, **options)
        lams = [lam if start is None else start + (lam - start) * k / (steps - 1) for k in range(steps)]
        wanted = reference_walk(Quadratic(u=0.4), lams, 0.1, beta or 0.1, resync, (-0.5, -0.5, 0.25))
        close(path.points, wanted, 1e-14, f"lambda {lam}, beta {beta}, resync {resync}, lambda_start {start}")
        close([m["bridge/lambda"] for m in path.metrics], lams, 1e-15, "the logged lambda")


def resync(code: Code) -> None:
    """theta^ <- theta and one step: w rests where (1 - (1 - alpha)^1) = alpha of the third term is left."""
    for lam in LAMBDAS:
        path = bridge_walk(code.bridge, Quadratic(), lam, 1000, lr=0.3, resync_every=1, settle=1e-15, limit=1e6)
        close(path.end, Quadratic().rest(lam, r=0.3), 1e-9, f"re-sync at lambda {lam}")
    path = bridge_walk(code.bridge, Quadratic(), 0.5, 600, lr=0.1, resync_every=1, settle=1e-15, limit=1e6)
    close((path.end[2], path.end[0]), (0.25, 1.75), 1e-9, "the printed re-sync rest")


def order(code: Code) -> None:
    """Every gradient is taken at the snapshot, and w moves last."""
    for every in (0, 2):
        path = bridge_walk(code.bridge, Quadratic(), 0.3, 4, resync_every=every, theta=0.3, w=0.2)
        log, starts = path.policy.log, path.points
        cuts = [i for i, entry in enumerate(log) if entry[:2] == ("apply", "w")]
        assert len(cuts) == 4 and cuts[-1] == len(log) - 1, "w moves once a step, and last"
        for k, (a, b) in enumerate(zip([-1, *cuts], cuts)):
            theta, shadow, w = starts[k]
            part = log[a + 1 : b + 1]
            assert sorted(e[1] for e in part if e[0] == "apply") == ["shadow", "theta", "w"]
            seen = {(e[1], e[2]): e[3] for e in part if e[0] == "grad"}
            assert set(seen) == {("nll", "live"), ("pg", "live"), ("shadow", "shadow")}, seen
            if every and k % every == 0:  # one RL step away from this step's theta
                shadow = theta + 0.1 * Quadratic().rl(theta, w)[1]
            for (_, at), point in seen.items():
                close(point[2], w, 0.0, "w of the snapshot")
                close(
                    point[0 if at == "live" else 1], theta if at == "live" else shadow, 1e-15, f"the snapshot at {at}"
                )


def spectrum(code: Code) -> None:
    """The update of test A is affine: its matrix, taken from the real code, has spectral radius .9301 at lambda 1/2."""

    def once(theta: float, shadow: float, w: float) -> np.ndarray:
        return bridge_walk(code.bridge, Quadratic(), 0.5, 1, theta=theta, shadow=shadow, w=w).end

    origin = once(0, 0, 0)
    matrix = np.stack([once(*e) - origin for e in np.eye(3)], axis=1)
    close(abs(np.linalg.eigvals(matrix)).max(), 0.9301, 5e-5, "spectral radius")
    close(np.linalg.solve(np.eye(3) - matrix, origin), (2.5, 2.0, 1.0), 1e-12, "rest of the affine map")


# -- test B: two prompts -----------------------------------------------------------------------------------------------


def bisect(f: Callable[[float], float], low: float, high: float) -> float:
    assert f(low) > 0 > f(high)
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if f(middle) > 0 else (low, middle)
    return 0.5 * (low + high)


def rest_z(p: TwoPrompts, lam: float) -> float:
    """Logit of prompt 1 at rest, from the stationarity condition written out in p = sigma(z)."""

    def slope(z: float) -> float:
        s = 1 / (1 + math.exp(-z))
        return (1 - lam) * 0.5 * (p.q1 - s) + lam * s * (1 - s) * (1 - p.tau * z)

    return bisect(slope, -4.0, 6.0)


def two_prompts(code: Code) -> None:
    for lam in LAMBDAS:
        z, optimum = rest_z(TwoPrompts(), lam), math.log(4)
        for start in ((0.0, 0.0), (1.5, -1.0)):
            path = bridge_walk(
                code.bridge, TwoPrompts(), lam, 1500, lr=4.0, theta=start[0], w=start[1], settle=1e-14, limit=1e6
            )
            close(path.end, (optimum, 1.0 - (z - optimum), z - optimum), 1e-9, f"lambda {lam} from {start}")


# -- test D: degeneracy, and what is said about it ---------------------------------------------------------------------


def warned_at(path: Any, words: str) -> list[int]:
    """Updates, counted from 1, after which a warning with these words came."""
    return [k + 1 for k, texts in enumerate(path.warned) if any(words in text for text in texts)]


def sum_at_rest(lam: float, p: OneSum) -> float:
    pull, push = (1 - lam) * p.curve_sft, lam * p.curve_rl
    return (3.0 * pull + 1.0 * push) / (pull + push)


def degeneracy(code: Code) -> None:
    """At theta^ = theta*(w) the third term is nothing, and w's step is theta's times beta / alpha."""
    for lam in LAMBDAS:
        for theta, w in ((0.0, 0.0), (2.0, -0.7)):
            path = bridge_walk(code.bridge, OneSum(), lam, 1, lr=0.1, theta=theta, w=w, shadow=1.0 - w, beta=0.03)
            moved = path.end - np.array(path.points[0])
            close(moved[2], 0.3 * moved[0], 1e-15, "w's step")
            close(moved[1], 0.0, 1e-15, "the shadow's step")
            assert abs(moved[0]) > 1e-3
        rest = bridge_walk(code.bridge, OneSum(), lam, 3000, lr=0.5, settle=1e-15).end
        close(rest[0] + rest[2], sum_at_rest(lam, OneSum()), 1e-9, "theta + w rests where joint mixing does")


def vanished_warning(code: Code) -> None:
    third, p = "third term", OneSum()
    for lam in LAMBDAS:  # the shadow at its optimum
        rest = sum_at_rest(lam, p)
        path = bridge_walk(code.bridge, p, lam, 60, theta=rest, shadow=1.0)
        assert warned_at(path, third) == list(range(50, 61)), warned_at(path, third)
    same = bridge_walk(code.bridge, p, 1.0, 60)  # lambda 1: the shadow does what theta does
    assert warned_at(same, third) == list(range(50, 61)), warned_at(same, third)
    for lam in LAMBDAS:
        apart = bridge_walk(code.bridge, Quadratic(), lam, 400)
        assert not warned_at(apart, third), "warned although the third term is at work"
    interrupted(code, third)


def interrupted(code: Code, third: str) -> None:
    """One step with a third term starts the count anew."""
    config = run_config({"name": "bridge"}, 200)
    method, policy = code.bridge.Bridge(config.method, config), Stub(OneSum(), 0.1, theta=sum_at_rest(0.5, OneSum()))
    method.setup(policy)
    policy.groups["shadow"].fill_(1.0)
    assert not warned_at(walk(method, policy, 49), third)
    policy.problem = Quadratic()
    walk(method, policy, 1)
    policy.problem = OneSum()
    policy.groups["theta"].fill_(sum_at_rest(0.5, OneSum()) - policy.point[2])
    policy.groups["shadow"].fill_(1.0 - policy.point[2])
    assert warned_at(walk(method, policy, 51), third) == [50, 51]


def still_shadow_warning(code: Code) -> None:
    words = "hardly moves"
    for rate, fires in ((1e-5, True), (1e-2, False), (1.0, False)):
        config = run_config({"name": "bridge"}, 10)
        method, policy = code.bridge.Bridge(config.method, config), Stub(Quadratic(), 0.1, theta=1.0)
        method.setup(policy)
        policy.optimisers["shadow"].lr *= rate
        said = warned_at(walk(method, policy, 3), words)
        assert said == ([1, 2, 3] if fires else []), (rate, said)
    quiet = bridge_walk(code.bridge, SimpleNamespace(sft=Quadratic().sft, rl=lambda theta, w: (0.0, 0.0, 0.0)), 0.5, 3)
    assert not warned_at(quiet, words), "a batch without spread says nothing about the shadow's step"


QUADRATIC: dict[str, Callable[[Code], None]] = {
    f.__name__: f for f in (trace, fixed_points, w_frozen, every_option_of_the_step, resync, order, spectrum)
}
OTHERS: dict[str, Callable[[Code], None]] = {
    f.__name__: f for f in (two_prompts, degeneracy, vanished_warning, still_shadow_warning)
}
CHECKS = QUADRATIC | OTHERS
