"""Pretrain the shipped models: `python -m bridgelm.data.toy.build base|teacher [--minutes M] [--out FOLDER]`.

The base imitates a legal but unskilled walker, so that moves, bookkeeping and format are nearly perfect and only the
choice of the next move is left to learn. The walker has a small goal bias (else reward is too rare to learn from), a
*habit*, an unhelpful favourite move, so that a lower temperature cannot stand in for training, and it gives up at
random, so that an answer that has ended is no proof of being right. The teacher imitates shortest solutions of every
difficulty.

The shipped models were trained in stages with `--start` (base 28, teacher 15 minutes of a busy core in all), the first
stages on wider number ranges of the same families; for a single run from scratch allow as much.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from bridgelm.data.toy import hops, jugs, knights, vocabulary
from bridgelm.data.toy.walk import Puzzle, Step, distances, shortest, write

FAMILIES = {"hops": hops, "jugs": jugs, "knights": knights}
# Every size, so that no position of a hard problem is untrained.
RANGE = {"hops": (1, 8), "jugs": (1, 7), "knights": (1, 6)}
SLACK = {"hops": (1.5, 2.0), "jugs": (1.5, 2.0), "knights": (1.5, 2.0)}
SHARE = {"hops": 0.35, "jugs": 0.35, "knights": 0.3}
GOAL = {"hops": 0.3, "jugs": 0.35, "knights": 0.15}  # probability of a move that comes nearer to the goal
HABIT = {"hops": 0.35, "jugs": 0.25, "knights": 0.2}  # probability of the favourite move
QUIT = 0.12  # probability of giving up after a move: an answer that has ended is thus no proof that it is right
SIZE = {"base": (64, 4), "teacher": (96, 4)}  # width, layers
POOL = 12000  # problems per family; the walks on them are drawn afresh every time


def stroll(family: str, puzzle: Puzzle, rng: random.Random) -> tuple[list[Step], bool]:
    """One walk of the base: habit, then goal bias, else any legal move; and whether it stopped, at the goal or because
    it gave up, before the cap cut it off."""
    state, steps, left = puzzle.start, [], distances(puzzle)
    while len(steps) < puzzle.cap and not puzzle.solved(state):
        options = puzzle.moves(state)
        draw = rng.random()
        if draw < HABIT[family]:
            options = options[:1]
        elif draw < HABIT[family] + GOAL[family]:
            here = left.get(state, math.inf)
            options = [(m, s) for m, s in options if left.get(s, math.inf) < here] or options
        move, state = rng.choice(options)
        steps.append(Step(move, state))
        if rng.random() < QUIT:
            return steps, True
    return steps, puzzle.solved(state)


def trace(kind: str, family: str, puzzle: Puzzle, rng: random.Random) -> tuple[str, bool]:
    """The text of one training answer, and whether it ended by itself (only then is the end token trained)."""
    steps, stopped = (shortest(puzzle, rng), True) if kind == "teacher" else stroll(family, puzzle, rng)
    return write(puzzle, steps), stopped


def pools(rng: random.Random) -> dict[str, list[Puzzle]]:
    made = {}
    for name, family in FAMILIES.items():
        low, high = RANGE[name]
        reach = [rng.randint(low, high if rng.random() < 0.5 else 3) for _ in range(POOL)]  # near ones: when to stop
        made[name] = [family.sample(rng, distance, rng.choice(SLACK[name])) for distance in reach]
    return made


def batch(
    kind: str, pool: dict[str, list[Puzzle]], size: int, rng: random.Random, ids: dict[str, int]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels (answers only), padded on the right, in four parts of similar length to spare padding."""
    rows = []
    for _ in range(size):
        family = rng.choices(list(SHARE), list(SHARE.values()))[0]
        puzzle = rng.choice(pool[family])
        text, ended = trace(kind, family, puzzle, rng)
        prompt = f"<|user|> {puzzle.prompt()} <|assistant|>".split()
        rows.append((len(prompt), [ids[w] for w in prompt + text.split() + ([vocabulary.END] if ended else [])]))
    rows.sort(key=lambda row: len(row[1]))
    parts = []
    for at in range(0, size, size // 4):
        some = rows[at : at + size // 4]
        width = len(some[-1][1])
        tokens = torch.tensor([row + [ids[vocabulary.PAD]] * (width - len(row)) for _, row in some])
        labels = torch.tensor([[-100] * begin + row[begin:] + [-100] * (width - len(row)) for begin, row in some])
        parts.append((tokens, labels))
    return parts


def fresh(kind: str) -> LlamaForCausalLM:
    """A Llama with biases on its projections (Qwen2's blocks). Not Qwen2 itself: for that model type transformers 5
    always opens a Qwen tokenizer, whatever the folder says, and the words of the puzzles would be lost."""
    width, layers = SIZE[kind]
    count = len(vocabulary.words())
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=count,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            attention_bias=True,
            bos_token_id=None,
            eos_token_id=vocabulary.words().index(vocabulary.END),
            pad_token_id=vocabulary.words().index(vocabulary.PAD),
            initializer_range=0.02 * math.sqrt(768 / width) / 2,
        )
    )


def train(
    kind: str, minutes: float, start: Path | None, size: int = 64, rate: float = 3e-3, seed: int = 0
) -> LlamaForCausalLM:
    """AdamW with a short warm-up and a cosine decay over wall-clock time, so that `minutes` is what it takes."""
    rng = random.Random(seed)
    pool = pools(rng)
    model = fresh(kind) if start is None else LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    ids = {word: i for i, word in enumerate(vocabulary.words())}
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    began, step, told = time.time(), 0, 0.0
    while (share := (time.time() - began) / (60 * minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)
        parts = batch(kind, pool, size, rng, ids)
        total = sum(int((labels >= 0).sum()) for _, labels in parts)
        optimiser.zero_grad()
        loss = 0.0
        for tokens, labels in parts:
            part = model(input_ids=tokens, labels=labels).loss * int((labels >= 0).sum()) / total
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        told = loss if step == 0 else 0.95 * told + 0.05 * loss
        if step % 200 == 0:
            print(f"step {step}  loss {told:.4f}  {100 * share:.0f} %", flush=True)
        step += 1
    return model


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """An ordinary Hugging Face folder; bfloat16 on disk halves the package and costs nothing measurable."""
    ids = {word: i for i, word in enumerate(vocabulary.words())}
    model.bfloat16().save_pretrained(folder)
    generation = GenerationConfig(
        eos_token_id=ids[vocabulary.END], pad_token_id=ids[vocabulary.PAD], do_sample=True, temperature=1.0
    )
    generation.save_pretrained(folder)
    vocabulary.save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="rebuild a shipped toy model")
    parser.add_argument("kind", choices=["base", "teacher"])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="go on from this folder instead of from random weights")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    save(
        train(args.kind, args.minutes, args.start, rate=args.rate, seed=args.seed),
        args.out or Path(__file__).parent / "models" / args.kind,
    )


if __name__ == "__main__":
    main()
