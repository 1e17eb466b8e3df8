"""What a pass saves lies in host memory until it is wanted: the same gradients to the bit, and no weight goes along."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bridgelm.config.run_config import ModelConfig
from bridgelm.model import forward, offload, storage
from bridgelm.model.batching import collate
from bridgelm.model.loading import load_model
from bridgelm.types import Micro, Problem, Row

Folder = Callable[..., Path]
Parked = list[tuple[Tensor, Tensor]]  # tensors of the device, and their copies


@pytest.fixture
def parked(monkeypatch: pytest.MonkeyPatch) -> Parked:
    """Host memory is memory of its own, as with a GPU."""
    seen: Parked = []

    def to_host(t: Tensor) -> Tensor:
        seen.append((t, t.clone()))
        return seen[-1][1]

    monkeypatch.setattr(storage, "to_host", to_host)
    monkeypatch.setattr(offload, "SMALL", 0)
    return seen


def micro_of(seed: int = 0) -> Micro:
    rng, rows = np.random.default_rng(seed), []
    for prompt, own in ((3, 4), (3, 6), (5, 2), (1, 8)):
        ids = np.array([*range(3, 3 + prompt), *rng.integers(2, 29, own)])
        rows.append(Row(ids, np.arange(len(ids)) >= prompt, "rollout", Problem("p", ())))
    return collate(rows, torch.float32, torch.device("cpu"), {})


def gradients(folder: Path, packed: bool, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, list[Tensor]]:
    seen = storage.to_host
    with monkeypatch.context() as patch:
        patch.setattr(storage, "to_host", lambda t: t)
        model = load_model(ModelConfig(name_or_path=str(folder), device="cpu", **options))
        patch.setattr(storage, "to_host", seen)
        if not packed:
            patch.setattr(forward, "packs", lambda model: False)
        live = forward.forward(model, micro_of(), entropy=True)
    assert live.entropy_BT is not None
    weight = torch.arange(live.logp_BT.numel()).view_as(live.logp_BT).cos()
    (weight * live.logp_BT + live.entropy_BT).sum().backward()
    return model, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma2"])
def test_gradients_are_the_same_to_the_bit(kind: str, checkpointing: bool, packed: bool, parked: Parked,
                                           tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"gradient_checkpointing": checkpointing}
    _, plain = gradients(tiny_folder(kind), packed, monkeypatch, **options)
    assert not parked
    model, found = gradients(tiny_folder(kind), packed, monkeypatch, **options, offload_activations=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    places = [t.untyped_storage().data_ptr() for t, _ in parked]
    assert places
    assert not weights & set(places)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_they_are_computed_from_what_lay_on_the_host(checkpointing: bool, parked: Parked, tiny_folder: Folder,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain = gradients(tiny_folder(), True, monkeypatch, gradient_checkpointing=checkpointing)
    to_host = storage.to_host
    monkeypatch.setattr(storage, "to_host", lambda t: to_host(t).mul_(1.5 if t.is_floating_point() else 1))
    _, found = gradients(tiny_folder(), True, monkeypatch, gradient_checkpointing=checkpointing,
                         offload_activations=True)
    assert not any(torch.equal(a, b) for a, b in zip(plain[:-1], found[:-1], strict=True))


def test_with_checkpointing_it_is_the_input_of_each_layer(parked: Parked, tiny_folder: Folder,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = gradients(tiny_folder(), True, monkeypatch, gradient_checkpointing=True, offload_activations=True)
    tokens = len(micro_of().layout.ids_N)
    inputs = [t for t, _ in parked if t.shape == (1, tokens, model.config.hidden_size)]
    assert len(inputs) >= model.config.num_hidden_layers
    beyond = sum(t.nbytes for t, _ in parked) - model.config.num_hidden_layers * inputs[0].nbytes
    assert beyond < 4 * inputs[0].nbytes, "the embedding's ids, and what the last norm saves"


def test_what_several_operations_save_is_moved_once(parked: Parked) -> None:
    hooks, t = offload.Saved(), torch.randn(50)
    a, b = hooks.pack(t), hooks.pack(t)
    assert a is b
    assert len(parked) == 1
    t.add_(1)
    assert hooks.pack(t) is not a, "it has changed since"
    assert hooks.pack(t[:30]) is not hooks.pack(t[:40])


def test_memory_that_is_used_again_is_no_old_friend(parked: Parked) -> None:
    hooks, kept = offload.Saved(), []
    for i in range(50):
        kept.append(hooks.pack(torch.full((1000,), float(i))))  # freed at once: the next one takes its place
        parked.clear()
    assert all(torch.equal(hooks.unpack(one), torch.full((1000,), float(i))) for i, one in enumerate(kept))


def test_nothing_is_moved_without_a_backward_pass(parked: Parked, tiny_folder: Folder) -> None:
    model = load_model(ModelConfig(name_or_path=str(tiny_folder()), device="cpu", offload_activations=True))
    with torch.no_grad():
        forward.forward(model, micro_of())
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]))
    parked.clear()
    x = torch.randn(50, requires_grad=True)
    (x * x).sum().backward()
    assert not parked, "nor outside the model, also after an error within"
