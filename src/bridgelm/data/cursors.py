"""Decides which problems and demonstrations each step gets: seeded, checkpointed cursors over shuffled splits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bridgelm.config.run_config import RunConfig
from bridgelm.data.splits import Problems, Splits, check_lengths, load_splits
from bridgelm.errors import UserError
from bridgelm.types import Demo, Problem

__all__ = ["ById", "Data", "Problems", "Splits", "check_lengths", "load_splits", "with_teacher"]


def with_teacher(facts: frozenset[str], config: RunConfig) -> frozenset[str]:
    """The facts of the data plus those of a [teacher], which can stand in for an author with unknown log-probs."""
    if config.teacher is None:
        return facts
    return facts | {"teacher"} | ({"behaviour"} if "demos" in facts else set())


class ById(dict[str, Problem]):
    """Problems by their ids. A run that goes on with other data may ask for one that is gone."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__({problem.id: problem for problem in problems})

    def __missing__(self, name: str) -> Problem:
        raise UserError(f"data.train: the run's checkpoint refers to problem {name!r}, which is not there any more; "
                        "put it back, or start a new run")


class _Cursor:
    """Endless shuffled epochs over `size` items. How many were taken is its whole state: an epoch's order depends on
    the seed, the stream and the epoch only, so it can be drawn again."""

    def __init__(self, seed: int, stream: int, size: int):
        self.size, self.taken = size, 0
        self._key, self._epoch, self._order = (seed, stream), -1, np.empty(0, dtype=np.int64)

    def take(self, n: int) -> list[int]:
        assert self.size > 0 or n == 0, "nothing to draw from: the run should have been refused"
        drawn = [self._at(position) for position in range(self.taken, self.taken + n)]
        self.taken += n
        return drawn

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.size)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([*self._key, epoch]).permutation(self.size)
        return int(self._order[offset])


class Data:
    """Draws for the methods. Each kind has its own stream, so that asking for more of one moves none of the others:
    two methods with one seed see the same problems. A resumed run sees what the uninterrupted one would have seen."""

    def __init__(self, splits: Splits, seed: int):
        self.splits = splits
        self._pairs = [(problem, demo) for problem in splits.demos or splits.train for demo in problem.demos]
        sizes = {"problems": len(splits.train), "demos": len(self._pairs), "val": len(splits.validation)}
        self._cursors = {name: _Cursor(seed % 2**63, i, size) for i, (name, size) in enumerate(sizes.items())}

    def problems(self, n: int) -> list[Problem]:
        return [self.splits.train[i] for i in self._cursors["problems"].take(n)]

    def demos(self, n: int) -> list[tuple[Problem, Demo]]:
        """Draws from the separate pool if there is one, else from the training problems' own demonstrations."""
        return [self._pairs[i] for i in self._cursors["demos"].take(n)]

    def val(self, n: int) -> list[Problem]:
        return [self.splits.validation[i] for i in self._cursors["val"].take(n)]

    def facts(self) -> frozenset[str]:
        """What the data offers, in the words of a method's `needs`."""
        own = [len(problem.demos) for problem in self.splits.train]
        there = {
            "demos": bool(self._pairs),
            "paired_demos": any(own),
            "two_traces": any(count >= 2 for count in own),
            "val": bool(self.splits.validation),
            "labels": all(problem.answer for problem in self.splits.train),
            "behaviour": bool(self._pairs) and all(demo.logps is not None for _, demo in self._pairs),
        }
        return frozenset(name for name, yes in there.items() if yes)

    def state(self) -> dict[str, Any]:
        return {name: {"taken": cursor.taken} for name, cursor in self._cursors.items()}

    def load(self, state: dict[str, Any]) -> None:
        for name, cursor in self._cursors.items():
            cursor.taken = state[name]["taken"]
