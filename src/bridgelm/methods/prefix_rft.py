"""One rollout of a group continues a prefix of a demonstration and is reinforced as a whole (Prefix-RFT, 2507.01679).

    L = floor(l |y*|),  l uniform on [low_t, .95],  low_t along a cosine from .95 to .05;  at most |y*| - 1
    plain rollouts:        A_i = r_i - mean of the plain ones          (divided by their deviation with `rl.std`)
    prefix tokens:         A = (r_h - mean of the plain ones) / n      n: rollouts that continue this prefix (`hybrids`)
    its continuation:      A = r_h where it is the only one (`raw`), else r_h - mean of the n
    of all prefix tokens of the batch, the 80 % with the lowest entropy get A = 0
    maximise  sum over all these tokens of min(rho A, clip(rho) A) / tokens

rho is pi/pi_old of the policy itself on prefix tokens too, so they are scored before the update, which gives their
entropies as well. A group has as many rollouts as in every other method.

Our reading: `continuation` = zero is the official `_v2`. The code cuts by the entropies of a micro-batch; here it is
one threshold, from the weights that sampled. Tokens that lose their weight still count. A prefix of no
token, or of a problem without demonstrations, makes a plain rollout.

Trap: the continuation's reward has no baseline. Where all rollouts pass, every hybrid is still pushed up with A = 1,
and with long prefixes it nearly always passes: that is SFT on the policy's own endings. The authors warn of it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, final

import numpy as np
from torch import Tensor

from bridgelm.config.run_config import RunConfig
from bridgelm.data import hints
from bridgelm.data.cursors import Data
from bridgelm.errors import UserError
from bridgelm.methods.base import Form, Method, descend, rl_coef, rl_setup, rl_terms, with_kl
from bridgelm.model.policy import Policy
from bridgelm.objective import credit, losses
from bridgelm.rollout.roller import NOTHING, Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Problem, Row, Verdict


@final
class PrefixRft(Method):
    tier = "derived"
    form = Form(data="rollouts, one a group from a prefix", demo="1[top 20% entropy] PPO (r - mean plain)",
                rollout="PPO; continuation: A = r", controller="prefix length cosine", models="none")
    needs = frozenset({"paired_demos"})

    def __init__(self, options: Any, run: RunConfig) -> None:
        super().__init__(options, run)
        if options.hybrids > run.rollout.group - 2:
            raise UserError(f"method.hybrids: {options.hybrids} of rollout.group = {run.rollout.group} leave fewer "
                            "than two plain rollouts for a mean; lower it, or raise rollout.group")
        self.measured: Metrics = {}

    def setup(self, policy: Policy) -> None:
        rl_setup(policy, self.options.rl)
        policy.optimiser("theta")

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        o, rollout, n = self.options, self.run.rollout, self.options.hybrids
        problems = data.problems(rollout.prompts)
        plain = roll(problems, group=rollout.group - n)
        numbers = list(dict.fromkeys(row.group for row in plain))
        shown = [self.prefix(roll, problem, step, i) for i, problem in enumerate(problems)]
        led = roll(problems, group=n, prefixes=[prefix for prefix in shown for _ in range(n)], numbers=numbers)
        plain += [row for row in led if not row.given]
        led, entropies = scored(roll.policy, [row for row in led if row.given])
        self.measured = {"prefix_rft/low": self.low(step), **measure(plain, led)}
        plain = credit.with_advantages(plain, o.rl.std, o.rl.aggregate, rollout.max_new_tokens, rollout.mask_overlong)
        led = self.credited(plain, led, entropies)
        rows = [both(row, "pg") for row in plain] + [both(row, "hybrid") for row in led]
        return with_kl(rows, roll, o.rl, self.run)

    def low(self, step: int) -> float:
        o = self.options
        return credit.schedule("cosine", o.low_start, o.low_end, step / max(1, self.run.steps - 1))

    def prefix(self, roll: Roller, problem: Problem, step: int, place: int) -> np.ndarray:
        demo = hints.pick(problem, self.run.seed, step, place)
        if demo is None:
            return NOTHING
        answer, low = hints.written(roll.chat, problem, demo), self.low(step)
        draw = np.random.default_rng(hints.seed(self.run.seed, step, place, 1)).random()
        length = int((low + (self.options.high - low) * draw) * len(answer))
        return answer[:min(length, len(answer) - 1, self.run.rollout.max_new_tokens - 1)]

    def credited(self, plain: list[Row], led: list[Row], entropies: list[np.ndarray]) -> list[Row]:
        """The hybrids with the stream `hybrid`; those that cannot be judged go without."""
        o, rollout = self.options, self.run.rollout
        baselines, own = group_rewards(plain), group_rewards(led)
        usable = [row.verdict is not Verdict.ERROR and row.group in baselines
                  and (row.finished or not rollout.mask_overlong) for row in led]
        given = [row.own & ~row.drawn for row in led]
        shown = [e[mask] for e, mask, used in zip(entropies, given, usable, strict=True) if used]
        least = threshold(np.concatenate([*shown, np.empty(0)]), o.cut)
        self.measured["prefix_rft/entropy"] = least if math.isfinite(least) else 0.0
        rows = []
        for row, mask, entropy, used in zip(led, given, entropies, usable, strict=True):
            if used:
                weight = np.where(row.drawn, self.continuation(row.reward, own[row.group]), 0.0)
                ahead = row.reward - exact_mean(baselines[row.group])
                weight[mask & (entropy >= least)] = ahead / o.hybrids
                row = row.with_stream("hybrid", weight, o.rl.aggregate, rollout.max_new_tokens, mask=row.own)
            rows.append(row)
        return rows

    def continuation(self, reward: float, rewards: list[float]) -> float:
        """The advantage of what a hybrid drew itself: hybrids of one prefix are a group of their own."""
        if len(rewards) == 1:
            return reward if self.options.continuation == "raw" else 0.0
        deviation = float(np.std(rewards)) + 1e-6 if self.options.rl.std else 1.0
        return (reward - exact_mean(rewards)) / deviation

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        rl = self.options.rl
        out, weight = rl_terms(batch, live, rl), batch.weight
        if "hybrid" in batch:
            out["hybrid"] = losses.pg_clip(live.logp_BT, batch.old_BT, weight["hybrid"], rl.clip_low, rl.clip_high)
        return out

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        return descend(policy, batch, self.terms, rl_coef(self.options.rl) | {"hybrid": 1.0}) | self.measured


def scored(policy: Policy, rows: list[Row]) -> tuple[list[Row], list[np.ndarray]]:
    """The rows with the policy's own log-probs on their prefixes, and the entropies of all their tokens."""
    logps, entropies = policy.score_and_entropy(rows)
    out = []
    for row, logp in zip(rows, logps, strict=True):
        assert row.old_logps is not None
        out.append(replace(row, old_logps=np.where(row.drawn, row.old_logps, logp)))
    return out, entropies


def threshold(entropies: np.ndarray, cut: float) -> float:
    """The least entropy of a token that keeps its weight. Equal ones are kept or lost together."""
    everywhere = np.sort(entropies)
    return float(everywhere[math.floor(cut * len(everywhere) + 1e-9)]) if len(everywhere) else math.inf


def group_rewards(rows: list[Row]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for row in rows:
        if row.verdict is not Verdict.ERROR:
            found.setdefault(row.group, []).append(row.reward)
    return found


def exact_mean(rewards: list[float]) -> float:
    """Exact for equal rewards, as the mean of six times 0.1 is not quite 0.1."""
    return rewards[0] + float(np.mean([reward - rewards[0] for reward in rewards]))


def both(row: Row, name: str) -> Row:
    """The row with the other of the two streams as well, at weight 0: both are divided by the tokens of both."""
    if name not in row.streams:
        return row
    other, stream = {"pg": "hybrid", "hybrid": "pg"}[name], row.streams[name]
    return replace(row, streams={**row.streams, other: replace(stream, weight=np.zeros(stream.mask.shape))})


def measure(plain: list[Row], led: list[Row]) -> Metrics:
    found: Metrics = {}
    for name, rows in (("plain", plain), ("hybrid", led)):
        rewards = [row.reward for row in rows if row.verdict is not Verdict.ERROR]
        if rewards:
            found[f"prefix_rft/{name}_reward"] = float(np.mean(rewards))
    return found | ({"prefix_rft/prefix": float(np.mean([row.given for row in led]))} if led else {})
