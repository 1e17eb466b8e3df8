"""The policy: gradients and optimizer steps of the groups of weights that one live model is made of (`weights.py`).

The live model holds merged weights and has no adapter modules. One ordinary backward pass gives G = dL/dW, and from it
dL/dtheta = G, dL/dB = s G A^T, dL/dA = s B^T G: both of BRIDGE's gradients cost two small products for each matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridgelm import dist
from bridgelm.config.run_config import OptimConfig
from bridgelm.engine import Origin
from bridgelm.ledger import Ledger
from bridgelm.model import batching, grads, optim
from bridgelm.model.forward import Soft, Target, forward, soft_targets
from bridgelm.model.grads import Gradient
from bridgelm.model.groups import Group, trainable
from bridgelm.model.packing import packs
from bridgelm.model.placement import Placements
from bridgelm.model.sharding import Sharding, Whole
from bridgelm.model.weights import Weights
from bridgelm.types import Batch, Live, Micro, Row

Terms = Callable[[Micro, Live], Mapping[str, Tensor]]


@dataclass
class Grads:
    """What one pass found: the gradients of theta and w, the value of each term, and the log-probs of each row, by the
    row's index."""

    theta: Gradient
    w: Gradient
    losses: dict[str, float]
    logps: dict[int, np.ndarray]
    entropies: dict[int, np.ndarray] = field(default_factory=dict)  # of the same rows, if they were asked for


@dataclass
class Named:
    """A declared optimizer, the group that it steps, and its learning rate before the schedule."""

    optimiser: torch.optim.Optimizer
    group: str
    lr: float
    moved: float = 0.0  # the norm of the last step
    shrink: float = 1.0  # what clipping multiplied the last gradient with


class Policy:
    """What a method updates. It has weights (`live`), optimizers that step them, and a ledger of the tokens used."""

    def __init__(self, model: Any, config: OptimConfig, ledger: Ledger, micro_tokens: int, seed: int = 0,
                 lora: tuple[int, float, str] | None = None, sharding: Callable[[Any], Sharding] = Whole) -> None:
        self.live = Weights(model, Placements.asked_for(config), seed, lora, sharding)
        self.config, self.ledger, self.micro_tokens = config, ledger, micro_tokens
        self.optimisers: dict[str, Named] = {}
        self.factor = 1.0  # of the learning-rate schedule

    # -- its weights, which do all this themselves (weights.py) ----------------------------------------------------

    @property
    def model(self) -> Any:
        return self.live.model

    @property
    def params(self) -> dict[str, Any]:
        return self.live.params

    @property
    def groups(self) -> dict[str, Group]:
        return self.live.groups

    @property
    def frozen(self) -> dict[str, Tensor]:
        return self.live.frozen

    @property
    def device(self) -> torch.device:
        return self.live.device

    def add_w(self, rank: int, alpha: float, pattern: str = "", exclusive: bool = False,
              points: Iterable[str] = ()) -> None:
        self.live.add_w(rank, alpha, pattern, exclusive, points)

    def fork(self, name: str, of: str = "theta") -> None:
        self.live.fork(name, of)

    def copy(self, source: str, target: str) -> None:
        self.live.copy(source, target)

    def lean(self, name: str, toward: str, share: float) -> None:
        self.live.lean(name, toward, share)

    def offset(self, direction: Gradient, size: float) -> AbstractContextManager[str]:
        return self.live.offset(direction, size)

    def weights(self, at: str = "live") -> dict[str, Tensor]:
        return self.live.weights(at)

    def at(self, point: str = "live") -> AbstractContextManager[Any]:
        return self.live.at(point)

    def gathered(self, point: str = "live") -> AbstractContextManager[Any]:
        return self.live.gathered(point)

    def origin(self, point: str = "live") -> AbstractContextManager[Origin]:
        return self.live.origin(point)

    def holding(self, weights: Mapping[str, Tensor] | Iterator[tuple[str, Tensor]]) -> AbstractContextManager[Any]:
        return self.live.holding(weights)

    def park(self, gradient: Gradient) -> None:
        """Puts a gradient that waits for another one where the configuration lets it wait."""
        self.live.placements.park(gradient)

    def absorb(self, keep_reference: bool = False, keep_optimiser: bool = False) -> None:
        """Ends a stage: w becomes part of theta, and the other groups and the optimizers go, but for what is kept."""
        self.live.absorb(keep_reference)
        self.optimisers = {n: o for n, o in self.optimisers.items() if keep_optimiser and n == "theta"}
        for named in self.optimisers.values():
            named.optimiser.param_groups[0]["params"] = list(self.groups["theta"].flat().values())

    # -- gradients and steps ---------------------------------------------------------------------------------------

    def optimiser(self, name: str, group: str | None = None, lr: float | None = None, kind: str | None = None,
                  moments_of: str | None = None) -> None:
        """Declares an optimizer, before the first step and before a checkpoint is read, which holds its state."""
        group, lr = group or name, self.config.lr if lr is None else lr
        if name in self.optimisers:  # kept from the stage before
            self.optimisers[name].lr = lr
            return
        source = self.optimisers[moments_of].optimiser if moments_of else None
        params = list(self.groups[group].flat().values())
        self.optimisers[name] = Named(optim.build(kind or self.config.kind, params, self.config, lr, source), group, lr)

    def grad(self, terms: Terms, batch: Batch, coef: Mapping[str, float], at: str = "live",
             entropy: bool = False, soft: tuple[str, Target] | None = None) -> Grads:
        """Gradient of sum_name coef[name] * sum(term * scale) / count at the weights of a point, which stand still
        meanwhile. `soft` names another point, and says which distributions to aim at, given that point's own ones;
        `live.cross_BT` is the cross-entropy to these."""
        group, w = self.live.parts(at)
        theirs = self.weights(soft[0]) if soft else {}
        self.live.sharding.train_only(trainable((group, w)))
        out = Grads(group.zeros(), w.zeros(), dict.fromkeys(coef, 0.0), {})
        idle = batching.idle(batch.rows, list(coef))
        broken: list[str] = []
        micros = batching.micros_of_rank(batch.rows, self.micro_tokens, idle, packs(self.model), dist.parted())

        def run(rows: list[Row], counted: bool) -> tuple[Live, dict[str, Tensor], bool]:
            """Adds the gradient of a micro-batch. Returns the pass, its terms, and whether loss and gradient are
            finite."""
            micro = batching.collate(rows, self.live.master, self.device, batch.stats)
            targets = self._soft_targets(micro, theirs, soft[1]) if soft else None  # first: it swaps the weights
            live = forward(self.model, micro, entropy, targets)
            parts = self._parts(terms(micro, live), batch, micro, coef) if counted else {}
            loss = torch.stack(list(parts.values())).sum() if parts else 0.0 * live.logp_BT.sum()
            sizes = [loss.detach().abs().float()]  # then the largest element of each weight's gradient
            with self.live.sharding.handing_over(partial(self._collect, ((group, out.theta), (w, out.w)), sizes)):
                loss.backward()
            return live, parts, bool(torch.stack(sizes).isfinite().all())

        with self.at(at), dist.moving_parts():
            for indices, rows in micros:
                live, parts, finite = run(rows, bool(indices))
                if not finite:
                    alone = [] if dist.parted() or len(rows) == 1 else [row for row in rows if not run([row], True)[2]]
                    broken += [f"{row.problem.id!r} ({row.kind})" for row in alone or rows]
                for n, value in parts.items():
                    out.losses[n] += float(value.detach())
                self._keep(out.logps, indices, rows, live.logp_BT)
                if live.entropy_BT is not None:
                    self._keep(out.entropies, indices, rows, live.entropy_BT)
        if broken:  # raised only here: in the loop, other ranks wait for this one's shards
            raise FloatingPointError(f"the loss or the gradient of {' and '.join(broken[:3])} is not finite "
                                     f"({out.losses}): stopped before the step")
        tokens = sum(len(row.ids) for i, row in enumerate(batch.rows) if i not in idle)
        self.ledger.train += tokens
        self.ledger.score += tokens if soft else 0
        self._complete(out)
        return out

    @staticmethod
    def _parts(values: Mapping[str, Tensor], batch: Batch, micro: Micro,
               coef: Mapping[str, float]) -> dict[str, Tensor]:
        """What each term adds to the loss of the batch."""
        assert coef.keys() & micro.weight.keys() <= values.keys(), "a weighted stream without a term"
        return {n: coef[n] * (values[n] * micro.scale[n]).sum() / batch.counts[n] for n in coef if n in values}

    @staticmethod
    def _complete(out: Grads) -> None:
        """Adds up what the ranks found in their micro-batches. Gradients of sharded weights are added up already; those
        of tensors that every rank has whole are not."""
        sums = torch.tensor(list(out.losses.values()), dtype=torch.float64)
        dist.add([sums, *(g for part in (out.theta, out.w) for name, g in part.items()
                          if not dist.parted() or grads.whole(name))])
        out.losses = dict(zip(out.losses, sums.tolist(), strict=True))
        found = batching.exchange({"logps": out.logps, "entropies": out.entropies})
        out.logps, out.entropies = found["logps"], found["entropies"]

    def _soft_targets(self, micro: Micro, weights: Mapping[str, Tensor], target: Target) -> Soft:
        with self.holding(weights) as model:
            return soft_targets(model, micro, target)

    @torch.no_grad()
    def _collect(self, into: tuple[tuple[Group, Gradient], ...], sizes: list[Tensor], name: str, g: Tensor) -> None:
        """Adds the gradient of a weight to those of the groups, and appends its largest element to `sizes`."""
        if g.numel():
            sizes.append(torch.linalg.vector_norm(g, math.inf).float())
        for group, gradient in into:
            group.collect(gradient, name, g.to(self.live.master))

    @staticmethod
    def _keep(into: dict[int, np.ndarray], indices: list[int], rows: list[Row], values_BT: Tensor) -> None:
        values = values_BT.detach().double().cpu().numpy()
        for b, (i, row) in enumerate(zip(indices, rows)):  # an empty micro-batch has a blank row and no index
            into[i] = values[b, :len(row.ids)]

    def score(self, rows: list[Row], at: str = "live") -> list[np.ndarray]:
        """The log-probs of the rows' own tokens, each row at its temperature, without gradients."""
        return self._scored(rows, at, False)[0]

    def score_and_entropy(self, rows: list[Row], at: str = "live") -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The same, and the entropy of the distribution that each token was drawn from, in one pass."""
        return self._scored(rows, at, True)

    @torch.no_grad()
    def _scored(self, rows: list[Row], at: str, entropy: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
        logps: dict[int, np.ndarray] = {}
        entropies: dict[int, np.ndarray] = {}
        micros = batching.micros_of_rank(rows, self.micro_tokens, set(), packs(self.model), dist.parted())
        with self.at(at), dist.moving_parts():
            for indices, chosen in micros:
                micro = batching.collate(chosen, self.live.master, self.device, {})
                live = forward(self.model, micro, entropy)
                self._keep(logps, indices, chosen, live.logp_BT)
                if live.entropy_BT is not None:
                    self._keep(entropies, indices, chosen, live.entropy_BT)
        self.ledger.score += sum(len(row.ids) for row in rows)
        found = batching.exchange({"logps": logps, "entropies": entropies})
        return [v for _, v in sorted(found["logps"].items())], [v for _, v in sorted(found["entropies"].items())]

    def apply(self, name: str, gradient: Gradient, rate: float = 1.0, clip_as: str | None = None,
              beside: Gradient | None = None) -> float:
        """Clips a gradient, in place, and steps one optimizer with it; returns the norm before clipping. `rate`
        multiplies the learning rate. `clip_as` names another optimizer whose last clip factor is used again. `beside`
        is the clipped gradient with which the optimizer has just stepped whose second moments this one shares."""
        named = self.optimisers[name]
        group = self.groups[named.group]
        params = group.flat()
        size = grads.norm(gradient)
        if not math.isfinite(size):
            raise FloatingPointError(f"the gradient of {name} is not finite (norm {size})")
        named.shrink = min(1.0, self.config.clip / (size + 1e-6)) if self.config.clip else 1.0
        if clip_as is not None:
            named.shrink = self.optimisers[clip_as].shrink
        for g in gradient.values():
            g.mul_(named.shrink)
        lr = named.lr * self.factor * rate
        for options in named.optimiser.param_groups:
            options["lr"] = lr
        if isinstance(named.optimiser, optim.SharedMoments):
            assert beside is not None, "shared moments need the gradient of the optimizer that they are shared with"
            named.optimiser.beside = {p: beside[key] for key, p in params.items()}
        moved = group.placement.step(named.optimiser, params, gradient, self.live.noise)
        if isinstance(named.optimiser, optim.SharedMoments):
            named.optimiser.beside = {}
        named.moved = lr * size * named.shrink if isinstance(named.optimiser, torch.optim.SGD) else moved
        self.live.changed(named.group)
        return size

    def precondition(self, name: str, gradient: Gradient) -> Gradient:
        """A gradient in the metric of an optimizer: divided by the root of its second moments, if it has any."""
        named = self.optimisers[name]
        group, out = named.optimiser.param_groups[0], {}
        for key, p in self.groups[named.group].flat().items():
            if key not in gradient:
                continue
            root = optim.root_moment(named.optimiser, p, group, self.device)
            out[key] = gradient[key] if root is None else gradient[key] / root
        return out

    def dot(self, g: Gradient, h: Gradient, metric: str | None = None) -> float:
        """The inner product of two gradients, in the metric of an optimizer if one is named."""
        if metric is None:
            return grads.dot(g, h)
        return grads.total({n: float((g[n] * self.precondition(metric, {n: x})[n]).sum()) for n, x in h.items()})

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint has to hold, by name."""
        out = self.live.tensors()
        for name, named in self.optimisers.items():
            names = list(self.groups[named.group].flat())
            out |= {f"optim/{name}/{k}": v for k, v in optim.tensors(named.optimiser, names).items()}
        return out

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Reads what `tensors` gave into the groups and optimizers that are declared."""
        self.live.load(saved)
        for name, named in self.optimisers.items():
            prefix, group = f"optim/{name}/", self.groups[named.group]
            state = {k.removeprefix(prefix): saved[k] for k in saved if k.startswith(prefix)}
            memory = group.placement.moments.memory(self.device)
            optim.load_tensors(named.optimiser, list(group.flat()), state, memory)
