"""Writes a report about run folders: an HTML page, Markdown, the figures as PNG and SVG, and the numbers as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

from bridgelm.analysis.comparison import Comparison, analyse
from bridgelm.reports import levels, text
from bridgelm.reports.files import draw_files
from bridgelm.reports.html import page
from bridgelm.reports.panels import bridge_methods, bridge_panels, curve_panels, difficulty_panel, training_panels
from bridgelm.reports.plots import Panel
from bridgelm.reports.tables import EXPLANATION, HEADING, demonstration_tables
from bridgelm.runs.folder import write_json
from bridgelm.runs.reader import Run


def report(runs: Sequence[str | Path], out: str | Path | None = None, *, base: str | None = None,
           title: str | None = None, stem: str = "report", notes: Sequence[str] = ()) -> Path:
    """Write OUT/`stem`.html, .md, .json and OUT/figures; returns the page's path.

    `base` names the method that the others are compared with (default: the first run's). `out` defaults to the run's
    own folder for one run, else to ./report. `notes` are said at the top.
    """
    comparison = analyse([Run(path) for path in runs], base)
    comparison = replace(comparison, notes=(*comparison.notes, *notes))
    folder = Path(out) if out else Path(runs[0]) / "report" if len(runs) == 1 else Path("report")
    folder.mkdir(parents=True, exist_ok=True)
    title = title or default_title(comparison)
    figures = write_figures(comparison, folder / "figures")
    write_json(folder / f"{stem}.json", {"title": title, **comparison.data(), "levels": levels.data(comparison)})
    texts = {"md": markdown(comparison, title, figures), "html": page(comparison, title)}
    for ending, content in texts.items():  # half a surrogate pair, which no file can hold, becomes a question mark
        (folder / f"{stem}.{ending}").write_text(content, encoding="utf-8", errors="replace")
    return folder / f"{stem}.html"


def default_title(comparison: Comparison) -> str:
    first, *others = [method.label for method in comparison.methods]
    if not others:
        return first
    return f"{first} against {text.names(others) if len(others) <= 5 else f'{len(others)} other methods'}"


def write_figures(comparison: Comparison, folder: Path) -> dict[str, str]:
    """Each figure as NAME.png and NAME.svg; returns {name: heading} of those that were drawn."""
    difficulty = difficulty_panel(comparison)
    wanted: dict[str, tuple[str, Sequence[Panel]]] = {
        "accuracy": ("Validation accuracy against compute", curve_panels(comparison)),
        "difficulty": ("Final test accuracy by difficulty", [difficulty] if difficulty else []),
        "training": ("Training", training_panels(comparison)),
    }
    for i, method in enumerate(bridge_methods(comparison)):
        name = "bridge" if i == 0 else f"bridge-{i + 1}"
        wanted[name] = (f"Diagnostics of {method.label}", bridge_panels(method))
    for name, (_, panels) in wanted.items():
        if panels:
            draw_files(panels, folder / name)
    return {name: heading for name, (heading, panels) in wanted.items() if panels}


def markdown(comparison: Comparison, title: str, figures: dict[str, str]) -> str:
    several = len(comparison.methods) > 1
    parts = [f"# {title}", f"{text.seeds_text(comparison)}, {date.today():%Y-%m-%d}. Written by `bridgelm report`."]
    parts += [f"> {note}" for note in comparison.notes]
    parts += [text.lead(comparison)] if several else []
    parts.append("\n".join(f"- {line}" for line in text.what_was_equal(comparison)))
    parts += ["## Results", text.markdown_table(text.result_table(comparison))]
    if several:
        parts += [f"## Where {comparison.base.label} does not win",
                  "\n".join(f"- {line}" for line in text.where_base_does_not_win(comparison)), "## Paired differences"]
        for figure, heading in text.FIGURES.items():
            table = text.difference_table(comparison, figure)
            if table.rows:
                parts += [f"### {heading}", text.markdown_table(table)]
    tables = levels.level_tables(comparison)
    parts += [f"## {levels.HEADING}", *map(text.markdown_table, tables)] if tables else []
    parts += ["## Cost", text.markdown_table(text.cost_table(comparison))]
    for i, (label, tables) in enumerate(demonstration_tables(comparison)):
        parts += [] if i else [f"## {HEADING}", EXPLANATION]
        parts += [*([f"### {label}"] if several else []), *map(text.markdown_table, tables)]
    parts += ["## Figures", *(f"![{heading}](figures/{name}.png)" for name, heading in figures.items())]
    parts += ["## How to read this", "\n".join(f"- {line}" for line in text.DEFINITIONS)]
    return text.harmless("\n\n".join(parts)) + "\n"
