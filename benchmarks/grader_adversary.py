"""A tiny policy that is rewarded for false accepts: it looks for texts that the grader takes for a gold answer of which
they are known to be wrong.

    python benchmarks/grader_adversary.py [--minutes 10] [--seed 0] [--out results/grader_adversary.json]

A text is the gold answer with a few edits, each drawn from a table of preferences (softmax) that learns by REINFORCE
for every kind of gold. Being wrong is known without the grader: golds are numbers, and a text is a candidate only if a
second, independent reading (`value_of`: a small calculator over fractions, or the reading of a person for words) gives
another value. What it finds is printed and belongs into tests.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GOLDS: dict[str, list[str]] = {
    "whole": ["7", "-12", "144", "1000", "35"], "fraction": [r"\frac{3}{4}", r"-\frac{5}{12}", "7/3"],
    "decimal": ["0.25", "3.75", "12.5"], "list": ["1, 2", "-3, 5", "2, 3, 5"], "tuple": ["(1, 2)", "(0, -3)"],
    "interval": ["[0, 1)", r"(-\infty, 2]"], "surd": [r"2\sqrt{3}", r"\sqrt{5}"], "symbol": ["x + 1", "2n", "x^2"],
    "unit": [r"5\text{ cm}", r"\$12", r"30^\circ"], "word": [r"\text{even}", r"\text{(B)}"], "ratio": ["3:4", "12:30"],
}
PIECES = [
    "0", "1", "2", "9", ".", ",", "-", "+", "!", "'", "^2", "_2", "%", r"\%", r"\pm ", "x", "i", "e", "(", ")",
    "[", "]", "{", "}", r"\{", r"\}", "|", "/", r"\cdot ", r"\sqrt{", r"\text{ or }", r"\text{ and }", ", ", ";",
    ":", "=", "x = ", "y = ", "<", r"\ne ", r"\approx ", r"\ldots", r"\infty", r"^\circ", r"\text{ cm}",
    r"\text{ m}", " million", " squared", "$", r"\$", "\\\\", "&", " ", r"\overline{1}", r"\frac{1}{2}",
    r"\boxed{", "10^{-90}", "\u202f", "²", "½", "−", "√", "C. ", "(B)", r"\mod 2", r"\cup ", r"\begin{pmatrix}",
    r"\end{pmatrix}", r"\left", r"\right", "\n", "not ", "about ", "or more", r"\to ", r"\Rightarrow "]
EDITS = ("insert", "delete", "double", "swap", "append", "prepend")
RATE = 0.3


def candidate(draw: random.Random, gold: str, weights: dict[str, list[float]]) -> tuple[str, list[tuple[str, int]]]:
    """The gold with one to four edits, and the choices that were made."""
    text, made = gold, []
    for _ in range(draw.randint(1, 4)):
        edit = choose(draw, weights["edits"])
        piece = choose(draw, weights["pieces"])
        made += [("edits", edit), ("pieces", piece)]
        at = draw.randint(0, len(text))
        name = EDITS[edit]
        if name == "insert":
            text = text[:at] + PIECES[piece] + text[at:]
        elif name == "delete":
            text = text[:at] + text[at + 1:]
        elif name == "double":
            text = text[:at] + text[max(0, at - 1):at] + text[at:]
        elif name == "swap" and 0 < at < len(text):
            text = text[:at - 1] + text[at] + text[at - 1] + text[at + 1:]
        elif name == "append":
            text += PIECES[piece]
        elif name == "prepend":
            text = PIECES[piece] + text
    return text, made


def choose(draw: random.Random, preferences: list[float]) -> int:
    top = max(preferences)
    return draw.choices(range(len(preferences)), [math.exp(p - top) for p in preferences])[0]


def learn(weights: dict[str, list[float]], made: list[tuple[str, int]], advantage: float) -> None:
    """REINFORCE on the softmax of each table."""
    for table, index in made:
        values = weights[table]
        top = max(values)
        total = sum(math.exp(v - top) for v in values)
        for i, value in enumerate(values):
            values[i] += RATE * advantage * ((i == index) - math.exp(value - top) / total)


def reading(text: str) -> Any:
    """What a careful reader takes from a text that says a plain number; None for all others.

    Independent of the grader: a calculator over fractions on the plainest grammar."""
    plain = text.replace("−", "-").replace("\u202f", "").replace(r"\$", "").replace("$", "").strip()
    plain = re.sub(r"\\d?frac\{(-?\d+)\}\{(\d+)\}", r"(\1)/(\2)", plain).replace(r"\cdot", "*").replace(" ", "")
    plain = re.sub(r"^[a-z]=", "", plain)
    if re.fullmatch(r"[-+]?\d+(\.\d+)?", plain):
        return Fraction(plain)
    if found := re.fullmatch(r"\(?([-+]?\d+)\)?/\(?(\d+)\)?", plain):
        return Fraction(int(found[1]), int(found[2])) if int(found[2]) else None
    if found := re.fullmatch(r"([-+]?\d+)((?:[-+*]\d+)+)", plain):
        total = product = Fraction(0)
        sign = 1
        for operator, number in re.findall(r"([-+*]?)(\d+)", plain):
            if operator == "*":
                product *= int(number)
            else:
                total, sign, product = total + sign * product, -1 if operator == "-" else 1, Fraction(int(number))
        return total + sign * product
    return None


def surely_wrong(kind: str, gold: str, text: str) -> bool:
    """Whether the text is wrong beyond argument: both read as numbers, and differ; or the counts of their numbers
    differ where the gold is a list, a tuple or an interval."""
    a, b = reading(gold), reading(text)
    if a is not None and b is not None:
        return a != b
    numbers = [re.findall(r"\d+(?:\.\d+)?", side) for side in (gold, text)]
    brackets = [re.sub(r"[^()\[\]]", "", side) for side in (gold, text)]
    plain = re.fullmatch(r"[\d\s.,()\[\]\\infty-]*", text) is not None
    if kind in {"list", "tuple", "interval"} and plain:
        if len(numbers[0]) != len(numbers[1]):
            return not re.search(r"(?<!\d)0+\d|\d{4}", text)
        other_ends = kind == "interval" and len(brackets[1]) == 2 and brackets[0] != brackets[1]
        values = [[Fraction(number) for number in side] for side in numbers]
        return other_ends or (kind in {"tuple", "interval"} and values[0] != values[1])
    if kind in {"surd", "symbol", "unit"}:
        return plain and reading(text) is not None and not (kind == "unit" and reading(text) == Fraction(numbers[0][0]))
    return False


def search(judge: Callable[[list[str], list[str]], list[bool]], minutes: float, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    tables = {kind: {"edits": [0.0] * len(EDITS), "pieces": [0.0] * len(PIECES)} for kind in GOLDS}
    end, tried, wrong, accepted = time.monotonic() + 60 * minutes, 0, 0, 0
    found: dict[str, list[str]] = {}
    curious: list[list[str]] = []
    while time.monotonic() < end:
        batch = []
        for _ in range(256):
            kind = draw.choice(list(GOLDS))
            gold = draw.choice(GOLDS[kind])
            batch.append((kind, gold, *candidate(draw, gold, tables[kind])))
        verdicts = judge([gold for _, gold, _, _ in batch], [text for _, _, text, _ in batch])
        rewards = []
        for (kind, gold, text, _), equal in zip(batch, verdicts, strict=True):
            bad = surely_wrong(kind, gold, text)
            tried, wrong, accepted = tried + 1, wrong + bad, accepted + equal
            if equal and bad:
                found.setdefault(kind, []).append(f"{gold} | {text}")
            elif equal and text.strip() != gold and len(curious) < 60:
                curious.append([gold, text])
            # Accepted texts of other wording are worth a little: holes are near what is read leniently.
            rewards.append(1.0 if equal and bad else 0.1 if equal and text.strip() != gold else 0.0)
        mean = sum(rewards) / len(rewards)
        for (kind, _, _, made), reward in zip(batch, rewards, strict=True):
            learn(tables[kind], made, reward - mean)
    return {"seed": seed, "minutes": minutes, "tried": tried, "surely_wrong": wrong, "accepted": accepted,
            "false_accepts": found, "accepted_in_other_words": curious}


def main() -> None:
    from bridgelm.types import Verdict
    from bridgelm.verify.math.grader import MathJudge

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "grader_adversary.json")
    args = parser.parse_args()
    judge = MathJudge(1.0, extract=("bare",))

    def equal(golds: list[str], texts: list[str]) -> list[bool]:
        return [found.verdict is Verdict.CORRECT for found in judge.decide(golds, texts)]

    result = search(equal, args.minutes, args.seed)
    judge.close()
    args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print({name: value for name, value in result.items() if name != "accepted_in_other_words"})


if __name__ == "__main__":
    main()
