"""The `exact` and `regex` verifiers, for answers that are words, letters or codes."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from bridgelm.types import Problem, Verdict
from bridgelm.verify.decision import Decision
from bridgelm.verify.extract import anchored, boxed, hashes, last_line, outside_think, tagged
from bridgelm.verify.pool import Pool


def normalise(text: str) -> str:
    """The text without what does not count: Unicode form, case, white space, surrounding $, and a closing full stop."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip("$* ").rstrip(". ")


FINDERS = {"tags": tagged, "boxed": boxed, "hashes": hashes, "phrase": anchored, "last line": last_line}


def prediction(text: str) -> tuple[str | None, str]:
    """The answer and the rule that found it: the content of <answer> tags, else the last box, else what stands behind
    ####, else what follows "the answer is", else the last line."""
    text = outside_think(text)
    for how, find in FINDERS.items():
        if (found := find(text)) is not None:
            return found, how
    return None, "none"


class ExactJudge:
    """The answer is correct if it equals the gold after normalisation."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def judged(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Decision]:
        return self.decide([problem.answer or "" for problem in problems], texts)

    def decide(self, golds: Sequence[str], texts: Sequence[str]) -> list[Decision]:
        return [self._decision(gold, text) for gold, text in zip(golds, texts, strict=True)]

    def _decision(self, gold: str, text: str) -> Decision:
        found, how = prediction(text)
        if not (gold := normalise(hashes(gold) or gold)):
            return Decision(Verdict.ERROR, found, how, "the gold answer is empty")
        same = found is not None and normalise(found) == gold
        return Decision(Verdict.CORRECT if same else Verdict.WRONG, found, how, "same words" if same else "other words")

    def close(self) -> None:
        """Nothing to close."""


def matches(task: dict[str, str], gold_is_good: Callable[[], None]) -> bool:
    """Runs in a worker process, so that an expression that backtracks for ever is ended at the time limit."""
    pattern = re.compile(task["gold"])
    gold_is_good()
    return pattern.fullmatch(task["prediction"].strip()) is not None


class RegexJudge:
    """The gold is a regular expression, and an answer is correct if all of it matches."""

    def __init__(self, cpu_seconds: float = 1.0, workers: int | None = None):
        self._pool = Pool("bridgelm.verify.exact:matches", cpu_seconds, size=workers)

    @property
    def counts(self) -> Counter[str]:
        return Counter({"exhausted": self._pool.counts["exhausted"], "cached": self._pool.counts["cached"]})

    def judged(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Decision]:
        return self.decide([problem.answer or "" for problem in problems], texts)

    def decide(self, golds: Sequence[str], texts: Sequence[str]) -> list[Decision]:
        found = [prediction(text) for text in texts]
        tasks = [{"gold": gold, "prediction": answer or ""} for gold, (answer, _) in zip(golds, found, strict=True)]
        return [Decision(Verdict.ERROR if out.error else Verdict.CORRECT if out.result else Verdict.WRONG, answer, how,
                         out.error or ("out of time or memory" if out.exhausted else "pattern"), out.ms)
                for out, (answer, how) in zip(self._pool.run(tasks), found, strict=True)]

    def close(self) -> None:
        self._pool.close()
