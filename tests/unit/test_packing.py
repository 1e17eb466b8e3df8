"""Rows in one line without padding: the same log-probs and gradients as side by side, a shared prompt computed once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bridgelm.config.run_config import ModelConfig
from bridgelm.model import forward, packing
from bridgelm.model.batching import collate, plan
from bridgelm.model.loading import load_model
from bridgelm.types import Micro, Problem, Row
from tiny import exact_norms

PROBLEM = Problem("p", ({"role": "user", "content": "?"},))
Folder = Callable[..., Path]


def group(prompt: list[int], *lengths: int, temperature: float = 1.0, seed: int = 0) -> list[Row]:
    rng, rows = np.random.default_rng(seed), []
    for length in lengths:
        ids = np.array([*prompt, *rng.integers(2, 29, length)], dtype=np.int64)
        rows.append(Row(ids, np.arange(len(ids)) >= len(prompt), "rollout", PROBLEM, temperature=temperature))
    return rows


def several() -> list[Row]:
    rows = group([3, 7, 8], 4, 1, 6) + group([3, 7], 3, 9, temperature=0.5, seed=1) + group([5], 2, seed=2)
    alone = Row(np.array([4, 9, 11]), np.ones(3, dtype=bool), "rollout", PROBLEM)  # no prompt at all
    torn = np.array([0, 0, 1, 1, 0, 0, 1, 0], dtype=bool)  # a tool's answer in between, and one at the end
    return [*rows, alone, Row(np.arange(2, 10), torn, "rollout", PROBLEM)]


def micro_of(rows: list[Row]) -> Micro:
    return collate(rows, torch.float64, torch.device("cpu"), {})


def opened(folder: Path, **options: Any) -> Any:
    return exact_norms(load_model(ModelConfig(name_or_path=str(folder), dtype="float64", device="cpu", **options)))


def found(model: Any, micro: Micro) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    live = forward.forward(model, micro, entropy=True)
    weight = torch.arange(live.logp_BT.numel(), dtype=torch.float64).view_as(live.logp_BT).cos()
    assert live.entropy_BT is not None
    (weight * live.logp_BT + weight.sin() * live.entropy_BT).sum().backward()
    return live.logp_BT.detach(), live.entropy_BT.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("small", [1, 10**6])  # several frames, one frame
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_packed_equals_side_by_side(tiny_folder: Folder, kind: str, checkpointing: bool, small: int,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SMALL", small)
    model, micro = opened(tiny_folder(kind), gradient_checkpointing=checkpointing), micro_of(several())
    assert packing.packs(model)
    assert len(micro.layout.frames) == (1 if small > 1 else 3)
    packed = found(model, micro)
    monkeypatch.setattr(forward, "packs", lambda model: False)
    padded = found(model, micro)
    torch.testing.assert_close(packed[0], padded[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(packed[1], padded[1], rtol=0, atol=1e-12)
    for name, g in padded[2].items():
        torch.testing.assert_close(packed[2][name], g, rtol=1e-9, atol=1e-12)


def test_a_shared_prompt_is_computed_once(tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = opened(tiny_folder()), several()
    seen: list[tuple[int, ...]] = []
    body = model.base_model.forward
    monkeypatch.setattr(model.base_model, "forward", lambda *a, **k: seen.append(k["input_ids"].shape) or body(*a, **k))
    with torch.no_grad():
        forward.forward(model, micro_of(rows))
    assert seen == [(1, (3 + 11) + (2 + 12) + (1 + 2) + 3 + 8)]


def test_no_mask_of_all_tokens_by_all_tokens_is_made(tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, micro = opened(tiny_folder()), micro_of(several())
    tokens, sizes = len(micro.layout.ids_N), []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(q: Any, k: Any, v: Any, attn_mask: Any = None, **rest: Any) -> Any:
        sizes.append((q.shape[2], attn_mask))
        return attention(q, k, v, attn_mask=attn_mask, **rest)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with torch.no_grad():
        forward.forward(model, micro)
    assert sizes
    assert all(length < tokens and mask is None for length, mask in sizes)


def test_the_model_is_as_before_where_nothing_is_packed(tiny_folder: Folder, tmp_path: Path) -> None:
    model, ids = opened(tiny_folder()), torch.tensor([[3, 7, 8, 0], [3, 9, 11, 12]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        forward.forward(model, micro_of(several()))
        assert model.config._attn_implementation == packing.NAME
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, before, rtol=0, atol=0)
    model.save_pretrained(tmp_path / "saved")
    assert packing.NAME not in json.dumps(json.loads((tmp_path / "saved" / "config.json").read_text()))


def test_who_is_packed(tiny_folder: Folder) -> None:
    assert packing.packs(load_model(ModelConfig(name_or_path=str(tiny_folder("llama")))))
    assert not packing.packs(load_model(ModelConfig(name_or_path=str(tiny_folder("llama")), attention="eager")))
    sliding = load_model(ModelConfig(name_or_path=str(tiny_folder("mistral"))))
    sliding.config.sliding_window = 8
    assert not packing.packs(sliding)
    layered = load_model(ModelConfig(name_or_path=str(tiny_folder("qwen2"))))
    layered.config.layer_types = ["full_attention", "sliding_attention"]
    assert not packing.packs(layered)


def test_the_budget_counts_a_shared_prompt_once_and_keeps_its_rows_together() -> None:
    one, two = group([3] * 10, 2, 2, 2, 2), group([4] * 10, 9, 1, 1, 1)
    rows = [row for pair in zip(one, two, strict=True) for row in pair]
    assert plan(rows, 22, set(), True) == [[1, 3, 5, 7], [0, 2, 4, 6]], "10 + 12 and 10 + 8 tokens"
    assert plan(rows, 40, set(), True) == [[1, 3, 5, 7, 0, 2, 4, 6]]
    assert plan(rows, 39, set(), True) == [[1, 3, 5, 7, 0, 2, 4], [6]]
    assert plan(rows, 11, set(), True)[:2] == [[1], [3]], "more than the budget goes alone"
    assert [len(micro) for micro in plan(rows, 24, set(), False)] == [1, 2, 2, 2, 1], "padded"
