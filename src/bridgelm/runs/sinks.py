"""Copies metrics to TensorBoard, Weights & Biases or trackio, which are imported only if `log.sinks` names them."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bridgelm.errors import UserError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Sink(ABC):
    """Takes every event of metrics.jsonl."""

    @abstractmethod
    def log(self, event: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


def check_sinks(names: Sequence[str]) -> None:
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(f"log.sinks: {name!r} is not installed; `pip install {PACKAGES[name]}`, or leave it out")


def open_sinks(names: Sequence[str], path: Path, config: Mapping[str, Any], step: int) -> list[Sink]:
    """`step` is that of the first event to come: where a resumed run's earlier points are overwritten."""
    classes = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
    return [classes[name](path, config, step) for name in names]


def scalars(event: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a step or eval event under the names that a sink shows: train/reward, validation/accuracy."""
    kind = event.get("event")
    group = "train" if kind == "step" else str(event.get("split", kind))
    return {name if "/" in name else f"{group}/{name}": value for name, value in event.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)}


class TensorBoard(Sink):
    def __init__(self, path: Path, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(path / "tensorboard"), purge_step=step or None)

    def log(self, event: Mapping[str, Any]) -> None:
        if event.get("event") == "warning":
            self.writer.add_text("warnings", str(event.get("text")), event.get("step"))
            return
        for name, value in scalars(event).items():
            self.writer.add_scalar(name, value, event.get("step"))

    def close(self) -> None:
        self.writer.close()


class Wandb(Sink):
    def __init__(self, path: Path, config: Mapping[str, Any], step: int) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.run = wandb.init(project="bridgelm", name=path.name, dir=str(path), config=dict(config))
        # A step of our own: W&B's refuses to go back, which a resumed run does, and an eval shares its step's number.
        self.run.define_metric("*", step_metric="step")

    def log(self, event: Mapping[str, Any]) -> None:
        self.run.log({**scalars(event), "step": event.get("step")})

    def close(self) -> None:
        self.run.finish()


class Trackio(Sink):
    def __init__(self, path: Path, config: Mapping[str, Any], step: int) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self.module = trackio
        trackio.init(project="bridgelm", name=path.name, config=dict(config), resume="allow")

    def log(self, event: Mapping[str, Any]) -> None:
        self.module.log(scalars(event), step=event.get("step"))

    def close(self) -> None:
        self.module.finish()
