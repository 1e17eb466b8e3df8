"""SFT with other losses or other data: each method's real terms on a tiny real model, against loops over rows and
tokens that take their log-probs from the model's logits and their gradients from autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mutants import Swaps, mutate
from torch import Tensor
from transformer import wide_norm

from bridgelm import grads, losses
from bridgelm.batching import make_batch
from bridgelm.config import make_config
from bridgelm.methods import dft as dft_module
from bridgelm.policy import Grads
from bridgelm.types import Row
from tiny import open_session, raw_config


@pytest.fixture(autouse=True)
def _wide_norm() -> Iterator[None]:
    with wide_norm():
        yield


def opened(folder: Path, method: dict[str, Any], **changes: Any) -> Any:
    return open_session(make_config(raw_config(folder, method, **changes)))


def shaken(session: Any, size: float = 0.1) -> Any:
    """The session, with theta away from where it began (and so from a reference)."""
    with torch.no_grad():
        for i, t in enumerate(session.policy.groups["theta"].full.values()):
            t += size * torch.sin(torch.arange(t.numel(), dtype=t.dtype) * 1.3 + i).reshape(t.shape)
    session.policy._stale = True
    return session


def found_by(session: Any, rows: list[Row], module: Any = None) -> Grads:
    """The method's loss and gradient on rows; of a mutant, if its module is given."""
    method = session.method
    if module is not None:
        method = getattr(module, type(method).__name__)(method.options, method.run)
    return session.policy.grad(method.terms, make_batch(rows), {"nll": 1.0})


def logits_of(session: Any, row: Row, at: str = "live") -> Tensor:
    """(T - 1, V): what predicts the tokens from the second on."""
    with session.policy.at(at) as model:
        return model(input_ids=torch.tensor(row.ids)[None]).logits[0, :-1]


def by_hand(session: Any, rows: list[Row], token: Callable[[Tensor, Tensor, int], Tensor],
            tokens: int | None = None) -> tuple[float, grads.Gradient]:
    """Sum over own tokens of token(logits of the policy, logits of the reference, id) over their number."""
    policy = session.policy
    reference = "reference" if "reference" in policy.groups else "live"
    with torch.no_grad():
        base = [logits_of(session, row, reference) for row in rows]
    for p in policy.params.values():
        p.requires_grad_()
    terms = []
    for row, other in zip(rows, base, strict=True):
        logits = logits_of(session, row)
        terms += [token(logits[t - 1], other[t - 1], int(row.ids[t])) for t in range(1, len(row.ids)) if row.own[t]]
    loss = torch.stack(terms).sum() / (tokens or len(terms))
    found = torch.autograd.grad(loss, list(policy.params.values()))
    return float(loss.detach()), dict(zip(policy.params, found, strict=True))


def distance(found: Grads, wanted: tuple[float, grads.Gradient]) -> float:
    """Of the gradients, relative; 1 if the losses differ."""
    if found.losses["nll"] != pytest.approx(wanted[0], rel=1e-9, abs=1e-14):
        return 1.0
    size = grads.norm(wanted[1])
    assert size > 1e-4
    return grads.norm(grads.mix((1.0, found.theta), (-1.0, wanted[1]))) / size


# -- dft -------------------------------------------------------------------------------------------------------------

def dft_token(logits: Tensor, base: Tensor, token: int) -> Tensor:
    """The official code's loss: the cross-entropy of the token times its softmax, detached."""
    loss = torch.nn.functional.cross_entropy(logits[None], torch.tensor([token]))
    return loss * torch.softmax(logits, -1)[token].detach()


def prift_token(logits: Tensor, base: Tensor, token: int) -> Tensor:
    return -torch.log_softmax(logits, -1)[token] * torch.softmax(base, -1)[token]


DFT_MUTANTS: dict[str, tuple[Swaps, Swaps]] = {  # of the method's file, and of the losses
    "no stop-gradient": ((), (("(logp_BT.detach() - math.log(alpha))", "(logp_BT - math.log(alpha))"),)),
    "p above 1": ((), (("- math.log(alpha)).clamp(max=0.0)", "- math.log(0.1))"),)),
    "plain SFT": ((('batch.weight["nll"] * losses.prob_weight(of)', 'batch.weight["nll"]'),), ()),
    "the square of p": ((("losses.prob_weight(of))", "losses.prob_weight(2 * of))"),), ()),
    "the other model": (((' == "reference" else live.logp_BT', ' == "live" else live.logp_BT'),), ()),
}


@pytest.mark.parametrize(("weights_of", "token"), [("live", dft_token), ("reference", prift_token)])
def test_dft_weighs_each_token_with_its_own_probability(tmp_path: Path, weights_of: str, token: Any) -> None:
    session = shaken(opened(tmp_path, {"name": "dft", "weights_of": weights_of}))
    assert isinstance(session.method, dft_module.Dft)
    rows = session.method.gather(session.data, session.roll, 0)
    wanted = by_hand(session, rows, token)
    found = found_by(session, rows)
    assert distance(found, wanted) < 1e-9
    metrics = session.method.update(session.policy, make_batch(rows), 0)
    assert metrics["loss/nll"] == found.losses["nll"]
    sft, _ = by_hand(opened(tmp_path / "sft", {"name": "sft"}), rows, lambda x, _, y: -torch.log_softmax(x, -1)[y])
    assert found.losses["nll"] < sft
    for name, (swaps, of_losses) in DFT_MUTANTS.items():
        if name == "no stop-gradient" and weights_of == "reference":  # whose log-probs have no gradient anyhow
            continue
        again = shaken(opened(tmp_path / name / weights_of, {"name": "dft", "weights_of": weights_of}))
        module = mutate(dft_module, swaps)
        module.losses = mutate(losses, of_losses)  # type: ignore[attr-defined]
        assert distance(found_by(again, rows, module), wanted) > 1e-3, name


def test_dft_reports_plain_nll_and_the_mean_weight(tmp_path: Path) -> None:
    session = opened(tmp_path, {"name": "dft"})
    rows = session.method.gather(session.data, session.roll, 0)
    nll, _ = by_hand(session, rows, lambda x, _, y: -torch.log_softmax(x, -1)[y])
    prob, _ = by_hand(session, rows, lambda x, _, y: torch.softmax(x, -1)[y])
    metrics = session.method.update(session.policy, make_batch(rows), 0)
    assert (metrics["dft/nll"], metrics["dft/prob"]) == (pytest.approx(nll), pytest.approx(prob))
