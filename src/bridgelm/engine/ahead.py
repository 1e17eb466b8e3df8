"""Answers that are drawn one step ahead (`rollout.ahead`): requests under way, and their results in a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bridgelm.engine.base import Request, Sampling
from bridgelm.types import Completion


class Rehearsed(Exception):
    """Ends a rehearsal of a method's `gather` where it draws, once its answers have been asked for."""


class Pending:
    """Completions under way, with a digest of the requests that they answer."""

    def __init__(self, asked: str, take: Callable[[], list[Completion]]) -> None:
        self.asked, self.take = asked, take

    @classmethod
    def of(cls, requests: Sequence[Request], sampling: Sampling, take: Callable[[], list[Completion]]) -> Pending:
        return cls(_digest(requests, sampling), take)

    def answers(self, requests: Sequence[Request], sampling: Sampling) -> bool:
        return self.asked == _digest(requests, sampling)

    def state(self) -> dict[str, Any]:
        """Waits for the completions and returns them for a checkpoint: when a run resumes, the weights that drew them
        are gone."""
        return {"asked": self.asked, "completions": [
            [c.ids.tolist(), c.raw_logps.tolist(), c.logps.tolist(), c.finished] for c in self.take()]}

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> Pending:
        found = [Completion(np.array(ids, dtype=np.int64), np.array(raw, dtype=np.float64),
                            np.array(logps, dtype=np.float64), finished)
                 for ids, raw, logps, finished in state["completions"]]
        return cls(state["asked"], lambda: found)


def _digest(requests: Sequence[Request], sampling: Sampling) -> str:
    asked = [(r.prompt.tolist(), r.seed, r.room) for r in requests]
    return hashlib.sha256(repr((asked, sampling)).encode()).hexdigest()
