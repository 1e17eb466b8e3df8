"""The policy: gradients and steps of the groups of weights that one live model is made of (`weights.py`).

The live model holds merged weights and has no adapter modules. One ordinary backward pass gives G = dL/dW, and from it
dL/dtheta = G, dL/dB = s G A^T, dL/dA = s B^T G: both of BRIDGE's gradients for two small products a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridgelm import dist
from bridgelm.config.run_config import OptimConfig
from bridgelm.ledger import Ledger
from bridgelm.model import batching, grads, optim, storage
from bridgelm.model.forward import Soft, Target, forward, soft_targets
from bridgelm.model.grads import Gradient
from bridgelm.model.groups import Group, trainable
from bridgelm.model.held import Whole
from bridgelm.model.packing import packs
from bridgelm.model.weights import Weights
from bridgelm.types import Batch, Live, Micro, Row

Terms = Callable[[Micro, Live], Mapping[str, Tensor]]


@dataclass
class Grads:
    """What one pass found: gradients by group, the value of each term, and the rows' log-probs (by row index)."""

    theta: Gradient
    w: Gradient
    losses: dict[str, float]
    logps: dict[int, np.ndarray]
    entropies: dict[int, np.ndarray] = field(default_factory=dict)  # of the same rows, where they were asked for


@dataclass
class Named:
    """A declared optimiser, the group it steps, and its rate before the schedule."""

    optimiser: torch.optim.Optimizer
    group: str
    lr: float
    moved: float = 0.0  # norm of the last step
    shrink: float = 1.0  # clip factor of the last step


class Policy(Weights):
    def __init__(self, model: Any, config: OptimConfig, ledger: Ledger, micro_tokens: int, seed: int = 0,
                 lora: tuple[int, float, str] | None = None, hold: Callable[[Any], Whole] = Whole) -> None:
        super().__init__(model, seed, lora, hold)
        self.config, self.ledger, self.micro_tokens = config, ledger, micro_tokens
        self.optimisers: dict[str, Named] = {}
        self.factor = 1.0  # of the learning-rate schedule
        self.noise = storage.Noise(self.seed, self.held.first_row)
        self._settle("theta")

    @torch.no_grad()
    def absorb(self, keep_reference: bool = False, keep_optimiser: bool = False) -> None:
        """Ends a stage: w becomes part of theta (of the frozen base in LoRA training), a removable one, the forks and
        the optimisers go."""
        theta, w = self.groups["theta"], self._w("live")
        for name in w.low:
            target = theta.full.get(name, self.frozen.get(name))
            assert target is not None
            target.copy_(target.to(self.device, self.master) + w.delta(name))
        if theta.full:  # matrices that only w trained come back to theta
            theta.full |= {name: t.to(self.master).requires_grad_() for name, t in self.frozen.items()}
            self.frozen = {}
        elif self.lora:  # and so do adapters, at their start
            fresh = self._low_rank("theta", *self.lora).low
            theta.low = {name: theta.low.get(name, pair) for name, pair in fresh.items()}
        kept = {"theta", "reference"} if keep_reference else {"theta"}
        self.groups = {name: group for name, group in self.groups.items() if name in kept}
        self.optimisers = {n: o for n, o in self.optimisers.items() if keep_optimiser and n == "theta"}
        for named in self.optimisers.values():
            named.optimiser.param_groups[0]["params"] = list(theta.flat().values())
        self._drifted, self._stale, self.removable = bool(w.low) or self._drifted, True, False

    # -- gradients and steps ---------------------------------------------------------------------------------------

    def optimiser(self, name: str, group: str | None = None, lr: float | None = None, kind: str | None = None,
                  moments_of: str | None = None) -> None:
        """Declares an optimiser, up front, so that a checkpoint knows it."""
        group, lr = group or name, self.config.lr if lr is None else lr
        if name in self.optimisers:  # kept from the stage before
            self.optimisers[name].lr = lr
            return
        source = self.optimisers[moments_of].optimiser if moments_of else None
        params = list(self.groups[group].flat().values())
        self.optimisers[name] = Named(optim.build(kind or self.config.kind, params, self.config, lr, source), group, lr)

    def grad(self, terms: Terms, batch: Batch, coef: Mapping[str, float], at: str = "live",
             entropy: bool = False, soft: tuple[str, Target] | None = None) -> Grads:
        """Gradient of sum_name coef[name] * sum(term * scale) / count at the weights of a point, at one snapshot.
        `soft` is another point and what to make of its distributions; `live.cross_BT` is the cross-entropy to that."""
        group, w = self._theta(at), self._w(at)
        theirs = self.weights(soft[0]) if soft else {}
        wanted = trainable((group, w))
        self.held.train_only(wanted)
        out = Grads(group.zeros(), w.zeros(), dict.fromkeys(coef, 0.0), {})
        idle = batching.idle(batch.rows, list(coef))
        broken: list[str] = []
        micros = batching.mine(batch.rows, self.micro_tokens, idle, packs(self.model), dist.parted())

        def run(rows: list[Row], counted: bool) -> tuple[Live, dict[str, Tensor], bool]:
            """Adds the gradient of a micro-batch; what it found, and whether the loss and the gradient are finite."""
            micro = batching.collate(rows, self.master, self.device, batch.stats)
            targets = self._soft_targets(micro, theirs, soft[1]) if soft else None  # weights stand still after it
            live = forward(self.model, micro, entropy, targets)
            parts = self._parts(terms(micro, live), batch, micro, coef) if counted else {}
            loss = torch.stack(list(parts.values())).sum() if parts else 0.0 * live.logp_BT.sum()
            sizes = [loss.detach().abs().float()]  # and the largest element of each weight's gradient
            with self.held.handing_over(partial(self._collect, ((group, out.theta), (w, out.w)), sizes)):
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
        if broken:  # said only now: in between, other ranks wait for this one's parts
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
        """What each term adds to the loss."""
        assert coef.keys() & micro.weight.keys() <= values.keys(), "a weighted stream without a term"
        return {n: coef[n] * (values[n] * micro.scale[n]).sum() / batch.counts[n] for n in coef if n in values}

    @staticmethod
    def _complete(out: Grads) -> None:
        """From what this rank's micro-batches gave to what all of them did. Gradients in parts are added up already,
        but for those of what is whole on every rank."""
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
        """Adds a gradient of the model to those of the groups, and its largest element to `sizes`."""
        if g.numel():
            sizes.append(torch.linalg.vector_norm(g, math.inf).float())
        for group, gradient in into:
            group.collect(gradient, name, g.to(self.master))

    @staticmethod
    def _keep(into: dict[int, np.ndarray], indices: list[int], rows: list[Row], values_BT: Tensor) -> None:
        values = values_BT.detach().double().cpu().numpy()
        for b, (i, row) in enumerate(zip(indices, rows)):  # none for the row of a micro-batch without any
            into[i] = values[b, :len(row.ids)]

    def score(self, rows: list[Row], at: str = "live") -> list[np.ndarray]:
        """Log-probs of rows' own tokens at each row's temperature, without gradients."""
        return self._scored(rows, at, False)[0]

    def score_and_entropy(self, rows: list[Row], at: str = "live") -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The log-probs of own tokens, and the entropy of the distribution that each stands in, of one pass."""
        return self._scored(rows, at, True)

    @torch.no_grad()
    def _scored(self, rows: list[Row], at: str, entropy: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
        logps: dict[int, np.ndarray] = {}
        entropies: dict[int, np.ndarray] = {}
        micros = batching.mine(rows, self.micro_tokens, set(), packs(self.model), dist.parted())
        with self.at(at), dist.moving_parts():
            for indices, chosen in micros:
                micro = batching.collate(chosen, self.master, self.device, {})
                live = forward(self.model, micro, entropy)
                self._keep(logps, indices, chosen, live.logp_BT)
                if live.entropy_BT is not None:
                    self._keep(entropies, indices, chosen, live.entropy_BT)
        self.ledger.score += sum(len(row.ids) for row in rows)
        found = batching.exchange({"logps": logps, "entropies": entropies})
        return [v for _, v in sorted(found["logps"].items())], [v for _, v in sorted(found["entropies"].items())]

    # -- where what is large lies ------------------------------------------------------------------------------------

    def fork(self, name: str, of: str = "theta") -> None:
        super().fork(name, of)
        self._settle(name)

    def _settle(self, name: str) -> None:
        """Lays down a group that was just made, wherever what it was made of lies."""
        group = self.groups[name]
        group.gradients = {"dtype": self.master, "device": self.device}
        for key, t in group.full.items():
            t.data = self._lay(name, key, t.data.to(self.device))

    def _form(self, group: str) -> storage.Form:
        """How the whole matrices of a group lie."""
        if self.lora or group not in ("theta", "shadow"):  # what is low-rank is small
            return storage.PLAIN
        if group == "theta":
            return storage.Form(host="masters" in self.config.host)
        return storage.Form(torch.bfloat16 if self.config.shadow == "bfloat16" else None, "shadow" in self.config.host)

    def _form_of_moments(self, group: str) -> storage.Form:
        return self._form(group) if group == "shadow" else storage.Form(host="moments" in self.config.host)

    def _lay(self, group: str, name: str, t: Tensor) -> Tensor:
        return self._form(group).lay(t, name, self.noise)

    def park(self, gradient: Gradient) -> None:
        """A gradient that waits for another one: to host memory, if that is asked for."""
        if "gradients" in self.config.host:
            for name in gradient:
                gradient[name] = storage.to_host(gradient[name])

    def apply(self, name: str, gradient: Gradient, rate: float = 1.0, clip_as: str | None = None,
              beside: Gradient | None = None) -> float:
        """Clips and steps one optimiser; returns the norm before clipping. The gradient is scaled in place.
        `rate` multiplies the learning rate; `clip_as` takes over the clip factor of another optimiser's last step;
        `beside` is what `apply` has left of the gradient of the optimiser whose second moments this one shares."""
        named = self.optimisers[name]
        params = self.groups[named.group].flat()
        size = grads.norm(gradient)
        if not math.isfinite(size):
            raise FloatingPointError(f"the gradient of {name} is not finite (norm {size})")
        named.shrink = min(1.0, self.config.clip / (size + 1e-6)) if self.config.clip else 1.0
        if clip_as is not None:
            named.shrink = self.optimisers[clip_as].shrink
        for g in gradient.values():
            g.mul_(named.shrink)
        lr = named.lr * self.factor * rate
        for group in named.optimiser.param_groups:
            group["lr"] = lr
        if isinstance(named.optimiser, optim.SharedMoments):
            assert beside is not None, "shared moments need the gradient of whose they are"
            named.optimiser.beside = {p: beside[key] for key, p in params.items()}
        moved = self._step(named, params, gradient)
        if isinstance(named.optimiser, optim.SharedMoments):
            named.optimiser.beside = {}
        named.moved = lr * size * named.shrink if isinstance(named.optimiser, torch.optim.SGD) else moved
        self._stale = self._stale or named.group in ("theta", "w")
        return size

    def _step(self, named: Named, params: Gradient, gradient: Gradient) -> float:
        weights, moments = self._form(named.group), self._form_of_moments(named.group)
        if (weights, moments) != (storage.PLAIN, storage.PLAIN):
            return storage.step(named.optimiser, ((key, p, gradient[key]) for key, p in params.items()), weights,
                                moments, self.master, self.noise)
        for key, p in params.items():
            p.grad = gradient[key]
        named.optimiser.step()
        for p in params.values():
            p.grad = None
        return optim.last_step_norm(named.optimiser, params)

    def precondition(self, name: str, gradient: Gradient) -> Gradient:
        """The gradient in the metric of an optimiser: divided by the root of its second moments, if it has any."""
        named = self.optimisers[name]
        group, out = named.optimiser.param_groups[0], {}
        for key, p in self.groups[named.group].flat().items():
            if key not in gradient:
                continue
            root = optim.root_moment(named.optimiser, p, group, self.device)
            out[key] = gradient[key] if root is None else gradient[key] / root
        return out

    def dot(self, g: Gradient, h: Gradient, metric: str | None = None) -> float:
        if metric is None:
            return grads.dot(g, h)
        return grads.total({n: float((g[n] * self.precondition(metric, {n: x})[n]).sum()) for n, x in h.items()})

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        out = {f"group/{g}/{n}": t.detach() for g, group in self.groups.items() for n, t in group.flat().items()}
        if self._drifted:
            out |= {f"frozen/{n}": t for n, t in self.frozen.items()}
        for name, named in self.optimisers.items():
            names = list(self.groups[named.group].flat())
            out |= {f"optim/{name}/{k}": v for k, v in optim.tensors(named.optimiser, names).items()}
        return out | ({"random/rounding": torch.tensor(self.noise.count)} if self.noise.count else {})

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        for g, group in self.groups.items():
            for n, t in group.flat().items():
                t.copy_(saved[f"group/{g}/{n}"])
        for n in self.frozen:
            self._drifted = self._drifted or f"frozen/{n}" in saved
            if f"frozen/{n}" in saved:
                self.frozen[n].copy_(saved[f"frozen/{n}"])
        for name, named in self.optimisers.items():
            prefix = f"optim/{name}/"
            mine = {k.removeprefix(prefix): saved[k] for k in saved if k.startswith(prefix)}
            lie = torch.device("cpu") if self._form_of_moments(named.group).host else self.device
            optim.load_tensors(named.optimiser, list(self.groups[named.group].flat()), mine, lie)
        if "random/rounding" in saved:
            self.noise.count = int(saved["random/rounding"])
        self._stale = True
