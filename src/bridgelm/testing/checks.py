"""A method on the embedded model, put through what every method promises; a line a check."""

from __future__ import annotations

import math
import random
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bridgelm.config import catalogue
from bridgelm.config.options import parts, samples
from bridgelm.config.run_config import RunConfig, make_config, override
from bridgelm.errors import UserError
from bridgelm.model.batching import make_batch
from bridgelm.testing.bench import (
    UNKNOWN,
    Bench,
    Constant,
    bits,
    difference,
    open_session,
    padding,
    stopping,
    watched,
    wrong_terms,
)
from bridgelm.training import loop

STEPS = 4


def even_length(completions: list[str], **columns: Any) -> list[float]:
    """A reward that the embedded model meets about every second time: groups differ."""
    return [float(len(text) % 2 == 0) for text in completions]


class Method:
    """A method with its settings, and a folder for what it trains."""

    def __init__(self, name: str, settings: list[str], folder: Path) -> None:
        self.name, self.settings, self.folder = name, settings, folder
        needs = catalogue.needs_of(self.config("check").method)
        self.teacher = "toy:teacher" if needs & {"teacher", "behaviour"} else None

    def config(self, run: str, dtype: str = "float64", **changes: Any) -> RunConfig:
        teacher = getattr(self, "teacher", None)
        raw: dict[str, Any] = {
            "name": run, "out": str(self.folder), "steps": STEPS, "threads": 1, "checkpoint_every": 0,
            "model": {"name_or_path": "toy:base", "dtype": dtype},
            "data": {"train": "toy:hops", "max_prompt_tokens": 64, "max_demo_tokens": 64, "toy": {
                "layout": "paired", "train_size": 24, "demo_size": 8, "eval_size": 8}},
            "method": {"name": self.name}, "reward": {"verifier": "toy", "functions": [f"{__file__}:even_length"]},
            "rollout": {"prompts": 4, "group": 4, "max_new_tokens": 12},
            # A large epsilon keeps Adam's steps well conditioned where a gradient is nearly zero.
            "optim": {"lr": 1e-3, "eps": 1e-3}, "batch": {"demos": 6, "micro_tokens": 256},
            "eval": {"every": 2, "problems": 4}, "teacher": teacher and {"name_or_path": teacher}, **changes}
        for item in self.settings:
            override(raw, item)
        return make_config(raw, self.name)

    @contextmanager
    def session(self, run: str) -> Iterator[Any]:
        made = open_session(self.config(run))
        grader = made.roll.grader
        try:
            yield made
        finally:
            made.folder.close()
            grader.close()


def one_update(method: Method) -> Iterator[tuple[str, str]]:
    """An update is a function of its rows, however they are cut, ordered or padded."""
    with method.session("update") as session:
        bench = Bench(session)
        first = bench.update(bench.rows)
        yield "an update moves something", "" if any(
            g.any() for _, found in first.gradients for g in found.values()) else "all gradients are zero"
        cuts = (difference(first, bench.update(bench.rows, tokens)) for tokens in (1, 150, 10**6))
        yield "micro-batches", next(filter(None, cuts), "")
        rows = list(bench.rows)
        random.Random(3).shuffle(rows)
        yield "order of the rows", difference(first, bench.update(rows))
        with padding():
            yield "padding", difference(first, bench.update(bench.rows))
        yield "terms", wrong_terms(session.method, bench.rows)


def flat(method: Method, reward: float, run: str) -> str:
    """Where all answers of a group have one reward RL has nothing to say, and everything stays finite."""
    with method.session(run) as session:
        session.roll.grader = Constant(reward)
        for _ in range(2):
            loop.take_step(session)
        session.roll.begin(2)
        rows = session.method.gather(session.data, session.roll, 2)
        if any(row.streams["pg"].weight.any() for row in rows if "pg" in row.streams):
            return "an advantage is not zero"
        seen: list[Any] = []
        batch = make_batch(rows)
        with watched(session.policy, seen):
            metrics = session.method.update(session.policy, replace(batch, stats=session.method.probe(batch)), 2)
        wrong = [key for key, value in metrics.items() if not math.isfinite(value) and key not in UNKNOWN]
        if wrong:
            return f"{wrong[0]} is {metrics[wrong[0]]}"
        fine = all(t.isfinite().all() for t in session.policy.tensors().values())
        return "" if fine and all(g.isfinite().all() for _, found in seen for g in found.values()) else \
            "weights or gradients are not finite"


def runs(method: Method) -> Iterator[tuple[str, str]]:
    """The same seed gives the same bits, also over interruptions."""
    whole = bits(loop.train(method.config("run-whole", "float32"), quiet=True).path)
    again = bits(loop.train(method.config("run-again", "float32"), quiet=True).path)
    yield "the same bits again", _differing(whole, again)
    config = method.config("run-stopped", "float32")
    path = Path(config.out) / config.name
    with stopping():
        for step in range(1, STEPS):
            try:
                loop.train(config, quiet=True) if step == 1 else loop.resume(path, quiet=True)
            except loop.Interrupted:
                continue
    loop.resume(path, quiet=True)
    yield "the same bits over interruptions", _differing(whole, bits(path))


def _differing(one: dict[str, Any], two: dict[str, Any]) -> str:
    return ", ".join(f"{key} differs" for key, value in one.items() if two[key] != value)


def check(name: str, settings: list[str], say: Callable[[str], None] = print) -> bool:
    """Whether all is as promised. A mistake in the settings is a UserError."""
    with tempfile.TemporaryDirectory() as folder:
        method = Method(name, settings, Path(folder))
        whole = [_caught("one update", one_update, method)]
        if any(samples(part) for part in parts(method.config("check").method)):
            for what, reward in (("pass", 1.0), ("fail", 0.0)):
                whole.append(_caught(f"groups that all {what}", lambda m, what=what, reward=reward: iter(
                    [(f"groups that all {what}", flat(m, reward, f"all-{what}"))]), method))
        whole.append(_caught("whole runs", runs, method))
        good = True
        for found in whole:
            for what, wrong in found:
                say(f"{'FAILED' if wrong else 'ok':<6}  {what}{': ' if wrong else ''}{wrong}")
                good = good and not wrong
    return good


def _caught(what: str, act: Callable[[Method], Iterator[tuple[str, str]]], method: Method) -> Iterator[tuple[str, str]]:
    try:
        yield from act(method)
    except UserError:
        raise
    except Exception as error:  # the method is the user's: whatever it raises, they are told where
        at = traceback.extract_tb(error.__traceback__)[-1]
        yield what, f"{type(error).__name__}: {' '.join(str(error).split())} ({at.filename}, line {at.lineno})"
