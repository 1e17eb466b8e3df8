"""Opens a Hugging Face causal LM for training: safetensors only, no remote code."""

from __future__ import annotations

from typing import Any

import torch

from bridgelm.chat import model_path
from bridgelm.config import ModelConfig
from bridgelm.errors import UserError
from bridgelm.offload import offload


def pick_device(name: str, section: str = "model") -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"{section}.device: {name!r}, but torch sees no CUDA device; use 'auto' or 'cpu'")
    return torch.device(name)


def load_model(config: ModelConfig) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device, path = pick_device(config.device, config.section), model_path(config.name_or_path, config.section)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, revision=config.revision, dtype=getattr(torch, config.dtype), use_safetensors=True,
            trust_remote_code=False, attn_implementation=None if config.attention == "auto" else config.attention)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{config.section}.name_or_path: {path!r} cannot be opened as a causal language model "
                        f"({reason})") from None
    if model.generation_config is None:
        model.generation_config = GenerationConfig.from_model_config(model.config)
    return prepared(model, config).to(device)


def prepared(model: Any, config: ModelConfig) -> Any:
    """Without chance, and with what is asked for to save memory."""
    if config.offload_activations:
        offload(model)
    if config.gradient_checkpointing:
        # Named anew in transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.train()  # checkpointing is skipped in eval mode; dropout is switched off below
    else:
        model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010
    return model


def peak_device_memory() -> dict[str, float]:
    """For run.json: the peak of the GPU, where there is one."""
    return {"peak_device_memory_mb": torch.cuda.max_memory_allocated() / 2**20} if torch.cuda.is_available() else {}
