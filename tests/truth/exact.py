"""Problems whose gradients are known in closed form, and policies that hand them to the real methods.

A gradient is of the LOSS, -J, as `Policy.grad` returns it. `Stub` is twenty lines of plain SGD that share no code with
bridgelm; `Shipped` is the real `Policy` with nothing replaced but the forward pass: its optimisers are the real ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from bridgelm.config.run_config import RunConfig, make_config
from bridgelm.model import grads
from bridgelm.model.groups import Group
from bridgelm.model.placement import Placements
from bridgelm.model.policy import Grads, Policy
from bridgelm.model.storage import Noise
from bridgelm.model.weights import Weights
from bridgelm.types import Batch

LAMBDAS = (0.1, 0.3, 0.5, 0.7, 0.9)
NOTHING = Batch((), {})
Point = tuple[float, float, float]  # theta, shadow, w


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x > -700 else 0.0


def logit(p: float) -> float:
    return math.log(p / (1 - p))


@dataclass(frozen=True)
class Quadratic:
    """J_RL = -(theta - a w)^2 / 2 - c w^2 / 2 + d w;   J_SFT = -(theta - t)^2 / 2 - b (w - u)^2 / 2."""

    a: float = 2.0
    t: float = 3.0
    b: float = 1.0
    u: float = 0.0
    c: float = 1.0
    d: float = 0.5

    def sft(self, theta: float, w: float) -> tuple[float, float, float]:
        """J and its derivatives in theta and w."""
        value = -0.5 * (theta - self.t) ** 2 - 0.5 * self.b * (w - self.u) ** 2
        return value, self.t - theta, self.b * (self.u - w)

    def rl(self, theta: float, w: float) -> tuple[float, float, float]:
        e = theta - self.a * w
        return -0.5 * e**2 - 0.5 * self.c * w**2 + self.d * w, -e, self.a * e - self.c * w + self.d

    def rest(self, lam: float, r: float = 1.0) -> Point:
        """Where BRIDGE rests. r < 1: the shadow is theta after a share r of the way to its optimum (re-sync)."""
        w = (self.b * self.u + lam * r * self.a * self.t) / (self.b + lam * r * self.a**2)
        theta = (1 - lam) * self.t + lam * self.a * w
        return theta, theta + r * (self.a * w - theta), w


@dataclass(frozen=True)
class TwoPrompts:
    """Bernoulli answers: logit theta + w on prompt 1, theta on prompt 2. RL on prompt 1, demonstrations on both."""

    q1: float = 0.9
    q2: float = 0.8
    tau: float = 1.0

    def sft(self, theta: float, w: float) -> tuple[float, float, float]:
        p1, p2 = sigmoid(theta + w), sigmoid(theta)
        value = 0.5 * sum(q * math.log(p) + (1 - q) * math.log1p(-p) for q, p in ((self.q1, p1), (self.q2, p2)))
        return value, 0.5 * (self.q1 - p1 + self.q2 - p2), 0.5 * (self.q1 - p1)

    def rl(self, theta: float, w: float) -> tuple[float, float, float]:
        z = theta + w
        p = sigmoid(z)
        slope = p * (1 - p) * (1 - self.tau * z)
        return p - self.tau * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))), slope, slope


@dataclass(frozen=True)
class OneSum:
    """Both objectives see only theta + w: J_RL peaks at 1, J_SFT at 3. The degenerate case."""

    curve_rl: float = 1.0
    curve_sft: float = 0.5

    def sft(self, theta: float, w: float) -> tuple[float, float, float]:
        e = 3.0 - theta - w
        return -0.5 * self.curve_sft * e**2, self.curve_sft * e, self.curve_sft * e

    def rl(self, theta: float, w: float) -> tuple[float, float, float]:
        e = 1.0 - theta - w
        return -0.5 * self.curve_rl * e**2, self.curve_rl * e, self.curve_rl * e


def closed_form(problem: Any, theta: float, w: float, coef: dict[str, float]) -> tuple[float, float, dict[str, float]]:
    """Gradient of the loss in theta and in w, and the value of each term: `nll` is SFT, `pg` and `shadow` are RL."""
    of = {"nll": problem.sft, "pg": problem.rl, "shadow": problem.rl}
    g_theta = g_w = 0.0
    losses = {}
    for name, c in coef.items():
        value, in_theta, in_w = of[name](theta, w)
        losses[name], g_theta, g_w = -c * value, g_theta - c * in_theta, g_w - c * in_w
    return g_theta, g_w, losses


def tensor(x: float) -> torch.Tensor:
    return torch.tensor([x], dtype=torch.float64)


class Stub:
    """A policy of two numbers and plain SGD, without clipping. `log` keeps each call and the point it was made at."""

    def __init__(self, problem: Any, lr: float, theta: float = 0.0, w: float = 0.0) -> None:
        self.problem, self.lr, self.w_start = problem, lr, w
        self.groups: dict[str, torch.Tensor] = {"theta": tensor(theta)}
        self.optimisers: dict[str, Any] = {}
        self.log: list[tuple[Any, ...]] = []

    @property
    def point(self) -> Point:
        theta = self.groups["theta"]
        return float(theta), float(self.groups.get("shadow", theta)), float(self.groups.get("w", tensor(0.0)))

    def add_w(
        self, rank: int, alpha: float, modules: str = "", exclusive: bool = False, points: tuple[str, ...] = ()
    ) -> None:
        self.groups["w"] = tensor(self.w_start)

    def fork(self, name: str, of: str = "theta") -> None:
        copy: Any = self.groups[of].clone()
        self.groups[name] = copy if of == "theta" else Group({"x": copy})  # a gradient of w is read by its tensors

    def copy(self, source: str, target: str) -> None:
        self.groups[target].copy_(self.groups[source])

    def lean(self, name: str, toward: str, share: float) -> None:
        self.groups[name] += share * (self.groups[toward] - self.groups[name])

    def optimiser(
        self,
        name: str,
        group: str | None = None,
        lr: float | None = None,
        kind: str | None = None,
        moments_of: str | None = None,
    ) -> None:
        self.optimisers[name] = SimpleNamespace(
            group=group or name, lr=self.lr if lr is None else lr, kind=kind, moments_of=moments_of, moved=0.0
        )

    def grad(self, terms: Any, batch: Batch, coef: dict[str, float], at: str = "live") -> Grads:
        self.log.append(("grad", "+".join(sorted(coef)), at, self.point))
        theta = self.groups["theta" if at == "live" else at]
        w = self.groups.get("w")
        g_theta, g_w, losses = closed_form(self.problem, float(theta), 0.0 if w is None else float(w), coef)
        return Grads({"x": tensor(g_theta)}, {} if w is None else {"x": tensor(g_w)}, losses, {})

    def apply(
        self, name: str, gradient: dict[str, torch.Tensor], rate: float = 1.0, clip_as: str | None = None,
        beside: dict[str, torch.Tensor] | None = None,
    ) -> float:
        self.log.append(("apply", name, "", self.point))
        named = self.optimisers[name]
        self.groups[named.group] -= rate * named.lr * gradient["x"]
        named.moved = rate * named.lr * abs(float(gradient["x"]))
        return abs(float(gradient["x"]))

    def park(self, gradient: dict[str, torch.Tensor]) -> None:
        pass

    def precondition(self, name: str, gradient: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return gradient

    def dot(self, g: dict[str, torch.Tensor], h: dict[str, torch.Tensor], metric: str | None = None) -> float:
        return grads.dot(g, h)


class Shipped(Policy):
    """The real policy, with a closed form in place of the model. Scalars live in the group's `full` tensors."""

    def __init__(self, problem: Any, config: Any, theta: float = 0.0, w: float = 0.0) -> None:
        self.problem, self.config, self.w_start = problem, config, w
        self.optimisers, self.factor = {}, 1.0
        self.live = live = Weights.__new__(Weights)
        live.frozen, live._drifted, live.stale = {}, False, False
        live.lora, live.noise, live.placements = None, Noise(0), Placements.asked_for(config)
        live.device, live.master = torch.device("cpu"), torch.float64
        live.groups = {"theta": Group({"x": tensor(theta).requires_grad_()})}

    @property
    def point(self) -> Point:
        return tuple(
            float(self.groups[g].full["x"].detach()) if g in self.groups else 0.0  # type: ignore[return-value]
            for g in ("theta", "shadow", "w")
        )

    def add_w(
        self, rank: int, alpha: float, pattern: str = "", exclusive: bool = False, points: tuple[str, ...] = ()
    ) -> None:
        self.groups["w"] = Group({"x": tensor(self.w_start).requires_grad_()})

    def grad(self, terms: Any, batch: Batch, coef: Any, at: str = "live", entropy: bool = False) -> Grads:
        theta = float(self.groups["theta" if at == "live" else at].full["x"].detach())
        w = float(self.groups["w"].full["x"].detach()) if "w" in self.groups else 0.0
        g_theta, g_w, losses = closed_form(self.problem, theta, w, coef)
        return Grads({"x": tensor(g_theta)}, {"x": tensor(g_w)} if "w" in self.groups else {}, losses, {})


def run_config(method: dict[str, Any], steps: int = 10, lr: float = 0.1, **sections: Any) -> RunConfig:
    optim = {"kind": "sgd", "lr": lr, "clip": None, **sections.pop("optim", {})}
    return make_config(
        {
            "name": "truth",
            "steps": steps,
            "model": {"name_or_path": "none"},
            "method": method,
            "data": {"train": "none.jsonl"},
            "reward": {"verifier": "exact"},
            "optim": optim,
            **sections,
        }
    )


@dataclass
class Path:
    """A run: its points, and what it was made of."""

    points: list[Point]
    policy: Any
    method: Any
    metrics: list[dict[str, float]] = field(default_factory=list)
    warned: list[list[str]] = field(default_factory=list)

    @property
    def end(self) -> np.ndarray:
        return np.array(self.points[-1])


def walk(method: Any, policy: Any, steps: int, limit: float = 1e100, settle: float | None = None) -> Path:
    """`steps` updates of a method on a policy; ends early when the point leaves `limit` or rests within `settle`."""
    out = Path([policy.point], policy, method)
    for step in range(steps):
        policy.factor = method.rate(step)
        metrics = method.update(policy, NOTHING, step)
        out.metrics.append(metrics)
        out.warned.append(method.warnings(metrics))
        out.points.append(policy.point)
        if any(not abs(x) < limit for x in policy.point):
            break
        if settle and all(abs(x - y) < settle for x, y in zip(out.points[-1], out.points[-2])):
            break
    return out


def bridge_walk(
    module: Any,
    problem: Any,
    lam: float,
    steps: int,
    lr: float = 0.1,
    theta: float = 0.0,
    w: float = 0.0,
    shadow: float | None = None,
    settle: float | None = None,
    limit: float = 1e100,
    **options: Any,
) -> Path:
    """The real BRIDGE (or a mutant of it) on the stub. beta is the rate of theta unless it is given."""
    config = run_config({"name": "bridge", "lambda": lam, **options}, steps, lr)
    method, policy = module.Bridge(config.method, config), Stub(problem, lr, theta, w)
    method.setup(policy)
    if shadow is not None:
        policy.groups["shadow"] = tensor(shadow)
    return walk(method, policy, steps, limit, settle)


def reference_walk(
    problem: Any,
    lams: list[float],
    lr: float,
    beta: float,
    resync_every: int = 0,
    start: Point = (0.0, 0.0, 0.0),
    shadow_every: int = 1,
) -> list[Point]:
    """Algorithm 2 of the paper with `+` in its line 9, in plain numbers, all gradients at one snapshot (Jacobi). With
    `shadow_every` the shadow's gradients of both are those of the last step whose number it divides."""
    theta, shadow, w = start
    points, third = [start], 0.0
    for k, lam in enumerate(lams):
        _, s_theta, s_w = problem.sft(theta, w)
        _, r_theta, r_w = problem.rl(theta, w)
        if resync_every and k % resync_every == 0:
            shadow = new_shadow = theta + lr * r_theta
        else:
            new_shadow = shadow + lr * problem.rl(shadow, w)[1] * (k % shadow_every == 0)
        third = problem.rl(shadow, w)[2] if k % shadow_every == 0 else third
        theta += lr * ((1 - lam) * s_theta + lam * r_theta)
        w += beta * ((1 - lam) * s_w + lam * (r_w - third))
        shadow = new_shadow
        points.append((theta, shadow, w))
    return points


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], rtol: float) -> bool:
    return grads.norm(grads.mix((1.0, a), (-1.0, b))) <= rtol * grads.norm(b)
