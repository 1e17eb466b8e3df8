"""Finds benchmark items among the training problems: the same text, or long stretches of it. No torch."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bridgelm.benchmarks.suites import Items
from bridgelm.types import Problem

WORDS = 10  # of a stretch
SHARE = 0.5  # of an item's stretches that one training problem must hold
# TeX that changes the look and not the text, and white space in its spellings.
LOOKS = re.compile(r"\\(?:left|right|displaystyle|q?quad|[,;:! ])|[$~{}]")
FRACTION = re.compile(r"\\[dt]?frac(?:(\d)(\d))?")  # \frac12 is \frac{1}{2}
# One or two letters are taken for single ones: `jx` is `j x`.
TOKEN = re.compile(r"\d+|[^\W\d_]{3,}|[^\W\d_]|[^\w\s]")


@dataclass(frozen=True)
class Overlap:
    """Pairs of (item, training problem). `near` holds those that are not the same, with the share of the item found."""

    suite: str
    items: int
    same: tuple[tuple[str, str], ...]
    near: tuple[tuple[str, str, float], ...]


def words(problem: Problem) -> list[str]:
    """The user's text in lower case, cut into words, numbers and signs, whatever its spaces and looks."""
    text = "\n".join(message["content"] for message in problem.messages if message["role"] == "user")
    text = FRACTION.sub(r"\\frac \1 \2", unicodedata.normalize("NFKC", text))
    return TOKEN.findall(LOOKS.sub(" ", text).casefold())


def overlaps(training: Sequence[Problem], suites: Sequence[Items]) -> list[Overlap]:
    """One pass over the training problems, against an index of all suites' stretches of WORDS words."""
    tokens = {(items.suite, problem.id): words(problem) for items in suites for problem in items.problems}
    whole: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    index: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for item, own in tokens.items():
        whole.setdefault(tuple(own), []).append(item)
        for stretch in _stretches(own):
            index.setdefault(stretch, []).append(item)
    same: dict[tuple[str, str], str] = {}
    near: dict[tuple[str, str], tuple[str, float]] = {}
    for problem in training:
        own = words(problem)
        for item in whole.get(tuple(own), ()):
            same.setdefault(item, problem.id)
        shared = Counter(item for stretch in _stretches(own) for item in index.get(stretch, ()))
        for item, count in shared.items():
            share = count / len(_stretches(tokens[item]))
            if share >= SHARE and share > near.get(item, ("", 0.0))[1]:
                near[item] = (problem.id, share)
    return [_of(items, same, near) for items in suites]


def _stretches(own: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(own[start:start + WORDS]) for start in range(len(own) - WORDS + 1)}


def _of(items: Items, same: Mapping[tuple[str, str], str],
        near: Mapping[tuple[str, str], tuple[str, float]]) -> Overlap:
    keys = [(items.suite, problem.id) for problem in items.problems]
    return Overlap(items.suite, len(keys), tuple((key[1], same[key]) for key in keys if key in same),
                   tuple((key[1], *near[key]) for key in keys if key in near and key not in same))


def report(found: Sequence[Overlap], shown: int = 3) -> str:
    """A line a suite, and the first few pairs."""
    lines = []
    for one in found:
        lines.append(f"  {one.suite:<14}{len(one.same)} of {one.items} items are there, {len(one.near)} more have half "
                     f"or more of their {WORDS}-word stretches in one of them")
        lines += [f"    {item} = {problem}" for item, problem in one.same[:shown]]
        lines += [f"    {item} ~ {problem} ({share:.0%})" for item, problem, share in
                  sorted(one.near, key=lambda pair: -pair[2])[:shown]]
    return "\n".join(lines)
