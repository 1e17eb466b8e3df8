"""benchmarks/gpu.py at the size of a test: that each figure is made, and that what does not fit in is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = """
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "pydantic" else find(name, *rest)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*words: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *before, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", *words], text=True,
                          capture_output=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_every_figure_is_made(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = run("--out", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [row["method"] for row in found["steps"]] == ["grpo", "sft", "bridge", "barrier", "grpo, adapters",
                                                         "bridge, adapters"]
    for row in found["steps"]:
        assert abs(row["seconds"] - row["rollout"] - row["update"]) < 1e-6
        assert row["share of the arithmetic in updates"] > 0
        assert (row["tokens"]["generate"] > 0) == (row["method"] != "sft")
    tokens = {row["method"]: row["tokens"]["train"] for row in found["steps"]}
    assert tokens["bridge"] > tokens["grpo"] > tokens["sft"] > 0, "the shadow's passes are in"
    decode, = found["decode"]
    weights = 2 * (64 * 16 + 2 * (16 * (2 * 16 + 2 * 8 + 3 * 32) + 16 + 2 * 8 + 3 * 16 - 16) + 16)
    cache = 2 * 2 * decode["rows"] * 2 * 4 * 2 * decode["width"]
    assert decode["bytes"] == weights + cache
    assert found["skipped"] == []


def test_what_does_not_fit_in_is_named(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert run("--out", str(out), "--minutes", "0").returncode == 0
    found = json.loads(out.read_text())
    assert found["steps"] == found["decode"] == []
    assert len(found["skipped"]) == 7
    assert found["skipped"][0] == {"size": "tiny", "what": "decode", "why": "about 20 s were not left"}


def test_missing_packages_are_told(tmp_path: Path) -> None:
    done = run("--wheels", str(tmp_path / "none"), before=("-c", BLOCK))
    assert done.returncode == 1
    assert "pydantic missing and" in done.stderr
    assert "--help" in done.stderr
