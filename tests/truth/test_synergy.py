"""The arms of the synergy study: `interleaved` and `data_mixing` through their files, against steps written out by hand
on a tiny real model, and the recipe `progressive`. A check is a function of the method's class; mutants fail theirs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hand import Script, advantages, gather, moved, opened, put, same, sessions, slope, weights
from mutants import Swaps, mutate

from bridgelm.config.run_config import load_config
from bridgelm.errors import UserError
from bridgelm.methods import data_mixing as mixing_module
from bridgelm.methods import interleaved as interleaved_module
from bridgelm.methods.joint import Joint
from bridgelm.model.batching import make_batch
from bridgelm.types import Verdict

ROOT = Path(__file__).parents[2]
Check = Callable[[Any, Path], None]


@pytest.fixture(autouse=True)
def _sessions() -> Iterator[None]:
    with sessions():
        yield


# -- interleaved -------------------------------------------------------------------------------------------------------

MIXED = [*"----", *"+--+", *"?---", *"????"]  # groups of four: failed, mixed, failed as far as it was graded, nothing


def demos_of(rows: Any) -> list[Any]:
    return [row for row in rows if row.kind == "demo"]


def imitates_what_failed(cls: Any, folder: Path) -> None:
    session = opened(folder, {"name": "interleaved", "every": 2}, MIXED, cls)
    first = gather(session, 0)
    assert not demos_of(first), "an SFT step after every second RL step"
    again = json.loads(json.dumps(session.method.state()))
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
    few = opened(folder / "few", {"name": "interleaved", "every": 2}, "-", cls, batch={"demos": 3, "micro_tokens": 64})
    problems = [row.problem.id for step in (0, 1) for row in gather(few, step) if row.kind == "rollout"]
    few.method.failed = problems[:1]
    rows = gather(few, 3)
    failed = list(dict.fromkeys(row.problem.id for row in rows if row.kind == "rollout"))
    assert [row.problem.id for row in demos_of(rows)] == failed[-3:]


def two_steps_in_turn(cls: Any, folder: Path) -> None:
    """RL at theta, then SFT at the theta that it left, each divided by its own tokens."""
    session = opened(folder, {"name": "interleaved", "sft_lr": 0.3}, MIXED, cls)
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


def nothing_failed(cls: Any, folder: Path) -> None:
    """All pass: no demonstrations, and not even the momentum of the SFT optimiser moves. All fail: SFT alone."""
    session = opened(folder, {"name": "interleaved"}, "-", cls, optim={"lr": 1e-2})
    session.method.update(session.policy, make_batch(gather(session, 0)), 0)
    session.roll.grader = Script("+")
    rows, start = gather(session, 1), weights(session)
    assert not demos_of(rows)
    session.method.update(session.policy, make_batch(rows), 1)
    second = session.policy.optimisers["theta_sft"].optimiser
    assert all(float(state["step"]) == 1 for state in second.state.values())
    same_up_to_adam = {n: (weights(session)[n] - start[n]).abs().max() for n in start}
    assert max(same_up_to_adam.values()) == 0, "flat groups, and no SFT step"
    alone = opened(folder / "fail", {"name": "interleaved"}, "-", cls)
    rows, start = gather(alone), weights(alone)
    demos = demos_of(rows)
    size = sum(int(r.own.sum()) for r in demos)
    wanted = moved(start, (0.1, slope(alone, [(r, r.own / size) for r in demos])))
    alone.method.update(alone.policy, make_batch(rows), 0)
    same(weights(alone), wanted, start, "all fail: the SFT step alone")


# -- data_mixing -------------------------------------------------------------------------------------------------------


def mixture(cls: Any, folder: Path) -> None:
    """Own answers are right, whole, the newest, and drawn without replacement; demonstrations stand in for them."""
    session = opened(folder, {"name": "data_mixing", "own": 0.5, "buffer": 2}, "-", cls)
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


def without_replacement(cls: Any, folder: Path) -> None:
    session = opened(folder, {"name": "data_mixing", "own": 1.0, "buffer": 6}, "-", cls)
    ids = [np.array([3, 5, 6 + i, 7, 1]) for i in range(6)]
    name = session.data.splits.train[0].id
    session.method.buffer = [(name, one.tolist(), 2) for one in ids]
    for step in range(5):
        found = demos_of(gather(session, step))
        assert sorted(int(r.ids[2]) for r in found) == [6, 7, 8, 9, 10, 11], "each of six once"
        assert all(r.own.tolist() == [False, False, True, True, True] for r in found)


def one_mean_over_the_mixture(cls: Any, folder: Path) -> None:
    for weight in (0.0, 0.7):
        method = {"name": "data_mixing", "own": 0.5, "rl_weight": weight}
        session = opened(folder / str(weight), method, "+--", cls)
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


CHECKS: dict[str, Check] = {check.__name__: check for check in (
    imitates_what_failed, two_steps_in_turn, nothing_failed, mixture, without_replacement, one_mean_over_the_mixture)}
OF_MIXING = {"mixture", "without_replacement", "one_mean_over_the_mixture"}


def class_of(name: str, swaps: Swaps = ()) -> Any:
    module = mixing_module if name in OF_MIXING else interleaved_module
    found = mutate(module, swaps) if swaps else module
    return found.DataMixing if name in OF_MIXING else found.Interleaved


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str, tmp_path: Path) -> None:
    CHECKS[name](class_of(name), tmp_path)


MUTANTS: dict[str, tuple[Swaps, str]] = {
    "any wrong rollout is enough": ((("and all(row.verdict is Verdict.WRONG", "and any(row.verdict is Verdict.WRONG"),),
                                    "imitates_what_failed"),
    "never forgets": ((("        self.failed = []\n", ""),), "imitates_what_failed"),
    "forgets at once": ((("[name for name in self.failed if name not in new] + new", "new"),), "imitates_what_failed"),
    "a problem comes twice": ((("[name for name in self.failed if name not in new] + new", "self.failed + new"),),
                              "imitates_what_failed"),
    "the oldest": ((("[-self.run.batch.demos * self.run.rollout.updates:]",
                     "[:self.run.batch.demos * self.run.rollout.updates]"),), "imitates_what_failed"),
    "not kept over a resume": ((('self.failed = list(state["failed"])', "self.failed = []"),), "imitates_what_failed"),
    "turns a step early": ((("if (step + 1) % self", "if step % self"),), "imitates_what_failed"),
    "both at one theta": ((('        metrics = {"grad_norm/theta"',
                            '        sft = policy.grad(self.terms, batch, {"nll": 1.0})\n'
                            '        metrics = {"grad_norm/theta"'),
                           ('            sft = policy.grad(self.terms, batch, {"nll": 1.0})\n', "")),
                          "two_steps_in_turn"),
    "one rate": (((", lr=self.options.sft_lr", ""),), "two_steps_in_turn"),
    "momentum goes on": ((('if "nll" in batch.counts:', "if True:"),), "nothing_failed"),
    "wrong answers are imitated": ((("if row.verdict is Verdict.CORRECT and row.finished]", "if row.finished]"),),
                                   "mixture"),
    "cut answers are imitated": (((" and row.finished]", "]"),), "mixture"),
    "the oldest answers": ((("self.buffer[-self.options.buffer:]", "self.buffer[:self.options.buffer]"),), "mixture"),
    "no buffer over a resume": ((('for name, ids, prompt in state["buffer"]', 'for name, ids, prompt in []'),),
                                "mixture"),
    "short of rows": ((("data.demos(size - wanted)", "data.demos(size - round(self.options.own * size))"),), "mixture"),
    "drawn with replacement": ((("draws.permutation(len(self.buffer))[:wanted]",
                                 "draws.integers(len(self.buffer), size=wanted) if wanted else []"),),
                               "without_replacement"),
    "the prompt is imitated": ((("np.arange(len(ids)) >= prompt", "np.arange(len(ids)) >= 0"),), "without_replacement"),
    "row means": ((('.with_stream("nll", 1.0)', '.with_stream("nll", 1.0, "row")'),), "one_mean_over_the_mixture"),
    "always RL": ((("if weight > 0 else {}", "if True else {}"), ("rl_coef(self.options.rl, weight)",
                                                                   "rl_coef(self.options.rl, 1.0)")),
                  "one_mean_over_the_mixture"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_seen(name: str, tmp_path: Path) -> None:
    swaps, check = MUTANTS[name]
    with pytest.raises(AssertionError):
        CHECKS[check](class_of(check, swaps), tmp_path)


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
