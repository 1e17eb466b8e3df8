"""Where one method is said to be another: the same gradients, to rounding, handed to the optimiser through both files.

Two real steps on the tiny world, each with gather, probe, terms and update; a method that collapses takes the other's
course and not only its first step. A mutant of each file shows that the comparison can fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from mutation import Mutant, mutants
from torch import Tensor
from transformer import wide_norm

from bridgelm.config import catalogue
from bridgelm.config.run_config import make_config
from bridgelm.methods import bridge, chord, hpt, joint, token_lead, trapo
from bridgelm.model.batching import make_batch
from bridgelm.training import loop
from tiny import open_session, raw_config

STEPS = 2
Course = list[dict[str, Tensor]]
PLAIN = {"std": False, "clip_high": 0.2, "aggregate": "row"}  # chord has other defaults than grpo
FROZEN = {"name": "bridge", "beta": 1e-300}  # of Adam: w starts at B = 0 and is at 1e-300 after a step


@pytest.fixture(autouse=True)
def _wide_norm() -> Iterator[None]:
    with wide_norm():
        yield


def course(folder: Path, method: dict[str, Any], **changes: Any) -> Course:
    """What each of the steps hands to theta's optimiser."""
    raw = raw_config(folder, method, steps=STEPS, **changes)
    if catalogue.needs(method["name"]) & {"teacher", "behaviour"}:
        raw["teacher"] = {"name_or_path": raw["model"]["name_or_path"]}
    session = open_session(make_config(raw))
    apply, handed = session.policy.apply, []

    def spy(name: str, gradient: Any, *args: Any, **options: Any) -> float:
        if name == "theta":
            handed.append({key: value.detach().clone() for key, value in gradient.items()})
        return apply(name, gradient, *args, **options)

    session.policy.apply = spy
    for _ in range(STEPS):
        loop.take_step(session)
    session.folder.close()
    session.roll.grader.close()
    return handed


def differ(first: Course, second: Course) -> float:
    """The largest difference, as a share of the largest gradient of its step."""
    assert len(first) == len(second) == STEPS
    gaps = []
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        size = max(float(value.abs().max()) for value in b.values())
        assert size > 0, "two methods that both do nothing would agree"
        gaps.append(max(float((a[key] - b[key]).abs().max()) for key in a) / size)
    return max(gaps)


COLLAPSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "joint at mu 0 is grpo": ({"name": "joint", "mu": 0.0}, {"name": "grpo"}),
    "kdrl at beta 0 is grpo": ({"name": "kdrl", "beta": 0.0, "delta": 0.0}, {"name": "grpo"}),
    "pear with even ratios is sft": ({"name": "pear", "gamma": 1.0, "ratio_low": 0.0, "ratio_high": 0.0},
                                     {"name": "sft"}),
    "bridge at lambda 0, w frozen, is sft": ({**FROZEN, "lambda": 0.0}, {"name": "sft"}),
    "bridge at lambda 1, w frozen, is grpo": ({**FROZEN, "lambda": 1.0}, {"name": "grpo"}),
    "bridge at lambda 1/4, w frozen, is joint at mu 3": ({**FROZEN, "lambda": 0.25}, {"name": "joint", "mu": 3.0}),
    "plain chord at mu 1/3 is joint at mu 1/2": (
        {"name": "chord", "tokens": "plain", "mu": 1 / 3, "rl": {"std": False, "clip_high": 0.28}},
        {"name": "joint", "mu": 0.5}),
    "gac at its prior alone is chord": (
        {"name": "gac", "blend": 0.0, "cap": 1.0, "warmup": 0, "decay_steps": 3, "prior": 0.8, "prior_end": 0.1},
        {"name": "chord", "mu": 0.8, "mu_end": 0.1, "decay": 3}),
    "token_lead with flat weights is joint": ({"name": "token_lead", "eta": 0.0, "mu": 0.7},
                                              {"name": "joint", "mu": 0.7}),
    "chord at mu 1, plain, is sft": ({"name": "chord", "tokens": "plain", "mu": 1.0}, {"name": "sft"}),
    "chord at mu 0 is grpo": ({"name": "chord", "mu": 0.0, "rl": PLAIN}, {"name": "grpo", "rl": PLAIN}),
    "hpt whose gate never closes is grpo": ({"name": "hpt", "gamma": -1.0}, {"name": "grpo"}),
    "uft without hints is grpo": ({"name": "uft", "high": 0.0, "low": 0.0}, {"name": "grpo"}),
}


def agree(claim: str, folder: Path) -> None:
    folder = Path(mkdtemp(dir=folder))
    one, other = (course(folder / str(i), method) for i, method in enumerate(COLLAPSES[claim]))
    assert differ(one, other) < 1e-9


@pytest.mark.parametrize("claim", COLLAPSES)
def test_one_method_is_another(tmp_path: Path, claim: str) -> None:
    agree(claim, tmp_path)


def by(claim: str) -> Callable[[Path], None]:
    return partial(agree, claim)


MUTANTS = [
    *mutants(joint, Mutant("term", "Joint.update", 4, by=by("joint at mu 0 is grpo"))),
    *mutants(bridge, Mutant("term", "Bridge.update", 3, by=by("bridge at lambda 0, w frozen, is sft")),
             Mutant("term", "Bridge.update", 3, by=by("bridge at lambda 1/4, w frozen, is joint at mu 3"))),
    *mutants(token_lead, Mutant("term", "TokenLead.weigh", "eta 1", by=by("token_lead with flat weights is joint"))),
    *mutants(hpt, Mutant("constant", "Hpt.weights", "1.0 1", to=0.9, by=by("hpt whose gate never closes is grpo"))),
    *mutants(chord, Mutant("term", "Chord.update", 3, by=by("chord at mu 0 is grpo"))),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(tmp_path: Path, mutant: Mutant) -> None:
    mutant.check(tmp_path)


# -- TrSFT, the loss of trapo's given tokens, on the demonstrations of sft ---------------------------------------------

def of_demonstrations(folder: Path, module: Any, alpha: float, other: str) -> float:
    """How far the gradient of trapo's terms is from another method's, on that one's rows."""
    session = open_session(make_config(raw_config(folder, {"name": other})))
    config = make_config(raw_config(folder / "trapo", {"name": "trapo", "alpha": alpha, "entropy_coef": 0.0}))
    batch = make_batch(session.method.gather(session.data, session.roll, 0))
    found = [session.policy.grad(method.terms, batch, {"nll": 1.0}).theta
             for method in (module.Trapo(config.method, config), session.method)]
    session.folder.close()
    session.roll.grader.close()
    return differ([found[0]] * STEPS, [found[1]] * STEPS)


CLAIMS = {"alpha 0 is sft": (0.0, "sft"), "alpha to 0 is sft": (1e-12, "sft"), "alpha 1 is dft": (1.0, "dft")}


@pytest.mark.parametrize("claim", CLAIMS)
def test_trsft_lies_between_sft_and_dft(tmp_path: Path, claim: str) -> None:
    assert of_demonstrations(tmp_path, trapo, *CLAIMS[claim]) < 1e-9
    other = {"sft": "dft", "dft": "sft"}[CLAIMS[claim][1]]
    assert of_demonstrations(tmp_path / "other", trapo, CLAIMS[claim][0], other) > 1e-3
    assert of_demonstrations(tmp_path / "half", trapo, 0.1, CLAIMS[claim][1]) > 1e-3, "between them it is neither"
