"""The training methods, one file each, imported when a run names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bridgelm.config import plugins

if TYPE_CHECKING:
    from bridgelm.config.run_config import RunConfig
    from bridgelm.methods.base import Method

    METHODS: dict[str, type[Method[Any]]]

__all__ = ["METHODS", "Method", "build"]


def build(options: Any, run: RunConfig) -> Method[Any]:
    """The method that options belong to: one of ours, or one's own (docs/own-method.md)."""
    return plugins.load_method(options.name)(options, run)


def __getattr__(name: str) -> Any:
    """`METHODS`, all of ours by name, and `Method` are there for whoever asks."""
    if name == "METHODS":
        globals()[name] = {key: plugins.load_method(key) for key in plugins.ours()}
    elif name == "Method":
        from bridgelm.methods.base import Method

        globals()[name] = Method
    else:
        raise AttributeError(f"module 'bridgelm.methods' has no attribute {name!r}")
    return globals()[name]
