"""The verifier of a run: one grader of answers and the user's reward functions, combined into rewards and verdicts.

reward  = 1 or 0 by the grader + the weighted sum of the functions (None is "no opinion" and adds nothing)
verdict = the grader's. With verifier = "none" the functions decide: correct if the reward is over half of the weight
          that had an opinion, so that functions of range [0, 1] are read as "more right than wrong".
A fault of the grader or of a function is an ERROR: counted and left out of its group, never scored as 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from bridgelm.config import plugins
from bridgelm.config.run_config import RewardConfig
from bridgelm.types import Grade, Problem, Verdict
from bridgelm.verify.decision import Decision
from bridgelm.verify.early import Judge as Early
from bridgelm.verify.functions import RewardFunction, load_function, said
from bridgelm.verify.grading import Task, build_judge


class Verifier(Protocol):
    """Grades each text as an answer to the problem at its side. It works from any thread; close it, or use `with`.

    `counts` are totals by kind (graded, correct, wrong, error, exhausted, ...); `last_error` describes a fault."""

    @property
    def counts(self) -> Counter[str]: ...
    @property
    def last_error(self) -> str: ...
    @property
    def early(self) -> Early | None: ...
    def grade(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Grade]: ...
    def close(self) -> None: ...
    def __enter__(self) -> Verifier: ...
    def __exit__(self, *exc: object) -> None: ...


class Judge(Protocol):
    """Says which answers are correct, without reward functions."""

    @property
    def counts(self) -> Counter[str]: ...
    def judged(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Decision]: ...
    def close(self) -> None: ...


def build_verifier(reward: RewardConfig) -> Verifier:
    """Loads the reward functions now, so that one that cannot be loaded is a UserError at once; worker processes start
    with the first answer."""
    functions = [load_function(spec) for spec in reward.functions]
    return Combined(build_grader(reward), functions, reward.weights or [1.0] * len(functions))


def build_grader(reward: RewardConfig) -> Judge | None:
    """The grader of answers alone, without reward functions."""
    if reward.verifier == "none":
        return None
    if plugins.is_own("verifier", reward.verifier):
        from bridgelm.verify.own import OwnJudge

        return OwnJudge(plugins.load("verifier", reward.verifier)(), reward.verifier)
    if reward.verifier == "toy":
        from bridgelm.verify.toy import ToyJudge

        return ToyJudge()
    task = Task(reward.verifier, tuple(reward.extract), reward.tolerance)
    return build_judge(task, reward.time_limit)  # pyright: ignore[reportReturnType]


class Combined:
    """The Verifier of every run: combines the grader with the reward functions."""

    def __init__(self, judge: Judge | None, functions: Sequence[RewardFunction], weights: Sequence[float]):
        self._judge, self._functions, self._weights = judge, functions, weights
        self.counts: Counter[str] = Counter()
        self.last_error = ""

    def grade(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Grade]:
        assert len(problems) == len(texts), "one problem for each text"
        if not problems:
            return []
        judged = self._judge.judged(problems, texts) if self._judge else None
        decisions: Sequence[Decision | None] = judged or [None] * len(texts)
        scores = [function(problems, texts) for function in self._functions]
        grades = [self._combine(decision and decision.verdict, [s[i] for s in scores])
                  for i, decision in enumerate(decisions)]
        self._count(grades)
        failed = next((i for i, grade in enumerate(grades) if grade.verdict is Verdict.ERROR), None)
        if failed is not None:
            self.last_error = self._fault(decisions[failed], [s[failed] for s in scores],
                                          said(problems[failed], texts[failed]))
        return grades

    def _fault(self, decision: Decision | None, scores: list[float | None], where: str) -> str:
        """Why a completion has no verdict."""
        if decision is not None and decision.verdict is Verdict.ERROR:
            return f"{decision.rule} ({where})"
        for function, score in zip(self._functions, scores, strict=True):
            if score is not None and math.isnan(score):
                return function.last_error
        if any(score is not None for score in scores):
            return f"the weighted sum of the rewards {scores} is no finite number ({where})"
        names = " and ".join(function.place for function in self._functions)
        return f"{names} returned None, which is no opinion, and reward.verifier = 'none' has none either ({where})"

    def _combine(self, verdict: Verdict | None, scores: list[float | None]) -> Grade:
        given = [(weight, score) for weight, score in zip(self._weights, scores, strict=True) if score is not None]
        reward = float(sum(weight * score for weight, score in given)) + (verdict is Verdict.CORRECT)
        if verdict is Verdict.ERROR or not math.isfinite(reward):  # a failed function scores nan
            return Grade(0.0, Verdict.ERROR)
        if verdict is None:
            if not given:  # nobody had an opinion
                return Grade(0.0, Verdict.ERROR)
            half = 0.5 * sum(weight for weight, _ in given if weight > 0)
            verdict = Verdict.CORRECT if reward > half else Verdict.WRONG
        return Grade(reward, verdict)

    def _count(self, grades: Sequence[Grade]) -> None:
        totals = Counter(self.counts)
        totals["graded"] += len(grades)
        totals.update(grade.verdict.value for grade in grades)
        if self._judge:
            totals.update({kind: n - totals[kind] for kind, n in self._judge.counts.items()})
        self.counts = totals

    @property
    def early(self) -> Early | None:
        """What judges an answer ahead of its batch (early.py); None where judging is fast anyway."""
        return getattr(self._judge, "remember", None)

    def close(self) -> None:
        if self._judge:
            self._judge.close()

    def __enter__(self) -> Combined:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
