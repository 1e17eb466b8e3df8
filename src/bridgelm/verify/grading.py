"""Grading outside a run (`bridgelm grade`): pairs of gold answer and prediction, each optionally with its own task."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from bridgelm.errors import UserError
from bridgelm.types import Verdict
from bridgelm.verify.decision import Decision
from bridgelm.verify.extract import RULES, Rule

VERIFIERS = ("math", "countdown", "knights", "exact", "regex")
CHUNK = 512


@dataclass(frozen=True)
class Task:
    """How answers are found and compared. A tolerance is relative to the gold number; 0 is exact."""

    verifier: str = "math"
    extract: tuple[Rule, ...] = RULES
    tolerance: float = 0.0

    def changed(self, given: Any) -> Task:
        """This task with the changes of a line's `task`: the name of a verifier, or an object with some of our
        fields."""
        if given is None:
            return self
        if isinstance(given, str):
            given = {"verifier": given}
        if not isinstance(given, Mapping) or (unknown := set(given) - {"verifier", "extract", "tolerance"}):
            raise UserError(f"task: {given!r}: write a verifier's name, or an object of verifier, extract, tolerance"
                            if not isinstance(given, Mapping) else f"task: unknown key {sorted(unknown)[0]!r}; known: "
                            "verifier, extract, tolerance")
        fields = dict(given)
        if "extract" in fields:
            rules = fields["extract"]
            fields["extract"] = tuple(rules.split(",") if isinstance(rules, str) else rules)
        return checked(replace(self, **fields))


def checked(task: Task) -> Task:
    if task.verifier not in VERIFIERS:
        raise UserError(f"task: no verifier {task.verifier!r}; choose from {', '.join(VERIFIERS)}")
    for rule in task.extract:
        if rule not in RULES:
            raise UserError(f"extract: no rule {rule!r}; choose from {', '.join(RULES)}")
    if not isinstance(task.tolerance, int | float) or not 0 <= task.tolerance < 1:
        raise UserError(f"tolerance: {task.tolerance!r} is not a number from 0 up to 1")
    return task


class Judge(Protocol):
    def decide(self, golds: Sequence[str], texts: Sequence[str]) -> list[Decision]: ...
    def close(self) -> None: ...


def build_judge(task: Task, time_limit: float = 1.0, workers: int | None = None) -> Judge:
    if task.verifier == "math":
        from bridgelm.verify.math.grader import MathJudge

        return MathJudge(time_limit, workers, task.extract, task.tolerance)
    if task.verifier in {"countdown", "knights"}:
        from bridgelm.verify import puzzles

        return puzzles.PuzzleJudge(getattr(puzzles, task.verifier))
    from bridgelm.verify.exact import ExactJudge, RegexJudge

    return RegexJudge(time_limit, workers) if task.verifier == "regex" else ExactJudge()


class Grader:
    """Grades lines of JSON, with one judge for each different task among them."""

    def __init__(self, task: Task | None = None, time_limit: float = 1.0, workers: int | None = None):
        self._task = task or Task()
        self._judges: dict[Task, Judge] = {}
        self._limits = (time_limit, workers)

    def grade_lines(self, lines: Iterable[str]) -> Iterator[Decision]:
        """Yields one Decision for each line of JSON, in order. A line that cannot be read gets a verdict of ERROR."""
        chunk: list[str] = []
        for line in lines:
            if line.strip():
                chunk.append(line)
            if len(chunk) == CHUNK:
                yield from self._chunk(chunk)
                chunk = []
        yield from self._chunk(chunk)

    def _chunk(self, lines: list[str]) -> list[Decision]:
        found: list[Decision | None] = [None] * len(lines)
        by_task: dict[Task, list[tuple[int, str, str]]] = {}
        for i, line in enumerate(lines):
            try:
                task, gold, prediction = self._read(line)
            except (ValueError, UserError) as error:
                found[i] = Decision(Verdict.ERROR, None, "none", f"this line is no task: {error}")
                continue
            by_task.setdefault(task, []).append((i, gold, prediction))
        for task, rows in by_task.items():
            if task not in self._judges:
                self._judges[task] = build_judge(task, *self._limits)
            decisions = self._judges[task].decide([gold for _, gold, _ in rows], [text for _, _, text in rows])
            for (i, _, _), decision in zip(rows, decisions, strict=True):
                found[i] = decision
        return [decision for decision in found if decision is not None]

    def _read(self, line: str) -> tuple[Task, str, str]:
        row = json.loads(line)
        if not isinstance(row, dict) or not {"gold", "prediction"} <= row.keys():
            raise ValueError("it needs the fields gold and prediction")
        return self._task.changed(row.get("task")), as_text(row["gold"]), as_text(row["prediction"])

    def close(self) -> None:
        for judge in self._judges.values():
            judge.close()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)
