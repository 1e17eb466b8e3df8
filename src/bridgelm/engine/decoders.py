"""Decoders of the native engine, which extend many rows by one token with a cache of keys and values.

`FastDecoder` spells out Qwen2, Qwen3 and Llama over the model's own modules and one preallocated cache; `ModelDecoder`
calls any Hugging Face model's own forward with its own cache. A decoder has `prefill`, `select` (keep or repeat rows)
and `step`, and returns next-token logits (B, V). Rows are padded on the left, so that all rows write the same column
of the cache. Rows are selected on the host, which saves waiting for the device.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bridgelm.errors import UserError


class Decoder(Protocol):
    def prefill(self, ids_BP: Tensor, pad_BP: Tensor) -> Tensor: ...
    def select(self, rows: np.ndarray) -> None: ...
    def step(self, token_B: Tensor) -> Tensor: ...


def make_decoder(model: Any, room: int) -> Decoder:
    """`room`: the number of tokens that will be added to the longest prompt."""
    config = model.config
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    plain = config.model_type in {"qwen2", "qwen3", "llama"} and set(layers) == {"full_attention"}
    return FastDecoder(model, room) if plain else ModelDecoder(model)


class FastDecoder:
    def __init__(self, model: Any, room: int) -> None:
        self.model, self.room = model, room
        self.body = model.base_model
        self.keys: list[Tensor] = []  # per layer (B, heads, P + room, d)
        self.values: list[Tensor] = []
        self.start_B = torch.empty(0)
        self.mask: Tensor | None = None
        self.width = 0

    def prefill(self, ids_BP: Tensor, pad_BP: Tensor) -> Tensor:
        self.width = ids_BP.shape[1]
        self.start_B = (~pad_BP).sum(1)
        position_BP = (torch.arange(self.width, device=ids_BP.device)[None] - self.start_B[:, None]).clamp(min=0)
        if bool(pad_BP.all()):
            self.mask, mask = None, None
        else:
            causal = torch.ones(self.width, self.width, dtype=torch.bool, device=ids_BP.device).tril()
            # A padded query attends to itself, so that no row of the softmax is empty; its output is never used.
            itself = torch.eye(self.width, dtype=torch.bool, device=ids_BP.device)
            mask = (causal[None] & pad_BP[:, None, :] | itself)[:, None]
            self.mask = torch.cat([pad_BP, pad_BP.new_ones(len(pad_BP), self.room)], 1)
        hidden = self._run(self.body.embed_tokens(ids_BP), position_BP, mask, fill=True)
        return self.model.lm_head(hidden[:, -1])

    def step(self, token_B: Tensor) -> Tensor:
        position_B1 = (self.width - self.start_B)[:, None]
        self.width += 1
        mask = None if self.mask is None else self.mask[:, None, None, :self.width]
        hidden = self._run(self.body.embed_tokens(token_B[:, None]), position_B1, mask, fill=False)
        return self.model.lm_head(hidden[:, -1])

    def select(self, rows: np.ndarray) -> None:
        """If rows become fewer, they are moved within the cache, and only those that cannot stay in place (see
        `filled`)."""
        chosen = torch.from_numpy(rows).to(self.start_B.device)
        at = np.flatnonzero(rows != np.arange(len(rows)))
        inside = len(rows) <= len(self.start_B)
        to, source = (torch.from_numpy(x).to(chosen.device) for x in (at, rows[at]))
        for cache in (self.keys, self.values):
            for layer, kept in enumerate(cache):  # layer by layer, so that there are never two whole caches
                if inside:
                    kept[to, :, :self.width] = kept[source, :, :self.width]
                cache[layer] = kept[:len(rows)] if inside else kept.index_select(0, chosen)
        self.start_B = self.start_B.index_select(0, chosen)
        self.mask = None if self.mask is None else self.mask.index_select(0, chosen)

    def _run(self, hidden: Tensor, position: Tensor, mask: Tensor | None, fill: bool) -> Tensor:
        cos, sin = self.body.rotary_emb(hidden, position)
        cos, sin = cos[:, None], sin[:, None]
        batch, length = position.shape
        for index, layer in enumerate(self.body.layers):
            attention = layer.self_attn
            x = layer.input_layernorm(hidden)
            shape = (batch, length, -1, attention.head_dim)
            q, k = attention.q_proj(x).view(shape), attention.k_proj(x).view(shape)
            if hasattr(attention, "q_norm"):
                q, k = attention.q_norm(q), attention.k_norm(k)
            q, k = _rotate(q.transpose(1, 2), cos, sin), _rotate(k.transpose(1, 2), cos, sin)
            v = attention.v_proj(x).view(shape).transpose(1, 2)
            if fill:
                self.keys.append(_room(k, self.room))
                self.values.append(_room(v, self.room))
            else:
                self.keys[index][:, :, self.width - 1] = k[:, :, 0]
                self.values[index][:, :, self.width - 1] = v[:, :, 0]
                k, v = self.keys[index][:, :, :self.width], self.values[index][:, :, :self.width]
            if fill:
                mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                                     scale=attention.scaling, enable_gqa=q.shape[1] != k.shape[1])
            else:  # query heads that share a key head become further queries of it, so that no key is repeated
                shared = q.view(batch, k.shape[1], -1, q.shape[-1])
                mixed = scaled_dot_product_attention(shared, k, v, attn_mask=mask, scale=attention.scaling)
                mixed = mixed.view(q.shape)
            hidden = hidden + attention.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.body.norm(hidden)


def filled(rows: np.ndarray) -> np.ndarray:
    """The same rows, ordered so that as many as possible keep their places and the last ones fill the gaps."""
    order = np.arange(len(rows))
    order[np.setdiff1d(order, rows)] = rows[rows >= len(rows)]
    return order


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def _room(x: Tensor, room: int) -> Tensor:
    out = x.new_empty(x.shape[0], x.shape[1], x.shape[2] + room, x.shape[3])
    out[:, :, :x.shape[2]] = x
    return out


def check_cache(model: Any) -> None:
    """Refuses state-space and recurrent models, whose state is not a cache of keys and values and ignores padding."""
    if "past_key_values" not in signature(type(model).forward).parameters:
        raise UserError(f"model.name_or_path: a {type(model).__name__} keeps no cache of keys and values, so the "
                        "native engine cannot draw answers from it; take a model with attention, or another "
                        "rollout.engine")


class ModelDecoder:
    def __init__(self, model: Any) -> None:
        check_cache(model)
        self.model = model
        self.cache: Any = None
        self.mask_BT = torch.empty(0)

    def prefill(self, ids_BP: Tensor, pad_BP: Tensor) -> Tensor:
        self.mask_BT = pad_BP.long()
        return self._call(ids_BP, (self.mask_BT.cumsum(1) - 1).clamp(min=0))

    def step(self, token_B: Tensor) -> Tensor:
        self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(token_B), 1)], 1)
        return self._call(token_B[:, None], self.mask_BT.sum(1, keepdim=True) - 1)

    def select(self, rows: np.ndarray) -> None:
        chosen = torch.from_numpy(rows).to(self.mask_BT.device)
        self.cache.reorder_cache(chosen)
        self.mask_BT = self.mask_BT.index_select(0, chosen)

    def _call(self, ids: Tensor, position: Tensor) -> Tensor:
        out = self.model(input_ids=ids, attention_mask=self.mask_BT, position_ids=position, past_key_values=self.cache,
                         use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return out.logits[:, -1]
