"""Makes rows a batch with the denominators of the whole batch, and that micro-batches of padded tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bridgelm import dist
from bridgelm.model.packing import line_up, prefix
from bridgelm.types import Batch, Micro, Problem, Row

BLANK = Row(np.zeros(2, dtype=np.int64), np.array([False, True]), "demo", Problem("", ()))


def make_batch(rows: Sequence[Row], stats: Mapping[str, Any] | None = None) -> Batch:
    """Counts the denominator of every stream over all rows, before anything is split: a wrong denominator is one of the
    two bugs that spoilt the SFT baselines of many papers."""
    counts: dict[str, float] = {}
    for row in rows:
        for name, stream in row.streams.items():
            tokens = float(stream.mask.sum())
            share = {"token": tokens, "row": float(tokens > 0), "constant": stream.constant}[stream.norm]
            counts[name] = counts.get(name, 0.0) + row.times * share
    return Batch(tuple(rows), counts, stats or {})


def split_rows(rows: Sequence[Row], parts: int) -> list[list[Row]]:
    """Splits the rows of a rollout batch for several updates. Groups stay whole; they and the demonstrations are dealt
    out evenly and in order."""
    if parts == 1:
        return [list(rows)]
    part_of: dict[int, int] = {}
    # The groups that one policy answered are dealt out evenly; a group that several answered still stays together.
    for source in sorted({row.at for row in rows}, key=lambda at: (at != "live", at)):
        groups = sorted({row.group for row in rows if row.kind == "rollout" and row.at == source} - part_of.keys())
        part_of |= {group: i * parts // len(groups) for i, group in enumerate(groups)}
    demos = [row for row in rows if row.kind == "demo"]
    out: list[list[Row]] = [[] for _ in range(parts)]
    for row in rows:
        if row.kind == "rollout":
            out[part_of[row.group]].append(row)
    for i, row in enumerate(demos):
        out[i * parts // len(demos)].append(row)
    return [part for part in out if part]


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """Splits a batch into two that share no group and no demonstration, and keeps the denominators of the whole: the
    two gradients add up to the batch's, and are two independent estimates of half of it."""
    where: dict[tuple[str, int], int] = {}
    parts: tuple[list[Row], list[Row]] = ([], [])
    demos = 0
    for row in batch.rows:
        if row.kind == "demo":
            parts[demos % 2].append(row)
            demos += 1
        else:
            parts[where.setdefault((row.at, row.group), len(where)) % 2].append(row)
    return replace(batch, rows=tuple(parts[0])), replace(batch, rows=tuple(parts[1]))


def micros_of_rank(rows: Sequence[Row], budget: int, skip: set[int], packed: bool,
                   even: bool = False) -> list[tuple[list[int], list[Row]]]:
    """The micro-batches that this rank computes, each as indices and rows. The largest are halved until all ranks have
    equally many, as far as there are rows enough. With `even` they always have: a rank that lacks a micro-batch gets
    one of no indices and a blank row."""
    micros, ranks = plan(rows, budget, skip, packed), dist.world()
    while len(micros) % ranks and len(largest := max(micros, key=len)) > 1:
        place, half = micros.index(largest), len(largest) // 2
        micros[place:place + 1] = [largest[:half], largest[half:]]
    micros += [[]] * (-len(micros) % ranks if even else 0)
    return [(micros[i], [rows[k] for k in micros[i]] or [BLANK]) for i in dist.share(len(micros))]


def exchange(values: Mapping[str, Mapping[int, np.ndarray]]) -> dict[str, dict[int, np.ndarray]]:
    """Joins what the ranks found out about their rows, by the name of the quantity and the index of the row."""
    found = dist.gather({f"{name}/{i}": array for name, arrays in values.items() for i, array in arrays.items()})
    out: dict[str, dict[int, np.ndarray]] = {name: {} for name in values}
    for key, array in found.items():
        name, _, i = key.rpartition("/")
        out[name][int(i)] = array
    return out


def plan(rows: Sequence[Row], budget: int, skip: set[int], packed: bool) -> list[list[int]]:
    """The indices of the rows of each micro-batch. Its rows are of one kind and of similar length, and it has no more
    than `budget` tokens. Padding counts as well, unless the model takes rows packed: then a prompt that several rows
    share counts once, and these rows stand together."""
    micros: list[list[int]] = []
    for kind in ("demo", "rollout"):
        current: list[int] = []
        size, prompts = 0, set[bytes]()
        for i in _in_order(rows, [i for i, row in enumerate(rows) if row.kind == kind and i not in skip], packed):
            prompt, length = _prompt(rows[i]), len(rows[i].ids)
            padded = (len(current) + 1) * len(rows[current[0]].ids) if current else length
            wanted = size + length - (prefix(rows[i]) if prompt in prompts else 0) if packed else padded
            if current and wanted > budget:
                micros.append(current)
                current, wanted, prompts = [], length, set()
            current.append(i)
            size = wanted
            prompts.add(prompt)
        if current:
            micros.append(current)
    return micros


def _in_order(rows: Sequence[Row], chosen: list[int], packed: bool) -> list[int]:
    by_length = sorted(chosen, key=lambda i: len(rows[i].ids), reverse=True)
    if not packed:
        return by_length
    sharing: dict[bytes, list[int]] = {}
    for i in by_length:  # a prompt's longest row decides where all of them stand
        sharing.setdefault(_prompt(rows[i]), []).append(i)
    return [i for together in sharing.values() for i in together]


def _prompt(row: Row) -> bytes:
    return row.ids[:prefix(row)].tobytes()


def idle(rows: Sequence[Row], terms: Sequence[str]) -> set[int]:
    """The rows that have no weight in any of the terms. Denominators are counted already, so these can be skipped."""
    return {i for i, row in enumerate(rows) if not (row.times and any(
        name in row.streams and np.any(row.streams[name].weight * row.streams[name].mask) for name in terms))}


def collate(rows: Sequence[Row], dtype: torch.dtype, device: torch.device, stats: Mapping[str, Any]) -> Micro:
    """The tensors of a micro-batch, padded on the right, and its layout without padding."""
    length = max(len(row.ids) for row in rows)
    shape = (len(rows), length)

    def stack(values: Iterator[np.ndarray | None], kind: type) -> np.ndarray:
        out = np.zeros(shape, dtype=kind)
        for b, value in enumerate(values):
            if value is not None:
                out[b, :len(value)] = value
        return out

    def real(values: Iterator[np.ndarray | None]) -> torch.Tensor:
        return torch.from_numpy(stack(values, np.float64)).to(device, dtype)

    names = sorted({name for row in rows for name in row.streams})
    streams = {name: [row.streams.get(name) for row in rows] for name in names}
    scale = {name: [None if s is None else row.times * s.mask / (max(1, s.mask.sum()) if s.norm == "row" else 1)
                    for row, s in zip(rows, stream, strict=True)] for name, stream in streams.items()}
    pads = (np.ones(len(row.ids)) for row in rows)
    return Micro(
        ids_BT=torch.from_numpy(stack((row.ids for row in rows), np.int64)).to(device),
        pad_BT=torch.from_numpy(stack(pads, np.bool_)).to(device),
        own_BT=torch.from_numpy(stack((row.own for row in rows), np.bool_)).to(device),
        old_BT=real(row.old_logps for row in rows),
        ref_BT=real(row.ref_logps for row in rows),
        teacher_BT=real(None if row.teacher_logps is None else np.nan_to_num(row.teacher_logps) for row in rows),
        taught_BT=torch.from_numpy(stack((None if row.teacher_logps is None else row.own & ~np.isnan(row.teacher_logps)
                                          for row in rows), np.bool_)).to(device),
        temperature_B=torch.tensor([row.temperature for row in rows], dtype=dtype, device=device),
        layout=line_up(rows),
        weight={name: real(None if s is None else s.weight for s in stream) for name, stream in streams.items()},
        scale={name: real(iter(scale[name])) for name in names},
        stats=stats,
    )
