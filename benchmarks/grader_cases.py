"""Generated cases: equivalences that must hold and near misses that must not, from one seed.

    python benchmarks/grader_cases.py [--cases 100000] [--seed 0] [--out results/grader_cases.json]

A case is right by construction: an answer is drawn, written in two ways, and for the near miss one thing is changed
that changes its value. A small sample of the same generator runs with the quick tests.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
SUPER = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
UNITS = ["cm", "inches", "square units", "apples", "dollars", "miles per hour", "ways", "m", "degrees"]


class Case(NamedTuple):
    kind: str
    gold: str
    prediction: str
    equal: bool


Maker = Callable[[random.Random], tuple[str, str, str]]  # gold, another spelling of it, a near miss


def tex(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    return ("-" if value < 0 else "") + rf"\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def fraction(draw: random.Random, size: int = 60) -> Fraction:
    return Fraction(draw.randint(-size, size) or 1, draw.randint(1, 24))


def off(draw: random.Random, value: Fraction) -> Fraction:
    """Another number that is easily taken for it: a sign, a digit, upside down."""
    choices = [-value, value + 1, value - Fraction(1, value.denominator), value * 10]
    if value.numerator:
        choices.append(1 / value)
    return draw.choice([other for other in choices if other != value] or [value + 1])


def spelled(draw: random.Random, value: Fraction) -> str:
    """A number in one of its spellings."""
    k = draw.randint(2, 9)
    top, bottom = value.numerator, value.denominator
    ways = [tex(value), f"{top}/{bottom}", rf"\dfrac{{{top * k}}}{{{bottom * k}}}", rf"$\tfrac{{{top}}}{{{bottom}}}$",
            f"({top})/({bottom})", tex(value).replace("-", "−")]
    if value.denominator == 1:
        ways += [f"{top}.0", f"{top}.", f"{top:,}", f"+{top}" if top > 0 else str(top)]
    rest = bottom
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest == 1 and bottom <= 1000:
        ways.append(f"{float(value)}")
    if value > 1 and bottom > 1:
        ways.append(rf"{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}")
    return draw.choice(ways)


def number(draw: random.Random) -> tuple[str, str, str]:
    value = fraction(draw)
    return tex(value), spelled(draw, value), spelled(draw, off(draw, value))


def large(draw: random.Random) -> tuple[str, str, str]:
    value = draw.randint(1000, 10**12)
    digits = list(str(value))
    at = draw.randrange(len(digits))
    digits[at] = str((int(digits[at]) + draw.randint(1, 9)) % 10)
    other = int("".join(digits))
    ways = ["{:,}", "{}", "{}.00"]
    text = draw.choice([f"{value:,}", f"{value:,}".replace(",", r",\!"), f"{value:,}".replace(",", "{,}"),
                        f"{value:,}".replace(",", " "), f"\\${value:,}", f"{value}"])
    return str(value), text, draw.choice(ways).format(other)


def decimal(draw: random.Random) -> tuple[str, str, str]:
    places = draw.randint(1, 6)
    value = Fraction(draw.randint(1, 10**places * 50), 10**places)
    text = f"{float(value):.{places}f}"
    other = value + Fraction(draw.choice([-1, 1]), 10 ** places)
    return text, draw.choice([text + "0", tex(value), "$" + text + "$"]), f"{float(other):.{places}f}"


def commuted(draw: random.Random) -> tuple[str, str, str]:
    """Sums and products of surds, pi and symbols in another order."""
    atoms = [rf"\sqrt{{{draw.choice([2, 3, 5, 7, 11])}}}", r"\pi", "x", "y", "x^2", r"\sin x", "e^{x}", "ab", "n"]
    terms = [(draw.choice([-1, 1]) * draw.randint(1, 12), atom) for atom in draw.sample(atoms, draw.randint(2, 4))]

    def write(parts: list[tuple[int, str]]) -> str:
        signed = [f"{'+' if c > 0 else '-'} {abs(c) if abs(c) > 1 else ''}{atom}" for c, atom in parts]
        return "".join(signed).removeprefix("+ ")

    mixed = draw.sample(terms, len(terms))
    wrong = list(mixed)
    at = draw.randrange(len(wrong))
    wrong[at] = (draw.choice([-wrong[at][0], wrong[at][0] + (1 if wrong[at][0] != -1 else 2)]), wrong[at][1])
    return write(terms), write(mixed), write(wrong)


def factored(draw: random.Random) -> tuple[str, str, str]:
    a, b = draw.randint(-9, 9), draw.randint(-9, 9)
    x = draw.choice("xtn")

    def expanded(p: int, q: int) -> str:
        return f"{x}^2 {'+' if p + q >= 0 else '-'} {abs(p + q)}{x} {'+' if p * q >= 0 else '-'} {abs(p * q)}"

    product = f"({x} {'+' if a >= 0 else '-'} {abs(a)})({x} {'+' if b >= 0 else '-'} {abs(b)})"
    miss = expanded(a + 1, b) if draw.random() < 0.5 or a * b == 0 else expanded(-a, b)
    return product, expanded(a, b), miss if miss != expanded(a, b) else expanded(a + 1, b)


def listed(draw: random.Random) -> tuple[str, str, str]:
    values = draw.sample([Fraction(n, d) for n in range(-9, 10) for d in (1, 2, 3)], draw.randint(2, 5))
    values = list(dict.fromkeys(values))
    if len(values) < 2:
        return listed(draw)
    mixed = draw.sample(values, len(values))
    wrong = [off(draw, mixed[0]), *mixed[1:]] if draw.random() < 0.6 else mixed[1:]
    if sorted(wrong) == sorted(values):
        wrong = mixed[1:]
    join = draw.choice([", ", " and ", "; ", r" \text{ or } "])
    named = draw.choice([lambda t: t, lambda t: rf"\{{{t}\}}" if ";" not in t else t])
    return ", ".join(map(tex, values)), named(join.join(map(tex, mixed))), ", ".join(map(tex, wrong))


def tupled(draw: random.Random) -> tuple[str, str, str]:
    values = [fraction(draw, 12) for _ in range(draw.randint(2, 4))]
    wrong = draw.sample(values, len(values)) if draw.random() < 0.5 else [off(draw, values[0]), *values[1:]]
    if wrong == values:
        wrong = [values[0] + 1, *values[1:]]
    left, right = draw.choice([("(", ")"), (r"\left( ", r" \right)")])

    def write(parts: list[Fraction]) -> str:
        inside = ", ".join(spelled(draw, value) if draw.random() < 0.3 else tex(value) for value in parts)
        return left + inside.replace("$", "") + right

    return "(" + ",".join(map(tex, values)) + ")", write(values), write(wrong)


def interval(draw: random.Random) -> tuple[str, str, str]:
    low = fraction(draw, 20)
    high = low + abs(fraction(draw, 20))
    brackets = draw.choice(["()", "[)", "(]", "[]"])
    signs = [r"<" if brackets[0] == "(" else r"\le", "<" if brackets[1] == ")" else r"\le"]
    gold = f"{brackets[0]}{tex(low)}, {tex(high)}{brackets[1]}"
    relation = f"{tex(low)} {signs[0]} x {signs[1]} {tex(high)}"
    flipped = draw.choice([b for b in ["()", "[)", "(]", "[]"] if b != brackets])
    miss = draw.choice([f"{flipped[0]}{tex(low)}, {tex(high)}{flipped[1]}",
                        f"{brackets[0]}{tex(low)}, {tex(high + 1)}{brackets[1]}"])
    return gold, draw.choice([relation, rf"x \in {gold}", gold.replace("frac", "dfrac")]), miss


def union(draw: random.Random) -> tuple[str, str, str]:
    ends = sorted(draw.sample(range(-20, 20), 4))
    a, b, c, d = ends
    gold = rf"({a},{b}] \cup ({c},{d})"
    same = draw.choice([rf"({c},{d})\cup({a},{b}]", f"({a}, {b}] ∪ ({c}, {d})",
                        rf"{a} < x \le {b} \text{{ or }} {c} < x < {d}"])
    miss = draw.choice([rf"({a},{b}) \cup ({c},{d})", rf"({a},{b}] \cup ({c},{d + 1})", rf"({a},{d})",
                        rf"({a},{b}] \cap ({c},{d})"])
    return gold, same, miss


def equation(draw: random.Random) -> tuple[str, str, str]:
    """A line, and multiples of its equation."""
    a, b, c = (draw.choice([-1, 1]) * draw.randint(1, 9) for _ in range(3))
    k = draw.choice([-3, -2, -1, 2, 3, 5])

    def line(p: int, q: int, r: int) -> str:
        return f"{p}x {'+' if q > 0 else '-'} {abs(q)}y {'+' if r > 0 else '-'} {abs(r)} = 0"

    miss = draw.choice([line(a, -b, c), line(a, b, -c), line(a + (1 if a != -1 else 2), b, c)])
    solved = f"y = {tex(Fraction(-a, b))}x {'+' if Fraction(-c, b) > 0 else '-'} {tex(abs(Fraction(-c, b)))}"
    return line(a, b, c), draw.choice([line(k * a, k * b, k * c), solved]), miss


def assigned(draw: random.Random) -> tuple[str, str, str]:
    value = fraction(draw)
    name = draw.choice(["x", "n", "AB", "f(2)", "k", r"\angle ABC", "P"])
    return tex(value), f"{name} = {tex(value)}", f"{name} = {tex(off(draw, value))}"


def unit(draw: random.Random) -> tuple[str, str, str]:
    value = fraction(draw)
    name = draw.choice(UNITS)
    with_unit = draw.choice([rf"{tex(value)} \text{{ {name}}}", rf"{tex(value)}\text{{ {name}}}"])
    return draw.choice([tex(value), with_unit]), with_unit, rf"{tex(off(draw, value))} \text{{ {name}}}"


def converted(draw: random.Random) -> tuple[str, str, str]:
    n = draw.randint(1, 90)
    small, factor, big = draw.choice([("cm", 100, "m"), ("minutes", 60, "hours"), ("cents", 100, "dollars"),
                                      ("inches", 12, "feet")])
    return rf"{n}\text{{ {big}}}", rf"{n * factor} \text{{ {small}}}", rf"{n} \text{{ {small}}}"


def percent(draw: random.Random) -> tuple[str, str, str]:
    n = draw.randint(1, 99)
    same = draw.choice([f"{n}%", f"{n} percent", f"{n}", tex(Fraction(n, 100)), f"0.{n:02d}"])
    return rf"{n}\%", same, draw.choice([rf"{n + 1}\%", rf"0.{n}\%"])


def power(draw: random.Random) -> tuple[str, str, str]:
    base, exponent = draw.randint(2, 9), draw.randint(3, 400)
    other = exponent + draw.choice([-1, 1, 2])
    same = draw.choice([f"{base}{str(exponent).translate(SUPER)}", rf"\frac{{1}}{{{base}^{{-{exponent}}}}}"])
    miss = draw.choice([f"{base}^{{{other}}}", f"{base}^{{{-exponent}}}", rf"{base}^{{{exponent}}}+1"])
    return f"{base}^{{{exponent}}}", same, miss


def tiny(draw: random.Random) -> tuple[str, str, str]:
    n = draw.randint(20, 2004)
    return rf"\frac{{1}}{{{n}!}}", rf"\frac{{1}}{{{n}\cdot {n - 1}!}}", rf"\frac{{1}}{{{n + 2}!}}"


def surd(draw: random.Random) -> tuple[str, str, str]:
    a, b, k = draw.randint(1, 20), draw.choice([2, 3, 5, 6, 7]), draw.randint(2, 6)
    gold = rf"{a} + {k}\sqrt{{{b}}}"
    same = draw.choice([rf"{a}+\sqrt{{{k * k * b}}}", f"{k}√{b} + {a}", rf"\frac{{{2 * a}+{2 * k}\sqrt{{{b}}}}}{{2}}"])
    miss = draw.choice([rf"{a} - {k}\sqrt{{{b}}}", rf"{a}+{k}\sqrt{{{b + 1}}}", rf"{a + k}\sqrt{{{b}}}",
                        rf"{k + 100}+{a}\sqrt{{{b}}}"])
    return gold, same, miss


def complex_number(draw: random.Random) -> tuple[str, str, str]:
    a, b = draw.randint(1, 30), draw.randint(1, 30)
    same = draw.choice([f"{b}i+{a}", rf"{a}+{b}\cdot i"])
    return f"{a} + {b}i", same, draw.choice([f"{a} - {b}i", f"-{a}+{b}i", f"{b + 31} + {a}i"])


def matrix(draw: random.Random) -> tuple[str, str, str]:
    rows = [[draw.randint(-9, 9) for _ in range(2)] for _ in range(2)]

    def write(kind: str, cells: list[list[int]]) -> str:
        return rf"\begin{{{kind}}} " + r" \\ ".join(" & ".join(map(str, row)) for row in cells) + rf" \end{{{kind}}}"

    wrong = [list(row) for row in rows]
    wrong[draw.randint(0, 1)][draw.randint(0, 1)] += draw.choice([-1, 1])
    return write("pmatrix", rows), write("bmatrix", rows), write("pmatrix", wrong)


MAKERS: list[Maker] = [number, large, decimal, commuted, factored, listed, tupled, interval, union, equation, assigned,
                       unit, converted, percent, power, tiny, surd, complex_number, matrix]


def generate(seed: int) -> Iterator[Case]:
    """Cases without end; each draw gives the equivalence and the near miss."""
    draw = random.Random(seed)
    while True:
        maker = draw.choice(MAKERS)
        gold, same, miss = maker(draw)
        yield Case(maker.__name__, gold, same, True)
        yield Case(maker.__name__, gold, miss, False)


def main() -> None:
    from bridgelm.types import Verdict
    from bridgelm.verify.math.grader import MathJudge

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "grader_cases.json")
    args = parser.parse_args()
    source, judge, start = generate(args.seed), MathJudge(1.0), time.time()
    tally: dict[str, Counter[str]] = {maker.__name__: Counter() for maker in MAKERS}
    wrong, done = [], 0
    while done < args.cases:
        cases = [next(source) for _ in range(min(2000, args.cases - done))]
        decisions = judge.decide([case.gold for case in cases], [case.prediction for case in cases])
        for case, found in zip(cases, decisions, strict=True):
            right = found.verdict is (Verdict.CORRECT if case.equal else Verdict.WRONG)
            tally[case.kind]["n"] += 1
            tally[case.kind]["false accepts" if not case.equal else "false rejects"] += not right
            if not right and len(wrong) < 200:
                wrong.append([*case, found.verdict.value, found.rule])
        done += len(cases)
        print(f"{done} cases, {len(wrong)} disagreements, {time.time() - start:.0f} s", flush=True)
    judge.close()
    result = {"seed": args.seed, "cases": done, "by_kind": tally, "disagreements": wrong}
    args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
