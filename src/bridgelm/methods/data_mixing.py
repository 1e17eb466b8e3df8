"""SFT on a mixture of demonstrations and of the policy's own verified answers (arXiv 2507.07562, data-mixing arm).

    maximise  sum_{y in M} log pi(y | x) / tokens of M   [ + rl_weight J_RL ]
    M: (1 - own) `batch.demos` demonstrations and own `batch.demos` answers from the buffer of verified rollouts

Each step samples, verifies, and puts the right answers into a buffer of the newest ones, from which the rows of M are
drawn without replacement. While it holds too few, demonstrations take their place: M has always `batch.demos` rows.

Our reading: the study names the arm and gives no mixture. Without `rl_weight` there is no RL gradient, only selection
(rejection sampling, round by round); with it the rollouts are trained on by RL too, whole groups and wrong ones.

Trap: the mean is over tokens, so long demonstrations outweigh short answers of one's own whatever `own` says; read
`mixing/own_tokens`. And the buffer is the policy's of some steps ago: its entropy falls faster than by RL.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
from torch import Tensor

from bridgelm.config.run_config import RunConfig
from bridgelm.data.cursors import ById, Data
from bridgelm.methods.base import Form, Method, descend, rl_coef, rl_rows, rl_setup, rl_terms, sft_terms
from bridgelm.model.policy import Policy
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row, Verdict


@final
class DataMixing(Method):
    tier = "derived"
    form = Form(data="demos + verified rollouts of a buffer", demo="1", rollout="1[right]; rl_weight PPO",
                controller="none", models="none")
    needs = frozenset({"demos"})

    def __init__(self, options: Any, run: RunConfig) -> None:
        super().__init__(options, run)
        self.buffer: list[tuple[str, list[int], int]] = []  # problem, ids, how many of them are the prompt's
        self.measured: Metrics = {}

    def setup(self, policy: Policy) -> None:
        rl_setup(policy, self.options.rl)
        policy.optimiser("theta")

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        rows = rl_rows(data, roll, self.options.rl, self.run)
        self.buffer += [(row.problem.id, row.ids.tolist(), int((~row.own).sum())) for row in rows
                        if row.verdict is Verdict.CORRECT and row.finished]  # a cut answer would teach not to stop
        self.buffer = self.buffer[-self.options.buffer:]
        size = self.run.batch.demos * self.run.rollout.updates
        wanted = min(round(self.options.own * size), len(self.buffer))
        known = ById(data.splits.train)
        draws = np.random.default_rng((self.run.seed, step, 2))
        mixture = [roll.demo(problem, demo) for problem, demo in data.demos(size - wanted)]
        for i in draws.permutation(len(self.buffer))[:wanted]:
            name, ids, prompt = self.buffer[i]
            mixture.append(Row(np.array(ids, dtype=np.int64), np.arange(len(ids)) >= prompt, "demo", known[name]))
        tokens = [int(row.own.sum()) for row in mixture]
        own_tokens = sum(tokens[len(tokens) - wanted:])
        self.measured = {"mixing/own": wanted / size, "mixing/own_tokens": own_tokens / sum(tokens),
                         "mixing/buffer": len(self.buffer)}
        order = draws.permutation(len(mixture))  # several updates a step share both kinds
        return rows + [mixture[i].with_stream("nll", 1.0) for i in order]

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return rl_terms(batch, live, self.options.rl) | sft_terms(batch, live)

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        weight = self.options.rl_weight
        coef = {"nll": 1.0} | (rl_coef(self.options.rl, weight) if weight > 0 else {})
        return descend(policy, batch, self.terms, coef) | self.measured

    def state(self) -> dict[str, Any]:
        return {"buffer": self.buffer}

    def load(self, state: Mapping[str, Any]) -> None:
        self.buffer = [(name, list(ids), prompt) for name, ids, prompt in state["buffer"]]
