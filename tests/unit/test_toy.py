"""The embedded task: generators, verifiers, demonstrations, tokenizer and the shipped models' size."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest

from bridgelm.data import toy
from bridgelm.data.toy.data import SLACK, puzzle_of, split_of, wrong_demo
from bridgelm.data.toy.walk import Step, distances, replay, shortest, write

FAMILIES = sorted(toy.FAMILIES)
SPLITS = ("train", "demos", "validation", "test", "hard")


def reference(problem):
    assert problem.answer is not None
    return problem.answer


@pytest.mark.parametrize("family", FAMILIES)
def test_generators_are_deterministic_and_seeded(family):
    first, again, other = (toy.problems(family, "train", 40, seed=s) for s in (1, 1, 2))
    assert first == again
    assert [p.id for p in first] != [p.id for p in other]
    assert len({p.id for p in first}) == 40


def test_generators_do_not_depend_on_the_hash_seed():
    code = "from bridgelm.data import toy; print([p.prompt for p in toy.problems('hops', 'train', 20)])"
    seen = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        seen.add(run.stdout)
    assert len(seen) == 1
    assert "hops" in seen.pop()


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_are_disjoint_up_to_renaming(family):
    keys = {}
    for split in SPLITS:
        drawn = [p for seed in (0, 1) for p in toy.problems(family, split, 60, seed=seed, exact=False)]
        keys[split] = {puzzle_of(p).key() for p in drawn}
    for split, mine in keys.items():
        assert mine
        assert all(not mine & other for name, other in keys.items() if name != split)
        assert all(split_of(puzzle_of(p)) == split for p in toy.problems(family, split, 5))


@pytest.mark.parametrize("family", FAMILIES)
def test_difficulty_is_the_distance_and_the_cap_is_generous(family):
    low, high = toy.TIERS[family]["rl"]
    for distance in range(low, high + 1):
        for problem in toy.problems(family, "train", 8, difficulty=distance):
            puzzle = puzzle_of(problem)
            assert problem.difficulty == distances(puzzle)[puzzle.start] == distance
            assert puzzle.cap >= 1.5 * distance
            assert problem.columns["cap"] == puzzle.cap
    assert SLACK[family] >= 1.5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["separate", "paired"])
@pytest.mark.parametrize("reach", ["within", "beyond"])
def test_demonstrations_verify_or_fail_as_declared(family, layout, reach):
    sizes = {"train_size": 120, "demo_size": 60, "eval_size": 20}
    data = toy.load(family, layout=layout, coverage=0.5, wrong=0.4, reach=reach, **sizes)
    assert len(data["demos"]) == 60
    for problem in data["demos"]:
        assert len(problem.demos) == (2 if layout == "paired" else 1)
        for demo in problem.demos:
            assert toy.grade(problem, demo.text) is (not problem.columns["wrong_demos"])
    assert 10 < sum(p.columns["wrong_demos"] for p in data["demos"]) < 40
    if layout == "paired":
        assert [p for p in data["train"] if p.demos] == data["demos"]
    else:
        assert not any(p.demos for p in data["train"])
        assert not {p.id for p in data["demos"]} & {p.id for p in data["train"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_references_verify_and_every_wrong_answer_fails(family):
    rng = random.Random(0)
    for problem in toy.problems(family, "test", 100):
        assert toy.grade(problem, reference(problem))
        assert toy.grade(problem, f"  {problem.answer}\n")  # white space is not part of the answer
        assert all(not toy.grade(problem, wrong_demo(puzzle_of(problem), rng)) for _ in range(5))


@pytest.mark.parametrize("family", FAMILIES)
def test_verifier_rejects_mutated_answers(family):
    rng = random.Random(0)
    for problem in toy.problems(family, "test", 30):
        puzzle, answer = puzzle_of(problem), reference(problem)
        words = answer.split()
        steps = list(replay(puzzle, answer))
        assert not toy.grade(problem, " ".join(words[:-1])), "last word missing"
        assert not toy.grade(problem, write(puzzle, steps[:-1])), "goal not reached"
        assert not toy.grade(problem, " ".join([*words, "0"])), "something after the goal"
        for at in range(len(words)):  # one other word anywhere: an illegal move or a wrong state, or another legal end
            changed = [*words[:at], "63" if words[at] != "63" else "62", *words[at + 1 :]]
            assert not toy.grade(problem, " ".join(changed))
        there_and_back = over_cap(puzzle, rng)
        if there_and_back is not None:
            assert not toy.grade(problem, there_and_back), "over the cap"


def over_cap(puzzle, rng):
    """A legal walk to the goal of more moves than the cap: strolls from which the way is then finished."""
    for _ in range(20):
        state, steps = puzzle.start, []
        while len(steps) < puzzle.cap:
            ways = [(m, s) for m, s in puzzle.moves(state) if s in distances(puzzle) and not puzzle.solved(s)]
            if not ways:
                break
            move, state = rng.choice(ways)
            steps.append(Step(move, state))
        else:
            return write(puzzle, [*steps, *shortest(replace(puzzle, start=state), rng)])
    return None


GARBAGE = ["", " ", "\n", "garbage", "0", "-1", "+3", "+3 +3", "1e9 2", "\u0663 \u0664", "\x00", "<|end|>", "nan nan"]
GARBAGE += ["fillA", "fillA 3", "9" * 20_000, "+3 " * 4000, "\N{COLLISION SYMBOL} 1"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", GARBAGE, ids=range(len(GARBAGE)))
def test_verifier_survives_garbage(family, text):
    assert toy.grade(toy.problems(family, "test", 1)[0], text) is False


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_parse_back_and_mangled_ones_are_refused(family):
    for problem in toy.problems(family, "test", 10):
        assert puzzle_of(problem).prompt() == problem.prompt
        with pytest.raises(ValueError, match="not a"):
            toy.FAMILIES[family].parse(problem.prompt + " please")


def test_bad_options_are_refused_in_one_line():
    calls = [
        lambda: toy.problems("chess", "train", 1),
        lambda: toy.problems("hops", "dev", 1),
        lambda: toy.load("hops", wrong=0.7),
        lambda: toy.model_path("big"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"choose|must lie"):
            call()
    with pytest.raises(ValueError, match="has only"):
        toy.problems("jugs", "hard", 5000, difficulty=9)


@pytest.mark.parametrize("kind", ["base", "teacher"])
def test_shipped_tokenizer_round_trips_without_unknown_words(kind):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toy.model_path(kind))
    assert tokenizer.pad_token_id is not None
    assert tokenizer.eos_token_id not in (None, tokenizer.pad_token_id)
    for family in FAMILIES:
        data = toy.load(family, wrong=0.3, train_size=30, demo_size=30, eval_size=30)
        for problem in [p for part in data.values() for p in part]:
            for text in [problem.prompt, problem.answer, *(d.text for d in problem.demos)]:
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids) == text
        chat = [*problem.messages, {"role": "assistant", "content": problem.answer}]
        prompt = tokenizer.apply_chat_template(list(problem.messages), add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(chat, tokenize=False)
        assert whole.startswith(prompt)
        assert whole.split()[-1] == tokenizer.eos_token


def test_shipped_models_are_small_ordinary_folders():
    folders = [toy.model_path(kind) for kind in ("base", "teacher")]
    assert sum(f.stat().st_size for folder in folders for f in folder.rglob("*")) <= 4 * 2**20
    for folder in folders:
        assert {f.name for f in folder.iterdir()} == {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        }
    one, other = ((folder / "tokenizer.json").read_bytes() for folder in folders)
    assert one == other, "base and teacher must share one vocabulary"
