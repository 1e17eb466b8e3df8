"""Parses an answer into its shape: value, words, list, tuple or interval, set, union, matrix, relation, ratio, time.

A text may be read in two ways (32,349 is a number or two; 1,5 may be a decimal): `readings` gives each of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from bridgelm.verify.math import number
from bridgelm.verify.math.split import THOUSANDS, enclosed, items, split, tokens, words_to_commas
from bridgelm.verify.math.units import Quantity, quantity

MEMBERS = 5000
RELATIONS = {"=", "<", ">", r"\le", r"\ge", r"\ne", r"\in", r"\notin", r"\equiv", r"\approx", r"\cong", r"\Rightarrow"}
SETS = {r"\cup", r"\cap", r"\setminus", "\\\\"}
TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
PLAIN_WORDS = re.compile(r"[A-Za-z][A-Za-z'.-]*(?:[\s/,-]+[A-Za-z][A-Za-z'.-]*)*")
MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}\s*(?:\{[clr|\s]*\})?(.*)\\end\{\1\}", re.DOTALL)
CHOICE = re.compile(r"(?:(?:option|choice|answer)\s*)?\(?\s*([A-Z])\s*\)?", re.IGNORECASE)
LABELLED = re.compile(r"(?:\\text\s*\{\s*)?(?:\(\s*([A-J])\s*\)|([A-J])\s*[.:)])\s*(?:\}\s*)?(.+)")
TIME = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?\s*(?:\\text\s*\{)?\s*([ap])?\.?\s?m?\.?\s*\}?", re.IGNORECASE)
BASED = re.compile(r"([0-9A-Z]+)\s*_\s*\{?\s*(\d{1,2})\s*\}?|\(\s*([0-9A-Z]+)\s*\)\s*_\s*\{?\s*(\d{1,2})\s*\}?"
                   r"|\\text\s*\{\s*([0-9A-Z]+)\s*\}\s*_\s*\{?\s*(\d{1,2})\s*\}?")
TRANSPOSED = re.compile(r"^([(\[][^()\[\]]*,[^()\[\]]*[)\]])\s*\^\s*\{?\s*(?:T|\\top|\\intercal|\\text\{T\})\s*\}?$")
COUNTED = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
FACTOR = re.compile(r"(?<![\w.,/^{}])(\d+)\s*/\s*(\d+)(?=\s*(?:[a-zA-Z(]|\\(?:pi|sqrt|ln|log|sin|cos|theta|alpha)))")
RATIO_IN_WORDS = re.compile(r"([0-9a-z.,]+)\s*(?:\\text\s*\{\s*to\s*\}|(?<=\s)to(?=\s))\s*([0-9a-z.,]+)")
WITH_DECIMAL = re.compile(r"(.*[^\s(])\s*\(\s*(?:\\approx|=|\\text\s*\{\s*or\s*\}|or)?\s*(-?\d*\.\d{1,12})\s*\)")
DECIMAL_COMMA = re.compile(r"([-+]?)(\d+),(\d+)")
NAME = re.compile(r"(?:\\[a-zA-Z]+|[a-zA-Z])(?:_(?:\{[^{}]*\}|[0-9a-zA-Z]))?(?:\^\{?\\prime\s*\}?|'+|\^\{?\\circ\}?)?"
                  r"(?:\s*\(\s*[a-zA-Z0-9_{}\\,\s+-]*\))?(?:\^\{-1\}\s*\([a-z]\))?")
MONEY_NAMES = re.compile(r"(?:\\angle\s*|\\triangle\s*|m\\angle\s*)?[A-Z]{1,4}(?:_\{?\w+\}?)?|\|[A-Z]{2}\|"
                         r"|\\text\s*\{[^{}]*\}(?:_\{?\w+\}?)?"
                         r"|[A-Z]\([^()]*\)|(?:[a-zA-Z]+\s?){1,6}")


@dataclass(frozen=True)
class Shape:
    """`parts` are shapes; `text` is the value, the words, the brackets or the operators."""

    kind: str
    text: str = ""
    parts: tuple[Any, ...] = ()
    quantity: Quantity | None = None


def readings(text: str, gold: bool) -> list[Shape]:
    """All readings of a spelled text, the likeliest first."""
    found = [read(text, gold)]
    if THOUSANDS.search(text):
        found.append(read(text, gold, thousands=False))
    if not gold and (exact_value := _with_decimal(text)):
        found.append(read(exact_value, gold))
    if (said := FACTOR.sub(r"\\frac{\1}{\2}", text)) != text:  # 3/4 x is three quarters of x
        found.append(read(said, gold))
    if (comma := DECIMAL_COMMA.fullmatch(quantity(text, not gold).text)) and (not gold or comma.group(2) == "0"):
        sign, whole, rest = comma.groups()
        if not THOUSANDS.fullmatch(f"{whole},{rest}"):
            found.append(read(f"{sign}{whole}.{rest}", gold))
    return list(dict.fromkeys(found))


def _with_decimal(text: str) -> str | None:
    """Reads `3/4 (0.75)` as 3/4 if the decimal in parentheses is its rounded value; else None."""
    if not (found := WITH_DECIMAL.fullmatch(text)):
        return None
    value, decimal = number.exact(found.group(1)), Fraction(found.group(2))
    places = len(found.group(2).partition(".")[2])
    return found.group(1) if value is not None and abs(value - decimal) <= Fraction(1, 2 * 10**places) else None


def read(text: str, gold: bool, thousands: bool = True, depth: int = 0) -> Shape:
    text = TRANSPOSED.sub(r"\1", _peeled(text))
    if depth > 6:
        return Shape("value", text, quantity=Quantity(text))
    if special := _special(text):
        return special
    if said := _words(text, gold, depth):
        return said
    if (members := items(words_to_commas(text), thousands)) and len(members) > 1:
        if len(members) > MEMBERS:
            return Shape("value", text, quantity=Quantity(text))
        return Shape("list", "", tuple(read(member, gold, thousands, depth + 1) for member in members))
    for look in (_relation, _ratio, _union, _group, _signs):
        if found := look(text, gold, thousands, depth):
            return found
    return _value(text, gold)


def _peeled(text: str) -> str:
    """The text without braces around all of it and without punctuation at its ends."""
    text = text.strip()
    while (found := enclosed(text)) and found[0] == "{" and found[2] == "}":
        text = found[1]
    text = text.rstrip(".,; ") if not text.endswith("\\,") else text
    return text.lstrip(",; ")


def _special(text: str) -> Shape | None:
    if found := TIME.fullmatch(text):
        hour, minute, second, half = found.groups()
        half = f" {half.lower()}m" if half else ""
        return Shape("time", f"{int(hour)}:{minute}" + (f":{second}" if second else "") + half)
    if found := BASED.fullmatch(text):
        digits, base = [group for group in found.groups() if group]
        if digits.isdigit() or int(base) > 10:
            return Shape("based", f"{digits.lstrip('0') or '0'}_{int(base)}")
    if (found := MATRIX.fullmatch(text)) and r"\end{" not in found.group(2):
        rows = [row for row in split(found.group(2), {"\\\\"}) if row.strip()]
        cells = [[cell.strip() for cell in split(row.replace(r"\hline", ""), {"&"})] for row in rows]
        if len({len(row) for row in cells}) == 1 and len(cells) * len(cells[0]) <= 900:
            entries = tuple(read(cell, True, depth=2) for row in cells for cell in row)
            return Shape("matrix", f"{len(cells)}x{len(cells[0])}", entries, Quantity(text))
    if (found := enclosed(text)) and found[0] in {"(", "["} and found[1].startswith(r"\begin{"):
        return _special(found[1])
    return None


def _words(text: str, gold: bool, depth: int) -> Shape | None:
    """An answer in words, letters or names."""
    if (lower := TEXT.sub(r"\1", text).strip().lower()) in COUNTED:
        return _value(str(COUNTED.index(lower)), gold)
    if TEXT.search(text) and not re.search(r"[^\s,.;:()'\"~-]", TEXT.sub("", text)):
        said = TEXT.sub(lambda m: m.group(1), text).strip()
        if re.search(r"\d", said):
            return None if said == text else read(said, gold, depth=depth + 1)
        members = [m for m in re.split(r"\s*(?:,|;|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z]))\s*", said) if m]
        if len(members) > 1 and all(len(m.split()) < 4 for m in members):
            return Shape("list", "", tuple(Shape("words", said_as(m)) for m in members))
        return Shape("words", said_as(said))
    if PLAIN_WORDS.fullmatch(text) and (len(text) > 3 or " " in text) and re.search("[a-zA-Z]{2}", text) \
            and not re.search(r",|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])", text):
        return Shape("words", said_as(text))
    return None


def said_as(text: str) -> str:
    """Normalised words: no case, articles or punctuation; a lone letter loses its parentheses."""
    if found := CHOICE.fullmatch(text.strip().rstrip(".")):
        return found.group(1)
    text = re.sub(r"[^\w\s+-]", " ", text.lower().replace("'", "")).replace("-", " ")
    return " ".join(word for word in text.split() if word not in {"a", "an", "the"}) or text.strip()


def _relation(text: str, gold: bool, thousands: bool, depth: int) -> Shape | None:
    pieces = split(text, RELATIONS, keep=True)
    if len(pieces) < 3:
        return None
    if any(not piece.strip() for piece in pieces[::2]):
        if pieces[0].strip() or not all(piece.strip() for piece in pieces[2::2]):
            return None
        pieces = pieces[2:] if pieces[1] in {"=", r"\approx", r"\in"} else pieces  # "= 5"
        if len(pieces) == 1:
            return read(pieces[0], gold, thousands, depth + 1)
        if not pieces[0].strip():
            return None
    if r"\approx" in pieces:  # what stands before it is the exact value, if it is a value at all
        at = pieces.index(r"\approx")
        pieces = pieces[:at] if len(pieces[:at]) > 1 or not is_name(pieces[0]) else [pieces[0], "=", *pieces[at + 1:]]
        if len(pieces) == 1:
            return read(pieces[0], gold, thousands, depth + 1)
    if r"\Rightarrow" in pieces:
        at = len(pieces) - pieces[::-1].index(r"\Rightarrow")
        return read("".join(pieces[at:]), gold, thousands, depth + 1)
    first = pieces[0].strip()
    sides = [read(piece, gold, thousands, depth + 1) for piece in pieces[2::2]]
    return Shape("relation", " ".join(pieces[1::2]), (Shape("value", first, quantity=Quantity(first)), *sides))


def is_name(text: str) -> bool:
    """Whether the text only names what is asked for: x, f(x), AB, the area, (p, q)."""
    text = text.strip()
    if found := enclosed(text):
        inner = [*items(found[1])]
        return found[0] == "(" and len(inner) > 1 and all(is_name(piece) for piece in inner)
    return bool(NAME.fullmatch(text) or MONEY_NAMES.fullmatch(text))


def _ratio(text: str, gold: bool, thousands: bool, depth: int) -> Shape | None:
    said = RATIO_IN_WORDS.fullmatch(text)
    pieces = list(said.groups()) if said else split(text, {":"})
    if len(pieces) < 2 or any(not piece.strip() for piece in pieces):
        return None
    return Shape("ratio", "", tuple(read(piece, gold, thousands, depth + 1) for piece in pieces))


def _union(text: str, gold: bool, thousands: bool, depth: int) -> Shape | None:
    pieces = split(text, SETS, keep=True)
    if len(pieces) < 3 or any(not piece.strip() for piece in pieces[::2]) or len(pieces) > 199:
        return None
    parts = tuple(read(piece, gold, thousands, depth + 1) for piece in pieces[::2])
    return Shape("union", " ".join(pieces[1::2]), parts)


def _group(text: str, gold: bool, thousands: bool, depth: int) -> Shape | None:
    found = enclosed(text)
    if found is None:
        return None
    left, inside, right = found
    if left == r"\{" and right == r"\}":
        builder = re.match(r"\s*[a-zA-Z](?:\s*\\in\s*\\mathbb\{[A-Z]\})?\s*(?:\\mid|\||:)\s*(.+)", inside)
        if builder:
            return read(builder.group(1), gold, thousands, depth + 1)
        members = items(words_to_commas(inside), _spaced(inside)) if inside else []
        if len(members) > MEMBERS:
            return None
        return Shape("set", "", tuple(read(member, gold, thousands, depth + 1) for member in members))
    if left not in {"(", "[", r"\langle"} or right not in {")", "]", r"\rangle"}:
        return None
    members = items(inside, _spaced(inside) and thousands)
    if len(members) > MEMBERS:
        return None
    if len(members) == 1:
        inner = enclosed(inside)
        return read(inside, gold, thousands, depth + 1) if (left, right) in {("(", ")"), ("[", "]")} and not (
            inner and inner[0] == r"\{") else None
    brackets = left.replace(r"\langle", "(") + right.replace(r"\rangle", ")")
    return Shape("group", brackets, tuple(read(member, gold, thousands, depth + 1) for member in members))


def _spaced(inside: str) -> bool:
    """Whether blanks tell the commas between members from those within numbers: in (1,000, 2,000), not in (100,200)."""
    return bool(re.search(r",\s", inside)) and bool(THOUSANDS.search(inside))


def _signs(text: str, gold: bool, thousands: bool, depth: int) -> Shape | None:
    """The list of values of a text with plus-minus signs: each independent sign doubles them."""
    count = sum(token in {r"\pm", r"\mp"} for token in tokens(text))
    if not 1 <= count <= 3:
        return None
    values = []
    upper = r"\mp" in text
    for i in range(2 if upper else 2 ** count):
        seen = 0
        made = []
        for token in tokens(text):
            if token in {r"\pm", r"\mp"}:
                bit = (i if upper else i >> seen) & 1
                made.append("-" if (bit == 1) == (token == r"\pm") else "+")
                seen += 1
            else:
                made.append(token)
        values.append(_value("".join(made).strip().removeprefix("+"), gold))
    return Shape("list", "pm", tuple(dict.fromkeys(values)))


def _value(text: str, gold: bool) -> Shape:
    found = quantity(text, single=not gold)
    return Shape("value", found.text, quantity=found)
