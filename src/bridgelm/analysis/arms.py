"""Decides and shows what each arm of a comparison gets: steps, learning rate, rollouts, demonstrations and FLOPs.

A method that is named without a recipe takes over the file's rates by purpose: one that only imitates has the rate and
the steps of the file's imitation, any other the rate of the file's exploration and as many rollouts. A method that
moves the same weights by both with one rate has that of exploration: the larger rates of imitation are known to spoil
RL, and a comparison that hands them out decides itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from bridgelm.config import catalogue
from bridgelm.config.options import COLD_START, LowRank, SequenceOptions, Stage, parts, samples
from bridgelm.config.options.core import GrpoOptions, SftOptions
from bridgelm.config.run_config import RunConfig, make_config, stage_steps

BOOKKEEPING = {"name", "out", "seed", "threads", "log", "checkpoint_every", "diagnose"}  # what moves no weight
SHOWN = {"steps", "method", "optim.lr", "optim.schedule", "optim.warmup"}  # by what they are for, or on purpose
NONE = "–"


class Part(NamedTuple):
    """A plain method of a run, with its steps and the stage that sets its rate; a run without stages is one stage."""

    options: Any
    steps: int
    stage: Stage | None

    @property
    def explores(self) -> bool:
        return samples(self.options) and catalogue.form(self.options.name)["rollout"] != "0"

    @property
    def imitates(self) -> bool:
        """Whether the weights that are kept imitate; a w that is taken away in the end does not count."""
        return self.draws and not catalogue.form(self.options.name)["demo"].startswith("0")

    @property
    def draws(self) -> bool:
        return any("demos" in need for need in catalogue.needs(self.options.name))


def run_parts(config: RunConfig) -> list[Part]:
    method = config.method
    if not isinstance(method, SequenceOptions):
        return [Part(parts(method)[0], config.steps, None)]
    return [Part(parts(stage.method)[0], steps, stage)
            for stage, steps in zip(method.stages, stage_steps(method, config.steps), strict=True)]


def pace(config: RunConfig, part: Part, steps: int) -> dict[str, Any]:
    """Keys of [optim] that give `steps` steps the rate of a part."""
    stage, optim = part.stage, config.optim
    warmup = None if stage is None else stage.warmup
    return {"lr": (stage and stage.lr) or optim.lr, "schedule": (stage and stage.schedule) or optim.schedule,
            "warmup": optim.warmup if warmup is None else round(warmup * steps)}


def rival(own: RunConfig, name: str, where: str) -> tuple[RunConfig, str | None]:
    """`own` with another method, `cold_start` among them; and what its rate is where the file has none for it."""
    found = run_parts(own)
    imitation = next((part for part in found if part.imitates and not part.explores), None)
    exploration = next((part for part in found if part.explores), None)
    sampling = catalogue.sampling_steps(own) or own.steps  # as many rollouts as the file makes
    raw = own.resolved()
    if name == "cold_start":
        return _cold_start(own, imitation, exploration, sampling, where), None
    options = parts(make_config({**raw, "method": {"name": name}, "steps": own.steps}, where).method)[0]
    part = Part(options, own.steps, None)
    only_imitates = part.imitates and not part.explores
    steps = (imitation.steps if imitation else own.steps) if only_imitates else sampling
    source = imitation if only_imitates else exploration
    optim = {**raw["optim"], **(pace(own, source, steps) if source else {})}
    method: dict[str, Any] = {"name": name}
    known = options.model_dump(by_alias=True)
    apart = next((rate for one in found if (rate := getattr(one.options, "sft_lr", None))), None)
    apart = apart or (pace(own, imitation, steps)["lr"] if imitation else None)
    if apart and "sft_lr" in known and known.get("optimisers", "two") == "two":
        method["sft_lr"] = apart
    beta = next((one.options.beta for one in found if isinstance(one.options, LowRank)), None)
    if beta and isinstance(options, LowRank):
        method["beta"] = beta
    if only_imitates and apart:
        optim["lr"] = apart
    made = make_config({**raw, "method": method, "steps": steps, "optim": optim}, where)
    wanted, has = ("imitation", imitation or apart) if only_imitates else ("exploration", exploration)
    mixed = any(one.imitates and one.explores for one in found)
    return made, None if has or mixed else (f"{name}: the file has no rate for {wanted}, so it is that of [optim], "
                                            f"{made.optim.lr:g}")


def _cold_start(own: RunConfig, imitation: Part | None, exploration: Part | None, sampling: int,
                where: str) -> RunConfig:
    """Cold start takes the stages of the file where it has them; else half of the steps are SFT, at the rate of its
    paper."""
    first = COLD_START[0]
    if imitation is not None:
        first = imitation.stage or Stage(method=SftOptions(), lr=own.optim.lr)
    second = (exploration and exploration.stage) or COLD_START[1]
    steps = imitation.steps if imitation else sampling
    stages = [first.model_copy(update={"method": SftOptions(), "steps": steps}),
              second.model_copy(update={"method": GrpoOptions(), "steps": None})]
    method = {"name": "sequence", "stages": [stage.model_dump(mode="json", by_alias=True) for stage in stages]}
    return make_config({**own.resolved(), "method": method, "steps": steps + sampling}, where)


@dataclass(frozen=True)
class Arm:
    """What one arm is given, as text where it is only shown. Rollouts and demonstrations are what the configuration
    asks for: a method that chooses between them as it goes may take fewer."""

    steps: str
    imitation: str
    exploration: str
    w: str
    rollouts: int
    demos: int
    work: float  # FLOPs of a weight, at half of the longest prompts and demonstrations and the longest answers


def arm(config: RunConfig) -> Arm:
    found, rollout, data = run_parts(config), config.rollout, config.data
    imitation, exploration, w = list[str](), list[str](), list[str]()
    rollouts = demos = 0
    work = 0.0
    for part in found:
        own, options = pace(config, part, part.steps), part.options
        both = part.imitates and part.explores
        if part.imitates:
            apart = getattr(options, "sft_lr", None)
            imitation.append(_rate({**own, "lr": apart}) if apart else _rate(own) + " (RL's)" * both)
        if part.explores:
            exploration.append(_rate(own))
        if hasattr(options, "rank") and hasattr(options, "beta"):
            w.append(_rate({**own, "lr": options.beta or own["lr"]}))
        answers = part.steps * rollout.prompts * rollout.group if samples(options) else 0
        shown = part.steps * config.batch.demos * rollout.updates if part.draws else 0
        rollouts, demos = rollouts + answers, demos + shown
        passes = 1 + options.other_passes
        reference = 2 * (getattr(getattr(options, "rl", None), "kl_coef", 0) > 0)
        prompt, answer = data.max_prompt_tokens / 2, rollout.max_new_tokens
        work += answers * (2 * answer + (prompt + answer) * (6 * passes + reference))
        work += shown * 6 * (prompt + data.max_demo_tokens / 2)
    steps = " + ".join(str(part.steps) for part in found)
    one, other, third = (" then ".join(dict.fromkeys(rates)) or NONE for rates in (imitation, exploration, w))
    return Arm(steps, one, other, third, rollouts, demos, work)


def _rate(own: Mapping[str, Any]) -> str:
    warmup = f", warm-up {own['warmup']}" if own["warmup"] else ""
    return f"{own['lr']:g}" + (f" {own['schedule']}" if own["schedule"] != "constant" else "") + warmup


def table(configs: Mapping[str, RunConfig]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, the base first."""
    arms = {label: arm(config) for label, config in configs.items()}
    base = next(iter(arms.values())).work
    rows = [[label, one.steps, one.imitation, one.exploration, one.w, f"{one.rollouts:,}", f"{one.demos:,}",
             f"{one.work / base:.2f}×" if base else NONE] for label, one in arms.items()]
    return ["arm", "steps", "lr imitation", "lr exploration", "lr w", "rollouts", "demos", "FLOPs, about"], rows


def unequal(configs: Mapping[str, RunConfig]) -> dict[str, str]:
    """What differs between arms beside the method itself: its name -> who has what."""
    arms = {label: arm(config) for label, config in configs.items()}
    rates = {f"learning rate of {key}": {label: rate for label, one in arms.items()
                                         if (rate := getattr(one, key)) != NONE}
             for key in ("imitation", "exploration", "w")}
    facts: dict[str, dict[str, str]] = {
        "steps": {label: one.steps for label, one in arms.items()}, **rates,
        "rollouts": {label: f"{one.rollouts:,}" for label, one in arms.items()},
        "demonstrations": {label: f"{one.demos:,}" for label, one in arms.items()}}
    kept = RunConfig.model_fields.keys() - BOOKKEEPING - {"method"}
    flat = {label: _flat({key: config.resolved()[key] for key in kept}) for label, config in configs.items()}
    for key in sorted({key for found in flat.values() for key in found} - SHOWN):
        facts[key] = {label: str(found.get(key, "unset")) for label, found in flat.items()}
    return {name: _who(values) for name, values in facts.items() if len(set(values.values())) > 1}


def _who(values: Mapping[str, str]) -> str:
    """Names that share a value are listed together."""
    groups: dict[str, list[str]] = {}
    for label, value in values.items():
        groups.setdefault(value, []).append(label)
    return "; ".join(f"{value} for {', '.join(labels) if len(labels) <= 6 else f'{len(labels)} arms'}"
                     for value, labels in groups.items())


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def identity(config: RunConfig) -> dict[str, Any]:
    """Equal for two configurations that are the same run but for its name, its seed and what is written down."""
    found = {key: value for key, value in config.resolved().items() if key not in BOOKKEEPING}
    if isinstance(config.method, SequenceOptions):
        stages = zip(found["method"]["stages"], stage_steps(config.method, config.steps), strict=True)
        found["method"] = {**found["method"], "stages": [{**stage, "steps": steps} for stage, steps in stages]}
    return found
