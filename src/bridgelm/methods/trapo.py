"""TRAPO (arXiv 2512.17636): prefixes of demonstrations, longer where a prompt fails, imitated where theta can follow.

A prompt's G rows are drawn in four micro-groups, 4 2 1 1 of 8. The first is unguided. Each later one begins with a part
of a demonstration if the mean reward of the prompt's rows so far is under its threshold, and is unguided otherwise:

    rows of 8     4     2     1     1      (always G rows a prompt)
    code          -    .5   2/3     1      prefix   .25   .5   1, of the demonstrations #0, #0, #1
    paper         -    .5    .7    .9      prefix   .2    .5   1

    maximise  sum over drawn tokens of A rho  +  sum over charged given tokens of sg(min(1, p / alpha)) log p
    A = r - mean over the prompt's rows, guided ones included;   both sums over one denominator: no mixing weight

The second sum, TrSFT, has the gradient of the code's p / max(sg p, alpha). A prefix that several rows share is charged
once, in the last of them. Drawn tokens are not clipped, given ones get no RL gradient. The two tables differ where 4 of
the first 6 rows are right: .667 calls for help in the paper's only.

Our reading: a micro-group's prefix is int(ratio x tokens), the end token not counted, and goes on to the first later
token with a blank line if that one stands before (ratio + .3) x tokens. Without a second demonstration the last row is
the first one again. Groups of another size than 8 keep the shape (`sizes`).

Trap: as released, the last row's text ends with the thought and an end token: it teaches to stop before an answer that
stands after </think>. Here the whole trace is given (`trace`). And that row, nearly always right, moves the mean that
all other rows of its prompt are held against (`baseline`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, final

import numpy as np
from torch import Tensor

from bridgelm.config.run_config import RunConfig
from bridgelm.data.chat import Chat
from bridgelm.data.cursors import Data
from bridgelm.errors import UserError
from bridgelm.methods.base import Form, Method, rl_coef, rl_setup
from bridgelm.model.policy import Policy
from bridgelm.objective import credit, losses
from bridgelm.rollout.roller import NOTHING, Roller
from bridgelm.types import Batch, Demo, Live, Metrics, Micro, Problem, Row, Verdict

# Mean reward under which each micro-group after the first gets its prefix, and the prefix's share of the demonstration.
TABLES = {"code": ((1 / 2, 0.25), (2 / 3, 0.5), (1.0, 1.0)), "paper": ((0.5, 0.2), (0.7, 0.5), (0.9, 1.0))}
SLACK = 0.3  # how much longer than its share a prefix may get by going on to a blank line


@final
class Trapo(Method):
    tier = "derived"
    form = Form(data="rollouts, some after a prefix; demos in their groups", demo="min(1, p/alpha) on prefixes",
                rollout="PG", controller="prefix by the prompt's mean reward", models="none; reference with rl.kl_coef")
    needs = frozenset({"paired_demos"})

    def __init__(self, options: Any, run: RunConfig) -> None:
        super().__init__(options, run)
        self.sizes = sizes(run.rollout.group)
        self.measured: Metrics = {}

    def setup(self, policy: Policy) -> None:
        rl_setup(policy, self.options.rl)
        policy.optimiser("theta")

    # -- rows ------------------------------------------------------------------------------------------------------

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        problems = data.problems(self.run.rollout.prompts)
        parts = [roll(problems, group=self.sizes[0])]
        numbers = [row.group for row in parts[0][::self.sizes[0]]]
        for size, (threshold, share) in zip(self.sizes[1:], TABLES[self.options.table], strict=True):
            so_far = credit.mean_rewards([row for part in parts for row in part])
            helped = {number for problem, number in zip(problems, numbers, strict=True)
                      if problem.demos and so_far.get(number, math.inf) < threshold}
            parts.append(self.micro_group(roll, problems, numbers, helped, size, share))
        self.measured = measure(parts)
        rows = self.credited([row for part in parts for row in part], [c for part in parts for c in charged(part)])
        if self.options.rl.kl_coef > 0:  # whose estimate needs tokens that theta drew
            rows = [row.with_stream("kl", 1.0, self.options.rl.aggregate, self.run.rollout.max_new_tokens)
                    if "pg" in row.streams and row.drawn.any() else row for row in roll.reference(rows)]
        return rows

    def micro_group(self, roll: Roller, problems: Sequence[Problem], numbers: Sequence[int], helped: set[int],
                    size: int, share: float) -> list[Row]:
        """`size` further rows of each prompt: after a prefix, whole demonstrations, or unguided ones."""
        pairs = list(zip(problems, numbers, strict=True))
        whole = share == 1.0
        drawn = [(p, n) for p, n in pairs if not (whole and n in helped)]
        prefixes = [self.prefix(roll.chat, p, share) if n in helped else NOTHING for p, n in drawn for _ in range(size)]
        rows = roll([p for p, _ in drawn], size, prefixes=prefixes, numbers=[n for _, n in drawn]) if drawn else []
        if whole:
            given = [(p, n, self.demo(p, 1 + i)) for p, n in pairs if n in helped for i in range(size)]
            rows += roll.experts([(p, demo) for p, _, demo in given], [n for _, n, _ in given])
        return rows

    def demo(self, problem: Problem, place: int) -> Demo:
        """One of the problem's demonstrations, with `trace = think` no more than its thought."""
        text = problem.demos[place % len(problem.demos)].text
        thought = re.search(r"<think>(.*?)</think>", text, re.DOTALL) if self.options.trace == "think" else None
        return Demo(thought[1] if thought else text)

    def prefix(self, chat: Chat, problem: Problem, share: float) -> np.ndarray:
        ids, own = chat.demo_ids(problem, self.demo(problem, 0))
        written = ids[own][:-1]  # without the end token
        blank = [i for i, token in enumerate(written) if "\n\n" in chat.text([token])]
        return written[:cut(len(written), blank, share)]

    # -- credit ----------------------------------------------------------------------------------------------------

    def credited(self, rows: list[Row], charge: list[bool]) -> list[Row]:
        """Streams `pg` and `nll` over all tokens of a row, each with weight on its own part: one denominator."""
        o, out, length = self.options, list(rows), self.run.rollout.max_new_tokens
        unguided = None if o.baseline == "all" else lambda row: row.given == 0
        for i, advantage in credit.group_advantages(rows, o.rl.std, unguided).items():
            row = rows[i]
            if self.run.rollout.mask_overlong and not row.finished:
                continue
            weight = advantage if o.prefix_weight == "advantage" else 1.0
            row = row.with_stream("pg", advantage * row.drawn, o.rl.aggregate, length, row.own)
            row = row.with_stream("nll", weight * charge[i] * given(row), o.rl.aggregate, length, row.own)
            out[i] = row.with_stream("entropy", 1.0) if o.entropy_coef and row.drawn.any() else row
        return out

    # -- losses and the update -------------------------------------------------------------------------------------

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        o, weight, out = self.options, batch.weight, {}
        if "pg" in batch and o.clip:
            out["pg"] = losses.pg_clip(live.logp_BT, batch.old_BT, weight["pg"], o.rl.clip_low, o.rl.clip_high)
        elif "pg" in batch:
            out["pg"] = losses.pg(live.logp_BT, batch.old_BT, weight["pg"])
        if "nll" in batch:
            trust = losses.prob_weight(live.logp_BT, o.alpha) if o.alpha else 1.0
            out["nll"] = losses.nll(live.logp_BT, weight["nll"] * trust)
        if "kl" in batch:
            out["kl"] = losses.kl_k3(live.logp_BT, batch.ref_BT, weight["kl"])
        if "entropy" in batch and live.entropy_BT is not None:
            out["entropy"] = -weight["entropy"] * live.entropy_BT
        return out

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        o = self.options
        coef = rl_coef(o.rl) | {"nll": 1.0} | ({"entropy": o.entropy_coef} if o.entropy_coef else {})
        found = policy.grad(self.terms, batch, coef, entropy=o.entropy_coef > 0)
        norm = policy.apply("theta", found.theta)
        return {"grad_norm/theta": norm, **{f"loss/{name}": value for name, value in found.losses.items()},
                **self.measured, **probabilities(batch, found.logps)}

    def warnings(self, metrics: Metrics) -> list[str]:
        if not metrics.get("trapo/repeated"):
            return []
        return ["some prompts have one demonstration only: trapo's last rows repeat it, where the paper has a second "
                "trace; give two `demos` a problem"]


def sizes(group: int) -> tuple[int, int, int, int]:
    """Rows of each micro-group: 4 2 1 1 of 8; of another number an eighth, an eighth, a quarter, and the rest first."""
    if group < 4:
        raise UserError(f"rollout.group = {group}: method 'trapo' draws four micro-groups; set it to 8, or at least 4")
    eighth, quarter = max(1, group // 8), max(1, group // 4)
    return group - quarter - 2 * eighth, quarter, eighth, eighth


def cut(length: int, blank: Sequence[int], share: float) -> int:
    """Where a prefix ends: behind the first token with a blank line from its share on, if that one comes soon."""
    at = int(length * share)
    later = next((i for i in blank if i >= at), length)
    return later + 1 if later < min(length, (share + SLACK) * length) else at


def given(row: Row) -> np.ndarray:
    return row.own & ~row.drawn


def charged(part: Sequence[Row]) -> list[bool]:
    """Which rows of a micro-group pay for their prefix: of those that share one, the last that was graded."""
    seen: set[tuple[int, bytes]] = set()
    out = []
    for row in reversed(part):
        key = (row.group, row.ids[given(row)].tobytes())
        out.append(row.given > 0 and row.verdict is not Verdict.ERROR and key not in seen)
        seen |= {key} if out[-1] else set()
    return out[::-1]


def measure(parts: Sequence[Sequence[Row]]) -> Metrics:
    """Share of the rows at each level of help; what rows earn without help, after a prefix and as demonstrations."""
    rows = [row for part in parts for row in part]
    sums = {f"level_{i}": float(sum(row.given > 0 for row in part)) for i, part in enumerate(parts) if i}
    sums |= {"level_0": float(sum(row.given == 0 for row in rows)), "rows": float(len(rows))}
    expert = [row for row in rows if row.at == "expert"]
    sums["repeated"] = float(sum(len(row.problem.demos) < 2 for row in expert))
    kinds = {"own": [row for row in rows if not row.given], "expert": expert,
             "guided": [row for row in rows if row.given and row.at != "expert"]}
    for name, some in kinds.items():
        rewards = [row.reward for row in some if row.verdict is not Verdict.ERROR]
        sums |= {f"{name}_reward": sum(rewards), name: float(len(rewards))}
    found = {f"trapo/level_{i}": sums[f"level_{i}"] / sums["rows"] for i in range(len(parts))}
    found |= {f"trapo/{name}_reward": sums[f"{name}_reward"] / sums[name] for name in kinds if sums[name]}
    return found | {"trapo/repeated": sums["repeated"]}


def probabilities(batch: Batch, logps: dict[int, np.ndarray]) -> Metrics:
    """Mean probability that theta gives to the tokens that it imitates, and to those that it drew."""
    sums: Metrics = {"prefix_p": 0.0, "prefix": 0.0, "own_p": 0.0, "own": 0.0}
    for i, row in enumerate(batch.rows):
        if i in logps and "nll" in row.streams:
            for name, where in (("prefix", row.streams["nll"].weight != 0), ("own", row.drawn)):
                sums[f"{name}_p"] += float(np.exp(logps[i][where]).sum())
                sums[name] += float(where.sum())
    return {f"trapo/{name}_p": sums[f"{name}_p"] / sums[name] for name in ("prefix", "own") if sums[name]}
