"""A second model: whose tokenizer fits, what it is shown, what it says, and what is kept of it on disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bridgelm
from bridgelm.config.run_config import ModelConfig, make_config
from bridgelm.data.chat import Chat, load_chat
from bridgelm.errors import UserError
from bridgelm.rollout import teacher_cache
from bridgelm.rollout.teacher_cache import Cache, fingerprint
from bridgelm.rollout.teacher_ids import Reader, TeacherModel, teacher_model
from bridgelm.runs.folder import read_lines
from bridgelm.training import checkpoint, loop
from bridgelm.types import Problem, Row

Sessions = Callable[..., Any]
Raw = Callable[..., dict[str, Any]]
PROBLEM = Problem("p", ({"role": "user", "content": "sum 1 + 2 ="},))
KDRL = {"name": "kdrl", "beta": 0.5, "delta": 0.0}


def chat_of(folder: Path, eos: tuple[int, ...] = (1,), system: str | None = None, **tokens: Any) -> Chat:
    made = load_chat(ModelConfig(name_or_path=str(folder)))
    for key, value in tokens.items():
        setattr(made.tokenizer, key, value)
    return Chat(made.tokenizer, system, eos)


def row_of(ids: list[int], prompt: int, **changes: Any) -> Row:
    return Row(np.array(ids), np.arange(len(ids)) >= prompt, "rollout", PROBLEM, **changes)


# -- tokenizers --------------------------------------------------------------------------------------------------------

def edited(tiny_folder: Callable[..., Path], folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The tiny model's folder with another tokenizer.json, and a vocabulary with spare rows."""
    shutil.copytree(tiny_folder(), folder)
    sizes = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**sizes, "vocab_size": 40}))
    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))
    return folder


def swap_words(settings: dict[str, Any]) -> None:
    vocab = settings["model"]["vocab"]
    vocab["7"], vocab["8"] = vocab["8"], vocab["7"]


def cut_otherwise(settings: dict[str, Any]) -> None:
    settings["pre_tokenizer"] = {"type": "CharDelimiterSplit", "delimiter": "e"}


def rename_end(settings: dict[str, Any]) -> None:
    settings["model"]["vocab"]["<end>"] = settings["model"]["vocab"].pop("<eos>")
    next(token for token in settings["added_tokens"] if token["content"] == "<eos>")["content"] = "<end>"


def one_more(settings: dict[str, Any]) -> None:
    settings["model"]["vocab"]["thus"] = max(settings["model"]["vocab"].values()) + 1


@pytest.mark.parametrize(("change", "words"), [
    (swap_words, ["2 tokens differ, for instance '7'", "here and", "of the model's own family"]),
    (cut_otherwise, ["cuts text into others", "The answer is"]),
], ids=["ids", "cuts"])
def test_another_tokenizer_is_refused_before_a_model_is_loaded(
        change: Any, words: list[str], raw: Raw, tiny_folder: Callable[..., Path], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    other = edited(tiny_folder, tmp_path / "other", change)
    monkeypatch.setattr(loop, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError) as refused:
        bridgelm.train(raw(KDRL, teacher={"name_or_path": str(other)}), quiet=True)
    for word in ("teacher.name_or_path", *words):
        assert word in str(refused.value)
    assert not (tmp_path / "runs" / "run").exists()


def test_more_words_in_the_teacher_are_no_harm_and_missing_ones_are(tiny_folder: Callable[..., Path],
                                                                  tmp_path: Path) -> None:
    small, large = chat_of(tiny_folder()), chat_of(edited(tiny_folder, tmp_path / "large", one_more))
    assert Reader(small, large).known.all()
    with pytest.raises(UserError, match="'thus', 29 here and missing there"):
        Reader(large, small)


# -- what it is shown --------------------------------------------------------------------------------------------------

def test_the_teacher_reads_the_answer_behind_its_own_prompt(tiny_folder: Callable[..., Path]) -> None:
    student, teacher = chat_of(tiny_folder()), chat_of(tiny_folder(), system="1 +")
    teacher.tokenizer.chat_template = ("{% for m in messages %}{{ m['content'] }} {% endfor %}"
                                       "{% if add_generation_prompt %}<bot> {% endif %}")
    row = row_of([3, 28, 6, 25, 7, 26, 4, 8, 9, 1], 7)
    shown = Reader(student, teacher).shown(row)
    assert shown.ids.tolist() == [6, 25, 28, 6, 25, 7, 26, 4, 8, 9, 1]
    assert shown.taught.tolist() == [False] * 8 + [True] * 3
    found = Reader.placed(row, shown, np.arange(11.0))
    np.testing.assert_array_equal(found, [np.nan] * 7 + [8.0, 9.0, 10.0])


@pytest.mark.parametrize(("mine", "theirs", "taught"), [
    ((1,), (1,), [True, True, True]),  # both end alike
    ((1,), (1, 3), [True, True, True]),  # the template closes with <eos>, whatever else ends a turn
    ((2, 1), (1,), [True, True, True]),
    ((2,), (1,), [True, True, False]),  # 2 ends the policy's turn alone
], ids=str)
def test_the_teacher_judges_no_end_but_its_own(mine: Any, theirs: Any, taught: list[bool],
                                               tiny_folder: Callable[..., Path]) -> None:
    student, teacher = chat_of(tiny_folder(), mine), chat_of(tiny_folder(), theirs)
    assert teacher.eos_id == 1
    ids = [3, 4, 8, 9, 2 if mine == (2,) else 1]
    reader = Reader(student, teacher)
    assert reader.shown(row_of(ids, 2)).taught[-3:].tolist() == taught


def test_what_the_teacher_does_not_know_ends_what_it_says(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """A control token of another meaning, or an id beyond the vocabulary (models have spare rows)."""
    student = chat_of(tiny_folder())
    reader = Reader(student, chat_of(edited(tiny_folder, tmp_path / "other", rename_end)))
    shown = reader.shown(row_of([3, 4, 8, 9, 1], 2))
    assert shown.taught[-3:].tolist() == [True, True, False]
    assert shown.ids[-1] == reader.teacher.pad_id
    shown = reader.shown(row_of([3, 4, 8, 400, 9], 2))
    assert shown.taught[-3:].tolist() == [True, False, False]
    assert shown.ids.max() < 40


def test_a_turn_that_the_policys_prompt_opened_is_opened_for_the_teacher(tiny_folder: Callable[..., Path]) -> None:
    student, teacher = chat_of(tiny_folder()), chat_of(tiny_folder())
    student.opens_think = True
    opening = Reader(student, teacher).shown(row_of([3, 4, 8], 2)).ids[:-1]
    assert opening.tolist() == [*teacher.prompt_ids(PROBLEM), *teacher.encode("<think>\n")]
    assert Reader(teacher, student).opening.size == 0


def test_what_is_left_out_is_taken_from_the_model() -> None:
    raw = {"name": "x", "steps": 1, "method": KDRL, "data": {"train": "a.jsonl"}, "reward": {"verifier": "exact"},
           "model": {"name_or_path": "m", "dtype": "bfloat16", "device": "cpu", "system_prompt": "Think."}}
    for given, wanted in (({}, {"dtype": "bfloat16", "device": "cpu", "system_prompt": "Think."}),
                          ({"dtype": "float32", "system_prompt": ""}, {"dtype": "float32", "system_prompt": None}),
                          ({"device": "cuda:1"}, {"device": "cuda:1", "attention": "auto"})):
        found = teacher_model(make_config({**raw, "teacher": {"name_or_path": "t", **given}}))
        assert {key: getattr(found, key) for key in wanted} == wanted
        assert found.name_or_path == "t"
        assert not found.lora_rank
        assert not found.gradient_checkpointing


# -- what it says ------------------------------------------------------------------------------------------------------

def test_scores_are_those_of_the_model_and_are_counted(session: Sessions) -> None:
    made = session(KDRL, teacher={"name_or_path": "llama"})
    made.roll.begin(0)
    rows = made.roll(made.data.problems(3))
    assert made.policy.ledger.teacher == 0
    found = made.roll.taught(rows)
    teacher, ledger = made.roll.teacher, made.policy.ledger
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not teacher.model.training
    for row in found:
        with torch.no_grad():
            logp = teacher.model(torch.from_numpy(row.ids)[None]).logits[0].log_softmax(-1)
        wanted = [float(logp[t - 1, row.ids[t]]) for t in np.flatnonzero(row.own)]
        assert row.teacher_logps is not None
        np.testing.assert_allclose(row.teacher_logps[row.own], wanted, rtol=1e-10)
        assert np.isnan(row.teacher_logps[~row.own]).all()
    assert ledger.teacher == sum(len(row.ids) for row in rows)
    parameters = sum(p.numel() for p in teacher.model.parameters())
    assert parameters != ledger.parameters
    totals = ledger.totals()
    assert totals["flops/teacher"] == 2 * parameters * ledger.teacher
    assert totals["flops"] == sum(value for key, value in totals.items() if key.startswith("flops/"))
    assert not any("teacher" in name for name in made.policy.tensors()), "it is in no checkpoint"


def test_a_row_that_it_has_nothing_to_say_about_costs_nothing(session: Sessions) -> None:
    made = session(KDRL, teacher={"name_or_path": "llama"})
    silent, other = row_of([3, 4, 400, 9], 2), row_of([3, 4, 8, 9], 2)
    found = made.roll.taught([silent, other, silent])
    assert [bool(np.isnan(row.teacher_logps[2:]).all()) for row in found] == [True, False, True]
    assert made.policy.ledger.teacher == len(made.roll.teacher.reader.shown(other).ids)
    assert np.isnan(made.roll.taught([silent])[0].teacher_logps).all()


def test_a_broken_teacher_stops_the_run(session: Sessions) -> None:
    made = session(KDRL, teacher={"name_or_path": "llama"})
    with torch.no_grad():
        next(iter(made.roll.teacher.model.parameters())).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="teacher"):
        made.roll.taught([row_of([3, 4, 8, 9], 2)])


def test_it_is_opened_when_asked_and_closed_with_its_stage(session: Sessions) -> None:
    stages = [{"method": {**KDRL, "rl_weight": 0.0}, "steps": 2}, {"method": {"name": "grpo"}}]
    made = session({"name": "sequence", "stages": stages}, exact=False, teacher={"name_or_path": "llama"})
    opened = []
    for _ in range(4):
        opened.append(made.roll.teacher._model is not None)
        loop.take_step(made)
    assert opened == [False, True, True, False]
    assert made.policy.ledger.totals()["flops/teacher"] > 0, "what it cost stays on the bill"


def test_the_data_knows_better_than_the_teacher(session: Sessions) -> None:
    made = session({"name": "pear"}, teacher={"name_or_path": "llama"})
    problem, demo = made.data.demos(1)[0]
    size = int(made.roll.demo(problem, demo).own.sum())
    given = made.roll.demo(problem, replace(demo, logps=(-0.5,) * (size - 1)))
    found = made.roll.authored([given, made.roll.demo(problem, demo)])
    assert found[0].teacher_logps[given.own].tolist()[:-1] == [-0.5] * (size - 1)
    assert np.isnan(found[0].teacher_logps[-1])
    assert not np.isnan(found[1].teacher_logps[given.own]).any()


# -- what is kept ------------------------------------------------------------------------------------------------------

def test_demonstrations_are_scored_once_and_survive_the_process(session: Sessions, monkeypatch: Any) -> None:
    made = session({"name": "pear"}, teacher={"name_or_path": "llama"})
    rows = [made.roll.demo(*pair) for pair in made.data.demos(20)]
    made.roll.begin(3)
    first = made.roll.authored([*rows, rows[0]])
    tokens = made.policy.ledger.teacher
    distinct = {row.ids.tobytes(): len(row.ids) for row in rows}
    assert tokens == sum(distinct.values()), "each once, though one was asked twice"
    folder = made.folder.path / "teacher"
    assert [path.name for path in folder.iterdir()] == ["000003-0.safetensors"]
    monkeypatch.setattr(type(made.roll.teacher), "score", lambda *_: pytest.fail("scored again"))
    made.roll.teacher.keep(folder, 4)  # as after a resume
    made.roll.teacher._name = None
    for again, before in zip(made.roll.authored(rows), first):
        np.testing.assert_array_equal(again.teacher_logps, before.teacher_logps)
    assert made.policy.ledger.teacher == tokens


def test_float32_scores_come_back_to_the_bit(session: Sessions) -> None:
    made = session({"name": "pear"}, exact=False, teacher={"name_or_path": "llama", "dtype": "float32"})
    rows = [made.roll.demo(*pair) for pair in made.data.demos(5)]
    said = made.roll.teacher.score(rows)
    for kept in (made.roll.authored(rows), made.roll.authored(rows)):
        for row, logps in zip(kept, said):
            np.testing.assert_array_equal(row.teacher_logps, logps)


def test_what_later_steps_or_a_torn_write_left_is_dropped(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "teacher")
    for step in (0, 1, 2):
        cache.put(step, {f"{step:032x}": np.array([-1.0 * step])})
    torn = tmp_path / "teacher" / "000000-9.safetensors"
    torn.write_bytes((tmp_path / "teacher" / "000000-0.safetensors").read_bytes()[:-3])
    (tmp_path / "teacher" / "000001-8.safetensors").write_bytes(b"")
    (tmp_path / "teacher" / "theirs.safetensors").write_bytes(b"")
    again = Cache(tmp_path / "teacher", 2)
    assert sorted(path.name for path in (tmp_path / "teacher").iterdir()) == [
        "000000-0.safetensors", "000001-1.safetensors", "theirs.safetensors"]
    found = again.get([f"{step:032x}" for step in (0, 1, 2)])
    assert {key[-1]: value.tolist() for key, value in found.items()} == {"0": [0.0], "1": [-1.0]}
    again.put(2, {f"{7:032x}": np.array([-7.0], dtype=np.float32)})
    assert Cache(tmp_path / "teacher", 3).get([f"{7:032x}"])[f"{7:032x}"].dtype == np.float32


def test_a_key_says_model_prompt_answer_and_temperature(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    ids, taught = np.arange(5), np.arange(5) > 2
    keys = {teacher_cache.key_of(name, i, t, temperature) for name in "ab" for i in (ids, ids + 1)
            for t in (taught, ~taught) for temperature in (1.0, 0.7)}
    assert len(keys) == 16
    model = TeacherModel(name_or_path=str(tiny_folder()))
    assert fingerprint(model) == fingerprint(model)
    assert fingerprint(model) != fingerprint(TeacherModel(name_or_path=str(tiny_folder("llama"))))
    other = tmp_path / "other"
    shutil.copytree(tiny_folder(), other)
    before = fingerprint(TeacherModel(name_or_path=str(other)))
    weights = other / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert fingerprint(TeacherModel(name_or_path=str(other))) != before


# -- a run -------------------------------------------------------------------------------------------------------------

def test_a_run_with_the_shipped_teacher(tmp_path: Path) -> None:
    raw = {"name": "run", "out": str(tmp_path), "steps": 2, "model": {"name_or_path": "toy:base"}, "method": KDRL,
           "teacher": {"name_or_path": "toy:teacher"}, "reward": {"verifier": "toy"},
           "data": {"train": "toy:hops", "toy": {"train_size": 30, "demo_size": 10, "eval_size": 4}},
           "rollout": {"prompts": 2, "group": 2, "max_new_tokens": 24}, "eval": {"every": 0, "problems": 4}}
    run = bridgelm.train(raw, quiet=True)
    last = run.metrics[-1]
    assert last["flops/teacher"] > 0
    assert last["kdrl/kl"] > 0
    assert not any("teacher" in name for name in load_file(
        checkpoint.newest(run.path) / checkpoint.TENSORS))  # type: ignore[operator]
    assert bridgelm.Run(run.path).config["teacher"]["name_or_path"] == "toy:teacher"


@pytest.mark.parametrize(("changes", "words"), [
    ({"method": {"name": "kdrl"}}, "method kdrl: it needs a second model: give a table [teacher]"),
    ({"method": {"name": "pear"}}, "method pear: it needs the log-probs"),
    ({"method": {"name": "sequence", "stages": [{"method": {"name": "pear"}}, {"method": {"name": "grpo"}}]}},
     "needs the log-probs"),
    ({"teacher": {"name_or_path": "toy:giant"}}, "teacher.name_or_path: 'toy:giant'"),
    ({"teacher": {"name_or_path": "./none"}}, "teacher.name_or_path: the folder ./none does not exist"),
    ({"teacher": {"name_or_path": "toy:teacher", "device": "gpu"}}, "teacher.device: 'gpu'"),
    ({"teacher": {"name_or_path": "toy:teacher", "chat_template": "no.jinja"}}, "teacher.chat_template: no.jinja"),
    ({"teacher": {"name_or_path": "toy:teacher", "lora_rank": 3}}, "unknown key 'teacher.lora_rank'"),
    ({"method": {"name": "kdrl", "beta_min": 0.1}}, "beta_min = 0.1, which is above it"),
    ({"method": {"name": "kdrl", "rl_weight": 0.0, "beta": 0.0, "delta": 0.0}}, "nothing is left to learn"),
    ({"method": {"name": "kdrl", "rl_weight": 0.0, "rl": {"kl_coef": 0.1}}}, "rl.kl_coef is a part of the RL term"),
    ({"method": {"name": "pear", "ratio_low": 0.1}}, "set ratio_low to 0 or below"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_mistakes_are_seen_without_torch(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    raw = {"name": "x", "out": str(tmp_path), "steps": 4, "model": {"name_or_path": "toy:base"},
           "method": {"name": "grpo"}, "data": {"train": "toy:hops"}, "reward": {"verifier": "toy"}, **changes}
    from bridgelm.runs import preflight

    with pytest.raises(UserError) as refused:
        preflight.check_static(make_config(raw))
    assert words in str(refused.value)


def test_check_data_looks_at_both_tokenizers_and_loads_no_torch(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "toy" / "kdrl.toml"
    code = ("import sys\nfrom bridgelm.cli.main import main\n"
            f"code = main(['check', {str(recipe)!r}, 'out={tmp_path}', '--data'])\n"
            "sys.exit(' '.join({'torch'} & set(sys.modules)) or code)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "toy:teacher, frozen" in done.stdout


def test_events_count_the_teacher(raw: Raw, tmp_path: Path) -> None:
    run = bridgelm.train(raw({"name": "pear"}, teacher={"name_or_path": "llama"}), quiet=True)
    tokens = [event["flops/teacher"] for event in read_lines(run.path / "metrics.jsonl") if event["event"] == "step"]
    assert tokens == sorted(tokens)
    assert tokens[-1] > 0
