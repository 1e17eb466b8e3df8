"""RL on problems that the policy can solve, SFT on those that it cannot (HPT, arXiv 2509.04419; SuperRL, 2506.01096).

    P = mean reward of a problem's rollouts
    P > gamma: maximise J_RL on its rollouts;    P <= gamma: drop them, maximise sft log pi(y*) of its demonstration
    J = sum over drawn tokens of A rho / tokens  +  sft (gated / problems) sum over demo tokens of log pi / tokens

gamma = 0 with `demos` = all is SuperRL: c = 1[max r > 0]. `gate` = advantage is its variant c = 1[max A > 0], which
imitates where all rollouts succeed, too. `gate` = soft is a table of HPT's code: coefficients (a, o, s) by the share
that was solved, interpolated between its rows, of J_RL, of LUFFY's shaped A* p / (p + shape) on the demonstration, and
of SFT. A* is the demonstration's reward less the mean of the group with it.

Our reading: a dropped rollout is one of weight 0 that still counts, so each token of a batch has one vote in J_RL and
each problem one in SFT. With `balance` = terms SFT has its own mean without that share, so that a single failed problem
weighs as much as all of RL. A group that is not graded, or a problem without demonstrations, stays with RL.

Trap: the official code adds a sum over rollouts / 8192 to a token mean over the demonstrations of a micro-batch, so the
weight of SFT against RL depends on how rows are packed. Here both counts are global, and the share stands in the open.
"""

from __future__ import annotations

from dataclasses import replace
from typing import final

import numpy as np
from torch import Tensor

from bridgelm.config.options.gates import SOFT
from bridgelm.data import hints
from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method, descend, rl_coef, rl_rows, rl_setup, rl_terms, sft_terms
from bridgelm.model.policy import Policy
from bridgelm.objective import credit, losses
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Demo, Live, Metrics, Micro, Problem, Row, Verdict

Weights = tuple[float, float, float]  # of J_RL, of RL on the demonstration, of SFT


@final
class Hpt(Method):
    tier = "derived"
    form = Form(data="rollouts; demo if P <= gamma", demo="sft 1[P <= gamma]", rollout="1[P > gamma] PPO",
                controller="gate for each problem", models="none")
    needs = frozenset({"paired_demos"})

    def setup(self, policy: Policy) -> None:
        rl_setup(policy, self.options.rl)
        policy.optimiser("theta")

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        rows = rl_rows(data, roll, self.options.rl, self.run)
        demos: list[Row] = []
        shown: list[tuple[Problem, Demo]] = []
        places: list[tuple[int, np.ndarray, float]] = []  # of those: the group, its rewards, the weight
        for group in (g for g in credit.groups_of(rows) if g and rows[g[0]].problem.demos):
            problem, number = rows[group[0]].problem, rows[group[0]].group
            rewards = np.array([rows[i].reward for i in group])
            own, offline, sft = self.weights(rewards)
            for i in group:
                rows[i] = scaled(rows[i], own)
            one = hints.pick(problem, self.run.seed, step, number)
            chosen = problem.demos if self.options.demos == "all" else (one,) if one else ()
            if sft:
                demos += [replace(roll.demo(problem, demo), group=number).with_stream("nll", sft) for demo in chosen]
            if offline:
                shown += [(problem, demo) for demo in chosen]
                places.append((number, rewards, offline))
        experts = roll.experts(shown, [number for number, _, _ in places])
        for row, (_, rewards, weight) in zip(experts, places, strict=True):
            if row.verdict is not Verdict.ERROR:
                advantage = row.reward - float(np.mean([*rewards, row.reward]))
                demos.append(row.with_stream("offline", weight * advantage, mask=row.own))
        return rows + demos

    def weights(self, rewards: np.ndarray) -> Weights:
        """The weights of SFT and RL on a problem whose rollouts had these rewards."""
        o = self.options
        if o.gate == "soft":
            rows = np.array(o.table or SOFT)
            place = min(max(float(rewards.mean()), 0.0), 1.0) * (len(rows) - 1)
            own, offline, sft = (float(np.interp(place, range(len(rows)), column)) for column in rows.T)
            return own, offline, o.sft * sft
        solvable = rewards.mean() > o.gamma if o.gate == "rate" else np.ptp(rewards) > 0
        return (1.0, 0.0, 0.0) if solvable else (0.0, 0.0, o.sft)

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        out = rl_terms(batch, live, self.options.rl) | sft_terms(batch, live)
        if "offline" in batch:
            out["offline"] = losses.shaped(live.logp_BT, batch.weight["offline"], self.options.shape)
        return out

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        share = {name: self.share(batch, name) for name in ("nll", "offline")}
        used = share if self.options.balance == "prompts" else {name: float(s > 0) for name, s in share.items()}
        coef = rl_coef(self.options.rl) | {name: s for name, s in used.items() if s}
        return descend(policy, batch, self.terms, coef) | {"hpt/gated": share["nll"]}

    @staticmethod
    def share(batch: Batch, name: str) -> float:
        """The share of the batch's problems that have rows in the stream."""
        found = {row.group for row in batch.rows if name in row.streams}
        every = {row.group for row in batch.rows if row.streams}
        counts = {"found": float(len(found)), "every": float(len(every))}
        return counts["found"] / max(1.0, counts["every"])


def scaled(row: Row, factor: float) -> Row:
    """The row with its weight in J_RL multiplied; the mask, and so the count, stays."""
    if factor == 1.0 or "pg" not in row.streams:
        return row
    stream = row.streams["pg"]
    return replace(row, streams={**row.streams, "pg": replace(stream, weight=factor * stream.weight)})
