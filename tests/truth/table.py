"""A policy that is a table of logits, and the slow versions of what is computed on it: loops over rows and tokens in
numpy, with grad log p = onehot - p written out. Nothing here calls a loss of the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from exact import run_config

from bridgelm.model import batching
from bridgelm.model.policy import Grads
from bridgelm.types import Demo, Live, Problem, Row, Verdict

CONTEXTS, WORDS = 4, 3


def problem(name: str = "p", demos: int = 2) -> Problem:
    return Problem(name, ({"role": "user", "content": name},), demos=tuple(Demo(f"{name} {i}") for i in range(demos)))


def row(
    ids: Sequence[int],
    reward: float = 0.0,
    group: int = 0,
    old: np.ndarray | None = None,
    kind: str = "rollout",
    at: str = "live",
    **more: Any,
) -> Row:
    """A prompt of one token, then the answer; `old`: the logits of the policy that drew it."""
    own = np.arange(len(ids)) > 0
    blank = Row(np.array(ids), own, kind, problem(), group, at, reward=reward)  # type: ignore[arg-type]
    if kind == "rollout":
        logps = np.zeros(len(ids)) if old is None else np.where(own, log_probs(old, blank), 0.0)
        verdict = Verdict.CORRECT if reward > 0.5 else Verdict.WRONG
        blank = replace(blank, old_logps=logps, verdict=verdict)
    if at == "expert":
        blank = replace(blank, given=int(own.sum()))
    return replace(blank, **more)


def probs(theta: np.ndarray, t: int) -> np.ndarray:
    """Of the word at position t of any row."""
    z = theta[(t - 1) % CONTEXTS]
    e = np.exp(z - z.max())
    return e / e.sum()


def log_probs(theta: np.ndarray, r: Row) -> np.ndarray:
    return np.array([0.0] + [math.log(probs(theta, t)[r.ids[t]]) for t in range(1, len(r.ids))])


def entropy(theta: np.ndarray, t: int) -> float:
    p = probs(theta, t)
    return float(-(p * np.log(p)).sum())


def slope(theta: np.ndarray, r: Row, t: int) -> np.ndarray:
    """grad log p of token t, as a table."""
    out = np.zeros_like(theta)
    out[(t - 1) % CONTEXTS] = np.eye(WORDS)[r.ids[t]] - probs(theta, t)
    return out


def entropy_slope(theta: np.ndarray, t: int) -> np.ndarray:
    out, p = np.zeros_like(theta), probs(theta, t)
    out[(t - 1) % CONTEXTS] = -p * (np.log(p) + entropy(theta, t))
    return out


def tokens(r: Row) -> list[int]:
    return [t for t in range(len(r.ids)) if r.own[t]]


class Table:
    """It takes no step: `applied` is the ascent direction that would be stepped with, `coef` what was asked for."""

    def __init__(self, theta: np.ndarray) -> None:
        self.theta = np.array(theta, dtype=np.float64)
        self.groups: dict[str, Any] = {"theta": self}
        self.ledger = SimpleNamespace(rollouts=0)
        self.rates: dict[str, Any] = {}
        self.applied = np.zeros_like(self.theta)
        self.scored: list[int] = []
        self.coef: dict[str, float] = {}

    def fork(self, name: str) -> None:
        self.groups[name] = self

    def optimiser(self, name: str, lr: float | None = None) -> None:
        self.rates[name] = lr

    def score(self, rows: list[Row], at: str = "live") -> list[np.ndarray]:
        self.scored.append(len(rows))
        return [np.where(r.own, log_probs(self.theta, r), 0.0) for r in rows]

    def grad(self, terms: Any, batch: Any, coef: dict[str, float], at: str = "live", entropy: bool = False) -> Grads:
        """Two rows a micro-batch, of one kind."""
        theta, self.coef = torch.tensor(self.theta, requires_grad=True), dict(coef)
        out = Grads({"x": torch.zeros_like(theta)}, {}, dict.fromkeys(coef, 0.0), {})
        idle = batching.idle(batch.rows, list(coef))
        for kind in ("demo", "rollout"):
            where = [i for i, r in enumerate(batch.rows) if r.kind == kind and i not in idle]
            for part in (where[k : k + 2] for k in range(0, len(where), 2)):
                rows = [batch.rows[i] for i in part]
                micro = batching.collate(rows, torch.float64, torch.device("cpu"), batch.stats)
                live = self.live(theta, rows, entropy)
                values = terms(micro, live)
                parts = {n: (values[n] * micro.scale[n]).sum() / batch.counts[n] for n in coef if n in values}
                (g,) = torch.autograd.grad(sum(coef[n] * v for n, v in parts.items()), theta)  # type: ignore[arg-type]
                out.theta["x"] += g
                for n, value in parts.items():
                    out.losses[n] += coef[n] * float(value.detach())
                for b, i in enumerate(part):
                    n = len(batch.rows[i].ids)
                    out.logps[i] = live.logp_BT[b, :n].detach().numpy()
                    if live.entropy_BT is not None:
                        out.entropies[i] = live.entropy_BT[b, :n].detach().numpy()
        return out

    def live(self, theta: torch.Tensor, rows: list[Row], with_entropy: bool) -> Live:
        length = max(len(r.ids) for r in rows)
        table = torch.log_softmax(theta, -1)
        where = [(t - 1) % CONTEXTS for t in range(length)]
        ids = torch.tensor([[*r.ids, *[0] * (length - len(r.ids))] for r in rows])
        own = torch.tensor([[*r.own, *[False] * (length - len(r.ids))] for r in rows])
        logp = table[where][None].expand(len(rows), -1, -1).gather(2, ids[:, :, None])[:, :, 0]
        spread = -(table.exp() * table).sum(-1)[where][None].expand(len(rows), -1)
        return Live(torch.where(own, logp, 0.0), torch.where(own, spread, 0.0) if with_entropy else None)

    def apply(self, name: str, gradient: dict[str, torch.Tensor]) -> float:
        assert name == "theta"
        self.applied = -gradient["x"].numpy()
        return float(gradient["x"].norm())


class Hands:
    """A roller that hands out the given rows, and demonstrations whose rewards are given."""

    def __init__(self, policy: Table, rows: Sequence[Row], answers: dict[str, Row] | None = None) -> None:
        self.policy, self.rows, self.answers = policy, list(rows), answers or {}
        self.asked: list[tuple[str, int]] = []

    def groups(self, data: Any) -> list[Row]:
        return self.rows

    def experts(self, pairs: Sequence[tuple[Problem, Demo]], numbers: Sequence[int]) -> list[Row]:
        self.asked += [(demo.text, number) for (_, demo), number in zip(pairs, numbers)]
        return [
            replace(self.answers[demo.text], problem=p, group=number, text=demo.text)
            for (p, demo), number in zip(pairs, numbers)
        ]

    def demo(self, p: Problem, demo: Row) -> Row:
        return replace(demo, problem=p)

    def reference(self, rows: list[Row]) -> list[Row]:
        return [replace(r, ref_logps=np.full(len(r.ids), -0.7)) for r in rows]


def data(demos: Sequence[Row] = ()) -> Any:
    return SimpleNamespace(demos=lambda n: [(problem(), d) for d in demos])


def method_of(make: Callable[..., Any], name: str, steps: int = 10, rollout: Any = (), **options: Any) -> Any:
    config = run_config({"name": name, **options}, steps, rollout={"max_new_tokens": 7, **dict(rollout)})
    return make(config.method, config)


def update(method: Any, policy: Table, rows: Sequence[Row], step: int = 0) -> dict[str, float]:
    batch = batching.make_batch(rows)
    return method.update(policy, replace(batch, stats=method.probe(batch)), step)


def thetas(seed: int = 0, scale: float = 1.2) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and those of the policy that drew the rollouts, some way off."""
    rng = np.random.default_rng(seed)
    now = scale * rng.standard_normal((CONTEXTS, WORDS))
    return now, now + 0.5 * rng.standard_normal((CONTEXTS, WORDS))
