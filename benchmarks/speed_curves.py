"""What a step costs as rollouts and lengths grow, and what methods cost beside grpo at equal rollouts."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import speed_model

Measure = Callable[[Mapping[str, Mapping[str, Any]], int, Mapping[str, str]], dict[str, list[Any]]]
SHAPE = "tiny"
ROLLOUTS = (64, 128, 256, 512, 1024)  # of 64 tokens
TOKENS = (16, 32, 64, 128, 256)  # of 128 rollouts
DEMOS = 8  # rollouts for each demonstration of the same length
QUIET: dict[str, Any] = {"probe_every": 0}  # no rollouts of the shadow
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {}, "joint": {}, "bridge": QUIET, "bridge, every 2nd step": {**QUIET, "shadow_every": 2},
    "bridge_dial": QUIET, "bridge_leaky": QUIET, "barrier": {}, "token_lead": {}, "guide": {}}
# Rollouts of a step -> lengths and methods whose price is measured. With few rollouts a decoding step is mostly costs
# that do not grow with their number, so that drawing answers dominates, as it does for long answers on a GPU.
PRICES: dict[int, tuple[tuple[int, ...], tuple[str, ...]]] = {
    128: (TOKENS, tuple(METHODS)), 16: ((32, 64, 128, 256, 512), ("grpo", "joint", "bridge", "bridge, every 2nd step"))}


def spec(folder: Path, name: str, rollouts: int, length: int, options: Mapping[str, Any]) -> dict[str, Any]:
    return {"system": "bridgelm", "folder": str(folder), "dtype": "float32", "name": f"{name}-{rollouts}-{length}",
            "method": {"name": name.partition(",")[0], **options}, "prompts": rollouts // 8, "group": 8,
            "length": length, "demos": rollouts // DEMOS, "micro_tokens": 4096}


def folder_for(root: Path, length: int) -> Path:
    folder = root / str(length)
    speed_model.write_model(folder, SHAPE, None)
    speed_model.write_data(folder, 256, length)
    return folder


def slope(pairs: Sequence[tuple[float, float]]) -> float:
    """Of a straight line through logarithms: 1 is linear."""
    xs, ys = [math.log(x) for x, _ in pairs], [math.log(y) for _, y in pairs]
    x, y = statistics.mean(xs), statistics.mean(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def scaling(measure: Measure, rounds: int) -> dict[str, Any]:
    out = {}
    for axis, sizes in (("rollouts", [(r, 64) for r in ROLLOUTS]), ("tokens", [(128, t) for t in TOKENS])):
        with tempfile.TemporaryDirectory() as root:
            specs = {f"{r}x{t}": spec(folder_for(Path(root), t), "grpo", r, t, {}) for r, t in sizes}
            found = measure(specs, rounds, {})
        points = [{"rollouts": r, "tokens": t, "seconds": statistics.median(x["seconds"] for x in found[f"{r}x{t}"])}
                  for r, t in sizes]
        out[axis] = {"points": points, "slope": slope([(p[axis], p["seconds"]) for p in points])}
        print(json.dumps({axis: out[axis]}), flush=True)
    return out


def price(measure: Measure, rounds: int) -> list[dict[str, Any]]:
    """Steps of every method beside grpo's, in turn. `s`: share of a grpo step that is not drawing answers; `d`: tokens
    of demonstrations that are trained on, prompts among them, for each such token of the rollouts."""
    rows = []
    for rollouts, (lengths, names) in PRICES.items():
        for length in lengths:
            with tempfile.TemporaryDirectory() as root:
                folder = folder_for(Path(root), length)
                found = measure({name: spec(folder, name, rollouts, length, METHODS[name]) for name in names},
                                2 * rounds, {})
            plain, joint = found["grpo"], found["joint"]
            share = statistics.median(t["training"] / t["seconds"] for t in plain)
            extra = statistics.median(j["train"] / g["train"] for j, g in zip(joint, plain, strict=True)) - 1
            rows.append({"rollouts": rollouts, "length": length, "s": share, "d": extra,
                         "seconds": statistics.median(t["seconds"] for t in plain),
                         "formula": 1 + share * (1 + extra), "formula, every 2nd step": 1 + share * (0.5 + extra),
                         "methods": {name: price_of(found[name], plain) for name in names}})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def price_of(turns: Sequence[Mapping[str, float]], plain: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Two steps that follow each other count as one: a shadow may rest in one of them."""
    ratios = [(a["seconds"] + b["seconds"]) / (c["seconds"] + d["seconds"])
              for a, b, c, d in zip(turns[::2], turns[1::2], plain[::2], plain[1::2], strict=True)]
    return {"price": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
