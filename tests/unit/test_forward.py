"""The forward pass against a plain one of Hugging Face: each row alone, unpadded, and a softmax over everything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bridgelm.model import forward as module
from bridgelm.model.batching import collate
from bridgelm.model.forward import forward, soft_targets
from bridgelm.model.packing import packs
from bridgelm.types import Micro, Problem, Row
from tiny import exact_norms

PROBLEM = Problem("p", ({"role": "user", "content": "?"},))
# Packed with a plain head; padded with a plain head; padded with logits that are capped.
KINDS = ["qwen2", "mistral", "gemma2"]
Open = Callable[..., Any]


@pytest.fixture
def opened(tiny_folder: Callable[[str], Path]) -> Open:
    def make(kind: str, moved: float = 0.0) -> Any:
        from transformers import AutoModelForCausalLM

        model = exact_norms(AutoModelForCausalLM.from_pretrained(tiny_folder(kind), dtype=torch.float64).eval())
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(moved * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        return model
    return make


def rows_of(*temperatures: float) -> list[Row]:
    """Two rows share a prompt of three tokens. One row has no prompt; in the others somebody else's token stands in
    between."""
    rng = np.random.default_rng(5)
    rows = []
    for b, temperature in enumerate(temperatures):
        ids = rng.integers(2, 29, 6 + 2 * b)
        ids[:3] = (5, 7, 9) if b in (1, 2) else ids[:3]
        own = np.arange(len(ids)) >= (3 if b in (1, 2) else 1)
        own[0], own[-2] = b == 0, b == 0
        rows.append(Row(ids, own, "rollout", PROBLEM, temperature=temperature))
    return rows


def micro_of(rows: list[Row]) -> Micro:
    return collate(rows, torch.float64, torch.device("cpu"), {})


def plain(model: Any, row: Row) -> Tensor:
    """The log-probs of the whole vocabulary (T, V) at each position of a row; no prediction of the first token."""
    logits = model(input_ids=torch.from_numpy(row.ids)[None], use_cache=False).logits[0, :-1] / row.temperature
    return torch.cat([torch.zeros_like(logits[:1]), logits - logits.exp().sum(-1, keepdim=True).log()])


def spread(values: Tensor, row: Row) -> Tensor:
    """Zero where a token is not an own one."""
    return values * torch.from_numpy(row.own) * (torch.arange(len(row.ids)) > 0)


def compare(found: Tensor, wanted: list[Tensor]) -> None:
    for b, values in enumerate(wanted):
        assert float((found[b, :len(values)].detach() - values).abs().max()) < 1e-12
        assert not found[b, len(values):].any(), "padding"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperatures", [(1.0, 1.0, 1.0, 1.0), (1.0, 0.7, 0.7, 1.6)])
@pytest.mark.parametrize("chunk", [None, 60])  # 60 logits: two tokens at a time
def test_log_probs_and_entropy(kind: str, temperatures: tuple[float, ...], chunk: int | None, opened: Open,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    rows, model = rows_of(*temperatures), opened(kind)
    assert packs(model) == (kind == "qwen2")
    wanted = [plain(model, row).detach() for row in rows]
    if chunk:
        monkeypatch.setattr(module, "CHUNK", chunk)
        monkeypatch.setattr(module, "KEPT", 3 * chunk)
    found = forward(model, micro_of(rows), entropy=True)
    compare(found.logp_BT, [spread(logp.gather(1, torch.from_numpy(row.ids)[:, None])[:, 0], row)
                            for logp, row in zip(wanted, rows)])
    assert found.entropy_BT is not None
    compare(found.entropy_BT, [spread(-(logp.exp() * logp).sum(-1), row) for logp, row in zip(wanted, rows)])
    assert found.cross_BT is None
    assert forward(model, micro_of(rows)).entropy_BT is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [None, 60])
def test_gradients(kind: str, chunk: int | None, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a weighted sum of log-probs and entropies, in every weight."""
    rows, weights = rows_of(1.0, 0.7, 0.7, 1.6), torch.linspace(-1, 2, 12)
    ours, theirs = opened(kind), opened(kind)
    loss: Any = 0.0
    for row in rows:
        logp = plain(theirs, row)
        own = logp.gather(1, torch.from_numpy(row.ids)[:, None])[:, 0] - 0.3 * (logp.exp() * logp).sum(-1)
        loss = loss + (weights[:len(row.ids)] * spread(own, row)).sum()
    loss.backward()
    if chunk:
        monkeypatch.setattr(module, "CHUNK", chunk)
        monkeypatch.setattr(module, "KEPT", 3 * chunk)
    found = forward(ours, micro_of(rows), entropy=True)
    assert found.entropy_BT is not None
    (weights[:found.logp_BT.shape[1]] * (found.logp_BT + 0.3 * found.entropy_BT)).sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert q.grad.abs().max() > 0, name
        assert float((p.grad - q.grad).abs().max()) < 1e-12 * max(1.0, float(q.grad.abs().max())), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [None, 60])
def test_cross_entropy_to_another_point(kind: str, chunk: int | None, opened: Open,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """The targets are half of the other point's distribution and half of the token itself, at the row's temperature.
    They have no gradient."""
    def half(logp_NV: Tensor, token_N: Tensor) -> Tensor:
        return 0.5 * logp_NV.exp() + 0.5 * torch.nn.functional.one_hot(token_N, logp_NV.shape[1])

    rows, ours, other = rows_of(1.0, 0.7, 0.7, 1.6), opened(kind), opened(kind, moved=0.1)
    wanted = []
    for row in rows:
        tokens = torch.from_numpy(row.ids)
        aim = 0.5 * plain(other, row).detach().exp() + 0.5 * torch.eye(29, dtype=torch.float64)[tokens]
        wanted.append(spread(-(aim * plain(ours, row).detach()).sum(-1), row))
    if chunk:
        monkeypatch.setattr(module, "CHUNK", chunk)
    targets = soft_targets(other, micro_of(rows), half)
    with torch.no_grad():  # the model may be given other weights before the targets are used
        for p in other.parameters():
            p.data = torch.zeros_like(p)
    found = forward(ours, micro_of(rows), soft=targets)
    assert found.cross_BT is not None
    compare(found.cross_BT, wanted)
    found.cross_BT.sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
    assert all(p.grad is None for p in other.parameters())
