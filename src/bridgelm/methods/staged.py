"""RL in stages of growing length, at a temperature that is found beforehand (AceReason 1.1, arXiv 2506.13284).

    maximise  J_RL of `grpo` on answers of at most length_k tokens in stage k; what was cut is masked or not         (1)
    T:  mean over tokens of H(softmax(z / T)) = target_entropy,   by bisection before the first step                 (2)

The paper trains on 8K, 16K, 24K and 32K tokens: `lengths` are shares of `rollout.max_new_tokens`. Leaving cut answers
out of the loss helps at the first two and hurts at the others. (2) is measured on the policy's own answers; T holds for
all stages, for sampling and in the loss alike. One optimiser and one reference throughout. AceReason's start is a model
after SFT: a `sequence` of `sft` and then `staged`.

Our reading: the entropy in (2) is that of the distributions which the policy's answers pass through, and those depend
on T: it is found on answers drawn at `rollout.temperature`, then again on answers drawn at what was found (`rounds`).
Left out: code problems, and that easy problems are dropped after each epoch.

Trap: T is right for the model that it was measured on. RL lowers the entropy and nothing raises T again. And with a
short first length most answers are cut: under the mask they teach nothing at all (`truncated`, `loss/pg`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, final

from torch import Tensor

from bridgelm.config.options.shaping import Length
from bridgelm.config.run_config import RunConfig
from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method, descend, rl_coef, rl_rows, rl_setup, rl_terms
from bridgelm.model.policy import Policy
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row

COLD, HOT = 0.1, 4.0  # temperatures that are looked between


@final
class Staged(Method):
    tier = "derived"
    form = Form(data="rollouts of a stage's length", demo="0", rollout="PPO; on-policy: A",
                controller="length stages; T by its entropy", models="none; reference with rl.kl_coef")

    def __init__(self, options: Any, run: RunConfig) -> None:
        super().__init__(options, run)
        self.temperature: float | None = None if options.target_entropy > 0 else run.rollout.temperature

    def setup(self, policy: Policy) -> None:
        rl_setup(policy, self.options.rl)
        policy.optimiser("theta")

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        stage = self.length_at(step)
        limit = max(1, round(stage.length * self.run.rollout.max_new_tokens))
        if self.temperature is None:
            self.temperature = self.found(data, roll, limit)
        now = {"max_new_tokens": limit, "temperature": self.temperature}
        roll.sampling = replace(roll.sampling, **now)
        rollout = self.run.rollout.model_copy(update={**now, "mask_overlong": stage.mask_overlong})
        return rl_rows(data, roll, self.options.rl, self.run.model_copy(update={"rollout": rollout}))              # (1)

    def length_at(self, step: int) -> Length:
        """The length limit at a share of the steps: a stage ends where its part and those before it are used up."""
        lengths = self.options.lengths
        ends = list(accumulate(length.part for length in lengths))
        return next((length for length, end in zip(lengths, ends, strict=True)
                     if step < round(end / ends[-1] * self.run.steps)), lengths[-1])

    def found(self, data: Data, roll: Roller, limit: int) -> float:                                                # (2)
        """Finds the temperature on the first problems of the training set, so that no cursor moves."""
        temperature = self.run.rollout.temperature
        for _ in range(self.options.rounds):
            roll.sampling = replace(roll.sampling, max_new_tokens=limit, temperature=temperature)
            rows = roll(data.splits.train[:self.options.probe], group=1)
            temperature = temperature_for_entropy(lambda t, drawn=rows: mean_entropy(roll.policy, drawn, t),
                                                  self.options.target_entropy)
        return temperature

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return rl_terms(batch, live, self.options.rl)

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        stage = {"staged/length": self.length_at(step).length, "staged/temperature": self.temperature or 0.0}
        return descend(policy, batch, self.terms, rl_coef(self.options.rl)) | stage

    def warnings(self, metrics: Metrics) -> list[str]:
        if self.options.target_entropy == 0 or 1.001 * COLD < (self.temperature or 1.0) < HOT / 1.001:
            return []
        return [f"method.target_entropy = {self.options.target_entropy:g} is not reached by any temperature between "
                f"{COLD:g} and {HOT:g}: the nearest one is used; look at `entropy`, and choose another target"]

    def state(self) -> dict[str, Any]:
        return {"temperature": self.temperature}

    def load(self, state: Mapping[str, Any]) -> None:
        self.temperature = state["temperature"]


def temperature_for_entropy(entropy: Callable[[float], float], target: float, cold: float = COLD, hot: float = HOT,
                            close: float = 1e-4) -> float:
    """Where a growing function of the temperature has the value `target`, to a relative `close`; the nearer bound where
    it is out of reach. The entropy of softmax(z / T) grows with T, by Var(z) / T^3."""
    while hot / cold > 1 + close:
        middle = (cold * hot) ** 0.5
        cold, hot = (middle, hot) if entropy(middle) < target else (cold, middle)
    return (cold * hot) ** 0.5


def mean_entropy(policy: Policy, rows: Sequence[Row], temperature: float) -> float:
    """The mean entropy over all tokens that the policy drew."""
    warm = [replace(row, temperature=temperature) for row in rows]
    _, entropies = policy.score_and_entropy(warm)
    values = [entropy[row.drawn] for row, entropy in zip(rows, entropies, strict=True)]
    return float(sum(v.sum() for v in values)) / max(1, sum(v.size for v in values))
