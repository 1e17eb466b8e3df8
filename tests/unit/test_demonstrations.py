"""`bridgelm demos`: what is sampled, what is kept, and that it reads back as the tokens that were drawn."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bridgelm
from bridgelm.cli.main import main
from bridgelm.config.run_config import ModelConfig, RunConfig, load_config, make_config
from bridgelm.data.chat import load_chat
from bridgelm.data.cursors import Data, check_lengths, load_splits
from bridgelm.data.schema import to_problem
from bridgelm.data.sources import Source
from bridgelm.engine import NativeEngine
from bridgelm.errors import UserError
from bridgelm.rollout import demonstrations
from bridgelm.rollout.demonstrations import DemoOptions, write_demos
from bridgelm.types import Completion, Problem

Raw = Callable[..., dict[str, Any]]
RECIPES = Path(__file__).parents[2] / "recipes" / "toy"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Completion]:
    """Every sample that the engine drew."""
    seen: list[Completion] = []
    generate = NativeEngine.generate

    def spy(*args: Any, **kwargs: Any) -> list[Completion]:
        found = generate(*args, **kwargs)
        seen.extend(found)
        return found
    monkeypatch.setattr(NativeEngine, "generate", spy)
    return seen


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def toy(tmp_path: Path, **sections: Any) -> RunConfig:
    raw = load_config(RECIPES / "kdrl.toml", [f"out={tmp_path}"]).resolved()
    for key, value in {"data": {"toy": {**raw["data"]["toy"], "train_size": 12, "demo_size": 4, "eval_size": 4}},
                       "rollout": {"max_rows": 12}, **sections}.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) else value
    return make_config(raw)


def balanced(counts: dict[str, int]) -> None:
    of = Counter(counts)
    assert of["samples"] == of["correct"] + of["wrong"] + of["error"]
    assert of["correct"] == sum(of[key] for key in ("kept", "duplicates", "cut", "more", "empty", "overlong"))


def test_what_is_written_reads_back_as_what_was_drawn(tmp_path: Path, drawn: list[Completion]) -> None:
    """Ids and log-probs to the bit, through the file and `data.demos`."""
    config, out = toy(tmp_path), tmp_path / "demos.jsonl"
    counts = write_demos(config, out, DemoOptions(samples=4))
    balanced(counts)
    assert counts["kept"] > 8
    assert counts["duplicates"] > 0
    assert not counts.get("again")
    config = toy(tmp_path, data={"demos": str(out)})
    chat = load_chat(config.model)
    data = Data(check_lengths(load_splits(config), chat, config), 0)
    assert "behaviour" in data.facts()
    written = {c.ids.tobytes(): c for c in drawn}
    pairs = data.demos(counts["kept"])
    assert len({(p.id, d.text) for p, d in pairs}) == counts["kept"], "each once, no duplicates"
    assert sum(int(chat.demo_ids(p, d)[1].sum()) for p, d in pairs) == counts["kept_tokens"]
    for problem, demo in pairs:
        ids, own = chat.demo_ids(problem, demo)
        completion = written[ids[own].tobytes()]
        assert demo.logps == tuple(completion.logps.tolist())
        assert completion.ids[-1] == chat.eos_id
    assert {row["author"] for row in lines(out)} == {"toy:teacher"}


def test_a_teacher_asked_again_says_the_same(tmp_path: Path) -> None:
    """The log-probs in the file are those that `[teacher]` would give for the same demonstrations."""
    from bridgelm.rollout.roller import author_logps
    from bridgelm.rollout.teacher import Teacher
    from bridgelm.types import Row

    config, out = toy(tmp_path), tmp_path / "demos.jsonl"
    write_demos(config, out, DemoOptions(samples=2))
    config = toy(tmp_path, data={"demos": str(out)})
    chat = load_chat(config.model)
    teacher = Teacher.of(config, chat)
    assert teacher is not None
    for problem in load_splits(config).demos:
        for demo in problem.demos:
            ids, own = chat.demo_ids(problem, demo)
            said = author_logps(problem, demo, own)
            assert said is not None
            found = teacher.score([Row(ids, own, "demo", problem)])[0]
            np.testing.assert_allclose(said[own], found[own], atol=1e-4)


def test_only_right_ones_are_kept_as_the_verifier_says(tmp_path: Path) -> None:
    from bridgelm.data.toy.data import grade

    config, out = toy(tmp_path), tmp_path / "demos.jsonl"
    counts = write_demos(config, out, DemoOptions(samples=6, keep=1, keep_wrong=True))
    balanced(counts)
    problems = {p.id: p for p in load_splits(config).train}
    assert counts["more"] > 0
    assert counts["wrong"] > 0
    for row in lines(out):
        assert len(row["demos"]) == 1
        assert grade(problems[row["id"]], row["demos"][0]["text"])
        assert row["solve_rate"] > 0
    assert len(lines(out)) == counts["solved"] == counts["kept"]
    wrong = [(row, demo) for row in lines(tmp_path / "demos.wrong.jsonl") for demo in row["demos"]]
    assert 0 < len(wrong) <= counts["wrong"]
    assert not any(grade(problems[row["id"]], demo["text"]) for row, demo in wrong)
    for path in (out, tmp_path / "demos.wrong.jsonl"):
        assert load_splits(toy(tmp_path, data={"demos": str(path)})).demos
    out.unlink()
    with pytest.raises(UserError, match=r"demos\.wrong\.jsonl: exists"):
        write_demos(config, out, DemoOptions(samples=6, keep_wrong=True))


# -- a user's own data and model ---------------------------------------------------------------------------------------

def own(raw: Raw, **sections: Any) -> RunConfig:
    """The tiny world: a random model, and a reward for an even number of words."""
    return make_config(raw("grpo", **{"rollout": {"max_new_tokens": 8, "max_rows": 32}, **sections}))


def test_a_sample_that_reads_back_otherwise_is_scored_as_it_will_be_read(raw: Raw, tmp_path: Path) -> None:
    """The tiny model draws control tokens, which its text leaves out."""
    config, out = own(raw), tmp_path / "demos.jsonl"
    counts = write_demos(config, out, DemoOptions(samples=8, temperature=0.7))
    balanced(counts)
    assert counts["again"] > 0
    assert counts["kept"] > counts["again"], "and some read back as they are"
    from bridgelm.model.loading import load_model

    chat, model = load_chat(config.model), load_model(config.model)
    checked = 0
    for row in lines(out):
        problem = to_problem(Source(row, "here", "x"), {})
        for demo in problem.demos:
            ids, mine = chat.demo_ids(problem, demo)
            with torch.no_grad():
                logp = (model(torch.from_numpy(ids)[None]).logits[0] / 0.7).log_softmax(-1)
            wanted = [float(logp[t - 1, ids[t]]) for t in np.flatnonzero(mine)]
            assert demo.logps is not None
            assert len(demo.logps) in (len(wanted), len(wanted) - 1)
            assert list(demo.logps) == pytest.approx(wanted[:len(demo.logps)], abs=1e-5)
            checked += 1
    assert checked == counts["kept"]


def test_paired_rows_are_a_file_for_data_train(raw: Raw, tmp_path: Path) -> None:
    config, out = own(raw), tmp_path / "paired.jsonl"
    before = load_splits(config).train
    counts = write_demos(config, out, DemoOptions(samples=4, paired=True))
    after = load_splits(own(raw, data={"train": str(out)})).train
    assert [(p.id, p.messages, p.answer, p.difficulty) for p in after] == [
        (p.id, p.messages, p.answer, p.difficulty) for p in before]
    assert all(new.demos[:len(old.demos)] == old.demos for old, new in zip(before, after))
    assert sum(len(new.demos) - len(old.demos) for old, new in zip(before, after)) == counts["kept"] > 0
    assert not any(len({d.text for d in p.demos}) < len(p.demos) for p in after)


def test_conversations_mapped_names_and_columns_come_back(tmp_path: Path) -> None:
    fields = {"prompt": "task", "demos": "worked", "answer": "gold"}
    for row in ({"task": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "gold": 5, "k": [1]},
                {"task": "u", "gold": "5", "difficulty": 2.0, "completion": "c", "question": "other"}):
        problem = to_problem(Source(row, "here", "name-1"), fields)
        made = demonstrations.to_row(problem, [{"text": "t", "logps": [-0.1, -1e-17]}], fields, False, {"author": "a"})
        again = to_problem(Source(json.loads(json.dumps(made)), "there", "other-9"), fields)
        assert (again.id, again.messages, again.answer, again.difficulty, again.conversational) == (
            problem.id, problem.messages, problem.answer, problem.difficulty, problem.conversational)
        assert [(d.text, d.logps) for d in again.demos] == [("t", (-0.1, -1e-17))]
        kept = {key: value for key, value in problem.columns.items() if key != "completion"}
        assert again.columns == {**kept, "author": "a"}


def test_the_model_itself_where_there_is_no_teacher_or_it_is_asked_for(raw: Raw, tmp_path: Path,
                                                                     tiny_folder: Callable[..., Path]) -> None:
    for i, (sections, wanted, name) in enumerate((
            ({}, DemoOptions(samples=2), "qwen2"),
            ({"teacher": {"name_or_path": "llama"}}, DemoOptions(samples=2), "llama"),
            ({"teacher": {"name_or_path": "llama"}}, DemoOptions(samples=2, own=True), "qwen2"))):
        out = tmp_path / f"{i}.jsonl"
        write_demos(own(raw, **sections), out, wanted)
        assert {row["author"] for row in lines(out)} == {str(tiny_folder(name))}
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    assert (tmp_path / "0.jsonl").read_bytes() != (tmp_path / "1.jsonl").read_bytes()


def test_greedy_samples_carry_log_probs_at_temperature_1(tmp_path: Path, drawn: list[Completion]) -> None:
    out = tmp_path / "demos.jsonl"
    counts = write_demos(toy(tmp_path), out, DemoOptions(samples=2, temperature=0.0))
    assert 0 < counts["kept"] == counts["duplicates"], "two greedy answers are one"
    raw_logps = {tuple(completion.raw_logps.tolist()) for completion in drawn}
    assert all(tuple(demo["logps"]) in raw_logps for row in lines(out) for demo in row["demos"])
    numbers = [x for row in lines(out) for demo in row["demos"] for x in demo["logps"]]
    assert min(numbers) < -0.01


def test_a_teacher_of_another_tokenizer_gives_texts_alone(raw: Raw, tmp_path: Path,
                                                          tiny_folder: Callable[..., Path]) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder(), other)
    settings = json.loads((other / "tokenizer.json").read_text())
    vocab = settings["model"]["vocab"]
    vocab["7"], vocab["8"] = vocab["8"], vocab["7"]
    (other / "tokenizer.json").write_text(json.dumps(settings))
    config = own(raw, teacher={"name_or_path": str(other)})
    with pytest.raises(UserError, match="its tokenizer is not that of"):
        write_demos(config, tmp_path / "a.jsonl", DemoOptions(samples=2))
    write_demos(config, tmp_path / "b.jsonl", DemoOptions(samples=2, text_only=True))
    rows = lines(tmp_path / "b.jsonl")
    assert rows
    assert not any("logps" in demo for row in rows for demo in row["demos"])


# -- stopped, gone on with, refused ------------------------------------------------------------------------------------

def test_a_stopped_command_goes_on_and_ends_with_the_same_file(raw: Raw, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    config, wanted = own(raw), DemoOptions(samples=4)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    counts = write_demos(config, whole, wanted)
    some, calls = demonstrations._some, []

    def stopping(*args: Any) -> Any:
        calls.append(args[3])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return some(*args)
    with monkeypatch.context() as patch:
        patch.setattr(demonstrations, "_some", stopping)
        with pytest.raises(KeyboardInterrupt):
            write_demos(config, cut, wanted)
    part = tmp_path / ".cut.jsonl.part"
    assert not cut.exists()
    assert len(lines(part)) == 1 + 16
    part.write_bytes(part.read_bytes()[:-30])  # killed while it wrote: the torn piece is drawn again
    with pytest.raises(UserError, match="a part made with other settings"):
        write_demos(config, cut, DemoOptions(samples=5))
    said: list[str] = []
    assert write_demos(config, cut, wanted, say=said.append) == counts
    assert said[0].startswith("16 of 40 problems"), "the first piece was kept"
    assert cut.read_bytes() == whole.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_a_file_is_not_overwritten_unless_told(raw: Raw, tmp_path: Path) -> None:
    config, out = own(raw), tmp_path / "demos.jsonl"
    out.write_text("mine")
    with pytest.raises(UserError, match=r"exists; name another file with --out, or overwrite it with --force"):
        write_demos(config, out, DemoOptions(samples=2))
    assert out.read_text() == "mine"
    write_demos(config, out, DemoOptions(samples=2, problems=5), force=True)
    assert 0 < len(lines(out)) <= 5
    with pytest.raises(UserError, match=r"ends in \.jsonl"):
        write_demos(config, tmp_path / "demos.json")
    with pytest.raises(UserError, match="does not exist; make it first"):
        write_demos(config, tmp_path / "no" / "demos.jsonl")


def test_nothing_solved_is_said_and_leaves_nothing(raw: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = tmp_path / "never.py"
    reward.write_text("def never(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n")
    config = own(raw, reward={"functions": [f"{reward}:never"]})
    with pytest.raises(UserError, match="nothing to keep: 40 problems x 2 samples gave 0 right answers"):
        write_demos(config, tmp_path / "demos.jsonl", DemoOptions(samples=2))
    assert not list(tmp_path.glob("*demos.jsonl*"))


def test_cut_answers_and_overlong_ones_are_no_demonstrations(raw: Raw, tmp_path: Path) -> None:
    counts = write_demos(own(raw, rollout={"max_new_tokens": 4, "max_rows": 64}), tmp_path / "a.jsonl",
                         DemoOptions(samples=8))
    balanced(counts)
    assert counts["cut"] > 0
    chat = load_chat(own(raw).model)
    config = own(raw, data={"max_demo_tokens": 8})
    loose = make_config({**config.resolved(), "rollout": {**config.resolved()["rollout"], "max_new_tokens": 20}})
    counts = write_demos(loose, tmp_path / "b.jsonl", DemoOptions(samples=8))
    balanced(counts)
    assert counts["overlong"] > 0
    for row in lines(tmp_path / "b.jsonl"):
        problem = to_problem(Source(row, "here", "x"), {})
        assert all(chat.demo_ids(problem, demo)[1].sum() <= 8 for demo in problem.demos)


def test_a_failing_verifier_stops_it(raw: Raw, tmp_path: Path) -> None:
    reward = tmp_path / "broken.py"
    reward.write_text("def broken(prompts, completions, **columns):\n    raise RuntimeError('no')\n")
    with pytest.raises(UserError, match="the verifier failed on"):
        write_demos(own(raw, reward={"functions": [f"{reward}:broken"]}), tmp_path / "demos.jsonl",
                    DemoOptions(samples=2))


def test_log_probs_leave_out_an_end_token_that_is_not_the_readers(tiny_folder: Callable[..., Path]) -> None:
    chat = load_chat(ModelConfig(name_or_path=str(tiny_folder())))
    author = demonstrations.Author(None, chat, chat, object(), "a")  # type: ignore[arg-type]
    problem = Problem("p", ({"role": "user", "content": "sum"},))
    for ids, wanted in (([6, 7, 1], [-1.0, -2.0, -3.0]), ([6, 7, 3], [-1.0, -2.0]), ([6, 7], [-1.0, -2.0])):
        logps = -np.arange(1.0, len(ids) + 1)
        completion = Completion(np.array(ids), logps * 9, logps, True)
        text = chat.text(np.array([6, 7]))
        assert demonstrations.read_logps(author, problem, text, completion, DemoOptions()) == (wanted, False)


# -- the command -------------------------------------------------------------------------------------------------------

def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demos.jsonl"
    words = ["demos", str(RECIPES / "joint.toml"), "teacher.name_or_path=toy:teacher", "--out", str(out),
             "--samples", "2", "data.toy.train_size=8", "data.toy.eval_size=4", "data.demos=not-yet.jsonl"]
    assert main(words) == 0
    text, progress = capsys.readouterr()
    for part in ("problems   8,", "samples    16 of", "kept", f"written    {out}"):
        assert part in text
    assert "8 of 8 problems" in progress
    assert main(words) == 2
    assert "--force" in capsys.readouterr().err
    assert bridgelm.demos(RECIPES / "kdrl.toml", tmp_path / "api.jsonl", samples=1, problems=4)["samples"] == 4
    with pytest.raises(UserError, match="unknown option 'sample'"):
        bridgelm.demos(RECIPES / "kdrl.toml", tmp_path / "b.jsonl", sample=1)
    assert main([*words[:5], "--temperature", "-1"]) == 2
    assert "--temperature -1" in capsys.readouterr().err


def test_toy_problems_take_demonstrations_from_a_file(tmp_path: Path) -> None:
    out = tmp_path / "demos.jsonl"
    write_demos(toy(tmp_path), out, DemoOptions(samples=2))
    splits = load_splits(toy(tmp_path, data={"demos": str(out)}))
    assert {p.id for p in splits.demos} == {row["id"] for row in lines(out)}
    row = {**lines(out)[0], "prompt": splits.test[0].prompt, "id": "new"}
    out.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="has the same prompt as"):
        load_splits(toy(tmp_path, data={"demos": str(out)}))
