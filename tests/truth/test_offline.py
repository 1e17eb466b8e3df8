"""SFT with other losses or other data: each method's real terms on a tiny real model, against loops over rows and
tokens that take their log-probs from the model's logits and their gradients from autograd."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutation import Mutant, mutants
from torch import Tensor

from bridgelm.config.options import samples
from bridgelm.config.options.core import GrpoOptions, SftOptions
from bridgelm.config.run_config import make_config
from bridgelm.errors import UserError
from bridgelm.methods import dft, fdiv_sft, rft
from bridgelm.methods.grpo import Grpo
from bridgelm.methods.sft import Sft
from bridgelm.model import batching, grads
from bridgelm.model.batching import make_batch
from bridgelm.model.policy import Grads
from bridgelm.objective import losses
from bridgelm.types import Grade, Live, Problem, Row, Verdict
from tiny import raw_config

pytestmark = pytest.mark.usefixtures("wide_norms")

Open = Callable[..., Any]


@pytest.fixture
def opened(session: Open) -> Open:
    return session


def shaken(session: Any, size: float = 0.1) -> Any:
    """The session, with theta away from where it began (and so from a reference)."""
    session.policy.fork("moved")
    with torch.no_grad():
        for i, t in enumerate(session.policy.groups["moved"].full.values()):
            t += size * torch.sin(torch.arange(t.numel(), dtype=t.dtype) * 1.3 + i).reshape(t.shape)
    session.policy.lean("theta", toward="moved", share=1.0)
    del session.policy.groups["moved"]
    return session


def found_by(session: Any, rows: list[Row]) -> Grads:
    """The method's loss and gradient on rows."""
    return session.policy.grad(session.method.terms, make_batch(rows), {"nll": 1.0})


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


@pytest.mark.parametrize(("weights_of", "token"), [("live", dft_token), ("reference", prift_token)])
def test_dft_weighs_each_token_with_its_own_probability(opened: Open, weights_of: str, token: Any) -> None:
    session = shaken(opened({"name": "dft", "weights_of": weights_of}))
    rows = session.method.gather(session.data, session.roll, 0)
    wanted = by_hand(session, rows, token)
    found = found_by(session, rows)
    assert distance(found, wanted) < 1e-9
    assert session.method.update(session.policy, make_batch(rows), 0)["loss/nll"] == found.losses["nll"]


def test_dft_reports_plain_nll_and_the_mean_weight(opened: Open) -> None:
    session = opened({"name": "dft"})
    rows = session.method.gather(session.data, session.roll, 0)
    nll, _ = by_hand(session, rows, lambda x, _, y: -torch.log_softmax(x, -1)[y])
    prob, _ = by_hand(session, rows, lambda x, _, y: torch.softmax(x, -1)[y])
    metrics = session.method.update(session.policy, make_batch(rows), 0)
    assert (metrics["dft/nll"], metrics["dft/prob"]) == (pytest.approx(nll), pytest.approx(prob))


# -- rft -------------------------------------------------------------------------------------------------------------

EVERYTHING = {"name": "rft", "over": "all", "unique": False, "max_per_problem": 0}


def nll_token(logits: Tensor, base: Tensor, token: int) -> Tensor:
    return -torch.log_softmax(logits, -1)[token]


def rollouts(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.kind == "rollout"]


def right(rows: list[Row]) -> list[Row]:
    return [row for row in rollouts(rows) if row.verdict is Verdict.CORRECT]


def tokens(rows: list[Row]) -> int:
    return sum(int(row.own.sum()) for row in rows)


def with_errors(session: Any) -> Any:
    """The grader fails on every fifth answer."""
    grade = session.roll.grader.grade

    def failing(problems: Any, texts: Any) -> Any:
        return [replace(g, verdict=Verdict.ERROR) if i % 5 == 4 else g for i, g in enumerate(grade(problems, texts))]
    session.roll.grader.grade = failing
    return session


def test_rft_over_all_tokens_is_grpo_without_a_baseline(opened: Open) -> None:
    """Against a loop over tokens, and against grpo's own surrogate with advantages 1[right]; graders' faults aside."""
    session = with_errors(opened(EVERYTHING, reward={"max_error_rate": 1.0}))
    rows = session.method.gather(session.data, session.roll, 0)
    graded = [row for row in rollouts(rows) if row.verdict is not Verdict.ERROR]
    assert 2 < len(right(rows)) < len(graded) < len(rollouts(rows))
    wanted = by_hand(session, right(rows), nll_token, tokens(graded))
    found = found_by(session, rows)
    assert distance(found, wanted) < 1e-9
    grpo = Grpo(GrpoOptions(), session.config)
    plain = [replace(row, streams={}).with_stream("pg", float(row.verdict is Verdict.CORRECT)) for row in graded]
    other = session.policy.grad(grpo.terms, make_batch(plain), {"pg": 1.0}).theta
    assert grads.norm(grads.mix((1.0, other), (-1.0, found.theta))) < 1e-9 * grads.norm(other)
    kept = with_errors(opened({**EVERYTHING, "over": "kept"}, reward={"max_error_rate": 1.0}))
    wanted = by_hand(kept, right(rows), nll_token)
    assert distance(found_by(kept, kept.method.gather(kept.data, kept.roll, 0)), wanted) < 1e-9


def scripted(answers: list[tuple[str, list[int], bool, bool]]) -> Callable[..., list[Row]]:
    """A roller that gives these answers (problem, ids, right, finished), whatever it is asked."""
    def roll(problems: Any) -> list[Row]:
        return [Row(np.array([3, 4, *ids]), np.arange(len(ids) + 2) >= 2, "rollout", by_id[name], i // 4,
                    temperature=0.7, reward=float(good), finished=done,
                    verdict=Verdict.CORRECT if good else Verdict.WRONG)
                for i, (name, ids, good, done) in enumerate(answers)]
    by_id: dict[str, Problem] = {}
    roll.by_id = by_id  # type: ignore[attr-defined]
    return roll


ANSWERS = [(0, [7], True, True), (0, [7], True, True), (0, [8], True, True), (0, [9], False, True),
           (1, [7], True, True), (1, [5], True, False), (1, [6, 6], True, True), (1, [7], True, True)]


@pytest.mark.parametrize(("options", "mask", "taught"), [
    ({}, False, [(0, [7]), (0, [8]), (1, [7]), (1, [5]), (1, [6, 6])]),
    ({}, True, [(0, [7]), (0, [8]), (1, [7]), (1, [6, 6])]),
    ({"max_per_problem": 2}, False, [(0, [7]), (0, [8]), (1, [7]), (1, [5])]),
    ({"max_per_problem": 1}, False, [(0, [7]), (1, [7])]),
    ({"unique": False}, False, [(0, [7]), (0, [7]), (0, [8]), (1, [7]), (1, [5]), (1, [6, 6]), (1, [7])]),
])
def test_which_answers_rft_keeps(opened: Open, options: dict[str, Any], mask: bool, taught: list[Any]) -> None:
    session = opened({"name": "rft", **options}, rollout={"prompts": 2, "mask_overlong": mask})
    names = [problem.id for problem in session.data.splits.train[:2]]
    roll = scripted([(names[k], ids, good, done) for k, ids, good, done in ANSWERS])
    roll.by_id.update({p.id: p for p in session.data.splits.train})  # type: ignore[attr-defined]
    rows = session.method.gather(session.data, roll, 0)
    demos = [row for row in rows if row.kind == "demo"]
    assert [(names.index(r.problem.id), r.ids[r.own].tolist()) for r in demos] == taught
    assert all(row.temperature == 1.0 for row in demos), "imitated as demonstrations are"
    assert make_batch(rows).counts["nll"] == sum(len(ids) for _, ids in taught), "what was drawn does not count twice"
    metrics = session.method.update(session.policy, make_batch(rows), 0)
    assert metrics["rft/taught"] == len(taught) and metrics["rft/kept"] == pytest.approx(len(taught) / 7)
    assert metrics["rft/solved"] == 1.0


def test_a_round_is_dealt_out_to_its_steps(opened: Open) -> None:
    """What is drawn once is imitated once, over three steps; a checkpoint carries the rest; the last round is short."""
    method = {"name": "rft", "refresh_every": 3, "max_per_problem": 0, "unique": False}
    session = opened(method, steps=4)
    steps, asked, state = [], [], {}
    for step in range(4):
        session.roll.begin(step)
        before = session.policy.ledger.rollouts
        steps.append(session.method.gather(session.data, session.roll, step))
        asked.append(session.policy.ledger.rollouts - before)
        session.method.update(session.policy, make_batch(steps[-1]), step)
        if step == 0:
            state = json.loads(json.dumps(session.method.state()))
    assert asked == [3 * 16, 0, 0, 16]
    assert not rollouts(steps[1]) and not rollouts(steps[2])
    dealt = [row for step in steps[:3] for row in step if row.kind == "demo"]
    assert [r.ids.tolist() for r in dealt] == [r.ids.tolist() for r in right(steps[0])]
    sizes = [sum(row.kind == "demo" for row in step) for step in steps[:3]]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) > 0
    other = rft.Rft(session.method.options, session.method.run)
    other.load(state)
    again = [other.gather(session.data, session.roll, step) for step in (1, 2)]
    assert [[r.ids.tolist() for r in step] for step in again] == [[r.ids.tolist() for r in s] for s in steps[1:3]]
    for mine, theirs in zip((r for step in again for r in step), (r for step in steps[1:3] for r in step), strict=True):
        assert (mine.own == theirs.own).all() and mine.problem is theirs.problem


class Verdicts:
    """A grader with one verdict for all."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict

    def close(self) -> None:
        pass

    def grade(self, problems: Any, texts: Any) -> Any:
        return [Grade(float(self.verdict is Verdict.CORRECT), self.verdict)] * len(texts)


@pytest.mark.parametrize("over", ["kept", "all"])
def test_rft_on_groups_that_all_pass_or_all_fail(opened: Open, over: str) -> None:
    """All right: SFT on every answer. All wrong: theta stays, even when Adam is in motion (over kept tokens), or has a
    gradient of zero, as grpo has (over all)."""
    session = opened({**EVERYTHING, "over": over})
    session.roll.grader.close()
    session.roll.grader = Verdicts(Verdict.CORRECT)
    rows = session.method.gather(session.data, session.roll, 0)
    assert len(right(rows)) == 16
    assert distance(found_by(session, rows), by_hand(session, right(rows), nll_token)) < 1e-9
    session.method.update(session.policy, make_batch(rows), 0)
    theta = {n: t.clone() for n, t in session.policy.groups["theta"].full.items()}
    session.roll.grader = Verdicts(Verdict.WRONG)
    rows = session.method.gather(session.data, session.roll, 1)
    metrics = session.method.update(session.policy, make_batch(rows), 1)
    assert metrics["grad_norm/theta"] == metrics["loss/nll"] == metrics["rft/solved"] == metrics["rft/taught"] == 0.0
    moved = any(not torch.equal(t, theta[n]) for n, t in session.policy.groups["theta"].full.items())
    assert moved == (over == "all")
    assert "begin with a stage of `sft`" in session.method.warnings(metrics)[0]
    assert not session.method.warnings({"rft/taught": 3.0})


def test_what_rft_refuses(tmp_path: Path, opened: Open) -> None:
    with pytest.raises(UserError, match="over = 'all' needs refresh_every = 1"):
        make_config(raw_config(tmp_path, {"name": "rft", "over": "all", "refresh_every": 2}))
    with pytest.raises(UserError, match=r"rollout\.refill: set it to 0 for method 'rft'"):
        opened({"name": "rft"}, rollout={"refill": 1})


# -- fdiv_sft --------------------------------------------------------------------------------------------------------

BETA = 0.5


def fdiv_token(divergence: str, limit: float = 0.5) -> Callable[[Tensor, Tensor, int], Tensor]:
    """-log pi plus g, from the conjugate itself: (f*(r) - r) / beta, beyond Hellinger's limit its tangent."""
    def conjugate(r: Tensor) -> Tensor:
        if divergence == "pearson":
            return r + r**2 / 4
        if float(r.detach()) < limit:
            return r / (1 - r)
        return limit / (1 - limit) + (r - limit) / (1 - limit) ** 2

    def token(logits: Tensor, base: Tensor, y: int) -> Tensor:
        logp = torch.log_softmax(logits, -1)[y]
        r = BETA * (logp - torch.log_softmax(base, -1)[y])
        return -logp + (conjugate(r) - r) / BETA
    return token


@pytest.mark.parametrize("divergence", ["pearson", "hellinger"])
def test_fdiv_is_its_conjugate_less_the_reward(opened: Open, divergence: str) -> None:
    session = shaken(opened({"name": "fdiv_sft", "divergence": divergence, "beta": BETA}), 0.3)
    rows = session.method.gather(session.data, session.roll, 0)
    logps = session.policy.score(rows)
    moved = [BETA * float(x) for row, logp in zip(rows, logps) for x in (logp - row.ref_logps)[row.own]]
    assert min(moved) < 0 < max(moved) and sum(r > 0.5 for r in moved) > 2, "on both sides, and beyond the limit"
    wanted = by_hand(session, rows, fdiv_token(divergence))
    assert distance(found_by(session, rows), wanted) < 1e-9
    metrics = session.method.update(session.policy, make_batch(rows), 0)
    assert metrics["fdiv/log_ratio"] == pytest.approx(np.mean(moved) / BETA)


def weights(session: Any, h: list[float]) -> list[float]:
    """Minus the slope of a demonstration token's loss in its log-prob, at these log-ratios."""
    row = max(session.method.gather(session.data, session.roll, 0), key=lambda row: row.own.sum())
    row = replace(row, ref_logps=np.zeros(len(row.ids)))
    micro = batching.collate([row], torch.float64, torch.device("cpu"), {})
    leaf = torch.zeros(1, len(row.ids), dtype=torch.float64)
    where = torch.tensor(np.flatnonzero(row.own)[:len(h)])
    leaf[0, where] = torch.tensor(h, dtype=torch.float64)[:len(where)]
    leaf.requires_grad_()
    (session.method.terms(micro, Live(leaf))["nll"] * micro.scale["nll"]).sum().backward()
    assert leaf.grad is not None
    return (-leaf.grad[0, where]).tolist()


def test_the_weights_of_fdiv(opened: Open) -> None:
    """Pearson 1 - (beta/2) h; Hellinger 2 - 1/(1 - r)^2, guarded at r >= 1."""
    pearson = opened({"name": "fdiv_sft", "beta": BETA})
    for some in ([0.0, 1.0, 4.0], [-3.0, 7.0, 100.0]):
        found = weights(pearson, some)
        assert found == pytest.approx([1 - BETA / 2 * h for h in some[:len(found)]])
    hellinger = opened({"name": "fdiv_sft", "beta": BETA, "divergence": "hellinger", "limit": 0.9})
    for some in ([0.0, 0.3, 1.0], [-4.0, -0.5, 1.7]):
        found = weights(hellinger, some)
        assert found == pytest.approx([2 - 1 / (1 - BETA * h) ** 2 for h in some[:len(found)]])
    guarded = weights(hellinger, [1.8, 2.0, 50.0])  # r = .9, 1 and 25
    assert guarded == pytest.approx([2 - 1 / 0.1**2] * len(guarded))
    assert weights(hellinger, [(1 - 0.5**0.5) / BETA])[0] == pytest.approx(0.0, abs=1e-12), "no further than that"


def test_total_variation_is_sft_to_rounding(opened: Open) -> None:
    session = opened({"name": "fdiv_sft", "divergence": "total_variation"})
    assert set(session.policy.groups) == {"theta"}, "it needs no reference"
    rows = session.method.gather(session.data, session.roll, 0)
    sft = Sft(SftOptions(), session.config)
    wanted = shaken(session).policy.grad(sft.terms, make_batch(rows), {"nll": 1.0})
    found = found_by(session, rows)
    assert found.losses == wanted.losses
    assert all(torch.equal(found.theta[n], g) for n, g in wanted.theta.items())
    assert "fdiv/log_ratio" not in session.method.update(session.policy, make_batch(rows), 0)


@pytest.mark.parametrize("divergence", ["pearson", "hellinger"])
def test_the_tie_on_own_samples_is_an_expectation(opened: Open, divergence: str) -> None:
    """Of one token, enumerated: the mean over the policy's own draws of the surrogate's gradient is the gradient of
    E_pi[g]. The surrogate is taken from the method's terms."""
    method = opened({"name": "fdiv_sft", "divergence": divergence, "beta": BETA, "penalty": "own"}).method
    logits = torch.tensor([0.3, -1.2, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    base = torch.tensor([0.0, 0.5, -0.4, 1.0], dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    one, h = torch.ones(4, dtype=torch.float64), logp - base
    r = BETA * h
    g = r**2 / 4 / BETA if divergence == "pearson" else torch.where(r < 0.5, r**2 / (1 - r), 0.5 + 3 * (r - 0.5)) / BETA
    wanted, = torch.autograd.grad((logp.exp() * g).sum(), logits, retain_graph=True)
    row = Row(np.arange(2), np.arange(2) >= 1, "rollout", Problem("p", ())).with_stream("tie", 1.0)
    micro = batching.collate([row] * 4, torch.float64, torch.device("cpu"), {})
    fill = {"old_BT": logp.detach(), "ref_BT": base}
    micro = replace(micro, **{k: torch.stack((0 * one, v), 1) for k, v in fill.items()})
    surrogate = method.terms(micro, Live(torch.stack((0 * one, logp), 1)))["tie"][:, 1]
    assert surrogate.tolist() == pytest.approx(g.tolist())
    found, = torch.autograd.grad((logp.exp().detach() * surrogate).sum(), logits)
    torch.testing.assert_close(found, wanted)


def test_what_fdiv_refuses_and_draws(tmp_path: Path, opened: Open) -> None:
    with pytest.raises(UserError, match="penalty = 'own' needs another divergence"):
        make_config(raw_config(tmp_path, {"name": "fdiv_sft", "divergence": "total_variation", "penalty": "own"}))
    session = opened({"name": "fdiv_sft", "penalty": "own"})
    assert samples(session.method.options)
    rows = session.method.gather(session.data, session.roll, 0)
    assert {row.kind: set(row.streams) for row in rows} == {"demo": {"nll"}, "rollout": {"tie"}}
    assert all(row.ref_logps is not None for row in rollouts(rows))
    at_start = session.method.update(session.policy, make_batch(rows), 0)
    assert at_start["loss/tie"] == pytest.approx(0.0, abs=1e-12) and "fdiv/log_ratio" in at_start


weighted, over_all = (test_dft_weighs_each_token_with_its_own_probability,
                      test_rft_over_all_tokens_is_grpo_without_a_baseline)
conjugate = test_fdiv_is_its_conjugate_less_the_reward


def own_tie(opened: Open) -> None:
    test_the_tie_on_own_samples_is_an_expectation(opened, "hellinger")


MUTANTS = [
    *mutants(
        dft,
        Mutant("detach", "prob_weight", by=lambda opened: weighted(opened, "live", dft_token), of=losses),
        Mutant("sign", "nll", by=lambda opened: weighted(opened, "live", dft_token), of=losses),
        Mutant("term", "Dft.terms", "prob_weight 0", by=lambda opened: weighted(opened, "live", dft_token)),
        Mutant("swap", "prob_weight", of=losses, by=lambda opened: weighted(opened, "live", dft_token)),
        Mutant("compare", "Dft.terms", "reference", by=lambda opened: weighted(opened, "live", dft_token)),
    ),
    *mutants(
        rft,
        Mutant("mask", "Rft.keep", "CORRECT 0", by=over_all),  # wrong ones too
        Mutant("compare", "Rft.gather", "over 0", by=over_all),
        Mutant("term", "Rft.gather", "set 0", by=over_all),  # counted twice
        Mutant("constant", "taught", "1.0", to=0.5, by=over_all),
        Mutant("compare", "Rft.usable", "ERROR", by=over_all),
    ),
    *mutants(
        fdiv_sft,
        Mutant("compare", "FdivSft.terms", "demos", by=lambda opened: conjugate(opened, "pearson")),  # no tie
        Mutant("constant", "FdivSft.penalty", "0.25", to=0.5, by=lambda opened: conjugate(opened, "pearson")),
        Mutant("sign", "FdivSft.penalty", 0, by=lambda opened: conjugate(opened, "hellinger")),
        Mutant("hold", "FdivSft.terms", "exp 0", by=own_tie),
        Mutant("term", "FdivSft.terms", "tie 2", by=own_tie),  # without the ratio
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant, opened: Open) -> None:
    mutant.check(opened)
