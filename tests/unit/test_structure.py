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
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import bridgelm
from bridgelm.cli.main import build_parser
from bridgelm.config import catalogue
from bridgelm.config.options import SequenceOptions
from bridgelm.config.run_config import RunConfig, _models, load_config, stage_steps
from bridgelm.methods.base import Form, Tier

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "bridgelm"
SURFACE = Path(__file__).with_name("surface.json")
DOCS = ROOT / "docs" / "methods.md"
FILES = sorted(SRC.rglob("*.py"))

# A module imports from its own layer and from those above it here. A trailing * stands for a family of files.
LAYERS = [
    ["types", "errors", "disk", "options", "variants", "config"],
    ["toy", "model_shapes", "model_files", "methods_info", "chat", "prompts", "data", "data_*", "suites",
     "contamination", "verify", "dist", "teacher_ids", "teacher_cache"],
    ["ledger", "packing", "batching", "forward", "loading", "grads", "groups", "held", "optim", "storage", "offload",
     "engine", "weights", "policy", "teacher"],
    ["credit", "losses", "mismatch", "cooperation", "hints", "rollout"],
    ["methods"],
    ["stats", "sinks", "metrics", "inputs", "progress", "runs", "checkpoint", "merging", "evaluation", "benchmarks",
     "benchmark_*", "harness", "probe", "training", "training_*", "demonstrations"],
    ["analysis", "compare", "compare_*", "diagnose", "diagnose_*", "report", "report_*", "preflight",
     "planning", "planning_*"],
    ["toy.build", "toy.build_*", "toy.train", "cli", "cli_*"],  # what rebuilds the toy models trains them
]
FREE = {"__init__", "__main__"}  # the package's front door reaches everything, lazily


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


@cache
def layer(module: str) -> int:
    """The most exact entry wins: `toy.build` before `toy`."""
    for name in (module, module.split(".")[0]):
        for number, entries in enumerate(LAYERS):
            if any(re.fullmatch(entry.replace("*", r"\w+"), name) for entry in entries):
                return number
    raise AssertionError(f"{module}: give it a place in LAYERS of {Path(__file__).name}")


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
    late = {other for other in imports(path) - FREE if layer(other) > layer(name)}
    assert not late, f"{name} imports from its right: {sorted(late)}"


def test_no_import_cycle() -> None:
    graph = {module_of(path): imports(path) - {module_of(path)} for path in FILES
             if path.parent != SRC or path.stem not in FREE}
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
    quick = ["config", "chat", "data", "methods_info", "preflight", "cli", "cli_data", "runs", "toy"]
    code = (f"import sys, importlib\nfor name in {quick}: importlib.import_module('bridgelm.' + name)\n"
            "sys.exit(' '.join({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)) or 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_sizes(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno + 1 <= 60, f"{node.name} is over 60 lines"


# -- the five places of a method ---------------------------------------------------------------------------------------

def registry() -> dict[str, str]:
    """METHODS of methods/__init__.py, name -> class, read without importing torch."""
    path = SRC / "methods" / "__init__.py"
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "METHODS":
            assert isinstance(node.value, ast.Dict)
            return {ast.literal_eval(key): ast.unparse(value) for key, value in zip(node.value.keys, node.value.values)
                    if key is not None}
    raise AssertionError("methods/__init__.py has no METHODS")


METHODS = sorted({path.stem for path in (SRC / "methods").glob("*.py")} - {"__init__", "base", "shadow"})


def test_files_registry_and_options_name_the_same_methods() -> None:
    assert set(registry()) == set(METHODS) == set(catalogue.option_classes())


@pytest.mark.parametrize("name", METHODS)
def test_five_places(name: str) -> None:
    text = (SRC / "methods" / f"{name}.py").read_text()
    assert f"class {registry()[name]}(Method)" in text, "1. its file holds the class that the registry names"
    assert re.search(rf"@final\s+class {registry()[name]}\(", text), "and the class is final"
    methods = [load_config(path).method for path in (ROOT / "recipes" / "toy").glob("*.toml")]
    named = {part.name for method in methods for part in (method, *catalogue.parts(method))}  # type: ignore[attr-defined]
    assert name in named, "3. a recipe in recipes/toy, of its own or as a stage"
    page = ROOT / "docs" / "methods" / f"{name}.md"
    assert page.is_file() and "**Trap**" in page.read_text(), f"4. a page {page.name} in docs/methods, with its trap"
    used = set().union(*(_imported(path) for path in (ROOT / "tests").rglob("*.py")))
    assert f"bridgelm.methods.{name}" in used, f"5. a test of its equation, which imports bridgelm.methods.{name}"


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


def test_the_table_of_the_methods_is_that_of_the_code() -> None:
    assert with_table(DOCS.read_text()) == DOCS.read_text(), "python tests/unit/test_structure.py writes it"


def with_table(text: str) -> str:
    return re.sub(r"(<!-- methods:begin -->\n).*(<!-- methods:end -->)",
                  lambda found: f"{found[1]}{catalogue.table()}\n{found[2]}", text, flags=re.DOTALL)


def test_toy_recipes_differ_in_method_steps_rate_and_layout_alone() -> None:
    recipes = {path.stem: tomllib.loads(path.read_text()) for path in (ROOT / "recipes" / "toy").glob("*.toml")}
    assert recipes
    own = {"name", "method", "steps", "teacher"}
    shared = {name: {key: value for key, value in recipe.items() if key not in own}
              | {"optim": {key: value for key, value in recipe["optim"].items() if key != "lr"},
                 "data": recipe["data"] | {"toy": recipe["data"]["toy"] | {"layout": "either"}}}
              for name, recipe in recipes.items()}
    rolls = {name: steps_with_rollouts(load_config(ROOT / "recipes" / "toy" / f"{name}.toml")) for name in recipes}
    assert len({steps for steps in rolls.values() if steps}) == 1, f"steps with rollouts differ: {rolls}"
    assert all(value == shared["bridge"] for value in shared.values())
    assert all(recipe["name"] == name for name, recipe in recipes.items())


def steps_with_rollouts(config: RunConfig) -> int:
    parts = catalogue.parts(config.method)
    steps = stage_steps(config.method, config.steps) if isinstance(config.method, SequenceOptions) else [config.steps]
    return sum(n for n, part in zip(steps, parts, strict=True) if catalogue.samples(part))


# -- the public surface ------------------------------------------------------------------------------------------------

def surface() -> dict[str, Any]:
    commands = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return {
        "package": sorted(bridgelm.__all__),
        "commands": {name: sorted("/".join(action.option_strings) or action.dest for action in parser._actions)
                     for name, parser in commands.choices.items()},
        "config": sorted(config_keys(RunConfig)),
        "methods": sorted(catalogue.option_classes()),
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


@pytest.mark.parametrize("name", ["compare", "diagnose", "report"])
def test_a_module_does_not_hide_the_function_of_its_name(name: str) -> None:
    code = (f"import bridgelm, bridgelm.types, bridgelm.{name} as inner, sys\nfrom bridgelm import {name} as first\n"
            f"from bridgelm.{name} import {name} as real\n"
            f"assert callable(bridgelm.{name}) and first is bridgelm.{name} is inner and real is not first\n"
            f"assert type(sys.modules['bridgelm.{name}']).__name__ == 'module'\n"
            "assert type(bridgelm.types).__name__ == 'module'\n")
    strict = ["-W", "error::ImportWarning"]  # which importlib gives where a submodule could not be set
    done = subprocess.run([sys.executable, *strict, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    SURFACE.write_text(json.dumps(surface(), indent=1) + "\n")
    DOCS.write_text(with_table(DOCS.read_text()))
