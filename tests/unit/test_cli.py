"""The command line as a user meets it: what each command prints, and that each mistake is one line with exit code 2."""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bridgelm
from bridgelm.cli.evaluate import format_result
from bridgelm.cli.main import main, parse
from bridgelm.config import catalogue
from bridgelm.config.run_config import absolute, load_config, make_config, starter
from bridgelm.errors import UserError
from bridgelm.runs import preflight

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "toy").glob("*.toml"))
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def run(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "bridgelm", *map(str, words)], capture_output=True, text=True,
                          cwd=cwd or ROOT, check=False)


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail as a user's mistake does, and returns its one line."""

    def check(*words: str | Path) -> str:
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert code == 2, (out, err)
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return check


# -- a user's own model and data, as small as they can be --------------------------------------------------------------

@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model folder (its weights are empty: no command here may open them), data and a TOML file."""
    model = tmp_path / "model"
    model.mkdir()
    words = {word: i for i, word in enumerate(["<unk>", "<eos>", "<pad>", "what", "is", "one", "two", "three"])}
    (model / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "decoder": None, "pre_tokenizer": {"type": "Whitespace"},
        "added_tokens": [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, token in enumerate(["<unk>", "<eos>", "<pad>"])],
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}}))
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 8, "eos_token_id": 1}))
    (model / "model.safetensors").write_bytes(b"")
    tokens = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, **tokens}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    numbers = ["one", "two", "three", "one one", "one two", "one three", "two one", "two two", "two three"]
    for role, part in (("train", numbers[:5]), ("validation", numbers[5:7]), ("test", numbers[7:])):
        rows = [{"prompt": f"what is {n}", "answer": n, "demos": [f"{n} is {n}"]} for n in part]
        (tmp_path / f"{role}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my.toml").write_text(
        'steps = 4\nmodel = { name_or_path = "model" }\nmethod = { name = "joint" }\nreward = { verifier = "exact" }\n'
        'data = { train = "train.jsonl", validation = "validation.jsonl", test = "test.jsonl" }\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_right_file_passes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "my.toml"]) == 0
    text = capsys.readouterr().out
    for part in ("nothing wrong found", "runs/my", "joint", "1024 = 4 steps x 32 prompts x 8 samples"):
        assert part in text
    assert main(["check", "my.toml", "--data"]) == 0
    assert "5 problems" in capsys.readouterr().out


def test_golds_that_the_verifier_does_not_accept_are_named(place: Path, capsys: pytest.CaptureFixture[str],
                                                           refuse: Callable[..., str]) -> None:
    words = ["check", "my.toml", "--data", "reward.verifier=math"]
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    rows[0]["answer"] = "It is one and one.\n#### 1,200"
    rows[1] |= {"id": "x", "answer": "We think\nthat it is a cat"}
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = refuse(*words)
    assert "1 of 5 rows: train.jsonl:2" in line.replace(f"{place}/", "")
    assert main([*words, "reward.max_error_rate=0.5"]) == 0
    assert "train.jsonl:2: 'We think that it is a cat': error, the gold answer is a text" in capsys.readouterr().out


def append(path: Path, line: str) -> None:
    path.write_text(path.read_text() + line + "\n")


def set_tokenizer(place: Path, **changes: Any) -> None:
    path = place / "model" / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def drop_demos(place: Path) -> None:
    path = place / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "demos"}) + "\n" for row in rows))


def old_run(place: Path) -> None:
    (place / "runs" / "my").mkdir(parents=True)
    (place / "runs" / "my" / "config.json").write_text("{}")


def finished_run(place: Path) -> None:
    old_run(place)
    (place / "runs" / "my" / "result.json").write_text("{}")


def no_safetensors(place: Path) -> None:
    (place / "model" / "model.safetensors").rename(place / "model" / "pytorch_model.bin")


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda place: (place / name).write_text(text) and None


# What is wrong -> the overrides that say it, what is done to the folder, and the words that must be in the line.
STATIC: dict[str, tuple[list[str], Callable[[Path], None] | None, list[str]]] = {
    "unknown key": (["rollout.promts=3"], None, ["my.toml", "rollout.promts", "'prompts'"]),
    "wrong type": (['steps="four"'], None, ["my.toml", "steps", "integer", "four"]),
    "out of range": (["method.name=bridge", "method.lambda=1.5"], None, ["method.lambda", "1"]),
    "unknown method": (["method.name=brige"], None, ["method.name", "brige", "'bridge'"]),
    "missing file": (["data.train=none.jsonl"], None, ["data.train", "none.jsonl does not exist"]),
    "missing test": (["data.test=none.jsonl"], None, ["data.test", "none.jsonl does not exist"]),
    "odd file": (["data.train=my.toml"], None, ["data.train", ".toml", "JSONL"]),
    "test is train": (["data.test=train.jsonl"], None, ["data.test", "held out"]),
    "no such family": (["data.train=toy:chess", "reward.verifier=toy"], None, ["data.train", "chess", "toy:hops"]),
    "toy and own test": (["data.train=toy:hops", "reward.verifier=toy"], None, ["data.test", "leave it out"]),
    "no such model": (["model.name_or_path=./none"], None, ["model.name_or_path", "./none does not exist"]),
    "no toy model": (["model.name_or_path=toy:giant"], None, ["model.name_or_path", "giant"]),
    "not a model": (["model.name_or_path=runs"], lambda p: (p / "runs").mkdir(), ["model.name_or_path", "config.json"]),
    "pickled weights": ([], no_safetensors, ["model.name_or_path", "safetensors"]),
    "no template file": (["model.chat_template=none.jinja"], None, ["model.chat_template", "none.jinja"]),
    "broken template": (["model.chat_template=a.jinja"], write("a.jinja", "\n{% if %}"), ["a.jinja, line 2"]),
    "device": (["model.device=gpu"], None, ["model.device", "cuda"]),
    "no reward file": (["reward.functions=['none.py:f']"], None, ["reward.functions.0", "none.py"]),
    "no reward function": (["reward.functions=['r.py:f']"], write("r.py", "def g(): 0"), ["r.py", "'f'", "it has g"]),
    "broken reward file": (["reward.functions=['r.py:f']"], write("r.py", "\ndef f(:"), ["r.py, line 2"]),
    "reward form": (["reward.functions=['r.f']"], None, ["reward.functions.0", "file.py:function"]),
    "pattern": (["model.lora_modules='q_proj('"], None, ["model.lora_modules", "regular expression"]),
    "method pattern": (["method.name=bridge", "method.modules='('"], None, ["method.modules", "regular expression"]),
    "updates": (["rollout.prompts=2", "rollout.updates=3"], None, ["rollout.updates", "rollout.prompts"]),
    "eight bits": (["optim.kind=adamw8bit"], None, ["optim.kind", "pip install 'bridgelm[8bit]'"]),
    "no sink": (["log.sinks=['trackio']"], None, ["log.sinks", "trackio", "pip install"]),
    "existing run": ([], old_run, ["runs/my", "--resume runs/my"]),
    "finished run": ([], finished_run, ["runs/my", "finished", "bridgelm report runs/my"]),
    "foreign folder": ([], lambda p: (p / "runs/my/x").mkdir(parents=True), ["runs/my", "no run folder"]),
    "override": (["steps"], None, ["unknown argument 'steps'", "--help"]),
}
DATA: dict[str, tuple[list[str], Callable[[Path], None] | None, list[str]]] = {
    "malformed line": ([], lambda p: append(p / "train.jsonl", '{"prompt": '), ["train.jsonl:6"]),
    "empty answer": ([], lambda p: append(p / "train.jsonl", '{"prompt": "what", "answer": ""}'), ["train.jsonl:6"]),
    "no prompt": ([], lambda p: append(p / "train.jsonl", '{"answer": "one"}'), ["train.jsonl:6", "prompt"]),
    "long demonstration": (["data.max_demo_tokens=3"], None, ["demonstration", "data.max_demo_tokens"]),
    "long prompt": (["data.max_prompt_tokens=2"], None, ["prompt", "data.max_prompt_tokens"]),
    "no pad and no eos": ([], lambda p: set_tokenizer(p, pad_token=None, eos_token=None), ["pad"]),
    "no chat template": ([], lambda p: set_tokenizer(p, chat_template=None), ["chat template", "model.chat_template"]),
    "unmet needs": ([], drop_demos, ["method joint", "demonstrations"]),
}


@pytest.mark.parametrize("case", STATIC)
def test_mistakes_that_check_sees(case: str, place: Path, refuse: Callable[..., str]) -> None:
    library = {"no sink": "trackio", "eight bits": "bitsandbytes"}.get(case)
    if library and preflight.find_spec(library):
        pytest.skip(f"{library} is installed here")
    overrides, spoil, words = STATIC[case]
    if spoil is not None:
        spoil(place)
    if case == "override":
        line = refuse("check", "my.toml", "--data", *overrides)
    else:
        line = refuse("check", "my.toml", *overrides)
        assert refuse("train", "my.toml", *overrides) == line, "train refuses as check does, before a model is loaded"
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize("case", DATA)
def test_mistakes_that_check_data_sees(case: str, place: Path, refuse: Callable[..., str]) -> None:
    overrides, spoil, words = DATA[case]
    if spoil is not None:
        spoil(place)
    line = refuse("check", "my.toml", "--data", *overrides)
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize(("words", "expected"), [
    (["trian"], "train"), (["train"], "TOML file"), (["train", "a.toml", "--resume", "b"], "--resume"),
    (["train", "none.toml"], "none.toml: cannot be read"), (["train", "--resume", "none"], "none: not a run folder"),
    (["export", "none", "out"], "none: not a run folder"), (["check"], "FILE"), (["show", "brigde"], "'bridge'"),
    (["show", "xyzzy"], "sequence"), (["check", "a.toml", "--all"], "--all"), (["methods", "a=1"], "a=1"),
    (["compare", "a.toml"], "--methods"), (["compare", "a.toml", "--methods", "sft", "--seeds", "0"], "--seeds"),
    (["eval", "none", "--samples", "-1"], "--samples"), (["report"], "RUN"),
])
def test_wrong_command_lines(words: list[str], expected: str, refuse: Callable[..., str], tmp_path: Path,
                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in refuse(*words)


def test_no_traceback_in_a_real_process(tmp_path: Path) -> None:
    done = run("check", tmp_path / "none.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


# -- what the quick commands print -------------------------------------------------------------------------------------

@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_pass(recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["check", str(recipe), f"out={tmp_path}"]) == 0
    assert "nothing wrong found" in capsys.readouterr().out


def test_version_and_help() -> None:
    assert run("--version").stdout == f"bridgelm {bridgelm.__version__}\n"
    done = run()
    assert done.returncode == 0
    assert "compare" in done.stdout
    for command in ("train", "eval", "compare", "report", "export", "check", "methods", "show", "init"):
        assert run(command, "--help").returncode == 0, command


def test_methods_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(catalogue.option_classes())
    assert not any("(no description)" in line for line in lines)


def test_show_reads_equation_defaults_and_sources_from_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "bridge"]) == 0
    text = capsys.readouterr().out
    for part in (catalogue.docstring("bridge"), "Needs of the data: demos", "lambda = 0.5",
                 "rank = 16", "rl.clip_low = 0.2", "truncation of the shadow's token ratio",
                 'preset = "paper" sets'):
        assert part in text
    for row in catalogue.option_rows(catalogue.find("bridge")):
        assert f"  {row.key} = {row.default}" in text


@pytest.mark.parametrize("name", catalogue.option_classes())
def test_needs_are_read_as_the_class_has_them(name: str) -> None:
    from bridgelm.methods import METHODS

    assert catalogue.needs(name) == METHODS[name].needs


def test_the_needs_of_a_sequence_are_those_of_its_stages() -> None:
    config = load_config(ROOT / "recipes" / "toy" / "cold_start.toml")
    assert catalogue.needs_of(config.method) == {"demos"}
    assert catalogue.needs_of(load_config(ROOT / "recipes" / "toy" / "grpo.toml").method) == frozenset()


def test_init_writes_a_file_that_checks_once_the_data_is_there(place: Path, capsys: pytest.CaptureFixture[str],
                                                               refuse: Callable[..., str]) -> None:
    assert main(["init"]) == 0
    assert "bridgelm check bridgelm.toml --data" in capsys.readouterr().out
    assert "data.train: data/train.jsonl does not exist" in refuse("check", "bridgelm.toml")
    (place / "data").mkdir()
    for role in ("train", "demos", "validation", "test"):
        (place / "data" / f"{role}.jsonl").touch()
    assert main(["check", "bridgelm.toml"]) == 0
    assert "exists already" in refuse("init")
    assert "cannot be written" in refuse("init", place / "none" / "a.toml")


def test_every_commented_line_of_the_starter_file_is_valid(place: Path) -> None:
    """Uncommented one at a time, in place: an example that does not load is worse than none."""
    lines = starter().splitlines()
    tried = 0
    for index, line in enumerate(lines):
        setting = line.removeprefix("# ")
        if not line.startswith("# ") or " = " not in setting or setting.startswith(("name", "stages")):
            continue
        path = place / "tried.toml"
        path.write_text("\n".join([*lines[:index], setting, *lines[index + 1:]]))
        load_config(path)
        tried += 1
    assert tried >= 5


def test_quick_commands_load_no_torch_and_take_under_a_second(tmp_path: Path) -> None:
    for words in (["check", str(RECIPES[0]), f"out={tmp_path}"], ["methods"], ["show", "bridge"], ["--version"]):
        code = (f"import sys\nfrom bridgelm.cli.main import main\ntry: main({words!r})\nexcept SystemExit: pass\n"
                "sys.exit(' '.join({'torch', 'transformers', 'datasets'} & set(sys.modules)) or 0)")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        # Processor time, which a busy machine does not stretch as it does the clock.
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0, words


# -- the commands that do the work, with the work replaced -------------------------------------------------------------

@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for the modules behind train, eval, compare, report and export; keeps what they were called with."""
    calls: dict[str, Any] = {}

    def keep(name: str, answer: Any) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            calls[name] = (args, kwargs)
            return answer

        return called

    result = {"accuracy": 0.5, "interval": [0.4, 0.6], "n": 100, "by_difficulty": {"3": [0.5, 100]}, "length": 9.0,
              "truncated": 0.0, "k": 4, "avg_k": 0.45, "pass_k": {"1": 0.45, "4": 0.8}}
    done = types.SimpleNamespace(path=Path("runs/my"), warnings=[{"step": 20, "text": "careful"}])
    stand_ins = {"training.loop": {"train": keep("train", done), "resume": keep("resume", done)},
                 "training.evaluation": {"evaluate_run": keep("evaluate", result)},
                 "training.checkpoint": {"export": keep("export", Path("out"))},
                 "comparisons.compare": {"compare": keep("compare", Path("page")),
                             "resolve": lambda base, *_: {"a": load_config(base)}},
                 "reports.page": {"report": keep("report", Path("page"))}}
    for name, functions in stand_ins.items():
        module = types.ModuleType(f"bridgelm.{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, f"bridgelm.{name}", module)
        room, _, file = name.partition(".")
        monkeypatch.setattr(importlib.import_module(f"bridgelm.{room}"), file, module, raising=False)
    return calls


def test_train_takes_overrides_before_and_behind_options(place: Path, work: dict[str, Any],
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "my.toml", "steps=7", "--quiet", "seed=3", "optim.lr=1e-4"]) == 0
    (config,), kwargs = work["train"]
    assert (config.steps, config.seed, config.optim.lr, kwargs) == (7, 3, 1e-4, {"quiet": True})
    said = capsys.readouterr().out
    assert "next: bridgelm report runs/my" in said
    assert "warning (step 20): careful\n" in said, "also where nothing was shown while it ran"


def test_resume(place: Path, work: dict[str, Any], refuse: Callable[..., str]) -> None:
    old_run(place)
    assert main(["train", "--resume", "runs/my"]) == 0
    assert work["resume"] == ((Path("runs/my"),), {"quiet": False, "allow_change": []})
    assert main(["train", "--resume", "runs/my", "--allow-change", "data", "--allow-change", "config"]) == 0
    assert work["resume"][1]["allow_change"] == ["data", "config"]
    assert "--resume" in refuse("train", "my.toml", "--allow-change", "data")
    assert "own configuration" in refuse("train", "my.toml", "--resume", "runs/my")
    assert "own configuration" in refuse("train", "--resume", "runs/my", "steps=9")


def test_an_interrupt_says_how_to_go_on(place: Path, work: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted(KeyboardInterrupt):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Interrupted(Path("runs/my"))

    monkeypatch.setattr(sys.modules["bridgelm.training.loop"], "train", stop)
    assert main(["train", "my.toml"]) == 130
    assert capsys.readouterr().err == "interrupted; go on with: bridgelm train --resume runs/my\n"


def test_the_other_commands(place: Path, work: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "runs/my", "--samples", "4", "--which", "best"]) == 0
    assert work["evaluate"] == (("runs/my",), {"split": "test", "samples": 4, "which": "best"})
    text = capsys.readouterr().out
    for part in ("0.500", "0.400 to 0.600", "100 problems", "avg@4", "pass@4", "0.800"):
        assert part in text
    assert main(["export", "runs/my", "out"]) == 0
    assert work["export"] == ((Path("runs/my"), Path("out")), {"which": "final"})
    assert main(["report", "a", "b", "--out", "page"]) == 0
    assert work["report"] == (([Path("a"), Path("b")], Path("page")), {"base": None})
    assert main(["compare", "my.toml", "--methods", "sft, grpo", "--seeds", "2", "--jobs", "2", "--out", "o"]) == 0
    assert work["compare"] == ((Path("my.toml"), ["sft", "grpo"], 2, 2, Path("o")),
                               {"overrides": [], "quiet": False, "dry_run": False})
    assert "report: page" in capsys.readouterr().out


def test_report_skips_what_a_shell_finds_beside_the_runs(place: Path, work: dict[str, Any],
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "recipes"):
        Path(name).mkdir()
    Path("a/config.json").write_text("{}")
    Path("a.log").write_text("")
    assert main(["report", "a", "a.log", "recipes", "--out", "page"]) == 0
    assert work["report"][0] == ([Path("a")], Path("page"))
    assert capsys.readouterr().err == "skipped, as no run folder: a.log, recipes\n"
    assert main(["report", "a", "gone"]) == 0 and work["report"][0][0] == [Path("a"), Path("gone")]  # refused there


def test_format_result_leaves_out_what_was_not_measured() -> None:
    text = format_result({"accuracy": 0.25, "interval": [0.1, 0.4], "n": 8, "by_difficulty": {}, "length": 1.0,
                          "truncated": 0.5})
    assert "avg@" not in text
    assert "50.0% cut" in text


def test_python_takes_a_config_a_dict_or_a_file(place: Path, work: dict[str, Any]) -> None:
    config = load_config("my.toml")
    for given in (config, config.resolved(), "my.toml", Path("my.toml")):
        bridgelm.train(given, quiet=True)
        assert work["train"] == ((absolute(config),), {"quiet": True})
    assert make_config(config.resolved()) == config
    with pytest.raises(UserError, match="either"):
        bridgelm.train()
    bridgelm.train(resume="runs/my")
    assert work["resume"][0] == (Path("runs/my"),)
    bridgelm.evaluate("some/model", config="my.toml")
    assert work["evaluate"] == (("some/model",), {"split": "test", "samples": 0, "which": "final", "config": config})


def test_python_refuses_what_check_refuses(place: Path, work: dict[str, Any]) -> None:
    old_run(place)
    with pytest.raises(UserError, match="this run exists"):
        bridgelm.train("my.toml")
    assert work == {}


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(f"{sys.executable} -m bridgelm show bridge | head -1", shell=True, capture_output=True,
                          text=True, cwd=ROOT, env={**os.environ}, check=False)
    assert done.stderr == ""
    assert done.stdout == "bridge\n"


def test_parse_keeps_the_order_of_overrides() -> None:
    assert parse(["train", "a.toml", "x=1", "--quiet", "x=2"]).overrides == ["x=1", "x=2"]


def test_corrupt_weights_are_a_user_error(tmp_path):
    import shutil

    from bridgelm.config.run_config import ModelConfig
    from bridgelm.data.model_shapes import model_path
    from bridgelm.model.loading import load_model

    folder = tmp_path / "model"
    shutil.copytree(model_path("toy:base"), folder)
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"model.name_or_path: .* cannot be opened"):
        load_model(ModelConfig(name_or_path=str(folder)))
