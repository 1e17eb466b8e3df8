"""lm_eval's own command line on our models, without a network: its numbers against the trainer's forward pass, and its
greedy answers against the native engine's. `make harness` runs this; without lm_eval it is skipped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bridgelm
from bridgelm.benchmarks.run import weights_digest
from bridgelm.config.run_config import ModelConfig, load_config
from bridgelm.data import toy
from bridgelm.data.chat import Chat, load_chat
from bridgelm.data.cursors import load_splits
from bridgelm.engine import NativeEngine, Origin, Request, Sampling
from bridgelm.model.batching import collate
from bridgelm.model.forward import forward
from bridgelm.model.loading import load_model
from bridgelm.types import Problem, Row

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval's own

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "toy" / "grpo.toml"
ROOM = 24
SYSTEM = "hops within"  # words that the toy tokenizer has
TEMPLATE = ("{%- for m in messages -%}{{ '<|' + m['role'] + '|> by ' + m['content'] + ' ' }}{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{ '<|assistant|> ' }}{%- endif -%}")
TASKS = {
    "choice": """
task: choice
output_type: multiple_choice
doc_to_target: "{{choices.index(answer)}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
""",
    "answer": f"""
task: answer
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], max_gen_toks: {ROOM}}}
metric_list: [{{metric: exact_match}}]
""",
}


@dataclass
class Found:
    """What a command of lm_eval wrote."""

    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]


@dataclass
class Case:
    """A model as the command names it, and how we open the same."""

    args: str
    config: ModelConfig


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks on eight problems: the right answer among three others' answers, and the answer itself."""
    folder = tmp_path_factory.mktemp("tasks")
    problems = load_splits(load_config(RECIPE, ["data.toy.eval_size=8"])).test
    rows = [{"prompt": p.prompt, "answer": p.answer,
             "choices": [problems[(i + j) % 8].answer for j in range(1, 4)] + [p.answer]}
            for i, p in enumerate(problems)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"""{text}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
""")
    return folder


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "kept.jinja").write_text(TEMPLATE)
    shutil.copy(folder / "kept.jinja", folder / "gone.jinja")
    run = bridgelm.train(load_config(RECIPE, [
        "steps=2", "name=run", f"out={folder}", "rollout.prompts=8", "eval.problems=8", "data.toy.eval_size=8",
        f"model.system_prompt={SYSTEM}", f"model.chat_template={folder}/gone.jinja"]), quiet=True).path
    (folder / "gone.jinja").unlink()  # a run folder is whole by itself
    shutil.copy(toy.model_path("base") / "model.safetensors", run / "best")  # other weights than final's, for certain
    trained = {"system_prompt": SYSTEM, "chat_template": str(folder / "kept.jinja")}
    return {
        "base": Case("model=toy:base", ModelConfig(name_or_path="toy:base")),
        "final": Case(f"model={run}", ModelConfig(name_or_path=str(run / "final"), **trained)),
        "best": Case(f"model={run},which=best", ModelConfig(name_or_path=str(run / "best"), **trained)),
        "odd": Case(f"model={odd(folder / 'odd')}", ModelConfig(name_or_path=str(folder / "odd"))),
        "short": Case("model=toy:base,dtype=bfloat16", ModelConfig(name_or_path="toy:base", dtype="bfloat16")),
    }


def odd(folder: Path) -> Path:
    """The toy base with what plain transformers would do and training does not: a BOS that the template does not write,
    and a repetition penalty. `*2` ends an answer too."""
    shutil.copytree(toy.model_path("base"), folder)
    change(folder / "generation_config.json", eos_token_id=[1, ids(folder)["*2"]], repetition_penalty=1.8)
    change(folder / "tokenizer_config.json", bos_token="<|system|>")
    change(folder / "tokenizer.json", post_processor={
        "type": "TemplateProcessing", "pair": [], "special_tokens": {
            "<|system|>": {"id": "<|system|>", "ids": [ids(folder)["<|system|>"]], "tokens": ["<|system|>"]}},
        "single": [{"SpecialToken": {"id": "<|system|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]})
    return folder


def ids(folder: Path) -> dict[str, int]:
    return json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def command(tmp_path: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Found]:
    """`python -m bridgelm.benchmarks.harness --model bridgelm --model_args ARGS ...`, in this process."""
    import datasets

    from bridgelm.benchmarks import harness

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(args: str, *more: str, names: str = "choice,answer") -> Found:
        monkeypatch.setattr(sys, "argv", [
            "harness", "--model", "bridgelm", "--model_args", args, "--tasks", names, "--include_path", str(tasks),
            "--batch_size", "4", "--output_path", str(tmp_path / "out"), "--log_samples", *more])
        assert harness.main() == 0
        (results,) = (tmp_path / "out").rglob("results_*.json")
        files = {name: next((tmp_path / "out").rglob(f"samples_{name}_*.jsonl")) for name in names.split(",")}
        return Found(json.loads(results.read_text()),
                     {name: sorted(map(json.loads, file.read_text().splitlines()), key=lambda s: s["doc_id"])
                      for name, file in files.items()})
    return run


def prompt_of(sample: dict[str, Any]) -> Problem:
    return Problem("p", ({"role": "user", "content": sample["doc"]["prompt"]},))


def logp(model: Any, prompt: np.ndarray, answer: np.ndarray) -> float:
    """Of an answer, by the training forward pass."""
    whole = np.concatenate([prompt, answer])
    row = Row(whole, np.arange(len(whole)) >= len(prompt), "rollout", Problem("p", ({"role": "user", "content": ""},)))
    with torch.no_grad():
        return float(forward(model, collate([row], torch.float64, torch.device("cpu"), {})).logp_BT.double().sum())


def check_choices(found: Found, model: Any, chat: Chat, prompt: Callable[[dict[str, Any]], np.ndarray]) -> None:
    right = []
    for sample in found.samples["choice"]:
        ours = [logp(model, prompt(sample), chat.encode(choice)) for choice in sample["doc"]["choices"]]
        theirs = [float(reply[0]) for reply in sample["filtered_resps"]]
        assert theirs == pytest.approx(ours, abs=1e-4)
        right.append(int(np.argmax(ours)) == 3)
    assert found.results["results"]["choice"]["acc,none"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize("name", ["base", "final", "best", "odd", "short"])
def test_scores_are_those_of_our_own_code(name: str, cases: dict[str, Case], command: Callable[..., Found]) -> None:
    found, config = command(cases[name].args, "--apply_chat_template"), cases[name].config
    chat, model = load_chat(config), load_model(config)
    check_choices(found, model, chat, lambda sample: chat.prompt_ids(prompt_of(sample)))
    requests = [Request(chat.prompt_ids(prompt_of(sample))) for sample in found.samples["answer"]]
    engine = NativeEngine(chat.eos_ids, chat.pad_id, chat.text)
    done = engine.generate(Origin(model), requests, Sampling(ROOM, 0.0))
    ours = [chat.text(completion.ids) for completion in done]
    assert [sample["filtered_resps"][0] for sample in found.samples["answer"]] == ours
    right = [text == sample["doc"]["answer"] for text, sample in zip(ours, found.samples["answer"])]
    assert found.results["results"]["answer"]["exact_match,none"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize("name", ["final", "odd"])
def test_without_a_template_the_text_alone_is_read(name: str, cases: dict[str, Case],
                                                   command: Callable[..., Found]) -> None:
    found, config = command(cases[name].args, names="choice"), cases[name].config
    chat = load_chat(config)
    check_choices(found, load_model(config), chat, lambda sample: chat.encode(sample["doc"]["prompt"]))


def test_the_results_name_run_commit_and_weights(cases: dict[str, Case], command: Callable[..., Found]) -> None:
    case = cases["best"]
    run = Path(case.config.name_or_path).parent
    found = command(case.args, "--apply_chat_template", names="choice").results
    facts = found["config"]["bridgelm"]
    config = case.config.model_copy(update={"chat_template": None})
    assert facts["sha256"] == weights_digest(config) != weights_digest(config.model_copy(
        update={"name_or_path": str(run / "final")}))
    assert (facts["run"], facts["which"]) == (str(run), "best")
    assert facts["run_commit"] == json.loads((run / "run.json").read_text())["commit"]
    assert [facts[key] for key in ("dtype", "device", "eos_ids", "system_prompt")] == ["float32", "cpu", [1], SYSTEM]
    assert found["chat_template"] == TEMPLATE


def test_system_prompts_and_kept_prompts(cases: dict[str, Case]) -> None:
    """The run's comes first and the task's stays; prompts that --cache_requests keeps are not those of another one."""
    from bridgelm.benchmarks.harness import BridgeLM

    folder = cases["final"].config.name_or_path
    lm = BridgeLM(folder, system_prompt=SYSTEM)
    both = lm.apply_chat_template([{"role": "system", "content": "to"}, {"role": "user", "content": "by"}])
    assert both == f"<|system|> by {SYSTEM}\n\nto <|user|> by by <|assistant|> "
    assert lm.tokenizer_name != BridgeLM(folder).tokenizer_name


def test_no_code_of_a_model_is_run(tmp_path: Path) -> None:
    from bridgelm.benchmarks.harness import BridgeLM

    folder = shutil.copytree(toy.model_path("base"), tmp_path / "remote")
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "remote.Remote"})
    (folder / "remote.py").write_text("raise AssertionError('it was run')\n")
    BridgeLM(str(folder), trust_remote_code=True)


@pytest.mark.parametrize(("args", "said"), [
    ("model=toy:base,dtype=float16", "model_args: dtype=float16: "),
    ("model=toy:bass", "model.name_or_path: 'toy:bass'"),
    ("model=RUN,which=bset", "which = 'bset': choose 'final' or 'best'"),
])
def test_mistakes_are_one_line(args: str, said: str, cases: dict[str, Case], tasks: Path) -> None:
    run = str(Path(cases["final"].config.name_or_path).parent)
    done = subprocess.run(
        [sys.executable, "-m", "bridgelm.benchmarks.harness", "--model", "bridgelm",
         "--model_args", args.replace("RUN", run),
         "--tasks", "choice", "--include_path", str(tasks)],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and f"\nerror: {said}" in done.stderr and "Traceback" not in done.stderr


def test_the_missing_package_is_named() -> None:
    code = ("import runpy, sys\nsys.modules['lm_eval'] = None\n"
            "runpy.run_module('bridgelm.benchmarks.harness', run_name='__main__')\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().endswith("pip install 'bridgelm[lm-eval]'")
