"""Token weights by what a demonstration's tokens do for reward: the real update on a real transformer, against
gradients of single tokens, running means and Adam's moments that are written out here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from exact import run_config
from mutation import Mutant, mutants
from torch import Tensor
from transformer import VOCABULARY, all_logps, bridge_method, build_policy, make_batch, make_rows, merged

from transformer import objective  # isort: skip

from bridgelm.methods import token_lead
from bridgelm.model.policy import Policy
from bridgelm.training import loop
from bridgelm.types import Batch, Demo, Problem, Row

pytestmark = pytest.mark.usefixtures("wide_norms")

MU, DECAY, ETA, LIMIT, BETA2, EPS = 0.6, 0.7, 0.8, 1.3, 0.95, 1e-2
Vector = dict[str, Tensor]


def fresh(lora: bool = False, optim: str = "adamw", **options: Any) -> tuple[Policy, Any]:
    """A policy at a random point, and the method set up on it."""
    settings = {"kind": optim, "lr": 0.01, "clip": None, "betas": [0.9, BETA2], "eps": EPS}
    policy = build_policy(lora=lora, **settings)
    del policy.groups["w"], policy.groups["shadow"]
    chosen = {"mu": MU, "decay": DECAY, "eta": ETA, "limit": LIMIT, "move": 1e-3, **options}
    config = run_config({"name": "token_lead", **chosen}, 4, 0.01, optim=settings)
    method = token_lead.TokenLead(config.method, config)
    method.setup(policy)
    return policy, method


def rows_of(seed: int = 0) -> list[Row]:
    """Rollouts and demonstrations; each demonstration has a problem of its own, one has tokens of half weight."""
    policy = build_policy()
    rng = np.random.default_rng(seed)
    out = []
    for i, row in enumerate(make_rows(policy)):
        if row.kind == "rollout":
            pg = row.streams["pg"]
            out.append(row.with_stream("pg", pg.weight * (1 + 0.3 * rng.standard_normal())))
            continue
        text = f"demonstration {i}"
        columns = {"source": "odd" if i % 2 else "even"}
        problem = Problem(f"p{i}", (), demos=(Demo("another"), Demo(text)), columns=columns)
        weight = np.where(np.arange(len(row.ids)) % 3 == 0, 0.5, 1.0) if i == 6 else 1.0
        out.append(replace(row, problem=problem, text=text).with_stream("nll", weight))
    return out


@dataclass
class Seen:
    """One real update, watched from outside."""

    theta: Vector  # before it
    weights: list[np.ndarray]  # of each demonstration's tokens, in the batch that SFT's gradient is taken of
    gradient: Vector  # of the loss, as handed to theta's optimiser
    metrics: dict[str, float]
    scored: int
    z: np.ndarray  # log s, up to a constant


def theta_of(policy: Policy) -> Vector:
    return {n: t.detach().clone() for n, t in policy.groups["theta"].flat().items()}


def watched(policy: Policy, method: Any, batch: Batch, step: int = 0) -> Seen:
    before, batches, applied, scored = theta_of(policy), [], [], []
    grad, apply, score = policy.grad, policy.apply, policy.score

    def spy_grad(terms: Any, chosen: Batch, coef: Any, at: str = "live", entropy: bool = False) -> Any:
        if set(coef) == {"nll"}:
            batches.append(chosen)
            assert chosen.counts == batch.counts
        return grad(terms, chosen, coef, at, entropy)

    def spy_apply(name: str, gradient: Any, **options: Any) -> float:
        assert name == "theta"
        applied.append({n: g.clone() for n, g in gradient.items()})
        for n, t in theta_of(policy).items():
            assert torch.equal(t, before[n]), "theta moved before its step"
        return apply(name, gradient, **options)

    def spy_score(rows: list[Row], at: str = "live") -> Any:
        assert all(row.kind == "demo" for row in rows), "only demonstrations are scored"
        scored.append(at)
        return score(rows, at)

    policy.grad, policy.apply, policy.score = spy_grad, spy_apply, spy_score  # type: ignore[method-assign]
    try:
        metrics = method.update(policy, batch, step)
    finally:
        del policy.grad, policy.apply, policy.score
    assert len(applied) == 1 and set(policy.groups) == {"theta", "reference", "lead"}
    weights = [(row.streams["nll"].weight / old.streams["nll"].weight)[row.own]
               for row, old in zip(batches[-1].rows, batch.rows) if row.kind == "demo"]
    with np.errstate(divide="ignore"):  # a gate may be shut
        return Seen(before, weights, applied[0], metrics, len(scored), np.log(np.concatenate(weights)))


# -- the same by hand ------------------------------------------------------------------------------------------------


class ByHand:
    """Keeps v, Adam's second moments and each token's memory as equations (1) to (4) say; numbers of its own."""

    def __init__(self, rows: list[Row], kl: float = 0.0, memory: float = 0.0, kind: str = "exp") -> None:
        self.rows, self.kl, self.keep, self.kind = rows, kl, memory, kind
        self.demos = [row for row in rows if row.kind == "demo"]
        self.v: dict[str, Any] = {}
        self.square: dict[str, Any] = {}
        self.steps, self.memory = 0, None

    def alignments(self, policy: Policy) -> np.ndarray:
        """<grad log pi(y), P v> of every demonstration token, at the policy's theta, which is not moved."""
        self.params = {n: t.detach().clone().requires_grad_() for n, t in policy.groups["theta"].flat().items()}
        keep = policy.groups["theta"]
        full = {n: self.params[n] for n in keep.full}
        low = {n: (self.params[f"{n}:A"], self.params[f"{n}:B"]) for n in keep.low}
        policy.groups["theta"] = replace(keep, full=full, low=low)
        weights = merged(policy, "live", with_w=False)
        policy.groups["theta"] = keep
        self.logps = all_logps(policy.model, weights, self.rows)
        losses = objective(self.rows, self.logps, bridge_method())
        self.g_rl = self.slope(-losses["pg"] - self.kl * losses["kl"])
        self.v = {n: DECAY * self.v.get(n, 0.0) + (1 - DECAY) * g for n, g in self.g_rl.items()}
        d = {n: v / (torch.sqrt(self.square[n] / (1 - BETA2**self.steps)) + EPS) if self.square else v
             for n, v in self.v.items()}
        tokens = [logp[t] for row, logp in zip(self.rows, self.logps) if row.kind == "demo"
                  for t in np.flatnonzero(row.own)]
        return np.array([sum(float((g * d[n]).sum()) for n, g in self.slope(token).items()) for token in tokens])

    def slope(self, value: Tensor) -> Vector:
        found = torch.autograd.grad(value, list(self.params.values()), retain_graph=True, allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(self.params.items(), found)}

    def weights(self, a: np.ndarray) -> np.ndarray:
        z = a / np.sqrt(np.mean(a**2))
        if self.keep:
            self.memory = z if self.memory is None else self.keep * self.memory + (1 - self.keep) * z
            z = self.memory
        if self.kind == "gate":
            return np.array([1.0 if x > 0 else 0.0 for x in z])
        if self.kind == "whole":
            found, start = [], 0
            for row in self.demos:
                size = int(row.own.sum())
                found += [1.0 if sum(z[start:start + size]) > 0 else 0.0] * size
                start += size
            return np.array(found)
        s = np.array([np.exp(ETA * min(max(x, -LIMIT), LIMIT)) for x in z])
        return s / s.mean()

    def step(self, s: np.ndarray) -> Vector:
        """The ascent direction of (4) at given weights; takes it into the moments."""
        total, count, i = torch.zeros((), dtype=torch.float64), 0, 0
        for row, logp in zip(self.rows, self.logps):
            for t in np.flatnonzero(row.own) if row.kind == "demo" else ():
                total, count, i = total + float(s[i]) * row.streams["nll"].weight[t] * logp[t], count + 1, i + 1
        g_sft = self.slope(total / count)
        joint = {n: (g + MU * g_sft[n]) / (1 + MU) for n, g in self.g_rl.items()}
        self.square = {n: BETA2 * self.square.get(n, 0.0) + (1 - BETA2) * g**2 for n, g in joint.items()}
        self.steps += 1
        return joint


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "low-rank theta": {"lora": True},
    "with a reference": {"rl": {"kl_coef": 0.3}},
    "memory": {"memory": 0.6},
    "gate": {"weights": "gate"},
    "gate of whole demonstrations": {"weights": "whole", "memory": 0.6},
    "plain steps": {"optim": "sgd"},
}


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_the_four_equations(case: str) -> None:
    """Three real updates; the first has no moments yet, so that P is the identity there."""
    options = CASES[case]
    policy, method = fresh(**options)
    rows = rows_of()
    hand = ByHand(rows, options.get("rl", {}).get("kl_coef", 0.0), options.get("memory", 0.0),
                  kind := options.get("weights", "exp"))
    for step in range(3):
        if options.get("optim") == "sgd":
            hand.square = {}
        a = hand.alignments(policy)
        seen = watched(policy, method, make_batch(rows), step)
        s = np.concatenate(seen.weights)
        assert kind != "exp" or abs(s.mean() - 1) < 1e-14, "weights do not have mean one"
        assert s == pytest.approx(hand.weights(a), rel=2e-4), f"weights of step {step}"
        size, z = np.sqrt(np.mean(a**2)), a / np.sqrt(np.mean(a**2))
        assert seen.metrics["lead/moved"] / seen.metrics["lead/step"] == pytest.approx(size, rel=1e-4), "size of a"
        assert seen.metrics["lead/mean"] == pytest.approx(z.mean(), abs=1e-4)
        assert seen.metrics["lead/share_negative"] == pytest.approx(np.mean(a < 0))
        assert seen.metrics["lead/kept"] == np.mean(s > 0)
        assert kind != "exp" or seen.metrics["lead/spread"] == pytest.approx(np.std(np.log(s)), rel=1e-12)
        ends = np.cumsum([0, *(row.own.sum() for row in hand.demos)])
        odd = np.concatenate([z[i:j] for row, i, j in zip(hand.demos, ends, ends[1:]) if row.problem.id == "p5"])
        assert seen.metrics.get("lead/source/odd") == pytest.approx(odd.mean(), abs=1e-4)
        joint = hand.step(s)
        for n, g in joint.items():
            close = (seen.gradient[n] + g).abs().max()
            assert close < 1e-10, f"gradient of {n} at step {step} is off by {close}"
        assert seen.metrics["lead/uneven"] < 0.02


# -- the look ahead ----------------------------------------------------------------------------------------------------


def error(move: float, moments: bool) -> tuple[float, float]:
    """How far the weights are from the exact ones, and e. With eta 1 and no limit, log s is a / rms(a)."""
    policy, method = fresh(move=1e-3)
    hand = ByHand(rows_of())
    if moments:
        hand.alignments(policy)
        hand.step(np.concatenate(watched(policy, method, make_batch(hand.rows)).weights))
    state = {**method.state(), "e": 0.1 * move}
    _, method = fresh(move=move, eta=1.0, limit=1e9)
    method.load(state)
    a = hand.alignments(policy)
    z = a / np.sqrt(np.mean(a**2))
    seen = watched(policy, method, make_batch(hand.rows), 1)
    off = seen.z - z
    return float(np.abs(off - off.mean()).max()), seen.metrics["lead/step"]


@pytest.mark.parametrize("moments", [False, True])
def test_the_error_is_quadratic_in_the_length_of_the_look(moments: bool) -> None:
    (far, long), (near, short) = (error(move, moments) for move in (3e-3, 3e-4))
    assert long == pytest.approx(10 * short) and 85 < far / near < 115 and near < 2e-5


@pytest.mark.parametrize("start", [0.0, 1e-7, 1e2])
def test_e_follows_the_move_that_is_asked_for(start: float) -> None:
    """A start that is far off costs one more pair of passes; then every look moves log-probs by about `move`."""
    policy, method = fresh(move=0.02)
    batch = make_batch(rows_of())
    watched(policy, method, batch)
    assert method.e == 0.0, "Adam's metric is another one from here on"
    method.e = start
    seen = watched(policy, method, batch, 1)
    first = seen.scored
    for step in range(2, 6):
        moved, e = seen.metrics["lead/moved"], seen.metrics["lead/step"]
        assert method.e == pytest.approx(e * min(max(0.02 / moved, 0.1), 10.0), rel=1e-12)
        seen = watched(policy, method, batch, step)
    assert first == (2 if start == 0.0 else 4) and seen.scored == 2
    assert seen.metrics["lead/moved"] == pytest.approx(0.02, rel=0.3)


def test_eta_zero_is_joint(session: Callable[..., Any]) -> None:
    """The same rollouts, losses and weights, step by step; the alignments are measured all the same."""
    runs = [session({"name": name, "mu": MU, **more}, optim={"eps": 1e-3})
            for name, more in (("joint", {}), ("token_lead", {"eta": 0.0}), ("token_lead", {"eta": 1.0}))]
    for _ in range(3):
        joint, same, other = (loop.take_step(run) for run in runs)
        assert same["reward"] == joint["reward"]
        assert same["grad_norm/theta"] == pytest.approx(joint["grad_norm/theta"], rel=1e-9)
        assert same["loss/nll"] * MU / (1 + MU) == pytest.approx(joint["loss/nll"], rel=1e-9)
        assert same["lead/spread"] == 0.0 and other["lead/spread"] > 0.1
    a, b, c = (theta_of(run.policy) for run in runs)
    assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-10
    assert max(float((a[n] - c[n]).abs().max()) for n in a) > 1e-3


def test_the_control_deals_the_same_weights_to_other_tokens() -> None:
    found = []
    for shuffled, step in ((False, 3), (True, 3), (True, 3), (True, 4)):
        policy, method = fresh(shuffled=shuffled)
        found.append(np.concatenate(watched(policy, method, make_batch(rows_of()), step).weights))
    plain, one, again, later = found
    assert np.array_equal(np.sort(plain), np.sort(one)) and not np.array_equal(plain, one)
    assert np.array_equal(one, again) and not np.array_equal(one, later)
    assert np.array_equal(one, np.random.default_rng([0, 3]).permutation(plain))
    policy, method = fresh(shuffled=True)
    turned = watched(policy, method, make_batch(rows_of()[::-1]), 3).weights  # the deal does not hang on their order
    assert np.concatenate(turned[::-1]) == pytest.approx(one, rel=1e-9)


# -- nothing learnt, nothing there -------------------------------------------------------------------------------------


def test_without_an_rl_gradient_all_weights_are_one() -> None:
    policy, method = fresh(memory=0.5)
    flat = [row.with_stream("pg", 0.0) if row.kind == "rollout" else row for row in rows_of()]
    seen = watched(policy, method, make_batch(flat))
    assert all(np.array_equal(w, np.ones_like(w)) for w in seen.weights) and seen.scored == 0
    assert not any(name.startswith("lead/") for name in seen.metrics)
    assert method.tables() == {} and not method.memory
    hand = ByHand(flat)
    hand.alignments(policy)
    assert seen.metrics["loss/pg"] == 0.0
    seen = watched(policy, method, make_batch(rows_of()), 1)
    assert seen.metrics["lead/spread"] > 0
    watched(policy, method, make_batch(flat), 2)  # v is remembered, and still says something
    assert policy.groups["lead"].flat()["lm_head.weight"].abs().max() > 0


@pytest.mark.parametrize("kind", ["demo", "rollout"])
def test_a_batch_with_one_kind_of_rows(kind: str) -> None:
    policy, method = fresh()
    watched_all = watched(policy, method, make_batch(rows_of()))
    assert watched_all.scored
    batch = make_batch([row for row in rows_of() if row.kind == kind])
    metrics = method.update(policy, batch, 1)
    assert all(np.isfinite(value) for value in metrics.values())
    assert ("lead/moved" in metrics) == (kind == "demo")


def test_a_look_that_breaks_the_model_is_not_used() -> None:
    policy, method = fresh()
    batch = make_batch(rows_of())
    watched(policy, method, batch)
    method.e = 1e250
    seen = watched(policy, method, batch, 1)
    assert all(np.array_equal(w, np.ones_like(w)) for w in seen.weights)
    assert all(np.isfinite(value) for value in seen.metrics.values()) and method.e < 1e250
    assert all(t.isfinite().all() for t in policy.tensors().values())


# -- attribution, warnings, state --------------------------------------------------------------------------------------


def test_attribution_is_the_mean_of_the_exact_alignments() -> None:
    policy, method = fresh()
    rows = rows_of()
    hand, means = ByHand(rows), []
    for step in range(3):
        a = hand.alignments(policy)
        z = a / np.sqrt(np.mean(a**2))
        ends = np.cumsum([row.own.sum() for row in hand.demos])
        means.append([part.mean() for part in np.split(z, ends[:-1])])
        hand.step(np.concatenate(watched(policy, method, make_batch(rows), step).weights))
    tables = method.tables()
    wanted = dict(zip((row.problem.id for row in hand.demos), np.mean(means, axis=0)))
    found = {row["problem_id"]: row for row in tables["demonstrations"]}
    assert {name: row["alignment"] for name, row in found.items()} == pytest.approx(wanted, abs=2e-4)
    assert found["p4"] | {"alignment": 0} == {"problem_id": "p4", "text": "demonstration 4", "source": "even",
                                              "tokens": 4, "count": 3, "alignment": 0}
    even = (4 * wanted["p4"] + 7 * wanted["p6"]) / 11
    sources = {row["source"]: row for row in tables["sources"]}
    assert sources["even"]["alignment"] == pytest.approx(even, abs=2e-4)
    assert (sources["even"]["demonstrations"], sources["even"]["tokens"]) == (2, 33)
    assert sources["odd"]["column"] == "source"
    assert [row["alignment"] for row in tables["sources"]] == sorted(row["alignment"] for row in tables["sources"])


def test_many_sources_share_the_last_metric() -> None:
    policy, method = fresh()
    rows = [row for row in rows_of() if row.kind == "rollout"]
    rng = np.random.default_rng(0)
    for i in range(11):
        ids = rng.integers(0, VOCABULARY, 5)
        problem = Problem(f"q{i:02}", (), columns={"source": f"s{i:02}"} if i < 10 else {})
        rows.append(Row(ids, np.arange(5) > 2, "demo", problem, text="x" * 500).with_stream("nll", 1.0))
    metrics = method.update(policy, make_batch(rows), 0)
    named = {name.removeprefix("lead/source/") for name in metrics if name.startswith("lead/source/")}
    assert named == {f"s{i:02}" for i in range(8)} | {"other"}
    tables = method.tables()
    assert len(tables["sources"]) == 10 and len(tables["demonstrations"]) == 11
    assert all(len(row["text"]) == 120 for row in tables["demonstrations"])
    last = [row["alignment"] for row in tables["demonstrations"] if row["source"] in ("s08", "s09")]
    assert metrics["lead/source/other"] == pytest.approx(np.mean(last), abs=2e-4)


def test_state_goes_through_json_and_is_not_shared() -> None:
    policy, method = fresh(memory=0.5)
    batch = make_batch(rows_of())
    for step in range(2):
        watched(policy, method, batch, step)
    saved = method.state()
    text = json.dumps(saved)
    _, again = fresh(memory=0.5)
    again.load(json.loads(text))
    assert again.state() == saved and again.tables() == method.tables()
    watched(policy, method, batch, 2)
    assert json.dumps(saved) == text and again.state() == json.loads(text), "a saved state does not change afterwards"
    assert all(value == round(value, 4) for values in method.memory.values() for value in values)


def test_half_precision_is_warned_of() -> None:
    """The look ahead of a bfloat16 model is mostly rounding; at float32 it is not."""
    for dtype, warned in ((torch.float32, False), (torch.bfloat16, True)):
        policy, method = fresh(move=1e-2)
        policy.live.dtype = dtype
        policy.lean("theta", "theta", 0.0)  # the live weights are made anew, in that dtype
        said = []
        for step in range(5):
            said.append(method.warnings(method.update(policy, make_batch(rows_of()), step)))
        assert any("mostly noise" in text for text in said[-1]) == warned, said
        assert not any(said[:4])


def test_a_look_that_nothing_shows_is_warned_of() -> None:
    _, method = fresh(move=0.01)
    for moved, said in ((1e-4, 0), (0.005, 0), *[(1e-4, 0)] * 4, (1e-4, 1), (0.005, 0), (1e-4, 1)):
        method.watch({"moved": moved})
        assert len(method.warnings({})) == said


check = test_an_update_is_the_four_equations
MUTANTS = mutants(
    token_lead,
    Mutant("swap", "follow", by=lambda: check("full")),
    Mutant("sign", "follow", by=lambda: check("full")),
    Mutant("denominator", "TokenLead.look", 1, by=lambda: check("full")),
    Mutant("drop", "TokenLead.weigh", "mean 1", by=lambda: check("full")),
    Mutant("clip", "TokenLead.weigh", "clip 0", by=lambda: check("full")),
    Mutant("term", "TokenLead.weigh", "eta 1", by=lambda: check("full")),
    Mutant("sign", "TokenLead.update", 0, by=lambda: check("full")),
    Mutant("compare", "TokenLead.weigh", "whole 1", by=lambda: check("gate")),
    Mutant("term", "TokenLead.remember", 3, by=lambda: check("memory")),
    Mutant("drop", "reweighted", "mask 0", by=lambda: check("full")),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()
