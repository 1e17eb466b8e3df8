"""Rank helpers. Everything a method counts over a batch goes through here, so that the numbers are global."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
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


def means(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means over the values of all ranks; a name without any value is left out."""
    sums = total({f"{kind} {name}": float(f(v)) for name, v in values.items() for kind, f in (("sum", np.sum),
                                                                                         ("count", np.size))})
    return {name: sums[f"sum {name}"] / sums[f"count {name}"] for name in values if sums[f"count {name}"]}


def gather(values: np.ndarray) -> np.ndarray:
    """The values of all ranks in one array, rank after rank; the ranks may have different numbers of them."""
    if world() == 1:
        return values
    counts = torch.zeros(world(), dtype=torch.int64)
    counts[td.get_rank()] = len(values)
    td.all_reduce(counts)
    out = torch.zeros(int(counts.sum()), dtype=torch.float64)
    start = int(counts[:td.get_rank()].sum())
    out[start:start + len(values)] = torch.from_numpy(np.asarray(values, dtype=np.float64))
    td.all_reduce(out)
    return out.numpy()
