"""`prefix_rft`: lengths, advantages and the entropy cut against slow versions, the loss against loops; and mutants."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from bigram import END, Answer, V, World, ids_of, method_of, problem, reply, reward, slope
from mutation import Mutant, mutants

from bridgelm.errors import UserError
from bridgelm.methods import prefix_rft
from bridgelm.methods.grpo import Grpo
from bridgelm.model.batching import make_batch, split_rows

LONG = " ".join(str(1 + (3 * i) % 5) for i in range(20))
PROBLEMS = [problem("a", "1 1", LONG), problem("b", "1 2", "5 4 3 2 1 5 4 3 2 1"), problem("c", "2 1", "3 1 4 1 5 2"),
            problem("bare", "2 2")]


def world(problems: Any = PROBLEMS, steps: int = 10, rollout: Any = (),
          judge: Any = reward, group: int = 4, **options: Any) -> World:
    method = method_of(prefix_rft.PrefixRft, {"name": "prefix_rft", **options}, prompts=len(problems), steps=steps,
                       group=group, **{"max_new_tokens": 32, "temperature": 0.8, **dict(rollout)})
    return World(method, problems, reply, judge)


def test_lengths() -> None:
    """floor(l |y*|) with l uniform on [low_t, .95], and low_t along the cosine."""
    made = world(steps=501)
    wanted = {0: 0.95, 125: 0.5 + 0.45 * math.sqrt(0.5), 250: 0.5, 375: 0.5 - 0.45 * math.sqrt(0.5), 500: 0.05}
    for step, low in wanted.items():
        assert made.method.low(step) == pytest.approx(low, abs=1e-12), step
        found = np.array([len(made.method.prefix(made.roll, PROBLEMS[0], step, i)) for i in range(800)])
        cells = np.bincount(found, minlength=22) / 800
        for k, share in enumerate(cells):  # 21 tokens, the end token among them: exact masses of floor(21 l)
            if low == 0.95:
                exact = float(k == 19)
            else:
                exact = max(0.0, min(0.95, (k + 1) / 21) - max(low, k / 21)) / (0.95 - low)
            assert abs(share - exact) <= 4.5 * math.sqrt(exact * (1 - exact) / 800), (step, k, share, exact)
    answer = [*ids_of(LONG), END]
    assert made.method.prefix(made.roll, PROBLEMS[0], 250, 3).tolist() == answer[:len(
        made.method.prefix(made.roll, PROBLEMS[0], 250, 3))]
    whole = world(low_start=1.0, high=1.0)  # the last token is never shown
    assert len(whole.method.prefix(whole.roll, PROBLEMS[0], 0, 0)) == 20
    short = world(low_start=1.0, high=1.0, rollout={"max_new_tokens": 8})
    assert len(short.method.prefix(short.roll, PROBLEMS[0], 0, 0)) == 7
    draws = [tuple(len(made.method.prefix(made.roll, PROBLEMS[0], 400, i + j)) for i in range(6)) for j in (0, 1)]
    assert draws[0][1:] == draws[1][:-1] and len(set(draws[0])) > 1
    assert [len(made.method.prefix(made.roll, PROBLEMS[0], 401 + i, 0)) for i in range(6)] != [draws[0][0]] * 6


def slow_advantages(plain: list[float], led: list[float], n: int, raw: bool, std: bool) -> tuple[Any, Any, Any]:
    """Of plain rollouts, of prefix tokens and of continuations, as in the official functions."""
    mean = sum(plain) / len(plain)
    def deviation(values: list[float]) -> float:
        middle = sum(values) / len(values)
        return math.sqrt(sum((v - middle) ** 2 for v in values) / len(values)) + 1e-6 if std else 1.0
    own = [(r - mean) / deviation(plain) for r in plain]
    prefix = [(r - mean) / n for r in led]
    if len(led) == 1:
        rest = [led[0] if raw else 0.0]
    else:
        rest = [(r - sum(led) / len(led)) / deviation(led) for r in led]
    return own, prefix, rest


def test_loss() -> None:
    cases: list[dict[str, Any]] = [
        {}, {"continuation": "zero"}, {"cut": 0.0, "rl": {"std": True}}, {"cut": 0.3, "hybrids": 2, "group": 5},
        {"hybrids": 3, "group": 6, "rl": {"std": True}, "cut": 0.5}]
    for options in cases:
        made = world(**options)
        found = made.step(6)
        n, group = options.get("hybrids", 1), options.get("group", 4)
        assert [len(call) for call in made.calls] == [4 * (group - n), 4 * n]
        assert made.policy.ledger.rollouts == 4 * group
        hybrids = [row for row in found.rows if row.given]
        entropies = []
        for row in hybrids:
            for t in np.flatnonzero(row.own & ~row.drawn):
                z = np.exp(made.policy.theta[int(row.ids[t - 1])].numpy() / 0.8)
                p = z / z.sum()
                entropies.append(float(-(p * np.log(p)).sum()))
        cut = math.floor(options.get("cut", 0.8) * len(entropies))
        least = sorted(entropies)[cut]
        total, tokens, kept, raised = np.zeros((V, V)), 0, 0, 0.0
        for p in PROBLEMS:
            rows = [row for row in found.rows if row.problem is p]
            plain, led = [r for r in rows if not r.given], [r for r in rows if r.given]
            own, prefix, rest = slow_advantages(
                [reward("", tuple(r.ids[2:])) for r in plain], [reward("", tuple(r.ids[2:])) for r in led], n,
                options.get("continuation", "raw") == "raw", bool(options.get("rl")))
            assert len(rows) == group and len(led) == (n if p.demos else 0)
            assert len({row.given for row in led}) <= 1, "one prefix for all of them"
            for row, a in zip(plain, own):
                for t in range(2, len(row.ids)):
                    total, tokens = total + a * slope(made.policy.theta, row, t), tokens + 1
            for row, a, b in zip(led, prefix, rest):
                for t in range(2, len(row.ids)):
                    z = np.exp(made.policy.theta[int(row.ids[t - 1])].numpy() / 0.8)
                    q = z / z.sum()
                    wanted = b
                    if t < 2 + row.given:
                        keeps = float(-(q * np.log(q)).sum()) >= least - 1e-12
                        wanted, kept, raised = a * keeps, kept + keeps, raised + abs(a * keeps)
                    total, tokens = total + wanted * slope(made.policy.theta, row, t), tokens + 1
        assert np.allclose(found.applied[0][1], total / tokens, rtol=0, atol=1e-13), options
        assert (raised > 0 and kept < len(entropies)) or options.get("cut") == 0.0
        assert found.metrics["prefix_rft/entropy"] == pytest.approx(least)
        assert found.metrics["prefix_rft/hybrid_reward"] == pytest.approx(
            np.mean([reward("", tuple(r.ids[2:])) for r in hybrids]))


def test_numbers() -> None:
    """By hand: plain rewards 1, 0, 0 have mean 1/3; a hybrid of reward 1 gets 2/3 on its prefix and 1 afterwards."""
    scripted = {"": [(5, END), (1, END), (2, END)], "led": [(3, 5, END)]}
    method = method_of(prefix_rft.PrefixRft, {"name": "prefix_rft", "cut": 0.0, "low_start": 0.5, "high": 0.5},
                       prompts=1)
    made = World(method, PROBLEMS[2:3], lambda _, prefix, i: scripted["led" if prefix else ""][i], reward)
    rows = made.step(0).rows
    assert [row.streams["pg"].weight[-1] for row in rows[:3]] == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    (hybrid,) = [row for row in rows if row.given]
    assert hybrid.ids.tolist() == [2, 1, 3, 1, 4, 3, 5, END]
    assert hybrid.streams["hybrid"].weight[2:] == pytest.approx([2 / 3] * 3 + [1.0] * 3)
    logps = made.policy.score([hybrid])[0]
    assert hybrid.old_logps == pytest.approx(logps), "the student's own log-probs on its prefix too"
    assert hybrid.streams["pg"].mask.sum() == 6 and not hybrid.streams["pg"].weight.any()


def test_cuts() -> None:
    """80 % of the tokens, counted, lose their weight; tokens of one entropy stay or go together."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 10, 99, 100):
        values = rng.random(n)
        for cut in ("0", "0.2", "0.5", "0.57", "0.8", "0.99"):
            least = prefix_rft.threshold(rng.permutation(values), float(cut))
            assert (values >= least).sum() == n - math.floor(Fraction(cut) * n), (n, cut)
    assert prefix_rft.threshold(np.array([2.0, 1.0, 1.0, 1.0]), 0.5) == 1.0
    assert prefix_rft.threshold(np.empty(0), 0.8) == math.inf


def test_clip() -> None:
    """Prefix tokens have PPO's ratio against the policy that the step began with: at another theta, term by term."""
    made = world(cut=0.0)
    data_rows = made.step(6).rows
    with torch.no_grad():
        made.policy.theta = made.policy.theta + 0.4 * torch.sin(torch.arange(V * V, dtype=torch.float64)).view(V, V)
    batch = make_batch(data_rows)
    found = made.policy.grad(made.method.terms, batch, {"pg": 1.0, "hybrid": 1.0})
    wanted, clipped, tokens = {"pg": 0.0, "hybrid": 0.0}, 0, 0
    for row in data_rows:
        now = made.policy.score([row])[0]
        tokens += int(row.own.sum())
        for name in wanted:
            for t in np.flatnonzero(row.own):
                ratio, a = math.exp(now[t] - row.old_logps[t]), row.streams[name].weight[t]  # type: ignore[index]
                bounded = min(max(ratio, 0.8), 1.28)
                wanted[name] -= min(ratio * a, bounded * a)
                clipped += name == "hybrid" and t < 2 + row.given and bounded != ratio and a != 0
    assert clipped > 3
    for name, value in wanted.items():
        assert found.losses[name] == pytest.approx(value / tokens, rel=1e-12)


def test_flat() -> None:
    """All fail, or all pass with `zero`: nothing. All pass as published: continuations, with weight 1."""
    for constant, continuation, still in ((0.0, "raw", True), (1.0, "zero", True), (0.1, "zero", True),
                                          (1.0, "raw", False)):
        made = world(judge=lambda *_, c=constant: c, continuation=continuation, group=7)
        found = made.step(6)
        wanted, tokens = np.zeros((V, V)), 0
        for row in found.rows:
            tokens += int(row.own.sum())
            if row.given and not still:
                for t in np.flatnonzero(row.drawn):
                    wanted += slope(made.policy.theta, row, t)
        assert np.allclose(found.applied[0][1], wanted / tokens, rtol=0, atol=0 if still else 1e-14)
        assert bool(np.abs(wanted).max() > 0) is not still


def test_without_demonstrations() -> None:
    """Nothing to show, or a prefix of no token: grpo."""
    for step, problems, options in ((0, PROBLEMS[3:], {}), (9, PROBLEMS[2:3], {"low_end": 0.0, "high": 0.1,
                                                                               "low_start": 0.1})):
        one = world(problems, **options).step(step)
        grpo = World(method_of(Grpo, {"name": "grpo"}, prompts=1, max_new_tokens=32, temperature=0.8), problems, reply,
                     reward)
        two = grpo.step(step)
        assert np.allclose(one.applied[0][1], two.applied[0][1], rtol=0, atol=1e-15)
        assert np.abs(two.applied[0][1]).max() > 0.01


def test_failed_grades() -> None:
    """A hybrid that could not be graded, and one without a graded plain rollout, have no part in it."""
    failed: set[str] = set()

    def judge(name: str, answer: Answer) -> float | None:
        led = len(answer) > 4
        if (name == "a" and led) or (name == "b" and not led) or (name == "c" and led and not failed):
            failed.add(name) if name == "c" else None
            return None
        return reward(name, answer)
    made = world(judge=judge, hybrids=2, group=5)
    rows = made.step(2).rows
    used = [(row.problem.id, row.given > 0, "hybrid" in row.streams) for row in rows]
    assert [u for name, led, u in used if name == "c" and led] == [False, True], "one of the two was not graded"
    assert all(u for name, led, u in used if name == "bare" or (name in "ac" and not led))
    assert not any(u for name, led, u in used if name == "b" or (name == "a" and led))


MUTANTS = mutants(
    prefix_rft,
    Mutant("constant", "PrefixRft.low", "cosine", to="linear", by=test_lengths),
    Mutant("term", "PrefixRft.prefix", "high 2", by=test_lengths),  # always the shortest
    Mutant("term", "PrefixRft.prefix", 8, by=test_lengths),  # nothing is left to draw
    Mutant("term", "PrefixRft.credited", "exact_mean 0", by=test_loss),
    Mutant("denominator", "PrefixRft.credited", "hybrids", by=test_loss),
    Mutant("branch", "PrefixRft.continuation", "raw 2", by=test_flat),
    Mutant("compare", "PrefixRft.credited", 5, by=test_loss),  # the highest entropies lose their weight
    Mutant("term", "threshold", 0, by=test_cuts),
    Mutant("drop", "scored", "old_logps 3", by=test_numbers),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()


def test_several_updates_keep_hybrids_with_their_group() -> None:
    rows = world().step(3).rows
    for part in split_rows(rows, 2):
        groups = {row.group for row in part}
        assert len(groups) == 2 and all(sum(row.group == g for row in part) == 4 for g in groups)
    assert replace(rows[0], given=1).drawn.sum() == rows[0].own.sum() - 1


def test_what_is_refused() -> None:
    for options, words in (({"rollout": {"refill": 1}}, r"rollout\.refill"), ({"hybrids": 3}, "hybrids"),
                           ({"high": 0.5}, "low_start")):
        with pytest.raises(UserError, match=words):
            world(**options)
    assert prefix_rft.PrefixRft.needs == {"paired_demos"}
