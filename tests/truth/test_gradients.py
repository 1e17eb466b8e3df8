"""Gradients of the real policy on a transformer: against finite differences and against PEFT's LoRA, in float64."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mutants import mutate
from torch import Tensor
from transformer import (
    all_logps,
    bridge_method,
    build,
    build_policy,
    make_batch,
    make_rows,
    merged,
    objective,
    wide_norm,
)
from transformers.models.qwen2 import modeling_qwen2

from bridgelm.model import groups as groups_module
from bridgelm.model.policy import Policy

NARROW = modeling_qwen2.Qwen2RMSNorm.forward  # as it ships


@pytest.fixture(autouse=True)
def _wide_norm() -> Iterator[None]:
    with wide_norm():
        yield


CASES = {  # what theta is, what w is on, how a term is averaged, how the shadow's ratio is used
    "full": ({}, "token", "truncate"),
    "full, tied head, row means": ({"tie": True}, "row", "clip"),
    "low-rank theta": ({"lora": True}, "constant", "truncate"),
    "w alone on its modules": ({"exclusive": True, "modules": r"mlp|q_proj"}, "token", "truncate"),
    "low-rank theta, w alone": ({"lora": True, "exclusive": True, "modules": r"mlp"}, "token", "clip"),
}
COEF = {"live": {"nll": 0.7, "pg": 1.3, "kl": 0.4}, "shadow": {"shadow": 1.2, "shadow_kl": 0.5}}


def total(
    policy: Policy, model: Any, rows: list[Any], method: Any, at: str, coef: dict[str, float], ratios: list[Tensor]
) -> float:
    with torch.no_grad():
        weights = merged(policy, at)
        terms = objective(rows, all_logps(model, weights, rows), method, ratios)
    return float(sum(c * terms[n] for n, c in coef.items()))


def worst_difference(case: str, at: str, only_w: bool = False) -> tuple[float, int]:
    """Along one random direction in every trainable tensor: |analytic - central difference| / scale, and how many."""
    options, aggregate, ratio = CASES[case]
    policy, model = build_policy(**options), build(options.get("tie", False))
    method, rows, coef = bridge_method(ratio=ratio), make_rows(policy, aggregate), COEF[at]
    found = policy.grad(method.terms if at == "live" else method.shadow_terms, make_batch(rows), coef, at=at)
    with torch.no_grad():
        now = all_logps(model, merged(policy, at), rows)
        ratios = [
            (lp - torch.from_numpy(r.old_logps)).exp() if r.old_logps is not None else lp for lp, r in zip(now, rows)
        ]
        by_hand = objective(rows, now, method)
    assert found.losses == pytest.approx({n: c * float(by_hand[n]) for n, c in coef.items()}, rel=1e-12)
    generator, step, worst, seen = torch.Generator().manual_seed(7), 2e-5, 0.0, 0
    parts = ((policy.groups["theta" if at == "live" else at], found.theta), (policy.groups["w"], found.w))
    for group, gradient in parts[only_w:]:
        assert list(group.flat()) == list(gradient)
        for name, t in group.flat().items():
            direction = torch.randn(t.shape, generator=generator, dtype=t.dtype)
            direction /= direction.norm()
            start, ends = t.detach().clone(), []
            for sign in (1, -1):
                with torch.no_grad():
                    t.copy_(start + sign * step * direction)
                ends.append(total(policy, model, rows, method, at, coef, ratios))
            with torch.no_grad():
                t.copy_(start)
            analytic, numeric = float((gradient[name] * direction).sum()), (ends[0] - ends[1]) / (2 * step)
            worst = max(worst, abs(analytic - numeric) / (abs(numeric) + 1e-1))
            seen += 1
    return worst, seen


@pytest.mark.parametrize("at", ["live", "shadow"])
@pytest.mark.parametrize("case", CASES)
def test_finite_differences(case: str, at: str) -> None:
    worst, seen = worst_difference(case, at)
    assert seen >= 30 if "alone" not in case else seen > 12
    assert worst < 1e-6, f"{case} at {at}: off by {worst:.2e}"


@pytest.mark.parametrize("term", ["nll", "pg", "kl"])
def test_single_terms_against_autograd_of_the_merged_weight(term: str) -> None:
    """Term by term, by differentiating through  theta + s B A  written out, which collects dA and dB in another way."""
    policy = build_policy()
    model, method = build(), bridge_method()
    rows = make_rows(policy)
    leaves = {f"{g}/{n}": t for g in ("theta", "w") for n, t in policy.groups[g].flat().items()}
    value = objective(rows, all_logps(model, merged(policy, "live"), rows), method)[term]
    wanted = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
    found = policy.grad(method.terms, make_batch(rows), {term: 1.0})
    for name, g in {
        **{f"theta/{n}": g for n, g in found.theta.items()},
        **{f"w/{n}": g for n, g in found.w.items()},
    }.items():
        assert torch.allclose(g, wanted[name], rtol=1e-10, atol=1e-13), name


@pytest.mark.parametrize("budget", [1, 20, 10_000])
def test_micro_batches_do_not_matter(budget: int) -> None:
    policy = build_policy()
    method, rows = bridge_method(), make_rows(policy)
    wanted = policy.grad(method.terms, make_batch(rows), COEF["live"])
    policy.micro_tokens = budget
    found = policy.grad(method.terms, make_batch(rows), COEF["live"])
    for a, b in ((found.theta, wanted.theta), (found.w, wanted.w)):
        assert all(torch.allclose(a[n], b[n], rtol=1e-11, atol=1e-14) for n in b)


# -- PEFT as a second implementation of low-rank terms -----------------------------------------------------------------


def peft_model(policy: Policy, at: str) -> Any:
    """PEFT's own adapter modules around theta, holding w's A and B."""
    import peft

    low = policy.groups["w"].low
    names = sorted({re.sub(r".*\.(\w+)\.weight", r"\1", n) for n in low})
    a = next(iter(low.values()))[0]
    config = peft.LoraConfig(
        r=a.shape[0],
        lora_alpha=policy.groups["w"].scale * a.shape[0],
        target_modules=names,
        lora_dropout=0.0,
        bias="none",
    )
    base = build()
    theta = merged(policy, at, with_w=False)
    with torch.no_grad():
        for n, p in base.named_parameters():
            p.copy_(theta[n])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for an attribute by its old name
        wrapped = peft.get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for n, (a, b) in low.items():
            layer = wrapped.base_model.model.get_submodule(n.removesuffix(".weight"))
            layer.lora_A.default.weight.copy_(a)
            layer.lora_B.default.weight.copy_(b)
    return wrapped


def worst_against_peft(at: str, coef: dict[str, float]) -> float:
    policy = build_policy()
    method, rows, peft_one = bridge_method(), make_rows(policy), peft_model(policy, at)
    found = policy.grad(method.terms if at == "live" else method.shadow_terms, make_batch(rows), coef, at=at)
    terms = objective(rows, all_logps(peft_one, None, rows), method)
    sum(c * terms[n] for n, c in coef.items()).backward()  # type: ignore[union-attr]
    worst = 0.0
    for n in policy.groups["w"].low:
        layer = peft_one.base_model.model.get_submodule(n.removesuffix(".weight"))
        for side, weight in (("A", layer.lora_A.default.weight), ("B", layer.lora_B.default.weight)):
            assert float(weight.grad.abs().max()) > 1e-6
            worst = max(worst, float((found.w[f"{n}:{side}"] - weight.grad).abs().max()))
    return worst


@pytest.mark.parametrize("at", ["live", "shadow"])
def test_low_rank_gradients_equal_pefts(at: str) -> None:
    assert worst_against_peft(at, COEF[at]) < 1e-10


def test_merged_logits_equal_unmerged_ones() -> None:
    policy = build_policy()
    ids = torch.randint(0, 13, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for at in ("live", "shadow"):
            unmerged = peft_model(policy, at)(ids).logits
            with policy.at(at) as model:
                assert torch.allclose(model(ids).logits, unmerged, rtol=1e-12, atol=1e-12)
        before = peft_model(policy, "live")(ids).logits
        policy.absorb()
        with policy.at() as model:
            assert torch.allclose(model(ids).logits, before, rtol=1e-12, atol=1e-12)


WRONG_COLLECTS = {
    "B without its scale": ("+= self.scale * (g @ a.detach().T)", "+= g @ a.detach().T"),
    "A without its scale": ("+= self.scale * (b.detach().T @ g)", "+= b.detach().T @ g"),
    "scale twice": ("+= self.scale * (g @ a.detach().T)", "+= self.scale**2 * (g @ a.detach().T)"),
    "only the last micro-batch": ('into[f"{name}:A"] += self.scale', 'into[f"{name}:A"] = self.scale'),
}


@pytest.mark.parametrize("wrong", WRONG_COLLECTS)
def test_wrong_collections_are_seen(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = mutate(groups_module, (WRONG_COLLECTS[wrong],))
    monkeypatch.setattr(groups_module.Group, "collect", mutant.Group.collect)
    assert worst_against_peft("live", COEF["live"]) > 1e-4
    assert worst_difference("full", "live", only_w=True)[0] > 1e-4


def test_without_the_patched_norm_differences_are_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the norm is patched: the checks above would see a float32 island in the model."""
    monkeypatch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", NARROW)
    assert worst_difference("full", "live", only_w=True)[0] > 1e-5
