"""The six methods on the embedded task: both families, both layouts of demonstrations, paired seeds.

    python benchmarks/study.py run      trains what is missing (goes on where it stopped) and writes results/study/
    python benchmarks/study.py readme   writes the table of results/study/ into README.md

Every cell is one `bridgelm compare`; what it wrote is kept beside the table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from datetime import date
from pathlib import Path
from typing import Any

from pages import fill

from bridgelm.comparisons.compare import compare
from bridgelm.runs.folder import git_commit, versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "study"
METHODS = ["bridge", "sft", "grpo", "cold_start", "alternate", "joint"]
# jugs has few different problems: more of them would all be the easiest ones.
SIZES = {"hops": [], "jugs": ["data.toy.train_size=1000", "data.toy.demo_size=400"]}
CELLS = [(family, layout) for family in ("hops", "jugs") for layout in ("separate", "paired")]


def run(seeds: int, jobs: int, runs: Path, cells: list[tuple[str, str]]) -> None:
    for family, layout in cells:
        folder = runs / f"{family}-{layout}"
        compare(ROOT / "recipes" / "toy" / "bridge.toml", METHODS, seeds, jobs, folder, quiet=True,
                overrides=[f"data.train=toy:{family}", f"data.toy.layout={layout}", *SIZES[family]])
        keep(folder, RESULTS / f"{family}-{layout}")
        print(f"{family}-{layout}: done", flush=True)


def keep(folder: Path, target: Path) -> None:
    """The compact part of a comparison: numbers, Markdown and figures, without the runs themselves."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    found = json.loads((folder / "comparison.json").read_text())
    found["runs"] = {label: {seed: Path(path).name for seed, path in paths.items()}
                     for label, paths in found["runs"].items()}
    found |= {"date": f"{date.today():%Y-%m-%d}", "commit": git_commit(), "versions": versions(),
              "per_seed": {label: {seed: per_seed(folder / name) for seed, name in names.items()}
                           for label, names in found["runs"].items()}}
    (target / "comparison.json").write_text(json.dumps(found, indent=1) + "\n")
    shutil.copy(folder / "comparison.md", target)
    (target / "figures").mkdir()
    for name in ("accuracy.svg", "bridge.svg"):
        if (folder / "figures" / name).exists():
            shutil.copy(folder / "figures" / name, target / "figures")


def per_seed(run_path: Path) -> dict[str, Any]:
    result = json.loads((run_path / "result.json").read_text())
    info = json.loads((run_path / "run.json").read_text())
    return {"final": result["final"]["accuracy"], "best": result.get("best", result["final"])["accuracy"],
            "hard": result["final"].get("hard", {}).get("accuracy"), "cpu_seconds": info.get("cpu_seconds")}


def table() -> str:
    """Mean final test accuracy with its 95 % interval over seeds, and the price in FLOPs."""
    cells = {path.parent.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*/comparison.json"))}
    if not cells:
        sys.exit("results/study is empty; run `python benchmarks/study.py run` first")
    seeds = {len(names) for found in cells.values() for names in found["runs"].values()}
    lines = ["| method | " + " | ".join(cells) + " | FLOPs |", "|---|" + "---:|" * (len(cells) + 1)]
    base = next(iter(cells.values()))["table"]["grpo"]["flops"]["value"]
    order = [m for m in METHODS if all(m in found["table"] for found in cells.values())]
    for label in order:
        figures = [figure(found["table"][label]["final"]) for found in cells.values()]
        flops = next(iter(cells.values()))["table"][label]["flops"]["value"] / base
        lines.append(f"| {label} | {' | '.join(figures)} | {flops:.2f}x |")
    dates = ", ".join(sorted({found["date"] for found in cells.values()}))
    return (f"Final greedy test accuracy in percent, mean over {', '.join(map(str, sorted(seeds)))} seeds with 95 % "
            f"intervals, equal rollouts; FLOPs of the first column against grpo ({dates}; `make study`).\n\n"
            + "\n".join(lines))


def figure(found: dict[str, Any]) -> str:
    half = "" if found["low"] is None else f" ± {100 * (found['high'] - found['value']):.1f}"
    return f"{100 * found['value']:.1f}{half}"


def readme() -> None:
    fill(ROOT / "README.md", "results", table())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "readme"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--cells", nargs="*", help="FAMILY-LAYOUT; default all")
    args = parser.parse_args()
    if args.what == "readme":
        readme()
    else:
        wanted = [tuple(cell.split("-")) for cell in args.cells or []] or CELLS
        run(args.seeds, args.jobs, args.runs, wanted)


if __name__ == "__main__":
    main()
