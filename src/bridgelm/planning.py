"""What a run will need, before it has a machine: bytes by what they are for, from the run's own code on a model without
storage (torch's meta device), so that every method's groups, copies and optimisers are the real ones.

    train     weights + masters + other groups + optimiser states + gradients + a merged copy of another point
              + activations of a micro-batch + a chunk of logits
    generate  weights + masters + other groups + optimiser states + the cache of keys and values
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bridgelm import forward
from bridgelm.config import ModelConfig, RunConfig, SequenceOptions
from bridgelm.held import Whole, layers
from bridgelm.ledger import Ledger
from bridgelm.methods import METHODS
from bridgelm.model_shapes import model_config
from bridgelm.optim import BLOCK, in_blocks
from bridgelm.policy import Policy
from bridgelm.teacher_ids import teacher_model

EIGHT = 1 + 4 / BLOCK  # bytes a value of eight bits with its block's scale
STATES = {"AdamW": 2, "SharedMoments": 1, "SGD": 0}  # tensors of a parameter's size and kind


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


def memory(config: RunConfig, gpus: int = 1) -> Need:
    """The largest need of a run's stages, on one of its cards."""
    if isinstance(config.method, SequenceOptions):
        stages = [config.model_copy(update={"method": stage.method}) for stage in config.method.stages]
        return max((memory(stage, gpus) for stage in stages), key=lambda need: need.peak)
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
    with policy.at("live"):
        parts = _standing(policy, eight)
        parts |= _training(policy, config, method.gradients)
        parts |= _generating(policy, config)
    if config.teacher is not None:
        teacher = empty_model(teacher_model(config))
        parts["standing/teacher"] = sum(p.numel() * p.element_size() for p in teacher.parameters())
    return Need(ledger.parameters, parts)


def empty_model(config: ModelConfig) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(config), dtype=getattr(torch, config.dtype))
    model.eval()
    return model


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
        where = "host" if name == "shadow" and "shadow" in host and group.full else "standing"
        parts[f"{where}/{'masters' if name == 'theta' else name}"] = seen.fresh(group.flat().values())
    states = {"standing": 0, "host": 0}
    for named in policy.optimisers.values():
        group = policy.groups[named.group]
        away = (group.full and "shadow" in host) if named.group == "shadow" else "moments" in host
        kind = type(named.optimiser).__name__
        states["host" if away else "standing"] += sum(
            int(STATES[kind] * t.numel() * (EIGHT if eight and kind == "AdamW" and in_blocks(t)
                                            else t.element_size())) for t in group.flat().values())
    return parts | {f"{where}/optimiser": size for where, size in states.items()}


def _training(policy: Policy, config: RunConfig, gradients: int) -> dict[str, int]:
    theta, w = policy.groups["theta"], policy.groups.get("w")
    groups = [group for group in (theta, w) if group is not None]
    touched = {name for group in groups for name in (*group.full, *group.low)}
    # A backward pass makes the model's gradients while it gives activations back: the largest comes first, or is last.
    own = max(policy.params[name].numel() * policy.params[name].element_size() for name in touched)
    passing = _passing(policy) if policy.held.apart else {"train/largest gradient": own}
    buffers = sum(t.numel() * t.element_size() for group in groups for t in group.flat().values())
    seen = _all(policy)
    points = [name for name, group in policy.groups.items()  # what stands in for theta
              if name not in {"theta", "w"} and group.flat().keys() == theta.flat().keys()]
    # Another point takes the place of the live weights: what they do not share with masters is given up for it.
    live = _all(policy, False).fresh(policy.held.local().values())
    copy = max((seen.copy().fresh(policy.weights(point).values()) - live for point in points), default=0)
    gradients = max(1, gradients - 1) if "gradients" in policy.config.host else gradients
    return {**passing, "train/gradients kept": gradients * buffers,
            "train/another point, merged": max(0, copy), **_activations(policy.model, config, touched)}


def _passing(policy: Policy) -> dict[str, int]:
    """What is gathered for a backward pass: the weights outside the layers all the time, of the layers the one at work
    and the next; their gradients, and those that are on their way, widened, to the ranks that keep them."""
    layer = max(sum(p.numel() for p in layer.parameters()) for layer in layers(policy.model))
    outside = sum(p.numel() for p in policy.params.values()) - sum(
        p.numel() for layer in layers(policy.model) for p in layer.parameters())
    size = policy.dtype.itemsize
    return {"train/layers gathered": size * (outside + 2 * layer),
            "train/gradients of layers": size * (outside + layer) + max(4, size) * max(outside, layer)}


def _activations(model: Any, config: RunConfig, touched: set[str]) -> dict[str, int]:
    """Of one micro-batch as large as batch.micro_tokens allows, in rows of the longest length."""
    data, length = config.data, config.data.max_prompt_tokens + max(config.rollout.max_new_tokens,
                                                                    config.data.max_demo_tokens)
    rows = max(1, config.batch.micro_tokens // length)
    for name, p in model.named_parameters():
        p.requires_grad_(name in touched)
    layers, kept = model.config.num_hidden_layers, _kept_by_backward(model, rows, length)
    if config.model.gradient_checkpointing:  # the input of each layer, and all of the one that is computed again
        inputs = rows * length * model.config.hidden_size * model.dtype.itemsize
        kept = layers * inputs + kept // layers
    tokens, vocabulary = rows * (length - data.max_prompt_tokens), model.config.vocab_size
    chunk = min(tokens * vocabulary, max(forward.CHUNK, vocabulary))
    return {"train/activations": kept, "train/logits": chunk * (model.dtype.itemsize + 3 * 4)}


def _kept_by_backward(model: Any, rows: int, length: int) -> int:
    """Bytes that autograd keeps of a forward pass up to the last hidden states, attention as fused kernels do it."""
    seen = Seen()
    seen.fresh(model.parameters())
    total = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal total
        total += seen.fresh([tensor])
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device="meta")  # whole already: nothing is asked of it
    with _fused_attention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return total


class _Fused(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps: its inputs, its output, and a number for each query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("only what is kept for it is asked for")


@contextmanager
def _fused_attention() -> Iterator[None]:
    functional: Any = torch.nn.functional
    original = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda q, k, v, *rest, **named: _Fused.apply(q, k, v)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def _generating(policy: Policy, config: RunConfig) -> dict[str, int]:
    model, c, rollout = policy.model, policy.model.config, config.rollout
    rows = min(rollout.max_rows, rollout.prompts * rollout.group)
    width = config.data.max_prompt_tokens + rollout.max_new_tokens
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    cache = 2 * c.num_hidden_layers * c.num_key_value_heads * head * rows * width * model.dtype.itemsize
    logits = rows * c.vocab_size * (model.dtype.itemsize + 2 * 4 + 8)
    whole = sum(p.numel() * p.element_size() for p in policy.params.values()) if policy.held.apart else 0
    rebuilt = _all(policy).fresh(policy.weights("live").values())  # beside the old ones, until they take their place
    return {"generate/keys and values": cache, "generate/logits": logits, "generate/weights made anew": rebuilt,
            "generate/weights gathered": whole}


def _all(policy: Policy, live: bool = True) -> Seen:
    seen = Seen()
    seen.fresh([*(policy.held.local().values() if live else ()), *policy.frozen.values()])
    for group in policy.groups.values():
        seen.fresh(group.flat().values())
    return seen
