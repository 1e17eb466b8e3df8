"""The real thing: torchrun, the command line, processes that are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridgelm.runs import folder
from bridgelm.training import loop
from bridgelm.config.run_config import make_config

from .test_ranks import assert_same_run, config_of

Make = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.dist


def command(file: Path, restarts: int = 0) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            f"--max-restarts={restarts}", "-m", "bridgelm", "train", str(file), "--quiet"]


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_comes_back(rank: int, shard: bool, raw: Make, tmp_path: Path) -> None:
    changes = {"steps": 20, "eval": {"every": 10}, "checkpoint_every": 3, "shard": shard}
    whole, killed = (config_of(raw, "bridge", tmp_path / kind, **changes) for kind in ("whole", "killed"))
    loop.train(make_config(whole.resolved()), quiet=True)
    file, run = tmp_path / "killed.json", tmp_path / "killed/runs/run"
    file.write_text(json.dumps(killed.resolved()))
    with subprocess.Popen(command(file, 1), stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not any(run.glob("checkpoints/step-*/state.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        ranks = {dict(part.split("=", 1) for part in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in part)
                 .get("RANK"): pid for pid in children(process.pid)}
        os.kill(ranks[str(rank)], 9)
        _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    info = folder.read_json(run / "run.json") or {}
    assert (info["status"], info["ranks"]) == ("finished", 2)
    assert_same_run(run, tmp_path / "whole/runs/run", 1e-6)  # Hugging Face's norms compute in float32


def test_a_mistake_is_said_once(raw: Make, tmp_path: Path) -> None:
    """And a run that is there already is not taken for one's own after a restart."""
    config = config_of(raw, "sft", tmp_path, steps=1)
    loop.train(config, quiet=True)
    file = tmp_path / "again.json"
    file.write_text(json.dumps(config.model_copy(update={"seed": 5}).resolved()))
    done = subprocess.run(command(file, 1), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 2, done.stderr  # once in each of the two attempts
    assert "exitcode  : 2" in done.stderr
