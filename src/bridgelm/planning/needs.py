"""What a run will need, before it has a machine: bytes by what they are for, from the run's own code on a model without
storage (torch's meta device), so that every method's groups, copies and optimizers are the real ones.

    train     weights + masters + other groups + optimizer states + gradients + a merged copy of another point
              + what the pass over a micro-batch makes
    generate  weights + masters + other groups + optimizer states + the cache of keys and values + what a pass makes

Both passes are run (`passes.py`), on the longest rows that the limits allow. The `Placement` of each group says what
lies in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from bridgelm.config.run_config import ModelConfig, RunConfig, SequenceOptions
from bridgelm.data.model_shapes import model_config
from bridgelm.ledger import Ledger
from bridgelm.methods import build
from bridgelm.methods.base import Gradients
from bridgelm.model.groups import Group, trainable
from bridgelm.model.loading import prepared
from bridgelm.model.optim import state_bytes
from bridgelm.model.packing import packs
from bridgelm.model.policy import Policy
from bridgelm.model.sharding import Sharding, Whole, layers
from bridgelm.planning import passes
from bridgelm.planning.passes import Models, Work, at_most
from bridgelm.rollout.teacher_ids import teacher_model

TEMPORARY = 3  # tensors of a weight's size that the optimizer makes while it steps that weight and measures the step


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


class OnPaper(Sharding):
    """The shards of the first of several ranks, beside a model that is still whole. No rank has larger ones. Weights
    without storage need not be copied."""

    sharded = True

    def __init__(self, model: Any, ranks: int) -> None:
        super().__init__(model)
        self.whole, self.ranks = Whole(model), ranks
        self.shards = {name: self.cut(p.detach()) for name, p in self.params.items()}

    def local(self) -> dict[str, Tensor]:
        return self.shards

    def cut(self, whole: Tensor) -> Tensor:
        return whole.new_empty(-(-len(whole) // self.ranks), *whole.shape[1:])

    def first_row(self, name: str) -> int:
        return 0

    def kept(self) -> dict[str, Tensor]:
        return {}

    def put(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        pass

    def handing_over(self, take: Callable[[str, Tensor], None]) -> AbstractContextManager[None]:
        return self.whole.handing_over(take)

    def gathered(self) -> AbstractContextManager[Any]:
        return self.whole.gathered()


def memory(config: RunConfig, gpus: int = 1, work: Work | None = None) -> Need:
    """What one card of a run needs, in the stage that needs most. `work` stands in for the most work that the limits
    allow."""
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
    method = build(config.method, config)
    method.setup(policy)
    work = work or at_most(config, packs(model))
    with policy.at("live"):
        models = _models(config.model.model_dump_json(), frozenset(trainable(_trained(policy))))
        parts = _standing(policy, eight)
        parts |= _training(policy, config, method.gradients, models, work)
        parts |= _generating(policy, config, models, work)
    if config.teacher is not None:
        teacher = empty_model(teacher_model(config))
        parts["standing/teacher"] = sum(p.numel() * p.element_size() for p in teacher.parameters())
    return Need(ledger.parameters, parts)


def empty_model(config: ModelConfig, layers: int | None = None) -> Any:
    """A model without storage; with `layers`, one that has only the first so many layers."""
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
    """The storages that were counted so far: a tensor that shares one of them costs nothing more."""

    def __init__(self) -> None:
        self.known: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no other storage gets the same number

    def copy(self) -> Seen:
        other = Seen()
        other.known = dict(self.known)
        return other

    def fresh(self, tensors: Iterable[Tensor]) -> int:
        """The bytes of those storages that were not counted before."""
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known[storage._cdata] = storage
                total += storage.nbytes()
        return total


def _standing(policy: Policy, eight_bit: bool) -> dict[str, int]:
    """What is there all the time, on the device and in host memory."""
    seen = Seen()
    parts = {"standing/weights": seen.fresh([*policy.live.sharding.local().values(), *policy.frozen.values()])}
    for name, group in policy.groups.items():
        where = "host" if group.placement.weights.host else "standing"
        parts[f"{where}/{'masters' if name == 'theta' else name}"] = seen.fresh(group.flat().values())
    states = {"standing": 0, "host": 0}
    for named in policy.optimisers.values():
        group = policy.groups[named.group]
        states["host" if group.placement.moments.host else "standing"] += sum(
            state_bytes(named.optimiser, t, eight_bit) for t in group.flat().values())
    return parts | {f"{where}/optimiser": size for where, size in states.items()}


def _trained(policy: Policy) -> tuple[Group, Group]:
    """theta, and w or an empty group."""
    return policy.groups["theta"], policy.groups.get("w", Group())


def _gradient(group: Group) -> int:
    return sum(t.nbytes for t in group.zeros().values())


def _training(policy: Policy, config: RunConfig, gradients: Gradients, models: Models, work: Work) -> dict[str, int]:
    """What is there only in training, at the moment that needs most: a pass over rows of one kind, a pass at another
    point, or between two passes."""
    theta, w = _trained(policy)
    of_theta, of_w = _gradient(theta), _gradient(w)
    parked = gradients.parked if policy.live.placements.waiting.host else 0

    def kept(held: int) -> dict[str, int]:
        waiting = min(parked, held - 1) * of_theta
        return {"train/gradients kept": held * (of_theta + of_w) - waiting, "host/gradients": waiting}

    largest = max(t.nbytes for group in (theta, w) for t in group.zeros().values())
    moments = [{**kept(gradients.between), "train/an optimiser's tensors": TEMPORARY * largest},
               {**kept(gradients.between), "train/a weight being merged": _merging(policy)}]
    for kind in {rows[0].kind for rows in work.micros}:
        found = passes.training(models, [rows for rows in work.micros if rows[0].kind == kind], policy.live.master)
        made = {"train/activations": found.kept, "train/logits and the way back": found.peak - found.kept,
                "host/activations": found.host, **(_passing(policy) if policy.live.sharding.sharded else {})}
        moments += [{**kept(getattr(gradients, kind)), **made}]
        if kind == "rollout" and (copy := _elsewhere(policy)):
            moments += [{**kept(gradients.elsewhere), "train/another point, merged": copy, **made}]
    return max(moments, key=lambda parts: sum(size for name, size in parts.items() if name.startswith("train/")))


def _merging(policy: Policy) -> int:
    """A weight while low-rank terms are added to it: the sum, and its copy in the model's dtype."""
    live, shards = policy.live, policy.live.sharding.local()
    own = live.dtype.itemsize if live.dtype != live.master else 0
    names = {name for group in policy.groups.values() for name in group.low}
    return max((shards[name].numel() for name in names), default=0) * (live.master.itemsize + own)


def _elsewhere(policy: Policy) -> int:
    """What the merged weights of another point take beyond the live weights, which give up their memory for them
    wherever it is not the masters' too."""
    theta, seen = policy.groups["theta"], _all(policy)
    points = [name for name, group in policy.groups.items()  # groups that can stand in for theta
              if name not in {"theta", "w"} and group.flat().keys() == theta.flat().keys()]
    live = _all(policy, False).fresh(policy.live.sharding.local().values())
    return max((seen.copy().fresh(policy.weights(point).values()) - live for point in points), default=0)


def _passing(policy: Policy) -> dict[str, int]:
    """What a backward pass over sharded weights gathers: the weights outside the layers all the time, those of the
    layer at work and of the next one; their gradients, and those that are sent, in a wider dtype, to the ranks whose
    shards they are of."""
    layer = max(sum(p.numel() for p in layer.parameters()) for layer in layers(policy.model))
    outside = sum(p.numel() for p in policy.params.values()) - sum(
        p.numel() for layer in layers(policy.model) for p in layer.parameters())
    size = policy.live.dtype.itemsize
    return {"train/layers gathered": size * (outside + 2 * layer),
            "train/gradients of layers": size * (outside + layer) + max(4, size) * max(outside, layer)}


def _generating(policy: Policy, config: RunConfig, models: Models, work: Work) -> dict[str, int]:
    """What is there only while answers are drawn, in the decoding that needs most."""
    c, model = policy.model.config, policy.model
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    token = 2 * c.num_hidden_layers * c.num_key_value_heads * head * model.dtype.itemsize
    whole = sum(p.numel() * p.element_size() for p in policy.params.values()) if policy.live.sharding.sharded else 0
    found = []
    for drawing in work.drawings:
        cache = token * drawing.rows * (drawing.prompt + drawing.answer)
        found.append({"generate/keys and values": cache,
                      "generate/what a pass makes":
                          max(0, passes.decoding(models, drawing, config.rollout.temperature) - cache)})
    adapters = sum(t.numel() * t.element_size() for name in ("theta", "w") if policy.live.lora and name in policy.groups
                   for t in policy.groups[name].flat().values())
    return {**max(found, key=lambda parts: sum(parts.values())), "generate/weights gathered": whole,
            "generate/adapter for the engine": adapters}


def _all(policy: Policy, live: bool = True) -> Seen:
    """All weights on the device, with or without the live ones."""
    seen = Seen()
    seen.fresh([*(policy.live.sharding.local().values() if live else ()), *policy.frozen.values()])
    for group in policy.groups.values():
        if not group.placement.weights.host:
            seen.fresh(group.flat().values())
    return seen
