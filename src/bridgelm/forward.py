"""One forward pass of a causal LM on a micro-batch: log-probs (and entropy) of the own tokens, head in chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bridgelm.types import Live, Micro

CHUNK = 2**24  # logits held at once: 64 MiB in float32
# Models whose logits are exactly head(last hidden state). Others may scale or cap them, so their own forward is used.
PLAIN_HEAD = {"qwen2", "qwen3", "llama", "mistral", "qwen2_moe", "qwen3_moe", "phi3", "olmo2", "smollm3"}


def _chunk(hidden_ND: Tensor, head: Any, target_N: Tensor, temperature_N: Tensor,
           entropy: bool) -> tuple[Tensor, Tensor]:
    logits = head(hidden_ND)
    return _score(logits, target_N, temperature_N, entropy)


def _score(logits_NV: Tensor, target_N: Tensor, temperature_N: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
    wide = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    logp_NV = torch.log_softmax(wide / temperature_N[:, None], dim=-1)
    logp_N = logp_NV.gather(1, target_N[:, None])[:, 0]
    return logp_N, -(logp_NV.exp() * logp_NV).sum(-1) if entropy else torch.zeros_like(logp_N)


def forward(model: Any, micro: Micro, entropy: bool = False) -> Live:
    """The own tokens' log-probabilities at each row's temperature, with gradients if they are switched on."""
    own_BT = micro.own_BT.clone()
    own_BT[:, 0] = False  # nothing predicts the first token
    where = own_BT[:, 1:]
    target_N = micro.ids_BT[:, 1:][where]
    temperature_N = micro.temperature_B[:, None].expand_as(where)[where]
    inputs = {"input_ids": micro.ids_BT, "attention_mask": micro.pad_BT.long(), "use_cache": False}
    if model.config.model_type in PLAIN_HEAD:
        hidden_ND = model.base_model(**inputs).last_hidden_state[:, :-1][where]
        head = model.get_output_embeddings()
        size = max(1, CHUNK // head.weight.shape[0])
        pieces = []
        for start in range(0, len(target_N), size):
            part = slice(start, start + size)
            args = (hidden_ND[part], head, target_N[part], temperature_N[part], entropy)
            pieces.append(_chunk(*args) if len(target_N) <= size else checkpoint(_chunk, *args, use_reentrant=False))
        logp_N, entropy_N = (torch.cat([p[i] for p in pieces]) for i in (0, 1))
    else:
        logits_NV = model(**inputs).logits[:, :-1][where]
        logp_N, entropy_N = _score(logits_NV, target_N, temperature_N, entropy)
    return Live(_spread(logp_N, own_BT), _spread(entropy_N, own_BT) if entropy else None)


def _spread(values_N: Tensor, own_BT: Tensor) -> Tensor:
    out = torch.zeros(own_BT.shape, dtype=values_N.dtype, device=values_N.device)
    return out.masked_scatter(own_BT, values_N)
