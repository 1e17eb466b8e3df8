"""The options of every method, torch-free so that a recipe is checked in milliseconds. Sources of the defaults stand
beside them; `docs/methods.md` says more."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    Field,
    PlainSerializer,
    SerializationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from bridgelm.config import plugins
from bridgelm.config.options.adaptive import AmftOptions, LspoOptions, SasrOptions, TrapoOptions
from bridgelm.config.options.base import LowRank, PolicyGradient, Rate, Shadowed, Share, Strict
from bridgelm.config.options.core import (
    BRIDGE_PRESETS,
    AlternateOptions,
    BarrierOptions,
    BridgeDialOptions,
    BridgeLeakyOptions,
    BridgeOptions,
    GrpoOptions,
    GuideOptions,
    JointOptions,
    SftOptions,
    TokenLeadOptions,
)
from bridgelm.config.options.gates import BreadOptions, HptOptions, PrefixRftOptions, ReliftOptions, UftOptions
from bridgelm.config.options.mixed import CHORD_PRESETS, Mixed
from bridgelm.config.options.offline import DftOptions, FdivSftOptions, GiftOptions, RftOptions
from bridgelm.config.options.shaping import PairShuffle, Shaping
from bridgelm.config.options.teachers import KdrlOptions, PearOptions

__all__ = ["BRIDGE_PRESETS", "CHORD_PRESETS", "CHOSEN", "COLD_START", "LowRank", "MethodOptions", "PolicyGradient",
           "Rate", "SequenceOptions", "Shadowed", "Share", "SingleOptions", "Stage", "Strict", "methods", "parts",
           "samples"]

SingleOptions = (SftOptions | GrpoOptions | AlternateOptions | JointOptions | BridgeOptions | BridgeLeakyOptions
                 | BridgeDialOptions | BarrierOptions | TokenLeadOptions | GuideOptions | DftOptions
                 | Shaping | TrapoOptions | SasrOptions | AmftOptions | LspoOptions | Mixed
                 | KdrlOptions | PearOptions
                 | HptOptions | ReliftOptions | UftOptions | PrefixRftOptions | BreadOptions
                 | RftOptions | FdivSftOptions | GiftOptions)


def samples(part: BaseModel) -> bool:
    """Whether a configured plain method draws answers to train on: it has a table `rl`, or it says so itself."""
    return bool(getattr(part, "samples", hasattr(part, "rl")))


def _or_own(value: Any, ours: ValidatorFunctionWrapHandler) -> Any:
    """A method whose options stand beside it, ours or one's own."""
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    known = {"shuffle_r1", "sequence", *(model.model_fields["name"].default for model in get_args(SingleOptions))}
    if not isinstance(name, str) or name in known or not (name in plugins.ours() or plugins.is_own("method", name)):
        return ours(value)
    return plugins.options(name, value) if isinstance(value, dict) else value


def _dump(value: Strict, info: SerializationInfo) -> dict[str, Any]:
    return value.model_dump(mode=info.mode, by_alias=info.by_alias)


CHOSEN = (Field(discriminator="name"), WrapValidator(_or_own), PlainSerializer(_dump))


class ShuffleR1Options(PairShuffle):
    """Shuffle-R1 (2508.05612) round a method with rollouts. The defaults are those of its code."""

    name: Literal["shuffle_r1"] = "shuffle_r1"
    # Its code's GRPO: advantages divided by the group's deviation, no KL.
    method: Annotated[SingleOptions, *CHOSEN] = GrpoOptions(rl=PolicyGradient(std=True))

    @model_validator(mode="after")
    def _has_rollouts_of_one_policy(self) -> ShuffleR1Options:
        name = self.method.name
        if not samples(self.method):
            raise ValueError(f"method {name!r} has no rollouts to choose from; wrap one that has, such as grpo")
        if isinstance(self.method, LowRank):
            raise ValueError(f"method {name!r} compares two policies on whole groups, and shuffle_r1 would leave out a "
                             "part of them; wrap another, such as grpo or joint")
        return self


class Stage(Strict):
    """One stage of a sequence, with a rate and optimisers of its own."""

    method: Annotated[SingleOptions | ShuffleR1Options, *CHOSEN]
    steps: Annotated[int, Field(ge=1)] | None = None  # stages that leave it out share what is left equally
    lr: Rate | None = None  # this and the next two: those of [optim] unless given
    schedule: Literal["constant", "linear", "cosine"] | None = None
    warmup: Share | None = None  # as a share of the stage's steps
    fresh_optimiser: bool = True
    fresh_reference: bool = True  # the KL reference is the start of the stage, not of the run


# Cold start with the repaired SFT recipe of arXiv 2604.23747; its RL stage is that paper's with the defaults of `grpo`
# and of [optim]. The paper gives SFT three epochs: the length of the stage is the user's to set.
COLD_START = [Stage(method=SftOptions(), lr=5e-5, schedule="cosine", warmup=0.1), Stage(method=GrpoOptions())]


class SequenceOptions(Strict):
    """Stages one after the other; without any, cold start: `sft`, then `grpo`."""

    name: Literal["sequence"] = "sequence"
    stages: Annotated[list[Stage], Field(min_length=1)] = COLD_START

    @model_validator(mode="after")
    def _kept_references_come_first(self) -> SequenceOptions:
        """A fresh stage drops the older reference, so that a later one has nothing to keep."""
        kept = [i for i, stage in enumerate(self.stages) if not stage.fresh_reference]
        fresh = next((i for i in range(1, max(kept, default=0)) if i not in kept), None)
        if fresh is not None:
            raise ValueError(f"stage {fresh} drops the reference that stage {max(kept)} would keep; set "
                             f"fresh_reference = false in stage {fresh} too, or leave it out in stage {max(kept)}")
        return self


MethodOptions = SingleOptions | ShuffleR1Options | SequenceOptions


def methods(method: Any) -> list[Any]:
    """The options of a run's method, of its stages, and of what those are wrapped round."""
    inner = [*(stage.method for stage in getattr(method, "stages", [])), getattr(method, "method", None)]
    return [method, *(found for one in inner if isinstance(one, Strict) for found in methods(one))]


def parts(method: Any) -> list[Any]:
    """The plain methods that a run consists of: its own, those of its stages, or the one that it is wrapped round."""
    inner = [stage.method for stage in getattr(method, "stages", [])] or [getattr(method, "method", None)]
    return [part for one in inner if one is not None for part in parts(one)] or [method]
