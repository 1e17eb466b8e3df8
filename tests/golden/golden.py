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
from tiny import open_session, raw_config

FOLDER = Path(__file__).parent
ROLLOUTS, TRAJECTORIES = FOLDER / "rollouts.json", FOLDER / "trajectories"
STEPS = 3
BRIDGE = {"name": "bridge", "rank": 2, "alpha": 4.0}
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"name": "sft"},
    "grpo": {"name": "grpo"},
    "grpo_kl_std": {"name": "grpo", "rl": {"kl_coef": 0.1, "std": True, "aggregate": "row"}},
    "sequence": {"name": "sequence", "stages": [{"method": {"name": "sft"}, "steps": 1}, {"method": {"name": "grpo"}}]},
    "alternate": {"name": "alternate"},
    "joint": {"name": "joint", "mu": 0.5, "mu_end": 0.1, "schedule": "linear"},
    "bridge": BRIDGE,
    "bridge_paper": {**BRIDGE, "preset": "paper"},
    "bridge_exclusive": {**BRIDGE, "exclusive": True, "modules": "mlp"},
    "bridge_leaky": {**BRIDGE, "name": "bridge_leaky"},
    "bridge_dial": {**BRIDGE, "name": "bridge_dial", "eta": 0.5},
    "barrier": {"name": "barrier"},
    "token_lead": {"name": "token_lead"},
    "guide": {"name": "guide", "rank": 2, "alpha": 4.0, "warmup": 1},
    "dft": {"name": "dft"},
    "interleaved": {"name": "interleaved"},
    "data_mixing": {"name": "data_mixing", "buffer": 20, "rl_weight": 0.5},
    "shuffle_r1": {"name": "shuffle_r1", "draws": 3},
    "trapo": {"name": "trapo"},
    "amft": {"name": "amft", "warmup": 0.34, "every": 2, "problems": 2, "eta": 0.1},
    "lspo": {"name": "lspo", "rank": 2, "alpha": 4.0, "fit_steps": 2, "beta": 0.05},
    "sasr": {"name": "sasr", "warmup": 0.34, "gamma": 12.0},
    "luffy": {"name": "luffy"},
    "srft": {"name": "srft"},
    "chord": {"name": "chord", "preset": "both", "warmup": 1, "decay": 2},
    "gac": {"name": "gac", "refresh": 2, "decay": 0.5, "warmup": 0, "decay_steps": 2},
    "kdrl": {"name": "kdrl", "beta": 0.5, "delta": 0.1, "beta_min": 0.1, "clamp": 2.0},
    "pear": {"name": "pear"},
    "staged": {"name": "staged", "target_entropy": 1.0, "probe": 6, "lengths": [{"length": 0.5}, {"length": 1.0}]},
    "gta": {"name": "gta", "open": "", "close": "", "format": ""},
    "hpt": {"name": "hpt", "gamma": 0.5, "sft": 0.3},
    "hpt_soft": {"name": "hpt", "gate": "soft"},
    "relift": {"name": "relift", "size": 1, "pass_rate": 0.5},
    "uft": {"name": "uft", "until": 1.0, "hint": 0.1},
    "prefix_rft": {"name": "prefix_rft", "cut": 0.5},
    "bread": {"name": "bread", "episodes": 4},
    "rft": {"name": "rft"},
    "fdiv_sft": {"name": "fdiv_sft", "beta": 0.5},
    "gift": {"name": "gift", "beta": 3.0},
}
# Of the recorded answers, no group of four fails.
SECTIONS: dict[str, dict[str, Any]] = {"bread": {"rollout": {"prompts": 6, "group": 2, "max_new_tokens": 6}}}
KEPT = ("loss/", "grad_norm/", "bridge/norm", "bridge/gain", "bridge/ess", "bridge/kl", "bridge/share",
        "bridge/theta_move", "bridge/shadow_move", "bridge/agreement", "dial/", "barrier/", "lead/", "guide/", "dft/",
        "interleaved/", "mixing/", "shuffle_r1/", "trapo/", "sasr/", "amft/", "lspo/", "luffy/", "chord/", "gac/",
        "staged/", "gta/", "kdrl/", "pear/", "srft/", "reward", "lr",
        "hpt/", "relift/", "uft/", "prefix_rft/", "bread/", "rft/", "fdiv/", "gift/")


def session(method: dict[str, Any], folder: Path) -> Any:
    raw = raw_config(folder, method, steps=STEPS, **SECTIONS.get(method["name"], {}))
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
            steps.append({key: value for key, value in found.items() if key.startswith(KEPT)})
        made.folder.close()
        made.roll.grader.close()
    return steps


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
