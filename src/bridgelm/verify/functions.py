"""The user's reward functions: `file.py:name` with TRL's signature `f(prompts, completions, **columns)`."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bridgelm.errors import UserError
from bridgelm.types import Problem

_NUMBERS = itertools.count()  # two files may have the same stem


class RewardFunction:
    """Calls the function as TRL would. Whatever it raises is a fault of the whole call: nan for every completion."""

    def __init__(self, function: Callable[..., Any], name: str):
        self._function, self._name = function, name
        self.last_error = ""
        parameters = inspect.signature(function).parameters.values()
        self._takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        self._names = {p.name for p in parameters}

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[float | None]:
        try:
            return self._checked(self._function(**self._arguments(problems, texts)), len(texts))
        except Exception as error:  # user code may raise anything; the run counts it and stops above a set rate
            self.last_error = f"reward function {self._name}: {type(error).__name__}: {error}"
            return [math.nan] * len(texts)

    def _arguments(self, problems: Sequence[Problem], texts: Sequence[str]) -> dict[str, list[Any]]:
        columns = {name: [p.columns.get(name) for p in problems] for name in _names(problems)}
        columns["answer"] = [p.answer for p in problems]
        columns.setdefault("difficulty", [p.difficulty for p in problems])
        columns["prompts"] = [[*p.messages] if p.conversational else p.prompt for p in problems]
        columns["completions"] = [[{"role": "assistant", "content": text}] if p.conversational else text
                                  for p, text in zip(problems, texts, strict=True)]
        return {name: values for name, values in columns.items() if self._takes_all or name in self._names}

    def _checked(self, scores: Any, count: int) -> list[float | None]:
        scores = list(scores)
        if len(scores) != count:
            raise ValueError(f"returned {len(scores)} rewards for {count} completions")
        return [None if score is None else float(score) for score in scores]


def _names(problems: Sequence[Problem]) -> list[str]:
    """The columns of all rows: they need not all have the same."""
    return list(dict.fromkeys(name for problem in problems for name in problem.columns))


def load_function(spec: str) -> RewardFunction:
    path, _, name = spec.rpartition(":")
    file = Path(path)
    if not path or not name.isidentifier() or file.suffix != ".py":
        raise UserError(f"reward.functions: {spec!r}: write it as path/to/file.py:function")
    if not file.is_file():
        raise UserError(f"reward.functions: {path} does not exist; paths start where the command is run")
    module_spec = importlib.util.spec_from_file_location(f"bridgelm_reward_{file.stem}_{next(_NUMBERS)}", file)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    folder = str(file.resolve().parent)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    sys.path.insert(0, folder)  # the user's helpers lie beside the file
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # the file is the user's: whatever it raises while loading, they are told where
        del sys.modules[module.__name__]
        raise UserError(f"reward.functions: {path} cannot be loaded: {type(error).__name__}: {error}") from None
    finally:
        sys.path.remove(folder)
    function = getattr(module, name, None)
    if not callable(function):
        have = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(f"reward.functions: {path} has no function {name!r}; it has {', '.join(have) or 'none'}")
    return RewardFunction(function, spec)
