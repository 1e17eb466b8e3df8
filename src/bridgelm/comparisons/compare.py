"""`bridgelm compare`: train what is missing of several methods on one model and one data set, then compare them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bridgelm.analysis.arms import identity, rival, unequal
from bridgelm.analysis.arms import table as arms_table
from bridgelm.analysis.comparison import Comparison, analyse, disagreement
from bridgelm.comparisons.everything import ALL, everything, with_layout
from bridgelm.comparisons.runs import RunProcess, train_all
from bridgelm.config import catalogue, plugins
from bridgelm.config.options.teachers import TeacherConfig
from bridgelm.config.run_config import RunConfig, load_config, make_config, one_folder, variant_names
from bridgelm.config.variants import KEY
from bridgelm.errors import UserError
from bridgelm.reports import text
from bridgelm.reports.levels import lengths
from bridgelm.reports.page import report
from bridgelm.runs.folder import check_sinks
from bridgelm.runs.progress import clock, short
from bridgelm.runs.reader import Run

WIDE = 90  # characters of a line that has room for the length of the answers


def compare(base: RunConfig | Mapping[str, Any] | str | Path, methods: Sequence[str], seeds: int | Sequence[int] = 3,
            jobs: int | None = None, out: str | Path | None = None, *, overrides: Sequence[str] = (),
            quiet: bool = False, dry_run: bool = False) -> Path | None:
    """Writes OUT/comparison.html, .md, .json and OUT/figures; returns the page's path.

    Each of `methods` is a variant that `base` carries, a recipe beside it (by its name), a path, or the name of a
    method, which then takes the base's other settings; `all` stands for every registered method (everything.py).
    `base` itself is always in and is what the others are compared with. Finished runs in OUT are kept, unfinished
    ones go on. `overrides` hold for all methods. `jobs`: runs at once, default one a core. What each arm is given is
    printed first (analysis/arms.py); `dry_run` stops there, without a page.
    """
    configs, notes = resolve_all(base, methods, overrides)
    first = next(iter(configs))
    folder = Path(out) if out else Path(configs[first].out) / f"compare-{first}"
    numbers = range(seeds) if isinstance(seeds, int) else seeds
    # Seeds outermost: a comparison that is stopped half way has whole pairs.
    plan = [RunProcess(_run_config(config, label, seed, folder))
            for seed in numbers for label, config in configs.items()]
    check_sinks(configs[first].log.sinks)
    if dry_run or not quiet:
        show_arms(configs, notes)
    if dry_run:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    train_all(plan, jobs or default_jobs(configs[first]), quiet)
    paths = [job.path for job in plan]
    page = report(paths, folder, base=first, stem="comparison", notes=notes)
    if not quiet:
        show(analyse([Run(path) for path in paths], first), notes=notes)
    return page


def resolve(base: RunConfig | Mapping[str, Any] | str | Path, methods: Sequence[str],
            overrides: Sequence[str] = ()) -> dict[str, RunConfig]:
    """The configurations by label, the base first. All must agree on what a fair comparison holds fixed."""
    return resolve_all(base, methods, overrides)[0]


def resolve_all(base: RunConfig | Mapping[str, Any] | str | Path, methods: Sequence[str],
                overrides: Sequence[str] = ()) -> tuple[dict[str, RunConfig], list[str]]:
    """The same, and what a reader should know: which of `all` methods were left out, and why."""
    if isinstance(base, str | Path):
        if ALL in methods:
            overrides = with_layout(base, overrides)
        own, file = load_config(base, overrides), Path(base)
        label = Path(base).stem
    else:
        own, file = base if isinstance(base, RunConfig) else make_config(dict(base)), None
        label = own.name
        if overrides:
            raise UserError("compare: overrides go with a recipe file; change the configuration itself")
    configs, notes = {label: own}, list[str]()
    if ALL in methods:
        found, notes = everything(own, file.parent if file else None, overrides,
                                  lambda item, folder, sets: _find(item, own, file if folder else None, sets)[0])
        for name, config in found.items():
            if all(identity(config) != identity(other) for other in configs.values()):
                configs[name] = config
        methods = [item for item in methods if item != ALL and item not in configs]
    for item in methods:
        is_file = item.endswith((".toml", ".json"))
        name = Path(item).stem if is_file else plugins.short(item)
        if name == label and not is_file:
            continue
        found, note = _find(item, own, file, overrides)
        key = disagreement(own.resolved(), found.resolved())
        if key:
            raise UserError(f"--methods: {item!r} has another {key} than {label!r}; a comparison needs the same model, "
                            "data, reward, rollout and eval")
        same = next((other for other, config in configs.items() if identity(config) == identity(found)), None)
        if same is None and name in configs:
            raise UserError(f"--methods: {name!r} is named twice, with different settings; give the recipes different "
                            "names")
        if same is not None:  # one arm: it would be trained twice, and no report tells the two apart
            notes += [f"{name} is what {same} is already, so it is the arm {same}."] * (name != same)
            continue
        configs[name] = found
        notes += [f"{note}."] if note else []
    return configs, notes


def _find(item: str, own: RunConfig, file: Path | None, overrides: Sequence[str]) -> tuple[RunConfig, str | None]:
    """The configuration that a name stands for, and what a reader should know about it."""
    if item.endswith((".toml", ".json")):
        return load_config(item, overrides), None
    try:
        one_folder(plugins.short(item))
    except ValueError as error:
        raise UserError(f"--methods: {error}; a recipe elsewhere is named by its path, with its ending") from None
    if ":" in item:
        return _rival(own, item, "--methods")
    if file is not None and item in variant_names(file):
        return load_config(file, [f"{KEY}={item}", *overrides]), None
    sibling = file.with_name(f"{item}.toml") if file is not None else None
    if sibling is not None and sibling.is_file():
        return load_config(sibling, overrides), None
    if item == own.method.name:
        return own, None
    place = f"no recipe {sibling} and " if sibling else ""
    return _rival(own, item, f"--methods: {place}as a method {item!r}")


def _rival(own: RunConfig, item: str, where: str) -> tuple[RunConfig, str | None]:
    found, note = rival(own, item, where)
    asks = catalogue.needs_of(found.method) & {"teacher", "behaviour"}
    if asks and found.teacher is None and found.data.train.startswith("toy:"):  # the embedded task has one of its own
        found = found.model_copy(update={"teacher": TeacherConfig(name_or_path="toy:teacher")})
    return found, note


def _run_config(config: RunConfig, label: str, seed: int, folder: Path) -> RunConfig:
    """One thread a run unless the recipe says otherwise: runs side by side share the cores."""
    update = {"name": f"{label}-seed{seed}", "seed": seed, "out": str(folder), "threads": config.threads or 1}
    return make_config({**config.resolved(), **update}, f"compare: {label}")


def default_jobs(config: RunConfig) -> int:
    """One run per core, or a single run where the runs would share a GPU."""
    on_gpu = config.model.device.startswith("cuda") or (config.model.device == "auto" and shutil.which("nvidia-smi"))
    return 1 if on_gpu else os.cpu_count() or 1


def show_arms(configs: Mapping[str, RunConfig], notes: Sequence[str] = (), console: Console | None = None) -> None:
    """What each arm is given, and what of it differs, before anything is trained."""
    console = console or Console()
    table = Table(title="What each arm is given", title_justify="left", title_style="bold", box=None,
                  header_style="dim", pad_edge=False)
    headings, rows = arms_table(configs)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "arm" else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    for line in [*(f"Not equal: {name}: {who}." for name, who in unequal(configs).items()), *notes]:
        console.print(Text(line), highlight=False)


def show(comparison: Comparison, console: Console | None = None, notes: Sequence[str] = ()) -> None:
    """The small table at the end, below what must be known before it is read."""
    console = console or Console()
    for line in [*comparison.notes, *notes]:
        console.print(Text(line), highlight=False)
    table = Table(title="Accuracy in percent, with 95 % intervals", title_justify="left", title_style="bold", box=None,
                  header_style="dim", pad_edge=False)
    against_base = f"against {comparison.base.label}"
    wide = console.width >= WIDE
    for heading in ("method", "final, test", "hard", against_base, *["tokens"] * wide, "rollouts", "FLOPs", "CPU"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    against = {claim.other: claim for claim in comparison.claims if claim.figure == "final"}
    for method in comparison.methods:
        row, claim = comparison.table[method.label], against.get(method.label)
        long = [f"{found.value:.1f}" if (found := lengths(method)["final"]) else "–"] * wide
        cost = {key: found.value if (found := row[key]) else None for key in ("rollouts", "flops", "cpu_seconds")}
        table.add_row(Text(method.label, style="bold"), text.interval(row["final"]), text.interval(row["hard"]),
                      text.gap(claim, turned=True) if claim else "", *long,
                      short(cost["rollouts"]), short(cost["flops"]), clock(cost["cpu_seconds"]))
    console.print(table)
    console.print(Text(text.lead(comparison)), highlight=False)
