"""Where the weights of a group, and the moments that its optimizer keeps of them, lie between uses: on the device or in
host memory, in the dtype of their arithmetic or in bfloat16. Every group owns a `Placement` from the moment it is made;
the optimizer's step and the memory plan ask it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bridgelm.config.run_config import OptimConfig
from bridgelm.model import grads, optim, storage
from bridgelm.model.grads import Gradient
from bridgelm.model.storage import Noise


@dataclass(frozen=True)
class Form:
    """How tensors of one kind lie between uses."""

    dtype: torch.dtype | None = None  # None: the dtype of their arithmetic
    host: bool = False

    def put(self, t: Tensor, name: str, noise: Noise) -> Tensor:
        """A tensor that was just computed, as it lies until its next use."""
        if self.dtype == torch.bfloat16 and t.is_floating_point() and not t.is_meta:
            t = storage.rounded(t, name, noise)
        elif self.dtype is not None and t.is_floating_point():
            t = t.to(self.dtype)
        return storage.to_host(t) if self.host else t

    def memory(self, device: torch.device) -> torch.device:
        """The device whose memory these tensors lie in, where `device` is that of the model."""
        return torch.device("cpu") if self.host else device


PLAIN = Form()


@dataclass(frozen=True)
class Placement:
    """Where the tensors of one group lie between uses. Gradients are made on the model's device."""

    weights: Form = PLAIN
    moments: Form = PLAIN
    device: torch.device | None = None  # of gradients; None: that of the weights
    dtype: torch.dtype | None = None  # of gradients and of all arithmetic; None: that of the weights

    def zeros(self, t: Tensor) -> Tensor:
        """An empty gradient of a weight."""
        return torch.zeros_like(t, dtype=self.dtype, device=self.device, requires_grad=False)

    def step(self, optimiser: torch.optim.Optimizer, params: Gradient, gradient: Gradient, noise: Noise) -> float:
        """One step of an optimizer over all weights of the group; returns the norm of the step, as far as the
        optimizer's state tells it."""
        if self.weights != PLAIN or self.moments != PLAIN:
            return self._step_in_turn(optimiser, params, gradient, noise)
        for name, p in params.items():
            p.grad = gradient[name]
        optimiser.step()
        for p in params.values():
            p.grad = None
        return optim.last_step_norm(optimiser, params)

    @torch.no_grad()
    def _step_in_turn(self, optimiser: torch.optim.Optimizer, params: Gradient, gradient: Gradient,
                      noise: Noise) -> float:
        """Each weight and its moments are brought to the gradient's device and dtype, stepped, and put back, before the
        next one is: only one of them is there in full at a time."""
        squares = {}
        for name, p in params.items():
            g = gradient[name]
            p.data = p.data.to(g.device, g.dtype)
            state = optimiser.state[p]
            for key, value in state.items():
                if _large(value):
                    state[key] = value.to(g.device, g.dtype if value.dtype == torch.bfloat16 else value.dtype)
            p.grad = g
            optimiser.step()
            p.grad = None
            squares[name] = optim.square_of_step(optimiser, p)
            p.data = self.weights.put(p.data, name, noise)
            # In an order of their own, since each draws random numbers and a loaded state lists them in another one.
            for key in sorted(state, reverse=True):
                if _large(state[key]):
                    state[key] = self.moments.put(state[key], name, noise)
        return math.sqrt(grads.total(squares))


AT_HAND = Placement()


def _large(value: object) -> bool:
    """Whether an entry of an optimizer's state is more than a single number."""
    return isinstance(value, Tensor) and value.dim() > 0


@dataclass(frozen=True)
class Placements:
    """What the configuration of a run says about where its large tensors lie: the placement of each group by its name,
    and where a gradient lies that waits for another one."""

    host: frozenset[str] = frozenset()  # what lies in host memory: `optim.host`
    shadow: torch.dtype | None = None  # of the shadow's weights and moments; None: that of their arithmetic

    @classmethod
    def asked_for(cls, config: OptimConfig) -> Placements:
        return cls(frozenset(config.host), torch.bfloat16 if config.shadow == "bfloat16" else None)

    def of(self, name: str, low_rank: bool, device: torch.device, dtype: torch.dtype) -> Placement:
        """The placement of a group. In a run of low-rank training (`low_rank`) no group is large enough to be put away.
        The shadow's moments lie where the shadow does."""
        shadow = PLAIN if low_rank else Form(self.shadow, "shadow" in self.host)
        weights = {"theta": PLAIN if low_rank else Form(host="masters" in self.host), "shadow": shadow}
        moments = shadow if name == "shadow" else Form(host="moments" in self.host)
        return Placement(weights.get(name, PLAIN), moments, device, dtype)

    @property
    def waiting(self) -> Form:
        """How a gradient lies that waits for another one."""
        return Form(host="gradients" in self.host)

    def park(self, gradient: Gradient) -> None:
        """Puts a gradient that waits for another one where it is to wait, tensor by tensor."""
        if self.waiting.host:
            for name in gradient:
                gradient[name] = storage.to_host(gradient[name])
