"""The cache on disk of the teacher's log-probs of demonstrations, which no update of the policy changes.

Each step writes what it had to compute as one safetensors file, which is renamed into place and so is whole or absent.
A resumed run drops the files of later steps and computes them again, as an uninterrupted run would.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bridgelm.config.run_config import ModelConfig
from bridgelm.data.model_shapes import model_path

PIECE = 2**16  # bytes that are read at each place of a weight file


class Cache:
    """Arrays by key, in a folder or, without one, in memory."""

    def __init__(self, folder: Path | None, step: int = 0) -> None:
        self.folder, self.memory = folder, dict[str, np.ndarray]()
        self.where: dict[str, Path] = {}
        self.written = 0
        paths = sorted(folder.glob("*.safetensors")) if folder else ()
        for path in (path for path in paths if re.fullmatch(r"\d+-\d+", path.stem)):
            keys = _keys(path) if int(path.stem.partition("-")[0]) < step else None
            if keys is None:
                path.unlink()
            else:
                self.where |= dict.fromkeys(keys, path)

    def get(self, keys: list[str]) -> dict[str, np.ndarray]:
        found = {key: self.memory[key] for key in keys if key in self.memory}
        files: dict[Path, set[str]] = {}
        for key in keys:
            if key in self.where:
                files.setdefault(self.where[key], set()).add(key)
        for path, wanted in files.items():
            with safe_open(path, "numpy") as file:
                found |= {key: file.get_tensor(key) for key in wanted}
        return found

    def put(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        if self.folder is None:
            self.memory |= arrays
            return
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{step:06d}-{self.written}.safetensors"
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        self.written += 1
        save_file(dict(arrays), draft)
        draft.replace(path)
        self.where |= dict.fromkeys(arrays, path)


def _keys(path: Path) -> list[str] | None:
    """The keys in a file; None if it is incomplete, which safetensors tells from the length in its header."""
    try:
        with safe_open(path, "numpy") as file:
            return list(file.keys())
    except (SafetensorError, OSError):
        return None


def key_of(model: str, ids: np.ndarray, taught: np.ndarray, temperature: float) -> str:
    parts = (model.encode(), ids.astype("<i8").tobytes(), np.packbits(taught).tobytes(), repr(temperature).encode())
    return hashlib.sha256(b"|".join(parts)).hexdigest()[:32]


def fingerprint(model: ModelConfig) -> str:
    """Identifies the weights of a model without reading all of them: by the commit of a model of the hub, and for a
    folder by its configuration and, for each weight file, its size and pieces from all over it."""
    path = Path(model_path(model.name_or_path, model.section))
    found = hashlib.sha256(f"{model.name_or_path}|{model.revision}|{model.dtype}".encode())
    if not path.is_dir():
        from transformers.utils.hub import cached_file

        file = cached_file(str(path), "config.json", revision=model.revision)
        return f"{model.name_or_path}@{Path(str(file)).parent.name}|{model.dtype}"
    for file in sorted([path / "config.json", *path.glob("*.safetensors")]):
        size = file.stat().st_size
        found.update(f"{file.name}:{size}".encode())
        with file.open("rb") as handle:
            for place in (0, size // 3, 2 * size // 3, size - PIECE):
                handle.seek(max(0, place))
                found.update(handle.read(PIECE))
    return found.hexdigest()
