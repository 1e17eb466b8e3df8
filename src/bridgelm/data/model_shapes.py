"""Finds the config.json of a model without its weights: in a folder, a table of common models, or on the hub."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bridgelm.config.run_config import ModelConfig
from bridgelm.errors import UserError

TOY = "toy:"


def model_path(name: str, section: str = "model") -> str:
    """A model's folder or hub name; `toy:base` and `toy:teacher` are the folders that travel in the package."""
    if not name.startswith(TOY):
        return str(Path(name).expanduser()) if name.startswith("~") else name
    from bridgelm.data import toy

    try:
        return str(toy.model_path(name.removeprefix(TOY)))
    except ValueError as error:
        raise UserError(f"{section}.name_or_path: {name!r}: {error}") from None


def model_config(model: ModelConfig) -> Any:
    from transformers import AutoConfig

    path = model_path(model.name_or_path, model.section)
    if not Path(path).is_dir() and path in shapes():
        kind, sizes = shapes()[path]
        return AutoConfig.for_model(kind, max_position_embeddings=32768, **sizes)
    try:
        return AutoConfig.from_pretrained(path, revision=model.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{model.section}.name_or_path: no config.json of {path!r} ({reason}); give a folder, or one "
                        f"of {', '.join(shapes())}") from None


def sizes_of(model: ModelConfig) -> dict[str, Any]:
    """What config.json says of the part that reads text, without torch where the model is a folder; nothing of a
    folder that has a tokenizer alone."""
    folder = Path(model_path(model.name_or_path, model.section))
    if not folder.is_dir():
        return model_config(model).get_text_config(decoder=True).to_dict()
    raw = read_object(folder / "config.json", model.section)
    return raw | raw.get("text_config", {})


def read_object(path: Path, section: str = "model") -> dict[str, Any]:
    """A JSON file of a model's folder; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{section}.name_or_path: {path} cannot be read ({error}); copy the file again") from None
    if not isinstance(found, dict):
        raise UserError(f"{section}.name_or_path: {path} holds no JSON object; copy the file again")
    return found


@dataclass(frozen=True)
class Positions:
    """How long a row of a model may be."""

    count: int
    model: ModelConfig

    @classmethod
    def of(cls, model: ModelConfig) -> Positions | None:
        """The limit on positions; None where there is none."""
        sizes = sizes_of(model)
        count = sizes.get("max_position_embeddings") or sizes.get("n_positions")
        return None if count is None else cls(count, model)

    @property
    def end(self) -> bool:
        return table_of_positions(model_config(self.model)) is not None


def table_of_positions(config: Any) -> int | None:
    """The length of a table with nothing behind its last row; None where positions are angles, or distances."""
    text = config.get_text_config(decoder=True)
    rotary = getattr(text, "rope_parameters", None) is not None
    return None if rotary else getattr(text, "max_position_embeddings", None)


@cache
def shapes() -> dict[str, tuple[str, dict[str, Any]]]:
    raw = tomllib.loads(Path(__file__).with_name("model_shapes.toml").read_text(encoding="utf-8"))
    return {name: (kind, sizes) for kind, models in raw.items() for name, sizes in models.items()}
