"""Guess, think, answer: SFT on a guessed label and RL on the rest of the answer, by a gradient gate (arXiv 2509.12108).

    L_SFT = - sum over label tokens of log pi(label | x, <guess>) / label tokens           all else is masked        (1)
    L_RL  = - J_RL of the tokens outside the guess,   R = R_grader + format_weight R_format                          (2)
    g     = g_RL where cos(g_SFT, g_RL) < 0,   else sft_weight g_SFT + rl_weight g_RL                                (3)

No demonstrations: the label is the problem's answer, or its first `words`. An answer is <guess>..</guess> <think>..
</think> <answer>..</answer>; its guess is trained by (1) alone and all the rest, tags and format included, by (2). With
empty tags the guess is the first tokens of an answer, as many as the label has, and no format is asked for.

Our reading: (1) is one row a problem, the prompt and a guess with the label in it, as the label depends on nothing that
comes later. The grader must read the answer where the format puts it. The cosine is that of a whole update.

Trap: the sampled guess is in the context of the thinking that is rewarded, and is itself not: a guess that is hardly
ever right teaches the policy to think against it. Hold `gta/guessed` against `correct`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, final

import numpy as np
from torch import Tensor

from bridgelm.config.run_config import RunConfig
from bridgelm.data.chat import Chat
from bridgelm.data.cursors import Data
from bridgelm.methods.base import Form, Gradients, Method, credited, rl_coef, rl_setup, rl_terms, sft_terms
from bridgelm.model import grads
from bridgelm.model.policy import Policy
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Demo, Live, Metrics, Micro, Problem, Row


@final
class Gta(Method):
    tier = "derived"
    gradients = Gradients(1, 2, 2)
    form = Form(data="rollouts; the label in the guess", demo="1 (label)", rollout="PPO (not the guess)",
                controller="RL alone where cos(g_SFT, g_RL) < 0", models="reference with rl.kl_coef (.01)")
    needs = frozenset({"labels"})

    def __init__(self, options: Any, run: RunConfig) -> None:
        super().__init__(options, run)
        self.measured: Metrics = {}

    def setup(self, policy: Policy) -> None:
        rl_setup(policy, self.options.rl)
        policy.optimiser("theta")

    def gather(self, data: Data, roll: Roller, step: int) -> list[Row]:
        o, chat = self.options, roll.chat
        rows = [replace(row, reward=row.reward + o.format_weight * self.fits(row.text)) if o.format else row
                for row in roll.groups(data)]
        problems = list({row.group: row.problem for row in rows}.values())
        labels = [self.label_row(chat, problem) for problem in problems]
        size = {label.problem.id: int(label.streams["nll"].mask.sum()) for label in labels}
        guesses = [self.guess(chat, row, size[row.problem.id]) for row in rows]
        right = [chat.text(row.ids[guess]).strip() == self.label(row.problem) for row, guess in
                 zip(rows, guesses, strict=True)]
        self.measured = {"gta/guessed": float(np.mean(right))}
        if o.format:
            self.measured["gta/format"] = float(np.mean([self.fits(row.text) for row in rows]))
        rows = credited(rows, roll, o.rl, self.run)
        return [without(row, guess) for row, guess in zip(rows, guesses, strict=True)] + labels                    # (2)

    def label(self, problem: Problem) -> str:
        words = (problem.answer or "").split()
        return " ".join(words[:self.options.words]) if self.options.words else (problem.answer or "").strip()

    def label_row(self, chat: Chat, problem: Problem) -> Row:                                                      # (1)
        o = self.options
        ids, own = chat.demo_ids(problem, Demo(o.open + self.label(problem) + o.close))
        row = Row(ids[:-1], own[:-1], "demo", problem)  # nothing ends here: no end token
        return row.with_stream("nll", 1.0, mask=self.guess(chat, row, len(ids)))

    def guess(self, chat: Chat, row: Row, size: int) -> np.ndarray:
        """Mask of the guess's tokens; where there are no tags, of the first `size` that the answer has."""
        o = self.options
        first = len(row.ids) - int(row.own.sum())
        found = chat.span(row.ids[first:], o.open, o.close) if o.open else (0, size)
        start, end = found or (0, 0)
        place = np.arange(len(row.ids)) - first
        return (place >= start) & (place < end)

    def fits(self, text: str) -> bool:
        return re.fullmatch(self.options.format, text, re.DOTALL) is not None

    def terms(self, batch: Micro, live: Live) -> dict[str, Tensor]:
        return rl_terms(batch, live, self.options.rl) | sft_terms(batch, live)

    def update(self, policy: Policy, batch: Batch, step: int) -> Metrics:
        o = self.options
        sft = policy.grad(self.terms, batch, {"nll": o.sft_weight})
        rl = policy.grad(self.terms, batch, rl_coef(o.rl, o.rl_weight))
        sizes = grads.norm(sft.theta) * grads.norm(rl.theta)
        cosine = policy.dot(sft.theta, rl.theta) / sizes if sizes else 0.0
        dropped = o.gate and cosine < 0
        norms = {"grad_norm/sft": grads.norm(sft.theta), "grad_norm/rl": grads.norm(rl.theta)}
        norm = policy.apply("theta", rl.theta if dropped else grads.blend((1.0, sft.theta), (1.0, rl.theta)))      # (3)
        losses = {f"loss/{name}": value for name, value in (sft.losses | rl.losses).items()}
        return {"grad_norm/theta": norm, "gta/cos": cosine, "gta/dropped": float(dropped), **norms, **losses,
                **self.measured}


def without(row: Row, guess: np.ndarray) -> Row:
    """The row with the guess's tokens out of all its streams, and so out of their denominators."""
    streams = {name: replace(s, mask=s.mask & ~guess) for name, s in row.streams.items()}
    return replace(row, streams=streams)
