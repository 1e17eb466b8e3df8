"""Where a demonstration is cut into pieces, and which demonstration of a problem is taken."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bridgelm.data import hints
from bridgelm.types import Demo, Problem


def chat(tokens: list[str]) -> Any:
    return SimpleNamespace(tokenizer=SimpleNamespace(convert_ids_to_tokens=lambda ids: [tokens[i] for i in ids]))


def cuts(tokens: list[str], pieces: int) -> list[int]:
    return hints.cuts(chat(tokens), np.arange(len(tokens) + 1), pieces)


def test_without_sentences_pieces_are_equal_numbers_of_tokens() -> None:
    assert cuts(["x"] * 10, 5) == [2, 4, 6, 8, 10]
    assert cuts(["x"] * 12, 5) == [2, 4, 7, 9, 12]
    assert cuts(["x"] * 3, 5) == [1, 2, 3], "at most five"
    assert cuts(["x"], 5) == [1]
    assert cuts([], 5) == [], "an end token alone has nothing to show"
    for length in range(1, 40):
        for pieces in range(1, 12):
            found = cuts(["x"] * length, pieces)
            assert found == sorted(set(found)) and found[-1] == length and len(found) == min(pieces, length)
            sizes = np.diff([0, *found])
            assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize(("tokens", "ends"), [
    (["A", "Ġb", ".", "ĠC", "Ġd", ".", "ĠE"], [3, 6]),  # byte-level
    (["▁A", "▁b", ".", "▁C", "?", "▁E"], [3, 5]),  # sentencepiece
    (["x", "Ġ=", "Ġ3", ".", "1", "4", "Ġy", "."], []),  # a number, and an end that is the text's own
    (["a", "Ċ", "b", "ĊĊ", "c", ".Ċ", "d"], [2, 4, 6]),  # lines
    (["a", ".", "Ċ", "Ċ", "b"], [4]),  # one end, not three
    (["He", "Ġsaid", "Ġ\"", "no", ".\"", "ĠThen"], [5]),
    (["a", ".", "b", "."], []),  # a word-level vocabulary has no marks
])
def test_sentences_and_lines_end_pieces(tokens: list[str], ends: list[int]) -> None:
    assert hints.sentence_ends(tokens) == ends
    inner = cuts(tokens, len(tokens))[:-1]
    assert inner == (ends or list(range(1, len(tokens))))


def test_pieces_end_at_the_sentence_nearest_to_equal_parts() -> None:
    tokens = ["w"] * 4 + [".", "Ġw"] + ["w"] * 1 + ["?", "Ġw"] + ["w"] * 11  # ends at 5 and 8 of 20
    assert cuts(tokens, 2) == [8, 20]
    assert cuts(tokens, 4) == [5, 8, 20]


def test_the_demonstration_is_drawn_by_its_key() -> None:
    problem = Problem("p", (), demos=tuple(Demo(text) for text in "abc"))
    drawn = [hints.pick(problem, 2**70 + 5, step, 1) for step in range(600)]
    assert drawn == [hints.pick(problem, 2**70 + 5, step, 1) for step in range(600)]
    counts = Counter(demo.text for demo in drawn if demo)
    assert set(counts) == set("abc") and all(abs(n - 200) < 4 * np.sqrt(600 * 2 / 9) for n in counts.values())
    assert drawn != [hints.pick(problem, 2**70 + 5, step, 2) for step in range(600)]
    assert hints.pick(Problem("q", ()), 1) is None
