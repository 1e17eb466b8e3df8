"""Shared by all tests: one thread, the tiny world on the path, tiny models made once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `import tiny`, whatever folder a test lies in


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a tiny model of a kind ("qwen2", "llama", ...), made when first asked for."""
    from tiny import save_model

    made: dict[str, Path] = {}

    def folder(kind: str = "qwen2") -> Path:
        if kind not in made:
            from transformers.utils import logging

            logging.disable_progress_bar()
            made[kind] = save_model(tmp_path_factory.mktemp(kind), kind)
        return made[kind]
    return folder


@pytest.fixture
def raw(tmp_path: Path, tiny_folder: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """A tiny run as a nested dict: `raw(method, **sections)`. Sections given are laid over the tiny world's own."""
    from tiny import raw_config

    def make(method: dict[str, Any] | str = "grpo", folder: Path | None = None, **changes: Any) -> dict[str, Any]:
        made = raw_config(folder or tmp_path, {"name": method} if isinstance(method, str) else method, tiny_folder())
        for key, value in changes.items():
            if key == "teacher" and value["name_or_path"] in ("qwen2", "llama"):  # a kind of tiny model
                value = {**value, "name_or_path": str(tiny_folder(value["name_or_path"]))}
            made[key] = {**made.get(key, {}), **value} if isinstance(value, dict) and key != "method" else value
        return made
    return make


@pytest.fixture
def session(raw: Callable[..., dict[str, Any]]) -> Iterator[Callable[..., Any]]:
    """Opens training sessions and closes their folders afterwards."""
    from bridgelm.config.run_config import make_config
    from tiny import open_session

    opened: list[Any] = []

    def make(method: dict[str, Any] | str = "grpo", exact: bool = True, **changes: Any) -> Any:
        config = make_config(raw(method, **{"name": f"run{len(opened)}", **changes}))
        opened.append(open_session(config, exact))
        return opened[-1]
    yield make
    for one in opened:
        one.folder.close()
        one.roll.grader.close()
