"""The shape of the code: import order, sizes, the five places of a method, and the frozen public surface.

After a change that is meant, `python tests/unit/test_structure.py` writes the surface and the table of docs/methods.md
anew; review the diff.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import tomllib
import typing
from collections import Counter
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import bridgelm
from bridgelm.cli.main import build_parser
from bridgelm.config import catalogue, plugins
from bridgelm.config.options import SequenceOptions, samples
from bridgelm.config.run_config import RunConfig, _models, load_config, stage_steps
from bridgelm.methods.base import Form, Tier

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "bridgelm"
SURFACE = Path(__file__).with_name("surface.json")
DOCS = ROOT / "docs" / "methods.md"
FILES = sorted(SRC.rglob("*.py"))

# The rooms of the package. A module imports from its own room and from those above it. README's tree and the table of
# docs/data-flow.md are written from this list and from the first sentence of each room's `__init__`.
ROOMS = ["", "config", "data", "verify", "engine", "objective", "model", "runs", "rollout", "methods", "analysis",
         "training", "benchmarks", "reports", "comparisons", "diagnosis", "planning", "cli", "testing"]
FRONT = {"__init__", "__main__"}  # the front door reaches everything, lazily
TORCH_FREE = ["config.run_config", "config.catalogue", "data.chat", "data.cursors", "data.toy", "methods.base",
              "runs.preflight", "runs.reader", "verify.math.judge", "cli.main", "cli.data"]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> int:
    room = module.partition(".")[0]
    return ROOMS.index(room) if room in ROOMS else 0


def sentence(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


def tree() -> str:
    """Every room and every file with its first sentence."""
    lines, ours = [], {f"methods.{name}" for name in registry()}
    for room in ROOMS:
        if room:
            lines += ["", f"**`{room}/`** {sentence(SRC / room / '__init__.py')}", ""]
        for path in sorted((SRC / room).glob("*.py") if not room else (SRC / room).rglob("*.py")):
            if path.stem not in FRONT and module_of(path) not in ours:  # docs/methods.md has those
                lines.append(f"- `{path.relative_to(SRC / room)}` {sentence(path)}")
    return "\n".join(lines).strip()


def import_table() -> str:
    graph: dict[str, set[str]] = {room: set() for room in ROOMS}
    for path in FILES:
        if path.parent == SRC and path.stem in FRONT:
            continue
        name = module_of(path)
        graph[ROOMS[room_of(name)]] |= {ROOMS[room_of(other)] for other in imports(path) - FRONT}
    lines = ["| room | what it holds | imports from |", "|---|---|---|"]
    for room in ROOMS[1:]:
        above = ", ".join(f"`{other}`" for other in ROOMS[1:] if other in graph[room] - {room}) or "none"
        lines.append(f"| `{room}` | {sentence(SRC / room / '__init__.py')} | {above} |")
    return "\n".join(lines)


def short_tree() -> str:
    """A line for each room."""
    width = max(map(len, ROOMS)) + 1
    lines = ["src/bridgelm/"]
    lines += [f"  {room + '/':<{width}}  {sentence(SRC / room / '__init__.py')}" for room in ROOMS[1:]]
    return "```\n" + "\n".join(lines) + "\n```"


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in the file, relative imports included."""
    package = ["bridgelm", *path.relative_to(SRC).parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[:len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    ours = {name.removeprefix("bridgelm.") for name in found if name.startswith("bridgelm.")}
    return {name for name in ours if (SRC / f"{name.replace('.', '/')}.py").exists() or
            (SRC / name.replace(".", "/") / "__init__.py").exists()}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_module_imports_only_from_its_left(path: Path) -> None:
    name = module_of(path)
    if path.relative_to(SRC).as_posix() in {"__init__.py", "__main__.py"}:
        return
    late = {other for other in imports(path) - FRONT if room_of(other) > room_of(name)}
    assert not late, f"{name} imports from rooms below it: {sorted(late)}"


def test_no_file_lies_outside_a_room() -> None:
    assert {path.stem for path in SRC.glob("*.py")} == {"__init__", "__main__", "types", "errors", "dist", "ledger"}
    rooms = {path.name for path in SRC.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(ROOMS[1:])


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_says_what_it_is(path: Path) -> None:
    assert sentence(path), "a first sentence, which stands in the tree of docs/data-flow.md"


def test_the_mathematics_of_the_grader_is_importable_by_itself() -> None:
    inner = {module_of(path) for path in (SRC / "verify" / "math").glob("*.py")}
    for name in inner - {"verify.math.grader"}:  # the grader hands comparisons to killable workers
        path = SRC / Path(*name.split(".")).with_suffix(".py")
        found = imports(path if path.exists() else SRC / "verify" / "math" / "__init__.py")
        assert found <= inner | {"verify.extract", "types", "errors", "verify"}, name


def test_no_import_cycle() -> None:
    graph = {module_of(path): imports(path) - {module_of(path)} for path in FILES
             if path.parent != SRC or path.stem not in FRONT}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name):], name])
        if name in done:
            return
        for other in sorted(graph.get(name, ())):
            # A package and its own parts belong together: `methods/__init__` lists them, they share `methods/base`.
            if not (name.startswith(f"{other}.") or other.startswith(f"{name}.")):
                visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_the_quick_modules_load_no_torch() -> None:
    code = (f"import sys, importlib\nfor name in {TORCH_FREE}: importlib.import_module('bridgelm.' + name)\n"
            "sys.exit(' '.join({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)) or 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_functions_fit_a_screen(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno + 1 <= 60, f"{node.name} is over 60 lines"


# -- the five places of a method ---------------------------------------------------------------------------------------

def registry() -> dict[str, str]:
    """Name -> class."""
    return {name: place.rpartition(":")[2] for name, place in plugins.ours().items()}


SHARED = {"__init__", "base", "bridge_controls", "shadow"}
METHODS = sorted({path.stem for path in (SRC / "methods").glob("*.py")} - SHARED)


def test_files_registry_and_options_name_the_same_methods() -> None:
    assert set(registry()) == set(METHODS) == set(catalogue.option_classes())


@pytest.mark.parametrize("name", METHODS)
def test_five_places(name: str) -> None:
    text = (SRC / "methods" / f"{name}.py").read_text()
    assert re.search(rf"@final\s+class {registry()[name]}\(Method", text), "1. its file holds its class, which is final"
    assert name in _in_toy_recipes(), "2. a recipe in recipes/toy, of its own or as a stage"
    page = ROOT / "docs" / "methods" / f"{name}.md"
    assert page.is_file() and "**Trap**" in page.read_text(), f"4. a page {page.name} in docs/methods, with its trap"
    assert f"bridgelm.methods.{name}" in _imported_by_tests(), f"5. a test of its equation that imports methods.{name}"
    holder = EQUATION_IN.get(name, name)
    assert name in WITHOUT_MUTANTS or registered_mutants()[holder] >= 5, (
        f"5. at least five mutants of {holder} that the test of the equation sees (see tests/truth/mutation.py)")


EQUATION_IN = {"sft": "losses", "grpo": "losses"}  # methods whose own file has no more than the coefficients
WITHOUT_MUTANTS = {"sequence"}  # it has no equation, but other methods as its stages


@cache
def registered_mutants() -> Counter[str]:
    """How many mutants of each module the truth tests try. That each is seen is a test of its own there."""
    found: Counter[str] = Counter()
    for path in (ROOT / "tests" / "truth").glob("test_*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imports = [n for n in nodes if isinstance(n, ast.ImportFrom) and str(n.module).startswith("bridgelm.")]
        called = {alias.asname or alias.name: alias.name for node in imports for alias in node.names}
        if any(isinstance(node, ast.FunctionDef) and node.name == "test_mutant_is_seen" for node in nodes):
            for call in (node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "mutants"):
                found[called.get(ast.unparse(call.args[0]), "")] += len(call.args) - 1
    return found


@cache
def _in_toy_recipes() -> set[str]:
    methods = [load_config(path).method for path in (ROOT / "recipes" / "toy").glob("*.toml")]
    parts = (part for method in methods for part in (method, *catalogue.parts(method)))
    return {part.name for part in parts}  # type: ignore[attr-defined]


@cache
def _imported_by_tests() -> set[str]:
    return set().union(*(_imported(path) for path in (ROOT / "tests").rglob("*.py")))


def _imported(path: Path) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.module]
    return {name for node in nodes for name in (node.module or "", *(f"{node.module}.{a.name}" for a in node.names))}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_its_equation_and_its_trap(name: str) -> None:
    text = catalogue.docstring(name)
    assert len(text.splitlines()[0]) < 120, "a first line that fits a table"
    assert "Trap" in text, "each method names the trap that its users fall into"
    assert catalogue.tier(name) in typing.get_args(Tier), "and how far it can be trusted"
    assert set(catalogue.form(name)) == {field.name for field in fields(Form)}, "and its form"


def test_toy_recipes_differ_in_method_steps_rate_and_layout_alone() -> None:
    recipes = {path.stem: tomllib.loads(path.read_text()) for path in (ROOT / "recipes" / "toy").glob("*.toml")}
    assert recipes
    for name, recipe in recipes.items():
        if name != "joint":
            assert recipe["base"] == "joint.toml" and recipe.get("optim", {}).keys() <= {"lr"}, name
            assert recipe.keys() <= {"base", "name", "method", "steps", "teacher", "data", "optim"}, name
            assert recipe.get("data", {"toy": {"layout": ""}}).keys() == {"toy"}, name
            assert recipe.get("data", {"toy": {}})["toy"].keys() <= {"layout"}, name
    rolls = {name: steps_with_rollouts(load_config(ROOT / "recipes" / "toy" / f"{name}.toml")) for name in recipes}
    assert len({steps for steps in rolls.values() if steps}) == 1, f"steps with rollouts differ: {rolls}"
    assert all(recipe["name"] == name for name, recipe in recipes.items())


def steps_with_rollouts(config: RunConfig) -> int:
    parts = catalogue.parts(config.method)
    steps = stage_steps(config.method, config.steps) if isinstance(config.method, SequenceOptions) else [config.steps]
    return sum(n for n, part in zip(steps, parts, strict=True) if samples(part))


# -- the public surface ------------------------------------------------------------------------------------------------

def surface() -> dict[str, Any]:
    commands = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return {
        "package": sorted(bridgelm.__all__),
        "commands": {name: sorted("/".join(action.option_strings) or action.dest for action in parser._actions)
                     for name, parser in commands.choices.items()},
        "config": sorted(config_keys(RunConfig)),
    }


def config_keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted keys; of a choice of methods all, with the method's name in brackets. A method within a method has the
    keys that it has by itself, so only its name is listed."""
    keys: set[str] = set()
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        inner = _models(field.annotation)
        keys |= {key} if not inner else set()
        for choice in inner:
            tag = f"<{choice.model_fields['name'].default}>" if len(inner) > 1 else ""
            keys |= {f"{key}{tag}"} if tag and "<" in prefix else config_keys(choice, f"{key}{tag}.")
    return keys


def test_the_public_surface_is_the_committed_one() -> None:
    committed = json.loads(SURFACE.read_text())
    now = surface()
    for part, names in now.items():
        assert names == committed[part], f"{part} changed; if that is meant: python tests/unit/test_structure.py"


def test_the_package_gives_what_it_lists() -> None:
    for name in bridgelm.__all__:
        assert getattr(bridgelm, name) is not None
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = bridgelm.nothing_such


PAGES = {DOCS: {"methods": catalogue.table}, ROOT / "README.md": {"rooms": short_tree},
         ROOT / "docs" / "data-flow.md": {"rooms": import_table, "tree": tree}}


def with_tables(path: Path) -> str:
    text = path.read_text()
    for mark, make in PAGES[path].items():
        text = re.sub(rf"(<!-- {mark}:begin -->\n).*(<!-- {mark}:end -->)",
                      lambda found, make=make: f"{found[1]}{make()}\n{found[2]}", text, flags=re.DOTALL)
    return text


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_what_is_generated_is_up_to_date(path: Path) -> None:
    assert with_tables(path) == path.read_text(), "python tests/unit/test_structure.py writes it"


if __name__ == "__main__":
    SURFACE.write_text(json.dumps(surface(), indent=1) + "\n")
    for page in PAGES:
        page.write_text(with_tables(page))
