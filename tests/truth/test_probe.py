"""The probes of `diagnose.every`: they leave the run as it is, and their numbers are those of plain formulas on the
model's own logits, row by row, with autograd in the place of the policy's gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutation import Mutant, mutants
from torch import Tensor
from transformer import wide_norm

from bridgelm.config.run_config import make_config
from bridgelm.diagnosis.measure import measure_saved
from bridgelm.model.batching import halves, make_batch
from bridgelm.objective import credit
from bridgelm.runs.folder import read_lines
from bridgelm.runs.reader import Run
from bridgelm.training import loop, measurements
from bridgelm.types import Row
from tiny import raw_config

STAGES = [{"method": {"name": "sft"}, "steps": 3}, {"method": {"name": "grpo"}}]
COLD_START = {"name": "sequence", "stages": STAGES}
PROBE = {"every": 2, "demos": 7, "problems": 5, "group": 4}


@pytest.fixture(autouse=True)
def _wide_norm() -> Iterator[None]:
    with wide_norm():
        yield


def raw(folder: Path, method: dict[str, Any], name: str, probed: bool) -> dict[str, Any]:
    """A reward that draws from the global generators, as a user's may: what a probe takes from them is given back."""
    made = raw_config(folder, method, name=name, steps=5, diagnose=PROBE if probed else {})
    reward = folder / "reward.py"
    reward.write_text("import random\nimport numpy\n\ndef reward(prompts, completions, **columns):\n"
                      "    return [float(random.random() + numpy.random.rand() > 1) for _ in completions]\n")
    return {**made, "reward": {"verifier": "none", "functions": [f"{reward}:reward"]}}


def course(run: Run, probes: bool) -> list[dict[str, Any]]:
    """The events without what differs between any two runs: times, and here the cost of the probes."""
    left_out = {"seconds", "flops/probe", "time/rollout", "time/update", "time/probe"}
    return [{key: value for key, value in event.items() if key not in left_out} for event in run.events
            if probes or event["event"] != "probe"]


@pytest.mark.parametrize("method", [COLD_START, {"name": "bridge", "probe_every": 2}],
                         ids=lambda m: m["name"])
def test_a_run_is_the_same_bit_for_bit_with_and_without(tmp_path: Path, method: dict[str, Any]) -> None:
    plain, probed = (loop.train(make_config(raw(tmp_path, method, f"probed-{on}", on)), quiet=True)
                     for on in (False, True))
    assert course(plain, False) == course(probed, False)
    weights = [(run.path / "final" / "model.safetensors").read_bytes() for run in (plain, probed)]
    assert weights[0] == weights[1]
    probes = [event for event in probed.events if event["event"] == "probe"]
    assert [event["step"] for event in probes] == ([0, 2, 3, 4, 5] if method is COLD_START else [0, 2, 4, 5])
    assert (probed.last("flops/probe") or 0) > 0 and plain.last("flops/probe") is None, "the cost has a line of its own"


@pytest.mark.parametrize("stop", [3, 4], ids=["between stages", "mid-stage"])
def test_a_resumed_run_takes_the_same_probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    whole = loop.train(make_config(raw(tmp_path, COLD_START, "whole", True)), quiet=True)
    take_step = loop.take_step

    def stopped(session: Any) -> Any:
        found = take_step(session)
        session.stop = session.step == stop
        return found

    monkeypatch.setattr(loop, "take_step", stopped)
    with pytest.raises(loop.Interrupted):
        loop.train(make_config(raw(tmp_path, COLD_START, "parts", True)), quiet=True)
    monkeypatch.setattr(loop, "take_step", take_step)
    parts = loop.resume(tmp_path / "runs" / "parts", quiet=True)
    assert course(whole, True) == course(parts, True)


# -- the numbers -------------------------------------------------------------------------------------------------------

def logps(model: Any, row: Row) -> Tensor:
    logits = model(torch.from_numpy(row.ids)[None]).logits[0].double() / row.temperature
    return torch.log_softmax(logits[:-1], -1).gather(1, torch.from_numpy(row.ids[1:])[:, None])[:, 0]


def of_own(values: Tensor, row: Row) -> Tensor:
    return values[torch.from_numpy(row.own[1:])]


def plain_gradient(model: Any, rows: list[Row], weights: list[float], tokens: int) -> tuple[Tensor, float]:
    """Of - sum of weight x log pi over all own tokens / `tokens`, as one long vector; and its value."""
    model.zero_grad()
    for p in model.parameters():
        p.requires_grad_(True)
    loss = -sum(w * of_own(logps(model, row), row).sum() for row, w in zip(rows, weights, strict=True)) / tokens
    loss.backward()  # type: ignore[union-attr]
    out = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return out, float(loss.detach())  # type: ignore[union-attr]


@pytest.fixture
def moved(session: Callable[..., Any]) -> Any:
    """A session whose weights have gone away from their start, with that start."""
    made = session("joint", diagnose=PROBE, rollout={"temperature": 0.8, "prompts": 4, "group": 4, "max_new_tokens": 6})
    start = {name: weight.clone() for name, weight in made.policy.weights("live").items()}
    with torch.no_grad():
        for i, t in enumerate(made.policy.groups["theta"].full.values()):
            t += 0.05 * torch.sin(torch.arange(t.numel(), dtype=t.dtype) + i).reshape(t.shape)
    made.policy.load(made.policy.tensors())  # the merged weights are old
    return made, start


def expected(made: Any, start: dict[str, Tensor]) -> tuple[dict[str, float], list[Row]]:
    sample = measurements.draw_sample(made.data.splits, made.config)
    demos = [made.roll.demo(problem, demo) for problem, demo in sample.demos]
    made.roll.begin(measurements.SALT)
    drawn = made.roll(sample.problems, PROBE["group"])
    model, parts = made.policy.model, {}
    tokens = sum(int(row.own.sum()) for row in demos)
    means = {row.group: np.mean([r.reward for r in drawn if r.group == row.group]) for row in drawn}
    gains = [row.reward - means[row.group] for row in drawn]
    drawn_tokens = sum(int(row.own.sum()) for row in drawn)
    with made.policy.at("live"):
        parts["sft"], ce = plain_gradient(model, demos, [1.0] * len(demos), tokens)
        parts["rl"], _ = plain_gradient(model, drawn, gains, drawn_tokens)
        for name, rows, weights, below in (("sft", demos, [1.0] * len(demos), tokens),
                                           ("rl", drawn, gains, drawn_tokens)):
            first = {id(row) for row in halves(make_batch(rows))[0].rows}
            for half in (True, False):
                kept = [i for i, row in enumerate(rows) if (id(row) in first) == half]
                parts[f"{name}{half}"], _ = plain_gradient(model, [rows[i] for i in kept], [weights[i] for i in kept],
                                                           below)
        live = torch.cat([of_own(logps(model, row), row) for row in drawn]).detach()
    with made.policy.holding(start):
        before = torch.cat([of_own(logps(model, row), row) for row in drawn]).detach()
    gone = torch.cat([(made.policy.weights("live")[n] - start[n]).flatten() for n in start]).norm()
    size = torch.cat([t.flatten() for t in start.values()]).norm()
    cosine = parts["sft"] @ parts["rl"] / (parts["sft"].norm() * parts["rl"].norm())
    gap = before - live
    values = {"demo_ce": ce, "cosine": cosine, "dot": parts["sft"] @ parts["rl"], "norm_sft": parts["sft"].norm(),
              "norm_rl": parts["rl"].norm(), "square_sft": 4 * parts["sftTrue"] @ parts["sftFalse"],
              "square_rl": 4 * parts["rlTrue"] @ parts["rlFalse"], "kl_start": (gap.exp() - 1 - gap).mean(),
              "distance": gone, "distance_share": gone / size, "reward": np.mean([row.reward for row in drawn])}
    return {name: float(value) for name, value in values.items()}, drawn


def measured(made: Any, start: dict[str, Tensor]) -> dict[str, float]:
    sample = measurements.draw_sample(made.data.splits, made.config)
    return measurements.measure(made.policy, made.roll, sample, PROBE["group"], start)


def wrong(found: dict[str, float], right: dict[str, float]) -> set[str]:
    return {name for name, value in right.items() if not math.isclose(found[name], value, rel_tol=1e-7, abs_tol=1e-10)}


def test_the_numbers_are_those_of_the_plain_formulas(moved: Any) -> None:
    right, drawn = expected(*moved)
    assert right["norm_rl"] > 0 and right["kl_start"] > 1e-3, "a case in which nothing is known would pass everything"
    assert len({int(row.own.sum()) for row in drawn}) > 1
    assert not wrong(measured(*moved), right)


SEEN = (  # a mutant, and the numbers that are wrong by it
    (Mutant("term", "gradient", "dot 1"), {"square_sft", "square_rl"}),
    (Mutant("term", "gradient", "losses 0"), {"demo_ce"}),
    (Mutant("branch", "with_advantages", "zscore 0", of=credit), {"dot", "norm_rl", "square_rl"}),
    (Mutant("swap", "kl_from", "old_logps"), {"kl_start"}),
    (Mutant("sign", "kl_from", "expm1"), {"kl_start"}),
    (Mutant("term", "distance", "double 0"), {"distance", "distance_share"}),
    (Mutant("term", "measure", 2), {"cosine"}),  # one of its two norms
)
MUTANTS = mutants(measurements, *(mutant for mutant, _ in SEEN))


@pytest.mark.parametrize(("mutant", "seen"), [*zip(MUTANTS, (seen for _, seen in SEEN), strict=True)],
                         ids=lambda value: str(value) if isinstance(value, Mutant) else "+".join(sorted(value)))
def test_mutant_is_seen(moved: Any, mutant: Mutant, seen: set[str]) -> None:
    right, _ = expected(*moved)
    with mutant.applied():
        assert wrong(measured(*moved), right) == seen


def test_the_sample_is_the_same_for_every_seed_and_held_out_where_it_can_be(session: Callable[..., Any]) -> None:
    first, second = (session("sft", diagnose=PROBE, seed=seed) for seed in (0, 1))
    a, b = (measurements.draw_sample(s.data.splits, s.config) for s in (first, second))
    assert a == b and not a.held and len(a.demos) == PROBE["demos"] and len(a.problems) == PROBE["problems"]
    splits = first.data.splits
    carrying = tuple(type(p)(p.id, p.messages, p.answer, splits.train[0].demos) for p in splits.validation)
    held = measurements.draw_sample(type(splits)(splits.train, (), carrying, splits.test), first.config)
    assert held.held and {p.id for p, _ in held.demos} <= {p.id for p in carrying}


def test_saved_models_measured_afterwards_give_the_same_numbers(tmp_path: Path) -> None:
    method = {"name": "sequence", "stages": [{"method": {"name": "sft"}, "steps": 2}, {"method": {"name": "joint"}}]}
    run = loop.train(make_config(raw_config(tmp_path, method, steps=4, diagnose=PROBE)), quiet=True)
    taken = {event["step"]: event for event in run.events if event["event"] == "probe"}
    rows = {row["step"]: row for row in read_lines(measure_saved(Run(run.path)))}
    assert {0, 2, 4} <= set(rows) and rows[4]["start"] == 2 and rows[2]["start"] == 0
    assert taken[4]["kl_start"] > 1e-4 and taken[4]["demo_ce"] != taken[2]["demo_ce"]
    for step in (0, 2, 4):
        for key in ("demo_ce", "reward", "cosine", "square_rl", "square_sft", "kl_start", "distance", "start"):
            assert rows[step][key] == pytest.approx(taken[step][key], rel=1e-9, abs=1e-12), (step, key)
