"""Whether two answers are equal, shape against shape and value against value; every comparison names its rule."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from bridgelm.verify.math import sets
from bridgelm.verify.math.expression import TooBig, Unreadable, parse
from bridgelm.verify.math.leaves import named, same_exactly, same_saying, same_times, same_values, same_words, skeleton
from bridgelm.verify.math.number import exact
from bridgelm.verify.math.scalar import proportional, same_value
from bridgelm.verify.math.shape import Shape, is_name

MATCHED = 300  # the longest lists whose members are matched by value; longer ones only as exact numbers


def equal(g: Shape, p: Shape) -> str:
    """The name of the rule by which the two are equal; empty if they are not."""
    g, p = _unwrapped(_named_apart(g, p), _named_apart(p, g))
    if g.kind == p.kind == "relation":
        return _relations(g, p)
    if g.kind == "list" and len(g.parts) == 1:
        return equal(g.parts[0], p)
    if (pieces := _as_sets(g, p)) is not None:
        return pieces
    if g.kind == p.kind:
        return SAME_KIND[g.kind](g, p)
    return _mixed(g, p)


def _named_apart(shape: Shape, other: Shape) -> Shape:
    """Rewrites (x, y) = (1, 2) as x = 1, y = 2 if the other answer is a list."""
    if other.kind != "list" or shape.kind != "relation" or shape.text != "=" or shape.parts[1].kind != "group":
        return shape
    names = [name.strip() for name in shape.parts[0].text.strip("() ").split(",")]
    if len(names) != len(shape.parts[1].parts) or not _all_named(other.parts):
        return shape
    sides = zip(names, shape.parts[1].parts, strict=True)
    return Shape("list", "", tuple(Shape("relation", "=", (Shape("value", name), value)) for name, value in sides))


def _unwrapped(g: Shape, p: Shape) -> tuple[Shape, Shape]:
    """Reduces an equation to its right side if its left side only names the answer and the other answer has no left
    side."""
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
        return True  # a name that is not an expression
    if not symbols and len(shape.parts) == 2:  # 3 + 4 = 7 gives the answer 7; 3 + 4 = 8 gives none
        return not strict and shape.parts[1].kind == "value" and same_value(left, shape.parts[1].text)
    if strict:  # 2x + z = 1 is not the answer 1; a quotient of names is a name
        return (bool(re.fullmatch(r"[\sA-Za-z_{}\\:/|]+", left)) and "frac" in left) or ":" in left
    return len(symbols) != 1


def _as_sets(g: Shape, p: Shape) -> str | None:
    """Compares both as sets; None if this decides nothing, as for two plain pairs, which are compared entry by
    entry."""
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
        names = [side.parts[0].text for side in (g, p)]
        if all(map(is_name, names)):
            if _same_name(g, p):
                return equal(g.parts[-1], p.parts[-1]) and "assignment"
            if all(CALL.fullmatch(skeleton(name)) for name in names):
                return ""  # these are not products of letters: f(2) = 0 is no multiple of f(3) = 0
        return _proportional(g, p)
    left, right = sets.as_pieces(g), sets.as_pieces(p)
    if left is not None and right is not None and _subject(g) == _subject(p):
        return "set of reals" if sets.same_pieces(left, right) else ""
    return _proportional(g, p)


CALL = re.compile(r".+\(\w+(?:,\w+)*\)")
RULE = re.compile(r"[a-zA-Z]\(([a-z](?:,[a-z])*)\)")  # the left side of a function's definition


def _same_name(g: Shape, p: Shape) -> bool:
    """Whether two left sides name the same thing. The name of a defined function does not count, so f(x), g(x) and y
    are the same; a value such as f(2) or P(A), and a well-known function, must be the same. A lone y may be any of
    them."""
    left, right = (skeleton(side.parts[0].text) for side in (g, p))
    if left == right:
        return True
    if "y" in (left, right):
        return "(" in left + right
    rules = [RULE.fullmatch(name) for name in (left, right)]
    if rules[0] is None or rules[1] is None:
        return False
    ours, theirs = (rule[1].split(",") for rule in rules if rule)
    constant = not any(_letters(side.parts[-1]) & {*ours, *theirs} for side in (g, p))  # W(x) = 1 and W(n) = 1
    return ours == theirs or (constant and len(ours) == len(theirs))


def _letters(shape: Shape) -> set[str]:
    found = set(re.findall(r"[a-z]", re.sub(r"\\[a-zA-Z]+", " ", shape.text)))
    return found.union(*map(_letters, shape.parts))


def _subject(shape: Shape) -> str:
    return next((skeleton(part.text).strip("|") for part in shape.parts if re.search("[a-zA-Z]", part.text)), "")


TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\ne": r"\ne"}


def _proportional(g: Shape, p: Shape) -> str:
    """Whether one equation or inequality is a multiple of the other."""
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
    if kinds == ("group", "list") and (g.text == "()" or len(g.parts) > 2):  # a bare list, in the order of the tuple
        return _all_equal(g.parts, p.parts) and "tuple"
    apart = _all_named(g.parts) and _distinct(g.parts, g.parts)
    if kinds == ("list", "group") and g.text != "pm" and (apart or not _like_interval(p)):
        return _all_equal(g.parts, p.parts) and "tuple"
    if set(kinds) == {"matrix", "group"}:
        matrix, group = (g, p) if g.kind == "matrix" else (p, g)
        if all(row.kind == "group" for row in group.parts):  # [[1, 2], [3, 4]]
            entries = [entry for row in group.parts for entry in row.parts]
            shape = f"{len(group.parts)}x{len(group.parts[0].parts)}"
            return named("matrix", shape == matrix.text and bool(_all_equal(matrix.parts, entries)))
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
        return same_saying(g, p)
    if kinds[1] == "set" and kinds[0] in {"value", "matrix"} and len(p.parts) == 1:
        return equal(g, p.parts[0])
    if kinds == ("set", "value") and len(g.parts) == 1:
        return equal(g.parts[0], p)
    return ""


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
    """The members of a list or set; a plus-minus member counts as its two values."""
    return [inner for part in shape.parts
            for inner in (part.parts if part.kind == "list" and part.text == "pm" else [part])]


def _unordered(g: Shape, p: Shape) -> str:
    left, right = _members(g), _members(p)
    sets_of = "set" in (g.kind, p.kind) or "pm" in (g.text, p.text)
    if sets_of or all(shape.kind == "group" for shape in (*left, *right)):  # a solution may be given twice
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
    """Whether the names on the named side differ (a = 1, b = 2), instead of one name with two values (x = 1, x = 2)."""
    named = left if _all_named(left) else right
    return len({_bare(s.parts[0].text) for s in named}) == len(named) > 1


def _bare(name: str) -> str:
    """The name without its index, as x_1 and x_2 are two values of the same x."""
    return re.sub(r"_\{?\w+\}?", "", skeleton(name))


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


def _matrices(g: Shape, p: Shape) -> str:
    return _all_equal(g.parts, p.parts) and "matrix" if g.text == p.text else ""


SAME_KIND = {"value": same_values, "words": same_words, "list": _unordered, "set": _unordered, "group": _groups,
             "union": _unions, "matrix": _matrices, "ratio": _ratios, "time": same_times, "based": same_exactly}
