"""The speed measurements, on our side: what they draw, how turns are taken, and what the page says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import speed
import speed_curves
import speed_model
import speed_page


def test_systems_take_turns_on_answers_of_the_wanted_length(tmp_path: Path) -> None:
    end = speed_model.end_probability(32 / 3, 32)
    assert (1 - (1 - end) ** 32) / end == pytest.approx(32 / 3)
    speed_model.write_model(tmp_path, "tiny", end)
    speed_model.write_data(tmp_path, 16, 8)
    size = speed.Size(8, 32)
    specs = {**speed.cell_specs("step", tmp_path, "tiny", "float32", size, False),
             **speed.cell_specs("rollouts", tmp_path, "tiny", "float32", size, False)}
    found = speed.measure({name: specs[name] for name in ("bridgelm", "native")}, 2, {})
    drawn = {name: [t["generate"] / 64 for t in turns] for name, turns in found.items()}
    drawn["bridgelm"] = [n - 22 / 8 for n in drawn["bridgelm"]]  # which counts the shared prompts too
    for name, lengths in drawn.items():  # a mean over 128 answers has a deviation of under one token
        assert sum(lengths) / 2 == pytest.approx(32 / 3, abs=3.0), name
    assert all(t["seconds"] > 0 and t["training"] + t["gathering"] <= t["seconds"] for t in found["bridgelm"])


def test_ratios_are_those_of_a_round() -> None:
    ours = [{"seconds": s, "generate": 10} for s in (1.0, 2.0, 4.0)]
    theirs = [{"seconds": s, "generate": 10} for s in (3.0, 4.0, 20.0)]
    found = speed.summary({"native": ours, "generate": theirs}, "native")["generate"]
    assert (found["ratio"], found["range"]) == (3.0, [2.0, 5.0])


def test_the_slope_and_the_page() -> None:
    assert speed_curves.slope([(n, 3.0 * n**0.9) for n in (64, 128, 1024)]) == pytest.approx(0.9)
    machine: dict[str, Any] = {"date": "d", "commit": "c", "machine": {"cpu": "x", "cores": 2, "load": 0},
                               "versions": {"python": "3", "torch": "2", "transformers": "5"}}
    row = {"kind": "step", "shape": "small", "dtype": "float32", "lengths": "fixed", "rollouts": 8,
           "systems": {"bridgelm": {"seconds": 1.0}, "trl": {"seconds": 1.2, "ratio": 1.2, "range": [1.1, 1.3]}}}
    lines = speed_page.comparison({**machine, "rows": [row]})
    assert "1.3, **missed**" in " ".join(lines)
    assert lines[-3] == "Targets met: 0. Missed: step small, float32, fixed: 1.20 of 1.3."
    assert "step, tiny, float32, spread;" in lines[-1]
    assert "step, small, float32, fixed" not in lines[-1]


def test_where_the_price_falls_under_the_papers() -> None:
    def rows(*prices: float) -> list[dict[str, Any]]:
        return [{"length": 32 * 2**i, "methods": {"bridge": {"price": p}}} for i, p in enumerate(prices)]
    assert speed_page.crossing(rows(1.5, 1.1, 1.2, 1.13, 1.0), "bridge") == "from 256 tokens"
    assert speed_page.crossing(rows(1.0, 1.5, 1.2), "bridge") == "nowhere up to 128 tokens (1.00)"


def test_a_resting_shadow_is_priced_over_two_steps() -> None:
    def turns(*seconds: float) -> list[dict[str, float]]:
        return [{"seconds": s} for s in seconds]
    found = speed_curves.price_of(turns(1, 3, 2, 4, 1, 5), turns(1, 1, 2, 2, 1, 1))
    assert found == {"price": 2.0, "range": [1.5, 3.0]}
