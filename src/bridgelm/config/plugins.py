"""Classes by their names: our methods, and methods, verifiers and engines of one's own, without a fork. Those are named
by their file (`path/to/file.py:Class`), by their module (`package.module:Class`), or by the name that an installed
package gives them as an entry point."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import itertools
import re
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel, PlainSerializer, ValidatorFunctionWrapHandler, WrapValidator, create_model

from bridgelm.config.options.base import Strict
from bridgelm.errors import UserError

METHODS = Path(__file__).parents[1] / "methods"
Kind = Literal["method", "verifier", "engine"]
_NUMBERS = itertools.count()  # two files may have the same stem
_LOADED: dict[tuple[Path, int, int], ModuleType] = {}  # by file, time and size: a class is made once


@cache
def installed(kind: Kind) -> dict[str, EntryPoint]:
    """What packages offer in the group `bridgelm.methods`, `bridgelm.verifiers` or `bridgelm.engines`."""
    return {entry.name: entry for entry in entry_points(group=f"bridgelm.{kind}s")}


@cache
def ours() -> dict[str, str]:
    """Our methods, name -> module:Class: a file each in methods/, which is imported when a run names it."""
    found = {}
    for path in sorted(METHODS.glob("*.py")):
        if cls := re.search(r"^class (\w+)\(Method\b(?!, )", path.read_text(encoding="utf-8"), re.MULTILINE):
            found[path.stem] = f"bridgelm.methods.{path.stem}:{cls[1]}"
    return found


def is_own(kind: Kind, name: str) -> bool:
    return ":" in name or (name in installed(kind) and not (kind == "method" and name in ours()))


def short(name: str) -> str:
    """How a method is called where there is no room for its file."""
    return name.rpartition(":")[2]


def load(kind: Kind, name: str) -> type[Any]:
    """The class that a name stands for; a UserError says in one line why there is none."""
    known = ours().get(name) if kind == "method" else None
    place, _, wanted = (name if ":" in name else known or installed(kind)[name].value).rpartition(":")
    if not place or not wanted.isidentifier():
        raise UserError(f"{name!r}: write it as path/to/file.py:Class or package.module:Class")
    module = _file(Path(place)) if place.endswith(".py") else _imported(place)
    found = getattr(module, wanted, None)
    if not inspect.isclass(found):
        have = [key for key, value in vars(module).items()
                if inspect.isclass(value) and value.__module__ == module.__name__]
        raise UserError(f"{place} has no class {wanted!r}; it has {', '.join(have) or 'none'}")
    return found


def load_method(name: str) -> type[Any]:
    """The same, if it is a method; its base class is not imported here, since it needs torch."""
    found = load("method", name)
    if not any((cls.__module__, cls.__name__) == ("bridgelm.methods.base", "Method") for cls in found.__mro__):
        raise UserError(f"{name}: {found.__name__} is no method; derive it from bridgelm.methods.base.Method")
    if inspect.isabstract(found):
        raise UserError(f"{name}: {found.__name__} lacks {', '.join(sorted(found.__abstractmethods__))}; a method "
                        "defines gather, terms and update")
    return found


@cache
def _options(cls: type[Any], name: str) -> type[BaseModel]:
    base = cls.Options
    if not (inspect.isclass(base) and issubclass(base, Strict)):
        raise UserError(f"{name}: {cls.__name__}.Options must be a class derived from bridgelm.config.options.Strict")
    return create_model(f"{cls.__name__} by name", __base__=base, __module__=base.__module__, __doc__=base.__doc__,
                        name=(Literal[name], name))  # type: ignore[valid-type]


def option_class(name: str) -> type[BaseModel]:
    """The options that stand beside a method: its `Options`, with `name` among them."""
    return _options(load_method(name), name)


def options(name: str, value: dict[str, Any]) -> BaseModel:
    model = option_class(name)
    known = {field.alias or key for key, field in model.model_fields.items()}
    for key in value:
        if key not in known and key not in model.model_fields:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise UserError(f"unknown key {key!r} of {name}; {hint}")
    return model.model_validate(value)


def source(kind: Kind, name: str) -> Path:
    """The file that a class of one's own stands in."""
    return Path(str(sys.modules[load(kind, name).__module__].__file__))


def full(name: str) -> str:
    """The name with the path of its file made absolute, since a run folder is read from any directory."""
    place, sign, wanted = name.rpartition(":")
    return f"{Path(place).expanduser().absolute()}{sign}{wanted}" if place.endswith(".py") else name


def _file(path: Path) -> ModuleType:
    path = path.expanduser().absolute()
    if not path.is_file():
        raise UserError(f"{path} does not exist; paths start where the command is run")
    stat = path.stat()
    key = path, stat.st_mtime_ns, stat.st_size
    if key not in _LOADED:
        _LOADED[key] = execute(path)
    return _LOADED[key]


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the module is the user's: whatever it raises, they are told where
        raise UserError(f"{name} cannot be imported ({type(error).__name__}: {error}); install its package, or name "
                        "its file: path/to/file.py:Class") from None


def execute(file: Path) -> ModuleType:
    """A file of the user as a module of its own; its helpers may lie beside it."""
    spec = importlib.util.spec_from_file_location(f"bridgelm_own_{file.stem}_{next(_NUMBERS)}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(file.resolve().parent)
    sys.modules[module.__name__] = module  # dataclasses and pydantic look their module up there
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the file is the user's: whatever it raises, they are told where
        del sys.modules[module.__name__]
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UserError(f"{file}{line} cannot be loaded: {type(error).__name__}: {error}") from None
    finally:
        sys.path.remove(folder)
    return module


def or_own(kind: Kind, method: str) -> tuple[WrapValidator, PlainSerializer]:
    """Lets a field of our own words also take the name of a class that has `method`."""
    def chosen(value: Any, ours: ValidatorFunctionWrapHandler) -> Any:
        if not isinstance(value, str) or not is_own(kind, value):
            return ours(value)
        if not callable(getattr(load(kind, value), method, None)):
            raise UserError(f"{value}: it has no method {method!r}, so it is no {kind}")
        return value
    return WrapValidator(chosen), PlainSerializer(str)
