"""The policy's arithmetic: groups, merged weights, forks, micro-batches, steps, checkpoints."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bridgelm.config.run_config import ModelConfig, OptimConfig
from bridgelm.errors import UserError
from bridgelm.ledger import Ledger
from bridgelm.model import batching, forward, grads
from bridgelm.model.batching import make_batch
from bridgelm.model.loading import load_model
from bridgelm.model.policy import Policy
from bridgelm.objective.losses import nll
from bridgelm.types import Live, Micro, Problem, Row
from tiny import exact_norms

PROBLEM = Problem("p", ({"role": "user", "content": "?"},))
MakePolicy = Callable[..., Policy]


def demos(n: int = 9, seed: int = 0, kind: Any = "demo") -> list[Row]:
    rng, rows = np.random.default_rng(seed), []
    for _ in range(n):
        length, prompt = int(rng.integers(5, 14)), int(rng.integers(1, 4))
        rows.append(Row(rng.integers(2, 29, length), np.arange(length) >= prompt, kind, PROBLEM,
                        old_logps=np.zeros(length)).with_stream("nll", 1.0))
    return rows


def terms(micro: Micro, live: Live) -> dict[str, Tensor]:
    return {"nll": nll(live.logp_BT, micro.weight["nll"])} if "nll" in micro else {}


@pytest.fixture
def policy(tiny_folder: Callable[[str], Path]) -> MakePolicy:
    def make(dtype: str = "float64", lora: tuple[int, float, str] | None = None, kind: str = "qwen2",
             micro_tokens: int = 64, checkpointing: bool = False, **optim: Any) -> Policy:
        model = load_model(ModelConfig(name_or_path=str(tiny_folder(kind)), dtype=dtype, device="cpu",  # type: ignore[arg-type]
                                       gradient_checkpointing=checkpointing))
        config = OptimConfig(**{"lr": 1e-2, "eps": 1e-3, **optim})
        return Policy(exact_norms(model) if dtype == "float64" else model, config, Ledger(1), micro_tokens, 0, lora)
    return make


def shake(policy: Policy, *names: str, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in names:
            for t in policy.groups[name].flat().values():
                t.add_(size * torch.randn(t.shape, generator=generator, dtype=t.dtype))
    policy.live.stale = True


def logits(policy: Policy, at: str = "live") -> Tensor:
    with policy.at(at) as model, torch.no_grad():
        return model(input_ids=torch.tensor([[3, 7, 8, 9, 4]])).logits.clone()


def off(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max())


# -- weights ---------------------------------------------------------------------------------------------------------

def test_live_weights_are_theta_plus_s_b_a(policy: MakePolicy) -> None:
    made = policy()
    made.add_w(3, 12.0)
    shake(made, "theta", "w")
    theta, w = made.groups["theta"], made.groups["w"]
    assert w.scale == 4.0
    assert len(w.low) == 14  # seven linear layers of two blocks; neither embeddings nor head
    for name, weight in made.weights().items():
        wanted = theta.full[name]
        if name in w.low:
            a, b = w.low[name]
            wanted = wanted + 4.0 * b @ a
        assert off(weight, wanted) < 1e-14
    with made.at() as model:
        assert all(torch.equal(p, made.weights()[n]) for n, p in model.named_parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_low_rank_terms_are_those_of_peft(policy: MakePolicy) -> None:
    from peft import LoraConfig, get_peft_model

    made = policy(lora=(3, 6.0, "q_proj|down_proj"))
    shake(made, "theta")
    ours = logits(made)
    batch = make_batch(demos())
    found = made.grad(terms, batch, {"nll": 1.0})
    settings = LoraConfig(r=3, lora_alpha=6.0, target_modules=["q_proj", "down_proj"])
    theirs: Any = get_peft_model(policy().model, settings)
    theirs = theirs.double()
    sides = {}
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                key = name.removeprefix("base_model.model.").replace(".lora_A.default.weight", ".weight:A")
                sides[key.replace(".lora_B.default.weight", ".weight:B")] = p
        for key, p in sides.items():
            p.copy_(made.groups["theta"].flat()[key])
    assert sides.keys() == made.groups["theta"].flat().keys()
    assert off(theirs(input_ids=torch.tensor([[3, 7, 8, 9, 4]])).logits.detach(), ours) < 1e-12
    loss = sum(terms(m, forward.forward(theirs.base_model.model, m))["nll"].mul(m.scale["nll"]).sum()
               for m in [batching.collate(list(batch.rows), torch.float64, torch.device("cpu"), {})])
    (loss / batch.counts["nll"]).backward()
    for key, p in sides.items():
        assert off(found.theta[key], p.grad) < 1e-12


def test_w_starts_at_nothing_but_with_a_gradient(policy: MakePolicy) -> None:
    made = policy()
    before = logits(made)
    made.add_w(2, 2.0)
    assert torch.equal(logits(made), before)
    found = made.grad(terms, make_batch(demos()), {"nll": 1.0})
    assert all(g.any() == key.endswith("B") for key, g in found.w.items())


def test_both_gradients_against_finite_differences(policy: MakePolicy) -> None:
    made = policy()
    made.add_w(2, 4.0)
    shake(made, "w")
    batch = make_batch(demos())
    found = made.grad(terms, batch, {"nll": 1.0})
    for group, gradient in (("theta", found.theta), ("w", found.w)):
        generator = torch.Generator().manual_seed(0)
        flat = made.groups[group].flat()
        way = {k: torch.randn(t.shape, generator=generator, dtype=t.dtype) for k, t in flat.items()}
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                for key, t in flat.items():
                    t.add_(way[key], alpha=step)
            made.live.stale = True
            values.append(made.grad(terms, batch, {"nll": 1.0}).losses["nll"])
            with torch.no_grad():
                for key, t in flat.items():
                    t.sub_(way[key], alpha=step)
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(grads.dot(gradient, way), rel=1e-7)


def test_forks_and_where_the_model_stands(policy: MakePolicy) -> None:
    made = policy()
    made.add_w(2, 4.0)
    start = logits(made)
    made.fork("reference")
    made.fork("shadow")
    shake(made, "theta")
    live = logits(made)
    assert off(live, start) > 1e-3
    assert torch.equal(logits(made, "shadow"), start)
    assert torch.equal(logits(made), live), "`at` puts the live weights back"
    with pytest.raises(RuntimeError, match="inside"), made.at("shadow"):
        raise RuntimeError("inside")
    assert torch.equal(logits(made), live), "also when the block fails"
    shake(made, "w")
    assert torch.equal(logits(made, "reference"), start), "the reference has no w"
    assert off(logits(made, "shadow"), start) > 1e-3, "the shadow shares it"
    made.copy("theta", "shadow")
    assert torch.equal(logits(made, "shadow"), logits(made))


@pytest.mark.parametrize("lora", [None, (2, 4.0, "")])
@pytest.mark.parametrize("exclusive", [False, True])
def test_absorb_keeps_the_function(policy: MakePolicy, lora: Any, exclusive: bool) -> None:
    made = policy(lora=lora)
    shake(made, "theta")
    before = logits(made)
    first = set(made.groups["theta"].flat())
    made.fork("reference")
    made.add_w(2, 4.0, "mlp" if exclusive else "", exclusive)
    assert off(logits(made), before) < 1e-12, "what theta had learnt stays"
    assert off(logits(made, "reference"), before) < 1e-12
    made.fork("shadow")
    made.optimiser("theta")
    shake(made, "theta", "w")
    before = logits(made)
    made.absorb(keep_optimiser=True)
    assert off(logits(made), before) < 1e-12
    assert set(made.groups) == {"theta"}
    assert set(made.groups["theta"].flat()) == first, "theta has all of its matrices again"
    kept = made.optimisers["theta"].optimiser.param_groups[0]["params"]
    assert {id(p) for p in kept} == {id(p) for p in made.groups["theta"].flat().values()}
    made.apply("theta", made.grad(terms, make_batch(demos()), {"nll": 1.0}).theta)
    assert off(logits(made), before) > 1e-4


def test_exclusive_matrices_belong_to_w_alone(policy: MakePolicy) -> None:
    made = policy()
    made.add_w(2, 4.0, "mlp", exclusive=True)
    theta, w = made.groups["theta"], made.groups["w"]
    assert not set(theta.full) & set(w.low)
    assert set(theta.full) | set(w.low) == set(made.params)
    found = made.grad(terms, make_batch(demos()), {"nll": 1.0})
    assert set(found.theta) == set(theta.full)
    assert all(p.grad is None for p in made.params.values())
    with pytest.raises(UserError, match=r"method\.exclusive"):
        policy(lora=(2, 4.0, "mlp")).add_w(2, 4.0, "", exclusive=True)
    with pytest.raises(UserError, match="no linear layer"):
        policy().add_w(2, 4.0, "nothing_of_that_name")


# -- numbers ---------------------------------------------------------------------------------------------------------

def test_bfloat16_models_train_on_float32_masters(policy: MakePolicy) -> None:
    """Steps far below bfloat16's spacing add up, and refreshing the live weights 200 times changes nothing."""
    made = policy("bfloat16")
    made.config = OptimConfig(kind="sgd", lr=1e-6, clip=None)
    made.add_w(2, 4.0)
    made.optimiser("theta")
    start = {n: t.detach().clone() for n, t in made.groups["theta"].full.items()}
    assert all(t.dtype == torch.float32 for t in made.groups["theta"].flat().values())
    ones = {n: torch.ones_like(t) for n, t in start.items()}
    for _ in range(200):
        made.apply("theta", ones)
        with made.at() as model:
            assert next(model.parameters()).dtype == torch.bfloat16
    for name, t in made.groups["theta"].full.items():
        wanted = start[name]
        for _ in range(200):
            wanted = wanted - 1e-6
        assert off(t, wanted) < 1e-7
        assert off(t, start[name]) > 1.9e-4
        assert torch.equal(made.params[name].data, t.detach().to(torch.bfloat16)), "one rounding from the master"


@pytest.mark.parametrize("moved", [False, True])
def test_a_point_takes_the_place_of_the_live_weights(policy: MakePolicy, moved: bool) -> None:
    """No second copy of the model is in memory, and what comes back is the live model, under its old number."""
    made = policy("bfloat16")
    made.add_w(2, 4.0)
    made.fork("shadow")
    shake(made, "shadow", "w")
    with made.origin() as origin:
        before, wanted = origin.version, {n: p.data.clone() for n, p in made.params.items()}
    live = [weakref.ref(p.data.untyped_storage()) for p in made.params.values()]
    assert all(storage() for storage in live)
    if moved:
        shake(made, "theta")
    with made.at("shadow") as model:
        assert not any(storage() for storage in live)
        shadow = made.weights("shadow")
        assert all(torch.equal(p.data, shadow[n]) for n, p in model.named_parameters())
        with made.at("live"):
            assert all(torch.equal(p.data, shadow[n]) for n, p in model.named_parameters())
        with made.at("theta"):
            pass
        assert all(torch.equal(p.data, shadow[n]) for n, p in model.named_parameters()), "a block within a block"
    with made.origin() as origin:
        assert (origin.version == before) != moved
        wanted = made.weights() if moved else wanted
        assert all(torch.equal(p.data, wanted[n]) for n, p in made.params.items())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chunk", [29 * 7, 1])
def test_saving_memory_does_not_change_gradients(policy: MakePolicy, checkpointing: bool, chunk: int,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(demos())
    plain = policy().grad(terms, batch, {"nll": 1.0}, entropy=True)
    monkeypatch.setattr(forward, "CHUNK", chunk)
    made = policy(checkpointing=checkpointing)
    found = made.grad(terms, batch, {"nll": 1.0}, entropy=True)
    assert found.losses["nll"] == pytest.approx(plain.losses["nll"], rel=1e-12)
    for key, g in plain.theta.items():
        assert off(found.theta[key], g) < 1e-12
    assert all(np.allclose(found.logps[i], plain.logps[i], atol=1e-12) for i in plain.logps)


def test_log_probs_and_entropy_are_those_of_the_model(policy: MakePolicy) -> None:
    for kind in ("qwen2", "llama", "mistral"):
        made, rows = policy(kind=kind), demos(5)
        micro = batching.collate(rows, torch.float64, torch.device("cpu"), {})
        micro.temperature_B[:] = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.7], dtype=torch.float64)
        live = forward.forward(made.model, micro, entropy=True)
        assert live.entropy_BT is not None
        for b, row in enumerate(rows):
            with torch.no_grad():
                whole = made.model(input_ids=torch.tensor(row.ids)[None]).logits[0] / micro.temperature_B[b]
            table = torch.log_softmax(whole, -1)
            for t in range(micro.ids_BT.shape[1]):
                mine = t < len(row.ids) and row.own[t]
                wanted = float(table[t - 1, row.ids[t]]) if mine else 0.0
                assert float(live.logp_BT[b, t].detach()) == pytest.approx(wanted, abs=1e-12)
                entropy = -float((table[t - 1].exp() * table[t - 1]).sum()) if mine else 0.0
                assert float(live.entropy_BT[b, t].detach()) == pytest.approx(entropy, abs=1e-12)


def test_score_is_grad_without_the_gradient(policy: MakePolicy) -> None:
    made, rows = policy(), demos()
    found = made.grad(terms, make_batch(rows), {"nll": 1.0})
    for i, logp in enumerate(made.score(rows)):
        np.testing.assert_allclose(logp, found.logps[i], atol=1e-12)
    assert made.ledger.score == made.ledger.train == sum(len(row.ids) for row in rows)


def test_entropies_come_with_the_scores_in_one_pass(policy: MakePolicy) -> None:
    made, rows = policy(), demos()
    logps, entropies = made.score_and_entropy(rows)
    assert made.ledger.score == sum(len(row.ids) for row in rows)
    for row, logp, entropy, alone in zip(rows, logps, entropies, made.score(rows)):
        np.testing.assert_array_equal(logp, alone)
        with torch.no_grad(), made.at("live") as model:
            logits = model(torch.from_numpy(row.ids)[None]).logits[0, :-1].double() / row.temperature
        p = torch.softmax(logits, -1).numpy()
        wanted = np.concatenate([[0.0], -(p * np.log(p)).sum(-1)])
        np.testing.assert_allclose(entropy[row.own], wanted[row.own], atol=1e-10)
        assert not entropy[~row.own].any()


def naive_mean_of_means(made: Policy, rows: list[Row]) -> float:
    """The mutant: each micro-batch a mean of its own."""
    micros = batching.plan(rows, made.micro_tokens, set(), False)
    means = []
    for indices in micros:
        micro = batching.collate([rows[i] for i in indices], torch.float64, torch.device("cpu"), {})
        with torch.no_grad():
            means.append(float((terms(micro, forward.forward(made.model, micro))["nll"] * micro.scale["nll"]).sum()
                               / micro.scale["nll"].sum()))
    return float(np.mean(means))


def test_the_sft_loss_is_sum_over_sum_for_any_split(policy: MakePolicy) -> None:
    made, rows = policy(), demos(12)
    logps = made.score(rows)
    wanted = -sum(logp.sum() for logp in logps) / sum(row.own.sum() for row in rows)
    mutants = []
    for tokens in (1, 20, 40, 70, 10**6):
        made.micro_tokens = tokens
        assert made.grad(terms, make_batch(rows), {"nll": 1.0}).losses["nll"] == pytest.approx(wanted, rel=1e-12)
        mutants.append(naive_mean_of_means(made, rows))
    assert mutants[-1] == pytest.approx(wanted), "one micro-batch: nothing to get wrong"
    assert all(abs(m - wanted) > 1e-3 for m in mutants[:-1]), "the mutant is told apart"


def test_micro_batches_never_mix_kinds(policy: MakePolicy) -> None:
    made, kinds = policy(micro_tokens=10**6), []
    rows = [row for pair in zip(demos(4), demos(4, 1, "rollout"), strict=True) for row in pair]

    def spy(micro: Micro, live: Live) -> dict[str, Tensor]:
        kinds.append(len(micro.ids_BT))
        return terms(micro, live)
    made.grad(spy, make_batch(rows), {"nll": 1.0})
    assert kinds == [4, 4]


# -- steps -----------------------------------------------------------------------------------------------------------

def test_clip_and_norm(policy: MakePolicy) -> None:
    made = policy(kind="qwen2")
    made.config = OptimConfig(kind="sgd", lr=0.5, clip=1.0)
    made.optimiser("theta")
    start = {n: t.detach().clone() for n, t in made.groups["theta"].full.items()}
    for factor, size in ((1.0, 4.0), (0.5, 0.25)):
        gradient = {n: torch.zeros_like(t) for n, t in start.items()}
        first = next(iter(gradient))
        gradient[first].view(-1)[:4] = size / 2
        made.factor = factor
        assert made.apply("theta", gradient) == pytest.approx(size)
        moved = grads.norm({n: t.detach() - start[n] for n, t in made.groups["theta"].full.items()})
        assert moved == pytest.approx(0.5 * factor * min(size, 1.0), rel=1e-5)
        assert made.optimisers["theta"].moved == pytest.approx(moved, rel=1e-5)
        start = {n: t.detach().clone() for n, t in made.groups["theta"].full.items()}


def test_adams_step_and_its_norm(policy: MakePolicy) -> None:
    """Against torch's own AdamW on plain copies, rate schedule and weight decay included."""
    made = policy(weight_decay=0.1, clip=None)
    made.optimiser("theta")
    copies = {n: t.detach().clone().requires_grad_() for n, t in made.groups["theta"].full.items()}
    theirs = torch.optim.AdamW(copies.values(), lr=1e-2, eps=1e-3, weight_decay=0.1)
    for step in range(4):
        made.factor = 1.0 - 0.2 * step
        theirs.param_groups[0]["lr"] = 1e-2 * made.factor
        gradient = made.grad(terms, make_batch(demos(seed=step)), {"nll": 1.0}).theta
        before = {n: t.detach().clone() for n, t in made.groups["theta"].full.items()}
        made.apply("theta", gradient)
        for n, t in copies.items():
            t.grad = gradient[n]
        theirs.step()
        assert all(torch.equal(t, copies[n]) for n, t in made.groups["theta"].full.items())
        decay = 1 - 1e-2 * made.factor * 0.1
        moved = grads.norm({n: t.detach() - decay * before[n] for n, t in made.groups["theta"].full.items()})
        assert made.optimisers["theta"].moved == pytest.approx(moved, rel=1e-6)


def test_the_shadow_steps_in_thetas_metric(policy: MakePolicy) -> None:
    made = policy(clip=None)
    made.fork("shadow")
    made.optimiser("theta")
    made.optimiser("shadow", kind="shared_moments", moments_of="theta")
    for step in range(3):  # equal gradients move both alike; the shadow reads theta's moments after its step
        gradient = made.grad(terms, make_batch(demos(seed=step)), {"nll": 1.0}).theta
        made.apply("theta", gradient)
        made.apply("shadow", gradient, beside=gradient)
    for name, t in made.groups["theta"].full.items():
        assert off(t, made.groups["shadow"].full[name]) < 1e-12
    g = made.grad(terms, make_batch(demos()), {"nll": 1.0}).theta
    assert made.dot(g, g) == pytest.approx(grads.norm(g) ** 2)
    assert made.dot(g, g, "theta") == pytest.approx(made.dot(g, g, "shadow"))


def test_a_loss_that_is_not_finite_stops_before_the_step(policy: MakePolicy) -> None:
    made = policy()
    made.optimiser("theta")
    before = {n: t.clone() for n, t in made.tensors().items()}
    with pytest.raises(FloatingPointError, match="stopped before the step"):
        made.grad(lambda m, x: {"nll": x.logp_BT * float("inf")}, make_batch(demos()), {"nll": 1.0})
    assert all(torch.equal(t, before[n]) for n, t in made.tensors().items())


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_names_its_row(policy: MakePolicy, bad: float) -> None:
    """The loss is finite, and one row of a micro-batch of several has a backward pass that is not."""
    made = policy(micro_tokens=1000)
    made.optimiser("theta")
    rows = [replace(row, problem=replace(PROBLEM, id=f"p{i}")) for i, row in enumerate(demos())]
    before = {n: t.clone() for n, t in made.tensors().items()}

    def spoilt(micro: Micro, live: Live) -> dict[str, Tensor]:
        logp_BT = live.logp_BT
        for b, ids in enumerate(micro.ids_BT):
            if torch.equal(ids[:len(rows[3].ids)], torch.from_numpy(rows[3].ids)):
                logp_BT.register_hook(lambda g, b=b: g.index_fill(0, torch.tensor([b]), bad))
        return {"nll": nll(logp_BT, micro.weight["nll"])}

    with pytest.raises(FloatingPointError, match=r"of 'p3' \(demo\) is not finite"):
        made.grad(spoilt, make_batch(rows), {"nll": 1.0})
    assert all(torch.equal(t, before[n]) for n, t in made.tensors().items())


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_no_optimiser_takes_a_step_that_is_not_finite(policy: MakePolicy, bad: float) -> None:
    """Whatever a method has made of finite gradients."""
    made = policy()
    made.optimiser("theta")
    before = {n: t.clone() for n, t in made.tensors().items()}
    gradient = made.grad(terms, make_batch(demos()), {"nll": 1.0}).theta
    next(iter(gradient.values())).view(-1)[3] = bad
    with pytest.raises(FloatingPointError, match="gradient of theta is not finite"):
        made.apply("theta", gradient)
    assert all(torch.equal(t, before[n]) for n, t in made.tensors().items())


@pytest.mark.parametrize("lora", [None, (2, 4.0, "")])
@pytest.mark.parametrize("exclusive", [False, True])
def test_state_goes_through_tensors_and_back(policy: MakePolicy, lora: Any, exclusive: bool) -> None:
    def build() -> Policy:
        made = policy(lora=lora)
        made.fork("reference")
        made.add_w(2, 4.0, "mlp" if exclusive else "", exclusive)
        made.fork("shadow")
        made.optimiser("theta")
        made.optimiser("shadow", kind="shared_moments", moments_of="theta")
        made.optimiser("w", lr=3e-3)
        return made

    def step(made: Policy, seed: int) -> None:
        found = made.grad(terms, make_batch(demos(seed=seed)), {"nll": 1.0})
        made.apply("theta", found.theta)
        shadow = made.grad(terms, make_batch(demos(seed=seed + 50)), {"nll": 1.0}, at="shadow")
        made.apply("shadow", shadow.theta, beside=found.theta)
        made.apply("w", found.w)
    one, two = build(), build()
    for seed in range(2):
        step(one, seed)
    two.load({n: t.clone() for n, t in one.tensors().items()})
    for seed in range(2, 4):
        step(one, seed)
        step(two, seed)
    mine, theirs = one.tensors(), two.tensors()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[n]) for n, t in mine.items())
    assert all(torch.equal(logits(one, at), logits(two, at)) for at in ("live", "shadow", "reference"))


def test_origins_of_equal_weights_have_equal_versions(policy: MakePolicy) -> None:
    made = policy()
    made.fork("shadow")
    made.optimiser("theta")
    made.optimiser("shadow")

    def version(at: str = "live") -> Any:
        with made.origin(at) as origin:
            return origin.version
    batch = make_batch(demos())
    first = version()
    assert first == version() is not None
    assert version("shadow") is None
    made.apply("shadow", made.grad(terms, batch, {"nll": 1.0}, at="shadow").theta)
    assert version() == first, "no step of the live weights"
    made.apply("theta", made.grad(terms, batch, {"nll": 1.0}).theta)
    assert version() != first


def test_an_origin_is_one_adapter_of_the_summed_rank(policy: MakePolicy) -> None:
    made = policy(lora=(2, 4.0, "q_proj|down_proj"))
    made.add_w(3, 9.0, "q_proj|o_proj")
    made.fork("shadow")
    shake(made, "theta", "w", "shadow")
    for at in ("live", "shadow"):
        with made.origin(at) as origin:
            assert origin.adapter is not None
            assert {a.shape[0] for a, _ in origin.adapter.values()} == {2, 3, 5}
            for name, weight in made.params.items():
                a, b = origin.adapter.get(name, (torch.zeros(0, 1), torch.zeros(1, 0)))
                assert off(weight, made.frozen[name] + b @ a) < 1e-12, name
    made.absorb()  # now the base is no more the one that was read from the folder
    with made.origin() as origin:
        assert origin.adapter is None
    with policy().origin() as origin:
        assert origin.adapter is None
