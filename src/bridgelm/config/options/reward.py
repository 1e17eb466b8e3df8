"""What grades an answer, and where it may stand."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bridgelm.config.options.base import Rate, Share, Strict
from bridgelm.config.plugins import or_own


class RewardConfig(Strict):
    """`verifier` grades answers; `functions` are `file.py:name` with TRL's signature, added to or in place of it."""

    verifier: Annotated[Literal["toy", "math", "countdown", "knights", "exact", "regex", "none"],
                        *or_own("verifier", "grade")] = "math"  # or one's own: docs/own-method.md
    functions: list[str] = Field(default_factory=list)
    weights: list[float] = Field(default_factory=list)  # one a function; default 1 each
    time_limit: Rate = 1.0  # CPU seconds an answer
    # Where `math` may find an answer, in the order of trying.
    extract: list[Literal["tags", "boxed", "hashes", "phrase", "bare", "last"]] = Field(
        default=["tags", "boxed", "hashes", "phrase", "bare", "last"], min_length=1)
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of `math`, relative to a gold number; 0 is exact
    max_error_rate: Share = 0.1  # a verifier that fails more often stops the run
