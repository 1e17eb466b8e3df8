"""Judges finished answers in a thread while other answers are still being generated.

The results go into the judge's cache. The whole batch is graded afterwards, in order and with everything that depends
on the batch, and finds them there."""

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
        """Queues an answer; `text` is called in the thread, so that decoding it costs the caller nothing."""
        self._waiting.put((problem, text))

    def __enter__(self) -> Early:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Waits for the answer that is being judged now; those still queued are left to the grading of the batch."""
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
            with suppress(UserError):  # grading the batch will raise it again
                self._judge([problem for problem, _ in batch], [text() for _, text in batch])
