"""A tiny real Qwen2 in float64, the shipped policy on it, and the same objective written out by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.models.qwen2 import modeling_qwen2

from bridgelm.config.run_config import OptimConfig
from bridgelm.ledger import Ledger
from bridgelm.methods.bridge import Bridge
from bridgelm.model import batching
from bridgelm.model.policy import Policy
from bridgelm.types import Batch, Problem, Row, Verdict

from exact import run_config  # isort: skip

PROBLEM = Problem("p", ({"role": "user", "content": "q"},))
VOCABULARY = 13


@contextmanager
def wide_norm() -> Iterator[None]:
    """HF's RMSNorm computes in float32 whatever the model's dtype; finite differences need the model's own."""

    def forward(self: Any, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    kept = modeling_qwen2.Qwen2RMSNorm.forward
    modeling_qwen2.Qwen2RMSNorm.forward = forward
    try:
        yield
    finally:
        modeling_qwen2.Qwen2RMSNorm.forward = kept


@cache
def initial_weights(tie: bool = False) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in build(tie, fresh=True).named_parameters()}


def build(tie: bool = False, fresh: bool = False) -> Any:
    torch.manual_seed(3)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=tie,
        initializer_range=0.4,
    )
    model = transformers.Qwen2ForCausalLM(config).double().eval()
    if not fresh:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(initial_weights(tie)[name])
    return model


def spread(policy: Policy, group: str, size: float, seed: int) -> None:
    """Moves a group off its start: A and B of a low-rank term both away from zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in policy.groups[group].flat().values():
            t.add_(size * torch.randn(t.shape, generator=generator, dtype=t.dtype))
    policy.live.stale = True


def build_policy(
    lora: bool = False,
    exclusive: bool = False,
    tie: bool = False,
    rank: int = 3,
    alpha: float = 5.0,
    modules: str = "",
    **optim: Any,
) -> Policy:
    """theta, w, shadow and reference, all at different points."""
    options = {"kind": "sgd", "lr": 0.05, "clip": None, **optim}
    policy = Policy(
        build(tie),
        OptimConfig.model_validate(options),
        Ledger(1),
        micro_tokens=24,
        seed=5,
        lora=(2, 3.0, "") if lora else None,
    )
    spread(policy, "theta", 0.05, 0)
    policy.fork("reference")
    policy.add_w(rank, alpha, modules, exclusive)
    policy.fork("shadow")
    for group, size, seed in (("reference", 0.05, 1), ("w", 0.15, 2), ("shadow", 0.06, 3)):
        spread(policy, group, size, seed)
    return policy


def make_rows(policy: Policy, aggregate: str = "token", on_policy: bool = False) -> list[Row]:
    """Rollouts and demonstrations of unequal lengths, one of several segments, a temperature, and real old log-probs
    (nudged off the policy's, unless `on_policy`) and reference log-probs."""
    rng = np.random.default_rng(11)
    rows: list[Row] = []
    for i, (prompt, answer, kind) in enumerate(
        (
            (3, 5, "rollout"),
            (2, 2, "rollout"),
            (4, 6, "rollout"),
            (1, 3, "rollout"),
            (2, 4, "demo"),
            (5, 1, "demo"),
            (3, 7, "demo"),
        )
    ):
        ids = rng.integers(0, VOCABULARY, prompt + answer)
        own = np.arange(len(ids)) >= prompt
        if i == 2:
            own[prompt + 2] = False  # a tool's word between two segments of its own
        row = Row(
            ids,
            own,
            kind,
            PROBLEM,
            group=i // 2,
            temperature=0.7 if kind == "rollout" else 1.0,  # type: ignore[arg-type]
            reward=float(i % 2),
            verdict=Verdict.CORRECT if i % 2 else Verdict.WRONG,
        )
        rows.append(row)
    old, ref = policy.score(rows), policy.score(rows, at="reference")
    out = []
    for i, row in enumerate(rows):
        if row.kind == "demo":
            out.append(row.with_stream("nll", 1.0))
            continue
        nudge = 0.0 if on_policy else 0.15 * rng.standard_normal(len(row.ids))
        filled = Row(
            row.ids,
            row.own,
            row.kind,
            row.problem,
            row.group,
            "live",
            row.temperature,
            np.where(row.own, old[i] + nudge, 0.0),
            ref[i],
            row.reward,
            row.verdict,
        )
        advantage = (0.8, -1.1, 0.5, -0.4)[i]
        for name, weight in (("pg", advantage), ("shadow", advantage), ("kl", 1.0), ("shadow_kl", 1.0)):
            filled = filled.with_stream(name, weight, aggregate, 9.0)  # type: ignore[arg-type]
        out.append(filled)
    return out


def bridge_method(**options: Any) -> Bridge:
    config = run_config({"name": "bridge", "rl": {"kl_coef": 0.3}, **options}, 4)
    return Bridge(config.method, config)


# -- the same objective by hand: weights merged here, no masks ---------------------------------------------------------


def merged(policy: Policy, at: str, with_w: bool = True) -> dict[str, Tensor]:
    theta = policy.groups["theta" if at == "live" else at]
    out = {n: theta.full[n] if n in theta.full else policy.frozen[n] for n in policy.params}
    for group in [theta] + ([policy.groups["w"]] if with_w and at != "reference" else []):
        for n, (a, b) in group.low.items():
            out[n] = out[n] + group.scale * b @ a
    return out


def all_logps(model: Any, weights: Mapping[str, Tensor] | None, rows: list[Row]) -> list[Tensor]:
    """Every token's log-prob given those before it. No mask: padding on the right is not seen from the left."""
    ids = torch.zeros(len(rows), max(len(row.ids) for row in rows), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.from_numpy(row.ids)
    logits = (torch.func.functional_call(model, dict(weights), (ids,)) if weights else model(ids)).logits
    out = []
    for i, row in enumerate(rows):
        logp = torch.log_softmax(logits[i] / row.temperature, -1)
        picked = logp[torch.arange(len(row.ids) - 1), ids[i, 1 : len(row.ids)]]
        out.append(torch.cat([torch.zeros(1, dtype=picked.dtype), picked]))
    return out


def objective(
    rows: list[Row],
    logps: list[Tensor],
    method: Bridge,
    frozen_ratio: list[Tensor] | None = None,
) -> dict[str, Tensor]:
    """Each term's loss, its mean taken by the definition. `frozen_ratio`: the ratios of a stop-gradient."""
    rl, cap = method.options.rl, method.options.ratio_cap
    total: dict[str, Tensor] = {}
    below: dict[str, float] = {}
    for i, (row, logp) in enumerate(zip(rows, logps)):
        for name, stream in row.streams.items():
            own = torch.from_numpy(stream.mask)
            lp, weight = logp[own], torch.from_numpy(np.array(stream.weight))[own]
            old = torch.from_numpy(row.old_logps)[own] if row.old_logps is not None else lp
            if name == "nll":
                each = -weight * lp
            elif name in ("kl", "shadow_kl"):
                ref = torch.from_numpy(row.ref_logps)[own]
                each = weight * ((ref - lp).exp() - 1 + lp - ref)
            elif name == "pg" or method.options.ratio == "clip":
                ratio = (lp - old).exp()
                bound = torch.where(weight > 0, ratio.clamp(max=1 + rl.clip_high), ratio.clamp(min=1 - rl.clip_low))
                each = -weight * bound
            else:
                ratio = (lp - old).exp() if frozen_ratio is None else frozen_ratio[i][own]
                kept = ratio.detach().clamp(max=cap)
                if method.options.ratio == "taper":
                    kept = torch.tensor([1.0 if w > 0 else min(float(r), 1.0) for w, r in zip(weight, kept)],
                                        dtype=torch.float64)
                each = -weight * kept * lp
            mean = each.mean() if stream.norm == "row" else each.sum()
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + mean
            below[name] = below.get(name, 0.0) + {"token": float(own.sum()), "row": 1.0, "constant": 9.0}[stream.norm]
    return {name: value / below[name] for name, value in total.items()}


def gradients(policy: Policy, rows: list[Row], coef: Mapping[str, float], at: str,
              method: Bridge) -> dict[str, dict[str, Tensor]]:
    """Of theta (or what stands for it at that point) and of w, by autograd through weights merged by hand."""
    groups = {"theta": policy.groups["theta" if at == "live" else at].flat(), "w": policy.groups["w"].flat()}
    terms = objective(rows, all_logps(build(), merged(policy, at), rows), method)
    loss = torch.stack([c * terms[name] for name, c in coef.items()]).sum()
    found = iter(torch.autograd.grad(loss, [t for group in groups.values() for t in group.values()]))
    return {group: {name: next(found) for name in tensors} for group, tensors in groups.items()}


def flat(tensors: Mapping[str, Tensor]) -> np.ndarray:
    return torch.cat([t.reshape(-1) for t in tensors.values()]).detach().numpy()


def make_batch(rows: list[Row]) -> Batch:
    return batching.make_batch(rows)
