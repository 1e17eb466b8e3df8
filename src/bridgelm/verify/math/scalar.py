"""Whether two expressions have the same value: decided exactly for rational numbers, else by many digits.

Both are evaluated to more digits than their literals hold: if two expressions of so few symbols agree on all of these
digits, they are the same number. Free symbols are replaced by several rational points, each within the domain of both
sides. Nothing is expanded or simplified, so no form of a wrong answer is slow. """

from __future__ import annotations

import re
from collections.abc import Iterator
from contextvars import ContextVar
from fractions import Fraction
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from bridgelm.verify.math.expression import TooBig, Unreadable, check, parse
from bridgelm.verify.math.number import exact

TOLERANCE: ContextVar[float] = ContextVar("tolerance", default=0.0)  # relative; 0 is exact
DIGITS = 30
MOST_DIGITS = 700
MACHINE = 12  # significant digits
AGREE = 4  # points at which two expressions must agree
AGREE_IN_PIECES = 14  # the same, where |x|, floors or remainders make an expression piecewise
TRIED = 30
POINTS = [Fraction(p, q) for p, q in [(37, 23), (71, 31), (113, 29), (19, 41), (7, 53), (227, 61), (3, 47), (433, 67),
                                      (29, 17), (101, 13), (11, 73), (59, 43)]]
SCALES = [Fraction(1, 97), Fraction(4, 3), Fraction(53), Fraction(1, 7), Fraction(2, 3), Fraction(9), Fraction(1)]


def same_value(left: str, right: str) -> bool:
    """Whether two texts in our TeX have the same value; raises Unreadable or TooBig if a text has none."""
    a, b = exact(left), exact(right)
    if TOLERANCE.get() and _near(left, right):
        return True
    if a is not None and b is not None:
        return a == b or _written_out(left, a, b) or _written_out(right, b, a)
    x, y = _read(left, a), _read(right, b)
    if same(x, y):
        return True
    return (a is not None and _written_out(left, a, y)) or (b is not None and _written_out(right, b, x))


def _near(gold: str, prediction: str) -> bool:
    """Whether the prediction is within the tolerance of the task, relative to the gold number."""
    try:
        a, b = parse_value(gold), parse_value(prediction)
        if a.free_symbols or b.free_symbols or not (a.is_finite and b.is_finite):
            return False
        return bool(abs(sympy.N(a - b, 30)) <= TOLERANCE.get() * abs(sympy.N(a, 30)))
    except (Unreadable, TooBig, TypeError, AttributeError):
        return False


def _written_out(text: str, value: Fraction, other: Any) -> bool:
    """Whether a text is the other value written out to the digits of a floating-point number, rounded or cut off."""
    found = re.fullmatch(r"[-+]?0*\.?0*(\d+)\.?(\d*)", text.strip())
    places = len(text.strip().partition(".")[2])
    if not found or not places or len(found.group(1) + found.group(2)) < MACHINE:
        return False
    if not isinstance(other, Fraction):
        if not isinstance(other, sympy.Expr) or other.free_symbols or not other.is_real:
            return False
        other = Fraction(str(sympy.N(_plain(other), places + 40)))
    if other.denominator == 1 or 10 ** places % other.denominator == 0:
        return False  # the other value ends within these digits, so nothing was rounded or cut off
    scaled = other * 10 ** places
    return value * 10 ** places in {round(scaled), int(scaled)}


def _read(text: str, value: Fraction | None) -> Any:
    return parse(text) if value is None else sympy.Rational(value.numerator, value.denominator)


def parse_value(text: str) -> Any:
    return _plain(_read(text, exact(text)))


def same(a: Any, b: Any) -> bool:
    """Whether two sympy expressions or matrices are equal."""
    matrices = [getattr(side, "is_Matrix", False) for side in (a, b)]
    if any(matrices):
        return all(matrices) and _same_matrix(a, b)
    if not all(isinstance(side, sympy.Expr) for side in (a, b)):
        return a == b
    a, b = _plain(a), _plain(b)
    if a == b:
        return True
    if a.is_Rational and b.is_Rational:
        return False
    if a.is_infinite or b.is_infinite:
        return False
    digits = DIGITS + 3 * (_height(a) + _height(b))
    if digits > MOST_DIGITS:
        raise TooBig
    return _agree(a, b, digits) if a.free_symbols or b.free_symbols else _close(a, b, {}, digits) is True


def _same_matrix(a: Any, b: Any) -> bool:
    a, b = a.doit(), b.doit()
    if a.shape != b.shape or a.rows * a.cols > 400:
        return False
    return all(same(x, y) for x, y in zip(list(a), list(b), strict=True))


def _plain(expression: Any) -> Any:
    """The expression, evaluated where that is cheap, with unknown functions as unknown numbers."""
    unknown = {f: sympy.Symbol("_" + re.sub(r"\W", "_", str(f))) for f in expression.atoms(AppliedUndef)}
    if unknown:
        expression = expression.xreplace(unknown)
    found = expression.doit()
    check(found)
    return found


def _names(expression: Any) -> set[str]:
    return {symbol.name for symbol in expression.free_symbols}


def _height(expression: Any) -> int:
    """The number of digits of all literals; an exponent counts as the digits of the power that it makes."""
    total = 0
    node: Any
    for node in sympy.preorder_traversal(expression):
        if node.is_Rational:
            total += len(str(node.p)) + len(str(node.q)) - 1
        elif node.is_Pow and node.base.is_Rational and node.exp.is_Rational and abs(node.base) != 1:
            total += int(abs(node.exp) * len(str(abs(node.base.p) + node.base.q)))
        elif node.is_Pow and node.exp.is_Rational:
            total += int(abs(node.exp)) // 4
    return total


def _close(a: Any, b: Any, at: dict[Any, Any], digits: int) -> bool | None:
    """Whether the two agree at a point; None if one of them has no finite value there."""
    try:
        x, y = (side.evalf(digits + 5, subs=at or None, maxn=3 * digits + 100) for side in (a, b))
    except (ValueError, TypeError, ZeroDivisionError, OverflowError, AttributeError, NotImplementedError):
        return None
    if not all(_is_number(side) for side in (x, y)):
        return None
    scale = max(abs(x), abs(y))
    if scale == 0:
        return True
    if scale < sympy.Float(10) ** -digits and not (a.is_Rational or b.is_Rational) and not at:
        return bool(abs(x - y) <= scale * sympy.Float(10) ** -10)
    return bool(abs(x - y) <= scale * sympy.Float(10, 15) ** -(digits - 5))


def _is_number(value: Any) -> bool:
    return value.is_number and value.is_finite is not False and not value.has(sympy.nan, sympy.zoo, sympy.oo) \
        and all(part.is_Number for part in value.as_real_imag())


def _agree(a: Any, b: Any, digits: int) -> bool:
    """Whether the two agree at several points of their domain; if it has no real point, at complex points."""
    seen = 0
    pieces = any(side.has(sympy.Abs, sympy.floor, sympy.ceiling, sympy.Mod, sympy.Max, sympy.Min) for side in (a, b))
    for at in _points(a, b):
        verdict = _close(a, b, at, digits)
        if verdict is False:
            return False
        seen += verdict is True
        if seen == (AGREE_IN_PIECES if pieces else AGREE):
            return True
    return False


def _points(a: Any, b: Any) -> Iterator[dict[Any, Any]]:
    symbols = sorted(a.free_symbols | b.free_symbols, key=lambda s: s.name)
    whole = _counted(a) | _counted(b)
    limits = [*_restricted(a), *_restricted(b)]
    found = 0
    for i in range(TRIED):
        at = {}
        for j, symbol in enumerate(symbols):
            value = POINTS[(i * 5 + j * 3) % len(POINTS)] * (1 if i < 2 else SCALES[(i + 3 * j) % len(SCALES)])
            sign = -1 if (i + j * (i // 2)) % 2 and symbol not in whole else 1
            number = (i + 2 * j) % 6 + 2 if symbol in whole else sign * value
            at[symbol] = sympy.Rational(number)
        if all(_allowed(limit, at) for limit in limits):
            found += 1
            yield at
    if found < AGREE:
        for i in range(TRIED // 3):
            yield {symbol: sympy.Rational(POINTS[(i + j) % 12]) + sympy.I * sympy.Rational(POINTS[(i + 3 * j + 1) % 12])
                   for j, symbol in enumerate(symbols)}


def _counted(expression: Any) -> set[Any]:
    """Symbols that can only be whole numbers: in the exponent of a negative number, or with a factorial."""
    found: set[Any] = set()
    for node in sympy.preorder_traversal(expression):
        if (isinstance(node, sympy.Pow) and node.base.is_negative) or isinstance(node, sympy.factorial):
            found |= node.args[-1].free_symbols
        elif isinstance(node, sympy.binomial | sympy.Sum | sympy.Product):
            found |= node.free_symbols
    return found


def _restricted(expression: Any) -> list[Any]:
    """The terms that must not be negative if the expression is to be real: under even roots, and in logarithms and
    powers."""
    return [node.args[0] for node in sympy.preorder_traversal(expression)
            if (isinstance(node, sympy.log) or (isinstance(node, sympy.Pow) and node.exp.is_integer is not True))
            and node.args[0].free_symbols]


def _allowed(limit: Any, at: dict[Any, Any]) -> bool:
    try:
        value = limit.evalf(15, subs=at)
    except (ValueError, TypeError, ZeroDivisionError, AttributeError):
        return False
    return bool(value.is_real and value > 0)


def proportional(left: Any, right: Any) -> Any:
    """The constant c with left = c * right; None if there is none. Both are `lhs - rhs` of an equation."""
    a, b = _plain(left), _plain(right)
    if not a.free_symbols or _names(a) != _names(b):
        return None
    ratio = None
    seen = 0
    for at in _points(a, b):
        try:
            x, y = a.evalf(40, subs=at), b.evalf(40, subs=at)
        except (ValueError, TypeError, ZeroDivisionError, AttributeError):
            continue
        if not (_is_number(x) and _is_number(y)) or abs(y) < 1e-20:
            continue
        now = x / y
        if abs(now) < 1e-20:
            return None
        if ratio is not None and abs(now - ratio) > abs(ratio) * sympy.Float(10) ** -25:
            return None
        ratio = now
        seen += 1
        if seen == AGREE:
            return ratio
    return None


__all__ = ["TooBig", "Unreadable", "parse_value", "proportional", "same", "same_value"]
