"""LSPO on a real transformer: w's brief fit by hand, the spliced groups in plain loops, and that no demonstration's
gradient reaches theta; and mutants."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checks import close
from exact import run_config
from mutants import Swaps, mutate
from transformer import VOCABULARY, all_logps, build, merged, spread, wide_norm

from bridgelm.config.run_config import OptimConfig
from bridgelm.errors import UserError
from bridgelm.ledger import Ledger
from bridgelm.methods import lspo as lspo_module
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
Rewards = dict[str, list[Any]]
OWN: Rewards = {"easy": [1, 0, 0, 1], "hard": [0, 0, 0, 0], "bare": [0, 0, 0, 0], "odd": [0, None, 0, None]}
LED: Rewards = {"hard": [0, 1, 1, 0], "odd": [None, 1, 0, 0]}


class FakeRoller:
    """Hands out answers, scored by whoever is asked; keeps w as it is when it is sampled."""

    def __init__(self, policy: Policy, own: Any, led: Any, logps: Any = None, demos: Any = None) -> None:
        self.policy, self.rewards = policy, {"live": own, "guide": led}
        self.logps, self.demos = logps, demos or DEMOS
        self.asked: list[tuple[str, list[str], Any]] = []
        self.w: dict[str, torch.Tensor] = {}
        self.watched: list[Row] = []  # what the live model says of them while w is fitted
        self.meanwhile: list[np.ndarray] = []

    def __call__(self, problems: Any, group: Any = None, at: str = "live", *, numbers: Any = None) -> list[Row]:
        self.asked.append((at, [p.id for p in problems], group))
        if at == "guide":
            self.w = {n: t.detach().clone() for n, t in self.policy.groups["w"].flat().items()}
            self.meanwhile = self.policy.score(self.watched) if self.watched else []
        rng, rows = np.random.default_rng(len(self.asked)), []
        for p, number in zip(problems, range(len(problems)) if numbers is None else numbers, strict=True):
            for reward in self.rewards[at][p.id]:
                ids = rng.integers(0, VOCABULARY, 2 + int(rng.integers(1, 5)))
                verdict = Verdict.ERROR if reward is None else Verdict.CORRECT if reward else Verdict.WRONG
                value = math.nan if reward is None else float(reward)
                row = Row(ids, np.arange(len(ids)) >= 2, "rollout", p, number, at, 0.8, reward=value, verdict=verdict)
                rows.append(row)
        scored = self.policy.score(rows, at)
        if at == "guide" and self.logps is not None:
            scored = [self.logps * row.own for row in rows]
        return [replace(row, old_logps=logp) for row, logp in zip(rows, scored, strict=True)]

    def demo(self, p: Problem, demo: Demo) -> Row:
        ids = np.array([0, 6, *self.demos[demo.text]])
        return Row(ids, np.arange(len(ids)) >= 2, "demo", p, text=demo.text)


def opened(module: ModuleType, own: Any = None, led: Any = None, logps: Any = None, demos: Any = None, **options: Any):
    chosen = {"rank": 2, "alpha": 4.0, "fit_steps": FIT, "beta": BETA, **options}
    config = run_config({"name": "lspo", **chosen}, rollout={"prompts": 4, "group": 4}, optim=OPTIM)
    policy = Policy(build(), OptimConfig.model_validate(OPTIM), Ledger(1), micro_tokens=40, seed=5)
    spread(policy, "theta", 0.05, 0)
    method = module.Lspo(config.method, config)
    method.setup(policy)
    problems = [EASY, HARD, BARE, ODD]
    data = SimpleNamespace(problems=lambda n: problems[:n])
    return SimpleNamespace(method=method, policy=policy, roll=FakeRoller(policy, own or OWN, led or LED, logps, demos),
                           data=data)  # fmt: skip


def gathered(made: Any) -> list[Row]:
    return made.method.gather(made.data, made.roll, 0)


def numbers(policy: Policy, group: str) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in policy.groups[group].flat().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


# -- the checks --------------------------------------------------------------------------------------------------------


def fitted(module: ModuleType) -> None:
    """w, when it is sampled from, is where plain gradient descent on the hard prompts' demonstrations leads."""
    made = opened(module)
    w, policy = made.policy.groups["w"], made.policy
    start = numbers(policy, "w")
    demos = [made.roll.demo(HARD, d) for d in HARD.demos] + [made.roll.demo(ODD, ODD.demos[0])]
    for _ in range(2):  # the second step's w begins anew, whatever the first left
        gathered(made)
        found = made.roll.w
        with torch.no_grad():
            for n, t in w.flat().items():
                t.copy_(start[n])
        for _ in range(FIT):
            params = w.flat()
            logps = all_logps(policy.model, merged(policy, "live"), demos)
            tokens = torch.cat([logp[torch.from_numpy(r.own)] for r, logp in zip(demos, logps, strict=True)])
            slopes = torch.autograd.grad(-tokens.mean(), list(params.values()))
            with torch.no_grad():
                for t, g in zip(params.values(), slopes, strict=True):
                    t -= BETA * g
        for n, t in w.flat().items():
            close(found[n].numpy(), t.detach().numpy(), 1e-12, f"w after its fit: {n}")
        with torch.no_grad():  # a w that was left somewhere must not matter
            for t in w.flat().values():
                t.fill_(0.7)
    assert made.method.measured["lspo/fit_last"] < made.method.measured["lspo/fit_first"]


def thrown_away(module: ModuleType) -> None:
    """After `gather` w is at its start, its Adam forgotten, and theta untouched; the live model has no w at all."""
    made = opened(module)
    made.policy.optimisers["w"].optimiser = torch.optim.Adam(made.policy.groups["w"].flat().values())
    w, theta = numbers(made.policy, "w"), numbers(made.policy, "theta")
    probe = made.roll([EASY])
    before, made.roll.watched = made.policy.score(probe), probe
    gathered(made)
    assert same(numbers(made.policy, "w"), w), "w is reset"
    assert not made.policy.optimisers["w"].optimiser.state
    assert same(numbers(made.policy, "theta"), theta), "theta did not move"
    assert any((g != w[n]).any() for n, g in made.roll.w.items()), "w was fitted in between"
    for found in (made.roll.meanwhile, made.policy.score(probe)):
        for a, b in zip(found, before, strict=True):
            close(a, b, 0.0, "what is evaluated and saved")


def only_the_hard_ones(module: ModuleType) -> None:
    made = opened(module)
    rows = gathered(made)
    assert made.roll.asked == [("live", ["easy", "hard", "bare", "odd"], None), ("guide", ["hard", "odd"], None)]
    spliced = [row for row in rows if row.at == "guide"]
    assert [(row.problem.id, row.group, row.reward) for row in spliced] == [("hard", 1, 1.0)] * 2 + [("odd", 3, 1.0)]
    found = made.method.measured
    assert [found[f"lspo/{name}"] for name in ("hard", "rescued", "spliced")] == [2, 2, 3]
    made = opened(module, retries=6, own={**OWN, "hard": [None] * 4})
    gathered(made)
    assert made.roll.asked[1] == ("guide", ["odd"], 6), "nothing graded, nothing known"


def spliced(module: ModuleType) -> None:
    """Advantages over the enlarged group; tokens of theta + w weigh min(ratio, cap), of the token or the answer."""
    caps = {"token": (1.2, 1e9), "sequence": (0.9, 1e9)}
    for kind, of_kind in caps.items():
        for cap in of_kind:
            made = opened(module, ratio=kind, ratio_cap=cap, beta=3.0)
            rows = gathered(made)
            bound = 0
            theta = made.policy.score(rows)
            for row, logp in zip(rows, theta, strict=True):
                group = [r for r in rows if r.group == row.group and r.verdict is not Verdict.ERROR]
                if row.verdict is Verdict.ERROR:
                    assert not row.streams
                    continue
                rewards = [r.reward for r in group]
                advantage = row.reward - sum(rewards) / len(rewards)
                v = np.ones(len(row.ids))
                if row.at == "guide":
                    led = led_logps(made, row)
                    log_ratio = [logp[t] - led[t] for t in range(len(row.ids)) if row.own[t]]
                    for t, x in zip(np.flatnonzero(row.own), log_ratio, strict=True):
                        v[t] = min(math.exp(sum(log_ratio) if kind == "sequence" else x), cap)
                        bound += v[t] == cap
                    close(row.old_logps, logp, 1e-12, "rho begins at 1")  # type: ignore[arg-type]
                stream = row.streams["pg"]
                close(stream.weight[row.own], (advantage * v)[row.own], 1e-12, f"{row.at}, {kind}, {cap}")
                assert (stream.mask == row.own).all()
            assert bool(bound) == (cap < 2), "the cap binds, or it does not"


def led_logps(made: Any, row: Row) -> np.ndarray:
    """What theta + w gave the row, with w as it was when it was sampled."""
    w = made.policy.groups["w"].flat()
    kept = {n: t.detach().clone() for n, t in w.items()}
    with torch.no_grad():
        for n, t in w.items():
            t.copy_(made.roll.w[n])
        logp = made.policy.score([row], "guide")[0]
        for n, t in w.items():
            t.copy_(kept[n])
    return logp


def no_demonstration_reaches_theta(module: ModuleType) -> None:
    """With the answers given, other demonstrations change nothing in theta's step, to the bit; and that step is the
    gradient of the drawn tokens alone."""
    steps = []
    for demos in (DEMOS, {"x": (4,), "y": (11, 3, 2), "z": (0, 0, 1, 1)}):
        made = opened(module, logps=-1.5, demos=demos)
        seen: list[Any] = []
        apply, grad = made.policy.apply, made.policy.grad
        before = numbers(made.policy, "theta")

        def spy(name: str, gradient: Any, made: Any = made, seen: Any = seen, apply: Any = apply) -> float:
            seen.append((name, {n: g.clone() for n, g in gradient.items()}))
            return apply(name, gradient)

        made.policy.apply = spy
        rows = gathered(made)
        assert all(row.kind == "rollout" for row in rows), "no demonstration is in theta's batch"
        assert same(numbers(made.policy, "theta"), before)
        made.method.update(made.policy, make_batch(rows), 0)
        assert [name for name, _ in seen] == ["w"] * FIT + ["theta"]
        made.policy.groups["theta"].flat()
        with torch.no_grad():
            for n, t in made.policy.groups["theta"].flat().items():
                t.copy_(before[n])
        made.policy._stale = True
        wanted = grad(made.method.terms, make_batch(rows), {"pg": 1.0}).theta
        assert same(seen[-1][1], wanted)
        steps.append(seen[-1][1])
    assert same(*steps)


def flat_groups(module: ModuleType) -> None:
    """All pass: w is not even fitted. All fail, w's answers too: it was fitted in vain, and theta stays."""
    for own, calls in ((1, 1), (0, 2)):
        made = opened(module, {name: [own] * 4 for name in OWN}, {name: [0] * 4 for name in OWN})
        rows = gathered(made)
        assert len(made.roll.asked) == calls
        assert len(rows) == 16
        found = made.policy.grad(made.method.terms, make_batch(rows), {"pg": 1.0}).theta
        assert not any(g.any() for g in found.values())


CHECKS: dict[str, Callable[[ModuleType], None]] = {
    f.__name__: f
    for f in (fitted, thrown_away, only_the_hard_ones, spliced, no_demonstration_reaches_theta, flat_groups)
}

RESET = "            self.reset(roll.policy)\n            rescued"
MUTANTS: dict[str, tuple[Swaps, str]] = {
    "theta_reads_demonstrations": ((('policy.apply("w", found.w)', 'policy.apply("theta", found.theta)'),),
                                   "no_demonstration_reaches_theta"),
    "theta_reads_them_too": ((('policy.apply("w", found.w)',
                               'policy.apply("w", found.w); policy.apply("theta", found.theta)'),), "thrown_away"),
    "demonstrations_in_the_batch": ((("        return rows\n", "        return [*rows, roll.demo(problems[0], "
                                      'problems[0].demos[0]).with_stream("pg", 1.0)]\n'),),
                                    "no_demonstration_reaches_theta"),
    "w_is_shipped": (((", removable=True)", ")"),), "thrown_away"),
    "w_is_kept": (((RESET, "            rescued"),), "thrown_away"),
    "w_goes_on": ((("        self.reset(policy)\n", ""),), "fitted"),
    "moments_are_kept": ((('policy.optimisers["w"].optimiser.state.clear()', "pass"),), "thrown_away"),
    "one_step_less": ((("range(self.options.fit_steps)", "range(self.options.fit_steps - 1)"),), "fitted"),
    "first_demonstration_only": ((("for demo in p.demos]", "for demo in p.demos[:1]]"),), "fitted"),
    "failures_join": ((("if row.verdict is Verdict.CORRECT]", "]"),), "only_the_hard_ones"),
    "groups_of_their_own": (((", numbers=list(hard))", ")"),), "only_the_hard_ones"),
    "ungraded_are_hard": ((("for row in rows if row.verdict is not Verdict.ERROR]", "for row in rows]"),),
                          "only_the_hard_ones"),
    "no_ratio": ((("weight=stream.weight * ratio)", "weight=stream.weight)"),), "spliced"),
    "ratio_upside_down": ((("theta - row.old_logps, 0.0", "row.old_logps - theta, 0.0"),), "spliced"),
    "no_cap": ((("np.exp(np.minimum(log_ratio, np.log(self.options.ratio_cap)))", "np.exp(log_ratio)"),), "spliced"),
    "clipped_round_w": ((("replace(row, old_logps=theta, streams", "replace(row, streams"),), "spliced"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_the_shipped_method(name: str) -> None:
    CHECKS[name](lspo_module)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_seen(name: str) -> None:
    swaps, check = MUTANTS[name]
    with pytest.raises(AssertionError):
        CHECKS[check](mutate(lspo_module, swaps, name))


def test_refill_is_refused() -> None:
    with pytest.raises(UserError, match="refill"):
        run_config({"name": "lspo"}, rollout={"refill": 1})
