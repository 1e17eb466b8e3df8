"""Tensors that lie in host memory or in bfloat16: what they are stepped to, and that small steps add up."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bridgelm.config.run_config import OptimConfig, make_config
from bridgelm.errors import UserError
from bridgelm.model import grads, optim, storage
from bridgelm.model.loading import load_model
from bridgelm.model.placement import Form, Placement
from bridgelm.training import loop
from contract.variants import METHOD, VARIANTS
from pretend import PretendGpu

Session = Callable[..., Any]
HOST = ["shadow", "moments", "gradients"]
NARROW = {"dtype": "bfloat16"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("value", [1.0009765625, -1.0009765625, 0.0203, -3.3e-7, 123456.7])
def test_rounding_is_right_in_the_mean(value: float) -> None:
    n = 40_000
    found = storage.rounded(torch.full((n // 200, 200), value), "x", storage.Noise(0)).double()
    low, high = found.min(), found.max()
    assert len(found.unique()) == 2
    assert torch.equal(torch.nextafter(low.bfloat16(), high.bfloat16()), high.bfloat16())
    error = float(high - low) / 2 / n**0.5  # of the mean, at most
    assert abs(float(found.mean()) - torch.tensor(value).double().item()) < 4 * error


def test_what_bfloat16_has_is_kept() -> None:
    exact = torch.randn(1000, generator=generator()).bfloat16()
    assert torch.equal(storage.rounded(exact.float(), "x", storage.Noise(0)), exact)


def draws(shape: tuple[int, ...], noise: storage.Noise) -> np.ndarray:
    """The sixteen bits that decide, of each element, from -1 to 1."""
    rows, columns = noise.words("x", torch.empty(shape))
    return (storage.mixed(rows + columns).numpy() & 0xFFFF) / 2**15 - 1 + 2**-16


def test_rounding_draws_evenly_and_each_element_alone() -> None:
    """Moments of a uniform draw; no correlation with a neighbour, another distance, or the same place next time."""
    noise = storage.Noise(7)
    first, second = draws((400, 500), noise), draws((400, 500), noise)
    error = first.size**-0.5
    assert abs(first.mean()) < 4 * error / 3**0.5
    assert abs((first**2).mean() - 1 / 3) < 4 * error * (4 / 45) ** 0.5
    others = {"next time": (first, second), "rows": (first[1:], first[:-1]), "columns": (first[:, 1:], first[:, :-1]),
              "diagonal": (first[1:, 1:], first[:-1, :-1]), "64 on": (first[:, 64:], first[:, :-64]),
              "256 on": (first[256:], first[:-256])}
    for what, (a, b) in others.items():
        assert abs((a * b).mean()) < 4 * a.size**-0.5 / 3, what
    pairs = (first[0::2, 0::2] * first[1::2, 0::2] * first[0::2, 1::2] * first[1::2, 1::2]).mean()
    assert abs(pairs) < 4 * (first.size / 4) ** -0.5 / 9  # of four in a square, whose words are made of two and two
    counts = np.histogram(first, 256, (-1, 1))[0]
    assert abs(((counts - counts.mean()) ** 2 / counts.mean()).sum() - 255) < 4 * (2 * 255) ** 0.5


@pytest.mark.parametrize("shape", [(7, 5), (7,), (7, 2, 3)])
def test_parts_are_rounded_as_the_whole_is(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """By three ranks, in pieces of any size."""
    t = torch.randn(shape, generator=generator())
    whole = [storage.rounded(t, "x", noise) for noise in [storage.Noise(3)] for _ in range(2)]
    assert not torch.equal(*whole), "other draws the second time"
    monkeypatch.setattr(storage, "PIECE", 8)
    for k, wanted in enumerate(whole):
        found = [storage.rounded(t[a:b], "x", storage.Noise(3, {"x": a}.__getitem__, k))
                 for a, b in ((0, 3), (3, 6), (6, 7), (7, 7))]
        assert torch.equal(torch.cat(found), wanted)


def test_a_shadow_in_bfloat16_follows_steps_far_below_its_spacing() -> None:
    """A step is a hundredth of the spacing: rounded to the nearest nothing would ever move."""
    config = OptimConfig(lr=1e-4, eps=1e-12)
    wide, narrow, source = (torch.full((64, 64), 1.5, requires_grad=True) for _ in range(3))
    adam = optim.build("adamw", [source], config, config.lr)
    steps = 200
    shared = [optim.build("shared_moments", [p], config, config.lr, adam) for p in (wide, narrow)]
    narrow.data = narrow.data.bfloat16()
    form, noise = Form(torch.bfloat16), storage.Noise(0)
    placement = Placement(form, form)
    for k in range(steps):
        g = torch.randn(64, 64, generator=generator(k)) * 0.1 + 1
        source.grad, wide.grad = g.clone(), g.clone()
        shared[0].beside, shared[1].beside = {wide: g}, {narrow: g}  # type: ignore[attr-defined]
        adam.step()
        shared[0].step()
        placement.step(shared[1], {"x": narrow}, {"x": g.clone()}, noise)
    assert narrow.dtype == shared[1].state[narrow]["exp_avg"].dtype == torch.bfloat16
    way = float(1.5 - wide.detach().mean())
    assert way == pytest.approx(steps * config.lr, rel=0.1)
    assert config.lr < 0.02 * 2**-7
    assert float(1.5 - narrow.detach().float().mean()) == pytest.approx(way, rel=0.05)


def test_a_loaded_state_is_rounded_as_the_one_that_was_saved() -> None:
    """A checkpoint lists what an optimizer keeps in another order; each entry still draws its own random numbers."""
    config, gradients = OptimConfig(lr=1e-2), torch.randn(3, 8, 64, generator=generator())
    form, ends = Form(torch.bfloat16), []
    for reload in (False, True):
        p, source = (torch.ones(8, 64).requires_grad_() for _ in range(2))
        adam = optim.build("adamw", [source], config, config.lr)
        shared: Any = optim.build("shared_moments", [p], config, config.lr, adam)
        noise = storage.Noise(0)
        for g in gradients:
            source.grad = g / 2
            adam.step()
            shared.beside = {p: g / 2}
            Placement(form, form).step(shared, {"x": p}, {"x": g.clone()}, noise)
            saved = optim.tensors(shared, ["x"])
            if reload:
                shared.state.clear()
                optim.load_tensors(shared, ["x"], dict(sorted(saved.items())), torch.device("cpu"))
        ends.append([p.detach(), shared.state[p]["exp_avg"], shared.state[p]["excess"]])
    assert all(map(torch.equal, *ends))
    assert ends[0][2].any()


def moved(session: Session, method: dict[str, Any], steps: int = 3, **sections: Any) -> dict[str, Tensor]:
    made = session(method, **sections)
    for _ in range(steps):
        loop.take_step(made)
    return {name: t.clone() for name, t in made.policy.tensors().items()}


@pytest.mark.parametrize("name", ["bridge", "grpo"])
def test_host_memory_changes_no_bit_of_plain_descent(name: str, session: Session) -> None:
    options = {"kind": "sgd", "lr": 0.01}
    plain, hosted = (moved(session, METHOD[name], optim={**options, "host": host}) for host in ([], HOST))
    assert plain.keys() <= hosted.keys()
    assert all(torch.equal(hosted[name], t) for name, t in plain.items())


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, raw: Callable[..., dict[str, Any]]) -> PretendGpu:
    """For runs in bfloat16, whose model is loaded before."""
    model = load_model(make_config(raw(model=NARROW)).model)
    monkeypatch.setattr(loop, "load_model", lambda config: copy.deepcopy(model))
    monkeypatch.setattr(loop, "_accelerator", lambda device: None)
    return PretendGpu()


@pytest.mark.parametrize(("name", "optim"), [
    ("stages", {"host": [*HOST, "masters"]}), ("bridge_leaky", {"host": ["shadow"], "shadow": "bfloat16"}),
    ("bridge_dial", {"host": ["moments", "gradients"]}), ("bridge_dial", {"host": ["shadow", "masters"]}),
    ("token_lead", {"host": ["masters"]})])
def test_what_lies_on_the_host_is_used_on_the_device(name: str, optim: dict[str, Any], session: Session,
                                                     pretend: PretendGpu) -> None:
    """And no bit of a run depends on it: stages, leaks, a look ahead, checkpoints, what is deployed."""
    wanted = ends(session, name, {**optim, "host": []})
    with pretend:
        found = ends(session, name, optim)
        lies = {part: {t.device.type for n, t in found.items() if n.startswith(part) and t.dim()} for part in PARTS}
    assert all(torch.equal(found[n], t) for n, t in wanted.items())
    for part, key in PARTS.items():
        assert lies[part] <= {"cpu" if key in optim["host"] else "cuda"}, part
    assert lies["group/theta/"]


EXCLUSIVE = VARIANTS["bridge exclusive"]
STAGES = {"name": "sequence", "stages": [{"method": METHOD["bridge"], "steps": 1}, {"method": EXCLUSIVE, "steps": 1},
                                         {"method": {"name": "joint", "rl": {"kl_coef": 0.1}}}]}
PARTS = {"group/theta/": "masters", "group/shadow/": "shadow", "optim/shadow/": "shadow", "optim/theta/": "moments",
         "group/w/": "", "group/reference/": "", "group/lead/": ""}


def ends(session: Session, name: str, optim: dict[str, Any]) -> dict[str, Tensor]:
    made = session(STAGES if name == "stages" else VARIANTS[name], model=NARROW, optim={"lr": 0.01, **optim})
    for _ in range(4):
        loop.take_step(made)
        made.policy.load({n: t.cpu() for n, t in made.policy.tensors().items()})
    made.method.deploy(made.policy, lambda: 0.0)
    return {n: t.detach() for n, t in made.policy.tensors().items()} | made.policy.weights()


def test_what_was_moved_is_measured_alike(session: Session) -> None:
    norms = []
    for host in ([], HOST):
        made = session({"name": "bridge", "rank": 2}, optim={"lr": 0.01, "host": host})
        metrics = [loop.take_step(made) for _ in range(2)][-1]
        norms.append({name: made.policy.optimisers[name].moved for name in ("theta", "shadow", "w")})
        assert metrics is None or metrics
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    assert min(norms[0].values()) > 0


def test_a_shadow_in_bfloat16_is_near_one_in_float32(session: Session) -> None:
    """And it is half as large: weights and momentum."""
    found = {kind: moved(session, {"name": "bridge", "rank": 2}, 1, model={"dtype": "float32"},
                         optim={"lr": 0.01, "shadow": kind}) for kind in ("float32", "bfloat16")}
    shadow = {kind: {n: t for n, t in tensors.items() if n.startswith(("group/shadow/", "optim/shadow/"))
                     and not n.endswith("step")} for kind, tensors in found.items()}
    assert len(shadow["bfloat16"]) > 20
    assert {t.dtype for t in shadow["bfloat16"].values()} == {torch.bfloat16}
    for part, share in (("group/", 2**-6), ("optim/", 2**-4)):  # a gradient at rounded weights is another one
        pairs = [(shadow["bfloat16"][n].float(), t) for n, t in shadow["float32"].items() if n.startswith(part)]
        off = sum(float((a - b).norm()) ** 2 for a, b in pairs) ** 0.5
        assert 0 < off < share * sum(float(b.norm()) ** 2 for _, b in pairs) ** 0.5


def test_blend_is_mix_and_uses_both_up() -> None:
    a, b = ({n: torch.randn(3, generator=generator(i)) for n in "xy"} for i in range(2))
    wanted, memory = grads.mix((0.3, a), (0.7, b)), {n: t.data_ptr() for n, t in a.items()}
    found = grads.blend((0.3, a), (0.7, b))
    assert all(torch.equal(found[n], wanted[n]) and found[n].data_ptr() == memory[n] for n in wanted)
    assert not a
    assert not b


def test_eight_bits_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"needs bitsandbytes: pip install"):
        optim.build("adamw8bit", [torch.zeros(2, requires_grad=True)], OptimConfig(), 1e-3)


def test_what_does_not_go_together(raw: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="has no float64"):
        make_config(raw("bridge", model={"dtype": "float64"}, optim={"kind": "adamw8bit"}))
    with pytest.raises(UserError, match=r"'masters' are the weights themselves unless model.dtype = 'bfloat16'"):
        make_config(raw("bridge", model={"dtype": "float32"}, optim={"host": ["masters"]}))
    make_config(raw("bridge", model={"dtype": "float32"}, optim={"host": ["masters"]}, shard=True))
