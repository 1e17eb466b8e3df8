"""What the shadow's log-probs on the joint policy's rollouts say: gain, effective sample size, KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bridgelm.objective import credit
from bridgelm.types import Metrics, Row

RELIABLE = 0.3  # effective sample size over n under which an importance-weighted gain is not worth reading


def gain(rewards: Sequence[np.ndarray], log_ratios: Sequence[np.ndarray]) -> tuple[float, float]:
    """J(joint) - J(shadow) from the joint policy's samples, and its standard error over groups.

    E_joint[(1 - rho) R], rho the ratio of whole sequences. A leave-one-out baseline is independent of the sample and
    E[1 - rho] = 0, so taking it off R costs no bias.
    """
    means = [np.mean((1 - np.exp(log)) * credit.leave_one_out(r)) for r, log in zip(rewards, log_ratios, strict=True)
             if len(r) > 1]
    if len(means) < 2:
        return (float(means[0]) if means else 0.0), float("inf")
    return float(np.mean(means)), float(np.std(means, ddof=1) / np.sqrt(len(means)))


def effective_share(log_ratios: np.ndarray) -> float:
    """(sum rho)^2 / sum rho^2 over n: 1 when the two policies agree, 1/n when one sample carries all the weight."""
    rho = np.exp(log_ratios - log_ratios.max())
    return float(rho.sum() ** 2 / (rho**2).sum() / len(rho))


def diagnose(rows: Sequence[Row], shadow: Mapping[int, np.ndarray], low: float, high: float) -> Metrics:
    """Metrics of the shadow, by its log-probs on `rows`, against the live policy that drew them; what it drew itself is
    left out. `low` and `high` bound the token ratio in use."""
    logs: dict[int, np.ndarray] = {}
    for i, logp in shadow.items():
        old = rows[i].old_logps
        if rows[i].kind == "rollout" and rows[i].at == "live" and old is not None:
            logs[i] = (logp - old)[rows[i].drawn]
    if not logs:
        return {}
    rewards, ratios = [], []
    for everyone in credit.groups_of(rows):
        group = [i for i in everyone if rows[i].finished or rows[i].streams]  # not those masked for their length
        # Rows of groups without spread were not passed through the shadow: their leave-one-out advantage is 0.
        rewards.append(np.array([rows[i].reward for i in group], dtype=np.float64))
        ratios.append(np.array([logs[i].sum() if i in logs else 0.0 for i in group]))
    value, error = gain(rewards, ratios)
    share = effective_share(np.array([log.sum() for log in logs.values()]))
    tokens = np.concatenate(list(logs.values()))
    token_ratio = np.exp(tokens)
    return {"gain": value, "gain_se": error, "gain_reliable": float(share >= RELIABLE), "ess": share,
            "clip_share": float(np.mean((token_ratio < low) | (token_ratio > high))),
            "kl_shadow": float(np.mean(token_ratio - 1 - tokens))}
