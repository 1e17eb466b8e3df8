"""Computes the figures of a diagnosis from run folders: what changed over each stage and at each switch of stages.

No torch: figures come from the measurements of `diagnose.every`, from validation, and from what
`bridgelm diagnose --measure` found on saved models afterwards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import BaseModel

from bridgelm.analysis.comparison import MethodRuns, group
from bridgelm.analysis.stats import Estimate, mean_interval
from bridgelm.config import catalogue, plugins
from bridgelm.config.options import SequenceOptions, samples
from bridgelm.config.run_config import make_config, stage_steps
from bridgelm.runs.folder import read_lines
from bridgelm.runs.reader import Run

AFTERWARDS = "diagnose.jsonl"  # in the run folder: what was measured on saved models
Event = dict[str, Any]


@dataclass(frozen=True)
class StageSpan:
    """Steps `start` (excluded) to `end` of a run, under one method."""

    method: str
    start: int
    end: int
    kind: str  # SFT | RL | mixed | whole run


def kind(method: BaseModel) -> str:
    """The kind of a stage, by what its method says of itself: whether it draws answers, and whether it needs somebody
    to imitate."""
    if not samples(method):
        return "SFT"
    return "mixed" if catalogue.needs_of(method) - {"val"} else "RL"


@dataclass(frozen=True)
class Switch:
    """Validation accuracy around the start of a stage: does it dip, how far, and when is it back?"""

    before: float  # accuracy at the last look at or before the switch
    lowest: float  # lowest accuracy of the looks after it, within the stage
    depth: float  # before - lowest, 0 if it never falls
    error: float  # standard error of that difference of two looks
    steps_to_lowest: int
    steps_to_recover: int | None  # to the first look after the lowest that is as good as before; None: there is none
    gain: float  # accuracy at the stage's end - before


class History:
    """One run, as a diagnosis sees it."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @cached_property
    def stages(self) -> list[StageSpan]:
        config = make_config(self.run.config, str(self.run.path))
        if not isinstance(config.method, SequenceOptions):
            return [StageSpan(plugins.short(config.method.name), 0, config.steps, kind(config.method))]
        ends = list(itertools.accumulate(stage_steps(config.method, config.steps)))
        return [StageSpan(plugins.short(stage.method.name), start, end, kind(stage.method))
                for stage, start, end in zip(config.method.stages, [0, *ends], ends)]

    @cached_property
    def probes(self) -> dict[int, Event]:
        """The measurements by step; what was measured in training wins over what was measured afterwards."""
        later = {row["step"]: row for row in read_lines(self.run.path / AFTERWARDS) if "step" in row}
        return later | {event["step"]: event for event in self.run.events if event.get("event") == "probe"}

    @property
    def probed(self) -> bool:
        return any(event.get("event") == "probe" for event in self.run.events)

    def ends(self, stage: StageSpan, key: str) -> tuple[float, float] | None:
        """A probe's figure at the start and at the end of a stage; None unless both were measured."""
        first, last = (self.probes.get(step, {}).get(key) for step in (stage.start, stage.end))
        return (first, last) if isinstance(first, int | float) and isinstance(last, int | float) else None

    def within(self, stage: StageSpan) -> list[Event]:
        """Probes of a stage, its start included."""
        return [probe for step, probe in sorted(self.probes.items()) if stage.start <= step <= stage.end]

    def looks(self, stage: StageSpan) -> list[Event]:
        return [event for event in self.run.evals if stage.start <= event["step"] <= stage.end
                and event.get("accuracy") is not None]

    def accuracy(self, stage: StageSpan) -> tuple[float, float] | None:
        """Validation accuracy at the last look before the stage and at the last one in it."""
        before = [event for event in self.run.evals if event["step"] <= stage.start]
        after = [event for event in self.looks(stage) if event["step"] > stage.start]
        return (before[-1]["accuracy"], after[-1]["accuracy"]) if before and after else None

    def switch(self, stage: StageSpan) -> Switch | None:
        before = [event for event in self.run.evals if event["step"] <= stage.start]
        after = [event for event in self.looks(stage) if event["step"] > stage.start]
        if stage.start == 0 or not before or not after:
            return None
        first, low = before[-1], min(after, key=lambda event: event["accuracy"])
        back = [event["step"] for event in after
                if event["step"] >= low["step"] and event["accuracy"] >= first["accuracy"]]
        error = math.sqrt(sum(e["accuracy"] * (1 - e["accuracy"]) / max(1, e.get("n") or 1) for e in (first, low)))
        dips = low["accuracy"] < first["accuracy"]
        return Switch(first["accuracy"], low["accuracy"], max(0.0, first["accuracy"] - low["accuracy"]), error,
                      low["step"] - stage.start if dips else 0,
                      (back[0] - stage.start if back else None) if dips else 0,
                      after[-1]["accuracy"] - first["accuracy"])


def clean_cosine(probes: Sequence[Event]) -> float | None:
    """The cosine of the gradients without their noise, which shrinks the plain cosine towards 0. None if noise is too
    large to tell."""
    rows = [p for p in probes if all(isinstance(p.get(key), int | float) for key in ("dot", "square_sft", "square_rl"))]
    sft, rl = (sum(max(row[key], -math.inf) for row in rows) for key in ("square_sft", "square_rl"))
    return sum(row["dot"] for row in rows) / math.sqrt(sft * rl) if sft > 0 and rl > 0 else None


@dataclass(frozen=True)
class Subject:
    """The runs of one configuration, and a stage of theirs; figures are means over the seeds."""

    label: str
    histories: tuple[History, ...]
    stage: StageSpan

    def over(self, read: Callable[[History], float | None]) -> Estimate | None:
        return mean_interval(value for history in self.histories if (value := read(history)) is not None)

    def figures(self) -> dict[str, Estimate | None]:
        stage = self.stage

        def change(key: str) -> Callable[[History], float | None]:
            return lambda h: ends[1] - ends[0] if (ends := h.ends(stage, key)) else None

        def at(key: str, place: int) -> Callable[[History], float | None]:
            return lambda h: ends[place] if (ends := h.ends(stage, key)) else None

        def last(key: str) -> Callable[[History], float | None]:
            def read(h: History) -> float | None:
                probe = h.probes.get(stage.end, {})  # drift is only meant where it is from this stage's own start
                return probe.get(key) if probe.get("start", -1) == stage.start else None
            return read

        def cosines(reduce: Callable[[list[float]], float]) -> Callable[[History], float | None]:
            def read(h: History) -> float | None:
                found = [p["cosine"] for p in h.within(stage) if isinstance(p.get("cosine"), int | float)]
                return reduce(found) if found else None
            return read

        readers: dict[str, Callable[[History], float | None]] = {
            "ce_start": at("demo_ce", 0), "ce_end": at("demo_ce", 1), "ce_change": change("demo_ce"),
            "reward_start": at("reward", 0), "reward_end": at("reward", 1), "reward_change": change("reward"),
            "accuracy_start": lambda h: found[0] if (found := h.accuracy(stage)) else None,
            "accuracy_end": lambda h: found[1] if (found := h.accuracy(stage)) else None,
            "accuracy_change": lambda h: found[1] - found[0] if (found := h.accuracy(stage)) else None,
            "cosine": cosines(lambda values: sum(values) / len(values)), "cosine_min": cosines(min),
            "cosine_negative": cosines(lambda values: sum(v < 0 for v in values) / len(values)),
            "cosine_clean": lambda h: clean_cosine(h.within(stage)),
            "kl": last("kl_start"), "distance": last("distance"), "distance_share": last("distance_share"),
        }
        return {name: self.over(read) for name, read in readers.items()}

    def switches(self) -> list[Switch]:
        return [found for history in self.histories if (found := history.switch(self.stage))]


def subjects(runs: Sequence[Run]) -> tuple[list[MethodRuns], list[Subject]]:
    """Runs grouped into configurations, and each one's stages in turn; of several, the whole run as well."""
    methods = group(runs)
    out = []
    for method in methods:
        histories = tuple(History(run) for run in method.by_seed.values())
        stages = histories[0].stages
        whole = [StageSpan("all", 0, stages[-1].end, "whole run")] if len(stages) > 1 else []
        out += [Subject(method.label, histories, stage) for stage in [*stages, *whole]]
    return methods, out
