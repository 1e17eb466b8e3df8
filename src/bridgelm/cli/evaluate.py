"""`bridgelm eval`: evaluates a run or a model on its own held-out problems, or on benchmarks."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridgelm.errors import UserError

OF_SUITES = ("prompt", "temperature", "max_new_tokens", "limit", "suite_folder", "suites", "label_fixes", "out",
             "dtype", "force")
OF_SPLITS = ("config", "split")


def takes(parser: argparse.ArgumentParser, count: Callable[[str], int], names: Callable[[str], list[str]]) -> None:
    parser.add_argument("models", nargs="+", metavar="RUN_OR_MODEL",
                        help="a run folder, or a Hugging Face folder or hub name; several are compared on suites")
    parser.add_argument("--samples", type=count, metavar="K", help="also avg@k and pass@k from K samples")
    parser.add_argument("--which", choices=["final", "best"], default="final",
                        help="a run's last weights, or the best on validation (default final)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples (default 0)")
    own = parser.add_argument_group("on the problems of a run or of a TOML file")
    own.add_argument("--config", type=Path, metavar="FILE", help="data and reward, for a model that is no run")
    own.add_argument("--split", choices=["test", "validation", "train", "hard"], help="default test")
    bench = parser.add_argument_group("on benchmarks")
    bench.add_argument("--suite", type=names, metavar="A,B,...", help="e.g. math500,aime24, or paper, or toy:hops")
    bench.add_argument("--suite-folder", type=Path, metavar="DIR", help="local copies (default: from the hub)")
    bench.add_argument("--suites", type=Path, metavar="FILE.toml", help="records of further suites")
    bench.add_argument("--prompt", metavar="NAME|FILE.toml",
                       help="bare, boxed, simplerl, few-shot, or your own (default: as the suite says)")
    bench.add_argument("--temperature", type=float, metavar="T", help="of the samples")
    bench.add_argument("--max-new-tokens", type=count, metavar="N", help="an answer's limit")
    bench.add_argument("--limit", type=count, metavar="N", help="only the first N items; the result says so")
    bench.add_argument("--rows", type=count, default=128, metavar="N", help="answers decoded at once (default 128)")
    bench.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the run's, or what the device likes")
    bench.add_argument("--label-fixes", type=Path, metavar="FILE", help="JSON lines of id and answer_corrected")
    bench.add_argument("--out", type=Path, metavar="DIR",
                       help="default RUN/eval for one run, else ./eval; an interrupted evaluation goes on there")
    bench.add_argument("--force", action="store_true", help="throw away answers that lie there")


def run(args: argparse.Namespace) -> None:
    if args.suite is None:
        for name in OF_SUITES:
            if getattr(args, name):
                raise UserError(f"eval: --{name.replace('_', '-')} needs --suite")
        if len(args.models) > 1:
            raise UserError("eval: several models are compared on benchmarks; give --suite")
        _on_splits(args)
        return
    for name in OF_SPLITS:
        if getattr(args, name):
            raise UserError(f"eval: --{name} and --suite do not go together")
    if args.temperature is not None and not 0 < args.temperature < math.inf:
        raise UserError("eval: --temperature is above 0; the greedy answer is always taken besides")
    print(_on_suites(args), end="")


def _on_splits(args: argparse.Namespace) -> None:
    import bridgelm

    model = args.models[0]
    if args.config is not None and (Path(model) / "run.json").is_file():
        raise UserError(f"eval: the run {model} has data and reward of its own; leave out --config")
    result = bridgelm.evaluate(model, config=args.config, split=args.split or "test", samples=args.samples or 0,
                               which=args.which)
    print(format_result(result))


def _on_suites(args: argparse.Namespace) -> str:
    from bridgelm.benchmarks import suites

    suites.choose(args.suite, args.suites)  # a wrong name is told before torch is loaded
    from bridgelm.benchmarks import run as benchmarks

    options = benchmarks.BenchmarkOptions(args.prompt, args.samples, args.temperature, args.max_new_tokens, args.seed,
                                          args.limit, args.rows, args.dtype, args.which)
    page = benchmarks.run(args.models, args.suite, args.out, options, folder=args.suite_folder, extra=args.suites,
                         fixes=args.label_fixes, force=args.force, say=_say())
    return page.read_text(encoding="utf-8").partition("\n## How it was asked")[0] + f"\nresults: {page}\n"


def _say() -> Callable[[str], None]:
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def format_result(result: dict[str, Any]) -> str:
    """Figures of one evaluation, a line each."""
    low, high = result["interval"]
    lines = [f"accuracy   {result['accuracy']:.3f}  (95 % interval {low:.3f} to {high:.3f}, {result['n']} problems)"]
    if "hard" in result:
        lines.append(f"hard       {result['hard']['accuracy']:.3f}  ({result['hard']['n']} problems)")
    if result.get("avg_k") is not None:
        lines.append(f"avg@{result['k']:<6} {result['avg_k']:.3f}")
    lines += [f"pass@{k:<5} {value:.3f}" for k, value in (result.get("pass_k") or {}).items()]
    lines += [f"difficulty {key:<5} {accuracy:.3f}  ({n})" for key, (accuracy, n) in result["by_difficulty"].items()]
    lines.append(f"length     {result['length']:.1f} tokens, {result['truncated']:.1%} cut at the limit")
    return "\n".join(lines)
