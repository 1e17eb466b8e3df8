"""Checks that a model's weights all come from its files and are finite; missing ones would be random."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bridgelm.data.model_shapes import read_object
from bridgelm.errors import UserError

INDEX = "model.safetensors.index.json"
NAMED = 3  # the most tensors that a message names


def check_index(folder: Path, section: str = "model") -> None:
    """An index names the files that are read; only those of its own folder are the model's."""
    for name, file in read_object(folder / INDEX, section).get("weight_map", {}).items():
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise UserError(f"{section}.name_or_path: {folder / INDEX} looks for {name} in {file!r}, outside the "
                            "model's folder; put all files of the model into its folder and name them alone")


def check_loaded(model: Any, info: dict[str, Any], path: str, section: str = "model") -> None:
    """What transformers reports of the keys (`output_loading_info`), without those that are rightly absent: weights
    that are tied, and what the model's class says to ignore. Older files hold buffers that are computed nowadays."""
    computed = {name for name, _ in model.named_buffers()}
    prefix = f"{model.base_model_prefix}."
    spare = {key for key in info["unexpected_keys"] if key not in computed and prefix + key not in computed}
    shapes = [f"{name} ({tuple(theirs)} in the file, {tuple(ours)} in the model)"
              for name, theirs, ours in sorted(info["mismatched_keys"])]
    found = {"missing": sorted(info["missing_keys"]), "of another shape": shapes, "unknown to the model": sorted(spare)}
    wrong = [f"{len(names)} {what} ({few(names)})" for what, names in found.items() if names]
    if wrong:
        raise UserError(f"{section}.name_or_path: the weights of {path!r} are not those of a "
                        f"{type(model).__name__}: {', '.join(wrong)}; save them anew under the names and shapes that "
                        "config.json stands for")


def check_finite(named: Iterable[tuple[str, Any]], place: str) -> None:
    bad = [name for name, t in named
           if t.is_floating_point() and t.numel() and not all(bool(end.isfinite()) for end in t.detach().aminmax())]
    if bad:
        raise UserError(f"{place}: {len(bad)} weights are not finite ({few(bad)}); take a checkpoint from before "
                        "they grew without bound, or copy the files again")


def few(names: list[str]) -> str:
    more = ["..."] if len(names) > NAMED else []
    return ", ".join([*names[:NAMED], *more])
