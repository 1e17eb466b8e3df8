"""The user's reward functions: `file.py:name` with TRL's signature `f(prompts, completions, **columns)`.

They are users' code in our process. Whatever they raise, sys.exit() included, is counted as a fault; what they print
goes to standard error; and they get copies of their arguments, so that they can change nothing of ours.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from bridgelm.config.plugins import execute
from bridgelm.errors import UserError
from bridgelm.types import Problem

SHORT = 80  # characters that an error message quotes


class WrongReturn(Exception):
    """A function returned something other than a list of rewards."""


class RewardFunction:
    """Calls the function as TRL would. If it raises, the whole call is at fault, and every completion scores nan. If
    one reward is not a finite number, only its completion is at fault."""

    def __init__(self, function: Callable[..., Any], name: str):
        self._function, self._name = function, name
        code = getattr(inspect.unwrap(function), "__code__", None)
        self._file = code.co_filename if code else name.rpartition(":")[0]
        self.place = self._at(code.co_firstlineno if code else None)
        self.last_error = ""
        parameters = inspect.signature(function).parameters.values()
        self._takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        self._names = {p.name for p in parameters}

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[float | None]:
        place = self.place
        arguments = self._arguments(problems, texts)
        try:
            with interrupts() as pressed, contextlib.redirect_stdout(Prints(sys.stdout, self.place)):  # type: ignore[type-var]
                scores = listed(self._function(**arguments), len(texts))  # which also runs it, if it is a generator
                return [self._number(score, problem, text)
                        for score, problem, text in zip(scores, problems, texts, strict=True)]
        except WrongReturn as error:
            fault = str(error)
        except SystemExit as error:
            place = self._where(error)
            fault = f"it called sys.exit({error.code!r}), and can only return rewards: raise an error instead"
        except KeyboardInterrupt as error:
            if pressed() or type(error) is not KeyboardInterrupt:  # Ctrl-C must still stop the run
                raise
            place, fault = self._where(error), "it raised KeyboardInterrupt, and nobody pressed Ctrl-C"
        # Users' code may raise anything; the run counts faults, and stops if there are too many.
        except BaseException as error:
            place, fault = self._where(error), f"{type(error).__name__}: {error}"
        more = f", the first of the {len(texts)} of its call" if len(texts) > 1 else ""
        self.last_error = f"{place}: {fault} ({said(problems[0], texts[0])}{more})"
        return [math.nan] * len(texts)

    def _number(self, score: Any, problem: Problem, text: str) -> float | None:
        """A reward as a float, None for no opinion, and nan for a fault."""
        if score is None:
            return None
        if isinstance(score, str | bytes) or not hasattr(score, "__float__") or getattr(score, "ndim", 0):
            fault = f"it returned {short(repr(score))} ({type(score).__name__}) as a reward, which is no number"
        elif not math.isfinite(number := float(score)):
            fault = f"it returned {number} as a reward, which is no finite number; return None for no opinion"
        else:
            return number
        self.last_error = f"{self.place}: {fault} ({said(problem, text)})"
        return math.nan

    def _at(self, line: int | None) -> str:
        at = f", line {line}" if line else ""
        return f"reward function {self._name.rpartition(':')[2]} ({self._file}{at})"

    def _where(self, error: BaseException) -> str:
        """The name of the function, with the last line of its own file that ran before the error."""
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self._file]
        return self._at(lines[-1]) if lines else self.place

    def _arguments(self, problems: Sequence[Problem], texts: Sequence[str]) -> dict[str, list[Any]]:
        """The arguments of a call, copied, so that nothing else sees what the function changes in them."""
        columns = {name: [p.columns.get(name) for p in problems] for name in _names(problems)}
        columns["answer"] = [p.answer for p in problems]
        columns.setdefault("difficulty", [p.difficulty for p in problems])
        columns["prompts"] = [[*p.messages] if p.conversational else p.prompt for p in problems]
        columns["completions"] = [[{"role": "assistant", "content": text}] if p.conversational else text
                                  for p, text in zip(problems, texts, strict=True)]
        return {name: [copy.deepcopy(value) for value in values] for name, values in columns.items()
                if self._takes_all or name in self._names}


def listed(scores: Any, count: int) -> list[Any]:
    """The rewards that a function returned, as a list. A text or a mapping is no list of rewards."""
    if isinstance(scores, str | bytes | Mapping | Set) or not hasattr(scores, "__iter__"):
        if inspect.iscoroutine(scores):
            scores.close()
        raise WrongReturn(f"it returned {short(repr(scores))} ({type(scores).__name__}), not a list of {count} rewards")
    scores = list(scores)
    if len(scores) != count:
        raise WrongReturn(f"it returned {len(scores)} rewards for {count} completions")
    return scores


def short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHORT else text[:SHORT - 3] + "..."


def said(problem: Problem, text: str) -> str:
    """Which sample a fault is about."""
    place = f" at {problem.place}" if problem.place else ""
    return f"problem {problem.id!r}{place}, completion {short(text)!r}"


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Tells whether Ctrl-C was pressed in the block. Only the main thread can know, as signals go there."""
    before = signal.getsignal(signal.SIGINT)
    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: False
        return

    def handler(number: int, frame: Any) -> Any:
        pressed.append(number)
        return before(number, frame)

    signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


class Prints:
    """Replaces standard output while a function runs. What the function's thread prints goes to standard error, so that
    it does not garble results and the progress display; what other threads print goes to standard output as usual."""

    def __init__(self, stdout: Any, place: str) -> None:
        self._stdout, self._place, self._thread = stdout, place, threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() != self._thread:
            return self._stdout.write(text)
        if self._place not in _PRINTING:
            _PRINTING.add(self._place)
            sys.stderr.write(f"{self._place} prints; what it prints goes to standard error:\n")
        return sys.stderr.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stdout, name)


_PRINTING: set[str] = set()  # functions whose user was told once that they print


def _names(problems: Sequence[Problem]) -> list[str]:
    """The columns of all rows together, as rows need not all have the same columns."""
    return list(dict.fromkeys(name for problem in problems for name in problem.columns))


def load_function(spec: str) -> RewardFunction:
    path, _, name = spec.rpartition(":")
    file = Path(path)
    if not path or not name.isidentifier() or file.suffix != ".py":
        raise UserError(f"reward.functions: {spec!r}: write it as path/to/file.py:function")
    if not file.is_file():
        raise UserError(f"reward.functions: {path} does not exist; paths start where the command is run")
    try:
        module = execute(file)
    except UserError as error:
        raise UserError(f"reward.functions: {error}") from None
    function = getattr(module, name, None)
    if not callable(function):
        have = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(f"reward.functions: {path} has no function {name!r}; it has {', '.join(have) or 'none'}")
    return RewardFunction(function, spec)
