"""Adam's moments in eight bits with a real bitsandbytes (`make eightbit`, which also writes results/eightbit.json)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor

from bridgelm.config.run_config import OptimConfig
from bridgelm.model import optim
from bridgelm.planning import needs
from bridgelm.runs import folder
from bridgelm.runs.folder import git_commit, versions
from bridgelm.training import checkpoint, loop
from dist.test_ranks import same_trajectory, standing_bytes, stop_and_go_on

RESULTS = Path(__file__).parents[2] / "results" / "eightbit.json"
HOST = ["shadow", "moments", "gradients"]
SHAPES = {"a": (7, 512), "b": (5, 300), "bias": (9,), "c": (2, 256)}  # c: no rows for the last of three ranks
Session, Make = Callable[..., Any], Callable[..., dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def results() -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {"date": f"{date.today():%Y-%m-%d}", "commit": git_commit(), "command": "make eightbit",
                             "versions": versions() | {"bitsandbytes": bitsandbytes.__version__}}
    yield found
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(folder, "git_commit", lambda: None)


@pytest.fixture
def wide(tiny_folder: Callable[..., Path]) -> dict[str, Any]:
    """A model with rows of whole blocks."""
    return {"name_or_path": str(tiny_folder("wide")), "dtype": "float32"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_moments_are_read_as_the_library_reads_them() -> None:
    p = torch.randn(65, 512, generator=generator(), requires_grad=True)
    adam = optim.build("adamw8bit", [p], OptimConfig(), 1e-3)
    for k in range(3):
        p.grad = torch.randn(p.shape, generator=generator(k + 1))
        adam.step()
    state = adam.state[p]
    for which in (1, 2):
        wanted = bitsandbytes.functional.dequantize_blockwise(
            state[f"state{which}"], absmax=state[f"absmax{which}"], code=state[f"qmap{which}"], blocksize=optim.BLOCK)
        assert torch.allclose(optim.moment(state, which), wanted.float(), rtol=1e-6)


class Part:
    """The rows of all weights that one of several ranks has, and their optimiser."""

    def __init__(self, weights: dict[str, Tensor], rank: int, count: int) -> None:
        self.rows = {n: slice(rank * -(-len(t) // count), (rank + 1) * -(-len(t) // count)) for n, t in weights.items()}
        self.weights = {n: t[self.rows[n]].clone().requires_grad_() for n, t in weights.items()}
        self.adam = optim.build("adamw8bit", list(self.weights.values()), OptimConfig(weight_decay=0.01), 0.1)

    def step(self, seed: int) -> None:
        for k, (name, p) in enumerate(self.weights.items()):
            whole = torch.randn(SHAPES[name], generator=generator(100 * seed + k))
            p.grad = whole[self.rows[name]] * 10.0 ** -(seed % 3)
        self.adam.step()

    def moved(self) -> float:
        return sum(optim.square_of_step(self.adam, p) for p in self.weights.values())

    def state(self) -> dict[str, Tensor]:
        return optim.tensors(self.adam, list(self.weights))


def joined(parts: list[Part]) -> dict[str, Tensor]:
    weights = {n: torch.cat([part.weights[n].detach() for part in parts]) for n in SHAPES}
    states = [part.state() for part in parts]
    return weights | {n: torch.cat([s[n] for s in states]) if t.ndim else t for n, t in states[0].items()}


def test_parts_step_as_the_whole_and_go_on_in_other_parts() -> None:
    """To the bit: one rank, three of which the last has no rows of one weight, and four after two."""
    start = {n: torch.randn(shape, generator=generator(k)) for k, (n, shape) in enumerate(SHAPES.items())}
    whole, three, two = ([Part(start, rank, count) for rank in range(count)] for count in (1, 3, 2))
    for seed in range(4):
        for part in (*whole, *three, *(two if seed < 2 else ())):
            part.step(seed)
    wanted = joined(whole)
    assert {t.dtype for n, t in wanted.items() if n.startswith(("a|state", "c|state"))} == {torch.uint8}
    assert wanted["a|absmax1"].shape == (7, 2)
    assert wanted["b|state1"].dtype == wanted["bias|state1"].dtype == torch.float32
    assert same(joined(three), wanted)
    assert sum(part.moved() for part in three) == pytest.approx(whole[0].moved())
    kept = joined(two)
    four = [Part({n: kept[n] for n in SHAPES}, rank, 4) for rank in range(4)]
    for part in four:
        optim.load_tensors(part.adam, list(part.weights), {
            n: t[part.rows[n.partition("|")[0]]] if t.ndim else t for n, t in kept.items() if "|" in n},
                           torch.device("cpu"))
        for seed in (2, 3):
            part.step(seed)
    assert same(joined(four), wanted)


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[n], t) for n, t in wanted.items())


def moved(session: Session, wide: dict[str, Any], steps: int, **options: Any) -> dict[str, Tensor]:
    made = session({"name": "bridge", "rank": 2}, model=wide, optim={"lr": 0.01, **options})
    for _ in range(steps):
        loop.take_step(made)
    return {name: t.clone() for name, t in made.policy.tensors().items()}


def test_eight_bits_follow_the_same_way(wide: dict[str, Any], session: Session, results: dict[str, Any]) -> None:
    """And host memory changes no bit."""
    start, plain, eight = moved(session, wide, 0), moved(session, wide, 4), moved(session, wide, 4, kind="adamw8bit")
    theta = [name for name in start if name.startswith("group/theta/")]
    off = sum(float((plain[n] - eight[n]).norm()) ** 2 for n in theta) ** 0.5
    far = sum(float((plain[n] - start[n]).norm()) ** 2 for n in theta) ** 0.5
    results["way"] = {"steps": 4, "distance from AdamW, as a share of the way": off / far}
    assert 0 < off < 0.15 * far
    assert sum(t.dtype == torch.uint8 for t in eight.values()) > 20
    assert same(moved(session, wide, 4, kind="adamw8bit", host=HOST), eight)


def test_they_take_the_bytes_that_are_planned(wide: dict[str, Any], session: Session, results: dict[str, Any]) -> None:
    found = {}
    for kind in ("adamw", "adamw8bit"):
        made = session({"name": "grpo"}, model=wide | {"dtype": "bfloat16"}, optim={"kind": kind})
        loop.take_step(made)
        need = needs.memory(made.config)
        assert standing_bytes(made.policy) == need.standing
        found[kind] = need.standing / need.parameters
    results["bytes a weight that stand"] = found
    saved = found["adamw"] - found["adamw8bit"]
    assert saved == pytest.approx(8 - 2 * (1 + 4 / 256), abs=0.02)  # biases and norms keep all bits


@pytest.mark.parametrize("name", ["bridge", "sequence"])
def test_an_interrupted_run_resumes_to_the_bit(name: str, wide: dict[str, Any], raw: Make, tmp_path: Path,
                                               results: dict[str, Any]) -> None:
    stop_and_go_on(raw, name, (1, 1), tmp_path, tolerance=0.0, model=wide, optim={"kind": "adamw8bit"})
    results.setdefault("resumed to the bit", []).append(name)


@pytest.mark.parametrize("count", [2, 3])
def test_parts_are_one_process(count: int, wide: dict[str, Any], raw: Make, tmp_path: Path,
                               results: dict[str, Any]) -> None:
    changes = {"model": wide, "optim": {"kind": "adamw8bit", "host": HOST}}
    same_trajectory(raw, "bridge", count, tmp_path, shard=True, tolerance=1e-3, **changes)
    results.setdefault("parts beside one process", {})[str(count)] = difference(
        *(tmp_path / kind / "runs/run" for kind in ("parted", "whole")))


def difference(run: Path, other: Path) -> dict[str, float]:
    """Rounding of float32 sums, and what four steps of eight bits make of it."""
    folders = [checkpoint.newest(one) for one in (run, other)]
    one, two = (checkpoint.SavedTensors(f, checkpoint.read_state(f).get("parts", {})) for f in folders if f is not None)
    codes = [float((one[n] != two[n]).double().mean()) for n in one if "|state" in n and one[n].dtype == torch.uint8]
    theta = [float((one[n] - two[n]).abs().max()) for n in one if n.startswith("group/theta/")]
    return {"share of other codes": sum(codes) / len(codes), "largest difference of a weight": max(theta)}


@pytest.mark.parametrize("counts", [(2, 1), (2, 4), (2, 2)])
def test_parts_resume_on_any_number(counts: tuple[int, int], wide: dict[str, Any], raw: Make, tmp_path: Path) -> None:
    stop_and_go_on(raw, "bridge", counts, tmp_path, (True, True), 1e-3, model=wide, optim={"kind": "adamw8bit"})
