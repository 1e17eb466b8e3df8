"""Which mix of demonstrations and rewards survives good, needed and wrong demonstrations? The pilot of all methods.

    python benchmarks/pilot.py run PHASE [--methods ...]   trains what is missing of a phase; goes on where it stopped
    python benchmarks/pilot.py choose                      picks each method's setting from the tuning runs
    python benchmarks/pilot_tables.py                      writes tables and figures from the rows

Phases: `tune` (every method has six settings, one tuning seed, three regimes, family hops; joint has more, for its
envelope), `screen` (the chosen setting, fresh seeds, hops), `controls` (placebos and ablations on the seeds of
`screen`), `improve` (what the logs suggested, the same seeds), `confirm` (named methods, fresh seeds, --families).
One line a run in results/pilot/runs.jsonl, which is what is committed; a run that has its line is not trained again.
Everything is predicted in docs/log.md before it is run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridgelm.config.run_config import RunConfig, load_config

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "pilot"
ROWS, CHOSEN = RESULTS / "runs.jsonl", RESULTS / "chosen.json"

REGIMES = {"redundant": ["data.toy.reach=within"], "necessary": ["data.toy.reach=beyond"],
           "misleading": ["data.toy.reach=within", "data.toy.wrong=0.4"]}
FAMILIES = {
    "hops": ["data.train=toy:hops", "rollout.max_new_tokens=41"],
    # jugs has few different problems: more of them would all be the easiest ones.
    "jugs": ["data.train=toy:jugs", "data.toy.train_size=1000", "data.toy.demo_size=400", "rollout.max_new_tokens=55"],
}
COMMON = ["eval.every=10", "eval.problems=400", "checkpoint_every=40", "log.samples=0"]
SEEDS = {"tune": [100], "screen": range(5), "confirm": range(10, 25), "controls": range(5), "improve": range(5)}
STEPS = 80  # with rollouts: what "equal rollouts" means

Setting = dict[str, Any]


def method(name: str, lr: float = 5e-4, **options: Any) -> Setting:
    return {"method": {"name": name, **options}, "lr": lr}


def cold_start(sft_steps: int, sft_lr: float, lr: float) -> Setting:
    stages = [{"method": {"name": "sft"}, "steps": sft_steps, "lr": sft_lr}, {"method": {"name": "grpo"}}]
    return {"method": {"name": "sequence", "stages": stages}, "lr": lr, "steps": sft_steps + STEPS}


def of_bridge(name: str, **fixed: Any) -> list[Setting]:
    return [method(name, lr, beta=beta, probe_every=10, **{"lambda": lam}, **fixed) for lr, beta, lam in
            ((1e-3, 2e-4, 0.5), (1e-3, 2e-4, 0.77), (1e-3, 2e-4, 0.91), (5e-4, 1e-4, 0.77), (1e-3, 1e-3, 0.77),
             (1e-3, 2e-4, 0.97), (1.4e-3, 2.8e-4, 0.97))]


# The mixing weight and the rates. lambda .5, .77, .91 and .97 are the mixtures mu = 1, .3, .1 and .03 of joint.
GRID: dict[str, list[Setting]] = {
    "grpo": [method("grpo", lr) for lr in (2e-4, 3.5e-4, 5e-4, 7e-4, 1e-3, 1.4e-3, 2e-3)],
    "cold_start": [cold_start(200, 1e-3, 5e-4), cold_start(100, 1e-3, 5e-4), cold_start(50, 1e-3, 5e-4),
                   cold_start(200, 5e-4, 5e-4), cold_start(200, 1e-3, 3e-4), cold_start(100, 1e-3, 8e-4),
                   cold_start(200, 5e-4, 1e-3), cold_start(100, 1e-3, 1.2e-3)],
    "joint": [method("joint", 1e-3, mu=1.0), method("joint", 1e-3, mu=0.3), method("joint", 1e-3, mu=0.1),
              method("joint", 1e-3, mu=1.0, mu_end=0.0, schedule="linear"),
              method("joint", 1e-3, mu=0.3, mu_end=0.0, schedule="linear"), method("joint", 1e-3, mu=0.03),
              method("joint", 1.4e-3, mu=0.03)],
    "bridge": of_bridge("bridge"),
    "bridge_paper": of_bridge("bridge", preset="paper"),
    "bridge_leaky": of_bridge("bridge_leaky", ratio="truncate"),
    "bridge_dial": [method("bridge_dial", lr, beta=beta, eta=eta, ratio="truncate", **{"lambda": lam})
                    for lr, beta, eta, lam in
                    ((1e-3, 2e-4, 0.1, 0.5), (1e-3, 2e-4, 0.1, 0.77), (1e-3, 2e-4, 0.1, 0.91), (1e-3, 2e-4, 0.3, 0.5),
                     (1e-3, 2e-4, 0.3, 0.77), (1e-3, 1e-3, 0.3, 0.77), (1.4e-3, 2.8e-4, 0.1, 0.91))],
    "barrier": [method("barrier", lr, eta=eta) for lr, eta in
                ((1e-3, 1.0), (1e-3, 2.0), (1e-3, 4.0), (1e-3, 8.0), (1e-3, 16.0), (5e-4, 4.0), (1.4e-3, 16.0))],
    "token_lead": [method("token_lead", lr, mu=mu, eta=eta, source="wrong_demos") for lr, mu, eta in
                   ((1e-3, 1.0, 1.0), (1e-3, 0.3, 1.0), (1e-3, 0.1, 1.0), (1e-3, 0.03, 1.0), (1e-3, 0.3, 2.0),
                    (1e-3, 0.1, 2.0))],
    "guide": [method("guide", lr, beta=beta, **{"lambda": lam}) for lr, beta, lam in
              ((1e-3, 2e-3, 0.5), (1e-3, 5e-3, 0.5), (1e-3, 2e-3, 0.9), (1e-3, 5e-3, 0.9), (5e-4, 5e-3, 0.5),
               (1.4e-3, 2e-3, 0.5))],
}
# Further mixtures of joint, for the best one of each regime: not a method, but what a user with a validation set of
# every regime could reach by trying.
ENVELOPE = [method("joint", 5e-4, mu=1.0), method("joint", 5e-4, mu=0.3), method("joint", 1e-3, mu=0.01),
            method("joint", 1e-3, mu=3.0, mu_end=0.0, schedule="linear"),
            method("joint", 5e-4, mu=1.0, mu_end=0.0, schedule="linear")]
# What the logs of tuning and screening suggested, all with a short SFT stage in front but the gates.
SFT_STAGE = {"method": {"name": "sft"}, "steps": 100, "lr": 1e-3}


def after_sft(lr: float, **inner: Any) -> Setting:
    return {"method": {"name": "sequence", "stages": [SFT_STAGE, {"method": inner}]}, "lr": lr, "steps": 100 + STEPS}


def fading(lr: float, mu: float, mu_end: float, steps: int) -> Setting:
    """Joint behind the SFT stage with the shares that the dial goes through, and nothing else of it."""
    fade = {"method": {"name": "joint", "mu": mu, "mu_end": mu_end, "schedule": "linear"}, "steps": steps}
    rest = {"method": {"name": "joint", "mu": mu_end}, "fresh_optimiser": False}
    return {"method": {"name": "sequence", "stages": [SFT_STAGE, fade, rest]}, "lr": lr, "steps": 100 + STEPS}


IMPROVE: dict[str, Setting] = {
    "sft_joint": after_sft(8e-4, name="joint", mu=0.03),
    "sft_fade": fading(8e-4, 0.1, 0.0183, 24),
    "sft_dial": after_sft(8e-4, name="bridge_dial", beta=2e-4, eta=0.1, ratio="taper", **{"lambda": 0.91}),
    "sft_dial_plain": after_sft(8e-4, name="bridge_dial", beta=2e-4, eta=0.1, ratio="taper", scales=[1.0],
                                **{"lambda": 0.91}),  # what it ends with, without a scale that is chosen by validation
    "dial_taper": method("bridge_dial", 1e-3, beta=2e-4, eta=0.1, ratio="taper", **{"lambda": 0.91}),
    "sft_barrier": after_sft(8e-4, name="barrier", eta=16.0),
    "sft_gate": after_sft(8e-4, name="token_lead", mu=0.1, weights="gate", source="wrong_demos"),
    "gate": method("token_lead", 1e-3, mu=0.1, weights="gate", source="wrong_demos"),
    "whole": method("token_lead", 1e-3, mu=0.1, weights="whole", memory=0.8, source="wrong_demos"),
}
# BRIDGE's third term and its placebos at BRIDGE's own setting, and what else a variant's gain could come from.
CONTROLS: dict[str, Setting] = {
    **{f"bridge_{third}": method("bridge", 1e-3, beta=2e-4, third=third, **{"lambda": 0.97})
       for third in ("rl", "sft", "frozen", "noise", "permuted")},
    "dial_fixed": method("bridge_dial", 1e-3, beta=2e-4, eta=0.0, scales=[1.0], ratio="truncate", **{"lambda": 0.91}),
    "leaky_taper": method("bridge_leaky", 1e-3, beta=2e-4, probe_every=10, ratio="taper", **{"lambda": 0.97}),
}
CONTROL_REGIMES = ["redundant"]  # the third term is asked about where demonstrations are good
NO_DEMOS = {"grpo"}  # the same run whether demonstrations are right or wrong: trained once, its row stands for both


@dataclass(frozen=True)
class Job:
    """One run; `key` is its identity in the rows, with the digest of its setting: a grid that was changed since is
    another run."""

    phase: str
    label: str
    setting: int
    regime: str
    family: str
    seed: int
    config: RunConfig
    digest: str

    @property
    def key(self) -> str:
        return "/".join([self.phase, self.label, self.digest, self.family, self.regime, str(self.seed)])


def bare(setting: Setting) -> Setting:
    """Without what tuning wrote beside it."""
    return {key: setting[key] for key in ("method", "lr", "steps") if key in setting}


def digest_of(setting: Setting) -> str:
    """The shadow's `ratio` was no option when the first rows were made: they ran with `truncate`, which is left out."""
    setting = bare(setting)
    method = {key: value for key, value in setting["method"].items() if (key, value) != ("ratio", "truncate")}
    return hashlib.sha256(json.dumps(setting | {"method": method}, sort_keys=True).encode()).hexdigest()[:8]


def setting_of(row: dict[str, Any]) -> Setting | None:
    """What a tuning run was trained with; None for a setting that is in no grid any more."""
    label, digest = row["label"], row["key"].split("/")[2]
    return next((s for s in GRID[label] + (ENVELOPE if label == "joint" else []) if digest_of(s) == digest), None)


def job(phase: str, label: str, number: int, setting: Setting, regime: str, family: str, seed: int,
        runs: Path) -> Job:
    setting, digest = bare(setting), digest_of(setting)
    overrides = [*REGIMES[regime], *FAMILIES[family], *COMMON]
    raw = load_config(ROOT / "recipes" / "toy" / "joint.toml", overrides).resolved()
    raw |= {"name": f"{phase}-{label}-{digest}-{family}-{regime}-{seed}", "out": str(runs), "seed": seed, "threads": 1,
            "steps": setting.get("steps", STEPS), "method": setting["method"]}
    raw["optim"]["lr"] = setting["lr"]
    return Job(phase, label, number, regime, family, seed, RunConfig.model_validate(raw), digest)


def plan(phase: str, methods: list[str] | None, runs: Path, families: Sequence[str] = ("hops",),
         regimes: Sequence[str] | None = None) -> list[Job]:
    """Seeds outermost, then regimes: a phase that is stopped half way has whole blocks."""
    if phase == "tune":
        grid = GRID | {"joint": GRID["joint"] + ENVELOPE}
        chosen = [(label, i, s) for label, settings in grid.items() for i, s in enumerate(settings)]
    else:
        chosen = [(label, 0, setting) for label, setting in settings_of(phase).items()]
    wanted = [entry for entry in chosen if methods is None or entry[0] in methods]
    return [job(phase, label, i, setting, regime, family, seed, runs) for seed in SEEDS[phase] for family in families
            for label, i, setting in wanted
            for regime in (regimes or (CONTROL_REGIMES if phase == "controls" else REGIMES))
            if not (label in NO_DEMOS and regime == "misleading")]


def settings_of(phase: str) -> dict[str, Setting]:
    """Tuned settings; of the later phases those above, and joint's envelope as labels of its own."""
    if phase in {"controls", "improve"}:
        return {"controls": CONTROLS, "improve": IMPROVE}[phase]
    chosen = json.loads(CHOSEN.read_text())
    return chosen["main"] | ({} if phase == "screen" else IMPROVE)


# -- running -----------------------------------------------------------------------------------------------------------

def run(planned: Sequence[Job], jobs: int) -> None:
    done = {row["key"] for row in rows()}
    todo = [one for one in planned if one.key not in done]
    print(f"{len(todo)} of {len(planned)} runs to go", flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool, ROWS.open("a") as file:
        futures = {pool.submit(train_one, one.config): one for one in todo}
        for number, future in enumerate(as_completed(futures), 1):
            one = futures[future]
            try:
                found = future.result()
            except Exception as error:  # one diverged run must not end the night's work; it stays missing
                print(f"{one.key}: {type(error).__name__}: {error}", flush=True)
                continue
            row = {"key": one.key, "phase": one.phase, "label": one.label, "setting": one.setting,
                   "family": one.family, "regime": one.regime, "seed": one.seed, **found}
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{number}/{len(todo)} {one.key}: {found['final']:.3f} ({found['cpu_seconds']:.0f} s)", flush=True)


def train_one(config: RunConfig) -> dict[str, Any]:
    from bridgelm.training.loop import resume, train

    path, started = Path(config.out) / config.name, time.process_time()
    found = resume(path, quiet=True) if (path / "config.json").exists() else train(config, quiet=True)
    return row_of(found, time.process_time() - started)


def row_of(found: Any, seconds: float) -> dict[str, Any]:
    """The compact facts of a finished run. `curve` is accuracy on validation against steps, FLOPs and rollouts."""
    evals, steps = found.evals, found.metrics
    last = evals[-1]
    curve = [[e["step"], round(e["accuracy"], 4), e["flops"], e["rollouts"]] for e in evals]
    own = {key: [round(e[key], 4) for e in steps if e.get(key) is not None] for key in WATCHED}
    return {"final": found.result["final"]["accuracy"], "best": found.result.get("best", {}).get("accuracy"),
            "hard": found.result["final"].get("hard", {}).get("accuracy"), "curve": curve, "flops": last["flops"],
            "rollouts": last["rollouts"], "cpu_seconds": round(seconds, 1),
            "reward": [round(e["reward"], 4) for e in steps if e.get("reward") is not None][::5],
            "commit": found.info["commit"], "watched": {key: values for key, values in own.items() if values}}


WATCHED = ["bridge/gain_honest", "bridge/shadow_reward", "dial/lambda", "dial/z", "barrier/nu", "lead/spread",
           "guide/gain", "guide/share"]


def rows() -> list[dict[str, Any]]:
    found = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    return found + [row | {"regime": "misleading"} for row in found
                    if row["label"] in NO_DEMOS and row["regime"] == "redundant"]


# -- choosing ----------------------------------------------------------------------------------------------------------

def late(row: dict[str, Any]) -> float:
    """Accuracy on validation, mean of the last two looks: what a setting is chosen by. Test is never looked at."""
    return sum(point[1] for point in row["curve"][-2:]) / 2


def choose() -> None:
    """One setting a method for all three regimes, by its mean; joint's best of each regime beside it."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows():
        if row["phase"] == "tune":
            found.setdefault(row["label"], {}).setdefault(row["key"].split("/")[2], {})[row["regime"]] = late(row)
    main: dict[str, Setting] = {}
    for label, settings in GRID.items():
        scores = {i: sum(v.values()) / len(v) for i, s in enumerate(settings)
                  if len(v := found.get(label, {}).get(digest_of(s), {})) == len(REGIMES)}
        if scores:
            best = max(scores, key=lambda i: scores[i])
            main[label] = settings[best] | {"number": best, "score": round(scores[best], 4)}
    envelope = {}
    for regime in REGIMES:
        tried = {i: v[regime] for i, s in enumerate(GRID["joint"] + ENVELOPE)
                 if regime in (v := found.get("joint", {}).get(digest_of(s), {}))}
        best = max(tried, key=lambda i: tried[i])
        envelope[regime] = (GRID["joint"] + ENVELOPE)[best] | {"number": best, "score": tried[best]}
    CHOSEN.write_text(json.dumps({"main": main, "envelope": envelope}, indent=1) + "\n")
    for label, setting in main.items():
        print(label, setting)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "choose"])
    parser.add_argument("phase", nargs="?", choices=list(SEEDS))
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--families", nargs="*", choices=list(FAMILIES), default=["hops"])
    parser.add_argument("--regimes", nargs="*", choices=list(REGIMES))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "pilot")
    args = parser.parse_args()
    if args.what == "choose":
        choose()
    elif args.phase is None:
        sys.exit("which phase?")
    else:
        run(plan(args.phase, args.methods, args.runs, args.families, args.regimes), args.jobs)


if __name__ == "__main__":
    main()
