"""Bytes a parameter of several methods, measured as tensors that are alive at the same time, beside what
`bridgelm plan` says of the same rows.

    python benchmarks/memory.py [--out results/memory.json] [--only TEXT]

A model of a few million weights takes two real steps on the CPU and answers the validation set; from the second step on
every tensor that an operation makes is followed until it is freed. What is put into host memory is told apart: it is a
copy of its own here, and so is what is brought back. What kernels use within themselves is not seen, nor what an
allocator wastes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pages import fill

from bridgelm.config.run_config import RunConfig, load_config, make_config
from bridgelm.data import toy
from bridgelm.model import batching
from bridgelm.planning import needs
from bridgelm.planning.alive import Alive
from bridgelm.planning.passes import Drawing, Work, largest, row_of
from bridgelm.runs.folder import git_commit, versions

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "toy"
SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 4096, "tie_word_embeddings": True, "max_position_embeddings": 256}
# Two layers of Qwen2.5-1.5B with a small vocabulary: what adapters and w add is as small as it is there.
WIDE = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 2, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 8192, "tie_word_embeddings": True, "max_position_embeddings": 256}
SHAPES = {"small": SHAPE, "wide": WIDE}
METHODS = {"sft": [], "grpo": [], "joint": [], "bridge": [], "barrier": [], "bridge_dial": [], "token_lead": [],
           "grpo, adapters": ["model.lora_rank=16"], "bridge, adapters": ["model.lora_rank=16"],
           "bridge, shadow in bfloat16": ["optim.shadow=bfloat16"],
           "bridge, on the host": ['optim.host=["shadow","gradients"]']}
AT_WIDTH = {"grpo": [], "bridge": [], "bridge, shadow in bfloat16, gradient on the host":
            ["optim.shadow=bfloat16", 'optim.host=["gradients"]'],
            "bridge, on the host": METHODS["bridge, on the host"], "grpo, adapters": METHODS["grpo, adapters"],
            "bridge, adapters": METHODS["bridge, adapters"], "bridge, adapters, moments on the host":
            [*METHODS["bridge, adapters"], 'optim.host=["gradients","moments"]']}
KINDS = {"float32": [], "bfloat16": ["model.dtype=bfloat16"],
         "bfloat16, checkpointing": ["model.dtype=bfloat16", "model.gradient_checkpointing=true"]}
OFFLOADED = {"bfloat16, offload": ["model.dtype=bfloat16", "model.offload_activations=true"],
             "bfloat16, checkpointing, offload": ["model.dtype=bfloat16", "model.gradient_checkpointing=true",
                                                  "model.offload_activations=true"]}
# Whole models, planned with everything else as by default: what BRIDGE takes beyond grpo.
WHOLE = ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-3B", "Qwen/Qwen3-8B-Base")
GOALS: dict[str, dict[str, Any]] = {
    "grpo": {}, "bridge": {},
    "bridge, shadow in bfloat16, gradient on the host": {"shadow": "bfloat16", "host": ["gradients"]},
    "bridge, on the host": {"host": ["shadow", "gradients"]}, "grpo, adapters": {}, "bridge, adapters": {},
    "bridge, adapters, moments on the host": {"host": ["gradients", "moments"]}}
PHASES = ("standing", "train", "generate")


def write_config(folder: Path, shape: dict[str, Any]) -> dict[str, Any]:
    """All of a model folder but its weights."""
    shutil.copytree(toy.model_path("base"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    known = json.loads((folder / "config.json").read_text())
    ids = {name: known[name] for name in ("eos_token_id", "bos_token_id", "pad_token_id") if name in known}
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **shape, **ids}
    (folder / "config.json").write_text(json.dumps(config))
    return config


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = write_config(folder, shape)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen2Config(**config)).save_pretrained(folder)


def points() -> list[tuple[str, str, str]]:
    """Shape, method and kind of weights."""
    return [*itertools.product(["small"], METHODS, KINDS), *itertools.product(["small"], ["grpo"], OFFLOADED),
            *itertools.product(["wide"], AT_WIDTH, ["bfloat16, checkpointing"])]


def config_of(shape: str, label: str, kind: str, folder: Path) -> RunConfig:
    few = ["rollout.prompts=2", "batch.demos=8", "eval.problems=8"]
    own = METHODS[label] if shape == "small" else [*AT_WIDTH[label], *few]
    overrides = [f"model.name_or_path={folder}/{shape}", f"out={folder}/runs", f"name={shape}-{label}-{kind}",
                 "data.max_prompt_tokens=12", "data.max_demo_tokens=20", "rollout.max_new_tokens=20",
                 "rollout.prompts=8", "batch.micro_tokens=768", "steps=4", "eval.problems=48", "eval.max_new_tokens=20",
                 f"reward.functions=['{ROOT}/tests/tiny.py:parity_reward']", *(KINDS | OFFLOADED)[kind], *own]
    return load_config(RECIPES / f"{label.partition(',')[0]}.toml", overrides)


class Watch:
    """What a step trained on and drew: for a plan of the same."""

    def __init__(self, alive: Alive, engine: Any) -> None:
        self.alive, self.engine, self.drawing, self.collate = alive, engine, engine.generate, batching.collate
        self.micros: list[Any] = []
        self.drawings: list[Drawing] = []
        self.peaks = dict.fromkeys(PHASES, 0)

    def __enter__(self) -> Watch:
        self.engine.generate, batching.collate = self.generate, self.collated
        self.alive.peak = self.alive.now
        self.alive.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.alive.__exit__(*error)
        self.mark("train")
        self.engine.generate, batching.collate = self.drawing, self.collate

    def mark(self, phase: str) -> None:
        self.peaks[phase] = max(self.peaks[phase], self.alive.peak)
        self.alive.peak = self.alive.now

    def collated(self, rows: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            self.micros.append(rows)
        return self.collate(rows, *args)

    def generate(self, origin: Any, requests: Any, sampling: Any, *args: Any, **named: Any) -> Any:
        self.mark("train")
        found = self.drawing(origin, requests, sampling, *args, **named)
        self.mark("generate")
        self.drawings.append(Drawing(len({r.prompt.tobytes() for r in requests}), len(requests),
                                     max(len(r.prompt) for r in requests), sampling.max_new_tokens))
        return found

    def work(self) -> dict[str, Any]:
        kinds = {kind: largest([rows for rows in self.micros if rows[0].kind == kind])
                 for kind in sorted({rows[0].kind for rows in self.micros})}
        return {"micros": {kind: [runs(rows) for rows in found] for kind, found in kinds.items()},
                "drawings": [vars(drawing) for drawing in dict.fromkeys(self.drawings)]}


def runs(rows: Any) -> list[list[int]]:
    """Lengths of prompt and answer, the number of the prompt, and how many rows are such."""
    numbers: dict[bytes, int] = {}
    found = []
    for row in rows:
        own = int(row.own.sum())
        prompt = row.ids[:len(row.ids) - own]
        found.append((len(prompt), own, numbers.setdefault(prompt.tobytes(), len(numbers))))
    return [[*key, len(list(same))] for key, same in itertools.groupby(found)]


def work_of(saved: dict[str, Any]) -> Work:
    micros = [[row_of(kind, prompt, own, number) for prompt, own, number, times in rows for _ in range(times)]
              for kind, found in saved["micros"].items() for rows in found]
    return Work(micros, [Drawing(**drawing) for drawing in saved["drawings"]])


def standing_tensors(policy: Any) -> Iterator[torch.Tensor]:
    """One by one: a list would keep those that are replaced."""
    yield from policy.params.values()
    yield from policy.frozen.values()
    for group in policy.groups.values():
        yield from group.flat().values()
    for named in policy.optimisers.values():
        for kept in named.optimiser.state.values():
            yield from (state for state in kept.values() if isinstance(state, torch.Tensor))


def measure(config: RunConfig) -> tuple[dict[str, int], dict[str, Any]]:
    sys.path.insert(0, str(ROOT / "tests"))
    from bridgelm.training import loop
    from tiny import open_session

    alive = Alive()
    with alive.host_apart():
        session = open_session(config, exact=False)
        loop.take_step(session)
        alive.follow(standing_tensors(session.policy))
        standing = alive.now
        with Watch(alive, session.roll.engine) as watch:
            loop.take_step(session)
            loop._evaluate(session, session.data.splits.validation[:config.eval.problems], 0)
    session.folder.close()
    session.roll.grader.close()
    return {**watch.peaks, "standing": standing}, watch.work()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="only write the table of docs/planning.md anew")
    parser.add_argument("--plan", action="store_true", help="plan the points of the result file anew, measure nothing")
    parser.add_argument("--only", help="measure the points whose shape/method/kind has this in it; others stay")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "memory.json")
    args = parser.parse_args()
    if args.page:
        write_page(json.loads(args.out.read_text(encoding="utf-8"))["rows"])
        return
    if args.plan:
        known = json.loads(args.out.read_text(encoding="utf-8"))
        rows = planned_anew(known.pop("rows"))
        write(known, rows, args.out)
        write_page(rows)
        return
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in SHAPES.items():
            write_model(Path(folder) / name, shape)
        for point in points():
            if args.only and args.only not in "/".join(point):
                continue
            config = config_of(*point, Path(folder))
            found, work = measure(config)
            need = needs.memory(config, work=work_of(work))
            row = {**dict(zip(("shape", "method", "kind"), point, strict=True)), "parameters": need.parameters,
                   **{f"measured {phase}": round(found[phase] / need.parameters, 2) for phase in PHASES},
                   **planned(need)}
            rows.append(row | {"work": work})
            print(json.dumps(rows[-1]), flush=True)
    if args.only:
        kept = json.loads(args.out.read_text(encoding="utf-8"))["rows"]
        rows = [*rows, *(row for row in kept if point_of(row) not in {point_of(own) for own in rows})]
    rows.sort(key=lambda row: points().index(point_of(row)))
    write({"shapes": SHAPES, "commit": git_commit(), "versions": versions()}, rows, args.out)
    write_page(rows)


def planned(need: needs.Need) -> dict[str, float]:
    return {f"planned {phase}": round(getattr(need, phase) / need.parameters, 2) for phase in PHASES}


def planned_anew(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in SHAPES.items():
            write_config(Path(folder) / name, shape)
        return [row | planned(needs.memory(config_of(*point_of(row), Path(folder)), work=work_of(row["work"])))
                for row in rows]


def goals() -> list[str]:
    lines = [f"| method | {' | '.join(WHOLE)} |", "|---|" + "---:|" * len(WHOLE)]
    base: dict[tuple[bool, str], float] = {}
    for label, optim in GOALS.items():
        adapters, cells = "adapters" in label, []
        for name in WHOLE:
            config = make_config({
                "name": "goal", "steps": 1, "method": {"name": label.partition(",")[0]}, "optim": optim,
                "model": {"name_or_path": name, "dtype": "bfloat16", "gradient_checkpointing": True,
                          "lora_rank": 16 * adapters},
                "data": {"train": "none.jsonl", "demos": "none.jsonl"}, "reward": {"verifier": "exact"}})
            need = needs.memory(config)
            found = need.train / need.parameters
            start = base.setdefault((adapters, name), found)
            cells.append(f"{found:.1f}, {found / start - 1:+.1%}")
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return lines


def point_of(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["shape"], row["method"], row["kind"]


def write(about: dict[str, Any], rows: list[dict[str, Any]], out: Path) -> None:
    """A row a line."""
    head = json.dumps(about, indent=1).removesuffix("\n}")
    out.write_text(head + ',\n "rows": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n ]\n}\n",
                   encoding="utf-8")


def write_page(rows: list[dict[str, Any]]) -> None:
    columns = " | ".join(f"{phase}: measured / planned" for phase in PHASES)
    small = [f"| method | weights | {columns} |", "|---|---|" + "---:|" * 3]
    wide = [f"| method | {columns} | train: more than `grpo` |", "|---|" + "---:|" * 4]
    base: dict[bool, float] = {}
    for row in rows:
        cells = [f"{row[f'measured {phase}']:.1f} / {row[f'planned {phase}']:.1f}" for phase in PHASES]
        if row["shape"] == "small":
            small.append("| " + " | ".join([row["method"], row["kind"], *cells]) + " |")
            continue
        start = base.setdefault("adapters" in row["method"], row["measured train"])
        more = f"{row['measured train'] / start - 1:.1%}"
        wide.append("| " + " | ".join([row["method"], *cells, more]) + " |")
    said = []
    for phase in PHASES:
        ratios = [row[f"planned {phase}"] / row[f"measured {phase}"] for row in rows]
        said += ["", f"{phase}: the plan is {min(ratios):.2f} to {max(ratios):.2f} times what was measured."]
    for name, lines in (("memory", [*small, *said]), ("width", wide), ("goals", goals())):
        fill(ROOT / "docs" / "planning.md", name, "\n".join(lines))


if __name__ == "__main__":
    main()
