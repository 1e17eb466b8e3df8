"""Which answers are trained on, in what order and where in the answer: arms of the synergy study, and shapers of RL."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from bridgelm.config.options.base import PolicyGradient, Rate, Share, Strict, Weight

Number = Annotated[int, Field(ge=1)]


class InterleavedOptions(Strict):
    """The interleaved arm of the synergy study (2507.07562): RL, and SFT on what it cannot solve, in turn."""

    name: Literal["interleaved"] = "interleaved"
    no_refill: ClassVar[str] = ("it imitates where all rollouts fail, and refills replace those groups "
                               "before it sees them")
    rl: PolicyGradient = PolicyGradient()
    every: Number = 1  # an SFT step after every so many RL steps; not recoverable from the study
    optimisers: Literal["one", "two"] = "two"  # ours: as in `alternate`; ReLIFT (2506.07527) has two as well
    sft_lr: Rate | None = None  # default: the main rate

    @model_validator(mode="after")
    def _one_optimiser_has_one_rate(self) -> InterleavedOptions:
        if self.optimisers == "one" and self.sft_lr is not None:
            raise ValueError("sft_lr needs optimisers = 'two': one optimiser has one rate; leave sft_lr out")
        return self


class DataMixingOptions(Strict):
    """The data-mixing arm of the synergy study (2507.07562): SFT on demonstrations and on verified own answers."""

    name: Literal["data_mixing"] = "data_mixing"
    rl: PolicyGradient = PolicyGradient()
    own: Share = 0.5  # of the rows of SFT that are the policy's own; ours, not recoverable from the study
    buffer: Number = 512  # verified own answers that are kept, the newest; ours
    rl_weight: Weight = 0.0  # of J_RL beside SFT; the other reading: > 0 trains on the rollouts by RL as well

    @model_validator(mode="after")
    def _a_pull_needs_rl(self) -> DataMixingOptions:
        if self.rl.kl_coef > 0 and self.rl_weight == 0:
            raise ValueError("rl.kl_coef is a part of J_RL, which rl_weight = 0 leaves out; give rl_weight, or leave "
                             "rl.kl_coef out")
        return self


class Length(Strict):
    """One of the stages of `staged`."""

    length: Annotated[float, Field(gt=0, le=1)]  # of rollout.max_new_tokens
    mask_overlong: bool = False  # leave answers that hit the stage's limit out of the loss
    part: Rate = 1.0  # of the run's steps, against the parts of the others


# 8K, 16K, 24K, 32K; leaving out what was cut helps at the first two and hurts at the others.
ACE_REASON = [Length(length=0.25, mask_overlong=True), Length(length=0.5, mask_overlong=True), Length(length=0.75),
              Length(length=1.0)]


class StagedOptions(Strict):
    """The RL of AceReason 1.1 (2506.13284): growing lengths, at a temperature that is found beforehand."""

    name: Literal["staged"] = "staged"
    rl: PolicyGradient = PolicyGradient()  # the paper's: no KL, a mean over all tokens; on-policy: nothing is clipped
    lengths: Annotated[list[Length], Field(min_length=1)] = ACE_REASON
    target_entropy: Weight = 0.3  # the paper's; 0: rollout.temperature stays
    probe: Number = 64  # problems whose answers the temperature is measured on; ours
    rounds: Number = 2  # of sampling at the temperature found, and finding it again; ours


class GtaGradient(PolicyGradient):
    """GTA's: GRPO with the group's deviation and a KL term."""

    kl_coef: Annotated[float, Field(ge=0)] = 0.01  # from notes on the paper
    std: bool = True  # GRPO as published


class GtaOptions(Strict):
    """Guess, think, answer (2509.12108). The weights are the paper's; tags and format stand in its examples."""

    name: Literal["gta"] = "gta"
    rl: GtaGradient = GtaGradient()
    sft_weight: Weight = 1.0
    rl_weight: Rate = 1.0
    gate: bool = True  # RL's gradient alone where the two conflict; off: always the sum
    open: str = "<guess>"  # where the guess begins; empty, as `close`: the first tokens of the answer, without tags
    close: str = "</guess>"
    words: Annotated[int, Field(ge=0)] = 0  # of the problem's answer, from its start, that are the label; 0: all of it
    format: str = r"\s*<guess>.*</guess>\s*<think>.*</think>\s*<answer>.*</answer>\s*"  # of the whole text; empty: none
    format_weight: Weight = 1.0  # of the format's reward, beside the grader's

    @model_validator(mode="after")
    def _two_tags_or_none(self) -> GtaOptions:
        if bool(self.open) != bool(self.close):
            raise ValueError("open and close go together: give both tags of the guess, or leave both empty")
        try:
            re.compile(self.format)
        except re.error as error:
            raise ValueError(f"format: {self.format!r} is not a regular expression: {error}") from None
        return self


class PairShuffle(Strict):
    """Shuffle-R1 (2508.05612): which rollouts are trained on, and how often. The defaults are its code's."""

    keep: Annotated[float, Field(gt=0, le=1)] = 0.5  # of each group's pairs, those furthest apart first; prune 0.5
    draws: Number = 8  # S: sub-batches of pairs that make up a batch; 1 is no shuffle: each kept pair once
    # Of a pair: |A_1| + |A_2|, the larger of the two, or that of the better answer. The mean is the sum again.
    weight: Literal["sum", "max", "positive"] = "sum"
    power: Weight = 1.0  # a pair is drawn in proportion to weight ** power


Shaping = InterleavedOptions | DataMixingOptions | StagedOptions | GtaOptions
