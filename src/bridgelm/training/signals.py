"""Ctrl-C and SIGTERM: the first lets the step end, saves and stops; the second stops at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from bridgelm.runs.progress import Progress


class Interrupted(KeyboardInterrupt):
    """Training was stopped; `path` is the run folder to go on with."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


class Stoppable(Protocol):
    stop: bool
    display: Progress

    @property
    def path(self) -> Path: ...


@contextmanager
def stoppable(session: Stoppable) -> Iterator[None]:
    """Ctrl-C (or SIGTERM) lets the step end, saves and stops; a second one stops at once, and a resumed run goes on
    from the last checkpoint."""
    def handler(number: int, frame: Any) -> None:
        if session.stop:
            raise Interrupted(session.path)
        session.stop = True
        session.display.say("stopping after this step; once more to stop at once")

    try:
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # only the main thread may handle signals
        before = {}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
