"""Denominators are counted once over the whole batch, and micro-batches are only a way to save memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bridgelm.model.batching import collate, idle, make_batch, plan, split_rows
from bridgelm.types import Problem, Row

PROBLEM = Problem("p", ({"role": "user", "content": "?"},))


def row(kind: Any = "rollout", own: int = 3, prompt: int = 2, group: int = 0, at: str = "live") -> Row:
    ids = np.arange(1, 1 + prompt + own)
    return Row(ids, np.arange(len(ids)) >= prompt, kind, PROBLEM, group, at, old_logps=-np.ones(len(ids)))


def test_denominators() -> None:
    rows = [row(own=3).with_stream("pg", 0.0), row(own=5).with_stream("pg", 2.0), row(own=4),
            row("demo", own=7).with_stream("nll", 1.0)]
    assert make_batch(rows).counts == {"pg": 8.0, "nll": 7.0}, "a zero weight counts, a row without the stream does not"
    for norm, constant, wanted in (("token", 9.0, 8.0), ("row", 9.0, 2.0), ("constant", 9.0, 18.0)):
        made = [r.with_stream("pg", 1.0, norm, constant) for r in rows[:2]]  # type: ignore[arg-type]
        assert make_batch(made).counts == {"pg": wanted}
    mask = np.array([False, False, True, False, True])
    assert make_batch([row().with_stream("pg", 1.0, mask=mask)]).counts == {"pg": 2.0}


def test_what_each_norm_sums_to() -> None:
    """With a loss of 1 a token: token and row means are 1, a constant length counts tokens against it."""
    rows = [row(own=n) for n in (1, 2, 6)]
    for norm, wanted in (("token", 1.0), ("row", 1.0), ("constant", 9 / 12)):
        made = [r.with_stream("pg", 1.0, norm, 4.0) for r in rows]  # type: ignore[arg-type]
        micro = collate(made, torch.float64, torch.device("cpu"), {})
        assert float(micro.scale["pg"].sum()) / make_batch(made).counts["pg"] == pytest.approx(wanted)


def test_plan_keeps_kinds_apart_and_every_row_once() -> None:
    rng = np.random.default_rng(0)
    rows = [row("demo" if rng.random() < 0.4 else "rollout", own=int(rng.integers(1, 30))) for _ in range(60)]
    for budget in (1, 31, 64, 200, 10**6):
        micros = plan(rows, budget, {3, 4}, False)
        assert sorted(i for m in micros for i in m) == [i for i in range(60) if i not in (3, 4)]
        for micro in micros:
            assert len({rows[i].kind for i in micro}) == 1
            padded = max(len(rows[i].ids) for i in micro) * len(micro)
            assert padded <= budget or len(micro) == 1
    assert len(plan(rows, 10**6, set(), False)) == 2


def test_idle_rows_are_those_without_any_weight() -> None:
    rows = [row().with_stream("pg", 0.0), row().with_stream("pg", 1.0),
            row().with_stream("pg", 0.0).with_stream("kl", 1.0),
            row("demo").with_stream("nll", 1.0), row().with_stream("pg", 1.0, mask=np.zeros(5, bool))]
    assert idle(rows, ["pg"]) == {0, 2, 3, 4}
    assert idle(rows, ["pg", "kl"]) == {0, 3, 4}
    assert idle(rows, ["nll"]) == {0, 1, 2, 4}


def test_collate_pads_with_nothing() -> None:
    rows = [row(own=2, prompt=1).with_stream("pg", np.array([0.0, 1.0, 2.0])), row(own=4, prompt=3)]
    micro = collate(rows, torch.float64, torch.device("cpu"), {"a": 1})
    assert micro.ids_BT.tolist() == [[1, 2, 3, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7]]
    assert micro.pad_BT.sum(1).tolist() == [3, 7]
    assert micro.own_BT.tolist() == [[False, True, True, False, False, False, False], [False] * 3 + [True] * 4]
    assert micro.weight["pg"].tolist() == [[0, 1, 2, 0, 0, 0, 0], [0] * 7]
    assert micro.scale["pg"].tolist() == [[0, 1, 1, 0, 0, 0, 0], [0] * 7]
    assert micro.old_BT[0].tolist() == [-1, -1, -1, 0, 0, 0, 0]
    assert micro.stats == {"a": 1}
    assert "pg" in micro
    assert "kl" not in micro


def test_several_updates_share_whole_groups_evenly() -> None:
    rows = [row(group=g) for g in (7, 3, 5, 9) for _ in range(2)] + [row("demo", own=i + 1) for i in range(6)]
    rows += [row(group=20 + g, at="shadow") for g in range(2)]
    parts = split_rows(rows, 2)
    assert sorted(map(id, rows)) == sorted(id(r) for part in parts for r in part)
    for part in parts:
        live = {r.group for r in part if r.kind == "rollout" and r.at == "live"}
        assert len(live) == 2
        assert all(sum(r.group == g for r in part) == 2 for g in live), "a group was torn apart"
        assert sum(r.kind == "demo" for r in part) == 3
        assert sum(r.at == "shadow" for r in part) == 1
    assert split_rows(rows, 1) == [rows]
