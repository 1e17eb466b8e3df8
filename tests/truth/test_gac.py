"""GAC's statistics in slow loops, its controller against the official one, the mixed step; and mutants."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from checks import close
from mutants import Swaps, mutate
from table import Hands, Table, data, log_probs, method_of, row, slope, thetas, tokens, update

from bridgelm.errors import UserError
from bridgelm.methods import gac as gac_module
from bridgelm.methods.chord import Chord
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


def ready(module: ModuleType, **options: Any) -> tuple[Any, Table]:
    method, policy = method_of(module.Gac, "gac", **options), Table(NOW)
    method.setup(policy)
    return method, policy


def gathered(method: Any, policy: Table, count: int = 12) -> list[Row]:
    return method.gather(data(demos(count)), Hands(policy, rollouts()), 0)


# -- the statistics ------------------------------------------------------------------------------------------------


def slowly(rows: list[Row], phi: bool, trim: float, std: bool = True) -> dict[str, float]:
    """One number a row in each of them, in loops; advantages from the rewards."""
    means, losses, apart = [], [], []
    for r in rows:
        group = [
            x.reward for x in rows if x.kind == "rollout" and x.group == r.group and x.verdict is not Verdict.ERROR
        ]
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
        squares = 0.0
        for t in tokens(r):
            p = math.exp(log_probs(NOW, r)[t])
            squares += ((-p * (1 - p) if phi else -1.0) + a) ** 2
        apart.append(squares / len(tokens(r)))

    def variance(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return sum((x - mean) ** 2 for x in values) / len(values)

    losses.sort()
    drop = int(len(losses) * trim) if len(losses) >= 4 else 0
    kept = losses[drop : len(losses) - drop]
    return {"s_rl": variance(means), "s_sft": variance(kept), "apart": sum(apart) / len(apart)}


def each_statistic(module: ModuleType) -> None:
    for count, options in (
        (12, {}),  # one left out at either end
        (25, {"tokens": "plain"}),  # two
        (9, {"rl": {"std": False}}),  # none: a tenth of nine
        (12, {"trim": 0.26}),
        (3, {"trim": 0.4}),  # fewer than four are left as they are
    ):
        method, policy = ready(module, **options)
        rows = gathered(method, policy, count)
        found = update(method, policy, rows)
        o = method.options
        for name, value in slowly(rows, o.tokens == "phi", o.trim, o.rl.std).items():
            close(found[f"gac/{name}"], value, 1e-14, f"{name}, {count} demonstrations, {options}")
    same = [replace(demos(1)[0]) for _ in range(6)]
    method, policy = ready(module)
    found = update(method, policy, method.gather(data(same), Hands(policy, []), 0))
    assert (found["gac/s_sft"], found["gac/s_rl"]) == (1e-8, 0.0), "no variance, and no rollouts at all"


def running(module: ModuleType) -> None:
    """Looked at in the first update and every third from then on; .8 of what was, .2 of what is; the first is taken
    as it is. Only then are rows scored."""
    method, policy = ready(module, refresh=3, decay=0.8)
    wanted: dict[str, float] = {}
    for k in range(8):
        rows = gathered(method, policy, 12 + k)
        found = update(method, policy, rows, step=k)
        if k % 3 == 0:
            new = slowly(rows, True, 0.1)
            wanted = {n: 0.8 * wanted[n] + 0.2 * x if wanted else x for n, x in new.items()}
        for name, value in wanted.items():
            close(found[f"gac/{name}"], value, 1e-13, f"{name} in update {k}")
    assert policy.scored == [8 - 1 + 12, 8 - 1 + 15, 8 - 1 + 18], "graded rollouts and demonstrations of three updates"


# -- the controller -------------------------------------------------------------------------------------------------


def official(o: Any, stats: list[tuple[float, float, float]]) -> list[float]:
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


SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"warmup": 5, "decay_steps": 20},
    {"decay": 0.2, "cap": 1.0, "blend": 1.0, "target": 0.9},
    {"decay": 0.5, "cap": 0.07, "blend": 0.7, "warmup": 0, "decay_steps": 10, "prior": 1.0, "prior_end": 0.0},
    {"decay": 0.0, "cap": 1.0, "blend": 0.9, "low": 0.3, "high": 0.55, "start": 0.4},
)


def controller(module: ModuleType) -> None:
    rng = np.random.default_rng(5)
    stats = [tuple(10.0 ** rng.uniform(-2, 1, 3)) for _ in range(40)]
    for options in SETTINGS:
        method, _ = ready(module, **options)
        wanted = official(method.options, stats)  # type: ignore[arg-type]
        for step, values in enumerate(stats):
            method.means = dict(zip(("s_rl", "s_sft", "apart"), values))
            told = method.steer(step)
            close(told["mu"], wanted[step], 1e-15, f"{options}, step {step}")
            assert told["mu"] == method.mu
            again = method_of(module.Gac, "gac", **options)
            again.load(json.loads(json.dumps(method.state())))
            method = again  # a resumed run goes on from there
        assert len(set(wanted)) > 10


def limits(module: ModuleType) -> None:
    """raw at its ends; no move over the cap, whatever the statistics; never outside the bounds."""
    free = {"decay": 0.0, "cap": 1.0, "blend": 1.0, "low": 0.0, "high": 1.0}
    for stats, raw in (
        ((1.0, 0.0, 0.0), 1.0),  # RL is noise alone: SFT
        ((0.0, 1.0, 0.0), 0.0),
        ((0.0, 0.0, 1.0), 0.3),  # neither is noise: the target
        ((1.0, 1.0, 0.0), 0.5),
        ((2.0, 1.0, 1.0), 2.3 / 4),
    ):
        method, _ = ready(module, **free, target=0.3)
        method.means = dict(zip(("s_rl", "s_sft", "apart"), stats))
        told = method.steer(0)
        close([told["raw"], told["mu"]], raw, 3e-8, f"statistics {stats}")
    for noisy, prior in ((0, 1.0), (1, 0.0)):
        method, _ = ready(module, decay=0.0, warmup=0, prior=prior, prior_end=prior)
        method.means = {"s_rl": 9.0 * (1 - noisy), "s_sft": 9.0 * noisy, "apart": 0.0}
        path = [method.steer(step)["mu"] for step in range(80)]
        moves = np.diff([0.5, *path])
        assert np.all(np.abs(moves) <= 0.01 + 1e-12) and path[-1] == (0.05 if noisy else 0.9)
        close(path[0], 0.49 if noisy else 0.51, 1e-15, "the cap")
    method, _ = ready(module, warmup=0, decay_steps=1, prior_end=0.6)
    method.means = {"s_rl": 0.0, "s_sft": 1.0, "apart": 0.0}
    for step in range(1, 4000):
        told = method.steer(step)
    close(told["mu"], (0.5 * 0.6 + 0.5 * 0.01 * 0.0) / (1 - 0.5 * 0.99), 1e-9, "99 % prior and 1 % estimate at rest")


# -- the step -------------------------------------------------------------------------------------------------------


def the_step(module: ModuleType) -> None:
    """The losses are CHORD's at the mu that the controller came to in this very update."""
    for kind, start in (("phi", 0.5), ("plain", 0.2)):
        method, policy = ready(module, tokens=kind, start=start, rl={"kl_coef": 0.2}, warmup=0)
        found = update(method, policy, gathered(method, policy))
        close(found["gac/mu"], start + 0.01, 1e-15, "the prior is above: up by the cap")
        options = {"tokens": kind, "mu": found["gac/mu"], "rl": {"kl_coef": 0.2}}
        theirs, same = method_of(Chord, "chord", **options), Table(NOW)
        theirs.setup(same)
        update(theirs, same, gathered(theirs, same))
        close(policy.applied, same.applied, 1e-16, kind)
        assert policy.coef == same.coef
        sft = sum(
            (p * (1 - p) if kind == "phi" else 1.0) * slope(NOW, r, t)
            for r in demos()
            for t in tokens(r)
            for p in [math.exp(log_probs(NOW, r)[t])]
        ) / sum(len(tokens(r)) for r in demos())
        flat, still = ready(module, tokens=kind, start=start, warmup=0)
        rows = [row([0, 1], 1.0, 0, OLD), row([0, 2], 1.0, 0, OLD)]
        update(flat, still, flat.gather(data(demos()), Hands(still, rows), 0))
        close(still.applied, (start + 0.01) * sft, 1e-14, "all pass: mu of weighted SFT, and nothing else")


CHECKS: dict[str, Callable[[ModuleType], None]] = {
    f.__name__: f for f in (each_statistic, running, controller, limits, the_step)
}


@pytest.mark.parametrize("name", CHECKS)
def test_shipped_code(name: str) -> None:
    CHECKS[name](gac_module)


MUTANTS: dict[str, tuple[Swaps, str]] = {
    "c_s of the wrong sign": ((("-p * (1 - p) if phi", "p * (1 - p) if phi"),), "each_statistic"),
    "c_s is p": ((("-p * (1 - p) if phi", "-p if phi"),), "each_statistic"),
    "plain is nothing": ((("else -np.ones_like(p)", "else 0 * p"),), "each_statistic"),
    "c_r of the wrong sign": ((("c_r = -stream.weight", "c_r = stream.weight"),), "each_statistic"),
    "c_r on demonstrations": ((("else np.zeros_like(p)", "else -np.ones_like(p)"),), "each_statistic"),
    "sums over tokens": ((("apart.append(np.mean(", "apart.append(np.sum("),), "each_statistic"),
    "not squared": ((("(c_s - c_r) ** 2", "np.abs(c_s - c_r)"),), "each_statistic"),
    "summed log-probs": ((("-logp[stream.mask].mean()", "-logp[stream.mask].sum()"),), "each_statistic"),
    "untrimmed": ((("trimmed(np.array(nlls), trim)", "np.array(nlls)"),), "each_statistic"),
    "trimmed at one end": ((("[drop:len(values) - drop]", "[:len(values) - drop]"),), "each_statistic"),
    "not sorted": ((("np.sort(values)", "values"),), "each_statistic"),
    "three are trimmed": ((("if len(values) >= 4 else 0", "if len(values) >= 3 else 0"),), "each_statistic"),
    "advantages trimmed too": (
        (
            (
                "variance(np.array(advantages))",
                "variance(trimmed(np.array(advantages), trim))",
            ),
        ),
        "each_statistic",
    ),
    "deviations": ((("float(values.var())", "float(values.std())"),), "each_statistic"),
    "unbiased": ((("values.var()", "values.var(ddof=1)"),), "each_statistic"),
    "no floor": ((("float(values.var()), EPS)", "float(values.var()), 0.0)"),), "each_statistic"),
    "each update": ((("self.updates % self.options.refresh == 0", "True"),), "running"),
    "never again": ((("self.updates % self.options.refresh == 0", "self.updates == 0"),), "running"),
    "decay turned round": (
        (("decay * self.means[name] + (1 - decay) * x if", "(1 - decay) * self.means[name] + decay * x if"),),
        "running",
    ),
    "from zero": (
        (
            (
                "decay * self.means[name] + (1 - decay) * x if self.means else x",
                "decay * self.means.get(name, 0.0) + (1 - decay) * x",
            ),
        ),
        "running",
    ),
    "target for SFT's noise": ((("(o.target * apart + s_rl)", "(o.target * apart + s_sft)"),), "limits"),
    "no target": ((("(o.target * apart + s_rl)", "(apart + s_rl)"),), "limits"),
    "SFT's noise forgotten": ((("(apart + s_sft + s_rl + EPS)", "(apart + s_rl + EPS)"),), "limits"),
    "mu's decay turned round": (
        (("o.decay * self.mu + (1 - o.decay) * raw", "(1 - o.decay) * self.mu + o.decay * raw"),),
        "controller",
    ),
    "estimate not clipped": (
        (
            (
                "near = clip(o.decay * self.mu + (1 - o.decay) * raw, o.low, o.high)",
                "near = o.decay * self.mu + (1 - o.decay) * raw",
            ),
        ),
        "controller",
    ),
    "blend turned round": (
        (("(1 - o.blend) * prior + o.blend * near", "o.blend * prior + (1 - o.blend) * near"),),
        "controller",
    ),
    "no cap": ((("clip(wanted - self.mu, -o.cap, o.cap)", "wanted - self.mu"),), "limits"),
    "cap downwards alone": ((("-o.cap, o.cap)", "-o.cap, 1.0)"),), "limits"),
    "no bounds": ((("-o.cap, o.cap), o.low, o.high)", "-o.cap, o.cap), 0.0, 1.0)"),), "limits"),
    "prior of another step": ((("warm_cosine(step,", "warm_cosine(step + 1,"),), "controller"),
    "prior's end forgotten": ((("o.prior, o.prior_end)", "o.prior, o.prior)"),), "controller"),
    "mu is not kept": (
        (('self.mu, self.updates, self.means = state["mu"],', '_, self.updates, self.means = state["mu"],'),),
        "controller",
    ),
    "mu of the update before": (
        (
            ("        told = self.steer(step)\n", "        before = self.mu\n        told = self.steer(step)\n"),
            ('1 - self.mu) | {"nll": self.mu}', '1 - before) | {"nll": before}'),
        ),
        "the_step",
    ),
    "mu turned round": ((('1 - self.mu) | {"nll": self.mu}', 'self.mu) | {"nll": 1 - self.mu}'),), "the_step"),
    "tokens forgotten": ((("live.logp_BT, self.options.tokens)", 'live.logp_BT, "phi")'),), "the_step"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_seen(name: str) -> None:
    swaps, check = MUTANTS[name]
    with pytest.raises(AssertionError):
        CHECKS[check](mutate(gac_module, swaps, "mutant"))


def test_a_start_out_of_bounds_is_refused() -> None:
    with pytest.raises(UserError, match=r"start = 0.95 is not between low and high"):
        ready(gac_module, start=0.95)
    assert gac_module.Gac.needs == {"demos"}
