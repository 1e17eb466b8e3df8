"""Each operator of `mutation` is seen to work, on a small module."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mutation import OPERATORS, Mutant

TOY = '''
LIMIT = 3

class Row:
    def with_stream(self, name, weight, norm="token", *, mask=None, at="live"):
        return (name, weight, norm, mask, at)

class Value:
    def __init__(self, x): self.x = x
    def detach(self): return Value(-self.x)

class Toy:
    rate = 0.5
    @staticmethod
    def mixed(a, b):
        """Says 2 - 1 in words, which are no code."""
        return a - b / 2
    def stream(self): return Row().with_stream("pg", 1.0, "row", mask=7, at="shadow")
    def clipped(self, x): return min(max(x, -1), 1)
    def gate(self, x): return "on" if x > 1 and x < LIMIT else "off"
    def held(self, x): return Value(Value(x).detach().x)
    def steps(self):
        seen = []
        seen.append("first")
        seen.append("second")
        return seen

def mean(values): return sum(values) / len(values)
def use(values): return mean(values), [v for v in values if v > 0]
'''


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    path = Path(tmp_path_factory.mktemp("toy")) / "toy_of_mutation.py"
    path.write_text(TOY)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SEEN: list[tuple[Mutant, str, Any]] = [
    (Mutant("sign", "Toy.mixed"), "Toy.mixed(5, 4)", 7.0),
    (Mutant("term", "Toy.mixed", 0), "Toy.mixed(5, 4)", 5),
    (Mutant("term", "Toy.mixed", 1), "Toy.mixed(5, 4)", 2.0),
    (Mutant("swap", "Toy.mixed", 0), "Toy.mixed(5, 4)", -3.0),
    (Mutant("swap", "Toy.clipped", "max 1"), "Toy().clipped(5)", 1),  # the same value
    (Mutant("denominator", "Toy.mixed"), "Toy.mixed(5, 4)", 1),
    (Mutant("denominator", "Toy.stream", to="constant"), "Toy().stream()[2]", "constant"),
    (Mutant("mask", "Toy.stream"), "Toy().stream()[3]", None),
    (Mutant("mask", "Toy.gate", 1), "Toy().gate(5)", "on"),
    (Mutant("mask", "use"), "use([1, -1])[1]", [1, -1]),
    (Mutant("detach", "Toy.held"), "Toy().held(2).x", 2),
    (Mutant("hold", "Toy.held", "detach 0"), "Toy().held(2).x", 2),  # twice minus
    (Mutant("clip", "Toy.clipped", "min 0"), "Toy().clipped(-5)", 1),
    (Mutant("clip", "Toy.clipped", "min 1"), "Toy().clipped(5)", 5),
    (Mutant("snapshot", "Toy.stream"), "Toy().stream()[4]", "live"),
    (Mutant("snapshot", "Toy.stream", to="reference"), "Toy().stream()[4]", "reference"),
    (Mutant("compare", "Toy.gate", 0), "Toy().gate(1)", "on"),
    (Mutant("compare", "Toy.gate", 1), "Toy().gate(0.5)", "on"),
    (Mutant("branch", "Toy.gate", 1), "Toy().gate(2)", "off"),
    (Mutant("constant", "Toy.mixed", 0, to=4), "Toy.mixed(5, 4)", 4.0),
    (Mutant("constant", "LIMIT", to=9), "Toy().gate(5)", "on"),
    (Mutant("constant", "Toy.rate", to=9), "Toy.rate", 9),
    (Mutant("instead", "mean", "sum", to="max"), "use([1, 3])[0]", 1.5),
    (Mutant("undo", "use", "mean"), "use([1, 3])[0]", [1, 3]),
    (Mutant("drop", "Toy.steps", "first"), "Toy().steps()", ["second"]),
    (Mutant("drop", "Toy.stream", "mask 0"), "Toy().stream()[3]", None),
    (Mutant("late", "Toy.steps", "first"), "Toy().steps()", ["second", "first"]),
]


@pytest.mark.parametrize(("mutant", "called", "wanted"), SEEN, ids=[str(mutant) for mutant, _, _ in SEEN])
def test_operator(mutant: Mutant, called: str, wanted: Any, toy: ModuleType) -> None:
    before = eval(called, vars(toy))
    applied = Mutant(mutant.operator, mutant.where, mutant.site, mutant.to, of=toy)
    with applied.applied() as what:
        assert eval(called, vars(toy)) == wanted, what
    assert eval(called, vars(toy)) == before, "and it is gone afterwards"


def test_every_operator_is_tried_above() -> None:
    assert {mutant.operator for mutant, _, _ in SEEN} == set(OPERATORS)


@pytest.mark.parametrize(("mutant", "words"), [
    (Mutant("sign", "Toy.gone"), "no function or constant"),
    (Mutant("detach", "Toy.mixed"), "0 sites"),
    (Mutant("sign", "Toy.mixed", 1), "0 sites"),
    (Mutant("sign", "Toy.mixed", "b"), "0 sites"),  # a variable is no name of a site
    (Mutant("term", "Toy.mixed"), r"2 sites.*\n  0  a - b / 2 -> a\n  1  a - b / 2 -> b / 2"),
])
def test_a_place_that_is_not_one_is_reported(mutant: Mutant, words: str, toy: ModuleType) -> None:
    with pytest.raises(AssertionError, match=words):
        Mutant(mutant.operator, mutant.where, mutant.site, of=toy).check()


def test_a_mutant_that_no_check_sees_is_reported_with_its_line(toy: ModuleType) -> None:
    def check() -> None:
        assert toy.Toy.mixed(0, 0) == 0

    with pytest.raises(pytest.fail.Exception, match=r"a - b / 2 -> a [+] b / 2"):
        Mutant("sign", "Toy.mixed", of=toy, by=check).check()
    Mutant("sign", "Toy.mixed", of=toy, by=lambda: toy.Toy.mixed(0, 2) == -1 or pytest.fail("seen")).check()


def test_a_check_that_the_shipped_code_fails_sees_nothing(toy: ModuleType) -> None:
    with pytest.raises(pytest.fail.Exception, match="always"):
        Mutant("sign", "Toy.mixed", of=toy, by=lambda: pytest.fail("always")).check()


def test_a_name_or_a_layout_changes_no_mutant(tmp_path: Path, toy: ModuleType) -> None:
    path = tmp_path / "other.py"
    path.write_text(TOY.replace("(a, b)", "(one, two)").replace("a - b / 2", "(\n  one\n  - (two / 2)  # why\n)"))
    other = ModuleType("other")
    other.__file__ = str(path)
    exec(compile(path.read_text(), str(path), "exec"), vars(other))
    with Mutant("term", "Toy.mixed", 1, of=other).applied():
        assert vars(other)["Toy"].mixed(5, 4) == 2.0
