"""Measurements along a run for `bridgelm diagnose`: fit of the demonstrations, reward, agreement of gradients, drift.

They are the same for every method and leave the run unchanged: their samples, seeds and ledger are their own.

    demo_ce                mean NLL per token of a fixed sample of demonstrations
    reward, correct, ...   of fresh answers to the first validation problems, drawn with the same random numbers always
    cosine                 between g_SFT and g_RL, the gradients of the two losses in theta on these samples
    square_sft, square_rl  their squared norms without the noise: 4 <g(A), g(B)> over two disjoint halves
    kl_start               KL(live || start) per token, the k3 estimate on the fresh answers
    distance               |live - start|, and |live - start| / |start|

`start` is the start of the current stage, which for the first stage is the start of the run. The models at the starts
of later stages are kept in the run folder (`starts/`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bridgelm import dist
from bridgelm.config.run_config import RunConfig
from bridgelm.data.cursors import Splits
from bridgelm.ledger import Ledger
from bridgelm.model import grads
from bridgelm.model.batching import halves, make_batch
from bridgelm.model.grads import Gradient
from bridgelm.model.loading import load_model
from bridgelm.model.policy import Policy
from bridgelm.objective import credit, losses
from bridgelm.rollout.roller import Roller, summary
from bridgelm.training.checkpoint import generators, save_model, set_generators
from bridgelm.types import Demo, Live, Metrics, Micro, Problem, Row

SALT = 15_485_863  # takes the place of the step in the seeds, so that these draws differ from those of training
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Sample:
    """What is measured on each time, whatever the seed of the run: demonstrations, and problems to answer."""

    demos: Sequence[tuple[Problem, Demo]]
    problems: Sequence[Problem]
    held: bool  # whether the demonstrations are held out: of validation problems, and so not trained on


def draw_sample(splits: Splits, config: RunConfig) -> Sample:
    """Takes demonstrations of validation problems if there are enough of them, else some that are trained on."""
    size = config.diagnose.demos
    apart = [(p, d) for p in splits.validation for d in p.demos]
    trained = [(p, d) for p in splits.demos or splits.train for d in p.demos]
    pool = apart if len(apart) >= size else trained
    order = np.random.default_rng(SALT).permutation(len(pool))[:size]
    return Sample([pool[i] for i in order], splits.validation[:config.diagnose.problems], pool is apart)


class Measurements:
    """Takes the measurements of one run. `start` holds the weights that drift is measured from."""

    def __init__(self, roll: Roller, splits: Splits, starts: Sequence[int], folder: Path, step: int,
                 taken: bool = True) -> None:
        """`taken`: whether the measurements after `step` were taken before the run was interrupted."""
        self.policy, self.config, self.starts, self.folder = roll.policy, roll.config, starts, folder
        self.roll = Roller(roll.policy, roll.engine, roll.chat, roll.grader, roll.config, early=roll.early)
        self.sample = draw_sample(splits, roll.config)
        begun = max(start for start in starts if start <= (step if taken else max(0, step - 1)))
        self.start_step, self.start = begun, dict[str, Tensor]()
        if step:
            named = roll.config.model if begun == 0 else roll.config.model.model_copy(
                update={"name_or_path": str(start_folder(folder, begun)), "revision": None})
            self.start = {n: self.policy.live.sharding.cut(p.detach()) for n, p in load_model(named).named_parameters()}

    def due(self, step: int) -> bool:
        return step % self.config.diagnose.every == 0 or step in self.starts or step == self.config.steps

    def take(self, step: int) -> dict[str, Any]:
        """Measures after `step` updates. At the end of a stage drift is measured from that stage's start; only then
        does the next stage begin."""
        clock = time.perf_counter()
        with _unnoticed(self.policy) as spent:
            if not self.start:
                self._begin(step)
            found = measure(self.policy, self.roll, self.sample, self.config.diagnose.group, self.start)
        self.policy.ledger.probe += spent.generate + spent.score + 3 * spent.train
        out = {**found, "start": self.start_step, "held": self.sample.held,
               "time/probe": time.perf_counter() - clock}
        if step in self.starts and step != self.start_step:
            self._begin(step)
        return out

    def _begin(self, step: int) -> None:
        self.start_step = step
        self.start = {name: weight.clone() for name, weight in self.policy.weights("live").items()}
        if step:  # the start of the run need not be saved: it is the model that was loaded
            start_folder(self.folder, step).parent.mkdir(exist_ok=True)
            save_model(self.policy, self.roll.chat, start_folder(self.folder, step))


def start_folder(run: Path, step: int) -> Path:
    return run / "starts" / f"step-{step:06d}"


@contextmanager
def _unnoticed(policy: Policy) -> Iterator[Ledger]:
    """Lends the policy another ledger, and restores the global random state, since a reward function may draw from
    it."""
    before = generators()
    own, policy.ledger = policy.ledger, Ledger(policy.ledger.parameters)
    try:
        yield policy.ledger
    finally:
        policy.ledger = own
        set_generators(before)


def measure(policy: Policy, roll: Roller, sample: Sample, group: int, start: Weights) -> Metrics:
    roll.begin(SALT)
    demos = [roll.demo(problem, demo).with_stream("nll", 1.0) for problem, demo in sample.demos]
    drawn = roll(sample.problems, group)
    found: Metrics = {"distance": (gone := distance(policy, start))[0], "distance_share": gone[1], **summary(drawn),
                      "kl_start": kl_from(policy, drawn, start)}
    sft, square_sft, loss = gradient(policy, demos, "nll")
    rl, square_rl, _ = gradient(policy, credit.with_advantages(drawn), "pg")
    sizes = grads.norm(sft), grads.norm(rl)
    if demos:
        found |= {"demo_ce": loss, "norm_sft": sizes[0], "square_sft": square_sft}
    dot = policy.dot(sft, rl)
    return found | {"norm_rl": sizes[1], "square_rl": square_rl, "dot": dot,
                    "cosine": dot / (sizes[0] * sizes[1]) if all(sizes) else math.nan}


def gradient(policy: Policy, rows: list[Row], name: str) -> tuple[Gradient, float, float]:
    """The gradient of one term in theta, summed over two halves; its squared norm without noise; the loss. Fresh
    answers are on-policy, so weight times log pi has the gradient of the RL loss as well."""
    def terms(batch: Micro, live: Live) -> dict[str, Tensor]:
        return {key: losses.nll(live.logp_BT, weight) for key, weight in batch.weight.items()}

    batch = make_batch(rows)
    first, second = (policy.grad(terms, replace(half, stats={}), {name: 1.0}) for half in halves(batch))
    square = 4 * policy.dot(first.theta, second.theta)
    return grads.mix((1.0, first.theta), (1.0, second.theta)), square, first.losses[name] + second.losses[name]


def kl_from(policy: Policy, rows: list[Row], start: Weights) -> float:
    with policy.holding(start):
        before = policy.score(rows)
    gaps = [logps[row.drawn] - row.old_logps[row.drawn] for row, logps in zip(rows, before, strict=True)
            if row.old_logps is not None]
    gap = np.concatenate([*gaps, np.empty(0)])
    return float(np.mean(np.expm1(gap) - gap)) if gap.size else math.nan


def distance(policy: Policy, start: Weights) -> tuple[float, float]:
    """How far the live weights are from `start`: absolute, and relative to the norm of `start`. Both are taken in the
    model's dtype, in which answers are sampled and models are saved."""
    moved = size = 0.0
    for name, weight in policy.weights("live").items():
        moved += float((weight.double() - start[name].double()).square().sum())
        size += float(start[name].double().square().sum())
    moved, size = dist.total(moved), dist.total(size)
    return math.sqrt(moved), math.sqrt(moved / size) if size else math.nan
