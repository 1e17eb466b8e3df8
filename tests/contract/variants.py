"""Every method, and the readings of it that change what a step does. Each is run on the tiny world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bridgelm.methods
from bridgelm.config import catalogue
from records import RECORDS

METHOD: dict[str, dict[str, Any]] = {name: {"name": name, **record.options} for name, record in RECORDS.items()}
BRIDGE, LEAKY, DIAL = METHOD["bridge"], METHOD["bridge_leaky"], METHOD["bridge_dial"]
GUIDE, STAGED = METHOD["guide"], METHOD["staged"]
# Methods that ask a teacher.
TAUGHT = [name for name in METHOD if catalogue.needs(name) & {"teacher", "behaviour"}]
READINGS: dict[str, dict[str, Any]] = {
    "grpo with a reference": {"name": "grpo", "rl": {"kl_coef": 0.1, "std": True, "aggregate": "row"}},
    "grpo, constant length": {"name": "grpo", "rl": {"aggregate": "constant"}},
    "alternate, one optimiser": {"name": "alternate", "optimisers": "one", "every": 2, "half_steps": True},
    "barrier with a reference": {"name": "barrier", "rl": {"kl_coef": 0.1}, "decay": 0.0, "cap": 3.0},
    "bridge paper": {**BRIDGE, "preset": "paper"},
    "bridge own rollouts": {**BRIDGE, "shadow_rollouts": "own", "rl": {"kl_coef": 0.1}},
    "bridge, every second step's shadow": {**BRIDGE, "shadow_every": 2},
    "bridge own rollouts, every second step's shadow": {**BRIDGE, "shadow_rollouts": "own", "shadow_every": 2},
    "bridge_leaky, every third step's shadow": {**LEAKY, "shadow_every": 3},
    "bridge, shadow in bfloat16": BRIDGE,
    "bridge_leaky, shadow in bfloat16, the rest on the host": LEAKY,
    "bridge with a reference": {**BRIDGE, "ratio": "taper", "rl": {"kl_coef": 0.1}},
    "bridge_leaky with a reference": {**LEAKY, "leak": 0.3, "rl": {"kl_coef": 0.1}},
    "bridge_dial, row means": {**DIAL, "leak": 0.0, "ratio": "truncate",
                              "rl": {"kl_coef": 0.1, "aggregate": "row", "std": True}},
    "token_lead with a memory": {"name": "token_lead", "memory": 0.5, "source": "difficulty", "rl": {"kl_coef": 0.1}},
    "token_lead, gate": {"name": "token_lead", "weights": "whole", "mu": 0.3},
    "token_lead shuffled": {"name": "token_lead", "shuffled": True, "eta": 0.5},
    "bridge exclusive": {**BRIDGE, "exclusive": True, "modules": "mlp"},
    "bridge resync": {**BRIDGE, "resync_every": 1, "lambda_start": 0.9},
    "bridge without a shadow": {**BRIDGE, "third": "rl", "probe_every": 0, "rl": {"kl_coef": 0.1}},
    "bridge, w from SFT alone": {**BRIDGE, "third": "sft", "probe_every": 0, "rl": {"kl_coef": 0.1}},
    "bridge, frozen shadow": {**BRIDGE, "third": "frozen"},
    "bridge, noise": {**BRIDGE, "third": "noise"},
    "bridge, permuted": {**BRIDGE, "third": "permuted", "rl": {"kl_coef": 0.1}, "resync_every": 2},
    "bridge then joint": {"name": "sequence", "stages": [
        {"method": {**BRIDGE, "exclusive": True, "modules": "mlp", "rl": {"kl_coef": 0.1}}, "steps": 2},
        {"method": {"name": "joint", "rl": {"kl_coef": 0.1}}, "fresh_optimiser": False, "fresh_reference": False}]},
    "dft by the start, then grpo": {"name": "sequence", "stages": [
        {"method": {"name": "dft", "weights_of": "reference"}, "steps": 2}, {"method": {"name": "grpo"}}]},
    "interleaved, one optimiser": {"name": "interleaved", "optimisers": "one", "every": 3, "rl": {"std": True}},
    "data_mixing with RL": {"name": "data_mixing", "rl_weight": 0.5, "rl": {"kl_coef": 0.1}},
    "sft, then shuffle_r1 round joint": {"name": "sequence", "stages": [
        {"method": {"name": "sft"}, "steps": 1},
        {"method": {"name": "shuffle_r1", "method": {"name": "joint", "rl": {"aggregate": "row"}}, "draws": 2}}]},
    "gta with tags": {"name": "gta", "open": "+ ", "close": " =", "format": "", "words": 1},
    "rft in rounds": {"name": "rft", "refresh_every": 3, "max_per_problem": 1},
    "rft over all tokens": {"name": "rft", "over": "all", "unique": False, "max_per_problem": 0},
    "fdiv_sft, hellinger on own answers": {"name": "fdiv_sft", "divergence": "hellinger", "penalty": "own"},
    "gift then grpo": {"name": "sequence", "stages": [
        {"method": {"name": "gift", "smooth": 0.1, "beta": 2.0}, "steps": 2},
        {"method": {"name": "grpo", "rl": {"kl_coef": 0.1}}}]},
    "guide without a pull": {**GUIDE, "kappa": 0.0, "lambda": 0.8, "rl": {"std": True, "aggregate": "row"}},
    "guide then grpo": {"name": "sequence", "stages": [{"method": GUIDE, "steps": 2}, {"method": {"name": "grpo"}}]},
    "trapo, paper's table with a reference": {"name": "trapo", "table": "paper", "baseline": "own",
                                              "rl": {"kl_coef": 0.1, "aggregate": "row"}},
    "sasr with a reference and probes": {"name": "sasr", "warmup": 0.25, "gamma": 9.0, "probe_every": 1},
    "sasr, blend": {"name": "sasr", "warmup": 0.25, "rule": "blend", "denominator": "grpo", "rl": {"kl_coef": 0.0}},
    "amft in Adam's metric": {"name": "amft", "warmup": 0.0, "every": 2, "problems": 2, "metric": "adam",
                              "eta_entropy": 0.05, "rl": {"kl_coef": 0.1}},
    "kdrl k3, masked": {"name": "kdrl", "beta": 0.3, "delta": 0.0, "estimator": "k3", "mask": "response", "clamp": 1.0,
                        "rl": {"kl_coef": 0.1, "aggregate": "row"}},
    "distil, pear, then grpo": {"name": "sequence", "stages": [
        {"method": {"name": "kdrl", "rl_weight": 0.0, "beta": 1.0, "delta": 0.0}, "steps": 1},
        {"method": {"name": "pear", "weights": "block", "normalise": "batch"}, "steps": 1},
        {"method": {"name": "grpo"}}]},
    "luffy, own baseline": {"name": "luffy", "baseline": "own", "demos": 2, "clip": True, "entropy": 0.0,
                            "rl": {"std": True, "aggregate": "row", "kl_coef": 0.1}},
    "srft, the other signs": {"name": "srft", "sft_sign": "plus", "entropy_of": "token", "demos": 2, "std": True,
                              "aggregate": "token"},
    "chord, plain with a warm-up": {"name": "chord", "preset": "mu", "warmup": 2, "decay": 3, "rl": {"kl_coef": 0.1}},
    "hpt, soft": {"name": "hpt", "gate": "soft", "rl": {"kl_coef": 0.1}},
    "hpt, advantage": {"name": "hpt", "gate": "advantage", "demos": "all", "balance": "terms"},
    "uft with a reference": {"name": "uft", "hint": 0.0, "rl": {"kl_coef": 0.1, "std": True}},
    "prefix_rft, two hybrids": {"name": "prefix_rft", "hybrids": 2, "continuation": "zero",
                                "rl": {"kl_coef": 0.1, "aggregate": "row"}},
    "bread, new groups": {"name": "bread", "episodes": 3, "reuse": False, "rl": {"kl_coef": 0.1}},
    "lspo, whole answers": {"name": "lspo", "rank": 2, "alpha": 4.0, "fit_steps": 2, "beta": 0.05, "ratio": "sequence",
                            "rl": {"kl_coef": 0.1}},
}
# Low-rank training is the policy's affair: it is run with the plain methods, and with those that have weights or
# optimisers of their own beside theta.
OWN = ("add_w(", "fork(", "shadow_setup(", "offset(", "absorb(", 'optimiser("theta_', "versus=")
FOLDER = Path(bridgelm.methods.__file__).parent
BESIDE = {name for name in METHOD if any(word in (FOLDER / f"{name}.py").read_text() for word in OWN)}
LORA = {f"{name}, low-rank theta": METHOD[name] for name in sorted(BESIDE | {"sft", "grpo", "joint"})} | {
    "bridge exclusive, low-rank theta": READINGS["bridge exclusive"],
    "sft, bridge exclusive, grpo, low-rank theta": {"name": "sequence", "stages": [
        {"method": {"name": "sft"}, "steps": 1}, {"method": READINGS["bridge exclusive"], "steps": 1},
        {"method": {"name": "grpo", "rl": {"kl_coef": 0.1}}}]},
}
VARIANTS = METHOD | READINGS | LORA
LATE = {name for name, record in RECORDS.items() if record.late}


def sections(name: str) -> dict[str, Any]:
    """The configuration of a variant beside its method."""
    # A large epsilon keeps Adam's steps well conditioned where a gradient is nearly zero.
    out: dict[str, Any] = {"optim": {"lr": 1e-2, "eps": 1e-3}}
    if any(f"'{taught}'" in str(VARIANTS.get(name)) for taught in TAUGHT):
        out["teacher"] = {"name_or_path": "llama"}  # another tiny model (conftest.py)
    if "bfloat16" in name:
        out["optim"] |= {"shadow": "bfloat16", "host": ["shadow", "moments", "gradients"] if "host" in name else []}
    return out | ({"model": {"lora_rank": 3, "lora_alpha": 6.0}} if name in LORA else {})
