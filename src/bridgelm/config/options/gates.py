"""Methods that turn from RL to a demonstration, or to a part of one, where the policy fails."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from bridgelm.config.options.base import PolicyGradient, Rate, Share, Strict, Weight

Coefficients = Annotated[list[Weight], Field(min_length=3, max_length=3)]
# (own RL, RL on the demonstration, SFT) at 0 .. 8 of 8 rollouts solved: HPT's official code, but for the row of 0,
# which our notes leave out; the hard gate's stands there.
SOFT = [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.125, 0.5, 0.5], [0.25, 1.0, 0.25], [0.5, 0.5, 0.125], [1.0, 0.25, 0.0],
        [1.0, 0.125, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]


class HptOptions(Strict):
    """RL on problems that the policy can solve, SFT on those that it cannot. `gate = "rate"`, `gamma = 0` and
    `demos = "all"` is SuperRL."""

    name: Literal["hpt"] = "hpt"
    rl: PolicyGradient = PolicyGradient()
    gate: Literal["rate", "advantage", "soft"] = "rate"  # HPT, SuperRL's variant, HPT's table
    gamma: float = 0.0  # SFT where the mean reward is not above it: 0 (Qwen), .25 (Llama) in HPT's code; < 0: never
    sft: Weight = 1.0  # coefficient of SFT: HPT's code; .3 there for Qwen2.5-Math-1.5B
    balance: Literal["prompts", "terms"] = "prompts"  # prompts: each has one vote, as in both papers' equations
    demos: Literal["one", "all"] = "one"  # of a problem: one in HPT, all of them in SuperRL
    table: Annotated[list[Coefficients], Field(min_length=2)] | None = None  # of `soft`; default: that of HPT's code
    shape: Rate = 0.1  # of `soft`: the demonstration's RL term is A p / (p + shape), as in LUFFY

    @model_validator(mode="after")
    def _each_gate_has_its_own_keys(self) -> HptOptions:
        if self.gate != "rate" and self.gamma != 0:
            raise ValueError(f"gamma is the threshold of gate = 'rate'; leave it out with gate = {self.gate!r}")
        if self.gate != "soft" and (self.table is not None or self.shape != 0.1):
            raise ValueError("table and shape are of gate = 'soft'; set that, or leave them out")
        if self.gate == "soft" and self.demos == "all":
            raise ValueError("gate = 'soft' puts one demonstration into the group; set demos = 'one'")
        return self


class ReliftOptions(Strict):
    """RL with SFT in between on failed problems."""

    name: Literal["relift"] = "relift"
    rl: PolicyGradient = PolicyGradient()
    size: Annotated[int, Field(ge=1)] | None = None  # of an SFT batch; default: batch.demos. The official code has 128
    sft_lr: Rate | None = None  # default: the main rate, as in the official code
    pass_rate: Share = 0.0  # up to which a problem counts as failed: the paper's none of eight


class UftOptions(Strict):
    """RL from a hint, the first part of a demonstration, that becomes shorter over the run."""

    name: Literal["uft"] = "uft"
    no_refill: ClassVar[str] = "it draws a hint for each problem, and replacing flat groups would choose among hints"
    rl: PolicyGradient = PolicyGradient()  # the official code has clip_high .2, kl_coef .001 and divides by the std
    pieces: Annotated[int, Field(ge=1)] = 5  # that a demonstration is cut into, at most: official code
    high: Share = 0.95  # chance that a piece is shown, at the start: official code
    low: Share = 0.05  # and at the end of the schedule
    until: Share = 0.6  # share of the run's steps with hints: 300 of 500 in the official code
    hint: Weight = 0.001  # weight of the log-likelihood of hint tokens: official code

    @model_validator(mode="after")
    def _hints_become_shorter(self) -> UftOptions:
        if self.low > self.high:
            raise ValueError("low is above high, so that hints would become longer; swap them")
        return self


class PrefixRftOptions(Strict):
    """One rollout of each group continues the first part of a demonstration, and is trained on both parts."""

    name: Literal["prefix_rft"] = "prefix_rft"
    no_refill: ClassVar[str] = "it has a hybrid in each group, and groups are judged without it"
    rl: PolicyGradient = PolicyGradient()  # the official code has clip_high .2
    hybrids: Annotated[int, Field(ge=1)] = 1  # rollouts of a group that continue one prefix: official code
    low_start: Share = 0.95  # the shortest prefix, as a share of the demonstration, at the start: notes on the code
    low_end: Share = 0.05  # and at the end of the run, along a cosine
    high: Share = 0.95  # the longest one
    cut: Annotated[float, Field(ge=0, lt=1)] = 0.8  # share of prefix tokens, those of least entropy, without weight
    continuation: Literal["raw", "zero"] = "raw"  # advantage of a single hybrid's own tokens: its reward; 0 is `_v2`

    @model_validator(mode="after")
    def _lengths_are_in_order(self) -> PrefixRftOptions:
        if max(self.low_start, self.low_end) > self.high:
            raise ValueError("low_start and low_end are shares of a demonstration that must not be above high")
        return self


class BreadOptions(Strict):
    """GRPO, and for problems without a success rollouts from the shortest prefix that brings some."""

    name: Literal["bread"] = "bread"
    no_refill: ClassVar[str] = "it has a use for groups that fail, which refills replace"
    rl: PolicyGradient = PolicyGradient()
    episodes: Annotated[int, Field(ge=2)] = 10  # that a demonstration is cut into, at most: the paper's K, from notes
    low: Share = 0.1  # ours, not recoverable: the success rates that a group from a prefix should have; between these
    high: Share = 0.9  # two a group of eight has one to seven successes, so that it has something to teach
    reuse: bool = True  # ours: train on the group that the search found; off: on a new one from the same prefix

    @model_validator(mode="after")
    def _a_range(self) -> BreadOptions:
        if self.low > self.high:
            raise ValueError("low is above high, and no success rate lies between; swap them")
        return self
