"""Rollout engines: prompts in, completions with raw and sampling log-probabilities out."""

from bridgelm.engine.base import Engine, Origin, Request, Sampling
from bridgelm.engine.native import NativeEngine

__all__ = ["Engine", "NativeEngine", "Origin", "Request", "Sampling"]
