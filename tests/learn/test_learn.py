"""Every toy recipe learns, which no unit test can show. `make learn` runs this and writes results/learn/."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

import bridgelm
from bridgelm.config.catalogue import parts
from bridgelm.config.run_config import load_config
from bridgelm.runs.folder import git_commit, versions

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "learn"
RECIPES = sorted((ROOT / "recipes" / "toy").glob("*.toml"))
GAIN = 0.10  # over the base on the validation set, by the end

pytestmark = pytest.mark.slow


def test_every_method_has_a_recipe() -> None:
    from bridgelm.methods import METHODS

    methods = [load_config(path).method for path in RECIPES]
    assert {part.name for method in methods for part in (method, *parts(method))} == set(METHODS)  # type: ignore[attr-defined]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_learns(recipe: Path, tmp_path: Path) -> None:
    run = bridgelm.train(load_config(recipe, [f"out={tmp_path}", "threads=1"]), quiet=True)
    evals = [event["accuracy"] for event in run.evals]
    assert run.result is not None
    found: dict[str, Any] = {
        "base": evals[0], "last": evals[-1], "best": max(evals), "test": run.result["final"]["accuracy"],
        "steps": run.steps, "seconds": round(run.metrics[-1]["seconds"], 1)}
    phases = {event["step"]: event["phase"] for event in run.metrics}
    if len(set(phases.values())) > 1:  # of stages also what they ended with
        found["after"] = {phases[e["step"]]: e["accuracy"] for e in run.evals if e["step"]}
    record(recipe.stem, found)
    assert evals[-1] > evals[0] + GAIN, found


def record(name: str, found: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    facts = {**found, "date": f"{date.today():%Y-%m-%d}", "commit": git_commit(), "versions": versions(),
             "command": "make learn"}
    (RESULTS / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
