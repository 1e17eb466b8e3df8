"""LUFFY's objective in loops over members and tokens, its numbers, and the official loss on fixed tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from checks import close
from mutants import Swaps, mutate
from table import (
    Hands,
    Table,
    data,
    entropy,
    entropy_slope,
    log_probs,
    method_of,
    problem,
    row,
    slope,
    thetas,
    tokens,
    update,
)

from bridgelm.errors import UserError
from bridgelm.methods import luffy as luffy_module
from bridgelm.model import batching
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


def ready(module: ModuleType, mask: bool = False, **options: Any) -> tuple[Any, Table]:
    method, policy = method_of(module.Luffy, "luffy", rollout={"mask_overlong": mask}, **options), Table(NOW)
    method.setup(policy)
    return method, policy


def equations(module: ModuleType) -> None:
    for options, overlong in SETTINGS:
        method, policy = ready(module, overlong, **options)
        rows = members()
        found = update(method, policy, method.credited(rows))
        wanted, losses = by_hand(rows, method.options, overlong)
        close(policy.applied, wanted, 1e-14, f"gradient, {options}")
        assert {n for n in found if n.startswith("loss/")} == {f"loss/{n}" for n in losses}
        for name, value in losses.items():
            close(found[f"loss/{name}"], value, 1e-14, f"loss of {name}, {options}")


def advantages(module: ModuleType, size: int, wins: int, **options: Any) -> tuple[set[float], float]:
    """Of the wrong or right own answers, and of the demonstration."""
    rows = [row([0, 1], float(i < wins), 0, OLD) for i in range(size)] + [expert([0, 2], 1.0, 0)]
    out = ready(module, **options)[0].credited(rows)
    return {float(r.streams["pg"].weight[1]) for r in out[:-1]}, float(out[-1].streams["demo"].weight[1])


def printed_numbers(module: ModuleType) -> None:
    """All fail, all pass, and in between; exact, also for a reward that is no binary fraction."""
    assert advantages(module, 7, 0) == ({-1 / 8}, 7 / 8), "the paper's seven and one"
    own, demo = advantages(module, 8, 0)
    close([*own, demo], [-1 / 9, 8 / 9], 1e-16, "eight and one")
    assert advantages(module, 7, 7) == ({0.0}, 0.0)
    assert advantages(module, 7, 3) == ({0.5, -0.5}, 0.5)
    assert advantages(module, 7, 0, baseline="own") == ({0.0}, 1.0)
    assert advantages(module, 8, 8, baseline="own") == ({0.0}, 0.0)
    rows = [row([0, 1], 0.1, 0, OLD) for _ in range(6)] + [expert([0, 2], 0.1, 0)]
    for baseline in ("group", "own"):
        method, policy = ready(module, baseline=baseline, entropy=0.0)
        out = method.credited(rows)
        assert not any(s.weight.any() for r in out for s in r.streams.values())
        update(method, policy, out)
        assert not policy.applied.any()


def shaped_weight(module: ModuleType) -> None:
    """A gamma p / (p + gamma)^2 on grad log pi, at most A / 4 at p = gamma, of either sign of A."""
    method, _ = ready(module, entropy=0.0)
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


def official(module: ModuleType) -> None:
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
    method, _ = ready(module, entropy=0.0)
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


def one_denominator(module: ModuleType) -> None:
    for aggregate, wanted in (("token", 13.0), ("row", 5.0), ("constant", 35.0)):
        method, _ = ready(module, rl={"aggregate": aggregate})
        rows = [row([0, 1, 2, 0], 1.0, 0, OLD), row([0, 1], 0.0, 0, OLD), expert([0, 1, 1, 1], 1.0, 0)]
        rows += [row([0, 1, 2, 0], 0.0, 1, OLD), row([0, 1, 1, 0], 0.0, 1, OLD)]
        counts = batching.make_batch(method.credited(rows)).counts
        assert (counts["pg"], counts["demo"], counts["entropy"]) == (wanted, wanted, 13.0)


def who_is_in_a_group(module: ModuleType) -> None:
    """`rollout.group` own answers stay; demonstrations of the same problem join under the same number."""
    for count, sizes in ((1, (1, 1)), (2, (2, 1)), (5, (3, 1))):
        method, policy = ready(module, demos=count)
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
    method, policy = ready(module, rl={"kl_coef": 0.3}, entropy=0.0)
    assert "reference" in policy.groups
    out = method.gather(data(), Hands(policy, rows, answers), 0)
    assert all(("kl" in r.streams) == (r.at != "expert") for r in out), "KL is estimated on what the policy drew"
    update(method, policy, out)
    assert policy.coef == {"pg": 1.0, "kl": 0.3, "demo": 1.0}


def what_is_told(module: ModuleType) -> None:
    method, policy = ready(module)
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


CHECKS: dict[str, Callable[[ModuleType], None]] = {
    f.__name__: f
    for f in (
        equations,
        printed_numbers,
        shaped_weight,
        official,
        one_denominator,
        who_is_in_a_group,
        what_is_told,
    )
}


@pytest.mark.parametrize("name", CHECKS)
def test_shipped_code(name: str) -> None:
    CHECKS[name](luffy_module)


SHAPED = 'losses.shaped(logp_BT, batch.weight["demo"], o.shape)'
PLAIN = 'losses.pg(logp_BT, batch.old_BT, batch.weight["pg"])'
PAIR = '{"pg": 0.0, "demo": advantage} if row.at == "expert" else {"pg": advantage, "demo": 0.0}'
MUTANTS: dict[str, tuple[Swaps, str]] = {
    "baseline turned round": ((('if o.baseline == "own"', 'if o.baseline == "group"'),), "printed_numbers"),
    "never the own baseline": ((('if o.baseline == "own"', 'if o.baseline == ""'),), "printed_numbers"),
    "the baseline is the demonstration": ((('row.at != "expert") if', 'row.at == "expert") if'),), "equations"),
    "std forgotten": ((("rows, o.rl.std, own", "rows, False, own"),), "equations"),
    "overlong answers teach": ((("if rollout.mask_overlong and not row.finished", "if False"),), "equations"),
    "always clipped": ((("and not o.clip", "and False"),), "equations"),
    "never clipped": ((("and not o.clip", ""),), "equations"),
    "no ratio": (((PLAIN, 'losses.nll(logp_BT, batch.weight["pg"])'),), "equations"),
    "own tokens shaped": (((PLAIN, 'losses.shaped(logp_BT, batch.weight["pg"], o.shape)'),), "official"),
    "demonstrations by their ratio": (((SHAPED, 'losses.pg(logp_BT, 0 * logp_BT, batch.weight["demo"])'),), "official"),
    "demonstrations imitated": (((SHAPED, 'losses.nll(logp_BT, batch.weight["demo"])'),), "shaped_weight"),
    "shape fixed": (((SHAPED, SHAPED.replace("o.shape", "0.1")),), "equations"),
    "p is a constant": (
        ((SHAPED, 'losses.nll(logp_BT, batch.weight["demo"] * (logp_BT.exp() / (logp_BT.exp() + o.shape)).detach())'),),
        "shaped_weight",
    ),
    "negative A left out": (((SHAPED, SHAPED.replace('["demo"]', '["demo"].clamp(min=0)')),), "shaped_weight"),
    "demonstrations are own": (((PAIR, '{"pg": advantage, "demo": 0.0}'),), "equations"),
    "own answers are demonstrations": (((PAIR, '{"pg": 0.0, "demo": advantage}'),), "equations"),
    "each by its own tokens": (
        ((PAIR, '{"demo": advantage} if row.at == "expert" else {"pg": advantage}'),),
        "one_denominator",
    ),
    "only drawn tokens": (((", rollout.max_new_tokens, row.own)", ", rollout.max_new_tokens)"),), "equations"),
    "aggregate forgotten": (((", weight, o.rl.aggregate,", ', weight, "constant",'),), "one_denominator"),
    "length forgotten": ((("rollout.max_new_tokens, row.own", "1.0, row.own"),), "one_denominator"),
    "bonus is a malus": ((('= -batch.weight["entropy"]', '= batch.weight["entropy"]'),), "equations"),
    "bonus of own answers alone": ((('"entropy", 1.0, mask=row.own', '"entropy", 1.0'),), "equations"),
    "bonus coefficient": ((('{"entropy": o.entropy}', '{"entropy": 1.0}'),), "equations"),
    "demonstrations left out": ((('| {"demo": 1.0}', '| {"demo": 0.0}'),), "equations"),
    "one demonstration": (((", step, self.options.demos)", ", step, 1)"),), "who_is_in_a_group"),
    "one demonstration for ever": (((", step, self.options.demos)", ", 0, self.options.demos)"),), "who_is_in_a_group"),
    "KL of demonstrations": (
        (
            (
                "return with_kl(rows, roll, self.options.rl, self.run)",
                'return [r.with_stream("kl", 1.0) for r in with_kl(rows, roll, self.options.rl, self.run)]',
            ),
        ),
        "who_is_in_a_group",
    ),
    "told of demonstrations that teach nothing": ((('if row.streams["demo"].weight.any()]', "]"),), "what_is_told"),
    "all fail is all pass": ((("not w for w in", "w for w in"),), "what_is_told"),
    "the demonstration is a win": (
        (('if row.at != "expert":\n                won', "if True:\n                won"),),
        "what_is_told",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_seen(name: str) -> None:
    swaps, check = MUTANTS[name]
    with pytest.raises(AssertionError):
        CHECKS[check](mutate(luffy_module, swaps, "mutant"))


def test_what_is_learnt_of_a_token_fades_below_the_shape() -> None:
    """The numbers of the trap: at p = 1e-4 a thousandth of A, while plain imitation weighs it 1."""
    weights = [0.1 * p / (p + 0.1) ** 2 for p in (1e-4, 1e-2, 0.1, 0.5)]
    assert weights == pytest.approx([0.000998, 0.08264, 0.25, 0.13889], abs=1e-5)


def test_refills_and_unmet_needs_are_refused() -> None:
    with pytest.raises(UserError, match=r"rollout\.refill"):
        method_of(luffy_module.Luffy, "luffy", rollout={"refill": 1})
    assert luffy_module.Luffy.needs == {"paired_demos"}
    assert method_of(luffy_module.Luffy, "luffy", rl={"std": True}).options.rl.aggregate == "constant"


def test_an_all_fail_group_moves_only_by_its_demonstration_and_away_from_its_failures() -> None:
    """Without the demonstration in the mean, failures would teach nothing."""
    for baseline, own in itertools.product(("group", "own"), (True, False)):
        method, policy = ready(luffy_module, baseline=baseline, entropy=0.0)
        rows = method.credited([row([0, 1], 0.0, 0, NOW), row([0, 2], 0.0, 0, NOW), expert([0, 0], 1.0, 0)])
        update(method, policy, rows[:2] if own else rows[2:])
        if own and baseline == "own":
            assert not policy.applied.any()
        else:
            push = -1 / 3 if own else (2 / 3 if baseline == "group" else 1.0)
            p = np.exp(log_probs(NOW, rows[2])[1])
            weights = [1.0, 1.0] if own else [0.1 * p / (p + 0.1) ** 2]
            part = rows[:2] if own else rows[2:]
            wanted = sum(push * w * slope(NOW, r, 1) for w, r in zip(weights, part)) / (7 * len(part))
            close(policy.applied, wanted, 1e-15, f"{baseline}, own {own}")
