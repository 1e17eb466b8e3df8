"""`shuffle_r1` against enumeration: pairs by brute force, draws by exact inclusion probabilities, and the loss of rows
that count several times by rows that are written down several times. Mutants of each line fail."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checks import close
from hand import advantages, gather, in_folder, opened, same, sessions, slope, weights
from mutation import Mutant, mutants

from bridgelm.config.run_config import load_config, make_config
from bridgelm.errors import UserError
from bridgelm.methods import shuffle_r1
from bridgelm.model import batching
from bridgelm.model.batching import make_batch
from bridgelm.types import Row
from tiny import raw_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _sessions() -> Iterator[None]:
    with sessions():
        yield


# -- (1) ---------------------------------------------------------------------------------------------------------------


def brute_pairs(values: Sequence[float]) -> list[tuple[float, ...]]:
    """Take away the largest and the smallest, again and again."""
    left, out = list(values), []
    while len(left) > 1:
        out.append((max(left), min(left)))
        left.remove(max(left))
        left.remove(min(left))
    return out + [(value,) for value in left]


def test_pairing(tmp_path: Path) -> None:
    for n in range(1, 7):
        for values in itertools.product((-1.5, 0.0, 0.25, 2.0), repeat=n):
            members = [10 + 3 * k for k in range(n)]
            found = shuffle_r1.pairs(members, values)
            assert sorted(i for pair in found for i in pair) == members, "each answer once"
            by_value = dict(zip(members, values))
            assert [tuple(by_value[i] for i in pair) for pair in found] == brute_pairs(values)
    assert shuffle_r1.pairs([7, 8, 9, 4], [1.0, 0.0, 0.0, 1.0]) == [(7, 9), (4, 8)], "ties in the order they came in"
    # The official code's own example: 16 answers, 8 pairs, 4 kept; the sizes that int((1 - prune) * pairs) gives.
    sixteen = shuffle_r1.pairs(range(16), [float(k) for k in range(16)])
    assert list(shuffle_r1.first(sixteen, 0.5)) == [(15, 0), (14, 1), (13, 2), (12, 3)]
    for n, keep, wanted in ((4, 0.5, 2), (3, 0.5, 1), (4, 1.0, 4), (4, 0.1, 1), (100, 0.57, 57), (1, 0.5, 1)):
        assert len(shuffle_r1.first(range(n), keep)) == wanted, (n, keep)


# -- (2) ---------------------------------------------------------------------------------------------------------------


def inclusion(weights_K: np.ndarray, size: int) -> np.ndarray:
    """Exact: every ordered draw of `size` pairs, one after the other in proportion to their weights."""
    out = np.zeros(len(weights_K))
    for order in itertools.permutations(range(len(weights_K)), size):
        chance, left = 1.0, float(weights_K.sum())
        for i in order:
            chance, left = chance * weights_K[i] / left, left - weights_K[i]
        out[list(order)] += chance
    return out


def test_multiplicities(tmp_path: Path) -> None:
    w = np.array([3.0, 2.0, 1.0, 0.5, 1.5, 0.25])
    runs = 1200
    for draws, sizes in ((6, [1] * 6), (3, [2] * 3), (2, [3] * 2), (4, [2, 2, 1, 1]), (8, [1] * 6 + [0] * 2)):
        found = np.array([shuffle_r1.drawn(w, draws, np.random.default_rng((1, seed))) for seed in range(runs)])
        assert (found.sum(1) == 6).all(), "the size of the batch stays"
        assert found.max() <= sum(size > 0 for size in sizes), "at most once a draw"
        wanted = sum(inclusion(w, size) for size in sizes if size)
        error = np.sqrt(found.var(0) / runs)
        assert (abs(found.mean(0) - wanted) <= 4.5 * error + 1e-12).all(), (draws, found.mean(0), wanted)
    close(inclusion(w, 1) * 6, 6 * w / w.sum(), 1e-14, "one a draw: S w / sum w")
    once = shuffle_r1.drawn(w, 1, np.random.default_rng(0))
    assert (once == 1).all(), "S = 1: each pair once"
    # Pairs without a weight only fill up, and evenly.
    flat = np.array([shuffle_r1.drawn(np.array([1.0, 0, 0, 0]), 2, np.random.default_rng((2, s))) for s in range(1200)])
    assert (flat[:, 0] == 2).all() and (flat.sum(1) == 4).all()
    assert abs(flat[:, 1:].mean(0) - 2 / 3).max() < 0.07
    plenty = [shuffle_r1.drawn(np.array([1.0, 1, 1, 1, 0, 0, 0, 0]), 2, np.random.default_rng(s)) for s in range(20)]
    assert all((times[4:] == 0).all() for times in plenty), "while there are pairs with a weight, no other is drawn"


# -- through the method's file: which rows count how often, and what the loss is -------------------------------------

MIXED = [*"+-+-", *"++++", *"+---", *"----"]


def first_pair(values: Sequence[float]) -> set[int]:
    """The first of the best and, from behind, the first of the worst: of a sort that keeps ties in order, the last."""
    best = max(range(len(values)), key=lambda k: (values[k], -k))
    worst = min(range(len(values)), key=lambda k: (values[k], -k))
    return {best, worst}


def test_counted_rows(tmp_path: Path) -> None:
    """With S draws of the batch's pairs; what was not kept stays as a row, for the log, and counts 0 times."""
    method = {"name": "shuffle_r1", "method": {"name": "joint"}, "draws": 2}
    session = opened(tmp_path, method, MIXED)
    rows = gather(session)
    rollouts = [r for r in rows if r.kind == "rollout"]
    assert len(rollouts) == 16 and sum(r.times for r in rollouts) == 8, "half of the answers, counted with their times"
    assert all(r.times == 1 for r in rows if r.kind == "demo"), "demonstrations are not its business"
    gains = advantages(rollouts)
    assert [float(r.streams["pg"].weight[-1]) for r in rollouts] == gains, "advantages of the full group"
    for g in range(4):
        group, own = rollouts[4 * g:4 * g + 4], gains[4 * g:4 * g + 4]
        assert not any(group[k].times for k in set(range(4)) - first_pair(own))
        assert len({group[k].times for k in first_pair(own)}) == 1, "a pair stays together"
    # Keep one pair of two in each group; their weights are 1, 0, 1, 0: each draw takes both that have one.
    assert [sum(r.times for r in rollouts[4 * g:4 * g + 4]) for g in range(4)] == [4, 0, 4, 0]
    assert session.method.measured["shuffle_r1/distinct"] == 0.5 and session.method.measured["shuffle_r1/most"] == 2
    close(session.method.measured["shuffle_r1/advantage"], 0.5, 1e-15, "mean |A| of what is trained on")
    close(session.method.measured["shuffle_r1/advantage_all"], np.mean(np.abs(gains)), 1e-15, "and of what was sampled")


def test_like_copies(tmp_path: Path) -> None:
    """The step is that of a batch in which each row stands as often as it counts, for every denominator."""
    for aggregate in ("token", "row", "constant"):
        inner = {"name": "grpo", "rl": {"aggregate": aggregate, "std": True}}
        method = {"name": "shuffle_r1", "method": inner, "draws": 3, "keep": 1.0}
        session = opened(tmp_path / aggregate, method, [0, 0.3, 1, 0.9, *"++--", *"-+--", *"-+++"])
        rows, start = gather(session), weights(session)
        assert {0.0, 1.0, 2.0} <= {r.times for r in rows}
        gains = advantages(rows, lambda g: float(np.sqrt(np.mean((g - g.mean()) ** 2))))
        copies = [(r, a) for r, a in zip(rows, gains) for _ in range(int(r.times))]
        length = {"token": sum(int(r.own.sum()) for r, _ in copies), "row": len(copies),
                  "constant": len(copies) * session.config.rollout.max_new_tokens}[aggregate]
        parts = [(r, a * r.own / length / (r.own.sum() if aggregate == "row" else 1)) for r, a in copies]
        gradient = slope(session, parts)
        session.method.update(session.policy, make_batch(rows), 0)
        wanted = {name: start[name] - 0.1 * gradient[name] for name in start}
        same(weights(session), wanted, start, aggregate)


def test_alone(tmp_path: Path) -> None:
    """Everything kept and no shuffle: the wrapped method to the bit of its rows, and its step to rounding."""
    inner = {"name": "grpo", "rl": {"kl_coef": 0.1}}
    plain = opened(tmp_path / "plain", inner, "+--?-++")
    wrapped = opened(tmp_path / "wrapped", {"name": "shuffle_r1", "method": inner, "keep": 1.0, "draws": 1}, "+--?-++")
    for step in range(2):
        start = weights(plain)
        one, two = gather(plain, step), gather(wrapped, step)
        assert all((a.ids == b.ids).all() and b.times == 1 for a, b in zip(one, two, strict=True))
        assert make_batch(one).counts == make_batch(two).counts
        plain.method.update(plain.policy, make_batch(one), step)
        wrapped.method.update(wrapped.policy, make_batch(two), step)
        same(weights(wrapped), weights(plain), start, f"step {step}")
    assert plain.policy.ledger.rollouts == wrapped.policy.ledger.rollouts, "as many answers are paid for"


def test_seeded(tmp_path: Path) -> None:
    """By the run's seed and the step, and by nothing else."""
    method = {"name": "shuffle_r1", "keep": 1.0, "draws": 4}
    graded = [0, 0.3, 1, 0.9, *"++--", *"-+--", *"-+++"]
    times = {}
    for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0)):
        session = opened(tmp_path / f"{len(times)}-{seed}-{step}", method, graded, seed=seed)
        found = [r.times for r in gather(session, step)]
        assert times.setdefault((seed, step), found) == found
    assert len({tuple(t) for t in times.values()}) == 3


def test_pair_weights(tmp_path: Path) -> None:
    kinds = {"sum": 3.5, "max": 2.0, "positive": 1.5}
    for kind, wanted in kinds.items():
        config = make_config(raw_config(tmp_path / kind, {"name": "shuffle_r1", "weight": kind}, tmp_path))
        method = shuffle_r1.ShuffleR1(config.method, config)
        close(method.weight([1.5, -2.0]), wanted, 0.0, kind)
    # A power of 0 draws evenly, a large one takes the largest.
    graded = [*"+-+-", *"++++", *"+---", *"----"]
    few = {"name": "shuffle_r1", "draws": 4, "method": {"name": "grpo", "rl": {"std": False}}}
    session = opened(tmp_path / "steep", {**few, "power": 400.0}, [1, 0, 0.5, 0.5, *"----", 0.8, 0, 0.4, 0.4, *"----"])
    rows = gather(session)
    assert [sum(r.times for r in rows[4 * g:4 * g + 4]) for g in range(4)] == [8, 0, 0, 0], "1 ** 400 against .8 ** 400"
    even = opened(tmp_path / "even", {**few, "power": 0.0}, graded)
    total = np.zeros(4)
    for step in range(20):
        rows = gather(even, step)
        total += [sum(r.times for r in rows[4 * g:4 * g + 4]) for g in range(4)]
    assert abs(total / 20 - 2).max() < 1.2, "evenly, flat groups too"


MUTANTS = mutants(
    shuffle_r1,
    Mutant("sign", "pairs", 0, by=in_folder(test_pairing)),
    Mutant("branch", "pairs", "len 1", by=in_folder(test_pairing)),  # the middle one is lost
    Mutant("term", "first", 0, by=in_folder(test_pairing)),
    Mutant("swap", "drawn", "exponential", by=in_folder(test_multiplicities)),
    Mutant("term", "drawn", 0, by=in_folder(test_multiplicities)),  # a short batch
    Mutant("term", "ShuffleR1.gather", "times 0", by=in_folder(test_counted_rows)),
    Mutant("constant", "ShuffleR1.gather", "power", to=1.0, by=in_folder(test_pair_weights)),
    Mutant("term", "collate", "times 1", by=in_folder(test_like_copies), of=batching),
    Mutant("term", "make_batch", "times 1", by=in_folder(test_like_copies), of=batching),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()


def test_rows_that_do_not_count_are_not_passed() -> None:
    blank = {"ids": np.array([0, 1]), "own": np.array([False, True]), "kind": "rollout", "problem": None}
    row = Row(**blank).with_stream("pg", 1.0)  # type: ignore[arg-type]
    assert batching.idle([row, replace(row, times=0.0), replace(row, times=2.0)], ["pg"]) == {1}


@pytest.mark.parametrize(("inner", "words"), [("sft", "has no rollouts"), ("bridge", "compares two policies"),
                                         ("guide", "compares two policies")])
def test_what_it_cannot_be_wrapped_round_is_refused(inner: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(ROOT / "recipes" / "toy" / "shuffle_r1.toml", [f'method.method={{name="{inner}"}}'])
