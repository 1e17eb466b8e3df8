"""Demonstrations inside the RL loss, or beside it under one weight: LUFFY, SRFT, CHORD, GAC. [C] is official code."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from bridgelm.config.options.base import PolicyGradient, Rate, Share, Strict, Weight

Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]


class DrGrpo(PolicyGradient):
    """The RL term as Dr. GRPO has it, and LUFFY [C]: no std, token losses summed over a constant length, no KL."""

    aggregate: Literal["token", "row", "constant"] = "constant"


class LuffyOptions(Strict):
    """Groups of `rollout.group` own answers and `demos` demonstrations."""

    name: Literal["luffy"] = "luffy"
    no_refill: ClassVar[str] = ("it learns from demonstrations where all own answers fail, and refills "
                               "replace those groups")
    rl: DrGrpo = DrGrpo()
    demos: Count = 1  # of the problem's own, in each group, where it has so many; [C] n_prefix = 1
    shape: Rate = 0.1  # gamma of f(p) = p / (p + gamma); [C] p_div_p_0.1
    baseline: Literal["group", "own"] = "group"  # mean over all members [C], or without the demonstrations
    clip: bool = False  # rl.clip_low and rl.clip_high hold for own tokens; [C] loss_remove_clip = True
    entropy: Weight = 0.001  # bonus, a mean over the tokens of all members; [C]


class PlainGrpo(PolicyGradient):
    """The RL term as CHORD's example has it [C]: GRPO with std, a clip of .2 on both sides, a token mean, no KL."""

    clip_high: Rate = 0.2
    std: bool = True


class SrftOptions(Strict):
    """[R]: an independent reproduction; [P]: the paper, by secondary notes on it; see docs/methods/srft.md."""

    samples: ClassVar[bool] = True  # it has rollouts, and no table `rl`
    name: Literal["srft"] = "srft"
    no_refill: ClassVar[str] = ("it learns from demonstrations where all own answers fail, and refills "
                               "replace those groups")
    demos: Count = 1  # as in `luffy` [R]
    sft: Weight = 0.5  # of exp(-H) [P]
    right: Weight = 0.1  # of exp(H), for right own answers; wrong ones have 1 [P]
    sft_sign: Literal["minus", "plus"] = "minus"  # exp(-H) [P, R]; the authors' public code is said to have exp(+H)
    entropy_of: Literal["sequence", "token"] = "sequence"  # H a row's mean [R], or each token's own, as there
    shape: Rate = 0.1  # of f(p) = p / (p + shape) [R]
    std: bool = False  # divide the demonstration's advantage by the group's deviation; [R] does not
    aggregate: Literal["token", "row", "constant"] = "constant"  # of the two RL losses [R]
    entropy: Weight = 0.001  # bonus, a mean over the tokens of all members; the authors' setting


# What each CHORD preset sets: the paper's two variants, and the official example, which has both. Sources: the comments
# of the official example file [C].
CHORD_PRESETS: dict[str, dict[str, Any]] = {
    "phi": {"tokens": "phi", "mu": 0.1},
    "mu": {"tokens": "plain", "mu": 0.9, "mu_end": 0.05, "decay": 200},
    "both": {"tokens": "phi", "mu": 0.5, "mu_end": 0.02, "warmup": 200, "decay": 400},
}


class ChordOptions(Strict):
    """(1 - mu) L_GRPO + mu L_SFT; a preset fills in what is left out."""

    name: Literal["chord"] = "chord"
    rl: PlainGrpo = PlainGrpo()
    preset: Literal["phi", "mu", "both"] = "phi"  # the better one in the paper
    tokens: Literal["plain", "phi", "p"] = "phi"  # weight of a demonstration's token: 1, p (1 - p), p (as in DFT)
    mu: Share = 0.1  # after the warm-up
    mu_end: Share | None = None  # after `decay` more steps; default: mu
    warmup: Steps = 0  # steps from 0 to mu
    decay: Steps = 0  # steps from mu to mu_end, along a cosine

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        """An explicit key wins over the preset."""
        return {**CHORD_PRESETS.get(data.get("preset", "phi"), {}), **data} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _a_way_from_mu_to_its_end(self) -> ChordOptions:
        if self.mu_end not in (None, self.mu) and self.decay == 0:
            raise ValueError("mu_end differs from mu, and decay = 0 leaves no steps between them: set decay, or leave "
                             "mu_end out")
        return self


class GacOptions(Strict):
    """CHORD's losses with a mixing weight that is estimated; all defaults are the official code's and README's [C]."""

    name: Literal["gac"] = "gac"
    rl: PlainGrpo = PlainGrpo()
    tokens: Literal["plain", "phi"] = "phi"  # `plain` is the paper's "without phi"
    start: Share = 0.5  # mu before the first update
    target: Share = 0.5  # share of the disagreement that goes to SFT
    decay: Share = 0.99  # of the running means, and of mu towards its estimate
    refresh: Count = 10  # updates between two looks at the statistics
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.1  # of the demonstrations, left out of s_sft at either end
    blend: Share = 0.5  # share of the estimate against the prior
    cap: Rate = 0.01  # most that mu moves in an update
    low: Share = 0.05  # bounds of mu
    high: Share = 0.9
    prior: Share = 0.85  # the prior's peak, after the warm-up
    prior_end: Share = 0.15
    warmup: Steps = 200
    decay_steps: Steps = 800  # from the peak to prior_end, along a cosine

    @model_validator(mode="after")
    def _bounds(self) -> GacOptions:
        if not self.low <= self.start <= self.high:
            raise ValueError(f"start = {self.start} is not between low and high ({self.low} and {self.high}): move it "
                             "there")
        return self


Mixed = LuffyOptions | SrftOptions | ChordOptions | GacOptions
