"""Shared results: what a file says and what it must not say, and several files as one table."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridgelm.cli.main import main
from bridgelm.config.run_config import make_config

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, raw: Callable[..., dict[str, Any]]) -> Write:
    """A finished run folder, by hand."""
    def make(name: str, seed: int, accuracy: float, place: str = "ana", **sections: Any) -> Path:
        home = tmp_path / "home" / place
        made = raw("grpo", home, **{"seed": seed, "name": name, **sections})
        for file in home.rglob("*.*"):
            os.utime(file, (1, 1))
        run = home / "runs" / name
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps(make_config(made).resolved()))
        (run / "run.json").write_text(json.dumps(
            {"started": "2026-01-01T00:00:00+00:00", "status": "finished", "host": "anas-laptop", "device": "cuda",
             "accelerator": "Card 9000", "ranks": 2, "bridgelm": "0.1.0", "peak_device_memory_mb": 7.0}))
        figures = {"accuracy": accuracy, "n": 10, "interval": [0.1, 0.9], "correct": {"secret-id": 1}}
        (run / "result.json").write_text(json.dumps({"final": figures, "best": figures}))
        events = [{"event": "step", "step": 4, "flops": 2e9, "seconds": 30.0, "rollouts": 64},
                  {"event": "eval", "step": 4, "accuracy": 0.25, "rollouts": 64, "flops": 2e9}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        return run
    return make


def shared(path: Path, *runs: Path) -> list[dict[str, Any]]:
    assert main(["report", "--share", *map(str, runs), "--out", str(path)]) == 0
    return json.loads(path.read_text())["runs"]


def test_a_file_says_what_is_needed_and_nothing_of_the_machine(write: Write, tmp_path: Path) -> None:
    run = write("r0", 3, 0.5)
    suite = {"greedy": {"accuracy": 0.4, "interval": [0.3, 0.5], "n": 90}, "settings": {
        "items": "abc", "sampling": {"greedy": 1}, "model": {"sha256": "def"}, "prompt": {"text": "{problem}"},
        "label_fixes": "/home/ana/fixes.jsonl"}, "model": {"run": str(run)}}
    (run / "eval").mkdir()
    (run / "eval" / "gsm8k.json").write_text(json.dumps(suite))
    (run / "eval" / "results.json").write_text("{}")
    found, = shared(tmp_path / "mine.json", run)
    text = (tmp_path / "mine.json").read_text()
    for private in (str(tmp_path), "ana", "secret-id", "tests/"):
        assert private not in text, private
    train = tmp_path / "home" / "ana" / "train.jsonl"
    assert found["settings"]["data"]["train"] == "sha256:" + hashlib.sha256(train.read_bytes()).hexdigest()
    assert found["hardware"] == {"device": "cuda", "accelerator": "Card 9000", "ranks": 2, "cpus": None}
    assert found["results"]["final"] == {"accuracy": 0.5, "n": 10, "interval": [0.1, 0.9]}
    assert found["suites"]["gsm8k"] == {"value": 0.4, "interval": [0.3, 0.5], "n": 90, "k": None, "items": "abc",
                                        "sampling": {"greedy": 1}, "weights": "def", "prompt": "{problem}"}
    assert found["curve"] == [{"step": 4, "accuracy": 0.25, "rollouts": 64, "flops": 2e9}]
    assert (found["cost"]["flops"], found["cost"]["peak_memory_mb"], found["seed"]) == (2e9, 7.0, 3)


def test_the_digest_is_of_what_decides_the_outcome(write: Write, tmp_path: Path) -> None:
    same = shared(tmp_path / "a.json", write("r0", 0, 0.5), write("r1", 1, 0.5, "bob", threads=2, log={"samples": 0}))
    assert same[0]["digest"] == same[1]["digest"], "other seed, name, folder and threads"
    other, = shared(tmp_path / "b.json", write("r2", 0, 0.5, "cem", optim={"lr": 0.5}))
    assert other["digest"] != same[0]["digest"]


def test_a_file_that_was_changed_is_not_passed_off_as_what_was_read(write: Write, tmp_path: Path) -> None:
    run = write("r0", 0, 0.5)
    (tmp_path / "home" / "ana" / "train.jsonl").write_text("other\n")
    (tmp_path / "home" / "ana" / "test.jsonl").unlink()
    data = shared(tmp_path / "a.json", run)[0]["settings"]["data"]
    assert (data["train"], data["test"]) == ("unknown", "unknown")


def test_files_are_one_table(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared(tmp_path / "mine.json", write("r0", 0, 0.5), write("r1", 1, 0.7))
    shared(tmp_path / "theirs.json", write("r2", 0, 0.25, "bob", rollout={"group": 2}))
    capsys.readouterr()
    assert main(["report", "--share", str(tmp_path / "mine.json"), str(tmp_path / "theirs.json")]) == 0
    printed = capsys.readouterr().out
    mine, theirs = (line for line in printed.splitlines() if "grpo" in line)
    assert "| 1: mine | grpo |" in mine
    assert "| 2 | 60.0 [-67.1, 187.1] | 2G | 0:30 | 2 x Card 9000 | bridgelm 0.1.0 |" in mine
    assert "| 1 | 25.0 [10.0, 90.0] |" in theirs
    assert "same problems" not in printed
    changed = json.loads((tmp_path / "theirs.json").read_text())
    changed["runs"][0]["settings"]["data"]["test"] = "hf:other"
    changed["runs"][0]["method"] = "\x1b[2Jgrpo"
    (tmp_path / "theirs.json").write_text(json.dumps(changed))
    assert main(["report", "--share", str(tmp_path / "mine.json"), str(tmp_path / "theirs.json")]) == 0
    printed = capsys.readouterr().out
    assert "Not all runs were tested on the same problems" in printed
    assert "\x1b" not in printed


@pytest.mark.parametrize(("change", "says"), [
    ({"version": 2}, "has version 2 of the form, and this is 1"), ({"format": "x"}, "not written by"),
    ({"runs": [{"method": "grpo"}]}, "no sound 'seed'")])
def test_a_file_of_another_form_is_refused(change: dict[str, Any], says: str, write: Write, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.json"
    shared(file, write("r0", 0, 0.5))
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert main(["report", "--share", str(file)]) == 2
    assert says in capsys.readouterr().err


def test_what_cannot_be_shared_is_told(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write("r0", 0, 0.5)
    for words, says in (([str(run), "a.json"], "takes run folders and writes a file, or takes such files"),
                        ([str(run), "--out", "folder"], "give --out NAME.json"),
                        ([str(run), "--base", "grpo"], "do not go together")):
        assert main(["report", "--share", *words]) == 2
        assert says in capsys.readouterr().err
    (run / "result.json").unlink()
    assert main(["report", "--share", str(run)]) == 2
    assert "not finished" in capsys.readouterr().err
