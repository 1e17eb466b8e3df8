"""Checkpoints that are whole or absent, and never unpickled: safetensors for tensors, JSON for the rest.

    RUN/checkpoints/step-000020/   everything a run needs to go on exactly; only the newest is kept
    RUN/best/, RUN/final/          merged models, ordinary Hugging Face folders
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bridgelm import dist, grads
from bridgelm.chat import Chat
from bridgelm.errors import UserError
from bridgelm.metrics import read_json, write_json
from bridgelm.policy import Policy

TENSORS, STATE = "tensors.safetensors", "state.json"


def save(run: Path, step: int, policy: Policy, state: Mapping[str, Any]) -> None:
    """Written beside and renamed into place: a kill at any moment leaves the older one or the newer one. The first rank
    writes what all of them hold; where weights lie in parts, each writes its own."""
    folder = run / "checkpoints"
    target, draft = folder / f"step-{step:06d}", folder / f".draft-{step:06d}"
    if dist.first():
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    dist.wait()
    about = _write_tensors(draft, policy.tensors())
    dist.wait()
    if dist.first():
        write_json(draft / STATE, {**state, **about, "step": step, "random": _random_state()})
        if target.exists():
            shutil.rmtree(target)
        draft.rename(target)
        for other in folder.iterdir():
            if other != target:
                shutil.rmtree(other, ignore_errors=True)
    dist.wait()


def _write_tensors(draft: Path, found: Mapping[str, Tensor]) -> dict[str, Any]:
    """This rank's file; gives what the state says of them, where there are several."""
    parted, counts = dist.parted(), grads.rows(found)
    names = [f"tensors-{rank:05d}-of-{dist.world():05d}.safetensors" for rank in range(dist.world())]
    if parted or dist.first():
        own = {name: t.detach().cpu().clone().contiguous() for name, t in found.items()
               if dist.first() or not grads.whole(name)}
        own |= {"random/torch": torch.get_rng_state()} if dist.first() else {}
        path = draft / (names[dist.rank()] if parted else TENSORS)
        save_file(own, path)
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    shapes = {name: [counts[name], *t.shape[1:]] if t.ndim else [] for name, t in found.items()}
    return {"parts": {"files": names, "shapes": shapes}} if parted else {}


class Saved(Mapping[str, Tensor]):
    """The tensors of a checkpoint: of each, what this rank holds, however many parts it was written in. No other rows
    are read."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        paths = [folder / name for name in about.get("files", [TENSORS])]
        self.shapes: dict[str, list[int]] = about.get("shapes", {})
        self.files = [safe_open(path, framework="pt") for path in paths]
        self.where: dict[str, list[Any]] = {}
        for file in self.files:
            names = file.keys()
            for name in names:
                self.where.setdefault(name, []).append(file)

    def __getitem__(self, name: str) -> Tensor:
        parts = [file.get_slice(name) for file in self.where[name]]
        shape = parts[0].get_shape()
        if not shape:
            return self.where[name][0].get_tensor(name)
        counts = [part.get_shape()[0] for part in parts]
        shape = [sum(counts), *shape[1:]]
        assert self.shapes.get(name, shape) == shape, f"{name}: the files are not of one checkpoint"
        start, stop = (0, shape[0]) if grads.whole(name) or not dist.parted() else dist.bounds(shape[0])
        found, at = [parts[0][:0]], 0
        for part, count in zip(parts, counts, strict=True):
            found.append(part[min(max(start - at, 0), count):min(max(stop - at, 0), count)])
            at += count
        return torch.cat(found)

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


def newest(run: Path) -> Path | None:
    found = sorted((run / "checkpoints").glob("step-*/" + STATE)) if (run / "checkpoints").is_dir() else []
    return found[-1].parent if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def load_tensors(checkpoint: Path, policy: Policy, state: Mapping[str, Any]) -> None:
    saved = Saved(checkpoint, state.get("parts", {}))
    torch.set_rng_state(saved["random/torch"])
    policy.load(saved)
    version, numbers, gauss = state["random"]["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["random"]["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


def seed_generators(seed: int) -> None:
    """The global generators at the start of a run, so that equal seeds are equal runs whatever came before."""
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
    """Of the global generators. BridgeLM draws from none of them; a user's reward function may."""
    name, keys, *rest = np.random.get_state()
    return {"python": list(random.getstate()), "numpy": [name, np.asarray(keys).tolist(), *rest]}


def save_model(policy: Policy, chat: Chat, folder: Path) -> None:
    """The merged live model as a plain Hugging Face folder, swapped in as a whole. It stops where training stopped."""
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
    except ValueError:  # as some models come: sampling settings without sampling, which transformers will not save
        settings.temperature = settings.top_p = settings.top_k = None
    model.save_pretrained(draft)
    chat.tokenizer.save_pretrained(draft)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def model_folder(run: Path, which: str) -> Path:
    folder = run / which
    if which not in ("final", "best"):
        raise UserError(f"which = {which!r}: choose 'final' or 'best'")
    if not (folder / "config.json").exists():
        raise UserError(f"{run}: there is no {which} model yet; finish the run with `bridgelm train --resume {run}`")
    return folder


def export(run_path: str | Path, out: str | Path, which: str = "final") -> Path:
    """A plain merged model folder with tokenizer, chat template, generation config and a model card."""
    run, out = Path(run_path), Path(out)
    if not (run / "config.json").exists():
        raise UserError(f"{run}: not a run folder (no config.json)")
    source = model_folder(run, which)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; choose another folder")
    shutil.copytree(source, out, dirs_exist_ok=True)
    (out / "README.md").write_text(_card(run, which), encoding="utf-8")
    return out


def _card(run: Path, which: str) -> str:
    config = read_json(run / "config.json") or {}
    info, result = read_json(run / "run.json") or {}, (read_json(run / "result.json") or {}).get(which, {})
    base, method = config["model"]["name_or_path"], config["method"]["name"]
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

- Training data: `{config['data']['train']}`; test accuracy: {accuracy}
- BridgeLM {info.get('bridgelm', '?')}, commit {info.get('commit') or 'unknown'}; torch {info.get('torch', '?')},
  transformers {info.get('transformers', '?')}

```json
{json.dumps(config['method'], indent=2)}
```
"""
