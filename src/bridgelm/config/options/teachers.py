"""A second, frozen model, and the methods that need to know what the author of a sequence thought of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from bridgelm.config.options.base import PolicyGradient, Rate, Strict, Weight


class TeacherConfig(Strict):
    """`name_or_path`: a Hugging Face folder or hub name with the tokenizer of [model], or `toy:teacher`."""

    name_or_path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float64"] | None = None  # this and the next two: those of [model]
    device: str | None = None
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] | None = None
    chat_template: str | None = None  # a Jinja file; default: the template that the teacher brings
    system_prompt: str | None = None  # default: that of [model]; "" for none


class KdrlOptions(Strict):
    """RL and on-policy distillation in one loss. Defaults: KDRL-Annealing, the best variant of arXiv 2506.02208."""

    name: Literal["kdrl"] = "kdrl"
    rl: PolicyGradient = PolicyGradient()
    rl_weight: Weight = 1.0  # of J_GRPO; 0 is on-policy distillation alone (ours; then take beta = 1, delta = 0)
    beta: Weight = 5e-3  # of the distillation at the start (paper; its constant variant is 2e-3 with delta = 0)
    beta_min: Weight = 1e-3  # where it stops to fall (paper)
    delta: Weight = 5e-5  # what it falls by in a step (paper: flat after 80 of about 280 steps); 0 keeps it constant
    # k2 has the gradient of the reverse KL (the paper's choice), k3 that of the forward KL, k1 none on average.
    estimator: Literal["k2", "k1", "k3"] = "k2"
    # Distil every answer, wrong answers alone, or those of groups without any correct one (the paper's two maskings).
    mask: Literal["none", "response", "group"] = "none"
    clamp: Rate = 10.0  # of |R|, R = log pi_T - log pi (ours; the paper has none)

    @model_validator(mode="after")
    def _something_is_learnt(self) -> KdrlOptions:
        if self.delta and self.beta_min > self.beta:
            raise ValueError(f"beta falls from {self.beta:g} to beta_min = {self.beta_min:g}, which is above it: lower "
                             "beta_min, or set delta = 0 for a constant beta")
        if self.rl_weight == 0 and self.rl.kl_coef > 0:
            raise ValueError("rl.kl_coef is a part of the RL term, which rl_weight = 0 leaves out; set it to 0")
        if self.rl_weight == 0 and self.beta == 0:
            raise ValueError("rl_weight = 0 and beta = 0: nothing is left to learn from; set one of them above 0")
        return self


class PearOptions(Strict):
    """SFT whose tokens are weighted by how plausible their continuation is to the student (arXiv 2602.01058)."""

    name: Literal["pear"] = "pear"
    # A weight for each token (the paper's default), for blocks of `block` tokens, or one for the whole demonstration.
    weights: Literal["token", "block", "sequence"] = "token"
    block: Annotated[int, Field(ge=1)] = 4  # of `block` (paper)
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.999  # decay a token towards the start (paper); not in `sequence`
    ratio_low: float = -0.08  # clip of log pi - log pi_b, a token (paper)
    ratio_high: float = 0.3  # the same (paper)
    weight_low: float = -10.0  # clip of the log weight (paper; third-party code: weights in [0.1, 10], so -2.303)
    weight_high: float = 5.0  # the same (paper; third-party code: 2.303)
    # Bring weights to mean 1 over the batch or over each demonstration (ours; the paper does neither).
    normalise: Literal["none", "batch", "row"] = "none"

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> PearOptions:
        for name in ("ratio", "weight"):
            low, high = getattr(self, f"{name}_low"), getattr(self, f"{name}_high")
            if not low <= 0 <= high:
                raise ValueError(f"{name}_low and {name}_high are logarithms around 0, not {low:g} and {high:g}; set "
                                 f"{name}_low to 0 or below, {name}_high to 0 or above")
        return self
