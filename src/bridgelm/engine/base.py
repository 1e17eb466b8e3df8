"""The interface of rollout engines: requests, sampling settings, the weights to draw from, and the Engine protocol."""

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
    room: int | None = None  # a limit of new tokens for this request, if below that of the sampling


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy. There is no top-p or top-k, as truncated log-probs would not be those of the policy."""

    max_new_tokens: int
    temperature: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Origin:
    """The weights to draw from: a model that holds them, merged, while the engine works."""

    model: Any
    # Equal for equal weights; if None, an engine with weights of its own copies them each time.
    version: tuple[int, int] | None = None
    # The low-rank (A, B) that turn the model as loaded into these weights.
    adapter: Mapping[str, tuple[Tensor, Tensor]] | None = None


class Lost(UserError):
    """An engine in another program gave no answers or unusable ones, or the run was told to stop while it waited."""


@dataclass(frozen=True)
class Caller:
    """What an engine that waits for another program can ask of the run, and tell it."""

    stopping: Callable[[], bool] = lambda: False  # whether the run was told to stop
    say: Callable[[str], None] = lambda text: None


Done = Callable[[int, np.ndarray], None]  # the number of a request, and the ids of its completion


class Engine(Protocol):
    """What draws answers. An engine of your own derives from it, is made as `Class(config, chat)`, and needs no more
    than `generate`."""

    exact: bool = False  # whether its log-probs are those of the trainer

    def generate(self, origin: Origin, requests: Sequence[Request], sampling: Sampling, ledger: Ledger | None = None,
                 done: Done | None = None) -> list[Completion]:
        """Returns one completion per request, in order. An engine that knows when a completion is finished calls
        `done`."""
        ...

    def start(self, origin: Origin, requests: Sequence[Request],
              sampling: Sampling) -> Callable[[], list[Completion]]:
        """Starts to draw with the weights as they are now, and returns a function that waits for the completions. An
        engine with a device of its own works in the meantime."""
        completions = self.generate(origin, requests, sampling)
        return lambda: completions

    def sleep(self) -> None:
        """Frees the memory of the device for the trainer; the next request wakes the engine."""

    def close(self) -> None:
        """Ends the engine with the run."""


def spent(requests: Sequence[Request], completions: Sequence[Completion]) -> int:
    """The tokens that the ledger counts: every distinct prompt once, and all drawn tokens."""
    return sum(len(p) for p in {tuple(r.prompt.tolist()) for r in requests}) + sum(len(c.ids) for c in completions)


def stopped(ids: Sequence[int], stop: tuple[str, ...], text: Callable[[Any], str]) -> bool:
    """Whether an answer ends with a stop string."""
    # A stop string may begin inside a token, and a token may be one byte of a character, so the tail that is searched
    # is long enough for both.
    return any(s in text(np.array(ids[-len(s.encode()) - 8:])) for s in stop)
