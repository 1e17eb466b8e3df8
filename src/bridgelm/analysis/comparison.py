"""Compares finished runs: groups them by method, and computes figures with intervals and paired differences.

Two figures are kept apart. *Test* accuracy is measured once, at the end, for the final weights and for those that were
best on validation. *Equal budget* accuracy is read off the validation curve: the last look at or below the budget.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from bridgelm.analysis.arms import BOOKKEEPING, unequal
from bridgelm.analysis.stats import (
    Difference,
    Estimate,
    at_budget,
    equivalence,
    holm,
    mean_height,
    mean_interval,
    paired_bootstrap,
    paired_difference,
)
from bridgelm.config import plugins
from bridgelm.config.run_config import RunConfig
from bridgelm.errors import UserError
from bridgelm.runs.reader import Run

SHARED = ("model", "data", "reward", "rollout", "eval")  # what compared runs must have in common
MARGIN = 0.02  # accuracies closer than two points are called equal, if a TOST says so at 5 %
ALPHA = 0.05
LONG = 8  # methods after which a table is sorted by final test accuracy

Reader = Callable[[Run], float | None]


def _result(part: str, *keys: str) -> Reader:
    def read(run: Run) -> float | None:
        node: Any = (run.result or {}).get(part)
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    return read


# name -> (heading, reader). Accuracies first, then costs.
ACCURACIES: dict[str, tuple[str, Reader]] = {
    "final": ("final, test", _result("final", "accuracy")),
    "best": ("best on validation, test", _result("best", "accuracy")),
    "hard": ("hard tier, test", _result("final", "hard", "accuracy")),
    "avg_k": ("sampled mean, test", _result("final", "avg_k")),
}
COSTS: dict[str, tuple[str, Reader]] = {
    "rollouts": ("rollouts", lambda run: run.last("rollouts")),
    "flops": ("FLOPs", lambda run: run.last("flops")),
    "seconds": ("wall time", lambda run: run.last("seconds")),
    "cpu_seconds": ("CPU time", lambda run: run.info.get("cpu_seconds")),
    "memory": ("peak memory, MB",
               lambda run: run.info.get("peak_device_memory_mb") or run.info.get("peak_memory_mb")),
}


@dataclass(frozen=True)
class MethodRuns:
    """The runs of one configuration; they differ in nothing but the seed."""

    label: str
    runs: tuple[Run, ...]

    @cached_property
    def by_seed(self) -> dict[int, Run]:
        return {run.seed: run for run in self.runs}

    def values(self, read: Reader) -> dict[int, float]:
        found = {seed: read(run) for seed, run in self.by_seed.items()}
        return {seed: float(value) for seed, value in found.items() if value is not None}

    def at(self, axis: str, budget: float) -> dict[int, float]:
        """Validation accuracy at a budget of rollouts, flops or seconds, by seed."""
        return self.values(lambda run: at_budget(*curve(run, axis), budget))

    @property
    def rolls(self) -> bool:
        return any((run.last("rollouts") or 0) > 0 for run in self.runs)


@dataclass(frozen=True)
class Claim:
    """The base method against another one in one figure."""

    figure: str
    heading: str
    other: str
    difference: Difference
    p_holm: float | None
    p_equal: float | None
    verdict: str  # ahead | behind | equal | unclear
    budget: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Everything that the report says, before it is laid out."""

    methods: tuple[MethodRuns, ...]
    table: dict[str, dict[str, Estimate | None]]  # label -> figure -> estimate
    budgets: dict[str, float | None]  # "rollouts", "flops": the common ones
    claims: tuple[Claim, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)
    unequal: Mapping[str, str] = field(default_factory=dict)  # what differs beside the method -> who has what

    @property
    def base(self) -> MethodRuns:
        return self.methods[0]

    @property
    def runs(self) -> list[Run]:
        return [run for method in self.methods for run in method.runs]

    def data(self) -> dict[str, Any]:
        """Plain data for comparison.json."""
        rows = {label: {key: asdict(value) if value else None for key, value in row.items()}
                for label, row in self.table.items()}
        runs = {method.label: {str(run.seed): str(run.path) for run in method.runs} for method in self.methods}
        return {"base": self.base.label, "runs": runs, "budgets": self.budgets, "table": rows,
                "claims": [asdict(claim) for claim in self.claims], "notes": list(self.notes),
                "unequal": dict(self.unequal)}


def curve(run: Run, axis: str) -> tuple[list[float], list[float]]:
    """The validation curve over rollouts, flops, seconds or step."""
    points = [(event[axis], event["accuracy"]) for event in run.evals
              if event.get(axis) is not None and event.get("accuracy") is not None]
    return [x for x, _ in points], [y for _, y in points]


def disagreement(first: Mapping[str, Any], second: Mapping[str, Any], sections: Sequence[str] = SHARED) -> str | None:
    """The first dotted key on which two resolved configurations differ within `sections`."""
    for key in sections:
        a, b = first.get(key), second.get(key)
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            return f"{key}.{disagreement(a, b, sorted({*a, *b}))}"
        return key
    return None


def group(runs: Sequence[Run]) -> list[MethodRuns]:
    """Runs of the same configuration, seed and bookkeeping apart, in the order in which they were given."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps({k: v for k, v in run.config.items() if k not in BOOKKEEPING}, sort_keys=True)
        groups.setdefault(key, []).append(run)
    methods: list[MethodRuns] = []
    taken: dict[str, int] = {}
    for members in groups.values():
        label = _label(members)
        taken[label] = taken.get(label, 0) + 1
        methods.append(MethodRuns(label if taken[label] == 1 else f"{label} #{taken[label]}", tuple(members)))
    return methods


def _label(members: Sequence[Run]) -> str:
    """The runs' common name without its seed (bridge-seed3 -> bridge), else the method's own name."""
    stems = {re.sub(r"[-_.]?(seed|s)?[-_]?\d+$", "", run.name) or run.name for run in members}
    if len(members) == 1:
        stems = {re.sub(r"[-_.](seed|s)[-_]?\d+$", "", members[0].name)}
    if len(stems) == 1:
        return stems.pop()
    options = members[0].config.get("method", {})
    stages = [plugins.short(stage["method"]["name"]) for stage in options.get("stages", [])]
    return " then ".join(stages) if stages else members[0].method


def analyse(runs: Sequence[Run], base: str | None = None) -> Comparison:
    """`base` is the label of the method that the others are compared with; without it, that of the
    first run."""
    if not runs:
        raise UserError("report: no run folders given; name one or more, e.g. runs/bridge")
    methods = group(runs)
    labels = [method.label for method in methods]
    if base is not None and base not in labels:
        raise UserError(f"base method {base!r} is not among the runs; one of: {', '.join(labels)}")
    first = next((m for m in methods if m.label == base), methods[0])
    methods = [first, *(method for method in methods if method is not first)]
    budgets = {axis: common_budget(methods, axis) for axis in ("rollouts", "flops")}
    table = {method.label: _row(method, budgets) for method in methods}
    if len(methods) > LONG:
        final = {label: found.value if (found := row["final"]) else -1.0 for label, row in table.items()}
        methods = [first, *sorted(methods[1:], key=lambda method: -final[method.label])]
    claims = tuple(claim for figure in [*ACCURACIES, "at_rollouts", "at_flops"]
                   for claim in _claims(methods[0], methods[1:], figure))
    differing = _unequal(methods)
    said = [f"Not equal: {name}: {who}." for name, who in differing.items()]
    return Comparison(tuple(methods), table, budgets, claims, (*said, *_notes(methods)), differing)


def _unequal(methods: Sequence[MethodRuns]) -> dict[str, str]:
    """What differs among settings that are still understood. A run of an older version is told by what else is
    compared."""
    configs = {}
    for method in methods:
        try:
            configs[method.label] = RunConfig.model_validate(method.runs[0].config)
        except ValidationError:
            return {"settings": f"those of {method.label} are of another version and cannot be compared"}
    return unequal(configs)


def common_budget(methods: Sequence[MethodRuns], axis: str) -> float | None:
    """The largest amount that all methods reached with every seed; for rollouts, among those that have any."""
    counted = [method for method in methods if method.rolls] if axis == "rollouts" else methods
    reached = [run.last(axis) for method in counted for run in method.runs]
    return min((value for value in reached if value is not None), default=None)


def _row(method: MethodRuns, budgets: Mapping[str, float | None]) -> dict[str, Estimate | None]:
    row = {key: mean_interval(method.values(read).values()) for key, (_, read) in {**ACCURACIES, **COSTS}.items()}
    for axis, budget in budgets.items():
        row[f"at_{axis}"] = None if budget is None else mean_interval(method.at(axis, budget).values())
    until = budgets["rollouts"]
    area = method.values(lambda run: mean_height(*curve(run, "rollouts"), until)) if method.rolls else {}
    row["area"] = mean_interval(area.values())
    if len(method.runs) == 1:
        row = {key: _over_problems(method.runs[0], key, value) for key, value in row.items()}
    return row


def _over_problems(run: Run, key: str, estimate: Estimate | None) -> Estimate | None:
    """Intervals of the test figures over problems (Wilson), for one seed, which has no other spread to show."""
    interval = _result(key, "interval")(run) if key in {"final", "best"} else None
    if estimate is None or not isinstance(interval, list):
        return estimate
    return Estimate(estimate.value, interval[0], interval[1], 1)


def _claims(base: MethodRuns, others: Sequence[MethodRuns], figure: str) -> list[Claim]:
    found = [(other, *_difference(base, other, figure)) for other in others]
    known = [(other, difference, budget) for other, difference, budget in found if difference is not None]
    adjusted = holm([difference.p for _, difference, _ in known])
    claims = []
    for (other, difference, budget), p in zip(known, adjusted):
        heading = ACCURACIES[figure][0] if figure in ACCURACIES else f"equal {COSTS[figure[3:]][0]}, validation"
        p_equal = equivalence(_gaps(base, other, figure), MARGIN) if difference.unit == "seeds" else None
        verdict = judge(difference, p, p_equal)
        claims.append(Claim(figure, heading, other.label, difference, p, p_equal, verdict, budget))
    return claims


def _figure(method: MethodRuns, figure: str, budget: float | None) -> dict[int, float]:
    if figure in ACCURACIES:
        return method.values(ACCURACIES[figure][1])
    return {} if budget is None else method.at(figure[3:], budget)


def _budget(base: MethodRuns, other: MethodRuns, figure: str) -> float | None:
    """Two methods are compared at the smaller of their own two budgets, not at the smallest of all methods."""
    return None if figure in ACCURACIES else common_budget([base, other], figure[3:])


def _gaps(base: MethodRuns, other: MethodRuns, figure: str) -> list[float]:
    budget = _budget(base, other, figure)
    first, second = _figure(base, figure, budget), _figure(other, figure, budget)
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def _difference(base: MethodRuns, other: MethodRuns, figure: str) -> tuple[Difference | None, float | None]:
    budget = _budget(base, other, figure)
    difference = paired_difference(_figure(base, figure, budget), _figure(other, figure, budget))
    if difference and difference.n == 1 and figure in {"final", "best"}:
        seed = min(base.by_seed.keys() & other.by_seed.keys())
        right = [_result(figure, "correct")(method.by_seed[seed]) for method in (base, other)]
        if isinstance(right[0], dict) and isinstance(right[1], dict):
            difference = paired_bootstrap(right[0], right[1]) or difference
    return difference, budget


def judge(difference: Difference, p: float | None, p_equal: float | None) -> str:
    """One training seed shows nothing about a method, however many problems were asked: unclear."""
    if difference.unit != "seeds" or p is None:
        return "unclear"
    if p < ALPHA and difference.value != 0:
        return "ahead" if difference.value > 0 else "behind"
    return "equal" if p_equal is not None and p_equal < ALPHA else "unclear"


def _notes(methods: Sequence[MethodRuns]) -> list[str]:
    """What a reader must know before believing the table."""
    runs = [run for method in methods for run in method.runs]
    notes = []
    key = next((key for run in runs if (key := disagreement(runs[0].config, run.config))), None)
    if key:
        notes.append(f"Not a fair comparison: the runs differ in {key}.")
    open_runs = [run.name for run in runs if run.status != "finished"]
    if open_runs:
        more = f" and {len(open_runs) - 6} more" if len(open_runs) > 6 else ""
        notes.append(f"{len(open_runs)} of {len(runs)} runs are not finished: {', '.join(open_runs[:6])}{more}.")
    seeds = {frozenset(method.by_seed) for method in methods}
    if len(seeds) > 1:
        notes.append("The methods were not run with the same seeds; differences use the seeds that two have in common.")
    if any(len(method.by_seed) < len(method.runs) for method in methods):
        notes.append("Some runs repeat a seed of the same configuration; the last one given counts.")
    most = max(len(method.by_seed) for method in methods)
    if len(methods) > 1 and most == 1:
        notes.append("One seed: how much another training run would differ is not known, so no difference is claimed.")
    elif len(methods) > 1 and most < 5:
        notes.append("Fewer than five seeds: intervals are wide, and small differences cannot be told apart.")
    return notes
