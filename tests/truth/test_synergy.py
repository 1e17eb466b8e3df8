"""The arms of the synergy study: `interleaved` and `data_mixing` through their files, against steps written out by hand
on a tiny real model, and the recipe `progressive`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hand import Script, advantages, gather, in_folder, moved, opened, put, same, sessions, slope, weights
from mutation import Mutant, mutants

from bridgelm.config.run_config import load_config
from bridgelm.errors import UserError
from bridgelm.methods import data_mixing, interleaved
from bridgelm.methods.joint import Joint
from bridgelm.model.batching import make_batch
from bridgelm.types import Verdict

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _sessions() -> Iterator[None]:
    with sessions():
        yield


# -- interleaved -------------------------------------------------------------------------------------------------------

MIXED = [*"----", *"+--+", *"?---", *"????"]  # groups of four: failed, mixed, failed as far as it was graded, nothing


def demos_of(rows: Any) -> list[Any]:
    return [row for row in rows if row.kind == "demo"]


def test_imitates_what_failed(tmp_path: Path) -> None:
    session = opened(tmp_path, {"name": "interleaved", "every": 2}, MIXED)
    first = gather(session, 0)
    assert not demos_of(first), "an SFT step after every second RL step"
    again = json.loads(json.dumps(session.method.state()))
    session.method.failed = []
    session.method.load(again)
    second = gather(session, 1)
    wanted = [rows[4 * g].problem.id for rows in (first, second) for g in (0, 2)]
    found = demos_of(second)
    assert [row.problem.id for row in found] == wanted
    assert all(row.text in {demo.text for demo in row.problem.demos} for row in found)
    assert session.method.measured == {"interleaved/failed": 0.5, "interleaved/demos": 4}
    assert not session.method.failed, "begun anew"
    cursor = session.data.state()
    session.method.failed = coming = [problem.id for problem in session.data.problems(4)]
    session.data.load(cursor)
    again = [row.problem.id for row in demos_of(gather(session, 3))]
    assert again == [coming[1], coming[3], coming[0], coming[2]], "once each, those that failed again last"
    # The newest, at most as many as an SFT step has.
    few = opened(tmp_path / "few", {"name": "interleaved", "every": 2}, "-", batch={"demos": 3, "micro_tokens": 64})
    problems = [row.problem.id for step in (0, 1) for row in gather(few, step) if row.kind == "rollout"]
    few.method.failed = problems[:1]
    rows = gather(few, 3)
    failed = list(dict.fromkeys(row.problem.id for row in rows if row.kind == "rollout"))
    assert [row.problem.id for row in demos_of(rows)] == failed[-3:]


def test_two_steps_in_turn(tmp_path: Path) -> None:
    """RL at theta, then SFT at the theta that it left, each divided by its own tokens."""
    session = opened(tmp_path, {"name": "interleaved", "sft_lr": 0.3}, MIXED)
    rows, start = gather(session), weights(session)
    rollouts, demos = [r for r in rows if r.kind == "rollout"], demos_of(rows)
    counted = [r for r in rollouts if r.verdict is not Verdict.ERROR]
    tokens = sum(int(r.own.sum()) for r in counted)
    parts = [(r, a / tokens * r.own) for r, a in zip(rollouts, advantages(rollouts))]
    after_rl = moved(start, (0.1, slope(session, parts)))
    metrics = session.method.update(session.policy, make_batch(rows), 0)
    end = weights(session)
    put(session, after_rl)
    size = sum(int(r.own.sum()) for r in demos)
    assert len({int(r.own.sum()) for r in demos}) > 1, "demonstrations of one length could not tell two means apart"
    wanted = moved(after_rl, (0.3, slope(session, [(r, r.own / size) for r in demos])))
    same(end, wanted, start, "theta after both steps")
    assert metrics["interleaved/demos"] == len(demos) == 2


def test_nothing_failed(tmp_path: Path) -> None:
    """All pass: no demonstrations, and not even the momentum of the SFT optimiser moves. All fail: SFT alone."""
    session = opened(tmp_path, {"name": "interleaved"}, "-", optim={"lr": 1e-2})
    session.method.update(session.policy, make_batch(gather(session, 0)), 0)
    session.roll.grader = Script("+")
    rows, start = gather(session, 1), weights(session)
    assert not demos_of(rows)
    session.method.update(session.policy, make_batch(rows), 1)
    second = session.policy.optimisers["theta_sft"].optimiser
    assert all(float(state["step"]) == 1 for state in second.state.values())
    same_up_to_adam = {n: (weights(session)[n] - start[n]).abs().max() for n in start}
    assert max(same_up_to_adam.values()) == 0, "flat groups, and no SFT step"
    alone = opened(tmp_path / "fail", {"name": "interleaved"}, "-")
    rows, start = gather(alone), weights(alone)
    demos = demos_of(rows)
    size = sum(int(r.own.sum()) for r in demos)
    wanted = moved(start, (0.1, slope(alone, [(r, r.own / size) for r in demos])))
    alone.method.update(alone.policy, make_batch(rows), 0)
    same(weights(alone), wanted, start, "all fail: the SFT step alone")


# -- data_mixing -------------------------------------------------------------------------------------------------------


def test_mixture(tmp_path: Path) -> None:
    """Own answers are right, whole, the newest, and drawn without replacement; demonstrations stand in for them."""
    session = opened(tmp_path, {"name": "data_mixing", "own": 0.5, "buffer": 2}, "-")
    rows = gather(session, 0)
    assert len(demos_of(rows)) == 6 and not session.method.buffer
    assert all(row.text for row in demos_of(rows)), "demonstrations"
    session.roll.grader = Script(*"+-")
    rows = gather(session, 1)
    right = [r for r in rows if r.verdict is Verdict.CORRECT]
    assert len(right) == 8 and not all(r.finished for r in right), "some right answers were cut"
    whole = [r.ids.tolist() for r in right if r.finished]
    assert [ids for _, ids, _ in session.method.buffer] == whole[-2:]
    found = demos_of(rows)
    mine = [row for row in found if not row.text]
    assert len(whole) > 2
    wanted = 2
    assert len(found) == 6 and len(mine) == wanted
    assert len({row.ids.tobytes() for row in mine}) == len({tuple(ids) for ids in map(tuple, whole)} & {
        tuple(row.ids.tolist()) for row in mine})
    by_ids = {tuple(r.ids.tolist()): r for r in right}
    for row in mine:
        source = by_ids[tuple(row.ids.tolist())]
        assert source.finished and source.problem is row.problem and (source.own == row.own).all()
    tokens = [int(r.own.sum()) for r in found]
    share = sum(int(r.own.sum()) for r in mine) / sum(tokens)
    assert session.method.measured["mixing/own_tokens"] == pytest.approx(share)
    assert session.method.measured["mixing/own"] == wanted / 6
    # The newest that the buffer has room for, whatever the step; resume draws the same.
    state, cursor = json.loads(json.dumps(session.method.state())), session.data.state()
    first = [r.ids.tolist() for r in demos_of(gather(session, 2))]
    assert len(session.method.buffer) == 2
    session.method.load(state)
    assert json.loads(json.dumps(session.method.state())) == state and state["buffer"]
    session.data.load(cursor)
    assert [r.ids.tolist() for r in demos_of(gather(session, 2))] == first
    assert first != [r.ids.tolist() for r in found]


def test_without_replacement(tmp_path: Path) -> None:
    session = opened(tmp_path, {"name": "data_mixing", "own": 1.0, "buffer": 6}, "-")
    ids = [np.array([3, 5, 6 + i, 7, 1]) for i in range(6)]
    name = session.data.splits.train[0].id
    session.method.buffer = [(name, one.tolist(), 2) for one in ids]
    for step in range(5):
        found = demos_of(gather(session, step))
        assert sorted(int(r.ids[2]) for r in found) == [6, 7, 8, 9, 10, 11], "each of six once"
        assert all(r.own.tolist() == [False, False, True, True, True] for r in found)


def test_one_mean_over_the_mixture(tmp_path: Path) -> None:
    for weight in (0.0, 0.7):
        method = {"name": "data_mixing", "own": 0.5, "rl_weight": weight}
        session = opened(tmp_path / str(weight), method, "+--")
        rows, start = gather(session), weights(session)
        found, rollouts = demos_of(rows), [r for r in rows if r.kind == "rollout"]
        assert any(not r.text for r in found) and any(r.text for r in found)
        size, tokens = sum(int(r.own.sum()) for r in found), sum(int(r.own.sum()) for r in rollouts)
        parts = [(r, r.own / size) for r in found]
        parts += [(r, weight * a / tokens * r.own) for r, a in zip(rollouts, advantages(rollouts))]
        wanted = moved(start, (0.1, slope(session, parts)))
        metrics = session.method.update(session.policy, make_batch(rows), 0)
        same(weights(session), wanted, start, f"rl_weight {weight}")
        assert ("loss/pg" in metrics) == (weight > 0)
        assert all(np.isfinite(value) for value in metrics.values())


OF_INTERLEAVED = mutants(
    interleaved,
    Mutant("mask", "unsolved", "WRONG 2", by=in_folder(test_imitates_what_failed)),
    Mutant("drop", "Interleaved.gather", 7, by=in_folder(test_imitates_what_failed)),  # never forgets
    Mutant("mask", "Interleaved.gather", "failed", by=in_folder(test_imitates_what_failed)),  # a problem comes twice
    Mutant("sign", "Interleaved.gather", "demos 0", by=in_folder(test_imitates_what_failed)),  # the oldest
    Mutant("drop", "Interleaved.load", by=in_folder(test_imitates_what_failed)),
    Mutant("drop", "Interleaved.setup", "sft_lr 2", by=in_folder(test_two_steps_in_turn)),
    Mutant("denominator", "Interleaved.gather", "with_stream", to="row", by=in_folder(test_two_steps_in_turn)),
)
OF_MIXING = mutants(
    data_mixing,
    Mutant("mask", "DataMixing.gather", "CORRECT 1", by=in_folder(test_mixture)),
    Mutant("mask", "DataMixing.gather", "CORRECT 2", by=in_folder(test_mixture)),
    Mutant("sign", "DataMixing.gather", "buffer 1", by=in_folder(test_mixture)),
    Mutant("drop", "DataMixing.load", by=in_folder(test_mixture)),
    Mutant("term", "DataMixing.gather", 4, by=in_folder(test_mixture)),  # more rows than asked for
    Mutant("compare", "DataMixing.gather", "arange 1", by=in_folder(test_without_replacement)),
    Mutant("denominator", "DataMixing.gather", "with_stream", to="row", by=in_folder(test_one_mean_over_the_mixture)),
    Mutant("branch", "DataMixing.update", 0, by=in_folder(test_one_mean_over_the_mixture)),
)


@pytest.mark.parametrize("mutant", [*OF_INTERLEAVED, *OF_MIXING], ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()


# -- progressive, and what is refused ----------------------------------------------------------------------------------


def test_progressive_is_joint_whose_imitation_ends_in_nothing() -> None:
    """The recipe goes from equal weights to RL alone; demo and rollout weigh mu/(1 + mu) and 1/(1 + mu)."""
    config = load_config(ROOT / "recipes" / "toy" / "progressive.toml")
    method = Joint(config.method, config)
    mu = np.array([method.mu(step) for step in range(config.steps)])
    assert mu[0] == 1.0 and mu[-1] == 0.0
    np.testing.assert_allclose(np.diff(mu), -1 / (config.steps - 1), rtol=1e-9)
    assert method.options.normalise


def test_refills_are_refused() -> None:
    with pytest.raises(UserError, match=r"rollout\.refill"):
        load_config(ROOT / "recipes" / "toy" / "interleaved.toml", ["rollout.refill=1"])
    with pytest.raises(UserError, match=r"rl\.kl_coef is a part of J_RL"):
        load_config(ROOT / "recipes" / "toy" / "data_mixing.toml", ["method.rl.kl_coef=0.1"])
    with pytest.raises(UserError, match="sft_lr needs optimisers"):
        load_config(ROOT / "recipes" / "toy" / "interleaved.toml", ["method.optimisers=one", "method.sft_lr=0.1"])


def test_one_optimiser_takes_both_steps(tmp_path: Path) -> None:
    session = opened(tmp_path, {"name": "interleaved", "optimisers": "one"}, "-", optim={"lr": 1e-2})
    session.method.update(session.policy, make_batch(gather(session)), 0)
    assert list(session.policy.optimisers) == ["theta"]
    steps = {float(s["step"]) for s in session.policy.optimisers["theta"].optimiser.state.values()}
    assert steps == {2.0}
    assert torch.isfinite(next(iter(weights(session).values()))).all()
