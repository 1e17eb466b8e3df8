"""Tables of what the demonstrations did for reward, for methods that record it: by source, and the best and worst."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bridgelm.analysis.comparison import Comparison, MethodRuns
from bridgelm.reports.text import Table
from bridgelm.runs.reader import Run

ENDS = 5  # demonstrations shown at either end
HEADING = "What the demonstrations did for reward"
EXPLANATION = ("Alignment says what reward does, to first order, when training makes a demonstration's tokens a little "
               "likelier: above 0 it rises, below 0 it falls. 1 is the typical size over the tokens of a batch.")


def demonstration_tables(comparison: Comparison) -> list[tuple[str, list[Table]]]:
    """Label of each method that kept account, and its tables. Seeds of a method are pooled."""
    found = ((method.label, _tables(method)) for method in comparison.methods)
    return [(label, tables) for label, tables in found if tables]


def _tables(method: MethodRuns) -> list[Table]:
    sources = _pooled(method.runs, "sources", ("source",), "tokens")
    column = _plain(sources[0].get("column") or "source") if sources else ""
    return [*_sources(sources, column), *_ends(_pooled(method.runs, "demonstrations", ("problem_id", "text"), "count"),
                                               column)]


def _sources(pooled: list[dict[str, Any]], column: str) -> list[Table]:
    if not pooled:
        return []
    headers = [column, "demonstrations", "tokens trained on", "mean alignment"]
    rows = [[_plain(row.get("source")), _count(row.get("demonstrations")), _count(row["weight"]),
             _signed(row["alignment"])] for row in pooled]
    return [Table(headers, rows, caption="By where the demonstrations come from, the worst for reward first.")]


def _ends(pooled: list[dict[str, Any]], column: str) -> list[Table]:
    """The most harmful and the most helpful demonstrations; nothing that helps is called harmful."""
    harmful = [row for row in pooled if row["alignment"] < 0][:ENDS]
    helpful = [row for row in reversed(pooled) if row["alignment"] > 0][:ENDS]
    headers = ["of problem", *([column] if column else []), "tokens", "times seen", "alignment"]
    tables = []
    for name, part in (("harmful", harmful), ("helpful", helpful)):
        rows = [[_plain(row.get("text")), _plain(row.get("problem_id")),
                 *([_plain(row.get("source") or "–")] if column else []), _count(row.get("tokens")),
                 _count(row["weight"]), _signed(row["alignment"])] for row in part]
        if rows:
            caption = f"{len(rows)} of {len(pooled):,}; texts may be cut. What was seen only once or twice is noisy."
            tables.append(Table([f"most {name} demonstrations", *headers], rows, caption=caption))
    return tables


def _pooled(runs: Iterable[Run], name: str, keys: tuple[str, ...], weight: str) -> list[dict[str, Any]]:
    """Rows that are about the same thing as one, their alignments averaged by `weight`; the lowest comes first."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in runs:
        for row in run.table(name):
            value, size = row.get("alignment"), row.get(weight)
            if not isinstance(value, int | float) or not isinstance(size, int | float) or size <= 0:
                continue
            into = found.setdefault(tuple(str(row.get(key)) for key in keys), {**row, "weight": 0, "sum": 0.0})
            into["weight"], into["sum"] = into["weight"] + size, into["sum"] + size * value
    rows = [{**row, "alignment": row["sum"] / row["weight"]} for row in found.values()]
    return sorted(rows, key=lambda row: row["alignment"])


def _count(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) else "–"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _plain(value: Any) -> str:
    """One line, and nothing that Markdown would make a link or an image of."""
    return " ".join(str(value).split()).replace("[", "(").replace("]", ")")
