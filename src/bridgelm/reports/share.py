"""`bridgelm report --share`: writes a run's results as one JSON file to share, and shows several such files as a table.

The file has what others need to compare, and no paths, user or host names. Its format is in docs/sharing.md."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from bridgelm.analysis.stats import Estimate, mean_interval
from bridgelm.benchmarks.scores import headline
from bridgelm.config.run_config import tables
from bridgelm.errors import UserError
from bridgelm.reports.text import Table, interval, markdown_table
from bridgelm.runs.folder import read_json, write_json
from bridgelm.runs.progress import clock, short
from bridgelm.runs.reader import Run

FORMAT, VERSION = "bridgelm-share", 1
NOT_COMPARED = ("name", "out", "seed", "threads", "log", "checkpoint_every")  # they decide nothing of the outcome
SOURCES = ("train", "demos", "validation", "test")
COSTS = ("seconds", "rollouts", "tokens", "flops", "flops/generate", "flops/train", "flops/score", "flops/teacher")
CURVE = ("step", "accuracy", "rollouts", "flops")
VERSIONS = ("bridgelm", "torch", "transformers", "python", "commit")


def act(paths: Sequence[Path], out: Path | None) -> str:
    """Run folders are written to one file; such files are printed."""
    files = [path.suffix == ".json" for path in paths]
    if not any(files):
        return f"shared: {share(paths, out)}"
    if out is not None or not all(files):
        raise UserError("report: --share takes run folders and writes a file, or takes such files and prints them")
    return table(paths)


def share(paths: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes OUT (default share.json) about run folders."""
    runs = [Run(path) for path in paths]
    for run in runs:
        if run.result is None:
            raise UserError(f"{run.path}: not finished, so there is nothing to compare; go on with "
                            f"`bridgelm train --resume {run.path}`")
    target = Path(out) if out else Path("share.json")
    if target.suffix != ".json":
        raise UserError(f"report: --share writes one JSON file; give --out NAME.json in place of {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, {"format": FORMAT, "version": VERSION, "runs": [_facts(run) for run in runs]})
    return target


def _facts(run: Run) -> dict[str, Any]:
    settings, info = _settings(run), run.info
    text = json.dumps({key: value for key, value in settings.items() if key not in NOT_COMPARED}, sort_keys=True)
    machine = {key: info.get(key) for key in ("device", "accelerator", "ranks", "cpus")}
    peak = info.get("peak_device_memory_mb") or info.get("peak_memory_mb")
    return {"name": run.config["name"], "method": run.method, "seed": run.seed, "steps": run.steps,
            "digest": hashlib.sha256(text.encode()).hexdigest(), "settings": settings,
            "versions": {key: info.get(key) for key in VERSIONS}, "hardware": machine,
            "results": {which: _figures(found) for which, found in (run.result or {}).items()},
            "suites": _suites(run.path / "eval"),
            "curve": [{key: event.get(key) for key in CURVE} for event in run.evals],
            "cost": {**{key: run.last(key) for key in COSTS}, "cpu_seconds": info.get("cpu_seconds"),
                     "peak_memory_mb": peak, "parameters": info.get("parameters")}}


def _settings(run: Run) -> dict[str, Any]:
    """The configuration with what lies on this machine replaced by what is in it."""
    config: dict[str, Any] = json.loads(json.dumps(run.config))
    started = datetime.fromisoformat(run.info["started"]).timestamp() if run.info.get("started") else float("inf")
    for key in SOURCES:
        if config["data"].get(key) is not None:
            config["data"][key] = _content(config["data"][key], started)
    for model in (config["model"], config.get("teacher")):
        if model:
            folder = Path(model["name_or_path"])
            if folder.is_absolute() or folder.is_dir():
                model["name_or_path"] = _content(str(folder / "config.json"), started)
            if model.get("chat_template"):
                model["chat_template"] = _content(model["chat_template"], started)
    functions = (entry.rpartition(":") for entry in config["reward"]["functions"])
    config["reward"]["functions"] = [f"{_content(file, started)}:{name}" for file, _, name in functions]
    for method in tables(config["method"]):
        method["name"] = _own(method["name"], started)
    config["reward"]["verifier"] = _own(config["reward"]["verifier"], started)
    config["rollout"]["engine"] = _own(config["rollout"]["engine"], started)
    config["rollout"]["server"] = None if config["rollout"].get("server") is None else "a server"
    return {key: value for key, value in config.items() if key != "out"}


def _own(name: str, started: float) -> str:
    """A class of the user without the path of its file."""
    file, sign, cls = name.rpartition(":")
    return f"{_content(file, started)}:{cls}" if sign and file.endswith(".py") else name


def _content(source: str, started: float) -> str:
    """The name of what is public, the hash of a file; nothing of one that is gone or was changed since then."""
    if source.startswith(("hf:", "toy:")):
        return source
    path = Path(source)
    if not path.is_file() or path.stat().st_mtime > started:
        return "unknown"
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _figures(found: Any) -> Any:
    """The figures without the single problems, whose ids belong to the owner of the data."""
    if not isinstance(found, dict):
        return found
    return {key: _figures(value) for key, value in found.items() if key != "correct"}


def _suites(folder: Path) -> dict[str, Any]:
    """What `bridgelm eval RUN --suite` left."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        result = read_json(path) or {}
        if "greedy" in result and path.stem != "results":
            value, bounds = headline(result)
            asked = result["settings"]
            found[path.stem] = {"value": value, "interval": bounds, "n": result["greedy"]["n"],
                                "k": result.get("sampled", {}).get("k"), "items": asked["items"],
                                "sampling": asked["sampling"], "weights": asked["model"]["sha256"],
                                "prompt": asked["prompt"]["text"]}
    return found


def table(files: Sequence[str | Path]) -> str:
    """Several shared files side by side: a row for each file and each configuration in it."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for number, path in enumerate(files, 1):
        for run in _read(Path(path)):
            key = f"{number}: {_plain(Path(path).stem)}", _plain(run["method"]), run["digest"]
            groups.setdefault(key, []).append(run)
    suites = sorted({suite for runs in groups.values() for run in runs for suite in run["suites"]})
    headers = ["file", "method", "settings", "seeds", "test", *map(_plain, suites), "FLOPs", "time", "machine",
               "made with"]
    rows = []
    for (file, method, digest), runs in groups.items():
        cost = {key: _mean(run["cost"].get(key) for run in runs) for key in ("flops", "seconds")}
        rows.append([file, method, _plain(digest[:8]), str(len(runs)),
                     _accuracy([run["results"].get("final", {}) for run in runs], "accuracy"),
                     *(_accuracy([run["suites"].get(suite, {}) for run in runs], "value") for suite in suites),
                     short(cost["flops"]), clock(cost["seconds"]), _machine(runs[0]),
                     f"bridgelm {_plain(runs[0]['versions'].get('bridgelm'))}"])
    caption = ("Accuracy in percent with 95 % intervals: over seeds where there are two or more, else over problems. "
               "Rows with the same settings differ in seed and machine only.")
    text = markdown_table(Table(headers, rows, caption=caption))
    if len({_asked(run) for runs in groups.values() for run in runs}) > 1:
        text += "\n\nNot all runs were tested on the same problems: compare their suites, not their tests."
    return text


def _asked(run: dict[str, Any]) -> str:
    """What decides the test problems: their file, or what they were held out of."""
    data = run["settings"].get("data", {})
    return str(data.get("test") or [data.get("train"), data.get("toy")])


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        found = read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path}: not written by `bridgelm report --share`")
    if found.get("version") != VERSION:
        raise UserError(f"{path}: has version {found.get('version')} of the form, and this is {VERSION}; "
                        "use the same version of BridgeLM")
    needed = {"method": str, "seed": int, "digest": str, "settings": dict, "versions": dict, "hardware": dict,
              "results": dict, "suites": dict, "cost": dict}
    for run in found.get("runs", []):
        for key, kind in needed.items():
            if not isinstance(run, dict) or not isinstance(run.get(key), kind):
                raise UserError(f"{path}: a run in it has no sound {key!r}; ask for the file as it was written")
    return found.get("runs", [])


def _accuracy(found: Sequence[dict[str, Any]], key: str) -> str:
    values = [one[key] for one in found if isinstance(one.get(key), int | float)]
    if len(values) != 1:
        return interval(mean_interval(values))
    low, high = next(one["interval"] for one in found if isinstance(one.get(key), int | float))
    return interval(Estimate(values[0], low, high))


def _mean(values: Any) -> float | None:
    kept = [value for value in values if isinstance(value, int | float)]
    return sum(kept) / len(kept) if kept else None


def _machine(run: dict[str, Any]) -> str:
    hardware = run["hardware"]
    ranks = hardware.get("ranks") or 1
    name = _plain(hardware.get("accelerator") or hardware.get("device"))
    return name if ranks == 1 else f"{ranks} x {name}"


def _plain(text: Any) -> str:
    """Somebody else's text, without the control characters that a terminal would obey."""
    return "".join(c for c in str(text) if c.isprintable())[:60]
