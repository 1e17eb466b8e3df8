"""Rows to problems, splits kept apart, limits, cursors; and that each mistake is named with its place and fix."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bridgelm.config.run_config import RunConfig, make_config
from bridgelm.data.chat import Chat
from bridgelm.data.cursors import ById, Data, Splits, check_lengths, load_splits
from bridgelm.data.schema import to_problem
from bridgelm.data.sources import Source, read
from bridgelm.data.splits import prompt_key
from bridgelm.errors import UserError
from bridgelm.types import Demo, Problem

SHARED = os.environ.get("BRIDGELM_DATA")


def config(verifier: str = "math", **data) -> RunConfig:
    return make_config({"name": "x", "steps": 1, "model": {"name_or_path": "m"}, "method": {"name": "grpo"},
                        "data": data, "reward": {"verifier": verifier}})


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def tasks(name: str, count: int, **more) -> list[dict]:
    return [{"id": f"{name}{i}", "prompt": f"{name} {i}?", "answer": str(i), **more} for i in range(count)]


def problem(row: dict, **fields: str) -> Problem:
    return to_problem(Source(row, "f.jsonl:3", "f-3"), fields)


USER = {"role": "user", "content": "2+3?"}
REPLY = {"role": "assistant", "content": "It is 5."}


@pytest.mark.parametrize("row", [
    {"prompt": "2+3?", "answer": "5"},
    {"prompt": [USER], "answer": 5},
    {"messages": [USER], "answer": "5"},
    {"problem": "2+3?", "answer": "5"},
    {"prompt": "2+3?", "solution": "5"},  # TRL's name of the gold
    {"prompt": [USER], "reward_model": {"ground_truth": "5", "style": "rule"}, "data_source": "d", "extra_info": {}},
])
def test_accepted_names_mean_the_same(row):
    found = problem(row)
    assert found.messages == (USER,)
    assert found.answer == "5"
    assert found.demos == ()
    assert found.id == "f-3"
    assert found.conversational == isinstance(row.get("prompt", row.get("messages")), list)


@pytest.mark.parametrize(("column", "value"), [
    ("demos", ["It is 5."]), ("demos", [{"text": "It is 5."}]), ("demos", [[REPLY]]), ("demos", "It is 5."),
    ("completion", "It is 5."), ("completion", [REPLY]),
])
def test_forms_of_demonstrations(column, value):
    assert problem({"prompt": "2+3?", column: value}).demos == (Demo("It is 5."),)


def test_closing_assistant_turn_is_a_demonstration():
    found = problem({"messages": [USER, REPLY]})
    assert (found.messages, found.demos) == ((USER,), (Demo("It is 5."),))


def test_solution_is_a_demonstration_only_when_mapped():
    row = {"problem": "2+3?", "answer": "5", "solution": "2+3=5", "level": "Level 4"}
    assert problem(row).demos == ()
    assert problem(row).columns == {"problem": "2+3?", "solution": "2+3=5", "level": "Level 4"}
    mapped = problem(row, demos="solution", difficulty="level")
    assert (mapped.demos, mapped.answer, mapped.difficulty) == ((Demo("2+3=5"),), "5", 4.0)
    # Mapped as the demonstration it is not the gold answer as well.
    assert problem({"problem": "2+3?", "solution": "2+3=5"}, demos="solution").answer is None


def test_log_probabilities_of_demonstrations():
    row = {"prompt": "q", "demos": ["a", "b"], "demo_logps": [[-1.0, -0.5], None]}
    assert problem(row).demos == (Demo("a", (-1.0, -0.5)), Demo("b"))
    assert problem({"prompt": "q", "demos": [{"text": "a", "logps": [-1]}]}).demos == (Demo("a", (-1.0,)),)


def test_structured_ground_truth_is_left_to_reward_functions():
    truth = {"ground_truth": {"numbers": [1, 2], "target": 3}}
    found = problem({"prompt": "q", "reward_model": truth})
    assert found.answer is None
    assert found.columns["reward_model"] == truth


@pytest.mark.parametrize(("row", "says"), [
    ({"answer": "5"}, "no prompt"),
    ({"prompt": "  "}, "'prompt' is empty"),
    ({"prompt": 3}, "neither a string nor a list"),
    ({"prompt": "a", "messages": [USER]}, "data.fields.prompt"),
    ({"problem": "a", "question": "b"}, "data.fields.prompt"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "one of system, developer, user"),
    ({"messages": [REPLY]}, "no user message"),
    ({"prompt": "a", "answer": ["5"]}, "'answer' must be a string or a number"),
    ({"prompt": "a", "demos": 5}, "'demos' must be a list"),
    ({"prompt": "a", "demos": ["x", 5]}, "'demos' entry 2 must be a text"),
    ({"prompt": "a", "demos": [" "]}, "entry 1 is empty"),
    ({"prompt": "a", "demos": [[USER, REPLY]]}, "several turns"),
    ({"prompt": "a", "demos": ["x"], "completion": "y"}, "data.fields.demos"),
    ({"prompt": "a", "demos": ["x"], "demo_logps": [[-1.0], [-2.0]]}, "one entry for each of the 1"),
    ({"prompt": "a", "demos": ["x"], "demo_logps": [[0.5]]}, "not above 0"),
    ({"prompt": "a", "difficulty": [1]}, "'difficulty' must be a number"),
])
def test_bad_rows_are_named(row, says):
    with pytest.raises(UserError, match=r"^f\.jsonl:3: ") as caught:
        problem(row)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_misspelt_mapping_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no column 'task', which data\.fields\.prompt names; it has id, prompt"):
        problem({"id": 1, "prompt": "a"}, prompt="task")
    spec = write(tmp_path / "a.jsonl", tasks("a", 3))
    with pytest.raises(UserError, match=r"data\.fields: unknown field 'promt'"):
        load_splits(config(train=spec, fields={"promt": "x"}))


@pytest.mark.parametrize(("text", "says"), [
    ('{"prompt": "a"}\n{"prompt": \n', "bad.jsonl:2: not valid JSON"),
    ('{"prompt": "a"}\n\n[1]\n', "bad.jsonl:3: holds a list"),
    ("\n", "holds no rows"),
    (b'{"prompt": "a"}\n\xff\xfe\n', "bad.jsonl:2: not UTF-8"),
])
def test_malformed_files_are_named_by_line(tmp_path, text, says):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read(str(path), "train")
    assert says in str(caught.value)


def test_missing_and_unknown_sources(tmp_path):
    with pytest.raises(UserError, match=r"data\.test: .*nowhere\.jsonl does not exist; give JSONL"):
        read(str(tmp_path / "nowhere.jsonl"), "test")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match=r"unknown kind of file '\.csv'"):
        read(str(tmp_path / "a.csv"), "train")
    (tmp_path / "a.parquet").write_text("x")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read(str(tmp_path / "a.parquet"), "train")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="not a folder saved by `datasets`"):
        read(str(tmp_path / "folder"), "train")


def test_every_format_gives_the_same_rows(tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": [USER], "demos": [{"text": "x", "logps": [-1.0]}], "reward_model": {"ground_truth": "5"}},
            {"prompt": [USER], "demos": [], "reward_model": {"ground_truth": "6"}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "many"))
    specs = [write(tmp_path / "a.jsonl", rows), *(str(tmp_path / n) for n in ("a.parquet", "a.json", "one", "many"))]
    for spec in specs:
        found = [to_problem(source, {}) for source in read(spec, "train")]
        assert [(p.messages, p.demos, p.answer) for p in found] == [
            ((USER,), (Demo("x", (-1.0,)),), "5"), ((USER,), (), "6")], spec
    with pytest.raises(UserError, match="no split 'test'; give the folder of one it has \\(train\\)"):
        read(str(tmp_path / "many"), "test")
    with pytest.raises(UserError, match=r"a\.parquet: row 1: no prompt"):
        to_problem(Source({}, read(specs[1], "train")[0].place, "n"), {})


def test_empty_answers_and_duplicate_ids_are_named(tmp_path):
    rows = tasks("a", 3)
    rows[1]["answer"] = " "
    spec = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"a\.jsonl:2: no answer, which reward\.verifier = 'math' needs"):
        load_splits(config(train=spec))
    rows[1] = {**rows[2], "prompt": "other"}
    spec = write(tmp_path / "b.jsonl", rows)
    with pytest.raises(UserError, match=r"b\.jsonl:3: id 'a2' is already used at .*b\.jsonl:2"):
        load_splits(config(train=spec))


def test_given_splits_are_taken_as_they_are(tmp_path):
    cfg = config(train=write(tmp_path / "tr.jsonl", tasks("a", 5)),
                 validation=write(tmp_path / "v.jsonl", tasks("b", 2)),
                 test=write(tmp_path / "te.jsonl", tasks("c", 3)),
                 demos=write(tmp_path / "d.jsonl", tasks("d", 2, demos=["x"])))
    splits = load_splits(cfg)
    assert [len(s) for s in (splits.train, splits.demos, splits.validation, splits.test)] == [5, 2, 2, 3]
    assert splits.notes == ()


def test_held_out_slices_are_fixed_disjoint_and_reported(tmp_path):
    rows = tasks("a", 100)
    rows += [{**row, "id": row["id"] + "again"} for row in rows]  # every prompt twice
    pool = write(tmp_path / "d.jsonl", [{**row, "demos": ["x"]} for row in rows[:100]])
    splits = load_splits(config(train=write(tmp_path / "a.jsonl", rows), demos=pool))
    keys = [{prompt_key(p) for p in s} for s in (splits.train, splits.validation, splits.test)]
    assert len(splits.validation) == 20
    assert not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])
    assert not {prompt_key(p) for p in splits.demos} & (keys[1] | keys[2])
    assert [note.split(":")[0] for note in splits.notes] == ["data.validation is not given", "data.test is not given"]
    again = load_splits(config(train=str(tmp_path / "a.jsonl"), demos=pool).model_copy(update={"seed": 7}))
    assert again == splits  # the same for every seed
    with pytest.raises(UserError, match=r"data\.validation: not given, and train has too few"):
        load_splits(config(train=write(tmp_path / "one.jsonl", tasks("a", 1))))


@pytest.mark.parametrize("other", ["train", "demos", "validation"])
def test_contamination_is_an_error_that_names_both(tmp_path, other):
    spoilt = {"id": "twin", "prompt": "TEST  1?", "answer": "1", "demos": ["x"]}
    specs = {role: write(tmp_path / f"{role}.jsonl", tasks(role, 3, demos=["x"]) + [spoilt] * (role == other))
             for role in ("train", "demos", "validation", "test")}
    with pytest.raises(UserError, match=rf"data\.{other}: 'twin' has the same prompt as 'test1' of data\.test"):
        load_splits(config(**specs))
    splits = load_splits(config(**specs, overlap="drop"))
    assert "twin" not in {p.id for p in getattr(splits, other)}
    assert len(splits.test) == 3
    assert f"1 problems of data.{other} left out" in splits.notes[0]


def test_pool_without_demonstrations_is_named(tmp_path):
    specs = {"train": write(tmp_path / "a.jsonl", tasks("a", 5)), "demos": write(tmp_path / "d.jsonl", tasks("d", 2))}
    with pytest.raises(UserError, match=r"data\.demos: .*'d0' has no demonstration"):
        load_splits(config(**specs))


@pytest.mark.parametrize("layout", ["paired", "separate"])
def test_toy(layout):
    sizes = {"layout": layout, "train_size": 30, "demo_size": 10, "eval_size": 10}
    splits = load_splits(config("toy", train="toy:hops", toy=sizes))
    assert (len(splits.train), len(splits.test), len(splits.hard)) == (30, 10, 10)
    facts = Data(splits, 0).facts()
    assert ("paired_demos" in facts) == (layout == "paired") == (not splits.demos)
    assert {"demos", "val"} <= facts
    with pytest.raises(UserError, match=r"data\.train: unknown toy family 'nothing'; choose from hops"):
        load_splits(config("toy", train="toy:nothing", toy=sizes))


# ---------------------------------------------------------------- limits


def spaced_chat() -> Chat:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<p>": 0, "<e>": 1, "<u>": 2}, unk_token="<u>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return Chat(PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<p>", eos_token="<e>", unk_token="<u>",
                                        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}"))


def splits_of(prompt: int = 3, demo: int = 3, logps: int | None = None, test: int = 3) -> Splits:
    def make(name: str, size: int, *demos: Demo) -> Problem:
        return Problem(name, ({"role": "user", "content": "w " * size},), "1", demos)

    long = Demo("w " * demo, None if logps is None else (-1.0,) * logps)
    return Splits((make("plain", 3), make("long", prompt)), (make("pool", 3, Demo("w"), long),), (make("v", 3),),
                  (make("t", test),))


def limited(**more) -> RunConfig:
    return config(train="x", max_prompt_tokens=5, max_demo_tokens=5, **more)


def test_nothing_is_truncated_and_at_the_limit_all_is_kept():
    splits = splits_of(prompt=5, demo=4, test=5)  # four words and the end token
    assert check_lengths(splits, spaced_chat(), limited()) == splits


def test_overlong_is_an_error_with_both_fixes():
    with pytest.raises(UserError, match=r"demonstration 2 of 'pool' has 6 tokens.*raise .* or set data\.overlong"):
        check_lengths(splits_of(demo=5), spaced_chat(), limited())
    with pytest.raises(UserError, match=r"prompt of 'long' has 6 tokens.*raise the limit or set data\.overlong"):
        check_lengths(splits_of(prompt=6), spaced_chat(), limited())


def test_overlong_can_be_dropped_where_it_is_trained_on_only():
    cfg = limited(overlong="drop")
    kept = check_lengths(splits_of(prompt=6, demo=5), spaced_chat(), cfg)
    assert [p.id for p in kept.train] == ["plain"]
    assert kept.demos[0].demos == (Demo("w"),)
    assert kept.notes == ("1 overlong prompts or demonstrations of data.train dropped",
                          "1 overlong prompts or demonstrations of data.demos dropped")
    with pytest.raises(UserError, match=r"data\.test: the prompt of 't' has 6 tokens.*or remove the row"):
        check_lengths(splits_of(test=6), spaced_chat(), cfg)


def test_log_probabilities_must_fit_the_tokens():
    for count in (3, 4):  # without and with the end token
        check_lengths(splits_of(logps=count), spaced_chat(), limited())
    with pytest.raises(UserError, match="demonstration 2 of 'pool' has 5 log-probabilities for 3 tokens"):
        check_lengths(splits_of(logps=5), spaced_chat(), limited())


# ---------------------------------------------------------------- cursors


def cursor_splits() -> Splits:
    def make(name: str, count: int, *demos: Demo) -> tuple[Problem, ...]:
        return tuple(Problem(f"{name}{i}", (USER,), "5", demos) for i in range(count))

    return Splits(make("t", 7), make("d", 3, Demo("x", (-1.0,)), Demo("y", (-1.0,))), make("v", 4), ())


def test_epochs_are_complete_shuffled_and_differ():
    data = Data(cursor_splits(), 3)
    epochs = [[p.id for p in data.problems(7)] for _ in range(3)]
    assert all(sorted(epoch) == [f"t{i}" for i in range(7)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [p.id for p in Data(cursor_splits(), 4).problems(7)]
    assert [p.id for p in Data(cursor_splits(), 3).problems(21)] == [i for epoch in epochs for i in epoch]
    pairs = data.demos(6)
    assert sorted((p.id, d.text) for p, d in pairs) == [(f"d{i}", t) for i in range(3) for t in "xy"]


def test_streams_do_not_move_each_other():
    one, two = Data(cursor_splits(), 3), Data(cursor_splits(), 3)
    two.demos(5)
    two.val(3)
    assert one.problems(9) == two.problems(9)
    same = cursor_splits().train
    equal = Data(Splits(tuple(Problem(p.id, p.messages, "5", (Demo("x"),)) for p in same), (), same, ()), 3)
    orders = {tuple(p.id for p in drawn) for drawn in (equal.problems(7), equal.val(7), [p for p, _ in equal.demos(7)])}
    assert len(orders) == 3


def test_a_resumed_cursor_goes_on_exactly():
    whole = Data(cursor_splits(), 3)
    whole.problems(5), whole.demos(4), whole.val(9)
    state = json.loads(json.dumps(whole.state()))
    resumed = Data(cursor_splits(), 3)
    resumed.problems(1)
    resumed.load(state)
    for _ in range(4):
        assert resumed.problems(3) == whole.problems(3)
        assert resumed.demos(5) == whole.demos(5)
        assert resumed.val(2) == whole.val(2)
    assert resumed.state() == whole.state()


def test_a_problem_that_is_gone_is_named():
    known = ById(cursor_splits().train)
    assert all(known[name].id == name for name in known)
    with pytest.raises(UserError, match=r"data\.train: .*'gone'"):
        _ = known["gone"]


def test_facts():
    splits = cursor_splits()
    assert Data(splits, 0).facts() == {"demos", "val", "behaviour", "labels"}
    own = Splits(splits.demos[:1] + splits.train, (), (), ())
    assert Data(own, 0).facts() == {"demos", "paired_demos", "two_traces", "behaviour", "labels"}
    assert [d.text for _, d in Data(own, 0).demos(2)] in (["x", "y"], ["y", "x"])
    silent = Splits((Problem("p", (USER,), "5", (Demo("x"), Demo("y", (-1.0,)))),), (), (), ())
    assert "behaviour" not in Data(silent, 0).facts()  # one log-probability missing is one too many
    assert Data(Splits(splits.train, (), (), ()), 0).facts() == {"labels"}
    unlabelled = Problem("q", (USER,), None)
    assert Data(Splits((*splits.train, unlabelled), (), (), ()), 0).facts() == frozenset()  # one answer missing


# ---------------------------------------------------------------- real sets


@pytest.mark.skipif(not SHARED, reason="BRIDGELM_DATA names no folder with real sets")
@pytest.mark.parametrize(("file", "count"), [("math500", 500), ("aime24", 30), ("olympiadbench", 675),
                                             ("gsm8k_test", 1319), ("minerva_math", 272)])
def test_real_sets_load(file, count):
    path = Path(SHARED or "") / "eval" / f"{file}.jsonl"
    found = [to_problem(source, {"demos": "solution"}) for source in read(str(path), "test")]
    assert len(found) == len({p.id for p in found}) == count
    assert all(p.answer and p.prompt for p in found)


@pytest.mark.skipif(not SHARED, reason="BRIDGELM_DATA names no folder with real sets")
def test_real_contamination_is_found():
    folder = Path(SHARED or "")
    cfg = config(train=str(folder / "train/limr.jsonl"), test=str(folder / "eval/math_test.jsonl"))
    with pytest.raises(UserError, match=r"has the same prompt as 'test/.* of data\.test"):
        load_splits(cfg)
    clean = load_splits(config(train=str(folder / "train/limr.jsonl"), test=str(folder / "eval/math500.jsonl")))
    assert len(clean.test) == 500
