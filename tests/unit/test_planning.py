"""Plans: bytes by what they are for, against counts by hand, and what is said of a run that does not fit."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import memory

from bridgelm.cli.main import main
from bridgelm.config.run_config import ModelConfig, make_config
from bridgelm.data import model_shapes
from bridgelm.model import forward
from bridgelm.model.optim import SharedMoments, build, state_bytes
from bridgelm.planning import durations, needs, passes

PUBLISHED = {"Qwen/Qwen2.5-0.5B": 0.49, "Qwen/Qwen2.5-1.5B": 1.54, "Qwen/Qwen2.5-3B": 3.09, "Qwen/Qwen2.5-7B": 7.61,
             "Qwen/Qwen3-1.7B-Base": 1.7, "Qwen/Qwen3-4B-Base": 4.0, "Qwen/Qwen3-8B-Base": 8.2,
             "meta-llama/Llama-3.2-1B-Instruct": 1.23, "meta-llama/Llama-3.2-3B-Instruct": 3.21,
             "meta-llama/Llama-3.1-8B-Instruct": 8.03}

ROOT = Path(__file__).parents[2]
SHORT = {"max_prompt_tokens": 8, "max_demo_tokens": 4}


@pytest.fixture
def need(raw: Callable[..., dict[str, Any]]) -> Callable[..., needs.Need]:
    return lambda method, **sections: needs.memory(make_config(raw(method, **sections)))


def test_the_table_has_the_published_sizes() -> None:
    assert model_shapes.shapes().keys() == PUBLISHED.keys()
    for name, billions in PUBLISHED.items():
        model = needs.empty_model(ModelConfig.model_validate({"name_or_path": name, "dtype": "bfloat16"}))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.02), name


@pytest.mark.parametrize(("dtype", "method", "standing"), [
    ("float32", "grpo", 4 + 8),  # the weights are their own masters; Adam's two moments
    ("bfloat16", "grpo", 2 + 4 + 8),
    ("bfloat16", {"name": "grpo", "rl": {"kl_coef": 0.1}}, 2 + 4 + 8 + 4),  # a reference beside
    ("bfloat16", "barrier", 2 + 4 + 8)])
def test_bytes_a_weight(dtype: str, method: Any, standing: int, need: Callable[..., needs.Need]) -> None:
    found = need(method, model={"dtype": dtype})
    assert found.standing == standing * found.parameters


def test_a_shadow_costs_its_weights_and_a_momentum(need: Callable[..., needs.Need]) -> None:
    """And w, rank 2, on the two layers' seven matrices: (rows + columns) each, with Adam's moments."""
    found = need({"name": "bridge", "rank": 2}, model={"dtype": "bfloat16"}, data=SHORT)
    d, kv, inner = 16, 8, 32
    w = 2 * 2 * (2 * (d + d) + 2 * (d + kv) + 3 * (d + inner))
    assert found.parts["standing/w"] == 4 * w
    assert found.parts["standing/shadow"] == 4 * found.parameters
    # One number bounds 32 neighbours in a row of a matrix (no row here is longer), and each element of a vector.
    bound = (24 + 5) + 2 * (2 * d + 2 * kv + 2 * inner + d) + 5 * d + 2 * (d + 2 * kv)
    assert found.parts["standing/optimiser"] == 8 * (found.parameters + w) + 4 * (found.parameters + bound)
    assert found.parts["train/gradients kept"] == 2 * 4 * (found.parameters + w)


def test_what_lies_in_bfloat16_in_eight_bits_or_on_the_host(need: Callable[..., needs.Need]) -> None:
    """Bytes a weight beside those of the run that keeps all of it as it is used."""
    bridge, model = {"name": "bridge", "rank": 2}, {"dtype": "bfloat16"}
    def found(**optim: Any) -> needs.Need:
        return need(bridge, model=model, optim=optim, data=SHORT)
    plain = found()
    n, w = plain.parameters, plain.parts["standing/w"] // 4
    bound = (plain.parts["standing/optimiser"] - 8 * (n + w)) // 4 - n  # of the shadow's second moments
    assert plain.standing - found(shadow="bfloat16").standing == (2 + 2) * n + 2 * bound
    hosted = found(host=["shadow", "gradients"])
    assert plain.standing - hosted.standing == (4 + 4) * n + 4 * bound
    assert hosted.parts["host/shadow"] + hosted.parts["host/optimiser"] == (4 + 4) * n + 4 * bound
    assert plain.parts["train/gradients kept"] - hosted.parts["train/gradients kept"] == 4 * n
    assert plain.standing - found(host=["moments"]).standing == 8 * (n + w)
    away = found(host=["masters"])
    assert plain.standing - away.standing == away.parts["host/masters"] == 4 * n
    assert "train/another point, merged" not in plain.parts
    for name, share in (("1.5B", 1.0), ("0.5B", 24 * 896 * 4864 / 494_032_768)):  # 0.5B: rows of 896 but for one matrix
        big = {"name_or_path": f"Qwen/Qwen2.5-{name}", "dtype": "bfloat16"}
        wide, eight = (needs.memory(make_config(raw_of(kind, big))) for kind in ("adamw", "adamw8bit"))
        saved = (wide.standing - eight.standing) / wide.parameters
        assert saved == pytest.approx(share * (8 - 2 * (1 + 4 / 256)), rel=1e-3)


def raw_of(kind: str, model: dict[str, Any]) -> dict[str, Any]:
    return {"name": "x", "steps": 1, "model": model, "method": {"name": "grpo"}, "data": {"train": "none.jsonl"},
            "optim": {"kind": kind}}


def test_the_states_counted_are_the_states_kept(session: Callable[..., Any]) -> None:
    from bridgelm.training import loop

    one = session({"name": "bridge", "rank": 2})
    loop.take_step(one)
    for named in one.policy.optimisers.values():
        for p in named.optimiser.param_groups[0]["params"]:
            kept = sum(v.nbytes for v in named.optimiser.state[p].values() if v.dim())
            assert kept == state_bytes(named.optimiser, p, False)
    assert {type(n.optimiser).__name__ for n in one.policy.optimisers.values()} == {"AdamW", SharedMoments.__name__}
    sgd = build("sgd", list(one.policy.groups["theta"].flat().values()), one.config.optim, 1.0)
    assert state_bytes(sgd, sgd.param_groups[0]["params"][0], False) == 0


def test_a_shadow_that_rests_takes_a_gradient_of_w_more_and_less_time(need: Callable[..., needs.Need],
                                                                      raw: Callable[..., dict[str, Any]]) -> None:
    methods = [{"name": "joint"}, *({"name": "bridge", "rank": 2, "shadow_every": every} for every in (1, 2))]
    plain, every, second = (need(method) for method in methods)
    assert second.parts["standing/shadow_w"] == second.parts["standing/w"]
    assert second.train == every.train + second.parts["standing/w"]
    times = [durations.seconds(make_config(raw(method)), found, durations.CARDS["h100"], 1, 0.3).train
             for method, found in zip(methods, (plain, every, second))]
    assert times[2] - times[0] == pytest.approx((times[1] - times[0]) / 2)


def test_parts_divide_what_stands(raw: Callable[..., dict[str, Any]]) -> None:
    """By the ranks, but for A, which all hold, and rows that do not divide; whole weights are there to draw answers."""
    config = make_config(raw({"name": "bridge", "rank": 2}, model={"dtype": "bfloat16"}, shard=True))
    one, four = needs.memory(config), needs.memory(config, 4)
    assert needs.memory(config.model_copy(update={"shard": False}), 4).parts == one.parts
    a = 2 * 2 * (6 * 16 + 32)  # both layers have six matrices of 16 columns and one of 32
    rows = one.parts["standing/w"] // 4 - a  # of B
    assert four.parts["standing/w"] == 4 * (a + rows // 4)
    vocabulary = 24 + 5  # the tokens of the tiny world: 8 rows a rank, and 5 of the last
    padding = 16 * (8 - vocabulary / 4)
    assert four.parts["standing/masters"] == 4 * (one.parameters / 4 + padding)
    assert four.parts["standing/shadow"] == four.parts["standing/masters"] == 2 * four.parts["standing/weights"]
    assert four.parts["train/gradients kept"] < 0.4 * one.parts["train/gradients kept"]
    assert four.parts["generate/weights gathered"] == 2 * one.parameters and not one.parts["generate/weights gathered"]


def test_adapters_train_no_whole_weights(need: Callable[..., needs.Need]) -> None:
    found = need("grpo", model={"dtype": "bfloat16", "lora_rank": 1})
    assert found.parts["train/gradients kept"] == found.parts["standing/masters"] < found.parameters
    matrices = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32)  # of the frozen base, beside those with the adapters
    assert found.parts["standing/weights"] == 2 * (found.parameters + matrices)


def test_checkpointing_and_smaller_pieces_cost_less(need: Callable[..., needs.Need]) -> None:
    def of(micro: int, **model: Any) -> needs.Need:
        return need("grpo", data=SHORT, batch={"micro_tokens": micro}, model=model,
                    rollout={"prompts": 64, "group": 4, "max_new_tokens": 56})
    whole = of(8192).parts["train/activations"]
    assert of(4096).parts["train/activations"] == pytest.approx(whole / 2, rel=0.1)
    again = of(8192, gradient_checkpointing=True)
    assert again.parts["train/activations"] < 0.7 * whole


def test_keys_and_values_by_hand(need: Callable[..., needs.Need]) -> None:
    found = need("grpo", data={"max_prompt_tokens": 100}, rollout={"max_new_tokens": 28}, model={"dtype": "bfloat16"},
                 eval={"problems": 1})
    rows, width, layers, heads, size = 16, 128, 2, 2, 4
    assert found.parts["generate/keys and values"] == 2 * layers * heads * size * rows * width * 2


def test_a_sequence_needs_what_its_largest_stage_does(need: Callable[..., needs.Need]) -> None:
    stages = [{"method": {"name": "sft"}, "steps": 2}, {"method": {"name": "bridge", "rank": 2}}]
    assert need({"name": "sequence", "stages": stages}).peak == need({"name": "bridge", "rank": 2}).peak


@pytest.fixture(scope="module")
def measured() -> tuple[Any, dict[str, Any]]:
    """The benchmark and what it found."""
    return memory, json.loads((ROOT / "results" / "memory.json").read_text())


def test_what_was_measured_was_planned(measured: tuple[Any, dict[str, Any]]) -> None:
    """Within 10 % at every point; some are planned anew below."""
    benchmark, found = measured
    assert [benchmark.point_of(row) for row in found["rows"]] == benchmark.points()
    for row in found["rows"]:
        for phase in benchmark.PHASES:
            assert row[f"planned {phase}"] == pytest.approx(row[f"measured {phase}"], rel=0.1), row


@pytest.mark.parametrize("at", [0, 4, 8, 14, -1])
def test_a_plan_of_the_measured_rows_is_what_was_measured(at: int, measured: tuple[Any, dict[str, Any]],
                                                          tmp_path: Path) -> None:
    benchmark, found = measured
    row = found["rows"][at]
    benchmark.write_config(tmp_path / row["shape"], found["shapes"][row["shape"]])
    config = benchmark.config_of(row["shape"], row["method"], row["kind"], tmp_path)
    plan = needs.memory(config, work=benchmark.work_of(row["work"]))
    for phase in benchmark.PHASES:
        assert getattr(plan, phase) / plan.parameters == pytest.approx(row[f"measured {phase}"], rel=0.06), phase


def test_a_few_layers_and_chunks_tell_what_all_need(raw: Callable[..., dict[str, Any]], tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch, measured: Any) -> None:
    """Against a pass through the whole model."""
    measured[0].write_config(tmp_path / "model", {**measured[0].SHAPE, "num_hidden_layers": 7, "vocab_size": 30_000,
                                                  "hidden_size": 64, "intermediate_size": 96})
    config = make_config(raw("grpo", model={"name_or_path": str(tmp_path / "model"), "dtype": "bfloat16"}, data=SHORT,
                             rollout={"prompts": 3, "group": 4, "max_new_tokens": 24}, batch={"micro_tokens": 600}))
    monkeypatch.setattr(forward, "CHUNK", 2**19)
    monkeypatch.setattr(forward, "KEPT", 2**22)
    for name in ("CHUNK", "KEPT"):
        monkeypatch.setattr(passes, name, getattr(forward, name))
    short = needs.memory(config)
    needs._models.cache_clear()
    monkeypatch.setattr(passes, "FEW", (3, 99))
    monkeypatch.setattr(passes, "with_fewer_chunks", lambda rows, vocabulary: (rows, 0))
    whole = needs.memory(config)
    needs._models.cache_clear()
    assert short.train == pytest.approx(whole.train, rel=1e-3)
    assert short.parts["train/activations"] == pytest.approx(whole.parts["train/activations"], rel=1e-3)
    assert short.generate == pytest.approx(whole.generate, rel=1e-3)


PLAN = """steps = 10
[model]
name_or_path = "Qwen/Qwen3-8B-Base"
dtype = "bfloat16"
[data]
train = "{data}"
[method]
name = "grpo"
[rollout]
max_new_tokens = 3072
"""


def test_what_does_not_fit_is_told_with_what_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    file = tmp_path / "run.toml"
    file.write_text(PLAN.format(data=tmp_path / "train.jsonl"))
    assert main(["plan", str(file), "--gpu", "h200"]) == 0
    printed = capsys.readouterr().out
    assert "IT DOES NOT FIT. It would" in printed and "no GPU was measured" in printed
    overrides = next(line for line in printed.splitlines() if line.startswith("    bridgelm plan"))
    overrides = shlex.split(overrides)[3:]
    assert len({key.partition("=")[0] for key in overrides}) == len(overrides)
    assert main(["plan", str(file), *overrides, "--gpu", "h200"]) == 0
    assert "  it fits" in capsys.readouterr().out
    assert main(["plan", str(file), "--gpu", "h300"]) == 2
    assert "choose from rtx4090" in capsys.readouterr().err


def test_more_cards_and_shorter_answers_take_less_time(raw: Callable[..., dict[str, Any]]) -> None:
    config = make_config(raw("grpo", rollout={"prompts": 64, "group": 8, "max_rows": 64}))
    need, card = needs.memory(config), durations.CARDS["h100"]
    one, four = (durations.seconds(config, need, card, gpus, 0.3) for gpus in (1, 4))
    assert one.train == pytest.approx(4 * four.train)
    assert one.generate == pytest.approx(4 * four.generate)
    assert durations.seconds(config, need, card, 1, 0.6).train > one.train
