"""Writes weights to files for another program: whole models as several safetensors files, adapters as PEFT does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

PART = 2 * 2**30  # bytes of one file; so much is held twice while it is written


def write_weights(named: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Writes safetensors files that replace those of the last time. Tied weights are written under each of their
    names."""
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    part: dict[str, Tensor] = {}
    size = number = 0
    for name, weight in named:
        if size and size + weight.nbytes > PART:
            save_file(part, folder / f"part-{number:05d}.safetensors")
            part, size, number = {}, 0, number + 1
        # A copy even if tied, as safetensors refuses shared storage.
        part[name] = torch.empty_like(weight, device="cpu").copy_(weight.detach())
        size += weight.nbytes
    save_file(part, folder / f"part-{number:05d}.safetensors")


def clear(folder: Path) -> None:
    """Deletes the files that the functions of this module have written, and nothing else."""
    for pattern in ("part-*.safetensors", "adapter_model.safetensors", "adapter_config.json"):
        for path in folder.glob(pattern):
            path.unlink()


def write_adapter(adapter: Mapping[str, tuple[Tensor, Tensor]], rank: int, dtype: torch.dtype, folder: Path) -> None:
    """Writes one adapter of rank `rank`; matrices of lower rank are padded with zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (a, b) in adapter.items():
        missing = rank - a.shape[0]
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = pad(a, (0, 0, 0, missing)).to("cpu", dtype).contiguous()
        tensors[f"{module}.lora_B.weight"] = pad(b, (0, missing)).to("cpu", dtype).contiguous()
    modules = sorted({re.sub(r"^.*\.(\w+)\.weight$", r"\1", name) for name in adapter})
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": modules,
        "bias": "none", "inference_mode": True}))
