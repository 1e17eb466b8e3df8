"""The run folder: what is written can be read, a torn line costs one event, a resume leaves no trace in the metrics."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bridgelm.config.run_config import make_config
from bridgelm.errors import UserError
from bridgelm.runs import progress as progress_module
from bridgelm.runs.folder import RunFolder, git_commit
from bridgelm.runs.progress import Progress, RunsDisplay, RunView, clock, runs_table, short
from bridgelm.runs.reader import Run
from bridgelm.runs.sinks import check_sinks, scalars

CONFIG = make_config({"name": "r", "steps": 10, "model": {"name_or_path": "toy:base"}, "data": {"train": "toy:hops"},
                      "reward": {"verifier": "toy"}, "method": {"name": "grpo"}})


def step(number: int, **more: float) -> dict:
    return {"event": "step", "step": number, "phase": "grpo", "reward": number / 10, "seconds": 2.0 * number,
            "rollouts": 8 * number, "tokens": 100 * number, **more}


def test_what_is_written_is_read_back(tmp_path):
    with RunFolder.create(tmp_path / "r", CONFIG) as folder:
        folder.write_run_info(device="cpu", threads=1, parameters=7)
        folder.append(step(1))
        folder.append({"event": "eval", "step": 1, "split": "validation", "accuracy": 0.25, "n": 4})
        folder.append({"event": "warning", "step": 1, "text": "careful"})
        folder.sample({"step": 1, "problem_id": "p", "completion": "zwölf\ud800", "verdict": "correct"})
        assert Run(tmp_path / "r").status == "running"
        folder.write_result({"final": {"accuracy": 0.5}})
        folder.set_status("finished")
    run = Run(tmp_path / "r")
    assert run.config == CONFIG.resolved() and run.method == "grpo" and run.seed == 0 and run.status == "finished"
    assert run.metrics == [step(1)] and run.evals[0]["accuracy"] == 0.25 and run.warnings[0]["text"] == "careful"
    assert run.samples(1)[0]["completion"] == "zwölf?" and run.samples(2) == []
    assert run.accuracy == 0.5 and run.steps == 1 and run.last("rollouts") == 8 and run.series("reward") == [(1, 0.1)]
    assert run.info["parameters"] == 7 and run.info["peak_memory_mb"] > 1 and run.info["cpu_seconds"] >= 0
    assert "finished at step 1 of 10" in repr(run) and "test 0.500" in repr(run)


def test_numbers_that_json_lacks_become_null_and_numpy_becomes_plain(tmp_path):
    with RunFolder.create(tmp_path / "r", CONFIG) as folder:
        folder.append(step(1, gain=float("nan"), top=float("inf"), many=np.float32(0.5), row=np.arange(2)))
    text = (tmp_path / "r" / "metrics.jsonl").read_text()
    event = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert event["gain"] is None and event["top"] is None and event["many"] == 0.5 and event["row"] == [0, 1]


def test_an_existing_run_is_refused_and_an_empty_folder_is_not(tmp_path):
    (tmp_path / "r").mkdir()
    RunFolder.create(tmp_path / "r", CONFIG).close()
    with pytest.raises(UserError, match=r"--resume .*or choose another `name`"):
        RunFolder.create(tmp_path / "r", CONFIG)
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder.open(tmp_path / "nothing")
    with pytest.raises(UserError, match="not a run folder"):
        Run(tmp_path / "nothing")


def test_a_torn_last_line_is_skipped_and_a_broken_middle_is_named(tmp_path):
    RunFolder.create(tmp_path / "r", CONFIG).close()
    path = tmp_path / "r" / "metrics.jsonl"
    path.write_text(json.dumps(step(1)) + '\n{"event": "step", "st')
    assert Run(tmp_path / "r").metrics == [step(1)]
    path.write_text('{"event"\n' + json.dumps(step(2)) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: not valid JSON"):
        _ = Run(tmp_path / "r").metrics


def _train(folder: RunFolder, first: int, last: int) -> None:
    for number in range(first, last + 1):
        if number == 4:
            folder.append({"event": "warning", "step": 4, "text": "careful"})
        folder.append(step(number))
        folder.sample({"step": number, "completion": f"text {number}"})


def test_resumed_files_equal_uninterrupted_ones_to_the_byte(tmp_path):
    with RunFolder.create(tmp_path / "whole", CONFIG) as folder:
        folder.append({"event": "warning", "step": 0, "text": "the tokenizer has no pad token"})
        _train(folder, 1, 8)
    with RunFolder.create(tmp_path / "split", CONFIG) as folder:
        folder.append({"event": "warning", "step": 0, "text": "the tokenizer has no pad token"})
        _train(folder, 1, 6)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (tmp_path / "split" / name).open("a") as file:
            file.write('{"step": 7, "torn')
    with RunFolder.open(tmp_path / "split") as folder:
        folder.truncate_after(3)
        folder.append({"event": "warning", "step": 0, "text": "the tokenizer has no pad token"})  # said again at start
        _train(folder, 4, 8)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "split" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with RunFolder.open(tmp_path / "split") as folder:
        folder.truncate_after(-1)
    assert (tmp_path / "split" / "metrics.jsonl").read_bytes() == b""


HOLD = """
import sys
from bridgelm.runs.folder import RunFolder
folder = RunFolder.open(sys.argv[1])
folder.set_status("running")
print("holding", flush=True)
sys.stdin.read()
"""


def test_one_writer_at_a_time_and_a_killed_one_is_known_as_such(tmp_path):
    path = tmp_path / "r"
    RunFolder.create(path, CONFIG).close()
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"holding\n"
        assert Run(path).status == "running"
        with pytest.raises(UserError, match="another process is training this run"):
            RunFolder.open(path)
        process.kill()
    assert Run(path).status == "interrupted"
    RunFolder.open(path).close()


def test_cpu_time_goes_on_counting_over_a_resume(tmp_path):
    RunFolder.create(tmp_path / "r", CONFIG).close()
    (tmp_path / "r" / "run.json").write_text('{"cpu_seconds": 1000.0, "started": "then", "peak_memory_mb": 1e9}')
    with RunFolder.open(tmp_path / "r") as folder:
        folder.write_run_info()
    info = Run(tmp_path / "r").info
    assert 1000.0 <= info["cpu_seconds"] < 1010 and info["started"] == "then" and info["peak_memory_mb"] == 1e9


def test_commit_is_none_outside_of_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None


def test_a_missing_sink_is_refused_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install trackio"):
        check_sinks(["trackio"])
    with pytest.raises(UserError, match="pip install wandb"):
        RunFolder.create(tmp_path / "r", {**CONFIG.resolved(), "log": {"sinks": ["wandb"]}})
    assert not (tmp_path / "r").exists()


def test_sinks_get_every_number(tmp_path, monkeypatch):
    calls: list[tuple] = []
    fake = types.SimpleNamespace(init=lambda **kw: calls.append(("init", kw["name"])),
                                 finish=lambda: calls.append(("end",)),
                                 log=lambda metrics, step: calls.append((step, metrics)))
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: fake)
    with RunFolder.create(tmp_path / "r", {**CONFIG.resolved(), "log": {"sinks": ["trackio"]}}) as folder:
        folder.append(step(1, **{"bridge/gain": 0.5, "flag": True}))
        folder.append({"event": "eval", "split": "validation", "step": 1, "accuracy": 0.25})
    assert calls[0] == ("init", "r") and calls[-1] == ("end",)
    assert calls[1][0] == 1 and calls[1][1]["train/reward"] == 0.1 and calls[1][1]["bridge/gain"] == 0.5
    assert "train/flag" not in calls[1][1] and calls[2] == (1, {"validation/accuracy": 0.25})
    assert scalars({"event": "warning", "text": "x", "step": 3}) == {}


def test_view_of_a_run():
    view = RunView("bridge", 10)
    for number in range(1, 5):
        view.update(step(number))
    view.update({"event": "eval", "step": 2, "split": "validation", "accuracy": 0.5})
    view.update({"event": "eval", "step": 4, "split": "validation", "accuracy": 0.4})
    view.update({"event": "eval", "step": 4, "split": "test", "accuracy": 0.9})
    assert view.tokens_per_second == 50 and view.left == 12.0
    assert view.heldout == 0.4 and view.best == (0.5, 2)
    assert view.plain() == ("bridge  step 4/10  grpo · reward 0.400 · held-out 0.400 (best 0.500 at step 2) · "
                            "50 tokens/s  0:12 left")
    view.update({**step(5), "phase": "sft", "reward": None})
    assert view.left is None and view.reward is None  # another stage, another speed: not guessed from the last


def test_display_off_a_terminal_is_one_plain_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Progress("r", 10, console=Console(file=out, width=30)) as display:
        for number in range(1, 11):
            now[0] += 4.0
            display.update(step(number))
        display.update({"event": "warning", "step": 10, "text": "careful [bold]"})
    lines = out.getvalue().splitlines()
    steps = [line.split("  ")[1] for line in lines if "step" in line]
    assert steps == ["step 3/10", "step 6/10", "step 9/10", "step 10/10"]
    assert "warning: careful [bold]" in lines and "\x1b" not in out.getvalue()
    quiet = io.StringIO()
    with Progress("r", 10, quiet=True, console=Console(file=quiet)) as display:
        display.update(step(1))
        display.update({"event": "warning", "step": 1, "text": "careful"})
    assert quiet.getvalue() == ""


def test_display_on_a_terminal_shows_all_that_is_promised():
    out = io.StringIO()
    console = Console(file=out, width=110, force_terminal=True)
    with Progress("r", 10, console=console) as display:
        for number in range(1, 4):
            display.update(step(number))
        display.update({"event": "eval", "step": 3, "split": "validation", "accuracy": 0.25})
    for part in ("step 3/10", "grpo", "reward 0.300", "held-out 0.250", "50 tokens/s", "0:14 left"):
        assert part in out.getvalue()
    table = io.StringIO()
    Console(file=table, width=120).print(runs_table([display.view, RunView("other", 5, "waiting")]))
    assert "3/10" in table.getvalue() and "waiting" in table.getvalue()
    many = RunsDisplay({str(i): RunView(str(i), 5, "waiting") for i in range(60)}, console=Console(height=20))
    many.views["59"].state = "training"
    assert len(many._shown()) == 14 and many._shown()[0].name == "59"


def test_short_numbers_and_clocks():
    assert [short(x) for x in (0, 7, 12.34, 999, 999.6, 1234, 30720, 1.2e12, None)] == [
        "0", "7", "12.3", "999", "1.0k", "1.2k", "30.7k", "1.2T", "–"]
    assert [clock(x) for x in (0, 59.6, 605, 11220, None)] == ["0:00", "1:00", "10:05", "3:07:00", "–"]


def test_tensorboard_for_real(tmp_path):
    pytest.importorskip("tensorboard")
    with RunFolder.create(tmp_path / "r", {**CONFIG.resolved(), "log": {"sinks": ["tensorboard"]}}) as folder:
        folder.append(step(1))
        folder.append({"event": "warning", "step": 1, "text": "careful"})
    found = list(Path(tmp_path / "r" / "tensorboard").glob("events.*"))
    assert found and b"train/reward" in found[0].read_bytes()
