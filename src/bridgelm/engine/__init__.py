"""Rollout engines: prompts in, completions with raw and sampling log-probabilities out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bridgelm import dist
from bridgelm.config import plugins
from bridgelm.engine.base import Caller, Engine, Lost, Origin, Request, Sampling
from bridgelm.engine.native import NativeEngine

if TYPE_CHECKING:
    from bridgelm.config.run_config import RunConfig
    from bridgelm.data.chat import Chat

__all__ = ["Caller", "Engine", "Lost", "NativeEngine", "Origin", "Request", "Sampling", "open_engine"]


def open_engine(config: RunConfig, chat: Chat, exchange: Path, caller: Caller) -> Engine:
    """The engine of a run. `exchange`: a folder for weights on their way to another program."""
    if dist.world() == 1:
        return _open(config, chat, exchange, caller)
    from bridgelm.engine.ranked import RankedEngine

    return RankedEngine(_open(config, chat, exchange, caller), served=config.rollout.server is not None)


def _open(config: RunConfig, chat: Chat, exchange: Path, caller: Caller) -> Engine:
    if config.rollout.engine == "native":
        return NativeEngine(chat.eos_ids, chat.pad_id, chat.text, config.rollout.max_rows)
    if plugins.is_own("engine", config.rollout.engine):
        return plugins.load("engine", config.rollout.engine)(config, chat)
    from bridgelm.engine.vllm import InProcess, VllmEngine
    from bridgelm.engine.vllm_server import Server

    backend = InProcess(config) if config.rollout.server is None else Server(config, exchange, caller)
    return VllmEngine(backend, chat, bool(config.model.lora_rank))
