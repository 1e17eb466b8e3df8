"""AMFT: its meta-gradient against finite differences of one step ahead on a real transformer, with validation reward
summed over every answer; its controller in plain numbers; and what it may look at."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checks import close
from exact import run_config, sigmoid
from mutation import Mutant, mutants
from ratios import row as bandit_row
from ratios import slope
from transformer import VOCABULARY, build_policy, make_rows, wide_norm

from bridgelm.errors import UserError
from bridgelm.methods import amft
from bridgelm.model import grads
from bridgelm.model.batching import make_batch
from bridgelm.model.policy import Policy
from bridgelm.types import Problem, Row, Verdict

PROMPTS = ((3, 1), (7, 2, 5))
REWARD = np.sin(3.0 * np.arange(VOCABULARY)) + 0.2  # of each one-token answer
LR = 1e-5


@pytest.fixture(autouse=True)
def _wide_norm() -> Iterator[None]:
    with wide_norm():
        yield


def method_of(**options: Any) -> Any:
    config = run_config({"name": "amft", "warmup": 0.0, **options}, 10, LR, eval={"problems": 3})
    return amft.Amft(config.method, config)


def policy_of(**optim: Any) -> Policy:
    policy = build_policy(lr=LR, **optim)
    del policy.groups["w"], policy.groups["shadow"]
    policy.optimiser("theta")
    return policy


def answers(policy: Policy) -> tuple[list[Row], np.ndarray]:
    """Every one-token answer to two prompts, and what the policy gives it."""
    rows = [Row(np.array([*prompt, a]), np.arange(len(prompt) + 1) == len(prompt), "rollout", Problem("v", ()), 90 + i,
                "val") for i, prompt in enumerate(PROMPTS) for a in range(VOCABULARY)]
    return rows, np.array([math.exp(logp[-1]) for logp in policy.score(rows)])


def utility(policy: Policy) -> float:
    """Mean reward over both prompts, exactly."""
    return float(answers(policy)[1] @ np.tile(REWARD, 2)) / 2


def rows_of(policy: Policy) -> list[Row]:
    """Rollouts, demonstrations, and validation rows in the policy's exact proportions."""
    rows, p = answers(policy)
    weighted = zip(rows, p, np.tile(REWARD, 2), strict=True)
    val = [replace(r, reward=x).with_stream("val", q * x, "constant", 1 / VOCABULARY) for r, q, x in weighted]
    return make_rows(policy) + val


def one_update(method: Any = None, policy: Any = None, step: int = 0, rows: Any = None, **options: Any) -> Any:
    """With each term's gradient before it, and what was stepped with."""
    policy, method, applied = policy or policy_of(), method or method_of(**options), []
    apply, batch = policy.apply, make_batch(rows_of(policy) if rows is None else rows)
    parts = {name: policy.grad(method.terms, batch, {name: 1.0}).theta for name in ("val", "nll", "pg")
             if name in batch.counts}

    def spy(name: str, gradient: Any) -> float:
        applied.append({n: g.clone() for n, g in gradient.items()})
        return apply(name, gradient)

    policy.apply = spy
    metrics = method.update(policy, batch, step)
    del policy.apply
    return SimpleNamespace(metrics=metrics, parts=parts, applied=applied[0], policy=policy, method=method)


def off(found: Any, *wanted: tuple[float, Any]) -> float:
    """How far a gradient is from a mix of others, in their size."""
    mixed = grads.mix(*wanted)
    return grads.norm(grads.mix((1.0, found), (-1.0, mixed))) / grads.norm(mixed)


def test_meta_gradient() -> None:
    """dU/dmu of one real step of SGD, by differences of the validation reward after it."""
    h, still = 0.2, {"eta": 0.0, "eta_entropy": 0.0}
    after = [utility(one_update(mu=mu, **still).policy) for mu in (0.5 - h, 0.5 + h)]
    difference = (after[1] - after[0]) / (2 * h)
    assert abs(difference) > 1e-8
    close(one_update(mu=0.5, **still).metrics["amft/inner"] / difference, 1.0, 2e-4, "lr <g_val, g_SFT - g_RL>")


@pytest.mark.parametrize(("metric", "optim"), [("plain", {}), ("adam", {"kind": "adamw", "eps": 1e-3})])
def test_signal(metric: str, optim: dict[str, Any]) -> None:
    """The cosines in plain sums, also in Adam's metric; `inner` is what it says."""
    policy = policy_of(**optim)
    first = one_update(policy=policy)  # fills Adam's moments
    root = {n: ((g**2).sqrt() + 1e-3).masked_fill(g == 0, math.inf) if metric == "adam" else torch.ones_like(g)
            for n, g in first.applied.items()}
    end = one_update(policy=policy, metric=metric, mu=0.5, eta=0.3, eta_entropy=0.0)

    def dot(a: str, b: str) -> float:
        return sum(float((end.parts[a][n] * end.parts[b][n] / root[n]).sum()) for n in root)

    cos = {x: dot("val", x) / math.sqrt(dot("val", "val") * dot(x, x)) for x in ("nll", "pg")}
    m = end.metrics
    close([m["amft/cos_sft"], m["amft/cos_rl"], m["amft/signal"]], [*cos.values(), cos["nll"] - cos["pg"]], 1e-9)
    close(m["amft/inner"] / LR, dot("val", "nll") - dot("val", "pg"), 1e-9, metric)
    close(m["amft/mu"], 0.5 + 0.3 * (cos["nll"] - cos["pg"]), 1e-9, "mu goes with the signal")


def test_the_raw_signal() -> None:
    raw = one_update(signal="inner", mu=0.5, eta=100.0, eta_entropy=0.0).metrics
    close(raw["amft/mu"], 0.5 + 100.0 * raw["amft/inner"], 1e-12)


@pytest.mark.parametrize("looks", [True, False])
def test_the_step(looks: bool) -> None:
    """(1 - mu) g_RL + mu g_SFT with the mu that has just moved, looked at validation or not."""
    policy, method = policy_of(), method_of(mu=0.5, eta=0.3, eta_entropy=0.2, target_entropy=3.0)
    end = one_update(method, policy, rows=None if looks else make_rows(policy))
    mu = end.metrics["amft/mu"]
    assert mu == method.mu != 0.5 and ("amft/signal" in end.metrics) == looks
    if not looks:
        close(mu - 0.5, 0.2 * (3.0 - end.metrics["amft/entropy"]), 1e-14, "entropy alone")
    assert off(end.applied, (1 - mu, end.parts["pg"]), (mu, end.parts["nll"])) < 1e-12


def test_entropy() -> None:
    """H by the drawn tokens of the rollouts; the first is the target; both signs; the bounds."""
    for sign, word in ((1, "equation"), (-1, "text")):
        policy, settings = policy_of(), {"mu": 0.5, "eta": 0.0, "eta_entropy": 0.1, "entropy_sign": word}
        drawn = [x for r in make_rows(policy) if r.kind == "rollout" for x in r.old_logps[r.own]]  # type: ignore[index]
        h = -sum(drawn) / len(drawn)
        m = one_update(policy=policy, **settings).metrics
        close([m["amft/entropy"], m["amft/target"], m["amft/mu"]], [h, h, 0.5], 1e-12, "the first step")
        m = one_update(target_entropy=h + 1.5, **settings).metrics
        close(m["amft/mu"], 0.5 + sign * 0.1 * 1.5, 1e-12, f"collapse, {word}")
    for target, bound in ((9.0, 0.9), (0.0, 0.3)):
        settings = {"mu": 0.5, "mu_min": 0.3, "mu_max": 0.9, "eta": 0.0, "eta_entropy": 10.0}
        close(one_update(target_entropy=target, **settings).metrics["amft/mu"], bound, 0.0, "bounds")


def test_warm_up() -> None:
    method, policy = method_of(warmup=0.5, mu=0.6), policy_of()
    end = one_update(method, policy)  # step 0 of 10
    assert off(end.applied, (1.0, end.parts["nll"])) == 0.0 and method.mu == 0.6, "SFT alone"
    assert method.target is None, "H* is that of the warmed-up policy"
    one_update(method, policy, step=5)
    assert method.target is not None


def test_flat_groups() -> None:
    """No reward to tell apart: no signal, and the step is mu SFT."""
    policy, rows = policy_of(), []
    for r in rows_of(policy):
        for name in {"pg", "val"} & r.streams.keys():
            r = r.with_stream(name, 0.0, r.streams[name].norm, r.streams[name].constant)
        rows.append(r)
    end = one_update(policy=policy, rows=rows, mu=0.7)
    assert (end.metrics["amft/signal"], end.metrics["amft/inner"], end.metrics["amft/mu"]) == (0.0, 0.0, 0.7)
    assert off(end.applied, (0.7, end.parts["nll"])) <= 1e-15


# -- rows --------------------------------------------------------------------------------------------------------------


def test_unbiased() -> None:
    """The mean over all groups of g_val is the slope of mean reward, of groups of two and of three."""
    for z, size in ((1.2, 2), (-0.4, 3)):
        total = 0.0
        for group in itertools.product((0, 1), repeat=size):
            p = math.prod(sigmoid(z) if a else 1 - sigmoid(z) for a in group)
            rows = amft.valued([bandit_row((a,), [0.0], float(a)) for a in group])
            steps = [r.streams["val"].weight[1] * (a - sigmoid(z)) for r, a in zip(rows, group, strict=True)]
            total += p * sum(steps) / make_batch(rows).counts["val"]
        close(total, slope(z), 1e-14, "d reward / d logit")
    lone = [replace(bandit_row((1,), [0.0], 1.0), verdict=Verdict.ERROR), bandit_row((0,), [0.0])]
    assert not any("val" in r.streams for r in amft.valued(lone)), "one graded answer says nothing"


def test_looks() -> None:
    """Every so many steps after the warm-up, on validation problems that nothing else is measured on."""
    there = tuple(Problem(f"v{i}", ()) for i in range(8))  # the first three are looked at (eval.problems)
    order = itertools.cycle((2, 5, 0, 7, 3, 1, 6, 4))
    data = SimpleNamespace(splits=SimpleNamespace(validation=there), demos=lambda n: [],
                           val=lambda n: [there[next(order)] for _ in range(n)])
    asked: list[list[str]] = []

    class Roller:
        policy = None

        def groups(self, data: Any) -> list[Row]:
            return [bandit_row((a,), [0.0], float(a)) for a in (0, 1)]

        def __call__(self, problems: Any) -> list[Row]:
            asked.append([p.id for p in problems])
            return [replace(bandit_row((a,), [0.0], float(a), 5 + i), problem=p) for i, p in enumerate(problems)
                    for a in (0, 1)]

    method = method_of(every=3, problems=4, warmup=0.2)
    kinds = [{r.at for r in method.gather(data, Roller(), step)} for step in range(10)]
    assert kinds == [set(), set(), *[{"live", "val"}, {"live"}, {"live"}] * 2, {"live", "val"}, {"live"}]
    assert asked == [["v5", "v7", "v3", "v6"], ["v4", "v5", "v7", "v3"], ["v6", "v4", "v5", "v7"]]
    method_of(problems=32).gather(data, Roller(), 0)
    assert len(asked[-1]) == 5, "no more than there are"
    data.splits.validation = there[:3]
    with pytest.raises(UserError, match="all 3 validation"):
        method.gather(data, Roller(), 0)


MUTANTS = mutants(
    amft,
    Mutant("sign", "Amft.look", 1, by=test_meta_gradient),
    Mutant("instead", "Amft.update", "eta", to="mu_max", by=partial(test_signal, "plain", {})),
    Mutant("branch", "Amft.look", "adam 1", by=partial(test_signal, "adam", {"kind": "adamw", "eps": 1e-3})),
    Mutant("term", "Amft.update", "nll 0", by=partial(test_the_step, False)),
    Mutant("compare", "Amft.follow_entropy", "equation", by=test_entropy),
    Mutant("clip", "Amft.move", "mu_max 1", by=test_entropy),
    Mutant("instead", "valued", "leave_one_out 1", to="centre", by=test_unbiased),
    Mutant("compare", "Amft.gather", "every", by=test_looks),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()
