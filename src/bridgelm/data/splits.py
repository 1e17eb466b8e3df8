"""Makes the splits: train, demonstrations, validation and test, without overlap and within the token limits."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from bridgelm.config import catalogue
from bridgelm.config.run_config import RunConfig
from bridgelm.data.schema import check_fields, to_problem
from bridgelm.data.sources import read
from bridgelm.errors import UserError
from bridgelm.types import Demo, Problem

if TYPE_CHECKING:
    from bridgelm.data.chat import Chat

TOY = "toy:"
Problems = tuple[Problem, ...]
# The most that is held out of train where a split is not given, besides a tenth of train.
HELD_OUT = {"validation": 200, "test": 500}


@dataclass(frozen=True, slots=True)
class Splits:
    """`demos` is the separate pool: problems with at least one demonstration each; empty where train carries its own.
    `hard` lies beyond the range of train (toy data only). `notes` say what was decided on the user's behalf."""

    train: Problems
    demos: Problems
    validation: Problems
    test: Problems
    hard: Problems = ()
    notes: tuple[str, ...] = ()


def load_splits(cfg: RunConfig) -> Splits:
    """Everything that `data` names, read, checked and kept apart."""
    data = cfg.data
    if data.train.startswith(TOY):
        return _toy_splits(cfg)
    check_fields(data.fields)
    needs_answer = cfg.reward.verifier in {"math", "exact", "regex"}
    train = _load(data.train, "train", cfg, needs_answer)
    demos = _pool(data.demos, cfg) if data.demos else ()
    held = {role: _load(spec, role, cfg, needs_answer) if spec else ()
            for role, spec in (("validation", data.validation), ("test", data.test))}
    splits = _kept_apart(Splits(train, demos, held["validation"], held["test"]), data.overlap)
    for role in ("validation", "test"):
        if not getattr(splits, role):
            splits = _hold_out(splits, role)
    return splits


def _toy_splits(cfg: RunConfig) -> Splits:
    from bridgelm.data import toy

    family = cfg.data.train.removeprefix(TOY)
    if family not in toy.FAMILIES:
        raise UserError(f"data.train: unknown toy family {family!r}; choose from {', '.join(toy.FAMILIES)}")
    for role in ("validation", "test"):
        if getattr(cfg.data, role):
            raise UserError(f"data.{role}: the embedded task brings its own; leave it out, or give data.train a file")
    try:
        made = {role: tuple(rows) for role, rows in toy.load(family, **cfg.data.toy.model_dump()).items()}
    except ValueError as error:
        raise UserError(f"data.toy: {error}") from None
    if cfg.data.demos:  # of `bridgelm demos`, say
        check_fields(cfg.data.fields)
        pool = _pool(cfg.data.demos, cfg)
        splits = Splits(made["train"], pool, made["validation"], made["test"], made.get("hard", ()))
        return _kept_apart(splits, cfg.data.overlap)
    pool = made["demos"] if cfg.data.toy.layout == "separate" else ()
    return Splits(made["train"], pool, made["validation"], made["test"], made.get("hard", ()))


def _pool(spec: str, cfg: RunConfig) -> Problems:
    demos = _load(spec, "demos", cfg, False)
    for problem in demos:
        if not problem.demos:
            raise UserError(f"data.demos: {spec}: {problem.id!r} has no demonstration; give it a demos column, or name "
                            "yours as data.fields.demos")
    return demos


def _load(spec: str, role: str, cfg: RunConfig, needs_answer: bool) -> Problems:
    problems, places = [], {}
    for source in read(spec, role):
        problem = to_problem(source, cfg.data.fields)
        if needs_answer and problem.answer is None:
            raise UserError(f"{source.place}: no answer, which reward.verifier = {cfg.reward.verifier!r} needs; "
                            "fill in the answer column, name yours as data.fields.answer, or remove the row")
        if problem.id in places:
            raise UserError(f"{source.place}: id {problem.id!r} is already used at {places[problem.id]}; make the ids "
                            "differ")
        places[problem.id] = source.place
        problems.append(problem)
    return tuple(problems)


def _hold_out(splits: Splits, role: str) -> Splits:
    """A tenth of train, the same for every run on this data: seeds and methods must be compared on equal splits.
    Other rows of the same prompts leave train and the demonstrations with it."""
    train = splits.train
    size = min(HELD_OUT[role], max(1, len(train) // 10))
    drawn = np.random.default_rng(list(role.encode())).permutation(len(train))[:size]
    held = tuple(train[i] for i in sorted(drawn))
    taken = {prompt_key(problem) for problem in held}
    rest = _without(train, taken)
    if not rest:
        raise UserError(f"data.{role}: not given, and train has too few different prompts ({len(train)}) to hold some "
                        f"out; give data.{role}")
    note = f"data.{role} is not given: {len(held)} of the training problems are held out for it"
    kept = {"train": rest, "demos": _without(splits.demos, taken), role: held}
    return replace(splits, **kept, notes=(*splits.notes, note))


def _without(problems: Problems, keys: Collection[str]) -> Problems:
    return tuple(problem for problem in problems if prompt_key(problem) not in keys)


def prompt_key(problem: Problem) -> str:
    """The prompt up to Unicode form, case and white space: what counts as the same task in two splits."""
    text = "\n".join(message["content"] for message in problem.messages if message["role"] != "system")
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _kept_apart(splits: Splits, policy: str) -> Splits:
    """No prompt of validation or test among the problems trained on, and none of test in validation."""
    for role, others in (("test", ("train", "demos", "validation")), ("validation", ("train", "demos"))):
        held = {prompt_key(problem): problem for problem in getattr(splits, role)}
        for other in others:
            clash = [problem for problem in getattr(splits, other) if prompt_key(problem) in held]
            if not clash:
                continue
            if policy == "error":
                twin = held[prompt_key(clash[0])]
                raise UserError(f"data.{other}: {clash[0].id!r} has the same prompt as {twin.id!r} of data.{role} "
                                f"({len(clash)} such in all); remove them, or set data.overlap = \"drop\" to leave "
                                f"them out of {other}")
            kept = _without(getattr(splits, other), held)
            if not kept:
                raise UserError(f"data.{other}: every prompt of it is also in data.{role}; give other problems")
            note = f"{len(clash)} problems of data.{other} left out: their prompts are also in data.{role}"
            splits = replace(splits, **{other: kept}, notes=(*splits.notes, note))
    return splits


def check_lengths(splits: Splits, chat: Chat, cfg: RunConfig) -> Splits:
    """Nothing is ever truncated: what is over a limit is an error or, where only trained on, dropped on request."""
    limits, notes = cfg.data, list(splits.notes)
    kept: dict[str, Problems] = {}
    for role in ("train", "demos", "validation", "test", "hard"):
        trained = role in {"train", "demos"}
        rows: list[Problem] = []
        dropped = 0
        for problem in getattr(splits, role):
            size = len(chat.prompt_ids(problem))
            if size <= limits.max_prompt_tokens:
                short = _short_demos(problem, chat, cfg) if trained else problem.demos
                dropped += len(problem.demos) - len(short)
                if short or role != "demos":
                    rows.append(replace(problem, demos=short))
            elif trained and limits.overlong == "drop":
                dropped += 1
            else:
                # Never a silently smaller test set.
                drop = ' or set data.overlong = "drop"' if trained else " or remove the row"
                raise UserError(f"data.{role}: the prompt of {problem.id!r} has {size} tokens, over "
                                f"data.max_prompt_tokens = {limits.max_prompt_tokens}; raise the limit{drop}")
        if dropped:
            notes.append(f"{dropped} overlong prompts or demonstrations of data.{role} dropped")
        if not rows and getattr(splits, role):
            raise UserError(f"data.{role}: nothing is left within the token limits; raise data.max_prompt_tokens or "
                            "data.max_demo_tokens")
        kept[role] = tuple(rows)
        notes += _beyond_positions(role, rows, chat, cfg)
    return Splits(**kept, notes=tuple(notes))


def _beyond_positions(role: str, problems: Sequence[Problem], chat: Chat, cfg: RunConfig) -> list[str]:
    """An error or a note, where a prompt and what is written behind it may be longer than the model has positions."""
    if chat.positions is None or not problems:
        return []
    trained = role in {"train", "demos"}
    limit, key = cfg.rollout.max_new_tokens, "rollout.max_new_tokens"
    if not trained and cfg.eval.max_new_tokens:
        limit, key = cfg.eval.max_new_tokens, "eval.max_new_tokens"
    elif trained and not catalogue.sampling_steps(cfg):
        limit = 0  # demonstrations alone
    if cfg.data.max_prompt_tokens + max(limit, cfg.data.max_demo_tokens if trained else 0) <= chat.positions.count:
        return []

    def most(problem: Problem) -> int:
        traces = [len(chat.demo_ids(problem, demo)[0]) for demo in problem.demos if trained]
        return max(len(chat.prompt_ids(problem)) + limit, *traces, 0)

    sizes = [most(problem) for problem in problems]
    size = max(sizes)
    if size <= chat.positions.count:
        return []
    longest = problems[sizes.index(size)]
    said = (f"data.{role}: {longest.id!r} may have {size} tokens (prompt and answer), and the model has "
            f"{chat.positions.count} positions")
    if not chat.positions.end:
        return [f"{said}: it was not trained to read further"]
    raise UserError(f"{said}; lower {key}, data.max_prompt_tokens or data.max_demo_tokens (data.overlong = \"drop\" "
                    "leaves longer rows out), or take a model with more positions")


def _short_demos(problem: Problem, chat: Chat, cfg: RunConfig) -> tuple[Demo, ...]:
    """The demonstrations within the limit (their end token counts), log-probabilities checked against their tokens."""
    short = []
    for number, demo in enumerate(problem.demos, 1):
        size = int(chat.demo_ids(problem, demo)[1].sum())
        if demo.logps is not None and len(demo.logps) not in {size - 1, size}:
            raise UserError(f"data: demonstration {number} of {problem.id!r} has {len(demo.logps)} log-probabilities "
                            f"for {size - 1} tokens (+ 1 with its end token); record them with this tokenizer")
        if size <= cfg.data.max_demo_tokens:
            short.append(demo)
        elif cfg.data.overlong == "error":
            raise UserError(f"data: demonstration {number} of {problem.id!r} has {size} tokens, over "
                            f"data.max_demo_tokens = {cfg.data.max_demo_tokens}; raise the limit or set "
                            'data.overlong = "drop"')
    return tuple(short)
