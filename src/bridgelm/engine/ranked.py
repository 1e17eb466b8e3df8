"""An engine that several ranks share: each has its part of the requests answered, and all get all completions.

A request draws from a stream of its own, so its tokens do not depend on who answers it. Of a server, which all of them
would ask, only the first rank asks; that it was lost is an answer too, on all of them.
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
                waiting = partial(_raise, error)  # where the others can hear of it
        return lambda: self._all(len(requests), mine, Ledger(0), waiting)[0]

    def _all(self, count: int, mine: Sequence[int], spent: Ledger,
             make: Callable[[], list[Completion]]) -> tuple[list[Completion], int]:
        """Everybody's completions, and the tokens that all of them took."""
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
        """Also with nothing to ask: engines of several ranks may only be opened together."""
        return dist.first() or not self.served

    def _mine(self, requests: Sequence[Request]) -> list[int]:
        if self.served:
            return list(range(len(requests))) if dist.first() else []
        numbers: dict[bytes, int] = {}  # equal prompts stay together, as an engine reads one once
        which = [numbers.setdefault(r.prompt.astype(np.int64).tobytes(), len(numbers)) for r in requests]
        share = set(dist.share(len(numbers)))
        return [i for i, number in enumerate(which) if number in share]

    def sleep(self) -> None:
        self.engine.sleep()

    def close(self) -> None:
        self.engine.close()


def _raise(error: Lost) -> NoReturn:
    raise error
