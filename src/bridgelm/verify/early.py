"""Judges finished answers in a thread while others are still being written. What is judged is in the judge's cache, so
that grading the whole batch afterwards, in order and with everything that depends on the batch, finds it done."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from bridgelm.errors import UserError
from bridgelm.types import Problem

Judge = Callable[[Sequence[Problem], Sequence[str]], None]


class Early:
    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._waiting: queue.SimpleQueue[tuple[Problem, Callable[[], str]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._stop = False

    def add(self, problem: Problem, text: Callable[[], str]) -> None:
        """`text` is made in the thread."""
        self._waiting.put((problem, text))

    def __enter__(self) -> Early:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Waits for what is being judged now; the rest is left to the whole batch."""
        self._stop = True
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while not self._stop and (first := self._waiting.get()) is not None:
            batch = [first]
            with suppress(queue.Empty):
                while (another := self._waiting.get_nowait()) is not None:
                    batch.append(another)
                self._stop = True
            with suppress(UserError):  # the whole batch will meet it too
                self._judge([problem for problem, _ in batch], [text() for _, text in batch])
