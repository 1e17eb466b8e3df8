"""`Run`: reads a run folder (metrics, samples, results, status), for users and for reports."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from bridgelm.config import plugins
from bridgelm.errors import UserError
from bridgelm.runs.folder import METRICS, SAMPLES, is_locked, read_json, read_lines

Event = dict[str, Any]


class Run:
    """One run folder. Reads when asked and keeps what it read; `Run(path)` again sees later events.

    >>> run = Run("runs/bridge")
    >>> run.accuracy, run.series("reward")[-1], run.samples(step=100)[0]["completion"]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise UserError(f"{self.path}: not a run folder (no config.json in it)")

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json") or {}

    @cached_property
    def info(self) -> dict[str, Any]:
        return read_json(self.path / "run.json") or {}

    @property
    def method(self) -> str:
        return plugins.short(self.config.get("method", {}).get("name", "?"))

    @property
    def seed(self) -> int:
        return self.config.get("seed", 0)

    @property
    def status(self) -> str:
        """running | interrupted | finished | failed. A run that says running, with nobody writing it, was killed."""
        said = self.info.get("status", "interrupted")
        return "interrupted" if said == "running" and not is_locked(self.path) else said

    @cached_property
    def events(self) -> list[Event]:
        return read_lines(self.path / METRICS)

    @property
    def metrics(self) -> list[Event]:
        """The training steps."""
        return [event for event in self.events if event.get("event") == "step"]

    @property
    def evals(self) -> list[Event]:
        """The measurements on the validation set."""
        return [event for event in self.events
                if event.get("event") == "eval" and event.get("split", "validation") == "validation"]

    @property
    def warnings(self) -> list[Event]:
        return [event for event in self.events if event.get("event") == "warning"]

    @property
    def steps(self) -> int:
        """Training steps done so far."""
        return max((event.get("step", 0) for event in self.metrics), default=0)

    @cached_property
    def result(self) -> dict[str, Any] | None:
        """Test figures, once the run is finished: {"final": ..., "best": ...}."""
        return read_json(self.path / "result.json")

    @property
    def accuracy(self) -> float | None:
        """Test accuracy of the final weights."""
        return (self.result or {}).get("final", {}).get("accuracy")

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of one training metric, e.g. "reward" or "bridge/ess"; steps without it are left out."""
        return [(event["step"], event[key]) for event in self.metrics if isinstance(event.get(key), int | float)]

    def samples(self, step: int | None = None) -> list[Event]:
        """The kept rollouts, of one step or of all."""
        return [row for row in self._samples if step is None or row.get("step") == step]

    @cached_property
    def _samples(self) -> list[Event]:
        return read_lines(self.path / SAMPLES)

    def table(self, name: str) -> list[Event]:
        """What the method found out beyond numbers a step, e.g. "demonstrations"; empty if it wrote no such table."""
        return read_lines(self.path / "tables" / f"{name}.jsonl")

    def last(self, key: str) -> float | None:
        """A cumulative metric's last value: seconds, rollouts, flops, tokens, flops/generate, ..."""
        for event in reversed(self.events):
            if isinstance(event.get(key), int | float):
                return event[key]
        return None

    def __repr__(self) -> str:
        parts = [f"{self.status} at step {self.steps} of {self.config.get('steps', '?')}"]
        scores = [(event.get("accuracy") or 0.0, event.get("step")) for event in self.evals]
        if scores:
            best, step = max(scores, key=lambda score: score[0])
            parts.append(f"validation {scores[-1][0]:.3f} (best {best:.3f} at step {step})")
        if self.accuracy is not None:
            parts.append(f"test {self.accuracy:.3f}")
        return f"<Run {self.path}: {self.method}, seed {self.seed}, {', '.join(parts)}>"
