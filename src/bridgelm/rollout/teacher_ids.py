"""Maps a row of the policy to the token ids that the teacher reads, and checks that their tokenizers agree. No torch.

The log-probs of two models can be compared token by token only if an id means the same to both. The ordinary tokens of
the two must therefore be the same, and text must be split alike. Control tokens may differ, as between a base model and
a chat model; the teacher gives no log-prob on one that it does not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bridgelm.config.run_config import ModelConfig, RunConfig
from bridgelm.data.chat import Chat, load_chat
from bridgelm.errors import UserError
from bridgelm.types import Row

PROBES = ("The answer is 1234567890.", "  \\boxed{\\frac{1}{2}}\n\n", "naïve 数学 🙂", "def f(x):\n\treturn x**2  # y")
KEPT = ("dtype", "device", "attention", "system_prompt")  # taken from [model] where [teacher] leaves them out


class TeacherModel(ModelConfig):
    """[teacher], with what it leaves out taken from [model]."""

    section: ClassVar[str] = "teacher"


def teacher_model(config: RunConfig) -> TeacherModel:
    assert config.teacher is not None
    given = {key: value for key, value in config.teacher.model_dump().items() if value is not None}
    found = {key: getattr(config.model, key) for key in KEPT} | given
    return TeacherModel.model_validate(found | {"system_prompt": found["system_prompt"] or None})


@dataclass(frozen=True)
class Shown:
    """A row as the teacher reads it: the teacher's own prompt, then the row from its first own token on."""

    ids: np.ndarray
    taught: np.ndarray  # mask of the tokens that it gives log-probs for


class Reader:
    """Turns a row of the policy into the row that the teacher reads."""

    def __init__(self, student: Chat, teacher: Chat) -> None:
        self.student, self.teacher = student, teacher
        self.known = same_tokens(student, teacher)
        # A policy with another end token than the teacher would be punished each time it ends, so this token is left
        # out.
        self.foreign_ends = np.array(sorted((student.eos_ids | teacher.eos_ids) - {teacher.eos_id}), dtype=np.int64)
        # A think block that the policy's prompt opens is part of the turn that the teacher continues.
        opened = student.opens_think and not teacher.opens_think
        self.opening = teacher.encode("<think>\n") if opened else np.empty(0, dtype=np.int64)

    @classmethod
    def of(cls, config: RunConfig, student: Chat) -> Reader:
        return cls(student, load_chat(teacher_model(config)))

    def shown(self, row: Row) -> Shown:
        first = int(np.argmax(row.own))
        prompt = np.concatenate([self.teacher.prompt_ids(row.problem), self.opening])
        tail, own = row.ids[first:], row.own[first:]
        known = (tail < len(self.known)) & self.known[np.minimum(tail, len(self.known) - 1)]
        # After a token that it does not know, the teacher would be scoring another text.
        taught = own & np.logical_and.accumulate(known) & ~np.isin(tail, self.foreign_ends)
        ids = np.concatenate([prompt, np.where(known, tail, self.teacher.pad_id)])
        return Shown(ids, np.concatenate([np.zeros(len(prompt), dtype=bool), taught]))

    @staticmethod
    def placed(row: Row, shown: Shown, logps: np.ndarray) -> np.ndarray:
        """The teacher's log-probs at the places of the row's own tokens; NaN where it gives none."""
        out = np.full(len(row.ids), np.nan)
        first = int(np.argmax(row.own))
        behind = len(row.ids) - first
        out[first:] = np.where(shown.taught, logps, np.nan)[-behind:]
        return out


def same_tokens(student: Chat, teacher: Chat) -> np.ndarray:
    """Whether each id of the policy means the same to the teacher. Ordinary tokens must, control tokens need
    not."""
    mine, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    known = np.zeros(max(mine.values()) + 1, dtype=bool)
    known[[i for token, i in mine.items() if theirs.get(token) == i]] = True
    control = student.control_ids | teacher.control_ids
    other = sorted((i, token) for token, i in mine.items() if not known[i] and i not in control)
    fix = "log-probs of tokens need one tokenizer: choose a teacher of the model's own family"
    if other:
        i, token = other[0]
        there = theirs.get(token)
        where = "missing there" if there is None else f"{there} there"
        raise UserError(f"teacher.name_or_path: its tokenizer is not that of model.name_or_path: {len(other)} tokens "
                        f"differ, for instance {token!r}, {i} here and {where}; {fix}")
    for probe in PROBES:
        if not np.array_equal(student.encode(probe), teacher.encode(probe)):
            raise UserError(f"teacher.name_or_path: its tokenizer has the tokens of model.name_or_path, but cuts text "
                            f"into others ({probe!r}); {fix}")
    return known
