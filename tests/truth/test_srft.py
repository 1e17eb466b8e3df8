"""SRFT's three losses in loops over members and tokens, both of its open readings, its limits; and mutants."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from checks import close
from exact import run_config
from mutants import Swaps, mutate
from table import Hands, Table, data, entropy, entropy_slope, log_probs, method_of, row, slope, thetas, tokens, update

from bridgelm.config import catalogue
from bridgelm.errors import UserError
from bridgelm.methods import srft as srft_module
from bridgelm.model import batching
from bridgelm.types import Live, Row, Verdict

NOW, OLD = thetas(4)


def expert(ids: list[int], reward: float, group: int) -> Row:
    return row(ids, reward, group, at="expert")


def members() -> list[Row]:
    """Mixed, all wrong, all right; a wrong demonstration; a grader's fault; a group of one; an answer that was cut."""
    E = Verdict.ERROR
    return [
        *(row(ids, r, 0, OLD) for ids, r in (([0, 1, 2], 1.0), ([0, 1], 0.0), ([1, 2, 2, 0, 1], 0.0))),
        expert([0, 2, 1, 1], 1.0, 0),
        *(row(ids, 0.0, 1, OLD) for ids in ([1, 1, 0], [2, 0, 0, 1], [1, 2])),
        expert([1, 0, 0, 2, 2], 1.0, 1),
        *(row(ids, 1.0, 2, OLD) for ids in ([0, 0, 2], [0, 1, 1, 1])),
        expert([0, 2, 2], 1.0, 2),
        row([2, 1], 1.0, 3, OLD),
        expert([2, 0, 1], 0.0, 3),
        row([1, 1, 1], 9.0, 4, OLD, verdict=E),
        row([1, 0], 0.2, 4, OLD),
        row([2, 2, 1, 0, 1], 0.0, 6, OLD, finished=False),
        row([2, 0, 0], 1.0, 6, OLD),
        expert([2, 1, 0], 1.0, 6),
    ]


def weight_of(r: Row, t: int, o: Any, sign: float) -> float:
    mean = sum(entropy(NOW, u) for u in tokens(r)) / len(tokens(r))
    return math.exp(sign * (entropy(NOW, t) if o.entropy_of == "token" else mean))


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
                up["entropy"] += entropy_slope(NOW, t)
                value["entropy"] -= entropy(NOW, t)
                if r.at == "expert":
                    demo_words += 1
                    w = o.sft * weight_of(r, t, o, -1.0 if o.sft_sign == "minus" else 1.0)
                    a = (r.reward - mean) / (deviation if o.std else 1.0)
                    up["nll"] += w * g
                    value["nll"] -= w * math.log(p)
                    up["pg"] += each * a * o.shape * p / (p + o.shape) ** 2 * g
                    value["pg"] -= each * a * p / (p + o.shape)
                else:
                    w = o.right * weight_of(r, t, o, 1.0) if r.verdict is Verdict.CORRECT else -1.0
                    up["own"] += each * w * g
                    value["own"] -= each * w * math.log(p)
    count = {"nll": demo_words, "pg": below, "own": below, "entropy": words / o.entropy if o.entropy else math.inf}
    total = sum(up[name] / count[name] for name in up)
    return np.asarray(total), {n: v / count[n] for n, v in value.items() if n != "entropy" or o.entropy}


SETTINGS: tuple[tuple[dict[str, Any], bool], ...] = (
    ({}, False),
    ({"sft_sign": "plus", "entropy_of": "token", "entropy": 0.0}, False),
    ({"sft": 0.8, "right": 0.3, "shape": 0.4, "std": True, "aggregate": "row", "entropy": 0.2}, True),
    ({"sft_sign": "plus", "aggregate": "token"}, False),
)


def ready(module: ModuleType, mask: bool = False, **options: Any) -> tuple[Any, Table]:
    method, policy = method_of(module.Srft, "srft", rollout={"mask_overlong": mask}, **options), Table(NOW)
    method.setup(policy)
    return method, policy


def equations(module: ModuleType) -> None:
    for options, overlong in SETTINGS:
        method, policy = ready(module, overlong, **options)
        rows = members()
        found = update(method, policy, method.credited(rows))
        wanted, losses = by_hand(rows, method.options, overlong)
        close(policy.applied, wanted, 1e-13, f"gradient, {options}")
        assert {n for n in found if n.startswith("loss/")} == {f"loss/{n}" for n in losses}
        for name, value in losses.items():
            close(found[f"loss/{name}"], value, 1e-13, f"loss of {name}, {options}")


def weights_are_constants(module: ModuleType) -> None:
    """Through log pi alone but for f(p): the entropy that weighs has no gradient, whatever its sign and reading."""
    for options in ({}, {"sft_sign": "plus"}, {"entropy_of": "token"}):
        method, _ = ready(module, entropy=0.0, **options)
        h = np.array([0.0, 0.3, 1.0, 0.2])
        mean = np.array([0.0, 0.5, 0.5, 0.5]) if "entropy_of" not in options else h
        logp = np.log([1.0, 0.5, 0.1, 0.9])
        sign = 1.0 if "sft_sign" in options else -1.0
        for kind, reward, name, wanted in (
            ("expert", 1.0, "nll", 0.5 * np.exp(sign * mean)),
            ("live", 1.0, "own", 0.1 * np.exp(mean)),
            ("live", 0.0, "own", -np.ones(4)),
        ):
            rows = [row([0] * 4, reward, 0, NOW, at=kind), row([0, 1], 0.5, 0, NOW)]
            micro = batching.collate(method.credited(rows)[:1], torch.float64, torch.device("cpu"), {})
            leaf, spread = (torch.tensor(x[None], requires_grad=True) for x in (logp, h))
            value = method.terms(micro, Live(leaf, spread))[name]
            g = torch.autograd.grad((value * micro.scale[name]).sum(), (leaf, spread), allow_unused=True)
            close(-g[0][0, 1:], wanted[1:], 1e-15, f"{name}, {options}")
            assert g[1] is None or not g[1].any(), "no gradient through H"


def limits(module: ModuleType) -> None:
    """All pass: own answers and demonstrations are imitated. All fail: answers are pushed away at the full weight."""
    for reward in (1.0, 0.0):
        method, policy = ready(module, entropy=0.0)
        own, demo = row([0, 1, 2], reward, 0, OLD), expert([0, 2], reward, 0)
        rows = method.credited([own, demo])
        assert not any(r.streams["pg"].weight.any() for r in rows), "flat with its demonstration"
        update(method, policy, rows)
        h = [np.mean([entropy(NOW, t) for t in tokens(r)]) for r in (own, demo)]
        w = 0.1 * math.exp(h[0]) if reward else -1.0
        wanted = 0.5 * math.exp(-h[1]) * slope(NOW, demo, 1) + w * sum(slope(NOW, own, t) for t in (1, 2)) / 14
        close(policy.applied, wanted, 1e-15, f"all {reward}")
    method, _ = ready(module)
    rows = method.credited([*(row([0, 1], 0.0, 0, OLD) for _ in range(7)), expert([0, 2], 1.0, 0)])
    assert rows[-1].streams["pg"].weight[1] == 7 / 8, "all own answers fail"
    assert {float(r.streams["own"].weight[1]) for r in rows[:-1]} == {-1.0}


def denominators(module: ModuleType) -> None:
    for aggregate, wanted in (("token", 13.0), ("row", 5.0), ("constant", 35.0)):
        method, _ = ready(module, aggregate=aggregate)
        rows = [row([0, 1, 2, 0], 1.0, 0, OLD), row([0, 1], 0.0, 0, OLD), expert([0, 1, 1, 1], 1.0, 0)]
        rows += [row([0, 1, 2, 0], 0.0, 1, OLD), row([0, 1, 1, 0], 0.0, 1, OLD)]
        counts = batching.make_batch(method.credited(rows)).counts
        assert counts == {"pg": wanted, "own": wanted, "nll": 3.0, "entropy": 13.0}, aggregate


def what_is_told(module: ModuleType) -> None:
    for sign, options in ((-1.0, {}), (1.0, {"sft_sign": "plus"})):
        method, policy = ready(module, **options)
        rows = members()
        found = update(method, policy, method.credited(rows))

        def h(r: Row) -> float:
            return float(np.mean([entropy(NOW, t) for t in tokens(r)]))

        demos = [r for r in rows if r.at == "expert"]
        right = [r for r in rows if r.at == "live" and r.verdict is Verdict.CORRECT]
        close(found["srft/entropy_demo"], np.mean([h(r) for r in demos]), 1e-15)
        close(found["srft/entropy_right"], np.mean([h(r) for r in right]), 1e-15)
        close(found["srft/sft_weight"], np.mean([0.5 * math.exp(sign * h(r)) for r in demos]), 1e-15)
        close(found["srft/right_weight"], np.mean([0.1 * math.exp(h(r)) for r in right]), 1e-15)
        close(found["srft/demo_reward"], 4 / 5, 1e-15)
        close(found["srft/demo_advantage"], np.mean([0.5, 0.75, 0.0, -0.5, 1 / 3]), 1e-15)


def gather(module: ModuleType) -> None:
    method, policy = ready(module, demos=2)
    rows = [row([0, i % 3], float(i % 2), i // 2, OLD) for i in range(4)]
    hands = Hands(policy, rows, {f"p {i}": expert([0, 1, i], 1.0, -1) for i in range(2)})
    out = method.gather(data(), hands, 0)
    assert [(r.at, r.group) for r in out] == [("live", 0)] * 2 + [("live", 1)] * 2 + [("expert", 0)] * 2 + [
        ("expert", 1)
    ] * 2
    assert all({"own", "pg", "entropy"} <= r.streams.keys() for r in out)
    assert all(("nll" in r.streams) == (r.at == "expert") for r in out)


CHECKS: dict[str, Callable[[ModuleType], None]] = {
    f.__name__: f for f in (equations, weights_are_constants, limits, denominators, what_is_told, gather)
}


@pytest.mark.parametrize("name", CHECKS)
def test_shipped_code(name: str) -> None:
    CHECKS[name](srft_module)


SIGN = '-1.0 if o.sft_sign == "minus" else 1.0\n            out'
OWN = 'torch.where(weight["own"] > 0, o.right * h_BT.exp(), 1.0)'
PAIR = '{"pg": advantage, "own": 0.0} if expert else {"pg": 0.0, "own": sign}'
MUTANTS: dict[str, tuple[Swaps, str]] = {
    "SFT's sign turned round": (((SIGN, SIGN.replace("minus", "plus")),), "equations"),
    "H always minus": (((SIGN, SIGN.replace("else 1.0", "else -1.0")),), "equations"),
    "H has a gradient": (
        (("live.entropy_BT.detach(), batch.own_BT", "live.entropy_BT, batch.own_BT"),),
        "weights_are_constants",
    ),
    "H is a sum": (((" / own_BT.sum(1).clamp(min=1)", ""),), "equations"),
    "H over padding": ((("own_BT.sum(1).clamp(min=1)", "own_BT.shape[1]"),), "equations"),
    "always a sequence's H": ((('self.options.entropy_of == "token"', "False"),), "equations"),
    "always a token's H": ((('self.options.entropy_of == "token"', "True"),), "equations"),
    "own answers by exp(-H)": (((OWN, OWN.replace("h_BT.exp()", "(-h_BT).exp()")),), "equations"),
    "wrong answers weighed, too": (((OWN, "o.right * h_BT.exp()"),), "limits"),
    "right answers in full": (((OWN, "1.0"),), "limits"),
    "wrong answers imitated": ((("CORRECT else -1.0", "CORRECT else 1.0"),), "limits"),
    "the coefficients of each other": ((("* o.sft *", "* o.right *"),), "equations"),
    "the demonstration imitated as often": (
        (('losses.shaped(logp_BT, weight["pg"], o.shape)', 'losses.nll(logp_BT, weight["pg"])'),),
        "equations",
    ),
    "shape fixed": ((('weight["pg"], o.shape)', 'weight["pg"], 0.1)'),), "equations"),
    "no RL on demonstrations": (((PAIR, PAIR.replace('"pg": advantage', '"pg": 0.0')),), "limits"),
    "the demonstration is an own answer": (((PAIR, PAIR.replace('"own": 0.0}', '"own": sign}')),), "limits"),
    "each by its own rows": (((PAIR, '{"pg": advantage} if expert else {"own": sign}'),), "denominators"),
    "std forgotten": ((("rows, o.std)", "rows, False)"),), "equations"),
    "overlong answers teach": ((("if rollout.mask_overlong and not row.finished", "if False"),), "equations"),
    "aggregate forgotten": (((", weight, o.aggregate,", ', weight, "constant",'),), "denominators"),
    "imitation of all": ((("mask=row.own) if expert else row", "mask=row.own)"),), "gather"),
    "a term left out": ((('"pg": 1.0, "own": 1.0}', '"pg": 1.0, "own": 0.5}'),), "equations"),
    "bonus is a malus": ((('= -weight["entropy"]', '= weight["entropy"]'),), "equations"),
    "one demonstration": (((", step, self.options.demos)", ", step, 1)"),), "gather"),
    "told of all own answers": (((" and batch.rows[i].verdict is Verdict.CORRECT", ""),), "what_is_told"),
    "told the other sign": (
        (('sign = -1.0 if o.sft_sign == "minus" else 1.0\n        return', "sign = -1.0\n        return"),),
        "what_is_told",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_seen(name: str) -> None:
    swaps, check = MUTANTS[name]
    with pytest.raises(AssertionError):
        CHECKS[check](mutate(srft_module, swaps, "mutant"))


def test_refills_are_refused() -> None:
    with pytest.raises(UserError, match=r"rollout\.refill"):
        method_of(srft_module.Srft, "srft", rollout={"refill": 1})
    assert srft_module.Srft.needs == {"paired_demos"}


def test_its_steps_count_as_steps_with_rollouts() -> None:
    """Though it has no table `rl`: what compares runs at equal rollouts goes by this."""
    assert catalogue.sampling_steps(run_config({"name": "srft"}, steps=9)) == 9
