"""Divides the requests of a run on several ranks among their engines, and gives every rank all completions.

Each request has a random stream of its own, so its tokens do not depend on the rank that draws them. A vLLM server is
asked by the first rank alone; if it is lost, all ranks learn that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import numpy as np

from bridgelm import dist
from bridgelm.engine.base import Done, Engine, Lost, Origin, Request, Sampling
from bridgelm.ledger import Ledger
from bridgelm.types import Completion


class RankedEngine:
    def __init__(self, engine: Engine, served: bool = False) -> None:
        self.engine, self.exact, self.served = engine, engine.exact, served

    def generate(self, origin: Origin, requests: Sequence[Request], sampling: Sampling, ledger: Ledger | None = None,
                 done: Done | None = None) -> list[Completion]:
        spent = Ledger(0)
        mine = self._mine(requests)
        tell: Done | None = (lambda i, ids: done(mine[i], ids)) if done else None
        asked = [requests[i] for i in mine]
        found, tokens = self._all(len(requests), mine, spent,
                                  lambda: self.engine.generate(origin, asked, sampling, spent, tell))
        if ledger is not None:
            ledger.generate += tokens
        return found

    def start(self, origin: Origin, requests: Sequence[Request],
              sampling: Sampling) -> Callable[[], list[Completion]]:
        mine = self._mine(requests)
        waiting: Callable[[], list[Completion]] = list
        if self._asks():
            try:
                waiting = self.engine.start(origin, [requests[i] for i in mine], sampling)
            except Lost as error:
                waiting = partial(_raise, error)  # raised in the exchange, where the other ranks learn of it
        return lambda: self._all(len(requests), mine, Ledger(0), waiting)[0]

    def _all(self, count: int, mine: Sequence[int], spent: Ledger,
             make: Callable[[], list[Completion]]) -> tuple[list[Completion], int]:
        """The completions of all ranks, and the number of tokens that they cost."""
        parts: dict[str, np.ndarray] = {}
        made: list[Completion] = []
        try:
            made = make() if self._asks() else []
        except Lost as error:
            mine, parts = [], {"lost": np.frombuffer(str(error).encode(), np.uint8)}
        for i, completion in zip(mine, made, strict=True):
            parts |= {f"{i}/ids": completion.ids, f"{i}/raw": completion.raw_logps, f"{i}/logps": completion.logps,
                      f"{i}/finished": np.array(completion.finished)}
        found = dist.gather(parts | {f"spent/{dist.rank()}": np.array(spent.generate)})
        if "lost" in found:
            raise Lost(found["lost"].tobytes().decode())
        return [Completion(found[f"{i}/ids"], found[f"{i}/raw"], found[f"{i}/logps"], bool(found[f"{i}/finished"]))
                for i in range(count)], sum(int(found[f"spent/{rank}"]) for rank in range(dist.world()))

    def _asks(self) -> bool:
        """Whether this rank asks its engine, even for nothing: vLLM engines of several ranks must be opened
        together."""
        return dist.first() or not self.served

    def _mine(self, requests: Sequence[Request]) -> list[int]:
        if self.served:
            return list(range(len(requests))) if dist.first() else []
        numbers: dict[bytes, int] = {}  # equal prompts go to one rank, as an engine processes a prompt once
        which = [numbers.setdefault(r.prompt.astype(np.int64).tobytes(), len(numbers)) for r in requests]
        share = set(dist.share(len(numbers)))
        return [i for i, number in enumerate(which) if number in share]

    def sleep(self) -> None:
        self.engine.sleep()

    def close(self) -> None:
        self.engine.close()


def _raise(error: Lost) -> NoReturn:
    raise error
