"""On the real policy and a real transformer: what point each gradient is taken at, and that one update is equations
(1)-(3) from one snapshot, whatever order the code writes in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mutation import Mutant, mutants
from torch import Tensor
from transformer import bridge_method, build_policy, make_batch, make_rows, wide_norm

from bridgelm.methods import bridge as bridge_module
from bridgelm.model import grads
from bridgelm.model.policy import Policy

Weights = dict[str, dict[str, Tensor]]
LR, BETA, LAM = 0.05, 0.02, 0.3


@pytest.fixture(autouse=True)
def _wide_norm() -> Iterator[None]:
    with wide_norm():
        yield


def copy_of(policy: Policy) -> Weights:
    return {g: {n: t.detach().clone() for n, t in group.flat().items()} for g, group in policy.groups.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in b)


class Recorded:
    """Wraps a policy's `grad` and `apply`, keeping the weights at the time of each call. The live model's own tensors
    are compared too: a stale merge would not show in the groups."""

    def __init__(self, policy: Policy) -> None:
        self.calls: list[tuple[str, str, Weights]] = []
        self.merged: list[dict[str, Tensor]] = []
        grad, apply = policy.grad, policy.apply

        def watched_grad(terms: Any, batch: Any, coef: Any, at: str = "live", entropy: bool = False) -> Any:
            self.calls.append(("grad", at, copy_of(policy)))
            with policy.at(at) as model:
                self.merged.append({n: p.detach().clone() for n, p in model.named_parameters()})
            return grad(terms, batch, coef, at, entropy)

        def watched_apply(name: str, gradient: Any, **options: Any) -> float:
            self.calls.append(("apply", name, copy_of(policy)))
            return apply(name, gradient, **options)

        policy.grad, policy.apply = watched_grad, watched_apply  # type: ignore[method-assign]


def one_update(
    module: Any = bridge_module, resync: bool = False, **options: Any
) -> tuple[Policy, Weights, Recorded, Any, Any]:
    policy = build_policy(lr=LR, **options)
    method = bridge_method(**{"lambda": LAM, "beta": BETA, "resync_every": int(resync)})
    method.__class__ = module.Bridge
    policy.optimiser("theta")
    policy.optimiser("shadow", kind="sgd")
    policy.optimiser("w", lr=BETA)
    batch = make_batch(make_rows(policy))
    before, recorded = copy_of(policy), Recorded(policy)
    method.update(policy, batch, 0)
    return policy, before, recorded, method, batch


@pytest.mark.parametrize("options", [{}, {"lora": True}, {"exclusive": True, "modules": "mlp"}])
def test_gradients_are_of_the_snapshot_and_w_moves_last(options: dict[str, Any]) -> None:
    policy, before, recorded, _, _ = one_update(**options)
    assert [c[1] for c in recorded.calls if c[0] == "apply"][-1] == "w"
    assert recorded.calls[-1][:2] == ("apply", "w")
    seen = [c for c in recorded.calls if c[0] == "grad"]
    assert [c[1] for c in seen] == ["live", "live", "shadow"]
    for (_, at, weights), merged in zip(seen, recorded.merged):
        own = "theta" if at == "live" else at
        assert equal(weights[own], before[own]) and equal(weights["w"], before["w"])
        fresh = build_policy(**options)  # merged anew from the snapshot's numbers
        for name, part in before.items():
            for n, t in fresh.groups[name].flat().items():
                t.data.copy_(part[n])
        fresh.live.stale = True
        assert equal(merged, fresh.weights(at))
    assert not equal(copy_of(policy)["theta"], before["theta"])


def expected(options: dict[str, Any], resync: bool) -> Weights:
    """Equations (1)-(3), each gradient from a policy of its own that never moves before."""

    def fresh() -> tuple[Policy, Any]:
        policy = build_policy(lr=LR, **options)
        return policy, make_batch(make_rows(policy))

    method = bridge_method()
    policy, batch = fresh()
    start = copy_of(policy)
    sft = policy.grad(method.terms, batch, {"nll": 1.0})
    rl = policy.grad(method.terms, batch, {"pg": 1.0, "kl": 0.3})
    policy, batch = fresh()
    if resync:
        with torch.no_grad():
            for n, t in policy.groups["shadow"].flat().items():
                t.copy_(start["theta"][n] - LR * rl.theta[n])
    moved = copy_of(policy)["shadow"]
    shadow = policy.grad(method.shadow_terms, batch, {"shadow": 1.0, "shadow_kl": 0.3}, at="shadow")
    step = grads.mix((LR * (1 - LAM), sft.theta), (LR * LAM, rl.theta))
    w_step = grads.mix((BETA * (1 - LAM), sft.w), (BETA * LAM, rl.w), (-BETA * LAM, shadow.w))
    return {
        "theta": {n: t - step[n] for n, t in start["theta"].items()},
        "shadow": moved if resync else {n: t - LR * shadow.theta[n] for n, t in start["shadow"].items()},
        "w": {n: t - w_step[n] for n, t in start["w"].items()},
        "reference": start["reference"],
    }


def off_by(found: Weights, wanted: Weights) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[g][n] - t).abs().max()) for g, part in wanted.items() for n, t in part.items())


CONFIGURATIONS = {
    "full": ({}, False),
    "low-rank theta": ({"lora": True}, False),
    "re-sync": ({}, True),
    "w alone on its modules": ({"exclusive": True, "modules": "mlp"}, False),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_one_update_is_the_three_equations(name: str) -> None:
    options, resync = CONFIGURATIONS[name]
    policy, _, _, _, _ = one_update(resync=resync, **options)
    assert off_by(copy_of(policy), expected(options, resync)) < 1e-12


MUTANTS = mutants(
    bridge_module,
    Mutant("snapshot", "Bridge.at_shadow", by=lambda: test_one_update_is_the_three_equations("full")),
    Mutant("late", "Bridge.update", 13, by=lambda: test_one_update_is_the_three_equations("re-sync")),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()


def test_diagnostics_of_a_real_update() -> None:
    """The logged norms are those of the three terms, measured from outside."""
    policy = build_policy(lr=LR)
    method = bridge_method(**{"lambda": LAM})
    for name in ("theta", "w"):
        policy.optimiser(name)
    policy.optimiser("shadow", kind="sgd")
    batch = make_batch(make_rows(policy))
    sft, rl = policy.grad(method.terms, batch, {"nll": 1.0}), policy.grad(method.terms, batch, {"pg": 1.0, "kl": 0.3})
    shadow = policy.grad(method.shadow_terms, batch, {"shadow": 1.0, "shadow_kl": 0.3}, at="shadow")
    found = method.update(policy, batch, 0)
    assert found["bridge/norm_sft"] == pytest.approx(grads.norm(sft.w), rel=1e-12)
    assert found["bridge/norm_rl"] == pytest.approx(grads.norm(rl.w), rel=1e-12)
    assert found["bridge/norm_shadow"] == pytest.approx(grads.norm(shadow.w), rel=1e-12)
    gain = {n: rl.w[n] - shadow.w[n] for n in rl.w}
    assert found["bridge/norm_third"] == pytest.approx(grads.norm(gain), rel=1e-12)
    pull, push = (1 - LAM) * grads.norm(sft.theta), LAM * grads.norm(rl.theta)
    assert found["bridge/share_sft"] == pytest.approx(pull / (pull + push), rel=1e-12)
    assert found["bridge/share_rl"] == pytest.approx(push / (pull + push), rel=1e-12)
    assert found["bridge/theta_move"] == pytest.approx(
        LR * grads.norm(grads.mix((1 - LAM, sft.theta), (LAM, rl.theta)))
    )
    assert found["bridge/shadow_move"] == pytest.approx(LR * grads.norm(shadow.theta))
