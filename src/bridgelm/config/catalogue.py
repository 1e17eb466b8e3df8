"""What `bridgelm methods` and `bridgelm show` say. It is read from the sources of the methods and of their options, so
that nothing is written twice and no torch is loaded."""

from __future__ import annotations

import ast
import difflib
import inspect
import io
import sys
import tokenize
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bridgelm.config import options, plugins
from bridgelm.config.options import parts
from bridgelm.config.run_config import RunConfig, stage_steps
from bridgelm.errors import UserError


@dataclass(frozen=True, slots=True)
class Option:
    key: str  # dotted, as it stands in the TOML under [method]
    default: str
    remark: str  # the allowed words, and the comment behind it in options/: meaning and source of the default


def option_classes() -> dict[str, type[BaseModel]]:
    """Name of each method -> the class of its options."""
    listed = {model.model_fields["name"].default: model for model in typing.get_args(options.MethodOptions)}
    return listed | {name: plugins.option_class(name) for name in plugins.ours() if name not in listed}


def find(name: str) -> type[BaseModel]:
    known = option_classes()
    if is_own(name):
        return plugins.option_class(name)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(known)}"
        raise UserError(f"{name!r} is not a method; {hint}")
    return known[name]


def is_own(name: str) -> bool:
    """Whether it is a method of the user; its class is then imported and asked."""
    return plugins.is_own("method", name)


@cache
def _module(name: str) -> ast.Module:
    path = plugins.METHODS / f"{name}.py"
    return ast.parse(path.read_text(encoding="utf-8") if path.is_file() else "")


def docstring(name: str) -> str:
    if is_own(name):
        cls = plugins.load_method(name)
        return inspect.cleandoc(cls.__doc__ or sys.modules[cls.__module__].__doc__ or "")
    return ast.get_docstring(_module(name)) or ""


def needs(name: str) -> frozenset[str]:
    """The method's own `needs`, read from its class without importing it."""
    if is_own(name):
        return plugins.load_method(name).needs
    for node in ast.walk(_module(name)):
        if not isinstance(node, ast.AnnAssign | ast.Assign) or node.value is None:
            continue
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        if isinstance(target, ast.Name) and target.id == "needs":
            return frozenset(str(n.value) for n in ast.walk(node.value) if isinstance(n, ast.Constant))
    return frozenset()


def form(name: str) -> dict[str, str]:
    """The method's `form` (methods/base.py), read from its class without importing it."""
    if is_own(name):
        return asdict(plugins.load_method(name).form)
    calls = (node.value for node in ast.walk(_module(name)) if isinstance(node, ast.Assign)
             and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "form")
    return {str(k.arg): ast.literal_eval(k.value) for call in calls if isinstance(call, ast.Call)
            for k in call.keywords}


def tier(name: str) -> str:
    """checked, derived or experimental (methods/base.py)."""
    if is_own(name):
        return plugins.load_method(name).tier
    return next((ast.literal_eval(node.value) for node in ast.walk(_module(name)) if isinstance(node, ast.Assign)
                 and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "tier"), "")


def remedy(need: str) -> str:
    """How to meet a need, in the words of the contract (`NEEDS` of methods/base.py)."""
    for node in _module("base").body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "NEEDS":
            return ast.literal_eval(node.value).get(need, need)
    return need


def sampling_steps(config: RunConfig) -> int:
    """How many of a run's steps draw answers."""
    method = config.method
    steps = stage_steps(method, config.steps) if isinstance(method, options.SequenceOptions) else [config.steps]
    return sum(n for n, part in zip(steps, parts(method), strict=True) if options.samples(part))


def needs_of(method: BaseModel) -> frozenset[str]:
    """What a configured method needs of the data, its stages included."""
    return frozenset(need for part in (method, *parts(typing.cast(Any, method)))
                     for need in needs(typing.cast(Any, part).name))


@cache
def _comments(path: str) -> dict[int, str]:
    """Line number of a file of options -> the comment that ends that line or its continuation."""
    text = Path(path).read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}


@cache
def _remarks(model: type[BaseModel]) -> dict[str, str]:
    """The comment behind each field, those of the classes above included."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not issubclass(cls, options.Strict):
            continue
        path = str(sys.modules[cls.__module__].__file__)
        for node in _body(path, cls.__qualname__):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                said = _comments(path)
                found[node.target.id] = " ".join(said[line] for line in lines if line in said)
    return found


def _body(path: str, qualname: str) -> list[ast.stmt]:
    """The body of a class in a file, which may stand inside another class."""
    body: list[ast.stmt] = ast.parse(Path(path).read_text(encoding="utf-8")).body
    for name in qualname.split("."):
        body = next((node.body for node in body if isinstance(node, ast.ClassDef) and node.name == name), [])
    return body


def _nested(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The model inside an annotation, if there is exactly one, and whether it stands in a list."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return (annotation, False) if issubclass(annotation, BaseModel) else (None, False)
    if typing.get_origin(annotation) is list:
        return _nested(typing.get_args(annotation)[0])[0], True
    return None, False


def _show(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _choices(annotation: Any) -> list[str]:
    """The words of a Literal, also of an optional one."""
    if typing.get_origin(annotation) is typing.Literal:
        return [str(word) for word in typing.get_args(annotation)]
    return [word for inner in typing.get_args(annotation) for word in _choices(inner)]


def option_rows(model: type[BaseModel], prefix: str = "") -> Iterator[Option]:
    """Every key of a method's table, nested tables included, with default and remark."""
    for name, info in model.model_fields.items():
        key = prefix + (info.alias or name)
        if key == "name":
            continue
        inner, many = _nested(info.annotation)
        if inner is not None:
            yield from option_rows(inner, f"{key}[]." if many else f"{key}.")
            continue
        remark = info.description or _remarks(model).get(name, "")
        choices = _choices(info.annotation)
        default = "required" if info.is_required() else _show(info.get_default(call_default_factory=True))
        yield Option(key, default, "; ".join(part for part in (" | ".join(choices), remark) if part))


def describe(name: str) -> str:
    """The page of `bridgelm show NAME`."""
    model = find(name)
    lines = [f"{name}", "=" * len(name), "", docstring(name) or "(no description)", "", f"Tier: {tier(name)}"]
    wanted = ", ".join(sorted(needs(name))) or "nothing beyond problems and a reward"
    lines += [f"Needs of the data: {wanted}", ""]
    if model.__doc__ and model.__doc__ != BaseModel.__doc__:
        lines += [" ".join(model.__doc__.split()), ""]
    rows = list(option_rows(model))
    if rows:
        lines.append("Options, under [method] in the TOML (key = default  # remark, source):")
        width = max(len(row.key) + len(row.default) for row in rows) + 3
        for row in rows:
            setting = f"{row.key} = {row.default}"
            lines.append(f"  {setting:<{width}}  {row.remark and '# '}{row.remark}".rstrip())
    presets = getattr(options, f"{name.upper()}_PRESETS", {})
    for preset, values in presets.items():
        lines.append(f'  preset = "{preset}" sets ' + ", ".join(f"{k} = {_show(v)}" for k, v in values.items()))
    for name_, info in model.model_fields.items():
        inner = _nested(info.annotation)[0]
        if inner is not None and inner.__doc__:
            lines += ["", f"  {name_}: {' '.join(inner.__doc__.split())}"]
    return "\n".join(lines).rstrip()


def summary(name: str) -> str:
    return " ".join(docstring(name).partition("\n\n")[0].split()) or "(no description)"


def overview() -> str:
    """The table of `bridgelm methods`, with those of installed packages."""
    wide = max(map(len, option_classes()))
    lines = []
    for name in option_classes():
        wanted = ", ".join(sorted(needs(name)))
        lines.append(f"{name:<{wide}}  {tier(name):<12}  {summary(name)}" + (f" [needs {wanted}]" if wanted else ""))
    lines += [f"{name:<{wide}}  {'installed':<12}  {entry.value}" for name, entry in plugins.installed("method").items()
              if name not in option_classes()]
    return "\n".join(lines)


def table() -> str:
    """All methods in their common form, for docs/methods.md."""
    head = ["method", "tier", "data of a step", "weight of a demo's token", "weight of a drawn token", "controller",
            "further models", "needs"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in option_classes():
        own = form(name)
        cells = [f"[`{name}`](methods/{name}.md)", tier(name),
                 *(own[key].replace("|", "\\|") for key in ("data", "demo", "rollout", "controller", "models")),
                 ", ".join(sorted(needs(name))) or "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
