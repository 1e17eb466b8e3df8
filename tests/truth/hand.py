"""Sessions on the tiny world whose rewards are given, and gradients written out by hand: one row after the other, from
the model's own logits, sharing nothing with the shipped terms, streams and counts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridgelm.config.run_config import make_config
from bridgelm.types import Grade, Row, Verdict
from tiny import open_session, raw_config, save_model

from transformer import wide_norm  # isort: skip

WORDS = {"+": Grade(1.0, Verdict.CORRECT), "-": Grade(0.0, Verdict.WRONG), "?": Grade(float("nan"), Verdict.ERROR)}


class Script:
    """A grader that hands out what it is told, over and over: + right, - wrong, ? failed, or a reward."""

    last_error = "scripted"

    def __init__(self, *given: Any) -> None:
        self.given = [WORDS[g] if g in WORDS else Grade(float(g), Verdict.CORRECT if g > 0.5 else Verdict.WRONG)
                      for g in given]

    def grade(self, problems: Any, texts: Sequence[str]) -> list[Grade]:
        out = [self.given[i % len(self.given)] for i in range(len(texts))]
        self.given = self.given[len(texts) % len(self.given):] + self.given[:len(texts) % len(self.given)]
        return out

    def close(self) -> None:
        pass


OPEN: list[Any] = []


@cache
def model_folder() -> Path:
    return save_model(Path(tempfile.mkdtemp()) / "model")


@contextmanager
def sessions() -> Iterator[None]:
    """Norms as wide as the model, and what was opened is closed afterwards."""
    with wide_norm():
        try:
            yield
        finally:
            while OPEN:
                made = OPEN.pop()
                made.folder.close()
                made.roll.grader.close()


def in_folder(check: Callable[[Path], None]) -> Callable[[], None]:
    """A check with a folder and sessions of its own, as mutants are tried."""
    def run() -> None:
        with tempfile.TemporaryDirectory() as folder, sessions():
            check(Path(folder))
    return run


def opened(folder: Path, method: dict[str, Any], grades: Sequence[Any] = "", **changes: Any) -> Any:
    """A session that takes plain gradient steps."""
    changes = {"optim": {"kind": "sgd", "lr": 0.1, "clip": 1e9}, **changes}
    raw = raw_config(folder, method, model_folder(), **changes)
    raw["reward"]["max_error_rate"] = 1.0
    session = open_session(make_config(raw))
    OPEN.append(session)
    if grades:
        session.roll.grader.close()
        session.roll.grader = Script(*grades)
    return session


def gather(session: Any, step: int = 0) -> list[Row]:
    session.roll.begin(step)
    session.policy.factor = 1.0
    return session.method.gather(session.data, session.roll, step)


def weights(session: Any) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in session.policy.groups["theta"].full.items()}


def put(session: Any, theta: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, t in session.policy.groups["theta"].full.items():
            t.copy_(theta[name])
    session.policy.load(session.policy.tensors())  # the merged weights are old


def slope(session: Any, parts: Sequence[tuple[Row, np.ndarray]]) -> dict[str, Tensor]:
    """Gradient of - sum over rows and tokens of weight x log pi at the session's weights."""
    total: Any = 0.0
    with session.policy.at("live") as model:
        for p in model.parameters():
            p.requires_grad_(True)
        for row, weight in parts:
            ids = torch.tensor(row.ids)[None]
            logp = torch.log_softmax(model(input_ids=ids).logits[0, :-1] / row.temperature, -1)
            token = logp.gather(1, ids[0, 1:, None])[:, 0]
            total = total - (torch.tensor(np.asarray(weight, dtype=np.float64))[1:] * token).sum()
        names = dict(model.named_parameters())
        found = torch.autograd.grad(total, list(names.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(names.items(), found, strict=True)}


def moved(start: dict[str, Tensor], *steps: tuple[float, dict[str, Tensor]]) -> dict[str, Tensor]:
    out = {name: t.clone() for name, t in start.items()}
    for rate, gradient in steps:
        for name in out:
            out[name] -= rate * gradient[name]
    return out


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], start: dict[str, Tensor], what: str = "") -> None:
    """Equal to rounding, measured against how far the weights moved."""
    off = max(float((found[n] - wanted[n]).abs().max()) for n in wanted)
    far = max(float((wanted[n] - start[n]).abs().max()) for n in wanted)
    assert off <= 1e-9 * far + 1e-14, f"{what}: off by {off}, moved by {far}"


def advantages(rows: Sequence[Row], std: Callable[[np.ndarray], float] | None = None) -> list[float]:
    """Reward less the group's mean over graded rows; 0 for what does not take part."""
    out = []
    for row in rows:
        group = [r.reward for r in rows if r.group == row.group and r.verdict is not Verdict.ERROR]
        value = row.reward - sum(group) / len(group) if row.verdict is not Verdict.ERROR and len(group) > 1 else 0.0
        out.append(value / (std(np.array(group)) + 1e-6) if std and value else value)
    return out
