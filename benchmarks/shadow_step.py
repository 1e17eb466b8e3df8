"""How far theta and BRIDGE's shadow move in their first steps, in theta's metric alone and with the bound of
`optim.SharedMoments`, measured on the weights themselves beside what the run logs.

    python benchmarks/shadow_step.py        two minutes on one core; writes results/shadow_step.json
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

from bridgelm.config.run_config import load_config
from bridgelm.model import optim
from bridgelm.model.policy import Policy
from bridgelm.training import loop

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "results" / "shadow_step.json"
STEPS, LR = 11, 1e-4
SETTINGS = {"lambda = .5": [], "lambda_start = 0": ["method.lambda_start=0"]}
METRICS = {"theta's metric alone": math.inf, "with the bound": optim.SLACK}


def watch(settings: list[str]) -> dict[str, list[dict[str, float]]]:
    """Norm of each step as it was and as it is logged, and the largest element in units of the learning rate."""
    found: dict[str, list[dict[str, float]]] = {"theta": [], "shadow": []}
    apply = Policy.apply

    def watched(self: Policy, name: str, gradient: Any, **options: Any) -> float:
        group = self.groups[self.optimisers[name].group].flat()
        before = {key: t.detach().clone() for key, t in group.items()}
        size = apply(self, name, gradient, **options)
        moved = [t.detach() - before[key] for key, t in group.items()]
        if name in found:
            found[name].append({"norm": math.sqrt(sum(float(t.norm()) ** 2 for t in moved)),
                                "logged": self.optimisers[name].moved,
                                "largest": max(float(t.abs().max()) for t in moved) / LR})
        return size

    with tempfile.TemporaryDirectory() as folder:
        config = load_config(ROOT / "recipes" / "toy" / "bridge.toml", [
            f"steps={STEPS}", f"optim.lr={LR}", "optim.warmup=0", "eval.every=0", f"out={folder}", *settings])
        Policy.apply = watched  # type: ignore[method-assign]
        try:
            loop.train(config, quiet=True)
        finally:
            Policy.apply = apply  # type: ignore[method-assign]
    return found


def main() -> None:
    rows = []
    for setting, overrides in SETTINGS.items():
        for metric, slack in METRICS.items():
            optim.SLACK = slack
            found = watch(overrides)
            for step in (0, 1, 2, 5, 10):
                theta, shadow = found["theta"][step], found["shadow"][step]
                rows.append({"setting": setting, "metric": metric, "step": step + 1,
                             "ratio": round(shadow["norm"] / theta["norm"], 3),
                             "largest_element_of_the_shadow_over_lr": round(shadow["largest"], 2),
                             "logged_over_true": round(shadow["logged"] / shadow["norm"], 5)})
                print(rows[-1], flush=True)
    TARGET.write_text(json.dumps({"command": "python benchmarks/shadow_step.py", "recipe": "recipes/toy/bridge.toml",
                                  "lr": LR, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
