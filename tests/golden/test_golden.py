"""Every method still takes the steps that it took when its trajectory was recorded."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from bridgelm.methods import METHODS

sys.path.insert(0, str(Path(__file__).parent))
import golden


@pytest.mark.parametrize("name", golden.METHODS)
def test_the_trajectory_is_the_recorded_one(name: str) -> None:
    recorded = golden.load(golden.TRAJECTORIES / f"{name}.json")
    found = golden.run(golden.METHODS[name], golden.load(golden.ROLLOUTS))
    assert len(found) == len(recorded) == golden.STEPS
    for step, (mine, theirs) in enumerate(zip(found, recorded, strict=True)):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            same = math.isclose(mine[key], value, rel_tol=1e-9, abs_tol=1e-13)  # also for two infinities
            assert same, f"step {step}, {key}: {mine[key]!r}, was {value!r}"


def test_every_method_is_recorded_and_the_files_stay_small() -> None:
    assert {method["name"] for method in golden.METHODS.values()} == set(METHODS)
    files = list(golden.TRAJECTORIES.iterdir())
    assert {path.stem for path in files} == set(golden.METHODS)
    assert max(path.stat().st_size for path in (golden.ROLLOUTS, *files)) < 20_000


def test_the_recordings_have_something_to_say() -> None:
    steps = {name: golden.load(golden.TRAJECTORIES / f"{name}.json") for name in golden.METHODS}
    assert all(step["grad_norm/theta"] > 1e-3 for name in steps for step in steps[name])
    assert all(0 < step["reward"] < 1 for step in steps["bridge"])
