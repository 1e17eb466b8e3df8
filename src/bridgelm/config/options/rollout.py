"""How answers are drawn, and by which engine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from bridgelm.config.options.base import Rate, Strict
from bridgelm.config.plugins import or_own

Count = Annotated[int, Field(ge=1)]


class VllmOptions(Strict):
    """Settings of `engine = "vllm"` in this process; a server has its own."""

    memory: Annotated[float, Field(gt=0, lt=1)] = 0.4  # share of the device's memory, for its weights and its cache
    max_length: Count | None = None  # prompt and answer; default: data.max_prompt_tokens and the longer of the limits
    eager: bool = False  # no CUDA graphs: starts sooner, decodes slower
    sleep: bool = True  # on a GPU: hands its memory to the trainer while that computes gradients


class RolloutConfig(Strict):
    prompts: Count = 32
    group: Annotated[int, Field(ge=2)] = 8
    max_new_tokens: Count = 512
    temperature: Rate = 1.0
    stop: list[str] = Field(default_factory=list)
    engine: Annotated[Literal["native", "vllm"], *or_own("engine", "generate")] = "native"  # docs/engines.md
    server: str | None = None  # http://host:port of a vLLM server; without it vLLM runs in this process
    # Seconds in which no answer comes, after which a server counts as hanging; 0.1 s a token of the longest answer or
    # 1 s per 50 MB of weights come on top.
    server_timeout: Annotated[float, Field(gt=0)] = 600.0
    server_retries: Annotated[int, Field(ge=0)] = 6  # after 1, 2, 4, ... s, where it is busy or out of reach
    vllm: VllmOptions = VllmOptions()
    # Where the engine's log-probs are not the trainer's own, a token's weight is multiplied with
    # min(correction, p_trainer / p_engine); 2 is that of Yao et al. 2025. 0: no correction.
    correction: Annotated[float, Field(ge=0)] = 2.0
    mismatch_warning: Rate = 0.01  # KL(engine || trainer) a token, in nats, from which on a run warns
    ahead: bool = False  # ask for a step's answers before the update of the step before: docs/engines.md
    max_rows: Count = 512  # decoded at once by the native engine
    updates: Count = 1  # optimiser steps a rollout batch is split into
    refill: Annotated[int, Field(ge=0)] = 0  # dynamic sampling: further draws to replace groups without spread
    mask_overlong: bool = False  # leave completions that hit the limit out of the loss

    @model_validator(mode="after")
    def _refills_are_further_draws(self) -> RolloutConfig:
        if self.ahead and self.refill:
            raise ValueError("ahead: refills depend on the answers before them; set rollout.refill = 0, or "
                             "rollout.ahead = false")
        return self

    @model_validator(mode="after")
    def _a_server_is_vllms(self) -> RolloutConfig:
        if self.server is not None and self.engine != "vllm":
            raise ValueError("server: it is a vLLM server; set rollout.engine = 'vllm', or leave it out")
        return self
