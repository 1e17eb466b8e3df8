"""Trains several runs side by side, each in a process of its own, with one live table and a clean stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bridgelm.config.run_config import RunConfig, absolute, up_to_date
from bridgelm.errors import UserError
from bridgelm.runs.folder import METRICS, read_json, write_json
from bridgelm.runs.progress import RunsDisplay, RunView
from bridgelm.runs.reader import Run

POLL = 0.2  # seconds
GRACE = 120.0  # seconds that a run gets to finish its step and save
UNIMPORTANT = {"out", "threads"}  # keys that may differ between a finished run and the one that is asked for


class Tail:
    """Reads what was added to a run's metrics.jsonl since the last look, whole lines only."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset, self.inode = path, 0, 0

    def read(self) -> list[dict[str, Any]]:
        try:
            with self.path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self.inode:  # new, or written anew: a resumed run drops the events after its checkpoint
                    self.inode, self.offset = inode, 0
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [json.loads(line) for line in whole.splitlines() if line.strip()]


class RunProcess:
    """One run of the comparison, and its process while it trains."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.path = absolute(config), Path(config.out) / config.name
        self.log = self.path.with_name(self.path.name + ".log")
        self.recipe = self.path.parent / "recipes" / f"{config.name}.json"
        self.view = RunView(config.name, config.steps, "waiting")
        self.tail = Tail(self.path / METRICS)
        self.process: subprocess.Popen[bytes] | None = None
        if self.is_finished():
            self.view.state = "finished"

    def is_finished(self) -> bool:
        """Whether there is nothing left to train. A run of the same name with other settings is refused."""
        found = read_json(self.path / "config.json") if self.path.exists() else None
        if found is None:
            return False
        key = differing_key(up_to_date(found), self.config.resolved())
        if key:
            raise UserError(f"{self.path}: this run was made with another {key} than is asked for now; "
                            "remove it, or choose another --out")
        return Run(self.path).status == "finished"

    def start(self) -> None:
        """A new run, or the rest of one that was stopped. Its output goes to the log beside its folder."""
        command = [sys.executable, "-m", "bridgelm", "train", "--quiet"]
        if (self.path / "config.json").exists():
            command += ["--resume", str(self.path)]
        else:
            self.recipe.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.recipe, self.config.resolved())
            command.append(str(self.recipe))
        with self.log.open("ab") as log:
            # In a session of its own: Ctrl-C reaches it once, from us, and not a second time from the terminal.
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            start_new_session=True)
        self.view.state = "starting"

    def look(self) -> bool:
        """Take in new events; True once the process has ended."""
        for event in self.tail.read():
            self.view.update(event)
        if self.process is None or self.process.poll() is None:
            return False
        ended_well = self.process.returncode == 0
        self.view.state = "finished" if ended_well else "failed"
        self.process = None if ended_well else self.process
        return True

    def said(self, lines: int = 12) -> str:
        """The last lines of the run's log."""
        text = self.log.read_text(encoding="utf-8", errors="replace").strip() if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])


def differing_key(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    return next((key for key in sorted({*first, *second} - UNIMPORTANT) if first.get(key) != second.get(key)), None)


def train_all(jobs: Sequence[RunProcess], at_once: int, quiet: bool = False) -> None:
    """Run what is not finished, `at_once` at a time. The first failure stops the others, at a checkpoint."""
    waiting = [job for job in jobs if job.view.state == "waiting"]
    running: list[RunProcess] = []
    with _stop_on_sigterm(), RunsDisplay({job.config.name: job.view for job in jobs}, quiet) as display:
        for job in jobs:
            job.look()  # runs that are done, or half done, show where they are
            if job not in waiting:
                job.view.state = "finished"
        if len(waiting) < len(jobs):
            display.say(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are already there")
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    running.append(waiting.pop(0))
                    running[-1].start()
                time.sleep(POLL)
                ended = [job for job in running if job.look()]
                running = [job for job in running if job not in ended]
                for job in ended:
                    _report_end(job, display)
                display.tick()
        except BaseException as error:
            _stop(running, display)
            if isinstance(error, KeyboardInterrupt):
                display.say("interrupted; the same command goes on where the runs stopped")
            raise


def _report_end(job: RunProcess, display: RunsDisplay) -> None:
    if job.view.state == "failed":
        assert job.process is not None
        said = job.said()
        display.say(f"{job.config.name} failed; the end of {job.log}:\n{said}")
        raise UserError(f"run {job.config.name} failed (exit code {job.process.returncode}): "
                        f"{(said.splitlines() or ['it said nothing'])[-1]} (all of it: {job.log})")
    display.say(f"{job.config.name} finished: {Run(job.path)!r}")


def _stop(running: Sequence[RunProcess], display: RunsDisplay) -> None:
    """Ask every run to save and end; a second Ctrl-C, or too long a wait, ends them at their last checkpoint."""
    alive = [job.process for job in running if job.process and job.process.poll() is None]
    if alive:
        display.say(f"stopping {len(alive)} run{'s' * (len(alive) > 1)} after the step under way; Ctrl-C again to kill")
    for process in alive:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + GRACE
    try:
        for process in alive:
            process.wait(max(0.1, deadline - time.monotonic()))
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        for process in alive:
            process.kill()
            process.wait()


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the runs like Ctrl-C does, and does not leave them behind."""
    def handler(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
