"""TRAPO: fixed points of TrSFT, its two limits, the table of micro-groups, and the credit of a row, each against
numbers that do not come from the code; and mutants."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checks import close
from exact import run_config
from mutation import Mutant, mutants

from bridgelm.errors import UserError
from bridgelm.methods import trapo
from bridgelm.methods.sft import Sft
from bridgelm.model import batching
from bridgelm.objective import credit, losses
from bridgelm.types import Demo, Live, Problem, Row, Verdict

EXPERT = np.array([0.45, 0.25, 0.15, 0.08, 0.05, 0.02])
WRITTEN = {"a": list(range(10, 30)), "b": list(range(40, 52))}  # tokens of the two demonstrations
END = 9


def method_of(group: int = 8, prompts: int = 1, rollout: Any = (), **options: Any):
    sections = {"rollout": {"group": group, "prompts": prompts, "max_new_tokens": 16, **dict(rollout)}}
    config = run_config({"name": "trapo", **options}, **sections)
    return trapo.Trapo(config.method, config)


# -- TrSFT on one token ------------------------------------------------------------------------------------------------


@cache
def symbols() -> tuple[Any, float]:
    """Each symbol as a demonstration of one token that weighs what the expert gives it; and the batch's denominator."""
    rows = []
    for i, p in enumerate(EXPERT):
        blank = Row(np.array([0, i]), np.array([False, True]), "rollout", Problem("p", ()), given=1)
        rows.append(blank.with_stream("nll", p, "constant", 1 / len(EXPERT), np.array([False, True])))
    batch = batching.make_batch(rows)
    return batching.collate(rows, torch.float64, torch.device("cpu"), {}), batch.counts["nll"]


def slope(method: Any, z: torch.Tensor) -> np.ndarray:
    """The ascent direction in the logits, through the method's terms and the batch's own denominator."""
    micro, count = symbols()
    leaf = z.clone().requires_grad_()
    logp_BT = torch.stack([torch.zeros(len(EXPERT), dtype=torch.float64), torch.log_softmax(leaf, 0)], 1)
    loss = (method.terms(micro, Live(logp_BT))["nll"] * micro.scale["nll"]).sum() / count
    return -torch.autograd.grad(loss, leaf)[0].numpy()


def rest_of(method: Any) -> np.ndarray:
    """Where the flow rests. It is taken in the metric of the probabilities: the same rest points, reached sooner."""
    z = torch.zeros(len(EXPERT), dtype=torch.float64)
    for _ in range(700):
        p = torch.softmax(z, 0).numpy()
        z = z + torch.from_numpy(np.clip(0.5 * slope(method, z) / np.maximum(p, 1e-12), -2, 2))
    return torch.softmax(z, 0).numpy()


def test_fixed_points() -> None:
    found = rest_of(method_of(alpha=0.1))
    close(found, [0.45 / 0.85, 0.25 / 0.85, 0.15 / 0.85, 0, 0, 0], 1e-6, "alpha .1: the three kept, over .85")
    close(found, [0.529, 0.294, 0.176, 0, 0, 0], 5e-4, "the printed ones")
    # .15 = alpha lambda is marginal: it takes what the kept two leave of lambda = .75.
    close(rest_of(method_of(alpha=0.2)), [0.6, 1 / 3, 1 / 15, 0, 0, 0], 1e-6, "alpha .2")


def test_limits_of_alpha() -> None:
    """alpha = 0 is sft, to the bit; alpha = 1 weighs p, as DFT does; between, the code's loss has the same gradient."""
    z = torch.tensor([0.3, -1.0, 2.0, 0.1, -3.0, 0.7], dtype=torch.float64)
    config = run_config({"name": "sft"})
    close(slope(method_of(alpha=0.0), z), slope(Sft(config.method, config), z), 0.0, "sft")
    close(slope(method_of(alpha=1e-300), z), slope(Sft(config.method, config), z), 0.0, "nearly 0")
    p = torch.softmax(z, 0).numpy()
    by_hand = EXPERT * p - p * (EXPERT * p).sum()
    close(slope(method_of(alpha=1.0), z), by_hand, 1e-16, "DFT in closed form")
    for alpha in (0.05, 0.1, 0.3, 1.0):
        leaf = z.clone().requires_grad_()
        q = torch.softmax(leaf, 0)
        ratio = (torch.from_numpy(EXPERT) * q / q.detach().clamp(min=alpha)).sum()
        wanted = torch.autograd.grad(ratio, leaf)[0].numpy()
        close(slope(method_of(alpha=alpha), z), wanted, 1e-15, f"the code's loss at alpha = {alpha}")


# -- rows --------------------------------------------------------------------------------------------------------------


class FakeChat:
    """Demonstrations are lists of tokens by name; token 23, the 14th of "a", has a blank line."""

    def demo_ids(self, problem: Problem, demo: Demo) -> tuple[np.ndarray, np.ndarray]:
        ids = [1, 2, *WRITTEN[demo.text], END]
        return np.array(ids), np.arange(len(ids)) >= 2

    def text(self, ids: Any) -> str:
        return "\n\n" if 23 in ids else "x"


class FakeRoller:
    """Hands out rewards in the order of a prompt's rows, and keeps what each row was given."""

    def __init__(self, rewards: dict[str, list[Any]]) -> None:
        self.chat, self.rewards, self.made = FakeChat(), {name: iter(list(r)) for name, r in rewards.items()}, 0
        self.calls = 0

    def row(self, problem: Problem, number: int, given: Any, drawn: int, at: str) -> Row:
        ids = np.array([1, 2, *given, *[5] * drawn])
        reward = next(self.rewards[problem.id])
        verdict = Verdict.ERROR if reward is None else Verdict.CORRECT if reward else Verdict.WRONG
        return Row(ids, np.arange(len(ids)) >= 2, "rollout", problem, number, at, old_logps=np.zeros(len(ids)),
                   reward=math.nan if reward is None else reward, verdict=verdict, given=len(given))

    def __call__(self, problems: Any, group: int, prefixes: Any = None, numbers: Any = None) -> list[Row]:
        self.calls += 1
        if numbers is None:
            numbers = range(self.made, self.made + len(problems))
            self.made += len(problems)
        prefixes = iter(prefixes if prefixes is not None else [[]] * (group * len(problems)))
        pairs = [pair for pair in zip(problems, numbers, strict=True) for _ in range(group)]
        return [self.row(p, n, next(prefixes), 3, "live") for p, n in pairs]

    def experts(self, pairs: Any, numbers: Any) -> list[Row]:
        return [self.row(p, n, [*WRITTEN[d.text], END], 0, "expert") for (p, d), n in zip(pairs, numbers, strict=True)]


def gathered(method: Any, rewards: dict[str, list[Any]], demos: tuple[str, ...] = ("a", "b")) -> list[Row]:
    problems = [Problem(name, (), demos=tuple(Demo(text) for text in demos)) for name in rewards]
    data = SimpleNamespace(problems=lambda n: problems)
    roll = FakeRoller(rewards)
    rows = method.gather(data, roll, 0)
    assert len(rows) == sum(method.sizes) * len(problems), "always as many rows a prompt"
    assert roll.calls <= 4
    return rows


def levels(rows: list[Row]) -> list[int]:
    return [row.given for row in rows]


def helped(table: str, scores: tuple[int, ...]) -> list[bool]:
    """The table of the notes, in sums: which of the last three micro-groups get their prefix."""
    s4, s6, s7 = sum(scores[:4]), sum(scores[:6]), sum(scores[:7])
    return [s4 < 2, s6 < 4, s7 < 7] if table == "code" else [s4 / 4 < 0.5, s6 / 6 < 0.7, s7 / 7 < 0.9]


def test_table_of_micro_groups() -> None:
    shares = {"code": 5, "paper": 4}  # tokens of 20: .25 and .2; half of them goes on to 14
    for table, short in shares.items():
        for scores in itertools.product((0, 1), repeat=8):
            found = levels(gathered(method_of(table=table), {"p": list(scores)}))
            two, three, four = helped(table, scores)
            wanted = [0] * 4 + [short * two] * 2 + [14 * three, 13 * four]
            assert found == wanted, (table, scores, found, wanted)
    edge = [1, 1, 1, 1, 0, 0, 0, 0]  # S6 = 4: .667
    assert levels(gathered(method_of(table="code"), {"p": edge}))[6] == 0
    assert levels(gathered(method_of(table="paper"), {"p": edge}))[6] == 14


def test_prompts_apart() -> None:
    """Each prompt is helped for itself, rows stay in its group, and an ungraded answer says nothing."""
    rewards = {"hard": [0] * 8, "easy": [1] * 8, "odd": [1, None, 0, None, 0, 0, 0, 0]}
    rows = gathered(method_of(prompts=3), rewards)
    by = {name: [row for row in rows if row.problem.id == name] for name in rewards}
    assert levels(by["hard"]) == [0, 0, 0, 0, 5, 5, 14, 13]
    assert levels(by["easy"]) == [0] * 8
    assert levels(by["odd"]) == [0] * 6 + [14, 13], "one of two graded answers is right: no help for the second part"
    assert [{row.group for row in part} for part in by.values()] == [{0}, {1}, {2}]
    assert not levels(gathered(method_of(), {"p": [None] * 8}))[4], "nothing known, no help"
    assert levels(gathered(method_of(), {"p": [0] * 8}, demos=())) == [0] * 8, "nor without a demonstration"


def test_second_trace() -> None:
    method = method_of()
    last = gathered(method, {"p": [0] * 8})[-1]
    assert last.ids[last.own].tolist() == [*WRITTEN["b"], END]
    assert method.measured["trapo/repeated"] == 0
    assert not method.warnings(method.measured)
    last = gathered(method, {"p": [0] * 8}, demos=("a",))[-1]
    assert last.ids[last.own].tolist() == [*WRITTEN["a"], END], "the first one again"
    assert "one demonstration only" in method.warnings(method.measured)[0]


def test_other_sizes() -> None:
    assert trapo.sizes(8) == (4, 2, 1, 1)
    assert trapo.sizes(16) == (8, 4, 2, 2)
    assert [trapo.sizes(g) for g in (4, 5, 6)] == [(1, 1, 1, 1), (2, 1, 1, 1), (3, 1, 1, 1)]
    assert all(sum(trapo.sizes(g)) == g and min(trapo.sizes(g)) > 0 for g in range(4, 40))
    rows = gathered(method_of(group=16), {"p": [0] * 16})
    assert levels(rows) == [0] * 8 + [5] * 4 + [14] * 2 + [13, 21], "whole demonstrations take turns"
    paid = [bool(row.streams["nll"].weight.any()) for row in rows]
    assert paid == [False] * 11 + [True, False, True, True, True]


def test_cuts() -> None:
    assert trapo.cut(20, [], 0.25) == 5
    assert trapo.cut(20, [], 0.5) == 10
    assert trapo.cut(7, [], 0.5) == 3, "rounded down"
    assert trapo.cut(20, [3], 0.25) == 5, "a blank line before the cut is behind us"
    assert trapo.cut(20, [5], 0.25) == 6, "just after the first later token with a blank line"
    assert trapo.cut(20, [2, 9, 10], 0.25) == 10
    assert trapo.cut(20, [11], 0.25) == 5, "(.25 + .3) 20 = 11 is too far"
    assert trapo.cut(20, [9], 0.2) == 10
    assert trapo.cut(20, [10], 0.2) == 4


def test_thoughts() -> None:
    text = "<think>why</think> so 4"
    problem = Problem("p", (), demos=(Demo(text), Demo("no marks")))
    assert method_of().demo(problem, 0).text == text, "the answer stays in"
    assert method_of(trace="think").demo(problem, 0).text == "why", "as released"
    assert method_of(trace="think").demo(problem, 1).text == "no marks"


# -- credit ------------------------------------------------------------------------------------------------------------


def streams_by_hand(rows: list[Row], baseline: str, std: bool, prefix_weight: str, shared: list[int]) -> Any:
    """Per token: the RL weight and the TrSFT weight of each row of one group, None where a row has left it."""
    good = [row for row in rows if row.verdict is not Verdict.ERROR]
    base = [row.reward for row in good if baseline == "all" or row.given == 0]
    mean = sum(base) / len(base)
    deviation = math.sqrt(sum((r - mean) ** 2 for r in base) / len(base)) + 1e-6
    out = []
    for i, row in enumerate(rows):
        if row.verdict is Verdict.ERROR:
            out.append(None)
            continue
        a = (row.reward - mean) / (deviation if std and max(base) > min(base) else 1.0)  # flat: nothing to divide by
        pays = 0.0 if i in shared else a if prefix_weight == "advantage" else 1.0
        given = [t >= 2 and t < 2 + row.given for t in range(len(row.ids))]
        drawn = [t >= 2 + row.given for t in range(len(row.ids))]
        out.append(([a * d for d in drawn], [pays * g for g in given]))
    return out


def test_credit_of_a_row() -> None:
    cases = [([0, 1, 0, 0, 0, 1, 0, 1], [4]), ([0, None, 0, 0, 1, None, 0, 1], []), ([0, 0, 0, 0, 0, 0, 0, 0], [4])]
    for rewards, shared in cases:
        for baseline, std, weight in itertools.product(("all", "own"), (False, True), ("one", "advantage")):
            options = {"baseline": baseline, "prefix_weight": weight, "rl": {"std": std}}
            rows = gathered(method_of(**options), {"p": rewards})
            wanted = streams_by_hand(rows, baseline, std, weight, shared)
            for row, one in zip(rows, wanted, strict=True):
                if one is None:
                    assert not row.streams, "an ungraded row leaves the group"
                    continue
                for name, weights in zip(("pg", "nll"), one, strict=True):
                    found = row.streams[name].weight * row.streams[name].mask
                    close(found, weights, 1e-15, f"{name}, {rewards}, {options}")
            counts = batching.make_batch(rows).counts
            assert counts["pg"] == counts["nll"] == 16 * sum(one is not None for one in wanted), "one denominator"


def test_flat_groups() -> None:
    """All pass: no help, nothing to learn, to the bit. All fail, the demonstration too: TrSFT of the prefixes alone."""
    passed = gathered(method_of(), {"p": [1.0] * 8})
    assert not any(row.streams[name].weight.any() for row in passed for name in ("pg", "nll"))
    six = gathered(method_of(group=6), {"p": [0.1] * 6})  # whose mean is not quite .1
    failed = gathered(method_of(), {"p": [0.1] * 8})
    assert not any(row.streams["pg"].weight.any() for row in (*failed, *six))
    assert [int(row.streams["nll"].weight.sum()) for row in failed] == [0, 0, 0, 0, 0, 5, 14, 13]


def test_unclipped() -> None:
    """-A rho for whatever rho; with `clip` the usual bounds. No RL gradient reaches a given token."""
    row = gathered(method_of(), {"p": [0, 1, 1, 0, 0, 0, 0, 0]})[1]
    row = replace(row, old_logps=np.log([1, 1, 0.1, 0.5, 0.9]))
    micro = batching.collate([row], torch.float64, torch.device("cpu"), {})
    logp = torch.full((1, 5), math.log(0.8), dtype=torch.float64, requires_grad=True)
    for clip, bound in ((False, math.inf), (True, 1.28)):
        loss = method_of(clip=clip).terms(micro, Live(logp))["pg"]
        ratios = np.array([0, 0, 8.0, 1.6, 0.8 / 0.9])
        close(loss.detach()[0].numpy(), -row.streams["pg"].weight * np.minimum(ratios, bound), 1e-14, f"clip {clip}")
    guided = gathered(method_of(), {"p": [0, 1, 0, 0, 0, 0, 1, 0]})[6]
    micro = batching.collate([guided], torch.float64, torch.device("cpu"), {})
    leaf = torch.full(micro.old_BT.shape, -0.7, dtype=torch.float64, requires_grad=True)
    loss = (method_of().terms(micro, Live(leaf))["pg"] * micro.scale["pg"]).sum()
    slope_ = torch.autograd.grad(loss, leaf)[0][0].numpy()
    assert guided.given == 14
    assert not slope_[: 2 + guided.given].any()
    assert slope_[2 + guided.given :].all()


def test_entropy() -> None:
    rows = gathered(method_of(), {"p": [0] * 8})
    micro = batching.collate(rows, torch.float64, torch.device("cpu"), {})
    values = torch.full_like(micro.old_BT, 0.6)
    loss = (method_of().terms(micro, Live(micro.old_BT - 1, values))["entropy"] * micro.scale["entropy"]).sum()
    counts = batching.make_batch(rows).counts
    assert counts["entropy"] == 7 * 3, "drawn tokens"
    close(float(loss) / counts["entropy"], -0.6, 1e-15, "minus the mean entropy")
    assert all("entropy" not in row.streams for row in gathered(method_of(entropy_coef=0.0), {"p": [0] * 8}))


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(UserError, match="set it to 8"):
        method_of(group=3)
    with pytest.raises(UserError, match="refill"):
        method_of(rollout={"refill": 1})


MUTANTS = mutants(
    trapo,
    Mutant("clip", "prob_weight", "clamp 0", by=test_fixed_points, of=losses),  # no cap on p / alpha
    Mutant("detach", "prob_weight", by=test_limits_of_alpha, of=losses),
    Mutant("compare", "Trapo.gather", "get 0", by=test_table_of_micro_groups),  # help at the threshold, too
    Mutant("branch", "mean_rewards", 0, by=test_prompts_apart, of=credit),  # what was not graded counts
    Mutant("term", "Trapo.micro_group", 1, by=test_second_trace),  # the first demonstration again
    Mutant("mask", "charged", 2, by=test_credit_of_a_row),  # each row pays for a shared prefix
    Mutant("denominator", "Trapo.credited", "nll", "token", by=test_credit_of_a_row),
    Mutant("instead", "Trapo.credited", "drawn 0", "own", by=test_unclipped),  # RL on given tokens
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()
