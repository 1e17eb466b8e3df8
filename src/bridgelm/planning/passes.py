"""Measures the peak memory of a run's largest training pass and decoding, on a model without storage.

The passes are run on torch's meta device, and every tensor is followed until it is freed."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bridgelm.config import catalogue
from bridgelm.config.options import samples
from bridgelm.config.run_config import RunConfig
from bridgelm.engine.decoders import make_decoder
from bridgelm.engine.native import _draw
from bridgelm.model import batching
from bridgelm.model.forward import CHUNK, KEPT, forward
from bridgelm.model.packing import line_up, packs
from bridgelm.model.sharding import Whole
from bridgelm.planning.alive import OnPaper, fused_attention
from bridgelm.types import Problem, Row

NOBODY = Problem("", ())
FEW = (3, 4)  # layers


@dataclass(frozen=True)
class Drawing:
    """Answers that are decoded at once."""

    prompts: int  # different ones
    rows: int
    prompt: int  # tokens of the longest
    answer: int


@dataclass(frozen=True)
class Work:
    """Micro-batches, and answers that are decoded."""

    micros: Sequence[Sequence[Row]]
    drawings: Sequence[Drawing]


def row_of(kind: Any, prompt: int, own: int, problem: int, temperature: float = 1.0) -> Row:
    """Rows of one problem share their prompt."""
    ids = np.full(prompt + own, problem, dtype=np.int64)
    return Row(ids, np.arange(prompt + own) >= prompt, kind, NOBODY, problem, temperature=temperature)


def at_most(config: RunConfig, packed: bool) -> Work:
    """Rows as long as the limits allow."""
    data, rollout, prompt = config.data, config.rollout, config.data.max_prompt_tokens
    groups = -(-rollout.prompts // rollout.updates)
    rows = [row_of("rollout", prompt, rollout.max_new_tokens, i, rollout.temperature) for i in range(groups)
            for _ in range(rollout.group)] if samples(config.method) else []
    if any("demo" in need for need in catalogue.needs_of(config.method)):
        rows += [row_of("demo", prompt, data.max_demo_tokens, i) for i in range(config.batch.demos)]
    looks, drawn = (min(rollout.max_rows, n) for n in (config.eval.problems, rollout.prompts * rollout.group))
    drawings = [Drawing(looks, looks, prompt, config.eval.max_new_tokens or rollout.max_new_tokens)]
    if rows and rows[0].kind == "rollout":
        drawings.append(Drawing(-(-drawn // rollout.group), drawn, prompt, rollout.max_new_tokens))
    micros = batching.plan(rows, config.batch.micro_tokens, set(), packed)
    return Work([[rows[i] for i in micro] for micro in micros], drawings)


class Pass(NamedTuple):
    """What a pass takes in bytes, beyond the weights."""

    kept: int  # kept by the layers for the backward pass
    peak: int
    host: int  # in host memory


class Models:
    """A model without storage, or two of fewer layers, by which what many equal ones need is known."""

    def __init__(self, make: Callable[[int], Any], layers: int, trained: Set[str]) -> None:
        self.layers, self.trained, last = layers, trained, make(min(layers, FEW[1]))
        self.models = [last] if layers <= FEW[1] else [make(FEW[0]), last] if packs(last) else [make(layers)]
        self.known: dict[Any, list[int]] = {}

    def run(self, what: Any, peaks: Callable[[Any], list[int]]) -> list[int]:
        """Once for each `what`."""
        if what not in self.known:
            found = [peaks(model) for model in self.models]
            more = self.layers - FEW[1] if found[1:] else 0
            self.known[what] = [b + more * (b - a) for a, b in zip(found[0], found[-1], strict=True)]
        return self.known[what]


def largest(micros: Sequence[Sequence[Row]]) -> list[Sequence[Row]]:
    """The micro-batch with the most tokens, and the one with the most own tokens."""
    sizes = {(len(line_up(rows).ids_N), sum(int(row.own.sum()) for row in rows)): rows for rows in micros}
    return [sizes[size] for size in {max(sizes), max(sizes, key=lambda size: size[::-1])}]


def training(models: Models, micros: Sequence[Sequence[Row]], dtype: torch.dtype) -> Pass:
    def passed(rows: Sequence[Row]) -> Pass:
        shapes = dtype, *((len(row.ids), int(row.own.sum()), row.group, row.temperature == 1) for row in rows)
        host, kept, *peaks = models.run(shapes, lambda model: _passed(Whole(model), set(models.trained), rows, dtype))
        return Pass(kept, max(peaks), host)

    return max((passed(rows) for rows in largest(micros)), key=lambda found: found.peak)


def _passed(sharding: Whole, trained: set[str], rows: Sequence[Row], dtype: torch.dtype) -> list[int]:
    """Peak bytes in host memory, and on the device after the layers, up to their last gradient, and up to the end."""
    model = sharding.model
    rows, left_out = with_fewer_chunks(rows, model.config.vocab_size)
    alive, laps = OnPaper(sharding.params.values()), list[int]()
    start = alive.peak = alive.now
    micro = batching.collate(rows, dtype, torch.device("cpu"), {})
    micro = replace(micro, layout=micro.layout.to(torch.device("meta")))

    def lap(now: bool = False) -> None:
        laps.append((alive.now if now else alive.peak) - start)
        alive.peak = alive.now if laps[1:] else alive.peak

    def back(module: Any, inputs: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda gradient: lap())

    def added(name: str, gradient: Tensor) -> None:
        gradient.to(dtype)  # as it is added to others

    sharding.train_only(trained)
    hooks = [model.base_model.register_forward_hook(lambda *args: lap(now=True)),
             model.get_input_embeddings().register_forward_hook(back)]
    with fused_attention(), alive.host_apart(), alive:
        live = forward(model, micro)
        loss = (live.logp_BT * micro.pad_BT).sum()
        with sharding.handing_over(added):
            loss.backward()
    for hook in hooks:
        hook.remove()
    more = 2 * left_out * model.config.hidden_size * model.dtype.itemsize  # hidden states, and gradients of these
    return [alive.host_peak, laps[0], *(lap + more for lap in laps[1:]), alive.peak - start + more]


def with_fewer_chunks(rows: Sequence[Row], vocabulary: int) -> tuple[Sequence[Row], int]:
    """Logits beyond those that are kept are made again chunk by chunk, and a few chunks need what many do. And how many
    own tokens are left out."""
    own = sum(int(row.own.sum()) for row in rows)
    share = min(1.0, (KEPT + 4 * CHUNK) / vocabulary / own)
    first = [int(row.own.argmax()) for row in rows]
    fewer = [replace(row, own=row.own & (np.arange(len(row.ids)) < start + max(1, share * row.own.sum())))
             for row, start in zip(rows, first, strict=True)]
    return fewer, own - sum(int(row.own.sum()) for row in fewer)


def decoding(models: Models, drawing: Drawing, temperature: float) -> int:
    return max(models.run((drawing, temperature), lambda model: _decoded(model, drawing, temperature)))


@torch.no_grad()
def _decoded(model: Any, drawing: Drawing, temperature: float) -> list[int]:
    """Bytes while prompts are read, while their caches are repeated, and while one token is decoded."""
    alive, laps = OnPaper(model.parameters()), list[int]()
    start = alive.peak = alive.now

    def lap() -> None:
        laps.append(alive.peak - start)
        alive.peak = alive.now

    ids = torch.zeros(drawing.prompts, drawing.prompt, dtype=torch.long)
    pad = torch.ones(ids.shape, dtype=torch.bool)
    pad[0, 0] = drawing.prompts == 1  # else not all are as long
    with fused_attention(), alive:
        decoder = make_decoder(model, drawing.answer)
        logits = decoder.prefill(ids, pad)
        lap()
        if drawing.rows > drawing.prompts:
            decoder.select(np.zeros(drawing.rows, dtype=np.int64))
            logits = logits[torch.zeros(drawing.rows, dtype=torch.long)]
        lap()
        uniform = torch.zeros(drawing.rows)
        _draw(logits, temperature, uniform)
        _draw(decoder.step(torch.zeros(drawing.rows, dtype=torch.long)), temperature, uniform)
        lap()
    return laps
