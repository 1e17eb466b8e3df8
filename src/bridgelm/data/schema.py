"""The schema of a data row (docs/data.md): a row becomes a Problem, or an error that names the place and the fix."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from bridgelm.data.sources import Source
from bridgelm.errors import UserError
from bridgelm.types import Demo, Message, Problem

FIELDS = ("id", "prompt", "messages", "answer", "demos", "demo_logps", "difficulty")
# Columns taken for one of ours where no field of that name is there: TRL's, verl's, and common ones.
PROMPT_ALIASES = ("problem", "question")
ROLES = ("system", "developer", "user", "assistant", "tool")


def check_fields(fields: Mapping[str, str]) -> None:
    for name in fields:
        if name not in FIELDS:
            raise UserError(f"data.fields: unknown field {name!r}; known: {', '.join(FIELDS)}")
    if "prompt" in fields and "messages" in fields:
        raise UserError("data.fields: both prompt and messages are mapped; keep one")


def to_problem(source: Source, fields: Mapping[str, str]) -> Problem:
    """The Problem of a row. `fields` maps our names to columns and wins over names recognised by themselves."""
    row, place = source.row, source.place
    for name, column in fields.items():
        # A column may be absent from single rows, but a required one that is absent is a misspelt mapping.
        if name in {"prompt", "messages"} and column not in row:
            raise UserError(f"{place}: no column {column!r}, which data.fields.{name} names; it has {_columns(row)}")
    messages, closing, conversational = _messages(row, place, fields)
    demos = _demos(row, place, fields)
    if closing and not demos:
        demos = (Demo(closing),)
    used = {name for name in FIELDS if name not in fields} | set(fields.values())
    identity = _get(row, fields, "id")
    return Problem(
        id=source.name if identity is None or identity == "" else str(identity),
        messages=messages,
        answer=_answer(row, place, fields),
        demos=_with_logps(demos, _get(row, fields, "demo_logps"), place),
        difficulty=_difficulty(_get(row, fields, "difficulty"), place),
        # Columns recognised under a foreign name stay: a reward function written for TRL or verl looks for them.
        columns={name: value for name, value in row.items() if name not in used},
        conversational=conversational,
        place=place,
    )


def _get(row: dict[str, Any], fields: Mapping[str, str], name: str) -> Any:
    return row.get(fields.get(name, name))


def _messages(row: dict[str, Any], place: str, fields: Mapping[str, str]) -> tuple[tuple[Message, ...], str, bool]:
    """The prompt's messages, the text of a closing assistant turn, and whether the row gave messages."""
    mapped = [name for name in ("prompt", "messages") if name in fields]
    found = [fields[mapped[0]]] if mapped else [n for n in ("prompt", "messages") if row.get(n) is not None]
    found = found or [name for name in PROMPT_ALIASES if row.get(name) is not None]
    if not found:
        raise UserError(f"{place}: no prompt; give a column prompt or messages, or name yours as data.fields.prompt "
                        f"(it has {_columns(row)})")
    if len(found) > 1:
        raise UserError(f"{place}: {found[0]!r} and {found[1]!r} could both be the prompt; say which one as "
                        "data.fields.prompt")
    value = row[found[0]]
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{place}: {found[0]!r} is empty; write the task there or remove the row")
        return ({"role": "user", "content": value},), "", False
    messages = _checked_messages(value, f"{place}: {found[0]!r}")
    closing = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
    if not messages or messages[-1]["role"] not in {"user", "tool"}:
        raise UserError(f"{place}: {found[0]!r} has no user message for the assistant to answer; end it with one")
    return tuple(messages), closing, True


def _checked_messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} is neither a string nor a list of messages; write "
                        '[{"role": "user", "content": "..."}]')
    messages: list[Message] = []
    for message in value:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in ROLES or not isinstance(content, str):
            raise UserError(f"{where}: a message needs a role (one of {', '.join(ROLES)}) and a content string; "
                            f"got {_short(message)}")
        messages.append({"role": role, "content": content})
    return messages


def _answer(row: dict[str, Any], place: str, fields: Mapping[str, str]) -> str | None:
    value = _get(row, fields, "answer")
    column = fields.get("answer", "answer")
    if value is None and "answer" not in fields:
        reward_model = row.get("reward_model")  # verl
        if isinstance(reward_model, dict):
            truth = reward_model.get("ground_truth")
            # A structured truth is for a reward function, which finds it in its column.
            value = None if isinstance(truth, dict | list) else truth
        elif "solution" not in fields.values() and isinstance(row.get("solution"), str):
            value = row["solution"]  # TRL's name of the gold answer
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{place}: {column!r} must be a string or a number; got {_short(value)}")
    return str(value).strip() or None


def _demos(row: dict[str, Any], place: str, fields: Mapping[str, str]) -> tuple[Demo, ...]:
    present = [name for name in ("demos", "completion") if row.get(name) is not None]
    if "demos" not in fields and len(present) > 1:
        raise UserError(f"{place}: 'demos' and 'completion' could both hold demonstrations; say which one as "
                        "data.fields.demos")
    column = fields.get("demos") or next(iter(present), "demos")
    value = row.get(column)
    if value is None:
        return ()
    if isinstance(value, str) or (isinstance(value, list) and value and _is_message(value[0])):
        value = [value]  # one demonstration: a text, or the messages of a TRL completion
    if not isinstance(value, list):
        raise UserError(f"{place}: {column!r} must be a list of demonstrations; got {_short(value)}")
    return tuple(_demo(item, f"{place}: {column!r} entry {number}") for number, item in enumerate(value, 1))


def _demo(item: Any, where: str) -> Demo:
    logps: tuple[float, ...] | None = None
    if isinstance(item, dict) and "text" in item:
        logps = None if item.get("logps") is None else _logps(item["logps"], where)
        item = item["text"]
    elif isinstance(item, list):
        messages = _checked_messages(item, where)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise UserError(f"{where}: demonstrations of several turns are not supported; give one assistant message")
        item = messages[0]["content"]
    if not isinstance(item, str):
        raise UserError(f'{where} must be a text, {{"text": ..., "logps": [...]}} or messages; got {_short(item)}')
    if not item.strip():
        raise UserError(f"{where} is empty; remove it or write the demonstration")
    return Demo(item, logps)


def _with_logps(demos: tuple[Demo, ...], value: Any, place: str) -> tuple[Demo, ...]:
    if value is None:
        return demos
    if not isinstance(value, list) or len(value) != len(demos):
        raise UserError(f"{place}: 'demo_logps' must be a list with one entry for each of the {len(demos)} "
                        "demonstrations (null where unknown)")
    return tuple(Demo(demo.text, demo.logps if entry is None else _logps(entry, f"{place}: 'demo_logps'"))
                 for demo, entry in zip(demos, value, strict=True))


def _logps(value: Any, where: str) -> tuple[float, ...]:
    numbers: list[Any] = value if isinstance(value, list) else [None]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) and n <= 0 for n in numbers):
        raise UserError(f"{where}: log-probabilities must be a list of finite numbers not above 0, one a token")
    return tuple(float(n) for n in numbers)


def _difficulty(value: Any, place: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, str):  # "Level 5" is 5; a label without a number ("?") is unknown
        label = re.search(r"-?\d+(?:\.\d+)?", value)
        return float(label.group()) if label else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{place}: 'difficulty' must be a number; got {_short(value)}")
    return float(value)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and "role" in value


def _columns(row: dict[str, Any]) -> str:
    return ", ".join(map(str, row)) or "no columns"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
