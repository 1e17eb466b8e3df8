"""Small models that vLLM's CPU kernels can run: heads of 32. The embedded task's have heads of 24, so its model is
written anew with wider heads: the same function."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tiny

WIDE = 32


def random_model(folder: Path, kind: str) -> Path:
    import transformers

    tokenizer = tiny.save_tokenizer(folder)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "head_dim": WIDE,
             "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None, "initializer_range": 0.15}
    config, model, tied = {"qwen2": ("Qwen2Config", "Qwen2ForCausalLM", True),
                           "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", False),
                           "llama": ("LlamaConfig", "LlamaForCausalLM", False)}[kind]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**sizes, tie_word_embeddings=tied)
    getattr(transformers, model)(made).save_pretrained(folder)
    return folder


def toy_model(folder: Path) -> Path:
    """The embedded task's base model with heads of 32. Rotary frequencies are base^(-2i / d): another base gives the
    first pairs of a wider head the old ones. The new pairs are zero, and queries make up for the other scale."""
    from transformers import AutoModelForCausalLM

    from bridgelm.data import toy

    source = Path(toy.model_path("base"))
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    old: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config, narrow = old.config, old.config.head_dim
    places = torch.cat([torch.arange(narrow // 2), WIDE // 2 + torch.arange(narrow // 2)])
    config.head_dim = WIDE
    config.rope_parameters = {**config.rope_parameters,
                              "rope_theta": config.rope_parameters["rope_theta"] ** (WIDE / narrow)}
    new = type(old)(config)

    def rows(t: Tensor) -> Tensor:
        """(heads * narrow, ...) -> (heads * WIDE, ...)"""
        heads = t.reshape(-1, narrow, *t.shape[1:])
        out = heads.new_zeros(heads.shape[0], WIDE, *t.shape[1:])
        out[:, places] = heads
        return out.flatten(0, 1)

    state = old.state_dict()
    for name, t in state.items():
        if any(part in name for part in ("q_proj", "k_proj", "v_proj")):
            state[name] = rows(t) * (math.sqrt(WIDE / narrow) if "q_proj" in name else 1.0)
        elif name.endswith("o_proj.weight"):
            state[name] = rows(t.T).T
    new.load_state_dict(state)
    ids = torch.arange(2, 60)[None]
    with torch.no_grad():
        assert (new(ids).logits - old(ids).logits).abs().max() < 1e-4
    new.save_pretrained(folder)
    return folder
