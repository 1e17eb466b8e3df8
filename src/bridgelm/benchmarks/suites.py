"""Loads benchmarks: declarative records (`suites.toml`, or the user's own) and their items, which are counted. No
torch."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from bridgelm.config.options.base import Rate, Strict
from bridgelm.config.options.reward import RewardConfig
from bridgelm.data.schema import to_problem
from bridgelm.data.sources import Source, read
from bridgelm.errors import UserError
from bridgelm.types import Problem

Count = Annotated[int, Field(ge=1)]
GROUPS: dict[str, list[str]] = {"paper": ["math500", "minerva", "olympiadbench", "aime24", "amc23"]}


class Suite(Strict):
    """What the fields mean is said at the top of suites.toml."""

    title: str
    source: str | None = None
    file: str | None = None
    items: list[Count] = Field(min_length=1)
    fields: dict[str, str] = Field(default_factory=dict)
    gold: str | None = None
    prompt: str = "boxed"
    verifier: Literal["math", "countdown", "knights", "exact", "regex", "toy"] = "math"
    extract: list[Literal["tags", "boxed", "hashes", "phrase", "bare", "last"]] = Field(
        default=["tags", "boxed", "hashes", "phrase", "bare", "last"], min_length=1)
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_new_tokens: Count = 5000  # the paper's
    samples: Annotated[int, Field(ge=0)] = 0
    temperature: Rate = 1.0
    level: str | None = None
    subject: str | None = None

    def reward(self) -> RewardConfig:
        return RewardConfig(verifier=self.verifier, extract=self.extract, tolerance=self.tolerance)


@dataclass(frozen=True)
class Items:
    """A suite's problems, where they came from, and which gold answers were corrected."""

    suite: str
    problems: tuple[Problem, ...]
    source: str
    sha256: str  # of ids, prompts and gold answers
    fixed: tuple[str, ...] = ()


@cache
def builtin() -> dict[str, Suite]:
    return parse(Path(__file__).with_name("suites.toml"))


def parse(path: Path) -> dict[str, Suite]:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        return TypeAdapter(dict[str, Suite]).validate_python(raw)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"suites: {path}: cannot be read ({error})") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"suites: {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def choose(names: Sequence[str], extra: Path | None = None) -> dict[str, Suite]:
    """The named suites, groups spelled out, in the order given."""
    known = builtin() | (parse(extra) if extra else {})
    found: dict[str, Suite] = {}
    for name in (one for given in names for one in GROUPS.get(given, [given])):
        if name not in known:
            raise UserError(f"suite: no {name!r}; choose from {', '.join([*GROUPS, *known])}, or describe your own in "
                            "a TOML file given as --suites")
        found[name] = known[name]
    return found


def overview() -> str:
    """A line for each suite and each group."""
    lines = [f"{name:<15}{'/'.join(map(str, one.items)):>8} items  {one.prompt:<6} {one.verifier:<10} "
             f"{one.source or f'--suite-folder with {one.file}'}" for name, one in builtin().items()]
    return "\n".join([*lines, *(f"{name:<15}= {', '.join(members)}" for name, members in GROUPS.items())])


def load(name: str, suite: Suite, folder: Path | None = None, fixes: Path | None = None) -> Items:
    """The items, from `folder` if there is one, else from the record's source; their number is checked."""
    source, problems = _toy(suite) if (suite.source or "").startswith("toy:") else _read(name, suite, folder)
    if len(problems) not in suite.items:
        published = " or ".join(map(str, suite.items))
        raise UserError(f"suite {name}: {source} has {len(problems)} items, and {published} are published; a benchmark "
                        "with another number of items is another benchmark")
    seen: dict[str, int] = {}
    for problem in problems:
        seen[problem.id] = seen.get(problem.id, 0) + 1
    if double := next((one for one, times in seen.items() if times > 1), None):
        raise UserError(f"suite {name}: {source}: the id {double!r} occurs twice; make the ids differ")
    problems, fixed = _corrected(problems, suite, fixes) if fixes else (problems, ())
    text = json.dumps([[p.id, p.messages, p.answer] for p in problems], ensure_ascii=False)
    return Items(name, tuple(problems), source, hashlib.sha256(text.encode()).hexdigest(), fixed)


def _toy(suite: Suite) -> tuple[str, list[Problem]]:
    from bridgelm.data import toy

    assert suite.source is not None
    return suite.source, toy.load(suite.source.removeprefix("toy:"))["test"]


def _read(name: str, suite: Suite, folder: Path | None) -> tuple[str, list[Problem]]:
    if folder is None:
        if suite.source is None:
            raise UserError(f"suite {name}: it has no public source; give the folder that holds {suite.file} as "
                            "--suite-folder")
        spec, fields = suite.source, suite.fields
    else:
        spec, fields = str(_local(name, suite, folder)), {}
    problems = [_problem(one, suite, fields) for one in read(spec, "test")]
    if suite.verifier in {"math", "exact", "regex"} and (bad := next((p for p in problems if not p.answer), None)):
        raise UserError(f"suite {name}: {spec}: {bad.id!r} has no answer")
    return spec, problems


def _local(name: str, suite: Suite, folder: Path) -> Path:
    """Finds the file in the folder itself or in one that lies in it."""
    if suite.file is None:
        raise UserError(f"suite {name}: its record names no local file; leave out --suite-folder to use {suite.source}")
    found = next((path for path in (folder / suite.file, *sorted(folder.glob(f"*/{suite.file}"))) if path.is_file()),
                 None)
    if found is None:
        raise UserError(f"suite {name}: no {suite.file} in {folder}; leave out --suite-folder to use {suite.source}")
    return found


def _problem(source: Source, suite: Suite, fields: Mapping[str, str]) -> Problem:
    column = fields.get("answer", "answer")
    value: Any = source.row.get(column)
    if isinstance(value, list):  # several answers of one item
        value = ", ".join(map(str, value))
    if isinstance(value, str) and suite.gold and (found := re.search(suite.gold, value)):
        value = found.group(1)
    return to_problem(replace(source, row=source.row | ({} if value is None else {column: value})), fields)


def _corrected(problems: list[Problem], suite: Suite, path: Path) -> tuple[list[Problem], tuple[str, ...]]:
    """Gold answers replaced by `answer_corrected` of the rows with an item's id (and, where said, of its file)."""
    better = {str(one.row["id"]): str(one.row["answer_corrected"]) for one in read(str(path), "label-fixes")
              if one.row.get("id") is not None and one.row.get("answer_corrected") is not None
              and ("file" not in one.row or Path(str(one.row["file"])).name == suite.file)}
    fixed = tuple(problem.id for problem in problems if better.get(problem.id, problem.answer) != problem.answer)
    return [replace(problem, answer=better.get(problem.id, problem.answer)) for problem in problems], fixed
