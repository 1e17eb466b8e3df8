"""A policy that is a table of logits, next token given the last, and the real roller and method on it: rollouts are
handed out, rewards are a function of the answer, and every gradient is a closed form."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from exact import run_config
from torch import Tensor

from bridgelm.ledger import Ledger
from bridgelm.model import batching
from bridgelm.model.policy import Grads
from bridgelm.rollout.roller import Roller
from bridgelm.types import Batch, Completion, Demo, Grade, Live, Problem, Row, Verdict

V, END = 6, 0  # tokens 0 .. 5; 0 ends an answer
Answer = tuple[int, ...]


class Table:
    """theta is V x V logits. `applied` keeps what each optimiser was handed, in order; a step is plain SGD."""

    def __init__(self, seed: int = 0, lr: float = 0.0) -> None:
        self.theta = torch.from_numpy(np.random.default_rng(seed).normal(0, 0.7, (V, V)))
        self.start, self.lr, self.ledger, self.groups = self.theta.clone(), lr, Ledger(1), {}
        self.rates: dict[str, float | None] = {}
        self.applied: list[tuple[str, np.ndarray]] = []

    def optimiser(self, name: str, group: str | None = None, lr: float | None = None) -> None:
        self.rates[name] = lr

    def fork(self, name: str) -> None:
        self.groups[name] = self.theta.clone()

    @contextmanager
    def at(self, point: str = "live") -> Iterator[Any]:
        yield self.theta if point == "live" else self.start

    origin = at

    def logp_NV(self, row: Row, table: Tensor) -> Tensor:
        """Of every token that could stand at places 1, 2, ... of a row."""
        return torch.log_softmax(table[torch.from_numpy(row.ids[:-1])] / row.temperature, -1)

    def look(self, row: Row, table: Tensor) -> tuple[Tensor, Tensor]:
        """log-probs and entropies at own tokens, 0 elsewhere."""
        all_NV, own = self.logp_NV(row, table), torch.from_numpy(row.own[1:])
        logp = all_NV.gather(1, torch.from_numpy(row.ids[1:])[:, None])[:, 0]
        entropy = -(all_NV.exp() * all_NV).sum(-1)
        zero = torch.zeros(1, dtype=torch.float64)
        return torch.cat([zero, logp * own]), torch.cat([zero, entropy * own])

    def score(self, rows: Sequence[Row], at: str = "live") -> list[np.ndarray]:
        return self.score_and_entropy(rows, at)[0]

    def score_and_entropy(self, rows: Sequence[Row], at: str = "live") -> tuple[list[np.ndarray], list[np.ndarray]]:
        self.ledger.score += sum(len(row.ids) for row in rows)
        with self.at(at) as table:
            found = [self.look(row, table) for row in rows]
        return [a.numpy() for a, _ in found], [b.numpy() for _, b in found]

    def grad(self, terms: Any, batch: Batch, coef: dict[str, float]) -> Grads:
        theta = self.theta.clone().requires_grad_()
        total, losses = 0.0 * theta.sum(), dict.fromkeys(coef, 0.0)
        for row in batch.rows:  # micro-batches of one row
            micro = batching.collate([row], torch.float64, torch.device("cpu"), batch.stats)
            values = terms(micro, Live(self.look(row, theta)[0][None]))
            for name in coef.keys() & values.keys():
                part = coef[name] * (values[name] * micro.scale[name]).sum() / batch.counts[name]
                total, losses[name] = total + part, losses[name] + float(part.detach())
        (gradient,) = torch.autograd.grad(total, theta)
        return Grads({"x": gradient}, {}, losses, {})

    def apply(self, name: str, gradient: dict[str, Tensor]) -> float:
        self.applied.append((name, -gradient["x"].numpy().copy()))
        self.theta = self.theta - self.lr * gradient["x"]
        return float(gradient["x"].norm())


def ids_of(text: str) -> list[int]:
    return [int(word) for word in text.split()]


class Chat:
    """A text is its tokens, written out. Sentences end where `ends` says."""

    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda ids: [str(i) for i in ids])

    def prompt_ids(self, problem: Problem) -> np.ndarray:
        return np.array(ids_of(problem.prompt))

    def demo_ids(self, problem: Problem, demo: Demo) -> tuple[np.ndarray, np.ndarray]:
        prompt = self.prompt_ids(problem)
        ids = np.concatenate([prompt, [*ids_of(demo.text), END]])
        return ids, np.arange(len(ids)) >= len(prompt)

    def turn(self, ids: Any) -> str:
        return " ".join(str(i) for i in ids)


@dataclass
class World:
    """`reply` gives the tokens that the engine draws after a prompt (and prefix): its arguments are the problem, the
    prefix and how many requests with this prompt and prefix came before."""

    method: Any
    problems: Sequence[Problem]
    reply: Callable[[str, Answer, int], Answer]
    reward: Callable[[str, Answer], float | None]
    policy: Table = field(default_factory=Table)
    calls: list[list[tuple[str, Answer]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.method.setup(self.policy)
        self.seen: Counter[tuple[str, Answer]] = Counter()
        self.roll = Roller(self.policy, self, Chat(), self, self.method.run)  # type: ignore[arg-type]
        self.taken = 0
        self.splits = SimpleNamespace(train=list(self.problems))
        self.last_error = ""

    # the data
    def problems_of(self, n: int) -> list[Problem]:
        self.taken += n
        return [self.splits.train[i % len(self.splits.train)] for i in range(self.taken - n, self.taken)]

    # the engine
    exact = True

    def generate(self, origin: Any, requests: Any, sampling: Any, ledger: Ledger) -> list[Completion]:
        out, call = [], []
        for request in requests:
            problem = self.owner(request.prompt)
            prefix = tuple(request.prompt[len(ids_of(problem.prompt)):].tolist())
            tokens = self.reply(problem.id, prefix, self.seen[problem.id, prefix])[:request.room]
            self.seen[problem.id, prefix] += 1
            call.append((problem.id, prefix))
            row = Row(np.concatenate([request.prompt, np.array(tokens, dtype=np.int64)]),
                      np.arange(len(request.prompt) + len(tokens)) >= len(request.prompt), "rollout", problem,
                      temperature=sampling.temperature)
            logps = self.policy.look(row, self.policy.theta)[0].numpy()[len(request.prompt):]
            out.append(Completion(np.array(tokens, dtype=np.int64), logps, logps, bool(tokens) and tokens[-1] == END))
        self.calls.append(call)
        return out

    def owner(self, prompt: np.ndarray) -> Problem:
        return next(p for p in self.splits.train if ids_of(p.prompt) == prompt[:len(ids_of(p.prompt))].tolist())

    # the grader
    def grade(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Grade]:
        out = []
        for problem, text in zip(problems, texts, strict=True):
            reward = self.reward(problem.id, tuple(ids_of(text)))
            verdict = Verdict.ERROR if reward is None else Verdict.CORRECT if reward > 0.5 else Verdict.WRONG
            out.append(Grade(0.0 if reward is None else reward, verdict))
        return out

    def step(self, number: int = 0) -> Any:
        """One step: its rows, its metrics, and what was applied in it."""
        self.roll.begin(number)
        done = len(self.policy.applied)
        data = SimpleNamespace(problems=self.problems_of, splits=self.splits)
        rows = self.method.gather(data, self.roll, number)
        metrics = self.method.update(self.policy, batching.make_batch(rows), number)
        return SimpleNamespace(rows=rows, metrics=metrics, applied=self.policy.applied[done:])


def problem(name: str, prompt: str, *demos: str) -> Problem:
    return Problem(name, ({"role": "user", "content": prompt},), demos=tuple(Demo(text) for text in demos))


def method_of(cls: Any, options: dict[str, Any], prompts: int = 2, group: int = 4, steps: int = 10,
              **rollout: Any) -> Any:
    config = run_config(options, steps, rollout={"prompts": prompts, "group": group, "max_new_tokens": 8, **rollout},
                        reward={"verifier": "exact", "max_error_rate": 1.0})
    return cls(config.method, config)


REPLIES: list[Answer] = [(5, END), (1, END), (2, 5, END), (2, 2, 1, END), (END,), (4, 5, END)]


def reply(name: str, prefix: Answer, i: int) -> Answer:
    return REPLIES[(i + len(prefix)) % len(REPLIES)]


def reward(_: str, answer: Answer) -> float:
    """Right where the last word is 5."""
    return float([5, *(t for t in answer if t != END)][-1] == 5)


def slope(table: Tensor, row: Row, t: int) -> np.ndarray:
    """d log pi(token t of the row) / d theta, written out: one at the token, less the probabilities, over T."""
    before, token = int(row.ids[t - 1]), int(row.ids[t])
    z = [math.exp(float(x) / row.temperature) for x in table[before]]
    out = np.zeros((V, V))
    out[before] = [-x / sum(z) for x in z]
    out[before, token] += 1
    return out / row.temperature


def probability(table: Tensor, row: Row, t: int) -> float:
    z = [math.exp(float(x) / row.temperature) for x in table[int(row.ids[t - 1])]]
    return z[int(row.ids[t])] / sum(z)
