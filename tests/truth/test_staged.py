"""`staged`: the temperature against closed forms and against entropies counted by hand, the stages against `grpo` with
the settings of each, on a tiny real model. Mutants of each line fail."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import close
from hand import advantages, gather, in_folder, opened, put, same, sessions, slope, weights
from mutation import Mutant, mutants

from bridgelm.config.run_config import load_config
from bridgelm.methods import staged
from bridgelm.model.batching import make_batch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _sessions() -> Iterator[None]:
    with sessions():
        yield


def two_levels(gap: float, others: int) -> Callable[[float], float]:
    """Entropy of softmax(z / T) for one logit `gap` above `others` equal ones."""

    def entropy(t: float) -> float:
        rest = others * math.exp(-gap / t)
        top = 1 / (1 + rest)
        return -top * math.log(top) - (1 - top) * math.log((1 - top) / others)

    return entropy


def test_bisection(tmp_path: Path) -> None:
    """The temperature at which the top token has a chosen probability p is gap / log(p others / (1 - p))."""
    for others in (1, 9):
        for p in (0.6, 0.9, 0.97):
            entropy = two_levels(1.3, others)
            wanted = 1.3 / math.log(p * others / (1 - p))
            if 0.1 < wanted < 4:
                found = staged.temperature_for_entropy(entropy, entropy(wanted))
                assert found == pytest.approx(wanted, rel=1e-4), (others, p)
    # Out of reach: the nearer bound.
    assert staged.temperature_for_entropy(two_levels(1.0, 1), 2.0) == pytest.approx(4.0, rel=1e-3)
    assert staged.temperature_for_entropy(lambda t: 5.0, 0.3) == pytest.approx(0.1, rel=1e-3)


def entropy_by_hand(session: Any, rows: Any, t: float) -> float:
    total, count = 0.0, 0
    with session.policy.at("live") as model, torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor(row.ids)[None]).logits[0]
            for i in np.flatnonzero(row.own):
                p = torch.softmax(logits[i - 1] / t, -1)
                total += float(-(p * p.log()).sum())
                count += 1
    return total / count


STAGES = [{"length": 0.5, "mask_overlong": True, "part": 2.0}, {"length": 1.0}]


def test_measured_on_its_own_answers(tmp_path: Path) -> None:
    """Round by round: T has the target's entropy on the answers of the round, which were drawn at the T before."""
    method = {"name": "staged", "target_entropy": 1.5, "probe": 5, "rounds": 2, "lengths": STAGES}
    session = opened(tmp_path, method, "+-")
    seen: list[Any] = []
    call = type(session.roll).__call__

    class Spy(type(session.roll)):  # type: ignore[misc]
        def __call__(self, *args: Any, **options: Any) -> Any:
            seen.append(call(self, *args, **options))
            return seen[-1]

    session.roll.__class__ = Spy
    cursor = session.data.state()["problems"]["taken"]
    rows = gather(session)
    assert len(seen) == 3 and [len(s) for s in seen] == [5, 5, 16]
    assert session.data.state()["problems"]["taken"] == cursor + 4, "the measurement moves no cursor"
    first, second, rollouts = seen
    assert [r.problem.id for r in first] == [p.id for p in session.data.splits.train[:5]]
    between = second[0].temperature
    assert {r.temperature for r in first} == {1.0} and 0.1 < between < 1.0, "a random model's entropy is higher"
    close(entropy_by_hand(session, first, between), 1.5, 2e-4, "the first round")
    end = session.method.temperature
    close(entropy_by_hand(session, second, end), 1.5, 2e-4, "the second round")
    assert {r.temperature for r in rollouts} == {r.temperature for r in rows} == {end} and end != between
    assert all(len(r.ids) - int((~r.own).sum()) <= 3 for s in seen for r in s), "of the first stage's length"
    # Measured once, and kept over a resume.
    again = opened(tmp_path / "again", method, "+-")
    again.method.load(json.loads(json.dumps(session.method.state())))
    gather(again, 1)
    assert again.method.temperature == end and again.policy.ledger.rollouts == 16


def test_like_grpo(tmp_path: Path) -> None:
    """Each stage samples and steps as grpo with its length, its mask and its temperature; also with constant length."""
    for aggregate in ("token", "constant"):
        rl = {"aggregate": aggregate}
        method = {"name": "staged", "target_entropy": 0.0, "lengths": STAGES, "rl": rl}
        rollout = {"prompts": 6, "group": 6, "temperature": 0.8}
        made = opened(tmp_path / aggregate, method, "+--+-", steps=6,
                      rollout={**rollout, "max_new_tokens": 8})
        for step, limit, masked in ((0, 4, True), (3, 4, True), (4, 8, False), (5, 8, False)):
            plain = opened(tmp_path / f"{aggregate}{step}", {"name": "grpo", "rl": rl}, "+--+-",
                           rollout={**rollout, "max_new_tokens": limit, "mask_overlong": masked})
            made.roll.grader.given = list(plain.roll.grader.given)
            plain.data.load(made.data.state())
            one, two, start = gather(plain, step), gather(made, step), weights(made)
            assert all(np.array_equal(a.ids, b.ids) and a.temperature == b.temperature == 0.8 for a, b in
                       zip(one, two, strict=True))
            assert make_batch(one).counts == make_batch(two).counts, f"step {step}"
            assert masked == any("pg" not in r.streams for r in two)
            gains, length = advantages(two), make_batch(one).counts["pg"]
            parts = [(r, a * r.own / length) for r, a in zip(two, gains) if r.finished or not masked]
            gradient = slope(made, parts)
            found = made.method.update(made.policy, make_batch(two), step)
            same(weights(made), {n: start[n] - 0.1 * gradient[n] for n in start}, start, f"step {step}")
            assert found["staged/length"] == limit / 8 and found["staged/temperature"] == 0.8
            made.roll.begin(step + 1)
            assert made.roll.sampling.max_new_tokens == 8, "other methods sample as the run says"
            put(made, start)


MUTANTS = mutants(
    staged,
    Mutant("compare", "temperature_for_entropy", "entropy 1", by=in_folder(test_bisection)),
    Mutant("constant", "Staged.found", "rounds", to=1, by=in_folder(test_measured_on_its_own_answers)),
    Mutant("drop", "mean_entropy", "temperature 1", by=in_folder(test_measured_on_its_own_answers)),
    Mutant("drop", "Staged.load", by=in_folder(test_measured_on_its_own_answers)),
    Mutant("term", "Staged.gather", "length 1", by=in_folder(test_like_grpo)),
    Mutant("constant", "Staged.gather", "mask_overlong 1", to=False, by=in_folder(test_like_grpo)),
    Mutant("constant", "Staged.length_at", "part", to=1.0, by=in_folder(test_like_grpo)),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()


def test_a_target_out_of_reach_is_said() -> None:
    config = load_config(ROOT / "recipes" / "toy" / "staged.toml", ["method.target_entropy=9.0"])
    method = staged.Staged(config.method, config)
    for temperature, said in ((0.8, 0), (staged.temperature_for_entropy(lambda t: 0.0, 9.0), 1),
                              (staged.temperature_for_entropy(lambda t: 99.0, 9.0), 1)):
        method.temperature = temperature
        assert len(method.warnings({})) == said, temperature


def test_the_defaults_are_the_papers_stages() -> None:
    lengths = load_config(ROOT / "recipes" / "toy" / "staged.toml").method.lengths  # type: ignore[union-attr]
    assert [(32 * s.length, s.mask_overlong) for s in lengths] == [(8, True), (16, True), (24, False), (32, False)]
