"""Prompt formats, which decide how a benchmark's problem is put to a model: declarative records, ours (`prompts.toml`)
or the user's. No torch."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError, field_validator

from bridgelm.config.options.base import Strict
from bridgelm.data.chat import Chat
from bridgelm.errors import UserError
from bridgelm.types import Problem

GAP = "{problem}"


class Shot(Strict):
    problem: str
    solution: str


class PromptFormat(Strict):
    """`text` holds {problem} once. A plain prompt is `shots`, each as `text` and its solution, then the problem."""

    about: str = ""
    style: Literal["chat", "plain"] = "chat"
    text: str
    system: str | None = None  # of a chat; unset: the model's own
    stop: list[str] = Field(default_factory=list)
    shots: list[Shot] = Field(default_factory=list)

    @field_validator("text")
    @classmethod
    def _has_one_gap(cls, text: str) -> str:
        if text.count(GAP) != 1:
            raise ValueError(f"it must hold {GAP} once, where the problem goes")
        return text

    def ids(self, chat: Chat, problem: Problem) -> np.ndarray:
        """The prompt's ids. Control tokens typed in a problem stay text in either style."""
        before, _, after = self.text.partition(GAP)
        if self.style == "plain":
            worked = "".join(f"{before}{shot.problem}{after} {shot.solution}\n\n" for shot in self.shots)
            return chat.plain_ids(worked + before, problem.prompt, after)
        turns = [turn for shot in self.shots for turn in ({"role": "user", "content": before + shot.problem + after},
                                                          {"role": "assistant", "content": shot.solution})]
        own = [*problem.messages[:-1], {**problem.messages[-1], "content": before + problem.prompt + after}]
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        if system and own[0]["role"] == "system":
            own = own[1:]
        return chat.prompt_ids(replace(problem, messages=(*system, *turns, *own)))

    def read(self, chat: Chat, ids: np.ndarray) -> str:
        """What a grader reads of a completion: up to the stop string, with the think block that a chat opened."""
        text = chat.turn(ids) if self.style == "chat" else chat.text(ids)
        cuts = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        return text[:min(cuts)] if cuts else text


@cache
def formats() -> dict[str, PromptFormat]:
    file = Path(__file__).with_name("prompts.toml")
    return {name: PromptFormat.model_validate(raw) for name, raw in tomllib.loads(file.read_text("utf-8")).items()}


def prompt_format(name: str) -> PromptFormat:
    """One of ours by name, or the user's own from a TOML file with the same keys."""
    if name in formats():
        return formats()[name]
    path = Path(name)
    if not path.is_file():
        raise UserError(f"prompt: no format {name!r}; choose from {', '.join(formats())}, or give a TOML file with "
                        f'text = "... {GAP} ..."')
    try:
        return PromptFormat.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"prompt: {path}: not a TOML file ({error})") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"prompt: {path}: {key}: {first['msg'].removeprefix('Value error, ')}") from None
