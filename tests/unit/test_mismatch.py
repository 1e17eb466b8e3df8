"""What is done about an engine whose log-probs are not the trainer's: one that is the native engine with noise."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bridgelm.config.run_config import make_config
from bridgelm.engine import NativeEngine, Origin, Request, Sampling
from bridgelm.ledger import Ledger
from bridgelm.methods import METHODS
from bridgelm.model import batching
from bridgelm.objective import mismatch
from bridgelm.training import loop
from bridgelm.types import Completion, Problem, Row
from tiny import open_session

Raw = Callable[..., dict[str, Any]]
PROBLEM = Problem("p", ({"role": "user", "content": ""},))


class Noisy:
    """Draws with the right probabilities and reports others: as wrong, to the trainer, as the other way round."""

    exact = False

    def __init__(self, inner: NativeEngine, size: float) -> None:
        self.inner, self.size = inner, size
        self.slept = self.closed = 0

    def generate(self, origin: Origin, requests: Sequence[Request], sampling: Sampling,
                 ledger: Ledger | None = None) -> list[Completion]:
        found = self.inner.generate(origin, requests, sampling, ledger)
        return [replace(c, logps=c.logps + self.size * self.noise(c)) for c in found]

    @staticmethod
    def noise(c: Completion) -> np.ndarray:
        return np.sin(np.arange(len(c.ids)) + c.ids)

    def start(self, origin: Origin, requests: Sequence[Request],
              sampling: Sampling) -> Callable[[], list[Completion]]:
        found = self.generate(origin, requests, sampling)
        return lambda: found

    def sleep(self) -> None:
        self.slept += 1

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[Noisy]]:
    def install(size: float) -> list[Noisy]:
        made: list[Noisy] = []

        def open_engine(config: Any, chat: Any, exchange: Path, caller: Any) -> Noisy:
            made.append(Noisy(NativeEngine(chat.eos_ids, chat.pad_id, chat.text), size))
            return made[-1]
        monkeypatch.setattr(loop, "open_engine", open_engine)
        return made
    return install


def row(gap: list[float], given: int = 0) -> Row:
    length = 2 + len(gap)
    return Row(np.arange(length), np.arange(length) >= 2, "rollout", PROBLEM, old_logps=np.zeros(length), given=given,
               mismatch=np.array([9.0, 9.0, *gap])).with_stream("pg", 3.0)


def test_the_corrected_mean_is_the_trainers() -> None:
    """Exactly, by a sum over a small vocabulary: without a cut E_q[w f] = E_p[f], with one it is sum min(c q, p) f."""
    rng = np.random.default_rng(0)
    p, q, f = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6)), rng.normal(size=6)
    for cap in (1e9, 2.0, 0.7):
        drawn = mismatch.corrected([replace(row([gap]).with_stream("pg", value))
                                    for gap, value in zip(np.log(p / q), f, strict=True)], cap)
        mean = sum(q_i * one.streams["pg"].weight[2] for q_i, one in zip(q, drawn, strict=True))
        assert mean == pytest.approx(float(np.sum(np.minimum(cap * q, p) * f)), rel=1e-12)


def test_only_drawn_tokens_of_the_engines_rows_are_corrected() -> None:
    first, plain = row([0.5, -0.5, 5.0, -5.0], given=1), replace(row([1.0]), mismatch=None)
    found = mismatch.corrected([first, plain], 2.0)
    expected = 3 * np.array([1, 1, 1, np.exp(-0.5), 2.0, np.exp(-5.0)])
    np.testing.assert_allclose(found[0].streams["pg"].weight, expected)
    assert found[0].streams["pg"].mask is first.streams["pg"].mask
    assert batching.make_batch(found).counts == batching.make_batch([first, plain]).counts, "the denominator stays"
    assert found[1] is plain
    assert mismatch.corrected([first], 0)[0] is first


def test_what_is_measured() -> None:
    gaps = [0.5, -0.5, 3.0]
    found = mismatch.measured([row(gaps), row([7.0], given=1), replace(row([8.0]), mismatch=None)], 2.0)
    d = np.array(gaps)
    assert found == pytest.approx({"engine/mismatch_mean": 4 / 3, "engine/mismatch_max": 3.0, "engine/truncated": 1 / 3,
                                   "engine/mismatch_kl": float(np.mean(np.exp(d) - 1 - d))})
    assert mismatch.measured([row([3.0])], 0)["engine/truncated"] == 0.0
    assert mismatch.measured([replace(row([3.0]), mismatch=None)], 2.0) == {}
    assert mismatch.warnings(found, 1.0)
    assert not mismatch.warnings(found, 10.0)
    assert not mismatch.warnings({}, 0.01)


def test_the_kl_is_the_kl() -> None:
    """On the engine's own samples its mean is sum q log(q / p)."""
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    mean = sum(q_i * mismatch.measured([row([gap])], 2.0)["engine/mismatch_kl"]
               for q_i, gap in zip(q, np.log(p / q), strict=True))
    assert mean == pytest.approx(float(np.sum(q * np.log(q / p))), rel=1e-12)


@pytest.mark.parametrize("at", ["live", "shadow"])
def test_old_log_probs_are_the_trainers(raw: Raw, noisy: Any, at: str) -> None:
    noisy(0.4)
    session = open_session(make_config(raw()))
    policy, roll = session.policy, session.roll
    policy.fork("shadow")
    with torch.no_grad():
        for t in policy.groups["shadow"].flat().values():
            t.add_(0.05 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1), dtype=t.dtype))
    roll.begin(0)
    prefix = session.chat.encode("1 + 2")
    rows = roll(session.data.problems(2), 2, at, prefixes=[prefix] * 4)
    for one, logps in zip(rows, policy.score(rows, at), strict=True):
        assert one.old_logps is not None
        assert one.mismatch is not None
        assert one.drawn.sum() == one.own.sum() - len(prefix)
        np.testing.assert_array_equal(one.old_logps, np.where(one.drawn, logps, 0))
        ids = one.ids[one.drawn]
        np.testing.assert_allclose(one.mismatch[one.drawn], -0.4 * np.sin(np.arange(len(ids)) + ids), atol=1e-9)
        assert not one.mismatch[~one.drawn].any()


def test_a_run_with_an_engine_that_disagrees(raw: Raw, noisy: Any, tmp_path: Path) -> None:
    """It is corrected in what is trained on, logged a step, warned of once; and the engine sleeps while training."""
    made = noisy(0.4)
    seen: list[Row] = []
    update = METHODS["grpo"].update

    def spy(self: Any, policy: Any, batch: Any, step: int) -> Any:
        assert made[-1].slept == step + 1
        seen.extend(batch.rows)
        return update(self, policy, batch, step)
    config = make_config(raw(optim={"lr": 1e-9}, rollout={"prompts": 4, "group": 4, "max_new_tokens": 6,
                                                          "correction": 1.2}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(METHODS["grpo"], "update", spy)
        run = loop.train(config, quiet=True)
    assert made[-1].closed == 1
    events = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    for event in steps:
        assert event["engine/mismatch_max"] == pytest.approx(0.4, abs=0.03)
        assert 0 < event["engine/mismatch_mean"] < event["engine/mismatch_max"]
        assert 0 < event["engine/truncated"] < 1
    assert sum("mismatch_warning" in event.get("text", "") for event in events) == 1
    live = [one for one in seen if one.streams["pg"].weight.any()]
    assert live
    for one in live:
        assert one.mismatch is not None
        advantage = one.streams["pg"].weight[one.drawn] / np.minimum(1.2, np.exp(one.mismatch[one.drawn]))
        np.testing.assert_allclose(advantage, advantage[0])


def test_the_native_engine_is_left_alone(raw: Raw) -> None:
    session = open_session(make_config(raw()))
    session.roll.begin(0)
    rows = session.roll(session.data.problems(2))
    assert all(one.mismatch is None for one in rows)
    assert session.policy.ledger.score == 0
    settled, found = session.roll.settle(rows)
    assert found == {}
    assert all(a is b for a, b in zip(settled, rows, strict=True))
