"""Where in a completion the answer is. Strings only, linear in their length: hostile texts must not hang it."""

from __future__ import annotations

import re
from collections import deque

THINK = re.compile(r"</?think>")
BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
BARE = re.compile(r"[^\s$\\{}]+")
ANCHOR = re.compile(r"(?:final answer|answer)\s*(?:is|:|=)\s*:?\s*", re.IGNORECASE)
# A sentence ends at a line break, or at a full stop that is followed by white space or nothing (so not within 3.14).
SENTENCE_END = re.compile(r"\n|\.(?=\s|$)")
# What may stand for itself as a mathematical expression: TeX between delimiters, or a number.
# The bound on lengths keeps a text of a million "\(" linear.
INNER = r"((?:[^$\\]|\\[\s\S])+)"  # an escaped dollar does not close
TEX = rf"(?<!\\)\$\${INNER}\$\$|(?<!\\)\${INNER}\$|\\\(([^\n]{{0,500}}?)\\\)|\\\[([^$]{{0,500}}?)\\\]"
DELIMITED = re.compile(TEX)
MATHS = re.compile(TEX + r"|(?<![\w.])([-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?)")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is a character of the answer


def outside_think(text: str) -> str:
    """The text outside think blocks. An unclosed block swallows the rest; a `</think>` that nothing opened was opened
    by the prompt, so all before it was thinking."""
    kept: list[str] = []
    inside, at = False, 0
    for tag in THINK.finditer(text):
        if tag.group() == "<think>":
            if not inside:
                kept.append(text[at : tag.start()])
            inside = True
        else:
            if not inside:
                kept.clear()
            inside, at = False, tag.end()
    if not inside:
        kept.append(text[at:])
    return "".join(kept)


def boxed(text: str) -> str | None:
    """The content of the last complete \\boxed{...} (or \\boxed 5), braces nested."""
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    closing = _closing_braces(text)
    for found in reversed(boxes):
        at = found.end()
        if at in closing:
            return text[at + 1 : closing[at]].strip()
        if bare := BARE.match(text, at):
            return bare.group()
    return None


def balanced(text: str) -> bool:
    """Whether every brace of an answer has its partner: a text cut within its box has not."""
    kinds = [found.group() for found in BRACE.finditer(text)]
    return kinds.count("{") == kinds.count("}") == len(_closing_braces(text))


def _closing_braces(text: str) -> dict[int, int]:
    """Where each opening brace is closed, in one pass."""
    opened: list[int] = []
    closing: dict[int, int] = {}
    for found in BRACE.finditer(text):
        if found.group() == "{":
            opened.append(found.start())
        elif found.group() == "}" and opened:
            closing[opened.pop()] = found.start()
    return closing


def anchored(text: str) -> str | None:
    """What follows the last "answer is" or "answer:", up to the end of its sentence."""
    found = _last(ANCHOR, text)
    if found is None:
        return None
    rest = text[found.end() :].lstrip()
    stop = SENTENCE_END.search(rest)
    return (rest[: stop.start()] if stop else rest).strip(" *") or None


def last_line(text: str) -> str | None:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else None


def delimited(text: str) -> list[str]:
    """Every expression between TeX delimiters."""
    return [_content(found) for found in DELIMITED.finditer(text)]


def last_maths(text: str) -> str | None:
    """The last expression between TeX delimiters, or the last number."""
    found = _last(MATHS, text)
    return None if found is None else _content(found)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def _content(found: re.Match[str]) -> str:
    return next(group for group in found.groups() if group is not None).strip()
