"""A GPU that is not there: tensors lie on it unless they were sent to host memory, and no operation takes both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)


class PretendGpu(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.host: dict[int, Any] = {}  # storages, held so that no number is used again

    def on_host(self, t: Tensor) -> bool:
        return t.untyped_storage()._cdata in self.host

    def send(self, t: Tensor) -> None:
        self.host[t.untyped_storage()._cdata] = t.untyped_storage()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device("cpu") if self.on_host(tensors[0]) else GPU
        if func == Tensor.cpu:
            return self.moved(*args, "cpu")
        if func == Tensor.to:
            return self.moved(*args, **kwargs)
        device = kwargs.get("device")
        if device is not None:
            kwargs |= {"device": "cpu"} | ({"pin_memory": False} if "pin_memory" in kwargs else {})
        known = {t.untyped_storage()._cdata for t in tensors}
        away = self.mixed(func, name, tensors)
        out = func(*args, **kwargs)
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in known and (
                    torch.device(device).type == "cpu" if device is not None else away):
                self.send(t)
        return out

    def mixed(self, func: Any, name: str, tensors: Iterable[Tensor]) -> bool:
        """Whether what is made of them lies on the host."""
        places = {self.on_host(t) for t in tensors if t.dim()}
        assert len(places) < 2 or name in ("copy_", "__set__"), f"{func} takes tensors of both memories"
        return places == {True}

    def moved(self, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        place = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.device | str | Tensor)), None)
        args, kwargs = tree_map(lambda x: "cpu" if isinstance(x, torch.device) else x, (args, kwargs))
        host = self.on_host(t)
        wanted = (host if place is None else self.on_host(place) if isinstance(place, Tensor)
                  else torch.device(place).type == "cpu")
        out = t.to(*args, **kwargs)
        if wanted != host and out.data_ptr() == t.data_ptr():
            out = t.clone()
        if wanted:
            self.send(out)
        return out
