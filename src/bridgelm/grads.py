"""Arithmetic on gradients: a gradient is a dict from parameter name to tensor."""

from __future__ import annotations

import math

from torch import Tensor, _foreach_add_, _foreach_mul, _foreach_norm  # pyright: ignore[reportPrivateImportUsage]

Gradient = dict[str, Tensor]


def mix(*terms: tuple[float, Gradient]) -> Gradient:
    """Sum of coefficient times gradient, all over the same parameters."""
    names = list(terms[0][1])
    assert all(list(g) == names for _, g in terms), "gradients over different parameters"
    first, *rest = terms
    out = _foreach_mul([first[1][n] for n in names], first[0])
    for coef, gradient in rest:
        _foreach_add_(out, [gradient[n] for n in names], alpha=coef)
    return dict(zip(names, out, strict=True))


def dot(a: Gradient, b: Gradient) -> float:
    return math.fsum(float((a[n] * b[n]).sum()) for n in a)


def norm(a: Gradient) -> float:
    return math.sqrt(math.fsum(float(x) ** 2 for x in _foreach_norm(list(a.values())))) if a else 0.0
