"""Where the live model's weights lie: whole on every rank, or in shards, a layer of them gathered while it is used.

Masters, copies, gradients and optimiser states are cut as the weights are: by rows, into as many parts as there are
ranks, of which the last may be smaller or empty. All of their arithmetic is then a rank's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from bridgelm import dist


class Whole:
    """An ordinary model."""

    apart = False  # whether the live weights have to be copies, where masters of the same kind could be them

    def __init__(self, model: Any) -> None:
        self.model = model
        self.params: dict[str, Any] = dict(model.named_parameters())

    def local(self) -> dict[str, Tensor]:
        """This rank's part of each live weight, as it lies there."""
        return {name: p.detach() for name, p in self.params.items()}

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part of a weight."""
        return whole

    def first_row(self, name: str) -> int:
        """Where this rank's part of a weight begins."""
        return 0

    def kept(self) -> dict[str, Tensor]:
        """What `put` brings back."""
        return {name: p.data for name, p in self.params.items()}

    def put(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, weight in weights:
            self.params[name].data = weight

    def train_only(self, names: set[str]) -> None:
        for name, p in self.params.items():
            p.requires_grad_(name in names)

    @contextmanager
    def handing_over(self, take: Callable[[str, Tensor], None]) -> Iterator[None]:
        """A block with a backward pass, of which each weight's gradient is taken and freed as soon as it is whole: all
        of them together would be as large as the model."""
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
        """A model that can be run, or written, without the other ranks."""
        yield self.model


def layers(model: Any) -> list[Any]:
    """What is gathered for itself, one after the other."""
    return [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]


class Sharded(Whole):
    """A model in FSDP2's shards. Its forward and backward passes are collectives, and so is `gathered`."""

    apart = True

    def __init__(self, model: Any) -> None:
        hollow = {id(p): torch.nn.Parameter(p.new_empty(0), requires_grad=False) for p in model.parameters()}
        self.hollow = copy.deepcopy(model, hollow)  # is lent whole weights to draw answers, and to be written
        device = next(model.parameters()).device
        half = next(model.parameters()).dtype.itemsize < 4
        shards = {"mesh": init_device_mesh(device.type, (dist.world(),)),
                  "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32 if half else None)}
        for module in (*layers(model), model):
            fully_shard(module, **shards)
            module.set_gradient_divide_factor(1.0)  # sums, whose denominators are in the loss
            module.set_force_sum_reduction_for_comms(True)
        model.body = lambda **inputs: model.base_model(**inputs)  # the head is applied apart (forward.py)
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
                module.reshard()  # the outermost stays gathered after a forward pass
        shards = self.local()
        for name, weight in weights:
            shards[name].copy_(weight)

    @contextmanager
    def handing_over(self, take: Callable[[str, Tensor], None]) -> Iterator[None]:
        """After the pass: torch adds parts up while it goes on."""
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
