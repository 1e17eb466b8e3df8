"""LSPO (arXiv 2607.27787): where all samples of a prompt fail, a throw-away w that has read its demonstrations tries.

    1  G samples of each prompt from theta; a prompt is hard if none of its graded samples is right
    2  w, fresh:  `fit_steps` steps of  maximise log pi_{theta + w}(y)  over the demonstrations y of the hard prompts
    3  the hard prompts are sampled again from theta + w, and the right answers join their prompt's group
    4  theta += grad sum of v min(rho A, clip(rho) A) over drawn tokens,   A = r - mean over the enlarged group,
       v = 1 for theta's own tokens, min(pi_theta / pi_{theta + w}, cap) for those of theta + w, both held fixed,
       rho = pi_theta / (pi_theta when the step began)
    5  w goes back to its start, its optimiser too; it is never part of what is evaluated or saved

No gradient of a demonstration ever reaches theta: only answers that were drawn and found right do.

Our reading: known from a note only; ratios are taken token by token (`sequence`: of the whole answer, without the bias,
and next to nothing for long ones), right answers are added to a group and take no sample's place, wrong ones of
theta + w are forgotten, and one w serves all hard prompts of a step.

Trap: a w that is fitted too far recites: its answers are right and so unlikely under theta that v is nearly 0. Watch
`lspo/ratio` beside `lspo/rescued`. And the extra samples are rollouts: compare at equal rollouts, not at equal steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from bridgelm.config.run_config import RunConfig
from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method, credited, descend, rl_coef, rl_setup, rl_terms, sft_terms
from bridgelm.model.batching import make_batch
from bridgelm.model.policy import Policy
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Problem, Row, Verdict


@final
class Lspo(Method):
    tier = "derived"
    form = Form(data="rollouts; of theta + w where all fail; demos for w", demo="0; w: 1",
                rollout="PPO; of w: x min(pi/pi_w, 2)", controller="all-fail detector", models="throw-away low-rank w")
    needs = frozenset({"paired_demos"})

    def __init__(self, options: Any, run: RunConfig) -> None:
        super().__init__(options, run)
        self.start: dict[str, Tensor] = {}  # of w
        self.measured: Metrics = {}

    def setup(self, policy: Policy) -> None:
        o = self.options
        rl_setup(policy, o.rl)
        policy.add_w(o.rank, o.alpha, o.modules, points=("guide",))
        policy.optimiser("theta")
        policy.optimiser("w", lr=o.beta)
        self.start = {name: t.detach().clone() for name, t in policy.groups["w"].flat().items()}

    # -- rows ------------------------------------------------------------------------------------------------------

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        problems = data.problems(self.run.rollout.prompts)
        own = roll(problems)
        hard = failed(own)
        found, rescued = dict[str, float](), list[Row]()
        if hard:
            found |= self.fit(roll, list(hard.values()))
            tried = roll(list(hard.values()), group=self.options.retries, at="guide", numbers=list(hard))
            self.reset(roll.policy)
            rescued = [row for row in tried if row.verdict is Verdict.CORRECT]
        rows = credited([*own, *rescued], roll, self.options.rl, self.run)
        rows, ratios = self.weighted(rows, roll.policy)
        self.measured = found | counted(len(hard), rescued, ratios)
        return rows

    def fit(self, roll: Roller, problems: Sequence[Problem]) -> Metrics:
        """A few steps of w, fresh, on the demonstrations of these problems. theta's half of the gradient is dropped."""
        policy = roll.policy
        self.reset(policy)
        demos = [roll.demo(p, demo).with_stream("nll", 1.0) for p in problems for demo in p.demos]
        batch, losses = make_batch(demos), []
        policy.factor = 1.0  # w knows no schedule
        for _ in range(self.options.fit_steps):
            found = policy.grad(self.terms, batch, {"nll": 1.0}, at="guide")
            policy.apply("w", found.w)
            losses.append(found.losses["nll"])
        return {"lspo/fit_first": losses[0], "lspo/fit_last": losses[-1]}

    @torch.no_grad()
    def reset(self, policy: Policy) -> None:
        for name, t in policy.groups["w"].flat().items():
            t.copy_(self.start[name])
        policy.optimisers["w"].optimiser.state.clear()

    def weighted(self, rows: list[Row], policy: Policy) -> tuple[list[Row], list[np.ndarray]]:
        """Answers of theta + w weigh v, and from here on count as theta's own: clipped round theta's log-probs."""
        where = [i for i, row in enumerate(rows) if row.at == "guide" and "pg" in row.streams]
        out, ratios = list(rows), []
        for i, theta in zip(where, policy.score([rows[i] for i in where]) if where else [], strict=True):
            row, stream = rows[i], rows[i].streams["pg"]
            assert row.old_logps is not None
            log_ratio = np.where(row.drawn, theta - row.old_logps, 0.0)
            if self.options.ratio == "sequence":
                log_ratio = np.full_like(log_ratio, log_ratio.sum())
            ratio = np.exp(np.minimum(log_ratio, np.log(self.options.ratio_cap)))
            # The reference's KL needs answers of theta: not of these.
            out[i] = replace(row, old_logps=theta, streams={"pg": replace(stream, weight=stream.weight * ratio)})
            ratios.append(ratio[row.drawn])
        return out, ratios

    # -- losses and the update -------------------------------------------------------------------------------------

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return rl_terms(batch, live, self.options.rl) | sft_terms(batch, live)

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        return descend(policy, batch, self.terms, rl_coef(self.options.rl)) | self.measured

    def load(self, state: Mapping[str, Any]) -> None:
        assert not state  # w begins anew in every step


def failed(rows: Sequence[Row]) -> dict[int, Problem]:
    """Group -> problem, where there are graded samples, none of them right, and a demonstration to learn from."""
    graded = [row for row in rows if row.verdict is not Verdict.ERROR]
    right = {row.group for row in graded if row.verdict is Verdict.CORRECT}
    return {row.group: row.problem for row in graded if row.group not in right and row.problem.demos}


def counted(hard: int, rescued: Sequence[Row], ratios: Sequence[np.ndarray]) -> Metrics:
    """Hard prompts, those with an answer now, such answers, and the mean of their tokens' v."""
    sums = {"hard": float(hard), "rescued": float(len({row.group for row in rescued})),
            "spliced": float(len(rescued)), "sum": float(sum(r.sum() for r in ratios)),
            "tokens": float(sum(r.size for r in ratios))}
    out = {f"lspo/{name}": sums[name] for name in ("hard", "rescued", "spliced")}
    return out | ({"lspo/ratio": sums["sum"] / sums["tokens"]} if sums["tokens"] else {})
