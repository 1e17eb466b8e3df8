"""SFT that prepares for RL: a demonstration's token weighs what its continuation is worth to the student.

PEAR (arXiv 2602.01058), a loss for the SFT stage; put it before `grpo` in a `sequence`. With pi_b the author's policy,

    d_t = clip(log pi(y_t) - log pi_b(y_t), ratio_low, ratio_high)                                               (1)
    log G_t = (T - t) log gamma + sum_{j > t} d_j         weights = "token", the paper's default                 (2)
            = (T - e) log gamma + sum_{j > e} d_j         "block": e is the last token of t's block
            = sum_j d_j                                   "sequence": the same for all tokens
    maximise  sum_t sg(G_t) log pi(y_t) / tokens,         log G_t clipped to [weight_low, weight_high]           (3)

A token's own ratio is left out of its weight: it weighs how likely the student is to go on as the demonstration does.
The weights are those of the live policy at each step. An end token that the author gave no log-prob has d = 0.

Trap: with a much stronger author d is negative nearly everywhere, suffix weights fall to their floor some hundred
tokens before the end, and only the end of each demonstration is trained: watch `pear/ess` and `pear/floor`. And the two
log-probs must be of the same ids: two tokenizers give weights that look reasonable and mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
from torch import Tensor

from bridgelm.config.options import PearOptions
from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Method, sft_rows
from bridgelm.model import grads
from bridgelm.model.policy import Policy
from bridgelm.objective import losses
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row


@final
class Pear(Method):
    tier = "derived"
    form = Form(data="demos with their author's log-probs", demo="gamma^(T-t) prod_{j>t} clip(p_j / pi_b)",
                rollout="0", controller="none", models="none; teacher where the data has no log-probs")
    needs = frozenset({"demos", "behaviour"})

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        return roll.authored(sft_rows(data, roll, self.run))

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        if "nll" not in batch:
            return {}
        g_BT = live.logp_BT.new_zeros(live.logp_BT.shape)
        ratios = (live.logp_BT - batch.teacher_BT).detach().double().cpu().numpy()
        masks = zip(batch.own_BT.cpu().numpy(), batch.taught_BT.cpu().numpy(), strict=True)
        for b, (own, taught) in enumerate(masks):
            found = weights(np.where(taught, ratios[b], 0.0)[own], self.options)
            g_BT[b, batch.own_BT[b]] = g_BT.new_tensor(found)
        return {"nll": losses.nll(live.logp_BT, batch.weight["nll"] * g_BT)}                                    # (3)

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        found = policy.grad(self.terms, batch, {"nll": 1.0})
        measured = self.measure([(row, found.logps[i]) for i, row in enumerate(batch.rows)])
        scale = 1 / measured["pear/weight"] if self.options.normalise == "batch" else 1.0
        norm = policy.apply("theta", grads.mix((scale, found.theta)))
        return {"grad_norm/theta": norm, "loss/nll": scale * found.losses["nll"], **measured}

    def measure(self, pairs: Sequence[tuple[Row, np.ndarray]]) -> Metrics:
        """What the weights were, from the log-probs that they were made of."""
        o, sums = self.options, dict.fromkeys(("n", "g", "g2", "gap", "ratio", "cut", "floor", "ceiling"), 0.0)
        for row, logps in pairs:
            assert row.teacher_logps is not None
            ratio = (logps - row.teacher_logps)[row.own]
            said = ratio[~np.isnan(ratio)]
            log_g = log_weights(np.nan_to_num(ratio), o)
            g = weights(np.nan_to_num(ratio), o)
            sums["n"] += len(g)
            sums["g"] += g.sum()
            sums["g2"] += (g**2).sum()
            sums["ratio"] += len(said)
            sums["gap"] += said.sum()
            sums["cut"] += ((said < o.ratio_low) | (said > o.ratio_high)).sum()
            sums["floor"] += (log_g <= o.weight_low).sum()
            sums["ceiling"] += (log_g >= o.weight_high).sum()
        t = {key: float(value) for key, value in sums.items()}
        return {"pear/weight": t["g"] / t["n"], "pear/ess": t["g"] ** 2 / (t["n"] * t["g2"]),
                "pear/gap": t["gap"] / max(1, t["ratio"]), "pear/cut": t["cut"] / max(1, t["ratio"]),
                "pear/floor": t["floor"] / t["n"], "pear/ceiling": t["ceiling"] / t["n"]}

    def warnings(self, metrics: Metrics) -> list[str]:
        if metrics["pear/floor"] <= 0.5:
            return []
        return ["over half of the demonstration tokens weigh the least they can (pear/floor): the author is far from "
                "the student, and little but the ends is trained; raise method.ratio_low towards 0, or take `sft`"]


def log_weights(ratio_T: np.ndarray, o: PearOptions) -> np.ndarray:
    """log G of a demonstration's own tokens before its clip, by (1) and (2), from log pi - log pi_b of each."""
    d_T = ratio_T.clip(o.ratio_low, o.ratio_high)
    if o.weights == "sequence":
        return np.full(len(d_T), d_T.sum())
    size = o.block if o.weights == "block" else 1
    end_T = np.minimum((np.arange(len(d_T)) // size + 1) * size, len(d_T))  # how many tokens the block's end has
    suffix = np.append(d_T[::-1].cumsum()[::-1], 0.0)  # from each token to the last, itself included
    return (len(d_T) - end_T) * np.log(o.gamma) + suffix[end_T]


def weights(ratio_T: np.ndarray, o: PearOptions) -> np.ndarray:
    g_T = np.exp(log_weights(ratio_T, o).clip(o.weight_low, o.weight_high))
    return g_T / g_T.mean() if o.normalise == "row" else g_T
