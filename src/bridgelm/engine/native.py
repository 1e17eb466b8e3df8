"""The native engine: batched decoding of any Hugging Face causal LM on the trainer's own weights.

A prompt that a group shares is processed once, and finished rows leave the batch. Each request has a random stream of
its own, so its tokens do not depend on the rest of the batch (up to rounding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridgelm.data.model_shapes import table_of_positions
from bridgelm.engine.base import Done, Origin, Request, Sampling, stopped
from bridgelm.engine.decoders import Decoder, filled, make_decoder
from bridgelm.errors import UserError
from bridgelm.ledger import Ledger
from bridgelm.types import Completion

BLOCK = 256  # tokens of the vocabulary per block of the two-level running sum
KEEP = 0.95  # rows are compacted when less than this share of them is still running


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
        for start in range(0, len(order), self.max_rows):
            chosen = order[start:start + self.max_rows]
            found = self._decode(model, [requests[i] for i in chosen], sampling, ledger, chosen, done)
            made.update(zip(chosen, found, strict=True))
        return [made[i] for i in range(len(requests))]

    def start(self, origin: Origin, requests: Sequence[Request],
              sampling: Sampling) -> Callable[[], list[Completion]]:
        found = self.generate(origin, requests, sampling)
        return lambda: found

    def sleep(self) -> None:
        """There is nothing to free: the engine has no weights of its own, and its caches are gone."""

    def close(self) -> None:
        pass

    def _decode(self, model: Any, requests: list[Request], sampling: Sampling, ledger: Ledger | None,
                numbers: list[int], done: Done | None) -> list[Completion]:
        device = next(model.parameters()).device
        limit = sampling.max_new_tokens
        _check_positions(model, requests, limit)
        decoder = make_decoder(model, limit)
        logits_BV, prompt_tokens = self._prefill(decoder, requests, device)
        uniform_RT = (np.stack([np.random.default_rng(r.seed).random(limit) for r in requests])
                      if sampling.temperature > 0 else None)
        written = _Written(len(requests), limit)
        room_R = np.array([limit if r.room is None else min(limit, r.room) for r in requests])
        eos = np.array(sorted(self.eos_ids), dtype=np.int64)
        going_R = room_R > 0
        alive = np.arange(len(requests))  # the request of each row of the decoder
        for t in range(limit):
            uniform = None if uniform_RT is None else torch.from_numpy(uniform_RT[alive, t]).to(device)
            token_B, raw_B, logp_B = _draw(logits_BV, sampling.temperature, uniform)
            here = going_R[alive]
            rows, tokens = alive[here], token_B.cpu().numpy()[here]
            written.add(rows, t, tokens, raw_B.cpu().numpy()[here], logp_B.cpu().numpy()[here])
            ended = np.isin(tokens, eos)
            if sampling.stop:
                ended |= [stopped(written.ids_RT[i, :t + 1].tolist(), sampling.stop, self.text) for i in rows]
            for i in rows[ended]:
                written.finished_R[i] = True
                if done:
                    done(numbers[i], written.ids_RT[i, :t + 1].copy())
            going_R[rows] = ~ended & (t + 1 < room_R[rows])
            running = np.flatnonzero(going_R[alive])
            if not len(running):
                break
            if len(running) < KEEP * len(alive):
                keep = filled(running)
                decoder.select(keep)
                token_B, alive = token_B[torch.from_numpy(keep).to(device)], alive[keep]
            logits_BV = decoder.step(token_B)
        if ledger is not None:
            ledger.generate += prompt_tokens + int(written.length_R.sum())
        return [written.completion(i) for i in range(len(requests))]

    def _prefill(self, decoder: Decoder, requests: list[Request], device: torch.device) -> tuple[Tensor, int]:
        """Processes every distinct prompt once and repeats its cache for the requests that share it."""
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
        rows = np.array(which)
        decoder.select(rows)
        return logits_BV[torch.from_numpy(rows).to(device)], sum(len(p) for p in prompts)


def _check_positions(model: Any, requests: Sequence[Request], limit: int) -> None:
    """Refuses rows that would run past the end of the model's position table."""
    count = table_of_positions(model.config)
    longest = max(len(r.prompt) + (limit if r.room is None else min(limit, r.room)) for r in requests)
    if count is not None and longest > count:
        raise UserError(f"model.name_or_path: a prompt and its answer may have {longest} tokens, and the model has "
                        f"{count} positions; allow fewer new tokens (max_new_tokens) or take shorter prompts")


class _Written:
    """The tokens and log-probs drawn so far."""

    def __init__(self, requests: int, limit: int) -> None:
        self.ids_RT = np.zeros((requests, limit), dtype=np.int64)
        self.raw_RT, self.logp_RT = np.zeros((2, requests, limit))
        self.length_R = np.zeros(requests, dtype=np.int64)
        self.finished_R = np.zeros(requests, dtype=bool)

    def add(self, rows: np.ndarray, t: int, tokens: np.ndarray, raw: np.ndarray, logp: np.ndarray) -> None:
        self.ids_RT[rows, t], self.raw_RT[rows, t], self.logp_RT[rows, t] = tokens, raw, logp
        self.length_R[rows] = t + 1

    def completion(self, i: int) -> Completion:
        ids, raw, logps = (values[i, :self.length_R[i]].copy() for values in (self.ids_RT, self.raw_RT, self.logp_RT))
        if not np.isfinite(raw).all():
            raise FloatingPointError("the model's logits are not finite")
        return Completion(ids, raw, logps, bool(self.finished_R[i]))


def _draw(logits_BV: Tensor, temperature: float, uniform_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row, with its log-prob at temperature 1 and at the sampling temperature."""
    wide = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    raw_BV = torch.log_softmax(wide, -1)
    if uniform_B is None:
        token_B = raw_BV.argmax(-1)
        raw_B = raw_BV.gather(1, token_B[:, None])[:, 0]
        return token_B, raw_B, torch.zeros_like(raw_B)
    logp_BV = raw_BV if temperature == 1.0 else torch.log_softmax(wide / temperature, -1)
    token_B = _inverse(logp_BV.exp(), uniform_B)
    return (token_B, raw_BV.gather(1, token_B[:, None])[:, 0], logp_BV.gather(1, token_B[:, None])[:, 0])


def _inverse(p_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Draws tokens by inverting the distribution function, so that one random number per row decides.

    In float32 the running sum would lose rare tokens of a large vocabulary, and a number close to 1 would round to 1
    and select an impossible token. In float64 the sum over the vocabulary costs as much as a layer, so it first runs
    over blocks and then within one block.
    """
    vocabulary = p_BV.shape[1]
    whole = vocabulary // BLOCK * BLOCK
    sums = [p_BV[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)] if whole else []
    if whole < vocabulary:
        sums.append(p_BV[:, whole:].sum(-1, keepdim=True))
    upto_BK, block_B1, target_B1 = _search(torch.cat(sums, 1), uniform_B[:, None])
    start_B1 = block_B1 * BLOCK
    column_BW = start_B1 + torch.arange(BLOCK, device=p_BV.device)
    inside = p_BV.gather(1, column_BW.clamp(max=vocabulary - 1)) * (column_BW < vocabulary)
    before_B1 = torch.where(block_B1 > 0, upto_BK.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
    share_B1 = (target_B1 - before_B1) / (upto_BK.gather(1, block_B1) - before_B1)  # of the block's probability
    _, place_B1, _ = _search(inside, share_B1)
    return (start_B1 + place_B1)[:, 0]


def _search(p_BK: Tensor, share_B1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The running sums, the first place where they exceed the given share of the total, and that share of the total."""
    upto_BK = p_BK.cumsum(-1, dtype=torch.float64)
    target_B1 = share_B1 * upto_BK[:, -1:]
    # A share may round to 1, but the place must not be behind the last one that has any probability.
    last_B1 = (upto_BK < upto_BK[:, -1:]).sum(-1, keepdim=True)
    return upto_BK, torch.searchsorted(upto_BK, target_B1, right=True).minimum(last_B1), target_B1
