"""Accuracy on the validation and test sets: greedy pass@1, and avg@k and unbiased pass@k of sampled answers.

All figures have intervals and are broken down by difficulty; the `hard` split lies beyond the range of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bridgelm.analysis import stats
from bridgelm.config.run_config import RunConfig, load_config
from bridgelm.data.chat import Chat, load_chat
from bridgelm.data.cursors import check_lengths, load_splits
from bridgelm.data.model_shapes import model_path
from bridgelm.engine import Engine, NativeEngine, Origin, Request, Sampling
from bridgelm.errors import UserError
from bridgelm.model.loading import load_model
from bridgelm.rollout.roller import AnswerGrader, check_errors
from bridgelm.training.checkpoint import model_folder
from bridgelm.types import Grade, Problem, Verdict
from bridgelm.verify import build_verifier

SALT = 7_919  # keeps evaluation draws apart from rollout draws


def measure(origin: Origin, engine: Engine, chat: Chat, grader: AnswerGrader, problems: Sequence[Problem],
            config: RunConfig, samples: int = 0) -> dict[str, Any]:
    """Grades one greedy answer to each problem, and `samples` sampled ones. Answers that could not be graded are
    counted and left out; too many of them stop the evaluation."""
    limit, stop = config.eval.max_new_tokens or config.rollout.max_new_tokens, tuple(config.rollout.stop)
    requests = [Request(chat.prompt_ids(p)) for p in problems]
    completions = engine.generate(origin, requests, Sampling(limit, 0.0, stop))
    grades = _graded(grader, list(problems), [chat.turn(c.ids) for c in completions], config)
    valid = [i for i, grade in enumerate(grades) if grade.verdict is not Verdict.ERROR]
    right = {i: int(grades[i].verdict is Verdict.CORRECT) for i in valid}
    hits = sum(right.values())
    out: dict[str, Any] = {
        "accuracy": hits / max(1, len(valid)), "n": len(valid), "interval": list(stats.wilson(hits, len(valid))),
        "errors": 1 - len(valid) / max(1, len(problems)),
        "length": float(np.mean([len(c.ids) for c in completions])),
        "truncated": float(np.mean([not c.finished for c in completions])),
        "by_difficulty": _by_difficulty(problems, right),
        "by_length": _by_length([len(c.ids) for c in completions], right),
        "correct": {problems[i].id: value for i, value in right.items()},
    }
    if samples:
        sampling = Sampling(limit, config.eval.temperature, stop)
        repeated = [problem for problem in problems for _ in range(samples)]
        requests = [Request(chat.prompt_ids(p), (config.seed, SALT, i)) for i, p in enumerate(repeated)]
        texts = [chat.turn(c.ids) for c in engine.generate(origin, requests, sampling)]
        out |= _sampled(_graded(grader, repeated, texts, config), samples)
    return out


def _graded(grader: AnswerGrader, problems: list[Problem], texts: list[str], config: RunConfig) -> list[Grade]:
    grades = grader.grade(problems, texts)
    failed = sum(grade.verdict is Verdict.ERROR for grade in grades)
    check_errors(failed, len(grades), config, "evaluation", grader)
    return grades


def _by_difficulty(problems: Sequence[Problem], right: dict[int, int]) -> dict[str, list[float]]:
    cells: dict[float, list[int]] = {}
    for i, value in right.items():
        difficulty = problems[i].difficulty
        if difficulty is not None:
            cells.setdefault(difficulty, []).append(value)
    return {f"{key:g}": [float(np.mean(cells[key])), len(cells[key])] for key in sorted(cells)}


def _by_length(tokens: Sequence[int], right: dict[int, int]) -> dict[str, list[float]]:
    """Accuracy by answer length, in powers of two: the key is the greatest length in a cell."""
    cells: dict[int, list[int]] = {}
    for i, value in right.items():
        cells.setdefault(2 ** math.ceil(math.log2(max(8, tokens[i]))), []).append(value)
    return {str(key): [float(np.mean(cells[key])), len(cells[key])] for key in sorted(cells)}


def _sampled(grades: list[Grade], samples: int) -> dict[str, Any]:
    """avg@k and unbiased pass@k. Answers that could not be graded are left out, and so are, from pass@k, problems with
    fewer than k graded answers."""
    cells = [grades[i:i + samples] for i in range(0, len(grades), samples)]
    hits = [(sum(g.verdict is Verdict.CORRECT for g in cell), sum(g.verdict is not Verdict.ERROR for g in cell))
            for cell in cells]
    shares = [correct / n for correct, n in hits if n]
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= samples]
    pass_k = {str(k): float(np.mean([stats.pass_at_k(n, c, k) for c, n in hits if n >= k])) for k in ks}
    spread = float(np.std(shares, ddof=1) / np.sqrt(len(shares))) if len(shares) > 1 else 0.0
    return {"k": samples, "avg_k": float(np.mean(shares)), "avg_k_se": spread, "pass_k": pass_k}


def evaluate_run(path_or_model: str | Path, *, split: str = "test", samples: int = 0, which: str = "final",
                 config: RunConfig | None = None) -> dict[str, Any]:
    """Measures a run's final or best model, or any model with the data and reward of `config`."""
    path = Path(path_or_model)
    is_run = (path / "run.json").exists()
    if is_run:
        config = load_config(path / "config.json")
        source = str(model_folder(path, which))
    elif config is None:
        raise UserError(f"{path_or_model}: not a run folder; to measure a model name a benchmark, `--suite NAME`, or "
                        "give a TOML file with data, reward and rollout settings, `--config FILE.toml`")
    else:
        source = model_path(str(path_or_model))
    opened = config.model.model_copy(update={"name_or_path": source, "revision": None})
    chat = load_chat(opened)
    splits = check_lengths(load_splits(config), chat, config)
    problems = getattr(splits, split, None)
    if not problems:
        raise UserError(f"split {split!r}: the data has none; choose from train, validation, test, hard")
    model = load_model(opened)
    engine = NativeEngine(chat.eos_ids, chat.pad_id, chat.text, config.rollout.max_rows)
    with build_verifier(config.reward) as grader:
        found = measure(Origin(model), engine, chat, grader, problems, config, samples)
    return {"model": source, "split": split, **found}


