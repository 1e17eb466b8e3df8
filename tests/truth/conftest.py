"""Helpers of the truth tests are plain modules beside them: `exact`, `checks`, `mutation`, `transformer`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def wide_norms() -> Iterator[None]:
    """Norms as wide as the model."""
    from transformer import wide_norm

    with wide_norm():
        yield
