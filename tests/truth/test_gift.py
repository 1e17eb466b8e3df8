"""GIFT's soft targets, and the cross-entropy to another point's distribution that they need: the real method on tiny
real models, against the official code's formulas on whole logits, written out here in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from mutation import Mutant, mutants
from torch import Tensor
from transformer import wide_norm

from bridgelm.config.options.core import SftOptions
from bridgelm.methods import gift
from bridgelm.methods.sft import Sft
from bridgelm.model import batching, forward, grads
from bridgelm.model.batching import make_batch
from bridgelm.model.policy import Grads
from bridgelm.types import Row

Open = Callable[..., Any]


@pytest.fixture(autouse=True)
def _wide_norm() -> Iterator[None]:
    with wide_norm():
        yield


@pytest.fixture
def moved(session: Open, tiny_folder: Callable[[str], Any]) -> Open:
    """A session of GIFT on a kind of model, theta away from its base."""
    def make(kind: str = "qwen2", model: dict[str, Any] | None = None, **options: Any) -> Any:
        made = session({"name": "gift", **options}, model={"name_or_path": str(tiny_folder(kind)), **(model or {})})
        with torch.no_grad():
            for i, t in enumerate(made.policy.groups["theta"].flat().values()):
                t += 0.2 * torch.sin(torch.arange(t.numel(), dtype=t.dtype) * 1.3 + i).reshape(t.shape)
        made.policy.load(made.policy.tensors())  # the merged weights are old
        return made
    return make


def found_by(session: Any, rows: list[Row], method: Any = None) -> Grads:
    method = method or session.method
    return session.policy.grad(method.terms, make_batch(rows), {"nll": 1.0}, soft=("reference", method.target))


def official(ref_logits: Tensor, token: int, beta: float, smooth: float) -> Tensor:
    """Steps 3 to 5 of the official trainer for one position."""
    probs = torch.softmax(ref_logits, -1)
    mixed = (1 - smooth) * probs + smooth * (1.0 / len(probs))
    raised = torch.log(mixed + 1e-10)
    raised[token] = raised[token] + beta
    return torch.softmax(raised, -1)


def by_hand(session: Any, rows: list[Row], beta: float, smooth: float = 0.0) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient in the model's weights, from whole logits, row by row."""
    policy, terms = session.policy, []

    def logits(row: Row) -> Tensor:
        return model(input_ids=torch.tensor(row.ids)[None]).logits[0, :-1]
    with policy.at("reference") as model, torch.no_grad():
        base = [logits(row) for row in rows]
    with policy.at("live") as model:
        for p in policy.params.values():
            p.requires_grad_()
        for row, other in zip(rows, base, strict=True):
            logp = torch.log_softmax(logits(row), -1)
            terms += [-(official(other[t - 1], int(row.ids[t]), beta, smooth) * logp[t - 1]).sum()
                      for t in range(1, len(row.ids)) if row.own[t]]
        loss = torch.stack(terms).sum() / len(terms)
        found = torch.autograd.grad(loss, list(policy.params.values()))
    return float(loss.detach()), dict(zip(policy.params, found, strict=True))


def distance(found: Grads, wanted: tuple[float, dict[str, Tensor]]) -> float:
    if found.losses["nll"] != pytest.approx(wanted[0], rel=1e-9):
        return 1.0
    size = grads.norm(wanted[1])
    assert size > 1e-4
    return grads.norm(grads.mix((1.0, found.theta), (-1.0, wanted[1]))) / size


@pytest.mark.parametrize(("beta", "smooth"), [(2.0, 0.0), (1.0, 0.3), (20.0, 0.0)])
@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_gift_is_the_official_loss(moved: Open, kind: str, beta: float, smooth: float,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """With a plain head (tied to the embeddings) and with one that caps its logits; whole, and in chunks of a token."""
    session = moved(kind, beta=beta, smooth=smooth)
    assert isinstance(session.method, gift.Gift)
    assert (session.policy.model.config.model_type in forward.PLAIN_HEAD) == (kind == "qwen2")
    rows = session.method.gather(session.data, session.roll, 0)
    wanted = by_hand(session, rows, beta, smooth)
    before = {n: p.data.clone() for n, p in session.policy.params.items()}
    assert distance(found_by(session, rows), wanted) < 1e-9
    for chunk in (1, 29 * 3):
        monkeypatch.setattr(forward, "CHUNK", chunk)
        for micro_tokens in (1, 10**6):
            session.policy.micro_tokens = micro_tokens
            assert distance(found_by(session, rows), wanted) < 1e-9
    assert all(torch.equal(p.data, before[n]) for n, p in session.policy.params.items()), "the live weights are back"


def test_gift_in_low_rank_and_with_checkpointing(moved: Open) -> None:
    session = moved("llama", {"lora_rank": 3, "gradient_checkpointing": True}, beta=2.0)
    rows = session.method.gather(session.data, session.roll, 0)
    loss, whole = by_hand(session, rows, 2.0)
    found = found_by(session, rows)
    assert found.losses["nll"] == pytest.approx(loss, rel=1e-9)
    theta = session.policy.groups["theta"]
    wanted = theta.zeros()
    for name, g in whole.items():
        theta.collect(wanted, name, g)
    assert grads.norm(grads.mix((1.0, found.theta), (-1.0, wanted))) < 1e-9 * grads.norm(wanted)


def test_a_whole_update(moved: Open) -> None:
    """In which the point that is aimed at is named."""
    session = moved(beta=2.0, smooth=0.3)
    rows = session.method.gather(session.data, session.roll, 0)
    wanted = by_hand(session, rows, 2.0, 0.3)
    norm = session.method.update(session.policy, make_batch(rows), 0)["grad_norm/theta"]
    assert norm == pytest.approx(grads.norm(wanted[1]), rel=1e-9)


MUTANTS = mutants(
    gift,
    Mutant("drop", "Gift.target", "beta"),
    Mutant("sign", "Gift.target", "beta"),
    Mutant("term", "Gift.target", "smooth 2"),
    Mutant("term", "Gift.target", 7),  # smooth p
    Mutant("denominator", "Gift.target", "smooth"),
    Mutant("constant", "Gift.update", "reference", to="live"),
    Mutant("instead", "Gift.terms", "cross_BT 1", to="logp_BT"),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant, moved: Open) -> None:
    replace(mutant, by=lambda: test_a_whole_update(moved)).check()


def test_target(moved: Open) -> None:
    """Token by token; at the floor of the base's probabilities the raised token has 5 %."""
    base = torch.tensor(np.random.default_rng(0).normal(size=(3, 7)) * 2, dtype=torch.float64)
    base[1, 4] = -60.0  # far below 1e-10
    token = torch.tensor([2, 4, 0])
    target = moved(beta=20.0).method.target(torch.log_softmax(base, -1), token)
    for i in range(3):
        torch.testing.assert_close(target[i], official(base[i], int(token[i]), 20.0, 0.0))
    assert float(target[1, 4]) == pytest.approx(0.0463, abs=1e-3)
    assert float(target[0, 2]) == pytest.approx(1.0, abs=1e-6)


def test_both_ends_of_beta(moved: Open) -> None:
    """beta -> infinity is sft; beta = 0 leaves a policy at its base where it is."""
    session = moved(beta=1e4)
    rows = session.method.gather(session.data, session.roll, 0)
    sft = session.policy.grad(Sft(SftOptions(), session.config).terms, make_batch(rows), {"nll": 1.0})
    found = found_by(session, rows)
    assert found.losses["nll"] == pytest.approx(sft.losses["nll"], rel=1e-12)
    assert grads.norm(grads.mix((1.0, found.theta), (-1.0, sft.theta))) < 1e-12 * grads.norm(sft.theta)
    still = moved(beta=0.0)
    still.policy.copy("reference", "theta")
    assert grads.norm(found_by(still, rows).theta) < 1e-7, "but for the floor"


def test_another_points_distribution_at_each_rows_temperature(moved: Open) -> None:
    """The core's part: cross-entropy of any two points, and what it costs."""
    session = moved()
    policy, rows = session.policy, session.method.gather(session.data, session.roll, 0)[:3]
    ledger, seen = policy.ledger, []
    scored = ledger.score

    def terms(micro: Any, live: Any) -> dict[str, Tensor]:
        seen.append(live.cross_BT.detach())
        return {"nll": micro.weight["nll"] * live.cross_BT}
    heated = [Row(r.ids, r.own, "demo", r.problem, temperature=0.5 + i).with_stream("nll", 1.0)
              for i, r in enumerate(rows)]
    policy.micro_tokens = 10**6
    policy.grad(terms, make_batch(heated), {"nll": 1.0}, at="reference", soft=("live", lambda logq, _: logq.exp()))
    assert ledger.score - scored == sum(len(row.ids) for row in rows)
    order = batching.plan(heated, 10**6, set(), False)[0]
    for b, i in enumerate(order):
        row = heated[i]
        tables = []
        for point in ("live", "reference"):
            with policy.at(point) as model, torch.no_grad():
                logits = model(input_ids=torch.tensor(row.ids)[None]).logits[0]
            tables.append(torch.log_softmax(logits / row.temperature, -1))
        for t in range(1, len(row.ids)):
            wanted = -float((tables[0][t - 1].exp() * tables[1][t - 1]).sum()) if row.own[t] else 0.0
            assert float(seen[0][b, t]) == pytest.approx(wanted, abs=1e-12)
