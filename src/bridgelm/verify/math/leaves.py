"""Whether two single values are equal: numbers with their units, words, times of day."""

from __future__ import annotations

import re

from bridgelm.verify.math import sets
from bridgelm.verify.math.number import exact
from bridgelm.verify.math.scalar import same_value
from bridgelm.verify.math.shape import Shape
from bridgelm.verify.math.units import Quantity, factor_between

NO_SOLUTION = {"no solution", "no solutions", "no real solution", "no real solutions", "empty set", "none"}
SAYINGS = [NO_SOLUTION, {"does not exist", "dne", "undefined"}, {"infinitely many", "infinite", "infinity"}]


def named(rule: str, holds: bool) -> str:
    return rule if holds else ""


def skeleton(text: str) -> str:
    """The text without what never counts: TeX that marks text, and blanks, except those between digits or words."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\^\{(\w)\}", r"^\1", re.sub(r"_\{(\w)\}", r"_\1", text))
    return re.sub(r"(?<=[^\w])\s+|\s+(?=[^\w])", "", text.strip()).strip().rstrip(" .")


def same_saying(g: Shape, p: Shape) -> str:
    if g.text.strip() == p.text.strip() or (len(g.text) > 1 and g.text.casefold() == p.text.strip().casefold()):
        return "words"
    words, value = (g.text, p.text) if g.kind == "words" else (p.text, g.text)
    return "words" if words in NO_SOLUTION and value.strip() in sets.EMPTY else ""


def same_values(g: Shape, p: Shape) -> str:
    left, right = g.quantity or Quantity(g.text), p.quantity or Quantity(p.text)
    if left == right:
        return "same text"
    if left.percent != right.percent:
        hundredth = [rf"\frac{{{side.text}}}{{100}}" if side.percent else side.text for side in (left, right)]
        return "percent" if same_value(left.text, right.text) or same_value(*hundredth) else ""
    scale = factor_between(left, right)
    if scale is None:
        return ""
    if scale != 1:
        scaled = rf"({left.text})\cdot\frac{{{scale.numerator}}}{{{scale.denominator}}}"
        return "unit" if same_value(scaled, right.text) else ""
    if same_value(left.text, right.text):
        return "number" if exact(left.text) is not None and exact(right.text) is not None else "value"
    kinds = [dict(side.unit or ()).keys() - {"size"} for side in (left, right)]
    if kinds[0] ^ kinds[1] == {"degrees"} and r"\pi" in left.text + right.text:
        turned = [rf"({side.text})\cdot\frac{{\pi}}{{180}}" if "degrees" in kind else side.text
                  for side, kind in zip((left, right), kinds, strict=True)]
        return named("degrees", same_value(*turned))
    return ""


def same_words(g: Shape, p: Shape) -> str:
    if g.text == p.text or any({g.text, p.text} <= saying for saying in SAYINGS):
        return "words"
    return ""


def same_times(g: Shape, p: Shape) -> str:
    """Whether two times are the same; a.m. or p.m. counts only if both sides give it."""
    return "time" if g.text == p.text or p.text in g.text.split() or g.text in p.text.split() else ""


def same_exactly(g: Shape, p: Shape) -> str:
    return g.kind if g.text == p.text else ""
