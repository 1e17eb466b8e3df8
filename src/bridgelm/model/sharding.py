"""The weights of the live model: whole on every rank, or in shards, of which one layer at a time is gathered for use.

Masters, copies, gradients and optimizer states are cut as the weights are: by rows, into as many shards as there are
ranks, of which the last may be smaller or empty. Each rank then does all arithmetic on its own shards alone.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from bridgelm import dist


class Sharding(ABC):
    """A model and this rank's shard of each of its weights."""

    sharded: bool  # if not, masters of the model's own dtype can share their memory with the live weights

    def __init__(self, model: Any) -> None:
        self.model = model
        self.params: dict[str, Any] = dict(model.named_parameters())

    def train_only(self, names: set[str]) -> None:
        """Makes backward passes compute the gradients of these weights alone."""
        for name, p in self.params.items():
            p.requires_grad_(name in names)

    @abstractmethod
    def local(self) -> dict[str, Tensor]:
        """This rank's shard of each live weight, in the live model's own memory."""

    @abstractmethod
    def cut(self, whole: Tensor) -> Tensor:
        """This rank's shard of a weight."""

    @abstractmethod
    def first_row(self, name: str) -> int:
        """The row of the whole weight that this rank's shard of it begins with."""

    @abstractmethod
    def kept(self) -> dict[str, Tensor]:
        """The shards of the live weights as they are now, for `put` to bring back later."""

    @abstractmethod
    def put(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Gives the live model other weights, by name and this rank's shard of each."""

    @abstractmethod
    def handing_over(self, take: Callable[[str, Tensor], None]) -> AbstractContextManager[None]:
        """A block with one backward pass. `take` is given the gradient of each weight, which is freed thereafter."""

    @abstractmethod
    def gathered(self) -> AbstractContextManager[Any]:
        """A block with a model of whole weights, which a rank can run or write without the others."""


class Whole(Sharding):
    """Every rank has all of every weight."""

    sharded = False

    def local(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.params.items()}

    def cut(self, whole: Tensor) -> Tensor:
        return whole

    def first_row(self, name: str) -> int:
        return 0

    def kept(self) -> dict[str, Tensor]:
        return {name: p.data for name, p in self.params.items()}

    def put(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, weight in weights:
            self.params[name].data = weight

    @contextmanager
    def handing_over(self, take: Callable[[str, Tensor], None]) -> Iterator[None]:
        """A gradient is taken as soon as it is complete: all of them together would be as large as the model."""
        def done(name: str, p: Tensor) -> None:
            assert p.grad is not None
            take(name, p.grad)
            p.grad = None

        hooks = [p.register_post_accumulate_grad_hook(partial(done, name))
                 for name, p in self.params.items() if p.requires_grad]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def gathered(self) -> Iterator[Any]:
        yield self.model


def layers(model: Any) -> list[Any]:
    """The modules of a model that are gathered one at a time."""
    return [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]


class Sharded(Sharding):
    """Every rank has some rows of every weight, by FSDP2. All ranks have to run forward and backward passes together,
    and to enter `gathered` together."""

    sharded = True

    def __init__(self, model: Any) -> None:
        hollow = {id(p): torch.nn.Parameter(p.new_empty(0), requires_grad=False) for p in model.parameters()}
        self.hollow = copy.deepcopy(model, hollow)  # `gathered` lends it whole weights
        device = next(model.parameters()).device
        half = next(model.parameters()).dtype.itemsize < 4
        shards = {"mesh": init_device_mesh(device.type, (dist.world(),)),
                  "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32 if half else None)}
        for module in (*layers(model), model):
            fully_shard(module, **shards)
            module.set_gradient_divide_factor(1.0)  # gradients are summed: the loss has the denominators
            module.set_force_sum_reduction_for_comms(True)
        model.body = lambda **inputs: model.base_model(**inputs)  # forward.py applies the head itself
        register_fsdp_forward_method(model, "body")
        super().__init__(model)

    def local(self) -> dict[str, Tensor]:
        return {name: p.detach().to_local() for name, p in self.params.items()}

    def cut(self, whole: Tensor) -> Tensor:
        return whole[slice(*dist.bounds(len(whole)))].clone()

    def first_row(self, name: str) -> int:
        return dist.bounds(len(self.params[name]))[0]

    def kept(self) -> dict[str, Tensor]:
        return {name: shard.clone() for name, shard in self.local().items()}

    @torch.no_grad()
    def put(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the outermost module stays gathered after a forward pass
        shards = self.local()
        for name, weight in weights:
            shards[name].copy_(weight)

    @contextmanager
    def handing_over(self, take: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Gradients are taken after the pass: while it goes on, torch is still adding up those of all ranks."""
        yield
        for name, p in self.params.items():
            if p.grad is not None:
                take(name, p.grad.to_local())
                p.grad = None

    @contextmanager
    def gathered(self) -> Iterator[Any]:
        places = dict(self.hollow.named_parameters())
        with dist.moving_parts():
            for name, p in self.params.items():
                places[name].data = p.detach().full_tensor()
        try:
            yield self.hollow
        finally:
            for p in places.values():
                p.data = p.new_empty(0)
