"""Builds the JSON lines that the recipes read, from public data sets of the hub or from files with the same columns.

    python recipes/data.py limr  --out data/limr     LIMR, and DeepSeek-R1's answers of DeepMath-103K
    python recipes/data.py math  --out data/math     MATH levels 3 to 5, and the same answers
    python recipes/data.py gsm8k --out data/gsm8k    GSM8K with its own solutions

Each writes train, validation and test, and demos where they are on problems of their own. No problem is in two of them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bridgelm.benchmarks.prompts import prompt_format
from bridgelm.data.sources import read
from bridgelm.errors import UserError
from bridgelm.verify.extract import boxed

SOURCES = {  # where each is looked for unless the command line names a file
    "limr": "hf:GAIR/LIMR:train", "math_train": "hf:DigitalLearningGmbH/MATH-lighteval:train",
    "math_test": "hf:DigitalLearningGmbH/MATH-lighteval:test", "math500": "hf:HuggingFaceH4/MATH-500:test",
    "r1": "hf:zwhe99/DeepMath-103K:train[:20000]",
    "gsm8k_train": "hf:openai/gsm8k@main:train", "gsm8k_test": "hf:openai/gsm8k@main:test"}
COUNTS = {"limr": 1389, "math_train": 7500, "math_test": 5000, "math500": 500, "gsm8k_train": 7473, "gsm8k_test": 1319}
VALIDATION = 500
Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["limr", "math", "gsm8k"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--demos", type=int, default=10000, help="demonstrations at most (default 10000)")
    parser.add_argument("--validation", type=int, default=VALIDATION, help="problems held out (default 500)")
    parser.add_argument("--any-number", action="store_true", help="do not insist on the published numbers of rows")
    for name, source in SOURCES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=source, metavar="FILE", help=f"default {source}")
    args = parser.parse_args()
    try:
        sets = gsm8k(args) if args.task == "gsm8k" else mathematics(args)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{args.out / name}.jsonl: {len(rows)}")


def mathematics(args: argparse.Namespace) -> dict[str, Rows]:
    test = load(args, "math500")
    taken = keys(test)
    of_test = without([row for row in load(args, "math_test") if hard(row)], taken)
    if args.task == "limr":
        train = load(args, "limr")
        validation = held_out(without(of_test, keys(train)), args.validation)
    else:
        # The same problems are held out for both, so that their runs can be compared.
        validation = held_out(without(of_test, keys(load(args, "limr"))), args.validation)
        train = unique([row for row in load(args, "math_train") if hard(row)] + of_test)
    train = without(train, taken | keys(validation))
    demos = r1_answers(args, taken | keys(validation))
    return {"train": train, "demos": demos, "validation": validation, "test": test}


def gsm8k(args: argparse.Namespace) -> dict[str, Rows]:
    """The solutions are demonstrations of the training problems themselves, without the calculator's marks."""
    test = load(args, "gsm8k_test")
    train = without(load(args, "gsm8k_train"), keys(test))
    validation = held_out(train, args.validation)
    train = without(train, keys(validation))
    return {"train": train, "validation": [bare(row) for row in validation], "test": [bare(row) for row in test]}


def load(args: argparse.Namespace, name: str) -> Rows:
    sources = read(getattr(args, name), name)
    if name in COUNTS and len(sources) != COUNTS[name] and not args.any_number:
        raise UserError(f"{getattr(args, name)}: {len(sources)} rows, and {COUNTS[name]} were published; give another "
                        f"--{name.replace('_', '-')}, or --any-number")
    return [to_row(source.row, source.name) for source in sources]


def to_row(row: dict[str, Any], name: str) -> dict[str, Any]:
    text = next((row[key] for key in ("problem", "question", "prompt") if row.get(key)), None)
    if isinstance(text, list):  # messages
        text = text[-1]["content"]
    worked = str(row.get("solution") or "")
    answer = str(row["answer"]) if row.get("answer") is not None else boxed(worked)
    if "####" in (said := worked or answer or ""):  # GSM8K, whose hub form has the solution in the answer's place
        steps, _, answer = said.rpartition("####")
        worked = re.sub(r"<<.*?>>", "", steps).strip() + f"\nThe answer is $\\boxed{{{answer.strip()}}}$."
    if text is None or not answer or not answer.strip():
        return {"id": str(row.get("id") or name), "problem": text or "", "answer": ""}
    level = re.search(r"\d+", str(row.get("level", "")))
    found = {"id": str(row.get("unique_id") or row.get("id") or name), "problem": text.strip(),
             "prompt": prompt_format("boxed").text.replace("{problem}", text.strip()), "answer": answer.strip()}
    return found | ({"difficulty": int(level.group())} if level else {}) | (
        {"demos": [worked]} if "####" in said else {})


def r1_answers(args: argparse.Namespace, taken: set[str]) -> Rows:
    """The shortest of the three answers to each problem."""
    rows: Rows = []
    for source in read(args.r1, "r1"):
        answers = [source.row[key] for key in sorted(source.row) if key.startswith("r1_solution") and source.row[key]]
        row = to_row({"problem": source.row.get("question"), "answer": source.row.get("final_answer")}, source.name)
        if not answers or not row["answer"] or key_of(row) in taken:
            continue
        text = min(answers, key=len).strip()
        if "</think>" in text and not text.startswith("<think>"):
            text = f"<think>\n{text}"
        rows.append({key: row[key] for key in ("id", "problem", "prompt", "answer")} | {"demos": [text]})
    return unique(rows)[:args.demos]


def hard(row: dict[str, Any]) -> bool:
    return row.get("difficulty", 0) >= 3


def key_of(row: dict[str, Any]) -> str:
    return " ".join(row["problem"].casefold().split())


def keys(rows: Iterable[dict[str, Any]]) -> set[str]:
    return {key_of(row) for row in rows}


def without(rows: Rows, taken: set[str]) -> Rows:
    """What can be trained on or asked: rows with an answer, none of `taken`, each problem once."""
    return unique([row for row in rows if row["answer"] and key_of(row) not in taken])


def unique(rows: Rows) -> Rows:
    return list({key_of(row): row for row in reversed(rows)}.values())[::-1]


def held_out(rows: Rows, size: int) -> Rows:
    return [rows[i] for i in sorted(np.random.default_rng(0).permutation(len(rows))[:size])]


def bare(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "demos"}


if __name__ == "__main__":
    main()
