"""`make dist` leaves what it found in results/dist.json."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from bridgelm.metrics import git_commit, versions

RESULT = Path(__file__).parents[2] / "results" / "dist.json"
FOUND: dict[str, Counter[str]] = {}
STARTED = time.time()


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call":
        name = report.nodeid.rpartition("::")[2].partition("[")[0]
        FOUND.setdefault(name, Counter())[report.outcome] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    option = session.config.option
    if option.markexpr != "dist" or option.keyword or option.collectonly or hasattr(session.config, "workerinput"):
        return
    facts = {"tests": {name: dict(counts) for name, counts in sorted(FOUND.items())},
             "minutes": round((time.time() - STARTED) / 60, 1),
             "cores": os.cpu_count(), "date": f"{date.today():%Y-%m-%d}", "commit": git_commit(), "versions": versions(),
             "command": "make dist"}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n")
