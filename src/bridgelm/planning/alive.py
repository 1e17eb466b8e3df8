"""Counts live bytes: follows every storage that an operation makes until it is freed, and keeps the peak.

It works on the CPU and on torch's meta device, where a pass costs no memory and next to no time."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from bridgelm.engine import decoders
from bridgelm.model import storage

FUSED = torch.nn.functional.scaled_dot_product_attention


class Alive(TorchDispatchMode):
    """The live bytes now and their peak; bytes in host memory are counted apart. Memory that a kernel uses internally
    is not seen."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = self.host = self.host_peak = 0
        self._sizes: dict[int, tuple[int, bool]] = {}  # of each storage, and whether it lies in host memory
        self.follow(known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.follow(tensor for tensor in tree_iter(out) if isinstance(tensor, Tensor))
        return out

    def follow(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            memory = tensor.untyped_storage()
            key, size = memory._cdata, memory.nbytes()
            if key not in self._sizes and size:
                self._count(key, size, False)
                weakref.finalize(memory, self._freed, key)

    def _count(self, key: int, size: int, host: bool) -> None:
        self._sizes[key] = size, host
        if host:
            self.host += size
            self.host_peak = max(self.host_peak, self.host)
        else:
            self.now += size
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int) -> None:
        size, host = self._sizes.pop(key, (0, False))
        if host:
            self.host -= size
        else:
            self.now -= size

    def on_host(self, tensor: Tensor) -> bool:
        return self._sizes.get(tensor.untyped_storage()._cdata, (0, False))[1]

    @contextmanager
    def host_apart(self) -> Iterator[None]:
        """Host memory as on a machine with a GPU: what goes there (`storage.to_host`) and what comes back are
        copies."""
        to_host, to = storage.to_host, Tensor.to

        def parked(t: Tensor) -> Tensor:
            if self.on_host(t):
                return t
            peak, copy = self.peak, t.detach().clone()
            self.follow([copy])
            key = copy.untyped_storage()._cdata
            size, _ = self._sizes[key]
            self._freed(key)
            self._count(key, size, True)
            self.peak = max(peak, self.now)  # it was never on the device
            return copy

        def brought(t: Tensor, *args: Any, **named: Any) -> Tensor:
            found = to(t, *args, **named)
            return found.clone() if self.on_host(found) else found

        places: tuple[Any, Any] = (storage, Tensor)
        places[0].to_host, places[1].to = parked, brought
        try:
            yield
        finally:
            places[0].to_host, places[1].to = to_host, to


class OnPaper(Alive):
    """Follows the bytes of operations on the meta device. Indices and masks may be real ones on the CPU: what they
    select is as large as it will be."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(t, Tensor) and t.is_meta for t in tree_iter((args, kwargs))):
            if func is torch.ops.aten.index.Tensor:
                args = (args[0], [place for index in args[1] for place in _places(index)])
            args, kwargs = tree_map_only(Tensor, _without_storage, (args, kwargs))
        return super().__torch_dispatch__(func, types, args, kwargs)


def _places(index: Tensor | None) -> tuple[Tensor | None, ...]:
    return index.nonzero(as_tuple=True) if index is not None and index.dtype == torch.bool else (index,)


def _without_storage(t: Tensor) -> Tensor:
    return t if t.is_meta else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


class _Fused(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps: its inputs, its output, and a number for each query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention as fused kernels compute it; the meta device has no such kernel."""
    places: tuple[Any, ...] = (torch.nn.functional, decoders)
    for place in places:
        place.scaled_dot_product_attention = lambda q, k, v, *rest, **named: _Fused.apply(q, k, v)
    try:
        yield
    finally:
        for place in places:
            place.scaled_dot_product_attention = FUSED
