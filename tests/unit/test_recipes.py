"""The recipes for real models: their data is built, they pass `check`, and they train once width, depth, batch and
length are cut to the size of a test."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import bridgelm
from bridgelm.analysis.comparison import disagreement
from bridgelm.cli.main import main
from bridgelm.comparisons.compare import resolve
from bridgelm.config import catalogue
from bridgelm.config.options import parts
from bridgelm.config.run_config import load_config, variant_names
from bridgelm.errors import UserError

ROOT = Path(__file__).parents[2]
RECIPES = sorted([*(ROOT / "recipes" / "paper").glob("*.toml"), *(ROOT / "recipes" / "small").glob("*.toml")])
PAPER = {"sft", "rl", "cold_start", "alternate", "joint", "adapters"}
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
HEADERS = ("<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
           "{{ m['content'] }}<|eot_id|>{% endfor %}"
           "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
KINDS = {"qwen2": ("Qwen2", CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
         "qwen3": ("Qwen3", CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
         "llama": ("Llama", HEADERS, ["<|end_of_text|>", "<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>",
                                      "<|end_header_id|>"])}


def save_model(folder: Path, kind: str) -> Path:
    """A random model of the real architecture over single bytes, with the real shape of the chat template."""
    import torch
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    architecture, template, control = KINDS[kind]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    ends = control[:2] if kind == "llama" else [control[0], control[2]]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=ends[1], pad_token=control[0])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 512,
             "tie_word_embeddings": kind != "qwen3", "eos_token_id": tokenizer.convert_tokens_to_ids(ends),
             "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    if kind == "qwen2":
        del sizes["head_dim"]
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**sizes)
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(folder)
    return folder


def build_data(task: str, folder: Path) -> None:
    """recipes/data.py on a few rows with the columns of the public sets."""
    sums = [{"problem": f"What is {a} + {b}?", "answer": str(a + b), "level": "Level 4",
             "solution": f"It is $\\boxed{{{a + b}}}$."} for a in range(10) for b in range(8)]
    del sums[20]["answer"], sums[41]["answer"]  # as in MATH, whose answers stand in a box
    worked = [{"question": row["problem"], "answer": f"<<1+1=2>>{i}\n#### {i}"} for i, row in enumerate(sums)]
    r1 = [{"question": f"What is {a} * {a}?", "final_answer": str(a * a),
           "r1_solution_1": f"{a * a}, I think, {a * a}.",
           "r1_solution_2": f"Hm.\n</think>\n$\\boxed{{{a * a}}}$"} for a in range(12)]
    sources = {"limr": sums[:24], "math-train": sums[:20], "math-test": sums[20:], "math500": sums[40:50], "r1": r1,
               "gsm8k-train": worked[:40], "gsm8k-test": [*worked[40:50], worked[3]]}
    words = ["data.py", task, "--out", f"data/{task}", "--validation", "6", "--any-number"]
    for name, rows in sources.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words += [f"--{name}", f"{name}.jsonl"]
    before, sys.argv = sys.argv, words
    try:
        runpy.run_path(str(ROOT / "recipes" / "data.py"), run_name="__main__")
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for task in ("limr", "math", "gsm8k"):
            build_data(task, folder)
    for kind in KINDS:
        save_model(folder / kind, kind)
    return folder


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"data/{name}.jsonl").read_text().splitlines()]


def test_the_data_is_kept_apart_and_has_what_a_run_reads() -> None:
    for task in ("limr", "math", "gsm8k"):
        sets = {name: {row["problem"] for row in rows(f"{task}/{name}")} for name in ("train", "validation", "test")}
        assert len(sets["validation"]) == 6
        assert not sets["train"] & (sets["validation"] | sets["test"])
        assert not sets["validation"] & sets["test"]
    assert len(rows("math/train")) == 80 - 10 - 6
    assert len(rows("limr/train")) == 24
    assert {row["problem"] for row in rows("math/validation")}.isdisjoint(row["problem"] for row in rows("limr/train"))
    found = {row["problem"]: row for row in rows("limr/train")}
    assert found["What is 2 + 4?"]["answer"] == "6", "from the box of its solution"
    assert found["What is 2 + 4?"]["difficulty"] == 4
    assert rows("math/demos")[3]["demos"] == ["9, I think, 9."], "the shorter of two"
    assert rows("math/demos")[11]["demos"] == ["121, I think, 121."]
    assert rows("gsm8k/train")[0]["demos"] == ["0\nThe answer is $\\boxed{0}$."]
    assert "demos" not in rows("gsm8k/test")[0]


@pytest.mark.parametrize("file", RECIPES, ids=lambda path: path.stem)
def test_check_finds_nothing_wrong(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "nothing wrong either" in printed
    assert PAPER - {"alternate"} <= set(variant_names(file)) <= PAPER


def test_the_papers_settings() -> None:
    for file in RECIPES[:6]:
        assert file.parent.name == "paper"
        configs = {name: load_config(file, [f"variant={name}"] if name else []) for name in ("", *sorted(PAPER))}
        base = configs.pop("")
        assert (base.rollout.prompts, base.rollout.group, base.rollout.max_new_tokens) == (64, 5, 3000)
        method: Any = base.method
        assert (base.optim.lr, method.lam, method.rank, method.alpha) == (5e-7, 0.5, 16, 16)
        assert (base.eval.max_new_tokens, base.eval.problems) == (5000, 500)
        for name, config in configs.items():
            differs = "model.lora_rank" if name == "adapters" else None
            assert disagreement(base.resolved(), config.resolved()) == differs
            assert name == "adapters" or config.optim == base.optim
            rl = [part.rl for part in parts(config.method) if hasattr(part, "rl")]
            assert all(one == method.rl for one in rl)
        assert catalogue.sampling_steps(configs["cold_start"]) == base.steps, "as many rollouts as the others"


CUT = ["device=cpu", "dtype=float32", "gradient_checkpointing=false"]
SHORT = ["steps=3", "checkpoint_every=0", "rollout.prompts=2", "rollout.group=4", "rollout.max_new_tokens=6",
         "batch.demos=2", "batch.micro_tokens=512", "eval.every=0", "eval.problems=2", "eval.max_new_tokens=4",
         "data.max_prompt_tokens=256", "data.max_demo_tokens=128", "threads=1",
         f"reward.functions=['{ROOT}/tests/tiny.py:parity_reward']",  # a random model has none of the verifier
         *(f"model.{item}" for item in CUT)]
VARIANTS = ["", "rl", "cold_start", "alternate", "joint", "sft", "cold_start,adapters", "adapters"]


CASES = [pytest.param(file, variant, marks=[pytest.mark.slow] if i else [], id=f"{file.stem} {variant}")
         for i, (file, variant) in enumerate(zip(RECIPES, VARIANTS))]


@pytest.mark.parametrize(("file", "variant"), CASES)
def test_three_steps(file: Path, variant: str, tmp_path: Path) -> None:
    """Each file once, and over all of them each variant."""
    kind = "llama" if "llama" in file.stem else "qwen3" if "qwen3" in file.stem else "qwen2"
    stages = ["method.stages.0.steps=1", "method.stages.1.steps=2"] if "cold_start" in variant else []
    run = bridgelm.train(load_config(file, [*([f"variant={variant}"] if variant else []), *SHORT, *stages,
                                            f"model.name_or_path={kind}", f"out={tmp_path}"]), quiet=True)
    assert (run.status, run.steps) == ("finished", 3)
    norms = [value for row in run.metrics for key, value in row.items() if key.startswith("grad_norm")]
    assert max(norms) > 0
    drawn = 0 if variant == "sft" else 2 if "cold_start" in variant else 3
    probed = run.config["method"].get("probe_every", 0) > 0  # once, at the end
    assert run.last("rollouts") == 8 * (drawn + probed)
    assert run.config["name"] == "-".join([file.stem, *(variant.split(",") if variant else [])])


def test_variants_are_compared_with_the_recipe() -> None:
    file = ROOT / "recipes" / "small" / "qwen2.5-0.5b.toml"
    found = resolve(file, ["joint", "cold_start", "grpo"], ["steps=300"])
    assert list(found) == ["qwen2.5-0.5b", "joint", "cold_start", "grpo"]
    assert found["joint"].method.name == "joint"
    assert [stage.steps for stage in found["cold_start"].method.stages] == [100, 200]  # type: ignore[union-attr]
    assert found["grpo"].method.name == "grpo", "no variant, but a method"


def test_a_variant_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    file = RECIPES[0]
    assert main(["check", str(file), "variant=jiont"]) == 2
    assert "no variant 'jiont'; it has sft, rl" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"it has none; a variant is a table \[variants.NAME\]"):
        load_config(ROOT / "recipes" / "toy" / "sft.toml", ["variant=rl"])

REFUSED = {("qwen3-8b-limr", "")}


@pytest.mark.parametrize(("stem", "changes"), [("qwen3-8b-limr", ""), ("qwen3-8b-limr", "variant=adapters"),
                                               ("qwen2.5-3b-math", "")])
def test_plan_refuses_what_does_not_fit(stem: str, changes: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without data: a plan comes first."""
    file = ROOT / "recipes" / "paper" / f"{stem}.toml"
    absent = ["data.train=nowhere.jsonl"]
    assert main(["plan", str(file), *changes.split(), *absent, "--gpu", "h200"]) == 0
    printed = capsys.readouterr().out
    assert ("DOES NOT FIT" in printed) == ((stem, changes) in REFUSED)
    assert ("It would, at " in printed) == ((stem, changes) in REFUSED), "with what would make it fit"
