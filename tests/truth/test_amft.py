"""AMFT: its meta-gradient against finite differences of one step ahead on a real transformer, with validation reward
summed over every answer; its controller in plain numbers; what it may look at; and mutants."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checks import close
from exact import run_config, sigmoid
from mutants import Swaps, mutate
from ratios import row as bandit_row
from ratios import slope
from transformer import VOCABULARY, build_policy, make_rows, wide_norm

from bridgelm.errors import UserError
from bridgelm.methods import amft as amft_module
from bridgelm.model import grads
from bridgelm.model.batching import make_batch
from bridgelm.model.policy import Policy
from bridgelm.types import Problem, Row, Verdict

PROMPTS = ((3, 1), (7, 2, 5))
REWARD = np.sin(3.0 * np.arange(VOCABULARY)) + 0.2  # of each one-token answer
VALIDATION = Problem("v", ())
LR = 1e-5


@pytest.fixture(autouse=True)
def _wide_norm() -> Iterator[None]:
    with wide_norm():
        yield


def method_of(module: ModuleType, **options: Any) -> Any:
    config = run_config({"name": "amft", "warmup": 0.0, **options}, 10, LR, eval={"problems": 3})
    return module.Amft(config.method, config)


def policy_of(**optim: Any) -> Policy:
    policy = build_policy(lr=LR, **optim)
    del policy.groups["w"], policy.groups["shadow"]
    policy.optimiser("theta")
    return policy


def answers(policy: Policy) -> tuple[list[Row], np.ndarray]:
    """Every one-token answer to two prompts, and what the policy gives it."""
    rows = [
        Row(np.array([*prompt, a]), np.arange(len(prompt) + 1) == len(prompt), "rollout", VALIDATION, 90 + i, "val")
        for i, prompt in enumerate(PROMPTS)
        for a in range(VOCABULARY)
    ]
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


def one_update(module: ModuleType, method: Any = None, policy: Any = None, **options: Any) -> Any:
    policy = policy or policy_of()
    method = method or method_of(module, **options)
    applied: list[Any] = []
    apply = policy.apply

    def spy(name: str, gradient: Any) -> float:
        applied.append({n: g.clone() for n, g in gradient.items()})
        return apply(name, gradient)

    policy.apply = spy
    batch = make_batch(rows_of(policy))
    parts = {name: policy.grad(method.terms, batch, {name: 1.0}).theta for name in ("val", "nll", "pg")}
    metrics = method.update(policy, batch, 0)
    del policy.apply
    return SimpleNamespace(metrics=metrics, parts=parts, applied=applied[0], policy=policy, method=method, batch=batch)


def caught(policy: Any) -> list[Any]:
    """The gradients that would be stepped with, in place of the steps."""
    seen: list[Any] = []
    policy.apply = lambda name, g: seen.append(g) or 1.0
    return seen


def meta_gradient(module: ModuleType) -> None:
    """dU/dmu of one real step of SGD, by differences of the validation reward after it."""
    h, after = 0.2, []
    for mu in (0.5 - h, 0.5 + h):
        end = one_update(module, mu=mu, eta=0.0, eta_entropy=0.0)
        assert end.method.mu == mu
        after.append(utility(end.policy))
    found = one_update(module, mu=0.5, eta=0.0, eta_entropy=0.0).metrics
    difference = (after[1] - after[0]) / (2 * h)
    assert abs(difference) > 1e-8
    close(found["amft/inner"] / difference, 1.0, 2e-4, "lr <g_val, g_SFT - g_RL>")


def signal(module: ModuleType) -> None:
    """The cosines in plain sums, also in Adam's metric; `inner` is what it says."""
    for metric, optim in (("plain", {}), ("adam", {"kind": "adamw", "eps": 1e-3})):
        policy = policy_of(**optim)
        first = one_update(module, policy=policy)  # fills Adam's moments
        root = {n: (g**2).sqrt() + 1e-3 if metric == "adam" else torch.ones_like(g) for n, g in first.applied.items()}
        if metric == "adam":
            root = {n: r.masked_fill(first.applied[n] == 0, math.inf) for n, r in root.items()}
        end = one_update(module, policy=policy, metric=metric, mu=0.5, eta=0.3, eta_entropy=0.0)

        def dot(a: str, b: str, r: Any = root, parts: Any = end.parts) -> float:
            return sum(float((parts[a][n] * parts[b][n] / r[n]).sum()) for n in r)

        cos = {x: dot("val", x) / math.sqrt(dot("val", "val") * dot(x, x)) for x in ("nll", "pg")}
        m = end.metrics
        close([m["amft/cos_sft"], m["amft/cos_rl"]], [cos["nll"], cos["pg"]], 1e-9, metric)
        close(m["amft/signal"], cos["nll"] - cos["pg"], 1e-9, metric)
        close(m["amft/inner"] / LR, dot("val", "nll") - dot("val", "pg"), 1e-9, metric)
        close(m["amft/mu"], 0.5 + 0.3 * (cos["nll"] - cos["pg"]), 1e-9, "mu goes with the signal")
    raw = one_update(module, signal="inner", mu=0.5, eta=100.0, eta_entropy=0.0).metrics
    close(raw["amft/mu"], 0.5 + 100.0 * raw["amft/inner"], 1e-12, "the raw signal")


def the_step(module: ModuleType) -> None:
    """(1 - mu) g_RL + mu g_SFT with the mu that has just moved, looked at validation or not."""
    for with_look in (True, False):
        policy, method = policy_of(), method_of(module, mu=0.5, eta=0.3, eta_entropy=0.2, target_entropy=3.0)
        end = one_update(module, method, policy)
        if not with_look:
            batch = make_batch([r for r in end.batch.rows if "val" not in r.streams])
            parts = {name: policy.grad(method.terms, batch, {name: 1.0}).theta for name in ("nll", "pg")}
            seen = caught(policy)
            before = method.mu
            metrics = method.update(policy, batch, 1)
            assert "amft/signal" not in metrics
            end = SimpleNamespace(metrics=metrics, parts=parts, applied=seen[0])
            close(method.mu - before, 0.2 * (3.0 - metrics["amft/entropy"]), 1e-14, "entropy alone")
        mu = end.metrics["amft/mu"]
        assert mu == method.mu != 0.5
        wanted = grads.mix((1 - mu, end.parts["pg"]), (mu, end.parts["nll"]))
        assert grads.norm(grads.mix((1.0, end.applied), (-1.0, wanted))) < 1e-12 * grads.norm(wanted)


def entropy(module: ModuleType) -> None:
    """H by the drawn tokens of the rollouts; the first is the target; both signs; the bounds."""
    for sign, word in ((1, "equation"), (-1, "text")):
        policy = policy_of()
        drawn = [x for r in make_rows(policy) if r.kind == "rollout" for x in r.old_logps[r.own]]  # type: ignore[index]
        h = -sum(drawn) / len(drawn)
        method = method_of(module, mu=0.5, eta=0.0, eta_entropy=0.1, entropy_sign=word)
        m = one_update(module, method, policy).metrics
        close([m["amft/entropy"], m["amft/target"], m["amft/mu"]], [h, h, 0.5], 1e-12, "the first step")
        method = method_of(module, mu=0.5, eta=0.0, eta_entropy=0.1, entropy_sign=word, target_entropy=h + 1.5)
        close(one_update(module, method).metrics["amft/mu"], 0.5 + sign * 0.1 * 1.5, 1e-12, f"collapse, {word}")
    for eta, bound in ((10.0, 0.9), (-0.0, 0.5)):
        options = {"mu": 0.5, "mu_min": 0.3, "mu_max": 0.9, "eta": 0.0, "eta_entropy": eta, "target_entropy": 9.0}
        close(one_update(module, **options).metrics["amft/mu"], bound, 0.0, "bounds")
    options |= {"eta_entropy": 10.0, "target_entropy": 0.0}
    close(one_update(module, **options).metrics["amft/mu"], 0.3, 0.0, "the lower bound")


def warm_up(module: ModuleType) -> None:
    method, policy = method_of(module, warmup=0.5, mu=0.6), policy_of()
    end = one_update(module, method, policy)  # step 0 of 10
    assert grads.norm(grads.mix((1.0, end.applied), (-1.0, end.parts["nll"]))) == 0.0, "SFT alone"
    assert method.mu == 0.6
    assert method.target is None, "H* is that of the warmed-up policy"
    method.update(policy, end.batch, 5)
    assert method.target is not None


def flat_groups(module: ModuleType) -> None:
    """No reward to tell apart: no signal, and the step is mu SFT."""
    policy, method = policy_of(), method_of(module, mu=0.7)
    rows = []
    for r in rows_of(policy):
        for name in {"pg", "val"} & r.streams.keys():
            r = r.with_stream(name, 0.0, r.streams[name].norm, r.streams[name].constant)
        rows.append(r)
    seen = caught(policy)
    batch = make_batch(rows)
    sft = policy.grad(method.terms, batch, {"nll": 1.0}).theta
    metrics = method.update(policy, batch, 0)
    assert metrics["amft/signal"] == metrics["amft/inner"] == 0.0
    assert metrics["amft/mu"] == 0.7
    assert grads.norm(grads.mix((1.0, seen[0]), (-0.7, sft))) <= 1e-15


# -- rows --------------------------------------------------------------------------------------------------------------


def unbiased(module: ModuleType) -> None:
    """The mean over all groups of g_val is the slope of mean reward, of groups of two and of three."""
    for z, size in ((1.2, 2), (-0.4, 3)):
        total = 0.0
        for group in itertools.product((0, 1), repeat=size):
            p = math.prod(sigmoid(z) if a else 1 - sigmoid(z) for a in group)
            rows = module.valued([bandit_row((a,), [0.0], float(a)) for a in group])
            batch = make_batch(rows)
            steps = [r.streams["val"].weight[1] * (a - sigmoid(z)) for r, a in zip(rows, group, strict=True)]
            total += p * sum(steps) / batch.counts["val"]
        close(total, slope(z), 1e-14, "d reward / d logit")
    lone = [replace(bandit_row((1,), [0.0], 1.0), verdict=Verdict.ERROR), bandit_row((0,), [0.0])]
    assert not any("val" in r.streams for r in module.valued(lone)), "one graded answer says nothing"


def looks(module: ModuleType) -> None:
    """Every so many steps after the warm-up, on validation problems that nothing else is measured on."""
    there = tuple(Problem(f"v{i}", ()) for i in range(8))  # the first three are looked at (eval.problems)
    order = itertools.cycle((2, 5, 0, 7, 3, 1, 6, 4))
    data = SimpleNamespace(
        splits=SimpleNamespace(validation=there),
        val=lambda n: [there[next(order)] for _ in range(n)],
        demos=lambda n: [],
    )
    asked: list[list[str]] = []

    class Roller:
        policy = None

        def groups(self, data: Any) -> list[Row]:
            return [bandit_row((a,), [0.0], float(a)) for a in (0, 1)]

        def __call__(self, problems: Any) -> list[Row]:
            asked.append([p.id for p in problems])
            return [replace(bandit_row((a,), [0.0], float(a), 5 + i), problem=p) for i, p in enumerate(problems)
                    for a in (0, 1)]  # fmt: skip

    method = method_of(module, every=3, problems=4, warmup=0.2)
    kinds = [{r.at for r in method.gather(data, Roller(), step)} for step in range(10)]
    assert kinds == [set(), set(), {"live", "val"}, {"live"}, {"live"}, {"live", "val"}, {"live"}, {"live"},
                     {"live", "val"}, {"live"}]  # fmt: skip
    assert asked == [["v5", "v7", "v3", "v6"], ["v4", "v5", "v7", "v3"], ["v6", "v4", "v5", "v7"]]
    asked.clear()
    method_of(module, problems=32).gather(data, Roller(), 0)
    assert len(asked[0]) == 5, "no more than there are"
    data.splits.validation = there[:3]
    with pytest.raises(UserError, match="all 3 validation"):
        method.gather(data, Roller(), 0)


CHECKS: dict[str, Callable[[ModuleType], None]] = {
    f.__name__: f for f in (meta_gradient, signal, the_step, entropy, warm_up, flat_groups, unbiased, looks)
}

MUTANTS: dict[str, tuple[Swaps, str]] = {
    "meta_reversed": ((("rate * (by_sft - by_rl)", "rate * (by_rl - by_sft)"),), "meta_gradient"),
    "meta_without_rl": ((("rate * (by_sft - by_rl)", "rate * by_sft"),), "meta_gradient"),
    "no_rate": ((("rate * (by_sft - by_rl)", "by_sft - by_rl"),), "meta_gradient"),
    "val_descends": ((('= losses.nll(live', '= -losses.nll(live'),), "meta_gradient"),
    "val_of_demos": ((('for name in ("val", "nll"))', 'for name in ("nll", "nll"))'),), "meta_gradient"),
    "cosines_added": ((("cos_sft - cos_rl,", "cos_sft + cos_rl,"),), "signal"),
    "metric_ignored": ((('"theta" if self.options.metric == "adam" else None', "None"),), "signal"),
    "norms_in_another_metric": ((("policy.dot(g, g, metric) ** 0.5", "policy.dot(g, g) ** 0.5"),), "signal"),
    "mu_swapped": ((("grads.mix((1 - self.mu, g_rl.theta), (self.mu, g_sft.theta))",
                     "grads.mix((self.mu, g_rl.theta), (1 - self.mu, g_sft.theta))"),), "the_step"),
    "mu_swapped_without_a_look": ((("rl_coef(rl, 1 - self.mu)", "rl_coef(rl, self.mu)"),), "the_step"),
    "no_pull_on_looks": ((("self.options.eta * signal + found", "self.options.eta * signal + 0 * found"),), "entropy"),
    "sign_of_the_text": (((' == "equation" else', ' == "text" else'),), "entropy"),
    "target_follows": ((("entropy if self.target is None else self.target", "entropy"),), "entropy"),
    "no_bounds": ((("min(max(self.mu + by, self.options.mu_min), self.options.mu_max)", "self.mu + by"),), "entropy"),
    "no_warm_up": ((("if step < self.first:", "if False:"),), "warm_up"),
    "nan_of_flat": ((("return a / b if b else 0.0", 'return a / b if b else float("nan")'),), "flat_groups"),
    "biased_baseline": ((("credit.leave_one_out(rewards)", "credit.centre(rewards)"),), "unbiased"),
    "twice": ((('"val", advantage,', '"val", 2 * advantage,'),), "unbiased"),
    "looked_at": ((("in there[looked:]}", "in there}"),), "looks"),
    "each_step": ((("(step - self.first) % self.options.every == 0", "True"),), "looks"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_the_shipped_method(name: str) -> None:
    CHECKS[name](amft_module)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_seen(name: str) -> None:
    swaps, check = MUTANTS[name]
    with pytest.raises(AssertionError):
        CHECKS[check](mutate(amft_module, swaps, name))
