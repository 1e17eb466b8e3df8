"""The native engine: batched decoding of any Hugging Face causal LM on the trainer's own weights.

A prompt shared by a group is read once; finished rows leave the batch; each request draws from a stream of its own, so
its tokens do not depend on what else is in the batch (up to rounding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridgelm.engine.base import Done, Origin, Request, Sampling, stopped
from bridgelm.engine.decoders import Decoder, make_decoder
from bridgelm.ledger import Ledger
from bridgelm.types import Completion

KEEP = 0.8  # rows are compacted when fewer than this share of them is still running


class NativeEngine:
    exact = True

    def __init__(self, eos_ids: frozenset[int], pad_id: int, text: Callable[[Any], str], max_rows: int = 512) -> None:
        self.eos_ids, self.pad_id, self.text, self.max_rows = eos_ids, pad_id, text, max_rows

    @torch.inference_mode()
    def generate(self, origin: Origin, requests: Sequence[Request], sampling: Sampling, ledger: Ledger | None = None,
                 done: Done | None = None) -> list[Completion]:
        model = origin.model
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        made: dict[int, Completion] = {}
        training = model.training
        model.eval()  # under gradient checkpointing the model is in training mode, where Hugging Face keeps no cache
        try:
            for start in range(0, len(order), self.max_rows):
                chosen = order[start:start + self.max_rows]
                writers = [_Writer(i, done) for i in chosen]
                found = self._decode(model, [requests[i] for i in chosen], sampling, ledger, writers)
                made.update(zip(chosen, found, strict=True))
        finally:
            model.train(training)
        return [made[i] for i in range(len(requests))]

    def start(self, origin: Origin, requests: Sequence[Request],
              sampling: Sampling) -> Callable[[], list[Completion]]:
        found = self.generate(origin, requests, sampling)
        return lambda: found

    def sleep(self) -> None:
        """It holds no weights of its own, and its caches are gone."""

    def close(self) -> None:
        pass

    def _decode(self, model: Any, requests: list[Request], sampling: Sampling, ledger: Ledger | None,
                writers: list[_Writer]) -> list[Completion]:
        device = next(model.parameters()).device
        decoder = make_decoder(model, sampling.max_new_tokens)
        logits_BV, prompt_tokens = self._prefill(decoder, requests, device)
        draws = [np.random.default_rng(r.seed).random(sampling.max_new_tokens) if sampling.temperature > 0 else None
                 for r in requests]
        alive = list(range(len(requests)))  # the request of each row of the decoder
        running = list(alive)
        rooms = [sampling.max_new_tokens if r.room is None else r.room for r in requests]
        eos = torch.tensor(sorted(self.eos_ids), device=device)
        for t in range(sampling.max_new_tokens):
            uniform = None
            if sampling.temperature > 0:
                uniform = torch.tensor([draws[i][t] for i in alive], device=device)  # type: ignore[index]
            token_B, raw_B, logp_B = _draw(logits_BV, sampling.temperature, uniform)
            ended = torch.isin(token_B, eos).tolist()
            for b, (token, raw, logp) in enumerate(zip(token_B.tolist(), raw_B.tolist(), logp_B.tolist(), strict=True)):
                writer = writers[alive[b]]
                if not writer.finished and t < rooms[alive[b]]:
                    writer.add(token, raw, logp)
                    if ended[b] or stopped(writer.ids, sampling.stop, self.text):
                        writer.finish()
            running = [b for b, i in enumerate(alive) if not writers[i].finished and t + 1 < rooms[i]]
            if not running or t + 1 == sampling.max_new_tokens:
                break
            if len(running) < KEEP * len(alive):
                keep = torch.tensor(running, device=device)
                decoder.select(keep)
                token_B, alive = token_B[keep], [alive[b] for b in running]
            logits_BV = decoder.step(token_B)
        if ledger is not None:
            ledger.generate += prompt_tokens + sum(len(w.ids) for w in writers)
        return [w.completion() for w in writers]

    def _prefill(self, decoder: Decoder, requests: list[Request], device: torch.device) -> tuple[Tensor, int]:
        """Reads every distinct prompt once and repeats its cache for the requests that share it."""
        distinct: dict[bytes, int] = {}
        which = [distinct.setdefault(r.prompt.astype(np.int64).tobytes(), len(distinct)) for r in requests]
        prompts: list[np.ndarray] = [np.frombuffer(key, dtype=np.int64) for key in distinct]
        width = max(len(p) for p in prompts)
        ids = np.full((len(prompts), width), self.pad_id, dtype=np.int64)
        for b, p in enumerate(prompts):
            ids[b, width - len(p):] = p
        lengths = torch.tensor([len(p) for p in prompts])
        pad_BP = torch.arange(width)[None] >= (width - lengths)[:, None]
        logits_BV = decoder.prefill(torch.from_numpy(ids).to(device), pad_BP.to(device))
        if len(prompts) == len(requests):  # setdefault numbers them in order
            return logits_BV, sum(len(p) for p in prompts)
        rows = torch.tensor(which, device=device)
        decoder.select(rows)
        return logits_BV[rows], sum(len(p) for p in prompts)


class _Writer:
    """One request's output so far."""

    def __init__(self, number: int, done: Done | None) -> None:
        self.number, self.done = number, done
        self.ids: list[int] = []
        self.raw: list[float] = []
        self.logps: list[float] = []
        self.finished = False

    def add(self, token: int, raw: float, logp: float) -> None:
        self.ids.append(token)
        self.raw.append(raw)
        self.logps.append(logp)

    def finish(self) -> None:
        self.finished = True
        if self.done:
            self.done(self.number, np.array(self.ids, dtype=np.int64))

    def completion(self) -> Completion:
        if not np.isfinite(self.raw).all():
            raise FloatingPointError("the model's logits are not finite")
        return Completion(np.array(self.ids, dtype=np.int64), np.array(self.raw), np.array(self.logps), self.finished)


def _draw(logits_BV: Tensor, temperature: float, uniform_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row, with its log-prob at temperature 1 and at the sampling temperature."""
    wide = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    raw_BV = torch.log_softmax(wide, -1)
    if uniform_B is None:
        token_B = raw_BV.argmax(-1)
        raw_B = raw_BV.gather(1, token_B[:, None])[:, 0]
        return token_B, raw_B, torch.zeros_like(raw_B)
    logp_BV = raw_BV if temperature == 1.0 else torch.log_softmax(wide / temperature, -1)
    # Inverse of the distribution function: one number decides, whatever else is in the batch. In float32 the running
    # sum would lose rare tokens of a large vocabulary, and a number next to 1 would round to 1: an impossible token.
    cumulative = logp_BV.exp().cumsum(-1, dtype=torch.float64)
    target = uniform_B[:, None] * cumulative[:, -1:]
    token_B = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=wide.shape[1] - 1)
    return (token_B, raw_BV.gather(1, token_B[:, None])[:, 0], logp_BV.gather(1, token_B[:, None])[:, 0])
