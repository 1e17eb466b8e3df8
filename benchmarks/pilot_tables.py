"""Tables and figures of the pilot, from the rows in results/pilot/runs.jsonl and nothing else.

    python benchmarks/pilot_tables.py [RUNS]    writes results/pilot/PHASE.json, PHASE.md, figures/, and the table of
                                                docs/cooperation.md; with the folder of the runs also facts.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pages import fill
from pilot import REGIMES, RESULTS, STEPS, late, rows, setting_of

from bridgelm.analysis.stats import (
    Estimate,
    at_budget,
    equivalence,
    holm,
    mean_height,
    mean_interval,
    paired_difference,
)
from bridgelm.reports.plots import PALETTE
from bridgelm.runs.reader import Run

MARGIN = 0.025
EVERY = "mean of the cells"
DRAWS = 4000
Cells = dict[str, dict[tuple[str, str], dict[int, dict[str, Any]]]]  # label -> (family, regime) -> seed -> row


def cells_of(found: Iterable[Mapping[str, Any]], phase: str) -> Cells:
    out: Cells = defaultdict(lambda: defaultdict(dict))
    for row in found:
        if row["phase"] == phase:
            out[row["label"]][row["family"], row["regime"]][row["seed"]] = dict(row)
    return out


def whole(cells: Cells) -> tuple[list[str], list[tuple[str, str]], list[int]]:
    """Methods, cells and seeds that are complete: only blocks that every method has are compared."""
    places = sorted({place for of_label in cells.values() for place in of_label},
                    key=lambda place: (place[0], list(REGIMES).index(place[1])))
    labels = [label for label in cells if all(place in cells[label] for place in places)]
    seeds = set.intersection(*(set(cells[label][place]) for label in labels for place in places)) if labels else set()
    return labels, places, sorted(seeds)


def regrets(final: np.ndarray) -> np.ndarray:
    """Mean accuracies (methods, cells) to regrets: the best method of the cell less one's own."""
    return final.max(0, keepdims=True) - final


def worst_regret(values: np.ndarray, draws: int = DRAWS) -> list[tuple[float, float, float]]:
    """Worst-case regret of each method with a percentile interval, from values (methods, cells, seeds); seeds are drawn
    anew for all methods and cells at once, so that pairs stay pairs."""
    point = regrets(values.mean(2)).max(1)
    rng = np.random.default_rng(0)
    samples = np.stack([regrets(values[:, :, rng.integers(0, values.shape[2], values.shape[2])].mean(2)).max(1)
                        for _ in range(draws)])
    low, high = np.quantile(samples, [0.025, 0.975], axis=0)
    return [(float(p), float(a), float(b)) for p, a, b in zip(point, low, high, strict=True)]


def at_flops(row: Mapping[str, Any], budget: float) -> float:
    """Accuracy on validation at the last look within a budget."""
    found = at_budget([point[2] for point in row["curve"]], [point[1] for point in row["curve"]], budget)
    assert found is not None
    return found


def height(row: Mapping[str, Any]) -> float:
    """Mean height of the validation curve over rollouts."""
    found = mean_height([point[3] for point in row["curve"]], [point[1] for point in row["curve"]])
    assert found is not None
    return found


def summary(phase: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    cells = cells_of(found, phase)
    labels, places, seeds = whole(cells)
    if not seeds:
        return {}
    values = np.array([[[cells[m][p][s]["final"] for s in seeds] for p in places] for m in labels])
    base = "grpo" if "grpo" in labels else labels[0]
    budget = {p: statistics.fmean(cells[base][p][s]["flops"] for s in seeds) for p in places}
    worst = worst_regret(values)
    table = {}
    for i, m in enumerate(labels):
        mine = {f"{f}/{r}": [cells[m][f, r][s] for s in seeds] for f, r in places}
        table[m] = {
            "cells": {name: cell_figures(of_cell, float(regrets(values.mean(2))[i, j]), budget[places[j]])
                      for j, (name, of_cell) in enumerate(mine.items())},
            "worst_regret": dict(zip(("value", "low", "high"), worst[i], strict=True)),
            "mean": float(values[i].mean()),
            "flops": statistics.fmean(cells[m][p][s]["flops"] / budget[p] for p in places for s in seeds),
            "cpu_seconds": statistics.fmean(row["cpu_seconds"] for of_cell in mine.values() for row in of_cell)}
    return {"phase": phase, "seeds": seeds, "margin": MARGIN, "base": base, "table": table,
            "contrasts": contrasts(values, labels, places, seeds)}


def cell_figures(of_cell: list[dict[str, Any]], regret: float, budget: float) -> dict[str, Any]:
    def mean(values: Iterable[float]) -> dict[str, float | None]:
        estimate = mean_interval(values) or Estimate(float("nan"))
        return {"value": estimate.value, "low": estimate.low, "high": estimate.high}

    return {"final": mean(row["final"] for row in of_cell), "hard": mean(row["hard"] for row in of_cell),
            "best": mean(row["best"] for row in of_cell), "late": mean(late(row) for row in of_cell), "regret": regret,
            "at_flops": mean(at_flops(row, budget) for row in of_cell),
            "height": mean(height(row) for row in of_cell)}


def contrasts(values: np.ndarray, labels: list[str], places: list[tuple[str, str]],
              seeds: list[int]) -> list[dict[str, Any]]:
    """Every method against joint and cold start, and against the dial behind an SFT stage where its controls are;
    paired by seed, in each cell, on the means of families and on the mean of the cells."""
    out = []
    for reference in ("joint", "cold_start", *([] if "sft_fade" not in labels else ["sft_dial"])):
        if reference not in labels:
            continue
        r = labels.index(reference)
        for i, label in enumerate(labels):
            if i == r:
                continue
            named = {f"{f}/{g}": values[[i, r], j] for j, (f, g) in enumerate(places)}
            families = list(dict.fromkeys(f for f, _ in places))
            for family in families if len(families) > 1 else []:
                named[f"mean of {family}"] = values[[i, r]][:, [f == family for f, _ in places]].mean(1)
            named[EVERY] = values[[i, r]].mean(1)
            for place, pair in named.items():
                first, second = (dict(zip(seeds, map(float, of_one), strict=True)) for of_one in pair)
                gap = paired_difference(first, second)
                assert gap is not None
                out.append({"method": label, "against": reference, "where": place, "value": gap.value, "low": gap.low,
                            "high": gap.high, "p": gap.p,
                            "p_equal": equivalence([first[s] - second[s] for s in seeds], MARGIN)})
    for which in {kind(one["where"]) for one in out}:
        group = [one for one in out if kind(one["where"]) == which]
        for one, adjusted in zip(group, holm([one["p"] for one in group]), strict=True):
            one["p_holm"] = adjusted
    return out


def kind(where: str) -> str:
    """Hypotheses of one kind are corrected together."""
    return where if where == EVERY else "family" if where.startswith("mean of") else "cell"


def into_page(found: Mapping[str, Any]) -> None:
    """The first table of a phase into docs/cooperation.md, where it has a place there."""
    page = RESULTS.parents[1] / "docs" / "cooperation.md"
    if f"<!-- {found['phase']}:begin -->" in page.read_text():
        fill(page, found["phase"], markdown(found).split("\nAt the FLOPs of")[0].strip())


# -- Markdown ------------------------------------------------------------------------------------------------------

def percent(found: Mapping[str, float | None]) -> str:
    value, high = found["value"], found["high"]
    assert value is not None
    return f"{100 * value:.1f}" + ("" if high is None else f" ± {100 * (high - value):.1f}")


def markdown(found: Mapping[str, Any]) -> str:
    table = found["table"]
    places = list(next(iter(table.values()))["cells"])
    order = sorted(table, key=lambda label: table[label]["worst_regret"]["value"])
    lines = [f"Phase `{found['phase']}`, {len(found['seeds'])} paired seeds; final greedy test accuracy in percent "
             "with 95 % intervals over seeds; regret in points against the best method of each cell.", "",
             "| method | worst regret | " + " | ".join(places) + " | mean | FLOPs | CPU s |",
             "|---|---:|" + "---:|" * (len(places) + 3)]
    for label in order:
        one = table[label]
        worst = one["worst_regret"]
        lines.append(f"| {label} | {100 * worst['value']:.1f} [{100 * worst['low']:.1f}, {100 * worst['high']:.1f}] | "
                     + " | ".join(percent(one["cells"][place]["final"]) for place in places)
                     + f" | {100 * one['mean']:.1f} | {one['flops']:.2f}x | {one['cpu_seconds']:.0f} |")
    lines += ["", f"At the FLOPs of `{found['base']}` (validation, last look within the budget), the mean height of "
              "the validation curve over rollouts, and the hard tier at the end:", "",
              "| method | " + " | ".join(f"{place}: at FLOPs, height, hard" for place in places) + " |",
              "|---|" + "---:|" * len(places)]
    for label in order:
        of_label = [table[label]["cells"][place] for place in places]
        lines.append(f"| {label} | " + " | ".join(
            ", ".join(f"{100 * one[key]['value']:.1f}" for key in ("at_flops", "height", "hard"))
            for one in of_label) + " |")
    lines += ["", "Paired differences in points (Holm over the rows of each kind; equal: two one-sided tests at "
              f"{100 * MARGIN:.1f} points):", "",
              "| method | against | where | difference | p (Holm) | p (equal) |", "|---|---|---|---:|---:|---:|"]
    for one in found["contrasts"]:
        if one["p_holm"] is None or one["p_equal"] is None:
            continue
        if kind(one["where"]) != "cell" or min(one["p_holm"], one["p_equal"]) < 0.05:
            lines.append(f"| {one['method']} | {one['against']} | {one['where']} | {100 * one['value']:+.1f} "
                         f"[{100 * one['low']:.1f}, {100 * one['high']:.1f}] | {one['p_holm']:.3f} "
                         f"| {one['p_equal']:.3f} |")
    return "\n".join(lines) + "\n"


# -- what only the run folders know ------------------------------------------------------------------------------------

WATCH = {"agreement": ("bridge_leaky", "bridge/agreement"), "lambda": ("bridge_dial", "dial/lambda"),
         "share_of_guide": ("guide", "guide/share"), "gain_of_guide": ("guide", "guide/gain_mean")}


def facts(runs: Path) -> dict[str, Any]:
    """What the rows leave out: the shadow beside RL alone, agreement of half-batches, lambda's way, alignments."""
    found: dict[str, Any] = {"shadow": shadow_facts(runs)}
    for key, (label, metric) in WATCH.items():
        for regime in REGIMES:
            series = [Run(path).series(metric) for path in sorted(runs.glob(f"screen-{label}-*-hops-{regime}-*/"))]
            series = [one for one in series if len(one) == STEPS]
            if series:
                curve = np.array([[value for _, value in one] for one in series]).mean(0).round(4).tolist()
                found.setdefault(key, {})[regime] = {"runs": len(series), "every_tenth_step": curve[::10],
                                                     "mean": statistics.fmean(curve), "end": curve[-1]}
    tables = [row for path in sorted(runs.glob("screen-token_lead-*-hops-misleading-*/tables/sources.jsonl"))
              for row in map(json.loads, path.read_text().splitlines())]
    found["alignment"] = {name: [row["alignment"] for row in tables if row["source"] == source]
                          for source, name in (("True", "wrong"), ("False", "right"))}
    return found


def shadow_facts(runs: Path) -> dict[str, dict[str, float]]:
    """Mean reward of the shadow's own rollouts, and of RL alone, on the same problems at the same steps and rate."""
    out: dict[str, dict[str, float]] = {}
    for label in ("bridge", "bridge_leaky"):
        for path in sorted(runs.glob(f"tune-{label}-*-hops-redundant-100/")):
            run = Run(path)
            if run.status == "finished" and run.config["optim"]["lr"] == 1e-3 and run.config["method"]["beta"] == 2e-4:
                rewards = dict(run.series("reward"))
                out[f"{label}, lambda {run.config['method']['lambda']}"] = {
                    str(step): round(rewards[step] - gain, 4) for step, gain in run.series("bridge/gain_honest")}
    steps = [int(step) for step in next(iter(out.values()), {})]
    for path in runs.glob("tune-grpo-*-hops-redundant-100/"):
        if Run(path).config["optim"]["lr"] == 1e-3:
            rewards = dict(Run(path).series("reward"))
            out["RL alone"] = {str(step): round(rewards[step], 4) for step in steps}
    return out


def shadows(found: Mapping[str, Mapping[str, float]], folder: Path) -> None:
    """The shadow's own reward beside that of RL alone."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(6.4, 3.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(1, 1, 1)
        for name, points in sorted(found.items()):
            colour = "#222222" if name == "RL alone" else PALETTE[2] if "leaky" in name else PALETTE[0]
            steps = [int(step) for step in points]
            axes.plot(steps, list(points.values()), color=colour, linewidth=2.2 if name == "RL alone" else 1.2)
        for text, colour in (("RL alone", "#222222"), ("shadow of bridge_leaky, by lambda", PALETTE[2]),
                             ("shadow of bridge, by lambda", PALETTE[0])):
            axes.plot([], [], color=colour, label=text)
        axes.set_xlabel("step")
        axes.set_ylabel("mean reward of its own rollouts")
        axes.legend(fontsize=7, frameon=False)
        save(figure, folder, "shadows")


# -- figures -------------------------------------------------------------------------------------------------------

STYLE = {"svg.fonttype": "none", "svg.hashsalt": "pilot", "font.size": 9, "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4"}


def save(figure: Any, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=150)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def mixtures(found: list[dict[str, Any]], folder: Path) -> None:
    """Accuracy on validation against the weight of imitation, from the tuning runs at one rate."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tuned = [row for row in found if row["phase"] == "tune"]
    share = {"joint": lambda o: 1 / (1 + o["mu"]), **dict.fromkeys(("bridge", "bridge_leaky", "bridge_dial"),
                                                                  lambda o: o["lambda"])}
    with mpl.rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(9.6, 3.1), layout="constrained")
        FigureCanvasAgg(figure)
        for k, regime in enumerate(REGIMES):
            axes = figure.add_subplot(1, 3, k + 1, sharey=figure.axes[0] if k else None)
            here = [row for row in tuned if row["regime"] == regime]
            for label, colour, mark in (("joint", 1, "o-"), ("bridge", 0, "s--"), ("bridge_leaky", 5, "v:"),
                                        ("bridge_dial", 2, "D-.")):
                points = []
                for row in here:
                    setting = setting_of(row) if row["label"] == label else None
                    plain = setting and setting["lr"] == 1e-3 and "mu_end" not in setting["method"] \
                        and setting["method"].get("beta", 2e-4) == 2e-4 and setting["method"].get("eta", 0.1) == 0.1
                    if setting and plain:
                        points.append((1 - share[label](setting["method"]), 100 * late(row)))
                points.sort()
                if points:
                    axes.plot(*zip(*points, strict=True), mark, color=PALETTE[colour], markersize=4, linewidth=1.4,
                              label=label)
            for label, dash, side in (("grpo", ":", "top"), ("cold_start", "-", "bottom")):
                best = max((100 * late(row) for row in here if row["label"] == label), default=None)
                if best is not None:
                    axes.axhline(best, color="#555555", linestyle=dash, linewidth=1)
                    axes.annotate(f"{label}, best setting", (0.98, best), xycoords=("axes fraction", "data"),
                                  ha="right", va=side, fontsize=7, color="#555555")
            axes.set_xscale("log")
            axes.set_title(regime, loc="left", fontsize=10, fontweight="bold")
            axes.set_xlabel("share of imitation in the step, 1 - lambda")
            if k == 0:
                axes.set_ylabel("accuracy on validation, %")
                axes.legend(fontsize=7, frameon=False, loc="lower left")
        save(figure, folder, "mixtures")


def figures(found: Mapping[str, Any], folder: Path) -> None:
    """Accuracy by regime, one dot a method, sorted by worst-case regret."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table = found["table"]
    places = list(next(iter(table.values()))["cells"])
    order = sorted(table, key=lambda label: -table[label]["worst_regret"]["value"])
    with mpl.rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(2.3 * (len(places) + 1) + 1, 0.3 * len(order) + 1.1), layout="constrained")
        FigureCanvasAgg(figure)
        first = None
        for k, place in enumerate([None, *places]):
            axes = figure.add_subplot(1, len(places) + 1, k + 1, sharey=first)
            first = first or axes
            for y, label in enumerate(order):
                one = table[label]["worst_regret"] if place is None else table[label]["cells"][place]["final"]
                colour = PALETTE[1] if label in ("joint", "cold_start", "grpo") else PALETTE[0]
                if one["low"] is not None:
                    axes.plot([100 * one["low"], 100 * one["high"]], [y, y], color=colour, linewidth=1.6)
                axes.plot([100 * one["value"]], [y], "o", color=colour, markersize=5)
            axes.set_yticks(range(len(order)), order)
            axes.tick_params(axis="y", labelleft=k == 0, length=0)
            axes.set_title("worst-case regret" if place is None else place.replace("/", ", "), fontsize=9,
                           fontweight="bold" if place is None else "normal", loc="left")
            axes.set_xlabel("points" if place is None else "test accuracy, %")
        save(figure, folder, found["phase"])


def main() -> None:
    if sys.argv[1:]:
        (RESULTS / "facts.json").write_text(json.dumps(facts(Path(sys.argv[1])), indent=1) + "\n")
    if (RESULTS / "facts.json").exists():
        shadows(json.loads((RESULTS / "facts.json").read_text())["shadow"], RESULTS / "figures")
    found = rows()
    mixtures(found, RESULTS / "figures")
    # Controls of what was seen on one family ran on it alone.
    found += [row | {"phase": f"confirm-{row['family']}"} for row in found
              if row["phase"] == "confirm" and row["family"] == "jugs"]
    for phase in dict.fromkeys(row["phase"] for row in found):
        if phase == "tune" or not (one := summary(phase, found)):
            continue
        (RESULTS / f"{phase}.json").write_text(json.dumps(one, indent=1) + "\n")
        (RESULTS / f"{phase}.md").write_text(markdown(one))
        figures(one, RESULTS / "figures")
        into_page(one)
        print(markdown(one))


if __name__ == "__main__":
    main()
