"""`uft`: the schedule and the distribution of hints against enumeration, the loss against loops; and mutants."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from bigram import V, World, ids_of, method_of, problem, reply, reward, slope
from mutation import Mutant, mutants

from bridgelm.errors import UserError
from bridgelm.methods import uft
from bridgelm.methods.grpo import Grpo

PROBLEMS = [problem("five", "1 1", "1 2 3 4 5"), problem("ten", "1 2", "1 2 3 4 5 5 4 3 2 1"),
            problem("two", "2 1", "3 5"), problem("bare", "2 2")]


def world(problems: Any = PROBLEMS, steps: int = 10, rollout: Any = (),
          judge: Any = reward, **options: Any) -> World:
    method = method_of(uft.Uft, {"name": "uft", **options}, prompts=len(problems), steps=steps,
                       **{"max_new_tokens": 16, **dict(rollout)})
    return World(method, problems, reply, judge)


def test_schedule() -> None:
    uft = world(steps=500).method
    wanted = {0: 0.95, 75: 0.05 + 0.45 * (1 + math.sqrt(0.5)), 100: 0.725, 150: 0.5, 200: 0.275,
              299: 0.05 + 0.45 * (1 + math.cos(math.pi * 299 / 300)), 300: 0.0, 499: 0.0}
    for step, p in wanted.items():
        assert uft.chance(step) == pytest.approx(p, abs=1e-12), step
    short = world(steps=10, until=0.4, high=0.8, low=0.2).method  # scaled to the run
    assert [short.chance(step) for step in range(10)] == pytest.approx(
        [0.8, 0.5 + 0.3 * math.sqrt(0.5), 0.5, 0.5 - 0.3 * math.sqrt(0.5), *[0.0] * 6])


def test_distribution() -> None:
    """Each of the 2^5 ways to show pieces has its probability; Pearson's statistic at 1 in 10,000."""
    made, n = world(), 2000
    for p in (0.95, 0.5, 0.2):
        exact = Counter[int]()
        for shown in itertools.product((0, 1), repeat=5):
            exact[sum(shown)] += math.prod(p if one else 1 - p for one in shown)  # type: ignore[assignment]
        for k, q in exact.items():
            assert q == pytest.approx(math.comb(5, k) * p**k * (1 - p) ** (5 - k))
        for which, size in ((0, 1), (1, 2)):  # five pieces of one token, five of two
            found = Counter(len(made.method.hint(made.roll, PROBLEMS[which], p, i % 50, i // 50)) for i in range(n))
            assert set(found) <= {size * k for k in range(6)}
            expected = {k: n * q for k, q in exact.items() if n * q >= 5}
            statistic = sum((found[size * k] - e) ** 2 / e for k, e in expected.items())
            assert statistic < 27, (p, found)  # chi^2 of 5 degrees of freedom: 25.7 at 1e-4
    two = Counter(len(made.method.hint(made.roll, PROBLEMS[2], 0.5, 0, i)) for i in range(n))  # fewer pieces than five
    assert sum((two[k] - n * q) ** 2 / (n * q) for k, q in ((0, 0.25), (1, 0.5), (2, 0.25))) < 20
    for kept in (0, 1):  # draws of two places, and of two steps, have nothing to do with each other
        pairs = np.array([[len(made.method.hint(made.roll, PROBLEMS[0], 0.5, *place)) for place in (
            (i, 0), ((i + 1, 0), (i, 1))[kept])] for i in range(600)])
        assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.15


def test_loss() -> None:
    """Advantages on what was drawn, .001 of the mean log-likelihood on hints, one hint a problem."""
    for weight, std in ((0.001, False), (0.7, True)):
        made = world(hint=weight, rl={"std": std}, rollout={"temperature": 0.8})
        found = made.step(2)
        (asked,) = made.calls
        shown = {name: {prefix for who, prefix in asked if who == name} for name, _ in asked}
        assert all(len(prefixes) == 1 for prefixes in shown.values()), "one hint for all rollouts of a problem"
        hint = {name: next(iter(prefixes)) for name, prefixes in shown.items()}
        assert hint["bare"] == () and sum(map(len, hint.values())) > 6
        for p in PROBLEMS[:3]:
            assert list(hint[p.id]) == ids_of(p.demos[0].text)[:len(hint[p.id])]
        pg, nll, drawn, given = np.zeros((V, V)), np.zeros((V, V)), 0, 0
        for p in PROBLEMS:
            rows = [row for row in found.rows if row.problem is p]
            start = len(ids_of(p.prompt)) + len(hint[p.id])
            assert [tuple(row.ids[start:]) for row in rows] == [reply(p.id, hint[p.id], i) for i in range(4)]
            rewards = [reward(p.id, tuple(row.ids[len(ids_of(p.prompt)):])) for row in rows]
            mean = sum(rewards) / 4
            deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 4) + 1e-6 if std else 1.0
            for row, r in zip(rows, rewards):
                for t in range(len(ids_of(p.prompt)), len(row.ids)):
                    if t < start:
                        nll, given = nll + slope(made.policy.theta, row, t), given + 1
                    else:
                        pg += (r - mean) / deviation * slope(made.policy.theta, row, t)
                        drawn += 1
        wanted = pg / drawn + weight * nll / given
        assert np.allclose(found.applied[0][1], wanted, rtol=0, atol=1e-13) and np.abs(pg).max() > 0.1
        assert found.metrics["uft/hint"] == sum(map(len, hint.values())) / 4
        rewards = [reward("", tuple(row.ids[2:])) for row in found.rows if not hint[row.problem.id]]
        assert found.metrics["uft/alone"] == pytest.approx(np.mean(rewards))
    assert made.policy.ledger.rollouts == 16


def test_hints_end() -> None:
    """After the schedule, and at no chance at all, it is grpo."""
    for step, options in ((6, {}), (9, {}), (0, {"high": 0.0, "low": 0.0})):
        one, two = world(**options).step(step), plain(step)
        assert (one.applied[0][1] == two.applied[0][1]).all() and np.abs(two.applied[0][1]).max() > 1e-3
        assert not any(row.given for row in one.rows) and one.metrics["uft/hint"] == 0
    assert any(row.given for row in world().step(5).rows)


def plain(step: int) -> Any:
    made = World(method_of(Grpo, {"name": "grpo"}, prompts=4, max_new_tokens=16), PROBLEMS, reply, reward)
    return made.step(step)


def test_flat() -> None:
    """All pass or all fail: the hints' likelihood alone."""
    for constant in (0.0, 1.0):
        made = world(judge=lambda *_, c=constant: c)
        found = made.step(1)
        total, tokens = np.zeros((V, V)), 0
        for row in found.rows:
            for t in range(2, 2 + row.given):
                total, tokens = total + slope(made.policy.theta, row, t), tokens + 1
        assert np.allclose(found.applied[0][1], 0.001 * total / tokens, rtol=0, atol=1e-16) and tokens > 8
        assert found.metrics["loss/pg"] == 0


def test_room() -> None:
    """A hint as long as an answer may be leaves room for one token; the end token is in none."""
    made = world(PROBLEMS[1:2], high=1.0, rollout={"max_new_tokens": 6})
    found = made.step(0)
    assert {row.given for row in found.rows} == {5} and {len(row.ids) for row in found.rows} == {2 + 6}
    whole = world(PROBLEMS[1:2], high=1.0).step(0)
    assert {row.given for row in whole.rows} == {10}


def test_reference() -> None:
    made = world(rl={"kl_coef": 0.1})
    found = made.step(1)
    for row in found.rows:
        assert (row.streams["kl"].mask == row.drawn).all() and (row.streams["kl"].weight == 1).all()
    assert found.metrics["loss/kl"] == pytest.approx(0)


MUTANTS = mutants(
    uft,
    Mutant("sign", "Uft.chance", "cos 1", by=test_schedule),
    Mutant("compare", "Uft.chance", 0, by=test_schedule),  # it ends a step late
    Mutant("term", "Uft.chance", "until 1", by=test_schedule),
    Mutant("compare", "Uft.hint", 3, by=test_distribution),
    Mutant("term", "Uft.hint", "max_new_tokens 0", by=test_room),
    Mutant("mask", "Uft.gather", "with_stream", by=test_loss),  # likelihood of all tokens
    Mutant("compare", "Uft.gather", "given", by=test_loss),
    Mutant("constant", "Uft.update", "hint 1", to=1.0, by=test_flat),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match=r"rollout\.refill"):
        world(rollout={"refill": 1})
    with pytest.raises(UserError, match="swap"):
        world(low=0.9, high=0.1)
    assert uft.Uft.needs == {"paired_demos"}
