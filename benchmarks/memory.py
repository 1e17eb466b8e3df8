"""Bytes a parameter of several methods, measured as tensors that are alive at the same time, beside what
`bridgelm plan` says of the same run.

    python benchmarks/memory.py [--out results/memory.json]

A model of a few million weights takes two real steps on the CPU; during the second every tensor that an operation makes
is followed until it is freed. What kernels use within themselves is not seen, nor what an allocator wastes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bridgelm import planning, toy
from bridgelm.config import RunConfig, load_config
from bridgelm.metrics import git_commit, versions

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "toy"
SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 4096, "tie_word_embeddings": True, "max_position_embeddings": 256}
METHODS = {"sft": [], "grpo": [], "joint": [], "bridge": [], "barrier": [], "bridge_dial": [], "token_lead": [],
           "grpo, adapters": ["model.lora_rank=16"], "bridge, adapters": ["model.lora_rank=16"],
           "bridge, shadow in bfloat16": ["optim.shadow=bfloat16"],
           "bridge, on the host": ['optim.host=["shadow","gradients"]']}
KINDS = {"float32": [], "bfloat16": ["model.dtype=bfloat16"],
         "bfloat16, checkpointing": ["model.dtype=bfloat16", "model.gradient_checkpointing=true"]}


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations have made and nobody has freed, and their highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def know(self, tensors: Any) -> int:
        """Bytes of what is there already, which is then not followed."""
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                total += storage.nbytes()
        return total


def write_model(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen2Config

    shutil.copytree(toy.model_path("base"), folder)
    config = json.loads((folder / "config.json").read_text())
    for file in folder.glob("*.safetensors"):
        file.unlink()
    ids = {name: config[name] for name in ("eos_token_id", "bos_token_id", "pad_token_id") if name in config}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE, **ids)).save_pretrained(folder)


def measure(config: RunConfig) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "tests"))
    from bridgelm import training
    from tiny import open_session

    session = open_session(config, exact=False)
    training.take_step(session)
    policy, alive = session.policy, Alive()
    states = [state for named in policy.optimisers.values() for kept in named.optimiser.state.values()
              for state in kept.values() if isinstance(state, torch.Tensor)]
    groups = [t for group in policy.groups.values() for t in group.flat().values()]
    standing = alive.know([*policy.params.values(), *policy.frozen.values(), *groups, *states])
    standing -= sum(size for name, size in planning.memory(config).parts.items() if name.startswith("host/"))
    peaks: dict[str, int] = {"generate": 0, "train": 0}
    generate = session.roll.engine.generate

    def between(*args: Any, **named: Any) -> Any:
        peaks["train"] = max(peaks["train"], alive.peak)
        alive.peak = alive.now
        found = generate(*args, **named)
        peaks["generate"] = max(peaks["generate"], alive.peak)
        alive.peak = alive.now
        return found

    session.roll.engine.generate = between
    with alive:
        training.take_step(session)
    peaks["train"] = max(peaks["train"], alive.peak)
    session.folder.close()
    session.roll.grader.close()
    return {"standing": standing, "train": standing + peaks["train"], "generate": standing + peaks["generate"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="only write the table of docs/planning.md anew")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "memory.json")
    args = parser.parse_args()
    if args.page:
        write_page(json.loads(args.out.read_text(encoding="utf-8"))["rows"])
        return
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model")
        for label, own in METHODS.items():
            for kind, of_kind in KINDS.items():
                overrides = [f"model.name_or_path={folder}/model", f"out={folder}/runs", f"name={label}-{kind}",
                             "data.max_prompt_tokens=12", "data.max_demo_tokens=20", "rollout.max_new_tokens=20",
                             "rollout.prompts=8", "batch.micro_tokens=768", "steps=4",
                             f"reward.functions=['{ROOT}/tests/tiny.py:parity_reward']", *own,
                             *of_kind]
                config = load_config(RECIPES / f"{label.partition(',')[0]}.toml", overrides)
                need, found = planning.memory(config), measure(config)
                row = {"method": label, "kind": kind, "parameters": need.parameters,
                       **{f"measured {phase}": round(found[phase] / need.parameters, 2) for phase in found},
                       **{f"planned {phase}": round(getattr(need, phase) / need.parameters, 2) for phase in found}}
                rows.append(row)
                print(json.dumps(row), flush=True)
    result = {"shape": SHAPE, "commit": git_commit(), "versions": versions(), "rows": rows}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_page(rows)


def write_page(rows: list[dict[str, Any]]) -> None:
    phases = ("standing", "train", "generate")
    lines = ["| method | weights | " + " | ".join(f"{phase}: measured / planned" for phase in phases) + " |",
             "|---|---|" + "---:|" * len(phases)]
    for row in rows:
        cells = [f"{row[f'measured {phase}']:.1f} / {row[f'planned {phase}']:.1f}" for phase in phases]
        lines.append("| " + " | ".join([row["method"], row["kind"], *cells]) + " |")
    for phase in phases:
        ratios = [row[f"planned {phase}"] / row[f"measured {phase}"] for row in rows]
        lines += ["", f"{phase}: the plan is {min(ratios):.2f} to {max(ratios):.2f} times what was measured."]
    page, begin, end = ROOT / "docs" / "planning.md", "<!-- memory:begin -->", "<!-- memory:end -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{rest.split(end)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
