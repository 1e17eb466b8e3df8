"""The teacher: a second, frozen model that gives log-probs for the tokens of rollouts and demonstrations.

It is loaded when it is first used, scores whole rows without gradients, and is not in checkpoints. Its log-probs of
demonstrations do not change during a run and are cached on disk (`teacher_cache.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bridgelm import dist
from bridgelm.config.run_config import ModelConfig, RunConfig
from bridgelm.data.chat import Chat
from bridgelm.ledger import Ledger
from bridgelm.model import batching
from bridgelm.model.forward import forward
from bridgelm.model.loading import load_model
from bridgelm.model.packing import packs
from bridgelm.rollout.teacher_cache import Cache, fingerprint, key_of
from bridgelm.rollout.teacher_ids import Reader, teacher_model
from bridgelm.types import Row

IMPOSSIBLE = -1e4  # a log-prob that stands for minus infinity


class Teacher:
    def __init__(self, config: ModelConfig, reader: Reader, micro_tokens: int) -> None:
        self.config, self.reader, self.micro_tokens = config, reader, micro_tokens
        self.ledger, self.cache = Ledger(0), Cache(None)
        self._model: Any = None
        self._name: str | None = None

    @classmethod
    def of(cls, config: RunConfig, chat: Chat) -> Teacher | None:
        """The teacher of a run, if it has one."""
        if config.teacher is None:
            return None
        return cls(teacher_model(config), Reader.of(config, chat), config.batch.micro_tokens)

    def keep(self, folder: Path, step: int) -> None:
        """Sets the folder of the cache, for a run that starts or resumes at `step`."""
        if dist.first():
            self.cache = Cache(folder, step)

    @property
    def model(self) -> Any:
        if self._model is None:
            self._model = load_model(self.config).requires_grad_(False)
            self.ledger.teacher_parameters = sum(p.numel() for p in self._model.parameters())
        return self._model

    def close(self) -> None:
        """Frees its memory; it is loaded again when it is used again."""
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.no_grad()
    def score(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Log-probs of each row's tokens after the teacher's own prompt, at the row's temperature, so that a teacher
        equal to the policy gives the same. NaN on tokens that the teacher does not know."""
        shown = [self.reader.shown(row) for row in rows]
        mine = [Row(s.ids, s.taught, row.kind, row.problem, temperature=row.temperature)
                for row, s in zip(rows, shown, strict=True)]
        said: dict[int, np.ndarray] = {}
        first = next(self.model.parameters())
        wide = torch.float64 if first.dtype == torch.float64 else torch.float32
        silent = {i for i, s in enumerate(shown) if not s.taught.any()}
        for indices, chosen in batching.micros_of_rank(mine, self.micro_tokens, silent, packs(self.model)):
            micro = batching.collate(chosen, wide, first.device, {})
            logps_BT = forward(self.model, micro).logp_BT.clamp(min=IMPOSSIBLE).cpu().numpy()
            if np.isnan(logps_BT).any():
                raise FloatingPointError("the teacher's logits are not finite")
            for b, i in enumerate(indices):
                said[i] = self.reader.placed(rows[i], shown[i], logps_BT[b, :len(shown[i].ids)])
        self.ledger.teacher += sum(len(row.ids) for i, row in enumerate(mine) if i not in silent)
        said = batching.exchange({"said": said})["said"]
        return [said[i] if i in said else np.full(len(row.ids), np.nan) for i, row in enumerate(rows)]

    def remembered(self, rows: Sequence[Row], step: int) -> list[np.ndarray]:
        """The same as `score`, from the cache where possible."""
        if self._name is None:
            self._name = fingerprint(self.config)
        keys = [key_of(self._name, s.ids, s.taught, row.temperature)
                for row, s in ((row, self.reader.shown(row)) for row in rows)]
        found = dist.gather(self.cache.get(keys) if dist.first() else {})
        missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in found}
        if missing:
            said = dict(zip(missing, self.score(list(missing.values())), strict=True))
            wide = np.float64 if self.config.dtype == "float64" else np.float32  # the dtype that they were computed in
            new = {key: logps[missing[key].own].astype(wide) for key, logps in said.items()}
            if dist.first():
                self.cache.put(step, new)
            found |= new
        return [_spread(row, found[key]) for row, key in zip(rows, keys, strict=True)]


def _spread(row: Row, values: np.ndarray) -> np.ndarray:
    out = np.full(len(row.ids), np.nan)
    out[row.own] = values
    return out


def with_logps(rows: Sequence[Row], logps: Sequence[np.ndarray]) -> list[Row]:
    return [replace(row, teacher_logps=found) for row, found in zip(rows, logps, strict=True)]
