"""Keeps in host memory what a forward pass saves for the backward pass.

With gradient checkpointing that is the input of each layer; without it, everything that the layers save. Weights stay
where they are, and a tensor that several operations save is moved once. Logits stay on the device, since no layer saves
them; `forward.KEPT` limits them.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from bridgelm.model import storage

SMALL = 2**16  # smaller tensors, in bytes, are not worth moving


class Parked:
    """A saved tensor in host memory."""

    def __init__(self, t: Tensor) -> None:
        self.host, self.device = storage.to_host(t), t.device

    def back(self) -> Tensor:
        return self.host.to(self.device)


class Saved:
    """The hooks of one forward pass, which move what it saves to host memory and back."""

    def __init__(self) -> None:
        self.parked: dict[tuple[Any, ...], tuple[weakref.ref[Any], weakref.ref[Parked]]] = {}

    def pack(self, t: Tensor) -> Tensor | Parked:
        whole = t if t._base is None else t._base
        if isinstance(whole, torch.nn.Parameter) or t.nbytes < SMALL:
            return t
        memory = t.untyped_storage()
        key = (memory._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype, t._version)
        source, known = self.parked.get(key, (None, None))
        found = known() if known and source and source() is memory else None  # else the number is another's by now
        if found is None:
            found = Parked(t.detach())
            self.parked[key] = weakref.ref(memory), weakref.ref(found)
        return found

    @staticmethod
    def unpack(saved: Tensor | Parked) -> Tensor:
        return saved.back() if isinstance(saved, Parked) else saved


def offload(model: Any) -> None:
    """Makes every pass through the model's layers keep what it saves in host memory."""
    passes: list[saved_tensors_hooks] = []

    def before(*args: Any) -> None:
        hooks = Saved()
        passes.append(saved_tensors_hooks(hooks.pack, hooks.unpack))
        passes[-1].__enter__()

    def after(*args: Any) -> None:
        passes.pop().__exit__()

    model.base_model.register_forward_pre_hook(before)
    model.base_model.register_forward_hook(after, always_call=True)
