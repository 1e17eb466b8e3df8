"""LSPO on a real transformer: w's brief fit by hand, the spliced groups in plain loops, and that no demonstration's
gradient reaches theta."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checks import close
from exact import run_config
from mutation import Mutant, mutants
from transformer import VOCABULARY, all_logps, build, merged, spread, wide_norm

from bridgelm.config.run_config import OptimConfig
from bridgelm.errors import UserError
from bridgelm.ledger import Ledger
from bridgelm.methods import lspo
from bridgelm.methods.lspo import Lspo
from bridgelm.model.batching import make_batch
from bridgelm.model.policy import Policy
from bridgelm.types import Demo, Problem, Row, Verdict

BETA, FIT = 0.3, 3
OPTIM = {"kind": "sgd", "lr": 0.05, "clip": None}
DEMOS = {"x": (1, 2, 3, 4), "y": (9, 8), "z": (5, 5, 5)}


@pytest.fixture(autouse=True)
def _wide_norm() -> Iterator[None]:
    with wide_norm():
        yield


def problem(name: str, *demos: str) -> Problem:
    return Problem(name, (), demos=tuple(Demo(text) for text in demos))


EASY, HARD, BARE, ODD = problem("easy", "x"), problem("hard", "x", "y"), problem("bare"), problem("odd", "z")
# Rewards of theta's own four samples, None where the grader failed, and of theta + w's.
OWN: dict[str, Any] = {"easy": [1, 0, 0, 1], "hard": [0, 0, 0, 0], "bare": [0, 0, 0, 0], "odd": [0, None, 0, None]}
LED: dict[str, Any] = {"hard": [0, 1, 1, 0], "odd": [None, 1, 0, 0]}


class FakeRoller:
    """Hands out answers, scored by whoever is asked; keeps w as it is when it is sampled."""

    def __init__(self, policy: Policy, own: Any, led: Any, logps: Any, demos: Any) -> None:
        self.policy, self.rewards, self.logps, self.demos = policy, {"live": own, "guide": led}, logps, demos
        self.asked: list[tuple[str, list[str], Any]] = []
        self.w: dict[str, torch.Tensor] = {}
        self.watched: list[Row] = []  # what the live model says of them while w is fitted
        self.meanwhile: list[np.ndarray] = []

    def __call__(self, problems: Any, group: Any = None, at: str = "live", *, numbers: Any = None) -> list[Row]:
        self.asked.append((at, [p.id for p in problems], group))
        if at == "guide":
            self.w = numbers_of(self.policy, "w")
            self.meanwhile = self.policy.score(self.watched) if self.watched else []
        rng, rows = np.random.default_rng(len(self.asked)), []
        for p, number in zip(problems, range(len(problems)) if numbers is None else numbers, strict=True):
            for reward in self.rewards[at][p.id]:
                ids = rng.integers(0, VOCABULARY, 2 + int(rng.integers(1, 5)))
                verdict = Verdict.ERROR if reward is None else Verdict.CORRECT if reward else Verdict.WRONG
                value = math.nan if reward is None else float(reward)
                rows.append(Row(ids, np.arange(len(ids)) >= 2, "rollout", p, number, at, 0.8,  # type: ignore[arg-type]
                                reward=value, verdict=verdict))
        scored = self.policy.score(rows, at)
        if at == "guide" and self.logps is not None:
            scored = [self.logps * row.own for row in rows]
        return [replace(row, old_logps=logp) for row, logp in zip(rows, scored, strict=True)]

    def demo(self, p: Problem, demo: Demo) -> Row:
        ids = np.array([0, 6, *self.demos[demo.text]])
        return Row(ids, np.arange(len(ids)) >= 2, "demo", p, text=demo.text)


def opened(own: Any = OWN, led: Any = LED, logps: Any = None, demos: Any = DEMOS, **options: Any) -> Any:
    chosen = {"rank": 2, "alpha": 4.0, "fit_steps": FIT, "beta": BETA, **options}
    config = run_config({"name": "lspo", **chosen}, rollout={"prompts": 4, "group": 4}, optim=OPTIM)
    policy = Policy(build(), OptimConfig.model_validate(OPTIM), Ledger(1), micro_tokens=40, seed=5)
    spread(policy, "theta", 0.05, 0)
    method = Lspo(config.method, config)
    method.setup(policy)
    return SimpleNamespace(method=method, policy=policy, roll=FakeRoller(policy, own, led, logps, demos))


def gathered(made: Any) -> list[Row]:
    return made.method.gather(SimpleNamespace(problems=lambda n: [EASY, HARD, BARE, ODD][:n]), made.roll, 0)


def numbers_of(policy: Policy, group: str) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in policy.groups[group].flat().items()}


@torch.no_grad()
def put(policy: Policy, group: str, values: dict[str, torch.Tensor]) -> None:
    for n, t in policy.groups[group].flat().items():
        t.copy_(values[n])
    policy.load(policy.tensors())  # the merged weights are old


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


def test_fitted() -> None:
    """w, when it is sampled from, is where plain gradient descent on the hard prompts' demonstrations leads."""
    made = opened()
    w, policy = made.policy.groups["w"], made.policy
    start = numbers_of(policy, "w")
    demos = [made.roll.demo(HARD, d) for d in HARD.demos] + [made.roll.demo(ODD, ODD.demos[0])]
    for _ in range(2):  # the second step's w begins anew, whatever the first left
        gathered(made)
        put(policy, "w", start)
        for _ in range(FIT):
            params = w.flat()
            logps = all_logps(policy.model, merged(policy, "live"), demos)
            tokens = torch.cat([logp[torch.from_numpy(r.own)] for r, logp in zip(demos, logps, strict=True)])
            slopes = torch.autograd.grad(-tokens.mean(), list(params.values()))
            with torch.no_grad():
                for t, g in zip(params.values(), slopes, strict=True):
                    t -= BETA * g
        for n, t in w.flat().items():
            close(made.roll.w[n].numpy(), t.detach().numpy(), 1e-12, f"w after its fit: {n}")
        put(policy, "w", {n: torch.full_like(t, 0.7) for n, t in start.items()})
    assert made.method.measured["lspo/fit_last"] < made.method.measured["lspo/fit_first"]


def test_thrown_away() -> None:
    """After `gather` w is at its start, its Adam forgotten, and theta untouched; the live model has no w at all."""
    made = opened()
    made.policy.optimisers["w"].optimiser = torch.optim.Adam(made.policy.groups["w"].flat().values())
    w, theta = numbers_of(made.policy, "w"), numbers_of(made.policy, "theta")
    probe = made.roll([EASY])
    before, made.roll.watched = made.policy.score(probe), probe
    gathered(made)
    assert same(numbers_of(made.policy, "w"), w), "w is reset"
    assert not made.policy.optimisers["w"].optimiser.state
    assert same(numbers_of(made.policy, "theta"), theta), "theta did not move"
    assert not same(made.roll.w, w), "w was fitted in between"
    for found in (made.roll.meanwhile, made.policy.score(probe)):
        for a, b in zip(found, before, strict=True):
            close(a, b, 0.0, "what is evaluated and saved")


def test_only_the_hard_ones() -> None:
    made = opened()
    rows = gathered(made)
    assert made.roll.asked == [("live", ["easy", "hard", "bare", "odd"], None), ("guide", ["hard", "odd"], None)]
    spliced = [row for row in rows if row.at == "guide"]
    assert [(row.problem.id, row.group, row.reward) for row in spliced] == [("hard", 1, 1.0)] * 2 + [("odd", 3, 1.0)]
    found = made.method.measured
    assert [found[f"lspo/{name}"] for name in ("hard", "rescued", "spliced")] == [2, 2, 3]
    made = opened(retries=6, own={**OWN, "hard": [None] * 4})
    gathered(made)
    assert made.roll.asked[1] == ("guide", ["odd"], 6), "nothing graded, nothing known"


@pytest.mark.parametrize(("kind", "cap"), [("token", 1.2), ("token", 1e9), ("sequence", 0.9), ("sequence", 1e9)])
def test_spliced(kind: str, cap: float) -> None:
    """Advantages over the enlarged group; tokens of theta + w weigh min(ratio, cap), of the token or the answer."""
    made = opened(ratio=kind, ratio_cap=cap, beta=3.0)
    rows, bound = gathered(made), 0
    theta, kept = made.policy.score(rows), numbers_of(made.policy, "w")
    put(made.policy, "w", made.roll.w)
    led = made.policy.score(rows, "guide")  # what theta + w gave them when it was sampled
    put(made.policy, "w", kept)
    for row, logp, by_w in zip(rows, theta, led, strict=True):
        if row.verdict is Verdict.ERROR:
            assert not row.streams
            continue
        rewards = [r.reward for r in rows if r.group == row.group and r.verdict is not Verdict.ERROR]
        v = np.ones(len(row.ids))
        if row.at == "guide":
            log_ratio = (logp - by_w)[row.own]
            v[row.own] = [min(math.exp(log_ratio.sum() if kind == "sequence" else x), cap) for x in log_ratio]
            bound += int((v == cap).sum())
            close(row.old_logps, logp, 1e-12, "rho begins at 1")
        stream = row.streams["pg"]
        close(stream.weight[row.own], ((row.reward - sum(rewards) / len(rewards)) * v)[row.own], 1e-12, row.at)
        assert (stream.mask == row.own).all()
    assert bool(bound) == (cap < 2), "the cap binds, or it does not"


def test_no_demonstration_reaches_theta() -> None:
    """With the answers given, other demonstrations change nothing in theta's step, to the bit; and that step is the
    gradient of the drawn tokens alone."""
    steps = []
    for demos in (DEMOS, {"x": (4,), "y": (11, 3, 2), "z": (0, 0, 1, 1)}):
        made, seen = opened(logps=-1.5, demos=demos), []
        apply, before = made.policy.apply, numbers_of(made.policy, "theta")

        def spy(name: str, gradient: Any, seen: Any = seen, apply: Any = apply) -> float:
            seen.append((name, {n: g.clone() for n, g in gradient.items()}))
            return apply(name, gradient)

        made.policy.apply = spy
        rows = gathered(made)
        assert all(row.kind == "rollout" for row in rows), "no demonstration is in theta's batch"
        assert same(numbers_of(made.policy, "theta"), before)
        made.method.update(made.policy, make_batch(rows), 0)
        assert [name for name, _ in seen] == ["w"] * FIT + ["theta"]
        put(made.policy, "theta", before)
        assert same(seen[-1][1], made.policy.grad(made.method.terms, make_batch(rows), {"pg": 1.0}).theta)
        steps.append(seen[-1][1])
    assert same(*steps)


@pytest.mark.parametrize(("own", "calls"), [(1, 1), (0, 2)])
def test_flat_groups(own: int, calls: int) -> None:
    """All pass: w is not even fitted. All fail, w's answers too: it was fitted in vain, and theta stays."""
    made = opened({name: [own] * 4 for name in OWN}, {name: [0] * 4 for name in OWN})
    rows = gathered(made)
    assert len(made.roll.asked) == calls and len(rows) == 16
    found = made.policy.grad(made.method.terms, make_batch(rows), {"pg": 1.0}).theta
    assert not any(g.any() for g in found.values())


MUTANTS = mutants(
    lspo,
    Mutant("drop", "Lspo.gather", "reset 1", by=test_thrown_away),
    Mutant("drop", "Lspo.fit", "reset", by=test_fitted),
    Mutant("drop", "Lspo.fit", "apply 1", by=test_no_demonstration_reaches_theta),
    Mutant("mask", "Lspo.gather", "CORRECT", by=test_only_the_hard_ones),
    Mutant("mask", "failed", "ERROR", by=test_only_the_hard_ones),
    Mutant("swap", "Lspo.weighted", "old_logps 1", by=partial(test_spliced, "token", 1e9)),
    Mutant("clip", "Lspo.weighted", "minimum 1", by=partial(test_spliced, "token", 1.2)),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()


def test_refill_is_refused() -> None:
    with pytest.raises(UserError, match="refill"):
        run_config({"name": "lspo"}, rollout={"refill": 1})
