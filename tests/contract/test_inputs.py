"""A run goes on with what it was made of: a change is named and refused, unless it is allowed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import bridgelm
from bridgelm.cli.main import main
from bridgelm.config.run_config import make_config
from bridgelm.errors import UserError
from bridgelm.runs import folder as metrics
from bridgelm.runs import inputs
from bridgelm.runs.reader import Run
from bridgelm.training import loop

Make = Callable[..., dict[str, Any]]

REWARD = "from helper import even\ndef reward(completions, **_):\n    return [float(even(c)) for c in completions]\n"
HELPER = "def even(text):\n    return len(text.split()) % 2 == 0\n"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(metrics, "git_commit", lambda: None)


@pytest.fixture
def make(raw: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a run that was stopped after step 2. Its model, data and reward function lie in `tmp_path`."""
    def made(method: str = "grpo", **changes: Any) -> Path:
        given = raw(method)
        shutil.copytree(given["model"]["name_or_path"], tmp_path / "base")
        (tmp_path / "reward.py").write_text(REWARD)
        (tmp_path / "helper.py").write_text(HELPER)
        reward = {"verifier": "none", "functions": [f"{tmp_path}/reward.py:reward"]}
        config = make_config(raw(method, model={"name_or_path": str(tmp_path / "base")}, reward=reward, **changes))
        take_step = loop.take_step

        def step(session: Any) -> Any:
            if session.step == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return take_step(session)
        with monkeypatch.context() as patch:
            patch.setattr(loop, "take_step", step)
            with pytest.raises(loop.Interrupted):
                loop.train(config, quiet=True)
        return Path(config.out) / config.name
    return made


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def rows(path: Path, change: Callable[[list[Any]], object]) -> None:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    change(found)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


def swap(found: list[Any]) -> None:
    found[3], found[16] = found[16], found[3]


def weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def set_config(run: Path, section: str, **values: Any) -> None:
    config = metrics.read_json(run / "config.json") or {}
    changed = {section: {**config[section], **values}} if section else values
    metrics.write_json(run / "config.json", {**config, **changed})


def demo(found: list[Any]) -> None:
    found[5]["demos"][0] += " ;"


CHANGES: dict[str, tuple[str, str, Callable[[Path, Path], object]]] = {
    "rows swapped": ("data", "data.train: rows 4, 17 changed", lambda at, run: rows(at / "train.jsonl", swap)),
    "a row gone": ("data", "data.train: there were 40 rows, now there are 39",
                   lambda at, run: rows(at / "train.jsonl", lambda found: found.pop())),
    "a demonstration": ("data", "data.train: row 6 changed", lambda at, run: rows(at / "train.jsonl", demo)),
    "a test answer": ("data", "data.test: row 1 changed",
                      lambda at, run: rows(at / "test.jsonl", lambda found: found[0].update(answer="3"))),
    "reward": ("reward", "reward.py changed", lambda at, run: edit(at / "reward.py", "float(", "0.5 * float(")),
    "what it imports": ("reward", "helper.py changed", lambda at, run: edit(at / "helper.py", "== 0", "== 1")),
    "weights": ("model", "model: model.safetensors changed", lambda at, run: weights(at / "base")),
    "model config": ("model", "model: config.json changed",
                     lambda at, run: edit(at / "base/config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')),
    "template": ("tokenizer", "tokenizer: chat template changed",
                 lambda at, run: edit(at / "base/chat_template.jinja", "<user>", "<bot>")),
    "vocabulary": ("tokenizer", "tokenizer: vocabulary and rules changed",
                   lambda at, run: edit(at / "base/tokenizer.json", '"sum"', '"sums"')),
    "seed": ("config", "config: seed was 0, is 7", lambda at, run: set_config(run, "", seed=7)),
    "dtype": ("config", 'config: model.dtype was "float64", is "float32"',
              lambda at, run: set_config(run, "model", dtype="float32")),
    "rate": ("config", "config: optim.lr was 0.01, is 0.5", lambda at, run: set_config(run, "optim", lr=0.5)),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_named_and_refused_unless_allowed(kind: str, make: Callable[..., Path], tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    key, says, change = CHANGES[kind]
    run = make()
    change(tmp_path, run)
    history = (run / "metrics.jsonl").read_bytes()
    for allowed in ([], [k for k in inputs.KEYS if k != key]):
        flags = [word for k in allowed for word in ("--allow-change", k)]
        assert main(["train", "--resume", str(run), "--quiet", *flags]) == 2
        said = capsys.readouterr().err
        assert says in said
        assert f"--allow-change {key}`" in said
        assert said.count("\n") == 1
    assert (run / "metrics.jsonl").read_bytes() == history
    assert main(["train", "--resume", str(run), "--quiet", "--allow-change", key]) == 0
    done = Run(run)
    assert done.status == "finished"
    (event,) = (event for event in done.events if event["event"] == "change")
    assert (event["step"], event["allowed"]) == (2, [key])
    assert says in event["text"]
    assert (metrics.read_json(run / inputs.FILE) or {})["changes"] == [event]
    assert [e["step"] for e in done.metrics] == [1, 2, 3, 4]


def test_nothing_changed_is_nothing_said(make: Callable[..., Path]) -> None:
    run = make()
    kept = (run / inputs.FILE).read_bytes()
    set_config(run, "", out="elsewhere")  # where the run lay once
    done = bridgelm.train(resume=run, quiet=True)
    assert not [event for event in done.events if event["event"] in ("change", "warning")]
    assert {**json.loads((run / inputs.FILE).read_text()), "config": {}} == {**json.loads(kept), "config": {}}


def test_several_changes_are_all_named(make: Callable[..., Path], tmp_path: Path) -> None:
    run = make()
    for kind in ("rows swapped", "weights", "seed", "rate"):
        CHANGES[kind][2](tmp_path, run)
    with pytest.raises(UserError, match=r"optim\.lr was .*, seed was .*; data\.train: .*; model: .*"
                                        r"--allow-change config --allow-change data --allow-change model`"):
        bridgelm.train(resume=run, quiet=True)
    with pytest.raises(UserError, match=r"--allow-change config --allow-change model`"):
        bridgelm.train(resume=run, quiet=True, allow_change=["data"])
    assert bridgelm.train(resume=run, quiet=True, allow_change=["data", "model", "config"]).status == "finished"


def test_what_cannot_be_allowed(make: Callable[..., Path], tmp_path: Path) -> None:
    run = make()
    with pytest.raises(UserError, match="--allow-change everything: there is no such key; one of config, data"):
        bridgelm.train(resume=run, quiet=True, allow_change=["everything"])
    for section, values, says in (("", {"method": {"name": "sft"}}, "the method was grpo, is sft"),
                                  ("", {"steps": 1}, "steps = 1, but the run is at step 2"),
                                  ("model", {"lora_rank": 2}, "is missing; the run goes on only with the model")):
        kept = (run / "config.json").read_bytes()
        set_config(run, section, **values)
        with pytest.raises(UserError, match=says):
            bridgelm.train(resume=run, quiet=True, allow_change=["config"])
        (run / "config.json").write_bytes(kept)


@pytest.mark.parametrize("lost", [Path.unlink, lambda path: path.write_text("{}")], ids=["gone", "empty"])
def test_without_fingerprints_nothing_is_taken_on_trust(lost: Callable[[Path], object],
                                                        make: Callable[..., Path]) -> None:
    run = make()
    lost(run / inputs.FILE)
    with pytest.raises(UserError, match=r"inputs\.json is missing or incomplete"):
        bridgelm.train(resume=run, quiet=True)
    assert bridgelm.train(resume=run, quiet=True, allow_change=inputs.KEYS).status == "finished"


def test_other_versions_are_told_and_refuse_nothing(make: Callable[..., Path],
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    run = make()
    kept = json.loads((run / inputs.FILE).read_text())
    metrics.write_json(run / inputs.FILE, {**kept, "versions": {**kept["versions"], "numpy": "0.9"}})
    assert bridgelm.train(resume=run).status == "finished"
    assert "note: numpy 0.9 is now" in capsys.readouterr().out
