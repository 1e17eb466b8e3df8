"""Weights merged by hand, from the numbers in the groups, against those of the live model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bridgelm.model.placement import Form, Placements
from bridgelm.model.weights import Weights

Numbers = dict[str, np.ndarray]


class Small(torch.nn.Module):
    """Two layers and a head of few numbers, with what `Weights` asks of a model."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 6, dtype=dtype), torch.nn.Linear(6, 4, bias=False, dtype=dtype)
        self.head = torch.nn.Linear(4, 5, bias=False, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float32))

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head


def shake(weights: Weights, *names: str) -> None:
    generator = torch.Generator().manual_seed(len(names))
    with torch.no_grad():
        for name in names:
            for t in weights.groups[name].flat().values():
                t.add_(torch.randn(t.shape, generator=generator, dtype=torch.float32).to(t))
            weights.changed(name)


def numbers(tensors: dict[str, Tensor]) -> Numbers:
    return {name: t.detach().double().numpy().copy() for name, t in tensors.items()}


def by_hand(base: Numbers, *groups: Any) -> Numbers:
    """base + sum of s B A."""
    out = dict(base)
    for group in groups:
        for name, (a, b) in group.low.items():
            out[name] = out[name] + group.scale * b.detach().double().numpy() @ a.detach().double().numpy()
    return out


def assert_at(weights: Weights, point: str, wanted: Numbers) -> None:
    """By the merged weights, and by those that the model has at the point."""
    with weights.at(point) as model:
        inside = numbers(dict(model.named_parameters()))
    for found in (numbers(weights.weights(point)), inside):
        assert found.keys() == wanted.keys()
        assert all(np.abs(found[name] - wanted[name]).max() < 1e-14 for name in wanted), point


def test_points_of_a_whole_theta_and_w() -> None:
    weights = Weights(Small())
    start = numbers(weights.weights())
    weights.fork("reference")
    weights.fork("shadow")
    weights.add_w(2, 6.0)
    assert set(weights.groups["w"].low) == {"first.weight", "second.weight"}, "no bias and no head"
    shake(weights, "theta")
    shake(weights, "shadow", "w")
    theta, shadow, w = (weights.groups[name] for name in ("theta", "shadow", "w"))
    assert w.scale == 3.0
    assert_at(weights, "live", live := by_hand(numbers(theta.full), w))
    assert_at(weights, "shadow", by_hand(numbers(shadow.full), w))
    assert_at(weights, "reference", start)
    assert_at(weights, "live", live)
    mixed = {name: 0.75 * a + 0.25 * numbers(theta.full)[name] for name, a in numbers(shadow.full).items()}
    weights.lean("shadow", "theta", 0.25)
    assert_at(weights, "shadow", by_hand(mixed, w))
    way = {name: torch.ones_like(t) for name, t in theta.full.items()}
    with weights.offset(way, 0.5) as point:
        assert_at(weights, point, by_hand({name: t + 0.5 for name, t in numbers(theta.full).items()}, w))
    assert_at(weights, "live", live)


def test_points_of_a_low_rank_theta_and_w() -> None:
    weights = Weights(Small(), lora=(1, 2.0, "first"))
    base = numbers(weights.weights())
    weights.add_w(2, 1.0, "second|first")
    shake(weights, "theta", "w")
    theta, w = weights.groups["theta"], weights.groups["w"]
    assert set(theta.low) == {"first.weight"}
    assert not theta.full
    assert_at(weights, "live", by_hand(base, theta, w))
    with weights.origin() as origin:
        assert origin.adapter is not None
        summed = {n: base[n] + b.numpy() @ a.numpy() for n, (a, b) in origin.adapter.items()}
    assert set(summed) == {"first.weight", "second.weight"}
    assert all(np.abs(t - by_hand(base, theta, w)[n]).max() < 1e-14 for n, t in summed.items())


@pytest.mark.parametrize("lora", [None, (1, 2.0, "")])
@pytest.mark.parametrize("exclusive", [False, True])
def test_absorbed_weights(lora: Any, exclusive: bool) -> None:
    """What w has learnt becomes theta's own, or the frozen base's; of the function nothing changes."""
    weights = Weights(Small(), lora=lora)
    shake(weights, "theta")
    before = by_hand(numbers(weights.frozen if lora else weights.groups["theta"].full), weights.groups["theta"])
    weights.add_w(2, 6.0, "second", exclusive)
    assert ("second.weight" in weights.groups["theta"].full or "second.weight" in weights.groups["theta"].low) \
        != exclusive
    assert_at(weights, "live", before)
    shake(weights, "w")
    assert_at(weights, "live", after := by_hand(before, weights.groups["w"]))
    weights.fork("reference")
    weights.absorb()
    assert set(weights.groups) == {"theta"}
    assert_at(weights, "live", after)


@pytest.mark.parametrize("lora", [None, (1, 1.0, "")])
def test_sums_are_rounded_once_to_the_models_dtype(lora: Any) -> None:
    """Groups are float32 beside a model in bfloat16; all terms are added before anything is rounded."""
    weights = Weights(Small(torch.bfloat16), lora=lora)
    weights.add_w(1, 1.0)
    shake(weights, "theta", "w")
    groups = [weights.groups[name] for name in ("theta", "w")]
    assert {t.dtype for group in groups for t in group.flat().values()} == {torch.float32}
    for name, found in weights.weights().items():
        wanted = groups[0].full.get(name, weights.frozen.get(name)).detach().float()  # type: ignore[union-attr]
        for group in groups:
            if name in group.low:
                a, b = group.low[name]
                wanted = b.detach() @ a.detach() + wanted
        assert torch.equal(found, wanted.bfloat16()), name


def test_blocks_within_blocks_give_back_what_was_there() -> None:
    weights = Weights(Small())
    weights.fork("reference")
    weights.fork("shadow")
    shake(weights, "shadow")
    live, shadow = (numbers(weights.weights(point)) for point in ("live", "shadow"))
    other = {name: torch.full_like(t, 7.0) for name, t in weights.weights().items()}

    def now() -> Numbers:
        return numbers(dict(weights.model.named_parameters()))

    def same(a: Numbers, b: Numbers) -> bool:
        return all(np.array_equal(a[name], b[name]) for name in b)

    with weights.at("live"):
        assert same(now(), live)
    with weights.holding(other):
        assert same(now(), numbers(other))
        with weights.at("live"):
            assert same(now(), numbers(other)), "within the block they are the live ones"
        with weights.at("shadow"):
            assert same(now(), shadow)
        assert same(now(), numbers(other))
    assert same(now(), live)
    with weights.at("shadow"):
        with weights.holding(other):
            assert same(now(), numbers(other))
        assert same(now(), shadow)
        with weights.at("reference"):
            assert same(now(), live)
        assert same(now(), shadow)
    with weights.at("live"):
        assert same(now(), live)


def test_a_group_owns_its_placement_from_the_start() -> None:
    """By the run's configuration: a shadow in bfloat16 on the host, whose moments go with it, and masters that stay."""
    weights = Weights(Small(torch.bfloat16), Placements(frozenset({"shadow", "moments"}), torch.bfloat16))
    weights.fork("reference")
    weights.fork("shadow")
    weights.add_w(1, 1.0)
    here, away = Form(), Form(host=True)
    there = Form(torch.bfloat16, host=True)
    found = {name: (group.placement.weights, group.placement.moments) for name, group in weights.groups.items()}
    assert found == {"theta": (here, away), "reference": (here, away), "shadow": (there, there), "w": (here, away)}
    assert {name: {t.dtype for t in group.flat().values()} for name, group in weights.groups.items()} == {
        name: {torch.bfloat16 if name == "shadow" else torch.float32} for name in weights.groups}
    assert {t.dtype for group in weights.groups.values() for t in group.zeros().values()} == {torch.float32}
    low = Weights(Small(), Placements(frozenset({"shadow", "masters"}), torch.bfloat16), lora=(1, 1.0, ""))
    low.fork("shadow")
    assert {group.placement.weights for group in low.groups.values()} == {here}, "low-rank terms are small"


def test_a_checkpoint_brings_back_every_weight() -> None:
    def build() -> Weights:
        weights = Weights(Small(), Placements(shadow=torch.bfloat16), lora=None)
        weights.add_w(1, 1.0, "second", exclusive=True)
        weights.fork("shadow")
        return weights

    first, second = build(), build()
    shake(first, "theta", "w", "shadow")
    first.fork("shadow")  # rounded at random, and counted
    saved = {name: t.clone() for name, t in first.tensors().items()}
    second.load(saved)
    assert saved.keys() == second.tensors().keys()
    assert {name for name in saved if name.startswith("frozen/")} == {"frozen/second.weight"}
    assert second.noise.count == first.noise.count > build().noise.count
    assert_at(second, "live", numbers(first.weights()))
    assert_at(second, "shadow", numbers(first.weights("shadow")))


def test_a_base_that_has_absorbed_w_is_in_the_checkpoint() -> None:
    first, second = (Weights(Small(), lora=(1, 2.0, "first")) for _ in range(2))
    first.add_w(2, 2.0)
    shake(first, "theta", "w")
    first.absorb()
    second.load(first.tensors())
    assert_at(second, "live", numbers(first.weights()))
    assert second.tensors().keys() == first.tensors().keys() > {f"frozen/{name}" for name in first.params}
    with second.origin() as origin:
        assert origin.adapter is None, "the model as it was read is no base any more"
