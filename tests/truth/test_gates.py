"""`hpt` and `relift`: which problems turn from RL to their demonstrations, with which weight, by loops over tokens on a
table of logits, with mutants of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bigram import END, V, World, ids_of, method_of, probability, problem, slope
from mutation import Mutant, mutants

from bridgelm.errors import UserError
from bridgelm.methods import hpt, relift
from bridgelm.methods.grpo import Grpo
from bridgelm.methods.sft import Sft
from bridgelm.model.batching import make_batch
from bridgelm.objective import losses
from bridgelm.types import Row

# Answers of four rollouts of each problem; a 5 in it is right, a 4 is half a reward, a 3 cannot be graded.
SCRIPT = {
    "fails": [(1, 2, END), (2, END), (1, 1, 2, END), (END,)],
    "mixed": [(5, END), (1, END), (2, 5, 1, END), (1, 2, 2, END)],
    "rare": [(5, END), (1, 1, END), (2, 1, END), (1, 2, 2, END)],
    "passes": [(5, END), (5, 5, END), (2, 5, END), (5, 1, END)],
    "half": [(4, END), (4, 4, END), (4, 1, END), (2, 4, END)],
    "bare": [(1, END), (2, END), (2, 1, END), (END,)],
    "broken": [(3, END), (3, 1, END), (3, END), (1, 3, END)],
    "partly": [(3, END), (1, END), (2, 2, END), (3, 1, END)],
}
PROBLEMS = [
    problem("fails", "1 1", "2 5", "5"), problem("mixed", "1 2", "1 5 1"), problem("rare", "2 1", "5 5"),
    problem("passes", "2 2", "2 2 5 1"), problem("half", "3 1", "4 5"), problem("bare", "3 2"),
    problem("broken", "3 3", "5 1"), problem("partly", "4 1", "2 2 2 5"),
]
ONE = [p if p.id != "fails" else problem("fails", "1 1", "2 5") for p in PROBLEMS]  # no choice of demonstrations


def reward(_: str, answer: tuple[int, ...]) -> float | None:
    return None if 3 in answer else 1.0 if 5 in answer else 0.5 if 4 in answer else 0.0


def world(cls: Any, options: dict[str, Any], problems: Any = ONE, lr: float = 0.0, **rollout: Any) -> World:
    method = method_of(cls, options, prompts=len(problems), **{"temperature": 0.8, **rollout})
    made = World(method, problems, lambda name, _, i: SCRIPT[name][i % 4], reward)
    made.policy.lr = lr
    return made


def graded(name: str) -> list[tuple[int, ...]]:
    return [answer for answer in SCRIPT[name] if 3 not in answer]


def bare_row(made: World, name: str, tokens: Any, temperature: float) -> Row:
    prompt = ids_of(next(p for p in made.problems if p.id == name).prompt)
    ids = np.array([*prompt, *tokens])
    return Row(ids, np.arange(len(ids)) >= len(prompt), "demo", made.problems[0], temperature=temperature)


def drawn(made: World, row: Row, weight: float = 1.0, shape: float | None = None) -> np.ndarray:
    """Sum over the row's own tokens of weight x d log pi, or of A d [p / (p + shape)]."""
    total = np.zeros((V, V))
    for t in np.flatnonzero(row.own):
        p = probability(made.policy.theta, row, t)
        total += weight * slope(made.policy.theta, row, t) * (1.0 if shape is None else shape * p / (p + shape) ** 2)
    return total


def own_part(made: World, weights: dict[str, float], temperature: float = 0.8) -> np.ndarray:
    """Of J_RL: every token of a group with two graded answers counts, with or without weight."""
    total, tokens = np.zeros((V, V)), 0
    for p in made.problems:
        answers = graded(p.id)
        if len(answers) < 2:
            continue
        rewards = [reward("", a) or 0.0 for a in answers]
        for answer, r in zip(answers, rewards):
            advantage = r - sum(rewards) / len(rewards)
            total += drawn(made, bare_row(made, p.id, answer, temperature), weights[p.id] * advantage)
            tokens += len(answer)
    return total / tokens


def demo_part(made: World, weights: dict[str, float], share: bool = True) -> np.ndarray:
    """Mean over demonstration tokens of weight x d log pi, times the share of the problems that have any."""
    total, tokens, found = np.zeros((V, V)), 0, 0
    for p in made.problems:
        if weights.get(p.id):
            found += 1
            for demo in p.demos:
                row = bare_row(made, p.id, [*ids_of(demo.text), END], 1.0)
                total += drawn(made, row, weights[p.id])
                tokens += int(row.own.sum())
    every = sum(len(graded(p.id)) > 0 for p in made.problems)
    return total / max(1, tokens) * (found / every if share else 1.0)


def same(found: Any, wanted: Any, tolerance: float = 1e-13) -> None:
    assert np.allclose(found, wanted, rtol=0, atol=tolerance), np.abs(np.asarray(found) - np.asarray(wanted)).max()


# -- hpt ---------------------------------------------------------------------------------------------------------------

RATES = {"fails": 0.0, "mixed": 0.5, "rare": 0.25, "passes": 1.0, "half": 0.5, "partly": 0.0}
HARD: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "rate": ({}, lambda name: RATES[name] <= 0),
    "a quarter": ({"gamma": 0.25}, lambda name: RATES[name] <= 0.25),
    "a half, at a third": ({"gamma": 0.5, "sft": 0.3}, lambda name: RATES[name] <= 0.5),
    "terms": ({"balance": "terms"}, lambda name: RATES[name] <= 0),
    "advantage": ({"gate": "advantage"}, lambda name: RATES[name] in (0.0, 1.0) or name == "half"),
    "never": ({"gamma": -1.0}, lambda name: False),
    "always": ({"gamma": 1.0}, lambda name: True),
}


@pytest.mark.parametrize("name", HARD)
def test_hard_gate(name: str) -> None:
    options, closed = HARD[name]
    for problems, demos in ((ONE, "one"), (PROBLEMS, "all")):
        made = world(hpt.Hpt, {"name": "hpt", "demos": demos, **options}, problems)
        found = made.step()
        gated = {p.id: bool(p.demos) and p.id in RATES and closed(p.id) for p in problems}
        wanted = own_part(made, {p.id: float(not gated[p.id]) for p in problems})
        nll = demo_part(made, {key: options.get("sft", 1.0) * yes for key, yes in gated.items()},
                        options.get("balance") != "terms")
        (applied,) = found.applied
        assert applied[0] == "theta"
        same(applied[1], wanted + nll)
        share = sum(gated.values()) / sum(len(graded(p.id)) > 0 for p in problems)
        assert found.metrics["hpt/gated"] == pytest.approx(share)
        # The rollouts of a gated problem are still there to be counted and reported.
        assert sum(row.kind == "rollout" for row in found.rows) == 4 * len(problems)


def test_soft_gate() -> None:
    """Numbers of the official table, for eight rollouts; and what lies between its rows."""
    table = {0: (0, 0, 1), 1: (0, 0, 1), 2: (0.125, 0.5, 0.5), 3: (0.25, 1, 0.25), 4: (0.5, 0.5, 0.125),
             5: (1, 0.25, 0), 6: (1, 0.125, 0), 7: (1, 0, 0), 8: (1, 0, 0)}
    made = method_of(hpt.Hpt, {"name": "hpt", "gate": "soft", "sft": 0.5})
    for k, (own, offline, sft) in table.items():
        found = made.weights(np.array([1.0] * k + [0.0] * (8 - k)))
        assert found == (own, offline, 0.5 * sft), k
    assert made.weights(np.array([1.0, 0.0] + [0.0] * 14)) == (0.0, 0.0, 0.5)
    assert made.weights(np.array([0.3125] * 2)) == (0.1875, 0.75, 0.1875)  # 2.5 of 8
    made = world(hpt.Hpt, {"name": "hpt", "gate": "soft", "sft": 0.5, "shape": 0.3})
    found = made.step()
    weights = {p.id: table[round(8 * RATES[p.id])] if p.demos and p.id in RATES else (1.0, 0.0, 0.0) for p in ONE}
    wanted = own_part(made, {name: w[0] for name, w in weights.items()})
    wanted += demo_part(made, {name: 0.5 * w[2] for name, w in weights.items()})
    total, tokens, problems = np.zeros((V, V)), 0, 0
    for p in ONE:
        if weights[p.id][1]:
            tokens_of_demo = [*ids_of(p.demos[0].text), END]
            rewards = [reward("", tuple(a)) or 0.0 for a in [*graded(p.id), tokens_of_demo]]
            advantage = rewards[-1] - sum(rewards) / len(rewards)
            row = bare_row(made, p.id, tokens_of_demo, 0.8)
            total += drawn(made, row, weights[p.id][1] * advantage, shape=0.3)
            tokens, problems = tokens + len(tokens_of_demo), problems + 1
    assert problems == 3
    every = sum(len(graded(p.id)) > 0 for p in ONE)
    same(found.applied[0][1], wanted + total / tokens * problems / every)


def test_collapses() -> None:
    """A gate that never opens is grpo; one that always does is sft on the demonstrations of the step's problems."""
    never, grpo = world(hpt.Hpt, {"name": "hpt", "gamma": -1.0}, lr=0.3), world(Grpo, {"name": "grpo"}, lr=0.3)
    for step in range(3):
        one, two = never.step(step), grpo.step(step)
        same(one.applied[0][1], two.applied[0][1], 1e-15)
        assert one.metrics["loss/pg"] == two.metrics["loss/pg"] and one.metrics["hpt/gated"] == 0
    assert np.abs(two.applied[0][1]).max() > 1e-3
    problems = [p for p in PROBLEMS if p.id in RATES]
    always = world(hpt.Hpt, {"name": "hpt", "gamma": 1.0, "demos": "all"}, problems)
    sft = world(Sft, {"name": "sft"}, problems)
    rows = [sft.roll.demo(p, demo).with_stream("nll", 1.0) for p in problems for demo in p.demos]
    metrics = sft.method.update(sft.policy, make_batch(rows), 0)
    found = always.step()
    same(found.applied[0][1], sft.policy.applied[0][1])
    assert found.metrics["loss/nll"] == pytest.approx(metrics["loss/nll"]) and found.metrics["loss/pg"] == 0


def test_flat() -> None:
    """All groups fail: SFT. All pass: nothing, but with the advantage gate SFT as well."""
    for name, gate, imitates in (("fails", "rate", True), ("passes", "rate", False), ("passes", "advantage", True)):
        made = world(hpt.Hpt, {"name": "hpt", "gate": gate}, [p for p in ONE if p.id == name])
        found = made.step()
        same(found.applied[0][1], demo_part(made, {name: 1.0}) if imitates else np.zeros((V, V)))
        assert found.metrics["loss/pg"] == 0
        assert bool(np.abs(found.applied[0][1]).max() > 0) is imitates


def test_one_demo_is_drawn() -> None:
    """By the seed, the step and the problem's place, so that both come up and a resumed run draws the same."""
    def texts(start: int) -> list[str]:
        made = world(hpt.Hpt, {"name": "hpt"}, [p for p in PROBLEMS if p.id == "fails"])
        return [row.text for step in range(start, 12) for row in made.step(step).rows if row.kind == "demo"]
    assert texts(0)[4:] == texts(4) and set(texts(0)) == {"2 5", "5"} and len(texts(0)) == 12


# -- relift ------------------------------------------------------------------------------------------------------------

def relift_world(problems: Any = ONE, prompts: int = 2, **options: Any) -> World:
    method = method_of(relift.Relift, {"name": "relift", "size": 3, "sft_lr": 0.7, **options}, prompts=prompts)
    made = World(method, problems, lambda name, _, i: SCRIPT[name][i % 4], reward)
    made.policy.lr = 0.2
    return made


def test_buffer_fills() -> None:
    """Two problems a step: who enters, who leaves first, and the SFT step: after RL's, with an optimiser of its own."""
    made = relift_world()
    assert made.policy.rates == {"theta": None, "theta_sft": 0.7}
    first = made.step(0)  # fails, mixed
    assert made.method.state() == {"buffer": ["fails"]} and [name for name, _ in first.applied] == ["theta"]
    second = made.step(1)  # rare, passes
    assert made.method.state() == {"buffer": ["fails"]} and second.metrics["relift/failed"] == 0
    third = made.step(2)  # half (no correct one), bare (no demonstration)
    assert made.method.state() == {"buffer": ["half", "fails"]} and third.metrics["relift/failed"] == 0.5
    assert third.metrics["relift/sft"] == 0 and third.metrics["relift/buffer"] == 2
    before = made.policy.theta.clone()
    fourth = made.step(3)  # broken (not graded), partly
    assert made.method.state() == {"buffer": []} and fourth.metrics["relift/failed"] == 1
    assert [name for name, _ in fourth.applied] == ["theta", "theta_sft"] and fourth.metrics["relift/sft"] == 1
    assert [row.problem.id for row in fourth.rows if row.kind == "demo"] == ["partly", "half", "fails"]
    made.policy.theta = before  # both groups are flat: RL does not move it
    same(fourth.applied[1][1], demo_part(made, {"partly": 1.0, "half": 1.0, "fails": 1.0}, share=False))
    # SFT is at the theta that RL's step leads to, in the one step as in the other.
    made = relift_world([p for p in ONE if p.id in ("fails", "mixed")], size=1)
    before = made.policy.theta.clone()
    found = made.step(0)
    made.policy.theta = before
    same(found.applied[0][1], own_part(made, dict.fromkeys(SCRIPT, 1.0), 1.0))
    made.policy.theta = before + 0.2 * torch.from_numpy(found.applied[0][1])
    same(found.applied[1][1], demo_part(made, {"fails": 1.0}, share=False))
    assert all(np.abs(gradient).max() > 1e-2 for _, gradient in found.applied)
    # Newest first, and what is too much stays.
    again = relift_world([p for p in ONE if p.id in ("fails", "partly")], size=3)
    again.step(0)
    assert again.method.buffer == ["fails", "partly"]
    again.step(1)
    assert again.method.buffer == ["partly"]


def test_the_rate_counts() -> None:
    made = relift_world(prompts=8, size=99, pass_rate=0.25)
    made.step(0)
    assert made.method.buffer == ["fails", "rare", "half", "partly"]


def test_rl_alone() -> None:
    """With a buffer that never fills, and on flat groups, the step is grpo's: nothing where all pass."""
    made, grpo = relift_world(prompts=8, size=99), world(Grpo, {"name": "grpo"}, temperature=1.0)
    one, two = made.step(), grpo.step()
    same(one.applied[0][1], two.applied[0][1], 1e-15)
    for name, stays in (("passes", True), ("fails", False)):
        made = relift_world([p for p in ONE if p.id == name], prompts=1, size=1)
        found = made.step()
        same(found.applied[0][1], np.zeros((V, V)), 0)
        assert len(found.applied) == (1 if stays else 2)


def test_resumed() -> None:
    """A run that is stopped with problems in its buffer goes on as if it had not been."""
    whole, first = relift_world(PROBLEMS), relift_world(PROBLEMS)
    seen = [whole.step(step) for step in range(8)]
    for step in range(3):
        first.step(step)
    second = relift_world(PROBLEMS)
    second.method.load(first.method.state())
    second.policy.theta, second.taken = first.policy.theta, first.taken
    for step in range(3, 8):
        found = second.step(step)
        assert [name for name, _ in found.applied] == [name for name, _ in seen[step].applied]
        for (_, one), (_, two) in zip(found.applied, seen[step].applied):
            assert (one == two).all()
    assert sum(len(s.applied) for s in seen) > 8


def test_what_each_gate_does_not_have_is_refused() -> None:
    for options, words in (({"gate": "advantage", "gamma": 0.5}, "gamma is the threshold"),
                           ({"table": [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]}, "of gate = 'soft'"),
                           ({"gate": "soft", "demos": "all"}, "demos = 'one'")):
        with pytest.raises(UserError, match=words):
            method_of(hpt.Hpt, {"name": "hpt", **options})
    assert hpt.Hpt.needs == relift.Relift.needs == {"paired_demos"}


MUTANTS = [
    *mutants(
        hpt,
        Mutant("compare", "Hpt.weights", "gamma 0", by=lambda: test_hard_gate("a quarter")),  # open at gamma
        Mutant("compare", "Hpt.weights", "ptp 0", by=lambda: test_hard_gate("advantage")),
        Mutant("constant", "Hpt.weights", "sft 1", to=1.0, by=lambda: test_hard_gate("a half, at a third")),
        Mutant("branch", "Hpt.update", "balance 1", by=lambda: test_hard_gate("rate")),  # always terms
        Mutant("denominator", "Hpt.share", by=lambda: test_hard_gate("rate")),
        Mutant("term", "Hpt.gather", 3, by=test_soft_gate),
        Mutant("sign", "shaped", 1, by=test_soft_gate, of=losses),
    ),
    *mutants(
        relift,
        Mutant("term", "Relift.gather", 0, by=test_buffer_fills),  # who waited is forgotten
        Mutant("compare", "Relift.gather", "size 0", by=test_buffer_fills),  # one late
        Mutant("instead", "Relift.fails", "verdict 1", to="finished", by=test_buffer_fills),
        Mutant("compare", "Relift.fails", "pass_rate 1", by=test_buffer_fills),
        Mutant("mask", "Relift.fails", "demos 0", by=test_the_rate_counts),  # without demonstrations, too
        Mutant("constant", "Relift.update", "theta_sft", to="theta", by=test_buffer_fills),  # one Adam
        Mutant("drop", "Relift.load", by=test_resumed),
        Mutant("drop", "Relift.setup", "lr 0", by=test_buffer_fills),
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()
