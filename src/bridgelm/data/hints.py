"""A problem's own demonstration, and where it can be cut: its first part is then a prefix that the policy continues."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bridgelm.data.chat import Chat
from bridgelm.types import Demo, Problem

WORD = ("Ġ", "▁", " ", "Ċ", "\n")  # how a token that begins a word, or a line, begins in the vocabularies of the day
LINE = ("Ċ", "\n", "<0x0A>")


def pick(problem: Problem, *key: int) -> Demo | None:
    """One of the problem's demonstrations; which one is seeded by `key`. None where it has none."""
    if not problem.demos:
        return None
    return problem.demos[int(np.random.default_rng(seed(*key)).integers(len(problem.demos)))]


def seed(*key: int) -> list[int]:
    return [part % 2**63 for part in key]


def written(chat: Chat, problem: Problem, demo: Demo) -> np.ndarray:
    """The demonstration's own tokens; the last one is the end token."""
    ids, own = chat.demo_ids(problem, demo)
    return ids[own]


def cuts(chat: Chat, answer: np.ndarray, pieces: int) -> list[int]:
    """Tokens up to the end of each of at most `pieces` pieces of about equal length; the end token is in none of them.
    Pieces end with a sentence or a line where the text has such ends, else anywhere."""
    length = len(answer) - 1
    ends = [end for end in sentence_ends(chat.tokenizer.convert_ids_to_tokens(answer[:-1].tolist())) if end < length]
    targets = [j * length / pieces for j in range(1, pieces)]
    inner = {min(ends, key=lambda end: (abs(end - t), end)) for t in targets} if ends else {int(t) for t in targets}
    return sorted({*inner, length} - {0})


def sentence_ends(tokens: Sequence[str]) -> list[int]:
    """How many tokens there are up to the end of each sentence or line."""
    found = []
    for i, token in enumerate(tokens, 1):
        stop = token.rstrip("\"')]*").endswith((".", "?", "!"))  # "3.14" is no end: no word begins after its point
        after = i < len(tokens) and tokens[i].startswith(WORD) and not tokens[i].startswith(LINE)
        line = any(mark in token for mark in LINE) and not (i < len(tokens) and tokens[i].startswith(LINE))
        if line or (stop and after):
            found.append(i)
    return found
