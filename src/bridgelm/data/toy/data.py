"""Problems and demonstrations of the embedded task, deterministic by seed. No torch.

Splits are disjoint by construction: a problem belongs to the split that the hash of its key falls into, whatever the
seed, and the key is the same for problems that are the same up to renaming.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from bridgelm.data.toy import hops, jugs, knights
from bridgelm.data.toy.walk import Puzzle, Step, distances, shortest, solves, wander, write
from bridgelm.types import Demo, Problem

FAMILIES: dict[str, Any] = {"hops": hops, "jugs": jugs, "knights": knights}
HELD_OUT = "knights"  # in the base's pretraining; no method is developed on it
# Hash buckets of 100. "demos" is the pool of the separate layout, on problems that no other split has.
BUCKETS = {
    "train": range(40),
    "demos": range(40, 55),
    "validation": range(55, 65),
    "test": range(65, 85),
    "hard": range(85, 100),
}
SLACK = {"hops": 2.0, "jugs": 2.0, "knights": 2.0}  # moves allowed, as a multiple of the shortest solution
# Distances (moves of a shortest solution) of each tier. "easy" is the range of demonstrations within the base's reach,
# "rl" that of training, validation and test, "beyond" and "hard" the two parts of the hard split, "far" the range of
# demonstrations beyond the base's reach.
TIERS: dict[str, dict[str, tuple[int, int]]] = {
    "hops": {"easy": (2, 4), "rl": (3, 6), "beyond": (7, 8), "hard": (9, 10), "far": (9, 10)},
    "jugs": {"easy": (1, 4), "rl": (1, 5), "beyond": (6, 6), "hard": (7, 9), "far": (6, 9)},
    "knights": {"easy": (1, 2), "rl": (1, 4), "beyond": (5, 5), "hard": (6, 6), "far": (6, 6)},
}
PATIENCE = 400  # draws without a new problem after which a distance counts as used up

Layout = Literal["separate", "paired"]
Reach = Literal["within", "beyond"]


def split_of(puzzle: Puzzle) -> str:
    bucket = int.from_bytes(hashlib.sha256(puzzle.key().encode()).digest()[:4], "big") % 100
    return next(name for name, buckets in BUCKETS.items() if bucket in buckets)


def puzzle_of(problem: Problem) -> Puzzle:
    return FAMILIES[problem.columns["family"]].parse(problem.prompt)


def distances_in(tiers: Sequence[tuple[int, int]]) -> list[int]:
    return [d for low, high in tiers for d in range(low, high + 1)]


def problems(
    family: str,
    split: str,
    n: int,
    seed: int = 0,
    difficulty: int | Sequence[int] | None = None,
    exact: bool = True,
) -> list[Problem]:
    """`n` different problems in random order, over the distances in `difficulty` (default: those of the split's tiers)
    as evenly as the family has them. Too few of them are an error if `exact`, else fewer are returned."""
    if family not in FAMILIES:
        raise ValueError(f"unknown toy family {family!r}: choose from {', '.join(FAMILIES)}")
    if split not in BUCKETS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(BUCKETS)}")
    tiers = TIERS[family]
    usual = {"hard": (tiers["beyond"], tiers["hard"]), "demos": (tiers["easy"],)}.get(split, (tiers["rl"],))
    wanted = (
        distances_in(usual) if difficulty is None else [difficulty] if isinstance(difficulty, int) else list(difficulty)
    )
    rng = random.Random(f"{family}/{split}/{seed}")  # a string seeds by its bytes: the same on every machine
    made: dict[str, Problem] = {}
    misses = dict.fromkeys(wanted, 0)
    while len(made) < n:
        live = [
            d for d in wanted if misses[d] < PATIENCE
        ]  # far problems of a small family run out: go on with the rest
        if not live and not exact:
            break
        if not live:
            raise ValueError(
                f"{family} has only {len(made)} problems of distances {wanted} in split {split!r}, not {n}"
            )
        distance = live[len(made) % len(live)]
        puzzle = FAMILIES[family].sample(rng, distance, SLACK[family])
        if split_of(puzzle) == split and puzzle.key() not in made:
            made[puzzle.key()] = record(family, puzzle, distance, rng)
            misses[distance] = 0
        else:
            misses[distance] += 1
    order = list(made.values())
    rng.shuffle(order)
    return order


def record(family: str, puzzle: Puzzle, distance: int, rng: random.Random) -> Problem:
    reference = write(puzzle, shortest(puzzle, rng))
    return Problem(
        id=f"{family}-{hashlib.sha256(puzzle.key().encode()).hexdigest()[:12]}",
        messages=({"role": "user", "content": puzzle.prompt()},),
        answer=reference,
        difficulty=float(distance),
        columns={"family": family, "cap": puzzle.cap},
    )


def grade(problem: Problem, text: str) -> bool:
    """True only for a legal walk within the cap that ends on the goal; any other text, however odd, is False."""
    return solves(puzzle_of(problem), text)


def expert(puzzle: Puzzle, rng: random.Random, count: int) -> list[str]:
    """`count` correct traces, different ones as far as there are several shortest solutions or room for a detour."""
    texts = [write(puzzle, shortest(puzzle, rng))]
    for attempt in range(20):
        if len(texts) >= count:
            break
        text = detour(puzzle, rng) if attempt > 5 else write(puzzle, shortest(puzzle, rng))
        if text not in texts and solves(puzzle, text):
            texts.append(text)
    return (texts * count)[:count]


def detour(puzzle: Puzzle, rng: random.Random) -> str:
    """One random move first, then the best way from there: another correct answer where the cap has room for it."""
    left = distances(puzzle)
    move, state = rng.choice([(m, s) for m, s in puzzle.moves(puzzle.start) if s in left])  # not into a dead end
    if puzzle.solved(state):
        return write(puzzle, [Step(move, state)])
    rest = shortest(replace(puzzle, start=state), rng)  # type: ignore[type-var]
    return write(puzzle, [Step(move, state), *rest])


def wrong_demo(puzzle: Puzzle, rng: random.Random) -> str:
    """A plausible answer that fails: of the right length and form, it either gives up short of the goal after a
    stroll without aim, or takes the right way and ends with a slip (a move that does not lead to the state written)."""
    right = shortest(puzzle, rng)
    if rng.random() < 0.5:
        before = puzzle.start if len(right) == 1 else right[-2].state
        others = [m for m, s in puzzle.moves(before) if s != right[-1].state]
        if others:
            return write(puzzle, [*right[:-1], Step(rng.choice(others), right[-1].state)])
    for extra in range(100):  # a stroll of the right length can hit the goal by chance: then try again, longer in time
        steps = wander(puzzle, rng, len(right) + extra // 10, stop=False)
        if not puzzle.solved(steps[-1].state):
            return write(puzzle, steps)
    raise AssertionError(f"no wrong answer found for {puzzle.prompt()}")


def with_demos(problem: Problem, rng: random.Random, count: int, wrong: float) -> Problem:
    """The problem with `count` traces, all wrong with probability `wrong` (the column `wrong_demos` says so)."""
    puzzle = puzzle_of(problem)
    bad = rng.random() < wrong
    texts = [wrong_demo(puzzle, rng) for _ in range(count)] if bad else expert(puzzle, rng, count)
    return replace(problem, demos=tuple(Demo(t) for t in texts), columns={**problem.columns, "wrong_demos": bad})


def load(
    family: str,
    layout: Layout = "separate",
    coverage: float = 1.0,
    wrong: float = 0.0,
    reach: Reach = "within",
    train_size: int = 2000,
    demo_size: int = 400,
    eval_size: int = 500,
    seed: int = 0,
) -> dict[str, list[Problem]]:
    """Everything one run needs: `train`, `demos` (problems that carry demonstrations), `validation`, `test`, `hard`.

    Layouts: *separate*, a pool on other problems than the training ones; *paired*, a share `coverage` of the training
    problems with two traces each, and `demos` is that share. Regimes: *redundant* is reach "within", *necessary* reach
    "beyond" (half of the problems, and all demonstrations of the pool, come from the tier that the base hardly ever
    solves), *misleading* is `wrong` > 0. Sizes are upper limits: a family that has fewer different problems in a split
    gives those.
    """
    if not (0 <= wrong <= 0.5 and 0 < coverage <= 1):
        raise ValueError("toy data: wrong must lie in [0, .5] and coverage in (0, 1]")
    tiers, rng = TIERS[family], random.Random(f"{family}/{layout}/{seed}")
    far = reach == "beyond"
    spread = distances_in([tiers["rl"]])
    if far:  # equal halves, whatever the number of distances in each tier
        unreached = distances_in([tiers["far"]])
        spread = spread * len(unreached) + unreached * len(spread)
    part = partial(problems, family, seed=seed, exact=False)
    train = part("train", train_size, difficulty=spread)
    if layout == "paired":
        covered = set(rng.sample(range(len(train)), max(1, round(coverage * len(train)))))
        train = [with_demos(p, rng, 2, wrong) if i in covered else p for i, p in enumerate(train)]
        demos = [p for p in train if p.demos]
    else:
        pool = part("demos", demo_size, difficulty=distances_in([tiers["far" if far else "easy"]]))
        demos = [with_demos(p, rng, 1, wrong) for p in pool]
    return {
        "train": train,
        "demos": demos,
        "validation": part("validation", eval_size, difficulty=spread),
        "test": part("test", eval_size, difficulty=spread),
        "hard": part("hard", eval_size),
    }
