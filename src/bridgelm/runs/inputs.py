"""Fingerprints of what a run is made of (`RUN/inputs.json`), which refuse to resume it with other data or models.

    config      the resolved configuration
    data        every problem with its demonstrations, in order, as training draws from them
    code        the sources of a method or an engine of the user, and of what they import that lies beside them
    reward      the same of reward functions and of a verifier of the user
    tokenizer   vocabulary, rules, chat template, end tokens
    model       the configuration and weight files of the base model
    teacher     the same of the teacher, and its tokenizer's files

Weight files are hashed as a whole. Sampled blocks would miss a change of a few tensors, and hashing all bytes costs
little: loading the model reads them anyway, and most disks are slower than the hash. A model of the hub is identified
by its commit. Other versions of libraries are reported but not refused.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridgelm.config import plugins
from bridgelm.config.options import methods, parts
from bridgelm.config.run_config import ModelConfig, RunConfig, make_config, up_to_date
from bridgelm.data.chat import model_path
from bridgelm.errors import UserError
from bridgelm.runs import disk
from bridgelm.runs.folder import RunFolder, read_json, versions, write_json
from bridgelm.types import Problem

if TYPE_CHECKING:
    from bridgelm.data.chat import Chat
    from bridgelm.data.cursors import Splits

FILE = "inputs.json"
KEYS: Sequence[str] = ("config", "data", "code", "reward", "tokenizer", "model", "teacher")
ROLES = ("train", "demos", "validation", "test", "hard")
SHOWN = 3  # the most differences of one kind that a message names


def check_keys(allowed: Collection[str]) -> None:
    for key in allowed:
        if key not in KEYS:
            raise UserError(f"--allow-change {key}: there is no such key; one of {', '.join(KEYS)}")


def take(config: RunConfig, splits: Splits, chat: Chat) -> dict[str, Any]:
    """The fingerprints of a run that is about to start or resume."""
    teacher: dict[str, str] = {}
    if config.teacher is not None:
        named = ModelConfig.model_validate({"name_or_path": config.teacher.name_or_path,
                                            "revision": config.teacher.revision})
        teacher = _model(named, "tokenizer*", "*.jinja")
        if config.teacher.chat_template:
            teacher["chat template"] = disk.digest(Path(config.teacher.chat_template))
    return {"config": config.resolved(), "tokenizer": _tokenizer(chat),
            "data": {role: _rows(getattr(splits, role)) for role in ROLES},
            "code": _digests([*(("method", part.name) for part in methods(config.method)),
                              ("engine", config.rollout.engine)]),
            "reward": {str(path): disk.digest(path) for entry in config.reward.functions
                       for path in _sources(Path(entry.rpartition(":")[0]))}
            | _digests([("verifier", config.reward.verifier)]),
            "model": _model(config.model), "teacher": teacher, "versions": versions()}


def compare(run: Path, now: Mapping[str, Any], allowed: Collection[str]) -> dict[str, str]:
    """The changes since the run began, by key. A change that is not allowed is a UserError."""
    then = read_json(run / FILE)
    if then is None and not any((run / "checkpoints").glob("step-*")):
        return {}  # the run was killed before it wrote the file
    if then is None or not all(isinstance(then.get(key), dict) for key in KEYS):
        found = dict.fromkeys(KEYS, f"{FILE} is missing or incomplete, and nothing else says what the run was made of")
    else:
        _check_method(run, then["config"], now["config"])
        found = {key: text for key in KEYS if (text := _difference(key, then[key], now[key]))}
    refused = [key for key in found if key not in allowed]
    if refused:
        said = "; ".join(dict.fromkeys(found[key] for key in refused))
        switches = " ".join(f"--allow-change {key}" for key in refused)
        raise UserError(f"{run}: not what the run was made of: {said}; put it back, start a new run, or go on all the "
                        f"same with `bridgelm train --resume {run} {switches}`")
    return found


def _check_method(run: Path, *configs: dict[str, Any]) -> None:
    """Refuses another method, which could not use the state that the first one kept."""
    was, now = (", ".join(part.name for part in parts(make_config(config).method)) for config in configs)
    if was != now:
        raise UserError(f"{run}: config: the method was {was}, is {now}; a run keeps its method: put it back, or start "
                        "a new run")


def other_versions(run: Path, now: Mapping[str, Any]) -> str:
    then = (read_json(run / FILE) or {}).get("versions", {})
    return ", ".join(f"{name} {then[name]} is now {version}" for name, version in now["versions"].items()
                     if then.get(name, version) != version)


def keep(folder: RunFolder, now: Mapping[str, Any], changed: Mapping[str, str], step: int) -> None:
    """Records allowed changes, as an event and in inputs.json, since a later resume may drop the event."""
    before = (read_json(folder.path / FILE) or {}).get("changes", [])
    if changed:
        event = {"event": "change", "step": step, "allowed": list(changed), "text": "; ".join(changed.values())}
        folder.append(event)
        before = [*before, event]
    write_json(folder.path / FILE, {**now, "changes": before})


# -- fingerprints ------------------------------------------------------------------------------------------------------

def _rows(problems: Sequence[Problem]) -> dict[str, Any]:
    """A digest of all rows tells whether any changed; eight digits of each row's digest tell which one."""
    each = [disk.digest_of(json.dumps(
        [p.id, p.messages, p.answer, [[d.text, d.logps] for d in p.demos], p.difficulty, dict(p.columns),
         p.conversational], default=_plain, sort_keys=True)) for p in problems]
    return {"rows": len(each), "digest": disk.digest_of("".join(each)), "each": "".join(row[:8] for row in each)}


def _plain(value: Any) -> str:
    """Text for values that JSON cannot hold: dates and the like; arrays and images by their bytes."""
    return value.tobytes().hex() if hasattr(value, "tobytes") else repr(value)


def _tokenizer(chat: Chat) -> dict[str, str]:
    tokenizer = chat.tokenizer
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules |= {"padding": None, "truncation": None}  # of the last call
    else:
        rules = {"vocabulary": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    ends = [sorted(chat.eos_ids), chat.eos_id, chat.pad_id]
    return {"vocabulary and rules": disk.digest_of(json.dumps(rules, sort_keys=True)),
            "chat template": disk.digest_of(json.dumps(tokenizer.chat_template)),
            "end and pad tokens": disk.digest_of(json.dumps(ends))}


def _model(config: ModelConfig, *more: str) -> dict[str, str]:
    path = Path(model_path(config.name_or_path, config.section))
    if path.is_dir():
        patterns = ("config.json", "*.safetensors", *more)
        return {file.name: disk.digest(file) for pattern in patterns for file in sorted(path.glob(pattern))}
    from transformers.utils.hub import cached_file

    file = cached_file(config.name_or_path, "config.json", revision=config.revision)
    return {"commit": Path(str(file)).parent.name}


def _digests(chosen: Sequence[tuple[plugins.Kind, str]]) -> dict[str, str]:
    """The digests of the files of what is the user's own."""
    return {str(path): disk.digest(path) for kind, name in chosen if plugins.is_own(kind, name)
            for path in _sources(plugins.source(kind, name))}


def _sources(file: Path, seen: Collection[Path] = ()) -> Iterator[Path]:
    """A file of the user, and the files beside it that it imports."""
    yield file
    tree, done = ast.parse(file.read_bytes()), {*seen, file}
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module):
        names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    for name in sorted(names):
        parts = name.split(".")
        above = [file.parent.joinpath(*parts[:i], "__init__.py") for i in range(1, len(parts) + 1)]
        for path in [*above, file.parent.joinpath(*parts).with_suffix(".py")]:
            if path.is_file() and path not in done:
                found = list(_sources(path, done))
                done |= set(found)
                yield from found


# -- differences -------------------------------------------------------------------------------------------------------

def _difference(key: str, then: dict[str, Any], now: dict[str, Any]) -> str:
    """The difference in words; empty if there is none."""
    if key == "data":
        return "; ".join(text for role in ROLES if (text := _moved(f"data.{role}", then.get(role, {}), now[role])))
    if key == "config":
        then, now = ({name: value for name, value in _flat(up_to_date(side)).items() if name != "out"}
                     for side in (then, now))
        found = [f"{name} was {json.dumps(then.get(name))}, is {json.dumps(now.get(name))}"
                 for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    else:
        word = {(True, True): "changed", (True, False): "is gone", (False, True): "is new"}
        found = [f"{name} {word[name in then, name in now]}" for name in sorted({*then, *now})
                 if then.get(name) != now.get(name)]
    return f"{key}: {_list(found)}" if found else ""


def _moved(role: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if then.get("digest") == now["digest"]:
        return ""
    if then.get("rows") != now["rows"]:
        return f"{role}: there were {then.get('rows')} rows, now there are {now['rows']}"
    was, is_ = ([side["each"][i:i + 8] for i in range(0, len(side["each"]), 8)] for side in (then, now))
    rows = [str(i) for i, (a, b) in enumerate(zip(was, is_, strict=True), 1) if a != b]
    how = "changed places" if sorted(was) == sorted(is_) else "changed"
    return f"{role}: row{'s' * (len(rows) > 1)} {_list(rows)} {how}"


def _list(parts: Sequence[str]) -> str:
    more = f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    return ", ".join(parts[:SHOWN]) + more


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested values by dotted keys."""
    if not isinstance(value, dict):
        return {name: value}
    inner = [_flat(item, f"{name}.{part}".lstrip(".")) for part, item in value.items()]
    return {key: item for found in inner for key, item in found.items()}
