"""The contract of a method: which rows exist, what loss each token gets, how the update is taken."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar, cast, get_args, get_origin

import numpy as np

from bridgelm.config import plugins
from bridgelm.config.options import PolicyGradient, Strict
from bridgelm.config.run_config import RunConfig
from bridgelm.data.cursors import Data, with_teacher
from bridgelm.errors import UserError
from bridgelm.objective import credit
from bridgelm.types import Batch, Live, Metrics, Micro, Row

if TYPE_CHECKING:  # `check` and `show` import a method for its options, and no torch
    from torch import Tensor

    from bridgelm.model.policy import Policy
    from bridgelm.rollout.roller import Roller

O = TypeVar("O")  # noqa: E741

NEEDS = {
    "demos": "demonstrations: give `data.demos`, or `demos` in the rows of `data.train`",
    "paired_demos": "demonstrations of the training problems themselves (`demos` in the rows of `data.train`)",
    "two_traces": "two demonstrations of a problem",
    "teacher": "a second model: give a table [teacher] with the name_or_path of a model of the same tokenizer",
    "behaviour": "the log-probs of the demonstrations' author: give `demo_logps` in their rows, or a [teacher]",
    "val": "a validation set (`data.validation`)",
    "labels": "an answer in every row of `data.train`",
}


class Gradients(NamedTuple):
    """Tensors of the size of theta and w that a method holds: in a pass over rows of a kind, this one's included, most
    that it holds between passes, and in a pass over rollouts at another point than the live one."""

    demo: int
    rollout: int
    between: int
    parked: int = 0  # of those in a pass over rollouts: what `policy.park` is asked for
    elsewhere: int = 1


@dataclass(frozen=True, kw_only=True)
class Form:
    """A method in the form that all of them share: grad L = - sum of weight x grad log pi over the tokens of its data.
    The table of docs/methods.md is made of it; PPO is the clipped A rho, PG the unclipped one."""

    data: str  # which rows exist in a step
    demo: str  # weight of a token that a demonstration gave
    rollout: str  # weight of a token that the policy drew
    controller: str  # what moves those weights, or the data, over the run
    models: str  # beside the policy


# How far a method can be trusted to be what its source describes. checked: formulas and masks agree with official code
# or an independent implementation on fixed tensors. derived: built from its published equations, or from notes on them.
# experimental: ours.
Tier = Literal["checked", "derived", "experimental"]


class Method(ABC, Generic[O]):
    """Abstract; every subclass is final. Methods share functions, never a parent's code. `Method[Options]` says whose
    options it has, where they stand beside it."""

    Options: ClassVar[type[Strict]] = Strict
    tier: ClassVar[Tier] = "experimental"
    form: ClassVar[Form] = Form(data="its own", demo="its own", rollout="its own", controller="its own",
                                models="its own")
    needs: ClassVar[frozenset[str]] = frozenset()
    gradients: ClassVar[Gradients] = Gradients(1, 1, 1)

    def __init__(self, options: O, run: RunConfig) -> None:
        self.options, self.run = options, run

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        given = [base for base in cls.__dict__.get("__orig_bases__", ()) if get_origin(base) is Method]
        if given:
            cls.Options = get_args(given[0])[0]

    @property
    def phase(self) -> str:
        return plugins.short(cast(Any, self.options).name)

    def starts(self) -> list[int]:
        """The steps (counted from 0) before which something new begins: the run, and each later stage."""
        return [0]

    def setup(self, policy: Policy) -> None:
        """Declares optimisers and forks, before the first step and before a checkpoint is read."""
        policy.optimiser("theta")

    @abstractmethod
    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        """Which rows exist in this step, with their streams."""

    def probe(self, batch: Batch) -> Mapping[str, Any]:
        """Statistics of the whole batch that a term needs, before it is cut into micro-batches."""
        return {}

    @abstractmethod
    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        """Per-token losses (B, T) by stream name, to be minimised."""

    @abstractmethod
    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        """One update; usually one line: `return descend(policy, batch, self.terms, {...})`."""

    def rate(self, step: int) -> float:
        """The factor that multiplies the learning rates."""
        o = self.run.optim
        return credit.rate_factor(o.schedule, o.warmup, o.final, step, self.run.steps)

    def warnings(self, metrics: Metrics) -> list[str]:
        """What a user should be told about this update; the trainer says each text once."""
        return []

    def deploy(self, policy: Policy, accuracy: Callable[[], float]) -> Metrics:
        """May move theta, after the last step, to what is to be deployed, by the accuracy of the live weights on the
        validation set."""
        return {}

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """What was found out beyond numbers a step, for files in the run folder, by name."""
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        assert not state


def descend(policy: Policy, batch: Batch, terms: Any, coef: Mapping[str, float]) -> Metrics:
    """Gradient of the weighted terms, one step of theta."""
    found = policy.grad(terms, batch, coef)
    norm = policy.apply("theta", found.theta)
    return {"grad_norm/theta": norm, **{f"loss/{name}": value for name, value in found.losses.items()}}


def mean_over(batch: Batch, name: str, values: Mapping[int, np.ndarray]) -> float:
    """The mean of a per-token number (tensors by row index) over the tokens of a stream, all weighted equally."""
    chosen = [values[i][row.streams[name].mask] for i, row in enumerate(batch.rows)
              if name in row.streams and i in values]
    return float(sum(v.sum() for v in chosen)) / max(1, sum(v.size for v in chosen))


def check_needs(method: Method, data: Data) -> None:
    unmet = method.needs - with_teacher(data.facts(), method.run)
    for need in NEEDS:
        if need in unmet:
            raise UserError(f"method {method.run.method.name!r} needs {NEEDS[need]}")


# -- the RL half, shared by every method with rollouts ---------------------------------------------------------------

def rl_setup(policy: Policy, rl: PolicyGradient) -> None:
    if rl.kl_coef > 0 and "reference" not in policy.groups:
        policy.fork("reference")


def rl_rows(data: Data, roll: Roller, rl: PolicyGradient, run: RunConfig) -> list[Row]:
    """Rollouts with centred advantages in the stream `pg`, and `kl` where a reference is asked for."""
    return credited(roll.groups(data), roll, rl, run)


def credited(rows: list[Row], roll: Roller, rl: PolicyGradient, run: RunConfig) -> list[Row]:
    rows = credit.with_advantages(rows, rl.std, rl.aggregate, run.rollout.max_new_tokens, run.rollout.mask_overlong)
    return with_kl(rows, roll, rl, run)


def with_kl(rows: list[Row], roll: Roller, rl: PolicyGradient, run: RunConfig) -> list[Row]:
    """KL to the reference is estimated on what the policy drew: a demonstration in a group has no part in it."""
    if rl.kl_coef == 0:
        return rows
    return [row.with_stream("kl", 1.0, rl.aggregate, run.rollout.max_new_tokens)
            if "pg" in row.streams and row.at != "expert" else row for row in roll.reference(rows)]


def experts(rows: Sequence[Row], roll: Roller, run: RunConfig, step: int, count: int = 1) -> list[Row]:
    """Makes `count` of a problem's own demonstrations further members of its group in `rows`, graded as rollouts
    are. Which of several is a draw of its own in every step."""
    pairs, numbers = [], []
    for number, problem in {row.group: row.problem for row in rows}.items():
        draws = np.random.default_rng([run.seed % 2**63, step, number, zlib.crc32(b"experts")])
        for i in sorted(draws.permutation(len(problem.demos))[:count]):
            pairs.append((problem, problem.demos[i]))
            numbers.append(number)
    return roll.experts(pairs, numbers) if pairs else []


def rl_terms(batch: Micro, live: Live, rl: PolicyGradient) -> dict[str, Tensor]:
    from bridgelm.objective import losses

    if "pg" not in batch:
        return {}
    out = {"pg": losses.pg_clip(live.logp_BT, batch.old_BT, batch.weight["pg"], rl.clip_low, rl.clip_high)}
    if "kl" in batch:
        out["kl"] = losses.kl_k3(live.logp_BT, batch.ref_BT, batch.weight["kl"])
    return out


def rl_coef(rl: PolicyGradient, weight: float = 1.0) -> dict[str, float]:
    return {"pg": weight, "kl": weight * rl.kl_coef} if rl.kl_coef > 0 else {"pg": weight}


# -- the SFT half ------------------------------------------------------------------------------------------------------

def sft_rows(data: Data, roll: Roller, run: RunConfig) -> list[Row]:
    return [roll.demo(problem, demo).with_stream("nll", 1.0)
            for problem, demo in data.demos(run.batch.demos * run.rollout.updates)]


def sft_terms(batch: Micro, live: Live) -> dict[str, Tensor]:
    from bridgelm.objective import losses

    return {"nll": losses.nll(live.logp_BT, batch.weight["nll"])} if "nll" in batch else {}
