"""Accuracy of every method by difficulty of the problem and by length of the answer.

A mean can hide that one method gains where another loses."""

from __future__ import annotations

import math
from dataclasses import asdict
from statistics import fmean
from typing import Any

from bridgelm.analysis.comparison import Comparison, MethodRuns
from bridgelm.analysis.stats import Estimate, mean_interval, wilson
from bridgelm.reports.panels import colours
from bridgelm.reports.text import Table, interval
from bridgelm.runs.reader import Run

HEADING = "By difficulty and by length"
MOST = 8  # columns of levels; more are taken together
ENDS = 0.1  # of a training, at either end, that its first and last lengths are a mean over

Level = tuple[float, ...]  # the levels that a column holds
Cells = dict[float, tuple[float, int]]  # level -> accuracy, problems


def cells(run: Run, part: str) -> Cells:
    """Final test accuracy at each level of `by_difficulty` or `by_length`."""
    found = ((run.result or {}).get("final") or {}).get(part) or {}
    return {float(key): (value[0], int(value[1])) for key, value in found.items()
            if _is_number(key) and isinstance(value, list) and len(value) == 2 and value[0] is not None and value[1]}


def columns(comparison: Comparison, part: str) -> list[Level]:
    """The levels; of more than `MOST` neighbours are put together, about equally many problems in each column."""
    counts: dict[float, int] = {}
    for run in comparison.runs:
        for level, (_, n) in cells(run, part).items():
            counts[level] = counts.get(level, 0) + n
    levels, total = sorted(counts), sum(counts.values())
    if len(levels) <= MOST:
        return [(level,) for level in levels]
    out: list[list[float]] = [[] for _ in range(MOST)]
    before = 0.0
    for level in levels:
        out[min(MOST - 1, int(MOST * (before + counts[level] / 2) / total))].append(level)
        before += counts[level]
    return [tuple(column) for column in out if column]


def estimate(method: MethodRuns, part: str, column: Level) -> Estimate | None:
    """Mean over the seeds with its interval; with one seed the interval is over problems (Wilson)."""
    found = []
    for run in method.by_seed.values():
        inside = [cell for level, cell in cells(run, part).items() if level in column]
        if inside:
            n = sum(count for _, count in inside)
            found.append((sum(accuracy * count for accuracy, count in inside) / n, n))
    if len(found) == 1:
        value, n = found[0]
        return Estimate(value, *wilson(value * n, n), 1)
    return mean_interval(value for value, _ in found)


def level_table(comparison: Comparison, part: str, what: str) -> Table | None:
    """Accuracy in each column; a level of one value alone is no level."""
    there = columns(comparison, part)
    if len(there) < 2:
        return None
    names = [f"{column[0]:g}" if len(column) == 1 else f"{column[0]:g}–{column[-1]:g}" for column in there]
    rows = [[method.label, *(interval(estimate(method, part, column)) for column in there)]
            for method in comparison.methods]
    caption = (f"Final test accuracy in percent by {what}, with 95 % intervals: over seeds, or, with one seed, over "
               "problems.")
    return Table(["method", *names], rows, colours(comparison), caption)


def length_table(comparison: Comparison) -> Table:
    rows = []
    for method in comparison.methods:
        found = lengths(method)
        rows.append([method.label, *(_tokens(found[key]) for key in ("first", "last", "final")),
                     interval(found["truncated"])])
    headers = ["method", "in training, at first", "in training, at last", "final, test", "final, cut at the limit, %"]
    return Table(headers, rows, colours(comparison),
                 f"Tokens of an answer. In training: the first and the last {ENDS:.0%} of the steps that drew answers.")


def lengths(method: MethodRuns) -> dict[str, Estimate | None]:
    runs = method.by_seed.values()
    final = [((run.result or {}).get("final") or {}) for run in runs]
    ends = [found for run in runs if (found := training_ends(run))]
    return {"first": mean_interval(first for first, _ in ends), "last": mean_interval(last for _, last in ends),
            "final": mean_interval(part["length"] for part in final if part.get("length") is not None),
            "truncated": mean_interval(part["truncated"] for part in final if part.get("truncated") is not None)}


def training_ends(run: Run) -> tuple[float, float] | None:
    values = [value for _, value in run.series("length")]
    if not values:
        return None
    n = max(1, math.ceil(ENDS * len(values)))
    return fmean(values[:n]), fmean(values[-n:])


def level_tables(comparison: Comparison) -> list[Table]:
    found = [level_table(comparison, "by_difficulty", "difficulty"),
             level_table(comparison, "by_length", "length of the answer, in tokens up to"), length_table(comparison)]
    return [table for table in found if table and any(cell != "–" for row in table.rows for cell in row[1:])]


def data(comparison: Comparison) -> dict[str, Any]:
    """Plain data for the JSON file: method -> what -> level -> estimate."""
    out: dict[str, Any] = {}
    for method in comparison.methods:
        parts: dict[str, Any] = {"length": {key: _plain(value) for key, value in lengths(method).items()}}
        for part in ("by_difficulty", "by_length"):
            parts[part] = {"–".join(f"{end:g}" for end in dict.fromkeys((column[0], column[-1]))):
                           _plain(estimate(method, part, column)) for column in columns(comparison, part)}
        out[method.label] = parts
    return out


def _plain(value: Estimate | None) -> dict[str, Any] | None:
    return asdict(value) if value else None


def _tokens(value: Estimate | None) -> str:
    if value is None:
        return "–"
    if value.low is None or value.high is None:
        return f"{value.value:.1f}"
    return f"{value.value:.1f} [{value.low:.1f}, {value.high:.1f}]"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False

