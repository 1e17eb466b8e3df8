"""Packs a micro-batch without padding: the tokens of all rows stand in one line, a prompt that several rows share once.

Everything but attention looks at one token at a time. Attention is computed in frames: rows of similar length, one
below the other, to which queries, keys and values are copied. No row attends to another one, and a shared prompt gets
the gradients of all its rows. Frames are padded on the right, where a causal mask hides the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridgelm.types import Frame, Layout, Row

NAME = "bridgelm"  # what our attention function is called among those of transformers
PACKABLE = {"qwen2", "qwen3", "llama", "mistral", "qwen2_moe", "qwen3_moe"}
# A frame that has SMALL tokens takes no row that is shorter than this share of its longest.
LIKE, SMALL = 0.7, 2048


def packs(model: Any) -> bool:
    """Whether a model can take rows packed: its tokens influence each other only by causal attention to the whole row
    before them."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (config.model_type in PACKABLE and kinds == {"full_attention"}
            and not (config.model_type == "mistral" and config.sliding_window)
            and config._attn_implementation in ("sdpa", NAME))


def prefix(row: Row) -> int:
    """How many tokens stand before the first own one. Rows of one problem may share these."""
    return int(row.own.argmax()) if row.own.any() else 0


def line_up(rows: Sequence[Row]) -> Layout:
    """The place of each row's tokens in the line and in the frames."""
    order = sorted(range(len(rows)), key=lambda b: len(rows[b].ids), reverse=True)
    frames: list[list[int]] = []
    for b in order:
        longest = len(rows[frames[-1][0]].ids) if frames else 0
        if not frames or (len(rows[b].ids) < LIKE * longest and longest * len(frames[-1]) >= SMALL):
            frames.append([])
        frames[-1].append(b)
    starts: dict[bytes, int] = {}  # where each prompt begins in the line
    ids, positions, places, tables = [], [], [], []
    before: dict[int, np.ndarray] = {}
    length = offset = 0
    for frame in frames:
        width = len(rows[frame[0]].ids)
        table = np.empty((len(frame), width), dtype=np.int64)
        for at, b in enumerate(frame):
            row, cut = rows[b], prefix(rows[b])
            key = np.asarray(row.ids[:cut], dtype=np.int64).tobytes()
            known = cut if cut and key in starts else 0
            if not known:
                starts[key] = length
            end = length + len(row.ids) - known
            table[at, :cut] = np.arange(starts[key], starts[key] + cut)
            table[at, known:len(row.ids)] = np.arange(length, end)
            table[at, len(row.ids):] = end - 1
            ids.append(row.ids[known:])
            here = np.arange(known, len(row.ids))
            positions.append(here)
            places.append(offset + at * width + here)
            before[b] = table[at, :len(row.ids) - 1][row.own[1:]]
            length = end
        tables.append(Frame(torch.from_numpy(table.reshape(-1)), len(frame)))
        offset += table.size

    def whole(parts: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))
    return Layout(whole(ids), whole(positions), tuple(tables), whole(places),
                  whole([before[b] for b in range(len(rows))]))


def last_hidden(model: Any, layout: Layout) -> Tensor:
    """The last hidden states (N, D) of the tokens in the line."""
    _registered()
    model.config._attn_implementation = NAME  # it does what `sdpa` does where nothing is packed
    # transformers takes a mask of four dimensions as it is, and so does not make one of shape (N, N).
    ready = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=layout.ids_N.device)
    return body_of(model)(input_ids=layout.ids_N[None], position_ids=layout.position_N[None], attention_mask=ready,
                          use_cache=False, packed=layout).last_hidden_state[0]


def body_of(model: Any) -> Any:
    """The model without its head. A sharded model has a method for it that goes through its outermost module
    (sharding.py)."""
    return getattr(model, "body", model.base_model)


def _registered() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
               packed: Layout | None = None, **options: Any) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packed is None:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    made = []
    for frame in packed.frames:
        q, k, v = (_framed(x, frame) for x in (query, key, value))
        out, _ = sdpa_attention_forward(module, q, k, v, None, **options)  # (rows, length, heads, d)
        made.append(out.flatten(0, 1))
    out = made[0] if len(made) == 1 else torch.cat(made)
    return out.index_select(0, packed.place_N)[None], None


def _framed(x: Tensor, frame: Frame) -> Tensor:
    """Copies what belongs to a frame there: (1, heads, N, d) -> (rows, heads, length, d)."""
    x = x[0].transpose(0, 1).index_select(0, frame.tokens)
    return x.unflatten(0, (frame.rows, -1)).transpose(1, 2)
