"""`jugs`: measure an amount with two jugs, e.g. `jugs 3 5 at 0 0 to 4 within 9` (either jug may hold it in the end).

Answer: `fillB 0 5 pourBA 3 2 ...`, the two contents restated after each move; moves that change nothing are illegal.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from bridgelm.data.toy.walk import cap_for, spread

TOP = 9  # the largest jug
MOVES = ("fillA", "fillB", "emptyA", "emptyB", "pourAB", "pourBA")
WORDS = ("jugs", "at", "to", "within", *MOVES)
FORM = re.compile(r"jugs (\d+) (\d+) at (\d+) (\d+) to (\d+) within (\d+)")
TOKENS_PER_MOVE = 3


@dataclass(frozen=True, slots=True)
class Jugs:
    sizes: tuple[int, int]
    start: tuple[int, int]
    goal: int
    cap: int

    def moves(self, state: tuple[int, int]) -> list[tuple[str, tuple[int, int]]]:
        (a, b), (size_a, size_b) = state, self.sizes
        to_b, to_a = min(a, size_b - b), min(b, size_a - a)
        after = [(size_a, b), (a, size_b), (0, b), (a, 0), (a - to_b, b + to_b), (a + to_a, b - to_a)]
        return [(m, s) for m, s in zip(MOVES, after, strict=True) if s != state]

    def solved(self, state: tuple[int, int]) -> bool:
        return self.goal in state

    def show(self, state: tuple[int, int]) -> str:
        return f"{state[0]} {state[1]}"

    def key(self) -> str:
        """The same for problems that are each other's mirror image."""
        return f"jugs {sorted(zip(self.sizes, self.start, strict=True))} {self.goal}"

    def prompt(self) -> str:
        (size_a, size_b), (a, b) = self.sizes, self.start
        return f"jugs {size_a} {size_b} at {a} {b} to {self.goal} within {self.cap}"


@lru_cache(maxsize=1)
def by_distance() -> dict[int, list[tuple[tuple[int, int], tuple[int, int], int]]]:
    """Every (sizes, start, goal) under its number of moves: far problems are too rare to be found by drawing."""
    found: dict[int, list] = {}
    for sizes in product(range(2, TOP + 1), range(2, TOP + 1)):
        for start in product(range(sizes[0] + 1), range(sizes[1] + 1)):
            nearest: dict[int, int] = {}
            for state, d in spread(Jugs(sizes, start, -1, 0).moves, start).items():  # in order of distance
                for amount in state:
                    nearest.setdefault(amount, d)
            for amount, d in nearest.items():
                found.setdefault(d, []).append((sizes, start, amount))
    return found


def sample(rng: random.Random, distance: int, slack: float) -> Jugs:
    """A random problem whose shortest solution has exactly `distance` moves."""
    return Jugs(*rng.choice(by_distance()[distance]), cap_for(distance, slack))


def parse(prompt: str) -> Jugs:
    found = FORM.fullmatch(prompt)
    if found is None:
        raise ValueError(f"not a jugs problem: {prompt!r}")
    size_a, size_b, a, b, goal, cap = map(int, found.groups())
    return Jugs((size_a, size_b), (a, b), goal, cap)
