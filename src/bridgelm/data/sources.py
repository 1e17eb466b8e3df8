"""Reads rows from JSONL, JSON, Parquet, a folder saved by `datasets`, or the hub; each row knows its file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridgelm.errors import UserError

HUB = "hf:"
FORMS = "JSONL, JSON, Parquet, a folder saved by `datasets`, or hf:NAME[:SPLIT]"


@dataclass(frozen=True, slots=True)
class Source:
    """One row with where it stands, for error messages, and a short unique name, for rows without an id."""

    row: dict[str, Any]
    place: str
    name: str


def read(spec: str, role: str) -> list[Source]:
    """All rows of `spec`. `role` (train, demos, validation, test) is the config key and the default hub split."""
    rows = list(_read(spec, role))
    if not rows:
        raise UserError(f"data.{role}: {spec} holds no rows; point it at a file with at least one")
    return rows


def _read(spec: str, role: str) -> Iterator[Source]:
    if spec.startswith(HUB):
        yield from _hub(spec, role)
        return
    path = Path(spec)
    if not path.exists():
        raise UserError(f"data.{role}: {spec} does not exist; give {FORMS}")
    if path.is_dir():
        yield from _saved(path, role)
    elif path.suffix in {".jsonl", ".ndjson"}:
        yield from _jsonl(path)
    elif path.suffix == ".json":
        yield from _json(path)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    else:
        raise UserError(f"data.{role}: {spec}: unknown kind of file {path.suffix!r}; give {FORMS}")


def _jsonl(path: Path) -> Iterator[Source]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                row = json.loads(text) if text else None
            except UnicodeDecodeError:
                raise UserError(f"{place}: not UTF-8; save the file as UTF-8") from None
            except (json.JSONDecodeError, RecursionError) as error:
                raise UserError(f"{place}: not valid JSON ({error}); each line must hold one JSON object") from None
            if text:
                yield _checked(row, place, f"{path.stem}-{number}")


def _json(path: Path) -> Iterator[Source]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); one object a line belongs in a .jsonl file") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds {_kind(rows)}; a .json file must be a list of objects")
    yield from _numbered(rows, str(path), path.stem)


def _parquet(path: Path) -> Iterator[Source]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}); write it again") from None
    yield from _numbered(rows, str(path), path.stem)


def _saved(path: Path, role: str) -> Iterator[Source]:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"data.{role}: {path} is not a folder saved by `datasets` "
                        f"({str(error).splitlines()[0]}); give {FORMS}") from None
    if isinstance(found, datasets.DatasetDict):
        if role not in found:
            have = ", ".join(map(str, found))
            raise UserError(f"data.{role}: {path} has no split {role!r}; give the folder of one it has ({have}), as "
                            f"{path}/NAME")
        found = found[role]
    yield from _numbered(found, str(path), path.name)


def _hub(spec: str, role: str) -> Iterator[Source]:
    import datasets

    name, _, split = spec.removeprefix(HUB).partition(":")
    name, _, subset = name.partition("@")
    split = split or ("train" if role == "demos" else role)
    try:
        found = datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # the hub client raises many unrelated kinds; whichever it is, the fix is the user's
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"data.{role}: {spec} cannot be loaded ({reason}); check hf:NAME[@SUBSET][:SPLIT] and the "
                        "connection, or download it and give the file") from None
    yield from _numbered(found, spec, f"{name}-{split}")


def _numbered(rows: Any, where: str, stem: str) -> Iterator[Source]:
    for number, row in enumerate(rows, 1):
        yield _checked(row, f"{where}: row {number}", f"{stem}-{number}")


def _checked(row: Any, place: str, name: str) -> Source:
    if not isinstance(row, dict):
        raise UserError(f"{place}: holds {_kind(row)}; a row must be an object such as "
                        '{"prompt": "...", "answer": "..."}')
    return Source(row, place, name)


def _kind(value: Any) -> str:
    names = {str: "a string", list: "a list", int: "a number", float: "a number", bool: "a truth value"}
    return "nothing" if value is None else names.get(type(value), "an object")
