"""Decides which figures a report has: curves over compute, accuracy by difficulty, training, and BRIDGE's
diagnostics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from bridgelm.analysis.comparison import Comparison, MethodRuns, curve
from bridgelm.reports.plots import GREY, PALETTE, Bar, Panel, Series
from bridgelm.runs.progress import clock, short
from bridgelm.runs.reader import Run

MANY = 10  # methods that can each have a colour; of more, most are drawn in grey
POINTS = 100  # of a line; longer ones are averaged in bins
UNRELIABLE = 0.3  # ESS/n below which the gain's estimate is not to be trusted

VERDICTS = {"ahead": "▲ ahead", "behind": "▼ behind", "equal": "= equal", "unclear": "? not shown"}
AXES = {"rollouts": ("rollouts", short), "flops": ("FLOPs", short), "seconds": ("wall time", clock)}


def percent(value: float) -> str:
    return f"{round(100 * value, 1):g}%"


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def signed(points: float, digits: int = 1) -> str:
    """+1.5, −2.0, and 0 without a sign."""
    text = f"{points:+.{digits}f}".replace("-", "−")
    return text[1:] if float(f"{points:.{digits}f}") == 0 else text


def colours(comparison: Comparison) -> list[int]:
    """One colour per method. Where there are many methods, only the base and the best by final test accuracy have one;
    the others are grey, and the tables name them."""
    methods = comparison.methods
    if len(methods) <= MANY:
        return list(range(len(methods)))
    final = {m.label: found.value if (found := comparison.table[m.label]["final"]) else -1.0 for m in methods}
    best = sorted(methods[1:], key=lambda m: -final[m.label])[:len(PALETTE) - 1]
    order = {method.label: i for i, method in enumerate([methods[0], *best])}
    return [order.get(method.label, GREY) for method in methods]


def curve_panels(comparison: Comparison) -> list[Panel]:
    """Held-out accuracy against what it cost; the band runs from the lowest to the highest seed."""
    panels = []
    for axis, (name, fmt) in AXES.items():
        lines = [line for method, i in zip(comparison.methods, colours(comparison))
                 if (line := _curve(method, axis, i))]
        if lines:
            title = f"Validation accuracy against {name}"
            panels.append(Panel(title, name, lines, fmt, percent, clock=axis == "seconds"))
    return panels


def _curve(method: MethodRuns, axis: str, colour: int) -> Series | None:
    """Seeds are matched by evaluation; of a method without rollouts only its end is shown, at zero rollouts."""
    runs = [points for run in method.by_seed.values() if (points := list(zip(*curve(run, axis))))]
    if not runs:
        return None
    looks = max(len(points) for points in runs)
    columns = [[points[i] for points in runs if i < len(points)] for i in range(looks)]
    if all(x == runs[0][0][0] for points in runs for x, _ in points):
        columns = [[points[-1] for points in runs]]
    columns = [column for column in columns if len(column) == len(runs)] or columns  # unfinished seeds end the mean
    xs = [fmean(x for x, _ in column) for column in columns]
    ys = [[y for _, y in column] for column in columns]
    fmt = AXES[axis][1]
    tips = [f"{method.label}: {share(fmean(y))} at {fmt(x)} {AXES[axis][0]}"
            + (f" (seeds {share(min(y))} to {share(max(y))})" if len(y) > 1 else "") for x, y in zip(xs, ys)]
    band = len(runs) > 1
    return Series(method.label, colour, xs, [fmean(y) for y in ys], [min(y) for y in ys] if band else None,
                  [max(y) for y in ys] if band else None, tips=tips, strong=colour == 0)


def accuracy_bars(comparison: Comparison) -> list[Bar]:
    bars = []
    for i, method in zip(colours(comparison), comparison.methods):
        found = comparison.table[method.label]["final"]
        if found:
            points = [run.accuracy for run in method.by_seed.values() if run.accuracy is not None]
            bars.append(Bar(method.label, i, found.value, found.low, found.high, points, share(found.value)))
    return bars


def difference_bars(comparison: Comparison, figure: str) -> list[Bar]:
    """Paired differences of one figure, in points of a percent; right of zero the base method is better."""
    order = {method.label: i for i, method in zip(colours(comparison), comparison.methods)}
    return [Bar(f"against {claim.other}", order[claim.other], 100 * claim.difference.value,
                _points(claim.difference.low), _points(claim.difference.high),
                text=f"{signed(100 * claim.difference.value)}  {VERDICTS[claim.verdict]}")
            for claim in comparison.claims if claim.figure == figure]


def _points(value: float | None) -> float | None:
    return None if value is None else 100 * value


def difficulty_panel(comparison: Comparison) -> Panel | None:
    """Final test accuracy at each difficulty."""
    lines = []
    for colour, method in zip(colours(comparison), comparison.methods):
        cells: dict[float, list[float]] = {}
        for run in method.by_seed.values():
            for level, (accuracy, _) in ((run.result or {}).get("final", {}).get("by_difficulty") or {}).items():
                if _number(level) is not None and accuracy is not None:
                    cells.setdefault(float(level), []).append(accuracy)
        levels = sorted(cells)
        if len(levels) > 1:
            tips = [f"{method.label}: {share(fmean(cells[level]))} at difficulty {level:g}" for level in levels]
            band = max(len(cells[level]) for level in levels) > 1
            low = [min(cells[level]) for level in levels] if band else None
            high = [max(cells[level]) for level in levels] if band else None
            means = [fmean(cells[level]) for level in levels]
            lines.append(Series(method.label, colour, levels, means, low, high, tips=tips, strong=colour == 0))
    return Panel("Final test accuracy by difficulty", "difficulty", lines, y_format=percent) if lines else None


def length_panel(comparison: Comparison) -> Panel | None:
    lines = [line for method, i in zip(comparison.methods, colours(comparison))
             if (line := _mean(method, "length", method.label, i))]
    return Panel("Tokens of an answer over training", "step", lines, y_format="{:.3g}".format) if lines else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def training_panels(comparison: Comparison) -> list[Panel]:
    plain = "{:.3g}".format
    wanted = {"reward": ("Reward of the rollouts", plain), "length": ("Tokens of a completion", plain),
              "flat_groups": ("Groups without spread", percent), "truncated": ("Completions cut short", percent)}
    panels = []
    for key, (title, fmt) in wanted.items():
        lines = [line for method, i in zip(comparison.methods, colours(comparison))
                 if (line := _mean(method, key, method.label, i))]
        if lines:
            panels.append(Panel(title, "step", lines, y_format=fmt))
    return panels


def bridge_methods(comparison: Comparison) -> list[MethodRuns]:
    return [method for method in comparison.methods if any(run.series("bridge/norm_rl") for run in method.runs)]


def bridge_panels(method: MethodRuns) -> list[Panel]:
    """BRIDGE's health over time, averaged over seeds."""
    norms = _lines(method, {"bridge/norm_sft": "SFT", "bridge/norm_rl": "RL", "bridge/norm_shadow": "shadow",
                            "bridge/norm_third": "RL − shadow"})
    plain = {
        "Effective sample size over n": (_lines(method, {"bridge/ess": "ESS/n", "bridge/clip_share": "clipped"}),
                                         [(UNRELIABLE, "below: gain unreliable")]),
        "KL from joint to shadow": (_lines(method, {"bridge/kl_shadow": ""}), []),
        "Movement a step": (_lines(method, {"bridge/shadow_move": "shadow", "bridge/theta_move": "theta"}), []),
        "Share of the update's norm": (_lines(method, {"bridge/share_sft": "SFT", "bridge/share_rl": "RL"}), []),
        "Lambda": (_lines(method, {"bridge/lambda": ""}), []),
    }
    panels = [Panel("Norm of w's gradient, by term", "step", norms, log=_wide(norms))] if norms else []
    gain = _gain(method)
    if gain:
        panels.append(Panel("Gain of joint over shadow", "step", gain, marks=[(0.0, "")]))
    return panels + [Panel(title, "step", lines, marks=marks, floor=0.0)
                     for title, (lines, marks) in plain.items() if lines]


def _gain(method: MethodRuns) -> list[Series]:
    """The estimate with its standard error; hollow where most of the seeds' ESS was too small to trust it."""
    rows = [binned(run, ("bridge/gain", "bridge/gain_se", "bridge/gain_reliable"), 40) for run in method.runs]
    steps = sorted({step for row in rows for step in row})
    xs, ys, errors, hollow = [], [], [], []
    for step in steps:
        cells = [row[step] for row in rows if step in row and row[step][0] is not None]
        if not cells:
            continue
        xs.append(float(step))
        ys.append(fmean(cell[0] or 0.0 for cell in cells))
        errors.append(math.sqrt(sum((cell[1] or 0.0) ** 2 for cell in cells)) / len(cells))
        hollow.append(fmean(1.0 if cell[2] is None else cell[2] for cell in cells) < 0.5)
    if not xs:
        return []
    low, high = [y - e for y, e in zip(ys, errors)], [y + e for y, e in zip(ys, errors)]
    found = [Series("by ratio", 0, xs, ys, low, high, hollow=hollow)]
    honest = _mean(method, "bridge/gain_honest", "sampled", 1)
    if honest:
        found.append(Series("sampled", 1, honest.xs, honest.ys, line=False))
    return found


def _wide(lines: Sequence[Series]) -> bool:
    """Whether the values span so much that only a logarithmic axis shows them all."""
    values = [y for line in lines for y in line.ys]
    return min(values) > 0 and max(values) / min(values) > 30


def _lines(method: MethodRuns, keys: Mapping[str, str]) -> list[Series]:
    return [line for i, (key, label) in enumerate(keys.items()) if (line := _mean(method, key, label, i))]


def _mean(method: MethodRuns, key: str, label: str, colour: int) -> Series | None:
    """A training metric over steps: mean of the seeds, with the range of the seeds as a band."""
    rows = [binned(run, (key,), POINTS) for run in method.by_seed.values()]
    cells: dict[int, list[float]] = {}
    for row in rows:
        for step, (value,) in row.items():
            if value is not None:
                cells.setdefault(step, []).append(value)
    steps = sorted(cells)
    if not steps:
        return None
    band = len(rows) > 1
    return Series(label, colour, [float(s) for s in steps], [fmean(cells[s]) for s in steps],
                  [min(cells[s]) for s in steps] if band else None, [max(cells[s]) for s in steps] if band else None)


def binned(run: Run, keys: Sequence[str], points: int) -> dict[int, list[float | None]]:
    """Means over bins of steps, keyed by a bin's last step. The bins depend on the run's length only."""
    width = max(1, -(-int(run.config.get("steps") or run.steps or 1) // points))
    bins: dict[int, list[list[float]]] = {}
    for event in run.metrics:
        row = bins.setdefault(-(-event.get("step", 0) // width) * width, [[] for _ in keys])
        for cell, key in zip(row, keys):
            if isinstance(event.get(key), int | float):
                cell.append(event[key])
    return {step: [fmean(cell) if cell else None for cell in row] for step, row in sorted(bins.items()) if any(row)}
