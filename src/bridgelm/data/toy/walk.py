"""What every puzzle family has in common: states, legal moves, a goal and a cap on the number of moves.

An answer is a walk, `move state move state ...`: each move is one token and the state it leads to is
restated, so legality and bookkeeping are primitives that a base model can have, and *where to go* is the
skill that training must add.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

State = Any  # hashable; each family has its own kind


class Puzzle(Protocol):
    """One problem of one family. Instances are frozen and hashable, so distances can be cached."""

    cap: int

    @property
    def start(self) -> State: ...
    def moves(self, state: State) -> list[tuple[str, State]]: ...
    def solved(self, state: State) -> bool: ...
    def show(self, state: State) -> str: ...
    def key(self) -> str: ...
    def prompt(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Step:
    """One move and the state that it leads to."""

    move: str
    state: State


def cap_for(distance: int, slack: float) -> int:
    """Moves allowed: at least 1.5 times the shortest solution, so that the cap never excludes a reference."""
    return max(math.ceil(1.5 * distance), math.ceil(slack * distance))


@lru_cache(maxsize=4096)
def distances(puzzle: Puzzle) -> dict[State, int]:
    """Moves still needed from each state that can be reached from the start (states without a way out are absent)."""
    parents: dict[State, list[State]] = {puzzle.start: []}
    order = [puzzle.start]
    for state in order:
        for _, after in puzzle.moves(state):
            if after not in parents:
                parents[after] = []
                order.append(after)
            parents[after].append(state)
    left = {state: 0 for state in order if puzzle.solved(state)}
    queue = list(left)
    for state in queue:
        for before in parents[state]:
            if before not in left:
                left[before] = left[state] + 1
                queue.append(before)
    return left


def spread(moves: Callable[[Any], list[tuple[str, Any]]], start: State) -> dict[State, int]:
    """Breadth-first distance of every state from `start`, under the function `moves(state)`."""
    far = {start: 0}
    queue = [start]
    for state in queue:
        for _, after in moves(state):
            if after not in far:
                far[after] = far[state] + 1
                queue.append(after)
    return far


def shortest(puzzle: Puzzle, rng: random.Random) -> list[Step]:
    """A shortest solution; ties are broken at random, so that two traces of one problem may differ."""
    left, state, steps = distances(puzzle), puzzle.start, []
    while not puzzle.solved(state):
        best = [(m, s) for m, s in puzzle.moves(state) if left.get(s, math.inf) == left[state] - 1]
        move, state = rng.choice(best)
        steps.append(Step(move, state))
    return steps


def wander(puzzle: Puzzle, rng: random.Random, length: int, stop: bool = True) -> list[Step]:
    """A legal walk of uniformly random moves, ended at the goal if `stop`, and after `length` moves anyway."""
    state, steps = puzzle.start, []
    while len(steps) < length and not (stop and puzzle.solved(state)):
        move, state = rng.choice(puzzle.moves(state))
        steps.append(Step(move, state))
    return steps


def write(puzzle: Puzzle, steps: list[Step]) -> str:
    return " ".join(f"{step.move} {puzzle.show(step.state)}".strip() for step in steps)


def replay(puzzle: Puzzle, text: str) -> Iterator[Step]:
    """The steps of an answer; raises ValueError at the first that is illegal or whose state is wrongly restated."""
    words, at, state = text.split(), 0, puzzle.start
    while at < len(words):
        after = dict(puzzle.moves(state)).get(words[at])
        if after is None:
            raise ValueError(f"illegal move {words[at]!r}")
        shown = puzzle.show(after).split()
        if words[at + 1 : at + 1 + len(shown)] != shown:
            raise ValueError(f"wrong state after {words[at]!r}")
        at, state = at + 1 + len(shown), after
        yield Step(words[at - 1 - len(shown)], state)


def solves(puzzle: Puzzle, text: str) -> bool:
    """True if the text is a legal walk within the cap whose last state is the goal. No other text can pass."""
    if len(text) > 10_000:  # far beyond any cap: refuse before doing work that grows with the garbage
        return False
    try:
        steps = list(replay(puzzle, text))
    except ValueError:
        return False
    return 0 < len(steps) <= puzzle.cap and puzzle.solved(steps[-1].state)
