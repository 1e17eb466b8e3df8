"""One strict TOML file describes a run. Loading it imports no torch and names every mistake with its fix."""

from __future__ import annotations

import difflib
import json
import tomllib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from bridgelm.config import plugins
from bridgelm.config.options import CHOSEN, MethodOptions, Rate, SequenceOptions, Share, Strict, parts
from bridgelm.config.options.optim import OptimConfig
from bridgelm.config.options.reward import RewardConfig
from bridgelm.config.options.rollout import RolloutConfig
from bridgelm.config.options.teachers import TeacherConfig
from bridgelm.config.variants import with_base, with_variants
from bridgelm.errors import UserError

Count = Annotated[int, Field(ge=1)]
LONGEST = 200  # bytes of a name: file systems take 255, and endings such as -seed0.json are put behind it


def one_folder(name: str) -> str:
    """A name that can only be that of a folder inside another one; else a ValueError that says why."""
    wrong = ("is empty" if not name.strip() else "stands for another folder" if name in {".", ".."} else
             "has a separator; `out` says where a run folder lies" if "/" in name or "\\" in name else
             "holds a character that cannot be printed" if not name.isprintable() else
             f"is longer than {LONGEST} bytes" if len(name.encode("utf-8", "replace")) > LONGEST else "")
    if wrong:
        shown = name if len(name) <= 40 else f"{name[:40]}..."
        raise ValueError(f"{shown!r} cannot be the name of a folder: it {wrong}")
    return name


Name = Annotated[str, AfterValidator(one_folder)]


class ModelConfig(Strict):
    """`name_or_path`: a Hugging Face folder or hub name, or `toy:base`, the tiny model that travels in the package."""

    section: ClassVar[str] = "model"  # the table that messages to the user name

    name_or_path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # of the forward pass; masters are at least float32
    device: str = "auto"
    chat_template: str | None = None  # a Jinja file, for models that bring none
    system_prompt: str | None = None
    lora_rank: Annotated[int, Field(ge=0)] = 0  # 0 trains all weights; r > 0 trains theta as an adapter of rank r
    lora_alpha: Rate = 16.0
    lora_modules: str = ""  # regular expression of linear layers; empty: all of them
    gradient_checkpointing: bool = False
    offload_activations: bool = False  # what layers save for the backward pass lies in host memory until then
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"  # auto: what transformers picks


class ToyOptions(Strict):
    """The embedded task, used where `data.train` is `toy:FAMILY`."""

    layout: Literal["paired", "separate"] = "separate"
    coverage: Share = 1.0  # paired: share of the problems that have demonstrations
    wrong: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    reach: Literal["within", "beyond"] = "within"  # whether demonstrations go beyond what the base ever finds
    train_size: Count = 2000
    demo_size: Count = 1000
    eval_size: Count = 500
    seed: int = 0  # of the data; the run's own seed does not change it


class DataConfig(Strict):
    """Paths (JSONL, Parquet, a folder saved by `datasets`), a hub data set `hf:NAME:SPLIT`, or `toy:FAMILY`."""

    train: str
    demos: str | None = None  # a pool of demonstrations on problems of their own ("separate")
    validation: str | None = None
    test: str | None = None
    max_prompt_tokens: Count = 1024
    max_demo_tokens: Count = 4096
    overlong: Literal["error", "drop"] = "error"  # a training prompt or demonstration over its limit; never truncated
    overlap: Literal["error", "drop"] = "error"  # a training prompt that is also in validation or test
    fields: dict[str, str] = Field(default_factory=dict)  # our field name -> the column that holds it
    toy: ToyOptions = ToyOptions()


class BatchConfig(Strict):
    demos: Count = 32  # demonstrations an update
    micro_tokens: Count = 16384  # of one forward pass; a prompt that rows share counts once, padding where there is any


class EvalConfig(Strict):
    every: Annotated[int, Field(ge=0)] = 10  # steps between looks at the validation set; 0: only at the end
    problems: Count = 200  # of the validation set
    samples: Annotated[int, Field(ge=0)] = 0  # k > 0: avg@k and pass@k on the test set, sampled, at the end
    temperature: Rate = 1.0
    max_new_tokens: Count | None = None  # default: the rollouts' limit


class LogConfig(Strict):
    samples: Annotated[int, Field(ge=0)] = 4  # rollouts kept a logged step
    samples_every: Count = 10
    sinks: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)


class DiagnoseConfig(Strict):
    """What is measured along the way for `bridgelm diagnose`; no weight moves by it. The cost: docs/diagnose.md."""

    every: Annotated[int, Field(ge=0)] = 0  # steps between probes; 0: none
    demos: Count = 64  # a fixed draw of the demonstrations
    problems: Count = 16  # the first of the validation set
    group: Annotated[int, Field(ge=2)] = 8  # answers of each


class RunConfig(Strict):
    """Everything that decides a run. `resolved()` of it is written to the run folder."""

    name: Name
    out: str = "runs"
    seed: Annotated[int, Field(ge=0)] = 0
    steps: Count
    checkpoint_every: Annotated[int, Field(ge=0)] = 20  # 0: only at the end or when interrupted
    threads: Annotated[int, Field(ge=0)] = 0  # CPU threads of torch; 0: its own default
    shard: bool = False  # several processes: each holds a part of all weights, copies and optimiser states
    model: ModelConfig
    data: DataConfig
    method: Annotated[MethodOptions, *CHOSEN]
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    optim: OptimConfig = OptimConfig()
    batch: BatchConfig = BatchConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    diagnose: DiagnoseConfig = DiagnoseConfig()
    teacher: TeacherConfig | None = None  # a second, frozen model

    @model_validator(mode="after")
    def _across_fields(self) -> RunConfig:
        if self.reward.verifier == "none" and not self.reward.functions:
            raise ValueError("reward.verifier is 'none' and reward.functions is empty: nothing would score an answer")
        if self.reward.weights and len(self.reward.weights) != len(self.reward.functions):
            raise ValueError("reward.weights needs one number for each of reward.functions")
        if self.data.train.startswith("toy:") != (self.reward.verifier == "toy") and not plugins.is_own(
                "verifier", self.reward.verifier):
            raise ValueError("reward.verifier = 'toy' and data.train = 'toy:...' go together")
        if self.optim.kind == "adamw8bit" and self.model.dtype == "float64":
            raise ValueError("optim.kind = 'adamw8bit' has no float64; set model.dtype to float32 or bfloat16")
        if "masters" in self.optim.host and self.model.dtype != "bfloat16" and not self.shard:
            raise ValueError("optim.host: 'masters' are the weights themselves unless model.dtype = 'bfloat16'; set "
                             "that, or leave them out")
        refuses = next((part for part in parts(self.method) if part.no_refill), None)
        if self.rollout.refill and refuses is not None:
            raise ValueError(f"rollout.refill: set it to 0 for method {refuses.name!r}: "
                             f"{refuses.no_refill}")
        if isinstance(self.method, SequenceOptions):
            stage_steps(self.method, self.steps)
            stages = self.method.stages
            moving = next((s.method.name for s in stages if s.method.moves_base), None)
            if self.model.lora_rank and moving and not all(s.fresh_reference for s in stages):
                raise ValueError(f"method.stages: with model.lora_rank and a stage of {moving!r} no stage can keep an "
                                 "older reference; leave out fresh_reference = false")
        return self

    def resolved(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)


def up_to_date(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that was written before some key existed has that key's default."""
    try:
        return RunConfig.model_validate(config).resolved()
    except ValidationError:  # a key that is gone: it differs
        return config


def absolute(config: RunConfig) -> RunConfig:
    """Makes the user's paths absolute, since a run folder is read from any directory. Names of hub and toy stay."""
    def full(path: str) -> str:
        return str(Path(path).expanduser().absolute())

    raw = config.resolved()
    data, reward = raw["data"], raw["reward"]
    for model in (raw["model"], raw["teacher"]):
        if model is None:
            continue
        if not model["name_or_path"].startswith("toy:") and Path(model["name_or_path"]).expanduser().is_dir():
            model["name_or_path"] = full(model["name_or_path"])
        if model["chat_template"] is not None:
            model["chat_template"] = full(model["chat_template"])
    for key in ("train", "demos", "validation", "test"):
        if data[key] is not None and not data[key].startswith(("toy:", "hf:")):
            data[key] = full(data[key])
    entries = [entry.rpartition(":") for entry in reward["functions"]]
    reward["functions"] = [f"{full(file)}:{name}" for file, _, name in entries]
    reward["verifier"] = plugins.full(reward["verifier"])
    raw["rollout"]["engine"] = plugins.full(raw["rollout"]["engine"])
    for method in tables(raw["method"]):
        method["name"] = plugins.full(method["name"])
    return RunConfig.model_validate(raw)


def tables(method: dict[str, Any]) -> typing.Iterator[dict[str, Any]]:
    """The table of a method, and those of its stages or of the method that it is wrapped round."""
    yield method
    for inner in [*(stage["method"] for stage in method.get("stages", [])), method.get("method")]:
        if isinstance(inner, dict) and "name" in inner:
            yield from tables(inner)


def stage_steps(options: SequenceOptions, total: int) -> list[int]:
    """Steps of each stage; those without a number share what is left of `total`, the last one the remainder too."""
    given = [stage.steps for stage in options.stages]
    open_, rest = given.count(None), total - sum(s for s in given if s is not None)
    if rest < open_ or (not open_ and rest != 0):
        raise ValueError(f"method.stages: the stages' steps do not add up to steps = {total}")
    shares = iter([rest // open_] * (open_ - 1) + [rest - rest // open_ * (open_ - 1)] if open_ else [])
    return [next(shares) if s is None else s for s in given]


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read a TOML file (or a run folder's config.json) with the file that it is based on, and apply `a.b=value`
    overrides."""
    path = Path(path)
    raw = with_base(_read(path), path, _read)
    raw.setdefault("name", path.stem)
    raw, overrides = with_variants(raw, overrides, str(path))
    for item in overrides:
        override(raw, item)
    return make_config(raw, str(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); `bridgelm init` writes a starter file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save the file as UTF-8") from None
    try:
        raw = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a table of settings; a run folder's config.json is one")
    return raw


def variant_names(path: str | Path) -> list[str]:
    """The variants that a TOML file carries."""
    path = Path(path)
    return list(with_base(_read(path), path, _read).get("variants", {})) if path.suffix == ".toml" else []


def make_config(raw: dict[str, Any], where: str = "config") -> RunConfig:
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None


def override(raw: dict[str, Any], item: str) -> None:
    key, sign, value = item.partition("=")
    if not sign:
        raise UserError(f"override {item!r}: write it as section.key=value")
    try:
        parsed = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word is a string
    *parents, last = key.strip().split(".")
    node: Any = raw
    try:
        for parent in parents:
            node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
            if not isinstance(node, dict | list):
                raise UserError(f"override {item!r}: {parent} is a value, not a table")
        place: Any = int(last) if isinstance(node, list) else last
        node[place] = parsed
    except (ValueError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"override {item!r}: the list has no such entry (they are counted from 0)") from None


def _explain(error: ValidationError) -> str:
    """Pydantic's first complaint as one line: the dotted key, what is wrong, and the nearest valid key."""
    first = error.errors()[0]
    tags = {model.model_fields["name"].default for model in typing.get_args(MethodOptions)}
    location = [part for part in first["loc"] if part not in tags]
    dotted = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        known = _keys_at([str(part) for part in first["loc"][:-1]])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"unknown key {dotted!r}; {hint}"
    if first["type"] == "missing":
        return f"{dotted!r} is missing"
    if first["type"] == "union_tag_invalid":
        context = first.get("ctx", {})
        return f"method.name: {context.get('tag')!r} is not a method; one of {context.get('expected_tags')}, or " \
               "your own as path/to/file.py:Class"
    message = first["msg"].removeprefix("Value error, ")
    value = "" if first["type"] in {"value_error", "union_tag_not_found"} else f" (got {first['input']!r})"
    return f"{dotted + ': ' if dotted else ''}{message}{value}"


def _keys_at(location: list[str]) -> list[str]:
    """The keys that are valid in the table at `location` of RunConfig."""
    models: list[Any] = [RunConfig]
    for part in location:
        if part.isdigit():
            continue
        tagged = [m for m in models if "name" in m.model_fields and m.model_fields["name"].default == part]
        if tagged:
            models = tagged
        else:
            fields = [m.model_fields[part] for m in models if part in m.model_fields]
            models = [inner for field in fields for inner in _models(field.annotation)]
    return sorted({field.alias or name for m in models for name, field in m.model_fields.items()})


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for inner in typing.get_args(annotation) for model in _models(inner)]


def starter() -> str:
    """The commented file that `bridgelm init` writes."""
    return Path(__file__).with_name("starter.toml").read_text(encoding="utf-8")
