"""The grader of mathematics: what is equal and what only looks so, where answers stand, puzzles, and the command."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, strategies

from bridgelm.cli.main import main
from bridgelm.errors import UserError
from bridgelm.types import Verdict
from bridgelm.verify import puzzles
from bridgelm.verify.extract import find
from bridgelm.verify.grading import Grader, Task, build_judge, checked
from bridgelm.verify.math.grader import MathJudge
from bridgelm.verify.math.judge import judge
from bridgelm.verify.math.number import exact
from bridgelm.verify.math.spelling import spell
from bridgelm.verify.math.units import factor_between, quantity

ROOT = Path(__file__).parents[2]
SHARED = os.environ.get("BRIDGELM_DATA")

EQUAL = {
    "numbers": [("1,000,000", "1000000"), ("1000", "1 000"), ("12000023", r"12,\!000,\!023"), ("007", "7"), ("-0", "0"),
                ("0.5", r"\frac12"), ("2.50", "5/2"), (r"2\frac12", "2.5"), ("1 1/2", "3/2"),
                (r"0.\overline{3}", "1/3"),
                ("3000", r"3\times10^3"), ("3.3e12", r"3.3 \times 10^{12}"), (".185", "0.185"),
                ("1,000,000", "1 million"),
                (r"\frac{1}{12}", "0.0833333333333333"), ("4.123105625617661", r"\sqrt{17}"), ("2.74", "2,74"),
                ("10^{100}", "10^100")],
    "unicode": [("-5", "−5"), (r"\frac{\sqrt{2}}{2}", "√2/2"), ("x^2", "x²"), (r"\frac12", "½"), ("1.5", "1½"),
                ("50", "50°"),
                (r"(-\infty,-2]\cup[3,\infty)", "(−∞, −2] ∪ [3, ∞)"), ("1242_6", "1242₆"), ("10000", "10\u202f000"),
                (r"3\pi", "3π"), (r"2\cdot 3", "6"), (r"1\pm\sqrt{19}", "1 ± √19"), (r"\sqrt{x+1}", "√(x+1)"),
                (r"\sqrt[3]{2}", "∛2"), (r"x\le 3", "x ≤ 3")],
    "spelling": [(r"\frac{\pi}{2}", r"\frac\pi 2"), (r"\dfrac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}"),
                 (r"\frac{\sqrt6}2", "√6/2"),
                 ("sqrt(3)/2", r"\frac{\sqrt3}{2}"), (r"\left(3,\tfrac{\pi}{2}\right)", "(3, pi/2)"), ("73", "**73**"),
                 (r"\frac{3}{4}\pi", "3/4 π"), ("x^{10}", "x^10"), (r"\text{13}", "13"), ("1/3", r"\cfrac{1}{3}")],
    "values": [(r"\frac{x+2}{7}", r"\frac{x}{7}+\frac{2}{7}"), (r"\tan^2(y)+1", r"\sec^2(y)"), ("6", "2(3)"),
               (r"1024", "2^{10}"),
               (r"2+\sqrt2", r"\sqrt{6+4\sqrt2}"), ("-1", r"e^{i\pi}"), ("x^2-1", "(x-1)(x+1)"),
               (r"\frac12", r"\sin 30^\circ"),
               ("x^4-2x^3-13x^2+14x+24", "24 + 14*x + (-13)*x^2 - 2*x^3 + x^4"), (r"\frac{n(n-1)}{2}", r"\binom{n}{2}"),
               (r"\frac{1+i}{1-i}", "i"), ("C_1e^{-t}", "e^{-t}C_1"), (r"\frac{1}{2^{99}}", "2^{-99}"),
               ("55", r"\sum_{k=1}^{10}k"),
               ("2n+1", "1+n+n"), (r"\log_2 3", "log₂3"), (r"\log_2 3", r"\frac{\ln 3}{\ln 2}"),
               (r"\log_{10} 20", "log_10 20"), (r"\log_2 9", r"2\log_23")],
    "units": [("12", r"12\text{ cm}"), ("45", "45 miles per hour"), ("4", "4 cups"), (r"15\mbox{ cm}^2", "15"),
              (r"\$10", "10"),
              (r"5\text{ cm}", r"50\text{ mm}"), (r"\$0.50", r"50\text{ cents}"), ("60 mph", "60 miles per hour"),
              ("5", "5 m"),
              (r"23{,}000", r"\$23,000"), (r"\frac13", r"\frac{1}{3} \text{meters}"), ("8:34 p.m.", "8:34 PM"),
              (r"125\text{ miles}", "$125$ miles"), (r"90^\circ", r"\frac{\pi}{2}")],
    "percent": [(r"28\%", "28"), ("28", "28 percent"), (r"50\%", "0.5"), ("6.4", "6.4%")],
    "words": [(r"\text{Evelyn}", "Evelyn"), (r"\text{even}", "Even"), (r"\text{(C)}", "C"), ("C", "(C) 12"),
              ("12", "C. 12"),
              (r"\text{no solution}", r"\emptyset"), (r"\text{A, B}", "A,B"), (r"\text{A, B}", "B and A")],
    "lists": [("1,-2", "-2, 1"), ("1,-2", "x = 1 or x = -2"), (r"19, 46, \text{ and } 82", "82, 46, 19"),
              ("6, 8", "6 and 8"),
              (r"\{1,2,3\}", "3, 2, 1"), (r"\pm 2021", r"\{-2021, 2021\}"), ("x_1=3,x_2=4", "4, 3"),
              ("a=3, b=4", "3, 4"),
              ("(1,2),(3,4)", "(3,4) and (1,2)"), ("(3,1)", "3, 1"), ("p=5,q=2;p=7,q=2", "(5,2),(7,2)"),
              ("(100,200)", "(100, 200)"), ("32, 349", "32,349")],
    "sets": [("(2,12) \\cup (12,102)", r"x \in (12,102)\cup(2,12)"), (r"x<-1 \text{ or } x>2", "(-∞,-1)∪(2,∞)"),
             ("[-2,7]", r"-2\le x\le 7"),
             (r"\mathbb{R}\setminus\{2\}", r"x\neq 2"), (r"k \ge 2", r"[2,\infty)"),
             (r"1\le|z|\le 3/2", r"z\in[-3/2,-1]\cup[1,3/2]"),
             ("x < 1", "-x > -1"), ("(0,3)", "0 < x < 3"), (r"(-\infty,\infty)", "all real numbers")],
    "equations": [("4", "x = 4"), ("x=4", "4"), ("2x+4y-3=0", r"y=-\frac{1}{2}x+\frac{3}{4}"),
                  ("x^2/4+y^2/3=1", "x^2/16+y^2/12=1/4"),
                  ("y = 2x+3", "2x+3"), ("(p,q)=(3,2)", "(3,2)"), ("25", "x^2+y^2=25"), ("11", r"x\approx 11"),
                  ("f(x)=x", "y = x"), ("f(x)=2x", "g(x) = 2x"), ("f^{-1}(x)=2x", "y=2x"), ("W(n)=1", "W(x)=1"),
                  (r"\cos x=1/2", r"\cos(x)=0.5"),
                  ("a^2+b^2=c^2", "c^2=a^2+b^2"), ("|AB|=1", "1")],
    "others": [("17_8", "17 base 8"), ("17_8", r"17_{\text{eight}}"), ("x=1, y=2", "(x,y)=(1,2)"),
               ("x=1, y=2", "(1, 2)"),
               ("10", "ten"), (r"(-\infty,0)\cup(0,\infty)", "all real numbers except 0"),
               (r"(-\infty,0)\cup(0,\infty)", r"ℝ \ {0}"), (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1, 2)^T"),
               (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "[[1, 2], [3, 4]]"), ("e^2", "exp(2)"), ("3:4", "6:8"),
               ("3:4", "3/4"), ("1:3", "1 to 3"), ("2:3", r"4 \text{ to } 6"),
               (r"\begin{pmatrix}1\\7\end{pmatrix}", "(1,7)"), ("204_5", "204"),
               (r"\begin{pmatrix}6&8\end{pmatrix}", r"\begin{bmatrix}5&6\end{bmatrix}+\begin{bmatrix}1&2\end{bmatrix}"),
               (r"\begin{pmatrix}1/2&0\end{pmatrix}", r"\left[\begin{array}{cc}0.5&0\end{array}\right]")],
}
DIFFERENT = {
    "numbers": [("1", "-1"), ("1234", "1243"), ("1/3", "0.333"), ("33.3", "100/3"), ("12", "1 2"), ("12", "1, 2"),
                ("1,2", "1.2"),
                ("0.5", "0.500000000001"), ("2", r"2\frac12"), ("5", "5 million"), ("1", r"\sqrt{1+10^{-100}}"),
                ("0.332", "0.333..."), ("0.33", "0.333..."), ("3/4", "3/4 (0.85)"), ("2", "2(0.5)"),
                ("3.14", r"3.14159\ldots")],
    "values": [(r"\log_3 2", r"\log_2 3"), (r"\frac{1}{2004!}", r"\frac{1}{2006!}"), ("2^{-99}", "2^{-98}"),
               (r"1-\frac{1}{e}", r"1+\frac{1}{e}"), ("4", r"4\sqrt2"),
               (r"\frac{2^{2005}+1}{3\cdot 2^{2006}}", r"\frac{1}{3\cdot 2^{2006}}"), ("x", "|x|"),
               ("x", r"\sqrt{x^2}"), ("x+1", "y+1"),
               (r"\sqrt2", "1.41421356"), (r"\pi", "22/7"), ("5", "2(3)"), ("x", "x+10^{-60}"),
               ("(a+5)(b+2)", "(+5)(b+2)"),
               ("ab", "a"), ("54", "204_5"), ("y'", "y"), ("2", r"\frac{1+\sqrt5}{2}")],
    "units": [("5 cm", "5 m"), (r"5\text{ m}", r"5\text{ m}^2"), (r"20^\circ C", r"20^\circ F"), ("5", "5 or more"),
              ("5", "less than 5"),
              ("9", "3 squared"), ("5m", "5"), (r"\$10", "10 cents"), (r"50\%", "50.5")],
    "words": [("A", "B"), (r"\text{even}", "odd"), (r"\text{A, B}", "A"), ("C", "D. 12"), (r"\text{yes}", "no")],
    "lists": [("1,-2", "x=2, x=-1"), ("4", "4 or 5"), ("1, 2", "1"), ("n=2,3,4", "n=1,2,3"), ("a=3, b=4", "4, 3"),
              ("a=3,b=4", "b=3,a=4"), ("-2,1", "(-2,1)"), ("(1,2)", "(2,1)"), ("(3,1)", r"\{1,3\}"),
              (r"\pm 2021", "2021"),
              ("2021", r"\pm 2021"), (r"1, 2, \ldots, n", r"1, 3, 5, \ldots, 2n-1"), ("1,1,2", "1,2")],
    "sets": [("[0,1)", "(0,1)"), ("(0,1)", "(0,1.5)"), ("x<1", "x>1"), ("(-1,1)", "(-1,1]"), (r"x\ne 2", r"x\ne 3"),
             (r"(1,2)\cup(3,4)", "(1,4)"), (r"(-1,0)\cup(0,1)", "(-1,1)")],
    "equations": [("2x+z=1", "1"), ("0", "a+3z=b"), ("x=3", "y=3"), ("1", "x^2=1"), ("3x-y+13=0", "3x+4y+14=0"),
                  (r"\cos(x)=\frac{42}{59}", r"\sin(x)=\frac{42}{59}"), ("f(x)=2x", "f(y)=2x"), ("f(2)=0", "f(3)=0"),
                  ("f(2)=5", "g(2)=5"), ("P(A)=0.5", "P(B)=0.5"), ("f'(x)=2x", "f(x)=2x"), ("f^{-1}(x)=2x", "g(x)=2x"),
                  ("x(y+1)=0", "x(y-1)=0"), (r"\log(x)=2", r"\ln(x)=2"),
                  (r"F_n=\sum_{k=0}^{n-1}F_kF_{n-k-1}", r"F_n=\sum_{k=0}^{n-2}F_kF_{n-k-2}")],
    "others": [("12:00", "1:00"), ("(1,3)", "1 to 3"), ("3:1", "1 to 3"),
               (r"1:2:3:\ldots", r"1:4:9:\ldots"), ("3:4", "4:3"), ("4210_7", "4210_8"),
               (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}")],
}

# What the adversary of benchmarks/grader_adversary.py found, and what its finds led to.
FOUND_BY_SEARCH = {
    "adversary": [("1, 2", "1,1 2"), ("x+1", "x+1'"), ("x+1", r"x+\ldots1"), ("1000", r"1000\ldots"),
                  (r"\sqrt{5}", r"\sqrt{5}\mod\text{ m}2"), (r"\sqrt{5}", r"10^{-90}=\sqrt{5}"),
                  (r"\text{(B)}", "(B) or (C)"), (r"\text{(B)}", "(B), (C)"), ("30^\\circ", r"30^\cir\$c"),
                  ("35", ".35"), ("144", ".144"), ("[0, 1)", "0,1"), ("[1, 2]", "1, 2"), ("x", r"x\mod 100"),
                  ("7", "3+4=8")],
}


def cases(table):
    return [pytest.param(gold, text, id=f"{kind}: {gold} | {text}")
            for kind, pairs in table.items() for gold, text in pairs]


@pytest.mark.parametrize(("gold", "text"), cases(EQUAL))
def test_equal(gold, text):
    assert judge(spell(gold), spell(text))[0]


@pytest.mark.parametrize(("gold", "text"), cases(DIFFERENT) + cases(FOUND_BY_SEARCH))
def test_different(gold, text):
    assert not judge(spell(gold), spell(text))[0]


NAMES = ["x", "t", "AB", r"\theta", "f(x)", "g(x, y)", "f(2)", "f(3)", "f'(x)", "f^{-1}(x)", "P(A)", "P(B)", r"\sin(x)",
         r"\cos(x)", r"\ln(x)", r"\cos(t)", r"\text{area}"]


@given(strategies.sampled_from(NAMES), strategies.sampled_from(NAMES), strategies.fractions(-9, 9, max_denominator=60))
def test_assignments_to_two_names_are_two_answers(left, right, value):
    gold, text = rf"{left} = \frac{{{value.numerator}}}{{{value.denominator}}}", f"{right} = {value}"
    assert judge(spell(gold), spell(text))[0] == (left == right)


def test_every_gold_of_the_tables_equals_itself_and_a_verdict_names_its_rule():
    for gold, _ in [pair for table in (EQUAL, DIFFERENT) for pairs in table.values() for pair in pairs]:
        assert judge(spell(gold), spell(gold)) == (True, "same text")
    assert judge("x^{2}", r"x\cdot x") == (True, "value")
    assert judge(r"\sqrt{2}", r"9^{9^{9^{9}}}") == (False, "too big")


def test_numbers_are_read_exactly():
    assert exact("1,234.5") == Fraction(2469, 2)
    assert exact(r"-\frac{-3}{6}") == Fraction(1, 2)
    assert exact(r"0.1\overline{6}") == Fraction(1, 6)
    for text in ("", "x", "1,23", "1/0", "0,111", r"2\frac{3}{2}", "1e99999", "--1", "1.2.3"):
        assert exact(text) is None


def test_units_convert_or_conflict():
    assert factor_between(quantity(r"5\text{ cm}", True), quantity("5 mm", True)) == 10
    assert factor_between(quantity(r"5\text{ cm}", True), quantity(r"5\text{ s}", True)) is None
    assert factor_between(quantity("5 apples", True), quantity(r"5\text{ s}", True)) == 1
    assert quantity("5 or more", True).text == "5 or more"


# ---------------------------------------------------------------- where an answer stands

FOUND = [
    (r"\boxed{1} and \boxed{2}", "1, 2", "boxed"),
    (r"\boxed{4}. Checking it again, we see that all is well. So it is \boxed{5}.", "5", "boxed"),
    (r"\boxed{4}, thus \boxed{4}", "4", "boxed"),
    (r"\boxed{\boxed{4}}", "4", "boxed"),
    (r"it is \boxed{12", "", "boxed"),  # cut by the end: 123 may have been meant
    ("it is $\\boxed{12$ and that is all.", "12", "boxed"),
    ("<answer> (1+2)*3 </answer>", "(1+2)*3", "tags"),
    ("<answer>first</answer> <answer>$\\boxed{7}$</answer>", "7", "tags"),
    ("<|begin_of_box|>42<|end_of_box|>", "42", "tags"),
    ("<think>\\boxed{1}</think> The answer is $\\frac{1}{2}$. I hope it is correct.", r"$\frac{1}{2}$", "phrase"),
    ("**Final Answer**\n\n$$x = 3$$", "x = 3", "phrase"),
    ("Final Answer: The largest $n$ is 34.", "34", "phrase"),
    ("Final Answer: Jane started growing Sphere 3 hours ago.", "3", "phrase"),
    ("45 miles per hour", "45 miles per hour", "bare"),
    (r"x = 3 \text{ or } x = 4", r"x = 3 \text{ or } x = 4", "bare"),
    ("We add them.\nTherefore, the probability that Alice wins the game is 2/3.", "2/3", "last"),
    ("So, the ordered pair $(x, y)$ that solves the system is $(7, 6)$.", "$(7, 6)$", "last"),
    ("I do not know what to say about this at all", None, None),
]


@pytest.mark.parametrize(("text", "answer", "rule"), FOUND)
def test_where_an_answer_stands(text, answer, rule):
    found, how = find(text)
    assert found == answer
    assert rule is None or how == rule


def test_a_task_says_which_places_count():
    assert find("The answer is 4.", ("boxed",)) == (None, "none")
    assert find("The answer is 4, no: \\boxed{5}", ("phrase", "boxed"))[1] == "phrase"
    with pytest.raises(UserError, match="no rule 'end'"):
        checked(Task(extract=("end",)))  # type: ignore[arg-type]


# ---------------------------------------------------------------- hostile texts

MILLION = 1_000_000
HOSTILE = ["1" * MILLION, "x" * MILLION, "(" * MILLION, "{" * 10_000 + "1" + "}" * 10_000,
           r"\frac{" * 10_000, "$" * MILLION,
           r"\boxed{" * 10_000 + "1" + "}" * 10_000, r"\boxed{1} " * 100_000, "1+" * 500_000 + "1",
           r"\text{" * 100_000, "**" * 500_000,
           "answer is " * 100_000, "<answer>" * 100_000, "√" * MILLION, "½" * MILLION, "1," * 500_000,
           r"9^{9^{9^{9}}}", r"(10^9)!",
           r"\binom{10^9}{5\cdot10^8}", r"\sum_{k=1}^{10^9}\frac{1}{k^2}",
           "(x+y+z)^{500}", r"\prod_{k=1}^{100000}k", "1e1000000000",
           r"\sin(10^{100000})", r"\int_0^1\frac{x^{50}\sin(x^{20})}{1+e^{x^3}}dx", "-" * 5000 + "1",
           "5 " + "a " * 3000,
           r"\sqrt{2+" * 40 + "2" + "}" * 40, r"__import__('os').system('false')"]


def test_hostile_texts_are_wrong_and_end_within_the_limit():
    with_limit = MathJudge(1.0, workers=2)
    before = time.process_time()
    found = with_limit.decide(["7"] * len(HOSTILE) * 2, [*HOSTILE, *(rf"So \boxed{{{text}}}" for text in HOSTILE)])
    assert time.process_time() - before < 20  # of this process, for 58 texts
    assert {decision.verdict for decision in found} == {Verdict.WRONG}
    assert max(decision.ms for decision in found) < 1200
    assert with_limit.decide(["4"], [r"\boxed{2+2}"])[0].verdict is Verdict.CORRECT
    with_limit.close()


# ---------------------------------------------------------------- puzzles, patterns

COUNT = json.dumps({"numbers": [47, 76, 55, 60], "target": 24})


@pytest.mark.parametrize(("answer", "rule"), [
    ("<answer> ((76 - 47) + 55) - 60 </answer>", "target"),
    ("<answer>55 - (60 - 76 + 47) = 24</answer>", "target"),
    ("<answer>76-47+55-60+0</answer>", "not each number once"),
    ("<answer>76-47</answer>", "not each number once"),
    ("<answer>76+47+55+60</answer>", "not the target"),
    ("<answer>76**47</answer>", "no expression"),
    ("<answer>__import__('os')</answer>", "no expression"),
    ("<answer>76/(47-47)+55+60</answer>", "no expression"),
    ("<answer>" + "(" * 100 + "76" + ")" * 100 + "</answer>", "no expression"),
    ("76 - 47 + 55 - 60", "no answer"),
    ("<think><answer>76 - 47 + 55 - 60</answer>", "no answer"),
])
def test_countdown(answer, rule):
    decision = puzzles.PuzzleJudge(puzzles.countdown).decide([COUNT], [answer])[0]
    assert decision.rule == rule
    assert (decision.verdict is Verdict.CORRECT) == (rule == "target")


def test_countdown_is_exact():
    assert puzzles.evaluate("(1+2)/3*6") == 6
    assert puzzles.evaluate("8/(3-8/3)") == 24  # by fractions, where floats would miss it
    assert puzzles.evaluate("-2*-(3)") == 6


STATEMENTS = ("(('not', ('telling-truth', 2)), ('or', ('telling-truth', 1), ('lying', 2)), "
              "('<=>', ('telling-truth', 1), ('lying', 1)))")
KNIGHTS = {"names": ["Amelia", "Penelope", "Evelyn"], "statements": STATEMENTS}


@pytest.mark.parametrize(("answer", "right"), [
    ("(1) Amelia is a knight\n(2) Penelope is a knight\n(3) Evelyn is a knave", True),
    ("Evelyn is a knave, Amelia is a knight, Penelope is a knight.", True),
    ("Amelia: knight, Penelope: knight, Evelyn: knave", True),
    ("Amelia is a knight, Penelope is a knight, Evelyn is a knight", False),
    ("Amelia is a knight, Penelope is a knight", False),
    ("Amelia is a knight, Amelia is a knave, Penelope is a knight, Evelyn is a knave", False),
])
def test_knights_and_knaves(answer, right):
    for truth in (KNIGHTS, {"names": KNIGHTS["names"], "solution": [True, True, False]}):
        decision = puzzles.PuzzleJudge(puzzles.knights).decide([json.dumps(truth)], [f"<answer>{answer}</answer>"])[0]
        assert (decision.verdict is Verdict.CORRECT) == right


def test_a_broken_puzzle_is_an_error():
    judged = puzzles.PuzzleJudge(puzzles.knights)
    for truth in ("", "{}", json.dumps({"names": ["A"], "statements": "(('maybe', 0),)"})):
        decision = judged.decide([truth], ["<answer>A is a knight</answer>"])[0]
        assert decision.verdict is Verdict.ERROR
        assert "cannot be read" in decision.rule


def test_patterns_match_whole_answers_within_the_limit():
    judged = build_judge(Task("regex"), 0.3, 1)
    golds = [r"\d{3}", r"\d{3}", r"(a+)+b", "("]
    texts = ["the answer is 123", "1234", "a" * 40, "x"]
    found = judged.decide(golds, texts)
    judged.close()
    assert [decision.verdict for decision in found] == [Verdict.CORRECT, Verdict.WRONG, Verdict.WRONG, Verdict.ERROR]
    assert found[2].rule == "out of time or memory"


# ---------------------------------------------------------------- the command


def grade(capsys, *arguments: str) -> tuple[list[dict], str]:
    assert main(["grade", *arguments]) == 0
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def test_grade_one_pair(capsys):
    rows, err = grade(capsys, "--gold", r"\frac{1}{2}", "--prediction", r"The answer is \boxed{0.5}.")
    assert [set(row) for row in rows] == [{"verdict", "extracted", "how", "rule", "ms"}]
    assert (rows[0]["verdict"], rows[0]["extracted"], rows[0]["rule"], err) == ("correct", "0.5", "number", "")


def test_grade_a_file_in_order_with_tasks(capsys, tmp_path):
    lines = [{"gold": "4", "prediction": r"\boxed{4}"}, {"gold": "4", "prediction": "5"}, {"gold": "",
             "prediction": "5"},
             {"gold": json.loads(COUNT), "prediction": "<answer>76-47+55-60</answer>", "task": "countdown"},
             {"gold": "4", "prediction": "The answer is 4.", "task": {"extract": ["boxed"]}},
             {"gold": "3.14", "prediction": "3.15", "task": {"tolerance": 0.01}}, {"gold": 7, "prediction": "7"},
             {"prediction": "5"}, {"gold": "1", "prediction": "1", "task": "chess"}]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\nno json\n\n")
    rows, err = grade(capsys, str(path), "--workers", "1")
    assert [row["verdict"] for row in rows] == ["correct", "wrong", "error", "correct", "wrong", "correct", "correct",
                                                "error", "error", "error"]
    assert "needs the fields gold and prediction" in rows[7]["rule"]
    assert "no verifier 'chess'" in rows[8]["rule"]
    assert "10 graded" in err
    assert "4 correct" in err


@pytest.mark.parametrize(("arguments", "says"), [
    ([], "name a FILE"), (["a.jsonl", "--gold", "1", "--prediction", "1"], "name a FILE"),
    (["--gold", "1"], "name a FILE"),
    (["nowhere.jsonl"], "cannot be read"),
    (["--gold", "1", "--prediction", "1", "--task", "chess"], "no verifier 'chess'"),
    (["--gold", "1", "--prediction", "1", "--extract", "middle"], "no rule 'middle'"),
    (["--gold", "1", "--prediction", "1", "--tolerance", "2"], "tolerance"),
])
def test_grade_mistakes(capsys, arguments, says):
    assert main(["grade", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_grade_streams_from_standard_input():
    line = json.dumps({"gold": "1", "prediction": "1"})
    done = subprocess.run([sys.executable, "-m", "bridgelm", "grade", "-"], input=line + "\n", text=True,
                          capture_output=True, check=True)
    assert json.loads(done.stdout)["verdict"] == "correct"


# ---------------------------------------------------------------- nothing is evaluated as Python


def test_no_grader_file_evaluates_text():
    for path in (ROOT / "src" / "bridgelm" / "verify").glob("*.py"):
        text = path.read_text()
        for word in (" eval(", " exec(", "sympify(", "parse_expr(", "lambdify(", "math_verify.parse(", "sympy.S("):
            assert word not in text, f"{path.name} uses {word}"


# ---------------------------------------------------------------- real cases


def test_exceptions_are_ruled_one_by_one():
    rows = [json.loads(line) for line in (ROOT / "benchmarks" / "grader_exceptions.jsonl").read_text().splitlines()]
    assert len({(row["source"], row["gold"], row["prediction"]) for row in rows}) == len(rows)
    label = {True: "correct", False: "wrong"}
    assert all(row["ruling"] and row["ours"] != label[row["label"]] for row in rows)
    assert {row["kind"] for row in rows} <= {"order", "decimal comma", "format", "tolerance", "two answers", "names",
                                            "contradiction", "no gold"}


@pytest.mark.skipif(not SHARED, reason="BRIDGELM_DATA names no folder with labelled cases")
def test_no_false_accept_on_labelled_cases():
    rows = [json.loads(line) for line in (ROOT / "benchmarks" / "grader_exceptions.jsonl").read_text().splitlines()]
    disputed = {(row["source"], row["gold"], row["prediction"]) for row in rows}
    cases = [json.loads(line) for path in sorted((Path(SHARED or "") / "grader").glob("*.jsonl"))
             for line in path.read_text(encoding="utf-8").splitlines()]
    cases = [case for case in cases if case["expected"] is not None
             and (case["source"], case["gold"][-120:], case["prediction"][-120:]) not in disputed]
    with Grader(workers=2) as grader:
        found = list(grader.grade_lines(json.dumps(case) for case in cases))
    pairs = list(zip(cases, found, strict=True))
    assert [case for case, d in pairs if d.verdict is Verdict.CORRECT and not case["expected"]] == []
    rejected = [case for case, d in pairs if d.verdict is not Verdict.CORRECT and case["expected"]]
    assert len(rejected) <= 0.01 * len(cases)


def test_a_sample_of_the_generated_cases():
    made = import_module("grader_cases")
    source = made.generate(20)
    cases = [next(source) for _ in range(400)]
    assert {case.kind for case in cases} == {maker.__name__ for maker in made.MAKERS}
    wrong = [case for case in cases if judge(spell(case.gold), spell(case.prediction))[0] != case.equal]
    assert wrong == []


def test_the_adversary_finds_a_hole_that_is_there():
    adversary = import_module("grader_adversary")
    numbers = re.compile(r"\d+")

    def careless(golds: list[str], texts: list[str]) -> list[bool]:  # digits alone
        return [numbers.findall(gold) == numbers.findall(text) for gold, text in zip(golds, texts, strict=True)]

    assert adversary.search(careless, 0.03, 0)["false_accepts"]


def import_module(name: str):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    return importlib.import_module(name)


def test_seeded_shuffles_of_lists_are_equal_and_one_digit_off_is_not():
    draw = random.Random(3)
    for _ in range(50):
        numbers = [draw.randint(-99, 99) for _ in range(draw.randint(2, 6))]
        gold = ", ".join(map(str, numbers))
        draw.shuffle(numbers)
        assert judge(gold, spell(" and ".join(map(str, numbers))))[0]
        numbers[0] += 1
        assert not judge(gold, ", ".join(map(str, numbers)))[0]
