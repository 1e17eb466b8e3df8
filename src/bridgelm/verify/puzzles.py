"""The `countdown` and `knights` verifiers: the answer in <answer> tags is checked against the puzzle itself.

`gold` is the row's `ground_truth` as JSON. Countdown: {"numbers": [...], "target": n}; any expression is right that
uses each number once and has exactly the value of the target. Knights and knaves: {"names": [...], "solution": [true,
...]}, or "statements" to solve; every name must be called a knight or a knave once. """

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import product
from typing import Any

from bridgelm.types import Problem, Verdict
from bridgelm.verify.decision import Decision
from bridgelm.verify.extract import find

LONGEST = 400
DEEPEST = 40
TOKEN = re.compile(r"\s*(\d+|[-+*/()])")
SAID = re.compile(r"\b(knight|knave)s?\b", re.IGNORECASE)
Checked = tuple[bool, str]


class PuzzleJudge:
    """Checks one of the two puzzles, in this process, as both checks are linear in the length of the answer."""

    def __init__(self, check: Callable[[Any, str], Checked]) -> None:
        self._check = check
        self.counts: Counter[str] = Counter()

    def judged(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Decision]:
        return self.decide([ground_truth(problem) for problem in problems], texts)

    def decide(self, golds: Sequence[str], texts: Sequence[str]) -> list[Decision]:
        return [self._decision(gold, text) for gold, text in zip(golds, texts, strict=True)]

    def _decision(self, gold: str, text: str) -> Decision:
        answer, how = find(text, ("tags",))
        try:
            truth = json.loads(gold)
            right, rule = self._check(truth, answer) if answer is not None else (False, "no answer")
        except (ValueError, KeyError, TypeError, SyntaxError) as error:
            fault = f"the ground truth {gold[:80]!r} cannot be read: {type(error).__name__}: {error}"
            return Decision(Verdict.ERROR, answer, how, fault)
        return Decision(Verdict.CORRECT if right else Verdict.WRONG, answer, how, rule)

    def close(self) -> None:
        """Nothing to close."""


def ground_truth(problem: Problem) -> str:
    truth = problem.columns.get("ground_truth")
    return truth if isinstance(truth, str) else json.dumps(truth) if truth is not None else problem.answer or ""


def countdown(truth: dict[str, Any], answer: str) -> Checked:
    target, numbers = Fraction(truth["target"]), sorted(int(number) for number in truth["numbers"])
    expression = answer.strip().partition("=")
    if expression[1] and expression[2].strip() != str(truth["target"]):
        return False, "not the target"
    value = evaluate(expression[0])
    if value is None:
        return False, "no expression"
    if sorted(int(found) for found in re.findall(r"\d+", expression[0])) != numbers:
        return False, "not each number once"
    return (True, "target") if value == target else (False, "not the target")


def evaluate(text: str) -> Fraction | None:
    """The value of an expression of whole numbers, + - * / and parentheses; None if the text is anything else."""
    text = text.replace("×", "*").replace("÷", "/").strip()
    if len(text) > LONGEST or TOKEN.sub("", text).strip():
        return None
    tokens = TOKEN.findall(text)
    try:
        value, at = _sum(tokens, 0, 0)
    except (IndexError, ZeroDivisionError, ValueError):
        return None
    return value if at == len(tokens) else None


def _sum(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    value, at = _product(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "+-":
        right, after = _product(tokens, at + 1, depth)
        value, at = (value + right if tokens[at] == "+" else value - right), after
    return value, at


def _product(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    value, at = _factor(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "*/":
        right, after = _factor(tokens, at + 1, depth)
        value, at = (value * right if tokens[at] == "*" else value / right), after
    return value, at


def _factor(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    if depth > DEEPEST:
        raise ValueError
    if tokens[at] == "-":
        value, at = _factor(tokens, at + 1, depth + 1)
        return -value, at
    if tokens[at] == "(":
        value, at = _sum(tokens, at + 1, depth + 1)
        if tokens[at] != ")":
            raise ValueError
        return value, at + 1
    return Fraction(int(tokens[at])), at + 1


def knights(truth: dict[str, Any], answer: str) -> Checked:
    names = list(truth["names"])
    solution = list(truth["solution"]) if "solution" in truth else solve(truth["statements"], len(names))
    if len(SAID.findall(answer)) != len(names):
        return False, "not one word for each"
    for name, knight in zip(names, solution, strict=True):
        said = re.findall(rf"\b{re.escape(name)}\b\W*(?:is\s+an?\s+)?\W*(knight|knave)\b", answer, re.IGNORECASE)
        if len(said) != 1 or (said[0].lower() == "knight") != bool(knight):
            return False, f"{name} is wrong" if said else f"{name} is missing"
    return True, "all right"


def solve(statements: str, people: int) -> list[bool]:
    """The one assignment of knights and knaves that fits all statements, found by trying them all."""
    claims = ast.literal_eval(statements)  # a literal, never evaluated
    if people > 10 or len(claims) != people:
        raise ValueError("one statement for each of at most 10 people")
    found = [knights for knights in product([True, False], repeat=people)
             if all(holds(claim, knights) == knight for claim, knight in zip(claims, knights, strict=True))]
    if len(found) != 1:
        raise ValueError(f"{len(found)} assignments fit")
    return list(found[0])


def holds(claim: Any, knights: Sequence[bool]) -> bool:
    kind, *rest = claim
    if kind in {"telling-truth", "lying"}:
        return knights[rest[0]] == (kind == "telling-truth")
    parts = [holds(part, knights) for part in rest]
    if kind == "not":
        return not parts[0]
    if kind == "->":
        return not parts[0] or parts[1]
    if kind == "<=>":
        return parts[0] == parts[1]
    if kind in {"and", "or"}:
        return all(parts) if kind == "and" else any(parts)
    raise ValueError(f"unknown statement {kind!r}")
