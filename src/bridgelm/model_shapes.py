"""The configuration of a model without its weights: a folder's, a table's of common models, or the hub's."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from bridgelm.chat import model_path
from bridgelm.config import ModelConfig
from bridgelm.errors import UserError


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


@cache
def shapes() -> dict[str, tuple[str, dict[str, Any]]]:
    raw = tomllib.loads(Path(__file__).with_name("model_shapes.toml").read_text(encoding="utf-8"))
    return {name: (kind, sizes) for kind, models in raw.items() for name, sizes in models.items()}
