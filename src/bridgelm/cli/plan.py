"""`bridgelm plan`: estimates the memory and time that a run needs on a card, without having the card."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridgelm.config.run_config import RunConfig
from bridgelm.errors import UserError

# Tried in this order, each on top of those before, until the run fits.
CHANGES = (("shard", "true"), ("model.gradient_checkpointing", "true"), ("rollout.max_rows", "128"),
           ("batch.micro_tokens", "8192"), ("rollout.max_rows", "32"), ("batch.micro_tokens", "4096"),
           ("model.offload_activations", "true"),
           ("optim.host", '["shadow","gradients"]'), ("optim.kind", "adamw8bit"),
           ("optim.host", '["shadow","gradients","moments"]'),
           ("optim.host", '["shadow","gradients","moments","masters"]'), ("model.lora_rank", "32"))


def takes(parser: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a key, e.g. rollout.max_rows=64")
    parser.add_argument("--gpu", default="h100", metavar="CARD",
                        help="rtx4090, l40s, a100-40, a100-80, h100 (default), h200, b200")
    parser.add_argument("--gpus", type=count, default=1, metavar="N", help="how many of them (default 1)")
    parser.add_argument("--length", type=float, default=0.33, metavar="X",
                        help="mean length of an answer as a share of the longest (default .33)")


def run(args: argparse.Namespace) -> None:
    from bridgelm.config.run_config import load_config
    from bridgelm.planning import durations as times
    from bridgelm.runs import preflight

    if args.gpu not in times.CARDS:
        raise UserError(f"plan: no card {args.gpu!r}; choose from {', '.join(times.CARDS)}")
    if not 0 < args.length <= 1:
        raise UserError("plan: --length lies above 0 and up to 1")
    config = load_config(args.file, args.overrides)
    preflight.check_static(config, reads=False)
    print(page(config, args.file, args.overrides, args.gpu, args.gpus, args.length))


def page(config: RunConfig, file: Path, overrides: list[str], gpu: str, gpus: int, length: float) -> str:
    from bridgelm.planning import durations as times
    from bridgelm.planning import needs

    need, card = needs.memory(config, gpus), times.CARDS[gpu]
    step, room = times.seconds(config, need, card, gpus, length), card.memory - times.RESERVE
    lines = [f"{file}: {config.method.name} on {config.model.name_or_path}, {need.parameters / 1e9:.2f} billion"
             " weights",
             f"  {'memory of each GPU':<38}{'GB':>8}"]
    lines += [f"    {name.partition('/')[2]:<36}{size / 1e9:8.2f}   {name.partition('/')[0]}"
              for name, size in need.parts.items() if size]
    lines += [f"  {'peak while training':<38}{times.WASTE * need.train / 1e9:8.2f}",
              f"  {'peak while generating':<38}{times.WASTE * need.generate / 1e9:8.2f}",
              f"  {f'there is, on one {gpu}':<38}{room / 1e9:8.2f}"]
    fits = times.WASTE * need.peak <= room
    lines.append("  it fits" if fits else _advice(file, overrides, room, gpus))
    lines += [f"  a step: about {_spell(step.generate)} of generating, {_spell(step.train)} of training"
              + (f", on {gpus} GPUs" if gpus > 1 else ""),
              f"  the run: about {_spell((step.generate + step.train) * config.steps)} for {config.steps} steps",
              f"  times are extrapolated from the card's data sheet ({times.TRAINING:.0%} of its arithmetic, "
              f"{times.BANDWIDTH:.0%} of its bandwidth, answers of {length:.0%} of the longest); no GPU was measured"]
    if gpus > 1:
        lines.append("  what the GPUs send each other is not in them" + (
            "" if config.shard else "; each holds everything: `shard = true` divides it"))
    return "\n".join(lines)


def _advice(file: Path, overrides: list[str], room: float, gpus: int) -> str:
    from bridgelm.config.run_config import load_config
    from bridgelm.planning import durations as times
    from bridgelm.planning import needs

    tried: dict[str, str] = {}
    for key, value in CHANGES:
        now = load_config(file, [*overrides, *_spelled(tried)])
        if not _smaller(now, key, value) or (key == "shard" and gpus == 1):
            continue
        wanted = tried | {key: value}
        try:
            need = needs.memory(load_config(file, [*overrides, *_spelled(wanted)]), gpus)
        except UserError:  # a method that cannot do with it
            continue
        tried = wanted
        if times.WASTE * need.peak <= room:
            return (f"  IT DOES NOT FIT. It would, at {times.WASTE * need.peak / 1e9:.1f} GB, with\n    "
                    f"bridgelm plan {file} {shlex.join([*overrides, *_spelled(tried)])}"
                    + (f" --gpus {gpus}" if gpus > 1 else ""))
    return "  IT DOES NOT FIT, and nothing that was tried makes it: take a larger card or a smaller model"


def _spelled(changes: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in changes.items()]


def _smaller(config: RunConfig, key: str, value: str) -> bool:
    """Whether a change asks for less than what is set already."""
    section, _, name = key.rpartition(".")
    now: Any = getattr(getattr(config, section) if section else config, name)
    if name == "host":
        return len(now) < value.count(",") + 1
    if name == "kind":
        return now == "adamw"
    return not now if value == "true" or name == "lora_rank" else now > int(value)


def _spell(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
