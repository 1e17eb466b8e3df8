"""A recipe can carry variants of itself, such as the baselines of a method: `[variants.NAME]` holds what differs.
`variant=NAME` chooses one on any command that takes key=value; `bridgelm compare FILE --methods NAME` trains it beside
the recipe itself."""

from __future__ import annotations

from collections.abc import Sequence
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


def _laid_over(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Tables are changed key by key, but a method is replaced: its keys mean nothing to another one."""
    return {**raw, **{key: {**raw.get(key, {}), **value} if isinstance(value, dict) and key != "method" else value
                      for key, value in changes.items()}}
