"""`Roller`: draws answers from the engine, grades them with the verifier, and makes them rows to train on.

There is one Roller per run; a method calls it from `gather`. It also makes rows of demonstrations, fills in log-probs
of the reference and the teacher, and stops the run if the verifier fails on too many of the last answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from bridgelm.config.run_config import RunConfig
from bridgelm.data.chat import Chat
from bridgelm.data.cursors import Data
from bridgelm.engine import Engine, Origin, Request, Sampling
from bridgelm.engine.ahead import Pending, Rehearsed
from bridgelm.engine.base import spent
from bridgelm.errors import UserError
from bridgelm.model.policy import Policy
from bridgelm.objective import credit, mismatch
from bridgelm.rollout.teacher import Teacher, with_logps
from bridgelm.types import Completion, Demo, Grade, Metrics, Problem, Row, Verdict
from bridgelm.verify.early import Early, Judge

WINDOW = 256  # the last answers over which the verifier's error rate is taken
NOTHING = np.empty(0, dtype=np.int64)
ENOUGH = 128  # fewer answers count as so many, as one unreadable gold in a small batch is no broken verifier


class AnswerGrader(Protocol):
    @property
    def last_error(self) -> str: ...

    def grade(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Grade]: ...


def check_errors(failed: int, graded: int, config: RunConfig, where: str, grader: AnswerGrader) -> None:
    """Stops the run if the verifier failed on too many answers, as training would ignore what it cannot grade."""
    limit = config.reward.max_error_rate
    if failed > limit * max(graded, ENOUGH) or (0 < failed == graded and limit < 1):
        raise UserError(f"reward: the verifier failed on {failed} of the last {graded} answers ({where}), over "
                        f"reward.max_error_rate = {limit}; the last fault: {grader.last_error or 'unknown'}")


class Roller:
    def __init__(self, policy: Policy, engine: Engine, chat: Chat, grader: AnswerGrader, config: RunConfig,
                 teacher: Teacher | None = None, early: Judge | None = None) -> None:
        self.early = early  # judges answers before their batch is graded
        self.teacher = teacher
        if teacher is not None:
            teacher.ledger = policy.ledger
        self.policy, self.engine, self.chat, self.grader, self.config = policy, engine, chat, grader, config
        rollout = config.rollout
        self.own = Sampling(rollout.max_new_tokens, rollout.temperature, tuple(rollout.stop))
        self.sampling = self.own
        self.pending: Pending | None = None  # the answers of the next step, if they were asked for
        self.rehearsing = self.stale = False
        self.step = self.calls = self.groups_made = 0
        self.recent: deque[bool] = deque(maxlen=WINDOW)  # for each of the last answers, whether the verifier failed

    def begin(self, step: int) -> None:
        """Starts a step. Draws are seeded by the seed of the run, the step and the call, so that a resumed run draws
        the same. A method may change `sampling` for the length of a step."""
        self.step, self.calls, self.groups_made, self.sampling = step, 0, 0, self.own

    def __call__(self, problems: Sequence[Problem], group: int | None = None, at: str = "live", *,
                 prefixes: Sequence[np.ndarray] | None = None, numbers: Sequence[int] | None = None) -> list[Row]:
        """Draws and grades `group` rollouts of each problem with the weights named `at`. Each problem is a group with a
        new number, or the one in `numbers`. `prefixes`, one per rollout, are first tokens of the answers that the
        policy continues; they count towards the limit of new tokens, and the whole answer is graded."""
        size = group or self.config.rollout.group
        repeated = [problem for problem in problems for _ in range(size)]
        given = prefixes if prefixes is not None else [NOTHING] * len(repeated)
        prompts = [self.chat.prompt_ids(problem) for problem in repeated]
        limit = self.sampling.max_new_tokens
        requests = [Request(np.concatenate([prompt, prefix]), (self.config.seed, self.step, self.calls, i),
                            max(0, limit - len(prefix)))
                    for i, (prompt, prefix) in enumerate(zip(prompts, given, strict=True))]
        self.calls += 1
        completions, stale = self._draw(requests, repeated, given, at)
        self.policy.ledger.rollouts += len(completions)
        answers = [np.concatenate([prefix, c.ids]) for prefix, c in zip(given, completions, strict=True)]
        rows = self._graded(repeated, prompts, answers, self._numbers(problems, size, numbers), at)
        before = [np.zeros(len(row.ids) - len(c.ids)) for row, c in zip(rows, completions, strict=True)]
        rows = [replace(row, given=len(prefix), old_logps=np.concatenate([zeros, c.logps]), finished=c.finished)
                for row, prefix, zeros, c in zip(rows, given, before, completions, strict=True)]
        return self._by_the_trainer(rows, at) if stale or not self.engine.exact else rows

    def _draw(self, requests: Sequence[Request], problems: Sequence[Problem], given: Sequence[np.ndarray],
              at: str) -> tuple[list[Completion], bool]:
        """The completions, and whether they were asked for one step ahead."""
        pending, self.pending = self.pending, None
        if pending is not None and at == "live" and pending.answers(requests, self.sampling):
            completions, self.stale = pending.take(), True
            self.policy.ledger.generate += spent(requests, completions)
            return completions, True
        with self.policy.origin(at) as origin:
            if not self.rehearsing:
                return self._generate(origin, requests, problems, given), False
            if at == "live":
                self.pending = Pending.of(requests, self.sampling, self.engine.start(origin, requests, self.sampling))
        raise Rehearsed

    def _generate(self, origin: Origin, requests: Sequence[Request], problems: Sequence[Problem],
                  given: Sequence[np.ndarray]) -> list[Completion]:
        args = (origin, requests, self.sampling, self.policy.ledger)
        if self.early is None:
            return self.engine.generate(*args)
        with Early(self.early) as early:
            return self.engine.generate(*args, done=lambda i, ids: early.add(
                problems[i], lambda: self.chat.turn(np.concatenate([given[i], ids]))))

    def _by_the_trainer(self, rows: list[Row], at: str) -> list[Row]:
        """Replaces the engine's log-probs by the trainer's, so that ratios compare the trainer with itself; the
        difference is kept in the rows."""
        out = []
        for row, logps in zip(rows, self.policy.score(rows, at), strict=True):
            assert row.old_logps is not None
            mine = np.where(row.drawn, logps, 0.0)
            out.append(replace(row, old_logps=mine, mismatch=mine - row.old_logps))
        return out

    def settle(self, rows: list[Row]) -> tuple[list[Row], Metrics]:
        """Ends the drawing of a step: the engine frees its memory, and rows get the weights that correct for the
        mismatch of engine and trainer."""
        self.engine.sleep()
        cap = self.config.rollout.correction
        stale = {"engine/stale_steps": float(self.stale)} if self.config.rollout.ahead else {}
        self.stale = False
        return mismatch.corrected(rows, cap), {**mismatch.measured(rows, cap), **stale}

    def state(self) -> dict[str, Any] | None:
        """The answers that were asked for ahead, for a checkpoint."""
        return self.pending.state() if self.pending is not None else None

    def load(self, state: dict[str, Any] | None) -> None:
        self.pending = Pending.load(state) if state is not None else None

    def experts(self, pairs: Sequence[tuple[Problem, Demo]], numbers: Sequence[int] | None = None) -> list[Row]:
        """Demonstrations as graded members of groups. The policy drew none of their tokens, so their `at` is
        `expert`."""
        problems = [problem for problem, _ in pairs]
        whole = [self.chat.demo_ids(problem, demo) for problem, demo in pairs]
        prompts, answers = [ids[~own] for ids, own in whole], [ids[own] for ids, own in whole]
        rows = self._graded(problems, prompts, answers, self._numbers(problems, 1, numbers), "expert")
        return [replace(row, given=int(row.own.sum()), old_logps=np.zeros(len(row.ids))) for row in rows]

    def _numbers(self, problems: Sequence[Problem], size: int, numbers: Sequence[int] | None) -> list[int]:
        """The number of the group of each row."""
        if numbers is None:
            numbers = range(self.groups_made, self.groups_made + len(problems))
            self.groups_made += len(problems)
        return [number for number in numbers for _ in range(size)]

    def _graded(self, problems: Sequence[Problem], prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray],
                numbers: Sequence[int], at: str) -> list[Row]:
        texts = [self.chat.turn(answer) for answer in answers]
        grades = self.grader.grade(problems, texts)
        self.recent.extend(grade.verdict is Verdict.ERROR for grade in grades)
        check_errors(sum(self.recent), len(self.recent), self.config, f"step {self.step + 1}", self.grader)
        return [Row(ids := np.concatenate([prompt, answer]), np.arange(len(ids)) >= len(prompt), "rollout", problem,
                    number, at, self.sampling.temperature, reward=grade.reward, verdict=grade.verdict, text=text)
                for problem, prompt, answer, number, grade, text
                in zip(problems, prompts, answers, numbers, grades, texts, strict=True)]

    def groups(self, data: Data) -> list[Row]:
        """The groups of a step. Up to `rollout.refill` times, groups whose rewards are all equal are replaced by groups
        of further problems; only as many as are missing are drawn."""
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
        return Row(ids, own, "demo", problem, text=demo.text, teacher_logps=author_logps(problem, demo, own))

    def reference(self, rows: list[Row]) -> list[Row]:
        """Fills in the log-probs of the frozen reference."""
        logps = self.policy.score(rows, at="reference")
        return [replace(row, ref_logps=logp) for row, logp in zip(rows, logps, strict=True)]

    def taught(self, rows: list[Row]) -> list[Row]:
        """Fills in the log-probs of the teacher."""
        assert self.teacher is not None, "a method that needs a teacher is refused without one"
        return with_logps(rows, self.teacher.score(rows))

    def authored(self, rows: list[Row]) -> list[Row]:
        """Fills in the log-probs of the demonstrations' author: those in the data, else those of the teacher."""
        missing = [i for i, row in enumerate(rows) if row.teacher_logps is None]
        if missing:
            assert self.teacher is not None, "a method that needs the author's log-probs is refused without them"
            found = self.teacher.remembered([rows[i] for i in missing], self.step)
            rows = list(rows)
            for i, logps in zip(missing, found, strict=True):
                rows[i] = replace(rows[i], teacher_logps=logps)
        return rows


def author_logps(problem: Problem, demo: Demo, own: np.ndarray) -> np.ndarray | None:
    """The log-probs that the data gives for a demonstration, at the places of its tokens; the end token may lack
    one."""
    if demo.logps is None:
        return None
    size = int(own.sum())
    if len(demo.logps) not in (size - 1, size):
        raise UserError(f"data: a demonstration of {problem.id!r} has {len(demo.logps)} log-probabilities for {size} "
                        "tokens; record them with this tokenizer")
    out = np.full(len(own), np.nan)
    out[np.flatnonzero(own)[:len(demo.logps)]] = demo.logps
    return out


def summary(rows: list[Row]) -> Metrics:
    """The metrics of a step's rollouts of the live weights. Rollouts that continue part of a demonstration are left out
    if there are others, as their reward is partly due to the demonstration."""
    live = [row for row in rows if row.kind == "rollout" and row.at == "live"]
    live = [row for row in live if not row.given] or live
    graded = [row for row in live if row.verdict is not Verdict.ERROR]
    if not graded:
        return {"errors": 1.0} if live else {}
    spread = credit.spread(live)
    return {"reward": float(np.mean([row.reward for row in graded])),
            "correct": float(np.mean([row.verdict is Verdict.CORRECT for row in graded])),
            "errors": 1 - len(graded) / len(live),
            "length": float(np.mean([row.drawn.sum() for row in live])),
            "truncated": float(np.mean([not row.finished for row in live])),
            "flat_groups": 1 - sum(spread.values()) / max(1, len(spread)),
            "entropy": float(-np.mean(np.concatenate([row.old_logps[row.drawn] for row in live  # type: ignore[index]
                                                      if row.old_logps is not None])))}
