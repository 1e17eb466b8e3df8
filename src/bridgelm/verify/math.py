"""Mathematical equality, by math-verify in killable workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bridgelm.types import Problem, Verdict
from bridgelm.verify.extract import anchored, boxed, delimited, last_maths, outside_think
from bridgelm.verify.pool import Outcome, Pool

MEMORY_MB = 2048


def prediction(text: str) -> str | None:
    """The answer of a completion: its last box, else what follows "the answer is", else its last expression."""
    text = outside_think(text)
    found = boxed(text)
    if found is not None:
        return found
    found = anchored(text)
    if found is None:
        return last_maths(text)
    # Several expressions count together: "$3$ or $5$" is an answer of two values and not a free choice.
    return ", ".join(delimited(found)) or found


class MathJudge:
    def __init__(self, cpu_seconds: float = 1.0, workers: int | None = None):
        self._pool = Pool("bridgelm.verify.math_worker:compare", cpu_seconds, MEMORY_MB, workers)

    @property
    def counts(self) -> Counter[str]:
        return Counter({"exhausted": self._pool.counts["exhausted"], "cached": self._pool.counts["cached"]})

    @property
    def last_error(self) -> str:
        return self._pool.last_error

    def verdicts(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
        """A completion without an answer is wrong and needs no worker."""
        verdicts = [Verdict.WRONG] * len(texts)
        tasks: dict[int, dict[str, str]] = {}
        for i, (problem, text) in enumerate(zip(problems, texts, strict=True)):
            found = prediction(text)
            if found is not None:
                tasks[i] = {"gold": problem.answer or "", "prediction": found}
        for i, outcome in zip(tasks, self._pool.run(list(tasks.values())), strict=True):
            verdicts[i] = verdict_of(outcome)
        return verdicts

    def close(self) -> None:
        self._pool.close()


def verdict_of(outcome: Outcome) -> Verdict:
    """Running out of time or memory against a good gold is wrong: hanging the grader must not pay."""
    if outcome.error:
        return Verdict.ERROR
    return Verdict.CORRECT if outcome.result and not outcome.exhausted else Verdict.WRONG
