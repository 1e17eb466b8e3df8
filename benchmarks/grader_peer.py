"""math-verify by itself, for the comparison of benchmarks/grader.py: run in a worker of our pool, which can end it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import math_verify


def plain(task: dict[str, str], gold_is_good: Callable[[], None]) -> bool:
    """Both texts as they are."""
    gold_is_good()
    return math_verify.verify(math_verify.parse(task["gold"]), math_verify.parse(task["prediction"]))


def boxed(task: dict[str, str], gold_is_good: Callable[[], None]) -> bool:
    """A text without a box or delimiters of its own is put into a box, as its documentation advises."""
    gold_is_good()
    texts = [task[name] if "$" in task[name] or "\\boxed" in task[name] or "\\(" in task[name] or "\\[" in task[name]
             else f"\\boxed{{{task[name]}}}" for name in ("gold", "prediction")]
    return math_verify.verify(*map(math_verify.parse, texts))


def warm_up() -> None:
    logging.disable(logging.WARNING)
    math_verify.verify(math_verify.parse("$1$"), math_verify.parse("$2$"))
