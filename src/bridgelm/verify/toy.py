"""The embedded task's own exact verifier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bridgelm.types import Problem, Verdict


class ToyJudge:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.last_error = ""

    def verdicts(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
        from bridgelm import toy

        return [Verdict.CORRECT if toy.grade(p, t) else Verdict.WRONG for p, t in zip(problems, texts, strict=True)]

    def close(self) -> None:
        """Nothing to close."""
