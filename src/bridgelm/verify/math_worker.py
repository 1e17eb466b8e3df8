"""One comparison of a gold answer with a predicted one, run inside a worker of the pool.

math-verify's own time-outs use signals of the main thread and do not stop big-number arithmetic in C. They are off
here: the pool ends a worker that takes too long.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from bridgelm.verify.extract import balanced, boxed

SPELLINGS = {"−": "-", "–": "-", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "∞": r"\infty ", "π": r"\pi ",
             "°": r"^\circ ", "×": r"\times ", "·": r"\cdot ", r"\!": "", r"\$": "", "$": ""}
TINY = 1e-4  # below it, rounding to 6 decimals makes unequal numbers look equal


def compare(task: dict[str, str], gold_is_good: Callable[[], None]) -> bool:
    """Whether the prediction equals the gold. `gold_is_good` is called once the gold has been understood: from then on
    running out of time or memory is the prediction's fault."""
    gold, prediction = clean(task["gold"]), clean(task["prediction"])
    parsed = parse(gold) if gold else []
    if not parsed:
        raise ValueError(f"the gold answer {task['gold'][:80]!r} cannot be read")
    gold_is_good()
    longest = 1000 + 4 * len(gold)  # no answer is that much longer than the gold
    if not prediction or len(prediction) > longest or not balanced(prediction):
        return False
    if prediction == gold:
        return True
    found = parse(prediction)
    return bool(found) and _equal(parsed, found)


def clean(text: str) -> str:
    """Spellings that math-verify does not know, and what surrounds an answer without being part of it."""
    inner = boxed(text)
    text = text if inner is None else inner
    for spelling, tex in SPELLINGS.items():
        text = text.replace(spelling, tex)
    text = text.removeprefix("\\(").removesuffix("\\)").removeprefix("\\[").removesuffix("\\]")
    text = re.sub(r"(?<=\d)\{,\}(?=\d)", ",", text)
    return text.strip().rstrip(".,;:").strip()


def parse(text: str) -> list[Any]:
    """Bare TeX is only read as TeX inside a box."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify.parse("\\boxed{" + text + "}", parsing_timeout=None)  # type: ignore[arg-type]


def _equal(gold: list[Any], found: list[Any]) -> bool:
    import math_verify

    if not math_verify.verify(gold, found, timeout_seconds=None, raise_on_error=True):
        return False
    return _close_numbers(gold[0], found[0])


def _close_numbers(gold: Any, found: Any) -> bool:
    """Whether two tiny numbers agree relatively too: 1/2^99 is not 1/2^98, though both are 0 to 6 decimals."""
    import sympy

    if not all(isinstance(x, sympy.Expr) and x.is_number and x.is_finite is not False for x in (gold, found)):
        return True
    left, right = sympy.N(gold, 30), sympy.N(found, 30)
    if not (left.is_comparable and right.is_comparable):
        return True
    size = max(abs(left), abs(right))
    return bool(size >= TINY or size == 0 or abs(left - right) <= 1e-3 * size)


def warm_up() -> None:
    """Imports and builds the parser before the clock of the first item starts."""
    parse("1")
