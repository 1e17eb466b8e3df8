"""The live display of one run while it trains, or of several runs side by side as a table.

On a terminal it is redrawn in place; elsewhere (a file, a CI log) it prints a plain line now and then."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

WINDOW = 20  # steps that the speed is taken over
PLAIN_EVERY = 10.0  # seconds between plain lines


def clock(seconds: float | None) -> str:
    """0:42, 12:05, 3:07:00; an en dash where nothing is known."""
    if seconds is None:
        return "–"
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def short(number: float | None) -> str:
    """1.2k, 3.4M, 5.6G, 7.8T; for counts, speeds and FLOPs."""
    if number is None:
        return "–"
    value, units = float(number), ["", "k", "M", "G", "T", "P", "E"]
    while abs(value) >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    digits = f"{value:.0f}" if abs(value) >= 99.5 or float(value).is_integer() else f"{value:.1f}"
    return digits + units[0]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


class RunView:
    """The state of a run, from its events in order."""

    def __init__(self, name: str, total: int, state: str = "starting") -> None:
        self.name, self.total, self.state = name, total, state
        self.step, self.phase = 0, ""
        self.reward: float | None = None
        self.heldout: float | None = None
        self.best: tuple[float, int] | None = None
        self._marks: deque[tuple[int, float, float]] = deque(maxlen=WINDOW + 1)

    def update(self, event: Mapping[str, Any]) -> None:
        validation = event.get("event") == "eval" and event.get("split", "validation") == "validation"
        if validation and event.get("accuracy") is not None:
            self.heldout = event["accuracy"]
            if self.best is None or event["accuracy"] > self.best[0]:
                self.best = (event["accuracy"], event.get("step", 0))
        if event.get("event") != "step":
            return
        if event.get("phase", "") != self.phase:
            self._marks.clear()  # another stage runs at another speed
        self.state, self.phase, self.step = "training", event.get("phase", ""), event.get("step", self.step)
        self.reward = event.get("reward")
        self._marks.append((self.step, event.get("seconds") or 0.0, event.get("tokens") or 0.0))

    @property
    def tokens_per_second(self) -> float | None:
        _, seconds, tokens = self._moved()
        return tokens / seconds if seconds > 0 else None

    @property
    def left(self) -> float | None:
        """Estimated seconds to the end, at the speed of the last steps."""
        steps, seconds, _ = self._moved()
        return (self.total - self.step) * seconds / steps if steps > 0 else None

    def _moved(self) -> tuple[int, float, float]:
        if len(self._marks) < 2:
            return 0, 0.0, 0.0
        first, last = self._marks[0], self._marks[-1]
        return last[0] - first[0], last[1] - first[1], last[2] - first[2]

    def figures(self) -> str:
        held = f"held-out {_share(self.heldout)}"
        if self.best and self.best[0] > (self.heldout or 0.0):
            held += f" (best {self.best[0]:.3f} at step {self.best[1]})"
        stage = self.phase if self.state == "training" else self.state
        parts = [stage, f"reward {_share(self.reward)}", held, f"{short(self.tokens_per_second)} tokens/s"]
        return " · ".join(part for part in parts if part)

    def plain(self) -> str:
        return f"{self.name}  step {self.step}/{self.total}  {self.figures()}  {clock(self.left)} left"


class Progress:
    """Display of one run: `with Progress(name, total) as progress: progress.update(event)` for each event."""

    def __init__(self, name: str, total: int, quiet: bool = False, console: Console | None = None) -> None:
        self.view = RunView(name, total)
        self.console = console or Console()
        self.quiet = quiet
        self._live: Live | None = None
        self._last_line = 0.0

    def __enter__(self) -> Progress:
        if self.console.is_terminal and not self.quiet:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        elif not self.quiet and self.view.step:
            self._line(self.view.plain())

    def update(self, event: Mapping[str, Any]) -> None:
        """Take an event as it goes to metrics.jsonl; warnings are printed above the display."""
        self.view.update(event)
        if event.get("event") == "warning":
            self.say(f"warning: {event.get('text')}")
        elif self._live is None and time.monotonic() - self._last_line >= PLAIN_EVERY:
            self._line(self.view.plain())

    def state(self, what: str) -> None:
        """Shows what the run does outside of training steps: "loading the model", "evaluating", "saving"."""
        self.view.state = what

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(Text(text), highlight=False, soft_wrap=True)

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        self.say(text)

    def _render(self) -> Group:
        view = self.view
        top = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None):
            top.add_column(no_wrap=True, ratio=ratio)
        top.add_row(Text(view.name, style="bold"), ProgressBar(view.total, view.step),
                    Text(f"step {view.step}/{view.total} · {clock(view.left)} left"))
        return Group(top, Text("  " + view.figures(), style="dim", no_wrap=True, overflow="ellipsis"))


class RunsDisplay:
    """Display of several runs that train at the same time; the caller feeds their views and calls `tick`."""

    def __init__(self, views: Mapping[str, RunView], quiet: bool = False, console: Console | None = None) -> None:
        self.views, self.quiet, self.console = views, quiet, console or Console()
        self._live: Live | None = None
        self._last_line = time.monotonic()

    def __enter__(self) -> RunsDisplay:
        if self.console.is_terminal and not self.quiet:
            self._live = Live(get_renderable=lambda: runs_table(self._shown()), console=self.console,
                              refresh_per_second=4, vertical_overflow="crop")
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(Text(text), highlight=False, soft_wrap=True)

    def tick(self) -> None:
        """Off a terminal: one line for each run under way, every `PLAIN_EVERY` seconds."""
        if self._live is None and time.monotonic() - self._last_line >= PLAIN_EVERY:
            self._last_line = time.monotonic()
            done = sum(view.state in {"finished", "failed"} for view in self.views.values())
            idle = {"waiting", "finished", "failed"}
            running = [view.plain() for view in self.views.values() if view.state not in idle]
            self.say(f"[{done} of {len(self.views)} runs done] " + " | ".join(running))

    def _shown(self) -> list[RunView]:
        """All, or what fits on the screen: first those under way."""
        room = max(4, self.console.height - 6)
        rank = {"finished": 2, "waiting": 1}
        return sorted(self.views.values(), key=lambda view: rank.get(view.state, 0))[:room]


def runs_table(views: Iterable[RunView]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("run", "phase", "progress", "step", "reward", "held-out", "tokens/s", "time left"):
        table.add_column(heading, justify="left" if heading in {"run", "phase", "progress"} else "right", no_wrap=True)
    for view in views:
        training = view.state == "training"
        style = {"failed": "red", "finished": "green", "waiting": "dim"}.get(view.state, "")
        table.add_row(Text(view.name, style=style), view.phase if training else view.state,
                      ProgressBar(view.total, view.step, width=20), f"{view.step}/{view.total}", _share(view.reward),
                      _share(view.heldout), short(view.tokens_per_second) if training else "–",
                      clock(view.left) if training else "–")
    return table
