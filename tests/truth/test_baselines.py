"""The plain baselines against slow, obvious versions: loops over rows and tokens on a tiny real model, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer import wide_norm

from bridgelm.config.run_config import make_config
from bridgelm.methods.alternate import Alternate
from bridgelm.methods.grpo import Grpo
from bridgelm.methods.sequence import Sequence
from bridgelm.methods.sft import Sft
from bridgelm.model.batching import make_batch
from tiny import open_session, raw_config


@pytest.fixture(autouse=True)
def _wide_norm() -> Iterator[None]:
    with wide_norm():
        yield


def opened(folder: Path, method: dict[str, Any], **changes: Any) -> Any:
    return open_session(make_config(raw_config(folder, method, **changes)))


def test_sft_is_the_mean_over_all_demonstration_tokens(tmp_path: Path) -> None:
    session = opened(tmp_path, {"name": "sft"})
    assert isinstance(session.method, Sft)
    rows = session.method.gather(session.data, session.roll, 0)
    loss = session.policy.grad(session.method.terms, make_batch(rows), {"nll": 1.0}).losses["nll"]
    tokens = [logp for row, scored in zip(rows, session.policy.score(rows)) for logp in scored[row.own]]
    assert len({int(row.own.sum()) for row in rows}) > 1, "rows of one length could not tell the two means apart"
    assert loss == pytest.approx(-sum(tokens) / len(tokens), rel=1e-10)


@pytest.mark.parametrize("std", [False, True])
@pytest.mark.parametrize("aggregate", ["token", "row", "constant"])
def test_grpo_is_the_clipped_surrogate_of_its_groups(tmp_path: Path, std: bool, aggregate: str) -> None:
    session = opened(tmp_path, {"name": "grpo", "rl": {"std": std, "aggregate": aggregate}})
    assert isinstance(session.method, Grpo)
    rows = session.method.gather(session.data, session.roll, 0)
    with torch.no_grad():  # away from the policy that sampled, so that ratios differ and some are clipped
        for i, t in enumerate(session.policy.groups["theta"].full.values()):
            t += 0.1 * torch.sin(torch.arange(t.numel(), dtype=t.dtype) + i).reshape(t.shape)
    loss = session.policy.grad(session.method.terms, make_batch(rows), {"pg": 1.0}).losses["pg"]
    scored, total, denominator, clipped = session.policy.score(rows), 0.0, 0.0, 0
    for i, row in enumerate(rows):
        rewards = [other.reward for other in rows if other.group == row.group]
        mean = sum(rewards) / len(rewards)
        spread = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
        advantage = (row.reward - mean) / (spread + 1e-6 if std else 1.0)
        summed = 0.0
        for t in range(len(row.ids)):
            if row.own[t]:
                ratio = math.exp(scored[i][t] - row.old_logps[t])
                bounded = min(max(ratio, 0.8), 1.28)
                clipped += bounded != ratio
                summed += -min(ratio * advantage, bounded * advantage)
        length = int(row.own.sum())
        total += summed / length if aggregate == "row" else summed
        denominator += {"token": length, "row": 1, "constant": session.config.rollout.max_new_tokens}[aggregate]
    assert clipped, "nothing was clipped"
    assert loss == pytest.approx(total / denominator, rel=1e-9, abs=1e-12)


def test_alternate_steps_at_half_size_and_in_turn(tmp_path: Path) -> None:
    session = opened(tmp_path, {"name": "alternate", "every": 3, "half_steps": True, "sft_lr": 0.5})
    assert isinstance(session.method, Alternate)
    assert [session.method.imitates(step) for step in range(6)] == [False, False, True, False, False, True]
    rates = {name: named.lr for name, named in session.policy.optimisers.items()}
    assert rates == {"theta": session.config.optim.lr / 2, "theta_sft": 0.25}


def test_sequence_gives_each_step_to_its_stage(tmp_path: Path) -> None:
    stages = [{"method": {"name": "sft"}, "steps": 3}, {"method": {"name": "grpo"}}]
    session = opened(tmp_path, {"name": "sequence", "stages": stages}, steps=5)
    assert isinstance(session.method, Sequence)
    kinds = [{row.kind for row in session.method.gather(session.data, session.roll, step)} for step in range(5)]
    assert kinds == [{"demo"}] * 3 + [{"rollout"}] * 2
