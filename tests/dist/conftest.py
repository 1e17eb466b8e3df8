"""`make dist` leaves what it found in results/dist.json."""

from __future__ import annotations

import json
import os
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from bridgelm.runs.folder import git_commit, versions

RESULT = Path(__file__).parents[2] / "results" / "dist.json"
FOUND: dict[str, Counter[str]] = {}


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call":
        name = report.nodeid.rpartition("::")[2].partition("[")[0]
        FOUND.setdefault(name, Counter())[report.outcome] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run of one file renews what is said of its tests."""
    option = session.config.option
    if option.markexpr != "dist" or option.keyword or option.collectonly or hasattr(session.config, "workerinput"):
        return
    facts = {"date": f"{date.today():%Y-%m-%d}", "commit": git_commit(), "versions": versions(), "cores": os.cpu_count(),
             "command": "make dist"}
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    found = known | {name: {**counts, **facts} for name, counts in FOUND.items()}
    RESULT.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
