"""Controls of the bracket of (3) on a real transformer: what w is stepped with, against slow gradients by hand.

Their closed forms and the noise are checks on the stub (`checks.CONTROLS`). A check here is a function of the method's
module: it passes on the shipped one, and each mutant fails the check that is named for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checks import SHADOWLESS
from exact import run_config
from mutation import Mutant, mutants
from torch import Tensor
from transformer import (
    PROBLEM,
    VOCABULARY,
    all_logps,
    build,
    build_policy,
    make_batch,
    make_rows,
    merged,
    objective,
    wide_norm,
)

from bridgelm.errors import UserError
from bridgelm.methods import bridge, bridge_controls, shadow
from bridgelm.model.policy import Policy
from bridgelm.types import Row, Verdict

LR, BETA, LAM, KL = 0.05, 0.02, 0.3, 0.3
# Groups of three, two (flat) and three, of which the last answer could not be graded.
REWARDS = ((0, 0.1), (0, 0.9), (0, 0.4), (1, 0.3), (1, 0.3), (2, 1.0), (2, 0.0), (2, None))
ADVANTAGES = (0.1 - 1.4 / 3, 0.9 - 1.4 / 3, 0.4 - 1.4 / 3, 0.0, 0.0, 0.5, -0.5)


@pytest.fixture(autouse=True)
def _wide_norm() -> Iterator[None]:
    with wide_norm():
        yield


def rollouts(policy: Policy) -> list[Row]:
    """Answers of unequal lengths, their old log-probs nudged off the policy's."""
    draws = np.random.default_rng(4)
    rows = []
    for i, (group, reward) in enumerate(REWARDS):
        ids = draws.integers(0, VOCABULARY, 5 + i % 4)
        verdict = Verdict.ERROR if reward is None else Verdict.WRONG
        own = np.arange(len(ids)) >= 2
        rows.append(Row(ids, own, "rollout", PROBLEM, group, reward=7.0 if reward is None else reward, verdict=verdict))
    old, ref = policy.score(rows), policy.score(rows, at="reference")
    return [
        replace(row, old_logps=np.where(row.own, o + 0.2 * draws.standard_normal(len(o)), 0.0), ref_logps=r)
        for row, o, r in zip(rows, old, ref)
    ]


def method_of(module: ModuleType, third: str, seed: int = 0) -> Any:
    options = {"name": "bridge", "third": third, "lambda": LAM, "beta": BETA, "rl": {"kl_coef": KL}}
    config = run_config(options, 4, seed=seed)
    return module.Bridge(config.method, config)


def gathered(method: Any, policy: Policy, step: int = 0) -> list[Row]:
    """The rows of a step, by the method's own `gather`."""
    demos = [(None, row) for row in make_rows(policy) if row.kind == "demo"]
    data = SimpleNamespace(demos=lambda n: demos)
    roll = SimpleNamespace(
        groups=lambda data: rollouts(policy), reference=lambda rows: rows, demo=lambda problem, row: row
    )
    return method.gather(data, roll, step)


def ready(third: str) -> Policy:
    policy = build_policy(lr=LR)
    policy.optimiser("theta")
    if third in SHADOWLESS:
        del policy.groups["shadow"]
    elif third != "frozen":
        policy.optimiser("shadow", kind="sgd")
    policy.optimiser("w", lr=BETA)
    return policy


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors.values()]).clone()


def slow_gradient(policy: Policy, rows: list[Row], method: Any, at: str, coef: dict[str, float]) -> Tensor:
    """w's gradient of the weighted terms, by autograd through weights merged here and means taken by definition."""
    total = objective(rows, all_logps(build(), merged(policy, at), rows), method)
    loss = torch.stack([c * total[name] for name, c in coef.items()]).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.groups["w"].flat().values()))])


def slow_rl(policy: Policy, method: Any, at: str, advantages: Any = ADVANTAGES) -> Tensor:
    """w's gradient of -J_RL at a point, with these advantages on the graded answers."""
    pg, kl = ("pg", "kl") if at == "live" else ("shadow", "shadow_kl")
    rows = [row.with_stream(pg, a).with_stream(kl, 1.0) for row, a in zip(rollouts(policy), advantages)]
    return slow_gradient(policy, rows, method, at, {pg: 1.0, kl: KL})


def bracket_of(policy: Policy, method: Any, rows: list[Row], step: int = 0) -> tuple[Tensor, dict[str, float]]:
    """What the bracket of (3) was in an update: taken out of the step of w, which is plain SGD."""
    demos = [row for row in rows if row.kind == "demo"]
    sft = slow_gradient(policy, demos, method, "live", {"nll": 1.0})
    before = flat(policy.groups["w"].flat())
    metrics = method.update(policy, make_batch(rows), step)
    moved = (before - flat(policy.groups["w"].flat())) / BETA
    return (moved - (1 - LAM) * sft) / LAM, metrics


def near(found: Tensor, wanted: Tensor, what: str) -> None:
    gap = float((found - wanted).norm())
    assert gap <= 1e-10 * max(1.0, float(wanted.norm())), f"{what}: off by {gap:.3g} of {float(wanted.norm()):.3g}"


def one_update(module: ModuleType, third: str, step: int = 0, seed: int = 0) -> tuple[Policy, Tensor, dict[str, float]]:
    policy, method = ready(third), method_of(module, third, seed)
    bracket, metrics = bracket_of(policy, method, gathered(method, policy, step), step)
    return policy, bracket, metrics


def trains_as_ever(module: ModuleType, third: str) -> None:
    """theta, and the shadow where it moves, take the first step that they take with the gain in the bracket."""
    usual, found = one_update(bridge, "gain")[0], one_update(module, third)[0]
    for name in {"theta", "shadow"} & found.groups.keys() - ({"shadow"} if third == "frozen" else set()):
        assert torch.equal(flat(found.groups[name].flat()), flat(usual.groups[name].flat())), f"{third}: {name}"
    assert not torch.equal(flat(found.groups["w"].flat()), flat(usual.groups["w"].flat())) or third == "frozen"


# -- the checks --------------------------------------------------------------------------------------------------------


def without_a_shadow(module: ModuleType) -> None:
    for third in SHADOWLESS:
        policy, method = ready(third), method_of(module, third)
        wanted = slow_rl(policy, method, "live")
        near(one_update(module, third)[1], wanted if third == "rl" else 0 * wanted, third)
        trains_as_ever(module, third)


def frozen(module: ModuleType) -> None:
    policy, method = ready("frozen"), method_of(module, "frozen")
    start = flat(policy.groups["shadow"].flat())
    for step in range(3):
        wanted = slow_rl(policy, method, "live") - slow_rl(policy, method, "shadow")
        before = flat(policy.groups["theta"].flat())
        rows = gathered(method, policy, step)
        near(bracket_of(policy, method, rows, step)[0], wanted, f"frozen, step {step}")
        assert torch.equal(flat(policy.groups["shadow"].flat()), start)
        assert not torch.equal(flat(policy.groups["theta"].flat()), before)
    trains_as_ever(module, "frozen")


def noise(module: ModuleType) -> None:
    policy, method = ready("noise"), method_of(module, "noise")
    true = slow_rl(policy, method, "live") - slow_rl(policy, method, "shadow")
    _, first, metrics = one_update(module, "noise")
    assert float(first.norm()) == pytest.approx(float(true.norm()), rel=1e-10)
    assert metrics.get("bridge/norm_placebo") == pytest.approx(metrics["bridge/norm_third"], rel=1e-12)
    others = [one_update(module, "noise", step=1)[1], one_update(module, "noise", seed=1)[1], true]
    cosines = [float(first @ other / first.norm() / other.norm()) for other in others]
    assert max(map(abs, cosines)) < 5 / len(true) ** 0.5, cosines
    assert torch.equal(one_update(module, "noise")[1], first)
    trains_as_ever(module, "noise")


def dealt_to(rows: list[Row]) -> np.ndarray:
    """The placebo's advantages of the graded answers; every token of an answer has the same."""
    rows = [row for row in rows if row.kind == "rollout"]
    assert [bool(row.streams) for row in rows] == [True] * 7 + [False], "an answer without a grade has no advantage"
    for row in rows[:-1]:
        assert "placebo" in row.streams
        placebo, pg = row.streams["placebo"], row.streams["pg"]
        assert np.ptp(placebo.weight[row.own]) == 0 and np.array_equal(placebo.mask, pg.mask)
        assert placebo.norm == pg.norm and placebo.constant == pg.constant
    return np.array([row.streams["placebo"].weight[-1] for row in rows[:-1]])


def permuted(module: ModuleType) -> None:
    """The bracket by the dealt-out advantages, both passes; the KL's part of it is the true one."""
    for step in range(2):
        policy, method = ready("permuted"), method_of(module, "permuted")
        advantages = dealt_to(gathered(method, policy, step))
        assert np.abs(advantages - ADVANTAGES).max() > 0.1
        wanted = slow_rl(policy, method, "live", advantages) - slow_rl(policy, method, "shadow", advantages)
        true = slow_rl(policy, method, "live") - slow_rl(policy, method, "shadow")
        _, found, metrics = one_update(module, "permuted", step)
        near(found, wanted, f"permuted, step {step}")
        assert metrics.get("bridge/norm_placebo") == pytest.approx(float(wanted.norm()), rel=1e-10)
        assert metrics["bridge/norm_third"] == pytest.approx(float(true.norm()), rel=1e-10)
        assert float((true - wanted).norm()) > 0.1 * float(true.norm())
    trains_as_ever(module, "permuted")


def dealing(module: ModuleType) -> None:
    """Every order is as likely: each answer gets each advantage equally often, the flat group's answers too."""
    policy, method, steps = ready("permuted"), method_of(module, "permuted"), 300
    rows = [row for row in gathered(method_of(bridge, "gain"), policy) if row.kind == "rollout"]
    data = SimpleNamespace(demos=lambda n: [])
    roll = SimpleNamespace(groups=lambda data: rows, reference=lambda rows: rows)
    dealt = np.stack([dealt_to(method.gather(data, roll, step)) for step in range(steps)])
    assert np.allclose(np.sort(dealt, axis=1), np.sort(ADVANTAGES)), "each advantage is handed out once"
    for value, times in ((0.9 - 1.4 / 3, 1), (0.0, 2), (-0.5, 1)):
        share = np.isclose(dealt, value).mean(axis=0)
        error = (times / 7 * (1 - times / 7) / steps) ** 0.5
        assert np.abs(share - times / 7).max() < 4.5 * error, (value, share)
    again = dealt_to(method_of(module, "permuted").gather(data, roll, 11))
    assert np.array_equal(again, dealt[11]), "a run that goes on at step 11 deals the same"
    other = np.stack([dealt_to(method_of(module, "permuted", seed=1).gather(data, roll, k)) for k in range(9)])
    assert (other != dealt[:9]).any(axis=1).sum() > 6, "seeds are apart"


CHECKS: dict[str, Callable[[ModuleType], None]] = {
    f.__name__: f for f in (without_a_shadow, frozen, noise, permuted, dealing)
}


@pytest.mark.parametrize("name", CHECKS)
def test_shipped_code(name: str) -> None:
    CHECKS[name](bridge)


MUTANTS = mutants(
    bridge_controls,
    Mutant("branch", "Third.without_shadow", 0, by=lambda: without_a_shadow(bridge)),
    Mutant("snapshot", "Bridge.at_shadow", by=lambda: frozen(bridge), of=bridge),
    Mutant("branch", "Third.bracket", 1, by=lambda: noise(bridge)),
    Mutant("sign", "Third.bracket", by=lambda: permuted(bridge)),
    Mutant("constant", "with_placebo", "pg", to="nothing", by=lambda: permuted(bridge)),
    Mutant("constant", "with_placebo", "shadow", to="nothing", by=lambda: permuted(bridge)),
    Mutant("constant", "Third.draws", "seed", to=0, by=lambda: dealing(bridge)),  # every seed deals alike
    Mutant("undo", "deal_out", "permutation 1", by=lambda: dealing(bridge)),  # each answer keeps its own
    Mutant("branch", "shadow_terms", "shadow_kl 1", by=lambda: frozen(bridge), of=shadow),  # no KL at the shadow
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()


# -- what is refused ---------------------------------------------------------------------------------------------------

ASKED: dict[str, dict[str, Any]] = {
    "probe_every": {"probe_every": 2},
    "resync_every": {"resync_every": 1},
    "shadow_rollouts": {"shadow_rollouts": "own"},
    "shadow_every": {"shadow_every": 2},
}
REFUSED = {
    "rl": set(ASKED),
    "sft": set(ASKED),
    "frozen": {"resync_every"},
    "permuted": {"shadow_rollouts", "shadow_every"},
}


@pytest.mark.parametrize("third", ["gain", "rl", "sft", "frozen", "noise", "permuted"])
def test_a_control_refuses_what_it_does_not_have(third: str) -> None:
    for key, options in ASKED.items():
        if key in REFUSED.get(third, set()):
            with pytest.raises(UserError, match=rf"third = '{third}' .*: leave out {key}$") as caught:
                run_config({"name": "bridge", "third": third, **options})
            assert "\n" not in str(caught.value)
        else:
            run_config({"name": "bridge", "third": third, **options})
    run_config({"name": "bridge", "third": third, "preset": "paper", "exclusive": True})


@pytest.mark.parametrize(
    ("method", "why"),
    [({"name": "bridge", "resync_every": 3}, "leave out shadow_every"), ({"name": "bridge_dial"}, "must be 1")],
)
def test_a_shadow_that_may_not_rest(method: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        run_config({**method, "shadow_every": 2})


def test_all_that_is_refused_is_named_at_once() -> None:
    with pytest.raises(UserError, match="leave out probe_every and resync_every and shadow_rollouts"):
        run_config(
            {"name": "bridge", "third": "rl", **ASKED["probe_every"], **ASKED["resync_every"], "shadow_rollouts": "own"}
        )
