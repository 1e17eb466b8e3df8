"""Writes the run folder (`RunFolder`): configuration, metrics, samples, status and results of a run; `Run` reads it.

    config.json    the resolved configuration            run.json      versions, machine, status, memory, CPU time
    metrics.jsonl  one event per line: step, eval, warning samples.jsonl a few rollouts of some steps
    inputs.json    what the run is made of (`inputs.py`)
    result.json    test accuracy of the final and of the best-on-validation checkpoint

JSON has no NaN and no infinity. Such a metric (the gain of an empty batch, say) is written as null and read as None;
a non-finite loss never gets here, as training stops on it first.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, TextIO

from bridgelm.config.run_config import RunConfig
from bridgelm.errors import UserError
from bridgelm.runs import disk
from bridgelm.runs.sinks import Sink, check_sinks, open_sinks

try:
    import fcntl
    import resource
except ImportError:  # Windows: no guard against a second writer, and no memory figure
    fcntl = resource = None

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
# Files that a killed run leaves behind.
DRAFTS = (".*.tmp", ".*-draft*", "starts/.*-draft*", "checkpoints/.draft-*", "teacher/.*")


def clean(value: Any) -> Any:
    """Converts to plain JSON data: numpy and torch scalars become Python's, NaN and infinity become None."""
    if isinstance(value, bool | str | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): clean(inner) for key, inner in value.items()}
    if hasattr(value, "tolist"):  # arrays and scalars of numpy and torch
        return clean(value.tolist())
    if isinstance(value, Iterable):
        return [clean(inner) for inner in value]
    return str(value)


def write_json(path: Path, data: Any) -> None:
    """Writes a JSON file as a whole or not at all, so that a reader never sees half a file."""
    text = json.dumps(clean(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", errors="replace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    disk.sync(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore the file or train the run again") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The events of a .jsonl file. A torn last line (the run was killed, or is writing) is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    events = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line) if line.strip() else None
        except ValueError:
            if number < len(lines) - 1:
                raise UserError(f"{path}:{number}: not valid JSON; restore the file or delete the line") from None
            event = None
        if isinstance(event, dict):
            events.append(event)
    return events


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("bridgelm", "torch", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def git_commit() -> str | None:
    """Commit of the repository that the command is run in, marked -dirty if it has changes; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far."""
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)  # macOS counts bytes, Linux kilobytes


class RunFolder:
    """The writing side of a run folder. Only one process writes at a time; its lock ends with it, however it dies."""

    # Locks of this process. POSIX drops a lock when any handle of its file is closed, so handles are kept open here.
    _locks: ClassVar[dict[Path, TextIO]] = {}

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path, self.config = path, dict(config)
        self._made: bool | None = None  # whether `create` made the folder; None for one that `open` opened
        self._sink_names: Sequence[str] = self.config.get("log", {}).get("sinks", [])
        self._sinks: list[Sink] | None = None
        self._files: dict[str, TextIO] = {}
        self._lock()
        self._info = read_json(path / "run.json") or {}
        self._cpu_before = self._info.get("cpu_seconds", 0.0) - time.process_time()
        self._warned = {(e.get("step"), e.get("text")) for e in self._past() if e.get("event") == "warning"}

    @classmethod
    def create(cls, path: str | Path, config: RunConfig | Mapping[str, Any]) -> RunFolder:
        """A new run folder; sinks that are not installed are refused here, before any model is loaded."""
        path = Path(path)
        data = config.resolved() if isinstance(config, RunConfig) else dict(config)
        check_sinks(data.get("log", {}).get("sinks", []))
        taken = UserError(f"{path}: there is already a run of this name; go on with "
                          f"`bridgelm train --resume {path}`, or choose another `name`")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
            made = True
        except FileExistsError:
            if not path.is_dir() or any(path.iterdir()):
                raise taken from None
            made = False
        write_json(path / "config.json", data)
        folder = cls(path, data)
        folder._made = made
        return folder

    def discard(self) -> None:
        """Removes what `create` made, if the run has trained nothing. A folder that existed before stays, empty as it
        was."""
        self.close()
        if self._made:
            shutil.rmtree(self.path)
            return
        for entry in list(self.path.iterdir()) if self._made is False else ():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Opens an existing run folder to resume the run. Call `truncate_after` with the step of the checkpoint
        first."""
        path = Path(path)
        config = read_json(path / "config.json")
        if config is None:
            raise UserError(f"{path}: not a run folder (no config.json); `bridgelm train FILE.toml` makes one")
        check_sinks(config.get("log", {}).get("sinks", []))
        folder = cls(path, config)
        for left in (found for pattern in DRAFTS for found in path.glob(pattern)):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        return folder

    def append(self, event: Mapping[str, Any]) -> None:
        """Appends an event to metrics.jsonl and the sinks, unless it is a warning that was given at this step
        before."""
        event = clean(event)
        if event.get("event") == "warning":
            if (event.get("step"), event.get("text")) in self._warned:
                return
            self._warned.add((event.get("step"), event.get("text")))
        self._write(METRICS, event)
        if self._sinks is None:
            self._sinks = open_sinks(self._sink_names, self.path, self.config, int(event.get("step") or 0))
        for sink in self._sinks:
            sink.log(event)

    def sample(self, row: Mapping[str, Any]) -> None:
        """Appends a rollout to samples.jsonl: step, problem_id, prompt, completion, answer, reward, verdict,
        difficulty."""
        self._write(SAMPLES, clean(row))

    def truncate_after(self, step: int) -> None:
        """Drop events and samples after `step`, and a torn last line, so that a resumed run's files end up as if it had
        never stopped. -1 drops all: a run that was killed before its first checkpoint starts again."""
        self._close_files()
        for name in (METRICS, SAMPLES):
            path = self.path / name
            if not path.exists():
                continue
            read_lines(path)  # names a line that is damaged
            kept = [line for line in path.read_bytes().splitlines(keepends=True)
                    if line.endswith(b"\n") and line.strip() and json.loads(line).get("step", 0) <= step]
            temporary = path.with_name(f".{name}.tmp")
            temporary.write_bytes(b"".join(kept))
            disk.sync(temporary)
            temporary.replace(path)
        disk.sync(self.path)
        self._warned = {(e.get("step"), e.get("text")) for e in self._past() if e.get("event") == "warning"}

    def sync(self) -> None:
        """Flushes events and samples to disk, before the checkpoint that follows them."""
        for name in self._files:
            disk.sync(self.path / name)

    def write_run_info(self, **facts: Any) -> None:
        """run.json: versions, commit, machine and what the caller knows (device, threads, parameters, ...). Also marks
        the run as running. `cpu_seconds` goes on counting over resumes."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._info = {**versions(), "commit": git_commit(), "platform": platform.platform(), "cpus": os.cpu_count(),
                      "host": socket.gethostname(), "started": now, **self._info, **facts}
        self.set_status("running")

    def set_status(self, status: str, **facts: Any) -> None:
        """running | interrupted | finished | failed, with memory and CPU time up to now. Call it at each checkpoint,
        so that a killed run's account is complete up to where it goes on."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        peak = max(peak_memory_mb(), self._info.get("peak_memory_mb") or 0.0)
        self._info = {**self._info, "status": status, "updated": now, "peak_memory_mb": peak,
                      "cpu_seconds": round(self._cpu_before + time.process_time(), 2), **facts}
        write_json(self.path / "run.json", self._info)

    def write_result(self, result: Mapping[str, Any]) -> None:
        write_json(self.path / "result.json", result)

    def write_table(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes a table as a whole, as it is computed from the whole run."""
        path = self.path / "tables" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(clean(row)) + "\n" for row in rows), encoding="utf-8")

    def close(self) -> None:
        self._close_files()
        for sink in self._sinks or []:
            sink.close()
        self._sinks = None
        lock = self._locks.pop(self.path.resolve(), None)
        if lock:
            lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _past(self) -> list[dict[str, Any]]:
        return read_lines(self.path / METRICS)

    def _write(self, name: str, row: Mapping[str, Any]) -> None:
        if name not in self._files:
            # A line is out once it is written; half a surrogate pair, which no file can hold, becomes a question mark.
            self._files[name] = (self.path / name).open("a", 1, "utf-8", errors="replace", newline="\n")
        self._files[name].write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    def _lock(self) -> None:
        key = self.path.resolve()
        if fcntl is None or key in self._locks:
            return
        handle = (self.path / ".lock").open("a")
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            raise UserError(f"{self.path}: another process is training this run; wait or stop it first") from None
        self._locks[key] = handle


class Follower(RunFolder):
    """The run folder on the other ranks, which write nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: Mapping[str, Any]) -> None: ...
    def sample(self, row: Mapping[str, Any]) -> None: ...
    def truncate_after(self, step: int) -> None: ...
    def sync(self) -> None: ...
    def write_run_info(self, **facts: Any) -> None: ...
    def set_status(self, status: str, **facts: Any) -> None: ...
    def write_result(self, result: Mapping[str, Any]) -> None: ...
    def write_table(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None: ...
    def close(self) -> None: ...
    def discard(self) -> None: ...


def is_locked(path: Path) -> bool:
    """Whether some process is writing this run folder right now."""
    if path.resolve() in RunFolder._locks:
        return True
    if fcntl is None or not (path / ".lock").exists():
        return False
    try:
        with (path / ".lock").open("a") as handle:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False
