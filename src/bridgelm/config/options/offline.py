"""SFT with another loss or other data: stages before RL, and baselines by themselves."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from bridgelm.config.options.base import Rate, Share, Strict, Weight


class DftOptions(Strict):
    """SFT whose tokens weigh their own probability. The paper has nothing to set."""

    name: Literal["dft"] = "dft"
    # Whose probability weighs: the policy's (DFT), or that of a frozen copy of the start (PriFT, 2606.09396).
    weights_of: Literal["live", "reference"] = "live"


class RftOptions(Strict):
    """Rejection-sampling fine-tuning on the policy's own right answers."""

    samples: ClassVar[bool] = True  # it draws answers, though it has no table `rl`
    no_refill: ClassVar[str] = "it learns from groups that are all right, which refills replace"
    name: Literal["rft"] = "rft"
    refresh_every: Annotated[int, Field(ge=1)] = 1  # steps that the answers of one round are dealt out to; 1: online
    unique: bool = True  # of equal answers to a problem one is kept (RFT; it compares equations, we the whole answer)
    max_per_problem: Annotated[int, Field(ge=0)] = 10  # of a round; ReST-EM's ten. 1 is STaR's, 0: no maximum (RFT)
    # What the sum is divided by: the tokens that are taught, as in SFT, or all that were drawn, as RL does it.
    over: Literal["kept", "all"] = "kept"

    @model_validator(mode="after")
    def _rollouts_are_of_the_step(self) -> RftOptions:
        if self.over == "all" and self.refresh_every > 1:
            raise ValueError("over = 'all' needs refresh_every = 1: the wrong answers of a round are not kept for its "
                             "later steps; leave over out")
        return self


class FdivSftOptions(Strict):
    """SFT from other divergences than total variation: it keeps a tie to its start."""

    name: Literal["fdiv_sft"] = "fdiv_sft"
    divergence: Literal["pearson", "hellinger", "total_variation"] = "pearson"  # ours: the paper's choice is not known
    beta: Rate = 0.1  # of the tie; not recoverable from the paper, .1 is what DPO is mostly run with
    penalty: Literal["demos", "own"] = "demos"  # where E_pi is estimated: on demonstration tokens, or on rollouts
    limit: Annotated[float, Field(gt=0, lt=1)] = 0.5  # ours: hellinger's r, from which on g is a straight line

    @property
    def samples(self) -> bool:
        return self.penalty == "own"

    @model_validator(mode="after")
    def _total_variation_has_no_penalty(self) -> FdivSftOptions:
        if self.divergence == "total_variation" and self.penalty == "own":
            raise ValueError("penalty = 'own' needs another divergence: with total_variation there is no penalty to "
                             "estimate; leave penalty out")
        return self


class GiftOptions(Strict):
    """SFT towards the base's distribution with the demonstration's token raised."""

    name: Literal["gift"] = "gift"
    beta: Weight = 20.0  # what the token's log-probability is raised by (official code)
    smooth: Share = 0.0  # share of the uniform distribution in the base's (official code); .01 for Llama, by a note
