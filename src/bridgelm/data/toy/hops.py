"""`hops`: from one number to another by given operations, e.g. `hops 7 to 31 by +3 *2 -5 within 6`.

Answer: `+3 10 *2 20 ...`. Numbers stay within 0..29; a move that would leave the range, or halve an odd number, is
illegal.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from bridgelm.data.toy.walk import cap_for, spread

TOP = 29
UP = ("+3", "+4", "+5", "+7", "+8")
DOWN = ("-2", "-3", "-5", "-6", "-7")
JUMP = ("*2", "*3", "/2")
MOVES = UP + DOWN + JUMP
WORDS = ("hops", "to", "by", "within", *MOVES)
FORM = re.compile(r"hops (\d+) to (\d+) by (\S+) (\S+) (\S+) within (\d+)")
TOKENS_PER_MOVE = 2


def apply(number: int, move: str) -> int | None:
    """The number after the move, or None where the move is illegal."""
    kind, by = move[0], int(move[1:])
    if kind == "/":
        return number // by if number % by == 0 and number else None
    after = number + by if kind == "+" else number - by if kind == "-" else number * by
    return after if 0 <= after <= TOP and after != number else None


TABLE = {m: [apply(n, m) for n in range(TOP + 1)] for m in MOVES}


@dataclass(frozen=True, slots=True)
class Hops:
    start: int
    goal: int
    ops: tuple[str, ...]
    cap: int

    def moves(self, state: int) -> list[tuple[str, int]]:
        return [(m, after) for m in self.ops if (after := TABLE[m][state]) is not None]

    def solved(self, state: int) -> bool:
        return state == self.goal

    def show(self, state: int) -> str:
        return str(state)

    def key(self) -> str:
        """The same for problems that differ only in the order of their operations."""
        return f"hops {self.start} {self.goal} {' '.join(sorted(self.ops))}"

    def prompt(self) -> str:
        return f"hops {self.start} to {self.goal} by {' '.join(self.ops)} within {self.cap}"


def sample(rng: random.Random, distance: int, slack: float) -> Hops:
    """A random problem whose shortest solution has exactly `distance` moves."""
    while True:
        ops = [rng.choice(UP), rng.choice(DOWN), rng.choice(JUMP)]
        rng.shuffle(ops)
        start = rng.randint(0, TOP)
        trial = Hops(start, -1, tuple(ops), cap_for(distance, slack))
        goals = [n for n, d in spread(trial.moves, start).items() if d == distance]
        if goals:
            return Hops(start, rng.choice(goals), trial.ops, trial.cap)


def parse(prompt: str) -> Hops:
    found = FORM.fullmatch(prompt)
    if found is None:
        raise ValueError(f"not a hops problem: {prompt!r}")
    start, goal, *ops, cap = found.groups()
    return Hops(int(start), int(goal), tuple(ops), int(cap))
