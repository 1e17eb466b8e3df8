"""The embedded task: three families of small puzzles with exact verifiers, a tiny base model and a tiny teacher.

No torch at import time. `load` gives the data of a run, `grade` is the reward, `model_path("base")` a Hugging Face
folder. `hops` and `jugs` are for use; `knights` is held out (see `HELD_OUT`).
"""

from __future__ import annotations

from pathlib import Path

from bridgelm.data.toy.data import FAMILIES, HELD_OUT, TIERS, grade, load, problems

__all__ = ["FAMILIES", "HELD_OUT", "TIERS", "grade", "load", "model_path", "problems"]


def model_path(kind: str) -> Path:
    """Folder of a shipped model, "base" or "teacher"."""
    folder = Path(__file__).parent / "models" / kind
    if not folder.is_dir():
        raise ValueError(f"no shipped toy model {kind!r}: choose base or teacher")
    return folder
