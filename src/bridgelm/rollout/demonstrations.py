"""`bridgelm demos`: samples demonstrations from a teacher, or from the model itself, and keeps the correct ones.

The log-probs that are written belong to the tokens that the text will have when it is read: if it is tokenized
differently from what was drawn, it is scored again. Unfinished work lies beside the output, one line per problem; a
command that was stopped continues from it and ends with the same file.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridgelm.config.run_config import ModelConfig, RunConfig
from bridgelm.data.chat import Chat, load_chat
from bridgelm.data.cursors import check_lengths, load_splits
from bridgelm.engine import NativeEngine, Origin, Request, Sampling
from bridgelm.errors import UserError
from bridgelm.model.loading import load_model
from bridgelm.rollout.roller import AnswerGrader, check_errors
from bridgelm.rollout.teacher import Teacher
from bridgelm.rollout.teacher_ids import Reader, teacher_model
from bridgelm.runs.folder import clean, read_lines
from bridgelm.types import Completion, Demo, Grade, Problem, Row, Verdict
from bridgelm.verify import build_verifier

SALT = 15_485_863  # keeps these draws apart from those of rollouts and evaluation


@dataclass(frozen=True)
class DemoOptions:
    """What to sample and what to keep of it."""

    samples: int = 4  # per problem
    temperature: float = 1.0
    max_new_tokens: int | None = None  # default: rollout.max_new_tokens
    keep: int | None = None  # the most correct samples of a problem to keep: the first ones drawn
    problems: int | None = None  # use only so many problems, the first of the train split
    paired: bool = False  # write all problems, with the demonstrations that they had before
    keep_wrong: bool = False  # write wrong samples too, to a file of their own
    text_only: bool = False  # write no log-probs, for a teacher with another tokenizer
    own: bool = False  # sample from [model] even if there is a [teacher]


@dataclass(frozen=True)
class Author:
    """The model that is sampled, and the tokenizer of the model to be trained, which will read the samples."""

    model: Any
    chat: Chat
    reader: Chat
    teacher: Teacher | None  # scores samples that are tokenized differently when read; None without log-probs
    name: str


def write_demos(config: RunConfig, out: str | Path, options: DemoOptions | None = None, *, force: bool = False,
                say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Samples, grades and writes the demonstrations, and returns the counts."""
    options, out = options or DemoOptions(), Path(out)
    draft = _opened(config, out, options, force)
    chat = load_chat(config.model)
    splits = check_lengths(load_splits(config), chat, config)
    problems = splits.train[:options.problems]
    size = max(1, config.rollout.max_rows // options.samples)  # problems decoded at once
    done = read_lines(draft)[1:]
    done = done[:len(done) // size * size] if len(done) < len(problems) else done
    _rewrite(draft, done, options, config)
    if len(done) < len(problems):
        author = _author(config, chat, options)
        with build_verifier(config.reward) as grader, draft.open("a", encoding="utf-8") as file:
            for start in range(len(done), len(problems), size):
                found = _some(author, grader, problems[start:start + size], start, config, options)
                file.write("".join(json.dumps(clean(line), ensure_ascii=False) + "\n" for line in found))
                file.flush()
                done += found
                say(f"{len(done)} of {len(problems)} problems, {sum(line['counts']['kept'] for line in done)} kept")
    rows = [line["row"] for line in done if line["row"] is not None]
    if not any(line["counts"]["kept"] for line in done) and not options.paired:
        draft.unlink()
        right, cut = (sum(line["counts"].get(key, 0) for line in done) for key in ("correct", "cut"))
        raise UserError(f"demos: nothing to keep: {len(problems)} problems x {options.samples} samples gave {right} "
                        f"right answers, {cut} of them cut off at the limit of new tokens; raise --samples or "
                        "--max-new-tokens, or take another teacher")
    if options.keep_wrong:
        _write(wrong_file(out), [line["wrong"] for line in done if line["wrong"] is not None])
    _write(out, rows)
    draft.unlink()
    return _totals(done)


def wrong_file(out: Path) -> Path:
    return out.with_suffix(".wrong.jsonl")


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text("".join(json.dumps(clean(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    fresh.replace(path)


def _opened(config: RunConfig, out: Path, options: DemoOptions, force: bool) -> Path:
    """The file of unfinished work. An existing output, or work with other settings, is not overwritten."""
    draft = out.with_name(f".{out.name}.part")
    for path in (out, *([wrong_file(out)] if options.keep_wrong else [])):
        if path.exists() and not force:
            raise UserError(f"{path}: exists; name another file with --out, or overwrite it with --force")
    if out.suffix != ".jsonl":
        raise UserError(f"{out}: demonstrations are written as JSON lines; name a file that ends in .jsonl")
    if not out.parent.is_dir():
        raise UserError(f"{out}: the folder {out.parent} does not exist; make it first")
    begun = read_lines(draft)[:1]
    if begun and begun[0] != clean(_header(options, config)) and not force:
        raise UserError(f"{draft}: holds a part made with other settings; repeat that command to finish it, or start "
                        "again with --force")
    if begun and force:
        draft.unlink()
    return draft


def _header(options: DemoOptions, config: RunConfig) -> dict[str, Any]:
    settings = config.resolved()
    kept = ("seed", "model", "teacher", "data", "reward")
    return {"wanted": asdict(options), **{key: settings[key] for key in kept}, "rows": config.rollout.max_rows,
            "limit": config.rollout.max_new_tokens, "stop": config.rollout.stop}


def _rewrite(draft: Path, done: Sequence[dict[str, Any]], options: DemoOptions, config: RunConfig) -> None:
    """Writes the header and the complete lines only; what a killed command left incomplete is drawn again."""
    _write(draft, [_header(options, config), *done])


def _author(config: RunConfig, reader: Chat, options: DemoOptions) -> Author:
    by_teacher = config.teacher is not None and not options.own
    named: ModelConfig = teacher_model(config) if by_teacher else config.model
    chat = load_chat(named) if by_teacher else reader
    teacher = None if options.text_only else Teacher(named, Reader(reader, chat), config.batch.micro_tokens)
    model = load_model(named) if teacher is None else teacher.model
    return Author(model, chat, reader, teacher, named.name_or_path)


def _some(author: Author, grader: AnswerGrader, problems: Sequence[Problem], start: int, config: RunConfig,
          options: DemoOptions) -> list[dict[str, Any]]:
    """Samples some problems. The line of each holds the row to be written, if any, and counts."""
    repeated = [problem for problem in problems for _ in range(options.samples)]
    engine = NativeEngine(author.chat.eos_ids, author.chat.pad_id, author.chat.text, config.rollout.max_rows)
    limit = options.max_new_tokens or config.rollout.max_new_tokens
    requests = [Request(author.chat.prompt_ids(problem), (config.seed, SALT, start * options.samples + i))
                for i, problem in enumerate(repeated)]
    sampling = Sampling(limit, options.temperature, tuple(config.rollout.stop))
    drawn = engine.generate(Origin(author.model), requests, sampling)
    grades = grader.grade(repeated, [author.chat.turn(completion.ids) for completion in drawn])
    failed = sum(grade.verdict is Verdict.ERROR for grade in grades)
    check_errors(failed, len(grades), config, "demonstrations", grader)
    out = []
    for i, problem in enumerate(problems):
        part = slice(i * options.samples, (i + 1) * options.samples)
        out.append(_line(author, problem, drawn[part], grades[part], config, options))
    return out


def _line(author: Author, problem: Problem, drawn: Sequence[Completion], grades: Sequence[Grade], config: RunConfig,
          options: DemoOptions) -> dict[str, Any]:
    counts: Counter[str] = Counter(problems=1, samples=len(drawn), tokens=sum(len(c.ids) for c in drawn))
    seen = {demo.text.strip() for demo in problem.demos}
    kept: dict[Verdict, list[dict[str, Any]]] = {Verdict.CORRECT: [], Verdict.WRONG: []}
    for completion, grade in zip(drawn, grades, strict=True):
        counts[grade.verdict.value] += 1
        text = author.chat.turn(completion.ids)
        _, own = author.reader.demo_ids(problem, Demo(text))
        fault = ("cut" if not completion.finished else "empty" if not text.strip() else
                 "overlong" if own.sum() > config.data.max_demo_tokens else
                 "duplicates" if text.strip() in seen else None)
        if grade.verdict not in kept or (grade.verdict is Verdict.WRONG and not options.keep_wrong):
            continue
        if fault is None and grade.verdict is Verdict.CORRECT and len(kept[grade.verdict]) == options.keep:
            fault = "more"
        if fault is not None:
            counts[fault] += grade.verdict is Verdict.CORRECT
            continue
        seen.add(text.strip())
        logps, again = read_logps(author, problem, text, completion, options)
        kept[grade.verdict].append({"text": text} | ({} if logps is None else {"logps": logps}))
        counts["again"] += again
        counts["kept_tokens"] += int(own.sum()) if grade.verdict is Verdict.CORRECT else 0
    right, judged = counts["correct"], counts["correct"] + counts["wrong"]
    counts["kept"], counts["solved"] = len(kept[Verdict.CORRECT]), int(right > 0)
    about = {"author": author.name, "solve_rate": right / judged if judged else None}
    row = to_row(problem, kept[Verdict.CORRECT], config.data.fields, options.paired, about)
    wrong = to_row(problem, kept[Verdict.WRONG], config.data.fields, False, about)
    return {"row": row if options.paired or kept[Verdict.CORRECT] else None,
            "wrong": wrong if kept[Verdict.WRONG] else None, "counts": dict(counts)}


def read_logps(author: Author, problem: Problem, text: str, drawn: Completion,
               options: DemoOptions) -> tuple[list[float] | None, bool]:
    """Log-probs, at the sampling temperature, of the tokens that the text has when it is read, and whether they had to
    be scored again. The end token has one if the author drew the same end token."""
    if author.teacher is None:
        return None, False
    ids, own = author.reader.demo_ids(problem, Demo(text))
    written, logps = ids[own], drawn.logps if options.temperature > 0 else drawn.raw_logps
    # Equal, or it ended at a stop string.
    if np.array_equal(drawn.ids, written) or np.array_equal(drawn.ids, written[:-1]):
        return _numbers(logps), False
    if np.array_equal(drawn.ids[:-1], written[:-1]):  # equal but for the end token
        return _numbers(logps[:-1]), False
    found = author.teacher.score([Row(ids, own, "demo", problem, temperature=options.temperature or 1.0)])[0][own]
    found = found[:-1] if np.isnan(found[-1]) else found
    return (None if np.isnan(found).any() else _numbers(found)), True


def _numbers(logps: np.ndarray) -> list[float]:
    return [min(float(x), 0.0) for x in logps]


def to_row(problem: Problem, demos: Sequence[dict[str, Any]], fields: dict[str, str], paired: bool,
           about: dict[str, Any]) -> dict[str, Any]:
    """A row that `data/schema.py` reads back as this problem with these demonstrations, under the same
    `data.fields`."""
    named = next((name for name in ("prompt", "messages") if name in fields), None)
    prompt = named or ("messages" if problem.conversational else "prompt")
    before = [{"text": demo.text} | ({} if demo.logps is None else {"logps": list(demo.logps)})
              for demo in problem.demos] if paired else []
    own = {"id": problem.id, prompt: list(problem.messages) if problem.conversational else problem.prompt,
           "answer": problem.answer, "demos": [*before, *demos], "difficulty": problem.difficulty}
    row = {fields.get(name, name): value for name, value in own.items() if value is not None}
    rest = {name: value for name, value in problem.columns.items() if name not in row and name != "completion"}
    return {**rest, **about, **row}


def _totals(done: Sequence[dict[str, Any]]) -> dict[str, Any]:
    total: Counter[str] = Counter()
    for line in done:
        total.update(line["counts"])
    return dict(total)


def summary(counts: dict[str, Any], out: Path) -> str:
    """The counts in a few lines of text."""
    of = Counter(counts)
    judged = of["correct"] + of["wrong"]
    share = f"{of['correct'] / judged:.1%}" if judged else "none"
    solved = of["solved"] / max(1, of["problems"])
    lines = [f"problems   {of['problems']}, {of['solved']} of them solved ({solved:.1%})",
             f"samples    {of['samples']} of {of['tokens']} tokens, {share} of the graded are right; the verifier "
             f"failed on {of['error']}",
             f"kept       {of['kept']} demonstrations of {of['kept_tokens']} tokens"]
    left = [f"{of[key]} {words}" for key, words in (
        ("duplicates", "duplicates"), ("cut", "cut at the limit"), ("more", "over --keep"), ("empty", "empty"),
        ("overlong", "over data.max_demo_tokens")) if of[key]]
    lines += [f"left out   of the right ones {', '.join(left)}"] if left else []
    lines += [f"scored     {of['again']} again, as their text reads back as other tokens"] if of["again"] else []
    return "\n".join([*lines, f"written    {out}"])
