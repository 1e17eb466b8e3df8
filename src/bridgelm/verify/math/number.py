"""Reads plain numbers as exact fractions, the cheap path that decides most answers."""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 4000  # the most digits that are read, and the largest exponent
PLAIN = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
SIGN = r"(?P<sign>[-+]?)\s*"
DECIMAL = re.compile(rf"{SIGN}(?P<number>{PLAIN})")
RATIO = re.compile(rf"{SIGN}(?P<top>{PLAIN})\s*/\s*(?P<bottom>{PLAIN})")
TEX_RATIO = re.compile(rf"{SIGN}\\frac\{{\s*(?P<inner>[-+]?)\s*(?P<top>{PLAIN})\s*\}}"
                       rf"\{{\s*(?P<below>-?)\s*(?P<bottom>{PLAIN})\s*\}}")
MIXED = re.compile(rf"{SIGN}(?P<whole>\d+)\s*(?:\\frac\{{\s*(?P<a>\d+)\s*\}}\{{\s*(?P<b>\d+)\s*\}}"
                   r"|\s(?P<c>\d+)\s*/\s*(?P<d>\d+))")
SCIENCE = re.compile(rf"{SIGN}(?P<number>{PLAIN})\s*"
                     r"(?:(?:\\times|\\cdot)\s*10\s*\^\s*(?:\{\s*(?P<up>[-+]?\d+)\s*\}|(?P<bare>\d))"
                     r"|[eE](?P<e>[-+]?\d{1,4}))")
REPEATING = re.compile(rf"{SIGN}(?P<whole>\d*)\.(?P<fixed>\d*)\\(?:overline|bar|dot)\s*\{{\s*(?P<cycle>\d+)\s*\}}")


def exact(text: str) -> Fraction | None:
    """The value of a plain number, fraction, mixed number, repeating decimal or power of ten; None for all else."""
    text = text.strip()
    while text.startswith("{") and text.endswith("}") and "{" not in text[1:-1]:
        text = text[1:-1].strip()
    if not text or len(text) > LONGEST or text[0] not in "+-.\\0123456789":
        return None
    for pattern, read in READERS:
        if found := pattern.fullmatch(text):
            value = read(found)
            if value is None:
                return None
            return -value if found["sign"] == "-" else value
    return None


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", "").rstrip(".") or "0")


def _quotient(top: Fraction, bottom: Fraction) -> Fraction | None:
    return top / bottom if bottom else None


def _ratio(found: re.Match[str]) -> Fraction | None:
    return _quotient(_decimal(found["top"]), _decimal(found["bottom"]))


def _tex_ratio(found: re.Match[str]) -> Fraction | None:
    value = _quotient(_decimal(found["top"]), _decimal(found["bottom"]))
    if value is None:
        return None
    return -value if (found["inner"] == "-") != (found["below"] == "-") else value


def _mixed(found: re.Match[str]) -> Fraction | None:
    """2\\frac{1}{2} is 2 + 1/2; with an improper fraction it is a product, which is not read here."""
    top, bottom = (found["a"], found["b"]) if found["a"] else (found["c"], found["d"])
    if int(top) >= int(bottom):
        return None
    return int(found["whole"]) + Fraction(int(top), int(bottom))


def _science(found: re.Match[str]) -> Fraction | None:
    exponent = int(found["up"] or found["bare"] or found["e"])
    return None if abs(exponent) > LONGEST else _decimal(found["number"]) * Fraction(10) ** exponent


def _repeating(found: re.Match[str]) -> Fraction:
    whole, fixed, cycle = found["whole"] or "0", found["fixed"], found["cycle"]
    tail = Fraction(int(cycle), 10 ** len(cycle) - 1) / 10 ** len(fixed)
    return int(whole) + (Fraction(int(fixed), 10 ** len(fixed)) if fixed else 0) + tail


READERS = [(DECIMAL, lambda found: _decimal(found["number"])), (RATIO, _ratio), (TEX_RATIO, _tex_ratio),
           (MIXED, _mixed), (SCIENCE, _science), (REPEATING, _repeating)]
