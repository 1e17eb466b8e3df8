"""What a rollout engine is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from bridgelm.errors import UserError
from bridgelm.ledger import Ledger
from bridgelm.types import Completion


@dataclass(frozen=True)
class Request:
    prompt: np.ndarray
    seed: tuple[int, ...] = (0,)
    room: int | None = None  # its own limit of new tokens, under the sampling's


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy. No top-p and no top-k: their truncated log-probs would not be the policy's."""

    max_new_tokens: int
    temperature: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Origin:
    """The weights to draw from: a model that holds them, merged, while the engine is at work."""

    model: Any
    version: tuple[int, int] | None = None  # equal for equal weights; None: unknown, an engine of its own copies them
    adapter: Mapping[str, tuple[Tensor, Tensor]] | None = None  # (A, B) that make them out of the model as it was read


class Lost(UserError):
    """The engine is another program, and its answers do not come or cannot be used, or the run was told to stop while
    it waited for them."""


@dataclass(frozen=True)
class Caller:
    """The run, as an engine sees it that waits for another program."""

    stopping: Callable[[], bool] = lambda: False  # whether it was told to stop
    say: Callable[[str], None] = lambda text: None


Done = Callable[[int, np.ndarray], None]  # the number of a request, and the ids of its completion


class Engine(Protocol):
    exact: bool  # whether its log-probs are the trainer's own

    def generate(self, origin: Origin, requests: Sequence[Request], sampling: Sampling, ledger: Ledger | None = None,
                 done: Done | None = None) -> list[Completion]:
        """A completion a request, in order. An engine that knows early which are done says so while it goes on."""
        ...

    def start(self, origin: Origin, requests: Sequence[Request],
              sampling: Sampling) -> Callable[[], list[Completion]]:
        """Takes up the weights as they are now; what it gives waits for the completions. An engine with a device of its
        own works in between."""
        ...

    def sleep(self) -> None:
        """Gives its memory to the trainer; it wakes by itself when it is asked for completions."""
        ...

    def close(self) -> None: ...


def spent(requests: Sequence[Request], completions: Sequence[Completion]) -> int:
    """Tokens for the ledger: every distinct prompt once, and what was drawn."""
    return sum(len(p) for p in {tuple(r.prompt.tolist()) for r in requests}) + sum(len(c.ids) for c in completions)


def stopped(ids: Sequence[int], stop: tuple[str, ...], text: Callable[[Any], str]) -> bool:
    """Whether an answer ends with a stop string."""
    # One may begin inside an earlier token, and a token may be one byte of a character: look at a tail that is sure to
    # hold it.
    return any(s in text(np.array(ids[-len(s.encode()) - 8:])) for s in stop)
