"""What a model is made of: one live Hugging Face model and the named groups of weights merged into it.

    live weight = theta (or a frozen base) + sum of low-rank terms  s B A  of theta (LoRA training) and of w (BRIDGE)

Masters are float32 (float64 in float64 runs); the live weights are rebuilt from them, never merged and unmerged in
place. A point is a place to look at the model from: `live`, the name of a group that stands in for theta (a shadow, a
reference), or a name that w declares for theta with w, where the live weights go without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bridgelm.engine import Origin
from bridgelm.errors import UserError
from bridgelm.model.grads import Gradient
from bridgelm.model.groups import Group, low_rank, stacked
from bridgelm.model.placement import Placements
from bridgelm.model.sharding import Sharding, Whole
from bridgelm.model.storage import Noise


class Weights:
    """The groups of weights and the live model. `lora` is the rank, the alpha and the pattern of the matrices where
    theta is a low-rank term on a frozen base."""

    def __init__(self, model: Any, placements: Placements | None = None, seed: int = 0,
                 lora: tuple[int, float, str] | None = None, sharding: Callable[[Any], Sharding] = Whole) -> None:
        self.sharding = sharding(model)
        self.model, self.params, self.seed, self.lora = model, self.sharding.params, seed, lora
        shards = self.sharding.local()
        first = next(iter(shards.values()))
        self.dtype, self.device = first.dtype, first.device
        self.master = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.placements, self.noise = placements or Placements(), Noise(seed, self.sharding.first_row)
        self.frozen: dict[str, Tensor] = {}
        self.groups: dict[str, Group] = {}
        self.stale = True  # whether the live weights have to be merged again, because a group has changed
        self._rebuilt = 0  # how often they were merged after a change
        self._away = False  # whether the model has other weights than the live ones
        self._lent = False  # whether a block has given the model weights that have to be there again after inner blocks
        self._drifted = False  # whether frozen weights differ from those that the model was loaded with
        if lora:
            self.frozen = {n: p.clone() for n, p in shards.items()}
            self._add("theta", self._low_rank("theta", *lora))
        else:
            masters = {n: p.to(self.master, copy=self.sharding.sharded).requires_grad_() for n, p in shards.items()}
            self._add("theta", Group(masters))

    def linear_weights(self, pattern: str = "") -> list[str]:
        """The names of the weights of linear layers that match a pattern; the output head is not one of them."""
        head = self.model.get_output_embeddings()
        return [f"{name}.weight" for name, module in self.model.named_modules()
                if isinstance(module, torch.nn.Linear) and module is not head and re.search(pattern, name)]

    def _low_rank(self, group: str, rank: int, alpha: float, pattern: str) -> Group:
        names = self.linear_weights(pattern)
        if not names:
            raise UserError(f"no linear layer of the model matches {pattern!r}: see model.lora_modules and "
                            "method.modules")
        shards = self.sharding.local()
        shapes = {name: shards[name].shape for name in names}
        return low_rank(shapes, rank, alpha, self.master, self.device, self.seed, group)

    def add_w(self, rank: int, alpha: float, pattern: str = "", exclusive: bool = False,
              points: Iterable[str] = ()) -> None:
        """Adds w, at these points alone if any are named. With `exclusive`, theta leaves the matrices of w alone."""
        w = self._add("w", self._low_rank("w", rank, alpha, pattern))
        w.points = frozenset(points)
        if exclusive:
            self._drifted = True  # a stage before may have moved what is frozen now
            theta = self.groups["theta"]
            for name in w.low:
                if name in theta.low:  # what theta has learnt there stays, as part of the frozen base
                    self.frozen[name] = (self.frozen[name].to(self.master) + theta.delta(name)).to(self.dtype)
                    for group in (theta, self.groups.get("reference", theta)):
                        group.low.pop(name, None)
                elif name in theta.full:
                    self.frozen[name] = theta.full.pop(name).detach().to(self.device)
            if not theta.flat():
                raise UserError("method.exclusive: w takes every matrix that theta has; narrow method.modules")
        self.stale = True

    def fork(self, name: str, of: str = "theta") -> None:
        """Makes a copy of a group under another name: the shadow, or a frozen reference."""
        self._add(name, self.groups[of].clone())

    def _add(self, name: str, group: Group) -> Group:
        """Takes in a group that was just made, and puts its weights where they lie between uses."""
        group.placement = self.placements.of(name, self.lora is not None, self.device, self.master)
        for key, t in group.flat().items():
            t.data = group.placement.weights.put(t.data.to(self.device), key, self.noise)
        self.groups[name] = group
        return group

    def copy(self, source: str, target: str) -> None:
        """Gives one group the numbers of another."""
        with torch.no_grad():
            for name, t in self.groups[target].flat().items():
                t.copy_(self.groups[source].flat()[name])

    def lean(self, name: str, toward: str, share: float) -> None:
        """Moves a group a share of the way to another: a leak."""
        group = self.groups[name]
        with torch.no_grad():
            for key, t in group.flat().items():
                wide = t.data.to(self.device, self.master)
                wide.lerp_(self.groups[toward].flat()[key].detach().to(wide), share)
                if wide.data_ptr() != t.data_ptr():
                    t.data = group.placement.weights.put(wide, key, self.noise)
        self.changed(name)

    def changed(self, name: str) -> None:
        """Notes that a group was changed. The live weights are made of theta and w, and are merged again before their
        next use."""
        self.stale = self.stale or name in ("theta", "w")

    @torch.no_grad()
    def absorb(self, keep_reference: bool = False) -> None:
        """Makes w part of theta (of the frozen base in LoRA training); no group but theta stays, and the reference if
        it is to be kept."""
        theta, w = self.groups["theta"], self._w("live")
        for name in w.low:
            target = theta.full.get(name, self.frozen.get(name))
            assert target is not None
            target.copy_(target.to(self.device, self.master) + w.delta(name))
        if theta.full:  # matrices that only w trained come back to theta
            theta.full |= {name: t.to(self.master).requires_grad_() for name, t in self.frozen.items()}
            self.frozen = {}
        elif self.lora:  # and so do low-rank terms, which start at zero again
            fresh = self._low_rank("theta", *self.lora).low
            theta.low = {name: theta.low.get(name, pair) for name, pair in fresh.items()}
        kept = {"theta", "reference"} if keep_reference else {"theta"}
        self.groups = {name: group for name, group in self.groups.items() if name in kept}
        self._drifted, self.stale = bool(w.low) or self._drifted, True

    def parts(self, at: str) -> tuple[Group, Group]:
        """What the weights of a point are made of: theta or the group in its place, and w or an empty group."""
        return self._theta(at), self._w(at)

    @contextmanager
    def offset(self, direction: Gradient, size: float) -> Iterator[str]:
        """Makes a point that is `size` times `direction` away from theta, for the length of the block, and gives the
        block its name."""
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
        declared = "w" in self.groups and at in self.groups["w"].points
        return self.groups["theta" if at == "live" or declared else at]

    def _w(self, at: str) -> Group:
        """w where it is part of a point. A shadow shares it; the reference is a start without it."""
        w = self.groups.get("w", Group())
        return w if (at in w.points if w.points else at != "reference") else Group()

    def weights(self, at: str = "live") -> dict[str, Tensor]:
        """The merged weights of a point in the model's dtype. Where nothing had to be computed, a tensor shares its
        memory with the group's."""
        return dict(self._merged(at))

    @torch.no_grad()
    def _merged(self, at: str) -> Iterator[tuple[str, Tensor]]:
        """Merges one weight after the other, so that each can take the place of an older one: there is never a second
        copy of all of them in memory."""
        parts = self.parts(at)
        for name in self.params:
            whole = parts[0].full.get(name)
            weight = self.frozen[name] if whole is None else whole.to(self.device)
            for part in parts:
                if name in part.low:
                    weight = part.delta(name).add_(weight)
            yield name, weight.detach().to(self.dtype)

    @contextmanager
    def at(self, point: str = "live") -> Iterator[Any]:
        """Gives the model the weights of a point, for the length of the block. The live weights are not kept meanwhile
        but merged again afterwards, unless the block is within another one that has changed the model's weights."""
        if point == "live":
            if self.stale or self._away:
                self.sharding.put(self._merged("live"))
            self._rebuilt += self.stale
            self.stale = self._away = False
            yield self.model
        elif self._lent:
            with self.holding(self._merged(point)) as model:
                yield model
        else:
            stale, self.stale, self._away, self._lent = self.stale, False, False, True
            self.sharding.put(self._merged(point))
            try:
                yield self.model
            finally:
                self.stale, self._away, self._lent = self.stale or stale, True, False

    @contextmanager
    def gathered(self, point: str = "live") -> Iterator[Any]:
        """Does as `at`, but with a model of whole weights, which each rank can run or write by itself."""
        with self.at(point), self.sharding.gathered() as model:
            yield model

    @contextmanager
    def origin(self, point: str = "live") -> Iterator[Origin]:
        """The weights of a point for an engine to draw answers from, for the length of the block."""
        with self.gathered(point) as model:
            version = (id(self), self._rebuilt) if point == "live" else None
            low = stacked(self.parts(point)) if self.lora and not self._drifted else None
            yield Origin(model, version, low)

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor] | Iterator[tuple[str, Tensor]]) -> Iterator[Any]:
        """Gives the model these merged weights, for the length of the block, within which they are the point `live`."""
        with self.at("live"):  # stale weights are merged now, so that they are not merged over these
            kept = self.sharding.kept()
        lent, self._lent = self._lent, True
        self.sharding.put(weights.items() if isinstance(weights, Mapping) else weights)
        try:
            yield self.model
        finally:
            self.sharding.put(kept.items())
            self._lent = lent

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint has to hold of the weights."""
        out = {f"group/{g}/{n}": t.detach() for g, group in self.groups.items() for n, t in group.flat().items()}
        if self._drifted:
            out |= {f"frozen/{n}": t for n, t in self.frozen.items()}
        return out | ({"random/rounding": torch.tensor(self.noise.count)} if self.noise.count else {})

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Reads into the groups that there are what `tensors` gave."""
        for g, group in self.groups.items():
            for n, t in group.flat().items():
                t.copy_(saved[f"group/{g}/{n}"])
        for n in self.frozen:
            self._drifted = self._drifted or f"frozen/{n}" in saved
            if f"frozen/{n}" in saved:
                self.frozen[n].copy_(saved[f"frozen/{n}"])
        if "random/rounding" in saved:
            self.noise.count = int(saved["random/rounding"])
        self.stale = True
