"""The grader beside math-verify on labelled cases, and how long a call takes.

    python benchmarks/grader.py --data FOLDER [--out results/grader.json]

FOLDER holds grader/*.jsonl (`source, prediction, gold, expected`) and eval/*.jsonl (`answer`). Nothing of it is copied:
the result has counts, and the disagreements that are not in grader_exceptions.jsonl, cut short.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from pages import fill

from bridgelm.types import Verdict
from bridgelm.verify.decision import Decision
from bridgelm.verify.math.grader import MathJudge
from bridgelm.verify.pool import Pool

HERE = Path(__file__).parent
EXCEPTIONS = HERE / "grader_exceptions.jsonl"
PEER_SECONDS = 8.0  # CPU time; its own limit is 5 s a call


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def exceptions() -> dict[tuple[str, str, str], dict[str, Any]]:
    return {key(row): row for row in read(EXCEPTIONS)}


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    """A disputed case is known by its source and texts; long texts by their ends."""
    return row["source"], row["gold"][-120:], row["prediction"][-120:]


def times(ms: list[float]) -> dict[str, float]:
    ordered = sorted(ms)
    return {"median": round(statistics.median(ordered), 2), "p99": round(ordered[int(0.99 * (len(ordered) - 1))], 1),
            "worst": round(ordered[-1], 1)}


def tally(rows: list[dict[str, Any]], verdicts: list[str], ms: list[float]) -> dict[str, Any]:
    count = Counter((row["expected"], verdict) for row, verdict in zip(rows, verdicts, strict=True))
    return {"false_accepts": count[False, "correct"], "false_rejects": count[True, "wrong"],
            "errors": count[True, "error"] + count[False, "error"], "ms": times(ms)}


def ours(rows: list[dict[str, Any]], judge: MathJudge) -> list[Decision]:
    return judge.decide([row["gold"] for row in rows], [row["prediction"] for row in rows])


def peer(rows: list[dict[str, Any]], pool: Pool) -> tuple[list[str], list[float]]:
    found = pool.run([{"gold": row["gold"], "prediction": row["prediction"]} for row in rows])
    verdicts = ["error" if out.error or out.exhausted else "correct" if out.result else "wrong" for out in found]
    return verdicts, [out.ms for out in found]


def measure(data: Path) -> dict[str, Any]:
    known = exceptions()
    result: dict[str, Any] = {"sources": {}, "disagreements": []}
    peers = {name: Pool(f"grader_peer:{name}", PEER_SECONDS, 4096, 1, [str(HERE)]) for name in ("plain", "boxed")}
    judge = MathJudge(1.0, workers=1)
    for path in sorted((data / "grader").glob("*.jsonl")):
        rows = [row for row in read(path) if row["expected"] is not None]
        decisions = ours(rows, judge)
        open_rows = [(row, found) for row, found in zip(rows, decisions, strict=True) if key(row) not in known]
        entry = {"n": len(rows), "disputed": len(rows) - len(open_rows),
                 "ours": tally(rows, [found.verdict.value for found in decisions], [found.ms for found in decisions]),
                 "ours_undisputed": tally([row for row, _ in open_rows], [d.verdict.value for _, d in open_rows],
                                          [d.ms for _, d in open_rows])}
        for name, pool in peers.items():
            entry[f"math_verify_{name}"] = tally(rows, *peer(rows, pool))
        result["sources"][path.stem] = entry
        for row, found in open_rows:
            if found.verdict is not (Verdict.CORRECT if row["expected"] else Verdict.WRONG):
                result["disagreements"].append({
                    "source": row["source"], "gold": row["gold"][-80:], "prediction": row["prediction"][-80:],
                    "expected": row["expected"], "verdict": found.verdict.value, "rule": found.rule})
        print(path.stem, json.dumps(entry), flush=True)
    result["golds"] = golds(data, judge)
    judge.close()
    for pool in peers.values():
        pool.close()
    result["step_of_512"] = step(data)
    return result


def golds(data: Path, judge: MathJudge) -> dict[str, dict[str, int]]:
    """Every benchmark's golds against themselves, within a sentence and a box."""
    found = {}
    for path in sorted((data / "eval").glob("*.jsonl")):
        answers = [row["answer"] for row in read(path)]
        decisions = judge.decide(answers, [rf"So it is $\boxed{{{answer}}}$." for answer in answers])
        verdicts = Counter(decision.verdict.value for decision in decisions)
        found[path.stem] = {"n": len(answers), **verdicts}
    return found


def step(data: Path) -> dict[str, Any]:
    """64 problems of MATH with 8 answers each: the right one in other spellings and wrong ones, as a step has them."""
    answers = [row["answer"] for row in read(data / "eval" / "math500.jsonl")][:64 * 5:5]
    spelled = [answer.replace("\\frac", "\\dfrac") for answer in answers]
    pairs = [(answer, rf"Thus it is $\boxed{{{spelled[(i + k // 2 * k) % len(answers)]}}}$.")
             for i, answer in enumerate(answers) for k in range(8)]
    seconds = []
    with_pool = MathJudge(1.0, workers=2)
    with_pool.decide(["1+x"] * 8, [f"x+{i}" for i in range(8)])  # workers are there
    for repeat in range(3):
        start = time.perf_counter()
        decisions = with_pool.decide([gold for gold, _ in pairs], [text + " " * repeat for _, text in pairs])
        workers = sum({(d.extracted, d.ms): d.ms for d in decisions}.values()) / 1000 if not repeat else 0.0
        seconds.append({"wall": round(time.perf_counter() - start, 3), "cpu_of_workers": round(workers, 3)})
    with_pool.close()
    return {"answers": len(pairs), "workers": 2, "seconds_with_empty_cache_then_full": seconds}


def table(result: dict[str, Any]) -> str:
    """The measured part of docs/grader.md."""
    lines = ["| source | n | disputed | ours FA / FR / errors | undisputed FA / FR | math-verify FA / FR "
             "| ours median / p99 / worst | math-verify median / p99 / worst |", "|---" * 8 + "|"]
    total = Counter()
    for name, entry in result["sources"].items():
        own, bare, other = entry["ours"], entry["ours_undisputed"], entry["math_verify_boxed"]
        counts = [entry["n"], entry["disputed"], own["false_accepts"], own["false_rejects"], own["errors"],
                  bare["false_accepts"], bare["false_rejects"], other["false_accepts"], other["false_rejects"]]
        total.update(dict(enumerate(counts)))
        clocks = [" / ".join(str(side["ms"][kind]) for kind in ("median", "p99", "worst")) for side in (own, other)]
        lines.append(_line(name, counts, clocks))
    lines.append(_line("all", [total[i] for i in range(9)], ["", ""]))
    kept = ", ".join(f"{name} {entry.get('correct', 0)}/{entry['n']}" for name, entry in result["golds"].items())
    step = result["step_of_512"]
    first, known = step["seconds_with_empty_cache_then_full"][:2]
    speed = (f"A step of {step['answers']} answers (64 problems of MATH-500, 8 answers each) with {step['workers']} "
             f"workers: {first['wall']} s wall, {first['cpu_of_workers']} s CPU in the workers, and {known['wall']} s "
             "with all pairs known. Other work shared the two cores.")
    return "\n".join([*lines, "", f"Golds against themselves, in a sentence and a box: {kept}.", "", speed])


def _line(name: str, n: list[int], clocks: list[str]) -> str:
    cells = [name, n[0], n[1], f"{n[2]} / {n[3]} / {n[4]}", f"{n[5]} / {n[6]}", f"{n[7]} / {n[8]}", *clocks]
    return "| " + " | ".join(map(str, cells)) + " |"


def write_page(result: dict[str, Any]) -> None:
    fill(HERE.parent / "docs" / "grader.md", "cases", table(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="without it only the page is written anew, from --out")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "grader.json")
    args = parser.parse_args()
    if args.data:
        args.out.write_text(json.dumps(measure(args.data), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    result = json.loads(args.out.read_text(encoding="utf-8"))
    write_page(result)
    print(f"wrote {args.out}: {len(result['disagreements'])} disagreements outside the exceptions")


if __name__ == "__main__":
    main()
