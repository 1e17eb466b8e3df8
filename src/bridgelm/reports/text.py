"""The words and tables of a report, before they become Markdown or HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from bridgelm.analysis.comparison import ACCURACIES, MARGIN, SHARED, Claim, Comparison, MethodRuns, disagreement
from bridgelm.analysis.stats import Estimate
from bridgelm.reports.panels import VERDICTS, colours, share, signed
from bridgelm.runs.progress import clock, short
from bridgelm.runs.reader import Run

FIGURES = {"final": "At the end of training, test", "hard": "Hard tier, test",
           "at_rollouts": "At equal rollouts, validation", "at_flops": "At equal FLOPs, validation"}
VERBS = {"ahead": "is ahead of", "behind": "is behind", "equal": "ties with",
         "unclear": "is not shown to differ from"}
LEDGER = {"flops/generate": "generate", "flops/train": "train", "flops/score": "score",
          "flops/teacher": "teacher"}

DEFINITIONS = (
    "Intervals are 95 %. With two or more seeds they are Student's t over seeds; with one seed they are over test "
    "problems (Wilson, or a paired bootstrap) and say nothing about another training run, so nothing is claimed from "
    "them.",
    "Differences are paired by seed. p is that of the paired t test, adjusted by Holm over the methods compared in one "
    "figure; “ahead” and “behind” need p < .05 after that, so an interval may leave out zero and still not do.",
    f"“Equal” is claimed only if two one-sided tests (TOST) put the true difference within ±{100 * MARGIN:.0f} points; "
    "“p equal” is theirs. “Not shown” is neither: more seeds may tell.",
    "Final is the last checkpoint; best is the checkpoint that was best on validation. Both are measured on the test "
    "set, which nothing was chosen on.",
    "At equal rollouts and equal FLOPs, each curve is read at its last validation look at or below the budget. In a "
    "difference, the budget is the smaller of the two methods' own.",
    "FLOPs are the ledger's estimate: 2N a generated or scored token, 6N a trained one; shadow, reference, "
    "teacher, demonstrations and probes are in.",
)


@dataclass(frozen=True)
class Table:
    """Cells are plain text. `marks` holds, for each row, the colour of the method that it is about."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    marks: Sequence[int | None] = ()
    caption: str = ""


def interval(estimate: Estimate | None) -> str:
    """86.3 [84.3, 88.3], in percent."""
    if estimate is None:
        return "–"
    text = f"{100 * estimate.value:.1f}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def gap(claim: Claim, turned: bool = False) -> str:
    """+10.0 [8.2, 11.7], in points: base minus other, or the other way round."""
    found = claim.difference
    value, low, high = found.value, found.low, found.high
    if turned:
        value, low, high = -value, None if high is None else -high, None if low is None else -low
    text = signed(100 * value)
    if low is None or high is None:
        return text
    bounds = (signed(100 * bound).removeprefix("+") for bound in (low, high))
    return f"{text} [{', '.join(bounds)}]"


def p_text(p: float | None) -> str:
    return "–" if p is None else "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def seeds_text(comparison: Comparison) -> str:
    counts = sorted({len(method.by_seed) for method in comparison.methods})
    spread = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{spread} seed{'' if spread == '1' else 's'}" + (" each" if len(comparison.methods) > 1 else "")


def names(labels: Sequence[str]) -> str:
    return " and ".join([", ".join(labels[:-1]), labels[-1]] if len(labels) > 1 else labels)


def few(labels: Sequence[str]) -> str:
    return names(labels) if len(labels) <= 6 else f"{len(labels)} methods ({labels[0]}, {labels[1]}, ...)"


def lead(comparison: Comparison) -> str:
    """The answer in two sentences."""
    base = comparison.base.label
    row = comparison.table[base]
    found = row["final"] or row["best"]
    first = f"{base} ends at {interval(found)} % on the test set." if found else f"{base} has no test figures yet."
    for figure, words in (("final", "There it"), ("at_flops", "At equal FLOPs it")):
        claims = [claim for claim in comparison.claims if claim.figure == figure]
        parts = [f"{text} {few([c.other for c in claims if c.verdict == verdict])}"
                 for verdict, text in VERBS.items() if any(c.verdict == verdict for c in claims)]
        if parts:
            first += f" {words} {', '.join(parts[:-1]) + ', and ' if len(parts) > 1 else ''}{parts[-1]}."
    return first


def where_base_does_not_win(comparison: Comparison) -> list[str]:
    """One sentence a figure that names every method which the base method is not shown to beat."""
    base, sentences = comparison.base.label, []
    for figure, heading in FIGURES.items():
        claims = [claim for claim in comparison.claims if claim.figure == figure]
        if not claims:
            continue
        parts = []
        for verdict in ("behind", "equal", "unclear"):
            found = [f"{claim.other} ({gap(claim)})" for claim in claims if claim.verdict == verdict]
            if found and verdict == "unclear" and len(found) > 6:
                parts.append(f"{VERBS[verdict]} {len(found)} methods (their differences are in the tables)")
            elif found:
                parts.append(f"{VERBS[verdict]} {names(found)}")
        sentences.append(f"{heading}: {base} {'; it '.join(parts)}." if parts
                         else f"{heading}: {base} is ahead of every other method here.")
    return sentences


def what_was_equal(comparison: Comparison) -> list[str]:
    """Plainly, what the methods had in common and what they had not."""
    methods, base = comparison.methods, comparison.base
    configs = [run.config for run in comparison.runs]
    key = next((key for other in configs if (key := disagreement(configs[0], other))), None)
    same, other = f"{names([*SHARED])} are the same in all runs", names([*comparison.unequal])
    lines = [f"Settings: NOT the same; the runs differ in {key}." if key is not None
             else f"Settings: {same}; NOT the same: {other} (at the top)." if other
             else f"Settings: {same}, and so are steps, learning rates and all else but the method."
             if len(methods) > 1 else f"Settings: {same}."]
    lines.append(f"Seeds: {seeds_text(comparison)}" + (", paired in every difference." if len(methods) > 1 else "."))
    for axis, title in (("rollouts", "Rollouts"), ("flops", "FLOPs")):
        amounts = {m.label: found.value for m in methods if (found := comparison.table[m.label][axis])}
        lines.append(f"{title}: {_amounts(amounts, base.label, axis)}")
    return lines


def _amounts(amounts: dict[str, float], base: str, axis: str) -> str:
    own = amounts.get(base)
    if len(amounts) < 2 or not own:
        return ", ".join(f"{label} {short(value)}" for label, value in amounts.items()) + "."
    alike = [label for label, value in amounts.items() if abs(value / own - 1) < 0.01]
    rest = {label: value for label, value in amounts.items() if label not in alike}
    size = f"{own:,.0f}" if axis == "rollouts" else short(own)
    if not rest:
        return f"equal, {size} a run."
    times = {label: "none" if value == 0 else f"{value / own:.2f}×" for label, value in rest.items()}
    if len(rest) > 8:
        order = sorted(rest, key=lambda label: rest[label])
        other = f"{len(rest)} methods from {times[order[0]]} ({order[0]}) to {times[order[-1]]} ({order[-1]})"
    else:
        other = ", ".join(f"{label} {times[label]}" for label in rest)
    same = names(alike) if len(alike) <= 6 else f"{len(alike)} methods"
    return f"{same} {'each ' if len(alike) > 1 else ''}{size} a run; against that, {other}."


def result_table(comparison: Comparison) -> Table:
    """Accuracies in percent, with intervals."""
    keys = [key for key in ACCURACIES if any(row.get(key) for row in comparison.table.values())]
    headers = ["method", "seeds", *(ACCURACIES[key][0] for key in keys)]
    several = len(comparison.methods) > 1
    budgets = {axis: name for axis, name in {"rollouts": "rollouts", "flops": "FLOPs"}.items()
               if several and comparison.budgets.get(axis)}
    headers += [f"at {short(comparison.budgets[axis])} {name}, validation" for axis, name in budgets.items()]
    rows = []
    for method in comparison.methods:
        row = comparison.table[method.label]
        rows.append([method.label, str(len(method.by_seed)), *(interval(row[key]) for key in keys),
                     *(_at_budget(method, row[f"at_{axis}"], axis, comparison) for axis in budgets)])
    return Table(headers, rows, colours(comparison), "Accuracy in percent, mean and 95 % interval.")


def _at_budget(method: MethodRuns, estimate: Estimate | None, axis: str, comparison: Comparison) -> str:
    """A method that never rolls out has no equal-rollouts figure of its own: its end is shown, and said to be."""
    text = interval(estimate)
    return f"{text} (its end)" if axis == "rollouts" and not method.rolls and estimate else text


def difference_table(comparison: Comparison, figure: str) -> Table:
    rows, marks = [], []
    order = dict(zip((method.label for method in comparison.methods), colours(comparison)))
    for claim in comparison.claims:
        if claim.figure != figure:
            continue
        row = [claim.other, gap(claim), p_text(claim.p_holm), p_text(claim.p_equal),
               f"{claim.difference.n} {claim.difference.unit}", VERDICTS[claim.verdict]]
        if claim.budget is not None:
            row.insert(1, short(claim.budget))
        rows.append(row)
        marks.append(order[claim.other])
    headers = ["against", "difference, points", "p (Holm)", "p equal", "over", comparison.base.label]
    if figure.startswith("at_"):
        headers.insert(1, "budget")
    caption = f"{comparison.base.label} minus the other method. {FIGURES.get(figure, figure)}."
    return Table(headers, rows, marks, caption)


def cost_table(comparison: Comparison) -> Table:
    headers = ["method", "rollouts", "FLOPs", *LEDGER.values(), "wall time", "CPU time", "peak memory"]
    rows = []
    for method in comparison.methods:
        row = comparison.table[method.label]
        value = {key: found.value if (found := row[key]) else None
                 for key in ("rollouts", "flops", "seconds", "cpu_seconds", "memory")}
        parts = ledger(method)
        rows.append([method.label, short(value["rollouts"]), short(value["flops"]),
                     *(share(parts.get(name)) for name in LEDGER.values()), clock(value["seconds"]),
                     clock(value["cpu_seconds"]), "–" if value["memory"] is None else f"{value['memory']:,.0f} MB"])
    caption = "Mean of the seeds. Generate, train and score are shares of the FLOPs."
    return Table(headers, rows, colours(comparison), caption)


def ledger(method: MethodRuns) -> dict[str, float]:
    """Shares of the FLOPs by what they were spent on."""
    parts = {name: fmean([run.last(key) or 0.0 for run in method.runs]) for key, name in LEDGER.items()}
    total = sum(parts.values())
    return {name: value / total for name, value in parts.items()} if total else {}


def run_table(comparison: Comparison) -> Table:
    rows, marks = [], []
    for i, method in zip(colours(comparison), comparison.methods):
        for run in method.runs:
            steps = f"{run.steps}/{run.config.get('steps', '?')}"
            rows.append([run.name, method.label, str(run.seed), run.status, steps, share(run.accuracy), _machine(run),
                         str(run.path)])
            marks.append(i)
    return Table(["run", "method", "seed", "status", "steps", "test", "made with", "folder"], rows, marks)


def _machine(run: Run) -> str:
    info = run.info
    parts = [f"{key} {info[key]}" for key in ("bridgelm", "torch", "transformers") if info.get(key)]
    commit = info.get("commit") or ""
    changed = " with changes" if commit.endswith("-dirty") else ""
    return ", ".join([*parts, *([f"commit {commit[:10]}{changed}"] if commit else [])])


def harmless(markdown: str) -> str:
    """Markdown lets HTML through; names and settings from run folders must not."""
    return markdown.replace("<", "&lt;")


def markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        plain = (cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in cells)
        return "| " + " | ".join(plain) + " |"

    rule = "|" + "|".join(" --- " if i == 0 else " ---: " for i in range(len(table.headers))) + "|"
    text = "\n".join([line(table.headers), rule, *(line(row) for row in table.rows)])
    return f"{text}\n\n{table.caption}" if table.caption else text
