"""Rollout engines: prompts in, completions with raw and sampling log-probabilities out."""

from bridgelm.engine.native import Engine, Request, Sampling

__all__ = ["Engine", "Request", "Sampling"]
