"""Peak memory of one forward and backward pass with and without what saves it: logits in chunks, gradient
checkpointing, activations on the host, rows without padding.

    python benchmarks/memory_long.py [--out results/memory_long.json]

Each point is in bfloat16 and a process of its own on the CPU. `device` is the sum of tensors that are alive at the same
time, beyond the weights; what is on the host is told apart. `process` is what the process grew by (its largest resident
size), host memory and what kernels use within themselves included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pages import fill

from bridgelm.config.run_config import ModelConfig
from bridgelm.model import forward
from bridgelm.model.batching import collate
from bridgelm.model.loading import prepared
from bridgelm.planning.alive import Alive
from bridgelm.planning.passes import row_of
from bridgelm.runs.folder import git_commit, versions

ROOT = Path(__file__).parents[1]
WHOLE = 2**62
KEPT = {"whole": (WHOLE, WHOLE), "1 GiB kept, then chunks": (forward.CHUNK, forward.KEPT), "chunks": (forward.CHUNK, 0)}
HEAD = {"tokens": 4096, "hidden_size": 512, "vocab_size": 151_936}
LONG = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 32_768, "tie_word_embeddings": True, "max_position_embeddings": 16_384}
ROW = (64, 16_320)  # prompt and demonstration
ROWS = [(64, 4032), *[(64, 448)] * 7]


def points() -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for logits in KEPT:
        out[f"head/{logits}"] = {"logits": logits}
    for logits, options in (("whole", []), ("1 GiB kept, then chunks", []), ("chunks", []),
                            ("chunks", ["offload_activations"]), ("chunks", ["gradient_checkpointing"]),
                            ("chunks", ["gradient_checkpointing", "offload_activations"])):
        out[f"row/{logits}/{', '.join(options) or 'nothing'}"] = {"rows": [ROW], "logits": logits, "options": options}
    for packed in (False, True):
        out[f"rows/{'packed' if packed else 'padded'}"] = {"rows": ROWS, "logits": "chunks", "options": [],
                                                           "packed": packed}
    return out


def head() -> Any:
    """A model that is nothing but its output head."""
    tokens, size = HEAD["tokens"], HEAD["hidden_size"]
    hidden = torch.randn(1, 1 + tokens, size, dtype=torch.bfloat16, requires_grad=True)
    layer = torch.nn.Linear(size, HEAD["vocab_size"], bias=False, dtype=torch.bfloat16)
    model = SimpleNamespace(config=SimpleNamespace(model_type="qwen2", _attn_implementation="eager"),
                            base_model=lambda **_: SimpleNamespace(last_hidden_state=hidden),
                            get_output_embeddings=lambda: layer)
    micro = collate([row_of("demo", 1, tokens, 7)], torch.float32, torch.device("cpu"), {})

    return [hidden, layer.weight], lambda: forward.forward(model, micro).logp_BT.sum()


def passes(rows: list[tuple[int, int]], options: list[str], packed: bool = True) -> Any:
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = ModelConfig.model_validate({"name_or_path": "", "dtype": "bfloat16", **dict.fromkeys(options, True)})
    model = prepared(AutoModelForCausalLM.from_config(Qwen2Config(**LONG), dtype=torch.bfloat16), config)
    micro = collate([row_of("demo", prompt, own, i) for i, (prompt, own) in enumerate(rows)], torch.float32,
                    torch.device("cpu"), {})
    if not packed:
        setattr(forward, "packs", lambda model: False)  # noqa: B010
    return [*model.parameters()], lambda: forward.forward(model, micro).logp_BT.sum()


def measure(what: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    forward.CHUNK, forward.KEPT = KEPT[what.pop("logits")]
    standing, loss = passes(**what) if "rows" in what else head(**what)
    alive = Alive(standing)
    start, before = alive.now, resident()
    with alive.host_apart(), alive:
        loss().backward()
    return {"device": alive.peak - start, "host": alive.host_peak, "process": resident() - before}


def resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", metavar="POINT", help="measure one point in this process")
    parser.add_argument("--page", action="store_true", help="only write the tables of docs/planning.md anew")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "memory_long.json")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(points()[args.one])))
        return
    if not args.page:
        rows = []
        for name in points():
            said = subprocess.run([sys.executable, __file__, "--one", name], check=True, stdout=subprocess.PIPE,
                                  text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            rows.append({"point": name, **json.loads(said.stdout.splitlines()[-1])})
            print(json.dumps(rows[-1]), flush=True)
        about = {"head": HEAD, "long": LONG, "row": ROW, "rows": ROWS, "commit": git_commit(), "versions": versions()}
        args.out.write_text(json.dumps(about | {"points": rows}, indent=1) + "\n", encoding="utf-8")
    write_page(json.loads(args.out.read_text(encoding="utf-8"))["points"])


def write_page(rows: list[dict[str, Any]]) -> None:
    for part, title in (("head", "| logits |"), ("row", "| logits | what else saves memory |"),
                        ("rows", "| rows |")):
        names, sizes = title.count("|") - 1, ["device, GB", "host, GB", "process, GB"]
        lines = [f"{title} {' | '.join(sizes)} |", "|" + "---|" * names + "---:|" * len(sizes)]
        for row in rows:
            first, *labels = row["point"].split("/")
            if first == part:
                values = [f"{row[key] / 1e9:.2f}" for key in ("device", "host", "process")]
                lines.append("| " + " | ".join([*(f"`{n}`" if "_" in n else n for n in labels), *values]) + " |")
        fill(ROOT / "docs" / "planning.md", part, "\n".join(lines))


if __name__ == "__main__":
    main()
