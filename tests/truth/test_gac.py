"""GAC's statistics in slow loops, its controller against the official one, and the mixed step."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from checks import close
from mutation import Mutant, mutants
from table import Hands, Table, data, log_probs, method_of, row, slope, thetas, tokens, update

from bridgelm.errors import UserError
from bridgelm.methods import gac
from bridgelm.methods.chord import Chord
from bridgelm.methods.gac import Gac
from bridgelm.types import Row, Verdict

NOW, OLD = thetas(2)


def rollouts() -> list[Row]:
    rewards = {0: (1.0, 0.0, 0.0), 1: (0.0, 1.0), 2: (1.0, 1.0), 3: (0.0, 0.0)}
    answers = iter(([0, 1, 2], [0, 1], [1, 2, 2, 0, 1], [2, 0], [1, 1, 1], [0, 2], [2, 2, 1, 0, 0], [1, 2], [0, 0, 1]))
    rows = [row(next(answers), r, group, OLD) for group, given in rewards.items() for r in given]
    return [*rows[:-1], replace(rows[-1], verdict=Verdict.ERROR)]  # and so its group is left out


def demos(count: int = 12) -> list[Row]:
    rng = np.random.default_rng(count)
    return [row(rng.integers(0, 3, rng.integers(3, 8)), math.nan, -1, kind="demo") for _ in range(count)]


def ready(make: Any = Gac, name: str = "gac", **options: Any) -> tuple[Any, Table]:
    method, policy = method_of(make, name, **options), Table(NOW)
    method.setup(policy)
    return method, policy


def gathered(method: Any, policy: Table, count: int = 12, rows: list[Row] | None = None) -> list[Row]:
    return method.gather(data(demos(count)), Hands(policy, rollouts() if rows is None else rows), 0)


# -- the statistics ------------------------------------------------------------------------------------------------


def slowly(rows: list[Row], phi: bool, trim: float, std: bool = True) -> dict[str, float]:
    """One number a row in each of them, in loops; advantages from the rewards."""
    means, losses, apart = [], [], []
    for r in rows:
        group = [x.reward for x in rows
                 if x.kind == "rollout" and x.group == r.group and x.verdict is not Verdict.ERROR]
        if r.kind == "rollout" and (r.verdict is Verdict.ERROR or len(group) < 2):
            continue
        a = 0.0
        if r.kind == "rollout":
            mean = sum(group) / len(group)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in group) / len(group))
            a = (r.reward - mean) / (deviation + 1e-6 if std else 1.0)
            means.append(a)
        else:
            losses.append(-sum(log_probs(NOW, r)[t] for t in tokens(r)) / len(tokens(r)))
        p = [math.exp(log_probs(NOW, r)[t]) for t in tokens(r)]
        apart.append(sum(((-x * (1 - x) if phi else -1.0) + a) ** 2 for x in p) / len(p))

    def variance(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return sum((x - mean) ** 2 for x in values) / len(values)

    losses.sort()
    drop = int(len(losses) * trim) if len(losses) >= 4 else 0
    kept = losses[drop : len(losses) - drop]
    return {"s_rl": variance(means), "s_sft": variance(kept), "apart": sum(apart) / len(apart)}


def test_each_statistic() -> None:
    for count, options in (
        (12, {}),  # one left out at either end
        (25, {"tokens": "plain"}),  # two
        (9, {"rl": {"std": False}}),  # none: a tenth of nine
        (3, {"trim": 0.4}),  # fewer than four are left as they are
    ):
        method, policy = ready(**options)
        rows, o = gathered(method, policy, count), method.options
        found = update(method, policy, rows)
        for name, value in slowly(rows, o.tokens == "phi", o.trim, o.rl.std).items():
            close(found[f"gac/{name}"], value, 1e-14, f"{name}, {count} demonstrations, {options}")
    method, policy = ready()
    found = update(method, policy, method.gather(data([demos(1)[0]] * 6), Hands(policy, []), 0))
    assert (found["gac/s_sft"], found["gac/s_rl"]) == (1e-8, 0.0), "no variance, and no rollouts at all"


def test_running_means() -> None:
    """Looked at in the first update and every third from then on; .8 of what was, .2 of what is; the first is taken
    as it is. Only then are rows scored."""
    method, policy = ready(refresh=3, decay=0.8)
    wanted: dict[str, float] = {}
    for k in range(8):
        rows = gathered(method, policy, 12 + k)
        found = update(method, policy, rows, step=k)
        if k % 3 == 0:
            wanted = {n: 0.8 * wanted.get(n, x) + 0.2 * x for n, x in slowly(rows, True, 0.1).items()}
        for name, value in wanted.items():
            close(found[f"gac/{name}"], value, 1e-13, f"{name} in update {k}")
    assert policy.scored == [8 - 1 + 12, 8 - 1 + 15, 8 - 1 + 18], "graded rollouts and demonstrations of three updates"


# -- the controller -------------------------------------------------------------------------------------------------


def official(o: Any, stats: list[Any]) -> list[float]:
    """mu over updates, after the description of the official controller."""
    mu, out = o.start, []
    for step, (s_r, s_s, d) in enumerate(stats):
        raw = (o.target * d + s_r) / (d + s_s + s_r + 1e-8)
        adaptive = o.decay * mu + (1 - o.decay) * raw
        adaptive = o.low if adaptive < o.low else o.high if adaptive > o.high else adaptive
        if step < o.warmup:
            prior = step / o.warmup * o.prior
        elif step >= o.warmup + o.decay_steps:
            prior = o.prior_end
        else:
            turn = math.pi * (step - o.warmup) / o.decay_steps
            prior = o.prior_end + (o.prior - o.prior_end) * 0.5 * (1 + math.cos(turn))
        candidate = (1 - o.blend) * prior + o.blend * adaptive
        if abs(candidate - mu) > o.cap:
            candidate = mu + (o.cap if candidate > mu else -o.cap)
        mu = o.low if candidate < o.low else o.high if candidate > o.high else candidate
        out.append(mu)
    return out


@pytest.mark.parametrize("options", [
    {},
    {"warmup": 5, "decay_steps": 20},
    {"decay": 0.2, "cap": 1.0, "blend": 1.0, "target": 0.9},
    {"decay": 0.5, "cap": 0.07, "blend": 0.7, "warmup": 0, "decay_steps": 10, "prior": 1.0, "prior_end": 0.0},
    {"decay": 0.0, "cap": 1.0, "blend": 0.9, "low": 0.3, "high": 0.55, "start": 0.4},
], ids=str)
def test_controller(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(5)
    stats = [tuple(10.0 ** rng.uniform(-2, 1, 3)) for _ in range(40)]
    method, _ = ready(**options)
    wanted = official(method.options, stats)
    for step, values in enumerate(stats):
        method.means = dict(zip(("s_rl", "s_sft", "apart"), values))
        close(method.steer(step)["mu"], wanted[step], 1e-15, f"{options}, step {step}")
        again = method_of(Gac, "gac", **options)
        again.load(json.loads(json.dumps(method.state())))
        assert again.mu == method.mu
        method = again  # a resumed run goes on from there
    assert len(set(wanted)) > 10


def test_ends_of_raw() -> None:
    free = {"decay": 0.0, "cap": 1.0, "blend": 1.0, "low": 0.0, "high": 1.0}
    for stats, raw in (
        ((1.0, 0.0, 0.0), 1.0),  # RL is noise alone: SFT
        ((0.0, 1.0, 0.0), 0.0),
        ((0.0, 0.0, 1.0), 0.3),  # neither is noise: the target
        ((2.0, 1.0, 1.0), 2.3 / 4),
    ):
        method, _ = ready(**free, target=0.3)
        method.means = dict(zip(("s_rl", "s_sft", "apart"), stats))
        told = method.steer(0)
        close([told["raw"], told["mu"]], raw, 3e-8, f"statistics {stats}")


# -- the step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "start"), [("phi", 0.5), ("plain", 0.2)])
def test_the_step(kind: str, start: float) -> None:
    """The losses are CHORD's at the mu that the controller came to in this very update."""
    method, policy = ready(tokens=kind, start=start, rl={"kl_coef": 0.2}, warmup=0)
    found = update(method, policy, gathered(method, policy))
    close(found["gac/mu"], start + 0.01, 1e-15, "the prior is above: up by the cap")
    theirs, same = ready(Chord, "chord", tokens=kind, mu=found["gac/mu"], rl={"kl_coef": 0.2})
    update(theirs, same, gathered(theirs, same))
    close(policy.applied, same.applied, 1e-16, kind)
    assert policy.coef == same.coef
    weighted = [((p * (1 - p) if kind == "phi" else 1.0) * slope(NOW, r, t))
                for r in demos() for t in tokens(r) for p in [math.exp(log_probs(NOW, r)[t])]]
    flat, still = ready(tokens=kind, start=start, warmup=0)
    update(flat, still, gathered(flat, still, rows=[row([0, 1], 1.0, 0, OLD), row([0, 2], 1.0, 0, OLD)]))
    close(still.applied, (start + 0.01) * np.mean(weighted, 0), 1e-14, "all pass: mu of weighted SFT, and no more")


MUTANTS = mutants(
    gac,
    Mutant("sign", "statistics", 0, by=test_each_statistic),  # c_s = p (1 - p)
    Mutant("sign", "statistics", "weight", by=test_each_statistic),  # c_r = A
    Mutant("instead", "variance", "var 2", to="std", by=test_each_statistic),
    Mutant("constant", "trimmed", 0, to=3, by=test_each_statistic),
    Mutant("drop", "Gac.update", "updates 1", by=test_running_means),
    Mutant("term", "Gac.steer", "target 1", by=test_ends_of_raw),
    Mutant("clip", "Gac.steer", "cap 1", by=partial(test_controller, {})),
    Mutant("swap", "Gac.steer", "warm_cosine", by=partial(test_controller, {})),
    Mutant("term", "Gac.update", "mu 2", by=partial(test_the_step, "phi", 0.5)),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()


def test_a_start_out_of_bounds_is_refused() -> None:
    with pytest.raises(UserError, match=r"start = 0.95 is not between low and high"):
        ready(start=0.95)
    assert Gac.needs == {"demos"}
