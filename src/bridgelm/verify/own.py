"""A verifier of one's own: a class without arguments that has `grade(problem, text)`, which says True or False.

    class Palindrome:
        def grade(self, problem: Problem, text: str) -> bool:
            return text == text[::-1]

It runs in the run's own process. Whatever it raises, sys.exit() included, is a fault of the answer: counted, left out
of its group, and never scored as wrong.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bridgelm.types import Problem, Verdict
from bridgelm.verify.decision import Decision
from bridgelm.verify.functions import Prints, short


class OwnJudge:
    def __init__(self, verifier: Any, name: str) -> None:
        self._verifier, self._place = verifier, f"verifier {name}"
        self.counts: Counter[str] = Counter()

    def judged(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Decision]:
        with contextlib.redirect_stdout(Prints(sys.stdout, self._place)):  # type: ignore[type-var]
            return [self._judge(problem, text) for problem, text in zip(problems, texts, strict=True)]

    def _judge(self, problem: Problem, text: str) -> Decision:
        try:
            said = self._verifier.grade(problem, text)
            # Of NumPy too; a number is a reward and no verdict.
            if type(said).__name__ not in ("bool", "bool_"):
                raise TypeError(f"it returned {short(repr(said))} ({type(said).__name__}), not True or False")
        except (Exception, SystemExit) as error:  # user code may raise anything; the run stops above a set rate
            return Decision(Verdict.ERROR, None, "", f"{self._place}: {type(error).__name__}: {error}")
        return Decision(Verdict.CORRECT if said else Verdict.WRONG, text, "all of it", self._place)

    def close(self) -> None:
        close = getattr(self._verifier, "close", None)
        if close is not None:
            close()
