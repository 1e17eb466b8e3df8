"""The plain baselines against slow, obvious versions: loops over rows and tokens on a tiny real model, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hand import gather, in_folder, opened, sessions
from mutation import Mutant, mutants

from bridgelm.model.batching import make_batch
from bridgelm.objective import credit, losses


@pytest.fixture(autouse=True)
def _sessions() -> Iterator[None]:
    with sessions():
        yield


def test_sft_is_the_mean_over_all_demonstration_tokens(tmp_path: Path) -> None:
    session = opened(tmp_path, {"name": "sft"})
    rows = gather(session)
    loss = session.policy.grad(session.method.terms, make_batch(rows), {"nll": 1.0}).losses["nll"]
    tokens = [logp for row, scored in zip(rows, session.policy.score(rows)) for logp in scored[row.own]]
    assert len({int(row.own.sum()) for row in rows}) > 1, "rows of one length could not tell the two means apart"
    assert loss == pytest.approx(-sum(tokens) / len(tokens), rel=1e-10)


@pytest.mark.parametrize("std", [False, True])
@pytest.mark.parametrize("aggregate", ["token", "row", "constant"])
def test_grpo_is_the_clipped_surrogate_of_its_groups(tmp_path: Path, aggregate: str, std: bool) -> None:
    session = opened(tmp_path, {"name": "grpo", "rl": {"std": std, "aggregate": aggregate}})
    rows = gather(session)
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


def test_sequence_gives_each_step_to_its_stage(tmp_path: Path) -> None:
    stages = [{"method": {"name": "sft"}, "steps": 3}, {"method": {"name": "grpo"}}]
    session = opened(tmp_path, {"name": "sequence", "stages": stages}, steps=5)
    assert [{row.kind for row in gather(session, step)} for step in range(5)] == [{"demo"}] * 3 + [{"rollout"}] * 2


def grpo_without_std(folder: Path) -> None:
    test_grpo_is_the_clipped_surrogate_of_its_groups(folder, "token", False)


MUTANTS = mutants(
    losses,
    Mutant("clip", "pg_clip", "minimum 0", by=in_folder(grpo_without_std)),
    Mutant("clip", "pg_clip", "clamp 1", by=in_folder(grpo_without_std)),
    Mutant("swap", "pg_clip", 0, by=in_folder(grpo_without_std)),  # the ratio upside down
    Mutant("branch", "with_advantages", "zscore 0", by=in_folder(grpo_without_std), of=credit),
    Mutant("term", "centre", "mean 0", by=in_folder(grpo_without_std), of=credit),
    Mutant("sign", "nll", by=in_folder(test_sft_is_the_mean_over_all_demonstration_tokens)),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()
