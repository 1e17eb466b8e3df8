"""Weights that are not those of the files, models that do not repeat themselves, and rows that do not fit are refused,
each in one line; families whose dropout is not a module are scored without it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bridgelm
from bridgelm.cli.data import check_data
from bridgelm.config.run_config import ModelConfig, make_config
from bridgelm.data.chat import load_chat
from bridgelm.data.cursors import check_lengths, load_splits
from bridgelm.engine import NativeEngine, Origin, Request, Sampling
from bridgelm.engine.decoders import make_decoder
from bridgelm.errors import UserError
from bridgelm.model import loading
from bridgelm.model.loading import load_model
from bridgelm.training import merging
from tiny import raw_config, save_tokenizer

Edit = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]

WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
ROTARY = {**WIDTH, "intermediate_size": 32, "num_key_value_heads": 2, "max_position_embeddings": 32,
          "attention_dropout": 0.1}
OLD = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "OPT": {**WIDTH, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 32, "layerdrop": 0.5},
    "GPTBigCode": OLD, "GPT2": OLD,
    "Starcoder2": {**ROTARY, "residual_dropout": 0.1, "embedding_dropout": 0.1},
    "Mixtral": {**ROTARY, "num_local_experts": 4, "router_jitter_noise": 0.3},
    "Bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 4, "attention_dropout": 0.1, "hidden_dropout": 0.1},
    "Falcon": {**WIDTH, "attention_dropout": 0.1, "hidden_dropout": 0.1},
    "Mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "Qwen2": {**ROTARY, "tie_word_embeddings": True}, "Llama": ROTARY}
ATTENTIVE = [name for name in FAMILIES if name != "Mamba"]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            tokenizer = save_tokenizer(made[name])
            ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
            config = getattr(transformers, f"{name}Config")(**FAMILIES[name], **ids, initializer_range=0.2)
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
        return made[name]
    return folder


@pytest.fixture
def copied(family: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(family(name), tmp_path / name))


def opened(folder: Path, **options: Any) -> Any:
    return load_model(ModelConfig(name_or_path=str(folder), device="cpu", **{"dtype": "float32", **options}))


def rewritten(folder: Path, edit: Edit) -> Path:
    file = folder / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})
    return folder


def scored(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 25)[None]
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def gradients(model: Any) -> list[torch.Tensor]:
    scored(model).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


# -- weights -----------------------------------------------------------------------------------------------------------

def other_prefix(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"policy.{name}": t for name, t in weights.items()}


def one_less(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t for name, t in weights.items() if name != "model.layers.1.mlp.up_proj.weight"}


def one_more(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**weights, "value_head.weight": torch.zeros(1, 16)}


def no_expert(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t for name, t in weights.items() if "layers.1" not in name or ".experts." not in name}


def narrow(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**weights, "model.norm.weight": torch.ones(15)}


def grown(bad: float) -> Edit:
    def edit(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights["model.layers.0.self_attn.q_proj.weight"][3, 2] = bad
        return weights
    return edit


BROKEN: dict[str, tuple[Edit, str]] = {
    "prefix": (other_prefix, r"27 missing \(lm_head\.weight, model\.embed_tokens\.weight, .*, \.\.\.\), "
                             r"26 unknown to the model \(policy\."),
    "missing": (one_less, r"1 missing \(model\.layers\.1\.mlp\.up_proj\.weight\); save"),
    "unexpected": (one_more, r"1 unknown to the model \(value_head\.weight\); save"),
    "shape": (narrow, r"model\.norm\.weight \(\(15,\) in the file, \(16,\) in the model\)"),
    "nan": (grown(float("nan")), r"1 weights are not finite \(model\.layers\.0\.self_attn\.q_proj\.weight\)"),
    "inf": (grown(float("-inf")), r"1 weights are not finite \(model\.layers\.0\.self_attn\.q_proj\.weight\)")}


@pytest.mark.parametrize("which", BROKEN)
def test_weights_that_are_not_there_or_not_finite_are_refused(which: str, copied: Callable[[str], Path]) -> None:
    edit, said = BROKEN[which]
    with pytest.raises(UserError, match=said) as error:
        opened(rewritten(copied("Qwen2"), edit))
    assert "\n" not in str(error.value)
    assert "model.name_or_path" in str(error.value)


def test_experts_that_are_stacked_when_read_are_missed_too(copied: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"2 missing \(model\.layers\.1\.mlp\.experts\.down_proj"):
        opened(rewritten(copied("Mixtral"), no_expert))


def test_neither_a_run_nor_its_teacher_begins_from_random_weights(copied: Callable[[str], Path],
                                                                  family: Callable[[str], Path],
                                                                  tmp_path: Path) -> None:
    broken = rewritten(copied("Qwen2"), other_prefix)
    with pytest.raises(UserError, match=r"^model\.name_or_path: the weights of"):
        bridgelm.train(raw_config(tmp_path / "world", {"name": "sft"}, model=broken), quiet=True)
    assert not (tmp_path / "world" / "runs" / "run").exists(), "nothing was trained, so the name stays free"
    taught = raw_config(tmp_path / "other", {"name": "kdrl"}, model=family("Qwen2"),
                        teacher={"name_or_path": str(broken)})
    with pytest.raises(UserError, match=r"^teacher\.name_or_path: the weights of"):
        bridgelm.train(taught, quiet=True)


def test_what_is_rightly_absent_is_not_missed(copied: Callable[[str], Path]) -> None:
    tied = copied("Qwen2")
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    opened(tied)
    rewritten(tied, lambda weights: {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
                                     "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    opened(tied)
    opened(rewritten(copied("GPT2"), lambda weights: {
        **weights, "transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32).tril().bool()}))
    bare = rewritten(copied("Llama"), lambda weights: {
        name.removeprefix("model."): t for name, t in weights.items()})  # as AutoModel saves it
    opened(bare)


def test_an_index_that_looks_outside_of_its_folder_is_refused(copied: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied("Qwen2")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    weights = load_file(tmp_path / "elsewhere.safetensors")
    for file in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors")):
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, file)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=r"model\.name_or_path: .*index\.json looks for .* outside the model's"):
            opened(folder)
    save_file(weights, folder / "part.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    opened(folder)


def test_nothing_is_merged_from_weights_that_are_not_finite(copied: Callable[[str], Path],
                                                            family: Callable[[str], Path], tmp_path: Path) -> None:
    broken = rewritten(copied("Qwen2"), grown(float("inf")))
    with pytest.raises(UserError, match=r"merge: .*model\.safetensors: 1 weights are not finite"):
        merging.merge(family("Qwen2"), broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_longer_than_the_vocabulary_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("Llama")
    load_chat(ModelConfig(name_or_path=str(folder)))
    save_tokenizer(folder, [*map(str, range(20)), "+", "=", ";", "sum", "extra"])
    with pytest.raises(UserError, match=r"up to 29 \('extra'\), and the model's vocabulary has 29; .*"
                                        r"resize_token_embeddings\(30\)"):
        load_chat(ModelConfig(name_or_path=str(folder)))


# -- the same row, the same numbers ------------------------------------------------------------------------------------

@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_scored_twice_has_the_same_numbers(name: str, checkpointing: bool, family: Callable[[str], Path],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    kept = loading.checkpoint
    monkeypatch.setattr(loading, "checkpoint", lambda *args, **more: (calls.append(1), kept(*args, **more))[1])
    plain = opened(family(name))
    with torch.no_grad():
        wanted = scored(plain)
    calls.clear()
    model = opened(family(name), gradient_checkpointing=checkpointing)
    calls.clear()
    assert torch.equal(scored(model), wanted)
    assert torch.equal(scored(model), wanted)
    assert len(calls) == 2 * 2 * checkpointing, "each layer of each pass"
    for found, g in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(found, g, rtol=1e-5, atol=1e-7)


def test_checkpointing_keeps_the_input_of_each_layer_alone(family: Callable[[str], Path]) -> None:
    def saved(model: Any) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            scored(model)
        return sum(sizes)
    for name in ("OPT", "Mixtral"):
        assert saved(opened(family(name), gradient_checkpointing=True)) < saved(opened(family(name))) / 3


def always(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.dropout(x, 0.1, training=True)


def with_gradients(x: torch.Tensor) -> torch.Tensor:
    return x * 1.01 if torch.is_grad_enabled() else x


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("change", "said"), [(always, "it draws random numbers"),
                                              (with_gradients, "logits differ by")])
def test_a_model_that_does_not_repeat_itself_is_refused(change: Callable[[torch.Tensor], torch.Tensor], said: str,
                                                        checkpointing: bool, family: Callable[[str], Path],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: change(forward(self, x)))
    with pytest.raises(UserError, match=rf"gives the same row other numbers each time \({said}"):
        opened(family("Llama"), gradient_checkpointing=checkpointing)


def test_a_family_without_layers_to_checkpoint_is_refused(family: Callable[[str], Path],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match=r"model\.gradient_checkpointing: the layers of a LlamaForCausalLM cannot be"):
        opened(family("Llama"), gradient_checkpointing=True)


# -- drawing answers ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ATTENTIVE)
def test_every_family_with_attention_decodes_as_it_scores(name: str, checkpointing: bool,
                                                          family: Callable[[str], Path]) -> None:
    model = opened(family(name), gradient_checkpointing=checkpointing)
    engine = NativeEngine(frozenset({1}), 0, str)
    prompts = [np.arange(5, 12), np.arange(4, 7)]
    found = engine.generate(Origin(model), [Request(p, (i,)) for i, p in enumerate(prompts)], Sampling(6))
    for prompt, completion in zip(prompts, found, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, completion.ids]))[None]
        with torch.no_grad():
            logp = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
        wanted = logp[0, len(prompt) - 1:-1].gather(1, ids[0, len(prompt):, None])[:, 0]
        assert completion.raw_logps == pytest.approx(wanted.numpy(), abs=1e-4)


def test_a_model_without_keys_and_values_is_refused_before_the_run(family: Callable[[str], Path],
                                                                   tmp_path: Path) -> None:
    with pytest.raises(UserError, match="MambaForCausalLM keeps no cache of keys and values"):
        make_decoder(opened(family("Mamba")), 4)
    with pytest.raises(UserError, match="MambaForCausalLM keeps no cache of keys and values"):
        bridgelm.train(raw_config(tmp_path, {"name": "sft"}, model=family("Mamba")), quiet=True)
    assert not (tmp_path / "runs" / "run").exists()


# -- positions ---------------------------------------------------------------------------------------------------------

def positions_config(folder: Path, model: Path, method: str, new_tokens: int, **changes: Any) -> Any:
    return make_config(raw_config(folder, {"name": method}, model=model, **{
        "rollout": {"prompts": 4, "group": 4, "max_new_tokens": new_tokens}, **changes}))


@pytest.mark.parametrize("name", ["OPT", "GPT2", "GPTBigCode"])
def test_rows_beyond_a_table_of_positions_are_refused(name: str, family: Callable[[str], Path],
                                                      tmp_path: Path) -> None:
    prompt = 7  # <user> sum a + b = <bot>
    check_data(positions_config(tmp_path, family(name), "grpo", 32 - prompt))
    long = positions_config(tmp_path, family(name), "grpo", 33 - prompt)
    for refuses in (check_data, lambda config: bridgelm.train(config, quiet=True)):
        with pytest.raises(UserError, match=r"data\.train: .* may have 33 tokens .* the model has 32 positions; lower "
                                            r"rollout\.max_new_tokens"):
            refuses(long)
    demos_alone = positions_config(tmp_path, family(name), "sft", 33 - prompt, eval={"max_new_tokens": 5})
    check_data(demos_alone)
    longer = positions_config(tmp_path, family(name), "sft", 5, eval={"max_new_tokens": 33 - prompt})
    with pytest.raises(UserError, match=r"data\.validation: .*lower eval\.max_new_tokens"):
        check_data(longer)


def test_rows_beyond_rotary_positions_are_warned_about(family: Callable[[str], Path], tmp_path: Path) -> None:
    config = positions_config(tmp_path, family("Llama"), "grpo", 26)
    notes = check_lengths(load_splits(config), load_chat(config.model), config).notes
    assert any("may have 33 tokens" in note and "not trained to read further" in note for note in notes)
    fits = positions_config(tmp_path, family("Llama"), "grpo", 25)
    assert not check_lengths(load_splits(fits), load_chat(fits.model), fits).notes
    without = positions_config(tmp_path, family("Bloom"), "grpo", 500)
    assert not check_lengths(load_splits(without), load_chat(without.model), without).notes


def test_an_engine_never_runs_into_the_end_of_the_positions(family: Callable[[str], Path]) -> None:
    engine, model = NativeEngine(frozenset({1}), 0, str), opened(family("OPT"))
    prompt = np.arange(5, 25)
    assert engine.generate(Origin(model), [Request(prompt)], Sampling(12, 0.0))
    assert engine.generate(Origin(model), [Request(prompt, room=12)], Sampling(99, 0.0))
    with pytest.raises(UserError, match="33 tokens, and the model has 32 positions"):
        engine.generate(Origin(model), [Request(prompt)], Sampling(13, 0.0))
