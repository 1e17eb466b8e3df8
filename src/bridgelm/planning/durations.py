"""Estimates how long a step takes on a card, from its arithmetic speed and its memory bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

from bridgelm.config.options import samples
from bridgelm.config.run_config import RunConfig, SequenceOptions
from bridgelm.planning.needs import Need

TRAINING = 0.4  # share of the peak that forward and backward passes reach
BANDWIDTH = 0.6  # share of the bandwidth that decoding reaches


@dataclass(frozen=True)
class Card:
    memory: float  # bytes
    flops: float  # a second, dense, bfloat16
    bandwidth: float  # bytes a second


# From the data sheets of the makers.
CARDS = {
    "rtx4090": Card(24e9, 165e12, 1.008e12), "l40s": Card(48e9, 362e12, 0.864e12),
    "a100-40": Card(40e9, 312e12, 1.555e12), "a100-80": Card(80e9, 312e12, 2.039e12),
    "h100": Card(80e9, 989e12, 3.35e12), "h200": Card(141e9, 989e12, 4.8e12), "b200": Card(180e9, 2250e12, 7.7e12),
}
RESERVE = 1.5e9  # what the driver and the libraries take
WASTE = 1.05  # an allocator's


@dataclass(frozen=True)
class StepTime:
    generate: float  # seconds
    train: float


def seconds(config: RunConfig, need: Need, card: Card, gpus: int, share: float) -> StepTime:
    """`share`: the mean length of an answer as a share of the longest. Answers are decoded in waves of
    rollout.max_rows, each as long as its longest."""
    rollout, data, n = config.rollout, config.data, need.parameters
    answers = 0 if _only_imitates(config) else rollout.prompts * rollout.group
    prompt, answer = data.max_prompt_tokens / 2, rollout.max_new_tokens * share
    rows = max(1, min(rollout.max_rows, -(-answers // gpus)))
    waves = -(-answers // (rows * gpus))
    weights = need.parts["generate/weights gathered"] or need.parts["standing/weights"]
    cache = need.parts["generate/keys and values"]
    read = weights + cache * share / 2 * min(1.0, rows / max(1, min(rollout.max_rows, answers or 1)))
    token = max(read / (BANDWIDTH * card.bandwidth), 2 * n * rows * share / (TRAINING * card.flops))
    decode = waves * rollout.max_new_tokens * token if answers else 0.0
    passes = 1 + ("standing/shadow" in need.parts) / getattr(config.method, "shadow_every", 1)
    scored = "standing/reference" in need.parts
    work = answers * (prompt + answer) * (6 * passes + 2 * scored) * n
    work += config.batch.demos * (prompt + data.max_demo_tokens / 2) * 6 * n * ("demos" in _needs(config))
    again = 4 / 3 if config.model.gradient_checkpointing else 1.0
    return StepTime(decode, again * work / (TRAINING * card.flops * gpus))


def _needs(config: RunConfig) -> frozenset[str]:
    from bridgelm.config import catalogue

    return frozenset(catalogue.needs_of(config.method))


def _only_imitates(config: RunConfig) -> bool:
    return not (isinstance(config.method, SequenceOptions) or samples(config.method))
