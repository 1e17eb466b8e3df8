"""Arithmetic on gradients: a gradient is a dict from parameter name to tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from torch import Tensor, _foreach_add_, _foreach_mul, _foreach_norm  # pyright: ignore[reportPrivateImportUsage]

from bridgelm import dist

Gradient = dict[str, Tensor]


def mix(*terms: tuple[float, Gradient]) -> Gradient:
    """The weighted sum of gradients over the same parameters, as new tensors."""
    names = list(terms[0][1])
    assert all(list(g) == names for _, g in terms), "gradients over different parameters"
    first, *rest = terms
    out = _foreach_mul([first[1][n] for n in names], first[0])
    for coef, gradient in rest:
        _foreach_add_(out, [gradient[n] for n in names], alpha=coef)
    return dict(zip(names, out, strict=True))


def whole(name: str) -> bool:
    """Whether every rank has all of a tensor even where weights are sharded: the A of a low-rank term with what an
    optimizer keeps of it, and a count of steps."""
    own, _, state = name.partition("|")
    return own.endswith(":A") or state == "step" or own.startswith("random/")


def rows(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many rows each tensor has, those of other ranks included."""
    own = {name: len(t) for name, t in tensors.items() if t.ndim}
    if not dist.parted():
        return own
    counts = dist.gather({f"{dist.rank()}": np.array(list(own.values()))}).values()
    return {name: count if whole(name) else int(sum(found)) for (name, count), *found in zip(own.items(), *counts)}


def total(parts: Mapping[str, float]) -> float:
    """The sum, over parameters and over ranks, of what each rank computed from its shards."""
    once = dist.first() or not dist.parted()
    return dist.total(math.fsum(x for n, x in parts.items() if once or not whole(n)))


def blend(first: tuple[float, Gradient], second: tuple[float, Gradient]) -> Gradient:
    """What `mix` computes of two gradients, tensor by tensor in the memory of the first. Both are emptied meanwhile, so
    that tensors that nobody else uses are freed at once. The first may lie in host memory."""
    (a, gradient), (b, other) = first, second
    assert list(gradient) == list(other), "gradients over different parameters"
    out = {}
    for name in list(gradient):
        part = other.pop(name)
        out[name] = gradient.pop(name).to(part.device).mul_(a).add_(part, alpha=b)
    return out


def dot(a: Gradient, b: Gradient) -> float:
    return total({n: float((a[n] * b[n]).sum()) for n in a})


def norm(a: Gradient) -> float:
    if not a:
        return 0.0
    return math.sqrt(total({n: float(x) ** 2 for n, x in zip(a, _foreach_norm(list(a.values())), strict=True)}))
