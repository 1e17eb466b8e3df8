"""What one CUDA machine without a network does: steps of five methods at three sizes, decoding against the memory
bandwidth, the training pass against the arithmetic, and what CUDA graphs and torch.compile would gain in decoding.

    python benchmarks/gpu.py                         writes results/gpu.json, in at most ten minutes
    python benchmarks/gpu.py --tiny --out gpu.json   the same on a CPU with a tiny model: that it runs, no figures

It needs torch and transformers. What else BridgeLM needs is taken from --wheels (default .wheels) where it is missing:

    pip download -d .wheels --only-binary=:all: --python-version 3.12 --platform manylinux_2_17_x86_64 \\
        --platform manylinux2014_x86_64 pydantic rich

Weights are random, of the real shapes of Qwen2.5, and made on the device. No figure of accuracy comes from here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIZES = ("0.5B", "1.5B", "3B")
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo"}, "sft": {"name": "sft"}, "bridge": {"name": "bridge"}, "barrier": {"name": "barrier"},
    "grpo, adapters": {"name": "grpo"}, "bridge, adapters": {"name": "bridge"}}
REAL = {"prompts": 16, "group": 8, "answer": 512, "prompt": 256, "demos": 16, "micro": 16384, "matrix": 8192}
TINY = {"prompts": 2, "group": 2, "answer": 8, "prompt": 16, "demos": 2, "micro": 256, "matrix": 64}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.5, help="what does not fit in is skipped (default 9.5)")
    parser.add_argument("--sizes", default=",".join(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--wheels", type=Path, default=ROOT / ".wheels")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu.json")
    args = parser.parse_args()
    deadline = time.perf_counter() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        bring(args.wheels, Path(folder) / "site")
        for path in (ROOT / "src", ROOT / "tests"):
            sys.path.insert(0, str(path))
        measure(args, Path(folder), deadline)


def bring(wheels: Path, site: Path) -> None:
    missing = [name for name in ("pydantic", "rich") if importlib.util.find_spec(name) is None]
    if not missing:
        return
    if not wheels.is_dir():
        raise SystemExit(f"{' and '.join(missing)} missing and {wheels} is not there: fetch the wheels where there is "
                         "a network, with the command that --help prints")
    for wheel in wheels.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(site)
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()


def measure(args: argparse.Namespace, folder: Path, deadline: float) -> None:
    import torch

    from bridgelm.runs.folder import git_commit, versions

    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --tiny tries the command on a CPU")
    device = torch.device("cpu" if args.tiny else "cuda")
    load = TINY if args.tiny else REAL
    name = "CPU, tiny" if args.tiny else torch.cuda.get_device_name(device)
    found: dict[str, Any] = {"device": name, "versions": versions(), "commit": git_commit(), "load": load,
                             "limits": limits(device, load["matrix"]), "steps": [], "decode": [], "skipped": []}
    last: dict[str, float] = {}  # seconds a parameter of each case, at the size before
    for size in ["tiny"] if args.tiny else args.sizes.split(","):
        cases = [("decode", None), *METHODS.items()]
        for label, method in cases:
            guess = last.get(label, 0.0) * parameters(size) * 1.2 or 20.0
            if time.perf_counter() + guess > deadline:
                found["skipped"].append({"size": size, "what": label, "why": f"about {guess:.0f} s were not left"})
                continue
            start = time.perf_counter()
            if method is None:
                found["decode"].append(decode(size, load, device, found["limits"]))
            else:
                try:
                    take(found, size, label, method, load, device, folder)
                except torch.OutOfMemoryError:
                    found["skipped"].append({"size": size, "what": label, "why": "the memory did not do"})
                drop(device)
            last[label] = (time.perf_counter() - start) / parameters(size)
            write(found, args.out)  # whatever comes next
    write(found, args.out)
    for row in [*found["decode"], *found["steps"], *found["skipped"]]:
        print(json.dumps(row))


def write(found: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def shape(size: str) -> dict[str, Any]:
    from bridgelm.data.model_shapes import shapes

    return SMALL if size == "tiny" else shapes()[f"Qwen/Qwen2.5-{size}"][1]


def parameters(size: str) -> float:
    s = shape(size)
    kv = s["hidden_size"] // s["num_attention_heads"] * s["num_key_value_heads"]
    layer = s["hidden_size"] * (2 * s["hidden_size"] + 2 * kv + 3 * s["intermediate_size"])
    return s["num_hidden_layers"] * layer + s["vocab_size"] * s["hidden_size"]


def model_of(size: str, device: Any, checkpointing: bool = False) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

    from bridgelm.model.loading import checkpoint_layers

    torch.manual_seed(0)
    ids = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    config = Qwen2Config(**shape(size), **ids, max_position_embeddings=32768)
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if checkpointing:
        checkpoint_layers(model)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return model.eval()


def limits(device: Any, size: int) -> dict[str, float]:
    """What the device reaches: bytes a second of a copy, FLOPs a second of a bfloat16 product."""
    import torch

    one = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    two = torch.empty_like(one)
    flat = torch.empty(4 * size * size, device=device)
    copy = timed(lambda: flat.copy_(flat.flip(0)) if device.type == "cpu" else flat[:flat.numel() // 2].copy_(
        flat[flat.numel() // 2:]), device)
    product = timed(lambda: torch.matmul(one, one, out=two), device)
    return {"bandwidth": 4 * flat.numel() / copy, "flops": 2 * size**3 / product}


def timed(act: Any, device: Any, times: int = 10) -> float:
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        act()
    wait()
    start = time.perf_counter()
    for _ in range(times):
        act()
    wait()
    return (time.perf_counter() - start) / times


def decode(size: str, load: dict[str, int], device: Any, limit: dict[str, float]) -> dict[str, Any]:
    """A step of the native decoder half way through an answer, for as many rows as a rollout batch has. What it has to
    read is the weights and the cache: `share` is how near it comes to the bandwidth."""
    import torch

    from bridgelm.engine.decoders import make_decoder

    model, rows = model_of(size, device), load["prompts"] * load["group"]
    with torch.inference_mode():
        ids = torch.randint(2, model.config.vocab_size, (rows, load["prompt"]), device=device)
        decoder: Any = make_decoder(model, load["answer"])
        token = decoder.prefill(ids, torch.ones_like(ids, dtype=torch.bool)).argmax(-1)
        decoder.width += load["answer"] // 2

        def step() -> Any:
            decoder.width -= 1  # the same step again
            return decoder.step(token)

        seconds = timed(step, device)
        graph = replayed(step, device)
        compiled: float | str | None = None
        if device.type == "cuda":
            decoder._run = torch.compile(decoder._run)
            try:
                compiled = timed(step, device)
            except Exception as error:  # of a compiler, which raises what it likes; the figures beside it are sound
                compiled = f"failed: {type(error).__name__}"
    read = sum(p.numel() * p.element_size() for p in model.parameters())
    read += sum(t.numel() * t.element_size() * decoder.width // t.shape[2] for t in (*decoder.keys, *decoder.values))
    drop(device)
    return {"size": size, "rows": rows, "width": decoder.width, "seconds": seconds, "tokens a second": rows / seconds,
            "bytes": read, "share": read / seconds / limit["bandwidth"], "CUDA graph": graph, "torch.compile": compiled}


def replayed(step: Any, device: Any) -> float | str | None:
    """Seconds of the same step without the cost of launching its kernels: what CUDA graphs could gain at most."""
    import torch

    if device.type != "cuda":
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        return f"failed: {str(error).splitlines()[0]}"
    return timed(graph.replay, device)


def take(found: dict[str, Any], size: str, label: str, method: dict[str, Any], load: dict[str, int], device: Any,
         folder: Path) -> None:
    """Two steps of a method as a run takes them; the second is timed."""
    import torch

    from bridgelm.config.run_config import make_config
    from bridgelm.planning import needs
    from bridgelm.training import loop
    from tiny import open_session

    config = make_config(raw(label, method, load, device, folder))
    if device.type == "cuda":
        real = config.model_copy(update={"model": config.model.model_copy(
            update={"name_or_path": f"Qwen/Qwen2.5-{size}"})})
        need, there = needs.memory(real).peak, torch.cuda.get_device_properties(device).total_memory
        if need > 0.95 * there:
            found["skipped"].append({"size": size, "what": label, "why": f"{need / 1e9:.0f} GB of {there / 1e9:.0f}"})
            return
        torch.cuda.reset_peak_memory_stats()
    kept = loop.load_model
    loop.load_model = lambda model: model_of(size, device, model.gradient_checkpointing)
    try:
        session = open_session(config, exact=False)
        loop.take_step(session)
        before = session.policy.ledger.state()
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        metrics = loop.take_step(session)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        worked = {key: value - before[key] for key, value in session.policy.ledger.state().items()
                  if key in {"generate", "score", "train"}}
        session.folder.close()
        session.roll.grader.close()
    finally:
        loop.load_model = kept
    update = seconds - metrics["time/rollout"]
    flops = 6 * session.policy.ledger.parameters * worked["train"]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    found["steps"].append({"size": size, "method": label, "seconds": seconds, "rollout": metrics["time/rollout"],
                           "update": update, "peak bytes": peak, "tokens": worked,
                           "share of the arithmetic in updates": flops / update / found["limits"]["flops"]})


def raw(label: str, method: dict[str, Any], load: dict[str, int], device: Any, folder: Path) -> dict[str, Any]:
    from tiny import save_tokenizer

    if not (folder / "train.jsonl").exists():
        save_tokenizer(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "eos_token_id": 1, **SMALL}))
        rng = random.Random(0)
        rows = [{"prompt": " ".join(str(rng.randrange(20)) for _ in range(load["prompt"] - 3)), "answer": str(i),
                 "demos": [" ".join(str(rng.randrange(20)) for _ in range(load["answer"] - 1))]} for i in range(200)]
        for name, part in (("train", rows[:160]), ("validation", rows[160:180]), ("test", rows[180:])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    shutil.rmtree(folder / "runs", ignore_errors=True)
    return {"name": "run", "out": str(folder / "runs"), "steps": 2, "method": method,
            "model": {"name_or_path": str(folder), "dtype": "bfloat16", "device": device.type,
                      "gradient_checkpointing": True, "lora_rank": 16 if label.endswith("adapters") else 0},
            "data": {**{key: str(folder / f"{key}.jsonl") for key in ("train", "validation", "test")},
                     "max_prompt_tokens": load["prompt"] + 8, "max_demo_tokens": load["answer"] + 8},
            "reward": {"verifier": "none", "functions": [f"{ROOT / 'tests' / 'tiny.py'}:parity_reward"]},
            "rollout": {"prompts": load["prompts"], "group": load["group"], "max_new_tokens": load["answer"]},
            "batch": {"demos": load["demos"], "micro_tokens": load["micro"]}, "log": {"samples": 0}}


def drop(device: Any) -> None:
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
