"""CHORD's mix in loops over tokens, its schedule against the official one, where it becomes grpo, sft and joint; and
mutants."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from checks import close
from mutants import Swaps, mutate
from table import Hands, Table, data, log_probs, method_of, row, slope, thetas, tokens, update
from transformer import wide_norm

from bridgelm.config.run_config import make_config
from bridgelm.errors import UserError
from bridgelm.methods import chord as chord_module
from bridgelm.methods.base import Method
from bridgelm.methods.grpo import Grpo
from bridgelm.methods.joint import Joint
from bridgelm.methods.sft import Sft
from bridgelm.model import batching
from bridgelm.objective import credit, losses
from bridgelm.types import Live, Row
from tiny import open_session, raw_config

NOW, OLD = thetas(1)
RL = {"std": True, "clip_low": 0.2, "clip_high": 0.2}


def rollouts(old: np.ndarray = OLD) -> list[Row]:
    rewards = {0: (1.0, 0.0, 0.0), 1: (0.0, 1.0), 2: (1.0, 1.0)}
    answers = iter(([0, 1, 2], [0, 1], [1, 2, 2, 0, 1], [2, 0], [1, 1, 1], [0, 2], [2, 2, 1, 0, 0]))
    return [row(next(answers), r, group, old) for group, given in rewards.items() for r in given]


def demos() -> list[Row]:
    return [row(ids, math.nan, -1, kind="demo") for ids in ([0, 2, 1, 1], [1, 0, 0, 2, 2, 1], [2, 1])]


def gathered(method: Any, policy: Table) -> list[Row]:
    return method.gather(data(demos()), Hands(policy, rollouts()), 0)


FACTORS: dict[str, Callable[[float], float]] = {"plain": lambda p: 1.0, "phi": lambda p: p * (1 - p), "p": lambda p: p}


def by_hand(kind: str, mu: float) -> tuple[np.ndarray, float, float]:
    """Ascent direction, and both losses with their weights."""
    rl, sft = np.zeros_like(NOW), np.zeros_like(NOW)
    value = {"pg": 0.0, "nll": 0.0}
    rows, words = rollouts(), 0
    for r in rows:
        group = [x.reward for x in rows if x.group == r.group]
        mean = sum(group) / len(group)
        a = (r.reward - mean) / (math.sqrt(sum((x - mean) ** 2 for x in group) / len(group)) + 1e-6)
        for t in tokens(r):
            words += 1
            ratio = math.exp(log_probs(NOW, r)[t] - log_probs(OLD, r)[t])
            bounded = min(max(ratio, 0.8), 1.2)
            value["pg"] -= min(a * ratio, a * bounded)
            if a * ratio <= a * bounded:
                rl += a * ratio * slope(NOW, r, t)
    below = 0
    for r in demos():
        for t in tokens(r):
            below += 1
            p = math.exp(log_probs(NOW, r)[t])
            value["nll"] -= FACTORS[kind](p) * math.log(p)
            sft += FACTORS[kind](p) * slope(NOW, r, t)
    return (1 - mu) * rl / words + mu * sft / below, (1 - mu) * value["pg"] / words, mu * value["nll"] / below


def ready(module: ModuleType, **options: Any) -> tuple[Any, Table]:
    method, policy = method_of(module.Chord, "chord", **options), Table(NOW)
    method.setup(policy)
    return method, policy


def equations(module: ModuleType) -> None:
    for kind in FACTORS:
        for mu in (0.1, 0.7):
            method, policy = ready(module, tokens=kind, mu=mu)
            found = update(method, policy, gathered(method, policy))
            wanted, pg, nll = by_hand(kind, mu)
            close(policy.applied, wanted, 1e-14, f"{kind}, mu {mu}")
            close([found["loss/pg"], found["loss/nll"]], [pg, nll], 1e-14, f"losses, {kind}, mu {mu}")
            close(
                found["chord/p"], np.mean([math.exp(log_probs(NOW, r)[t]) for r in demos() for t in tokens(r)]), 1e-15
            )
            assert found["chord/mu"] == mu


def ends(module: ModuleType) -> None:
    """mu = 0 is grpo, plain mu = 1 is sft, plain mu = m / (1 + m) is joint at m, and mu 0 reads no demonstration."""
    others: tuple[tuple[float, type[Method], dict[str, Any]], ...] = (
        (0.0, Grpo, {"name": "grpo", "rl": RL}),
        (1.0, Sft, {"name": "sft"}),
        (0.6 / 1.6, Joint, {"name": "joint", "rl": RL, "mu": 0.6}),
    )
    for mu, other, options in others:
        method, policy = ready(module, tokens="plain", mu=mu)
        theirs, same = method_of(other, **options), Table(NOW)
        update(method, policy, gathered(method, policy))
        update(theirs, same, gathered(theirs, same))
        close(policy.applied, same.applied, 1e-16, f"mu {mu} against {options['name']}")
        assert set(policy.coef) == ({"pg"} if mu == 0 else {"nll"} if mu == 1 else {"pg", "nll"})
        assert np.abs(policy.applied).max() > 1e-3
    method, policy = ready(module, mu=1.0)
    update(method, policy, gathered(method, policy))
    close(policy.applied, by_hand("phi", 1.0)[0], 1e-14, "mu = 1 with phi is weighted SFT")


def official_schedule(step: int, warmup: int, decay: int, peak: float, valley: float) -> float:
    if step < warmup:
        return step / warmup * peak
    if step >= warmup + decay:
        return valley
    return (peak - valley) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / decay)) + valley


def schedule(module: ModuleType) -> None:
    """The paper's numbers, and every step of the presets."""
    presets = {"phi": (0, 0, 0.1, 0.1), "mu": (0, 200, 0.9, 0.05), "both": (200, 400, 0.5, 0.02)}
    for preset, numbers in presets.items():
        method, _ = ready(module, preset=preset)
        for step in range(700):
            close(method.mu(step), official_schedule(step, *numbers), 1e-15, f"{preset} at {step}")
    printed = {
        "mu": {0: 0.9, 100: 0.475, 200: 0.05, 500: 0.05},
        "both": {0: 0.0, 100: 0.25, 200: 0.5, 400: 0.26, 600: 0.02},
    }
    for preset, values in printed.items():
        for step, value in values.items():
            close(ready(module, preset=preset)[0].mu(step), value, 1e-15, f"{preset} at {step}")
    method, policy = ready(module, preset="both")
    for step in (50, 300):
        assert update(method, policy, gathered(method, policy), step)["chord/mu"] == method.mu(step)
    update(method, policy, gathered(method, policy), 300)
    close(policy.applied, by_hand("phi", method.mu(300))[0], 1e-14, "both at once: the schedule and p(1 - p)")
    kept = [r for r in gathered(method, policy) if r.kind == "demo"]
    assert kept and ready(module, preset="mu", mu=0.4, decay=10)[0].mu(0) == 0.4, "a key wins over the preset"


def only_through_log_pi(module: ModuleType) -> None:
    """The weight is a constant: the slope of the term in log p is -weight, not the derivative of weight x log p."""
    for kind, factor in FACTORS.items():
        method, _ = ready(module, tokens=kind)
        p = np.array([1.0, 1e-5, 0.1, 0.5, 0.9, 1.0])
        r = row([0] * 6, kind="demo").with_stream("nll", 0.7)  # as a stream may say
        micro = batching.collate([r], torch.float64, torch.device("cpu"), {})
        leaf = torch.tensor(np.log(p)[None], requires_grad=True)
        value = method.terms(micro, Live(leaf))["nll"]
        (g,) = torch.autograd.grad(value[0, 1:].sum(), leaf)
        close(-g[0, 1:], [0.7 * factor(x) for x in p[1:]], 1e-15, f"{kind}: the weight alone")
        close(value[0, 1:].detach(), [-0.7 * factor(x) * math.log(x) for x in p[1:]], 1e-15, f"{kind}: the value")


def flat_groups(module: ModuleType) -> None:
    """All pass or all fail: mu of the weighted SFT gradient and nothing else."""
    for reward in (0.0, 1.0, 0.1):
        method, policy = ready(module, mu=0.3)
        rows = [row([0, i % 3, 1], reward, i // 6, OLD) for i in range(12)]
        update(method, policy, method.gather(data(demos()), Hands(policy, rows), 0))
        alone, same = ready(module, mu=1.0)
        update(alone, same, alone.gather(data(demos()), Hands(same, []), 0))
        close(policy.applied, 0.3 * same.applied, 1e-16, f"all {reward}")


def reference(module: ModuleType) -> None:
    method, policy = ready(module, mu=0.25, rl={"kl_coef": 0.4})
    update(method, policy, gathered(method, policy))
    assert "reference" in policy.groups
    close([policy.coef["pg"], policy.coef["kl"], policy.coef["nll"]], [0.75, 0.3, 0.25], 1e-16)


CHECKS: dict[str, Callable[[ModuleType], None]] = {
    f.__name__: f for f in (equations, ends, schedule, only_through_log_pi, flat_groups, reference)
}


@pytest.mark.parametrize("name", CHECKS)
def test_shipped_code(name: str) -> None:
    CHECKS[name](chord_module)


PHI = '"phi": lambda: p_BT * (1 - p_BT)'
MUTANTS: dict[str, tuple[ModuleType, Swaps, str]] = {
    "mu turned round": (chord_module, (('rl, 1 - mu) | {"nll": mu}', 'rl, mu) | {"nll": 1 - mu}'),), "equations"),
    "RL in full": (chord_module, (("rl, 1 - mu)", "rl, 1.0)"),), "equations"),
    "mu without its step": (chord_module, (("mu = self.mu(step)", "mu = self.mu(0)"),), "schedule"),
    "ends are read all the same": (chord_module, (("items() if c > 0", "items() if c >= 0"),), "ends"),
    "the end is forgotten": (
        chord_module,
        (("o.mu if o.mu_end is None else o.mu_end", "o.mu"),),
        "schedule",
    ),
    "tokens forgotten": (chord_module, (("self.options.tokens)", '"phi")'),), "equations"),
    "weights of the demonstrations forgotten": (
        chord_module,
        (('batch.weight["nll"] * weight', "weight"),),
        "only_through_log_pi",
    ),
    "p of all tokens": (chord_module, (("[i][row.own]", "[i]"),), "equations"),
    "phi without its other half": (losses, ((PHI, '"phi": lambda: p_BT'),), "equations"),
    "phi doubled": (losses, ((PHI, '"phi": lambda: 2 * p_BT * (1 - p_BT)'),), "only_through_log_pi"),
    "phi with a gradient": (
        losses,
        (("p_BT = prob_weight(logp_BT)", "p_BT = logp_BT.exp()"),),
        "only_through_log_pi",
    ),
    "p is one": (losses, (('"p": lambda: p_BT', '"p": lambda: p_BT.new_ones(())'),), "only_through_log_pi"),
    "half a cosine less": (credit, (("(step - warmup) / decay if", "(step - warmup) / (2 * decay) if"),), "schedule"),
    "the cosine starts early": (credit, (("(step - warmup) / decay if", "step / decay if"),), "schedule"),
    "warm-up by one more": (
        credit,
        (("return peak * step / warmup", "return peak * (step + 1) / warmup"),),
        "schedule",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_seen(name: str) -> None:
    of, swaps, check = MUTANTS[name]
    wrong = mutate(chord_module, swaps if of is chord_module else (), "mutant")
    if of is not chord_module:
        setattr(wrong, of.__name__.rpartition(".")[2], mutate(of, swaps, "mutant"))
    with pytest.raises(AssertionError):
        CHECKS[check](wrong)


def test_a_mix_without_a_way_is_refused() -> None:
    with pytest.raises(UserError, match=r"mu_end differs from mu.*set decay"):
        ready(chord_module, mu=0.3, mu_end=0.1)
    assert chord_module.Chord.needs == {"demos"}


@pytest.fixture
def _wide() -> Iterator[None]:
    with wide_norm():
        yield


@pytest.mark.usefixtures("_wide")
def test_a_real_step_at_either_end_is_that_of_grpo_and_of_sft(tmp_path: Path) -> None:
    """Through the trainer, on a real model: the same rows, the same gradient to rounding."""

    def gradient(name: str, method: dict[str, Any]) -> dict[str, torch.Tensor]:
        session = open_session(make_config(raw_config(tmp_path / name, method)))
        kept: dict[str, torch.Tensor] = {}
        session.policy.apply = lambda group, g: kept.update({k: v.clone() for k, v in g.items()}) or 1.0
        rows = session.method.gather(session.data, session.roll, 0)
        session.method.update(session.policy, batching.make_batch(rows), 0)
        session.folder.close()
        session.roll.grader.close()
        return kept

    for mu, other in ((0.0, {"name": "grpo", "rl": RL}), (1.0, {"name": "sft"})):
        mine = gradient(f"chord{mu}", {"name": "chord", "tokens": "plain", "mu": mu})
        theirs = gradient(f"other{mu}", other)
        assert mine.keys() == theirs.keys() and any(g.abs().max() > 1e-3 for g in theirs.values())
        for name, g in theirs.items():
            close(mine[name], g, 1e-12, f"mu {mu}: {name}")
