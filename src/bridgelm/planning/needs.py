"""What a run will need, before it has a machine: bytes by what they are for, from the run's own code on a model without
storage (torch's meta device), so that every method's groups, copies and optimisers are the real ones.

    train     weights + masters + other groups + optimiser states + gradients + a merged copy of another point
              + what a micro-batch's pass makes
    generate  weights + masters + other groups + optimiser states + the cache of keys and values + what a pass makes

Both passes are run (`planning_passes.py`), on the longest rows that the limits allow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from bridgelm.config.run_config import ModelConfig, RunConfig, SequenceOptions
from bridgelm.data.model_shapes import model_config
from bridgelm.ledger import Ledger
from bridgelm.methods import METHODS
from bridgelm.methods.base import Gradients
from bridgelm.model.groups import trainable
from bridgelm.model.held import Whole, layers
from bridgelm.model.loading import prepared
from bridgelm.model.optim import BLOCK, in_blocks, pieces
from bridgelm.model.packing import packs
from bridgelm.model.policy import Policy
from bridgelm.planning import passes
from bridgelm.planning.passes import Models, Work, at_most
from bridgelm.rollout.teacher_ids import teacher_model

EIGHT = 1 + 4 / BLOCK  # bytes a value of eight bits with its block's scale
TEMPORARY = 3  # tensors of the largest one's size that an optimiser's step, or what measures it, makes of each
STATES = {"AdamW": 2, "SharedMoments": 1, "SGD": 0}  # tensors of a parameter's size; `pieces` counts the bound


@dataclass(frozen=True)
class Need:
    """Bytes by what they are for; `train` and `generate` are the peaks of the two phases."""

    parameters: int
    parts: dict[str, int]

    @property
    def standing(self) -> int:
        return sum(self.parts[name] for name in self.parts if name.startswith("standing/"))

    @property
    def train(self) -> int:
        return self.standing + sum(size for name, size in self.parts.items() if name.startswith("train/"))

    @property
    def generate(self) -> int:
        return self.standing + sum(size for name, size in self.parts.items() if name.startswith("generate/"))

    @property
    def peak(self) -> int:
        return max(self.train, self.generate)


class OnPaper(Whole):
    """The first of several ranks that hold weights in parts; no part of another is smaller by more than a row."""

    apart = True

    def __init__(self, model: Any, ranks: int) -> None:
        super().__init__(model)
        self.parts = {name: p.detach().new_empty(-(-len(p) // ranks), *p.shape[1:]) for name, p in self.params.items()}

    def local(self) -> dict[str, Tensor]:
        return self.parts

    def put(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Weights are copied in one by one."""


def memory(config: RunConfig, gpus: int = 1, work: Work | None = None) -> Need:
    """The largest need of a run's stages, on one of its cards; `work` is other than the limits allow."""
    if isinstance(config.method, SequenceOptions):
        stages = [config.model_copy(update={"method": stage.method}) for stage in config.method.stages]
        return max((memory(stage, gpus, work) for stage in stages), key=lambda need: need.peak)
    model = empty_model(config.model)
    ledger = Ledger(sum(p.numel() for p in model.parameters()))
    lora = (config.model.lora_rank, config.model.lora_alpha, config.model.lora_modules)
    optim, eight = config.optim, config.optim.kind == "adamw8bit"
    optim = optim.model_copy(update={"kind": "adamw"}) if eight else optim  # the library need not be here
    policy = Policy(model, optim, ledger, config.batch.micro_tokens, config.seed,
                    lora if config.model.lora_rank else None,
                    partial(OnPaper, ranks=gpus) if config.shard and gpus > 1 else Whole)
    method = METHODS[config.method.name](config.method, config)
    method.setup(policy)
    work = work or at_most(config, packs(model))
    with policy.at("live"):
        models = _models(config.model.model_dump_json(), frozenset(_trained(policy)))
        parts = _standing(policy, eight)
        parts |= _training(policy, config, method.gradients, models, work)
        parts |= _generating(policy, config, models, work)
    if config.teacher is not None:
        teacher = empty_model(teacher_model(config))
        parts["standing/teacher"] = sum(p.numel() * p.element_size() for p in teacher.parameters())
    return Need(ledger.parameters, parts)


def empty_model(config: ModelConfig, layers: int | None = None) -> Any:
    """Or the first layers of one."""
    from transformers import AutoModelForCausalLM

    shape = model_config(config)
    if layers and layers < shape.num_hidden_layers:
        shape.num_hidden_layers = layers
        if getattr(shape, "layer_types", None):
            shape.layer_types = shape.layer_types[:layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, config.dtype))
    return prepared(model, config)


@lru_cache(maxsize=8)  # advice plans the same model many times
def _models(raw: str, trained: frozenset[str]) -> Models:
    config = ModelConfig.model_validate_json(raw)
    return Models(partial(empty_model, config), model_config(config).num_hidden_layers, trained)


class Seen:
    """Storages counted so far: a tensor that shares one costs nothing more."""

    def __init__(self) -> None:
        self.known: dict[int, torch.UntypedStorage] = {}  # held, so that no number is used again

    def copy(self) -> Seen:
        other = Seen()
        other.known = dict(self.known)
        return other

    def fresh(self, tensors: Iterable[Tensor]) -> int:
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known[storage._cdata] = storage
                total += storage.nbytes()
        return total


def _standing(policy: Policy, eight: bool) -> dict[str, int]:
    """On the device, and in host memory."""
    host, seen = policy.config.host, Seen()
    parts = {"standing/weights": seen.fresh([*policy.held.local().values(), *policy.frozen.values()])}
    for name, group in policy.groups.items():
        where = "host" if _away(policy, name) else "standing"
        parts[f"{where}/{'masters' if name == 'theta' else name}"] = seen.fresh(group.flat().values())
    states = {"standing": 0, "host": 0}
    for named in policy.optimisers.values():
        group = policy.groups[named.group]
        away = _away(policy, "shadow") if named.group == "shadow" else "moments" in host
        kind = type(named.optimiser).__name__
        states["host" if away else "standing"] += sum(
            int(STATES[kind] * t.numel() * (EIGHT if eight and kind == "AdamW" and in_blocks(t) else t.element_size()))
            + (pieces(t.shape) * t.element_size() if kind == "SharedMoments" else 0) for t in group.flat().values())
    return parts | {f"{where}/optimiser": size for where, size in states.items()}


def _away(policy: Policy, group: str) -> bool:
    """Whether a group lies in host memory."""
    key = {"shadow": "shadow", "theta": "masters"}.get(group)
    return key in policy.config.host and bool(policy.groups[group].full)


def _trained(policy: Policy) -> set[str]:
    return trainable(group for group in (policy.groups["theta"], policy.groups.get("w")) if group is not None)


def _training(policy: Policy, config: RunConfig, gradients: Gradients, models: Models, work: Work) -> dict[str, int]:
    """Of the moment that needs most: a pass over rows of a kind, one at another point, or between two passes."""
    theta, w = policy.groups["theta"], policy.groups.get("w")
    groups = [group for group in (theta, w) if group is not None]
    of_theta = sum(t.numel() * policy.master.itemsize for t in theta.flat().values())
    of_w = sum(t.numel() * policy.master.itemsize for t in w.flat().values()) if w else 0
    parked = gradients.parked * ("gradients" in config.optim.host)

    def kept(held: int) -> dict[str, int]:
        waiting = min(parked, held - 1) * of_theta
        return {"train/gradients kept": held * (of_theta + of_w) - waiting, "host/gradients": waiting}

    largest = max(t.numel() * policy.master.itemsize for group in groups for t in group.flat().values())
    moments = [{**kept(gradients.between), "train/an optimiser's tensors": TEMPORARY * largest},
               {**kept(gradients.between), "train/a weight being merged": _merging(policy)}]
    for kind in {rows[0].kind for rows in work.micros}:
        found = passes.training(models, [rows for rows in work.micros if rows[0].kind == kind], policy.master)
        made = {"train/activations": found.kept, "train/logits and the way back": found.peak - found.kept,
                "host/activations": found.host, **(_passing(policy) if policy.held.apart else {})}
        moments += [{**kept(getattr(gradients, kind)), **made}]
        if kind == "rollout" and (copy := _elsewhere(policy)):
            moments += [{**kept(gradients.elsewhere), "train/another point, merged": copy, **made}]
    return max(moments, key=lambda parts: sum(size for name, size in parts.items() if name.startswith("train/")))


def _merging(policy: Policy) -> int:
    """A weight that low-rank terms are added to: the sum, and its copy in the model's dtype."""
    own = policy.dtype.itemsize if policy.dtype != policy.master else 0
    names = {name for group in policy.groups.values() for name in group.low}
    return max((policy.held.local()[name].numel() for name in names), default=0) * (policy.master.itemsize + own)


def _elsewhere(policy: Policy) -> int:
    """Another point takes the place of the live weights: what they do not share with masters is given up for it."""
    theta, seen = policy.groups["theta"], _all(policy)
    points = [name for name, group in policy.groups.items()  # what stands in for theta
              if name not in {"theta", "w"} and group.flat().keys() == theta.flat().keys()]
    live = _all(policy, False).fresh(policy.held.local().values())
    return max((seen.copy().fresh(policy.weights(point).values()) - live for point in points), default=0)


def _passing(policy: Policy) -> dict[str, int]:
    """What is gathered for a backward pass: the weights outside the layers all the time, of the layers the one at work
    and the next; their gradients, and those that are on their way, widened, to the ranks that keep them."""
    layer = max(sum(p.numel() for p in layer.parameters()) for layer in layers(policy.model))
    outside = sum(p.numel() for p in policy.params.values()) - sum(
        p.numel() for layer in layers(policy.model) for p in layer.parameters())
    size = policy.dtype.itemsize
    return {"train/layers gathered": size * (outside + 2 * layer),
            "train/gradients of layers": size * (outside + layer) + max(4, size) * max(outside, layer)}


def _generating(policy: Policy, config: RunConfig, models: Models, work: Work) -> dict[str, int]:
    """Of the decoding that needs most."""
    c, model = policy.model.config, policy.model
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    token = 2 * c.num_hidden_layers * c.num_key_value_heads * head * model.dtype.itemsize
    whole = sum(p.numel() * p.element_size() for p in policy.params.values()) if policy.held.apart else 0
    found = []
    for drawing in work.drawings:
        cache = token * drawing.rows * (drawing.prompt + drawing.answer)
        found.append({"generate/keys and values": cache,
                      "generate/what a pass makes":
                          max(0, passes.decoding(models, drawing, config.rollout.temperature) - cache)})
    adapters = sum(t.numel() * t.element_size() for name in ("theta", "w") if policy.lora and name in policy.groups
                   for t in policy.groups[name].flat().values())
    return {**max(found, key=lambda parts: sum(parts.values())), "generate/weights gathered": whole,
            "generate/adapter for the engine": adapters}


def _all(policy: Policy, live: bool = True) -> Seen:
    """On the device."""
    seen = Seen()
    seen.fresh([*(policy.held.local().values() if live else ()), *policy.frozen.values()])
    for name, group in policy.groups.items():
        if not _away(policy, name):
            seen.fresh(group.flat().values())
    return seen
