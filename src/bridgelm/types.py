"""The records that flow through BridgeLM, and the one legend of shapes. No torch at import time.

Shape legend, used as a suffix of names: B rows of a micro-batch, T tokens of a row (padded), N selected tokens,
V vocabulary, G samples of one problem's group, D hidden size. `logp_BT[b, t]` is the log-probability of token t of row
b given everything before it; position 0 has no prediction and is 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, device

Message = dict[str, str]


class Verdict(str, Enum):
    """What a verifier says. ERROR is a fault of the grader: it is counted and left out, never scored as 0."""

    CORRECT = "correct"
    WRONG = "wrong"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Demo:
    """One demonstration: the assistant's text. `logps` are its author's token log-probabilities, where known."""

    text: str
    logps: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """One task item. `columns` are the further fields of its data row, handed to reward functions."""

    id: str
    messages: tuple[Message, ...]
    answer: str | None = None
    demos: tuple[Demo, ...] = ()
    difficulty: float | None = None
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])
    conversational: bool = False  # the row gave messages, so reward functions get messages and not strings
    place: str = field(default="", compare=False)  # file and line of its row

    @property
    def prompt(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True, slots=True)
class Grade:
    """A graded completion: the reward used for training and the verdict used for counting."""

    reward: float
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine returns for one request. `raw_logps` are at temperature 1, `logps` at the sampling temperature.

    `ids` includes the end-of-sequence token if it was drawn; `finished` is False for a completion cut at its limit.
    """

    ids: np.ndarray
    raw_logps: np.ndarray
    logps: np.ndarray
    finished: bool


Norm = Literal["token", "row", "constant"]


@dataclass(frozen=True, slots=True)
class Stream:
    """The tokens of a row that a loss term covers (mask), and their weights. A masked token counts in the denominator
    even if its weight is 0.

    `norm` says what the term is divided by over the whole global batch: its masked tokens, its rows (each row a mean
    over its own tokens), or rows times `constant` (a fixed length, as Dr. GRPO does).
    """

    mask: np.ndarray
    weight: np.ndarray
    norm: Norm = "token"
    constant: float = 1.0


@dataclass(frozen=True, slots=True)
class Row:
    """A flat token sequence to train on. `own` marks the tokens of the answer (there may be several segments). The
    first `given` of these come from a demonstration; the policy drew the others."""

    ids: np.ndarray
    own: np.ndarray
    kind: Literal["rollout", "demo"]
    problem: Problem
    group: int = -1
    at: str = "live"  # the weights that sampled it
    temperature: float = 1.0
    # Log-probs under the policy that drew it, at the row's temperature; 0 on given tokens.
    old_logps: np.ndarray | None = None
    ref_logps: np.ndarray | None = None
    reward: float = math.nan  # NaN for a demonstration
    verdict: Verdict | None = None
    finished: bool = True
    text: str = ""
    streams: Mapping[str, Stream] = field(default_factory=dict[str, Stream])
    given: int = 0
    times: float = 1.0  # how often the row counts in every term, its denominator included; 0: not at all
    teacher_logps: np.ndarray | None = None  # NaN where the teacher gives none (on an end token that it does not have)
    mismatch: np.ndarray | None = None  # old_logps minus the log-probs of the engine, where the two differ

    @property
    def drawn(self) -> np.ndarray:
        """The tokens that a policy drew."""
        return self.own & (self.own.cumsum() > self.given)

    def with_stream(self, name: str, weight: float | np.ndarray, norm: Norm = "token", constant: float = 1.0,
                    mask: np.ndarray | None = None) -> Row:
        mask = self.drawn if mask is None else mask
        weights = np.broadcast_to(np.asarray(weight, dtype=np.float64), mask.shape)
        return replace(self, streams={**self.streams, name: Stream(mask, weights, norm, constant)})


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one update with the global denominator of every term, counted before any micro-batching."""

    rows: tuple[Row, ...]
    counts: Mapping[str, float]
    stats: Mapping[str, Any] = field(default_factory=dict[str, Any])  # what the method's `probe` found

    def kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row.kind == kind]


@dataclass(frozen=True, slots=True)
class Frame:
    """Rows of equal length in one attention call: the index in the packed line of the token at each place."""

    tokens: Tensor
    rows: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The tokens of a micro-batch packed into one line, with a prompt that rows share only once (`packing.py`)."""

    ids_N: Tensor
    position_N: Tensor
    frames: tuple[Frame, ...]
    place_N: Tensor  # the place of each token in the concatenated frames
    before_N: Tensor  # for each own token, row by row: the index of the token that predicts it

    def to(self, device: device) -> Layout:
        if device.type == "cpu":
            return self
        frames = tuple(Frame(f.tokens.to(device), f.rows) for f in self.frames)
        return Layout(self.ids_N.to(device), self.position_N.to(device), frames, self.place_N.to(device),
                      self.before_N.to(device))


@dataclass(frozen=True, slots=True)
class Micro:
    """Padded tensors of a few rows of one kind. `scale[name]` turns a per-token loss into its summand:
    the stream's mask, divided by the row's own count where the term is a mean over rows."""

    ids_BT: Tensor
    pad_BT: Tensor  # True on real tokens
    own_BT: Tensor
    old_BT: Tensor
    ref_BT: Tensor
    teacher_BT: Tensor  # 0 where the teacher gives none
    taught_BT: Tensor  # True where the teacher gives a log-prob
    temperature_B: Tensor
    layout: Layout  # the same tokens without padding
    weight: Mapping[str, Tensor]
    scale: Mapping[str, Tensor]
    stats: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __contains__(self, name: str) -> bool:
        return name in self.weight


@dataclass(frozen=True, slots=True)
class Live:
    """What the current weights say about a micro-batch, with gradients. Zero outside `own`."""

    logp_BT: Tensor
    entropy_BT: Tensor | None = None
    cross_BT: Tensor | None = None  # cross-entropy to the soft targets, where `policy.grad` was given some


Metrics = dict[str, float]
