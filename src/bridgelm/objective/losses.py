"""Per-token losses, to be minimised: likelihood, PPO's clip, truncated ratios, KL. Pure functions: shapes as
in types.py, weights and old log-probs are constants."""

from __future__ import annotations

import math

from torch import Tensor


def nll(logp_BT: Tensor, weight_BT: Tensor) -> Tensor:
    return -weight_BT * logp_BT


def prob_weight(logp_BT: Tensor, alpha: float = 1.0) -> Tensor:
    """min(1, sg(p) / alpha), a weight for a token's NLL by its own probability: at alpha = 1 it is p, and alpha -> 0
    leaves the NLL as it is. By logarithms, so that no small p or alpha underflows."""
    return (logp_BT.detach() - math.log(alpha)).clamp(max=0.0).exp()


def token_weight(logp_BT: Tensor, kind: str) -> Tensor:
    """A constant factor of a token's loss, by its probability p: 1 (`plain`), p (1 - p) (`phi`), or p (`p`)."""
    p_BT = prob_weight(logp_BT)
    return {"plain": lambda: p_BT.new_ones(()), "phi": lambda: p_BT * (1 - p_BT), "p": lambda: p_BT}[kind]()


def pg_clip(logp_BT: Tensor, old_BT: Tensor, weight_BT: Tensor, low: float, high: float) -> Tensor:
    """PPO's clipped surrogate; the weight is the advantage."""
    ratio = (logp_BT - old_BT).exp()
    return -(weight_BT * ratio).minimum(weight_BT * ratio.clamp(1 - low, 1 + high))


def pg(logp_BT: Tensor, old_BT: Tensor, weight_BT: Tensor) -> Tensor:
    """-A ratio, without a clip: no token ever loses its gradient."""
    return -weight_BT * (logp_BT - old_BT).exp()


def shaped(logp_BT: Tensor, weight_BT: Tensor, shape: float) -> Tensor:
    """-A p / (p + shape), with the gradient through p: the weight on grad log pi is A shape p / (p + shape)^2. It peaks
    at p = shape, at a quarter of an on-policy token's."""
    return -weight_BT * (logp_BT - math.log(shape)).sigmoid()


def pg_truncate(logp_BT: Tensor, old_BT: Tensor, weight_BT: Tensor, cap: float) -> Tensor:
    """-A sg(min(ratio, cap)) log pi: off-policy tokens keep a gradient, where clipping gives them none.

    Its bias: a token's ratio stands in for the ratio of the whole prefix, and ratios above `cap` count as `cap`.
    """
    ratio = (logp_BT.detach() - old_BT).exp().clamp(max=cap)
    return -weight_BT * ratio * logp_BT


def pg_taper(logp_BT: Tensor, old_BT: Tensor, weight_BT: Tensor) -> Tensor:
    """-A sg(w) log pi with w = 1 where A > 0 and min(ratio, 1) where A < 0 (after TOPR, arXiv 2503.14286).

    Rewarded tokens keep their pull however unlikely they have become, and unrewarded ones lose their push as they
    become unlikely: a policy that has left the samples' comes back. With ratios alone nothing calls it back.
    """
    ratio = (logp_BT.detach() - old_BT).clamp(max=0.0).exp()
    return -weight_BT * ratio.where(weight_BT < 0, 1.0) * logp_BT


def kl_k3(logp_BT: Tensor, ref_BT: Tensor, weight_BT: Tensor) -> Tensor:
    """Schulman's low-variance estimate of KL(pi || ref) on the policy's own tokens: always >= 0."""
    log_ratio = ref_BT - logp_BT
    return weight_BT * (log_ratio.exp() - 1 - log_ratio)


def kl(logp_BT: Tensor, other_BT: Tensor, estimate: str, clamp: float) -> Tensor:
    """An estimate of KL(pi || other) on the policy's own tokens: k1 = -R, k2 = R^2 / 2 or k3 = e^R - R - 1, with
    R = log other - log pi. Beyond |R| = clamp it goes on as a straight line, so that its gradient is that at the clamp.

    On tokens that pi drew, the mean gradient of k2 is that of the KL, that of k3 the one of KL(other || pi), and that
    of k1 is zero.
    """
    r_BT = other_BT - logp_BT
    near_BT = r_BT.clamp(-clamp, clamp).detach()
    grown_BT = near_BT.expm1()
    value_BT, slope_BT = {"k1": (-near_BT, -near_BT.new_ones(())), "k2": (near_BT**2 / 2, near_BT),
                          "k3": (grown_BT - near_BT, grown_BT)}[estimate]
    return value_BT + slope_BT * (r_BT - near_BT)
