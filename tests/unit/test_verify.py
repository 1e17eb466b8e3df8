"""Verdicts: where the answer is, what equals it, what kills a worker, and how reward functions add up."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bridgelm.config.run_config import RewardConfig
from bridgelm.errors import UserError
from bridgelm.types import Grade, Problem, Verdict
from bridgelm.verify import build_verifier, exact
from bridgelm.verify.early import Early
from bridgelm.verify.extract import anchored, balanced, boxed, find, last_maths, outside_think
from bridgelm.verify.math.grader import MathJudge
from bridgelm.verify.pool import GOLD_EXHAUSTS, Outcome, Pool

SHARED = os.environ.get("BRIDGELM_DATA")
SLOW = r"\boxed{\sum_{k=1}^{4000} \sin(k)^{k}}"
HANG = r"\boxed{\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}}"


def task(answer: str | None, **columns) -> Problem:
    return Problem("p", ({"role": "user", "content": "q"},), answer, columns=columns)


# ---------------------------------------------------------------- extraction


@pytest.mark.parametrize(("text", "left"), [
    ("a <think>b</think> c", "a  c"),
    ("<think>b", ""),
    ("a <think>b", "a "),
    ("b</think> c", " c"),  # the prompt had opened it
    ("<think>b <think> d</think> c", " c"),
    ("<think>b</think>c<think>d</think>e", "ce"),
    ("a<think>b</think>c</think>d", "d"),
    ("plain", "plain"),
])
def test_thoughts_are_no_answers(text, left):
    assert outside_think(text) == left


@pytest.mark.parametrize(("text", "found"), [
    (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
    (r"\boxed 5 .", "5"),
    (r"\fbox{7}", "7"),
    (r"\boxed{4} or \boxed{5", "4"),  # cut short: the last complete one
    (r"\boxed{}", ""),
    ("no box", None),
    (r"\boxedfoo{3}", None),
])
def test_boxes(text, found):
    assert boxed(text) == found


def test_other_places_of_an_answer():
    assert anchored("The answer is 3.14. Done.") == "3.14"
    assert anchored("Answer: **12**\nbye") == "12"
    assert anchored("nothing") is None
    assert last_maths("so $x=2$ and 7 then $y$ ok") == "y"
    assert last_maths("costs 1,200.50 in all") == "1,200.50"
    assert find("first $2$. The answer is $4$ or $5$.") == ("$4$ or $5$", "phrase")
    assert find(r"The answer is 3, so \boxed{4}") == ("4", "boxed")
    assert find("<think>\\boxed{4}</think>") == (None, "none")
    assert balanced(r"\frac{1}{2}\}")
    assert not balanced("1}{")


@pytest.mark.parametrize("piece", [r"\boxed{", r"\(", r"\[", "$", "answer is ", "<think>", "1,", "{", "answer "])
def test_extraction_is_linear_on_hostile_text(piece):
    text = piece * 100_000
    start = time.process_time()
    find(text)
    exact.prediction(text)
    assert time.process_time() - start < 5


SOLUTION = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = <<48+24=72>>72 clips.\n#### {}"


@pytest.mark.parametrize(("gold", "text", "right"), [
    (SOLUTION.format("72"), r"so \boxed{72}", True),
    (SOLUTION.format("72"), "The answer is 73.", False),
    (SOLUTION.format("72"), SOLUTION.format("72").replace("24", "23"), True),
    (SOLUTION.format("1,072"), "1072", True),
    (SOLUTION.format("$1,072"), r"\boxed{1072}", True),
    (SOLUTION.format("72 clips"), "#### 72", True),
    ("x\n#### -3.50", "-7/2", True),
    ("5", "reasoning\n#### 6", False),
    ("5", "#### Step 1\n3 and 2 are to be added.\nThe answer is 5.", True),
])
def test_the_form_of_gsm8k(gold, text, right):
    judge = MathJudge(1.0, 1)
    found = judge.decide([gold], [text])[0]
    judge.close()
    assert found.verdict is (Verdict.CORRECT if right else Verdict.WRONG)


def test_a_gold_of_prose_in_which_no_answer_stands_is_an_error():
    with build_verifier(RewardConfig(verifier="math")) as verifier:
        grades = verifier.grade([task("We have three cats\nand they are all here")], ["3"])
        assert grades == [Grade(0.0, Verdict.ERROR)]
        assert "a text of several lines" in verifier.last_error


# ---------------------------------------------------------------- exact and toy


@pytest.mark.parametrize(("answer", "text", "verdict"), [
    ("Blue", "thinking\nThe answer is blue.", Verdict.CORRECT),
    ("Blue", "blue", Verdict.CORRECT),
    ("Blue", "not blue", Verdict.WRONG),
    ("Blue", "blue\nor red", Verdict.WRONG),
    ("12", "\\boxed{12} is it", Verdict.CORRECT),
    ("12", "12.5", Verdict.WRONG),
    ("Blue", "<think>blue", Verdict.WRONG),
    ("Blue", "", Verdict.WRONG),
    (None, "blue", Verdict.ERROR),
])
def test_exact(answer, text, verdict):
    with build_verifier(RewardConfig(verifier="exact")) as verifier:
        assert verifier.grade([task(answer)], [text]) == [Grade(float(verdict is Verdict.CORRECT), verdict)]


def test_toy():
    from bridgelm.data import toy

    problem = toy.load("hops", train_size=5, demo_size=1, eval_size=1)["train"][0]
    with build_verifier(RewardConfig(verifier="toy")) as verifier:
        grades = verifier.grade([problem, problem], [problem.answer or "", "nonsense"])
    assert [g.verdict for g in grades] == [Verdict.CORRECT, Verdict.WRONG]


# ---------------------------------------------------------------- math


@pytest.fixture(scope="module")
def math():
    with build_verifier(RewardConfig(verifier="math", time_limit=0.7)) as verifier:
        yield verifier


MATH = [
    ("4", r"so \boxed{4}", Verdict.CORRECT),
    ("4", r"so \boxed{5}", Verdict.WRONG),
    (r"\frac{1}{2}", r"\boxed{0.5}", Verdict.CORRECT),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3,\pi/2)}", Verdict.CORRECT),
    ("50", r"\boxed{50°}", Verdict.CORRECT),
    ("-5", r"\boxed{−5}", Verdict.CORRECT),
    ("1200", "The answer is $\\$1{,}200$.", Verdict.CORRECT),
    (r"We get $\boxed{7}$.", "7", Verdict.CORRECT),
    ("Evelyn", r"\boxed{\text{Evelyn}}", Verdict.CORRECT),
    ("4", "The answer is $4$ or $5$.", Verdict.WRONG),
    ("4", r"<think>\boxed{4}", Verdict.WRONG),
    ("4", r"The answer is \boxed{4", Verdict.WRONG),
    ("4", r"\boxed{}", Verdict.WRONG),
    ("4", "I do not know", Verdict.WRONG),
    (r"\frac{1}{2^{99}}", r"\boxed{\frac{1}{2^{98}}}", Verdict.WRONG),  # both are 0 to six decimals
    (r"\frac{1}{2^{99}}", r"\boxed{2^{-99}}", Verdict.CORRECT),
    ("1", r"\boxed{" + "0" * 1100 + "1}", Verdict.WRONG),  # equal, but no answer is that much longer than the gold
    ("5", r"\boxed{" + "(" * 400 + "5" + ")" * 400 + "}", Verdict.WRONG),
    ("", r"\boxed{5}", Verdict.ERROR),  # no gold: nobody's fault but the data's
]


def test_math(math):
    grades = math.grade([task(gold) for gold, _, _ in MATH], [text for _, text, _ in MATH])
    assert [(gold, text, grade.verdict) for (gold, text, _), grade in zip(MATH, grades, strict=True)] == MATH


def test_a_hang_costs_its_limit_is_wrong_and_harms_no_other(math):
    texts = [HANG, r"\boxed{1}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{1}", SLOW]
    before = math.counts["exhausted"]
    start = time.monotonic()
    verdicts = [g.verdict for g in math.grade([task("1")] * 5, texts)]
    assert verdicts == [Verdict.WRONG, Verdict.CORRECT, Verdict.WRONG, Verdict.CORRECT, Verdict.WRONG]
    assert math.counts["exhausted"] >= before + 1
    assert time.monotonic() - start < 60


def test_grading_works_from_threads(math):
    found: list[Verdict] = []

    def work(number: int) -> None:
        found.extend(g.verdict for g in math.grade([task(str(number))], [rf"\boxed{{{number}}}"]))

    threads = [threading.Thread(target=work, args=(100 + i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [Verdict.CORRECT] * 6


# ---------------------------------------------------------------- the pool

TARGET = '''
import os, signal, time

def act(task, gold_is_good):
    if task["gold"] == "good":
        gold_is_good()
    what = task["prediction"]
    if what == "spin":
        while True: pass
    if what == "big integer":
        return len(str(7 ** (10 ** 9)))
    if what == "memory":
        return len(bytes(4 << 30))
    if what == "hidden memory":
        try:
            bytes(4 << 30)
        except MemoryError:
            raise ValueError("wrapped")
    if what == "deep":
        def down(n): return down(n + 1)
        down(0)
    if what == "raise":
        raise ValueError("no")
    if what == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit":
        os._exit(3)
    if what == "print":
        print("noise on stdout")
        os.write(1, b"more noise\\n")
    if what == "sleep":
        time.sleep(1.0)
    if what == "pid":
        return os.getpid()
    return what
'''


@pytest.fixture(scope="module")
def make_pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    (folder / "pool_target.py").write_text(TARGET)
    return lambda: Pool("pool_target:act", cpu_seconds=0.3, memory_mb=1024, size=2, paths=[str(folder)])


@pytest.fixture(scope="module")
def pool(make_pool):
    with make_pool() as made:
        yield made


@pytest.fixture
def fresh(make_pool):
    with make_pool() as made:
        yield made


def outcomes(pool: Pool, *predictions: str, gold: str = "good") -> list[Outcome]:
    return pool.run([{"gold": gold, "prediction": p} for p in predictions])


def test_results_come_in_order_and_no_worker_starts_before_the_first_task(fresh):
    assert fresh.counts["started"] == 0
    assert [o.result for o in outcomes(fresh, *map(str, range(20)))] == [str(i) for i in range(20)]
    assert fresh.counts["started"] <= 2


@pytest.mark.parametrize("what", ["spin", "big integer", "memory", "hidden memory", "deep", "segv"])
def test_exhaustion_is_told_from_error_and_spares_the_rest(pool, what):
    before = pool.counts["exhausted"]
    texts = [f"{n} beside {what}" for n in "abc"]
    found = outcomes(pool, texts[0], what, *texts[1:])
    assert found == [Outcome(texts[0]), Outcome(exhausted=True), Outcome(texts[1]), Outcome(texts[2])]
    assert pool.counts["exhausted"] == before + 1


@pytest.mark.parametrize("what", ["spin", "memory", "segv"])
def test_exhaustion_before_the_gold_is_understood_is_an_error(pool, what):
    assert outcomes(pool, what, gold="unread") == [Outcome(error=GOLD_EXHAUSTS)]


@pytest.mark.parametrize("what", ["raise", "killed", "exit"])
def test_other_faults_are_errors_and_are_not_remembered(pool, what):
    found = outcomes(pool, what, f"beside {what}")
    assert found[0].error
    assert found[1] == Outcome(f"beside {what}")
    before = pool.counts["cached"]
    outcomes(pool, what)
    assert pool.counts["cached"] == before


def test_cpu_time_counts_and_not_wall_time(pool):
    assert outcomes(pool, "sleep")[0].result == "sleep"  # three times the limit, asleep


def test_noise_on_stdout_does_not_mix_with_answers(pool):
    assert [o.result for o in outcomes(pool, "print", "x")] == ["print", "x"]


def test_equal_tasks_run_once_and_closing_ends_the_workers(fresh):
    first = outcomes(fresh, "pid", "pid")
    assert first[0] == first[1]
    assert outcomes(fresh, "pid") == first[:1]
    assert (fresh.counts["run"], fresh.counts["cached"]) == (1, 2)
    pid = first[0].result
    os.kill(pid, 0)
    fresh.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_target_that_cannot_be_imported_is_a_user_error():
    with Pool("no_such_module:act") as pool, pytest.raises(UserError, match=r"cannot start.*no_such_module"):
        outcomes(pool, "a")


# ---------------------------------------------------------------- reward functions

FUNCTIONS = '''
seen = {}

def length(prompts, completions, **columns):
    seen.update(columns, prompts=prompts, completions=completions)
    return [float(len(c)) for c in completions]

def some(completions, kind, **kwargs):
    return [1.0 if k == "yes" else 0.0 if k == "no" else None for k in kind]

def narrow(prompts, completions, answer):
    return [float(a in c) for a, c in zip(answer, completions)]

def chatty(prompts, completions, **kwargs):
    return [float(p[-1]["content"] == "q" and c[0]["content"] == "a") for p, c in zip(prompts, completions)]

def broken(completions, **kwargs):
    raise RuntimeError("database is down")

def short(completions, **kwargs):
    return [1.0]

def undefined(completions, **kwargs):
    return [float("nan"), 1.0]
'''


@pytest.fixture
def functions(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(FUNCTIONS)

    def grade(verifier: str, names: list[str], problems: list[Problem], texts: list[str], weights=()) -> list[Grade]:
        config = RewardConfig.model_validate({"verifier": verifier, "functions": [f"{path}:{n}" for n in names],
                                              "weights": list(weights)})
        with build_verifier(config) as made:
            return made.grade(problems, texts)

    return grade


def test_functions_are_added_to_the_verifier(functions):
    problems = [task("a", kind="yes"), task("b", kind="?")]
    grades = functions("exact", ["length", "some"], problems, ["a", "xyz"], [0.1, 2])
    assert [g.reward for g in grades] == pytest.approx([1 + 0.1 + 2, 0.3])
    assert [g.verdict for g in grades] == [Verdict.CORRECT, Verdict.WRONG]  # the verifier's alone


def test_functions_alone_decide_over_half_of_the_weight_that_had_an_opinion(functions):
    kinds = ["yes", "no", "?"]
    problems = [task("a", kind=k) for k in kinds]
    assert functions("none", ["some"], problems, ["x"] * 3) == [
        Grade(1.0, Verdict.CORRECT), Grade(0.0, Verdict.WRONG), Grade(0.0, Verdict.ERROR)]  # nobody knows the third
    both = functions("none", ["some", "narrow"], problems, ["x", "x", "a"])
    assert both == [Grade(1.0, Verdict.WRONG), Grade(0.0, Verdict.WRONG), Grade(1.0, Verdict.CORRECT)]


def test_functions_get_columns_and_strings(functions, tmp_path):
    with build_verifier(RewardConfig(verifier="none", functions=[f"{tmp_path / 'rewards.py'}:length"])) as verifier:
        verifier.grade([task("1", kind="k"), task("2", other=[3])], ["a", "bb"])
        seen = verifier._functions[0]._function.__globals__["seen"]  # type: ignore[attr-defined]
    assert seen == {"prompts": ["q", "q"], "completions": ["a", "bb"], "answer": ["1", "2"], "kind": ["k", None],
                    "other": [None, [3]], "difficulty": [None, None]}


def test_conversational_rows_give_messages(functions):
    problem = Problem("p", ({"role": "user", "content": "q"},), "a", conversational=True)
    assert functions("none", ["chatty"], [problem], ["a"]) == [Grade(1.0, Verdict.CORRECT)]


@pytest.mark.parametrize("name", ["broken", "short"])
def test_a_failing_function_is_an_error_of_the_whole_call(functions, name):
    assert functions("exact", [name], [task("a")] * 2, ["a", "b"]) == [Grade(0.0, Verdict.ERROR)] * 2


def test_a_fault_of_the_verifier_leaves_no_reward_of_the_functions(functions):
    assert functions("exact", ["length"], [task(None)], ["abc"]) == [Grade(0.0, Verdict.ERROR)]


def test_an_undefined_reward_is_an_error_of_its_completion(functions):
    assert [g.verdict for g in functions("exact", ["undefined"], [task("a")] * 2, ["a", "a"])] == [
        Verdict.ERROR, Verdict.CORRECT]


def test_faults_are_counted_and_told(functions, tmp_path):
    config = RewardConfig(verifier="exact", functions=[f"{tmp_path / 'rewards.py'}:broken"])
    with build_verifier(config) as verifier:
        verifier.grade([task("a")] * 2, ["a", "b"])
        verifier.grade([task("a")], ["a"])
        assert verifier.counts["graded"] == verifier.counts["error"] == 3
        assert "database is down" in verifier.last_error


FAULTY = '''
import sys

def leaves(completions, **kwargs):
    sys.exit(0)

def interrupts(completions, **kwargs):
    raise KeyboardInterrupt

def text(completions, **kwargs):
    return "1" * len(completions)

def table(completions, **kwargs):
    return {i: 1.0 for i, _ in enumerate(completions)}

def unordered(completions, **kwargs):
    return set(completions)

async def later(completions, **kwargs):
    return [1.0 for c in completions]

def nothing(completions, **kwargs):
    pass

def long(completions, **kwargs):
    return [1.0] * 3

def lazy(completions, **kwargs):
    for c in completions:
        yield 1 / len(c[:0])

class Stop(BaseException):
    pass

def stops(completions, **kwargs):
    raise Stop("enough")

def words(completions, **kwargs):
    return ["1", 1.0]

def infinite(completions, **kwargs):
    return [float("-inf"), 1.0]

def huge(completions, **kwargs):
    return [10**400, 1.0]

def silent(completions, **kwargs):
    return [None, 1.0]
'''


@pytest.mark.parametrize(("name", "line", "says", "failed"), [
    ("leaves", 5, "it called sys.exit(0)", 2),
    ("interrupts", 8, "raised KeyboardInterrupt, and nobody pressed Ctrl-C", 2),
    ("text", 10, "returned '11' (str), not a list of 2 rewards", 2),
    ("table", 13, "(dict), not a list of 2 rewards", 2),
    ("unordered", 16, "(set), not a list of 2 rewards", 2),
    ("later", 19, "(coroutine), not a list of 2 rewards", 2),
    ("nothing", 22, "returned None (NoneType), not a list of 2 rewards", 2),
    ("long", 25, "returned 3 rewards for 2 completions", 2),
    ("lazy", 30, "ZeroDivisionError", 2),
    ("stops", 36, "Stop: enough", 2),
    ("words", 38, "returned '1' (str) as a reward, which is no number", 1),
    ("infinite", 41, "returned -inf as a reward, which is no finite number", 1),
    ("huge", 44, "OverflowError", 2),
    ("silent", 47, "returned None, which is no opinion", 1),
])
def test_a_fault_names_function_line_sample_and_what_is_wrong(tmp_path, name, line, says, failed):
    path = tmp_path / "faulty.py"
    path.write_text(FAULTY)
    problem = task("a")
    with build_verifier(RewardConfig(verifier="none", functions=[f"{path}:{name}"])) as verifier:
        grades = verifier.grade([problem, problem], ["x" * 300, "y"])
        fault = verifier.last_error
    assert [grade.verdict for grade in grades] == [Verdict.ERROR, Verdict.ERROR if failed == 2 else Verdict.CORRECT]
    for part in (f"reward function {name} ({path}", "problem 'p', completion 'xxx", says):
        assert part in fault
    assert f"line {line})" in fault or name == "huge"
    assert "x" * 100 not in fault


def test_ctrl_c_within_a_reward_function_is_the_users(tmp_path):
    path = tmp_path / "slow.py"
    path.write_text("import os, signal\ndef f(completions, **kwargs):\n    os.kill(os.getpid(), signal.SIGINT)\n"
                    "    return [1.0 for _ in completions]\n")
    made = build_verifier(RewardConfig(verifier="none", functions=[f"{path}:f"]))
    with made, pytest.raises(KeyboardInterrupt):
        made.grade([task("a")], ["a"])


def test_what_a_function_changes_or_prints_reaches_nobody_else(tmp_path, capsys):
    path = tmp_path / "careless.py"
    path.write_text("def f(prompts, completions, marks, **kwargs):\n    print('looking')\n"
                    "    found = [float(len(m)) for m in marks]\n    marks[0].append(1)\n    prompts[0][0].clear()\n"
                    "    completions.clear()\n    return found\n")
    problem = Problem("p", ({"role": "user", "content": "q"},), "a", columns={"marks": [3]}, conversational=True)
    with build_verifier(RewardConfig(verifier="none", functions=[f"{path}:f"] * 2)) as verifier:
        for _ in range(2):
            assert [grade.reward for grade in verifier.grade([problem] * 2, ["a", "b"])] == [2.0, 2.0]
    assert problem.columns == {"marks": [3]}
    assert problem.messages == ({"role": "user", "content": "q"},)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("looking") == 4
    assert err.count("prints; what it prints goes to standard error") == 1


def test_a_file_that_leaves_while_it_is_loaded_is_named(tmp_path):
    (tmp_path / "script.py").write_text("import sys\ndef f(completions): return []\nsys.exit(0)\n")
    with pytest.raises(UserError, match="cannot be loaded: SystemExit"):
        build_verifier(RewardConfig(verifier="none", functions=[f"{tmp_path / 'script.py'}:f"]))


@pytest.mark.parametrize(("spec", "says"), [
    ("rewards.py", "write it as path/to/file.py:function"),
    ("nowhere.py:f", "does not exist"),
    ("{path}:lenth", "has no function 'lenth'; it has length, some"),
    ("{bad}:f", "cannot be loaded: SyntaxError"),
])
def test_functions_that_cannot_be_loaded(functions, tmp_path, spec, says):
    (tmp_path / "bad.py").write_text("def f(:\n")
    spec = spec.format(path=tmp_path / "rewards.py", bad=tmp_path / "bad.py")
    with pytest.raises(UserError) as caught:
        build_verifier(RewardConfig(verifier="none", functions=[spec]))
    assert says in str(caught.value)


# ---------------------------------------------------------------- real answers


@pytest.mark.skipif(not SHARED, reason="BRIDGELM_DATA names no folder with real sets")
def test_real_golds_equal_themselves_and_not_their_neighbours():
    lines = (Path(SHARED or "") / "eval" / "math500.jsonl").read_text(encoding="utf-8").splitlines()
    golds = [json.loads(line)["answer"] for line in lines][::8]
    judge = MathJudge(2.0, workers=2)
    same = judge.judged([task(gold) for gold in golds], [rf"So \boxed{{{gold}}}." for gold in golds])
    others = judge.judged([task(gold) for gold in golds], [rf"\boxed{{{gold}}}" for gold in golds[1:] + golds[:1]])
    judge.close()
    assert [gold for gold, found in zip(golds, same, strict=True) if found.verdict is not Verdict.CORRECT] == []
    shifted = zip(golds, golds[1:] + golds[:1], others, strict=True)
    assert [(a, b) for a, b, found in shifted if found.verdict is Verdict.CORRECT and a != b] == []


def test_reward_files_may_hold_dataclasses_and_import_siblings(tmp_path):
    from bridgelm.verify.functions import load_function

    (tmp_path / "sibling_helper.py").write_text("SCORE = 1.0\n")
    (tmp_path / "r.py").write_text("from __future__ import annotations\nfrom dataclasses import dataclass\n"
                                   "from typing import ClassVar\nimport sibling_helper\n@dataclass\nclass A:\n"
                                   "    x: int\n    y: ClassVar[int] = 1\n"
                                   "def f(completions):\n    return [sibling_helper.SCORE for _ in completions]\n")
    assert load_function(f"{tmp_path / 'r.py'}:f")([task("a")], ["a"]) == [1.0]


# ---------------------------------------------------------------- while others are still being written

def test_answers_are_judged_while_others_are_written():
    """The engine goes on only when the verdict on its first answer is in."""
    judged: list[list[str]] = []
    seen = threading.Event()

    def judge(problems: Any, texts: Any) -> None:
        judged.append(list(texts))
        seen.set()

    with Early(judge) as early:
        early.add(task("1"), lambda: "first")
        assert seen.wait(20), "nothing was judged before the end"
        early.add(task("2"), lambda: "second")
    assert judged[0] == ["first"]


def test_what_was_judged_early_is_not_judged_again():
    judge = MathJudge(2.0, workers=1)
    golds, texts = ["x+1", "x+1", "7"], [r"\boxed{1+x}", r"\boxed{x-1}", r"\boxed{7}"]
    with Early(judge.remember) as early:
        early.add(task("x+1"), lambda: r"\boxed{1+x}")
        while judge.counts["cached"] == 0:  # as many runs as were not asked for
            time.sleep(0.01)
    runs = judge._pool.counts["run"]
    found = judge.judged([task(gold) for gold in golds], texts)
    assert [one.verdict.value for one in found] == ["correct", "wrong", "correct"]
    assert (runs, judge._pool.counts["run"], judge.counts["cached"]) == (1, 2, 0)
    judge.close()


def test_an_early_fault_is_left_to_the_whole_batch():
    def judge(problems: Any, texts: Any) -> None:
        raise UserError("no workers")

    with Early(judge) as early:
        early.add(task("1"), lambda: "first")
