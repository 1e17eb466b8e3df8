"""Comparison and report, against run folders written by hand in the documented format."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import scipy.stats

from bridgelm.analysis import arms as compare_arms
from bridgelm.analysis.comparison import analyse, group, judge
from bridgelm.analysis.stats import Difference, mean_interval, wilson
from bridgelm.comparisons import everything
from bridgelm.comparisons.compare import compare, resolve, resolve_all
from bridgelm.comparisons.runs import Tail
from bridgelm.config import catalogue
from bridgelm.config.run_config import RunConfig, load_config, make_config
from bridgelm.errors import UserError
from bridgelm.reports import levels as report_levels
from bridgelm.reports import panels as report_panels
from bridgelm.reports.page import report
from bridgelm.reports.panels import binned, bridge_panels
from bridgelm.reports.plots import Panel, Series, svg, ticks
from bridgelm.reports.text import what_was_equal
from bridgelm.runs.reader import Run

METHODS = {
    "sft": {"name": "sft"},
    "grpo": {"name": "grpo"},
    "cold_start": {"name": "sequence", "stages": [{"method": {"name": "sft"}, "steps": 30},
                                                  {"method": {"name": "grpo"}}]},
    "alternate": {"name": "alternate"},
    "joint": {"name": "joint"},
    "bridge": {"name": "bridge"},
}
END = {"sft": 0.71, "grpo": 0.76, "cold_start": 0.81, "alternate": 0.845, "joint": 0.86, "bridge": 0.862}
PRICE = {"sft": 0.3, "grpo": 1.0, "cold_start": 0.8, "alternate": 1.15, "joint": 1.2, "bridge": 1.75}


def config(label: str, seed: int, steps: int = 120, **sections: dict) -> dict:
    raw = {"name": f"{label}-seed{seed}", "seed": seed, "steps": steps, "method": METHODS[label],
           "model": {"name_or_path": "toy:base"}, "data": {"train": "toy:walk"}, "reward": {"verifier": "toy"}}
    return make_config({**raw, **sections}).resolved()


def write_run(folder: Path, label: str, seed: int = 0, steps: int = 120, every: int = 10, **sections: dict) -> Path:
    """A finished run with curves of a plausible shape. Written without the code under test."""
    path = folder / f"{label}-seed{seed}"
    path.mkdir(parents=True)
    rng = random.Random(f"{label}{seed}")
    end = END[label] + rng.gauss(0, 0.012)
    events, samples = [], []
    for step in range(steps + 1):
        done = step / steps
        sft = label == "sft" or (label == "cold_start" and step <= 30)
        rolled = 0 if label == "sft" else max(0, step - 30) * 256 if label == "cold_start" else step * 256
        cost = step * 1e11 * PRICE[label]
        common = {"seconds": step * 0.5 * PRICE[label] + rng.random() * 0.01, "rollouts": rolled, "flops": cost,
                  "tokens": step * 4000, "flops/generate": 0.3 * cost * (rolled > 0), "flops/train": 0.6 * cost,
                  "flops/score": 0.1 * cost}
        level = 0.3 + (end - 0.3) * (1 - math.exp(-3.5 * done)) / (1 - math.exp(-3.5))
        if step:
            phase = "sft" if sft else METHODS[label]["name"].replace("sequence", "grpo")
            events.append({"event": "step", "step": step, "phase": phase, **common,
                "reward": None if sft else level + rng.gauss(0, 0.03), "length": 14 + 9 * done, "errors": 0.0,
                "truncated": 0.08 * math.exp(-5 * done), "flat_groups": None if sft else 0.15 + 0.5 * done,
                "loss/nll": 1.2 * math.exp(-done), "grad_norm/theta": 0.8 + 0.2 * rng.random(),
                **(_bridge(done, rng) if label == "bridge" else {})})
        if step % every == 0:
            hits = {str(d): [max(0.0, min(1.0, level - 0.09 * (d - 4))), 50] for d in (3, 4, 5, 6)}
            events.append({"event": "eval", "step": step, "split": "validation", "accuracy": level + rng.gauss(0, 0.01),
                           "n": 200, "length": 14.0, "truncated": 0.01, "by_difficulty": hits, **common})
        if step % 20 == 0:
            samples += [_sample(step, i, rng.random() < level) for i in range(4)]
    if label == "bridge":
        text = "the third term of w's gradient has been zero for 50 steps"
        events.append({"event": "warning", "step": steps, "text": text})
    _dump(path, config(label, seed, steps, **sections), events, samples, end, rng)
    return path


def _bridge(done: float, rng: random.Random) -> dict:
    ess = max(0.08, 0.95 - 0.85 * done + rng.gauss(0, 0.03))
    rl = 0.5 + 0.1 * rng.random()
    return {"bridge/norm_sft": 2.1 * math.exp(-1.5 * done) + 0.1 * rng.random(), "bridge/norm_rl": rl,
            "bridge/norm_shadow": rl * (1 - 0.2 * done), "bridge/norm_third": 0.02 + 0.1 * done,
            "bridge/gain": 0.004 + 0.02 * done + rng.gauss(0, 0.006), "bridge/gain_se": 0.006 + 0.01 * done,
            "bridge/gain_reliable": int(ess > 0.3), "bridge/ess": ess, "bridge/clip_share": 0.3 * done,
            "bridge/kl_shadow": 0.12 * done**1.5, "bridge/shadow_move": 0.9 + 0.1 * rng.random(),
            "bridge/theta_move": 1.0, "bridge/share_sft": 0.6 - 0.2 * done, "bridge/share_rl": 0.4 + 0.2 * done,
            "bridge/lambda": 0.5, **({"bridge/gain_honest": 0.01 + 0.01 * done} if rng.random() < 0.1 else {})}


def _sample(step: int, i: int, right: bool) -> dict:
    return {"step": step, "problem_id": f"walk-{i}", "answer": str(2 * i + 16), "reward": float(right),
            "prompt": f"Start at 7. Add {i + 3}, double it, take away 4.\nWhere?", "difficulty": 3 + i,
            "completion": f"7 + {i + 3} = {i + 10}; doubled {2 * i + 20}; minus 4 is {2 * i + 16 + (not right)}.",
            "verdict": "correct" if right else "wrong"}


def _dump(path: Path, settings: dict, events: list, samples: list, end: float, rng: random.Random) -> None:
    correct = {f"t{i}": int(rng.random() < end) for i in range(300)}
    part = {"accuracy": end, "n": 300, "interval": [end - 0.05, end + 0.04], "correct": correct, "length": 20.0,
            "truncated": 0.01, "by_difficulty": {str(d): [max(0.02, end - 0.11 * (d - 4)), 60] for d in range(3, 8)},
            "hard": {"accuracy": end - 0.3, "n": 60}}
    result = {"final": part, "best": {**part, "accuracy": end + 0.008, "step": 100}}
    info = {"status": "finished", "peak_memory_mb": 900.0 + 10 * rng.random(), "cpu_seconds": 60.0 + 20 * rng.random(),
            "torch": "2.9", "python": "3.11.7", "commit": "0" * 40, "parameters": 1_000_000, "device": "cpu"}
    for name, data in {"config": settings, "run": info, "result": result}.items():
        (path / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    for name, rows in {"metrics": events, "samples": samples}.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six methods, three seeds."""
    root = tmp_path_factory.mktemp("runs")
    for label in METHODS:
        for seed in range(3):
            write_run(root, label, seed, steps=60)
    return root


@pytest.fixture(autouse=True)
def no_figure_files(request, monkeypatch):
    """matplotlib takes most of a report's time; one test draws them."""
    if "figures" not in request.node.name:
        monkeypatch.setattr(sys.modules["bridgelm.reports.page"], "draw_files", lambda *args: [])


def runs_of(folder: Path, *labels: str) -> list[Run]:
    return [Run(folder / f"{label}-seed{seed}") for label in labels for seed in range(3)]


def edit(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Rewrite one JSON file, or each line of a JSONL file, of a run."""
    file = path / name
    if name.endswith("jsonl"):
        rows = [change(json.loads(line)) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        file.write_text(json.dumps(change(json.loads(file.read_text()))))


# --- analysis


def test_runs_that_differ_in_the_seed_alone_are_one_method(folder):
    methods = group(runs_of(folder, "bridge", "cold_start"))
    assert [(m.label, sorted(m.by_seed)) for m in methods] == [("bridge", [0, 1, 2]), ("cold_start", [0, 1, 2])]


def test_the_same_name_with_other_settings_is_another_method(tmp_path):
    paths = [write_run(tmp_path / str(i), "bridge", seed, steps=20) for i in range(2) for seed in range(2)]
    for path in paths[2:]:
        edit(path, "config.json", lambda c: {**c, "optim": {**c["optim"], "lr": 1e-5}})
    assert [m.label for m in group([Run(path) for path in paths])] == ["bridge", "bridge #2"]


def test_equal_rollouts_reads_each_curve_at_its_last_look_below_the_budget(folder):
    runs = runs_of(folder, "bridge", "cold_start", "sft")
    found = analyse(runs)
    budget = min(run.last("rollouts") for run in runs if run.last("rollouts"))  # cold start's; sft has none
    assert found.budgets["rollouts"] == budget == 30 * 256
    by_hand = []
    for run in runs[:3]:
        below = [event for event in run.evals if event["rollouts"] <= budget]
        assert below[-1]["step"] == 30  # bridge has rolled out as much after half of its steps
        by_hand.append(below[-1]["accuracy"])
    estimate = found.table["bridge"]["at_rollouts"]
    assert estimate is not None and estimate.value == pytest.approx(statistics.fmean(by_hand))
    sft = found.table["sft"]["at_rollouts"]
    assert sft is not None
    assert sft.value == pytest.approx(statistics.fmean(run.evals[-1]["accuracy"] for run in runs[6:]))  # its end


def test_a_difference_uses_the_smaller_budget_of_the_two(folder):
    runs = runs_of(folder, "bridge", "joint", "sft")
    claims = {(claim.figure, claim.other): claim for claim in analyse(runs).claims}
    assert claims["at_flops", "joint"].budget == pytest.approx(60e11 * PRICE["joint"])
    assert claims["at_flops", "sft"].budget == pytest.approx(60e11 * PRICE["sft"])
    assert claims["at_flops", "sft"].difference.value < -0.05  # the shadow has its price
    final = claims["final", "joint"].difference
    gaps = [a.accuracy - b.accuracy for a, b in zip(runs[:3], runs[3:6])]  # type: ignore[operator]
    expected = scipy.stats.ttest_1samp(gaps, 0)
    assert final.value == pytest.approx(statistics.fmean(gaps)) and final.p == pytest.approx(expected.pvalue)


def test_verdicts():
    def verdict(value: float, p: float | None, equal: float | None, unit: str = "seeds") -> str:
        return judge(Difference(value, None, None, p, 5, unit), p, equal)

    assert verdict(0.1, 0.01, 0.9) == "ahead" and verdict(-0.1, 0.01, 0.9) == "behind"
    assert verdict(0.001, 0.6, 0.01) == "equal" and verdict(0.03, 0.2, 0.6) == "unclear"
    assert verdict(0.2, 1e-9, None, "problems") == "unclear"  # one training seed shows nothing about a method
    assert verdict(0.1, None, None) == "unclear"


def test_one_seed_gives_intervals_over_problems_and_no_claim(folder):
    found = analyse([Run(folder / "bridge-seed0"), Run(folder / "sft-seed0")])
    claim = next(claim for claim in found.claims if claim.figure == "final")
    assert claim.difference.unit == "problems" and claim.difference.n == 300 and claim.verdict == "unclear"
    assert claim.difference.low is not None
    estimate, result = found.table["bridge"]["final"], found.base.runs[0].result
    assert estimate is not None and result is not None
    assert [estimate.low, estimate.high] == result["final"]["interval"]


def test_no_or_foreign_folders_and_unknown_bases_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        report([tmp_path])
    with pytest.raises(UserError, match="no run folders given"):
        report([])
    with pytest.raises(UserError, match="'x' is not among the runs; one of: bridge"):
        report([folder / "bridge-seed0"], tmp_path, base="x")


# --- report


def test_report_writes_page_text_numbers_and_figures(folder, tmp_path):
    target = report([run.path for run in runs_of(folder, *METHODS)], tmp_path / "out", base="bridge")
    assert target == tmp_path / "out" / "report.html"
    names = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    stems = ("accuracy", "difficulty", "training", "bridge")
    assert {f"{name}.{ending}" for name in stems for ending in ("png", "svg")} == names
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["base"] == "bridge" and len(data["claims"]) == 5 * 5
    text = (tmp_path / "out" / "report.md").read_text()
    final = mean_interval(run.accuracy for run in runs_of(folder, "joint"))  # type: ignore[misc]
    assert final is not None and final.low is not None and final.high is not None
    row = next(line for line in text.splitlines() if line.startswith("| joint | 3 |"))
    assert f"| {100 * final.value:.1f} [{100 * final.low:.1f}, {100 * final.high:.1f}] |" in row
    assert "Where bridge does not win" in text and "At equal FLOPs, validation: bridge is behind sft" in text
    equal = "bridge, grpo, alternate and joint each 15,360 a run; against that, sft none, cold_start 0.50×"
    assert f"Rollouts: {equal}" in text
    page = target.read_text()
    for part in ("Where bridge does not win", "BRIDGE&#x27;s diagnostics", "zero for 50 steps", "Holm"):
        assert part in page


class Page(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.policy = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if dict(attrs).get("http-equiv"):
            self.policy = dict(attrs)["content"] or ""

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[-1] += data


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'<!--\u2028\ud800\x00"


def test_nothing_that_a_run_holds_can_act_in_the_page(tmp_path):
    plain = Page(report([write_run(tmp_path / "a", "bridge", steps=20)], tmp_path / "plain").read_text())
    path = write_run(tmp_path / "b", "bridge", steps=20)
    edit(path, "samples.jsonl", lambda row: {**row, "prompt": EVIL, "completion": EVIL, "answer": EVIL,
                                             "problem_id": EVIL, "verdict": EVIL})
    edit(path, "metrics.jsonl", lambda e: {**e, "text": EVIL} if e["event"] == "warning" else e)
    edit(path, "config.json", lambda c: {**c, "model": {**c["model"], "name_or_path": EVIL}})
    edit(path, "run.json", lambda info: {**info, "torch": EVIL, "commit": EVIL})
    edit(path, "result.json", lambda r: {**r, "final": {**r["final"], "by_difficulty": {EVIL: [0.5, 2]}}})
    evil = path.rename(path.with_name("<img src=x onerror=alert(3)>|`-seed0"))
    target = report([evil], tmp_path / "evil")
    page = Page(target.read_text())
    assert [tag for tag, _ in page.tags if tag in {"script", "img", "iframe", "a"}] == [
        tag for tag, _ in plain.tags if tag in {"script", "img", "iframe", "a"}]
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    data = json.loads(page.scripts[0])
    assert data["rows"][0][4].startswith("</script><script>alert(1)")  # shown as it was written, by textContent
    assert "<img" not in target.with_suffix(".md").read_text()


def write_tables(path: Path, shift: float = 0.0, text: str = "step {i} | then [more](x)") -> None:
    """Twelve demonstrations, from -0.6 to 0.5 (and shifted), of two sources."""
    rows = [{"problem_id": f"p{i}", "text": text.format(i=i), "source": "odd" if i % 2 else "even", "tokens": 10 + i,
             "count": 2, "alignment": (i - 6) / 10 + shift} for i in range(12)]
    sources = [{"column": "origin", "source": name, "demonstrations": 6, "tokens": 1000 + 500 * (name == "odd"),
                "alignment": {"even": -0.1, "odd": 0.05}[name] + shift} for name in ("even", "odd")]
    (path / "tables").mkdir()
    for name, table in (("demonstrations", rows), ("sources", sources)):
        (path / "tables" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))


def test_what_the_demonstrations_did_for_reward_is_shown(tmp_path):
    first, second = (write_run(tmp_path, "joint", seed, steps=20) for seed in range(2))
    none = report([first], tmp_path / "none")
    assert "demonstrations did" not in none.read_text() + none.with_suffix(".md").read_text()
    write_tables(first)
    write_tables(second, 0.2)  # a second seed, where all was better
    assert Run(first).table("sources")[0]["source"] == "even" and Run(first).table("nothing") == []
    target = report([first, second], tmp_path / "out")
    page, text = target.read_text(), target.with_suffix(".md").read_text()
    for document in (page, text):
        assert "What the demonstrations did for reward" in document and "above 0 it rises" in document
    assert "| origin | demonstrations | tokens trained on | mean alignment |" in text
    assert "| even | 6 | 2,000 | +0.00 |\n| odd | 6 | 3,000 | +0.15 |" in text
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| step ")]
    assert [line[1] for line in lines] == [*(f"p{i}" for i in range(5)), *(f"p{i}" for i in range(11, 6, -1))]
    assert lines[0][-1] == "−0.50 |" and lines[0][-2] == "4" and lines[5][-1] == "+0.60 |"
    assert lines[0][0] == r"| step 0 \| then (more)(x)"  # neither a cell of its own nor a link
    assert "| most harmful demonstrations | of problem | origin |" in text
    assert "<th>most helpful demonstrations</th>" in page and "5 of 12;" in page


def test_texts_of_demonstrations_cannot_act_in_the_page(tmp_path):
    path = write_run(tmp_path / "run", "joint", steps=20)
    plain = Page(report([path], tmp_path / "plain").read_text())
    write_tables(path, text="{i}" + EVIL.replace("{", "(").replace("}", ")"))
    edit(path, "tables/sources.jsonl", lambda row: {**row, "source": EVIL + row["source"], "column": EVIL})
    target = report([path], tmp_path / "evil")
    page = Page(target.read_text())
    acting = [[tag for tag, _ in one.tags if tag in {"script", "img", "iframe"}] for one in (page, plain)]
    assert acting[0] == acting[1] and "onerror=alert(2)" in target.read_text()
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert "<img" not in target.with_suffix(".md").read_text()


def test_the_page_is_alone_and_lets_no_script_run_but_its_own(folder, tmp_path):
    html = report([folder / "bridge-seed0"], tmp_path).read_text()
    page = Page(html)
    for tag, attrs in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "srcset", "action", "poster"):
            assert (attrs.get(name) or "#").startswith("#"), (tag, attrs)
    assert not re.search(r"url\(|@import|https?://", html)
    own = page.scripts[-1]
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.policy and page.policy.startswith("default-src 'none'")
    assert "innerHTML" not in own and "eval(" not in own


def test_an_unfinished_run_and_one_without_anything_still_make_a_report(tmp_path):
    done, half, empty = (write_run(tmp_path, "bridge", seed, steps=40) for seed in range(3))
    (half / "result.json").unlink()
    edit(half, "run.json", lambda info: {**info, "status": "interrupted"})
    lines = (half / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "metrics.jsonl").write_text("".join(lines[:20]) + '{"event": "st')
    for name in ("metrics.jsonl", "samples.jsonl", "result.json", "run.json"):
        (empty / name).unlink()
    text = report([done, half, empty], tmp_path / "all").with_suffix(".md").read_text()
    assert "2 of 3 runs are not finished: bridge-seed1, bridge-seed2" in text
    assert "no test figures" not in report([empty], tmp_path / "none").read_text()


def test_unequal_settings_are_said_first(folder, tmp_path):
    odd = write_run(tmp_path, "joint", 0, steps=20, rollout={"group": 4})
    found = analyse([Run(folder / "bridge-seed0"), Run(odd)])
    assert "Not a fair comparison: the runs differ in rollout.group." in found.notes
    assert any("NOT the same; the runs differ in rollout.group" in line for line in what_was_equal(found))


def test_sixty_runs_make_a_page_of_bounded_size_quickly(tmp_path, monkeypatch):
    monkeypatch.setattr("bridgelm.reports.samples.SAMPLE_BYTES", 60_000)
    paths = [write_run(tmp_path, label, seed, steps=40) for label in METHODS for seed in range(10)]
    long = "x" * 3000
    for path in paths:
        edit(path, "samples.jsonl", lambda row: {**row, "completion": long})
    html = report(paths, tmp_path / "out").read_text()
    data = json.loads(Page(html).scripts[0])
    assert data["total"] == 60 * 12 > len(data["rows"])
    assert {row[1] for row in data["rows"]} == {40}  # the last step of each run is kept
    assert len({row[0] for row in data["rows"]}) == 60
    assert len(html) < 1_500_000


def with_levels(path: Path, difficulty: dict, length: dict, tokens: float) -> None:
    def change(result):
        result["final"] |= {"by_difficulty": difficulty, "by_length": length, "length": tokens, "truncated": 0.25}
        return result

    edit(path, "result.json", change)


def test_every_method_by_difficulty_and_by_length_with_intervals(tmp_path):
    for seed, (easy, hard) in enumerate(((0.8, 0.2), (0.6, 0.4), (0.7, 0.3))):
        path = write_run(tmp_path, "bridge", seed)
        with_levels(path, {"1": [easy, 60], "2": [hard, 40]}, {"16": [0.9, 50]}, 20 + seed)
    with_levels(write_run(tmp_path, "grpo"), {"1": [0.5, 60]}, {"16": [0.9, 50], "32": [0.5, 50]}, 30.0)
    comparison = analyse([Run(path) for path in sorted(tmp_path.iterdir())], "bridge")
    difficulty, length, tokens = report_levels.level_tables(comparison)
    expected = mean_interval([0.8, 0.6, 0.7])
    assert difficulty.headers == ["method", "1", "2"]
    assert difficulty.rows[0][1] == f"70.0 [{100 * expected.low:.1f}, {100 * expected.high:.1f}]"
    low, high = wilson(30, 60)
    assert difficulty.rows[1][1:] == [f"50.0 [{100 * low:.1f}, {100 * high:.1f}]", "–"], "one seed: over problems"
    assert length.headers == ["method", "16", "32"] and length.rows[0][1].startswith("90.0 [90.0, 90.0]")
    assert tokens.rows[0][3].startswith("21.0 [") and tokens.rows[0][4] == "25.0 [25.0, 25.0]"
    run = comparison.methods[1].runs[0]
    values = [value for _, value in run.series("length")]
    assert report_levels.training_ends(run) == (statistics.fmean(values[:12]), statistics.fmean(values[-12:]))
    data = json.loads(json.dumps(report_levels.data(comparison)))
    assert data["grpo"]["by_length"]["32"]["value"] == 0.5 and data["bridge"]["length"]["final"]["n"] == 3


def test_many_levels_share_columns_of_about_equally_many_problems(tmp_path):
    levels = {f"{0.05 * i:g}": [i / 40, 10] for i in range(40)}
    with_levels(write_run(tmp_path, "grpo"), levels, {}, 20.0)
    comparison = analyse([Run(path) for path in tmp_path.iterdir()])
    there = report_levels.columns(comparison, "by_difficulty")
    assert [len(column) for column in there] == [5] * 8
    assert report_levels.estimate(comparison.base, "by_difficulty", there[1]).value == pytest.approx(7 / 40)
    assert report_levels.level_table(comparison, "by_difficulty", "").headers[1] == "0–0.2"


def test_figures_of_many_methods_colour_the_best_and_grey_the_others(tmp_path, monkeypatch):
    for i in range(14):
        monkeypatch.setitem(METHODS, f"m{i:02}", {"name": "joint", "mu": 0.1 * (i + 1)})
        monkeypatch.setitem(END, f"m{i:02}", 0.3 + 0.03 * i)
        monkeypatch.setitem(PRICE, f"m{i:02}", 1.0)
        write_run(tmp_path, f"m{i:02}")
    comparison = analyse([Run(path) for path in sorted(tmp_path.iterdir())], "m03")
    labels = [method.label for method in comparison.methods]
    assert labels[0] == "m03" and labels[1:3] == ["m13", "m12"], "the base, then by final accuracy"
    tones = report_panels.colours(comparison)
    assert tones == [0, 1, 2, 3, 4, 5, 6, 7, *[-1] * 6]
    drawn = svg(report_panels.curve_panels(comparison)[0])
    assert drawn.count('class="line sx"') == 6 and ">m00</text>" not in drawn and ">m13</text>" in drawn
    page = report(sorted(tmp_path.iterdir()), tmp_path / "out", base="m03", notes=["x is left out: no teacher"])
    text = page.read_text()
    assert "In grey: the 6 other methods" in text and "x is left out: no teacher" in text
    assert "no difference shown from 13" in text
    assert "6 others" in (tmp_path / "out" / "figures" / "accuracy.svg").read_text()


def test_gain_points_are_hollow_where_the_sample_was_too_small(folder):
    panels = {panel.title: panel for panel in bridge_panels(group(runs_of(folder, "bridge"))[0])}
    gain = panels["Gain of joint over shadow"].series[0]
    assert gain.hollow is not None and not gain.hollow[0] and gain.hollow[-1]
    drawn = svg(panels["Gain of joint over shadow"])
    assert drawn.count('class="hollow') == sum(gain.hollow) > 0
    assert gain.low is not None and all(low < y for low, y in zip(gain.low, gain.ys))
    assert (0.3, "below: gain unreliable") in panels["Effective sample size over n"].marks
    assert panels["Norm of w's gradient, by term"].log  # two decades apart


def test_labels_of_lines_that_end_together_do_not_overlap():
    ends = [Series(f"method {i}", i, [0, 1], [0.0, 0.8 + i / 1000]) for i in range(10)]
    heights = [float(y) for y in re.findall(r'class="label[^>]* y="([\d.]+)"', svg(Panel("", "", ends)))]
    heights.sort()
    assert len(heights) == 10 and min(b - a for a, b in itertools.pairwise(heights)) >= 11.9


def test_ticks_are_round_and_cover_the_axis():
    assert ticks(0.0, 1.0, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(13, 107, 4) == [25, 50, 75, 100]
    assert ticks(0, 400, 4, clock=True) == [0, 120, 240, 360]
    assert ticks(2, 2) == [2]


def test_binned_means_do_not_depend_on_where_a_run_stopped(folder):
    run = Run(folder / "bridge-seed0")
    rows = binned(run, ("reward",), 10)
    assert list(rows) == [6, 12, 18, 24, 30, 36, 42, 48, 54, 60]
    first = [event["reward"] for event in run.metrics[:6]]
    assert rows[6] == [pytest.approx(statistics.fmean(first))]


# --- compare


RECIPE = """steps = {steps}
[model]
name_or_path = "toy:base"
[data]
train = "toy:hops"
[reward]
verifier = "toy"
[method]
name = "{method}"
[rollout]
group = {group}
"""


def recipes(folder: Path, **groups: int) -> Path:
    for method in ("bridge", "grpo", "sft"):
        (folder / f"{method}.toml").write_text(RECIPE.format(method=method, steps=20, group=groups.get(method, 8)))
    return folder / "bridge.toml"


def test_compare_finds_recipes_and_methods(tmp_path):
    base = recipes(tmp_path)
    found = resolve(base, ["grpo", "bridge", str(tmp_path / "sft.toml"), "joint"], ["optim.lr=0.5"])
    assert {label: config.method.name for label, config in found.items()} == {
        "bridge": "bridge", "grpo": "grpo", "sft": "sft", "joint": "joint"}
    assert {config.optim.lr for config in found.values()} == {0.5}
    with pytest.raises(UserError, match=r"'gpro' is not a method"):
        resolve(base, ["gpro"])
    assert list(resolve(base, ["grpo", str(tmp_path / "grpo.toml"), "bridge"])) == ["bridge", "grpo"]
    (tmp_path / "other").mkdir()
    text = (tmp_path / "grpo.toml").read_text()
    for name in ("grpo", "bridge"):
        (tmp_path / "other" / f"{name}.toml").write_text(text + "[optim]\nlr = 0.5\n")
        with pytest.raises(UserError, match=f"'{name}' is named twice, with different settings"):
            resolve(base, ["grpo", str(tmp_path / "other" / f"{name}.toml")])
    with pytest.raises(UserError, match=r"'\.\./grpo' cannot be the name of a folder"):
        resolve(base, ["../grpo"])


def test_a_named_method_makes_as_many_rollouts_as_the_base():
    base = load_config(Path(__file__).parents[2] / "recipes/toy/cold_start.toml", ["name=mine"])
    found = resolve(base, ["joint", "cold_start"])
    assert {name: one.steps for name, one in found.items()} == {"mine": 280, "joint": 80}, "cold_start is the base"


def test_the_file_s_own_method_is_the_base_arm_and_not_a_second_one(tmp_path, trainer):
    """It was trained twice, and then no report was written."""
    recipes(tmp_path).rename(tmp_path / "own.toml")
    (tmp_path / "ready" / "bridge-seed0").rename(tmp_path / "ready" / "own-seed0")
    page = compare(tmp_path / "own.toml", ["bridge", "grpo"], 1, 2, tmp_path / "out", quiet=True)
    assert page is not None and calls(tmp_path / "out") == ["new grpo-seed0", "new own-seed0"]
    assert "bridge is what own is already, so it is the arm own." in page.with_suffix(".md").read_text()


def starter() -> RunConfig:
    stages = [{"method": {"name": "sft"}, "steps": 25, "lr": 1e-5, "schedule": "cosine", "warmup": 0.1},
              {"method": {"name": "grpo"}}]
    return make_config({"name": "my", "steps": 30, "method": {"name": "sequence", "stages": stages},
                        "model": {"name_or_path": "toy:base"}, "data": {"train": "toy:hops"},
                        "reward": {"verifier": "toy"}, "optim": {"lr": 1e-6, "warmup": 5}})


def test_a_named_method_has_the_file_s_rates_by_what_they_are_for():
    configs, notes = resolve_all(starter(), ["sft", "gift", "grpo", "joint", "alternate", "cold_start"])
    assert notes == ["cold_start is what my is already, so it is the arm my."]
    for name in ("sft", "gift"):
        optim = configs[name].optim
        assert (configs[name].steps, optim.lr, optim.schedule, optim.warmup) == (25, 1e-5, "cosine", 2)
    for name in ("grpo", "joint", "alternate"):
        optim = configs[name].optim
        assert (configs[name].steps, optim.lr, optim.schedule, optim.warmup) == (5, 1e-6, "constant", 5)
    assert configs["alternate"].method.sft_lr == 1e-5  # pyright: ignore[reportAttributeAccessIssue]
    arms = {name: compare_arms.arm(one) for name, one in configs.items()}
    assert {arms[name].rollouts for name in ("my", "grpo", "joint", "alternate")} == {arms["my"].rollouts}
    assert arms["joint"].imitation == "1e-06, warm-up 5 (RL's)" and arms["grpo"].imitation == "–"
    assert (arms["my"].steps, arms["my"].demos) == ("25 + 5", 25 * 32)
    differ = compare_arms.unequal(configs)
    assert list(differ) == ["steps", "learning rate of imitation", "rollouts", "demonstrations"]
    base = make_config({**starter().resolved(), "method": {"name": "grpo"}})
    (note,) = resolve_all(base, ["sft"])[1]
    assert note == "sft: the file has no rate for imitation, so it is that of [optim], 1e-06."


def test_a_dry_run_prints_the_arms_and_trains_nothing(tmp_path, capsys):
    assert compare(starter(), ["sft", "joint"], out=tmp_path / "out", dry_run=True) is None
    said = " ".join(capsys.readouterr().out.split())
    assert "What each arm is given" in said and "Not equal: steps: 25 + 5 for my; 25 for sft; 5 for joint." in said
    assert not (tmp_path / "out").exists()


def test_what_differs_stands_at_the_top_and_is_not_called_equal(tmp_path):
    runs = [write_run(tmp_path, "bridge", 0, steps=20), write_run(tmp_path, "grpo", 0, steps=20, optim={"lr": 1e-5})]
    found = analyse([Run(path) for path in runs])
    line = "Not equal: learning rate of exploration: 1e-06 for bridge; 1e-05 for grpo."
    assert line in found.notes and "NOT the same: learning rate of exploration" in what_was_equal(found)[0]
    page = report(runs, tmp_path / "page")
    for text in (page.read_text(), page.with_suffix(".md").read_text()):
        assert text.index(line) < text.index("bridge ends at")
    same = [write_run(tmp_path / "same", label, 0, steps=20) for label in ("alternate", "joint")]
    equal = analyse([Run(path) for path in same])
    assert not equal.unequal and what_was_equal(equal)[0].endswith("and all else but the method.")


def test_all_methods_are_compared_on_paired_data_and_those_left_out_are_named(tmp_path, monkeypatch):
    place = Path(__file__).parents[2] / "recipes" / "toy"
    names = {"cold_start" if name == "sequence" else name for name in catalogue.option_classes()}
    configs, notes = resolve_all(place / "bridge.toml", ["all", "bridge_paper"], ["batch.demos=7"])
    assert next(iter(configs)) == "bridge" and set(configs) == {*names, "bridge_paper"} and not notes
    assert {(c.data.toy.layout, c.batch.demos) for c in configs.values()} == {("paired", 7)}
    configs, notes = resolve_all(place / "bridge.toml", ["all"], ["steps=2"])
    assert set(configs) == names and configs["cold_start"].steps == 4, "its defaults, where its recipe does not fit"
    assert any(note.startswith("cold_start: its recipe does not fit these settings") for note in notes)
    monkeypatch.setattr(everything, "data_facts", lambda config: frozenset({"demos", "paired_demos", "val"}))
    monkeypatch.setattr(catalogue, "needs_of",
                        lambda method: frozenset({"two_traces"} if method.name == "sft" else ()))
    configs, notes = resolve_all(place / "grpo.toml", ["all"])
    assert set(configs) == names - {"sft"}
    assert notes == ["sft is left out: the data lacks two demonstrations of a problem"]


def test_compare_refuses_to_mix_unequal_settings(tmp_path):
    with pytest.raises(UserError, match=r"'grpo' has another rollout\.group than 'bridge'"):
        resolve(recipes(tmp_path, grpo=4), ["grpo"])


TRAINER = """
import json, os, shutil, sys, time
from pathlib import Path
arguments = sys.argv[1:]
mode = Path(os.environ["MODE"]).read_text()
if "--resume" in arguments:
    config = json.loads((Path(arguments[-1]) / "config.json").read_text())
else:
    config = json.loads(Path(arguments[-1]).read_text())
label = config["name"].split("-seed")[0]
path = Path(config["out"]) / config["name"]
with open(Path(config["out"]) / "calls", "a") as calls:
    calls.write(("resume " if "--resume" in arguments else "new ") + config["name"] + "\\n")
if mode == "fail" and label == "grpo":
    sys.exit("error: out of luck")
if mode == "hang":
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        (path / "saved").write_text("")
        sys.exit(130)
shutil.copytree(Path(os.environ["MODE"]).parent / "ready" / config["name"], path, dirs_exist_ok=True)
(path / "config.json").write_text(json.dumps(config))
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch) -> Path:
    """A stand-in for `bridgelm train`, so that a comparison takes seconds. Returns the file that says what it does."""
    script, mode = tmp_path / "trainer.py", tmp_path / "mode"
    script.write_text(TRAINER)
    mode.write_text("train")
    for label in ("bridge", "grpo", "sft"):
        for seed in range(2):
            write_run(tmp_path / "ready", label, seed, steps=20)
    monkeypatch.setenv("MODE", str(mode))
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **kw: start(
        [command[0], str(script), *command[4:]] if command[1:4] == ["-m", "bridgelm", "train"] else command, **kw))
    return mode


def calls(out: Path) -> list[str]:
    lines = sorted((out / "calls").read_text().splitlines())
    (out / "calls").unlink()
    return lines


def test_compare_trains_what_is_missing_and_nothing_twice(tmp_path, trainer, capsys):
    base, out = recipes(tmp_path), tmp_path / "out"
    page = compare(base, ["bridge", "grpo"], 2, 2, out)
    assert page == out / "comparison.html" and page.is_file() and (out / "comparison.md").is_file()
    assert calls(out) == ["new bridge-seed0", "new bridge-seed1", "new grpo-seed0", "new grpo-seed1"]
    assert json.loads((out / "comparison.json").read_text())["runs"]["grpo"]["1"].endswith("grpo-seed1")
    shown = capsys.readouterr().out
    assert "final, test" in shown and "grpo-seed1 finished" in shown
    edit(out / "grpo-seed1", "run.json", lambda info: {**info, "status": "interrupted"})
    compare(base, ["bridge", "grpo", "sft"], 2, 2, out, quiet=True)
    assert calls(out) == ["new sft-seed0", "new sft-seed1", "resume grpo-seed1"]
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="bridge-seed0: this run was made with another optim than is asked for"):
        compare(base, ["bridge", "grpo"], 2, 2, out, overrides=["optim.lr=0.5"], quiet=True)


def test_runs_from_before_a_key_existed_are_kept(tmp_path, trainer):
    compare(recipes(tmp_path), ["grpo"], seeds=1, jobs=1, out=tmp_path / "out", quiet=True)
    edit(tmp_path / "out" / "grpo-seed0", "config.json",
         lambda config: {key: value for key, value in config.items() if key != "diagnose"})
    compare(recipes(tmp_path), ["grpo"], seeds=1, jobs=1, out=tmp_path / "out", quiet=True)
    assert sorted(calls(tmp_path / "out")) == ["new bridge-seed0", "new grpo-seed0"]
    with pytest.raises(UserError, match="made with another diagnose"):
        compare(recipes(tmp_path), ["grpo"], seeds=1, jobs=1, out=tmp_path / "out", quiet=True,
                overrides=["diagnose.every=5"])


def test_a_failed_run_stops_the_comparison_and_says_why(tmp_path, trainer):
    trainer.write_text("fail")
    said = r"run grpo-seed0 failed \(exit code 1\): error: out of luck \(all of it: .*log\)"
    with pytest.raises(UserError, match=said):
        compare(recipes(tmp_path), ["bridge", "grpo"], 1, 1, tmp_path / "out", quiet=True)


def test_ctrl_c_lets_the_runs_save_and_leaves_none_behind(tmp_path, trainer, capsys):
    trainer.write_text("hang")
    out = tmp_path / "out"
    expected = [out / f"{label}-seed0" / "config.json" for label in ("bridge", "grpo")]

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while not all(path.exists() for path in expected) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        compare(recipes(tmp_path), ["bridge", "grpo"], 1, 2, out)
    assert all((path.parent / "saved").exists() for path in expected)
    assert "the same command goes on" in capsys.readouterr().out
    trainer.write_text("train")
    calls(out)
    compare(recipes(tmp_path), ["bridge", "grpo"], 1, 2, out, quiet=True)
    assert calls(out) == ["resume bridge-seed0", "resume grpo-seed0"]


def test_tail_reads_whole_lines_once_and_starts_again_after_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text('{"step": 1}\n{"step"')
    assert tail.read() == [{"step": 1}]
    with path.open("a") as file:
        file.write(': 2}\n')
    assert tail.read() == [{"step": 2}] and tail.read() == []
    other = tmp_path / "other"
    other.write_text('{"step": 1}\n{"step": 22222}\n{"step": 3}\n')
    other.replace(path)
    assert [event["step"] for event in tail.read()] == [1, 22222, 3]
