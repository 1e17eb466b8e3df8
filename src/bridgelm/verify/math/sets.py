"""Sets of real numbers: intervals, unions, inequalities and exclusions as one sorted list of pieces with exact ends."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import sympy

from bridgelm.verify.math.scalar import TooBig, Unreadable, parse_value, same
from bridgelm.verify.math.shape import Shape, is_name

REAL = {"\\mathbb{R}", "\\Reals", "R", "\\R"}
ALL_REALS = {"all real numbers", "real numbers", "all reals", "all real number", "reals"}
EMPTY = {"\\emptyset", "\\{\\}"}


@dataclass(frozen=True)
class Piece:
    low: Any
    high: Any
    low_open: bool
    high_open: bool


def as_pieces(shape: Shape) -> list[Piece] | None:
    """The pieces of the set from left to right; None if it is not a set of real numbers with exactly known ends."""
    try:
        found = _pieces(shape)
        return None if found is None else _merged(found)
    except (Unreadable, TooBig, TypeError, ValueError):
        return None


def _pieces(shape: Shape) -> list[Piece] | None:
    if shape.kind == "group" and len(shape.parts) == 2 and all(part.kind == "value" for part in shape.parts):
        low, high = (_end(part) for part in shape.parts)
        return [_piece(low, high, shape.text[0] == "(", shape.text[1] == ")")]
    if shape.kind == "set":
        return [Piece(value, value, False, False) for value in map(_end, _flat(shape))]
    if shape.kind == "value":
        return [_whole()] if shape.text.replace(" ", "") in REAL else [] if shape.text.strip() in EMPTY else None
    if shape.kind == "words":
        return [_whole()] if shape.text in ALL_REALS else None
    if shape.kind == "relation":
        return _from_relation(shape)
    if shape.kind == "union":
        return _combined(shape)
    if shape.kind == "list" and shape.parts and all(part.kind in {"relation", "group"} for part in shape.parts):
        return _from_list(shape)
    return None


def _from_list(shape: Shape) -> list[Piece] | None:
    """`x < 1 or x > 3` is a union; `x != 1, x != 2` leaves out both."""
    if any(part.kind == "group" or "=" in part.text.split() for part in shape.parts):
        return None
    if len({side.text for part in shape.parts for side in part.parts if is_name(side.text)}) > 1:
        return None  # the parts are about different variables
    parts = [_pieces(part) for part in shape.parts]
    if any(part is None for part in parts):
        return None
    if all(part.text == r"\ne" for part in shape.parts):
        found = [_whole()]
        for part in parts:
            found = _meet(found, part or [])
        return found
    return [piece for part in parts for piece in part or []]


def _flat(shape: Shape) -> list[Shape]:
    return [inner for part in shape.parts for inner in (_flat(part) if part.kind == "list" else [part])]


def _whole() -> Piece:
    return Piece(-sympy.oo, sympy.oo, True, True)


def _piece(low: Any, high: Any, low_open: bool, high_open: bool) -> Piece:
    if _less(high, low) or (same(low, high) and (low_open or high_open)):
        raise ValueError
    return Piece(low, high, low_open or low == -sympy.oo, high_open or high == sympy.oo)


def _end(shape: Shape) -> Any:
    value = parse_value(shape.text)
    if value.free_symbols or not (value.is_extended_real or value.is_infinite):
        raise ValueError
    return value


def _from_relation(shape: Shape) -> list[Piece] | None:
    ops, sides = shape.text.split(), shape.parts
    if bars := [i for i, side in enumerate(sides) if re.fullmatch(r"\|\s*[a-z]\s*\|", side.text)]:
        if len(bars) != 1:
            return None
        bare = replace(sides[bars[0]], text=sides[bars[0]].text.strip("| "))
        named = replace(shape, parts=(*sides[:bars[0]], bare, *sides[bars[0] + 1:]))
        found = _meet(_from_relation(named) or [], [Piece(sympy.Integer(0), sympy.oo, False, True)])
        return [*found, *(Piece(-piece.high, -piece.low, piece.high_open, piece.low_open) for piece in found)]
    if ops == [r"\in"]:
        return _pieces(sides[1]) if is_name(sides[0].text) else None
    if len(ops) == 1 and ops[0] in {"<", ">", r"\le", r"\ge", r"\ne", "="}:
        if not is_name(sides[0].text):
            if not is_name(sides[1].text) or sides[1].kind != "value" or ops[0] == "=":
                return None
            flipped = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
            return _ray(flipped.get(ops[0], ops[0]), _end(sides[0]))
        return _ray(ops[0], _end(sides[1])) if sides[1].kind == "value" else None
    if len(ops) == 2 and is_name(sides[1].text) and all(side.kind == "value" for side in sides):
        low, high = _end(sides[0]), _end(sides[2])
        if {*ops} <= {"<", r"\le"}:
            return [_piece(low, high, ops[0] == "<", ops[1] == "<")]
        if {*ops} <= {">", r"\ge"}:
            return [_piece(high, low, ops[1] == ">", ops[0] == ">")]
    return None


def _ray(op: str, end: Any) -> list[Piece]:
    if op == "=":
        return [Piece(end, end, False, False)]
    left, right = Piece(-sympy.oo, end, True, op != r"\le"), Piece(end, sympy.oo, op != r"\ge", True)
    return [left, right] if op == r"\ne" else [left] if op in {"<", r"\le"} else [right]


def _combined(shape: Shape) -> list[Piece] | None:
    ops = shape.text.split()
    found = _pieces(shape.parts[0])
    for op, part in zip(ops, shape.parts[1:], strict=True):
        other = _pieces(part)
        if found is None or other is None:
            return None
        if op == r"\cup":
            found = [*found, *other]
        else:
            found = _meet(_merged(found), _merged(other) if op == r"\cap" else _outside(_merged(other)))
    return found


def _outside(pieces: list[Piece]) -> list[Piece]:
    found, low, low_open = [], -sympy.oo, True
    for piece in pieces:
        if _less(low, piece.low) or (same(low, piece.low) and not low_open and piece.low_open):
            found.append(Piece(low, piece.low, low_open, not piece.low_open or piece.low == -sympy.oo))
        low, low_open = piece.high, not piece.high_open
    if low != sympy.oo:
        found.append(Piece(low, sympy.oo, low_open, True))
    return found


def _meet(left: list[Piece], right: list[Piece]) -> list[Piece]:
    found = []
    for a in left:
        for b in right:
            low, low_open = max_end((a.low, a.low_open), (b.low, b.low_open))
            high, high_open = min_end((a.high, a.high_open), (b.high, b.high_open))
            if _less(low, high) or (same(low, high) and not low_open and not high_open):
                found.append(Piece(low, high, low_open, high_open))
    return found


def max_end(a: tuple[Any, bool], b: tuple[Any, bool]) -> tuple[Any, bool]:
    if same(a[0], b[0]):
        return a[0], a[1] or b[1]
    return b if _less(a[0], b[0]) else a


def min_end(a: tuple[Any, bool], b: tuple[Any, bool]) -> tuple[Any, bool]:
    if same(a[0], b[0]):
        return a[0], a[1] or b[1]
    return a if _less(a[0], b[0]) else b


def _less(a: Any, b: Any) -> bool:
    verdict = a < b
    if verdict in (True, False, sympy.true, sympy.false):
        return bool(verdict)
    return bool(sympy.N(a, 40) < sympy.N(b, 40))


def _merged(pieces: list[Piece]) -> list[Piece]:
    """The pieces sorted, with those that touch joined."""
    if len(pieces) > 200:
        raise ValueError
    keyed = sorted(pieces, key=lambda piece: (float(piece.low) if piece.low.is_finite else -math.inf, piece.low_open))
    found: list[Piece] = []
    for piece in keyed:
        last = found[-1] if found else None
        if last and (_less(piece.low, last.high)
                     or (same(piece.low, last.high) and not (piece.low_open and last.high_open))):
            high, high_open = _wider((last.high, last.high_open), (piece.high, piece.high_open))
            found[-1] = Piece(last.low, high, last.low_open, high_open)
        else:
            found.append(piece)
    return found


def _wider(a: tuple[Any, bool], b: tuple[Any, bool]) -> tuple[Any, bool]:
    if same(a[0], b[0]):
        return a[0], a[1] and b[1]
    return b if _less(a[0], b[0]) else a


def same_pieces(left: list[Piece], right: list[Piece]) -> bool:
    return len(left) == len(right) and all(
        (a.low_open, a.high_open) == (b.low_open, b.high_open) and same(a.low, b.low) and same(a.high, b.high)
        for a, b in zip(left, right, strict=True))
