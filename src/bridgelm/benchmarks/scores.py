"""Computes figures from kept answers: pass@1, avg@k and pass@k with intervals, breakdowns, and paired comparisons of
models.

An item's score is its greedy verdict (1 or 0) or the share of right ones among its samples. Answers that the grader
failed on are left out and their share is told. Intervals are over items: they say what other items of the same kind
would give, not what another training run would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bridgelm.analysis import stats
from bridgelm.benchmarks.suites import Suite
from bridgelm.types import Problem

Answer = Mapping[str, Any]  # a line of the file of samples
Scores = dict[str, float]  # item -> score
KS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DRAWS, FLIPS = 2000, 10_000


def scores(answers: Sequence[Answer], sampled: bool) -> Scores:
    """The score of each item; answers that the grader failed on are left out."""
    found: dict[str, list[int]] = {}
    for one in answers:
        if (one["draw"] > 0) == sampled and one["verdict"] != "error":
            found.setdefault(one["id"], []).append(one["verdict"] == "correct")
    return {item: float(np.mean(values)) for item, values in found.items()}


def summary(suite: Suite, problems: Sequence[Problem], answers: Sequence[Answer], k: int) -> dict[str, Any]:
    greedy = [one for one in answers if one["draw"] == 0]
    own = scores(answers, sampled=False)
    hits = round(sum(own.values()))
    found: dict[str, Any] = {"greedy": {
        "accuracy": hits / max(1, len(own)), "interval": list(stats.wilson(hits, len(own))), "correct": hits,
        "n": len(own), **_shares(greedy)}}
    if k:
        found["sampled"] = _sampled([one for one in answers if one["draw"] > 0], k)
    found["by"] = {name: cells for name, column in (("level", suite.level), ("subject", suite.subject)) if column
                   if (cells := _cells({problem.id: _column(problem, column) for problem in problems}, own))}
    found["by"]["length"] = _cells({one["id"]: f"up to {_power(one['tokens'])} tokens" for one in greedy}, own)
    return found


def _shares(answers: Sequence[Answer]) -> dict[str, float]:
    """Answers cut at the limit, failures of the grader, and the mean length in tokens."""
    count = max(1, len(answers))
    return {"truncated": sum(not one["finished"] for one in answers) / count,
            "errors": sum(one["verdict"] == "error" for one in answers) / count,
            "length": sum(one["tokens"] for one in answers) / count}


def _sampled(answers: Sequence[Answer], k: int) -> dict[str, Any]:
    graded: dict[str, list[bool]] = {}
    for one in answers:
        if one["verdict"] != "error":
            graded.setdefault(one["id"], []).append(one["verdict"] == "correct")
    means = [float(np.mean(values)) for values in graded.values()]
    pass_k = {}
    for size in dict.fromkeys([*(s for s in KS if s <= k), k]):
        chances = [stats.pass_at_k(len(v), sum(v), size) for v in graded.values() if len(v) >= size]
        pass_k[str(size)] = {"value": float(np.mean(chances)) if chances else None, "n": len(chances),
                             "interval": bootstrap([chances])}
    return {"k": k, "avg": float(np.mean(means)) if means else None, "interval": bootstrap([means]), "n": len(means),
            "pass": pass_k, **_shares(answers)}


def _column(problem: Problem, column: str) -> Any:
    return problem.difficulty if column == "difficulty" else problem.columns.get(column)


def _power(tokens: int) -> int:
    return 2 ** math.ceil(math.log2(max(8, tokens)))


def _cells(key: Mapping[str, Any], own: Scores) -> dict[str, dict[str, Any]]:
    cells: dict[Any, list[float]] = {}
    for item, value in own.items():
        if key.get(item) is not None:
            cells.setdefault(key[item], []).append(value)
    return {f"{name:g}" if isinstance(name, float) else str(name):
            {"accuracy": float(np.mean(values)), "n": len(values),
             "interval": list(stats.wilson(sum(values), len(values)))}
            for name, values in sorted(cells.items(), key=lambda cell: _natural(cell[0]))}


def _natural(name: Any) -> tuple[float, str]:
    digits = "".join(c for c in str(name) if c.isdigit())
    return float(digits or "inf"), str(name)


def headline(result: Mapping[str, Any]) -> tuple[float | None, list[float]]:
    """What stands in a table: avg@k where the suite is so small that samples are drawn, else greedy pass@1."""
    if "sampled" in result:
        return result["sampled"]["avg"], result["sampled"]["interval"]
    return result["greedy"]["accuracy"], result["greedy"]["interval"]


def bootstrap(strata: Sequence[Sequence[float]], seed: int = 0) -> list[float]:
    """95 % percentile interval of the mean of the strata's means, items drawn anew within each. Where all scores are
    the same, drawing anew shows nothing: Wilson's interval of so many items."""
    pooled = [value for values in strata for value in values]
    if not pooled or min(pooled) == max(pooled):
        return list(stats.wilson(sum(pooled), len(pooled)))
    rng = np.random.default_rng(seed)
    means = np.zeros(DRAWS)
    for values in strata:
        array = np.asarray(values, dtype=np.float64)
        means += array[rng.integers(0, len(array), (DRAWS, len(array)))].mean(1) / len(strata)
    return [float(q) for q in np.quantile(means, [0.025, 0.975])]


def averages(by_suite: Mapping[str, Scores]) -> dict[str, Any]:
    """Macro: every suite counts the same; micro: every item does."""
    strata = [list(own.values()) for own in by_suite.values() if own]
    pooled = [value for values in strata for value in values]
    if not pooled:
        return {}
    return {"macro": {"value": float(np.mean([np.mean(v) for v in strata])), "interval": bootstrap(strata)},
            "micro": {"value": float(np.mean(pooled)), "interval": bootstrap([pooled]), "n": len(pooled)},
            "suites": len(strata)}


def compare(first: Mapping[str, Scores], second: Mapping[str, Scores]) -> dict[str, dict[str, Any]]:
    """First minus second on the items that both have: each suite, the macro and the micro average. p: exact McNemar
    where every score is 0 or 1, else random signs of the differences."""
    gaps = {suite: np.array([first[suite][item] - second[suite][item]
                             for item in sorted(first[suite].keys() & second[suite].keys())])
            for suite in first if suite in second}
    gaps = {suite: values for suite, values in gaps.items() if len(values)}
    found = {suite: _difference([values]) for suite, values in gaps.items()}
    for suite in found:
        own, other = first[suite], second[suite]
        if {*own.values(), *other.values()} <= {0.0, 1.0}:
            found[suite]["p"] = stats.mcnemar(own, other)
    if len(gaps) > 1:
        found["macro"] = _difference(list(gaps.values()))
        found["micro"] = _difference([np.concatenate(list(gaps.values()))])
    return found


def _difference(strata: Sequence[np.ndarray], seed: int = 0) -> dict[str, Any]:
    rng, observed = np.random.default_rng(seed), float(np.mean([values.mean() for values in strata]))
    flipped = np.zeros(FLIPS)
    for values in strata:
        for start in range(0, FLIPS, 1000):  # all at once would take 400 MB for the largest suite
            signs = rng.integers(0, 2, (1000, len(values))) * 2.0 - 1.0
            flipped[start:start + 1000] += signs @ values / len(values) / len(strata)
    beyond = int((np.abs(flipped) >= abs(observed) - 1e-12).sum())
    return {"difference": observed, "interval": bootstrap([list(values) for values in strata]),
            "p": (1 + beyond) / (1 + len(flipped)), "n": sum(len(values) for values in strata),
            "better": int(sum((values > 0).sum() for values in strata)),
            "worse": int(sum((values < 0).sum() for values in strata))}
