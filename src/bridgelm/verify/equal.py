"""Whether two answers are one: shapes against shapes, values against values. Every comparison names its rule."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from bridgelm.verify import sets
from bridgelm.verify.expression import TooBig, Unreadable, parse
from bridgelm.verify.number import exact
from bridgelm.verify.scalar import proportional, same_value
from bridgelm.verify.shape import Shape, is_name
from bridgelm.verify.units import Quantity, factor_between

NO_SOLUTION = {"no solution", "no solutions", "no real solution", "no real solutions", "empty set", "none"}
SAYINGS = [NO_SOLUTION, {"does not exist", "dne", "undefined"}, {"infinitely many", "infinite", "infinity"}]
MATCHED = 300  # members of two lists that are matched by value; more only as exact numbers


def skeleton(text: str) -> str:
    """Without what never counts: blanks (but those between digits or words), and TeX that says "this is text"."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\^\{(\w)\}", r"^\1", re.sub(r"_\{(\w)\}", r"_\1", text))
    return re.sub(r"(?<=[^\w])\s+|\s+(?=[^\w])", "", text.strip()).strip(" .")


def equal(g: Shape, p: Shape) -> str:
    """The rule by which they are equal; empty where they are not."""
    g, p = _unwrapped(g, p)
    if g.kind == p.kind == "relation":
        return _relations(g, p)
    if g.kind == "list" and len(g.parts) == 1:
        return equal(g.parts[0], p)
    if (pieces := _as_sets(g, p)) is not None:
        return pieces
    if g.kind == p.kind:
        return SAME_KIND[g.kind](g, p)
    return _mixed(g, p)


def named(rule: str, holds: bool) -> str:
    return rule if holds else ""


def _unwrapped(g: Shape, p: Shape) -> tuple[Shape, Shape]:
    """An equation whose left side only names the answer is its right side, if the other answer has no left side."""
    if p.kind == "relation" and g.kind not in {"relation"} and p.text.split()[-1] in {"=", r"\in"}:
        if _names_answer(p, strict=False):
            p = p.parts[-1]
    elif g.kind == "relation" and p.kind != "relation" and _names_answer(g, strict=True):
        g = g.parts[-1]
    return g, p


def _names_answer(shape: Shape, strict: bool) -> bool:
    if set(shape.text.split()) - {"=", r"\in"}:
        return False
    left = shape.parts[0].text
    if is_name(left) or len(shape.parts) > 2:
        return True
    try:
        symbols = parse(left).free_symbols
    except (Unreadable, TooBig, AttributeError):
        return True  # a name that is no expression
    if strict:  # 2x + z = 1 is not the answer 1; a quotient of names is a name
        return (bool(re.fullmatch(r"[\sA-Za-z_{}\\:/|]+", left)) and "frac" in left) or ":" in left
    return len(symbols) != 1


def _as_sets(g: Shape, p: Shape) -> str | None:
    """None where sets decide nothing: two plain pairs are compared entry by entry."""
    kinds = {g.kind, p.kind}
    if not kinds & {"union", "relation"} and not (kinds & {"words", "set"} and kinds & {"group", "value", "union"}) \
            and not (kinds == {"list"} and any(part.kind == "relation" for part in (*g.parts, *p.parts))) \
            and not ("list" in kinds and kinds & {"group", "union"}):
        return None
    left, right = sets.as_pieces(g), sets.as_pieces(p)
    if left is None or right is None:
        return None
    return "set of reals" if sets.same_pieces(left, right) else ""


def _relations(g: Shape, p: Shape) -> str:
    if g.text == p.text and len(g.parts) == len(p.parts) and _all_equal(g.parts, p.parts):
        return "relation"
    if set(g.text.split()) | set(p.text.split()) <= {"=", r"\in"}:
        names = [skeleton(side.parts[0].text) for side in (g, p)]
        if all(is_name(side.parts[0].text) for side in (g, p)) and _same_name(*names):
            return equal(g.parts[-1], p.parts[-1]) and "assignment"
        return _proportional(g, p)
    left, right = sets.as_pieces(g), sets.as_pieces(p)
    if left is not None and right is not None and _subject(g) == _subject(p):
        return "set of reals" if sets.same_pieces(left, right) else ""
    return _proportional(g, p)


def _same_name(left: str, right: str) -> bool:
    """One name, or f(x) and y: what a function is called does not count."""
    return left == right or all("(" in name or name == "y" for name in (left, right))


def _subject(shape: Shape) -> str:
    return next((skeleton(part.text).strip("|") for part in shape.parts if re.search("[a-zA-Z]", part.text)), "")


TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\ne": r"\ne"}


def _proportional(g: Shape, p: Shape) -> str:
    """One equation or inequality is a multiple of the other."""
    if len(g.parts) != 2 or len(p.parts) != 2 or g.text not in TURNED or p.text not in TURNED:
        return ""
    try:
        (a, b), (c, d) = ([parse(part.text) for part in side.parts] for side in (g, p))
        constant = proportional(a - b, c - d)
    except TypeError:
        return ""
    if constant is None:
        return ""
    if g.text in {"=", r"\ne"}:
        return "equation" if g.text == p.text else ""
    expected = g.text if constant.is_real and constant > 0 else TURNED[g.text]
    return "inequality" if constant.is_real and p.text == expected else ""


def _mixed(g: Shape, p: Shape) -> str:
    kinds = (g.kind, p.kind)
    if kinds == ("set", "list") or kinds == ("list", "set"):
        return _unordered(g, p) and "set"
    if kinds == ("group", "list"):  # a bare list in the order of the tuple
        return _all_equal(g.parts, p.parts) and "tuple"
    if kinds == ("list", "group") and g.text != "pm" and not _like_interval(p):
        return _all_equal(g.parts, p.parts) and "tuple"
    if set(kinds) == {"matrix", "group"}:
        matrix, group = (g, p) if g.kind == "matrix" else (p, g)
        vector = matrix.text.startswith("1x") or matrix.text.endswith("x1")
        return _all_equal(matrix.parts, group.parts) and "vector" if vector and group.text in {"()", "[]"} else ""
    if set(kinds) == {"matrix", "value"}:  # a sum or product of matrices
        return named("matrix", same_value(*(s.quantity.text if s.quantity else s.text for s in (g, p))))
    if "based" in kinds and "value" in kinds:
        based, value = (g, p) if g.kind == "based" else (p, g)
        return "base" if based.text.split("_")[0] == value.text.strip().lstrip("0") else ""
    if "ratio" in kinds and "value" in kinds:
        ratio, value = (g, p) if g.kind == "ratio" else (p, g)
        if len(ratio.parts) == 2 and all(part.kind == "value" for part in ratio.parts):
            return named("ratio", same_value(rf"\frac{{{ratio.parts[0].text}}}{{{ratio.parts[1].text}}}", value.text))
        return ""
    if set(kinds) == {"words", "value"}:
        return _said(g, p)
    if kinds[1] == "set" and kinds[0] in {"value", "matrix"} and len(p.parts) == 1:
        return equal(g, p.parts[0])
    if kinds == ("set", "value") and len(g.parts) == 1:
        return equal(g.parts[0], p)
    return ""


def _said(g: Shape, p: Shape) -> str:
    if g.text.strip() == p.text.strip() or (len(g.text) > 1 and g.text.casefold() == p.text.strip().casefold()):
        return "words"
    words, value = (g.text, p.text) if g.kind == "words" else (p.text, g.text)
    return "words" if words in NO_SOLUTION and value.strip() in sets.EMPTY else ""


def _like_interval(shape: Shape) -> bool:
    if len(shape.parts) != 2:
        return False
    ends = [exact(part.text) if part.kind == "value" else None for part in shape.parts]
    return ends[0] is None or ends[1] is None or ends[0] < ends[1] or shape.text != "()"


def _all_equal(left: Sequence[Shape], right: Sequence[Shape]) -> str:
    return "tuple" if len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True)) else ""


def _groups(g: Shape, p: Shape) -> str:
    if g.text != p.text and not (len(g.parts) > 2 and {g.text, p.text} <= {"()", "[]"}):
        return ""
    return _all_equal(g.parts, p.parts)


def _members(shape: Shape) -> list[Shape]:
    """Of a list or set, with the two values of a plus-minus member in its place."""
    return [inner for part in shape.parts
            for inner in (part.parts if part.kind == "list" and part.text == "pm" else [part])]


def _unordered(g: Shape, p: Shape) -> str:
    left, right = _members(g), _members(p)
    sets_of = "set" in (g.kind, p.kind) or "pm" in (g.text, p.text)
    if sets_of or all(shape.kind == "group" for shape in (*left, *right)):  # a solution may be said twice
        left, right = list(dict.fromkeys(left)), list(dict.fromkeys(right))
    if len(left) != len(right):
        return ""
    if not any(s.quantity and (s.quantity.percent or s.quantity.unit) for s in (*left, *right)):
        numbers = [[exact(s.text) if s.kind == "value" else None for s in side] for side in (left, right)]
        if None not in (*numbers[0], *numbers[1]):
            return "list" if Counter(numbers[0]) == Counter(numbers[1]) else ""
    if len(left) > MATCHED:
        return ""
    if _all_named(left) and _all_named(right) and len({part.parts[0].text for part in left}) == len(left):
        right = sorted(right, key=lambda part: skeleton(part.parts[0].text))
        left = sorted(left, key=lambda part: skeleton(part.parts[0].text))
        return _all_equal(left, right) and "list"
    if (_all_named(left) or _all_named(right)) and _distinct(left, right):  # a = 3, b = 4 against 3, 4
        return _all_equal(left, right) and "list"
    for a in left:
        at = next((i for i, b in enumerate(right) if _equal_or_not(a, b)), None)
        if at is None:
            return ""
        right.pop(at)
    return "list"


def _equal_or_not(a: Shape, b: Shape) -> str:
    try:
        return equal(a, b)
    except Unreadable:
        return ""


def _all_named(shapes: Sequence[Shape]) -> bool:
    return all(s.kind == "relation" and s.text == "=" and is_name(s.parts[0].text) for s in shapes)


def _distinct(left: Sequence[Shape], right: Sequence[Shape]) -> bool:
    """Whether the named side names different things (a = 1, b = 2), and not one thing twice (x = 1, x = 2)."""
    named = left if _all_named(left) else right
    return len({_bare(s.parts[0].text) for s in named}) == len(named) > 1


def _bare(name: str) -> str:
    """x_1 and x_2 are two values of one x."""
    return re.sub(r"_\{?\w+\}?", "", skeleton(name))


def _values(g: Shape, p: Shape) -> str:
    left, right = g.quantity or Quantity(g.text), p.quantity or Quantity(p.text)
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


def _words(g: Shape, p: Shape) -> str:
    if g.text == p.text or any({g.text, p.text} <= saying for saying in SAYINGS):
        return "words"
    return ""


def _ratios(g: Shape, p: Shape) -> str:
    if len(g.parts) != len(p.parts):
        return ""
    if _all_equal(g.parts, p.parts):
        return "ratio"
    if any(part.kind != "value" or "ldots" in part.text for part in (*g.parts, *p.parts)):
        return ""
    a, b = g.parts[0].text, p.parts[0].text
    return "ratio" if all(same_value(rf"({a})\cdot({y.text})", rf"({b})\cdot({x.text})")
                          for x, y in zip(g.parts[1:], p.parts[1:], strict=True)) else ""


def _unions(g: Shape, p: Shape) -> str:
    if set(g.text.split()) == set(p.text.split()) == {r"\cup"}:
        return _unordered(g, p) and "union"
    return _all_equal(g.parts, p.parts) if g.text == p.text else ""


def _exactly(g: Shape, p: Shape) -> str:
    return g.kind if g.text == p.text else ""


def _times(g: Shape, p: Shape) -> str:
    """An hour that one side alone says is of the morning is the same hour."""
    return "time" if g.text == p.text or p.text in g.text.split() or g.text in p.text.split() else ""


def _matrices(g: Shape, p: Shape) -> str:
    return _all_equal(g.parts, p.parts) and "matrix" if g.text == p.text else ""


SAME_KIND = {"value": _values, "words": _words, "list": _unordered, "set": _unordered, "group": _groups,
             "union": _unions, "matrix": _matrices, "ratio": _ratios, "time": _times, "based": _exactly}
