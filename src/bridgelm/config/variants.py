"""Recipes that differ in a few keys. `base = "FILE"` lays a recipe over another one, whose path is relative to its own
folder. A recipe can also carry variants of itself, such as the baselines of a method, in tables `[variants.NAME]` that
hold what differs. `variant=NAME` chooses one on any command that takes key=value, and
`bridgelm compare FILE --methods NAME` trains it beside the recipe itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bridgelm.errors import UserError

KEY = "variant"


def with_variants(raw: dict[str, Any], overrides: Sequence[str], where: str) -> tuple[dict[str, Any], list[str]]:
    """The settings with the chosen variants laid over them, in the order given, and the other overrides."""
    tables, rest, names = raw.pop("variants", {}), [], list[str]()
    for item in overrides:
        key, _, value = item.partition("=")
        if key.strip() == KEY:
            names += [name.strip(" \"'") for name in value.split(",")]
        else:
            rest.append(item)
    for name in names:
        if not isinstance(tables, dict) or not isinstance(tables.get(name), dict):
            have = f"it has {', '.join(tables)}" if tables else "it has none; a variant is a table [variants.NAME]"
            raise UserError(f"{where}: no variant {name!r}; {have}")
        raw = {**_laid_over(raw, tables[name]), "name": tables[name].get("name", f"{raw['name']}-{name}")}
    return raw, rest


def with_base(raw: dict[str, Any], path: Path, read: Callable[[Path], dict[str, Any]],
              seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a file laid over those of the file that its key `base` names. The name is never inherited: it
    would send two runs to one folder."""
    if "base" not in raw:
        return raw
    seen = (*seen, path.resolve())
    name = raw.pop("base")
    if not isinstance(name, str):
        raise UserError(f"{path}: base: write the path of a TOML file, relative to the folder of this one")
    other = path.parent / name
    if other.resolve() in seen:
        raise UserError(f"{path}: base: {name} is based on this file itself")
    below = with_base(read(other), other, read, seen)
    below.pop("name", None)
    return _laid_over(below, raw)


def _laid_over(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Tables are changed key by key, but a method is replaced: its keys mean nothing to another one."""
    def one(key: str, value: Any) -> Any:
        inner = raw.get(key)
        if isinstance(value, dict) and isinstance(inner, dict) and key != "method":
            return _laid_over(inner, value)
        return value

    return {**raw, **{key: one(key, value) for key, value in changes.items()}}
