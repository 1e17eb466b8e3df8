"""What every method promises about one update: it is a function of the rows, however they are cut, padded or ordered;
flat groups teach nothing; weights are constants; streams that are missing are not read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from bridgelm.config import catalogue
from bridgelm.config.options import CHOSEN, MethodOptions, samples
from bridgelm.config.run_config import make_config
from bridgelm.errors import UserError
from bridgelm.methods import METHODS
from bridgelm.model import grads
from bridgelm.model.batching import make_batch
from bridgelm.testing.bench import (
    UNKNOWN,
    Bench,
    Constant,
    Update,
    difference,
    padding,
    watched,
    wrong_terms,
)
from bridgelm.training import loop
from records import RECORDS

from .variants import LATE, METHOD, VARIANTS, sections

Make = Callable[..., Any]


def assert_equal(one: Update, two: Update, what: str) -> None:
    assert not difference(one, two), what


@pytest.fixture
def bench(session: Make, request: pytest.FixtureRequest) -> Bench:
    name = request.param
    return Bench(session(VARIANTS[name], **sections(name)))


def test_all_methods_are_here() -> None:
    assert set(METHOD) == set(METHODS)


@pytest.mark.parametrize("bench", VARIANTS, indirect=True)
def test_an_update_does_not_depend_on_how_its_rows_are_cut(bench: Bench) -> None:
    first = bench.update(bench.rows)
    assert any(grads.norm(g) > 1e-4 for _, g in first.gradients)
    for tokens in (1, 29, 10**6):
        assert_equal(first, bench.update(bench.rows, tokens), f"micro-batches of {tokens} tokens")
    shuffled = list(bench.rows)
    random.Random(3).shuffle(shuffled)
    assert_equal(first, bench.update(shuffled), "rows in another order")
    with padding():
        assert_equal(first, bench.update(bench.rows), "five columns of padding more")


@pytest.mark.parametrize("bench", VARIANTS, indirect=True)
def test_terms_read_only_streams_that_exist_and_weights_are_constants(bench: Bench) -> None:
    assert not wrong_terms(bench.session.method, bench.rows)


@pytest.mark.parametrize("name", [name for name, cls in METHODS.items()
                                  if cls.needs & {"demos", "paired_demos"} or name == "sequence"])
def test_unmet_needs_are_refused_before_the_model_is_loaded(name: str, raw: Make, monkeypatch: pytest.MonkeyPatch,
                                                            tmp_path: Any) -> None:
    from tiny import write_data

    config = raw(METHOD[name])
    write_data(tmp_path, demos=False)
    monkeypatch.setattr(loop, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match="needs demonstrations"):
        loop.train(make_config(config), quiet=True)
    assert not (tmp_path / "runs" / "run").exists()


# -- groups that all pass or all fail: the RL term is exactly zero, and what is left is stated for each method -------

OPTIONS: TypeAdapter[Any] = TypeAdapter(Annotated[MethodOptions, *CHOSEN])
FLAT = {name: method for name, method in VARIANTS.items()
        if any(samples(part) for part in catalogue.parts(OPTIONS.validate_python(method)))}


@pytest.fixture
def flat(session: Make, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A session whose groups are all flat, and the batch of its first step with rollouts."""
    name, reward = request.param
    made = session(FLAT[name], **sections(name), rollout={"group": 6})
    made.roll.grader.close()
    made.roll.grader = Constant(reward)
    if made.method.options.name in LATE:
        for _ in range(2):
            loop.take_step(made)
    return made


@pytest.mark.parametrize("flat", [(name, r) for name in FLAT for r in (0.0, 1.0, 0.1)], indirect=True, ids=str)
def test_flat_groups_teach_nothing(flat: Any) -> None:
    """0.1 is no binary fraction: the mean of six of them is not quite 0.1."""
    session, policy = flat, flat.policy
    session.roll.begin(session.step)
    rows = session.method.gather(session.data, session.roll, session.step)
    for row in rows:
        for name in {"pg", "shadow"} & row.streams.keys():
            assert not row.streams[name].weight.any()
    batch = make_batch(rows)
    method = getattr(session.method, "stage", session.method)
    if hasattr(method.options, "rl") or "pg" in batch.counts:  # it has advantages
        assert batch.counts["pg"] > 0, "a zero advantage still counts"
        found = policy.grad(method.terms, batch, {"pg": 1.0}, entropy=True)
        assert not any(g.any() for g in (*found.theta.values(), *found.w.values()))
        assert found.losses == {"pg": 0.0}
    nothing = policy.groups["theta"].zeros()
    # Each method's own limit: what is left when RL has nothing to say (KL, entropy and teacher stay: left out here).
    if {"kl", "entropy", "kd"} & batch.counts.keys():
        return
    wanted: dict[str, grads.Gradient] = {"theta": nothing}  # grpo: nothing at all
    record = RECORDS[method.options.name]
    if record.limit:
        sft = policy.grad(method.terms, batch, dict.fromkeys(("nll", *record.stay), 1.0), entropy=True)
        wanted |= record.limit(method, sft, policy, session.step)
    steps: list[tuple[str, grads.Gradient]] = []
    with watched(policy, steps):
        metrics = session.method.update(policy, batch, session.step)
    seen = dict(reversed(steps))  # the first step of each optimiser
    assert all(np.isfinite(v) for key, v in metrics.items() if key not in UNKNOWN), metrics
    for name, gradient in wanted.items():
        if name in seen:
            for key, g in gradient.items():
                torch.testing.assert_close(seen[name][key], g, rtol=1e-9, atol=1e-15)
    assert all(t.isfinite().all() for t in policy.tensors().values())
