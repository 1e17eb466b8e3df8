"""Splits TeX at separators outside brackets, in linear time; \\{ and half-open intervals do not confuse it."""

from __future__ import annotations

import re

TOKEN = re.compile(r"\\begin\{[a-z]*\*?\}|\\end\{[a-z]*\*?\}"
                   r"|\\text\s*\{[^{}]*\}|\\[{}|]|\\[a-zA-Z]+|\\.|[0-9]+|\s+|.", re.DOTALL)
OPEN = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\langle": r"\rangle", r"\lfloor": r"\rfloor",
        r"\lceil": r"\rceil"}
CLOSE = {*OPEN.values(), ")", "]"}
ROUND = {"(", ")", "[", "]"}
JOINS = re.compile(r"\s*(?:and|or|and/or|&)\s*", re.IGNORECASE)
THOUSANDS = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")


def tokens(text: str) -> list[str]:
    return TOKEN.findall(text)


def depths(parts: list[str]) -> list[int]:
    """How many brackets are open before each token. Round and square ones close each other: [0, 1)."""
    found: list[int] = []
    stack: list[str] = []
    for part in parts:
        if part in CLOSE or part.startswith(r"\end{"):
            if stack and (stack[-1] == part or (part in ROUND and stack[-1] in {")", "]"}) or part[0:4] == r"\end"):
                stack.pop()
            found.append(len(stack))
        else:
            found.append(len(stack))
            if part in OPEN:
                stack.append(OPEN[part])
            elif part.startswith(r"\begin{"):
                stack.append(r"\end")
    return found


def split(text: str, at: set[str], keep: bool = False) -> list[str]:
    """The pieces between top-level tokens that are in `at`; with `keep` the tokens too, at odd places."""
    parts = tokens(text)
    pieces, current = [], []
    for part, depth in zip(parts, depths(parts), strict=True):
        if depth == 0 and part in at:
            pieces.append("".join(current))
            if keep:
                pieces.append(part)
            current = []
        else:
            current.append(part)
    return [*pieces, "".join(current)]


def items(text: str, thousands: bool = True) -> list[str]:
    """The members of a list: between commas, semicolons, `and`, `or`. Semicolons, where there are any, cut first."""
    if ";" in text and len(cut := split(text, {";"})) > 1:
        return [piece.strip() for piece in cut if piece.strip()]
    if thousands:
        text = THOUSANDS.sub(lambda m: m.group().replace(",", "\x00"), text)
    parts = tokens(text)
    pieces: list[list[str]] = [[]]
    for part, depth in zip(parts, depths(parts), strict=True):
        if depth == 0 and (part in {",", r"\lor", r"\land", r"\\"} or _joins(part)):
            pieces.append([])
        else:
            pieces[-1].append(part)
    found = ["".join(piece).replace("\x00", ",").strip() for piece in pieces]
    return [piece for piece in found if piece]


def _joins(part: str) -> bool:
    if part.startswith(r"\text"):
        return bool(JOINS.fullmatch(part[part.index("{") + 1:-1].strip(" ,;")))
    return False


def words_to_commas(text: str) -> str:
    """`and` and `or` in plain text as commas; those within \\text{...} stay."""
    parts = re.split(r"(\\text\s*\{[^{}]*\})", text)
    parts[::2] = [re.sub(r"\s*,?\s*(?<![a-zA-Z\\])(?:[Aa]nd/or|[Aa]nd|AND|[Oo]r|OR)(?![a-z])\s*,?\s*", ", ", part)
                  for part in parts[::2]]
    joined = "".join(parts)
    return re.sub(r"\s*,?\s*\\text\s*\{\s*,?\s*(?:and|or)\s*\}\s*,?\s*", ", ", joined, flags=re.IGNORECASE)


def enclosed(text: str) -> tuple[str, str, str] | None:
    """Opening bracket, inside and closing bracket, if one pair encloses all of the text."""
    parts = tokens(text.strip())
    if len(parts) < 2 or parts[0] not in OPEN or parts[-1] not in CLOSE:
        return None
    before = depths(parts)
    if any(depth == 0 for depth in before[1:-1]) or before[-1] != 0:
        return None
    return parts[0], "".join(parts[1:-1]).strip(), parts[-1]
