"""Joint SFT and RL whose demonstration tokens are weighted by what they do for reward (ours).

    v     =  d v + (1 - d) grad J_RL(theta)                             running mean of RL's gradient           (1)
    a_it  =  [ log pi_{theta + e P v}(y_it) - log pi_{theta - e P v}(y_it) ] / 2e                               (2)
    s_it  =  exp(eta clip(a_it / rms(a), -limit, limit)),   divided by its mean over the batch's tokens         (3)
    maximise  ( J_RL + mu sum_it s_it log pi(y_it) / tokens ) / (1 + mu),   with s held fixed                   (4)

P is Adam's preconditioner before the step. a_it, the alignment of token t of demonstration i, is
<grad log pi(y_it), P v> up to O(e^2): to first order, what reward gains when a step of Adam makes that token likelier.
Two forward passes give it for all tokens. e is such that log-probs move by `move` (root mean square).

`weights` = gate puts s = 1[a > 0], and `whole` the same by a's mean over the demonstration; neither is brought to mean
one, so that there is less SFT where demonstrations hurt. At eta = 0 `exp` is `joint`. The weights are on data, so that
theta cannot undo them. The mean alignment of each demonstration, and of each source, is written to the run folder.

Our reading: the deviation that a is divided by is taken about zero, so that demonstrations which all help alike are
weighted alike. `memory` uses a mean over the epochs in place of one step's noisy value.

Trap: a model in bfloat16 cannot show so small a step. The alignment is then rounding noise, however `e` is chosen
(`lead/uneven` near 1), unless `move` is about 0.1: use float32 weights, or raise `move`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from bridgelm.config.run_config import RunConfig
from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Gradients, Method, rl_coef, rl_rows, rl_setup, rl_terms, sft_rows, sft_terms
from bridgelm.model import grads
from bridgelm.model.policy import Policy
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Live, Metrics, Micro, Row

FAR = 10.0  # a look ahead that moves log-probs by so many times too much or too little is taken again, once
LOPSIDED = 0.5  # share of the move that is not mirrored at -e, from which on it is noise, or too long a step
PATIENCE = 5  # updates with a look ahead that cannot be trusted before saying so
SOURCES = 8  # that get a metric of their own
TEXT = 120  # characters of a demonstration that are kept for the report


@final
class TokenLead(Method):
    tier = "experimental"
    gradients = Gradients(2, 1, 3)
    form = Form(data="rollouts + demos", demo="mu s/(1 + mu), s = exp(eta alignment), mean 1",
                rollout="PPO/(1 + mu)", controller="s by two looks ahead along RL's gradient",
                models="mean RL gradient")
    needs = frozenset({"demos"})

    def __init__(self, options: Any, run: RunConfig) -> None:
        super().__init__(options, run)
        self.e = 0.0  # of the next look ahead; 0: to be guessed
        self.unseen = self.lopsided = 0  # updates whose look ahead was too small, or mostly noise, less the others
        self.memory: dict[str, list[float]] = {}  # demonstration -> running mean of a / rms(a) of each token
        self.seen: dict[str, list[Any]] = {}  # demonstration -> problem, text, source, tokens, visits, sum of means
        self.sources: list[str] = []

    def setup(self, policy: Policy) -> None:
        rl_setup(policy, self.options.rl)
        policy.optimiser("theta")
        policy.fork("lead")  # v is as large as theta: a group, so that checkpoints carry it
        for t in policy.groups["lead"].flat().values():
            t.detach().zero_()

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        return rl_rows(data, roll, self.options.rl, self.run) + sft_rows(data, roll, self.run)

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return rl_terms(batch, live, self.options.rl) | sft_terms(batch, live)

    # -- the update: all gradients and log-probs are of one theta --------------------------------------------------

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        mu = self.options.mu
        scale = 1.0 / (1.0 + mu)
        rl = policy.grad(self.terms, batch, rl_coef(self.options.rl))
        follow(policy, rl.theta, self.options.decay)                                                    # (1)
        rows, where = list(batch.rows), demo_order(batch)
        demos = [rows[i] for i in where]
        half, middle, found = self.look(policy, demos)                                                  # (2)
        size = rms(half)
        z = half / size if size else half
        weights = self.weigh(demos, z, step) if size else np.ones_like(half)                            # (3)
        for i, factor in zip(where, split(weights, demos), strict=True):
            rows[i] = reweighted(rows[i], factor)
        sft = policy.grad(self.terms, replace(batch, rows=tuple(rows)), {"nll": 1.0})
        joint = grads.blend((scale, rl.theta), (scale * mu, sft.theta))  # each is as large as the model
        norm = policy.apply("theta", joint)                                                             # (4)
        if size:
            # A demonstration without weight has no log-probs of the SFT pass.
            bend = [part - sft.logps[i][mask(rows[i])] for i, part in zip(where, split(middle, demos), strict=True)
                    if i in sft.logps]
            found |= {"uneven": rms(np.concatenate([*bend, np.empty(0)])) / size, "kept": mean(weights > 0)}
            if self.options.weights == "exp":
                found["spread"] = float(np.std(np.log(weights)))
            found |= self.account(demos, z)
        self.watch(found)
        return {"grad_norm/theta": norm, "loss/nll": sft.losses["nll"], "loss/pg": rl.losses["pg"], "joint/mu": mu,
                **{f"lead/{name}": value for name, value in found.items()}}

    def look(self, policy: Policy, demos: list[Row]) -> tuple[np.ndarray, np.ndarray, Metrics]:
        """Half the difference of the log-probs at theta +- e P v, and their mean, over all demonstration tokens."""
        nothing = np.zeros(sum(int(mask(row).sum()) for row in demos))
        v = {name: t.detach() for name, t in policy.groups["lead"].flat().items()}
        direction = policy.precondition("theta", v)
        length = grads.norm(direction)
        if not length or not nothing.size:
            return nothing, nothing, {}
        adam = self.run.optim.adam
        moments = adam and bool(policy.optimisers["theta"].optimiser.state)
        # A first guess: one step of Adam's size; without its second moments, a step of length `move`.
        e = self.e or (self.run.optim.lr if moments else self.options.move / length)
        for last in (False, True):
            up, down = (logps(policy, demos, direction, size) for size in (e, -e))
            half = (up - down) / 2
            moved = rms(half)
            ratio = self.options.move / max(moved, 1e-30) if math.isfinite(moved) else 0.0
            if last or 1 / FAR <= ratio <= FAR:
                break
            e *= float(np.clip(ratio, 1e-4, 1e4))
        # Kept for the next step, unless that one has another metric: Adam's, from its second step on.
        self.e = e * float(np.clip(ratio, 1 / FAR, FAR)) if moments or not adam else 0.0
        if not math.isfinite(moved):  # weights so far off that the model breaks: no alignment in this step
            return nothing, nothing, {"step": e}
        return half, (up + down) / 2, {"step": e, "moved": moved}

    def weigh(self, demos: list[Row], z: np.ndarray, step: int) -> np.ndarray:
        """s of each token from z = a / rms(a)."""
        o = self.options
        if o.memory:
            z = self.remember(demos, z)
        if o.weights == "exp":
            weights = np.exp(o.eta * np.clip(z, -o.limit, o.limit))
            weights /= mean(weights)
        else:
            parts = [part.mean(keepdims=True).repeat(part.size) if part.size else part for part in split(z, demos)]
            weights = ((np.concatenate(parts) if o.weights == "whole" else z) > 0).astype(np.float64)
        return np.random.default_rng([self.run.seed % 2**63, step]).permutation(weights) if o.shuffled else weights

    def remember(self, demos: list[Row], z: np.ndarray) -> np.ndarray:
        """The running mean of each token with this step's value in it. Four digits of it are kept, as text."""
        keep, out = self.options.memory, []
        for row, new in zip(demos, split(z, demos), strict=True):
            old = self.memory.get(key(row))
            out.append(new if old is None else keep * np.array(old) + (1 - keep) * new)
            self.memory[key(row)] = [round(float(x), 4) for x in out[-1]]
        return np.concatenate(out)

    # -- what the demonstrations did for reward --------------------------------------------------------------------

    def account(self, demos: list[Row], z: np.ndarray) -> Metrics:
        """Adds this step's alignments to those of each demonstration; returns them by source."""
        by_source: dict[str, list[np.ndarray]] = {}
        for row, each in zip(demos, split(z, demos), strict=True):
            if not each.size:
                continue
            source = source_of(row, self.options.source)
            entry = self.seen.setdefault(key(row), [row.problem.id, row.text[:TEXT], source, each.size, 0, 0.0])
            entry[4:] = [entry[4] + 1, round(entry[5] + float(each.mean()), 6)]
            if source is not None:
                if source not in self.sources and len(self.sources) < SOURCES:
                    self.sources.append(source)
                by_source.setdefault(source if source in self.sources else "other", []).append(each)
        return {"mean": mean(z), "share_negative": mean(z < 0),
                **{f"source/{name[:TEXT]}": float(np.concatenate(part).mean()) for name, part in by_source.items()}}

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """All demonstrations that were looked at, the worst for reward first, and their sources."""
        names = ("problem_id", "text", "source", "tokens", "count")
        rows = [dict(zip(names, entry, strict=False)) | {"alignment": round(entry[5] / entry[4], 4)}
                for entry in self.seen.values()]
        rows.sort(key=lambda row: (row["alignment"], row["problem_id"], row["text"]))
        sources = []
        for name in sorted({row["source"] for row in rows if row["source"] is not None}):
            part = [row for row in rows if row["source"] == name]
            tokens = [row["tokens"] * row["count"] for row in part]
            value = sum(n * row["alignment"] for n, row in zip(tokens, part, strict=True)) / sum(tokens)
            sources.append({"column": self.options.source, "source": name, "demonstrations": len(part),
                            "tokens": sum(tokens), "alignment": round(value, 4)})
        sources.sort(key=lambda row: row["alignment"])
        return {name: found for name, found in (("demonstrations", rows), ("sources", sources)) if found}

    # -- whether to believe it -------------------------------------------------------------------------------------

    def watch(self, found: Metrics) -> None:
        """Counts up on a look ahead that cannot be trusted and down on one that can: noise has its lucky steps."""
        self.unseen = max(0, self.unseen + (1 if found.get("moved", math.inf) < self.options.move / FAR else -1))
        self.lopsided = max(0, self.lopsided + (1 if found.get("uneven", 0.0) > LOPSIDED else -1))

    def warnings(self, metrics: Metrics) -> list[str]:
        out = []
        if self.unseen >= PATIENCE:
            out.append("token_lead's look ahead moves log-probs by less than a tenth of method.move "
                       f"({PATIENCE} updates by now): the model's dtype does not show so small a step; use float32, or "
                       "raise method.move")
        if self.lopsided >= PATIENCE:
            out.append(f"token_lead's alignments are mostly noise (lead/uneven over {LOPSIDED}, {PATIENCE} updates by "
                       "now): with bfloat16 weights use float32 or method.move = 0.1; with float32 lower method.move")
        return out

    def state(self) -> dict[str, Any]:
        return {"e": self.e, "unseen": self.unseen, "lopsided": self.lopsided, "sources": list(self.sources),
                "memory": {name: list(values) for name, values in self.memory.items()},
                "seen": {name: list(entry) for name, entry in self.seen.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        self.e, self.unseen, self.lopsided = state["e"], state["unseen"], state["lopsided"]
        self.sources = list(state["sources"])
        self.memory = {name: list(values) for name, values in state["memory"].items()}
        self.seen = {name: list(entry) for name, entry in state["seen"].items()}


def follow(policy: Policy, loss_gradient: grads.Gradient, decay: float) -> None:
    """The running mean v of grad J_RL, which is minus the gradient of the loss."""
    with torch.no_grad():
        for name, t in policy.groups["lead"].flat().items():
            t.mul_(decay).add_(loss_gradient[name], alpha=decay - 1)


def logps(policy: Policy, demos: list[Row], direction: grads.Gradient, size: float) -> np.ndarray:
    """The log-probs of all demonstration tokens some way from theta, which itself stays where it is."""
    with policy.offset(direction, size) as point:
        found = policy.score(demos, at=point)
    return np.concatenate([logp[mask(row)] for logp, row in zip(found, demos, strict=True)])


def demo_order(batch: Batch) -> list[int]:
    """Indices of the demonstrations, in an order that does not depend on that of the rows."""
    rows = batch.rows
    where = [i for i, row in enumerate(rows) if "nll" in row.streams]
    return sorted(where, key=lambda i: (rows[i].problem.id, rows[i].text, rows[i].ids.tobytes()))


def mask(row: Row) -> np.ndarray:
    return row.streams["nll"].mask


def key(row: Row) -> str:
    """One name for one demonstration in every epoch: its problem, its place among the problem's, its length."""
    place = next((i for i, demo in enumerate(row.problem.demos) if demo.text == row.text), 0)
    return f"{row.problem.id}#{place}:{int(mask(row).sum())}"


def source_of(row: Row, column: str) -> str | None:
    value = {"difficulty": row.problem.difficulty, **row.problem.columns}.get(column)
    return None if value is None else str(value)


def split(values: np.ndarray, demos: list[Row]) -> list[np.ndarray]:
    ends = np.cumsum([int(mask(row).sum()) for row in demos])
    return np.split(values, ends[:-1]) if demos else []


def reweighted(row: Row, factor: np.ndarray) -> Row:
    """The row with the weights of its demonstration tokens multiplied; masks, and so all counts, stay."""
    stream = row.streams["nll"]
    weight = np.array(stream.weight)
    weight[stream.mask] *= factor
    return replace(row, streams={**row.streams, "nll": replace(stream, weight=weight)})


def mean(values: np.ndarray) -> float:
    return float(values.sum()) / max(1, values.size)


def rms(values: np.ndarray) -> float:
    return math.sqrt(mean(values**2))
