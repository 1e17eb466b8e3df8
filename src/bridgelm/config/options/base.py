"""What options are made of."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


class Strict(BaseModel):
    """No unknown keys, no silent conversions, no later changes."""

    no_refill: ClassVar[str] = ""  # of a method's options: why `rollout.refill` would spoil it
    # Of a method's options: whether it changes LoRA's frozen base, which an older reference is measured from.
    moves_base: ClassVar[bool] = False

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    @property
    def other_passes(self) -> float:
        """How many training passes a method's step takes over its rollouts at other points than the live one."""
        return 0.0


class PolicyGradient(Strict):
    """The RL term. Defaults: DAPO's clip range, token mean, no std and no KL (the repaired recipe of 2604.23747)."""

    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Rate = 0.28
    kl_coef: Annotated[float, Field(ge=0)] = 0.0  # > 0 keeps a frozen copy of the start as reference (k3 estimator)
    std: bool = False  # divide advantages by the group's own standard deviation (GRPO) or not (Dr. GRPO)
    aggregate: Literal["token", "row", "constant"] = "token"  # DAPO / GRPO as published / Dr. GRPO


class LowRank(Strict):
    """w is a low-rank term on the weights of theta."""

    rl: PolicyGradient = PolicyGradient()
    lam: Share = Field(default=0.5, alias="lambda")  # the paper's
    beta: Rate | None = None  # rate of w; default: the rate of theta (docs/bridge.md)
    rank: Annotated[int, Field(ge=1)] = 16  # the paper's
    alpha: Rate = 16.0  # the paper's; w enters as theta + (alpha / rank) B A
    modules: str = ""  # regular expression of the linear layers that carry w; empty: all of them


class Shadowed(LowRank):
    """A shadow that learns from the joint policy's rollouts, corrected by token ratios."""

    moves_base: ClassVar[bool] = True  # its w is merged into it
    ratio: Literal["taper",  # 1 for rewarded tokens, min(ratio, 1) for others: a stray shadow comes back (2503.14286)
                   "truncate"] = "taper"  # min(ratio, ratio_cap): the gradient of J_RL up to the cap
    probe_every: Annotated[int, Field(ge=0)] = 0  # every so many steps sample the shadow: the honest gain
    ratio_cap: Rate = 2.0  # of `truncate`: truncation of the shadow's token ratio
    shadow_every: Annotated[int, Field(ge=1)] = 1  # steps between the shadow's; w uses its last gradient in between

    @property
    def other_passes(self) -> float:
        return 1 / self.shadow_every
