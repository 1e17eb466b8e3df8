"""Engine x verifier -> rows. One `Roller` serves a run; a method calls it from `gather`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from bridgelm import credit
from bridgelm.chat import Chat
from bridgelm.config import RunConfig
from bridgelm.data import Data
from bridgelm.engine import Engine, Request, Sampling
from bridgelm.errors import UserError
from bridgelm.policy import Policy
from bridgelm.types import Completion, Demo, Grade, Metrics, Problem, Row, Verdict

WINDOW = 256  # answers that the verifier's error rate is taken over
ENOUGH = 128  # fewer count as so many: one unreadable gold in a small batch is no broken verifier


class Grader(Protocol):
    @property
    def last_error(self) -> str: ...

    def grade(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Grade]: ...


def check_errors(failed: int, graded: int, config: RunConfig, where: str, grader: Grader) -> None:
    """A verifier that keeps failing stops the run: its silence must not pass for wrong answers."""
    limit = config.reward.max_error_rate
    if failed > limit * max(graded, ENOUGH) or (0 < failed == graded and limit < 1):
        raise UserError(f"reward: the verifier failed on {failed} of the last {graded} answers ({where}), over "
                        f"reward.max_error_rate = {limit}; the last fault: {grader.last_error or 'unknown'}")


class Roller:
    def __init__(self, policy: Policy, engine: Engine, chat: Chat, grader: Grader, config: RunConfig) -> None:
        self.policy, self.engine, self.chat, self.grader, self.config = policy, engine, chat, grader, config
        rollout = config.rollout
        self.sampling = Sampling(rollout.max_new_tokens, rollout.temperature, tuple(rollout.stop))
        self.step = self.calls = self.groups_made = 0
        self.recent: deque[bool] = deque(maxlen=WINDOW)  # whether the verifier failed on the last answers

    def begin(self, step: int) -> None:
        """Every draw of a step is seeded by the run's seed, the step and the call: a resumed run draws the same."""
        self.step, self.calls, self.groups_made = step, 0, 0

    def __call__(self, problems: Sequence[Problem], group: int | None = None, at: str = "live") -> list[Row]:
        """Graded rollouts of each problem from the weights of a point, a new group number for each problem."""
        size = group or self.config.rollout.group
        repeated = [problem for problem in problems for _ in range(size)]
        requests = [Request(self.chat.prompt_ids(problem), (self.config.seed, self.step, self.calls, i))
                    for i, problem in enumerate(repeated)]
        self.calls += 1
        with self.policy.at(at) as model:
            completions = self.engine.generate(model, requests, self.sampling, self.policy.ledger)
        self.policy.ledger.rollouts += len(completions)
        texts = [self.chat.turn(c.ids) for c in completions]
        grades = self.grader.grade(repeated, texts)
        self.recent.extend(grade.verdict is Verdict.ERROR for grade in grades)
        check_errors(sum(self.recent), len(self.recent), self.config, f"step {self.step + 1}", self.grader)
        rows = [self._row(problem, request.prompt, completion, grade, text, self.groups_made + i // size, at)
                for i, (problem, request, completion, grade, text)
                in enumerate(zip(repeated, requests, completions, grades, texts, strict=True))]
        self.groups_made += len(problems)
        return rows

    def _row(self, problem: Problem, prompt: np.ndarray, completion: Completion, grade: Grade, text: str,
             group: int, at: str) -> Row:
        ids = np.concatenate([prompt, completion.ids])
        own = np.arange(len(ids)) >= len(prompt)
        old = np.concatenate([np.zeros(len(prompt)), completion.logps])
        return Row(ids, own, "rollout", problem, group, at, self.sampling.temperature, old, None, grade.reward,
                   grade.verdict, completion.finished, text)

    def groups(self, data: Data) -> list[Row]:
        """The step's groups. With `rollout.refill`, those without spread are replaced by groups of further problems, as
        many times as it says; exactly the missing ones are drawn, so none is left over."""
        wanted = self.config.rollout.prompts
        rows = self(data.problems(wanted))
        for _ in range(self.config.rollout.refill):
            spread = credit.spread(rows)
            missing = wanted - sum(spread.values())
            if missing:
                rows = [row for row in rows if spread.get(row.group)] + self(data.problems(missing))
        return rows

    def demo(self, problem: Problem, demo: Demo) -> Row:
        ids, own = self.chat.demo_ids(problem, demo)
        return Row(ids, own, "demo", problem, text=demo.text)

    def reference(self, rows: list[Row]) -> list[Row]:
        """Fills in the frozen reference's log-probs."""
        logps = self.policy.score(rows, at="reference")
        return [replace(row, ref_logps=logp) for row, logp in zip(rows, logps, strict=True)]


def summary(rows: list[Row]) -> Metrics:
    """What a step's rollouts of the live weights say."""
    live = [row for row in rows if row.kind == "rollout" and row.at == "live"]
    graded = [row for row in live if row.verdict is not Verdict.ERROR]
    if not graded:
        return {"errors": 1.0} if live else {}
    spread = credit.spread(live)
    return {"reward": float(np.mean([row.reward for row in graded])),
            "correct": float(np.mean([row.verdict is Verdict.CORRECT for row in graded])),
            "errors": 1 - len(graded) / len(live),
            "length": float(np.mean([row.own.sum() for row in live])),
            "truncated": float(np.mean([not row.finished for row in live])),
            "flat_groups": 1 - sum(spread.values()) / max(1, len(spread)),
            "entropy": float(-np.mean(np.concatenate([row.old_logps[row.own] for row in live  # type: ignore[index]
                                                      if row.old_logps is not None])))}
