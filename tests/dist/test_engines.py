"""Engines that several ranks share: who asks, and what all of them get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridgelm import dist
from bridgelm.engine.base import Origin, Request, Sampling, spent
from bridgelm.engine.ranked import RankedEngine
from bridgelm.ledger import Ledger
from bridgelm.types import Completion

from .ranks import on_ranks


class Echo:
    """Answers with the prompt, and remembers how often it was asked for how many."""

    exact = False

    def __init__(self) -> None:
        self.asked: list[int] = []

    def generate(self, origin: Origin, requests: Sequence[Request], sampling: Sampling, ledger: Ledger | None = None,
                 done: Any = None) -> list[Completion]:
        found = self.start(origin, requests, sampling)()
        if ledger is not None:
            ledger.generate += spent(requests, found)
        return found

    def start(self, origin: Origin, requests: Sequence[Request],
              sampling: Sampling) -> Callable[[], list[Completion]]:
        self.asked.append(len(requests))
        found = [Completion(r.prompt, r.prompt / 2, r.prompt / 4, True) for r in requests]
        return lambda: found

    def sleep(self) -> None: ...
    def close(self) -> None: ...


@pytest.mark.parametrize(("served", "asked"), [(True, [[3, 1], []]), (False, [[2, 1], [1, 0]])])
def test_who_asks(tmp_path: Path, served: bool, asked: list[list[int]]) -> None:
    """The first rank alone asks a server; else each asks, though it has nothing to ask for, as opening may be joint."""
    def work() -> Any:
        echo, ledger = Echo(), Ledger(1)
        engine = RankedEngine(echo, served)
        requests = [Request(np.arange(1, n)) for n in (3, 5, 3)]
        found = engine.generate(Origin(None), requests, Sampling(4), ledger)
        found += engine.start(Origin(None), requests[:1], Sampling(4))()
        return {"ids": [c.ids.tolist() for c in found], "logps": [c.logps.tolist() for c in found],
                "spent": ledger.generate, "asked": echo.asked, "rank": dist.rank()}
    ranks = on_ranks(2, work, tmp_path)
    for found in ranks:
        assert found["ids"] == [[1, 2], [1, 2, 3, 4], [1, 2], [1, 2]]
        assert found["logps"] == [[i / 4 for i in ids] for ids in found["ids"]]
        assert found["spent"] == 2 + 4 + 2 + 4 + 2
    assert [found["asked"] for found in ranks] == asked
