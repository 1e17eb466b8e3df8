"""What must hold of BRIDGE, as functions of its module: run on the shipped code they pass, on each mutant one fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from exact import LAMBDAS, NOTHING, OneSum, Quadratic, Stub, TwoPrompts, bridge_walk, reference_walk, run_config, walk

from bridgelm.methods import bridge, joint
from bridgelm.model import grads
from bridgelm.model.policy import Grads
from bridgelm.objective import losses, shadow_diagnostics
from bridgelm.types import Problem, Row, Verdict


@dataclass(frozen=True)
class Code:
    """The modules under test; a mutant replaces one of them."""

    bridge: ModuleType = bridge
    joint: ModuleType = joint
    losses: ModuleType = losses
    shadow_diagnostics: ModuleType = shadow_diagnostics


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


def resting_shadow(code: Code) -> None:
    """The shadow is passed and stepped in every n-th step; w goes on with its last gradient in between."""
    for every, lam, steps in ((2, 0.3, 12), (3, 0.6, 11), (20, 0.5, 12)):
        path = bridge_walk(code.bridge, Quadratic(u=0.4), lam, steps, theta=-0.5, w=0.25, beta=0.3, shadow_every=every)
        wanted = reference_walk(Quadratic(u=0.4), [lam] * steps, 0.1, 0.3, 0, (-0.5, -0.5, 0.25), every)
        close(path.points, wanted, 1e-14, f"shadow_every {every}")
        passes = [e for e in path.policy.log if e[:2] == ("grad", "shadow")]
        assert len(passes) == -(-steps // every), "a shadow that rests is not passed"
        for k, metrics in enumerate(path.metrics):
            assert ("loss/shadow" in metrics) == ("bridge/shadow_move" in metrics) == (k % every == 0)


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


# -- controls of the bracket of (3) ------------------------------------------------------------------------------------

SHADOWLESS = ("rl", "sft")
FLAT = SimpleNamespace(sft=Quadratic().sft, rl=lambda theta, w: (0.0, 0.0, 0.0))


def controlled(code: Code, third: str, lam: float = 0.5, seed: int = 0, lr: float = 0.1, **options: Any) -> Any:
    config = run_config({"name": "bridge", "lambda": lam, "third": third, **options}, 10, lr, seed=seed)
    return code.bridge.Bridge(config.method, config)


def control_rest(q: Quadratic, third: str, lam: float, start: float) -> np.ndarray:
    """(theta, w) where (1) and the control's (3) are zero: two linear equations. `start` is the frozen shadow."""
    rest = 1 - lam
    of_w = {
        "rl": ((-lam * q.a, rest * q.b + lam * (q.a**2 + q.c)), rest * q.b * q.u + lam * q.d),
        "sft": ((0.0, 1.0), q.u),
        "frozen": ((-lam * q.a, rest * q.b), rest * q.b * q.u - lam * q.a * start),  # the bracket is a (theta - start)
    }[third]
    return np.linalg.solve([(1.0, -lam * q.a), of_w[0]], [rest * q.t, of_w[1]])


def controls_rest(code: Code) -> None:
    tame = Quadratic(a=0.5, b=4.0, u=0.3)  # where a frozen shadow has a stable rest: (1 - l) b > (l a)^2
    for third in (*SHADOWLESS, "frozen"):
        for lam in LAMBDAS:
            for q, theta in ((Quadratic(), 0.0), (tame, -0.4)):
                wanted = control_rest(q, third, lam, theta)
                stub = Stub(q, 0.3, theta=theta)
                if third != "frozen" or q is tame:
                    path = stepped(controlled(code, third, lam), stub, 600, settle=1e-14)
                    close((path.end[0], path.end[2]), wanted, 1e-9, f"{third} at lambda {lam}")
                else:  # a saddle for a large lambda, so it is begun there: nothing moves
                    stub = Stub(q, 0.1, theta=wanted[0], w=wanted[1])
                    path = stepped(controlled(code, third, lam), stub, 3, shadow=theta)
                    close(path.points, [(wanted[0], theta, wanted[1])] * 4, 1e-14, f"{third} at lambda {lam}")
                if third == "frozen":
                    close([p[1] for p in path.points], theta, 0.0, "the frozen shadow")
    close(control_rest(Quadratic(), "rl", 0.5, 0.0), (2.375, 0.875), 1e-15, "rl at lambda 1/2")
    close(control_rest(Quadratic(), "sft", 0.5, 0.0), (1.5, 0.0), 1e-15, "sft at lambda 1/2")
    close(control_rest(Quadratic(), "frozen", 0.5, 0.0), (-1.5, -3.0), 1e-14, "frozen at lambda 1/2")


def stepped(method: Any, policy: Any, steps: int, shadow: float | None = None, settle: float | None = None) -> Any:
    method.setup(policy)
    if shadow is not None:
        policy.groups["shadow"].fill_(shadow)
    return walk(method, policy, steps, settle=settle)


def controls_path(code: Code) -> None:
    """Step by step in plain numbers, before any rest: a moving start, beta apart from alpha."""
    q = Quadratic(u=0.4)
    for third in (*SHADOWLESS, "frozen"):
        for lam in LAMBDAS:
            path = stepped(controlled(code, third, lam, beta=0.03), Stub(q, 0.1, theta=-0.5, w=0.25), 12)
            theta, w = -0.5, 0.25
            for found in path.points:
                close((found[0], found[2]), (theta, w), 1e-13, f"{third} at lambda {lam}")
                at_start = q.rl(-0.5, w)[2]
                bracket = {"rl": q.rl(theta, w)[2], "sft": 0.0, "frozen": q.rl(theta, w)[2] - at_start}[third]
                step = 0.1 * ((1 - lam) * q.sft(theta, w)[1] + lam * q.rl(theta, w)[1])
                w += 0.03 * ((1 - lam) * q.sft(theta, w)[2] + lam * bracket)
                theta += step


def controls_cost(code: Code) -> None:
    """What a control does not need is not there: no shadow, no optimiser of it, no pass, no word of it."""
    for third in ("gain", "frozen", "noise", "permuted", *SHADOWLESS):
        path = stepped(controlled(code, third), Stub(Quadratic(), 0.1, theta=1.0), 2)
        policy, metrics = path.policy, path.metrics[-1]
        assert ("shadow" in policy.groups) == (third not in SHADOWLESS), third
        assert ("shadow" in policy.optimisers) == (third not in (*SHADOWLESS, "frozen")), third
        passes = [entry[1:] for entry in policy.log if entry[0] == "grad"]
        once = [("nll", "live"), ("pg", "live")] + [("shadow", "shadow")] * (third not in SHADOWLESS)
        extra = [("pg", "live"), ("shadow", "shadow")] if third == "permuted" else []
        assert sorted(p[:2] for p in passes) == sorted(2 * (once + extra)), (third, passes)
        for half, start in enumerate(path.points[:2]):  # each at the snapshot, the placebo's passes too
            for _, at, point in passes[half * len(passes) // 2 : (half + 1) * len(passes) // 2]:
                close(point[2], start[2], 0.0, "w of the snapshot")
                where = 0 if at == "live" else 1
                close(point[where], start[where], 0.0, f"{third}: the snapshot at {at}")
        assert any("shadow" in key for key in metrics) == (third not in SHADOWLESS), sorted(metrics)
        assert ("bridge/shadow_move" in metrics) == ("shadow" in policy.optimisers)
        assert ("bridge/norm_placebo" in metrics) == (third in ("noise", "permuted"))
        assert {"bridge/norm_sft", "bridge/norm_rl", "bridge/norm_third", "bridge/theta_move"} <= metrics.keys()


def controls_quiet(code: Code) -> None:
    """No control is warned of for what it is meant to do, and none stumbles over groups without spread."""
    for third in ("frozen", *SHADOWLESS, "noise", "permuted"):
        path = stepped(controlled(code, third, 0.3), Stub(Quadratic(), 0.1, theta=1.0), 60)
        assert not any(path.warned), (third, next(t for t in path.warned if t))
        flat = stepped(controlled(code, third, 0.3), Stub(FLAT, 0.1, theta=1.0, w=0.2), 1)
        close(flat.end[2] - 0.2, 0.1 * 0.7 * Quadratic().sft(1.0, 0.2)[2], 1e-15, f"{third}: w follows SFT alone")
        assert all(math.isfinite(value) for value in flat.metrics[0].values())


class Known(Stub):
    """w is two tensors whose gradients are drawn once for each term; keeps what w is stepped with."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        draws = np.random.default_rng(1)
        self.known = {
            name: {  # most of the norm is in the smaller tensor
                key: torch.from_numpy(size * draws.standard_normal(shape))
                for key, shape, size in (("A", (4, 30), 1.0), ("B", (6, 4), 5.0))
            }
            for name in ("nll", "pg", "shadow")
        }
        self.steps_of_w: list[dict[str, torch.Tensor]] = []

    def grad(self, terms: Any, batch: Any, coef: Any, at: str = "live") -> Grads:
        found = super().grad(terms, batch, coef, at)
        (name,) = coef
        return Grads(found.theta, dict(self.known[name]), found.losses, {})

    def apply(self, name: str, gradient: Any, **options: Any) -> float:
        if name == "w":
            self.steps_of_w.append(gradient)
            return grads.norm(gradient)
        return super().apply(name, gradient, **options)


def noise_of(code: Code, steps: range, seed: int = 0) -> tuple[Known, np.ndarray]:
    """What was put into the bracket in each step, as rows: taken out of w's step."""
    policy, method = Known(Quadratic(), 0.1, theta=1.0), controlled(code, "noise", 0.4, seed)
    method.setup(policy)
    metrics = [method.update(policy, NOTHING, step) for step in steps]
    nll = policy.known["nll"]
    rows = [
        torch.cat([((g[key] - 0.6 * nll[key]) / 0.4).flatten() for key in ("A", "B")]).numpy()
        for g in policy.steps_of_w
    ]
    for found, row in zip(metrics, rows):
        close(found["bridge/norm_placebo"], np.linalg.norm(row), 1e-12, "the logged norm of the placebo")
    return policy, np.stack(rows)


def noise(code: Code) -> None:
    """Noise of the bracket's norm over all tensors at once, anew in each step, the same for a seed and a step."""
    policy, found = noise_of(code, range(400))
    true = torch.cat([(policy.known["pg"][key] - policy.known["shadow"][key]).flatten() for key in ("A", "B")]).numpy()
    size, n = np.linalg.norm(true), len(true)
    close(np.linalg.norm(found, axis=1), size, 1e-12, "the norm of the bracket")
    units = found / size
    cosines = units @ (true / size)
    assert abs(cosines).max() < 5 / math.sqrt(n) and abs(cosines.mean()) < 5 / math.sqrt(400 * n), "a direction of it"
    among = units @ units.T - np.eye(400)
    assert abs(among).max() < 6 / math.sqrt(n), "steps repeat each other"
    close(
        np.linalg.norm(units.mean(0)), 1 / math.sqrt(400), 0.25 / math.sqrt(400), "the mean of many is nearly nothing"
    )
    share = (units[:, :120] ** 2).sum(1).mean()  # 120 of 144 coordinates are in the first tensor
    close(share, 120 / n, 0.02, "spread over the tensors by their sizes")
    assert abs(np.mean(units**4) * n**2 / 3 - 1) < 0.06, "a Gaussian's fourth moment"
    close(noise_of(code, range(7, 9))[1], found[7:9], 0.0, "a run that goes on at step 7 draws the same")
    assert abs(noise_of(code, range(3), seed=1)[1] @ found[:3].T).max() < 6 / math.sqrt(n) * size**2, "seeds are apart"
    for third in ("noise", "permuted"):  # theta and the shadow go on as ever
        wanted = stepped(controlled(code, "gain"), Stub(Quadratic(), 0.1, theta=1.0, w=0.3), 1).end
        for seed in range(8):
            first = stepped(controlled(code, third, seed=seed), Stub(Quadratic(), 0.1, theta=1.0, w=0.3), 1).end
            close(first[:2], wanted[:2], 0.0, f"{third}: theta and the shadow in the first step")
    same = [stepped(controlled(code, t), Stub(Quadratic(), 0.1, theta=1.0), 20).points for t in ("permuted", "gain")]
    close(same[0], same[1], 0.0, "without rows there is nothing to permute")


def one_row(group: int, reward: float, verdict: Verdict, at: str = "live") -> Row:
    own = np.array([False, True])
    return Row(
        np.array([0, 1]), own, "rollout", Problem(f"p{group}", ()), group, at, 1.0, np.zeros(2), None, reward, verdict
    )


class FakeRoller:
    """Joint rollouts with a mean reward of .25; the shadow's earn step / 10 and step / 5, and one is not graded."""

    step = 0

    def groups(self, data: Any) -> list[Row]:
        rewards = ((0, 1.0), (0, 0.0), (1, 0.0), (1, 0.0))
        return [one_row(g, r, Verdict.CORRECT if r else Verdict.WRONG) for g, r in rewards]

    def __call__(self, problems: Any, at: str = "live") -> list[Row]:
        assert at == "shadow" and [p.id for p in problems] == ["p0", "p1"]
        rewards = (0.1 * self.step, 0.2 * self.step)
        return [one_row(2, r, Verdict.WRONG, at) for r in rewards] + [one_row(2, 9.0, Verdict.ERROR, at)]


def shadow_reward(code: Code) -> None:
    """Logged where the shadow was sampled and only there, and said by each update of that step."""
    data = SimpleNamespace(demos=lambda n: [])
    for third in ("gain", "frozen", "noise"):
        for options, every in (({"probe_every": 3}, 3), ({"shadow_rollouts": "own"}, 1), ({}, 0)):
            method, policy, roll = controlled(code, third, **options), Stub(Quadratic(), 0.1, theta=1.0), FakeRoller()
            method.setup(policy)
            for roll.step in range(7):
                method.gather(data, roll, roll.step)
                for _ in range(2):  # two updates on one batch of rollouts
                    found = method.update(policy, NOTHING, roll.step)
                    sampled = bool(every) and roll.step % every == 0
                    assert ("bridge/shadow_reward" in found) == ("bridge/gain_honest" in found) == sampled, roll.step
                    if sampled:
                        close(found["bridge/shadow_reward"], 0.15 * roll.step, 1e-15, "the shadow's own reward")
                        close(found["bridge/gain_honest"], 0.25 - 0.15 * roll.step, 1e-15, "the honest gain")


QUADRATIC: dict[str, Callable[[Code], None]] = {
    f.__name__: f
    for f in (trace, fixed_points, w_frozen, every_option_of_the_step, resting_shadow, resync, order, spectrum)
}
OTHERS: dict[str, Callable[[Code], None]] = {
    f.__name__: f for f in (two_prompts, degeneracy, vanished_warning, still_shadow_warning)
}
CONTROLS: dict[str, Callable[[Code], None]] = {
    f.__name__: f for f in (controls_rest, controls_path, controls_cost, controls_quiet, noise, shadow_reward)
}
CHECKS = QUADRATIC | OTHERS | CONTROLS
