"""Accuracy: greedy pass@1, and by sampling avg@k and unbiased pass@k, with intervals, by difficulty, in and beyond
the range of the training problems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bridgelm import stats
from bridgelm.chat import Chat, load_chat, model_path
from bridgelm.checkpoint import model_folder
from bridgelm.config import RunConfig, load_config
from bridgelm.data import check_lengths, load_splits
from bridgelm.engine import Engine, Request, Sampling
from bridgelm.errors import UserError
from bridgelm.loading import load_model
from bridgelm.rollout import Grader
from bridgelm.types import Problem, Verdict
from bridgelm.verify import build_verifier

SALT = 7_919  # keeps evaluation draws apart from rollout draws


def measure(model: Any, engine: Engine, chat: Chat, grader: Grader, problems: Sequence[Problem], max_new_tokens: int,
            samples: int = 0, temperature: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """One greedy answer a problem, and `samples` sampled ones. Grading errors are counted and left out."""
    requests = [Request(chat.prompt_ids(p)) for p in problems]
    completions = engine.generate(model, requests, Sampling(max_new_tokens, 0.0))
    grades = grader.grade(list(problems), [chat.turn(c.ids) for c in completions])
    valid = [i for i, grade in enumerate(grades) if grade.verdict is not Verdict.ERROR]
    right = {i: int(grades[i].verdict is Verdict.CORRECT) for i in valid}
    hits = sum(right.values())
    out: dict[str, Any] = {
        "accuracy": hits / max(1, len(valid)), "n": len(valid), "interval": list(stats.wilson(hits, len(valid))),
        "errors": 1 - len(valid) / max(1, len(problems)),
        "length": float(np.mean([len(c.ids) for c in completions])),
        "truncated": float(np.mean([not c.finished for c in completions])),
        "by_difficulty": _by_difficulty(problems, right),
        "correct": {problems[i].id: value for i, value in right.items()},
    }
    if samples:
        out |= _sampled(model, engine, chat, grader, problems, Sampling(max_new_tokens, temperature), samples, seed)
    return out


def _by_difficulty(problems: Sequence[Problem], right: dict[int, int]) -> dict[str, list[float]]:
    cells: dict[float, list[int]] = {}
    for i, value in right.items():
        difficulty = problems[i].difficulty
        if difficulty is not None:
            cells.setdefault(difficulty, []).append(value)
    return {f"{key:g}": [float(np.mean(cells[key])), len(cells[key])] for key in sorted(cells)}


def _sampled(model: Any, engine: Engine, chat: Chat, grader: Grader, problems: Sequence[Problem], sampling: Sampling,
             samples: int, seed: int) -> dict[str, Any]:
    repeated = [problem for problem in problems for _ in range(samples)]
    requests = [Request(chat.prompt_ids(p), (seed, SALT, i)) for i, p in enumerate(repeated)]
    completions = engine.generate(model, requests, sampling)
    grades = grader.grade(repeated, [chat.turn(c.ids) for c in completions])
    hits = np.array([g.verdict is Verdict.CORRECT for g in grades]).reshape(len(problems), samples).sum(1)
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= samples]
    pass_k = {str(k): float(np.mean([stats.pass_at_k(samples, int(c), k) for c in hits])) for k in ks}
    spread = float(np.std(hits / samples, ddof=1) / np.sqrt(len(hits))) if len(hits) > 1 else 0.0
    return {"k": samples, "avg_k": float(np.mean(hits) / samples), "avg_k_se": spread, "pass_k": pass_k}


def evaluate_run(path_or_model: str | Path, *, split: str = "test", samples: int = 0, which: str = "final",
                 config: RunConfig | None = None) -> dict[str, Any]:
    """Measures a run's final or best model, or any model with the data and reward of `config`."""
    path = Path(path_or_model)
    is_run = (path / "run.json").exists()
    if is_run:
        config = load_config(path / "config.json")
        source = str(model_folder(path, which))
    elif config is None:
        raise UserError(f"{path_or_model}: not a run folder; to measure a model give a TOML file with its data, reward "
                        "and rollout settings: `bridgelm eval MODEL --config FILE.toml`")
    else:
        source = model_path(str(path_or_model))
    chat = load_chat(config.model.model_copy(update={"name_or_path": source}))
    splits = check_lengths(load_splits(config), chat, config)
    problems = getattr(splits, split, None)
    if not problems:
        raise UserError(f"split {split!r}: the data has none; choose from train, validation, test, hard")
    model = load_model(config.model.model_copy(update={"name_or_path": source}))
    engine = Engine(chat.eos_ids, chat.pad_id, chat.text, config.rollout.max_rows)
    limit = config.eval.max_new_tokens or config.rollout.max_new_tokens
    with build_verifier(config.reward) as grader:
        found = measure(model, engine, chat, grader, problems, limit, samples, config.eval.temperature, config.seed)
    return {"model": source, "split": split, **found}


