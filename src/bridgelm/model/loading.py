"""Opens a Hugging Face causal language model for training: from safetensors only, and without remote code."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bridgelm.config.run_config import ModelConfig
from bridgelm.data.model_files import check_finite, check_index, check_loaded
from bridgelm.data.model_shapes import model_path
from bridgelm.errors import UserError
from bridgelm.model.offload import offload

ROW = 8  # how many tokens are scored to see whether a model gives the same numbers again
ROUNDING = 16  # units in the last place by which they may differ: a device may add up in another order each time


def pick_device(name: str, section: str = "model") -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"{section}.device: {name!r}, but torch sees no CUDA device; use 'auto' or 'cpu'")
    return torch.device(name)


def load_model(config: ModelConfig) -> Any:
    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device, path = pick_device(config.device, config.section), model_path(config.name_or_path, config.section)
    model = open_whole(
        path, config.section, revision=config.revision, dtype=getattr(torch, config.dtype), use_safetensors=True,
        trust_remote_code=False, attn_implementation=None if config.attention == "auto" else config.attention)
    if model.generation_config is None:
        model.generation_config = GenerationConfig.from_model_config(model.config)
    model = prepared(model, config).to(device)
    check_finite(model.named_parameters(), f"{config.section}.name_or_path: {path!r}")
    check_repeatable(model, config.section)
    return model


def open_whole(path: str, section: str = "model", **options: Any) -> Any:
    """A model of which every weight was read from its files. transformers alone would draw missing ones at random."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    check_index(Path(path), section)
    opened: Any
    try:
        opened = AutoModelForCausalLM.from_pretrained(path, **options, output_loading_info=True,
                                                      ignore_mismatched_sizes=True)  # `info` lists them
    except (OSError, ValueError, ImportError, SafetensorError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{section}.name_or_path: {path!r} cannot be opened as a causal language model "
                        f"({reason})") from None
    model, info = opened
    check_loaded(model, info, path, section)
    return model


def prepared(model: Any, config: ModelConfig) -> Any:
    """A model without dropout, and with what the configuration asks for to save memory."""
    if config.offload_activations:
        offload(model)
    if config.gradient_checkpointing:
        checkpoint_layers(model, config.section)
    return model.eval()  # dropout and any other noise belong to training mode


def checkpoint_layers(model: Any, section: str = "model") -> None:
    """Makes layers keep only their inputs for the backward pass. transformers itself does this in training mode
    only, where many families add noise outside of any module that could be switched off."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not model.supports_gradient_checkpointing:
        raise UserError(f"{section}.gradient_checkpointing: the layers of a {type(model).__name__} cannot be "
                        "checkpointed; set it to false")
    for layer in layers:
        layer.forward = partial(_checkpointed, layer)  # not `__call__`: hooks around it run once


def _checkpointed(layer: Any, *args: Any, **inputs: Any) -> Any:
    forward = partial(type(layer).forward, layer, **inputs)  # the class is FSDP2's by now, if sharded
    return checkpoint(forward, *args, use_reentrant=False) if torch.is_grad_enabled() else forward(*args)


def check_repeatable(model: Any, section: str = "model") -> None:
    """Scores one short row twice as in training and once as in rollouts. Ratios of probabilities mean something only if
    the three agree."""
    row = torch.arange(min(ROW, len(model.get_input_embeddings().weight)), device=model.device)[None]
    drawn = _generator_states(model.device)

    def score(gradients: bool) -> Tensor:
        with torch.set_grad_enabled(gradients):
            return model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits.detach()

    first, *others = (score(gradients) for gradients in (True, True, False))
    apart = max(float((other - first).abs().max()) for other in others)
    chance = not all(map(torch.equal, drawn, _generator_states(model.device)))
    if chance or apart > ROUNDING * torch.finfo(first.dtype).eps * float(first.abs().max()):
        why = "it draws random numbers in eval mode" if chance else f"logits differ by {apart:.2g}"
        raise UserError(f"{section}.name_or_path: a {type(model).__name__} gives the same row other numbers each time "
                        f"({why}), so probabilities before and after an update cannot be compared; set its dropout "
                        "and noise to 0 in config.json, or take another model")


def _generator_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def peak_device_memory() -> dict[str, float]:
    """The peak memory of the GPU, if there is one, for run.json."""
    return {"peak_device_memory_mb": torch.cuda.max_memory_allocated() / 2**20} if torch.cuda.is_available() else {}
