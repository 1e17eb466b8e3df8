"""What every method promises about one update: it is a function of the rows, however they are cut, padded or ordered;
flat groups teach nothing; weights are constants; streams that are missing are not read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from bridgelm.config import catalogue
from bridgelm.config.options import MethodOptions, samples
from bridgelm.config.run_config import make_config
from bridgelm.errors import UserError
from bridgelm.methods import METHODS
from bridgelm.model import batching, grads
from bridgelm.model.batching import make_batch
from bridgelm.training import loop
from bridgelm.types import Grade, Live, Micro, Row, Verdict

from .limits import LIMITS, STAY
from .variants import LATE, METHOD, VARIANTS, sections

Make = Callable[..., Any]


@dataclass
class Update:
    """What an update did: the gradients handed to each optimiser, its metrics, and the weights after it."""

    gradients: list[tuple[str, grads.Gradient]]
    metrics: dict[str, float]
    weights: dict[str, torch.Tensor]


class Bench:
    """A session some steps into training, on whose next batch one update can be taken again and again."""

    def __init__(self, session: Any, steps: int = 2) -> None:
        self.session = session
        for _ in range(steps):
            loop.take_step(session)
        session.roll.begin(steps)
        self.rows: list[Row] = session.method.gather(session.data, session.roll, steps)
        session.policy.factor = 1.0
        self._saved = {name: t.clone() for name, t in session.policy.tensors().items()}
        self._state = session.method.state()

    def update(self, rows: list[Row], micro_tokens: int = 64) -> Update:
        session, policy, seen = self.session, self.session.policy, []
        for named in policy.optimisers.values():
            named.optimiser.state.clear()
        policy.load({name: t.clone() for name, t in self._saved.items()})
        session.method.load(self._state)
        policy.micro_tokens = micro_tokens
        apply = type(policy).apply

        def spy(name: str, gradient: grads.Gradient, **options: Any) -> float:
            seen.append((name, {key: g.clone() for key, g in gradient.items()}))
            return apply(policy, name, gradient, **options)
        policy.apply = spy
        batch = make_batch(rows)
        metrics = session.method.update(policy, replace(batch, stats=session.method.probe(batch)), 2)
        del policy.apply
        metrics.pop("bridge/gain_honest", None)  # said once, by the first update after a probe
        return Update(seen, metrics, {name: t.clone() for name, t in policy.tensors().items()})


def assert_equal(one: Update, two: Update, what: str) -> None:
    assert one.metrics.keys() == two.metrics.keys()
    for key, value in one.metrics.items():
        assert two.metrics[key] == pytest.approx(value, rel=1e-8, abs=1e-12), f"{what}: {key}"
    assert [name for name, _ in one.gradients] == [name for name, _ in two.gradients]
    for (name, g), (_, h) in zip(one.gradients, two.gradients, strict=True):
        off = grads.norm(grads.mix((1.0, g), (-1.0, h)))
        assert off <= 1e-9 * grads.norm(g) + 1e-13, f"{what}: gradient of {name} is off by {off} of {grads.norm(g)}"
    for name, t in one.weights.items():
        torch.testing.assert_close(two.weights[name], t, rtol=1e-7, atol=1e-9, msg=lambda text: f"{what}: {text}")


@pytest.fixture
def bench(session: Make, request: pytest.FixtureRequest) -> Bench:
    name = request.param
    return Bench(session(VARIANTS[name], **sections(name)))


def test_all_methods_are_here() -> None:
    assert set(METHOD) == set(METHODS)


@pytest.mark.parametrize("bench", VARIANTS, indirect=True)
def test_an_update_does_not_depend_on_how_its_rows_are_cut(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench.update(bench.rows)
    assert any(grads.norm(g) > 1e-4 for _, g in first.gradients)
    for tokens in (1, 29, 10**6):
        assert_equal(first, bench.update(bench.rows, tokens), f"micro-batches of {tokens} tokens")
    shuffled = list(bench.rows)
    random.Random(3).shuffle(shuffled)
    assert_equal(first, bench.update(shuffled), "rows in another order")
    collate = batching.collate

    def padded(*args: Any) -> Micro:
        micro = collate(*args)

        def widen(x: torch.Tensor, value: float = 0) -> torch.Tensor:
            return torch.nn.functional.pad(x, (0, 5), value=value) if x.dim() == 2 else x
        return replace(micro, ids_BT=widen(micro.ids_BT, 7), pad_BT=widen(micro.pad_BT), own_BT=widen(micro.own_BT),
                       old_BT=widen(micro.old_BT), ref_BT=widen(micro.ref_BT), teacher_BT=widen(micro.teacher_BT),
                       taught_BT=widen(micro.taught_BT),
                       weight={k: widen(v) for k, v in micro.weight.items()},
                       scale={k: widen(v) for k, v in micro.scale.items()})
    monkeypatch.setattr(batching, "collate", padded)
    assert_equal(first, bench.update(bench.rows), "five columns of padding more")


@pytest.mark.parametrize("bench", VARIANTS, indirect=True)
def test_terms_read_only_streams_that_exist_and_weights_are_constants(bench: Bench) -> None:
    method = bench.session.method
    inner = getattr(method, "stage", method)
    readers = [inner.terms, *([inner.shadow_terms] if hasattr(inner, "shadow_terms") else [])]
    for kind in ("demo", "rollout"):
        rows = [row for row in bench.rows if row.kind == kind][:3]
        for chosen in (rows, [replace(row, streams={}) for row in rows]):
            if not chosen:
                continue
            micro = batching.collate(chosen, torch.float64, torch.device("cpu"), {})
            constants = [micro.old_BT, micro.ref_BT, micro.teacher_BT, *micro.weight.values(), *micro.scale.values()]
            assert not any(t.requires_grad for t in constants)
            for t in constants:
                t.requires_grad_()
            for terms in readers:
                leaf = (micro.old_BT.detach() + 0.1).requires_grad_()
                found = terms(micro, Live(leaf, 0.3 * micro.own_BT.double(), 0.1 - leaf))
                assert set(found) <= set(micro.weight)
                for name, value in found.items():
                    assert value.shape == micro.ids_BT.shape
                    assert value.isfinite().all()
                    assert not (value.detach() * micro.scale[name])[~micro.own_BT].any()


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

class Constant:
    """A grader with one reward for all."""

    def __init__(self, reward: float) -> None:
        self.reward = reward

    def grade(self, problems: Any, texts: Any) -> list[Grade]:
        return [Grade(self.reward, Verdict.CORRECT if self.reward > 0.5 else Verdict.WRONG)] * len(texts)

    def close(self) -> None:
        pass


OPTIONS: TypeAdapter[Any] = TypeAdapter(MethodOptions)
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
    if method.options.name in LIMITS:
        stay = dict.fromkeys(("nll", *STAY.get(method.options.name, ())), 1.0)
        sft = policy.grad(method.terms, batch, stay, entropy=True)
        wanted |= LIMITS[method.options.name](method, sft, policy, session.step)
    seen: dict[str, grads.Gradient] = {}
    apply = type(policy).apply
    policy.apply = lambda name, g, **options: (seen.setdefault(name, {k: v.clone() for k, v in g.items()}),
                                               apply(policy, name, g, **options))[1]
    metrics = session.method.update(policy, batch, session.step)
    assert all(np.isfinite(v) for key, v in metrics.items() if key != "bridge/gain_se"), metrics
    for name, gradient in wanted.items():
        if name in seen:
            for key, g in gradient.items():
                torch.testing.assert_close(seen[name][key], g, rtol=1e-9, atol=1e-15)
    assert all(t.isfinite().all() for t in policy.tensors().values())
