"""One comparison of a gold answer with a predicted one, run inside a worker of the pool."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

from bridgelm.verify.math.expression import TooBig, Unreadable, parse
from bridgelm.verify.math.judge import judge
from bridgelm.verify.math.scalar import TOLERANCE, same_value
from bridgelm.verify.math.shape import readings
from bridgelm.verify.math.spelling import spell

LONGEST_GOLD = 20_000
# The parser is slow on every construct that it meets for the first time, so these are parsed before any task.
USUAL = [r"-\frac{2(x^2+6)}{9(x^2-2)\sqrt[3]{x^2-2}^2}+\frac{a}{b}", r"2\sin(x)\cos^2 y-\ln(3)e^{-2t}",
         r"\omega_{n}^{2} e^{-\zeta \omega_{n} t} \cos (\omega_{n} \sqrt{1-\zeta^{2}} t)",
         r"\sin\theta+\cos\frac{\pi}{3}",
         r"x_1+f(x)+|x-1|+\lfloor x\rfloor", r"3^{n+1}-2\cdot 5!+\binom{n}{2}",
         r"\log_2 8-\log_{10} 5", r"\text{Evelyn}",
         r"\sum_{k=1}^{10}k^2", r"\int_0^1 x dx", r"(x-1)^3(x+1)^3", r"2\times3/4", r"\arctan 2", "ab-cd"]
USUAL_PAIRS = [(r"\frac{x}{7}+\frac{2}{7}", r"\frac{x+2}{7}"), (r"\sqrt{6+4\sqrt{2}}", r"2+\sqrt{2}"),
               (r"\sin^2(y)", r"1-\cos^2(y)")]


def compare(task: dict[str, str], gold_is_good: Callable[[], None]) -> tuple[bool, str]:
    """Whether the prediction equals the gold, and the rule that decided. `gold_is_good` is called once the gold has
    been understood: from then on, running out of time or memory is the fault of the prediction."""
    gold, prediction = task["gold"], task["prediction"]
    TOLERANCE.set(float(task.get("tolerance", "0")))
    if len(gold) > LONGEST_GOLD:
        raise ValueError("the gold answer is longer than any answer")
    gold = spell(gold)
    if not gold:
        raise ValueError(f"the gold answer {task['gold'][:80]!r} cannot be read")
    readings(gold, True)
    gold_is_good()
    if len(prediction) > 1000 + 4 * len(task["gold"]):
        return False, "too long"
    prediction = spell(prediction)
    return judge(gold, prediction) if prediction else (False, "no answer")


def warm_up() -> None:
    """Imports and builds the parser, so that this does not count against the time limit of the first task."""
    logging.disable(logging.WARNING)
    for text in USUAL:
        with contextlib.suppress(Unreadable, TooBig):
            parse(text)
    for pair in USUAL_PAIRS:
        same_value(*pair)
