"""`knights`: a knight's way between two squares, e.g. `knights 12 to 55 avoid 27 33 41 46 within 6`. The family
held out: it is in the base's pretraining, and no method is developed on it.

Squares of the 8 x 8 board are numbered 0..63 row by row. Answer: the squares visited, `29 44 ...`; a move is its own
restated state, so an answer costs one token a move. The squares to avoid, and those off the board, are illegal.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from bridgelm.data.toy.walk import cap_for, spread

SIDE = 8
BLOCKED = 4
WORDS = ("knights", "to", "avoid", "within")
FORM = re.compile(r"knights (\d+) to (\d+) avoid (\d+) (\d+) (\d+) (\d+) within (\d+)")
TOKENS_PER_MOVE = 1
LEAPS = ((-2, -1), (-2, 1), (-1, -2), (-1, 2), (1, -2), (1, 2), (2, -1), (2, 1))


def jumps(square: int) -> list[int]:
    row, column = divmod(square, SIDE)
    ends = [(row + r, column + c) for r, c in LEAPS]
    return [r * SIDE + c for r, c in ends if 0 <= r < SIDE and 0 <= c < SIDE]


TABLE = [jumps(square) for square in range(SIDE * SIDE)]
# The farthest that anything is from each square on an open board; squares to avoid seldom add more than one move.
FAR = [max(spread(lambda s: [("", to) for to in TABLE[s]], square).values()) for square in range(SIDE * SIDE)]


@dataclass(frozen=True, slots=True)
class Knights:
    start: int
    goal: int
    avoid: tuple[int, ...]
    cap: int

    def moves(self, state: int) -> list[tuple[str, int]]:
        return [(str(to), to) for to in TABLE[state] if to not in self.avoid]

    def solved(self, state: int) -> bool:
        return state == self.goal

    def show(self, state: int) -> str:
        return ""

    def key(self) -> str:
        """The same for problems that differ only in the order of the squares to avoid."""
        return f"knights {self.start} {self.goal} {sorted(self.avoid)}"

    def prompt(self) -> str:
        return f"knights {self.start} to {self.goal} avoid {' '.join(map(str, self.avoid))} within {self.cap}"


def sample(rng: random.Random, distance: int, slack: float) -> Knights:
    """A random problem whose shortest solution has exactly `distance` moves."""
    starts = [square for square in range(SIDE * SIDE) if FAR[square] >= distance - (distance < 6)]
    while True:
        start = rng.choice(starts)
        avoid = rng.sample([square for square in range(SIDE * SIDE) if square != start], BLOCKED)
        trial = Knights(start, -1, tuple(avoid), cap_for(distance, slack))
        goals = [square for square, d in spread(trial.moves, start).items() if d == distance]
        if goals:
            return Knights(start, rng.choice(goals), trial.avoid, trial.cap)


def parse(prompt: str) -> Knights:
    found = FORM.fullmatch(prompt)
    if found is None:
        raise ValueError(f"not a knights problem: {prompt!r}")
    start, goal, *avoid, cap = map(int, found.groups())
    return Knights(start, goal, tuple(avoid), cap)
