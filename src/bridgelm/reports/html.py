"""The report as one HTML page: no request leaves it, and nothing that a model wrote can act in it.

Every text goes through `esc`; the samples lie in a JSON block in which `<`, `>` and `&` are written as escapes, and a
content security policy lets no script run but our own, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import date
from importlib.resources import files

from bridgelm.analysis.comparison import Claim, Comparison
from bridgelm.reports import levels, text
from bridgelm.reports.panels import (
    MANY,
    VERDICTS,
    accuracy_bars,
    bridge_methods,
    bridge_panels,
    colours,
    curve_panels,
    difference_bars,
    difficulty_panel,
    length_panel,
    percent,
    share,
    signed,
    training_panels,
)
from bridgelm.reports.plots import GREY, Panel, esc, svg, svg_bars, tone
from bridgelm.reports.samples import samples_section
from bridgelm.reports.tables import EXPLANATION, HEADING, demonstration_tables
from bridgelm.runs.progress import clock, short
from bridgelm.runs.reader import Run

BRIDGES = 6  # methods whose diagnostics are drawn


def page(comparison: Comparison, title: str) -> str:
    """The whole document."""
    assets = files("bridgelm.reports") / "assets"
    css, script = ((assets / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    sections = [found for found in _sections(comparison) if found[2]]
    links = "".join(f'<a href="#{key}">{esc(name)}</a>' for key, name, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{esc(name)}</h2>{content}</section>' for key, name, content in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{esc(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(title)} · BridgeLM</title><style>{css}</style></head><body>"
        f'<header><div><p class="kicker">BridgeLM report</p><h1>{esc(title)}</h1>{_subtitle(comparison)}</div>'
        '<button id="theme" type="button" aria-label="switch between light and dark">◐ theme</button></header>'
        f"<nav>{links}</nav><main>{body}</main>"
        f"<footer>Made by <b>bridgelm report</b> on {date.today():%d %B %Y}. This page loads nothing from elsewhere."
        "</footer>"
        f'<div id="tip" role="tooltip"></div><script>{script}</script></body></html>\n'
    )


def _sections(comparison: Comparison) -> list[tuple[str, str, str]]:
    several = len(comparison.methods) > 1
    return [
        ("short", "In short", _short(comparison) + _warnings(comparison.runs)),
        ("curves", "Accuracy against compute", _curves(comparison)),
        ("results", "Results", _results(comparison)),
        ("differences", "Paired differences", _differences(comparison) if several else ""),
        ("levels", levels.HEADING, _levels(comparison)),
        ("cost", "Cost", _cost(comparison)),
        ("bridge", "BRIDGE's diagnostics", _diagnostics(comparison)),
        ("demonstrations", HEADING, _demonstrations(comparison)),
        ("training", "Training", _small(training_panels(comparison), "Mean of the seeds, and their range.")),
        ("samples-view", "Sample rollouts", samples_section(comparison.runs)),
        ("runs", "Runs and reading aid", _runs(comparison)),
    ]


def _subtitle(comparison: Comparison) -> str:
    config = comparison.base.runs[0].config
    count = len(comparison.runs)
    model, data = config.get("model", {}).get("name_or_path"), config.get("data", {}).get("train")
    runs = f"{count} run{'s' * (count > 1)}"
    facts = [model, data, text.seeds_text(comparison), runs, f"{config.get('steps')} steps"]
    return f'<p class="sub">{" · ".join(esc(fact) for fact in facts if fact)}</p>'


def _short(comparison: Comparison) -> str:
    warnings = "".join(f"<p>{esc(note)}</p>" for note in comparison.notes)
    out = [f'<div class="card note">{warnings}</div>'] if warnings else []
    out += [f'<p class="lead">{esc(text.lead(comparison))}</p>'] if comparison.claims else []
    out.append(_claims(comparison) if comparison.claims else _facts(comparison))
    if len(comparison.runs) == 1:
        return f'<div class="grid">{"".join(out)}</div>'
    equal = "".join(f"<li>{esc(line)}</li>" for line in text.what_was_equal(comparison))
    blocks = [f'<div class="card"><h3>What was equal, and what was not</h3><ul class="plain">{equal}</ul></div>']
    if comparison.claims:
        lines = "".join(f"<li>{esc(line)}</li>" for line in text.where_base_does_not_win(comparison))
        blocks.append(f'<div class="card"><h3>Where {esc(comparison.base.label)} does not win</h3>'
                      f'<ul class="plain">{lines}</ul></div>')
    return f'<div class="grid">{"".join(out)}<div class="grid cols2">{"".join(blocks)}</div></div>'


def _claims(comparison: Comparison) -> str:
    """One line per figure, which compares the base method with each other method."""
    rows = []
    for figure, heading in text.FIGURES.items():
        claims = [claim for claim in comparison.claims if claim.figure == figure]
        open_ = [claim for claim in claims if claim.verdict == "unclear"]
        if len(claims) > MANY:  # what is shown stands out; the rest is a click away
            rest = f"<details><summary>no difference shown from {len(open_)}</summary>{_chips(open_)}</details>"
            shown = _chips([claim for claim in claims if claim not in open_]) + rest * bool(open_)
        else:
            shown = _chips(claims)
        if claims:
            rows.append(f"<b>{esc(heading)}</b><div>{shown}</div>")
    key = "▲ ahead · ▼ behind · = equal within 2 points · ? no difference shown. Points, with 95 % intervals."
    heading = f"{comparison.base.label} against the others, {text.seeds_text(comparison)}"
    return (f'<div class="card"><h3>{esc(heading)}</h3><div class="claims">{"".join(rows)}</div>'
            f'<p class="caption">{key}</p></div>')


def _chips(claims: Sequence[Claim]) -> str:
    chips = "".join(f'<span class="chip {claim.verdict}"><i>{VERDICTS[claim.verdict][0]}</i> {esc(claim.other)} '
                    f"{esc(text.gap(claim))}</span>" for claim in claims)
    return f'<div class="chips">{chips}</div>'


def _facts(comparison: Comparison) -> str:
    """The figures of a single method, in large type."""
    row, run = comparison.table[comparison.base.label], comparison.base.runs[0]
    last = run.evals[-1]["accuracy"] if run.evals else None
    figures = [("final, test accuracy", share(row["final"].value) if row["final"] else "–"),
               ("best on validation, test", share(row["best"].value) if row["best"] else "–"),
               ("last validation look", share(last)),
               ("rollouts", short(row["rollouts"].value) if row["rollouts"] else "–"),
               ("FLOPs", short(row["flops"].value) if row["flops"] else "–"),
               ("wall time", clock(row["seconds"].value) if row["seconds"] else "–"),
               ("peak memory", f"{row['memory'].value:,.0f} MB" if row["memory"] else "–")]
    cells = "".join(f"<div><b>{esc(value)}</b><span>{esc(name)}</span></div>" for name, value in figures)
    return f'<div class="card facts">{cells}</div>'


def _band(comparison: Comparison) -> str:
    grey = colours(comparison).count(GREY)
    return _spread(comparison) + (f" In grey: the {grey} other methods; point at a dot for its name." if grey else "")


def _spread(comparison: Comparison) -> str:
    if any(len(method.by_seed) > 1 for method in comparison.methods):
        return "Line: mean of the seeds. Band: lowest to highest seed."
    return "One seed: the spread between trainings is not known."


def _figure(panel: Panel, width: int, height: int) -> str:
    return f'<figure class="card"><h3>{esc(panel.title)}</h3>{svg(panel, width, height)}</figure>'


def _curves(comparison: Comparison) -> str:
    """The first axis large, the others below it."""
    panels = curve_panels(comparison)
    if not panels:
        return ""
    rest = "".join(_figure(panel, 560, 290) for panel in panels[1:])
    first = f'<div class="wide">{_figure(panels[0], 1140, 360)}</div>'
    return (f'<div class="grid">{first}<div class="grid cols2">{rest}</div></div>'
            f'<p class="caption">{esc(_band(comparison))}</p>')


def _small(panels: Sequence[Panel], caption: str) -> str:
    if not panels:
        return ""
    drawn = "".join(_figure(panel, 260, 185) for panel in panels)
    return f'<div class="grid cols4">{drawn}</div><p class="caption">{esc(caption)}</p>'


def _results(comparison: Comparison) -> str:
    bars, charts = accuracy_bars(comparison), ""
    if len(bars) > 1 or any(len(bar.points) > 1 for bar in bars):
        charts = (f'<figure class="card"><h3>Final test accuracy</h3>{svg_bars(bars, percent, width=1100)}'
                  "<figcaption>Dot: mean. Bar: 95 % interval. Rings: single seeds.</figcaption></figure>")
    table = html_table(text.result_table(comparison))
    return f'<div class="grid"><div class="card">{table}</div>{charts}</div>'


def _levels(comparison: Comparison) -> str:
    panels = [panel for panel in (difficulty_panel(comparison), length_panel(comparison)) if panel]
    drawn = "".join(_figure(panel, 560, 290) for panel in panels)
    tables = "".join(f'<div class="card">{html_table(table)}</div>' for table in levels.level_tables(comparison))
    return f'<div class="grid"><div class="grid cols2">{drawn}</div>{tables}</div>' if drawn or tables else ""


def _differences(comparison: Comparison) -> str:
    blocks = []
    for figure, heading in text.FIGURES.items():
        bars = difference_bars(comparison, figure)
        if bars:
            table = html_table(text.difference_table(comparison, figure))
            chart = svg_bars(bars, lambda value: signed(value, 0 if float(value).is_integer() else 1), zero=True)
            blocks.append(f'<div class="card"><h3>{esc(heading)}</h3>{chart}'
                          f"<details><summary>p-values</summary>{table}</details></div>")
    note = (f"Points by which {comparison.base.label} is better (right of zero) or worse (left of it); paired by seed, "
            "95 % intervals.")
    return f'<div class="grid cols2">{"".join(blocks)}</div><p class="caption">{esc(note)}</p>' if blocks else ""


def html_table(table: text.Table) -> str:
    verdicts = {words: name for name, words in VERDICTS.items()}
    head = "".join(f"<th>{esc(cell)}</th>" for cell in table.headers)
    rows = []
    for i, row in enumerate(table.rows):
        mark = table.marks[i] if i < len(table.marks) else None
        swatch = "" if mark is None else f'<span class="swatch {tone(mark)}"></span>'
        cells = [f"<td{_class(verdicts.get(cell))}>{esc(cell)}</td>" for cell in row]
        cells[0] = cells[0].replace(">", f">{swatch}", 1)
        rows.append(f"<tr>{''.join(cells)}</tr>")
    caption = f'<p class="caption">{esc(table.caption)}</p>' if table.caption else ""
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll">{body}</div>{caption}'


def _class(name: str | None) -> str:
    return f' class="{name}"' if name else ""


def _cost(comparison: Comparison) -> str:
    """The table, and the ledger's parts as bars on one scale."""
    amounts = {label: flops.value if (flops := row["flops"]) else 0.0 for label, row in comparison.table.items()}
    most = max(amounts.values(), default=0.0)
    rows = []
    for i, method in zip(colours(comparison), comparison.methods):
        parts = text.ledger(method)
        bars = "".join(f'<span class="part{j}" style="width:{100 * value * amounts[method.label] / most:.2f}%" '
                       f'data-tip="{esc(method.label)}: {esc(name)} {share(value)}"></span>'
                       for j, (name, value) in enumerate(parts.items())) if most else ""
        colour = tone(i)
        rows.append(f'<span><span class="swatch {colour}"></span>{esc(method.label)}</span>'
                    f'<div class="bar {colour}">{bars}</div><span>{esc(short(amounts[method.label]))}</span>')
    parts = enumerate(text.LEDGER.values())
    legend = "".join(f'<span><span class="swatch part{j}"></span>{name}</span>' for j, name in parts)
    chart = (f'<div class="card"><h3>FLOPs of a run, by what they were spent on</h3><div class="legend">{legend}</div>'
             f'<div class="ledger">{"".join(rows)}</div></div>') if most else ""
    return f'<div class="grid"><div class="card">{html_table(text.cost_table(comparison))}</div>{chart}</div>'


def _diagnostics(comparison: Comparison) -> str:
    methods = bridge_methods(comparison)
    caption = ("Gain: hollow points had an effective sample size under .3 and are not to be trusted; points without a "
               "line are measured on rollouts of the shadow. Bands: range of the seeds, or the gain's standard error.")
    blocks = [f"<h3>{esc(method.label)}</h3>" * (len(methods) > 1) + _small(bridge_panels(method), caption)
              for method in methods[:BRIDGES]]
    more = len(methods) - BRIDGES
    left = f"<p>{more} more BRIDGE variants are drawn among the figure files.</p>" if more > 0 else ""
    return "".join(blocks) + left


def _demonstrations(comparison: Comparison) -> str:
    blocks = []
    for label, tables in demonstration_tables(comparison):
        cards = "".join(f'<div class="card">{html_table(table)}</div>' for table in tables)
        heading = f"<h3>{esc(label)}</h3>" if len(comparison.methods) > 1 else ""
        blocks.append(f'{heading}<div class="grid">{cards}</div>')
    return f"<p>{esc(EXPLANATION)}</p>{''.join(blocks)}" if blocks else ""


def _warnings(runs: Sequence[Run]) -> str:
    found: dict[str, list[str]] = {}
    for run in runs:
        for event in run.warnings:
            found.setdefault(str(event.get("text")), []).append(f"{run.name} at step {event.get('step')}")
    lines = "".join(f"<li>{esc(what)}: {esc(', '.join(where[:6]))}{' and more' * (len(where) > 6)}</li>"
                    for what, where in found.items())
    return f'<div class="card note"><h3>Warnings</h3><ul class="plain">{lines}</ul></div>' if lines else ""


def _runs(comparison: Comparison) -> str:
    runs = comparison.runs
    dumped = {m.runs[0].name: json.dumps(m.runs[0].config, indent=1, ensure_ascii=False) for m in comparison.methods}
    settings = "".join(f"<details><summary>settings of {esc(name)}</summary><pre>{esc(config)}</pre></details>"
                       for name, config in dumped.items())
    aid = "".join(f"<li>{esc(line)}</li>" for line in text.DEFINITIONS)
    table = html_table(text.run_table(comparison))
    open_list = " open" if len(runs) <= 12 else ""
    return (f'<div class="card"><h3>How to read this</h3><ul class="plain">{aid}</ul></div>'
            f'<details{open_list}><summary>{len(runs)} run{"s" * (len(runs) > 1)}</summary>'
            f'<div class="card">{table}</div></details>{settings}')
