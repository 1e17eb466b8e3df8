"""A tiny world for tests: a word-level tokenizer, a random model of a few thousand weights, sums as data."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bridgelm.testing.bench import exact_norms, open_session

__all__ = ["exact_norms", "open_session"]

WORDS = [*(str(i) for i in range(20)), "+", "=", ";", "sum"]
TEMPLATE = ("{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} {% else %}"
            "<bot> {{ m['content'] }} <eos> {% endif %}{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}")


def save_tokenizer(folder: Path, known: Sequence[str] = WORDS) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "<user>", "<bot>", *known]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                        additional_special_tokens=["<user>", "<bot>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(folder: Path, kind: str = "qwen2", seed: int = 0, scale: float = 0.2) -> Path:
    """A random model whose answers are varied enough that groups differ in reward."""
    import transformers

    tokenizer = save_tokenizer(folder)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
             "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
             "initializer_range": scale}
    names = {"qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
             "wide": ("Qwen2Config", "Qwen2ForCausalLM", {"hidden_size": 256, "intermediate_size": 512}),
             "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 4}),
             "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
             "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"head_dim": 4, "query_pre_attn_scalar": 4}),
             "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 6})}
    config_name, model_name, extra = names[kind]
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**{**sizes, **extra}))
    model.save_pretrained(folder)
    return folder


def write_data(folder: Path, n: int = 40, seed: int = 0, demos: bool = True) -> dict[str, str]:
    """Sums of two small numbers; the answer is the last word. Each problem carries two demonstrations."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(10) for b in range(10)]
    rng.shuffle(pairs)
    out = {}
    for role, part in (("train", pairs[:n]), ("validation", pairs[n:n + 10]), ("test", pairs[n + 10:n + 20])):
        path = folder / f"{role}.jsonl"
        with path.open("w") as handle:
            for a, b in part:
                row = {"prompt": f"sum {a} + {b} =", "answer": str(a + b), "difficulty": float(a + b > 9)}
                if demos and role == "train":
                    row["demos"] = [f"{a} + {b} = {a + b}", str(a + b)]
                handle.write(json.dumps(row) + "\n")
        out[role] = str(path)
    return out


def parity_reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that a random model meets now and then: an answer with an even number of words, first word a digit."""
    return [float(len(c.split()) % 2 == 0) for c in completions]


def raw_config(folder: Path, method: dict[str, Any], model: Path | None = None, **changes: Any) -> dict[str, Any]:
    """A run on the tiny world, as the nested dict of a TOML file; `changes` replace whole sections."""
    folder.mkdir(parents=True, exist_ok=True)
    model = model or save_model(folder / "model")
    data = write_data(folder)
    raw = {"name": "run", "out": str(folder / "runs"), "steps": 4, "checkpoint_every": 2, "threads": 1,
           "model": {"name_or_path": str(model), "dtype": "float64"},
           "data": data, "method": method,
           "reward": {"verifier": "none", "functions": [f"{Path(__file__)}:parity_reward"]},
           "rollout": {"prompts": 4, "group": 4, "max_new_tokens": 6},
           "optim": {"lr": 1e-2}, "batch": {"demos": 6, "micro_tokens": 64},
           "eval": {"every": 2, "problems": 8}, "log": {"samples": 2, "samples_every": 2}}
    return {**raw, **changes}
