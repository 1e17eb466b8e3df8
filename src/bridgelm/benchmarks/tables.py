"""Writes benchmark results as Markdown: models beside each other, paired comparisons, breakdowns, published numbers."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bridgelm.benchmarks.scores import averages, compare, headline

Results = Mapping[str, Mapping[str, dict[str, Any]]]  # model -> suite -> result


def combined(results: Results) -> dict[str, Any]:
    """What can only be said of several suites or models: averages, and each model against the first."""
    scores = {model: {suite: found["scores"] for suite, found in own.items()} for model, own in results.items()}
    first, *others = results
    return {"averages": {model: averages(own) for model, own in scores.items()},
            "paired": {f"{other} - {first}": compare(scores[other], scores[first]) for other in others}}


def page(results: Results, found: Mapping[str, Any]) -> str:
    suites = list(next(iter(results.values())))
    parts = ["# Benchmarks", "", _about(results), "", *_main(results, found["averages"], suites)]
    for pair, cells in found["paired"].items():
        parts += ["", f"## {pair}", "", "The same items, paired. p is of no difference: exact McNemar for one answer "
                  "an item, random signs for averages.", "", *_paired(cells, results)]
    parts += ["", "## How it was asked", "", *_asked(results)]
    for model, own in results.items():
        parts += ["", f"## {model} by level, subject and length of answer", "", *_cells(own)]
    if published := _published(suites):
        parts += ["", *published]
    return "\n".join(parts) + "\n"


def _about(results: Results) -> str:
    one = next(iter(next(iter(results.values())).values()))
    text = "Percent right, 95 % intervals over items (Wilson for one greedy answer an item, bootstrap for averages)."
    limited = sorted({str(found["limit"]) for own in results.values() for found in own.values() if found["limit"]})
    if limited:
        text += f" **Only the first {', '.join(limited)} items of each suite**: not the benchmark."
    if fixed := sorted({f"{name} ({len(found['label_fixes']['applied'])})" for own in results.values()
                        for name, found in own.items() if found["label_fixes"]}):
        text += f" **Gold answers corrected** in {', '.join(fixed)} by {one['settings']['label_fixes']}."
    return text


def _main(results: Results, means: Mapping[str, Any], suites: Sequence[str]) -> list[str]:
    first = next(iter(results.values()))
    heads = [first[suite]["title"] + (f" (avg@{first[suite]['sampled']['k']})" if "sampled" in first[suite] else "")
             for suite in suites]
    many = len(suites) > 1
    lines = [_row("model", *heads, *(["macro", "micro"] if many else []), "cut", "grader errors"),
             "|---" + "|---:" * (len(heads) + 2 * many + 2) + "|"]
    for model, own in results.items():
        cells = [percent(*headline(own[suite])) for suite in suites]
        if many:
            cells += [percent(means[model][kind]["value"], means[model][kind]["interval"]) for kind in
                      ("macro", "micro")]
        lines.append(_row(model, *cells, *(share(own, key) for key in ("truncated", "errors"))))
    if any("sampled" in found for own in results.values() for found in own.values()):
        lines += ["", *_passes(results)]
    return lines


def _passes(results: Results) -> list[str]:
    lines = [_row("model", "suite", "pass@1 greedy", "avg@k", "unbiased pass@k"), "|---|---|---:|---:|---|"]
    for model, own in results.items():
        for suite, found in own.items():
            if "sampled" in found:
                drawn = found["sampled"]
                passes = ", ".join(f"@{k} {percent(cell['value'], cell['interval'])}" for k, cell in
                                   drawn["pass"].items())
                lines.append(_row(model, suite, percent(found["greedy"]["accuracy"], found["greedy"]["interval"]),
                                  percent(drawn["avg"], drawn["interval"]), passes))
    return lines


def _paired(cells: Mapping[str, Mapping[str, Any]], results: Results) -> list[str]:
    lines = [_row("suite", "difference in points", "p", "better", "worse", "items"), "|---|---:|---:|---:|---:|---:|"]
    for suite, cell in cells.items():
        low, high = (100 * bound for bound in cell["interval"])
        lines.append(_row(suite, f"{100 * cell['difference']:+.1f} [{low:+.1f}, {high:+.1f}]", f"{cell['p']:.2g}",
                          cell["better"], cell["worse"], cell["n"]))
    return lines


def _asked(results: Results) -> list[str]:
    lines = []
    for model, own in results.items():
        facts = next(iter(own.values()))["model"]
        lines.append(f"- **{model}**: weights {facts['sha256'][:12]}, {facts['parameters']:,} parameters, "
                     f"{facts['dtype']}, {facts['engine']} engine on {facts['device']}"
                     + (f", run {facts['run']} ({facts['which']})" if "run" in facts else ""))
    for suite, found in next(iter(results.values())).items():
        sampling, grading = found["settings"]["sampling"], found["settings"]["grading"]
        drawn = f", {sampling['samples']} samples at temperature {sampling['temperature']:g}" if sampling["samples"] \
            else ""
        lines += [f"- **{suite}**: {found['items']} items of {found['source']}; one greedy answer{drawn}, at most "
                  f"{sampling['max_new_tokens']} tokens; graded by {grading['verifier']}"
                  + (f" within {grading['tolerance']:g}" if grading["tolerance"] else "")
                  + f". First prompt ({found['first_prompt']['id']}):", "", _block(found["first_prompt"]["text"]), ""]
    return lines


def _block(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return "\n".join(f"  {line}".rstrip() for line in [fence, *text.splitlines(), fence])


def _cells(own: Mapping[str, dict[str, Any]]) -> list[str]:
    lines = [_row("suite", "by", "value", "accuracy", "items"), "|---|---|---|---:|---:|"]
    return lines + [_row(suite, by, value, percent(cell["accuracy"], cell["interval"]), cell["n"])
                    for suite, found in own.items() for by, cells in found["by"].items()
                    for value, cell in cells.items()]


def _published(suites: Sequence[str]) -> list[str]:
    """The paper's own numbers, where one of its suites is among ours."""
    paper = tomllib.loads(Path(__file__).with_name("published.toml").read_text(encoding="utf-8"))
    columns = [(i, suite) for i, suite in enumerate(paper["suites"]) if suite in suites]
    if not columns:
        return []
    lines = [f"## Published for {paper['model']} ({paper['source']})", "",
             "The paper's numbers, not ours: one run each, no intervals, another grader and other prompts.", "",
             _row("method (published)", *(suite for _, suite in columns), "macro"), "|---" + "|---:" * len(columns)
             + "|---:|"]
    for method, values in paper["rows"].items():
        shown = [values[i] for i, _ in columns]
        lines.append(_row(method, *(f"{value:.1f}" for value in shown), f"{sum(shown) / len(shown):.1f}"))
    return lines


def share(own: Mapping[str, dict[str, Any]], key: str) -> str:
    """A share over all answers of all suites."""
    kinds = [(found[kind][key], found["items"] * (1 if kind == "greedy" else found["sampled"]["k"]))
             for found in own.values() for kind in ("greedy", "sampled") if kind in found]
    return f"{100 * sum(value * n for value, n in kinds) / sum(n for _, n in kinds):.1f} %"


def percent(value: float | None, interval: Sequence[float]) -> str:
    return "none" if value is None else f"{100 * value:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
