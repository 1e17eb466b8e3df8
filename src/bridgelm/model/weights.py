"""What a model is made of: one live Hugging Face model and the named groups of weights merged into it.

    live weight = theta (or a frozen base) + sum of low-rank terms  s B A  of theta (LoRA training) and of w (BRIDGE)

Masters are float32 (float64 in float64 runs); the live weights are rebuilt from them, never merged and unmerged in
place. A point is a place to look at the model from: `live`, the name of a group that stands in for theta (a shadow, a
reference), or `guide`, which is theta with a removable w.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bridgelm.engine import Origin
from bridgelm.errors import UserError
from bridgelm.model.grads import Gradient
from bridgelm.model.groups import Group, low_rank, stacked
from bridgelm.model.held import Whole


class Weights:
    def __init__(self, model: Any, seed: int = 0, lora: tuple[int, float, str] | None = None,
                 hold: Callable[[Any], Whole] = Whole) -> None:
        self.held = hold(model)
        self.model, self.params, self.seed, self.lora = model, self.held.params, seed, lora
        lying = self.held.local()
        first = next(iter(lying.values()))
        self.dtype, self.device = first.dtype, first.device
        self.master = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.frozen: dict[str, Tensor] = {}
        self.groups: dict[str, Group] = {}
        self.removable = False  # whether w is a guide: the live model goes without it
        self._rebuilt = 0  # how often the live weights were, after a change
        self._away = self._lent = False  # whether the model has other weights than the live ones, and will give them up
        self._drifted = False  # whether frozen weights differ from those that the model was loaded with
        if lora:
            self.frozen = {n: p.clone() for n, p in lying.items()}
            self.groups["theta"] = self._low_rank("theta", *lora)
        else:
            masters = {n: p.to(self.master, copy=self.held.apart).requires_grad_() for n, p in lying.items()}
            self.groups["theta"] = Group(masters)
        self._stale = True

    def linear_weights(self, pattern: str = "") -> list[str]:
        """The weights of linear layers whose name matches; the output head is not one of them."""
        head = self.model.get_output_embeddings()
        return [f"{name}.weight" for name, module in self.model.named_modules()
                if isinstance(module, torch.nn.Linear) and module is not head and re.search(pattern, name)]

    def _low_rank(self, group: str, rank: int, alpha: float, pattern: str) -> Group:
        names = self.linear_weights(pattern)
        if not names:
            raise UserError(f"no linear layer of the model matches {pattern!r}: see model.lora_modules and "
                            "method.modules")
        lying = self.held.local()
        shapes = {name: lying[name].shape for name in names}
        return low_rank(shapes, rank, alpha, self.master, self.device, self.seed, group)

    def add_w(self, rank: int, alpha: float, pattern: str = "", exclusive: bool = False,
              removable: bool = False) -> None:
        """Adds w. With `exclusive`, theta leaves the matrices of w alone; a `removable` w is only in `guide`."""
        self.removable = removable
        w = self.groups["w"] = self._low_rank("w", rank, alpha, pattern)
        if exclusive:
            self._drifted = True  # a stage before may have moved what is frozen now
            theta = self.groups["theta"]
            for name in w.low:
                if name in theta.low:  # what theta has learnt there stays, in the base that its start is measured from
                    self.frozen[name] = (self.frozen[name].to(self.master) + theta.delta(name)).to(self.dtype)
                    for group in (theta, self.groups.get("reference", theta)):
                        group.low.pop(name, None)
                elif name in theta.full:
                    self.frozen[name] = theta.full.pop(name).detach().to(self.device)
            if not theta.flat():
                raise UserError("method.exclusive: w takes every matrix that theta has; narrow method.modules")
        self._stale = True

    def fork(self, name: str, of: str = "theta") -> None:
        """A copy of a group under another name: the shadow, or a frozen reference."""
        self.groups[name] = self.groups[of].clone()

    def _lay(self, group: str, name: str, t: Tensor) -> Tensor:
        """A tensor of a group as it lies between uses."""
        return t

    def copy(self, source: str, target: str) -> None:
        with torch.no_grad():
            for name, t in self.groups[target].flat().items():
                t.copy_(self.groups[source].flat()[name])

    def lean(self, name: str, toward: str, share: float) -> None:
        """Moves a group a share of the way to another: a leak."""
        with torch.no_grad():
            for key, t in self.groups[name].flat().items():
                wide = t.data.to(self.device, self.master)
                wide.lerp_(self.groups[toward].flat()[key].detach().to(wide), share)
                if wide.data_ptr() != t.data_ptr():
                    t.data = self._lay(name, key, wide)
        self._stale = self._stale or name == "theta"

    @contextmanager
    def offset(self, direction: Gradient, size: float) -> Iterator[str]:
        """The name of a point `size` times `direction` away from theta, for the length of the block."""
        self.fork("offset")
        with torch.no_grad():
            for key, t in self.groups["offset"].flat().items():
                t.add_(direction[key], alpha=size)
        try:
            yield "offset"
        finally:
            del self.groups["offset"]

    def _theta(self, at: str) -> Group:
        """The group in theta's place at a point."""
        return self.groups["theta" if at in ("live", "guide") else at]

    def _w(self, at: str) -> Group:
        """w where it is part of a point. A shadow shares it; the reference is a start without it; a guide can be
        removed, and only the point `guide` has it."""
        there = at == "guide" if self.removable else at != "reference"
        return self.groups.get("w", Group()) if there else Group()

    def weights(self, at: str = "live") -> dict[str, Tensor]:
        """Merged weights in the model's dtype; tensors of their own only where something had to be computed."""
        return dict(self._merged(at))

    @torch.no_grad()
    def _merged(self, at: str) -> Iterator[tuple[str, Tensor]]:
        """One after the other, so that each can take the place of an older one: a second copy never is in memory."""
        parts = [self._theta(at), self._w(at)]
        for name in self.params:
            whole = parts[0].full.get(name)
            weight = self.frozen[name] if whole is None else whole.to(self.device)
            for part in parts:
                if name in part.low:
                    weight = part.delta(name).add_(weight)
            yield name, weight.detach().to(self.dtype)

    @contextmanager
    def at(self, point: str = "live") -> Iterator[Any]:
        """The model with the weights of a point, for the length of the block. Those of `live` are not kept meanwhile
        but merged again, unless the block is within one that holds others."""
        if point == "live":
            if self._stale or self._away:
                self.held.put(self._merged("live"))
            self._rebuilt += self._stale
            self._stale = self._away = False
            yield self.model
        elif self._lent:
            with self.holding(self._merged(point)) as model:
                yield model
        else:
            stale, self._stale, self._away, self._lent = self._stale, False, False, True
            self.held.put(self._merged(point))
            try:
                yield self.model
            finally:
                self._stale, self._away, self._lent = self._stale or stale, True, False

    @contextmanager
    def gathered(self, point: str = "live") -> Iterator[Any]:
        """The same, as a model that each rank can run, or write, by itself."""
        with self.at(point), self.held.gathered() as model:
            yield model

    @contextmanager
    def origin(self, point: str = "live") -> Iterator[Origin]:
        """The weights of a point to draw from, for the length of the block."""
        with self.gathered(point) as model:
            version = (id(self), self._rebuilt) if point == "live" else None
            low = stacked((self._theta(point), self._w(point))) if self.lora and not self._drifted else None
            yield Origin(model, version, low)

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor] | Iterator[tuple[str, Tensor]]) -> Iterator[Any]:
        """The model with these merged weights, for the length of the block; the point `live` within it is them."""
        with self.at("live"):  # whatever is stale is rebuilt now, and not over them
            kept = self.held.kept()
        lent, self._lent = self._lent, True
        self.held.put(weights.items() if isinstance(weights, Mapping) else weights)
        try:
            yield self.model
        finally:
            self.held.put(kept.items())
            self._lent = lent
