"""Which answers are trained on, in what order and where in the answer: arms of the synergy study, and shapers of RL."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from bridgelm.options.base import PolicyGradient, Rate, Share, Strict, Weight

Number = Annotated[int, Field(ge=1)]


class InterleavedOptions(Strict):
    """The interleaved arm of the synergy study (2507.07562): RL, and SFT on what it cannot solve, in turn."""

    name: Literal["interleaved"] = "interleaved"
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


class PairShuffle(Strict):
    """Shuffle-R1 (2508.05612): which rollouts are trained on, and how often. The defaults are its code's."""

    keep: Annotated[float, Field(gt=0, le=1)] = 0.5  # of each group's pairs, those furthest apart first; prune 0.5
    draws: Number = 8  # S: sub-batches of pairs that make up a batch; 1 is no shuffle: each kept pair once
    # Of a pair: |A_1| + |A_2|, the larger of the two, or that of the better answer. The mean is the sum again.
    weight: Literal["sum", "max", "positive"] = "sum"
    power: Weight = 1.0  # a pair is drawn in proportion to weight ** power


Shaping = InterleavedOptions | DataMixingOptions
