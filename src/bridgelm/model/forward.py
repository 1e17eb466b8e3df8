"""One forward pass of a causal language model over a micro-batch: the log-probs of the own tokens, and on request the
entropy of their distributions and the cross-entropy to those of another point. Rows are packed without padding where
the model allows it, and logits are computed in chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bridgelm.model.packing import body_of, last_hidden, packs
from bridgelm.types import Live, Micro

CHUNK = 2**24  # how many logits are computed at once: 64 MiB in float32
KEPT = 2**28  # how many logits of a micro-batch the backward pass finds kept (1 GiB); it computes the others again
# Models whose logits are exactly head(last hidden state). Others may scale or cap them, so their own code makes them.
PLAIN_HEAD = {"qwen2", "qwen3", "llama", "mistral", "qwen2_moe", "qwen3_moe", "phi3", "olmo2", "smollm3"}

# From another point's log-probs (N, V) and the tokens (N) to the distributions (N, V) to aim at.
Target = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Soft:
    """The soft targets of the own tokens: another point's last hidden states, and its head, which makes their logits
    chunk by chunk; or, without a head, the logits themselves."""

    values_N: Tensor
    head: tuple[Tensor, Tensor | None] | None
    target: Target

    def at(self, part: slice, token_N: Tensor, temperature_N: Tensor | None) -> Tensor:
        values_N = self.values_N[part]
        logits_NV = values_N if self.head is None else torch.nn.functional.linear(values_N, *self.head)
        return self.target(_log_softmax(logits_NV, temperature_N), token_N)


def _log_softmax(logits_NV: Tensor, temperature_N: Tensor | None) -> Tensor:
    wide = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return torch.log_softmax(wide if temperature_N is None else wide / temperature_N[:, None], dim=-1)


def _chunk(values_N: Tensor, head: Any, token_N: Tensor, temperature_N: Tensor | None, entropy: bool,
           soft: Soft | None, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    logp_NV = _log_softmax(values_N if head is None else head(values_N), temperature_N)
    logp_N = logp_NV.gather(1, token_N[:, None])[:, 0]
    entropy_N = -(logp_NV.exp() * logp_NV).sum(-1) if entropy else torch.zeros_like(logp_N)
    if soft is None:
        return logp_N, entropy_N, torch.zeros_like(logp_N)
    with torch.no_grad():
        target_NV = soft.at(part, token_N, temperature_N)
    return logp_N, entropy_N, -(target_NV * logp_NV).sum(-1)


def _where(micro: Micro) -> tuple[Tensor, Tensor]:
    """Masks of the own tokens (B, T), and of the positions that predict them (B, T - 1)."""
    own_BT = micro.own_BT.clone()
    own_BT[:, 0] = False  # nothing predicts the first token
    return own_BT, own_BT[:, 1:]


def _last(model: Any, micro: Micro, where: Tensor) -> tuple[Tensor, Any]:
    """The last hidden states of the positions that predict own tokens, and the head; where logits are more than the
    head's output, these logits and None."""
    if packs(model):
        layout = micro.layout.to(where.device)
        return last_hidden(model, layout).index_select(0, layout.before_N), model.get_output_embeddings()
    inputs = {"input_ids": micro.ids_BT, "attention_mask": micro.pad_BT.long(), "use_cache": False}
    if model.config.model_type in PLAIN_HEAD:
        return body_of(model)(**inputs).last_hidden_state[:, :-1][where], model.get_output_embeddings()
    return model(**inputs).logits[:, :-1][where], None


@torch.no_grad()
def soft_targets(model: Any, micro: Micro, target: Target) -> Soft:
    """The soft targets that the model's present weights give; it may have others when the targets are used."""
    values_N, head = _last(model, micro, _where(micro)[1])
    if head is None:
        return Soft(values_N, None, target)
    bias = getattr(head, "bias", None)
    weight, bias = head.weight.data, None if bias is None else bias.data
    if hasattr(model, "body"):  # a sharded model, where other weights are written into the same memory
        weight, bias = weight.clone(), None if bias is None else bias.clone()
    return Soft(values_N, (weight, bias), target)


def forward(model: Any, micro: Micro, entropy: bool = False, soft: Soft | None = None) -> Live:
    """The log-probs of the own tokens at each row's temperature, with gradients if these are switched on."""
    own_BT, where = _where(micro)
    token_N = micro.ids_BT[:, 1:][where]
    plain = bool((micro.temperature_B == 1).all())  # nearly always; it saves a second copy of the logits
    temperature_N = None if plain else micro.temperature_B[:, None].expand_as(where)[where]
    values_N, head = _last(model, micro, where)
    size = len(token_N) if head is None else max(1, CHUNK // head.weight.shape[0])
    pieces = []
    for start in range(0, max(1, len(token_N)), max(1, size)):
        part = slice(start, start + size)
        heat = None if temperature_N is None else temperature_N[part]
        args = (values_N[part], head, token_N[part], heat, entropy, soft, part)
        kept = head is None or min(start + size, len(token_N)) * head.weight.shape[0] <= KEPT
        pieces.append(_chunk(*args) if kept else checkpoint(_chunk, *args, use_reentrant=False))
    logp_N, entropy_N, cross_N = (torch.cat([p[i] for p in pieces]) for i in range(3))
    return Live(_spread(logp_N, own_BT), _spread(entropy_N, own_BT) if entropy else None,
                _spread(cross_N, own_BT) if soft else None)


def _spread(values_N: Tensor, own_BT: Tensor) -> Tensor:
    """The values of the own tokens at the tokens' places (B, T), and zeros elsewhere."""
    out = torch.zeros(own_BT.shape, dtype=values_N.dtype, device=values_N.device)
    return out.masked_scatter(own_BT, values_N)
