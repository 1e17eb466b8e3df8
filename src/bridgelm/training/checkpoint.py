"""Checkpoints, which hold weights, optimizer state, data position and random state: written, checked, loaded, exported.

A checkpoint is whole or absent, and nothing in it is unpickled: tensors are safetensors, all else is JSON.

    RUN/checkpoints/step-000020/   everything a run needs to go on exactly, with checksums; the last two are kept
    RUN/best/, RUN/final/          merged models, ordinary Hugging Face folders
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bridgelm import dist
from bridgelm.config import plugins
from bridgelm.data.chat import Chat
from bridgelm.errors import UserError
from bridgelm.model import grads
from bridgelm.model.policy import Policy
from bridgelm.runs import disk
from bridgelm.runs.folder import read_json, write_json

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
CHECKSUM = "xxh3_128"  # the key in the manifest, which names the algorithm
NEEDED = {"step", "method", "data", "ledger", "best", "said", "watch", "due", "random"}  # keys of the state
KEPT = 2
OURS = re.compile(r"(step|\.draft)-\d{6,}(-old)?")  # the folders in RUN/checkpoints that are written here


def save(run: Path, step: int, policy: Policy, state: Mapping[str, Any]) -> None:
    """Writes a draft beside the checkpoints and renames it into place, so that a kill at any moment leaves a whole one.
    The first rank writes what all ranks hold; where weights are sharded, each rank writes its shard."""
    folder = run / "checkpoints"
    target, draft = folder / f"step-{step:06d}", folder / f".draft-{step:06d}"
    if dist.first():
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    dist.wait()
    about, sums = _write_tensors(draft, policy.tensors())
    if dist.first():
        write_json(draft / STATE, {**state, **about, "step": step, "random": _random_state()})
        write_json(draft / MANIFEST, {CHECKSUM: {**sums, STATE: disk.digest(draft / STATE)}})
        _put(draft, target)
        # Checkpoints of later steps are left over from before the run was resumed from an older one.
        stay = [path for path in kept(run) if _step(path) <= step][:KEPT]
        for other in folder.iterdir():
            if other not in stay and OURS.fullmatch(other.name):  # a copy that a user made has another name and stays
                shutil.rmtree(other, ignore_errors=True)
    dist.wait()


def _put(draft: Path, folder: Path) -> None:
    """Replaces `folder` with the draft as a whole, once all of the draft is on disk."""
    disk.sync_tree(draft)
    old = draft.with_name(f"{draft.name}-old")
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    disk.sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_tensors(draft: Path, found: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, str]]:
    """Writes this rank's file. Returns how tensors are split over files, where there are several, and all checksums."""
    parted, counts = dist.parted(), grads.rows(found)
    sums: dict[str, np.ndarray] = {}
    names = [f"tensors-{rank:05d}-of-{dist.world():05d}.safetensors" for rank in range(dist.world())]
    if parted or dist.first():
        own = {name: t.detach().cpu().clone().contiguous() for name, t in found.items()
               if dist.first() or not grads.whole(name)}
        own |= {"random/torch": torch.get_rng_state()} if dist.first() else {}
        path = draft / (names[dist.rank()] if parted else TENSORS)
        save_file(own, path)
        disk.sync(path)
        sums[path.name] = np.frombuffer(bytes.fromhex(disk.digest(path)), dtype=np.uint8)
    sums = dist.gather(sums)
    shapes = {name: [counts[name], *t.shape[1:]] if t.ndim else [] for name, t in found.items()}
    about = {"parts": {"files": names, "shapes": shapes}} if parted else {}
    return about, {name: found.tobytes().hex() for name, found in sums.items()}


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint. Of each, only the rows that this rank holds are read, however many shards it was
    written in."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        paths = [folder / name for name in about.get("files", [TENSORS])]
        self.shapes: dict[str, list[int]] = about.get("shapes", {})
        self.files = [safe_open(path, framework="pt") for path in paths]
        self.where: dict[str, list[Any]] = {}
        for file in self.files:
            names = file.keys()
            for name in names:
                self.where.setdefault(name, []).append(file)

    def shape(self, name: str) -> list[int]:
        """The shape of the whole tensor, over all shards."""
        shapes = [file.get_slice(name).get_shape() for file in self.where[name]]
        return [sum(shape[0] for shape in shapes), *shapes[0][1:]] if shapes[0] else []

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shape(name)
        if not shape:
            return self.where[name][0].get_tensor(name)
        parts = [file.get_slice(name) for file in self.where[name]]
        counts = [part.get_shape()[0] for part in parts]
        assert self.shapes.get(name, shape) == shape, f"{name}: the files are not of one checkpoint"
        start, stop = (0, shape[0]) if grads.whole(name) or not dist.parted() else dist.bounds(shape[0])
        found, at = [parts[0][:0]], 0
        for part, count in zip(parts, counts, strict=True):
            found.append(part[min(max(start - at, 0), count):min(max(stop - at, 0), count)])
            at += count
        return torch.cat(found)

    def __contains__(self, name: object) -> bool:
        return name in self.where

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


def kept(run: Path) -> list[Path]:
    """All checkpoints of a run, whole or damaged, the newest first."""
    found = [path for path in (run / "checkpoints").glob("step-*")
             if OURS.fullmatch(path.name) and path.name[5:].isdigit()]
    return sorted(found, key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])


def newest(run: Path) -> Path | None:
    return next(iter(kept(run)), None)


def open_whole(run: Path) -> tuple[Path, dict[str, Any], str] | None:
    """The newest undamaged checkpoint, its state, and what is wrong with newer ones. None if there are no checkpoints;
    if all of them are damaged, the run is refused. All ranks get the same."""
    damaged: list[str] = []
    for name in dist.from_first(lambda: [path.name for path in kept(run)]):
        folder = run / "checkpoints" / name
        wrong = _damage(folder)
        if not wrong:
            return folder, dist.from_first(lambda folder=folder: read_state(folder)), "; ".join(damaged)
        damaged.append(f"{name}: {wrong}")
    if damaged:
        raise UserError(f"{run}: no checkpoint is whole ({'; '.join(damaged)}); put one back into "
                        f"{run}/checkpoints from a copy, or remove the run folder to train anew")
    return None


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint; empty if nothing is. The files are divided among the ranks."""
    sums = dist.from_first(lambda: _sums(folder))
    if not sums:
        return f"{MANIFEST} is missing or damaged"
    mine = {name: _wrong(folder / name, sums[name]) for name in sorted(sums)[dist.rank()::dist.world()]}
    found = dist.gather({name: np.frombuffer(text.encode(), dtype=np.uint8) for name, text in mine.items() if text})
    said = [f"{name} {found[name].tobytes().decode()}" for name in sorted(found)]
    return ", ".join(said) or dist.from_first(lambda: _odd(folder, sums))


def _sums(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / MANIFEST).read_bytes())[CHECKSUM]
        return {str(name): str(found[name]) for name in found}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _wrong(path: Path, checksum: str) -> str:
    try:
        return "" if disk.digest(path) == checksum else "is damaged"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _odd(folder: Path, sums: Mapping[str, str]) -> str:
    """What can be wrong with a checkpoint whose files are all as they were written."""
    if STATE not in sums:
        return f"{MANIFEST} does not name {STATE}"
    state = read_state(folder)
    lacks = sorted(NEEDED - state.keys())
    if lacks:
        return f"{STATE} lacks {', '.join(lacks)}"
    if state["step"] != _step(folder):
        return f"{STATE} is of step {state['step']}"
    lacks = sorted({*state.get("parts", {}).get("files", [TENSORS])} - sums.keys())
    return f"{MANIFEST} does not name {', '.join(lacks)}" if lacks else ""


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def load_tensors(checkpoint: Path, policy: Policy, state: Mapping[str, Any]) -> None:
    saved = SavedTensors(checkpoint, state.get("parts", {}))
    _check_fit(checkpoint, saved, policy)
    torch.set_rng_state(saved["random/torch"])
    policy.load(saved)
    version, numbers, gauss = state["random"]["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["random"]["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


def _check_fit(checkpoint: Path, saved: SavedTensors, policy: Policy) -> None:
    """Refuses a checkpoint whose tensors are not those of this run, as happens when settings were changed."""
    own = {name: t for name, t in policy.tensors().items() if name.startswith("group/")}
    counts = grads.rows(own)
    shapes = {name: [counts[name], *t.shape[1:]] if t.ndim else [] for name, t in own.items()}
    wanted: dict[str, list[int] | None] = {**shapes}
    for optimiser, named in policy.optimisers.items():
        prefix = f"optim/{optimiser}/"
        for name in (name for name in saved if name.startswith(prefix)):
            weight, _, key = name.removeprefix(prefix).rpartition("|")
            shape = shapes.get(f"group/{named.group}/{weight}")
            if shape is None or key.startswith("exp_avg"):
                wanted[name] = shape
    for name, shape in wanted.items():
        found = saved.shape(name) if name in saved else None
        if shape is None or found != shape:
            says = "is missing" if found is None else "belongs to no weight of the run" if shape is None else \
                f"has the shape {found} in place of {shape}"
            raise UserError(f"{checkpoint}: {name} {says}; the run goes on only with the model and the settings that "
                            "the checkpoint was made with")


def seed_generators(seed: int) -> None:
    """Seeds the global generators at the start of a run, so that equal seeds give equal runs whatever ran before."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generators() -> tuple[Any, ...]:
    """The states of the global generators, for `set_generators`."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_generators(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def _random_state() -> dict[str, Any]:
    """The state of the global generators as JSON. BridgeLM draws from none of them; a user's reward function may."""
    name, keys, *rest = np.random.get_state()
    return {"python": list(random.getstate()), "numpy": [name, np.asarray(keys).tolist(), *rest]}


def save_model(policy: Policy, chat: Chat, folder: Path) -> None:
    """Writes the merged live model as a plain Hugging Face folder, which replaces an older one as a whole. Its
    generation config names the end tokens that training used."""
    with policy.gathered("live") as model:
        if dist.first():
            _write_model(model, chat, folder)
    dist.wait()


def _write_model(model: Any, chat: Chat, folder: Path) -> None:
    draft = folder.with_name(f".{folder.name}-draft")
    shutil.rmtree(draft, ignore_errors=True)
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id = sorted(chat.eos_ids), chat.pad_id
    try:
        settings.validate(strict=True)
    except ValueError:  # some models have sampling settings but do_sample = false, which transformers will not save
        settings.temperature = settings.top_p = settings.top_k = None
    model.save_pretrained(draft)
    chat.tokenizer.save_pretrained(draft)
    _put(draft, folder)


def weights_of(folder: Path) -> str:
    """The checksum of a model folder's weights; empty if there are none."""
    files = sorted(folder.glob("*.safetensors"))
    return disk.digest_of(" ".join(disk.digest(path) for path in files)) if files else ""


def model_folder(run: Path, which: str) -> Path:
    folder = run / which
    if which not in ("final", "best"):
        raise UserError(f"which = {which!r}: choose 'final' or 'best'")
    if not (folder / "config.json").exists():
        raise UserError(f"{run}: there is no {which} model yet; finish the run with `bridgelm train --resume {run}`")
    return folder


def export(run_path: str | Path, out: str | Path, which: str = "final") -> Path:
    """Copies a run's merged model, with tokenizer, chat template, generation config and a model card, to `out`."""
    run, out = Path(run_path), Path(out)
    if not (run / "config.json").exists():
        raise UserError(f"{run}: not a run folder (no config.json)")
    source = model_folder(run, which)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; choose another folder")
    shutil.copytree(source, out, dirs_exist_ok=True)
    (out / "README.md").write_text(_card(run, which), encoding="utf-8")
    return out


def _public(name: str) -> str:
    """A name without the folders of this machine: a model card is there to be published."""
    return Path(name).name if Path(name).is_absolute() else name


def _card(run: Path, which: str) -> str:
    config = read_json(run / "config.json") or {}
    info, result = read_json(run / "run.json") or {}, (read_json(run / "result.json") or {}).get(which, {})
    base, method = _public(config["model"]["name_or_path"]), plugins.short(config["method"]["name"])
    accuracy = f"{result['accuracy']:.3f} (95 % interval {result['interval'][0]:.3f} to {result['interval'][1]:.3f}, " \
               f"{result['n']} problems, greedy)" if result else "not measured"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [bridgelm, {method}]
---

# {config['name']}

`{base}` trained with BridgeLM's `{method}` for {config['steps']} steps (seed {config['seed']}); the {which} weights,
all adapters merged.

- Training data: `{_public(config['data']['train'])}`; test accuracy: {accuracy}
- BridgeLM {info.get('bridgelm', '?')}, commit {info.get('commit') or 'unknown'}; torch {info.get('torch', '?')},
  transformers {info.get('transformers', '?')}

```json
{json.dumps(config['method'], indent=2)}
```
"""
