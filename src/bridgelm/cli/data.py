"""`bridgelm check --data`: reads the data and the tokenizer as a run would, without loading a model."""

from __future__ import annotations

from collections.abc import Sequence

from bridgelm.benchmarks import contamination
from bridgelm.benchmarks.suites import Items
from bridgelm.config import catalogue
from bridgelm.config.run_config import RunConfig
from bridgelm.data.chat import load_chat
from bridgelm.data.cursors import Data, check_lengths, load_splits, with_teacher
from bridgelm.data.splits import TOY, Splits
from bridgelm.errors import UserError
from bridgelm.rollout.teacher_ids import Reader
from bridgelm.types import Problem, Verdict
from bridgelm.verify.base import build_grader
from bridgelm.verify.decision import Decision
from bridgelm.verify.exact import normalise
from bridgelm.verify.extract import hashes
from bridgelm.verify.math.grader import gold_answer

NAMED = 20  # rows whose gold is not accepted that are named


def check_data(config: RunConfig, suites: Sequence[Items] = ()) -> str:
    """What was found, in a few lines; with suites also which of their items are trained on."""
    chat = load_chat(config.model)
    splits = check_lengths(load_splits(config), chat, config)
    facts = with_teacher(Data(splits, config.seed).facts(), config)
    for need in sorted(catalogue.needs_of(config.method) - facts):
        raise UserError(f"method {config.method.name}: the data lacks {catalogue.remedy(need)}")
    if config.teacher is not None:
        Reader.of(config, chat)  # refuses a teacher of another tokenizer
    lines = []
    for role in ("train", "demos", "validation", "test", "hard"):
        problems = getattr(splits, role)
        if not problems:
            continue
        prompt = max(len(chat.prompt_ids(problem)) for problem in problems)
        traces = [int(chat.demo_ids(p, demo)[1].sum()) for p in problems for demo in p.demos]
        line = f"  {role:<11}{len(problems)} problems, prompts of at most {prompt} tokens"
        lines.append(line + (f", {len(traces)} demonstrations of at most {max(traces)}" if traces else ""))
    lines += [f"  note: {note}" for note in splits.notes]
    lines += check_golds(config, splits)
    if suites:
        given = [*splits.train, *splits.demos, *splits.validation]
        if config.data.test is None and not config.data.train.startswith(TOY):
            given += splits.test  # held out of the file that was given for training
        lines += ["benchmark items among the training problems, demonstrations and validation problems:",
                  contamination.report(contamination.overlaps(given, suites))]
    return "\n".join(lines)


def check_golds(config: RunConfig, splits: Splits) -> list[str]:
    """Every gold graded as an answer to itself: lines that name the rows whose gold is not accepted. Where a run would
    stop over so many errors, they are an error."""
    if config.reward.verifier not in {"math", "exact"}:
        return []  # patterns need not match themselves, and puzzles have many answers
    judge, lines = build_grader(config.reward), []
    assert judge is not None
    try:
        for role in ("train", "validation", "test"):
            problems = getattr(splits, role)
            decisions = judge.judged(problems, [_answered(config, problem.answer or "") for problem in problems])
            bad = [(p, d) for p, d in zip(problems, decisions, strict=True) if d.verdict is not Verdict.CORRECT]
            rows = [f"    {_row(problem, decision)}" for problem, decision in bad[:NAMED]]
            if len(bad) > config.reward.max_error_rate * len(problems):
                raise UserError(f"data.{role}: the verifier does not accept the gold answer itself of {len(bad)} of "
                                f"{len(problems)} rows: {'; '.join(row.strip() for row in rows[:5])}; write the answer "
                                "alone, or behind #### in the last line, or name its column as data.fields.answer")
            if bad:
                more = [f"    and {len(bad) - NAMED} more"] if len(bad) > NAMED else []
                lines += [f"  golds of {role} that the verifier does not accept for themselves:", *rows, *more]
    finally:
        judge.close()
    return lines


def _answered(config: RunConfig, gold: str) -> str:
    """The gold as an answer, where the verifier looks first."""
    gold = gold_answer(gold) if config.reward.verifier == "math" else normalise(hashes(gold) or gold)
    forms = {"tags": "<answer>{}</answer>", "boxed": "\\boxed{{{}}}", "hashes": "#### {}", "phrase": "The answer is {}"}
    first = config.reward.extract[0] if config.reward.verifier == "math" else "tags"
    return forms.get(first, "{}").format(gold)


def _row(problem: Problem, decision: Decision) -> str:
    gold = " ".join((problem.answer or "").split())
    gold = gold if len(gold) <= 60 else gold[:57] + "..."
    return f"{problem.place or problem.id}: {gold!r}: {decision.verdict.value}, {decision.rule}"
