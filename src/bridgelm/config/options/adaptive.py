"""Methods that adapt the mix of imitation and reward as they go: how much help, which step, what weight."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from bridgelm.config.options.base import PolicyGradient, Rate, Share, Strict, Weight


class ConstantLength(PolicyGradient):
    """The RL term as TRAPO's launch script sets it: divided by a constant length, no std, no KL."""

    aggregate: Literal["token", "row", "constant"] = "constant"


class TrapoOptions(Strict):
    """Expert prefixes that grow until a prompt is solved, imitated where the policy can follow."""

    name: Literal["trapo"] = "trapo"
    no_refill: ClassVar[str] = "it draws a prompt's rows one after the other and helps those that fail"
    rl: ConstantLength = ConstantLength()
    clip: bool = False  # clip own tokens (rl.clip_low, rl.clip_high); off in the official script
    alpha: Share = 0.1  # official code and paper; a token of probability p weighs min(1, p / alpha); 0: sft, 1: p
    table: Literal["code", "paper"] = "code"  # when help comes, and how much: the official code's or the paper's
    prefix_weight: Literal["one", "advantage"] = "one"  # of a given token: the code's 1, or one reader's A
    baseline: Literal["all", "own"] = "all"  # over all rows of a prompt (the script), or those without help
    trace: Literal["whole", "think"] = "whole"  # `think`: the code's, which ends at the end of the thought (trap)
    entropy_coef: Weight = 0.001  # official script; mean entropy of the tokens that the policy drew


class Published(PolicyGradient):
    """GRPO as first published: a symmetric clip, z-scored rewards and a KL to a reference."""

    clip_high: Rate = 0.2
    kl_coef: Weight = 0.01
    std: bool = True


class SasrOptions(Strict):
    """Each step imitates or reinforces, as the gradient of imitation fades."""

    name: Literal["sasr"] = "sasr"
    rl: Published = Published()  # z-score and KL: a third party's reading; kl_coef .01 and clip .2: ours
    warmup: Annotated[float, Field(gt=0, lt=1)] = 0.1  # share of the steps that only imitate; not recoverable, ours
    gamma: Weight = 1.0  # not recoverable, ours; SFT's share is 1 / (1 + gamma) when the warm-up ends
    rule: Literal["sampled", "blend"] = "sampled"  # a third party's Algorithm 1; `blend`: a low-trust explainer's
    denominator: Literal["warmup", "grpo"] = "warmup"  # whose norm SFT's is held against (third party; explainer)
    probe_every: Annotated[int, Field(ge=0)] = 0  # ours; steps without SFT after which its norm is measured again
    floor: Share = 0.0  # of p; ours


class AmftOptions(Strict):
    """(1 - mu) L_RL + mu L_SFT, with mu moved by what validation reward and entropy say."""

    name: Literal["amft"] = "amft"
    rl: PolicyGradient = PolicyGradient()  # group advantages in place of the paper's critic: ours
    mu: Share = 0.8  # released config (its README says .5)
    mu_min: Share = 0.05  # released config
    mu_max: Share = 0.95  # released config
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of the steps that only imitate; 50 of 500 in the config
    every: Annotated[int, Field(ge=1)] = 20  # steps between looks at validation; released config
    problems: Annotated[int, Field(ge=1)] = 32  # of validation, a look; ours
    signal: Literal["cosine", "inner"] = "cosine"  # ours, free of scale; `inner`: the paper's lr <g_val, g_SFT - g_RL>
    eta: Weight = 0.02  # rate of the meta-gradient; ours, for `cosine`. The config's 1e-4 is for `inner`
    metric: Literal["plain", "adam"] = "plain"  # `adam`: gradients as Adam sees them, which is how theta moves; ours
    eta_entropy: Weight = 5e-4  # released config
    entropy_sign: Literal["equation", "text"] = "equation"  # which way an entropy under the target moves mu: up, down
    target_entropy: Weight | None = None  # default: that of the first rollouts after the warm-up

    @model_validator(mode="after")
    def _bounds_hold_mu(self) -> AmftOptions:
        if not self.mu_min <= self.mu <= self.mu_max:
            raise ValueError(f"mu = {self.mu} lies outside of mu_min = {self.mu_min} and mu_max = {self.mu_max}; widen "
                             "them or move mu")
        return self


class LspoOptions(Strict):
    """Where all samples of a prompt fail, a throw-away w that has just read the demonstrations samples again."""

    name: Literal["lspo"] = "lspo"
    no_refill: ClassVar[str] = "it is for the groups that all fail, which refills replace"
    rl: PolicyGradient = PolicyGradient()  # the paper compares with DAPO: its clip range and token mean
    rank: Annotated[int, Field(ge=1)] = 8  # not recoverable ("small"); ours
    alpha: Rate = 16.0  # not recoverable; ours
    modules: str = ""  # regular expression of the linear layers that carry w; empty: all of them
    fit_steps: Annotated[int, Field(ge=1)] = 8  # of w, a step of the run; not recoverable ("brief"), ours
    beta: Rate = 1e-3  # rate of w; not recoverable, ours
    retries: Annotated[int, Field(ge=1)] | None = None  # samples of theta + w, a failed prompt; default: rollout.group
    ratio: Literal["token", "sequence"] = "token"  # pi_theta / pi_(theta + w) of each token, or of the whole answer
    ratio_cap: Rate = 2.0  # of that ratio; ours, as in `bridge` and `guide`
