"""`bridgelm demos`: the options of the command and the call that runs it."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

from bridgelm.errors import UserError

NAMES = ("samples", "temperature", "max_new_tokens", "keep", "problems", "paired", "keep_wrong", "text_only", "own")


def takes(demos: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """The arguments of the command."""
    demos.add_argument("file", type=Path, metavar="FILE", help="the run's TOML file: its problems, verifier and models")
    demos.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. teacher.name_or_path=toy:teacher")
    demos.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="where the demonstrations go")
    demos.add_argument("--samples", type=count, default=4, metavar="K", help="answers to each problem (default 4)")
    demos.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy (default 1)")
    demos.add_argument("--max-new-tokens", type=count, metavar="N", help="default: rollout.max_new_tokens")
    demos.add_argument("--keep", type=count, metavar="N", help="at most so many right answers a problem (default all)")
    demos.add_argument("--problems", type=count, metavar="N", help="only the first N of the train split (default all)")
    demos.add_argument("--paired", action="store_true",
                       help="write all problems, with the demonstrations they have already: a file for data.train")
    demos.add_argument("--keep-wrong", action="store_true", help="wrong answers too, in FILE.wrong.jsonl, to look at")
    demos.add_argument("--text-only", action="store_true", help="no log-probs: for a teacher of another tokenizer")
    demos.add_argument("--own", action="store_true", help="sample [model], though there is a [teacher]")
    demos.add_argument("--force", action="store_true", help="overwrite FILE.jsonl")


def run(args: argparse.Namespace) -> None:
    from bridgelm.config.run_config import load_config
    from bridgelm.runs import preflight

    if not 0 <= args.temperature < math.inf:
        raise UserError(f"demos: --temperature {args.temperature:g} is no temperature; 0 is greedy, 1 the model's own")
    config = preflight.to_sample(load_config(args.file, args.overrides))
    from bridgelm.rollout import demonstrations

    options = demonstrations.DemoOptions(**{name: getattr(args, name) for name in NAMES})
    counts = demonstrations.write_demos(config, args.out, options, force=args.force,
                                        say=lambda text: print(text, file=sys.stderr))
    print(demonstrations.summary(counts, args.out))
