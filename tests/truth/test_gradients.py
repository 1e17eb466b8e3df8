"""Gradients of the real policy on a transformer: against finite differences and against PEFT's LoRA, in float64."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import peft
import pytest
import torch
from mutation import Mutant, mutants
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

from bridgelm.model import groups
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


def found_by(policy: Policy, method: Any, rows: list[Any], at: str) -> Any:
    return policy.grad(method.terms if at == "live" else method.shadow_terms, make_batch(rows), COEF[at], at=at)


def worst_difference(case: str, at: str, only_w: bool = False) -> tuple[float, int]:
    """Along one random direction in every trainable tensor: |analytic - central difference| / scale, and how many."""
    options, aggregate, ratio = CASES[case]
    policy, model = build_policy(**options), build(options.get("tie", False))
    method, rows, coef = bridge_method(ratio=ratio), make_rows(policy, aggregate), COEF[at]
    found = found_by(policy, method, rows, at)
    with torch.no_grad():
        now = all_logps(model, merged(policy, at), rows)
        by_hand = objective(rows, now, method)
    ratios = [(lp - torch.from_numpy(r.old_logps)).exp() if r.old_logps is not None else lp for lp, r in zip(now, rows)]
    assert found.losses == pytest.approx({n: c * float(by_hand[n]) for n, c in coef.items()}, rel=1e-12)

    @torch.no_grad()
    def total(t: Tensor, value: Tensor) -> float:
        t.copy_(value)
        terms = objective(rows, all_logps(model, merged(policy, at), rows), method, ratios)
        return float(sum(c * terms[n] for n, c in coef.items()))

    generator, step, worst, seen = torch.Generator().manual_seed(7), 2e-5, 0.0, 0
    parts = ((policy.groups["theta" if at == "live" else at], found.theta), (policy.groups["w"], found.w))
    for group, gradient in parts[only_w:]:
        assert list(group.flat()) == list(gradient)
        for name, t in group.flat().items():
            direction = torch.randn(t.shape, generator=generator, dtype=t.dtype)
            direction /= direction.norm()
            start = t.detach().clone()
            numeric = (total(t, start + step * direction) - total(t, start - step * direction)) / (2 * step)
            total(t, start)
            worst = max(worst, abs(float((gradient[name] * direction).sum()) - numeric) / (abs(numeric) + 1e-1))
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
    policy, method = build_policy(), bridge_method()
    rows = make_rows(policy)
    found = policy.grad(method.terms, make_batch(rows), {term: 1.0})
    value = objective(rows, all_logps(build(), merged(policy, "live"), rows), method)[term]
    for group, gradient in (("theta", found.theta), ("w", found.w)):
        leaves = policy.groups[group].flat()
        wanted = torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
        for name, g in zip(leaves, wanted, strict=True):
            assert torch.allclose(gradient[name], g, rtol=1e-10, atol=1e-13), name


@pytest.mark.parametrize("budget", [1, 20, 10_000])
def test_micro_batches_do_not_matter(budget: int) -> None:
    policy, method = build_policy(), bridge_method()
    rows = make_rows(policy)
    wanted = found_by(policy, method, rows, "live")
    policy.micro_tokens = budget
    found = found_by(policy, method, rows, "live")
    for a, b in ((found.theta, wanted.theta), (found.w, wanted.w)):
        assert all(torch.allclose(a[n], b[n], rtol=1e-11, atol=1e-14) for n in b)


# -- PEFT as a second implementation of low-rank terms -----------------------------------------------------------------


def peft_model(policy: Policy, at: str) -> Any:
    """PEFT's own adapter modules around theta, holding w's A and B."""
    low, base, theta = policy.groups["w"].low, build(), merged(policy, at, with_w=False)
    rank = next(iter(low.values()))[0].shape[0]
    names = sorted({re.sub(r".*\.(\w+)\.weight", r"\1", n) for n in low})
    config = peft.LoraConfig(r=rank, lora_alpha=policy.groups["w"].scale * rank, target_modules=names,
                             lora_dropout=0.0, bias="none")
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


@pytest.mark.parametrize("at", ["live", "shadow"])
def test_low_rank_gradients_equal_pefts(at: str) -> None:
    policy, method = build_policy(), bridge_method()
    rows, peft_one = make_rows(policy), peft_model(policy, at)
    found = found_by(policy, method, rows, at)
    terms = objective(rows, all_logps(peft_one, None, rows), method)
    sum(c * terms[n] for n, c in COEF[at].items()).backward()  # type: ignore[union-attr]
    for n in policy.groups["w"].low:
        layer = peft_one.base_model.model.get_submodule(n.removesuffix(".weight"))
        for side, weight in (("A", layer.lora_A.default.weight), ("B", layer.lora_B.default.weight)):
            assert float(weight.grad.abs().max()) > 1e-6
            assert float((found.w[f"{n}:{side}"] - weight.grad).abs().max()) < 1e-10


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


MUTANTS = mutants(
    groups,
    Mutant("term", "Group.collect", "scale 1", by=partial(test_low_rank_gradients_equal_pefts, "live")),
    Mutant("term", "Group.collect", "scale 3", by=partial(test_finite_differences, "full", "live")),
    Mutant("drop", "Group.collect", 1, by=partial(test_single_terms_against_autograd_of_the_merged_weight, "nll")),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()


def test_without_the_patched_norm_differences_are_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the norm is patched: the checks above would see a float32 island in the model."""
    monkeypatch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", NARROW)
    assert worst_difference("full", "live", only_w=True)[0] > 1e-5
