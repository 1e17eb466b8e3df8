"""The same tokens, old log-probs and advantages through TRL's own trainers and through ours: losses and gradients.

A check for development, in an environment of its own; nothing of BridgeLM needs TRL. Set-up and run, from the root:

    python3 -m venv /tmp/trl-venv && /tmp/trl-venv/bin/pip install -c constraints.txt torch trl==1.16.0 -e .
    /tmp/trl-venv/bin/python benchmarks/trl_parity.py        (under a minute on a CPU)

TRL's side is `GRPOTrainer._generate_and_score_completions` (with its sampling replaced by fixed answers) and
`GRPOTrainer.compute_loss`, and `SFTTrainer.get_batch_samples` and `compute_loss`, unchanged; ours are the files of the
methods. The model is a tiny random Qwen2 in float64, norms and rotary angles too (TRL pads on the left, so that its
positions are not ours). TRL's head sums in float32 whatever the model is, so each case is run twice: as TRL comes,
where only rounding of float32 may separate the two, and with a log-softmax in float64 in the place of that head.
Writes results/trl_parity.json. Exit code 1 if what should agree does not, or what is said to differ does not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import MethodType
from typing import Any

import datasets
import numpy as np
import torch
import transformers
import trl.trainer.utils
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from bridgelm.config.run_config import OptimConfig, make_config
from bridgelm.ledger import Ledger
from bridgelm.methods import METHODS
from bridgelm.methods.base import rl_coef
from bridgelm.model.batching import make_batch
from bridgelm.model.policy import Policy
from bridgelm.objective import credit
from bridgelm.types import Problem, Row, Verdict

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from tiny import exact_norms, save_model  # noqa: E402

TOLERANCE = {"float32 head": 2e-6, "float64 head": 1e-11}  # of the gradient, relative
GROUP, LIMIT = 4, 9  # answers of a problem, tokens of an answer
CLIP = {"epsilon": 0.2, "epsilon_high": 0.28}
KL = {"beta": 0.3, "use_bias_correction_kl": False}
# name -> (settings of TRL, options `rl` of ours, settings of both). What TRL calls bnpo is a token mean of its own
# micro-batch; what it calls dapo is one over the generation batch.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo"}, {"aggregate": "row"}, {}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"aggregate": "constant"}, {}),
    "dapo": ({"loss_type": "dapo"}, {"aggregate": "token"}, {}),
    "bnpo": ({"loss_type": "bnpo"}, {"aggregate": "token"}, {}),
    "grpo, symmetric clip": ({"loss_type": "grpo", "epsilon_high": None}, {"aggregate": "row", "clip_high": 0.2}, {}),
    "grpo, KL": ({"loss_type": "grpo", **KL}, {"aggregate": "row", "kl_coef": 0.3}, {}),
    "dr_grpo, KL": ({"loss_type": "dr_grpo", **KL}, {"aggregate": "constant", "kl_coef": 0.3}, {}),
    "dapo, KL": ({"loss_type": "dapo", **KL}, {"aggregate": "token", "kl_coef": 0.3}, {}),
    "dapo, KL times the ratio": ({"loss_type": "dapo", "beta": 0.3}, {"aggregate": "token", "kl_coef": 0.3}, {}),
    "dapo, temperature .7": ({"loss_type": "dapo", "temperature": 0.7}, {"aggregate": "token"}, {"temperature": 0.7}),
    "grpo, 4 micro-batches": ({"loss_type": "grpo"}, {"aggregate": "row"}, {"micro": 4}),
    "dr_grpo, 4 micro-batches": ({"loss_type": "dr_grpo"}, {"aggregate": "constant"}, {"micro": 4}),
    "dapo, 4 micro-batches": ({"loss_type": "dapo"}, {"aggregate": "token"}, {"micro": 4}),
    "bnpo, 4 micro-batches": ({"loss_type": "bnpo"}, {"aggregate": "token"}, {"micro": 4}),
    "grpo, group deviation": ({"loss_type": "grpo", "scale_rewards": "group"}, {"aggregate": "row", "std": True}, {}),
    "dapo, truncated answers masked": ({"loss_type": "dapo"}, {"aggregate": "token"}, {"mask": True}),
    "grpo, truncated answers masked": ({"loss_type": "grpo"}, {"aggregate": "row"}, {"mask": True}),
    "dr_grpo, truncated answers masked": ({"loss_type": "dr_grpo"}, {"aggregate": "constant"}, {"mask": True}),
}
# Where the two do not mean the same.
DIFFERENT = {
    "dapo, KL times the ratio": "TRL's default multiplies the k3 estimate by the token's ratio "
                                "(use_bias_correction_kl); ours is the plain k3 estimate of the GRPO paper",
    "bnpo, 4 micro-batches": "TRL takes the mean of its micro-batches' token means, so that the loss depends on the "
                             "micro-batch; ours is the mean over the global batch whatever it is cut into (TRL: dapo)",
    "grpo, group deviation": "TRL divides by the sample deviation (n - 1) + 1e-4, ours by the population's (n) + 1e-6 "
                             "as the GRPO paper does; with the same advantages the two agree (`same_advantages`)",
    "grpo, truncated answers masked": "TRL still counts a masked answer as a row, ours does not",
    "dr_grpo, truncated answers masked": "TRL still counts a masked answer as a row, ours does not",
}
Gradient = Mapping[str, Tensor]


def answers(vocabulary: int, eos: int) -> tuple[list[list[int]], list[list[int]], list[float]]:
    """Prompts (each repeated for its group), answers of unequal lengths, some cut off, and rewards; a group is flat."""
    rng = np.random.default_rng(7)
    prompts, completions, rewards = [], [], []
    for group in range(4):
        prompt = rng.integers(5, vocabulary, 3 + group).tolist()
        for i in range(GROUP):
            length = int(rng.integers(1, LIMIT))
            cut = (group + i) % 5 == 0
            prompts.append(prompt)
            completions.append(rng.integers(5, vocabulary, LIMIT if cut else length).tolist() + [eos] * (not cut))
            rewards.append(1.0 if group == 3 else float(rng.random() < 0.5))
    return prompts, completions, rewards


class WideHead:
    """In the place of TRL's chunked head: a log-softmax in the model's own dtype."""

    @staticmethod
    def apply(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
              *_: Any) -> tuple[Tensor, ...]:
        logps = torch.log_softmax(torch.nn.functional.linear(hidden, weight, bias) / temperature, -1)
        top = (logps.argmax(-1) == targets).to(logps.dtype)
        return logps.gather(1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1).detach(), top, top, top


def opened(folder: Path) -> Any:
    model = exact_norms(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
    rotary, half = model.model.rotary_emb, model.config.hidden_size // model.config.num_attention_heads // 2
    rates = 1e4 ** (-torch.arange(half, dtype=torch.float64) / half)
    assert torch.allclose(rates, rotary.inv_freq.double(), rtol=1e-6), "another rotary embedding than is written here"

    def angles(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = (position_ids[..., None].double() * rates).repeat(1, 1, 2)
        return angle.cos(), angle.sin()

    rotary.forward = angles
    return model


def trl_grpo(folder: Path, settings: dict[str, Any], both: dict[str, Any], out: Path) -> dict[str, Any]:
    """Loss, gradient, advantages, and the log-probs that both are to use."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    prompts, completions, rewards = answers(len(tokenizer), tokenizer.eos_token_id)
    micro = both.get("micro", 1)
    args = GRPOConfig(output_dir=str(out), use_cpu=True, bf16=False, report_to="none", num_generations=GROUP,
                      per_device_train_batch_size=len(prompts) // micro, gradient_accumulation_steps=micro,
                      max_completion_length=LIMIT, mask_truncated_completions=both.get("mask", False),
                      **{"scale_rewards": "none", "beta": 0.0, "temperature": 1.0, **CLIP, **settings})
    data = datasets.Dataset.from_dict({"prompt": ["sum 1 + 1 ="] * len(prompts)})
    trainer = GRPOTrainer(model=opened(folder), reward_funcs=lambda completions, **_: rewards, args=args,
                          train_dataset=data, processing_class=tokenizer)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = micro
    texts = tokenizer.batch_decode(completions)
    trainer._generate = MethodType(  # the one thing replaced: what would be sampled
        lambda self, given: (prompts, completions, None, texts, None, {}, None, None), trainer)
    batch = trainer._generate_and_score_completions([{"prompt": "sum 1 + 1 ="}] * len(prompts))
    now = batch["completion_ids"].shape[1]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logps, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, now)
    generator = torch.Generator().manual_seed(5)
    nudge = torch.randn(logps.shape, generator=generator, dtype=torch.float64).to(logps.dtype)
    batch["old_per_token_logps"], batch["ref_per_token_logps"] = logps + 0.3 * nudge, logps - 0.2 * nudge.flip(0)
    parts = {key: value.chunk(micro) if value.dim() else [value] * micro for key, value in batch.items()}
    losses = []
    for i in range(micro):
        loss = trainer.compute_loss(trainer.model, {key: part[i] for key, part in parts.items()})
        loss.backward()
        losses.append(float(loss.detach()))
    return {"loss": sum(losses), "gradient": {n: p.grad.clone() for n, p in trainer.model.named_parameters()},
            "advantages": batch["advantages"].double().numpy(), "old": batch["old_per_token_logps"].numpy(),
            "ref": batch["ref_per_token_logps"].numpy(), "prompts": prompts, "completions": completions,
            "rewards": rewards, "eos": tokenizer.eos_token_id,
            "clipped": float(np.mean(trainer._metrics["train"]["clip_ratio/region_mean"]))}


def our_policy(folder: Path, micro_tokens: int) -> Policy:
    return Policy(opened(folder), OptimConfig(), Ledger(1), micro_tokens)


def our_run(folder: Path, method: dict[str, Any], both: dict[str, Any]) -> Any:
    raw = {"name": "parity", "steps": 1, "model": {"name_or_path": str(folder)}, "data": {"train": "none.jsonl"},
           "method": method, "rollout": {"max_new_tokens": LIMIT, "mask_overlong": both.get("mask", False),
                                         "temperature": both.get("temperature", 1.0)}}
    config = make_config(raw)
    return METHODS[config.method.name](config.method, config)


def our_grpo(folder: Path, given: dict[str, Any], rl: dict[str, Any], both: dict[str, Any],
             advantages: np.ndarray | None = None) -> dict[str, Any]:
    """The step of `grpo` on the same rows; with `advantages`, those are put in the place of our own."""
    method = our_run(folder, {"name": "grpo", "rl": {"clip_low": 0.2, "clip_high": 0.28, **rl}}, both)
    rows = []
    for i, (prompt, answer) in enumerate(zip(given["prompts"], given["completions"])):
        ids = np.array([*prompt, *answer])
        zeros = np.zeros(len(prompt))
        old, ref = (np.concatenate([zeros, given[key][i][:len(answer)]]) for key in ("old", "ref"))
        rows.append(Row(ids, np.arange(len(ids)) >= len(prompt), "rollout", Problem("p", ()), i // GROUP,
                        temperature=both.get("temperature", 1.0), old_logps=old, ref_logps=ref,
                        reward=given["rewards"][i], verdict=Verdict.CORRECT, finished=answer[-1] == given["eos"]))
    options = method.options.rl
    rows = credit.with_advantages(rows, options.std, options.aggregate, LIMIT, both.get("mask", False))
    own = np.array([row.streams["pg"].weight[-1] if "pg" in row.streams else np.nan for row in rows])
    if advantages is not None:
        rows = [row.with_stream("pg", advantages[i], options.aggregate, LIMIT) if "pg" in row.streams else row
                for i, row in enumerate(rows)]
    if options.kl_coef:
        rows = [row.with_stream("kl", 1.0, options.aggregate, LIMIT) if "pg" in row.streams else row for row in rows]
    micro_tokens = 10_000 if both.get("micro", 1) == 1 else 40
    found = our_policy(folder, micro_tokens).grad(method.terms, make_batch(rows), rl_coef(options))
    return {"loss": sum(found.losses.values()), "gradient": found.theta, "advantages": own}


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    a, b = theirs["gradient"], ours["gradient"]
    assert a.keys() == b.keys()
    gap = torch.sqrt(sum(((a[n] - b[n]) ** 2).sum() for n in a))  # type: ignore[arg-type]
    size = torch.sqrt(sum((a[n] ** 2).sum() for n in a))  # type: ignore[arg-type]
    return {"loss_trl": theirs["loss"], "loss_ours": ours["loss"], "loss_abs": abs(theirs["loss"] - ours["loss"]),
            "loss_rel": abs(theirs["loss"] - ours["loss"]) / max(abs(theirs["loss"]), 1e-300),
            "gradient_max_abs": max(float((a[n] - b[n]).abs().max()) for n in a),
            "gradient_rel": float(gap / size), "gradient_norm_trl": float(size),
            "gradient_norm_ratio": float(torch.sqrt(sum((b[n] ** 2).sum() for n in b)) / size)}  # type: ignore[arg-type]


def compare_grpo(folder: Path, out: Path) -> dict[str, Any]:
    found = {}
    for name, (settings, rl, both) in CASES.items():
        theirs = trl_grpo(folder, settings, both, out)
        ours = our_grpo(folder, theirs, rl, both)
        gaps = np.abs(theirs["advantages"] - ours["advantages"])
        entry = differences(theirs, ours) | {"advantages_max_abs": float(np.nanmax(gaps)),
                                              "clipped_share": theirs["clipped"]}
        if name in DIFFERENT:
            entry["why"] = DIFFERENT[name]
            entry["same_advantages"] = differences(theirs, our_grpo(folder, theirs, rl, both, theirs["advantages"]))
        found[name] = entry
    return found


def compare_sft(folder: Path, out: Path, loss_type: str, micro: int) -> dict[str, float]:
    """TRL's SFT (`nll`, or `dft`) on demonstrations of unequal lengths; it counts the tokens of all micro-batches."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    prompts, completions, _ = answers(len(tokenizer), tokenizer.eos_token_id)
    args = SFTConfig(output_dir=str(out), use_cpu=True, bf16=False, report_to="none", loss_type=loss_type,
                     per_device_train_batch_size=len(prompts) // micro, gradient_accumulation_steps=micro)
    data = datasets.Dataset.from_dict({"prompt": ["sum 1 ="] * 4, "completion": ["1"] * 4})
    trainer = SFTTrainer(model=opened(folder), args=args, train_dataset=data, processing_class=tokenizer)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = micro
    batches = []
    for some in np.array_split(np.arange(len(prompts)), micro):
        width = max(len(prompts[i]) + len(completions[i]) for i in some)
        ids, labels, mask = (torch.full((len(some), width), fill) for fill in (tokenizer.pad_token_id, -100, 0))
        for b, i in enumerate(some):
            whole = torch.tensor(prompts[i] + completions[i])
            ids[b, :len(whole)], mask[b, :len(whole)] = whole, 1
            labels[b, len(prompts[i]):len(whole)] = whole[len(prompts[i]):]
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    samples, count = trainer.get_batch_samples(iter(batches), micro, torch.device("cpu"))
    total = 0.0
    for inputs in samples:
        loss = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=count)
        loss.backward()
        total += float(loss.detach())
    theirs = {"loss": total, "gradient": {n: p.grad.clone() for n, p in trainer.model.named_parameters()}}
    return differences(theirs, our_sft(folder, "sft" if loss_type == "nll" else loss_type, prompts, completions, micro))


def our_sft(folder: Path, name: str, prompts: Sequence[list[int]], completions: Sequence[list[int]],
            micro: int) -> dict[str, Any]:
    method = our_run(folder, {"name": name}, {})
    rows = [Row(np.array([*p, *c]), np.arange(len(p) + len(c)) >= len(p), "demo", Problem("p", ())) for p, c
            in zip(prompts, completions)]
    rows = [row.with_stream("nll", 1.0) for row in rows]
    policy, batch = our_policy(folder, 10_000 if micro == 1 else 40), make_batch(rows)
    batch = replace(batch, stats=method.probe(batch))
    found = policy.grad(method.terms, batch, {"nll": 1.0})
    return {"loss": found.losses["nll"], "gradient": found.theta}


def everything(folder: Path, out: Path) -> dict[str, Any]:
    found = compare_grpo(folder, out)
    for kind in ["nll", *(["dft"] if "dft" in METHODS else [])]:
        for micro in (1, 4):
            name = f"{'sft' if kind == 'nll' else kind}{f', {micro} micro-batches' * (micro > 1)}"
            found[name] = compare_sft(folder, out, kind, micro)
    return found


def agrees(entry: Mapping[str, Any], head: str) -> bool:
    close = entry["loss_abs"] <= TOLERANCE[head] * max(1.0, abs(entry["loss_trl"]))
    return close and entry["gradient_rel"] < TOLERANCE[head]


def failures(found: Mapping[str, Mapping[str, Any]], head: str) -> list[str]:
    """What should agree and does not, and what is said to differ and does not."""
    wrong = [name for name, entry in found.items() if agrees(entry, head) == (name in DIFFERENT)]
    return wrong + [f"{name} (same advantages)" for name in ("grpo, group deviation",)
                    if not agrees(found[name]["same_advantages"], head)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Losses and gradients beside TRL's own.")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "trl_parity.json")
    path = parser.parse_args().out
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "date": f"{date.today():%Y-%m-%d}", "command": "python benchmarks/trl_parity.py",
        "versions": {name: version(name) for name in ("trl", "torch", "transformers", "accelerate")},
        "model": "random Qwen2, 2 layers, hidden 16, float64", "tolerance": TOLERANCE, "differ": DIFFERENT}
    wrong = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_model(Path(temporary) / "model")
        for head in TOLERANCE:
            if head == "float64 head":
                trl.trainer.utils._ChunkedLogProbFunction = WideHead
            found = everything(folder, Path(temporary) / "out")
            same = {name: entry for name, entry in found.items() if agrees(entry, head)}
            largest = {key: max((entry[key] for entry in same.values()), default=None)
                       for key in ("loss_abs", "gradient_max_abs", "gradient_rel")}
            record[head] = {"agree": [*same], "largest": largest, "cases": found}
            wrong += [f"{name}, {head}" for name in failures(found, head)]
            for name, entry in found.items():
                print(f"{head}  {'agrees ' if name in same else 'differs'} {name:36} loss {entry['loss_abs']:.1e}  "
                      f"gradient {entry['gradient_rel']:.1e} relative")
    path.write_text(json.dumps(record, indent=1) + "\n")
    for name in wrong:
        print(f"NOT AS EXPECTED: {name}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
