"""Rank helpers. Everything a method counts over a batch goes through here, so that the numbers are global."""

from __future__ import annotations

import torch
import torch.distributed as td


def world() -> int:
    return td.get_world_size() if td.is_available() and td.is_initialized() else 1


def total(values: dict[str, float]) -> dict[str, float]:
    """Sums over ranks. Every rank passes the same keys."""
    if world() == 1:
        return dict(values)
    keys = sorted(values)
    packed = torch.tensor([values[k] for k in keys], dtype=torch.float64)
    td.all_reduce(packed)
    return dict(zip(keys, packed.tolist(), strict=True))
