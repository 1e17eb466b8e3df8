"""`bridgelm check --data`: the data and the tokenizer are read as a run would read them, and no model is."""

from __future__ import annotations

from collections.abc import Sequence

from bridgelm.benchmarks import contamination
from bridgelm.benchmarks.suites import Items
from bridgelm.config import catalogue
from bridgelm.config.run_config import RunConfig
from bridgelm.data.chat import load_chat
from bridgelm.data.cursors import Data, check_lengths, load_splits, with_teacher
from bridgelm.data.splits import TOY
from bridgelm.errors import UserError
from bridgelm.rollout.teacher_ids import Reader


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
    if suites:
        given = [*splits.train, *splits.demos, *splits.validation]
        if config.data.test is None and not config.data.train.startswith(TOY):
            given += splits.test  # held out of the file that was given for training
        lines += ["benchmark items among the training problems, demonstrations and validation problems:",
                  contamination.report(contamination.overlaps(given, suites))]
    return "\n".join(lines)
