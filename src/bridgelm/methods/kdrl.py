"""RL and distillation from a teacher, both on the policy's own answers: KDRL (arXiv 2506.02208).

    maximise  rl_weight J_RL - beta D,    R_t = log pi_T(y_t) - log pi(y_t)                                      (1)
    D = sum over the same tokens of k(R_t), divided by J_RL's count;  k2 = R^2 / 2                               (2)
    beta = max(beta_0 - delta step, beta_min)                                                                    (3)

The gradient of k2 on the policy's own tokens is that of each token's KL(pi || pi_T): a token's advantage A becomes
A + beta R. `mask` distils wrong answers alone ("response") or groups without a correct one ("group"); both ask for the
verdict, not for a shaped reward. A token that is left out still counts in (2), as an advantage of 0 does. R is clamped
in the gradient, and k goes on as a straight line there. The teacher reads the answer behind its own prompt, at the
rollouts' temperature, and says nothing of an end token that is not its own.

Trap: the plain difference log pi - log pi_T (`estimator = "k1"`) is an estimate of the KL whose *gradient* is zero on
average: as a loss it teaches nothing, and its value looks right. k3 = e^R - R - 1 as a loss has the gradient of the
other KL, KL(pi_T || pi), with weights e^R that are rare and huge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import final

import numpy as np
from torch import Tensor

from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method, descend, rl_coef, rl_rows, rl_setup, rl_terms
from bridgelm.model.policy import Policy
from bridgelm.objective import losses
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row, Verdict


@final
class Kdrl(Method):
    tier = "derived"
    form = Form(data="rollouts", demo="0", rollout="PPO + beta (log pi_T - log pi)",
                controller="beta falls by the step; masks by correctness", models="teacher")
    needs = frozenset({"teacher"})

    def setup(self, policy: Policy) -> None:
        rl_setup(policy, self.options.rl)
        policy.optimiser("theta")

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        rows = roll.taught(rl_rows(data, roll, self.options.rl, self.run))
        return [with_distillation(row, asked) for row, asked in zip(rows, masked(rows, self.options.mask), strict=True)]

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        out = rl_terms(batch, live, self.options.rl)
        if "kd" in batch:
            o = self.options
            out["kd"] = batch.weight["kd"] * losses.kl(live.logp_BT, batch.teacher_BT, o.estimator, o.clamp)     # (2)
        return out

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        o, beta = self.options, self.beta(step)
        coef = (rl_coef(o.rl, o.rl_weight) if o.rl_weight > 0 else {}) | ({"kd": beta} if beta > 0 else {})
        return descend(policy, batch, self.terms, coef) | {"kdrl/beta": beta} | self.measure(batch, beta)       # (1)

    def beta(self, step: int) -> float:                                                                         # (3)
        o = self.options
        return max(o.beta - o.delta * step, o.beta_min) if o.delta else o.beta

    def measure(self, batch: Batch, beta: float) -> Metrics:
        """Shares of the tokens that the teacher has something to say about; `kept` is that of the drawn tokens that
        are distilled, and `flipped` that of the distilled ones whose advantage the teacher turns round."""
        o = self.options
        sums = dict.fromkeys(("drawn", "kept", "flipped", "taught", "gap", "k2", "kl", "clamped"), 0.0)
        for row in batch.rows:
            if "kd" not in row.streams or row.teacher_logps is None or row.old_logps is None:
                continue
            r = row.teacher_logps - row.old_logps
            near, kept, taught = np.clip(r, -o.clamp, o.clamp), row.streams["kd"].weight > 0, row.drawn & ~np.isnan(r)
            credit = o.rl_weight * row.streams["pg"].weight[kept]
            sums["drawn"] += row.drawn.sum()
            sums["kept"] += kept.sum()
            sums["flipped"] += (credit * (credit + beta * near[kept]) < 0).sum()
            sums["taught"] += taught.sum()
            sums["clamped"] += (np.abs(r[taught]) > o.clamp).sum()
            sums["gap"] += r[taught].sum()
            sums["k2"] += (near[taught] ** 2).sum() / 2
            sums["kl"] += (np.exp(near[taught]) - near[taught] - 1).sum()  # k3: unbiased as a value
        total = {key: float(value) for key, value in sums.items()}
        below = {"kept": "drawn", "flipped": "kept", "gap": "taught", "k2": "taught", "kl": "taught",
                 "clamped": "taught"}
        return {f"kdrl/{key}": total[key] / total[n] for key, n in below.items() if total[n]}

    def warnings(self, metrics: Metrics) -> list[str]:
        out = []
        if self.options.estimator == "k1":
            out.append("estimator = \"k1\" has no gradient on average: the teacher teaches nothing but noise; take "
                       "\"k2\"")
        if metrics.get("kdrl/clamped", 0.0) > 0.05:
            out.append("more than 5 % of the tokens are impossible to the teacher (kdrl/clamped): look whether it is "
                       "shown its own chat template and system prompt")
        return out


def masked(rows: Sequence[Row], mask: str) -> list[bool]:
    """Whether each row is to be distilled."""
    solved = {row.group for row in rows if row.verdict is Verdict.CORRECT}
    wanted = {"none": lambda row: True, "response": lambda row: row.verdict is Verdict.WRONG,
              "group": lambda row: row.group not in solved}[mask]
    return [wanted(row) for row in rows]


def with_distillation(row: Row, asked: bool) -> Row:
    """The stream `kd` with the denominator of `pg`: what is not distilled has weight 0 and counts."""
    if "pg" not in row.streams:
        return row
    assert row.teacher_logps is not None
    stream = row.streams["pg"]
    weight = (stream.mask & ~np.isnan(row.teacher_logps) & asked).astype(np.float64)
    return replace(row, streams={**row.streams, "kd": replace(stream, weight=weight)})
