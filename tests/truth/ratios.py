"""Test C and the two-token case: exact expectations over every answer, through the real losses and diagnostics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from checks import Code, close
from exact import Quadratic, Stub, run_config, sigmoid, walk

from bridgelm.model import batching
from bridgelm.model.policy import Grads
from bridgelm.types import Live, Problem, Row, Verdict

PROBLEM = Problem("p", ({"role": "user", "content": "q"},))
JOINT, SHADOW = 1.2, 0.4  # logits of action 1 in test C


def row(answer: tuple[int, ...], logps: list[float], reward: float = 0.0, group: int = 0) -> Row:
    """A prompt of one token and the answer, with the log-probs of the policy that sampled it."""
    return Row(
        np.array([0, *answer]),
        np.array([False] + [True] * len(answer)),
        "rollout",
        PROBLEM,
        group,
        old_logps=np.array([0.0, *logps]),
        reward=reward,
        verdict=Verdict.CORRECT if reward else Verdict.WRONG,
    )


def method(code: Code, **options: Any) -> Any:
    config = run_config({"name": "bridge", **options})
    return code.bridge.Bridge(config.method, config)


def shadow_gradient(
    bridge: Any,
    rows: list[Row],
    parameter: torch.Tensor,
    logp: Callable[[torch.Tensor, Row], torch.Tensor],
    name: str = "shadow",
) -> torch.Tensor:
    """-dL/d(parameter) through the method's own terms: rows weigh their probability, so it is an exact expectation."""
    batch = batching.make_batch(rows)
    micro = batching.collate(rows, torch.float64, torch.device("cpu"), {})
    logp_BT = torch.stack([logp(parameter, r) for r in rows])
    terms = (bridge.shadow_terms if name == "shadow" else bridge.terms)(micro, Live(logp_BT))
    loss = (terms[name] * micro.scale[name]).sum() / batch.counts[name]
    return -torch.autograd.grad(loss, parameter)[0]


def one_token_gradient(
    code: Code, joint: float, shadow: float, weight: Callable[[int], float], name: str = "shadow", **options: Any
) -> float:
    """The estimate of dJ/dz at the shadow from both actions of the joint policy, each with its probability."""
    p = sigmoid(joint)
    rows = [row((a,), [math.log(q)]).with_stream(name, q * weight(a), "constant", 0.5) for a, q in ((1, p), (0, 1 - p))]

    def logp(z: torch.Tensor, r: Row) -> torch.Tensor:
        value = torch.nn.functional.logsigmoid(z if r.ids[1] else -z)
        return torch.stack([torch.zeros_like(value), value])

    z = torch.tensor(shadow, dtype=torch.float64, requires_grad=True)
    return float(shadow_gradient(method(code, **options), rows, z, logp, name))


def slope(z: float) -> float:
    return sigmoid(z) * (1 - sigmoid(z))


def one_token(code: Code) -> None:
    """The truncated token ratio is exact under its cap; without a ratio the gradient is wrong by a third."""
    p = sigmoid(JOINT)
    for baseline in (0.0, p, -0.7):
        found = one_token_gradient(code, JOINT, SHADOW, lambda a, b=baseline: a - b)
        close(found, slope(SHADOW), 1e-15, f"test C, baseline {baseline}")
    close(slope(SHADOW), 0.240261, 5e-7, "the printed gradient")
    for joint, shadow in ((0.3, -0.3), (-1.0, -0.6), (2.0, 1.9)):
        close(
            one_token_gradient(code, joint, shadow, lambda a: a - 0.3),
            slope(shadow),
            1e-15,
            "other pairs under the cap",
        )
    # No ratio: what sampling from the joint policy alone would give (the method's plain likelihood term).
    close(one_token_gradient(code, JOINT, SHADOW, lambda a: a, "nll"), 0.308418, 5e-7, "biased, no baseline")
    close(one_token_gradient(code, JOINT, SHADOW, lambda a: a - p, "nll"), 0.177894, 5e-7, "biased, baseline p")
    capped(code)
    clipped(code)
    tapered(code)


def capped(code: Code) -> None:
    """Over the cap the ratio counts as the cap: action 0 has the ratio 1.7337 in test C, so a cap of 1.5 binds."""
    p, q = sigmoid(JOINT), sigmoid(SHADOW)
    found = one_token_gradient(code, JOINT, SHADOW, lambda a: a - p, ratio_cap=1.5)
    close(found, p * (q / p) * (1 - p) * (1 - q) + (1 - p) * 1.5 * (0 - p) * (0 - q), 1e-15, "cap 1.5")
    close(slope(SHADOW) - found, (1 - p) * ((1 - q) / (1 - p) - 1.5) * p * q, 1e-15, "what the cap costs")


def clipped(code: Code) -> None:
    """PPO's clip agrees in test C, where no ratio leaves on the side that it stops at, and is silent where one does."""
    close(one_token_gradient(code, JOINT, SHADOW, lambda a: a, ratio="clip"), slope(SHADOW), 1e-15, "clip, test C")
    far = sigmoid(SHADOW) * 1.29  # a ratio of 1.29 with a positive advantage: past 1 + .28
    z = math.log(far / (1 - far))
    close(one_token_gradient(code, SHADOW, z, lambda a: a, ratio="clip"), 0.0, 0.0, "the clip's dead zone")
    close(
        one_token_gradient(code, SHADOW, z, lambda a: a, ratio="truncate"), slope(z), 1e-15, "which truncation has not"
    )


def tapered(code: Code) -> None:
    """Rewarded actions at full weight, others by the ratio up to 1; and so a shadow that has lost the rewarded action
    is pulled back at the rate of the joint policy, where the exact gradient has vanished."""
    p = sigmoid(JOINT)
    for z in (SHADOW, -9.0, 3.0):
        q = sigmoid(z)
        wanted = p * (1 - p) * (1 - q) + (1 - p) * min((1 - q) / (1 - p), 1.0) * p * q
        close(one_token_gradient(code, JOINT, z, lambda a: a - p, ratio="taper"), wanted, 1e-15, f"taper at {z}")
    assert one_token_gradient(code, JOINT, -9.0, lambda a: a - p, ratio="taper") > 500 * slope(-9.0)


def expected_gain(code: Code, outcomes: list[tuple[float, float, float]], size: int) -> float:
    """Exact mean of the estimator over all groups of `size` samples; outcomes are (probability, reward, log ratio)."""
    total = 0.0
    for group in itertools.product(outcomes, repeat=size):
        value, _ = code.shadow_diagnostics.gain([np.array([o[1] for o in group])], [np.array([o[2] for o in group])])
        total += math.prod(o[0] for o in group) * value
    return total


def gap(code: Code) -> None:
    p, q = sigmoid(JOINT), sigmoid(SHADOW)
    clean = [(p, 1.0, math.log(q / p)), (1 - p, 0.0, math.log((1 - q) / (1 - p)))]
    flips = [(prob * share, value, log) for prob, r, log in clean for share, value in ((0.8, r), (0.2, 1 - r))]
    for size in (2, 3, 4):
        close(expected_gain(code, clean, size), p - q, 1e-14, f"gap with groups of {size}")
    for size in (2, 3):
        close(expected_gain(code, flips, size), 0.6 * (p - q), 1e-14, f"gap under flips with groups of {size}")
    close(p - q, 0.169837, 5e-7, "the printed gap")
    close(0.6 * (p - q), 0.101902, 5e-7, "the printed gap under flips")
    several = [np.array([1.0, 0.0]), np.array([0.0, 1.0, 1.0])], [np.array([-0.2, 0.3]), np.array([0.1, 0.0, -0.4])]
    value, error = code.shadow_diagnostics.gain(*several)
    single = [code.shadow_diagnostics.gain([r], [log])[0] for r, log in zip(*several)]
    close((value, error), (np.mean(single), abs(single[0] - single[1]) / 2), 1e-15, "mean and error over two groups")


# -- two tokens --------------------------------------------------------------------------------------------------------
# A policy is three logits: of the first token being 1, and of the second being 1 after a 0 and after a 1. The joint
# policy's probabilities are fractions of 20, so that its distribution is met exactly by 400 rows.

ANSWERS = list(itertools.product((0, 1), repeat=2))
JOINT_2 = np.array([math.log(0.75 / 0.25), math.log(0.4 / 0.6), math.log(0.55 / 0.45)])
SHADOW_2 = np.array([0.5, 0.3, -0.4])
REWARD_2 = {(0, 0): 0.2, (0, 1): 1.0, (1, 0): 0.0, (1, 1): 0.7}


def token_probs(logits: np.ndarray, answer: tuple[int, int]) -> np.ndarray:
    first, second = sigmoid(logits[0]), sigmoid(logits[1 + answer[0]])
    return np.array([first if answer[0] else 1 - first, second if answer[1] else 1 - second])


def prob(logits: np.ndarray, answer: tuple[int, int]) -> float:
    return float(np.prod(token_probs(logits, answer)))


def value_of(logits: np.ndarray, reward: dict[tuple[int, int], float]) -> float:
    return sum(prob(logits, a) * reward[a] for a in ANSWERS)


def logp_2(logits: torch.Tensor, r: Row) -> torch.Tensor:
    a, b = int(r.ids[1]), int(r.ids[2])
    signed = torch.stack([logits[0] * (2 * a - 1), logits[1 + a] * (2 * b - 1)])
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.nn.functional.logsigmoid(signed)])


def token_ratio_gradient(code: Code, baseline: float, cap: float) -> np.ndarray:
    """What the method computes in expectation: every answer of the joint policy, weighted by its probability."""
    rows = [
        row(a, list(np.log(token_probs(JOINT_2, a)))).with_stream(
            "shadow", prob(JOINT_2, a) * (REWARD_2[a] - baseline), "constant", 0.25
        )
        for a in ANSWERS
    ]
    logits = torch.tensor(SHADOW_2, requires_grad=True)
    return shadow_gradient(method(code, ratio_cap=cap), rows, logits, logp_2).numpy()


def exact_gradient() -> np.ndarray:
    """dJ(shadow)/dlogits by differentiating the sum over answers."""
    logits = torch.tensor(SHADOW_2, requires_grad=True)
    total = sum(logp_2(logits, row(a, [0.0, 0.0])).sum().exp() * REWARD_2[a] for a in ANSWERS)
    return torch.autograd.grad(total, logits)[0].numpy()  # type: ignore[arg-type]


def documented_bias(baseline: float) -> np.ndarray:
    """The same bias from its two causes, in closed form. Token 1 is credited with the value under the joint policy's
    second token; token 2 is weighted by how often the joint policy, not the shadow, reaches its first token."""
    p1, h1 = sigmoid(JOINT_2[0]), sigmoid(SHADOW_2[0])
    after = [
        [
            sum((s if b else 1 - s) * (REWARD_2[a, b] - baseline) for b in (0, 1))
            for a in (0, 1)
            for s in [sigmoid(logits[1 + a])]
        ]
        for logits in (JOINT_2, SHADOW_2)
    ]
    first = h1 * (1 - h1) * ((after[0][1] - after[1][1]) - (after[0][0] - after[1][0]))
    reach = {0: (1 - p1) - (1 - h1), 1: p1 - h1}
    second = [reach[a] * slope(SHADOW_2[1 + a]) * (REWARD_2[a, 1] - REWARD_2[a, 0]) for a in (0, 1)]
    return np.array([first, *second])


def two_tokens(code: Code) -> None:
    outcomes = [(prob(JOINT_2, a), REWARD_2[a], math.log(prob(SHADOW_2, a) / prob(JOINT_2, a))) for a in ANSWERS]
    wanted = value_of(JOINT_2, REWARD_2) - value_of(SHADOW_2, REWARD_2)
    for size in (2, 3):
        close(expected_gain(code, outcomes, size), wanted, 1e-14, "the gain by sequence ratios")
    for baseline in (0.0, 0.35):
        bias = token_ratio_gradient(code, baseline, 10.0) - exact_gradient()
        close(bias, documented_bias(baseline), 1e-15, "the bias of the token ratio")
    close(token_ratio_gradient(code, 0.35, 10.0), token_ratio_gradient(code, 0.0, 10.0), 1e-15, "baselines cancel")
    diagnosed(code, wanted)


def diagnosed(code: Code, wanted: float) -> None:
    """400 rows in the joint policy's exact proportions: what `diagnose` reports are then exact expectations."""
    answers = [a for a in ANSWERS for _ in range(round(400 * prob(JOINT_2, a)))]
    assert len(answers) == 400
    rows = [row(a, list(np.log(token_probs(JOINT_2, a))), REWARD_2[a]) for a in answers]
    shadow = {i: np.array([0.0, *np.log(token_probs(SHADOW_2, a))]) for i, a in enumerate(answers)}
    found = code.shadow_diagnostics.diagnose(rows, shadow, 0.8, 1.2)
    rho = np.array([prob(SHADOW_2, a) / prob(JOINT_2, a) for a in ANSWERS])
    p = np.array([prob(JOINT_2, a) for a in ANSWERS])
    tokens = np.array([token_probs(SHADOW_2, a) / token_probs(JOINT_2, a) for a in ANSWERS])
    close(found["gain"], wanted * 400 / 399, 1e-12, "one group of 400: leave-one-out takes its own sample out")
    close(found["ess"], 1 / float(p @ rho**2), 1e-12, "effective sample size 1 / E rho^2")
    close(found["kl_shadow"], float(p @ np.log(p / (p * rho))) / 2, 1e-12, "KL(joint | shadow) a token")
    close(found["clip_share"], float(p @ ((tokens < 0.8) | (tokens > 1.2)).mean(1)), 1e-12, "share of clipped tokens")
    assert found["gain_reliable"] == 1.0


def ess_warning(code: Code) -> None:
    """Said under .3, and only then. The stub hands out log-probs that make a wanted effective sample size."""
    for wanted, fires in ((0.9, False), (0.35, False), (0.25, True), (0.05, True)):
        n = 40  # all ratios 1 but one: (n - 1 + x)^2 = wanted n (n - 1 + x^2), of which the larger root is taken
        x = max(np.roots([wanted * n - 1, -2 * (n - 1), wanted * n * (n - 1) - (n - 1) ** 2]))
        rows = [row((i % 2,), [-3.0], float(i % 2), i // 4) for i in range(n)]
        logps = {i: np.array([0.0, -3.0 + (math.log(x) if i == 5 else 0.0)]) for i in range(n)}
        bridge, policy = method(code), WithLogps(Quadratic(), 0.1, theta=1.0)
        bridge.setup(policy)
        policy.rows = logps
        metrics = bridge.update(policy, batching.make_batch(rows), 0)
        assert "bridge/ess" in metrics, "the shadow's log-probs did not arrive"
        close(metrics["bridge/ess"], wanted, 1e-12, "the effective sample size with one heavy ratio")
        said = any("effective sample size" in text for text in bridge.warnings(metrics))
        assert said == fires, f"effective sample size {wanted}: warned {said}"
        assert metrics["bridge/gain_reliable"] == float(not fires)
    quiet = walk(method(code), ready(code), 3)
    assert not any("effective sample size" in text for texts in quiet.warned for text in texts)


class WithLogps(Stub):
    rows: dict[int, np.ndarray] = {}  # noqa: RUF012

    def grad(self, terms: Any, batch: Any, coef: Any, at: str = "live") -> Grads:
        found = super().grad(terms, batch, coef, at)
        return Grads(found.theta, found.w, found.losses, self.rows if at == "shadow" else {})


def ready(code: Code) -> Stub:
    policy = Stub(Quadratic(), 0.1, theta=1.0)
    method(code).setup(policy)
    return policy


RATIO_CHECKS: dict[str, Callable[[Code], None]] = {f.__name__: f for f in (one_token, gap, two_tokens, ess_warning)}
