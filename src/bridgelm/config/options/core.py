"""The paper's baselines, BRIDGE, and our own variants of cooperation."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from bridgelm.config.options.base import LowRank, PolicyGradient, Rate, Shadowed, Share, Strict, Weight


class SftOptions(Strict):
    name: Literal["sft"] = "sft"


class GrpoOptions(Strict):
    name: Literal["grpo"] = "grpo"
    rl: PolicyGradient = PolicyGradient()


class AlternateOptions(Strict):
    """BRIDGE's "naive alternation": one RL step, then one SFT step, every `every` steps."""

    name: Literal["alternate"] = "alternate"
    rl: PolicyGradient = PolicyGradient()
    every: Annotated[int, Field(ge=1)] = 1  # an SFT step after every so many RL steps; the paper gives no number
    optimisers: Literal["one", "two"] = "two"  # two Adams remove the scale of the losses; one shares the moments
    sft_lr: Rate | None = None  # default: the main rate
    half_steps: bool = False  # both steps at half size, so that an iteration moves as far as joint's does

    @model_validator(mode="after")
    def _one_optimiser_has_one_rate(self) -> AlternateOptions:
        if self.optimisers == "one" and self.sft_lr is not None:
            raise ValueError("sft_lr needs optimisers = 'two': one optimiser has one rate; leave sft_lr out")
        return self


class JointOptions(Strict):
    """J_RL + mu J_SFT. BRIDGE v3's "SFT+RL" baseline gives no mu: 1 is the plain sum."""

    name: Literal["joint"] = "joint"
    rl: PolicyGradient = PolicyGradient()
    mu: Annotated[float, Field(ge=0)] = 1.0
    mu_end: Annotated[float, Field(ge=0)] | None = None  # where the schedule ends; default: mu
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    normalise: bool = True  # divide both by 1 + mu, so that mu moves the mix and not the step


# What each BRIDGE preset sets. `paper` is the literal reading of Algorithm 2; `repaired` mends what cannot work.
BRIDGE_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"shadow_step": "plain", "ratio": "clip", "rl": {"std": True}},
    "repaired": {"shadow_step": "shared_moments", "ratio": "truncate"},
}


class BridgeOptions(Shadowed):
    """Settings of the paper and of its open readings."""

    name: Literal["bridge"] = "bridge"
    preset: Literal["repaired", "paper"] = "repaired"
    lambda_start: Share | None = None  # with it, lambda moves linearly from here to `lambda` over the run
    exclusive: bool = False  # theta leaves the modules of w alone (the non-degenerate reading)
    resync_every: Annotated[int, Field(ge=0)] = 0  # 0: persistent shadow; 1: the one-step reading
    shadow_rollouts: Literal["shared", "own"] = "shared"
    # Controls of the third term: joint RL without the shadow's part (`rl`), none at all (`sft`), a shadow that stays at
    # the start (`frozen`), and two placebos: noise of its norm (`noise`), and advantages dealt out anew (`permuted`).
    third: Literal["gain", "rl", "sft", "frozen", "noise", "permuted"] = "gain"
    shadow_step: Literal["shared_moments", "plain"] = "shared_moments"
    ratio: Literal["truncate", "taper", "clip"] = "truncate"  # clip: PPO's

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        """A preset fills in what the user left out; an explicit key wins over it."""
        if not isinstance(data, dict):
            return data
        preset = BRIDGE_PRESETS.get(data.get("preset", "repaired"), {})
        nested = {"rl": {**preset["rl"], **data["rl"]}} if "rl" in preset and isinstance(data.get("rl"), dict) else {}
        return {**preset, **data, **nested}

    @model_validator(mode="after")
    def _one_advantage_scale(self) -> BridgeOptions:
        if self.shadow_rollouts == "own" and self.rl.std:
            raise ValueError("shadow_rollouts = 'own' needs rl.std = false: each policy's advantages would be divided "
                             "by its own groups' deviations, and w's third term would be the gradient of no gain")
        return self

    @model_validator(mode="after")
    def _controls_ask_for_what_they_have(self) -> BridgeOptions:
        """What a control does not have cannot be asked for."""
        asked = {"probe_every": self.probe_every > 0, "resync_every": self.resync_every > 0,
                 "shadow_rollouts": self.shadow_rollouts == "own", "shadow_every": self.shadow_every > 1}
        refused = {"rl": (set(asked), "has no shadow"), "sft": (set(asked), "has no shadow"),
                   "frozen": ({"resync_every"}, "keeps its shadow at the start"),
                   "permuted": ({"shadow_rollouts", "shadow_every"},
                                "deals out the advantages of one set of rollouts for both policies in each step")}
        keys, why = refused.get(self.third, (set(), ""))
        wrong = [key for key, given in asked.items() if given and key in keys]
        if wrong:
            raise ValueError(f"third = {self.third!r} {why}: leave out {' and '.join(wrong)}")
        return self

    @model_validator(mode="after")
    def _a_new_shadow_does_not_rest(self) -> BridgeOptions:
        if self.resync_every and self.shadow_every > 1:
            raise ValueError("resync_every makes the shadow anew and needs its gradient there: leave out shadow_every")
        return self


class BridgeLeakyOptions(Shadowed):
    """BRIDGE with a shadow that is kept near theta, and a w that moves as far as its third term can be trusted."""

    name: Literal["bridge_leaky"] = "bridge_leaky"
    leak: Share = 1 / 15  # share of the way to theta that the shadow is pulled in each step
    agreement_decay: Share = 0.9  # of the running mean of how far two half-batches agree on the third term


class BridgeDialOptions(Shadowed):
    """lambda is turned by reward: the shadow says where more or less imitation leads."""

    name: Literal["bridge_dial"] = "bridge_dial"
    leak: Share = 1 / 15
    eta: Annotated[float, Field(ge=0)] = 0.1  # most that logit(lambda) moves in a step
    limit: Rate = 4.0  # of |logit(lambda)|
    scales: list[Weight] = Field(default=[0.0, 0.5, 1.0, 1.5])  # of theta - shadow, tried on validation

    @model_validator(mode="after")
    def _theta_and_shadow_step_together(self) -> BridgeDialOptions:
        if self.shadow_every > 1:
            raise ValueError("shadow_every must be 1: theta less a shadow that rests is made of RL's steps too, and "
                             "lambda would be turned by them; leave it out")
        return self


class BarrierOptions(Strict):
    """Of the policies that are best by reward, the one that fits the demonstrations best; no shadow."""

    name: Literal["barrier"] = "barrier"
    rl: PolicyGradient = PolicyGradient()
    eta: Rate = 1.0  # size of RL's part against SFT's where the two do not conflict
    decay: Share = 0.9  # of the running means of c, n_S and n_R
    cap: Rate = 100.0  # of nu
    low: Share = 0.05  # mean reward under which a vanished RL gradient means "nothing solved yet", not "optimal"


class TokenLeadOptions(Strict):
    """Joint mixing whose demonstration tokens are weighted by what they do for reward."""

    name: Literal["token_lead"] = "token_lead"
    rl: PolicyGradient = PolicyGradient()
    mu: Annotated[float, Field(ge=0)] = 1.0  # J_RL + mu J_SFT, divided by 1 + mu, as in `joint`
    # `exp`: exp(eta a / rms(a)), mean one. `gate`: 1 where a > 0, else 0. `whole`: the same by a's mean over the
    # demonstration. Gates are not brought to mean one: where demonstrations hurt, there is less of them.
    weights: Literal["exp", "gate", "whole"] = "exp"
    eta: Annotated[float, Field(ge=0)] = 1.0  # of `exp`; 0 is `joint`
    limit: Rate = 3.0  # of |a| in deviations
    decay: Share = 0.9  # of the running mean of RL's gradient that is looked ahead along
    move: Rate = 0.1  # root mean square change of a token's log-prob by the look ahead
    memory: Share = 0.0  # > 0: running mean of each token's alignment over the epochs, kept with this decay
    source: str = "source"  # column of the data that names where a demonstration comes from
    shuffled: bool = False  # control: the same weights, dealt out to other tokens


class GuideOptions(LowRank):
    """w is a guide that half of the rollouts follow and that is taken away in the end."""

    name: Literal["guide"] = "guide"
    no_refill: ClassVar[str] = ("it compares two policies on the same problems, and replacing groups "
                               "would choose among them")
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of each group that follows the guide, at first
    kappa: Annotated[float, Field(ge=0)] = 0.01  # pull of the guide towards theta: KL(guide || theta)
    shape: Rate = 0.1  # a guided success weighs p / (p + shape), p its token's probability without the guide
    ratio_cap: Rate = 2.0  # of the token ratio of guided failures
    decay: Share = 0.9  # of the running mean of the gain
    warmup: Annotated[int, Field(ge=0)] = 20  # steps before the guide's share follows its gain

    @model_validator(mode="after")
    def _no_reference(self) -> GuideOptions:
        if self.rl.kl_coef > 0:
            raise ValueError("rl.kl_coef must be 0: half of the rollouts are the guide's, and the estimate of "
                             "KL(theta || start) needs theta's own; `kappa` is what holds the guide back")
        return self
