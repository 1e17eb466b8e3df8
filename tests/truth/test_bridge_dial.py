"""bridge_dial: what z says, which way lambda goes, and what is deployed, each against an independent answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checks import close
from exact import Path, Quadratic, Shipped, Stub, run_config, tensor, walk
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

from bridgelm.methods import bridge_dial, shadow
from bridgelm.methods.bridge_dial import BridgeDial, alignment, by_group
from bridgelm.model import batching
from bridgelm.model.policy import Grads
from bridgelm.types import Batch


@pytest.fixture(autouse=True)
def _wide_norm() -> Iterator[None]:
    with wide_norm():
        yield


def method_of(steps: int = 10, lr: float = 0.1, optim: Any = None, **options: Any) -> Any:
    config = run_config({"name": "bridge_dial", **options}, steps, lr, optim=optim or {})
    return BridgeDial(config.method, config)


# -- closed forms ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hills:
    """J_RL = -.05 (W - 1)^2 and J_SFT = -.5 (W - 3)^2 of W = theta + w."""

    def sft(self, theta: float, w: float) -> tuple[float, float, float]:
        e = theta + w - 3
        return -0.5 * e * e, -e, -e

    def rl(self, theta: float, w: float) -> tuple[float, float, float]:
        e = theta + w - 1
        return -0.05 * e * e, -0.1 * e, -0.1 * e


class Telling(Stub):
    """Hands out log-probs on two groups whose x_g are exactly s_g <g_RL(theta), theta - shadow>. With the default s
    their mean is the inner product and z is a third of its sign."""

    def __init__(self, *args: Any, s: tuple[float, float] = (-2.0, 4.0), **more: Any) -> None:
        super().__init__(*args, **more)
        self.s = s
        self.batch = batching.make_batch(
            [row((1,), [-1.0], 1.0, group).with_stream("pg", 1.0).with_stream("shadow", 1.0) for group in (0, 1)]
        )

    def inner(self) -> float:
        theta, shadow, w = self.point
        return self.problem.rl(theta, w)[1] * (theta - shadow)

    def grad(self, terms: Any, batch: Batch, coef: dict[str, float], at: str = "live") -> Grads:
        found = super().grad(terms, batch, coef, at)
        theta, shadow, w = self.point
        slope = self.problem.rl(theta, w)[1]
        value = slope * (theta if at == "live" else shadow)
        logps = {i: np.array([0.0, s * value]) for i, s in enumerate(self.s)} if "nll" not in coef else {}
        return Grads(found.theta, found.w, found.losses, logps)


def dial_walk(
    problem: Any,
    steps: int,
    lr: float = 0.05,
    start: tuple[float, float] = (0.0, 0.0),
    s: tuple[float, float] = (-2.0, 4.0),
    **options: Any,
) -> Path:
    method = method_of(steps, lr, **options)
    policy = Telling(problem, lr, *start, s=s)
    method.setup(policy)
    path = Path([policy.point], policy, method)
    for step in range(steps):
        path.metrics.append(method.update(policy, policy.batch, step))
        path.points.append(policy.point)
    return path


def logit(p: float) -> float:
    return math.log(p) - math.log(1 - p)


def test_path_of_everything() -> None:
    """theta, shadow, w and lambda in plain numbers from one snapshot; the lambda in use is the one before z."""
    for lam, rho, beta, eta, limit, s in (
        (0.3, 0.2, 0.02, 0.3, 4.0, (-2.0, 4.0)),
        (0.5, 1 / 15, 0.1, 0.7, 1.2, (0.9, 1.1)),  # z = 10: clipped, and the logit meets its limit
        (0.8, 0.0, 0.3, 0.05, 4.0, (4.0, 0.2)),
        (1.0, 0.1, 0.1, 0.2, 2.0, (1.0, 2.0)),
        (0.0, 1.0, 0.1, 0.2, 2.0, (0.5, -1.0)),
    ):
        problem, theta, w = Quadratic(u=0.4, t=2.0), -0.5, 0.25
        shadow, value = theta, limit * (1 if lam == 1 else -1) if lam in (0, 1) else logit(lam)
        points, lams, zs = [(theta, shadow, w)], [], []
        for _ in range(30):
            now = 1 / (1 + math.exp(-value))
            _, s_theta, s_w = problem.sft(theta, w)
            _, r_theta, r_w = problem.rl(theta, w)
            _, h_theta, h_w = problem.rl(shadow, w)
            x = np.array(s) * (r_theta * (theta - shadow))
            error = abs(x[0] - x[1]) / 2  # sd over the root of two, and the sd of two is |difference| / root of two
            z = x.mean() / error if error else 0.0
            theta, shadow, w = (
                theta + 0.1 * ((1 - now) * s_theta + now * r_theta),
                shadow + 0.1 * h_theta + rho * (theta - shadow),
                w + beta * ((1 - now) * s_w + now * (r_w - h_w)),
            )
            value = max(-limit, min(limit, value - eta * max(-1.0, min(1.0, z))))
            points.append((theta, shadow, w))
            lams.append(now)
            zs.append(z)
        assert len(set(np.sign(zs))) > 1 and zs[0] == 0
        options = {"lambda": lam, "leak": rho, "beta": beta, "eta": eta, "limit": limit}
        path = dial_walk(problem, 30, 0.1, (-0.5, 0.25), s, **options)
        close([m["dial/lambda"] for m in path.metrics], lams, 1e-12, "lambda")
        close([m["dial/z"] for m in path.metrics], zs, 1e-9, "z")
        close(path.points, points, 1e-12, f"lambda {lam}, rho {rho}")


def test_order_of_calls() -> None:
    path = dial_walk(Quadratic(), 3, start=(0.3, 0.2), leak=0.2)
    log = path.policy.log
    assert len(log) == 18
    for k in range(3):
        part = log[6 * k : 6 * k + 6]
        assert [e[1] for e in part if e[0] == "apply"] == ["theta", "shadow", "w"]
        for entry in part:
            if entry[0] == "grad":
                close(entry[3], path.points[k], 0.0, f"the snapshot at {entry[2]}")


FIXED = {"leak": 0.0, "beta": 1e-300, "eta": 0.0}


def thetas(lam: float, rho: float, steps: int = 400) -> np.ndarray:
    return np.array([p[0] for p in dial_walk(Hills(), steps, **{**FIXED, "leak": rho, "lambda": lam}).points])


def test_sign_of_the_hypergradient() -> None:
    """w frozen, lambda fixed: <g_RL, D> has the sign of minus dJ_RL(theta_k)/dlambda, from two whole runs, at each of
    400 steps, and both turn at step 15. With z in charge, lambda goes the way of that derivative."""
    for rho in (0.0, 1 / 15):
        lam = 0.5
        path = dial_walk(Hills(), 400, **{**FIXED, "leak": rho, "lambda": lam})
        up, down = (thetas(lam + d, rho) for d in (1e-5, -1e-5))
        slope = (-0.05 * (up - 1) ** 2 + 0.05 * (down - 1) ** 2) / 2e-5
        inner = np.array([Hills().rl(t, w)[1] * (t - s) for t, s, w in path.points])
        assert (np.sign(inner[1:]) == -np.sign(slope[1:])).all() and len(inner) == 401
        signs = np.sign(inner[1:])
        assert (signs[:15] == 1).all() and (signs[15:] == -1).all(), "step 15, counted from 0, is where both turn"
        z = np.array([m["dial/z"] for m in path.metrics])
        close(z[1:], np.sign(inner[1:-1]) / 3, 1e-6, "z is a third of the sign")
        turned = dial_walk(Hills(), 400, **{**FIXED, "leak": rho, "lambda": lam, "eta": 1e-9})
        moves = np.diff([m["dial/lambda"] for m in turned.metrics])
        assert (np.sign(moves[1:]) == np.sign(slope[1:-2])).all(), "lambda goes where J_RL of the run rises"


def test_reward_rises() -> None:
    """Free to move, lambda first falls, since imitation leads uphill, then rises past its start; the end is better by
    reward than at any fixed lambda that does not already start in RL."""
    for rho in (0.0, 1 / 15):
        path = dial_walk(Hills(), 200, **{**FIXED, "leak": rho, "eta": 0.1})
        lams = [m["dial/lambda"] for m in path.metrics]
        assert min(lams[:15]) < 0.45 and lams[-1] > 0.95
        end, fixed = path.points[-1][0], [thetas(lam, rho, 200)[-1] for lam in (0.1, 0.5, 0.8)]
        assert all(Hills().rl(end, 0)[0] > Hills().rl(theta, 0)[0] for theta in fixed)


# -- z on a transformer ------------------------------------------------------------------------------------------------

LAM, RHO, LR, BETA, CAP = 0.3, 0.2, 0.05, 0.02, 1.05


def shrink_d(policy: Any, size: float) -> dict[str, torch.Tensor]:
    """Puts the shadow a step of this size away from theta, and gives that step."""
    generator, out = torch.Generator().manual_seed(9), {}
    with torch.no_grad():
        for name, t in policy.groups["shadow"].flat().items():
            out[name] = size * torch.randn(t.shape, generator=generator, dtype=t.dtype)
            t.copy_(policy.groups["theta"].flat()[name] - out[name])
    return out


def test_first_order() -> None:
    """sum of x_g against <grad of sum A log pi at theta, D> by autograd through weights merged by hand."""
    for lora in (False, True):
        for aggregate in ("token", "row", "constant"):
            policy = build_policy(lora=lora)
            rows = make_rows(policy, aggregate)
            leaves = policy.groups["theta"].flat()
            logps = all_logps(build(), merged(policy, "live"), rows)
            total = torch.zeros((), dtype=torch.float64)
            for r, lp in zip(rows, logps):
                if "pg" in r.streams:
                    advantage = float(r.streams["pg"].weight[r.own][0])
                    total = total + advantage * lp[torch.from_numpy(r.own)].sum() / (
                        int(r.own.sum()) if aggregate == "row" else 1)  # fmt: skip
            gradient = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()))))
            live = dict(enumerate(policy.score(rows)))
            off = []
            for size in (4e-4, 2e-4, 1e-4):
                step = shrink_d(policy, size)
                exact = sum(float((gradient[n] * step[n]).sum()) for n in step)
                found = sum(by_group(rows, live, dict(enumerate(policy.score(rows, at="shadow")))))
                off.append(found / exact - 1)
            assert abs(off[-1]) < 0.02, (aggregate, off)
            assert off[0] / off[1] == pytest.approx(2, abs=0.1) and off[1] / off[2] == pytest.approx(2, abs=0.05), off


def test_group_means() -> None:
    """By hand: own tokens of the stream's mask alone; flat groups count; groups without a stream do not."""
    mask = np.array([False, False, True])  # of a stream narrower than the row's own tokens
    rows = [
        row((1, 2), [-1.0, -1.0], 1.0, 0).with_stream("pg", 2.0),
        row((1, 2), [-1.0, -1.0], 0.0, 0).with_stream("pg", -1.0),
        row((1, 2), [-1.0, -1.0], 0.0, 1).with_stream("pg", 3.0, mask=mask),
        row((1, 2), [-1.0, -1.0], 0.0, 2).with_stream("pg", 0.0),  # flat: not passed through the model
        row((1, 2), [-1.0, -1.0], 0.0, 3),  # nothing graded
    ]
    live = {i: np.array([9.0, -1.0 - i, -0.5]) for i in range(3)}
    shadow = {i: np.array([5.0, -1.7, -0.25 * i]) for i in range(3)}
    x = [2 * (0.7 - 0.5) - (-0.3 - 0.25), 3 * 0.0, 0.0]
    assert by_group(rows, live, shadow) == pytest.approx(x, rel=0, abs=1e-15)
    shadow[2][2] = -2.0
    x[1] = 3 * 1.5
    assert by_group(rows, live, shadow) == pytest.approx(x, rel=0, abs=1e-15)
    mean = sum(x) / 3
    error = math.sqrt(sum((v - mean) ** 2 for v in x) / 2 / 3)
    close(alignment(rows, live, shadow), mean / error, 1e-14, "z")
    assert alignment(rows[:2], live, shadow) == 0.0, "one group"
    assert alignment(rows[3:], {}, {}) == 0.0 and alignment([], {}, {}) == 0.0, "nothing to say"
    same = {i: v.copy() for i, v in live.items()}
    assert alignment(rows, live, same) == 0.0, "the shadow is theta"


def test_one_update_on_a_transformer() -> None:
    """The three equations with gradients by hand, theta's clip factor on the shadow too, and z from hand-made
    log-probs at the snapshot."""
    clip = 0.05
    policy = build_policy(lr=LR, clip=clip)
    options = {"lambda": LAM, "leak": RHO, "beta": BETA, "ratio_cap": CAP, "eta": 0.5, "rl": {"kl_coef": 0.3}}
    method = method_of(**options)
    for name, rate in (("theta", LR), ("shadow", LR), ("w", BETA)):
        policy.optimiser(name, lr=rate)
    rows, by = make_rows(policy), bridge_method(ratio_cap=CAP, ratio="taper")
    sft = gradients(policy, rows, {"nll": 1.0}, "live", by)
    rl = gradients(policy, rows, {"pg": 1.0, "kl": 0.3}, "live", by)
    shadow = gradients(policy, rows, {"shadow": 1.0, "shadow_kl": 0.3}, "shadow", by)
    joint = (1 - LAM) * flat(sft["theta"]) + LAM * flat(rl["theta"])
    w_step = (1 - LAM) * flat(sft["w"]) + LAM * (flat(rl["w"]) - flat(shadow["w"]))
    factor = clip / (np.linalg.norm(joint) + 1e-6)
    own = clip / (np.linalg.norm(flat(shadow["theta"])) + 1e-6)
    assert factor < 0.7 and abs(factor / min(1.0, own) - 1) > 0.1, "the two clip factors must differ"
    theta0, shadow0, w0 = (flat(policy.groups[g].flat()) for g in ("theta", "shadow", "w"))
    wanted = {
        "theta": theta0 - LR * factor * joint,
        "shadow": shadow0 - LR * factor * flat(shadow["theta"]) + RHO * (theta0 - shadow0),
        "w": w0 - BETA * min(1.0, clip / (np.linalg.norm(w_step) + 1e-6)) * w_step,
    }
    x: dict[int, float] = {}
    with torch.no_grad():
        pairs = (all_logps(build(), merged(policy, at), rows) for at in ("live", "shadow"))
        for r, a, b in zip(rows, *pairs):
            if r.kind == "rollout":
                moved = float((a - b)[torch.from_numpy(r.own)].sum())
                x[r.group] = x.get(r.group, 0.0) + float(r.streams["pg"].weight[0]) * moved
    z = (x[0] + x[1]) / abs(x[0] - x[1])
    found = method.update(policy, make_batch(rows), 0)
    close(found["dial/z"], z, 1e-10, "z")
    close(method.lam, 1 / (1 + math.exp(-logit(LAM) + 0.5 * max(-1, min(1, z)))), 1e-12, "the next lambda")
    for group, value in wanted.items():
        close(flat(policy.groups[group].flat()), value, 1e-12, group)


def test_same_metric() -> None:
    """With no demonstrations to learn from, no leak and lambda near 1, theta and the shadow take the same steps: Adam,
    its momentum, clip and weight decay are theirs in common. With demonstrations too, the shadow steps in theta's
    metric: its first step is its gradient over the size of theta's."""

    class Alone(Quadratic):
        def sft(self, theta: float, w: float) -> tuple[float, float, float]:
            return 0.0, 0.0, 0.0

    config = run_config(
        {"name": "bridge_dial", "lambda": 1.0, "limit": 60.0, "leak": 0.0, "beta": 0.03, "eta": 0.0}, 40,
        optim={"kind": "adamw", "clip": 0.3, "weight_decay": 0.01})  # fmt: skip
    method, policy = BridgeDial(config.method, config), Shipped(Alone(), config.optim, 0.4, 0.1)
    method.setup(policy)
    with torch.no_grad():
        policy.groups["w"].full["x"].fill_(0.9)
    points = walk(method, policy, 40).points
    close([p[0] for p in points], [p[1] for p in points], 1e-12, "theta and its shadow")
    assert abs(points[-1][0] - points[0][0]) > 0.5
    config = run_config({"name": "bridge_dial", "leak": 0.0}, 1, optim={"kind": "adamw", "clip": 0.3})
    method, policy = BridgeDial(config.method, config), Shipped(Quadratic(), config.optim, 0.4, 0.1)
    method.setup(policy)
    end, rl, sft = walk(method, policy, 1).end, Quadratic().rl(0.4, 0.1)[1], Quadratic().sft(0.4, 0.1)[1]
    close(end[0] - 0.4, 0.1 * np.sign(rl + sft), 1e-6, "Adam's first step")
    close(end[1] - 0.4, 0.1 * rl / abs(0.5 * rl + 0.5 * sft), 1e-6, "the shadow's first step")


# -- what is deployed --------------------------------------------------------------------------------------------------


def deployed(
    accuracy: Callable[[float], float], scales: list[float]
) -> tuple[float, dict[str, float], list[float], Any]:
    """The scale that theta ends at, the metrics and the scales that were tried, seen from the weights alone."""
    method = method_of(scales=scales)
    policy = Shipped(Quadratic(), method.run.optim, 3.0, 0.7)
    method.setup(policy)
    with torch.no_grad():
        policy.groups["shadow"].full["x"].copy_(tensor(1.0))
    tried: list[float] = []

    def look() -> float:
        assert policy.live.stale, "the live weights are to be merged anew"
        policy.live.stale = False
        tried.append((policy.point[0] - 1.0) / 2.0)
        return accuracy(tried[-1])

    found = method.deploy(policy, look)
    assert policy.live.stale and policy.point[1:] == (1.0, 0.7) and set(policy.groups) == {"theta", "shadow", "w"}
    return (policy.point[0] - 1.0) / 2.0, found, tried, policy


def test_scale_of_the_end() -> None:
    grid = [0.0, 0.5, 1.0, 1.5]
    for peak in (0.5, 1.5, 1.0, 0.0):
        end, found, tried, _ = deployed(lambda c, peak=peak: 0.9 - (c - peak) ** 2, grid)
        close(end, peak, 1e-15, "theta")
        assert sorted(tried) == grid, "each once, the shadow and theta themselves exactly"
        assert found["dial/scale"] == peak
        wanted = {f"dial/accuracy_at_{c:g}": pytest.approx(0.9 - (c - peak) ** 2, abs=1e-12) for c in grid}
        assert {k: v for k, v in found.items() if k != "dial/scale"} == wanted
    for flat_top, wanted in (((0.0, 0.5, 1.0, 1.5), 1.0), ((0.0, 1.5), 1.5), ((0.0, 0.5), 0.5), ((0.5, 1.5), 0.5)):
        end, _, _, _ = deployed(lambda c, top=flat_top: float(c in top), grid)
        close(end, wanted, 1e-15, f"of equals {flat_top}")
    end, found, tried, _ = deployed(lambda c: 0.5, [2.0])
    assert (end, sorted(tried)) == (1.0, [1.0, 2.0]), "what was trained is always tried"
    assert deployed(lambda c: 0.5, [])[0] == 1.0


def test_the_live_weights_follow() -> None:
    policy = build_policy()
    method, seen = method_of(scales=[0.0]), []

    def look() -> float:
        with policy.at("live") as model:
            seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return float(len(seen) == 1)

    policy.weights("live")
    wanted = [{n: t.detach().clone() for n, t in merged(policy, at).items()} for at in ("shadow", "live")]
    assert method.deploy(policy, look)["dial/scale"] == 0.0
    look()
    for found, at in zip(seen, (wanted[0], wanted[1], wanted[0])):
        assert all(torch.allclose(found[n], at[n], rtol=0, atol=1e-15) for n in at)


# -- wrong versions ----------------------------------------------------------------------------------------------------

MUTANTS = mutants(
    bridge_dial,
    # (1), (2) and (3)
    Mutant("term", "BridgeDial.update", 1, by=test_path_of_everything),  # lambda for 1 - lambda, in (1)
    Mutant("term", "BridgeDial.update", 3, by=test_path_of_everything),  # and in (3)
    Mutant("sign", "BridgeDial.update", 1, by=test_path_of_everything),  # the shadow's part added
    Mutant("snapshot", "BridgeDial.update", by=test_path_of_everything),  # the shadow's gradient at theta
    Mutant("drop", "BridgeDial.update", "lean", by=test_path_of_everything),
    Mutant("late", "BridgeDial.update", "lean", by=test_path_of_everything),  # the leak to the new theta
    Mutant("late", "BridgeDial.update", 10, by=test_order_of_calls),
    Mutant("drop", "BridgeDial.update", "clip_as 0", by=test_path_of_everything),  # the shadow never moves
    Mutant("drop", "BridgeDial.update", "clip_as 1", by=test_one_update_on_a_transformer),  # it is clipped by itself
    Mutant("drop", "BridgeDial.update", "beside 1", by=test_same_metric),
    Mutant("constant", "BridgeDial.setup", "adam", to=False, by=test_same_metric),
    Mutant("branch", "shadow_terms", "shadow_kl 1", by=test_one_update_on_a_transformer, of=shadow),
    # (4)
    Mutant("sign", "BridgeDial.update", 3, by=test_sign_of_the_hypergradient),
    Mutant("sign", "BridgeDial.update", 3, by=test_reward_rises),
    Mutant("term", "BridgeDial.update", 4, by=test_reward_rises),  # lambda stays
    Mutant("clip", "BridgeDial.update", 1, by=test_path_of_everything),
    Mutant("clip", "BridgeDial.update", 3, by=test_path_of_everything),
    Mutant("clip", "BridgeDial.bound", 1, by=test_path_of_everything),
    Mutant("clip", "BridgeDial.bound", 3, by=test_path_of_everything),
    Mutant("term", "BridgeDial.lam", 2, by=test_path_of_everything),
    Mutant("swap", "by_group", 2, by=test_sign_of_the_hypergradient),
    Mutant("term", "by_group", 1, by=test_first_order),  # without advantages
    Mutant("branch", "by_group", 5, by=test_first_order),  # sums over rows that are means
    Mutant("term", "by_group", 5, by=test_group_means),  # the last row of a group alone
    Mutant("constant", "by_group", 12, to=..., by=test_group_means),  # all tokens
    Mutant("drop", "by_group", 3, by=test_group_means),  # groups without a stream count
    Mutant("drop", "alignment", "ddof 1", by=test_group_means),
    Mutant("denominator", "alignment", 0, by=test_group_means),  # the deviation for the error
    Mutant("constant", "alignment", 5, to=1.0, by=test_group_means),  # one group is enough
    # what is deployed
    Mutant("sign", "BridgeDial.deploy", 0, by=test_scale_of_the_end),  # the worst
    Mutant("sign", "BridgeDial.deploy", 1, by=test_scale_of_the_end),  # of equals the one nearest to -1
    Mutant("constant", "BridgeDial.deploy", "1.0", to=0.5, by=test_scale_of_the_end),  # the trained one is not tried
    Mutant("drop", "BridgeDial.deploy", "place 2", by=test_scale_of_the_end),  # the last
    Mutant("drop", "BridgeDial.deploy", "copy", by=test_scale_of_the_end),
    Mutant("swap", "BridgeDial.deploy", "copy", by=test_scale_of_the_end),
    Mutant("drop", "BridgeDial.deploy", "groups", by=test_scale_of_the_end),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()


def test_state_and_warnings() -> None:
    method, other = method_of(**{"lambda": 0.2}), method_of()
    assert method.lam == pytest.approx(0.2, abs=1e-15) and other.lam == 0.5
    other.load(method.state())
    assert other.lam == method.lam
    for wanted, fires in ((0.35, False), (0.25, True)):
        n = 40
        x = max(np.roots([wanted * n - 1, -2 * (n - 1), wanted * n * (n - 1) - (n - 1) ** 2]))
        rows = [row((i % 2,), [-3.0], float(i % 2), i // 4) for i in range(n)]
        policy, method = WithLogps(Quadratic(), 0.1, theta=1.0), method_of()
        method.setup(policy)
        policy.rows = {i: np.array([0.0, -3.0 + (math.log(x) if i == 5 else 0.0)]) for i in range(n)}
        found = method.update(policy, batching.make_batch(rows), 0)
        assert found["bridge/ess"] == pytest.approx(wanted, abs=1e-12)
        assert any("effective sample size" in text for text in method.warnings(found)) == fires
    method, policy = method_of(), Stub(Quadratic(), 0.1, theta=1.0)
    method.setup(policy)
    policy.optimisers["shadow"].lr *= 1e-5
    assert all(any("hardly moves" in text for text in texts) for texts in walk(method, policy, 2).warned)
    quiet = SimpleNamespace(sft=Quadratic().sft, rl=lambda theta, w: (0.0, 0.0, 0.0))
    method, policy = method_of(), Stub(quiet, 0.1, theta=1.0)
    method.setup(policy)
    path = walk(method, policy, 2)
    assert path.warned == [[], []] and [m["dial/z"] for m in path.metrics] == [0.0, 0.0]
