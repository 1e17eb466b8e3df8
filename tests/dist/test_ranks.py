"""A run on several ranks is the run of one process, to rounding."""

from __future__ import annotations

import json
import math
import os
import signal
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from bridgelm.model import batching, loading, offload, policy, storage
from bridgelm.training import checkpoint, loop
from bridgelm import dist
from bridgelm.runs import folder as metrics
from bridgelm.planning import needs
from bridgelm.config.run_config import make_config
from bridgelm.model.policy import Policy
from bridgelm.types import Problem, Row

from contract.variants import VARIANTS, sections
from .ranks import on_ranks

Make = Callable[..., dict[str, Any]]
QUICK = ["bridge", "sft", "grpo with a reference", "prefix_rft", "kdrl"]
SHARDED = [("bridge", 3), ("bridge, low-rank theta", 2), ("gift", 2)]  # 3: no weight has rows that it divides


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(metrics, "git_commit", lambda: None)


@pytest.fixture(autouse=True)
def _exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's norms compute in float32, where the last bit of a sum over ranks can become a millionth."""
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight

    for norm in (Qwen2RMSNorm, LlamaRMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


def config_of(raw: Make, name: str, folder: Path, **changes: Any) -> Any:
    model, data = raw()["model"], raw()["data"]
    own = sections(name)
    own = {**own, "model": {**model, **own.get("model", {})}, "data": data}
    for key, value in changes.items():
        own[key] = {**own.get(key, {}), **value} if isinstance(value, dict) else value
    return make_config(raw(VARIANTS[name], folder=folder, **own))


def fingerprint(trained: Policy) -> int:
    """Of all weights and optimiser states, to the bit."""
    return zlib.crc32(b"".join(t.detach().double().numpy().tobytes() for _, t in sorted(trained.tensors().items())))


def standing_bytes(trained: Policy) -> int:
    """Live weights, masters, copies and optimiser states."""
    states = [t for key, t in trained.tensors().items() if t.ndim and not key.startswith("frozen/")]
    return sum(t.numel() * t.element_size() for t in [*trained.live.sharding.local().values(), *trained.frozen.values(), *states])


def run_on(count: int, config: Any, folder: Path) -> list[Any]:
    """Trains; every rank says what it ends with."""
    said: dict[str, Any] = {}
    finish = loop.finish_run

    def noted(session: loop.Session) -> None:
        said.update(weights=fingerprint(session.policy), bytes=standing_bytes(session.policy), data=session.data.state(), ledger=session.policy.ledger.state(),
                    method=zlib.crc32(json.dumps(session.method.state(), default=str).encode()))
        said["ledger"].pop("seconds")
        finish(session)

    def work() -> Any:
        loop.finish_run = noted
        loop.train(config, quiet=True)
        return {**said, "meetings": dist._State.meetings}

    return on_ranks(count, work, folder)


def assert_same_run(found: Path, wanted: Path, tolerance: float = 1e-9) -> None:
    for a, b in zip(events(found), events(wanted), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert close(a[key], b[key], tolerance), (key, a[key], b[key])
    states = [checkpoint.read_state(checkpoint.newest(run)) for run in (found, wanted)]  # type: ignore[arg-type]
    one, two = (checkpoint.SavedTensors(checkpoint.newest(run), state.pop("parts", {}))  # type: ignore[arg-type]
                for run, state in zip((found, wanted), states, strict=True))
    assert one.keys() == two.keys()
    for name in one:
        if one[name].dtype == torch.uint8:  # codes: the next one is another number
            assert float((one[name] != two[name]).double().mean()) <= 50 * tolerance, name
        else:
            assert np.allclose(one[name].double(), two[name].double(), rtol=tolerance, atol=tolerance), name
    for state in states:
        state["ledger"].pop("seconds")
        state["best"].pop("weights")  # a checksum of what is equal up to rounding
    for key in states[0]:
        assert close(states[0][key], states[1][key], tolerance), key


def events(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in json.loads(line).items() if k != "seconds" and not k.startswith("time/")}
            for line in (run / "metrics.jsonl").read_text().splitlines()]


def close(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k], tolerance) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(close(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) or isinstance(b, float):
        return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
    return a == b


def same_trajectory(raw: Make, name: str, count: int, tmp_path: Path, shard: bool = False, tolerance: float = 1e-9,
                    there: dict[str, Any] | None = None, **changes: Any) -> list[int]:
    """Gives the bytes that stand on each rank. `there`: changes on the ranks alone."""
    whole = config_of(raw, name, tmp_path / "whole", **changes)
    parted = config_of(raw, name, tmp_path / "parted", shard=shard, **{**changes, **(there or {})})
    loop.train(whole, quiet=True)
    said = run_on(count, parted, tmp_path / "said")
    assert "meetings" in said[0], said
    standing = [one.pop("bytes") for one in said]
    if shard:
        assert len({one.pop("weights") for one in said}) == count, "each rank has a part of its own"
    assert all(one == said[0] for one in said), said
    assert_same_run(tmp_path / "parted/runs/run", tmp_path / "whole/runs/run", tolerance)
    return standing


@pytest.mark.parametrize("name", QUICK)
def test_two_ranks_are_one_process(name: str, raw: Make, tmp_path: Path) -> None:
    same_trajectory(raw, name, 2, tmp_path)


@pytest.mark.parametrize(("name", "count"), SHARDED)
def test_parts_are_one_process(name: str, count: int, raw: Make, tmp_path: Path) -> None:
    """And the first rank, whose parts are the largest, holds as many bytes as are planned for."""
    held = same_trajectory(raw, name, count, tmp_path, shard=True)
    assert held[0] == max(held)
    assert held[0] == needs.memory(config_of(raw, name, tmp_path / "plan", shard=True), count).standing


ELSEWHERE: dict[str, Any] = {"shadow": "bfloat16", "host": ["shadow", "moments", "gradients"]}


def test_parts_that_lie_elsewhere_are_one_process(raw: Make, tmp_path: Path) -> None:
    """Each rank rounds its rows as one process does."""
    there = {"optim": {**ELSEWHERE, "host": [*ELSEWHERE["host"], "masters"]}}
    held = same_trajectory(raw, "bridge", 3, tmp_path, shard=True, there=there, optim=ELSEWHERE)
    need = needs.memory(config_of(raw, "bridge", tmp_path / "plan", shard=True, **there), 3)
    assert held[0] == need.standing + sum(size for part, size in need.parts.items() if part.startswith("host/"))


@pytest.mark.parametrize("shard", [False, True])
def test_a_rank_with_nothing_to_train(shard: bool, raw: Make, tmp_path: Path) -> None:
    """One demonstration, two ranks; and one problem to answer."""
    same_trajectory(raw, "joint", 2, tmp_path, shard, batch={"demos": 1, "micro_tokens": 4096},
                    rollout={"prompts": 1, "group": 2})


@pytest.mark.parametrize(("name", "counts", "shard"), [("bridge", (2, 1), (False, False)),
                                                       ("bridge, low-rank theta", (2, 3), (True, True))])
def test_a_checkpoint_of_two_ranks_resumes_on_others(name: str, counts: tuple[int, int], shard: tuple[bool, bool],
                                                     raw: Make, tmp_path: Path) -> None:
    stop_and_go_on(raw, name, counts, tmp_path, shard)


def stop_and_go_on(raw: Make, name: str, counts: tuple[int, int], tmp_path: Path,
                   shard: tuple[bool, bool] = (False, False), tolerance: float = 1e-9, **changes: Any) -> None:
    """A signal to the last rank alone stops all of them after the same step. `shard`: before and after the stop."""
    whole, parted = (config_of(raw, name, tmp_path / kind, **changes) for kind in ("whole", "parted"))
    parted = parted.model_copy(update={"shard": shard[0]})
    loop.train(whole, quiet=True)
    run = tmp_path / "parted/runs/run"
    take_step = loop.take_step

    def signalled(session: loop.Session) -> Any:
        if session.step == 1 and dist.rank() == dist.world() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(session)

    def first() -> Any:
        loop.take_step = signalled
        loop.train(parted, quiet=True)

    assert on_ranks(counts[0], first, tmp_path / "first") == [{"stopped": str(run)}] * counts[0]
    saved = checkpoint.newest(run)
    assert saved is not None
    assert saved.name == "step-000002"
    assert len(list(saved.glob("*.safetensors"))) == (counts[0] if shard[0] and counts[0] > 1 else 1)
    metrics.write_json(run / "config.json", {**(metrics.read_json(run / "config.json") or {}), "shard": shard[1]})
    assert on_ranks(counts[1], lambda: loop.resume(run, True, ["config"]).status, tmp_path / "then") \
        == ["finished"] * counts[1]
    assert_same_run(run, tmp_path / "whole/runs/run", tolerance)


@pytest.mark.parametrize("shard", [False, True])
def test_damage_and_changes_are_seen_on_all_ranks(shard: bool, raw: Make, tmp_path: Path) -> None:
    """The last rank's part is damaged: all of them go on from the older checkpoint, or none goes on."""
    config = config_of(raw, "sft", tmp_path / "run", shard=shard, checkpoint_every=1)
    run, take_step = tmp_path / "run/runs/run", loop.take_step

    def stopped() -> Any:
        def step(session: loop.Session) -> Any:
            session.stop = session.step == 2
            return take_step(session)
        loop.take_step = step
        loop.train(config, quiet=True)

    def damage(folder: Path) -> Path:
        path = sorted(folder.glob("*.safetensors"))[-1]
        path.write_bytes(path.read_bytes()[:-8] + b"damaged.")
        return path

    def resumed(name: str, *allowed: str) -> list[Any]:
        return on_ranks(2, lambda: loop.resume(run, True, allowed).status, tmp_path / name)

    on_ranks(2, stopped, tmp_path / "first")
    newest, older = checkpoint.kept(run)
    bad = damage(newest)
    assert len(list(newest.glob("*.safetensors"))) == (2 if shard else 1)
    kept, settings = bad.read_bytes(), metrics.read_json(run / "config.json") or {}
    metrics.write_json(run / "config.json", {**settings, "seed": 7})
    errors = resumed("changed")
    assert errors[0] == errors[1]
    assert "seed was" in errors[0]["error"]
    metrics.write_json(run / "config.json", settings)
    good = (older / bad.name).read_bytes()
    damage(older)
    errors = resumed("both")
    assert errors[0] == errors[1]
    assert "no checkpoint is whole" in errors[0]["error"]
    (older / bad.name).write_bytes(good)
    assert bad.read_bytes() == kept
    assert resumed("then") == ["finished"] * 2
    (warning,) = (event for event in events(run) if event["event"] == "warning")
    assert bad.name in warning["text"]
    loop.train(config_of(raw, "sft", tmp_path / "whole"), quiet=True)
    found, wanted = (load_file(folder / "final/model.safetensors") for folder in (run, tmp_path / "whole/runs/run"))
    assert all(np.allclose(found[name].double(), wanted[name].double(), atol=1e-9) for name in wanted)


@pytest.mark.parametrize(("bad", "shard"), [(0, False), (1, True)])
def test_an_error_of_one_rank_ends_all(bad: int, shard: bool, raw: Make, tmp_path: Path) -> None:
    """A loss that is not finite in the micro-batches of one rank; the others learn of it instead of waiting."""
    config = config_of(raw, "sft", tmp_path / "run", shard=shard)
    forward = policy.forward

    def work() -> Any:
        if dist.rank() == bad:
            policy.forward = lambda *args, **more: replace(live := forward(*args, **more),
                                                           logp_BT=live.logp_BT * math.nan)
        loop.train(config, quiet=True)

    found = on_ranks(2, work, tmp_path / "said")
    assert found[0] == found[1]
    assert "step 1: the loss or the gradient of " in found[0]["error"]
    assert (metrics.read_json(tmp_path / "run/runs/run/run.json") or {})["status"] == "failed"


def test_a_crash_where_others_wait_for_parts_ends_all(raw: Make, tmp_path: Path) -> None:
    config = config_of(raw, "sft", tmp_path / "run", shard=True)
    forward, done = policy.forward, []

    def work() -> Any:
        def crash(*args: Any, **more: Any) -> Any:
            done.append(1)
            if len(done) == 3:
                raise RuntimeError("out of memory")
            return forward(*args, **more)

        if dist.rank() == 1:
            policy.forward = crash
        loop.train(config, quiet=True)

    found = on_ranks(2, work, tmp_path / "said")
    assert found[1]["crash"] == "RuntimeError: out of memory"
    assert "peer" in found[0]["crash"], "it has lost a rank"
    assert (metrics.read_json(tmp_path / "run/runs/run/run.json") or {})["status"] == "failed"


def test_a_crash_of_one_rank_ends_all(tmp_path: Path) -> None:
    def work() -> Any:
        if dist.rank() == 1:
            raise RuntimeError("out of memory")
        return dist.gather({})

    found = on_ranks(2, work, tmp_path)
    assert found == [{"crash": "PeerFailed: rank 1 failed (RuntimeError: out of memory)"},
                     {"crash": "RuntimeError: out of memory"}]


def test_ranks_at_different_collectives_say_so(tmp_path: Path) -> None:
    found = on_ranks(2, lambda: dist.agree(True) if dist.rank() else dist.wait(), tmp_path)
    assert all("different collectives" in one["crash"] for one in found)


def test_what_is_exchanged(tmp_path: Path) -> None:
    def work() -> Any:
        rank = dist.rank()
        tensors = [torch.full((2, 2), 1.0 + rank), torch.full((3,), 10.0 * (1 + rank), dtype=torch.float64)]
        dist.add(tensors)
        arrays = dist.gather({"a": np.arange(3), "empty": np.empty(0)} if rank else {"b": np.array(True)})
        return [[t.tolist() for t in tensors], {k: a.tolist() for k, a in sorted(arrays.items())},
                dist.from_first(lambda: {"rank": rank}), dist.agree(rank == 1), dist.agree(False), list(dist.share(5))]

    both = [[[[3.0, 3.0], [3.0, 3.0]], [30.0, 30.0, 30.0]], {"a": [0, 1, 2], "b": True, "empty": []}, {"rank": 0}, True,
            False]
    assert on_ranks(2, work, tmp_path) == [[*both, [0, 2, 4]], [*both, [1, 3]]]


def test_micro_batches_are_dealt_out_evenly(raw: Make, tmp_path: Path) -> None:
    rows = [Row(np.arange(n), np.arange(n) > 0, "demo", Problem("p", ())) for n in range(3, 9)]
    found = on_ranks(4, lambda: [i for i, _ in batching.micros_of_rank(rows, 10**6, set(), False)], tmp_path)
    assert sorted(i for micros in found for micro in micros for i in micro) == list(range(6))
    assert {len(micros) for micros in found} == {1}


# -- all of it: `make dist` ----------------------------------------------------------------------------------------

@pytest.mark.dist
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_method_on_ranks(name: str, count: int, raw: Make, tmp_path: Path) -> None:
    same_trajectory(raw, name, count, tmp_path)


@pytest.mark.dist
@pytest.mark.parametrize("name", VARIANTS)
def test_every_method_in_parts(name: str, raw: Make, tmp_path: Path) -> None:
    same_trajectory(raw, name, 2, tmp_path, shard=True)


@pytest.mark.dist
@pytest.mark.parametrize("name", ["bridge", "grpo", "sequence", "bridge exclusive, low-rank theta", "bridge, noise"])
def test_four_parts(name: str, raw: Make, tmp_path: Path) -> None:
    same_trajectory(raw, name, 4, tmp_path, shard=True)


@pytest.mark.dist
@pytest.mark.parametrize("counts", [(2, 1), (2, 4), (1, 2)])
@pytest.mark.parametrize("name", ["bridge", "grpo", "sequence", "sft, low-rank theta", "kdrl"])
def test_a_checkpoint_resumes_on_any_number(name: str, counts: tuple[int, int], raw: Make, tmp_path: Path) -> None:
    stop_and_go_on(raw, name, counts, tmp_path)


@pytest.mark.dist
@pytest.mark.parametrize(("counts", "shard"), [((2, 1), (True, True)), ((2, 4), (True, True)), ((2, 2), (True, False)),
                                               ((2, 2), (False, True)), ((1, 2), (True, True))])
@pytest.mark.parametrize("name", ["bridge", "sequence", "bridge exclusive, low-rank theta"])
def test_parts_resume_on_any_number(name: str, counts: tuple[int, int], shard: tuple[bool, bool], raw: Make,
                                    tmp_path: Path) -> None:
    stop_and_go_on(raw, name, counts, tmp_path, shard)


@pytest.mark.dist
@pytest.mark.parametrize(("counts", "shard"), [((2, 1), (True, True)), ((2, 4), (True, True)),
                                               ((2, 2), (True, False)), ((1, 2), (True, True))])
def test_parts_that_lie_elsewhere_resume_on_any_number(counts: tuple[int, int], shard: tuple[bool, bool], raw: Make,
                                                       tmp_path: Path) -> None:
    stop_and_go_on(raw, "bridge", counts, tmp_path, shard, optim=ELSEWHERE)


@pytest.mark.dist
@pytest.mark.parametrize("name", ["bridge_dial", "token_lead", "sequence", "bridge exclusive"])
def test_other_methods_in_parts_that_lie_elsewhere(name: str, raw: Make, tmp_path: Path) -> None:
    same_trajectory(raw, name, 4, tmp_path, shard=True, optim=ELSEWHERE)


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["gradient checkpointing", "llama"])
def test_other_models_in_parts(kind: str, raw: Make, tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    changes = {"gradient_checkpointing": True} if "gradient" in kind else {"name_or_path": str(tiny_folder(kind))}
    same_trajectory(raw, "bridge", 2, tmp_path, True, model={**raw()["model"], **changes})


@pytest.mark.dist
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_on_the_host_of_weights_in_parts(checkpointing: bool, raw: Make, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathered weights are not among them: they are gathered again for the way back."""
    models: list[Any] = []

    def place(t: Any) -> int:
        return (t.to_local() if hasattr(t, "to_local") else t).untyped_storage().data_ptr()

    def to_host(t: torch.Tensor) -> torch.Tensor:
        assert place(t) not in {place(p) for p in models[-1].parameters()}
        return t.clone()

    offloaded = offload.offload
    monkeypatch.setattr(loading, "offload", lambda model: (models.append(model), offloaded(model)))
    monkeypatch.setattr(storage, "to_host", to_host)
    monkeypatch.setattr(offload, "SMALL", 0)
    same_trajectory(raw, "bridge", 2, tmp_path, True, model={**raw()["model"], "offload_activations": True,
                                                             "gradient_checkpointing": checkpointing})


@pytest.mark.dist
@pytest.mark.parametrize("shard", [False, True])
def test_several_updates_probes_and_samples(shard: bool, raw: Make, tmp_path: Path) -> None:
    same_trajectory(raw, "bridge", 2, tmp_path, shard, rollout={"updates": 2, "refill": 1}, eval={"samples": 2},
                    diagnose={"every": 2, "problems": 4, "group": 2, "demos": 6})
