"""LUFFY's objective in loops over members and tokens, its numbers, and the official loss on fixed tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from checks import close
from mutation import Mutant, mutants
from table import Hands, Table, data, entropy, entropy_slope, log_probs, method_of, problem, row

from table import slope, thetas, tokens, update  # isort: skip

from bridgelm.errors import UserError
from bridgelm.methods import luffy
from bridgelm.model import batching
from bridgelm.objective import losses
from bridgelm.types import Live, Row, Verdict

NOW, OLD = thetas()


def expert(ids: list[int], reward: float, group: int) -> Row:
    return row(ids, reward, group, at="expert")


def members() -> list[Row]:
    """Some right and some wrong with a right demonstration; all wrong; all right; a wrong demonstration; a grader's
    fault; a group that is left with one member; two demonstrations. Answers differ in length; one was cut off."""
    E = Verdict.ERROR
    rows = [
        *(row(ids, r, 0, OLD) for ids, r in (([0, 1, 2], 1.0), ([0, 1], 0.0), ([1, 2, 2, 0, 1], 0.0))),
        expert([0, 2, 1, 1], 1.0, 0),
        *(row(ids, 0.0, 1, OLD) for ids in ([1, 1, 0], [2, 0, 0, 1], [1, 2])),
        expert([1, 0, 0, 2, 2], 1.0, 1),
        *(row(ids, 1.0, 2, OLD) for ids in ([0, 0, 2], [0, 1, 1, 1])),
        expert([0, 2, 2], 1.0, 2),
        *(row(ids, r, 3, OLD) for ids, r in (([2, 1], 1.0), ([2, 2, 0], 0.0))),
        expert([2, 0, 1], 0.0, 3),
        row([1, 1, 1], 9.0, 4, OLD, verdict=E),
        row([1, 0], 0.3, 4, OLD),
        expert([1, 2, 0, 0], 1.0, 4),
        row([0, 0, 1], 1.0, 5, OLD),
        row([0, 2, 1], 0.0, 5, OLD, verdict=E),
        row([2, 2, 1, 0, 1], 0.0, 6, OLD, finished=False),
        row([2, 0, 0], 1.0, 6, OLD),
        expert([2, 1, 0], 1.0, 6),
        expert([2, 1, 1, 0, 0, 0], 1.0, 6),
    ]
    own = rows[5].own.copy()
    own[1] = False  # a word that is not the author's
    rows[5] = replace(rows[5], own=own)
    return rows


def by_hand(rows: list[Row], o: Any, overlong: bool, length: int = 7) -> tuple[np.ndarray, dict[str, float]]:
    """Ascent direction and the terms' losses."""
    own, demo, bonus = (np.zeros_like(NOW) for _ in range(3))
    losses = {"pg": 0.0, "demo": 0.0, "entropy": 0.0}
    below = words = 0.0
    for group in {r.group for r in rows}:
        graded = [r for r in rows if r.group == group and r.verdict is not Verdict.ERROR]
        base = [r.reward for r in graded if o.baseline == "group" or r.at != "expert"]
        if len(graded) < 2 or not base:
            continue
        mean = sum(base) / len(base)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in base) / len(base)) + 1e-6 if len(set(base)) > 1 else 1.0
        for r in graded:
            if overlong and not r.finished:
                continue
            a = (r.reward - mean) / (deviation if o.rl.std else 1.0)
            n = len(tokens(r))
            below += {"token": n, "row": 1, "constant": length}[o.rl.aggregate]
            words += n
            each = 1 / n if o.rl.aggregate == "row" else 1.0
            for t in tokens(r):
                p = math.exp(log_probs(NOW, r)[t])
                bonus += entropy_slope(NOW, t)
                losses["entropy"] -= entropy(NOW, t)
                if r.at == "expert":
                    demo += each * a * o.shape * p / (p + o.shape) ** 2 * slope(NOW, r, t)
                    losses["demo"] -= each * a * p / (p + o.shape)
                    continue
                ratio = math.exp(log_probs(NOW, r)[t] - log_probs(OLD, r)[t])
                stopped = o.clip and (ratio > 1 + o.rl.clip_high if a > 0 else ratio < 1 - o.rl.clip_low)
                bounded = min(max(ratio, 1 - o.rl.clip_low), 1 + o.rl.clip_high)
                own += 0.0 if stopped else each * a * ratio * slope(NOW, r, t)
                losses["pg"] -= each * (min(a * ratio, a * bounded) if o.clip else a * ratio)
    found = {name: losses[name] / below for name in ("pg", "demo")}
    found |= {"entropy": o.entropy * losses["entropy"] / words} if o.entropy else {}
    return (own + demo) / below + o.entropy * bonus / words, found


SETTINGS: tuple[tuple[dict[str, Any], bool], ...] = (
    ({}, False),
    ({"baseline": "own", "shape": 0.4, "entropy": 0.0, "rl": {"aggregate": "token"}}, False),
    ({"clip": True, "entropy": 0.3, "rl": {"std": True, "aggregate": "row", "clip_low": 0.1}}, True),
    ({"baseline": "own", "rl": {"std": True}}, True),
)


def ready(mask: bool = False, **options: Any) -> tuple[Any, Table]:
    method, policy = method_of(luffy.Luffy, "luffy", rollout={"mask_overlong": mask}, **options), Table(NOW)
    method.setup(policy)
    return method, policy


def test_equations() -> None:
    for options, overlong in SETTINGS:
        method, policy = ready(overlong, **options)
        rows = members()
        found = update(method, policy, method.credited(rows))
        wanted, losses = by_hand(rows, method.options, overlong)
        close(policy.applied, wanted, 1e-14, f"gradient, {options}")
        assert {n for n in found if n.startswith("loss/")} == {f"loss/{n}" for n in losses}
        for name, value in losses.items():
            close(found[f"loss/{name}"], value, 1e-14, f"loss of {name}, {options}")


def advantages(size: int, wins: int, **options: Any) -> tuple[set[float], float]:
    """Of the wrong or right own answers, and of the demonstration."""
    rows = [row([0, 1], float(i < wins), 0, OLD) for i in range(size)] + [expert([0, 2], 1.0, 0)]
    out = ready(**options)[0].credited(rows)
    return {float(r.streams["pg"].weight[1]) for r in out[:-1]}, float(out[-1].streams["demo"].weight[1])


def test_printed_numbers() -> None:
    """All fail, all pass, and in between; exact, also for a reward that is no binary fraction."""
    assert advantages(7, 0) == ({-1 / 8}, 7 / 8), "the paper's seven and one"
    own, demo = advantages(8, 0)
    close([*own, demo], [-1 / 9, 8 / 9], 1e-16, "eight and one")
    assert advantages(7, 7) == ({0.0}, 0.0)
    assert advantages(7, 3) == ({0.5, -0.5}, 0.5)
    assert advantages(7, 0, baseline="own") == ({0.0}, 1.0)
    assert advantages(8, 8, baseline="own") == ({0.0}, 0.0)
    rows = [row([0, 1], 0.1, 0, OLD) for _ in range(6)] + [expert([0, 2], 0.1, 0)]
    for baseline in ("group", "own"):
        method, policy = ready(baseline=baseline, entropy=0.0)
        out = method.credited(rows)
        assert not any(s.weight.any() for r in out for s in r.streams.values())
        update(method, policy, out)
        assert not policy.applied.any()


def test_shaped_weight() -> None:
    """A gamma p / (p + gamma)^2 on grad log pi, at most A / 4 at p = gamma, of either sign of A."""
    method, _ = ready(entropy=0.0)
    for a in (7 / 8, -1 / 3):
        r = expert([0] * 8, 1.0, 0).with_stream("demo", a, mask=expert([0] * 8, 1.0, 0).own)
        micro = batching.collate([r], torch.float64, torch.device("cpu"), {})
        p = np.array([1.0, 1e-6, 1e-3, 0.03, 0.1, 0.3, 0.9, 1.0])
        leaf = torch.tensor(np.log(p)[None], requires_grad=True)
        value = method.terms(micro, Live(leaf))["demo"]
        close(value[0, 1:].detach(), -a * p[1:] / (p[1:] + 0.1), 1e-15, "-A f(p)")
        (g,) = torch.autograd.grad((value * micro.scale["demo"]).sum(), leaf)
        close(-g[0, 1:], a * 0.1 * p[1:] / (p[1:] + 0.1) ** 2, 1e-15, "through p")
        assert int(g[0].abs().argmax()) == 4
        close(float(-g[0, 4]), a / 4, 1e-15, "the peak")


def test_official() -> None:
    """The official loss is a sum over a micro-batch of m rows, divided by the length alone, then a mean over
    micro-batches: m times ours. Here on fixed tensors, written independently."""
    rng = np.random.default_rng(3)
    n, length, m = 8, 7, 4
    logp, old = -rng.uniform(0.05, 3.0, (n, length)), -rng.uniform(0.05, 3.0, (n, length))
    a, prefix = rng.standard_normal(n), np.arange(n) % 4 == 3
    mask = np.arange(length) < rng.integers(2, length + 1, n)[:, None]
    ratio, p = np.exp(logp - old), np.exp(logp)
    losses = np.where(prefix[:, None], -a[:, None] * p / (p + 0.1), -a[:, None] * ratio) * mask
    wanted = np.mean([losses[k : k + m].sum() / length for k in range(0, n, m)]) / m
    method, _ = ready(entropy=0.0)
    rows = []
    for i in range(n):
        own = np.array([False, *mask[i]])
        r = Row(np.zeros(length + 1, dtype=int), own, "rollout", problem(), 0, "expert" if prefix[i] else "live")
        r = replace(r, old_logps=np.array([0.0, *(0 * old[i] if prefix[i] else old[i])]))
        for name, weight in (("pg", 0.0 if prefix[i] else a[i]), ("demo", a[i] if prefix[i] else 0.0)):
            r = r.with_stream(name, weight, "constant", float(length), own)
        rows.append(r)
    batch = batching.make_batch(rows)
    micro = batching.collate(rows, torch.float64, torch.device("cpu"), {})
    full = torch.tensor(np.concatenate([np.zeros((n, 1)), logp], 1))
    values = method.terms(micro, Live(full))
    found = sum(float((values[x] * micro.scale[x]).sum()) / batch.counts[x] for x in ("pg", "demo"))
    close(found, wanted, 1e-14, "official loss / m")


def test_one_denominator() -> None:
    for aggregate, wanted in (("token", 13.0), ("row", 5.0), ("constant", 35.0)):
        method, _ = ready(rl={"aggregate": aggregate})
        rows = [row([0, 1, 2, 0], 1.0, 0, OLD), row([0, 1], 0.0, 0, OLD), expert([0, 1, 1, 1], 1.0, 0)]
        rows += [row([0, 1, 2, 0], 0.0, 1, OLD), row([0, 1, 1, 0], 0.0, 1, OLD)]
        counts = batching.make_batch(method.credited(rows)).counts
        assert (counts["pg"], counts["demo"], counts["entropy"]) == (wanted, wanted, 13.0)


def test_who_is_in_a_group() -> None:
    """`rollout.group` own answers stay; demonstrations of the same problem join under the same number."""
    for count, sizes in ((1, (1, 1)), (2, (2, 1)), (5, (3, 1))):
        method, policy = ready(demos=count)
        problems = problem("many", 3), problem("none", 0), problem("one", 1)
        rows = [replace(row([0, i % 3], i % 2, 10 + i // 4, OLD), problem=problems[i // 4]) for i in range(12)]
        answers = {f"{x} {i}": expert([0, 1, i], 1.0, -1) for x in ("many", "one") for i in range(3)}
        chosen = set()
        for step in range(12):
            hands = Hands(policy, rows, answers)
            out = method.gather(data(), hands, step)
            assert [r.group for r in out[:12]] == [r.group for r in rows] and out[0].text == rows[0].text
            assert [r.group for r in out[12:]] == [10] * sizes[0] + [12] * sizes[1]
            assert all(r.at == "expert" and r.problem.id in ("many", "one") for r in out[12:])
            again = Hands(policy, rows, answers)
            method.gather(data(), again, step)
            assert again.asked == hands.asked, "a resumed run draws the same"
            texts = [text for text, number in hands.asked if number == 10]
            assert len(set(texts)) == len(texts)
            chosen.add(tuple(texts))
        assert len(chosen) > 1 or count > 2, "not the same demonstration for ever"
    method, policy = ready(rl={"kl_coef": 0.3}, entropy=0.0)
    assert "reference" in policy.groups
    out = method.gather(data(), Hands(policy, rows, answers), 0)
    assert all(("kl" in r.streams) == (r.at != "expert") for r in out), "KL is estimated on what the policy drew"
    update(method, policy, out)
    assert policy.coef == {"pg": 1.0, "kl": 0.3, "demo": 1.0}


def test_what_is_told() -> None:
    method, policy = ready()
    rows = members()
    found = update(method, policy, method.credited(rows))
    demos = [r for r in rows if r.at == "expert"]
    close(found["luffy/demo_reward"], np.mean([r.reward for r in demos]), 1e-15)
    means = {0: 0.5, 1: 0.25, 2: 1.0, 3: 1 / 3, 4: 0.65, 6: 0.75}
    close(found["luffy/demo_advantage"], np.mean([r.reward - means[r.group] for r in demos]), 1e-15)
    p = np.exp(np.concatenate([log_probs(NOW, r)[1:] for r in demos if r.group != 2]))  # in which A is 0
    close(found["luffy/p"], p.mean(), 1e-15)
    close(found["luffy/weight"], np.mean(0.1 * p / (p + 0.1) ** 2), 1e-15)
    close(found["luffy/all_fail"], 2 / 6, 1e-15, "groups 1 and 4; 5 has no two graded members")


def test_refills_and_unmet_needs_are_refused() -> None:
    with pytest.raises(UserError, match=r"rollout\.refill"):
        method_of(luffy.Luffy, "luffy", rollout={"refill": 1})
    assert luffy.Luffy.needs == {"paired_demos"}
    assert method_of(luffy.Luffy, "luffy", rl={"std": True}).options.rl.aggregate == "constant"


MUTANTS = mutants(
    luffy,
    Mutant("branch", "Luffy.credited", "baseline 1", by=test_printed_numbers),  # never the own baseline
    Mutant("compare", "Luffy.credited", "expert 0", by=test_equations),  # the demonstration alone is the baseline
    Mutant("denominator", "Luffy.credited", "aggregate", "token", by=test_one_denominator),
    Mutant("mask", "Luffy.terms", "clip 1", by=test_equations),  # never clipped
    Mutant("sign", "shaped", 0, by=test_shaped_weight, of=losses),
    Mutant("hold", "shaped", "sigmoid 0", by=test_equations, of=losses),  # p is a constant
    Mutant("instead", "Luffy.credited", "own 0", "drawn", by=test_equations),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()
