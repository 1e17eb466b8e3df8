"""The parser of all commands and the entry point `main`. Each command imports what it needs when it runs, so that
`check` and `show` are instant."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from bridgelm import __version__
from bridgelm.cli import demos, plan
from bridgelm.cli import evaluate as cli_eval
from bridgelm.errors import UserError

EXAMPLES = """examples:
  bridgelm train recipes/toy/bridge.toml seed=1
  bridgelm train --resume runs/bridge
  bridgelm compare recipes/toy/bridge.toml --methods bridge,grpo,cold_start --seeds 3
  bridgelm init my.toml
"""


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as any other mistake of the user: one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def _count(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def build_parser() -> argparse.ArgumentParser:
    about = "Train on demonstrations and verifiable rewards at once, and see which mix of the two your data needs."
    parser = Parser(prog="bridgelm", description=about, epilog=EXAMPLES,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"bridgelm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    _add_training(commands)
    _add_reading(commands)
    return parser


def _add_training(commands: Any) -> None:
    train = _command(commands, "train", run_train, "train as a TOML file says, or go on with an interrupted run")
    train.add_argument("file", nargs="?", type=Path, metavar="FILE", help="the run's TOML file")
    _takes_overrides(train)
    train.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run, exactly where it stopped")
    train.add_argument("--allow-change", action="append", default=[], metavar="KEY",
                       help="with --resume: go on although this is not what the run was made of (config, data, code, "
                       "reward, tokenizer, model or teacher); may be given several times")
    train.add_argument("--quiet", action="store_true", help="no progress display")

    compare = _command(commands, "compare", run_compare, "train what is missing of several methods, and compare them")
    compare.add_argument("file", type=Path, metavar="FILE", help="the TOML file that all methods share")
    _takes_overrides(compare)
    compare.add_argument("--methods", type=_names, required=True, metavar="A,B,...",
                         help="methods, or recipes that lie beside FILE; `all` for every method")
    compare.add_argument("--seeds", type=_count, default=3, metavar="N", help="seeds of each method (default 3)")
    compare.add_argument("--jobs", type=_count, metavar="N",
                         help="runs at the same time (default: one a core; 1 on a GPU)")
    compare.add_argument("--out", type=Path, metavar="DIR", help="where runs and report go (default runs/compare-NAME)")
    compare.add_argument("--quiet", action="store_true", help="no progress display and no table")
    compare.add_argument("--dry-run", action="store_true",
                         help="print what each arm is given (steps, rates, rollouts, demonstrations), and stop")

    evaluate = _command(commands, "eval", cli_eval.run, "measure runs or models on held-out problems or on benchmarks")
    cli_eval.takes(evaluate, _count, _names)

    about = "sample demonstrations from the teacher, or from the model itself, and keep the right ones"
    demos.takes(_command(commands, "demos", demos.run, about), _count)

    export = _command(commands, "export", run_export, "write a run's model as a plain Hugging Face folder")
    export.add_argument("run", type=Path, metavar="RUN")
    export.add_argument("out", type=Path, metavar="OUT")
    _takes_which(export)

    merge = _command(commands, "merge", run_merge, "average the weights of two runs or models into one model folder")
    merge.add_argument("one", metavar="RUN_OR_MODEL_A")
    merge.add_argument("other", metavar="RUN_OR_MODEL_B")
    merge.add_argument("out", type=Path, metavar="OUT")
    merge.add_argument("--weight", type=float, default=0.5, metavar="W", help="share of B (default .5)")
    _takes_which(merge)


def _add_reading(commands: Any) -> None:
    report = _command(commands, "report", run_report, "write one HTML page about one or more runs")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/report for one run, else ./report")
    report.add_argument("--share", action="store_true", help="write one JSON that others can compare with (--out FILE, "
                        "default share.json); of such files: print them as one table")
    report.add_argument("--base", metavar="METHOD", help="what the others are compared with (default: the first run's)")

    diagnose = _command(commands, "diagnose", run_diagnose, "what SFT and RL did to each other in one or more runs")
    diagnose.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    diagnose.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/diagnosis, or ./diagnosis for several")
    diagnose.add_argument("--measure", action="store_true", help="measure the saved models of runs without probes")

    check = _command(commands, "check", run_check, "find mistakes in a TOML file before any model is loaded")
    check.add_argument("file", type=Path, metavar="FILE")
    _takes_overrides(check)
    check.add_argument("--data", action="store_true", help="also read the data and the tokenizer")
    check.add_argument("--suite", type=_names, metavar="A,B,...",
                       help="with --data: look for items of these benchmarks among the training problems")
    check.add_argument("--suite-folder", type=Path, metavar="DIR", help="local copies of them (default: from the hub)")

    plan.takes(_command(commands, "plan", plan.run, "the memory and the time of a run on a GPU"), _count)

    from bridgelm.cli import grade

    grade.add_arguments(_command(commands, "grade", grade.run, "grade answers against gold answers"))
    _command(commands, "methods", run_methods, "list the methods")
    _command(commands, "suites", run_suites, "list the benchmarks")
    show = _command(commands, "show", run_show, "a method's equation, options, their sources, and its traps")
    show.add_argument("name", metavar="NAME")
    init = _command(commands, "init", run_init, "write a commented starter file for your own model and data")
    init.add_argument("path", nargs="?", type=Path, default=Path("bridgelm.toml"), metavar="PATH")


def _command(commands: Any, name: str, act: Callable[..., None], help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.set_defaults(act=act)
    return parser


def _takes_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a key, e.g. optim.lr=2e-6")


def _takes_which(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--which", choices=["final", "best"], default="final",
                        help="the last weights, or the best on validation (default final)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help()
        raise SystemExit(0)
    # argparse ends a list of positionals at the first option; overrides may stand behind options too.
    unknown = [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in args]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r} of {args.command}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def run_train(args: argparse.Namespace) -> None:
    if "RANK" in os.environ:
        from bridgelm import dist

        with dist.joined():
            return _train(args, dist.restarted())
    return _train(args)


def _train(args: argparse.Namespace, restarted: bool = False) -> None:
    from bridgelm.config.run_config import load_config
    from bridgelm.runs import preflight

    if args.resume is not None:
        if args.file is not None:
            raise UserError("train: --resume goes on with the run's own configuration; leave out FILE and key=value")
        if not (args.resume / "config.json").is_file():
            raise UserError(f"{args.resume}: not a run folder (no config.json in it)")
        from bridgelm.training import loop

        run = loop.resume(args.resume, quiet=args.quiet, allow_change=args.allow_change)
    else:
        if args.file is None:
            raise UserError("train: name a TOML file, or --resume RUN; `bridgelm init` writes a starter file")
        if args.allow_change:
            raise UserError("train: --allow-change goes with --resume RUN; a new run takes everything as it is")
        config = preflight.ready(load_config(args.file, args.overrides), restarted)
        from bridgelm.training import loop

        run = loop.train(config, quiet=args.quiet)
    if _first():
        for event in run.warnings:
            print(f"warning (step {event['step']}): {event['text']}")
        print(f"{run}\nnext: bridgelm report {run.path}   or   bridgelm export {run.path} OUT")


def run_compare(args: argparse.Namespace) -> None:
    import bridgelm

    page = bridgelm.compare(args.file, args.methods, args.seeds, args.jobs, args.out, overrides=args.overrides,
                            quiet=args.quiet, dry_run=args.dry_run)
    if page is not None:
        print(f"report: {page}")


def run_report(args: argparse.Namespace) -> None:
    import bridgelm

    if args.share:
        from bridgelm.reports import share

        if args.base is not None:
            raise UserError("report: --base and --share do not go together")
        print(share.act(args.runs, args.out))
        return
    print(f"report: {bridgelm.report(_run_folders(args.runs), args.out, base=args.base)}")


def _run_folders(paths: Sequence[Path]) -> list[Path]:
    """The run folders among the paths that the shell made of runs/*; a missing path is kept, for an error to name."""
    other = [path for path in paths if path.exists() and not (path / "config.json").is_file()]
    if other and len(other) < len(paths):
        print(f"skipped, as no run folder: {', '.join(map(str, other))}", file=sys.stderr)
        return [path for path in paths if path not in other]
    return list(paths)


def run_diagnose(args: argparse.Namespace) -> None:
    import bridgelm

    print(f"diagnosis: {bridgelm.diagnose(args.runs, args.out, measure=args.measure)}")


def run_export(args: argparse.Namespace) -> None:
    import bridgelm

    print(bridgelm.export(args.run, args.out, which=args.which))


def run_merge(args: argparse.Namespace) -> None:
    import bridgelm

    out = bridgelm.merge(args.one, args.other, args.out, weight=args.weight, which=args.which)
    print(f"{out}\nnext: bridgelm eval {out} --config FILE.toml")


def run_check(args: argparse.Namespace) -> None:
    from bridgelm.config.run_config import load_config, variant_names
    from bridgelm.config.variants import KEY
    from bridgelm.runs import preflight

    config = preflight.ready(load_config(args.file, args.overrides))
    others = {} if any(item.partition("=")[0] == KEY for item in args.overrides) else {
        name: load_config(args.file, [f"{KEY}={name}", *args.overrides]) for name in variant_names(args.file)}
    for other in others.values():
        preflight.check_static(other)
    print(f"{args.file}: nothing wrong found\n{preflight.summary(config)}"
          + (f"\n  {'variants':<9} {', '.join(others)}: nothing wrong either" if others else ""))
    if args.suite and not args.data:
        raise UserError("check: --suite needs --data")
    if args.data:
        from bridgelm.benchmarks import suites
        from bridgelm.cli.data import check_data

        chosen = suites.choose(args.suite or [])
        print(check_data(config, [suites.load(name, suite, args.suite_folder) for name, suite in chosen.items()]))


def run_methods(args: argparse.Namespace) -> None:
    from bridgelm.config import catalogue

    print(catalogue.overview())


def run_suites(args: argparse.Namespace) -> None:
    from bridgelm.benchmarks import suites

    print(suites.overview())


def run_show(args: argparse.Namespace) -> None:
    from bridgelm.config import catalogue

    print(catalogue.describe(args.name))


def run_init(args: argparse.Namespace) -> None:
    from bridgelm.config.run_config import starter

    if args.path.exists():
        raise UserError(f"{args.path}: exists already; name another file: bridgelm init PATH")
    try:
        args.path.write_text(starter(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{args.path}: cannot be written ({error.strerror})") from None
    print(f"wrote {args.path}\nnext: change the lines marked <--, then  bridgelm check {args.path} --data")


def _first() -> bool:
    """Whether this process speaks for all that torchrun started; they tell each other of errors."""
    return os.environ.get("RANK", "0") == "0"


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        args.act(args)
        sys.stdout.flush()
    except UserError as error:
        if _first():
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        # Training stops with a checkpoint and says where it lies; anything else has nothing to go on with.
        path = stop.args[0] if stop.args else None
        if _first():
            say = f"interrupted; go on with: bridgelm train --resume {path}" if path else "interrupted"
            print(say, file=sys.stderr)
        return 130
    except BrokenPipeError:  # `bridgelm methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
