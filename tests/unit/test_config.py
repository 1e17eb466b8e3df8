"""The configuration: what a TOML file may say, what overrides and presets do, and that each mistake names its fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bridgelm.config.options import BRIDGE_PRESETS, BridgeOptions, SequenceOptions
from bridgelm.config.run_config import RunConfig, load_config, make_config, stage_steps
from bridgelm.errors import UserError

RECIPES = Path(__file__).parents[2] / "recipes" / "toy"


def raw(**changes: Any) -> dict[str, Any]:
    base = {"name": "x", "steps": 10, "model": {"name_or_path": "toy:base"}, "data": {"train": "toy:hops"},
            "reward": {"verifier": "toy"}, "method": {"name": "sft"}}
    return {**base, **changes}


def message(data: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        make_config(data, "here.toml")
    text = str(caught.value)
    assert text.startswith("here.toml: ")
    assert "\n" not in text
    return text


def test_bridge_presets_fill_in_what_is_left_out() -> None:
    for preset, values in BRIDGE_PRESETS.items():
        assert values.items() <= chosen({"preset": preset}, values).items()
    repaired = BRIDGE_PRESETS["repaired"]
    assert chosen({}, repaired) == repaired, "the field defaults are the preset's"


def chosen(raw_options: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """What options come to, cut down to the keys of `like`."""
    found = BridgeOptions.model_validate(raw_options).model_dump()
    return {key: {inner: found[key][inner] for inner in value} if isinstance(value, dict) else found[key]
            for key, value in like.items()}


@pytest.mark.parametrize("preset", ["paper", "repaired"])
@pytest.mark.parametrize(("key", "value"), [("ratio", "clip"), ("ratio", "truncate"), ("shadow_step", "plain"),
                                            ("shadow_step", "shared_moments"), ("rl", {"std": False})])
def test_an_explicit_key_wins_over_the_preset(preset: str, key: str, value: Any) -> None:
    wanted = {**BRIDGE_PRESETS[preset], key: value}
    assert chosen({"preset": preset, key: value}, wanted) == wanted


def test_a_preset_fills_in_what_a_nested_table_leaves_out() -> None:
    options = BridgeOptions.model_validate({"preset": "paper", "rl": {"clip_low": 0.1}})
    assert (options.rl.clip_low, options.rl.std) == (0.1, True)


def test_alternation_with_one_optimiser_refuses_a_second_rate() -> None:
    assert "sft_lr" in message(raw(method={"name": "alternate", "optimisers": "one", "sft_lr": 1e-4}))
    make_config(raw(method={"name": "alternate", "sft_lr": 1e-4}))


def test_own_shadow_rollouts_refuse_a_deviation_for_each_group() -> None:
    with pytest.raises(UserError, match=r"rl\.std = false"):
        make_config(raw(method={"name": "bridge", "shadow_rollouts": "own", "rl": {"std": True}}))


def test_the_written_configuration_of_a_preset_reads_back_as_itself() -> None:
    config = make_config(raw(method={"name": "bridge", "preset": "paper", "ratio": "truncate", "lambda": 0.3}))
    again = make_config(json.loads(json.dumps(config.resolved())))
    assert again == config
    assert again.resolved()["method"]["lambda"] == 0.3


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_lambda_has_a_closed_range(value: float) -> None:
    config = make_config(raw(method={"name": "bridge", "lambda": value}))
    assert config.method.lam == value  # type: ignore[union-attr]


def test_a_sequence_without_stages_is_the_repaired_cold_start() -> None:
    from bridgelm.methods.sequence import Sequence

    config = make_config(raw(method={"name": "sequence"}, steps=40, optim={"lr": 1e-6}))
    sft, rl = Sequence(config.method, config).stages  # type: ignore[arg-type]
    assert (sft.phase, sft.run.steps, rl.phase, rl.run.steps) == ("sft", 20, "grpo", 20)
    optim = sft.run.optim
    assert (optim.lr, optim.schedule, optim.warmup, optim.final) == (5e-5, "cosine", 2, 0.1)
    assert (rl.run.optim.lr, rl.run.optim.schedule, rl.run.optim.warmup) == (1e-6, "constant", 0)


@pytest.mark.parametrize("value", [-1e-9, 1.000001, float("nan"), float("inf")])
def test_lambda_outside_its_range_is_refused(value: float) -> None:
    assert "method.lambda" in message(raw(method={"name": "bridge", "lambda": value}))


@pytest.mark.parametrize(("steps", "total", "expected"), [([4, 6], 10, [4, 6]), ([4, None], 10, [4, 6]),
                                                          ([None, 1], 10, [9, 1]), ([None], 7, [7]),
                                                          ([None, None], 11, [5, 6]), ([None, 2, None], 9, [3, 2, 4])])
def test_stage_steps_add_up(steps: list[int | None], total: int, expected: list[int]) -> None:
    assert stage_steps(stages(steps), total) == expected


@pytest.mark.parametrize("steps", [[4, 5], [4, 7], [9, None, None], [10, None], [11, None]])
def test_stage_steps_that_do_not_add_up_are_refused(steps: list[int | None]) -> None:
    with pytest.raises(ValueError, match=r"method\.stages"):
        stage_steps(stages(steps), 10)
    assert "method.stages" in message(raw(method=stages(steps).model_dump()))


def stages(steps: list[int | None]) -> SequenceOptions:
    return SequenceOptions.model_validate({"stages": [{"method": {"name": "sft"}, "steps": n} for n in steps]})


@pytest.mark.parametrize(("changes", "words"), [
    ({"stepz": 3}, ["unknown key 'stepz'", "did you mean 'steps'?"]),
    ({"optim": {"learning_rate": 1e-3}}, ["unknown key 'optim.learning_rate'", "known keys: ", "lr"]),
    ({"rollout": {"promts": 4}}, ["unknown key 'rollout.promts'", "'prompts'"]),
    ({"method": {"name": "bridge", "lamda": 0.5}}, ["unknown key 'method.lamda'", "'lambda'"]),
    ({"method": {"name": "grpo", "rl": {"clip_hi": 0.3}}}, ["unknown key 'method.rl.clip_hi'", "'clip_high'"]),
    ({"method": {"name": "brdge"}}, ["method.name", "'brdge'", "'bridge'"]),
    ({"method": {"name": "sequence", "stages": [{"method": {"name": "sft"}, "step": 3}]}},
     ["stages.0.step", "'steps'"]),
    ({"steps": "ten"}, ["steps", "integer", "'ten'"]),
    ({"steps": 10.0}, ["steps", "integer"]),
    ({"steps": True}, ["steps"]),
    ({"steps": 0}, ["steps", "1"]),
    ({"optim": {"lr": "1e-6"}}, ["optim.lr", "number"]),
    ({"rollout": {"group": 1}}, ["rollout.group", "2"]),
    ({"eval": {"every": -1}}, ["eval.every"]),
    ({"reward": {"verifier": "none"}, "data": {"train": "a.jsonl"}}, ["reward.verifier", "reward.functions"]),
    ({"reward": {"verifier": "math"}}, ["'toy'", "go together"]),
    ({"reward": {"verifier": "toy", "functions": ["a.py:f"], "weights": [1.0, 2.0]}}, ["reward.weights"]),
    ({"model": {}}, ["'model.name_or_path' is missing"]),
])
def test_mistakes_name_the_key_and_the_fix(changes: dict[str, Any], words: list[str]) -> None:
    text = message(raw(**changes))
    missing = [word for word in words if word not in text]
    assert not missing, text


@pytest.mark.parametrize("name", ["../victim", "..", ".", "", " ", "/tmp/x", "a/b", "a\\b", "a\nb", "a\x00", "x" * 201,
                                  "é" * 101])
def test_a_name_stays_inside_of_out(name: str) -> None:
    text = message(raw(name=name))
    assert text.startswith("here.toml: name: ") and "\n" not in text, text
    assert make_config(raw(name="x" * 200, out="../any/where")).out == "../any/where"


def test_a_missing_table_is_named() -> None:
    data = raw()
    del data["data"]
    assert "'data' is missing" in message(data)


def test_overrides() -> None:
    config = load_config(RECIPES / "cold_start.toml", [
        "steps=90", "optim.lr=2e-5", "name=other", "rollout.mask_overlong=true", "optim.betas=[0.8, 0.9]",
        "method.stages.0.steps=30", "data.toy.layout=paired", 'model.system_prompt="a=b"'])
    assert (config.steps, config.optim.lr, config.name, config.rollout.mask_overlong) == (90, 2e-5, "other", True)
    assert config.optim.betas == [0.8, 0.9]
    assert config.data.toy.layout == "paired"
    assert config.model.system_prompt == "a=b"
    assert isinstance(config.method, SequenceOptions)
    assert stage_steps(config.method, config.steps) == [30, 60]


@pytest.mark.parametrize(("override", "words"), [
    ("steps", "section.key=value"), ("optim.lrr=1", "'lr'"), ("steps.x=1", "is a value"), ("optim.lr=fast", "optim.lr"),
    ("method.stages.7.steps=1", "stages"), ("method.stages.first.steps=1", "stages"), ("=3", "unknown key"),
])
def test_wrong_overrides(override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(RECIPES / "cold_start.toml", [override])
    assert words in str(caught.value)


def test_file_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("steps = = 3")
    with pytest.raises(UserError, match=r"broken\.toml: not valid TOML.*line 1"):
        load_config(broken)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.toml"):
        load_config(binary)
    array = tmp_path / "array.json"
    array.write_text("[1]")
    with pytest.raises(UserError, match=r"array\.json"):
        load_config(array)


def test_the_name_is_the_file_s_unless_it_is_given(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    text = (RECIPES / "joint.toml").read_text()
    file.write_text(text.replace('name = "joint"\nsteps', "steps"))
    assert load_config(file).name == "mine"


def test_a_configuration_is_frozen() -> None:
    config = make_config(raw())
    with pytest.raises(ValidationError):
        config.steps = 3  # type: ignore[misc]
    assert isinstance(config, RunConfig)


def _sequence(*kept: bool, model: dict | None = None, name: str = "grpo") -> dict:
    stages = [{"method": {"name": name}, "steps": 1, "fresh_reference": not keep} for keep in kept]
    return {"name": "a", "steps": len(kept), "model": {"name_or_path": "toy:base", **(model or {})},
            "data": {"train": "toy:hops"}, "reward": {"verifier": "toy"},
            "method": {"name": "sequence", "stages": stages}}


def test_a_fresh_stage_before_a_kept_reference_is_refused():
    with pytest.raises(UserError, match=r"stage 1 drops the reference that stage 2 would keep; set fresh_reference"):
        make_config(_sequence(False, False, True))
    make_config(_sequence(False, True, True))
    make_config(_sequence(False, True, False))


def test_an_adapter_with_a_bridge_stage_keeps_no_older_reference():
    with pytest.raises(UserError, match="leave out fresh_reference = false"):
        make_config(_sequence(False, True, model={"lora_rank": 2}, name="bridge"))
    make_config(_sequence(False, False, model={"lora_rank": 2}, name="bridge"))


@pytest.mark.parametrize("change", [{"seed": -1}, {"optim": {"betas": [0.9, 1.0]}}])
def test_numbers_that_would_fail_later_are_refused(change):
    with pytest.raises(UserError, match=r"seed|betas"):
        make_config({**_sequence(False), **change})


def test_paths_become_absolute_and_names_stay(tmp_path, monkeypatch):
    from bridgelm.config.run_config import absolute

    monkeypatch.chdir(tmp_path)
    raw = {**_sequence(False), "data": {"train": "a.jsonl", "test": "hf:x/y"},
           "reward": {"verifier": "exact", "functions": ["r.py:f"]}}
    made = absolute(make_config(raw))
    assert (made.data.train, made.data.test) == (str(tmp_path / "a.jsonl"), "hf:x/y")
    assert made.reward.functions == [f"{tmp_path / 'r.py'}:f"]
    assert made.model.name_or_path == "toy:base"
    assert absolute(made) == made


def test_a_home_folder_is_expanded_and_mps_is_refused(monkeypatch):
    from bridgelm.data.model_shapes import model_path
    from bridgelm.runs.preflight import check_static

    monkeypatch.setenv("HOME", "/somewhere")
    assert model_path("~/model") == "/somewhere/model"
    with pytest.raises(UserError, match="'cpu', 'cuda'"):
        check_static(make_config(_sequence(False, model={"device": "mps"})))


# -- recipes that are based on another one -----------------------------------------------------------------------------

def write_recipe(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_recipe_says_only_what_differs_from_its_base(tmp_path: Path) -> None:
    """Tables are merged key by key at every depth, a method is replaced, variants are inherited and the name is not."""
    write_recipe(tmp_path / "shared" / "whole.toml", """
        name = "whole"
        method = { name = "joint", mu = 0.3 }
        model = { name_or_path = "toy:base" }
        reward = { verifier = "toy" }
        [data]
        train = "toy:hops"
        toy = { train_size = 30, layout = "paired" }
        [variants.slow]
        optim = { lr = 1e-7 }
    """)
    write_recipe(tmp_path / "middle.toml", 'base = "shared/whole.toml"\nsteps = 7\n[data.toy]\ntrain_size = 20\n')
    leaf = write_recipe(tmp_path / "leaf.toml", 'base = "middle.toml"\nmethod = { name = "grpo" }\n')
    found = load_config(leaf, ["steps=9"])
    assert (found.name, found.steps, found.method.name) == ("leaf", 9, "grpo")
    assert (found.data.train, found.data.toy.train_size, found.data.toy.layout) == ("toy:hops", 20, "paired")
    assert load_config(leaf, ["variant=slow"]).optim.lr == 1e-7
    assert load_config(tmp_path / "middle.toml").method.mu == 0.3  # type: ignore[union-attr]


@pytest.mark.parametrize(("text", "said"), [
    ('base = "mine.toml"', "based on this file itself"), ('base = "missing.toml"', "missing.toml: cannot be read"),
    ("base = 3", "write the path of a TOML file")])
def test_a_base_that_cannot_be(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_config(write_recipe(tmp_path / "mine.toml", text))
    assert "\n" not in str(caught.value)
