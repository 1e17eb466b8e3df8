"""BridgeLM trains reasoning language models on demonstrations and verifiable rewards at once, and measures which mix
your data needs. Everything the command line does is here too; importing the package loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridgelm.config.run_config import RunConfig, load_config
    from bridgelm.errors import UserError
    from bridgelm.runs.reader import Run

__version__ = "0.1.0"
__all__ = ["Run", "RunConfig", "UserError", "__version__", "benchmark", "compare", "demos", "diagnose", "evaluate",
           "export", "load_config", "merge", "report", "train"]

_HOME = {"Run": "runs.reader", "RunConfig": "config.run_config", "load_config": "config.run_config",
         "UserError": "errors"}


def train(config: RunConfig | Mapping[str, Any] | str | Path | None = None, *, resume: str | Path | None = None,
          quiet: bool = False, allow_change: Sequence[str] = ()) -> Run:
    """Train as `config` says (a RunConfig, a dict of the same keys, or a TOML file), or go on with the run folder
    `resume`, made of what it was made of but for what `allow_change` names ("data", "config", ...)."""
    from bridgelm.runs.preflight import ready
    from bridgelm.training import loop

    if (config is None) == (resume is None):
        raise import_module("bridgelm.errors").UserError("train: give either a configuration or a run to resume")
    if resume is not None:
        return loop.resume(Path(resume), quiet=quiet, allow_change=allow_change)
    assert config is not None
    return loop.train(ready(_as_config(config)), quiet=quiet)


def evaluate(run_or_model: str | Path, *, config: RunConfig | Mapping[str, Any] | str | Path | None = None,
             split: str = "test", samples: int = 0, which: str = "final") -> dict[str, Any]:
    """Greedy accuracy with its interval, and with `samples` = k also avg@k and pass@k. A model that is no run folder
    takes its data and reward from `config`."""
    from bridgelm.training.evaluation import evaluate_run

    given = {} if config is None else {"config": _as_config(config)}
    return evaluate_run(run_or_model, split=split, samples=samples, which=which, **given)


def benchmark(models: str | Path | Sequence[str | Path], suites: Sequence[str], out: str | Path | None = None, *,
              suite_folder: str | Path | None = None, own_suites: str | Path | None = None,
              label_fixes: str | Path | None = None, force: bool = False, **options: Any) -> dict[str, Any]:
    """Runs or models on benchmarks, as `bridgelm eval --suite` does, with its options as arguments (samples=8,
    prompt="simplerl", limit=50, ...). Returns what OUT/results.json holds; an interrupted one goes on there."""
    import json

    inner, error = import_module("bridgelm.benchmarks.run"), import_module("bridgelm.errors").UserError
    names = [models] if isinstance(models, str | Path) else models
    try:
        asked = inner.BenchmarkOptions(**options)
    except TypeError as problem:
        raise error(f"benchmark: {problem}") from None
    paths = {"folder": suite_folder, "extra": own_suites, "fixes": label_fixes}
    page = inner.run([str(name) for name in names], suites, Path(out) if out else None, asked, force=force,
                     **{key: Path(path) for key, path in paths.items() if path})
    return json.loads(page.with_name("results.json").read_text(encoding="utf-8"))


def export(run: str | Path, out: str | Path, *, which: str = "final") -> Path:
    """Write the run's model, merged, as an ordinary Hugging Face folder."""
    from bridgelm.training import checkpoint

    return checkpoint.export(Path(run), Path(out), which=which)


def merge(one: str | Path, other: str | Path, out: str | Path, *, weight: float = 0.5, which: str = "final") -> Path:
    """Write (1 - weight) `one` + weight `other`, two runs or model folders, as an ordinary Hugging Face folder."""
    from bridgelm.training import merging

    return merging.merge(one, other, Path(out), weight, which)


def compare(base: RunConfig | Mapping[str, Any] | str | Path, methods: Sequence[str], seeds: int | Sequence[int] = 3,
            jobs: int | None = None, out: str | Path | None = None, *, overrides: Sequence[str] = (),
            quiet: bool = False, dry_run: bool = False) -> Path | None:
    """Train what is missing of `methods` x `seeds`, all on the base's model and data, and write the comparison.
    A method is one of `bridgelm methods`, or the name or path of a recipe beside `base`. `dry_run` only prints what
    each arm would be given."""
    from bridgelm.runs.preflight import check_static

    inner = import_module("bridgelm.comparisons.compare")
    for config in inner.resolve(base, methods, overrides).values():
        check_static(config)
    return inner.compare(base, methods, seeds, jobs, out, overrides=overrides, quiet=quiet, dry_run=dry_run)


def report(runs: Sequence[str | Path], out: str | Path | None = None, *, base: str | None = None) -> Path:
    """Write the page about one or more run folders; `base` names the method that the others are compared with."""
    return import_module("bridgelm.reports.page").report(runs, out, base=base)


def demos(config: RunConfig | Mapping[str, Any] | str | Path, out: str | Path, *, force: bool = False,
          **options: Any) -> dict[str, int]:
    """Sample demonstrations as `bridgelm demos` does, with its options as arguments (samples=8, paired=True, ...), and
    return the counts."""
    from dataclasses import fields

    from bridgelm.runs.preflight import to_sample

    inner = import_module("bridgelm.rollout.demonstrations")
    known = {field.name for field in fields(inner.DemoOptions)}
    for name in options.keys() - known:
        raise import_module("bridgelm.errors").UserError(f"demos: unknown option {name!r}; known: {sorted(known)}")
    return inner.write_demos(to_sample(_as_config(config)), out, inner.DemoOptions(**options), force=force)


def diagnose(runs: Sequence[str | Path], out: str | Path | None = None, *, measure: bool = False) -> Path:
    """Write what SFT and RL did to each other in run folders; `measure` first measures the saved models of runs that
    took no probes while they trained."""
    return import_module("bridgelm.diagnosis.diagnose").diagnose(runs, out, measure=measure)


def _as_config(config: RunConfig | Mapping[str, Any] | str | Path) -> RunConfig:
    from bridgelm.config.run_config import RunConfig, load_config, make_config

    if isinstance(config, RunConfig):
        return config
    return load_config(config) if isinstance(config, str | Path) else make_config(dict(config))


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bridgelm' has no attribute {name!r}")
    return getattr(import_module(f"bridgelm.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
