"""Trajectories on recorded rollouts: what each method's losses and gradient norms are, to full precision, step by step.

The recorded part is what a machine or a library could draw otherwise: the completions and their log-probs. The model's
weights are a formula, so they need no file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bridgelm.config import catalogue
from bridgelm.config.run_config import make_config
from bridgelm.engine import Request, Sampling
from bridgelm.training import loop
from bridgelm.types import Completion
from records import RECORDS
from tiny import open_session, raw_config

FOLDER = Path(__file__).parent
ROLLOUTS, TRAJECTORIES = FOLDER / "rollouts.json", FOLDER / "trajectories"
STEPS = 3
METHODS: dict[str, dict[str, Any]] = {
    "_".join(filter(None, (name, suffix))): {"name": name, **options} for name, record in RECORDS.items()
    for suffix, options in ({"": record.options} if record.golden is None else record.golden).items()}
KEPT = ("loss/", "grad_norm/", "bridge/norm", "bridge/gain", "bridge/ess", "bridge/kl", "bridge/share",
        "bridge/theta_move", "bridge/shadow_move", "bridge/agreement", "dial/", "barrier/", "lead/", "guide/", "dft/",
        "interleaved/", "mixing/", "shuffle_r1/", "trapo/", "sasr/", "amft/", "lspo/", "luffy/", "chord/", "gac/",
        "staged/", "gta/", "kdrl/", "pear/", "srft/", "reward", "lr",
        "hpt/", "relift/", "uft/", "prefix_rft/", "bread/", "rft/", "fdiv/", "gift/")


def session(method: dict[str, Any], folder: Path) -> Any:
    raw = raw_config(folder, method, steps=STEPS, **RECORDS[method["name"]].golden_sections)
    # A large epsilon: Adam would turn the rounding of a gradient that is nearly zero into a step.
    raw["optim"] = {"lr": 1e-2, "eps": 1e-3}
    if catalogue.needs(method["name"]) & {"teacher", "behaviour"}:
        raw["teacher"] = {"name_or_path": raw["model"]["name_or_path"]}
    made = open_session(make_config(raw))
    with torch.no_grad():  # any weights do; these are the same everywhere
        for i, p in enumerate(made.roll.teacher.model.parameters() if made.roll.teacher else ()):
            wave = torch.cos(torch.arange(p.numel(), dtype=torch.float64) * (1.3 + 0.1 * i) + i).view_as(p)
            p.copy_(1 + 0.1 * wave if p.dim() == 1 else 0.3 * wave)
        for i, (name, p) in enumerate(made.policy.params.items()):
            wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * (1.7 + 0.1 * i) + i)
            value = (1 + 0.1 * wave if "norm" in name else 0.3 * wave).view_as(p)
            for group in made.policy.groups.values():
                if name in group.full:
                    group.full[name].copy_(value)
            if name in made.policy.frozen:
                made.policy.frozen[name].copy_(value)
        for pair in (pair for group in made.policy.groups.values() for pair in group.low.values()):
            for t in pair:  # w is not zero either
                t.copy_(0.2 * torch.cos(torch.arange(t.numel(), dtype=torch.float64)).view_as(t))
    made.policy.live.stale = True
    return made


class Recorded:
    """An engine that answers each request of a step with the recorded completion of its place."""

    exact = True

    def __init__(self, completions: list[list[Any]]) -> None:
        self.completions = completions

    def generate(self, origin: Any, requests: Sequence[Request], sampling: Sampling, ledger: Any) -> list[Completion]:
        out = []
        for request in requests:
            _, step, call, index = request.seed
            ids, logps, finished = self.completions[(step * 7 + call * 3 + index) % len(self.completions)]
            out.append(Completion(np.array(ids, dtype=np.int64), np.array(logps), np.array(logps), finished))
        return out

    def sleep(self) -> None:
        pass


def run(method: dict[str, Any], completions: list[list[Any]]) -> list[dict[str, float]]:
    """The metrics of each step."""
    with tempfile.TemporaryDirectory() as folder:
        made = session(method, Path(folder))
        made.roll.engine = Recorded(completions)
        steps = []
        for _ in range(STEPS):
            found = loop.take_step(made)
            kept = (*KEPT, *RECORDS[method["name"]].kept)
            steps.append({key: value for key, value in found.items() if key.startswith(kept)})
        made.folder.close()
        made.roll.grader.close()
    return steps


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
