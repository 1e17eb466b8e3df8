"""Wrong versions of the shipped code, each of which a method's truth test must see.

A mutant is an operator (what goes wrong) at a place (in which function, and at which of the operator's sites there):

    MUTANTS = mutants(kdrl, Mutant("clip", "Kdrl.beta", by=schedule), Mutant("detach", "kl", by=update, of=losses))

    @pytest.mark.parametrize("mutant", MUTANTS, ids=str)
    def test_mutant_is_seen(mutant: Mutant) -> None:
        mutant.check()

`where` is the qualified name of a function of the module, or of a constant of the module. `site` says which one if the
operator has several sites there: a number (in the order of the text), or a name that occurs at the site: a called
function, an attribute, a keyword or a string, such as "apply", "mask" or "pg"; and "apply 1" is the second site with
that name. Local variables are no such names, and neither layout nor comments count: a formatter or a renamed variable
changes no mutant. A place that does not exist, or that is not the only one, fails and lists the sites that there are.

While a mutant is applied, the function itself runs the wrong code, whoever calls it: checks need no module handed to
them. `by` is the check that must fail, by an assertion: it calls the method like the test that the shipped code passes.

    python tests/truth/mutation.py     tries all mutants, and writes how many are seen to results/mutants.json
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


# -- the operators: from a node, all wrong versions of it --------------------------------------------------------------

def sign(node: ast.AST, to: Any) -> Iterator[ast.AST]:
    """a + b for a - b and the reverse; x for -x."""
    if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Add | ast.Sub):
        yield changed(node, op=ast.Sub() if isinstance(node.op, ast.Add) else ast.Add())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node.operand


def term(node: ast.AST, to: Any) -> Iterator[ast.AST]:
    """One side of a + b, a - b, a * b, a | b, without the other: first without the right one, then without the left."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.BitOr):
        yield from (node.left, node.right)


def swap(node: ast.AST, to: Any) -> Iterator[ast.AST]:
    """b - a for a - b, b / a for a / b; f(b, a) for f(a, b), as the ends of a schedule; (b, a) for a pair (a, b)."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub | ast.Div):
        yield changed(node, left=node.right, right=node.left)
    if isinstance(node, ast.Call) and len(node.args) > 1:
        yield changed(node, args=[node.args[1], node.args[0], *node.args[2:]])
    if isinstance(node, ast.Tuple) and len(node.elts) == 2 and isinstance(node.ctx, ast.Load):
        yield changed(node, elts=node.elts[::-1])


def denominator(node: ast.AST, to: Any) -> Iterator[ast.AST]:
    """a for a / b; and another denominator (`to`: token, row or constant) for a stream's."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div | ast.FloorDiv) and to is None:
        yield node.left
    if isinstance(node, ast.Call) and name_of(node.func) == "with_stream" and to is not None:
        given, others = len(node.args) > 1, [word for word in node.keywords if word.arg != "norm"]
        yield changed(node, args=[*node.args[:2], ast.Constant(to), *node.args[3:]] if given else node.args,
                      keywords=others if given else [*others, ast.keyword("norm", ast.Constant(to))])


def mask(node: ast.AST, to: Any) -> Iterator[ast.AST]:
    """Without a mask: a keyword mask or where, one side of a & b or of a and b, the condition of a comprehension."""
    if isinstance(node, ast.Call) and any(word.arg in ("mask", "where") for word in node.keywords):
        yield changed(node, keywords=[word for word in node.keywords if word.arg not in ("mask", "where")])
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        yield from (node.left, node.right)
    if isinstance(node, ast.BoolOp):
        for i in range(len(node.values)):
            left = node.values[:i] + node.values[i + 1:]
            yield changed(node, values=left) if len(left) > 1 else left[0]
    if isinstance(node, ast.comprehension) and node.ifs:
        yield changed(node, ifs=[])


def detach(node: ast.AST, to: Any) -> Iterator[ast.AST]:
    """A gradient where there is none: x for x.detach()."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "detach":
        yield node.func.value


def hold(node: ast.AST, to: Any) -> Iterator[ast.AST]:
    """No gradient where there is one: f(x).detach() for f(x)."""
    if isinstance(node, ast.Call):
        yield ast.Call(ast.Attribute(node, "detach", ast.Load()), [], [])


def clip(node: ast.AST, to: Any) -> Iterator[ast.AST]:
    """The other side: max for min; then none: the first argument, or the receiver, alone."""
    sides = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "amin": "amax", "amax": "amin"}
    if not isinstance(node, ast.Call) or not node.args + node.keywords:
        return
    name = name_of(node.func)
    if name in sides and (len(node.args) > 1 or isinstance(node.func, ast.Attribute)):
        yield changed(node, func=renamed(node.func, sides[name]))
        yield node.args[0]
    if name in ("clip", "clamp"):
        receiver = getattr(node.func, "value", None)
        yield node.args[0] if receiver is None or name_of(receiver) in ("np", "torch") else receiver
        if any(word.arg in sides for word in node.keywords):
            yield changed(node, keywords=[ast.keyword(sides.get(w.arg or "", w.arg), w.value) for w in node.keywords])


def snapshot(node: ast.AST, to: Any) -> Iterator[ast.AST]:
    """The weights of another moment: `at` without its value, which is live; or `to` for it."""
    if isinstance(node, ast.Call) and any(word.arg == "at" for word in node.keywords):
        others = [word for word in node.keywords if word.arg != "at"]
        yield changed(node, keywords=others + ([ast.keyword("at", ast.Constant(to))] if to is not None else []))


def compare(node: ast.AST, to: Any) -> Iterator[ast.AST]:
    """First the case of equality turned (>= for >), then all of it (<= for >, is not for is)."""
    edges = {ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Lt: ast.LtE, ast.LtE: ast.Lt}
    turned = {ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
              ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
    if isinstance(node, ast.Compare):
        for table in (edges, turned):
            if type(node.ops[0]) in table:
                yield changed(node, ops=[table[type(node.ops[0])](), *node.ops[1:]])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
        yield node.operand


def branch(node: ast.AST, to: Any) -> Iterator[ast.AST]:
    """Always the first branch, then always the other, of an `if`."""
    if isinstance(node, ast.IfExp):
        yield from (node.body, node.orelse)
    if isinstance(node, ast.If):
        yield from (changed(node, test=ast.Constant(value)) for value in (True, False))


def constant(node: ast.AST, to: Any) -> Iterator[ast.AST]:
    """`to` for a number, a string, a constant, or an attribute such as an option."""
    attribute = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    if attribute or (isinstance(node, ast.Constant) and node.value is not None):
        yield ast.Constant(to)


def instead(node: ast.AST, to: Any) -> Iterator[ast.AST]:
    """The function or attribute called `to` for another one: centre for leave_one_out, reward for verdict."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        yield renamed(node, to)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        yield changed(node, func=renamed(node.func, to))


def drop(node: ast.AST, to: Any) -> Iterator[ast.AST]:
    """Without a statement, which must not be the one that first names a variable; without a keyword of a call."""
    if isinstance(node, ast.stmt) and not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Return | ast.Pass):
        yield ast.Pass()
    if isinstance(node, ast.keyword):
        yield ast.keyword("", node.value)  # taken out below


def undo(node: ast.AST, to: Any) -> Iterator[ast.AST]:
    """What a call is given, for what it makes of it: x for f(x)."""
    if isinstance(node, ast.Call) and node.args:
        yield node.args[0]


OPERATORS: dict[str, Callable[[ast.AST, Any], Iterator[ast.AST]]] = {f.__name__: f for f in (
    sign, term, swap, denominator, mask, detach, hold, clip, snapshot, compare, branch, constant, instead, drop, undo)}
OPERATORS["late"] = OPERATORS["drop"]  # a statement after the one that follows it, as a step before a gradient


def changed(node: Any, **fields: Any) -> Any:
    out = copy.copy(node)
    for name, value in fields.items():
        setattr(out, name, value)
    return out


def renamed(node: ast.AST, to: str) -> ast.AST:
    return changed(node, **{"attr" if isinstance(node, ast.Attribute) else "id": to})


def name_of(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


# -- places ------------------------------------------------------------------------------------------------------------

def parsed(module: ModuleType) -> ast.Module:
    return ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))


def named(tree: ast.AST, where: str) -> ast.AST:
    """The function or the constant with this qualified name."""
    node = tree
    for name in where.split("."):
        found = [child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == name
                 or name in [name_of(t) for t in getattr(child, "targets", [getattr(child, "target", child)])]]
        assert len(found) == 1, f"{where}: no function or constant of that name"
        node = found[0]
    return node


def within(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Every place below a node, as (parent, field, index), in the order of the text; without what does not run."""
    for name, value in ast.iter_fields(node):
        if (name in ("annotation", "returns", "args") and not isinstance(node, ast.Call)) or name == "decorator_list":
            continue
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            doc = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if isinstance(child, ast.AST) and not doc and not isinstance(node, ast.JoinedStr):
                yield node, name, i if isinstance(value, list) else None
                yield from within(child)


def names(node: ast.AST) -> set[str]:
    """What a site can be named by: all but the names of variables."""
    called = {name_of(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
    return called | {str(getattr(n, key)) for n in ast.walk(node) for kind, key in (
        (ast.Attribute, "attr"), (ast.keyword, "arg"), (ast.Constant, "value")) if isinstance(n, kind)}


def said(node: ast.AST) -> str:
    return ast.unparse(node).partition("\n")[0]


def sites(tree: ast.AST, operator: str, where: str, to: Any) -> Iterator[tuple[set[str], str, Callable[[], None]]]:
    """Of each site: its names, what is put in the place of what, and a function that does it to the tree."""
    for parent, field, i in within(named(tree, where)):
        node = getattr(parent, field) if i is None else getattr(parent, field)[i]
        for new in OPERATORS[operator](node, to):
            block = list(getattr(parent, field)) if i is not None else []
            if operator == "late":
                if i is None or i + 1 >= len(block) or isinstance(node, ast.keyword):
                    continue
                what = f"{said(node)}, after {said(block[i + 1])}"
                block[i:i + 2] = block[i + 1], block[i]
            else:
                what = f"{said(node)} -> {'' if isinstance(new, ast.keyword) else said(new)}"
                if i is not None:
                    block[i:i + 1] = [] if isinstance(new, ast.keyword) else [new]
            put = new if i is None else block
            yield names(node), what, lambda parent=parent, field=field, put=put: setattr(parent, field, put)


# -- mutants -----------------------------------------------------------------------------------------------------------

PASSED: set[Callable[..., Any]] = set()


@dataclass(frozen=True)
class Mutant:
    operator: str
    where: str
    site: int | str | None = None
    to: Any = None  # what is put there, for the operators that ask for it
    by: Callable[..., Any] = lambda: None  # the check that sees it
    of: Any = None  # the module that the function is in, if it is not the method's own
    method: str = ""

    def __str__(self) -> str:
        parts = (self.method, self.operator, self.where, self.site, self.to)
        return "-".join(str(part) for part in parts if part is not None)

    def tree(self) -> tuple[ast.Module, str]:
        """The module's syntax tree with this mutant in it, and what was changed."""
        tree = parsed(self.of)
        every = list(sites(tree, self.operator, self.where, self.to))
        name, number = "", self.site
        if isinstance(self.site, str):
            name, _, last = self.site.rpartition(" ")
            name, number = (name, int(last)) if last.isdigit() else (self.site, None)
        found = [site for site in every if not name or name in site[0]]
        chosen = found if number is None else found[int(number):][:1]
        listed = "\n".join(f"  {i}  {what}" for i, (_, what, _) in enumerate(every))
        assert len(chosen) == 1, f"{self}: {len(chosen)} sites; {self.operator} has these in {self.where}:\n{listed}"
        chosen[0][2]()
        return ast.fix_missing_locations(tree), chosen[0][1]

    @contextmanager
    def applied(self) -> Iterator[str]:
        """The function runs the mutant's code, or the constant has its value, until the end; gives what was changed."""
        tree, what = self.tree()
        file = str(self.of.__file__)
        node = named(tree, self.where)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            owner: Any = self.of
            *path, name = self.where.split(".")
            for part in path:
                owner = getattr(owner, part)
            assert node.value is not None
            kept, value = getattr(owner, name), eval(compile(ast.Expression(node.value), file, "eval"), vars(self.of))
        else:
            owner, name = function(self.of, self.where), "__code__"
            kept, value = owner.__code__, code(compile(tree, file, "exec"), self.where)
        setattr(owner, name, value)
        try:
            yield what
        finally:
            setattr(owner, name, kept)

    def check(self, *fixtures: Any) -> None:
        if self.by not in PASSED:
            self.by(*fixtures)  # the shipped code passes
            PASSED.add(self.by)
        with self.applied() as what:
            try:
                self.by(*fixtures)
            except (AssertionError, pytest.fail.Exception):
                return
        pytest.fail(f"{self} passes its check: {what}")


def function(module: ModuleType, where: str) -> Any:
    found: Any = module
    for name in where.split("."):
        found = inspect.getattr_static(found, name)
        found = inspect.unwrap(getattr(found, "fget", None) or getattr(found, "__func__", found))
    return found


def code(of: CodeType, where: str) -> CodeType:
    """The code of a function in that of its module."""
    for name in where.split("."):
        (of,) = [c for c in of.co_consts if isinstance(c, CodeType) and c.co_name == name]
    return of


def mutants(module: ModuleType, *these: Mutant) -> list[Mutant]:
    """These, as mutants of the method in this module."""
    method = module.__name__.rpartition(".")[2]
    return [replace(mutant, of=mutant.of or module, method=method) for mutant in these]


# -- the command -------------------------------------------------------------------------------------------------------

class Table:
    """How many mutants of each method and operator there are, and how many of them are seen."""

    def __init__(self) -> None:
        self.all: Counter[tuple[str, str]] = Counter()
        self.killed: Counter[tuple[str, str]] = Counter()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if mutant_of(item)]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        report = yield
        mutant = mutant_of(item)
        if report.when == "call" and mutant:
            self.all[mutant.method, mutant.operator] += 1
            self.killed[mutant.method, mutant.operator] += report.passed
        return report

    def counts(self) -> dict[str, Any]:
        def summed(key: int) -> dict[str, dict[str, int]]:
            return {name: {kind: sum(n for pair, n in of.items() if pair[key] == name)
                           for kind, of in (("mutants", self.all), ("killed", self.killed))}
                    for name in sorted({pair[key] for pair in self.all})}
        return {"methods": summed(0), "operators": summed(1), "mutants": self.all.total(),
                "killed": self.killed.total()}


def mutant_of(item: Any) -> Any:
    """The mutant that a test is about, if it is one of a method."""
    mutant = item.callspec.params.get("mutant") if hasattr(item, "callspec") else None
    return mutant if getattr(mutant, "method", "") else None


def main() -> int:
    table = Table()
    status = pytest.main([str(Path(__file__).parent), "-q", "-n", "0"], plugins=[table])
    (ROOT / "results" / "mutants.json").write_text(json.dumps(table.counts(), indent=1) + "\n")
    for kind in ("methods", "operators"):
        for name, n in table.counts()[kind].items():
            print(f"{name:20} {n['killed']:4} of {n['mutants']:4} seen")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
