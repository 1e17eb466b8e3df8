"""`bread`: the search against an exhaustive one, what it costs, and the loss against loops; and mutants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from bigram import END, Answer, V, World, ids_of, method_of, problem, slope
from mutants import Swaps, mutate

from bridgelm.errors import UserError
from bridgelm.methods import bread as bread_module
from bridgelm.methods.grpo import Grpo

TEN = "1 2 3 4 1 2 3 4 1 2"  # ten episodes of one token
TWENTY = " ".join([TEN, TEN])
SOLVED = problem("solved", "1 1", TEN)


def world(module: Any = bread_module, problems: Any = (), rates: Any = (), rollout: Any = (), group: int = 8,
          judge: Any = None, **options: Any) -> World:
    """`rates[name]` says how many of a group are right (a 5 in them), given so many tokens of the demonstration."""
    table: dict[str, Callable[[int], int]] = dict(rates)

    def reply(name: str, prefix: Answer, i: int) -> Answer:
        right = table[name](len(prefix)) if name in table else 3
        return (4, 5, END) if i % group < right else (4, *[1] * (i % 3), END)

    def reward(_: str, answer: Answer) -> float:
        return float(5 in answer)

    method = method_of(module.Bread, {"name": "bread", **options}, prompts=len(problems), group=group,
                       **{"max_new_tokens": 32, "temperature": 0.8, **dict(rollout)})
    return World(method, problems, reply, judge or reward)


def used(found: Any) -> dict[str, int]:
    """Tokens of the prefix that each failed problem's further group went on from."""
    return {row.problem.id: row.given for row in found.rows if row.given}


def search(module: ModuleType) -> None:
    """Against trying every number of episodes, for every place at which a monotone rate enters and leaves the range."""
    for start in range(1, 12):
        for end in range(start, 12):
            name = f"{start} {end}"
            made = world(module, [problem(name, "1 2", TWENTY)], {name: lambda tokens, s=start, e=end: (
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


def target(module: ModuleType) -> None:
    """Rates at the ends of the range are in it."""
    for low, high, wanted in ((0.1, 0.9, 1), (0.5, 0.75, 4), (0.5, 0.5, 4), (0.51, 0.75, 5), (0.95, 1.0, 8)):
        made = world(module, [problem("ramp", "1 2", TEN)], {"ramp": lambda tokens: min(8, tokens)}, low=low,
                     high=high)  # k of 8 right after k tokens
        assert used(made.step()) == {"ramp": wanted}, (low, high)


def calls(module: ModuleType) -> None:
    """Every step has the same number of calls, whatever fails: ranks stay together."""
    for problems, rates in (([SOLVED], {}), ([problem("bare", "1 2")], {"bare": lambda _: 0}),
                            ([problem("never", "1 2", TEN), SOLVED], {"never": lambda _: 0}),
                            ([problem("short", "1 2", "1 2")], {"short": lambda tokens: 4 * (tokens > 0)})):
        for reuse, count in ((True, 5), (False, 6)):
            made = world(module, problems, rates, reuse=reuse)
            found = made.step()
            assert len(made.calls) == count
            assert used(found) == ({"short": 1} if "short" in rates else {})
    made = world(module, [SOLVED], episodes=3)
    made.step()
    assert [len(call) for call in made.calls] == [8, 0, 0]


def loss(module: ModuleType) -> None:
    """GRPO on all groups; the prefix is context. The failed group's tokens count, with advantage 0."""
    problems = [problem("fails", "1 2", TWENTY), SOLVED, problem("never", "2 1", TEN), problem("bare", "2 2")]
    rates = {"fails": lambda tokens: 0 if tokens < 6 else 3, "never": lambda _: 0, "bare": lambda _: 0}
    for reuse in (True, False):
        made = world(module, problems, rates, reuse=reuse)
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


def limits(module: ModuleType) -> None:
    """No group fails, or none can be helped: grpo; all pass or all fail: nothing."""
    problems = [SOLVED, problem("never", "1 2", TEN)]
    rates = {"never": lambda _: 0}
    made = world(module, problems, rates)
    grpo = World(method_of(Grpo, {"name": "grpo"}, group=8, max_new_tokens=32, temperature=0.8), problems, made.reply,
                 made.reward)
    one, two = made.step(), grpo.step()
    assert (one.applied[0][1] == two.applied[0][1]).all() and np.abs(two.applied[0][1]).max() > 0.01
    for right in (0, 8):
        found = world(module, problems[1:], {"never": lambda _, n=right: n}).step()
        assert not found.applied[0][1].any()
    assert found.metrics["bread/failed"] == 0 and found.metrics["bread/extra"] == 0


def grades(module: ModuleType) -> None:
    """A failure is a group without a correct answer, whatever the rewards; what was not graded is no failure of it."""
    half = world(module, [problem("half", "1 2", TEN)], judge=lambda *_: 0.25).step()
    assert half.metrics["bread/failed"] == 1
    broken = world(module, [problem("broken", "1 2", TEN)], judge=lambda *_: None)
    found = broken.step()
    assert found.metrics["bread/failed"] == 0 and found.metrics["bread/extra"] == 0

    def no_grade_from_prefixes(_: str, answer: Answer) -> float | None:
        return None if answer[0] == 1 else 0.0
    broken = world(module, [problem("led", "1 2", TEN)], judge=no_grade_from_prefixes)
    assert used(broken.step()) == {} and len(broken.calls) == 5


def room(module: ModuleType) -> None:
    """A prefix leaves room for an answer: of twenty tokens with ten in the limit, at most nine."""
    made = world(module, [problem("late", "1 2", TWENTY)], {"late": lambda tokens: 4 if tokens >= 8 else 0},
                 rollout={"max_new_tokens": 10})
    found = made.step()
    assert used(found) == {"late": 8}
    assert max(len(prefix) for call in made.calls for _, prefix in call) <= 8
    assert all(len(row.ids) <= 12 for row in found.rows)


CHECKS: dict[str, Callable[[ModuleType], None]] = {
    "search": search, "target": target, "calls": calls, "loss": loss, "limits": limits, "grades": grades, "room": room,
}


@pytest.mark.parametrize("name", CHECKS)
def test_bread(name: str) -> None:
    CHECKS[name](bread_module)


MUTANTS: dict[str, tuple[Swaps, str]] = {
    "longest": ((("            search.high = search.episodes\n", "            search.low = search.episodes\n"),),
                "search"),
    "first in the range": ((("search.found, search.used = group, search.prefix",
                             "search.found, search.used, search.low = group, search.prefix, search.high"),), "search"),
    "above the range counts": ((("if rate(graded) <= self.options.high:", "if True:"),), "search"),
    "above the range asks for more": (
        (("            search.high = search.episodes\n",
          "            if rate(graded) <= self.options.high:\n                search.high = search.episodes\n"
          "            else:\n                search.low = search.episodes\n"),), "search"),
    "below the range counts": ((("rate(graded) < self.options.low", "rate(graded) < 0"),), "search"),
    "low end open": ((("rate(graded) < self.options.low", "rate(graded) <= self.options.low"),), "target"),
    "high end open": ((("rate(graded) <= self.options.high", "rate(graded) < self.options.high"),), "target"),
    "range ignored": ((("rate(graded) < self.options.low", "rate(graded) == 0"),), "target"),
    "one call too few": ((("math.ceil(math.log2(", "math.floor(math.log2("),), "search"),
    "calls only where needed": (
        (("            self.halve(roll, [search for search in searches if search.going])",
          "            if any(search.going for search in searches):\n"
          "                self.halve(roll, [search for search in searches if search.going])"),), "calls"),
    "searches go on for ever": ((("[search for search in searches if search.going])", "searches)"),), "search"),
    "the whole demonstration is tried": ((("self.high = len(self.ends)", "self.high = len(self.ends) + 1"),), "search"),
    "off by one episode": ((("self.ends[self.episodes - 1]", "self.ends[self.episodes]"),), "search"),
    "tokens for episodes": ((("self.ends[self.episodes - 1]", "self.episodes"),), "search"),
    "a new group always": ((("if not self.options.reuse:", "if True:"),), "calls"),
    "failed groups leave": (
        (("credited(rows + [", "credited([row for row in rows if row.group not in {f.group for f in failed}] + ["),),
        "loss"),
    "joined to the failed group": (
        (("for search in chosen for row in search.found]",
          "for search in chosen for row in [__import__('dataclasses').replace(r, group=next(f.group for f in failed "
          "if f.problem is r.problem)) for r in search.found]]"),), "loss"),
    "prefix is trained": (
        (("        return credited(rows",
          "        for s in chosen:\n"
          "            s.found = [__import__('dataclasses').replace(row, given=0) for row in s.found]\n"
          "        return credited(rows"),),
        "loss"),
    "failure by reward": ((("for group in groups if rate(group) == 0]",
                            "for group in groups if max(r.reward for r in group) == 0]"),), "grades"),
    "all are searched": ((("if rate(group) == 0]", "if True]"),), "limits"),
    "ungraded groups fail": ((("for group in credit.groups_of(rows) if group]",
                               "for group in [[i for i, r in enumerate(rows) if r.group == g] for g in "
                               "dict.fromkeys(r.group for r in rows)]]"),), "grades"),
    "no room": ((("ends[:short + 1]", "ends"),), "room"),
    "extra not counted": ((("float(roll.policy.ledger.rollouts - before)", "0.0"),), "search"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_seen(name: str) -> None:
    swaps, check = MUTANTS[name]
    with pytest.raises((AssertionError, IndexError)):
        CHECKS[check](mutate(bread_module, swaps, "mutant"))


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match=r"rollout\.refill"):
        world(problems=[SOLVED], rollout={"refill": 1})
    with pytest.raises(UserError, match="swap"):
        world(problems=[SOLVED], low=0.9, high=0.1)
    assert bread_module.Bread.needs == {"paired_demos"}
