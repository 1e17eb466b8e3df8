"""The record that a grader returns for one completion: verdict, extracted answer, and the rules that led to it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bridgelm.types import Verdict


@dataclass(frozen=True, slots=True)
class Decision:
    verdict: Verdict
    extracted: str | None  # the answer that was found in the completion
    how: str  # the rule that found it
    rule: str  # the rule that decided
    ms: float = 0.0

    def timed(self, seconds: float) -> Decision:
        return replace(self, ms=1000 * seconds)
