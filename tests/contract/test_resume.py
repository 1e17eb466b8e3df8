"""The same seed gives the same bits, and so does a run that was stopped or killed, wherever that was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridgelm.config.run_config import make_config
from bridgelm.model.policy import Policy
from bridgelm.rollout.roller import Roller
from bridgelm.runs import folder as metrics
from bridgelm.testing.bench import bits, stopping
from bridgelm.training import checkpoint, loop

from .variants import BESIDE, METHOD, READINGS, VARIANTS, sections

Make = Callable[..., dict[str, Any]]
STEPS = 4
CHANGES = {name: {} for name in VARIANTS} | {"bridge, float32": {"model": {"dtype": "float32"}},
                                             "bridge, several updates": {"rollout": {"updates": 2, "refill": 1}}}
# A killed process is the trainer's affair more than the method's: plain RL, and who has weights beside theta.
KILLED = {"grpo", "bridge, several updates", *BESIDE}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what is tested here, and slow on a busy machine: a killed process needs no fsync."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(metrics, "git_commit", lambda: None)


def config_of(raw: Make, name: str, folder: Path, **changes: Any) -> Any:
    method = VARIANTS.get(name, METHOD["bridge"])
    merged = sections(name)
    for key, value in (*CHANGES.get(name, {}).items(), *changes.items()):
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return make_config(raw(method, folder=folder, **merged))


def assert_same_bits(run: Path, whole: dict[str, Any]) -> None:
    found = bits(run)
    for key, value in whole.items():
        assert found[key] == value, f"{run}: {key} differs"


def go_on(run: Path) -> None:
    loop.resume(run, quiet=True)


def metrics_config(run: Path) -> Any:
    return make_config(metrics.read_json(run / "config.json") or {})


def in_child(work: Callable[[], None]) -> int:
    """Runs `work` in a forked process; the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_update(run: Path, start: Callable[[], None], after: int) -> None:
    """kill -9 in the middle of an update: `after` optimisers have stepped in this process."""
    apply, calls = Policy.apply, []

    def counted(self: Policy, name: str, gradient: Any, **options: Any) -> float:
        calls.append(name)
        if len(calls) > after:
            die()
        return apply(self, name, gradient, **options)
    Policy.apply = counted  # type: ignore[method-assign]
    start()


def killed_in_rollouts(run: Path, start: Callable[[], None]) -> None:
    def begin(self: Roller, step: int) -> None:
        Roller._graded = die if step == 2 else Roller._graded  # type: ignore[method-assign,assignment]
        if step == 3:  # nothing was graded in step 2
            die()
        old_begin(self, step)
    old_begin = Roller.begin
    Roller.begin = begin  # type: ignore[method-assign]
    start()


def killed_in_save(run: Path, start: Callable[[], None]) -> None:
    """With the tensors on disk, but not yet the rest; the step's metrics are written."""
    checkpoint.write_json = die  # type: ignore[assignment]
    start()


@pytest.mark.parametrize("name", CHANGES)
def test_the_same_bits_again_and_after_interruptions(name: str, raw: Make, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {kind: tmp_path / kind / "runs" / "run" for kind in ("whole", "again", "stopped", "killed")}
    model = raw()["model"]["name_or_path"]
    configs = {kind: config_of(raw, name, tmp_path / kind, model={"name_or_path": model}, steps=STEPS,
                               data=raw()["data"], checkpoint_every=2 if kind == "killed" else 0) for kind in runs}
    loop.train(configs["whole"], quiet=True)
    whole = bits(runs["whole"])
    assert len({json.loads(e)["grad_norm/theta"] for e in whole["metrics"] if "grad_norm/theta" in e}) == STEPS
    if name in METHOD:
        loop.train(configs["again"], quiet=True)
        assert_same_bits(runs["again"], whole)

    with stopping():  # stopped in every step, saved after it, gone on from there
        for step in range(1, STEPS):
            go = (lambda: loop.train(configs["stopped"], quiet=True)) if step == 1 else (
                lambda: go_on(runs["stopped"]))
            with pytest.raises(loop.Interrupted):
                go()
            assert (metrics.read_json(runs["stopped"] / "run.json") or {})["status"] == "interrupted"
            saved = checkpoint.newest(runs["stopped"])
            assert saved is not None
            assert saved.name == f"step-{step:06d}"
        go_on(runs["stopped"])
    assert_same_bits(runs["stopped"], whole)

    if name in KILLED:
        kill_and_go_on(configs["killed"], runs["killed"], whole)


def kill_and_go_on(config: Any, run: Path, whole: dict[str, Any]) -> None:
    kills: list[Callable[[Callable[[], None]], None]] = [
        lambda start: killed_in_update(run, start, 0),  # before there is any checkpoint
        lambda start: killed_in_rollouts(run, start),
        lambda start: killed_in_update(run, start, 1),
        lambda start: killed_in_save(run, start),
    ]
    for i, kill in enumerate(kills):
        start = (lambda: loop.train(config, quiet=True)) if i == 0 else (lambda: go_on(run))
        assert in_child(lambda kill=kill, start=start: kill(start)) == -signal.SIGKILL, i
    go_on(run)
    assert_same_bits(run, whole)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"step-{STEPS - 2:06d}", whole["checkpoint"]]


def test_a_second_signal_stops_at_once(raw: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, run = tmp_path / "whole" / "runs" / "run", tmp_path / "cut" / "runs" / "run"
    loop.train(config_of(raw, "bridge", tmp_path / "whole"), quiet=True)
    apply, calls = Policy.apply, []

    def twice(self: Policy, name: str, gradient: Any, **options: Any) -> float:
        calls.append(name)
        if len(calls) == 8:  # in the middle of the third step
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return apply(self, name, gradient, **options)
    with monkeypatch.context() as patch:
        patch.setattr(Policy, "apply", twice)
        with pytest.raises(loop.Interrupted):
            loop.train(config_of(raw, "bridge", tmp_path / "cut"), quiet=True)
    assert len(calls) == 8
    saved = checkpoint.newest(run)
    assert saved is not None
    assert saved.name == "step-000002"
    config = metrics_config(run).model_dump(mode="json", by_alias=True)
    assert config["method"]["name"] == "bridge"
    go_on(run)
    found, wanted = bits(run), bits(whole)
    for key in wanted:  # the two runs have data files of their own, with the same rows
        assert found[key] == wanted[key], key
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # handlers are put back


def test_a_finished_run_is_left_alone(raw: Make, tmp_path: Path) -> None:
    run = loop.train(config_of(raw, "grpo", tmp_path), quiet=True)
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file() and p.name != ".lock"}
    assert loop.resume(run.path).status == "finished"
    assert before == {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file() and p.name != ".lock"}


def test_kill_9_from_outside_through_the_command(raw: Make, tmp_path: Path) -> None:
    """The real thing: another process, the command line, no chance to say goodbye."""
    configs = {}
    for kind in ("whole", "killed"):
        config = config_of(raw, "bridge", tmp_path / kind, steps=40, eval={"every": 20}, checkpoint_every=3)
        configs[kind] = tmp_path / f"{kind}.json"
        configs[kind].write_text(json.dumps(config.resolved()))
    loop.train(make_config(json.loads(configs["whole"].read_text())), quiet=True)
    run, command = tmp_path / "killed" / "runs" / "run", [sys.executable, "-m", "bridgelm", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, str(configs["killed"]), "--quiet"], env=environment) as process:
        deadline = time.monotonic() + 60
        while checkpoint.newest(run) is None and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    steps = [e["step"] for e in metrics.read_lines(run / "metrics.jsonl")]
    assert max(steps) < 40
    done = subprocess.run([*command, "--resume", str(run), "--quiet"], env=environment, check=False)
    assert done.returncode == 0
    assert_same_bits(run, bits(tmp_path / "whole" / "runs" / "run"))


def test_the_readings_are_run_too() -> None:
    assert set(READINGS) | set(METHOD) <= set(CHANGES)
