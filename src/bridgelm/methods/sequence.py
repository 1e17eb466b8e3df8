"""Stages one after the other. Cold start ("SFT then RL") is `sft` then `grpo`; any methods may be stages.

Each stage has its own steps, rate and schedule, fresh optimisers and, by default, a fresh KL reference: the stage's own
start. w of a BRIDGE stage is merged into theta when its stage ends.

Trap: cold start is the baseline that most mixed methods fail to beat once its SFT loss is computed rightly (arXiv
2604.23747): tune the length and both rates of the two stages before claiming anything over it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

from torch import Tensor

from bridgelm.config.options import SequenceOptions
from bridgelm.config.run_config import RunConfig, stage_steps
from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method
from bridgelm.model.policy import Policy
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row


@final
class Sequence(Method):
    tier = "checked"
    form = Form(data="its stages'", demo="its stages'", rollout="its stages'", controller="stage switch",
                models="its stages'")
    def __init__(self, options: SequenceOptions, run: RunConfig) -> None:
        super().__init__(options, run)
        self.lengths = stage_steps(options, run.steps)
        self.stages = [self._build(i) for i in range(len(options.stages))]
        self.current = 0
        self.needs = frozenset().union(*(stage.needs for stage in self.stages))  # type: ignore[misc]

    def _build(self, index: int) -> Method:
        from bridgelm.methods import build  # this file is in it

        stage = self.options.stages[index]
        own = {"lr": stage.lr, "schedule": stage.schedule,
               "warmup": None if stage.warmup is None else round(stage.warmup * self.lengths[index])}
        changes: dict[str, Any] = {key: value for key, value in own.items() if value is not None}
        run = self.run.model_copy(update={"steps": self.lengths[index],
                                          "optim": self.run.optim.model_copy(update=changes)})
        return build(stage.method, run)

    @property
    def stage(self) -> Method:
        return self.stages[self.current]

    @property
    def phase(self) -> str:
        return self.stage.phase

    def starts(self) -> list[int]:
        return [sum(self.lengths[:i]) for i in range(len(self.lengths))]

    def setup(self, policy: Policy) -> None:
        policy.config = self.stage.run.optim
        if any(not stage.fresh_reference for stage in self.options.stages) and "reference" not in policy.groups:
            policy.fork("reference")  # of the run's start, whatever stage asks for it
        self.stage.setup(policy)

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        if self._index(step) != self.current:
            self.current = self._index(step)
            stage = self.options.stages[self.current]
            if roll.teacher is not None:
                roll.teacher.close()  # the new stage may do without
            roll.policy.absorb(keep_reference=not stage.fresh_reference, keep_optimiser=not stage.fresh_optimiser)
            self.setup(roll.policy)
        return self.stage.gather(data, roll, step - self._start())

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return self.stage.terms(batch, live)

    def probe(self, batch: Batch) -> Mapping[str, Any]:
        return self.stage.probe(batch)

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        return self.stage.update(policy, batch, step - self._start())

    def warnings(self, metrics: Metrics) -> list[str]:
        return self.stage.warnings(metrics)

    def rate(self, step: int) -> float:
        return self.stage.rate(step - self._start())

    def deploy(self, policy: Policy, accuracy: Callable[[], float]) -> Metrics:
        return self.stage.deploy(policy, accuracy)  # of the last stage; the others hand on what they end with

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        return {name: rows for stage in self.stages for name, rows in stage.tables().items()}

    def state(self) -> dict[str, Any]:
        return {"current": self.current, "stages": [stage.state() for stage in self.stages]}

    def load(self, state: Mapping[str, Any]) -> None:
        self.current = state["current"]
        for stage, saved in zip(self.stages, state["stages"], strict=True):
            stage.load(saved)

    def _start(self) -> int:
        return sum(self.lengths[:self.current])

    def _index(self, step: int) -> int:
        return next(i for i in range(len(self.lengths)) if step < sum(self.lengths[:i + 1]))
