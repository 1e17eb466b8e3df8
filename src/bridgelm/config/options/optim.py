"""The table [optim]."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bridgelm.config.options.base import Rate, Share, Strict

NO_LIBRARY = "optim.kind = 'adamw8bit' needs bitsandbytes: pip install 'bridgelm[8bit]'"
Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Strict):
    kind: Literal["adamw", "adamw8bit", "sgd"] = "adamw"  # adamw8bit: both moments in eight bits, by bitsandbytes
    lr: Rate = 1e-6
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] = Field(default=[0.9, 0.999])
    eps: Rate = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Rate | None = 1.0  # largest global gradient norm; null in JSON or a huge value: no clipping
    warmup: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final: Share = 0.1  # where linear and cosine schedules end, as a share of lr
    shadow: Literal["float32", "bfloat16"] = "float32"  # of a shadow and its momentum; bfloat16: rounded stochastically
    # What lies in host memory, and is moved tensor by tensor when it is used: a shadow and its momentum, the moments
    # of the other optimisers, a gradient of theta that waits for the next one, theta in float32.
    host: list[Literal["shadow", "moments", "gradients", "masters"]] = Field(default_factory=list)

    @property
    def adam(self) -> bool:
        return self.kind != "sgd"
