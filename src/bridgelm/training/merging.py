"""`bridgelm merge`: averages the weights of two models, (1 - weight) A + weight B, into a plain Hugging Face folder.

Merging a run of SFT with one of RL is the merging arm of the synergy study (arXiv 2507.07562). Merging half and half
the model before and after SFT undoes some of an SFT that went too far (arXiv 2606.09932). Nothing is trained and no
model is opened: tensors are read from their files one by one and averaged in float64.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bridgelm.config import plugins
from bridgelm.config.run_config import ModelConfig
from bridgelm.data.chat import load_tokenizer
from bridgelm.data.model_files import INDEX, check_finite, check_index
from bridgelm.data.model_shapes import model_path
from bridgelm.errors import UserError
from bridgelm.runs.folder import read_json, write_json
from bridgelm.training.checkpoint import model_folder

RECORD = "merged.json"
# Keys of config.json that say how a model was saved, not what it computes.
SAVING = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache", "eos_token_id",
          "pad_token_id", "bos_token_id"}


def merge(one: str | Path, other: str | Path, out: str | Path, weight: float = 0.5, which: str = "final") -> Path:
    """Writes (1 - weight) `one` + weight `other`; each is a run (`which`: final or best) or a model folder. All files
    but the weights are copied from `one`, and `merged.json` records what was merged."""
    if not 0 <= weight <= 1:
        raise UserError(f"merge: weight = {weight:g} is not between 0 and 1; 0 is the first model and 1 the second")
    out = Path(out)
    _is_free(out)
    folders = [_folder(str(source), which) for source in (one, other)]
    _same_architecture(*folders)
    _same_tokenizer(*folders)
    files = _files(folders[0]), _files(folders[1])
    with ExitStack() as stack:
        opened = [{str(file): stack.enter_context(safe_open(file, "pt")) for file in set(found.values())}
                  for found in files]
        _same_shapes(files, opened, folders)
        out.parent.mkdir(parents=True, exist_ok=True)
        # The draft has a temporary folder of its own, which is removed whatever happens.
        draft = Path(stack.enter_context(TemporaryDirectory(prefix=f".{out.name}-draft", dir=out.parent))) / "model"
        shutil.copytree(folders[0], draft, ignore=shutil.ignore_patterns("*.safetensors", "README.md", RECORD))
        dtypes: set[torch.dtype] = set()
        for file in sorted(set(files[0].values())):
            merged = {name: _mixed(name, files, opened, weight) for name, home in files[0].items() if home == file}
            dtypes |= {t.dtype for t in merged.values() if t.is_floating_point()}
            save_file(merged, draft / file.name, metadata={"format": "pt"})
        _settle(draft, dtypes)
        _record(draft, out.name, (str(one), str(other)), folders, weight)
        _is_free(out)
        if out.exists():
            shutil.copytree(draft, out, dirs_exist_ok=True)
        else:
            draft.rename(out)
    return out


def _is_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; choose another folder")


def _mixed(name: str, files: tuple[dict[str, Path], dict[str, Path]], opened: list[dict[str, Any]],
           weight: float) -> Tensor:
    """One merged tensor. Weights 0 and 1 copy exactly; between them it is rounded once, to the wider of the two
    dtypes."""
    a, b = (where[str(found[name])].get_tensor(name) for found, where in zip(files, opened, strict=True))
    for found, t in zip(files, (a, b), strict=True):
        check_finite([(name, t)], f"merge: {found[name]}")
    if not a.is_floating_point():
        return a
    kind = torch.promote_types(a.dtype, b.dtype)
    if weight in (0.0, 1.0):
        return (b if weight else a).to(kind)
    return ((1 - weight) * a.double() + weight * b.double()).to(kind)


def _folder(source: str, which: str) -> Path:
    """The folder that holds the weights of a run or a model."""
    path = Path(model_path(source))
    if (path / "run.json").exists():
        return model_folder(path, which)
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise UserError(f"{source}: neither a run nor a model folder with config.json and *.safetensors; download a "
                        "model of a hub first, and give its folder")
    check_index(path)
    return path


def _files(folder: Path) -> dict[str, Path]:
    """Maps the name of each tensor to the file that holds it."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as handle:
            found |= dict.fromkeys(handle.keys(), path)
    return found


def _same_architecture(one: Path, other: Path) -> None:
    from transformers import AutoConfig  # AutoConfig brings config.json of older versions into one form

    first, second = (AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict() for folder in (one, other))
    for key in sorted({*first, *second} - SAVING):
        if first.get(key) != second.get(key):
            raise UserError(f"merge: {one} and {other} are of different architectures: {key} is {first.get(key)!r} in "
                            f"one and {second.get(key)!r} in the other; merge models that began as the same one")


def _same_tokenizer(one: Path, other: Path) -> None:
    first, second = (load_tokenizer(ModelConfig(name_or_path=str(folder))).get_vocab() for folder in (one, other))
    if first != second:
        words = sorted({word for word in {*first, *second} if first.get(word) != second.get(word)})
        raise UserError(f"merge: {one} and {other} have different tokenizers: {len(words)} tokens, {words[0]!r} among "
                        "them, have other numbers; a weight of one would stand for another token of the other")


def _same_shapes(files: tuple[dict[str, Path], dict[str, Path]], opened: list[dict[str, Any]],
                 folders: list[Path]) -> None:
    for name in sorted({*files[0], *files[1]}):
        shapes = [tuple(where[str(found[name])].get_slice(name).get_shape()) if name in found else None
                  for found, where in zip(files, opened, strict=True)]
        if shapes[0] != shapes[1]:
            said = [f"{shape} in {folder}" if shape else f"missing in {folder}"
                    for shape, folder in zip(shapes, folders, strict=True)]
            raise UserError(f"merge: the weight {name} is {' and '.join(said)}; merge models of one architecture")


def _settle(draft: Path, dtypes: set[torch.dtype]) -> None:
    """Updates config.json and the index to the merged weights."""
    config = read_json(draft / "config.json") or {}
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if len(dtypes) == 1:
        write_json(draft / "config.json", {**config, key: str(next(iter(dtypes))).removeprefix("torch.")})
    if (draft / INDEX).exists():
        index = read_json(draft / INDEX) or {}
        size = 0
        for path in draft.glob("*.safetensors"):
            with safe_open(path, "pt") as handle:
                size += sum(t.numel() * t.element_size() for t in map(handle.get_tensor, handle.keys()))
        write_json(draft / INDEX, {**index, "metadata": {**index.get("metadata", {}), "total_size": size}})


def _record(draft: Path, name: str, sources: tuple[str, str], folders: list[Path], weight: float) -> None:
    from bridgelm import __version__

    parts = [{"source": source, "folder": str(folder.absolute()), "weight": share, **_origin(folder)}
             for source, folder, share in zip(sources, folders, (1 - weight, weight), strict=True)]
    write_json(draft / RECORD, {"bridgelm": __version__, "parts": parts})
    made = [f", {part['method']}, {part['steps']} steps, seed {part['seed']}" if "method" in part else ""
            for part in parts]
    lines = "\n".join(f"- {part['weight']:g} x `{part['source']}`{how}" for part, how in zip(parts, made, strict=True))
    (draft / "README.md").write_text(
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [bridgelm, merge]\n---\n\n# {name}\n\n"
        f"Weights of two models in one, by BridgeLM {__version__}; files other than the weights are those of the "
        f"first.\n\n{lines}\n", encoding="utf-8")


def _origin(folder: Path) -> Mapping[str, Any]:
    """The configuration of the run that a model is from, or the record of an earlier merge."""
    run = folder.parent / "config.json"
    if (folder.parent / "run.json").exists() and run.exists():
        config = read_json(run) or {}
        return {"base": config["model"]["name_or_path"], "method": plugins.short(config["method"]["name"]),
                "steps": config["steps"], "seed": config["seed"]}
    return {"merged": json.loads((folder / RECORD).read_text())["parts"]} if (folder / RECORD).exists() else {}
