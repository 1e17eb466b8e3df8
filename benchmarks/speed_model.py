"""Models and prompts of the speed measurements: random Qwen2s that end an answer with a given probability a token."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # their tokenizer

PROMPT = 20  # words; with its two markers a prompt has 22 tokens
MARKS = ["<pad>", "<eos>", "<unk>", "<user>", "<bot>"]  # the first words of the tests' tokenizers
EOS = 1
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 512},
    "small": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 512},
    "large": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8,
              "num_key_value_heads": 2, "vocab_size": 151936},
}


def end_probability(mean: float, limit: int) -> float:
    """The probability of an end at each token with which answers of at most `limit` tokens have this mean length."""
    low, high = 1e-9, 1.0
    for _ in range(100):
        p = (low + high) / 2
        low, high = (p, high) if (1 - (1 - p) ** limit) / p > mean else (low, p)
    return low


def write_model(folder: Path, shape: str, end: float | None) -> int:
    """Saves a model and its tokenizer; the number of its weights. `end` None: an answer never ends by itself.

    The first coordinate of every embedding is the same, and no layer writes to it: after the last norm it is a constant
    but for the norm's rounding, and so is what the end token's row of the (tied) head makes of it.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = SHAPES[shape]
    write_tokenizer(folder, sizes["vocab_size"])
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True, max_position_embeddings=1024,
                                         eos_token_id=EOS, pad_token_id=0, bos_token_id=None))
    body: Any = model.model
    with torch.no_grad():
        level = 2 * 0.02 * math.sqrt(sizes["hidden_size"])  # four times the energy of the other coordinates
        body.embed_tokens.weight[:, 0] = level
        for layer in body.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        ids = torch.randint(len(MARKS), sizes["vocab_size"], (8, 64))
        hidden = body(ids).last_hidden_state
        others = torch.logsumexp(model.lm_head(hidden), -1).mean() - level * hidden[..., 0].mean()
        wanted = -25.0 if end is None else float(others) + math.log(end / (1 - end))
        body.embed_tokens.weight[EOS, 1:] = 0  # its logit is the constant alone
        body.embed_tokens.weight[EOS, 0] = level + wanted / hidden[..., 0].mean()
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def write_tokenizer(folder: Path, size: int) -> None:
    from tiny import save_tokenizer

    save_tokenizer(folder, [f"t{i}" for i in range(size - len(MARKS))])


def prompts(count: int) -> list[str]:
    """Of the 500 words that every tokenizer has."""
    draws = random.Random(0)
    return [" ".join(f"t{draws.randrange(500)}" for _ in range(PROMPT)) for _ in range(count)]


def write_data(folder: Path, count: int, demo: int) -> None:
    """Prompts with a demonstration of `demo` tokens, the end token among them."""
    draws = random.Random(1)
    rows = [{"prompt": prompt, "answer": "t0", "demos": [" ".join(f"t{draws.randrange(500)}" for _ in range(demo - 1))]}
            for prompt in prompts(count + 4)]
    for name, part in (("train", rows[:count]), ("validation", rows[count:count + 2]), ("test", rows[count + 2:])):
        text = "".join(json.dumps(row if name == "train" else {**row, "demos": []}) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
