"""RL from hints: rollouts continue the first part of a demonstration, shorter and shorter (UFT, arXiv 2505.16984).

    y* is cut into at most 5 pieces;  l ~ Binomial(5, p_t) of them are shown, the same to all rollouts of a problem
    p_t = low + (high - low) (1 + cos(pi t / T)) / 2,  T = `until` of the run's steps;  no hint from then on
    maximise  J_RL on the tokens that follow the hint  +  hint sum over hint tokens of log pi / hint tokens
              - kl_coef KL(pi || start)

The paper's schedule is T = 300 of 500 steps, from .95 to .05. Whole answers are graded, hint and continuation.

Our reading: pieces end with sentences or lines where there are any, else they are equal numbers of tokens, and a
demonstration of fewer pieces has a binomial of as many. All five may be shown: the policy then has to end. A hint
leaves room for one token under `rollout.max_new_tokens`. A problem without demonstrations has no hint.

Trap: early rewards are those of nearly solved problems, where most groups pass and teach nothing. They say nothing
about the policy alone: look at `uft/alone`, the reward of rollouts without a hint, and at the validation set.
"""

from __future__ import annotations

import math
from typing import Any, final

import numpy as np
from torch import Tensor

from bridgelm.config.run_config import RunConfig
from bridgelm.data import hints
from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method, credited, descend, rl_coef, rl_setup, rl_terms, sft_terms
from bridgelm.model.policy import Policy
from bridgelm.rollout.roller import NOTHING, Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Problem, Row, Verdict


@final
class Uft(Method):
    tier = "derived"
    form = Form(data="rollouts from one hint a problem", demo="hint (.001) on hint tokens", rollout="PPO",
                controller="Binomial(5, p), p cosine .95 -> .05", models="none; reference with rl.kl_coef")
    needs = frozenset({"paired_demos"})

    def __init__(self, options: Any, run: RunConfig) -> None:
        super().__init__(options, run)
        self.measured: Metrics = {}

    def setup(self, policy: Policy) -> None:
        rl_setup(policy, self.options.rl)
        policy.optimiser("theta")

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        rollout, p = self.run.rollout, self.chance(step)
        problems = data.problems(rollout.prompts)
        shown = [self.hint(roll, problem, p, step, i) for i, problem in enumerate(problems)]
        rows = roll(problems, prefixes=[hint for hint in shown for _ in range(rollout.group)])
        self.measured = {"uft/chance": p, "uft/hint": float(np.mean([len(hint) for hint in shown]))}
        alone = [row.reward for row in rows if not row.given and row.verdict is not Verdict.ERROR]
        if alone:
            self.measured["uft/alone"] = float(np.mean(alone))
        rows = credited(rows, roll, self.options.rl, self.run)
        return [row.with_stream("nll", 1.0, mask=row.own & ~row.drawn) if row.given else row for row in rows]

    def chance(self, step: int) -> float:
        """That a piece is shown."""
        o, last = self.options, self.options.until * self.run.steps
        return o.low + (o.high - o.low) * 0.5 * (1 + math.cos(math.pi * step / last)) if step < last else 0.0

    def hint(self, roll: Roller, problem: Problem, p: float, step: int, place: int) -> np.ndarray:
        key = (self.run.seed, step, place)
        demo = hints.pick(problem, *key)
        if demo is None or p == 0:
            return NOTHING
        answer = hints.written(roll.chat, problem, demo)
        ends = [0, *hints.cuts(roll.chat, answer, self.options.pieces)]
        draws = np.random.default_rng(hints.seed(*key, 1)).random(len(ends) - 1)  # apart from the demonstration's draw
        return answer[:min(ends[int((draws < p).sum())], self.run.rollout.max_new_tokens - 1)]

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return rl_terms(batch, live, self.options.rl) | sft_terms(batch, live)

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        coef = rl_coef(self.options.rl) | ({"nll": self.options.hint} if self.options.hint else {})
        return descend(policy, batch, self.terms, coef) | self.measured
