"""`bridgelm diagnose`: what SFT and RL did to each other in a run, as Markdown, JSON, PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

from bridgelm.analysis.comparison import MethodRuns
from bridgelm.diagnosis import text
from bridgelm.diagnosis.facts import History, Subject, subjects
from bridgelm.errors import UserError
from bridgelm.reports.files import draw_files
from bridgelm.reports.panels import percent
from bridgelm.reports.plots import Panel, Series
from bridgelm.reports.text import harmless, markdown_table
from bridgelm.runs.folder import write_json
from bridgelm.runs.reader import Run

# The measurements: key -> (title, whether it is measured from the stage's own start, and so begins anew with each).
LINES = {"demo_ce": ("Cross-entropy of the demonstrations", False), "reward": ("Reward of the probes' answers", False),
         "cosine": ("Cosine of SFT's and RL's gradient", False), "kl_start": ("KL from the stage's start", True),
         "distance_share": ("Distance from the stage's start", True)}


def diagnose(runs: Sequence[str | Path], out: str | Path | None = None, *, measure: bool = False) -> Path:
    """Writes OUT/diagnosis.md, .json and OUT/figures/diagnosis.png, .svg; returns the Markdown's path.

    With `measure`, the saved models of runs without probes are measured first, which loads them. `out` defaults to
    RUN/diagnosis for one run, else to ./diagnosis.
    """
    if not runs:
        raise UserError("diagnose: no run folders given; name one or more, e.g. runs/cold_start")
    opened = [Run(path) for path in runs]
    if measure:
        from bridgelm.diagnosis.measure import measure_saved

        for run in opened:
            if not History(run).probed:
                measure_saved(run)
    methods, found = subjects(opened)
    folder = Path(out) if out else Path(runs[0]) / "diagnosis" if len(runs) == 1 else Path("diagnosis")
    panels = all_panels(methods)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    if panels:
        draw_files(panels, folder / "figures" / "diagnosis")
    write_json(folder / "diagnosis.json", data(methods, found))
    path = folder / "diagnosis.md"
    path.write_text(markdown(methods, found, bool(panels)), encoding="utf-8", errors="replace")
    return path


def markdown(methods: Sequence[MethodRuns], found: Sequence[Subject], drawn: bool) -> str:
    order = {method.label: i for i, method in enumerate(methods)}
    colours = [order[subject.label] for subject in found]
    histories = [History(run) for method in methods for run in method.by_seed.values()]
    parts = ["# What SFT and RL did to each other", f"{len(histories)} run{'s' * (len(histories) > 1)}, "
             f"{date.today():%Y-%m-%d}. Written by `bridgelm diagnose`."]
    said = text.sentences(found)
    parts += ["\n".join(f"- {line}" for line in said)] if said else []
    tables = {"What each stage did": text.coupling_table(found, colours),
              "Gradients and drift": text.drift_table(found, colours),
              "Dip and rise at a switch": text.switch_table(found, colours)}
    for heading, table in tables.items():
        known = any(cell != "–" for row in table.rows for cell in row[3:])
        parts += [f"## {heading}", markdown_table(table)] if known else []
    lacking = text.missing(histories)
    parts += ["## What is missing", "\n".join(f"- {line}" for line in lacking)] if lacking else []
    parts += ["## Figures", "![diagnosis](figures/diagnosis.png)"] if drawn else []
    parts += ["## How to read this", "\n".join(f"- {line}" for line in text.DEFINITIONS)]
    return harmless("\n\n".join(parts)) + "\n"


def data(methods: Sequence[MethodRuns], found: Sequence[Subject]) -> dict[str, Any]:
    """Plain data: the figures of each stage with their intervals, and every run's own probes and switches."""
    stages = [{"run": subject.label, "method": subject.stage.method, "kind": subject.stage.kind,
               "start": subject.stage.start, "end": subject.stage.end,
               **{key: asdict(value) if value else None for key, value in subject.figures().items()}}
              for subject in found]
    runs = []
    for method in methods:
        for seed, run in method.by_seed.items():
            history = History(run)
            switches = {str(stage.start): asdict(switch) for stage in history.stages
                        if (switch := history.switch(stage))}
            runs.append({"run": method.label, "seed": seed, "path": str(run.path), "probed": history.probed,
                         "probes": [probe for _, probe in sorted(history.probes.items())], "switches": switches})
    return {"stages": stages, "runs": runs, "sentences": text.sentences(found)}


def all_panels(methods: Sequence[MethodRuns]) -> list[Panel]:
    cuts = sorted({stage.start for method in methods for stage in _histories(method)[0].stages if stage.start})[:6]
    marks = {"cosine": [(0.0, "")]}
    panels = []
    for key, (title, anew) in LINES.items():
        lines = [line for i, method in enumerate(methods) if (line := _over_steps(method, key, i, anew))]
        if lines:
            panels.append(Panel(title, "step", lines, marks=marks.get(key, []), cuts=cuts,
                                floor=0.0 if anew else None))
    looks = [line for i, method in enumerate(methods) if (line := _accuracy(method, i))]
    if looks:
        panels.insert(min(2, len(panels)), Panel("Validation accuracy", "step", looks, y_format=percent, cuts=cuts))
    trade = [line for i, method in enumerate(methods) for line in _trade(method, i)]
    if trade:
        panels.append(Panel("Change of CE against KL, stages with RL", "KL from the stage's start", trade,
                            marks=[(0.0, "")], floor=0.0))
    return panels


def _histories(method: MethodRuns) -> list[History]:
    return [History(run) for run in method.by_seed.values()]


def _line(label: str, colour: int, cells: Mapping[float, Sequence[float]], seeds: int) -> Series | None:
    """Means over the seeds with their range; steps that not every seed has are left out where others have."""
    whole = {x: ys for x, ys in cells.items() if len(ys) == seeds} or dict(cells)
    xs = sorted(whole)
    if not xs:
        return None
    band = seeds > 1
    return Series(label, colour, xs, [fmean(whole[x]) for x in xs], [min(whole[x]) for x in xs] if band else None,
                  [max(whole[x]) for x in xs] if band else None)


def _over_steps(method: MethodRuns, key: str, colour: int, anew: bool) -> Series | None:
    cells: dict[float, list[float]] = {}
    histories = _histories(method)
    for history in histories:
        for step, probe in history.probes.items():
            if isinstance(probe.get(key), int | float):
                cells.setdefault(float(step), []).append(probe[key])
    line = _line(method.label, colour, cells, len(histories))
    if line is None or not anew:
        return line
    # At a switch the stage that ends has its drift, and the next one starts from none.
    xs, ys, low, high = list(line.xs), list(line.ys), list(line.low or []), list(line.high or [])
    for stage in histories[0].stages[1:]:
        if stage.start in xs:
            i = xs.index(stage.start) + 1
            for row, value in ((xs, float(stage.start)), (ys, 0.0), (low, 0.0), (high, 0.0)):
                row.insert(i, value)
    return Series(line.label, colour, xs, ys, low if line.low else None, high if line.high else None)


def _accuracy(method: MethodRuns, colour: int) -> Series | None:
    cells: dict[float, list[float]] = {}
    for run in method.by_seed.values():
        for event in run.evals:
            if event.get("accuracy") is not None:
                cells.setdefault(float(event["step"]), []).append(event["accuracy"])
    return _line(method.label, colour, cells, len(method.by_seed))


def _trade(method: MethodRuns, colour: int) -> list[Series]:
    """How much fit of the demonstrations a unit of drift costs, probe by probe, in stages that draw answers."""
    lines = []
    for stage in _histories(method)[0].stages:
        if stage.kind == "SFT":
            continue
        points: dict[int, list[tuple[float, float]]] = {}
        for history in _histories(method):
            first = history.probes.get(stage.start, {}).get("demo_ce")
            for probe in history.within(stage):
                if isinstance(first, int | float) and probe.get("start") == stage.start:
                    points.setdefault(probe["step"], []).append((probe["kl_start"], probe["demo_ce"] - first))
        steps = [step for step in sorted(points) if step > stage.start and all(None not in p for p in points[step])]
        if steps:
            xs = [0.0, *(fmean([x for x, _ in points[step]]) for step in steps)]
            ys = [0.0, *(fmean([y for _, y in points[step]]) for step in steps)]
            label = method.label if len(_histories(method)[0].stages) == 1 else f"{method.label}: {stage.method}"
            lines.append(Series(label, colour, xs, ys))
    return lines
