"""The `math` verifier: finds the answer in a gold, which may be a whole solution, and in a completion; decides easy
comparisons at once, and has killable workers decide the others."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from bridgelm.types import Problem, Verdict
from bridgelm.verify.decision import Decision
from bridgelm.verify.extract import RULES, Rule, find, is_prose
from bridgelm.verify.math.number import exact
from bridgelm.verify.pool import Outcome, Pool

MEMORY_MB = 2048
SHORT = 60  # characters of the longest answer that is decided without a worker


class MathJudge:
    def __init__(self, cpu_seconds: float = 1.0, workers: int | None = None, extract: Sequence[Rule] = RULES,
                 tolerance: float = 0.0):
        self._pool = Pool("bridgelm.verify.math.comparison:compare", cpu_seconds, MEMORY_MB, workers)
        self._extract, self._tolerance = tuple(extract), tolerance
        self._glance = 0

    @property
    def counts(self) -> Counter[str]:
        counts = self._pool.counts
        return Counter({"exhausted": counts["exhausted"], "cached": counts["cached"], "at_a_glance": self._glance})

    def judged(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Decision]:
        return self.decide([problem.answer or "" for problem in problems], texts)

    def decide(self, golds: Sequence[str], texts: Sequence[str]) -> list[Decision]:
        """Decides each pair; a completion without an answer is wrong and needs no worker."""
        found: list[Decision | None] = []
        tasks: dict[int, dict[str, str]] = {}
        for i, (gold, text) in enumerate(zip(golds, texts, strict=True)):
            start = time.thread_time()
            decision, task = self._glanced(gold, text)
            if decision is None:
                tasks[i] = task
            found.append(decision and decision.timed(time.thread_time() - start))
        self._glance += len(texts) - len(tasks)
        for i, outcome in zip(tasks, self._pool.run(list(tasks.values())), strict=True):
            found[i] = decision_of(outcome, tasks[i]["prediction"], tasks[i]["how"])
        return [decision for decision in found if decision is not None]

    def remember(self, problems: Sequence[Problem], texts: Sequence[str]) -> None:
        """Compares ahead of time what will be asked for later. Only comparisons that need a worker are kept, by the
        pool."""
        glanced = [self._glanced(problem.answer or "", text) for problem, text in zip(problems, texts, strict=True)]
        self._pool.remember([task for decision, task in glanced if decision is None])

    def _glanced(self, gold: str, text: str) -> tuple[Decision | None, dict[str, str]]:
        """The decision, where it is easy; else the task for a worker."""
        answer, how = find(text, self._extract)
        gold = gold_answer(gold)
        task = {"gold": gold, "prediction": answer or "", "how": how}
        return at_a_glance(gold, answer, how), task | ({"tolerance": repr(self._tolerance)} if self._tolerance else {})

    def close(self) -> None:
        self._pool.close()


def gold_answer(gold: str) -> str:
    """The answer in a gold, which may itself be a whole solution with a box, cut off or not, or with ####."""
    long = len(gold) > 80 or "\n" in gold.strip()
    rules: Sequence[Rule] = ("tags", "boxed", "hashes", "phrase", "bare") if long else ("boxed", "hashes")
    answer, _ = find(gold, rules, cut=False)
    return gold if answer is None else answer


def at_a_glance(gold: str, answer: str | None, how: str) -> Decision | None:
    """Decides the easy cases: missing answers, golds that nothing can equal, plain numbers and equal strings."""
    if not gold.strip():
        return Decision(Verdict.ERROR, answer, how, "the gold answer is empty")
    if "\n" in gold.strip() and is_prose(gold):
        return Decision(Verdict.ERROR, answer, how, "the gold answer is a text of several lines without a \\boxed{}, a "
                                                    "#### or an \"answer is\" that says where its answer stands")
    if answer is None or not answer.strip():
        return Decision(Verdict.WRONG, answer, how, "no answer")
    if len(gold) > SHORT or len(answer) > SHORT:
        return None
    left, right = gold.strip().strip("$"), answer.strip().strip("$")
    if left and left == right:
        return Decision(Verdict.CORRECT, answer, how, "same text")
    a, b = exact(left), exact(right)
    if a is not None and b is not None and "." not in left + right:
        return Decision(Verdict.CORRECT if a == b else Verdict.WRONG, answer, how, "number")
    return None


def decision_of(outcome: Outcome, answer: str, how: str) -> Decision:
    """The decision on a worker's outcome. If time or memory runs out against a good gold, the answer is wrong: hanging
    the grader must not pay."""
    if outcome.error:
        return Decision(Verdict.ERROR, answer, how, outcome.error, outcome.ms)
    if outcome.exhausted:
        return Decision(Verdict.WRONG, answer, how, "out of time or memory", outcome.ms)
    equal, rule = outcome.result
    return Decision(Verdict.CORRECT if equal else Verdict.WRONG, answer, how, rule, outcome.ms)
