"""SRFT's three losses in loops over members and tokens, both of its open readings, and its limits."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from checks import close
from exact import run_config
from mutation import Mutant, mutants
from table import Hands, Table, data, entropy, entropy_slope, log_probs, method_of, row, slope, thetas, tokens, update

from bridgelm.config import catalogue
from bridgelm.errors import UserError
from bridgelm.methods import srft
from bridgelm.methods.srft import Srft
from bridgelm.model import batching
from bridgelm.types import Live, Row, Verdict

NOW, OLD = thetas(4)


def expert(ids: list[int], reward: float, group: int) -> Row:
    return row(ids, reward, group, at="expert")


def members() -> list[Row]:
    """Mixed, all wrong, all right; a wrong demonstration; a grader's fault; a group of one; an answer that was cut."""
    return [
        *(row(ids, r, 0, OLD) for ids, r in (([0, 1, 2], 1.0), ([0, 1], 0.0), ([1, 2, 2, 0, 1], 0.0))),
        expert([0, 2, 1, 1], 1.0, 0),
        *(row(ids, 0.0, 1, OLD) for ids in ([1, 1, 0], [2, 0, 0, 1], [1, 2])),
        expert([1, 0, 0, 2, 2], 1.0, 1),
        *(row(ids, 1.0, 2, OLD) for ids in ([0, 0, 2], [0, 1, 1, 1])),
        expert([0, 2, 2], 1.0, 2),
        row([2, 1], 1.0, 3, OLD),
        expert([2, 0, 1], 0.0, 3),
        row([1, 1, 1], 9.0, 4, OLD, verdict=Verdict.ERROR),
        row([1, 0], 0.2, 4, OLD),
        row([2, 2, 1, 0, 1], 0.0, 6, OLD, finished=False),
        row([2, 0, 0], 1.0, 6, OLD),
        expert([2, 1, 0], 1.0, 6),
    ]


def h(r: Row) -> float:
    return float(np.mean([entropy(NOW, t) for t in tokens(r)]))


def by_hand(rows: list[Row], o: Any, overlong: bool, length: int = 7) -> tuple[np.ndarray, dict[str, float]]:
    """Ascent direction and each term's loss."""
    up = {name: np.zeros_like(NOW) for name in ("nll", "pg", "own", "entropy")}
    value = dict.fromkeys(up, 0.0)
    below = demo_words = words = 0.0
    for group in {r.group for r in rows}:
        graded = [r for r in rows if r.group == group and r.verdict is not Verdict.ERROR]
        if len(graded) < 2:
            continue
        mean = sum(r.reward for r in graded) / len(graded)
        deviation = math.sqrt(sum((r.reward - mean) ** 2 for r in graded) / len(graded)) + 1e-6
        for r in graded:
            if overlong and not r.finished:
                continue
            n = len(tokens(r))
            below += {"token": n, "row": 1, "constant": length}[o.aggregate]
            words += n
            each = 1 / n if o.aggregate == "row" else 1.0
            for t in tokens(r):
                p, g = math.exp(log_probs(NOW, r)[t]), slope(NOW, r, t)
                spread = entropy(NOW, t) if o.entropy_of == "token" else h(r)
                up["entropy"] += entropy_slope(NOW, t)
                value["entropy"] -= entropy(NOW, t)
                if r.at == "expert":
                    demo_words += 1
                    w = o.sft * math.exp(-spread if o.sft_sign == "minus" else spread)
                    a = (r.reward - mean) / (deviation if o.std else 1.0)
                    up["nll"] += w * g
                    value["nll"] -= w * math.log(p)
                    up["pg"] += each * a * o.shape * p / (p + o.shape) ** 2 * g
                    value["pg"] -= each * a * p / (p + o.shape)
                else:
                    w = o.right * math.exp(spread) if r.verdict is Verdict.CORRECT else -1.0
                    up["own"] += each * w * g
                    value["own"] -= each * w * math.log(p)
    count = {"nll": demo_words, "pg": below, "own": below, "entropy": words / o.entropy if o.entropy else math.inf}
    total = sum(up[name] / count[name] for name in up)
    return np.asarray(total), {n: v / count[n] for n, v in value.items() if n != "entropy" or o.entropy}


def ready(mask: bool = False, **options: Any) -> tuple[Any, Table]:
    method, policy = method_of(Srft, "srft", rollout={"mask_overlong": mask}, **options), Table(NOW)
    method.setup(policy)
    return method, policy


@pytest.mark.parametrize(("options", "overlong"), [
    ({}, False),
    ({"sft_sign": "plus", "entropy_of": "token", "entropy": 0.0}, False),
    ({"sft": 0.8, "right": 0.3, "shape": 0.4, "std": True, "aggregate": "row", "entropy": 0.2}, True),
    ({"sft_sign": "plus", "aggregate": "token"}, False),
], ids=str)
def test_equations(options: dict[str, Any], overlong: bool) -> None:
    method, policy = ready(overlong, **options)
    rows = members()
    found = update(method, policy, method.credited(rows))
    wanted, losses = by_hand(rows, method.options, overlong)
    close(policy.applied, wanted, 1e-13, "gradient")
    assert {n for n in found if n.startswith("loss/")} == {f"loss/{n}" for n in losses}
    for name, value in losses.items():
        close(found[f"loss/{name}"], value, 1e-13, f"loss of {name}")


def test_weights_are_constants() -> None:
    """Through log pi alone but for f(p): the entropy that weighs has no gradient, whatever its sign and reading."""
    for options in ({}, {"sft_sign": "plus"}, {"entropy_of": "token"}):
        method, _ = ready(entropy=0.0, **options)
        each = np.array([0.0, 0.3, 1.0, 0.2])
        mean = np.array([0.0, 0.5, 0.5, 0.5]) if "entropy_of" not in options else each
        logp = np.log([1.0, 0.5, 0.1, 0.9])
        sign = 1.0 if "sft_sign" in options else -1.0
        for kind, reward, name, wanted in (
            ("expert", 1.0, "nll", 0.5 * np.exp(sign * mean)),
            ("live", 1.0, "own", 0.1 * np.exp(mean)),
            ("live", 0.0, "own", -np.ones(4)),
        ):
            rows = [row([0] * 4, reward, 0, NOW, at=kind), row([0, 1], 0.5, 0, NOW)]
            micro = batching.collate(method.credited(rows)[:1], torch.float64, torch.device("cpu"), {})
            leaf, spread = (torch.tensor(x[None], requires_grad=True) for x in (logp, each))
            value = method.terms(micro, Live(leaf, spread))[name]
            g = torch.autograd.grad((value * micro.scale[name]).sum(), (leaf, spread), allow_unused=True)
            close(-g[0][0, 1:], wanted[1:], 1e-15, f"{name}, {options}")
            assert g[1] is None or not g[1].any(), "no gradient through H"


def test_limits() -> None:
    """All pass: own answers and demonstrations are imitated. All fail: answers are pushed away at the full weight."""
    for reward in (1.0, 0.0):
        method, policy = ready(entropy=0.0)
        own, demo = row([0, 1, 2], reward, 0, OLD), expert([0, 2], reward, 0)
        update(method, policy, method.credited([own, demo]))
        w = 0.1 * math.exp(h(own)) if reward else -1.0
        wanted = 0.5 * math.exp(-h(demo)) * slope(NOW, demo, 1) + w * sum(slope(NOW, own, t) for t in (1, 2)) / 14
        close(policy.applied, wanted, 1e-15, f"all {reward}: flat with its demonstration")


def test_denominators() -> None:
    for aggregate, wanted in (("token", 13.0), ("row", 5.0), ("constant", 35.0)):
        method, _ = ready(aggregate=aggregate)
        rows = [row([0, 1, 2, 0], 1.0, 0, OLD), row([0, 1], 0.0, 0, OLD), expert([0, 1, 1, 1], 1.0, 0)]
        rows += [row([0, 1, 2, 0], 0.0, 1, OLD), row([0, 1, 1, 0], 0.0, 1, OLD)]
        counts = batching.make_batch(method.credited(rows)).counts
        assert counts == {"pg": wanted, "own": wanted, "nll": 3.0, "entropy": 13.0}, aggregate


def test_what_is_told() -> None:
    for sign, options in ((-1.0, {}), (1.0, {"sft_sign": "plus"})):
        method, policy = ready(**options)
        rows = members()
        found = update(method, policy, method.credited(rows))
        demo = np.array([h(r) for r in rows if r.at == "expert"])
        right = np.array([h(r) for r in rows if r.at == "live" and r.verdict is Verdict.CORRECT])
        for name, values in (("entropy_demo", demo), ("entropy_right", right), ("right_weight", 0.1 * np.exp(right)),
                             ("sft_weight", 0.5 * np.exp(sign * demo)), ("demo_reward", [4 / 5]),
                             ("demo_advantage", [0.5, 0.75, 0.0, -0.5, 1 / 3])):
            close(found[f"srft/{name}"], np.mean(values), 1e-15, name)


def test_gather() -> None:
    method, policy = ready(demos=2)
    rows = [row([0, i % 3], float(i % 2), i // 2, OLD) for i in range(4)]
    hands = Hands(policy, rows, {f"p {i}": expert([0, 1, i], 1.0, -1) for i in range(2)})
    out = method.gather(data(), hands, 0)
    assert [(r.at, r.group) for r in out] == [(at, g) for at in ("live", "expert") for g in (0, 0, 1, 1)]
    assert all(r.streams.keys() - {"nll"} == {"own", "pg", "entropy"} for r in out)
    assert all(("nll" in r.streams) == (r.at == "expert") for r in out)


MUTANTS = mutants(
    srft,
    Mutant("compare", "Srft.terms", "sft_sign", by=partial(test_equations, {}, False)),
    Mutant("detach", "Srft.terms", "entropy_BT", by=test_weights_are_constants),
    Mutant("compare", "Srft.spread", "entropy_of", by=partial(test_equations, {}, False)),
    Mutant("branch", "Srft.credited", "verdict 0", by=test_limits),  # wrong answers are imitated
    Mutant("term", "Srft.terms", "right 0", by=test_limits),
    Mutant("constant", "Srft.terms", "shape", to=1.0, by=partial(test_equations, {}, False)),
    Mutant("denominator", "Srft.credited", "aggregate", to="constant", by=test_denominators),
    Mutant("mask", "Srft.told", "CORRECT 2", by=test_what_is_told),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()


def test_refills_are_refused() -> None:
    with pytest.raises(UserError, match=r"rollout\.refill"):
        method_of(Srft, "srft", rollout={"refill": 1})
    assert Srft.needs == {"paired_demos"}


def test_its_steps_count_as_steps_with_rollouts() -> None:
    """Though it has no table `rl`: what compares runs at equal rollouts goes by this."""
    assert catalogue.sampling_steps(run_config({"name": "srft"}, steps=9)) == 9
