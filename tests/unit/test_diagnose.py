"""Diagnosis from run folders written by hand: the arithmetic of stages and switches, and what is said to be missing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import bridgelm
from bridgelm.cli.main import main
from bridgelm.config.run_config import make_config
from bridgelm.diagnosis.diagnose import all_panels
from bridgelm.diagnosis.facts import History, clean_cosine, subjects
from bridgelm.diagnosis.measure import models
from bridgelm.errors import UserError
from bridgelm.runs.reader import Run

ORDERS = {"cold": ("sft", "grpo"), "reverse": ("grpo", "sft")}
ACCURACY = {0: 0.3, 10: 0.5, 20: 0.6, 30: 0.4, 40: 0.55, 50: 0.65, 60: 0.7}  # a dip of 20 points after the switch at 20


def write(folder: Path, name: str, seed: int = 0, probed: bool = True, **changes: Any) -> Path:
    """20 steps of the first stage, 40 of the second; a probe every 10 steps. CE falls in SFT and rises in RL."""
    stages = [{"method": {"name": ORDERS[name][0]}, "steps": 20}, {"method": {"name": ORDERS[name][1]}}]
    raw = {"name": f"{name}-seed{seed}", "seed": seed, "steps": 60, "method": {"name": "sequence", "stages": stages},
           "model": {"name_or_path": "toy:base"}, "data": {"train": "toy:hops"}, "reward": {"verifier": "toy"}}
    path = folder / raw["name"]
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(make_config({**raw, **changes}).resolved()))
    (path / "run.json").write_text(json.dumps({"status": "finished"}))
    events: list[dict[str, Any]] = []
    for step, accuracy in ACCURACY.items():
        events.append({"event": "eval", "split": "validation", "step": step, "accuracy": accuracy, "n": 400})
        first = step <= 20
        done = step if first else step - 20
        falls = ORDERS[name][0 if first else 1] == "sft"
        slope = 0.01 + 0.001 * seed
        start = 2.0 if first else 2.0 - 20 * slope if ORDERS[name][0] == "sft" else 2.0 + 20 * slope
        probe = {"event": "probe", "step": step, "start": 0 if first else 20, "held": False,
                 "demo_ce": start - slope * done if falls else start + slope * done, "reward": accuracy + 0.01 * seed,
                 "cosine": 0.1 - 0.01 * step, "dot": 1.0, "square_sft": 4.0, "square_rl": 1.0,
                 "kl_start": 0.002 * done, "distance": 0.1 * done, "distance_share": 0.001 * done}
        events += [probe] if probed else []
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def test_changes_of_each_stage(tmp_path: Path) -> None:
    _, (sft, rl, whole) = subjects([Run(write(tmp_path, "cold"))])
    assert [(s.stage.method, s.stage.kind, s.stage.start, s.stage.end) for s in (sft, rl, whole)] == [
        ("sft", "SFT", 0, 20), ("grpo", "RL", 20, 60), ("all", "whole run", 0, 60)]
    found = [s.figures() for s in (sft, rl, whole)]
    change = {key: [f[key].value for f in found] for key in ("ce_change", "reward_change", "accuracy_change")}
    assert change["ce_change"] == pytest.approx([-0.2, 0.4, 0.2])
    assert change["reward_change"] == change["accuracy_change"] == pytest.approx([0.3, 0.1, 0.4])
    assert found[0]["kl"].value == pytest.approx(0.04) and found[1]["kl"].value == pytest.approx(0.08)
    assert found[2]["kl"] is None, "drift of the last probe is from the stage's start and not from the run's"
    assert found[1]["cosine"].value == pytest.approx(0.1 - 0.01 * 40)
    assert found[0]["cosine_negative"].value == pytest.approx(1 / 3)


def test_a_dip_its_depth_and_its_end(tmp_path: Path) -> None:
    history = History(Run(write(tmp_path, "cold")))
    first, second = history.stages
    assert history.switch(first) is None
    found = history.switch(second)
    assert found is not None
    assert (found.before, found.lowest, found.steps_to_lowest, found.steps_to_recover) == (0.6, 0.4, 10, 30)
    assert found.depth == pytest.approx(0.2) and found.gain == pytest.approx(0.1)
    assert found.error == pytest.approx(math.sqrt((0.6 * 0.4 + 0.4 * 0.6) / 400))


@pytest.mark.parametrize(("after", "depth", "back"), [((0.6, 0.7, 0.8, 0.9), 0.0, 0),
                                                      ((0.5, 0.4, 0.5, 0.59), 0.2, None)], ids=["none", "for good"])
def test_no_dip_and_a_dip_for_good(tmp_path: Path, after: tuple[float, ...], depth: float, back: int | None) -> None:
    path = write(tmp_path, "cold")
    events = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for event in events:
        if event["event"] == "eval" and event["step"] > 20:
            event["accuracy"] = after[event["step"] // 10 - 3]
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    found = History(Run(path)).switch(History(Run(path)).stages[1])
    assert found is not None
    assert found.depth == pytest.approx(depth) and found.steps_to_recover == back


def test_noise_is_taken_out_of_the_cosine() -> None:
    rows = [{"dot": 1.0, "square_sft": 4.0, "square_rl": 1.0}, {"dot": -2.0, "square_sft": 0.0, "square_rl": 3.0}]
    assert clean_cosine(rows) == pytest.approx(-1 / math.sqrt(4 * 4))
    assert clean_cosine([{"dot": 1.0, "square_sft": -1.0, "square_rl": 1.0}]) is None
    assert clean_cosine([{"dot": None}]) is None


def test_both_orders_over_seeds_say_what_is_shown_and_what_is_not(tmp_path: Path, capsys: Any) -> None:
    paths = [write(tmp_path, name, seed) for name in ORDERS for seed in (0, 1, 2)]
    out = tmp_path / "out"
    assert main(["diagnose", *map(str, paths), "--out", str(out)]) == 0
    assert str(out / "diagnosis.md") in capsys.readouterr().out
    text = (out / "diagnosis.md").read_text()
    assert "cold: RL (grpo, steps 20–60) raised the CE of the demonstrations (+0.440 [" in text
    assert "reverse: SFT (sft, steps 20–60) raised reward (+0.100 [" in text, "what happened, whatever a paper says"
    assert "a clear dip in 3 of 3 seeds, recovered after 30, 30, 30 steps; mean depth 20.0 points" in text
    assert "## What is missing" not in text
    data = json.loads((out / "diagnosis.json").read_text())
    assert [(s["run"], s["kind"]) for s in data["stages"]] == [
        ("cold", "SFT"), ("cold", "RL"), ("cold", "whole run"), ("reverse", "RL"), ("reverse", "SFT"),
        ("reverse", "whole run")]
    assert data["stages"][1]["ce_change"]["n"] == 3 and len(data["runs"]) == 6
    assert all((out / "figures" / f"diagnosis.{ending}").stat().st_size > 5000 for ending in ("png", "svg"))


def test_one_seed_claims_nothing_and_a_changed_sign_is_not_shown(tmp_path: Path) -> None:
    text = bridgelm.diagnose([write(tmp_path, "cold")]).read_text()
    assert "one seed, nothing is claimed" in text
    paths = [write(tmp_path / "two", "cold", seed) for seed in (0, 1)]
    events = [json.loads(line) for line in (paths[1] / "metrics.jsonl").read_text().splitlines()]
    for event in events:
        if event["event"] == "probe" and event["step"] == 60:
            event["demo_ce"] = 1.5
    (paths[1] / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    text = bridgelm.diagnose(paths, tmp_path).read_text()
    assert "RL (grpo, steps 20–60) is not shown to have changed the CE" in text


def test_without_probes_what_is_missing_is_said(tmp_path: Path) -> None:
    path = write(tmp_path, "reverse", probed=False)
    text = bridgelm.diagnose([path]).read_text()
    assert "reverse-seed0 has no probes" in text and "--measure" in text
    assert "SFT (sft, steps 20–60) raised validation accuracy (+10.0 points; one seed" in text
    assert "## Gradients and drift" not in text
    (path / "diagnose.jsonl").write_text("".join(
        json.dumps({"step": step, "start": 0, "demo_ce": ce, "kl_start": 0.1}) + "\n"
        for step, ce in ((0, 2.0), (60, 2.5))))
    again = bridgelm.diagnose([path]).read_text()
    assert "has kept no model of the switch at step 20" in again and "at steps 0, 60" in again
    assert "| reverse | whole run | 0–60 | 2.000 → 2.500 | +0.500 |" in again


def test_drift_begins_anew_with_a_stage(tmp_path: Path) -> None:
    methods, _ = subjects([Run(write(tmp_path, "cold"))])
    panels = {panel.title: panel for panel in all_panels(methods)}
    kl = panels["KL from the stage's start"].series[0]
    assert list(kl.xs) == [0, 10, 20, 20, 30, 40, 50, 60] and kl.ys[2:4] == pytest.approx([0.04, 0.0])
    assert all(panel.cuts == [20] for title, panel in panels.items() if "against" not in title)
    trade = panels["Change of CE against KL, stages with RL"].series[0]
    assert trade.xs == pytest.approx([0, 0.02, 0.04, 0.06, 0.08]) and trade.ys == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_saved_models_are_found_and_nothing_else_is_measured(tmp_path: Path) -> None:
    path = write(tmp_path, "cold", probed=False)
    assert models(Run(path)) == {0: None}
    with pytest.raises(UserError, match="no model of it is saved yet"):
        bridgelm.diagnose([path], measure=True)
    for name in ("final", "best", "starts/step-000020"):
        (path / name).mkdir(parents=True)
        (path / name / "config.json").write_text("{}")
    (path / "result.json").write_text(json.dumps({"best": {"step": 50}}))
    events = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(events + json.dumps({"event": "step", "step": 60}) + "\n")
    assert {step: folder and Path(folder).name for step, folder in models(Run(path)).items()} == {
        0: None, 20: "step-000020", 50: "best", 60: "final"}
