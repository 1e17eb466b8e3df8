"""The verifier of a run on several ranks: the first rank grades, and sends the grades to the others.

A user's reward function may depend on the whole batch, draw random numbers or cost money, so it is called once, with
the arguments that it would get in a run of one process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bridgelm import dist
from bridgelm.config.run_config import RewardConfig
from bridgelm.types import Grade, Problem, Verdict
from bridgelm.verify.base import Verifier, build_verifier
from bridgelm.verify.early import Judge as Early


def shared_verifier(reward: RewardConfig) -> Verifier:
    """The verifier of a run, for one rank or several."""
    verifier = build_verifier(reward)
    return verifier if dist.world() == 1 else RankedVerifier(verifier)


class RankedVerifier:
    def __init__(self, verifier: Verifier):
        self._verifier = verifier
        self.last_error = ""

    def grade(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Grade]:
        found, self.last_error = dist.from_first(lambda: self._graded(problems, texts))
        return [Grade(reward, Verdict(verdict)) for reward, verdict in found]

    def _graded(self, problems: Sequence[Problem], texts: Sequence[str]) -> tuple[list[tuple[float, str]], str]:
        grades = self._verifier.grade(problems, texts)
        return [(grade.reward, grade.verdict.value) for grade in grades], self._verifier.last_error

    @property
    def counts(self) -> Counter[str]:
        return self._verifier.counts

    @property
    def early(self) -> Early | None:
        return self._verifier.early if dist.first() else None

    def close(self) -> None:
        self._verifier.close()

    def __enter__(self) -> RankedVerifier:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
