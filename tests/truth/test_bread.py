"""`bread`: the search against an exhaustive one, what it costs, and the loss against loops; and mutants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from bigram import END, Answer, V, World, ids_of, method_of, problem, slope
from mutation import Mutant, mutants

from bridgelm.errors import UserError
from bridgelm.methods import bread
from bridgelm.methods.grpo import Grpo

TEN = "1 2 3 4 1 2 3 4 1 2"  # ten episodes of one token
TWENTY = " ".join([TEN, TEN])
SOLVED = problem("solved", "1 1", TEN)


def world(problems: Any = (), rates: Any = (), rollout: Any = (), group: int = 8,
          judge: Any = None, **options: Any) -> World:
    """`rates[name]` says how many of a group are right (a 5 in them), given so many tokens of the demonstration."""
    table: dict[str, Callable[[int], int]] = dict(rates)

    def reply(name: str, prefix: Answer, i: int) -> Answer:
        right = table[name](len(prefix)) if name in table else 3
        return (4, 5, END) if i % group < right else (4, *[1] * (i % 3), END)

    def reward(_: str, answer: Answer) -> float:
        return float(5 in answer)

    method = method_of(bread.Bread, {"name": "bread", **options}, prompts=len(problems), group=group,
                       **{"max_new_tokens": 32, "temperature": 0.8, **dict(rollout)})
    return World(method, problems, reply, judge or reward)


def used(found: Any) -> dict[str, int]:
    """Tokens of the prefix that each failed problem's further group went on from."""
    return {row.problem.id: row.given for row in found.rows if row.given}


def test_search() -> None:
    """Against trying every number of episodes, for every place at which a monotone rate enters and leaves the range."""
    for start in range(1, 12):
        for end in range(start, 12):
            name = f"{start} {end}"
            made = world([problem(name, "1 2", TWENTY)], {name: lambda tokens, s=start, e=end: (
                0 if tokens < 2 * s else 4 if tokens < 2 * e else 8)})
            found = made.step()
            exhaustive = next((2 * k for k in range(1, 10) if start <= k < end), None)
            wide = end - start >= 1 and exhaustive is not None
            assert used(found) == ({name: exhaustive} if wide else {}), name
            # Ten places, so that four groups are enough whatever they say; the whole demonstration is not tried.
            tried = [prefix for call in made.calls[1:] for _, prefix in call]
            assert len(made.calls) == 5 and len(tried) == 8 * len(set(tried)) <= 32
            assert all(list(prefix) == ids_of(TWENTY)[:len(prefix)] and 0 < len(prefix) < 20 for prefix in tried)
            assert made.policy.ledger.rollouts == 8 + len(tried)
            assert found.metrics["bread/extra"] == len(tried) and found.metrics["bread/failed"] == 1
            assert found.metrics["bread/rescued"] == float(wide)
            assert found.metrics.get("bread/prefix") == (exhaustive / 20 if wide and exhaustive else None)


def test_target() -> None:
    """Rates at the ends of the range are in it."""
    for low, high, wanted in ((0.1, 0.9, 1), (0.5, 0.75, 4), (0.5, 0.5, 4), (0.51, 0.75, 5), (0.95, 1.0, 8)):
        made = world([problem("ramp", "1 2", TEN)], {"ramp": lambda tokens: min(8, tokens)}, low=low,
                     high=high)  # k of 8 right after k tokens
        assert used(made.step()) == {"ramp": wanted}, (low, high)


def test_calls() -> None:
    """Every step has the same number of calls, whatever fails: ranks stay together."""
    for problems, rates in (([SOLVED], {}), ([problem("bare", "1 2")], {"bare": lambda _: 0}),
                            ([problem("never", "1 2", TEN), SOLVED], {"never": lambda _: 0}),
                            ([problem("short", "1 2", "1 2")], {"short": lambda tokens: 4 * (tokens > 0)})):
        for reuse, count in ((True, 5), (False, 6)):
            made = world(problems, rates, reuse=reuse)
            found = made.step()
            assert len(made.calls) == count
            assert used(found) == ({"short": 1} if "short" in rates else {})
    made = world([SOLVED], episodes=3)
    made.step()
    assert [len(call) for call in made.calls] == [8, 0, 0]


def test_loss() -> None:
    """GRPO on all groups; the prefix is context. The failed group's tokens count, with advantage 0."""
    problems = [problem("fails", "1 2", TWENTY), SOLVED, problem("never", "2 1", TEN), problem("bare", "2 2")]
    rates = {"fails": lambda tokens: 0 if tokens < 6 else 3, "never": lambda _: 0, "bare": lambda _: 0}
    for reuse in (True, False):
        made = world(problems, rates, reuse=reuse)
        found = made.step()
        led = [row for row in found.rows if row.given]
        assert {row.given for row in led} == {6} and len(led) == 8 and len(found.rows) == 40
        assert len({row.group for row in led}) == 1 and len({row.group for row in found.rows}) == 5
        total, tokens = np.zeros((V, V)), 0
        for row in found.rows:
            group = [other for other in found.rows if other.group == row.group]
            advantage = row.reward - sum(other.reward for other in group) / 8
            for t in range(2 + row.given, len(row.ids)):
                total, tokens = total + advantage * slope(made.policy.theta, row, t), tokens + 1
        assert np.allclose(found.applied[0][1], total / tokens, rtol=0, atol=1e-14) and np.abs(total).max() > 0.1
        tried = Counter(prefix for call in made.calls[1:] for name, prefix in call if name == "fails")
        assert tried[tuple(ids_of(TWENTY)[:6])] == (8 if reuse else 16)
        assert found.metrics["bread/failed"] == 0.75 and found.metrics["bread/rescued"] == pytest.approx(1 / 3)


def test_limits() -> None:
    """No group fails, or none can be helped: grpo; all pass or all fail: nothing."""
    problems = [SOLVED, problem("never", "1 2", TEN)]
    rates = {"never": lambda _: 0}
    made = world(problems, rates)
    grpo = World(method_of(Grpo, {"name": "grpo"}, group=8, max_new_tokens=32, temperature=0.8), problems, made.reply,
                 made.reward)
    one, two = made.step(), grpo.step()
    assert (one.applied[0][1] == two.applied[0][1]).all() and np.abs(two.applied[0][1]).max() > 0.01
    for right in (0, 8):
        found = world(problems[1:], {"never": lambda _, n=right: n}).step()
        assert not found.applied[0][1].any()
    assert found.metrics["bread/failed"] == 0 and found.metrics["bread/extra"] == 0


def test_grades() -> None:
    """A failure is a group without a correct answer, whatever the rewards; what was not graded is no failure of it."""
    half = world([problem("half", "1 2", TEN)], judge=lambda *_: 0.25).step()
    assert half.metrics["bread/failed"] == 1
    broken = world([problem("broken", "1 2", TEN)], judge=lambda *_: None)
    found = broken.step()
    assert found.metrics["bread/failed"] == 0 and found.metrics["bread/extra"] == 0

    def no_grade_from_prefixes(_: str, answer: Answer) -> float | None:
        return None if answer[0] == 1 else 0.0
    broken = world([problem("led", "1 2", TEN)], judge=no_grade_from_prefixes)
    assert used(broken.step()) == {} and len(broken.calls) == 5


def test_room() -> None:
    """A prefix leaves room for an answer: of twenty tokens with ten in the limit, at most nine, whatever is found."""
    made = world([problem("late", "1 2", TWENTY)], {"late": lambda tokens: 4 if tokens >= 8 else 0},
                 rollout={"max_new_tokens": 10})
    found = made.step()
    assert used(found) == {"late": 8}
    never = world([problem("never", "1 2", TWENTY)], {"never": lambda tokens: 0}, rollout={"max_new_tokens": 10})
    never.step()
    assert max(len(prefix) for tried in (made, never) for call in tried.calls for _, prefix in call) == 8
    assert all(len(row.ids) <= 12 for row in found.rows)


MUTANTS = mutants(
    bread,
    Mutant("compare", "Bread.halve", "low 0", by=test_target),
    Mutant("compare", "Bread.halve", "high 0", by=test_target),
    Mutant("branch", "Bread.halve", "high 0", by=test_search),  # a rate above the range is used
    Mutant("term", "Search.episodes", 1, by=test_search),
    Mutant("term", "Search.prefix", "episodes 0", by=test_search),
    Mutant("mask", "Bread.gather", "rate", by=test_limits),  # all groups are searched
    Mutant("mask", "Bread.gather", "going", by=test_search),
    Mutant("branch", "Bread.gather", "reuse 0", by=test_calls),
    Mutant("term", "Bread.gather", "found 0", by=test_loss),
    Mutant("compare", "Bread.search", 1, by=test_room),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match=r"rollout\.refill"):
        world(problems=[SOLVED], rollout={"refill": 1})
    with pytest.raises(UserError, match="swap"):
        world(problems=[SOLVED], low=0.9, high=0.1)
    assert bread.Bread.needs == {"paired_demos"}
