"""Helpers of the truth tests are plain modules beside them: `exact`, `checks`, `mutation`, `transformer`."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
