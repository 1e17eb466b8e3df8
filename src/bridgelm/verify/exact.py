"""Equality of normalised strings: for answers that are words, letters or plain numbers."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

from bridgelm.types import Problem, Verdict
from bridgelm.verify.extract import anchored, boxed, last_line, outside_think


def normalise(text: str) -> str:
    """Unicode form, case, white space, surrounding $ and the closing full stop do not count."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip("$* ").rstrip(". ")


def prediction(text: str) -> str | None:
    """The last boxed answer, else what follows "the answer is", else the last line."""
    text = outside_think(text)
    return next((found for find in (boxed, anchored, last_line) if (found := find(text)) is not None), None)


class ExactJudge:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.last_error = ""

    def verdicts(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
        return [self._verdict(problem, text) for problem, text in zip(problems, texts, strict=True)]

    def _verdict(self, problem: Problem, text: str) -> Verdict:
        gold = normalise(problem.answer or "")
        if not gold:
            self.last_error = f"problem {problem.id!r} has no answer to compare with"
            return Verdict.ERROR
        found = prediction(text)
        return Verdict.CORRECT if found is not None and normalise(found) == gold else Verdict.WRONG

    def close(self) -> None:
        """Nothing to close."""
