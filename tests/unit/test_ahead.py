"""Rollouts asked for one step ahead: with which weights they are drawn, what is made of it, and exact resumes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bridgelm.config.run_config import make_config
from bridgelm.engine import NativeEngine, Request, Sampling
from bridgelm.engine.ahead import Pending
from bridgelm.engine.vllm import Answer, VllmEngine
from bridgelm.errors import UserError
from bridgelm.rollout.roller import Roller
from bridgelm.training import loop
from bridgelm.types import Completion, Row
from tiny import open_session

Raw = Callable[..., dict[str, Any]]
ROLLOUT = {"prompts": 4, "group": 4, "max_new_tokens": 6, "ahead": True}


def steps(path: Path) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/rollout", "time/update", "seconds")
    return [{k: v for k, v in e.items() if k not in timed} for e in events if e["event"] == "step"]


@pytest.mark.parametrize("method", ["grpo", "joint"])
def test_each_steps_answers_come_from_the_weights_before(raw: Raw, monkeypatch: pytest.MonkeyPatch,
                                                         method: str) -> None:
    """A plain run with the same draws, where the weights are put back by one update before each draw, is the same."""
    config = make_config(raw(method, rollout=ROLLOUT))
    rows: list[list[Row]] = []
    weights: list[dict[str, torch.Tensor]] = []
    settle = Roller.settle

    def spy(self: Roller, found: list[Row]) -> Any:
        rows.append([row for row in found if row.kind == "rollout"])
        weights.append({n: w.clone() for n, w in self.policy.weights().items()})
        return settle(self, found)
    monkeypatch.setattr(Roller, "settle", spy)
    run = loop.train(config, quiet=True)
    taken = steps(run.path)
    assert [event["engine/stale_steps"] for event in taken] == [0, 1, 1, 1]
    assert "engine/mismatch_kl" not in taken[0]
    assert all(event["engine/mismatch_kl"] > 1e-7 for event in taken[1:])
    session = open_session(config.model_copy(update={"name": "again"}), exact=False)
    for step in range(4):
        problems = [row.problem for row in rows[step][::4]]
        session.roll.begin(step)
        with session.policy.holding(weights[max(0, step - 1)]):
            session.policy.live.stale = False
            fresh = session.roll(problems)
        for mine, theirs in zip(rows[step], fresh, strict=True):
            np.testing.assert_array_equal(mine.ids, theirs.ids)
            assert mine.old_logps is not None
            assert theirs.old_logps is not None
            if step:
                assert mine.mismatch is not None
                np.testing.assert_allclose(mine.old_logps - mine.mismatch, theirs.old_logps, atol=1e-9)
        with session.policy.holding(weights[step]):
            session.policy.live.stale = False
            for mine, now in zip(rows[step], session.policy.score(rows[step]), strict=True):
                np.testing.assert_allclose(mine.old_logps[mine.drawn], now[mine.drawn], atol=1e-9)  # type: ignore[index]


def test_nothing_is_drawn_twice_and_the_ledger_is_the_same(raw: Raw) -> None:
    spent = {}
    for ahead in (False, True):
        config = make_config(raw(optim={"lr": 1e-12}, name=f"run-{ahead}", rollout={**ROLLOUT, "ahead": ahead}))
        last = steps(loop.train(config, quiet=True).path)[-1]
        spent[ahead] = {key: last[key] for key in ("flops/generate", "flops/train", "rollouts")}
        score = last["flops/score"]
        assert (score > 0) == ahead, "the trainer's own log-probs when they are used"
    assert spent[True] == spent[False]


@pytest.mark.parametrize("method", ["grpo", "joint"])
def test_a_resumed_run_is_the_uninterrupted_one(raw: Raw, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    whole = loop.train(make_config(raw(method, name="whole", rollout=ROLLOUT)), quiet=True)
    config = make_config(raw(method, name="cut", rollout=ROLLOUT))
    take = loop.take_step

    def stop(session: Any) -> Any:
        if session.step == 3:
            raise KeyboardInterrupt
        return take(session)
    monkeypatch.setattr(loop, "take_step", stop)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, quiet=True)
    monkeypatch.setattr(loop, "take_step", take)
    path = Path(config.out) / "cut"
    state = json.loads(next((path / "checkpoints").glob("*/state.json")).read_text())
    assert state["step"] == 2
    assert len(state["ahead"]["completions"]) == 16
    resumed = loop.resume(path, quiet=True)
    assert steps(resumed.path) == steps(whole.path)


def test_what_goes_on_differently_is_drawn_anew(raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(make_config(raw(rollout=ROLLOUT)))
    session.roll.begin(0)
    session.method.gather(session.data, session.roll, 0)
    before, loaded = session.data.state(), list[Any]()
    monkeypatch.setattr(session.method, "state", lambda: {"counted": np.int64(3)})
    monkeypatch.setattr(session.method, "load", loaded.append)
    loop.ask_ahead(session.method, session.data, session.roll, 0)
    assert session.data.state() == before
    assert loaded == [{"counted": 3}]
    assert session.roll.pending is not None
    session.roll.begin(1)
    session.data.problems(1)  # now the step has other problems
    session.method.gather(session.data, session.roll, 1)
    assert not session.roll.stale
    assert session.roll.pending is None


def test_pending_answers_go_through_a_checkpoint() -> None:
    requests = [Request(np.array([3, 4]), (7, 1, 0, 0), 5)]
    done = Completion(np.array([5, 6]), np.array([-0.1, -1 / 3]), np.array([-0.2, -2 / 3]), True)
    first = Pending.of(requests, Sampling(5), lambda: [done])
    again = Pending.load(json.loads(json.dumps(first.state())))
    found = again.take()[0]
    assert again.answers(requests, Sampling(5))
    for other in ([Request(np.array([3, 4]), (7, 1, 0, 1), 5)], [Request(np.array([3, 5]), (7, 1, 0, 0), 5)],
                  [Request(np.array([3, 4]), (7, 1, 0, 0), 4)], requests * 2):
        assert not again.answers(other, Sampling(5))
    assert not again.answers(requests, Sampling(5, 0.9))
    assert (found.ids.tolist(), found.raw_logps.tolist(), found.logps.tolist(), found.finished) == (
        [5, 6], [-0.1, -1 / 3], [-0.2, -2 / 3], True)


def test_refusals(raw: Raw) -> None:
    with pytest.raises(UserError, match=r"ahead: refills depend on the answers before them; set rollout.refill = 0"):
        make_config(raw(rollout={**ROLLOUT, "refill": 1}))
    config = make_config(raw({"name": "guide"}, rollout=ROLLOUT))
    with pytest.raises(UserError, match=r"rollout.ahead: method 'guide' draws 2 times in step 1, .*ahead = false"):
        loop.train(config, quiet=True)


def test_a_new_stage_begins_with_answers_of_its_own(raw: Raw) -> None:
    stages = [{"method": {"name": "grpo"}, "steps": 2}, {"method": {"name": "grpo"}, "steps": 2}]
    run = loop.train(make_config(raw({"name": "sequence", "stages": stages}, rollout=ROLLOUT)), quiet=True)
    assert [event["engine/stale_steps"] for event in steps(run.path)] == [0, 1, 0, 1]


def test_a_device_elsewhere_draws_meanwhile(raw: Raw) -> None:
    """`start` returns while the server is at work, and new weights wait for it."""
    begun, go, calls = threading.Event(), threading.Event(), list[str]()

    class Slow:
        max_length, elsewhere = 64, True

        def wake(self, model: Any) -> None: ...
        def load(self, named: Any) -> None:
            calls.append("load")

        def complete(self, prompts: Any, params: Any) -> list[Answer]:
            begun.set()
            assert go.wait(20)
            calls.append("drawn")
            return [Answer([5], [-1.0], True) for _ in prompts]

        def close(self) -> None: ...

    session = open_session(make_config(raw()))
    engine = VllmEngine(Slow(), session.chat, False)  # type: ignore[arg-type]
    asked = [Request(np.array([3, 4]), (0, i)) for i in range(2)]
    with session.policy.origin() as origin:
        take = engine.start(origin, asked, Sampling(4))
    assert begun.wait(20)
    assert calls == ["load"]
    threading.Timer(0.05, go.set).start()
    session.policy.live.stale = True
    with session.policy.origin() as origin:
        engine.generate(origin, asked, Sampling(4))
    assert calls == ["load", "drawn", "load", "drawn"]
    assert [c.ids.tolist() for c in take()] == [[5], [5]]
    engine.close()


def test_the_native_engine_draws_at_once(raw: Raw) -> None:
    session = open_session(make_config(raw()))
    engine = session.roll.engine
    assert isinstance(engine, NativeEngine)
    asked = [Request(np.array([3, 8, 4]), (0, i)) for i in range(4)]
    with session.policy.origin() as origin:
        take, found = engine.start(origin, asked, Sampling(6)), engine.generate(origin, asked, Sampling(6))
        with torch.no_grad():
            for weight in session.policy.params.values():
                weight.zero_()
    assert [c.ids.tolist() for c in take()] == [c.ids.tolist() for c in found]
