"""SFT weighted by what a token's continuation is worth: weights against loops over tokens, and whole updates against
SFT's gradient with those weights written into its stream, on a real model with authors from data and from a teacher."""

from __future__ import annotations

import atexit
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exact import run_config
from mutation import Mutant, mutants

from bridgelm.config.run_config import make_config
from bridgelm.errors import UserError
from bridgelm.methods import pear
from bridgelm.methods.sft import Sft
from bridgelm.model import batching, grads
from bridgelm.rollout.roller import author_logps
from bridgelm.types import Demo, Live, Problem, Row
from tiny import open_session, raw_config, save_model

PROBLEM = Problem("p", ({"role": "user", "content": "q"},))
OPEN: list[Any] = []


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().folder.close()


def method_of(**options: Any) -> Any:
    config = run_config({"name": "pear", **options}, 10)
    return pear.Pear(config.method, config)


def slowly(ratios: list[float], o: Any) -> list[float]:
    """Equations (1) to (3), a product at a time; NaN is a token that the author said nothing of."""
    d = [0.0 if math.isnan(r) else min(max(r, o.ratio_low), o.ratio_high) for r in ratios]
    total, logs = len(d), []
    for t in range(1, total + 1):
        if o.weights == "sequence":
            end, decay = 0, 0
        else:
            size = o.block if o.weights == "block" else 1
            end = t
            while end % size and end < total:
                end += 1
            decay = total - end
        log = decay * math.log(o.gamma)
        for j in range(end + 1, total + 1):
            log += d[j - 1]
        logs.append(min(max(log, o.weight_low), o.weight_high))
    g = [math.exp(log) for log in logs]
    return [x * total / sum(g) for x in g] if o.normalise == "row" else g


def weights_of(method: Any, logps: list[float], author: list[float]) -> list[float]:
    """What the method multiplies -log pi by, through its own `terms`; its gradient must say the same."""
    ids = np.arange(2 + len(logps))
    row = Row(ids, ids >= 2, "demo", PROBLEM, teacher_logps=np.array([np.nan, np.nan, *author]))
    micro = batching.collate([row.with_stream("nll", 1.0)], torch.float64, torch.device("cpu"), {})
    leaf = torch.tensor([[0.0, 0.0, *logps]], dtype=torch.float64, requires_grad=True)
    value = method.terms(micro, Live(leaf))["nll"]
    slope = torch.autograd.grad(value.sum(), leaf)[0][0, 2:]
    found = (-value[0, 2:] / leaf[0, 2:]).tolist()
    assert found == pytest.approx((-slope).tolist(), rel=1e-12), "a gradient through the weights"
    return found


@pytest.mark.parametrize(("options", "wanted"), [
    ({}, [math.exp(0.22) * 0.999**2, math.exp(0.3) * 0.999, 1.0]),
    ({"weights": "block", "block": 1}, [math.exp(0.22) * 0.999**2, math.exp(0.3) * 0.999, 1.0]),
    ({"weights": "block", "block": 2}, [math.exp(0.3) * 0.999, math.exp(0.3) * 0.999, 1.0]),
    ({"weights": "block", "block": 7}, [1.0, 1.0, 1.0]),
    ({"weights": "sequence"}, [math.exp(0.32)] * 3),
    ({"gamma": 0.5, "ratio_low": -2.0}, [0.25 * math.exp(-0.7), 0.5 * math.exp(0.3), 1.0]),
], ids=str)
def test_three_tokens_by_hand(options: dict[str, Any], wanted: list[float]) -> None:
    """log pi - log pi_b is .1, -1 and .5: clipped to .1, -.08 and .3."""
    assert weights_of(method_of(**options), [-1.0, -3.0, -0.5], [-1.1, -2.0, -1.0]) == pytest.approx(wanted, rel=1e-12)


def test_the_defaults_are_the_papers() -> None:
    o = method_of().options
    assert (o.weights, o.gamma, o.block, o.ratio_low, o.ratio_high, o.weight_low, o.weight_high, o.normalise) == (
        "token", 0.999, 4, -0.08, 0.3, -10.0, 5.0, "none")


def test_both_clips_of_the_weight() -> None:
    """200 tokens at -.08 or 40 at .3 go over it: the floor is e^-10, the ceiling e^5."""
    far = weights_of(method_of(gamma=1.0), [-2.0] * 200, [-1.0] * 200)
    assert far[:75] == pytest.approx([math.exp(-10)] * 75)
    assert far[75:] == pytest.approx([math.exp(-0.08 * (199 - t)) for t in range(75, 200)])
    near = weights_of(method_of(gamma=1.0), [-1.0] * 40, [-2.0] * 40)
    assert near[:23] == pytest.approx([math.exp(5)] * 23)
    assert near[23:] == pytest.approx([math.exp(0.3 * (39 - t)) for t in range(23, 40)])


def test_an_author_that_is_the_policy_makes_it_sft() -> None:
    assert weights_of(method_of(gamma=1.0), [-1.0, -2.0], [-1.0, -2.0]) == [1.0, 1.0]


# -- whole updates -----------------------------------------------------------------------------------------------------


@cache
def world() -> dict[str, Any]:
    """A tiny one whose demonstrations have log-probs of their own here and there, with or without their end token."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    (folder / "teacher").mkdir(parents=True)
    teacher = save_model(folder / "teacher", "llama", seed=4, scale=0.4)
    raw = raw_config(folder, {}, teacher={"name_or_path": str(teacher)})
    rng, lines = np.random.default_rng(2), []
    for i, line in enumerate(Path(raw["data"]["train"]).read_text().splitlines()):
        row = json.loads(line)
        sizes = [len(text.split()) for text in row["demos"]]
        given = [[-float(x) for x in rng.exponential(1.0, size + (i % 2))] for size in sizes]
        row["demo_logps"] = [given[0] if i % 3 else None, given[1] if i % 4 else None]
        lines.append(json.dumps(row))
    Path(raw["data"]["train"]).write_text("\n".join(lines) + "\n")
    return raw


def opened(folder: Path, **options: Any) -> Any:
    settings = {"name": "pear", "gamma": 0.9, "ratio_low": -0.8, "ratio_high": 0.6, "weight_low": -1.5,
                "weight_high": 0.5, **options}
    session = open_session(make_config({**world(), "method": settings, "out": str(folder)}))
    OPEN.append(session)
    return session


def author_of(session: Any, row: Row) -> list[float]:
    """From the data, else from the teacher, read here by hand."""
    said = next(demo.logps for demo in row.problem.demos if demo.text == row.text)
    if said is not None:
        return [*said, *[math.nan] * (int(row.own.sum()) - len(said))]
    with torch.no_grad():
        logp = session.roll.teacher.model(torch.from_numpy(row.ids)[None]).logits[0].log_softmax(-1)
    return [float(logp[t - 1, row.ids[t]]) for t in np.flatnonzero(row.own)]


def check_updates(folder: Path, **options: Any) -> None:
    """Two updates: the weights of the second are those of the moved policy."""
    session = opened(folder, **options)
    policy, o, plain = session.policy, session.config.method, Sft(session.config.method, session.config)
    apply, authors = type(policy).apply, set()
    for step in range(2):
        session.roll.begin(step)
        rows = session.method.gather(session.data, session.roll, step)
        weighted, every, ratios = [], [], []
        for row, scored in zip(rows, policy.score(rows)):
            author = author_of(session, row)
            said = {demo.text: demo.logps for demo in row.problem.demos}[row.text]
            authors.add((math.isnan(author[-1]), said is None))
            ratio = [float(x) - b for x, b in zip(scored[row.own], author)]
            g = slowly(ratio, o)
            weight = np.zeros(len(row.ids))
            weight[row.own] = g
            weighted.append(row.with_stream("nll", weight))
            every += g
            ratios += [r for r in ratio if not math.isnan(r)]
        wanted = policy.grad(plain.terms, batching.make_batch(weighted), {"nll": 1.0})
        scale = len(every) / sum(every) if o.normalise == "batch" else 1.0
        seen: list[Any] = []
        policy.apply = lambda name, g, seen=seen, **_: (seen.append({k: v.clone() for k, v in g.items()}),
                                                        apply(policy, name, g))[1]
        metrics = session.method.update(policy, batching.make_batch(rows), step)
        off = grads.norm(grads.mix((1.0, seen[0]), (-scale, wanted.theta)))
        assert off < 1e-10 * grads.norm(seen[0]), "gradient"
        assert metrics["loss/nll"] == pytest.approx(scale * wanted.losses["nll"], rel=1e-10)
        assert metrics["pear/weight"] == pytest.approx(np.mean(every), rel=1e-10)
        ess = sum(every) ** 2 / sum(g * g for g in every)
        assert metrics["pear/ess"] == pytest.approx(ess / len(every), rel=1e-10)
        assert metrics["pear/gap"] == pytest.approx(np.mean(ratios), rel=1e-10)
        assert metrics["pear/cut"] == pytest.approx(np.mean([not -0.8 <= r <= 0.6 for r in ratios]))
        if o.normalise != "row":
            ends = {"floor": math.exp(o.weight_low), "ceiling": math.exp(o.weight_high)}
            for name, end in ends.items():
                assert metrics[f"pear/{name}"] == pytest.approx(np.mean(np.isclose(every, end))), name
                assert metrics[f"pear/{name}"] > 0 or o.weights == "block", name
    assert {True, False} == {nan for nan, _ in authors} == {taught for _, taught in authors}


CASES: dict[str, dict[str, Any]] = {
    "token": {}, "block": {"weights": "block", "block": 2}, "sequence": {"weights": "sequence"},
    "mean one": {"normalise": "batch"}, "mean one in each": {"weights": "block", "normalise": "row", "block": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_sft_with_these_weights(case: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_updates(Path(folder), **CASES[case])


MUTANTS = mutants(
    pear,
    Mutant("sign", "Pear.terms", 0, by=partial(test_an_update_is_sft_with_these_weights, "token")),
    Mutant("swap", "Pear.terms", "teacher_BT", by=partial(test_an_update_is_sft_with_these_weights, "token")),
    Mutant("term", "log_weights", 5, by=partial(test_an_update_is_sft_with_these_weights, "token")),  # no decay
    Mutant("term", "log_weights", 2, by=partial(test_an_update_is_sft_with_these_weights, "token")),  # own ratio in it
    Mutant("branch", "log_weights", "block 1", by=partial(test_an_update_is_sft_with_these_weights, "block")),
    Mutant("clip", "log_weights", "ratio_low", by=partial(test_an_update_is_sft_with_these_weights, "token")),
    Mutant("clip", "weights", "weight_low", by=partial(test_an_update_is_sft_with_these_weights, "token")),
    Mutant("branch", "Pear.update", "batch 0", by=partial(test_an_update_is_sft_with_these_weights, "token")),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()


def test_rewards_do_not_enter(tmp_path: Path) -> None:
    """It samples nothing, so groups that all pass or all fail are no case of its own."""
    session = opened(tmp_path)
    session.roll.grader.close()
    session.roll.grader = None
    rows = session.method.gather(session.data, session.roll, 0)
    assert {row.kind for row in rows} == {"demo"}
    assert session.policy.ledger.rollouts == 0


def test_log_probs_that_do_not_fit_the_tokens_are_refused() -> None:
    own = np.array([False, True, True, True])
    for logps, wanted in (((-1.0, -2.0), [-1.0, -2.0, np.nan]), ((-1.0, -2.0, -3.0), [-1.0, -2.0, -3.0])):
        found = author_logps(PROBLEM, Demo("a b", logps), own)
        assert found is not None
        np.testing.assert_array_equal(found, [np.nan, *wanted])
    for wrong in ((-1.0,), (-1.0,) * 4, ()):
        with pytest.raises(UserError, match=r"'p' has . log-probabilities for 3 tokens; record them"):
            author_logps(PROBLEM, Demo("a b", wrong), own)
    assert author_logps(PROBLEM, Demo("a b"), own) is None


def test_a_far_author_is_warned_of() -> None:
    assert "pear/floor" in method_of().warnings({"pear/floor": 0.7})[0]
    assert method_of().warnings({"pear/floor": 0.2}) == []


def test_ratios_are_read_from_the_rows_places() -> None:
    """Two segments of own tokens with a tool's word between: the word is no part of T."""
    ids = np.arange(7)
    own = np.array([False, True, True, False, True, True, False])
    row = Row(ids, own, "demo", PROBLEM, teacher_logps=np.where(own, -1.0, np.nan)).with_stream("nll", 1.0)
    micro = batching.collate([row, replace(row, ids=ids[:6], own=own[:6], teacher_logps=row.teacher_logps[:6],
                                           streams={}).with_stream("nll", 1.0)], torch.float64, torch.device("cpu"), {})
    value = method_of(gamma=1.0).terms(micro, Live(torch.where(micro.own_BT, -1.2, 0.0).double()))["nll"]
    wanted = [0.0, *(1.2 * math.exp(-0.08 * k) for k in (3, 2)), 0.0, *(1.2 * math.exp(-0.08 * k) for k in (1, 0)), 0.0]
    assert value.tolist() == [pytest.approx(wanted), pytest.approx(wanted)]
