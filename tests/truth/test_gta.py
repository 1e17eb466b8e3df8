"""`gta`: its gate on given gradients, its two losses against sums written out by hand on a tiny real model, spans
against brute force on two kinds of tokenizer. Mutants of each line fail."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checks import close
from hand import advantages, gather, in_folder, opened, same, sessions, slope, weights
from mutation import Mutant, mutants

from bridgelm.config.options.shaping import GtaOptions
from bridgelm.config.run_config import load_config
from bridgelm.data.chat import Chat
from bridgelm.data.cursors import Data
from bridgelm.errors import UserError
from bridgelm.methods import gta
from bridgelm.model.batching import make_batch
from bridgelm.model.policy import Grads
from bridgelm.types import Completion
from tiny import TEMPLATE, save_tokenizer

ROOT = Path(__file__).parents[2]
FREE = {"name": "gta", "open": "", "close": "", "format": "", "rl": {"kl_coef": 0.0, "std": False}}
TAGS = {**FREE, "open": "+ ", "close": " ;", "format": r"\+ .* ; .*", "format_weight": 0.5}


@pytest.fixture(autouse=True)
def _sessions() -> Iterator[None]:
    with sessions():
        yield


# -- (3) ---------------------------------------------------------------------------------------------------------------


class Given:
    """A policy whose two gradients are given; `stepped` is what it was told to step with."""

    def __init__(self, sft: list[float], rl: list[float]) -> None:
        self.given, self.stepped = {"nll": sft, "pg": rl}, []

    def grad(self, terms: Any, batch: Any, coef: dict[str, float]) -> Grads:
        name = "nll" if "nll" in coef else "pg"
        value = coef[name] * torch.tensor(self.given[name], dtype=torch.float64)
        return Grads({"x": value[:1], "y": value[1:]}, {}, {name: 0.0}, {})

    def dot(self, g: Any, h: Any) -> float:
        return float(sum((g[k] * h[k]).sum() for k in g))

    def apply(self, name: str, gradient: Any) -> float:
        self.stepped = torch.cat([gradient["x"], gradient["y"]]).tolist()
        return float(torch.tensor(self.stepped).norm())


def test_gate(tmp_path: Path) -> None:
    weights_ = {"sft_weight": 2.0, "rl_weight": 0.5}
    cases = [([1.0, 0.0], [-1.0, 2.0], -1 / math.sqrt(5), True),  # against each other
             ([1.0, 0.0], [-1e-9, 2.0], -5e-10, True),
             ([1.0, 0.0], [0.0, 2.0], 0.0, False),  # exactly at right angles: the sum
             ([1.0, 1.0], [1.0, 2.0], 3 / math.sqrt(10), False),
             ([0.0, 0.0], [1.0, -2.0], 0.0, False), ([1.0, -3.0], [0.0, 0.0], 0.0, False)]
    for sft, rl, cosine, dropped in cases:
        for on in (True, False):
            run = SimpleNamespace()
            method = gta.Gta(GtaOptions.model_validate({**FREE, **weights_, "gate": on}), run)
            policy = Given(sft, rl)
            found = method.update(policy, None, 0)
            close(found["gta/cos"], cosine, 1e-15, f"cosine of {sft} and {rl}")
            alone = dropped and on
            wanted = [0.5 * r + (0.0 if alone else 2.0 * s) for s, r in zip(sft, rl)]
            close(policy.stepped, wanted, 1e-15, f"{sft}, {rl}, gate {on}")
            assert found["gta/dropped"] == float(alone)


# -- (1) and (2) -------------------------------------------------------------------------------------------------------


class Says:
    """An engine that answers with given words, in turn."""

    exact = True

    def __init__(self, session: Any, *texts: str) -> None:
        self.policy, self.texts, self.session = session.policy, texts, session

    def generate(self, origin: Any, requests: Any, sampling: Any, ledger: Any) -> list[Completion]:
        out = []
        for i, request in enumerate(requests):
            ids = self.session.chat.tokenizer(self.texts[i % len(self.texts)], add_special_tokens=False)["input_ids"]
            ids = np.array([*ids, self.session.chat.eos_id])
            logps = []
            with torch.no_grad():
                whole = np.concatenate([request.prompt, ids])
                table = torch.log_softmax(origin.model(input_ids=torch.tensor(whole)[None]).logits[0], -1)
                logps = [float(table[len(request.prompt) + t - 1, token]) for t, token in enumerate(ids)]
            out.append(Completion(ids, np.array(logps), np.array(logps), True))
        return out


def words(session: Any, row: Any, mask: np.ndarray) -> str:
    return session.chat.tokenizer.decode(row.ids[mask])


SPOKEN = ("+ 7 8 ; 1 2", "+ 9 ; 3", "4 5 6", "+ 3 1")


def spoken(folder: Path, method: dict[str, Any], grades: str = "+-++") -> Any:
    session = opened(folder, method, grades)
    session.roll.engine = Says(session, *SPOKEN)
    return session


def test_masks(tmp_path: Path) -> None:
    session = spoken(tmp_path / "tags", TAGS)
    rows = gather(session)
    rollouts, labels = rows[:16], rows[16:]
    assert [words(session, r, r.streams["pg"].mask) for r in rollouts[:4]] == [
        "+ ; 1 2 <eos>", "+ ; 3 <eos>", "4 5 6 <eos>", "+ 3 1 <eos>"], "all but the guess, tags and end included"
    assert len(labels) == 4 and [r.problem.id for r in labels] == [rollouts[4 * g].problem.id for g in range(4)]
    for row in labels:
        assert words(session, row, row.own) == f"+ {row.problem.answer} ;", "no end token: nothing ends here"
        assert words(session, row, row.streams["nll"].mask) == row.problem.answer and set(row.streams) == {"nll"}
    assert session.method.measured["gta/format"] == 0.5
    free = spoken(tmp_path / "free", FREE)
    rows = gather(free)
    assert [words(free, r, r.streams["pg"].mask) for r in rows[:4]] == [
        "7 8 ; 1 2 <eos>", "9 ; 3 <eos>", "5 6 <eos>", "3 1 <eos>"], "the first token is the guess: a label has one"
    assert all(words(free, r, r.streams["nll"].mask) == words(free, r, r.own) == r.problem.answer for r in rows[16:])
    right = np.mean([free.chat.tokenizer.decode(r.ids[r.own][:1]) == r.problem.answer for r in rows[:16]])
    assert free.method.measured == {"gta/guessed": right}
    kl = spoken(tmp_path / "kl", {**TAGS, "rl": {}})
    rows = gather(kl)
    assert all((r.streams["kl"].mask == r.streams["pg"].mask).all() for r in rows[:16]), "L_RL is without the guess"


def test_labels(tmp_path: Path) -> None:
    """Its first words, and longer ones: the guess is as long as the label."""
    for count, wanted in ((0, "1 2 3"), (1, "1"), (2, "1 2"), (9, "1 2 3")):
        session = spoken(tmp_path / str(count), {**FREE, "words": count})
        train = tuple(replace(p, answer=" 1 2 3 ") for p in session.data.splits.train)
        session.data.splits = replace(session.data.splits, train=train)
        rows = gather(session)
        assert words(session, rows[-1], rows[-1].streams["nll"].mask) == wanted
        first = rows[0]
        left = first.own.sum() - first.streams["pg"].mask.sum()
        assert left == len(wanted.split())


def test_both_losses(tmp_path: Path) -> None:
    """The step is that of the two sums, each over its own count; rewards have the format's part in them."""
    session = spoken(tmp_path, {**TAGS, "gate": False, "sft_weight": 0.7, "rl_weight": 1.3})
    rows, start = gather(session), weights(session)
    rollouts, labels = rows[:16], rows[16:]
    grades = [1.0, 0.0, 1.0, 1.0] * 4
    fits = [0.5, 0.5, 0.0, 0.0] * 4
    assert [r.reward for r in rollouts] == [g + f for g, f in zip(grades, fits)]
    guess = [{0: (1, 2), 1: (1,), 2: (), 3: ()}[i % 4] for i in range(16)]
    kept = []
    for row, places in zip(rollouts, guess):
        mask, first = row.own.copy(), int((~row.own).sum())
        mask[[first + k for k in places]] = False
        kept.append(mask)
    tokens, size = sum(int(m.sum()) for m in kept), len(labels)
    parts = [(r, 1.3 * a / tokens * m) for r, a, m in zip(rollouts, advantages(rollouts), kept)]
    parts += [(r, 0.7 / size * (np.arange(len(r.ids)) == len(r.ids) - 2)) for r in labels]
    gradient = slope(session, parts)
    session.method.update(session.policy, make_batch(rows), 0)
    same(weights(session), {n: start[n] - 0.1 * gradient[n] for n in start}, start, "both losses")
    flat = spoken(tmp_path / "flat", FREE, "+")
    rows, start = gather(flat), weights(flat)
    labels = rows[16:]
    gradient = slope(flat, [(r, 1 / len(labels) * r.own) for r in labels])
    flat.method.update(flat.policy, make_batch(rows), 0)
    same(weights(flat), {n: start[n] - 0.1 * gradient[n] for n in start}, start, "all pass: the labels alone")


MUTANTS = mutants(
    gta,
    Mutant("compare", "Gta.update", 0, by=in_folder(test_gate)),  # dropped at right angles
    Mutant("mask", "Gta.update", "gate 0", by=in_folder(test_gate)),
    Mutant("branch", "Gta.update", "blend 0", by=in_folder(test_gate)),
    Mutant("mask", "without", "mask 0", by=in_folder(test_masks)),
    Mutant("mask", "Gta.label_row", "guess", by=in_folder(test_masks)),
    Mutant("term", "Gta.gather", "format_weight 0", by=in_folder(test_both_losses)),
    Mutant("constant", "Gta.update", "sft_weight", to=1.0, by=in_folder(test_both_losses)),
    Mutant("branch", "Gta.label", "words 1", by=in_folder(test_labels)),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()


# -- spans -------------------------------------------------------------------------------------------------------------


def bytes_tokenizer(folder: Path) -> Any:
    """A byte-level BPE whose tokens cross the tags' borders, and cut characters of several bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    texts = ["<g>one</g>", "so <g>two é</g> and", "</g><g>", "<g>é</g>"] * 3
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=(
        pre_tokenizers.ByteLevel.alphabet()), special_tokens=["<pad>", "<eos>"]))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE)


def brute(tokenizer: Any, ids: list[int], opening: str, closing: str) -> tuple[int, int] | None:
    """Token by token: those whose characters all lie between the tags."""
    texts = [tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False) for n in range(len(ids) + 1)]
    whole = texts[-1]
    begin = whole.find(opening)
    stop = whole.find(closing, begin + len(opening)) if begin >= 0 else -1
    if stop < 0:
        return None
    inside = [n for n in range(len(ids)) if len(texts[n]) >= begin + len(opening) and len(texts[n + 1]) <= stop]
    return (inside[0], inside[-1] + 1) if inside else ()  # type: ignore[return-value]


def test_spans_are_those_of_brute_force(tmp_path: Path) -> None:
    chat = Chat(bytes_tokenizer(tmp_path / "bytes"))
    crossing = 0
    for text in ("<g>one</g>", "a<g>é é</g> x", "so <g>two é</g> and<g>three</g>", "<g></g>", "<g>open", "</g><g>x</g>",
                 "<g> 12 </g>", "nothing", ""):
        ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        wanted, found = brute(chat.tokenizer, ids, "<g>", "</g>"), chat.span(ids, "<g>", "</g>")
        if wanted is None:
            assert found is None, text
        elif wanted == ():
            assert found is not None and found[0] == found[1], text
        else:
            assert found == wanted, text
            inner = chat.tokenizer.decode(ids[found[0]:found[1]])
            between = text.partition("<g>")[2].partition("</g>")[0]
            assert inner in between
            crossing += inner != between
    assert crossing, "some token belongs to a tag and to the guess"
    plain = Chat(save_tokenizer(tmp_path / "words"))
    ids = plain.tokenizer("3 + 7 8 ; 1", add_special_tokens=False)["input_ids"]
    assert plain.span(ids, "+ ", " ;") == plain.span(ids, "+", ";") == (2, 4)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_mistakes_are_named() -> None:
    recipe = ROOT / "recipes" / "toy" / "gta.toml"
    with pytest.raises(UserError, match="open and close go together"):
        load_config(recipe, ["method.open=<guess>"])
    with pytest.raises(UserError, match="not a regular expression"):
        load_config(recipe, ["method.format=(("])


def test_labels_are_needed(tmp_path: Path) -> None:
    session = opened(tmp_path, FREE)
    assert gta.Gta.needs == {"labels"} and "labels" in session.data.facts()
    splits = session.data.splits
    bare = replace(splits, train=(replace(splits.train[0], answer=None), *splits.train[1:]))
    assert "labels" not in Data(bare, 0).facts()


def test_the_format_of_the_paper() -> None:
    fits = gta.Gta(GtaOptions(), SimpleNamespace()).fits  # type: ignore[arg-type]
    assert fits("<guess>a</guess>\n<think>b\nc</think> <answer>d</answer>\n")
    for text in ("<think>b</think><answer>d</answer>", "<guess>a</guess><answer>d</answer><think>b</think>",
                 "x <guess>a</guess><think>b</think><answer>d</answer>"):
        assert not fits(text)
