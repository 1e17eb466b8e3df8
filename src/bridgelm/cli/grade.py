"""`bridgelm grade`: grades answers outside a run and prints one JSON object per line."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bridgelm.errors import UserError
from bridgelm.verify.decision import Decision
from bridgelm.verify.extract import RULES
from bridgelm.verify.grading import Grader, Task, checked


def add_arguments(parser: Any) -> None:
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE",
                        help="JSON lines with prediction, gold and perhaps task; - reads standard input")
    parser.add_argument("--gold", metavar="TEXT", help="one pair in place of FILE: the gold answer")
    parser.add_argument("--prediction", metavar="TEXT", help="and the answer or whole completion to grade")
    parser.add_argument("--task", default="math", metavar="NAME",
                        help="math (default), countdown, knights, exact, regex")
    parser.add_argument("--extract", default=",".join(RULES), metavar="A,B,...",
                        help=f"where an answer may stand, in the order of trying (default {','.join(RULES)})")
    parser.add_argument("--tolerance", type=float, default=0.0, metavar="X",
                        help="relative, for numbers (default 0: exact)")
    parser.add_argument("--time-limit", type=float, default=1.0, metavar="S", help="CPU seconds an answer (default 1)")
    parser.add_argument("--workers", type=int, metavar="N", help="worker processes (default: one a core, at most 8)")


def run(args: Namespace) -> None:
    single = args.gold is not None or args.prediction is not None
    if single == (args.file is not None) or (single and None in (args.gold, args.prediction)):
        raise UserError("grade: name a FILE of JSON lines, or give --gold and --prediction")
    if args.time_limit <= 0 or (args.workers is not None and args.workers < 1):
        raise UserError("grade: --time-limit and --workers are above 0")
    task = checked(Task(args.task, tuple(rule.strip() for rule in args.extract.split(",")), args.tolerance))
    workers = args.workers or (1 if single else None)
    start, tally = time.monotonic(), Counter()
    with Grader(task, args.time_limit, workers) as grader:
        lines = [json.dumps({"gold": args.gold, "prediction": args.prediction})] if single else read_lines(args.file)
        for decision in grader.grade_lines(lines):
            print(json.dumps(as_row(decision), ensure_ascii=False))
            tally[decision.verdict.value] += 1
            tally["exhausted"] += decision.rule == "out of time or memory"
    if not single:
        print(summary(tally, time.monotonic() - start), file=sys.stderr)


def as_row(decision: Decision) -> dict[str, Any]:
    return {"verdict": decision.verdict.value, "extracted": decision.extracted, "how": decision.how,
            "rule": decision.rule, "ms": round(decision.ms, 3)}


def read_lines(path: Path) -> Iterator[str]:
    if str(path) == "-":
        yield from sys.stdin
        return
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"grade: {path}: cannot be read ({error})") from None


def summary(tally: Counter[str], seconds: float) -> str:
    graded = sum(tally[verdict] for verdict in ("correct", "wrong", "error"))
    share = tally["correct"] / max(1, graded - tally["error"])
    return (f"{graded} graded in {seconds:.1f} s: {tally['correct']} correct ({share:.1%} of those with a verdict), "
            f"{tally['wrong']} wrong ({tally['exhausted']} of them out of time or memory), {tally['error']} errors")
