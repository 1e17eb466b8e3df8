"""The loop: looks at the validation set, best and final, refusals, reward functions, rollout options."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import bridgelm
from bridgelm.errors import UserError
from bridgelm.objective import credit
from bridgelm.rollout.roller import summary
from bridgelm.runs.folder import RunFolder
from bridgelm.training import checkpoint, loop
from bridgelm.training.watch import Watch
from bridgelm.types import Grade, Row, Verdict

Raw = Callable[..., dict[str, Any]]
Sessions = Callable[..., Any]


def write_reward(path: Path, body: str) -> list[str]:
    path.write_text("import random\nCALLS = []\n" + body)
    return [f"{path}:reward"]


class Scripted:
    """A grader with a rule: (problem, text, place in the call) -> reward, or None for a fault."""

    last_error = "the rule said so"

    def __init__(self, rule: Callable[[Any, str, int], float | None]) -> None:
        self.rule = rule

    def grade(self, problems: Any, texts: Any) -> list[Grade]:
        found = [self.rule(p, t, i) for i, (p, t) in enumerate(zip(problems, texts, strict=True))]
        return [Grade(0.0, Verdict.ERROR) if r is None else
                Grade(r, Verdict.CORRECT if r > 0.5 else Verdict.WRONG) for r in found]

    def close(self) -> None:
        pass


def with_grader(session: Any, rule: Callable[[Any, str, int], float | None]) -> Any:
    session.roll.grader = Scripted(rule)
    session.roll.begin(0)
    return session


def group_sizes(rows: list[Row]) -> list[int]:
    return list(Counter(row.group for row in rows).values())


# -- the loop --------------------------------------------------------------------------------------------------------

def test_looks_best_and_final(raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best step is chosen on validation, the first of equals, and both models are measured on the test set."""
    scores = iter([0.9, 0.2, 0.6, 0.6])  # before training, after steps 2, 4 and 5
    measure, calls = loop._evaluate, []

    def scripted(session: Any, problems: Any, samples: int, model: Any = None) -> dict[str, Any]:
        found = measure(session, problems, samples, model)
        calls.append((session.step, problems, model is not None))
        return {**found, "accuracy": next(scores)} if len(problems) == 8 else found
    monkeypatch.setattr(loop, "_evaluate", scripted)
    run = bridgelm.train(raw("sft", steps=5), quiet=True)
    assert [e["step"] for e in run.evals] == [0, 2, 4, 5], "every two steps and at the end"
    assert [e["accuracy"] for e in run.evals] == [0.9, 0.2, 0.6, 0.6]
    assert all(e["n"] == 8 and "interval" in e and "correct" not in e for e in run.evals)
    result = run.result
    assert result is not None
    assert result["final"]["step"] == 5
    assert result["best"]["step"] == 4, "not the untrained model, and not the later of two equal ones"
    assert [(step, len(problems), own) for step, problems, own in calls[-2:]] == [(5, 10, False), (5, 10, True)]
    for which in ("final", "best"):
        found = bridgelm.evaluate(run.path, which=which)
        assert found["correct"] == result[which]["correct"]
        assert set(result[which]) >= {"accuracy", "n", "interval", "by_difficulty", "correct", "length", "truncated"}
        assert result[which]["n"] == 10
    from safetensors.torch import load_file

    assert not all((load_file(run.path / "best" / "model.safetensors")[k] == v).all()
                   for k, v in load_file(run.path / "final" / "model.safetensors").items())


def test_only_looks_at_the_end_without_a_cadence(raw: Raw) -> None:
    run = bridgelm.train(raw("sft", eval={"every": 0}), quiet=True)
    assert [e["step"] for e in run.evals] == [0, 4]
    assert run.result is not None
    assert run.result["best"] == run.result["final"]


def test_metrics_and_samples(raw: Raw) -> None:
    run = bridgelm.train(raw("joint"), quiet=True)
    assert [m["step"] for m in run.metrics] == [1, 2, 3, 4]
    last = run.metrics[-1]
    assert last["rollouts"] == 4 * 16
    parameters = run.info["parameters"]
    assert last["flops"] == last["flops/generate"] + last["flops/train"] + last["flops/score"]
    assert last["tokens"] == last["flops/generate"] / 2 / parameters + last["flops/train"] / 6 / parameters
    assert last["phase"] == "joint"
    assert 0 <= last["reward"] <= 1
    assert [e["seconds"] for e in run.metrics] == sorted(e["seconds"] for e in run.metrics)
    assert Counter(s["step"] for s in run.samples()) == {1: 2, 3: 2}
    assert set(run.samples()[0]) == {"step", "problem_id", "prompt", "completion", "answer", "reward", "verdict",
                                     "difficulty"}
    assert run.status == "finished"


def test_an_existing_run_is_refused(raw: Raw) -> None:
    config = raw("sft", steps=1)
    run = bridgelm.train(config, quiet=True)
    before = (run.path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="this run exists"):
        bridgelm.train(config, quiet=True)
    with pytest.raises(UserError, match=r"--resume"):  # also when nothing was checked before
        loop.train(bridgelm.RunConfig.model_validate(config), quiet=True)
    assert (run.path / "metrics.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="not a run folder"):
        bridgelm.train(resume=run.path.parent, quiet=True)


@pytest.mark.parametrize("there", [True, False])
def test_a_run_that_cannot_begin_takes_back_what_it_made_and_no_more(raw: Raw, tmp_path: Path, there: bool,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise UserError("no such model")

    monkeypatch.setattr(loop, "load_model", fail)
    config = bridgelm.RunConfig.model_validate(raw("sft", steps=1, out=str(tmp_path / "box")))
    path = tmp_path / "box" / config.name
    if there:
        path.mkdir(parents=True)
        number = path.stat().st_ino
    with pytest.raises(UserError, match="no such model"):
        loop.train(config, quiet=True)
    assert path.exists() == there and (tmp_path / "box").exists()
    if there:
        assert path.stat().st_ino == number and not any(path.iterdir()), "an empty folder of the user's is left alone"
    begun = RunFolder.create(path, config)
    begun.close()
    with pytest.raises(UserError, match="no such model"):
        bridgelm.train(resume=path, quiet=True)
    assert (path / "config.json").exists(), "a run that another process began is not this one's to delete"


def test_a_loss_that_is_not_finite_is_a_user_error(raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    from bridgelm.objective import losses

    nll, calls = losses.nll, []

    def spoilt(logp: Any, weight: Any) -> Any:
        calls.append(1)
        return nll(logp, weight) * (float("nan") if len(calls) > 4 else 1.0)
    monkeypatch.setattr(losses, "nll", spoilt)
    with pytest.raises(UserError, match=r"step \d: the loss or the gradient of .* is not finite.*lower optim\.lr"):
        bridgelm.train(raw("sft"), quiet=True)
    run = bridgelm.Run(raw("sft")["out"] + "/run")
    assert run.info["status"] == "failed"


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_leaves_the_good_checkpoint(raw: Raw, monkeypatch: pytest.MonkeyPatch,
                                                                  bad: float) -> None:
    """The loss is finite; the run stops before the step, and goes on from the step before as if nothing had been."""
    from bridgelm.objective import losses

    nll, calls = losses.nll, []

    def spoilt(logp: Any, weight: Any) -> Any:
        calls.append(1)
        if len(calls) > 4:
            logp.register_hook(lambda g: g * bad)
        return nll(logp, weight)

    whole = bridgelm.train(raw("sft", name="whole", checkpoint_every=1), quiet=True)
    monkeypatch.setattr(losses, "nll", spoilt)
    with pytest.raises(UserError, match=r"step \d: the loss or the gradient of '.*' \(demo\).*is not finite"):
        bridgelm.train(raw("sft", checkpoint_every=1), quiet=True)
    monkeypatch.undo()
    run = bridgelm.Run(raw("sft")["out"] + "/run")
    assert run.info["status"] == "failed" and 0 < len(run.metrics) < len(whole.metrics)
    then = bridgelm.train(resume=run.path, quiet=True)
    assert [m["loss/nll"] for m in then.metrics] == [m["loss/nll"] for m in whole.metrics]


def test_the_rate_follows_its_schedule(raw: Raw) -> None:
    run = bridgelm.train(raw("sft", optim={"warmup": 2, "schedule": "linear", "final": 0.0}), quiet=True)
    assert [m["lr"] for m in run.metrics] == pytest.approx([0.005, 0.01, 0.01, 0.0])
    sequence = {"name": "sequence", "stages": [{"method": {"name": "sft"}, "steps": 2, "lr": 0.02},
                                               {"method": {"name": "grpo"}, "schedule": "linear"}]}
    run = bridgelm.train(raw(sequence, name="two"), quiet=True)
    assert [m["phase"] for m in run.metrics] == ["sft", "sft", "grpo", "grpo"]
    assert [m["lr"] for m in run.metrics] == pytest.approx([0.02, 0.02, 0.01, 0.001])


# -- reward functions ------------------------------------------------------------------------------------------------

def test_a_reward_function_with_trls_signature(raw: Raw, tmp_path: Path) -> None:
    functions = write_reward(tmp_path / "mine.py", """
def reward(prompts, completions, answer, **columns):
    assert len(prompts) == len(completions) == len(answer) == len(columns["difficulty"])
    assert all(isinstance(p, str) and p.startswith("sum") for p in prompts)
    return [float(a in c.split()) for a, c in zip(answer, completions)]
""")
    run = bridgelm.train(raw("grpo", reward={"functions": functions}), quiet=True)
    assert run.status == "finished"
    for sample in run.samples():
        assert sample["reward"] == float(sample["answer"] in sample["completion"].split())
        assert sample["verdict"] == ("correct" if sample["reward"] else "wrong")


def test_a_reward_that_draws_is_repeatable(raw: Raw, tmp_path: Path) -> None:
    functions = write_reward(tmp_path / "noise.py", """
def reward(prompts, completions, **columns):
    return [random.random() for _ in prompts]
""")
    rewards = [[m["reward"] for m in bridgelm.train(raw("grpo", name=name, reward={"functions": functions}),
                                                    quiet=True).metrics] for name in ("one", "two")]
    assert rewards[0] == rewards[1]
    assert len(set(rewards[0])) == 4


def test_a_failing_grader_stops_the_run(raw: Raw, tmp_path: Path) -> None:
    functions = write_reward(tmp_path / "broken.py", """
def reward(prompts, completions, **columns):
    raise RuntimeError("out of order")
""")
    with pytest.raises(UserError, match=r"reward.*max_error_rate"):
        bridgelm.train(raw("grpo", reward={"functions": functions}), quiet=True)


def test_a_run_that_learns_nothing_says_so_once_and_counts_on_when_resumed(raw: Raw, tmp_path: Path) -> None:
    functions = write_reward(tmp_path / "zero.py", """
def reward(prompts, completions, **columns):
    return [0.0 for _ in completions]
""")
    changes = {"reward": {"functions": functions}, "eval": {"every": 0}, "steps": 23, "checkpoint_every": 15,
               "rollout": {"prompts": 2, "group": 2, "max_new_tokens": 1}}
    taken = loop.take_step

    def stops(session: Any) -> Any:
        if session.step == 18:
            raise KeyboardInterrupt
        return taken(session)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", stops)
        with pytest.raises(KeyboardInterrupt):
            bridgelm.train(raw("grpo", **changes), quiet=True)
    run = loop.resume(tmp_path / "runs" / "run", quiet=True)
    cut = all(event["truncated"] == 1 for event in run.metrics[:20])
    assert [(event["step"], event["text"].split()[7]) for event in run.warnings] == [
        (20, "answers"), (20, "gradient"), *[(20, "answer")] * cut]
    assert all("for 20 steps in a row" in event["text"] for event in run.warnings)
    assert "no answer was right" in run.warnings[0]["text"]
    assert "Warnings" in bridgelm.report([run.path]).read_text()


def test_what_is_counted_is_steps_in_a_row() -> None:
    watch = Watch()
    flat = {"flat_groups": 1.0, "correct": 0.5, "truncated": 1.0, "grad_norm/theta": 0.0}
    for _ in range(19):
        assert watch.warnings(flat, 8) == []
    assert watch.warnings({"loss/nll": 1.0}, 8) == [], "a step without rollouts and gradient changes no count"
    assert watch.warnings({**flat, "truncated": 0.5}, 8)[0].startswith("for 20 steps in a row all answers of")
    for _ in range(19):
        assert watch.warnings(flat, 8) == []
    cut, = watch.warnings(flat, 8)
    assert cut.startswith("for 20 steps in a row every answer was cut at rollout.max_new_tokens = 8")
    assert watch.warnings(flat, 8) == []


# -- rollouts --------------------------------------------------------------------------------------------------------

def test_errors_leave_the_group_and_never_score_zero(session: Sessions) -> None:
    made = with_grader(session("grpo", reward={"max_error_rate": 0.5}),
                       lambda p, t, i: None if i in (0, 4, 5, 6) else float(i % 4 == 1))
    rows = made.method.gather(made.data, made.roll, 0)
    assert [row.verdict is Verdict.ERROR for row in rows[:8]] == [True, False, False, False, True, True, True, False]
    assert "pg" not in rows[0].streams, "a failed grade has no part in the loss"
    assert rows[1].streams["pg"].weight[0] == pytest.approx(2 / 3), "the baseline is over the rest"
    assert not any("pg" in row.streams for row in rows[4:8]), "a group with one grade is left out"
    found = summary(rows)
    assert found["errors"] == pytest.approx(4 / 16)
    assert found["reward"] == pytest.approx(np.mean([r.reward for r in rows if r.verdict is not Verdict.ERROR]))
    assert found["flat_groups"] == pytest.approx(1 / 4)
    made.config = made.roll.config = made.config.model_copy(
        update={"reward": made.config.reward.model_copy(update={"max_error_rate": 0.03})})
    made.roll.begin(1)
    with pytest.raises(UserError, match="failed on 8 of the last 32 answers"):
        made.method.gather(made.data, made.roll, 1)


def test_rollouts_that_continue_a_demonstration_are_left_out_of_the_reward(session: Sessions) -> None:
    made = with_grader(session("grpo"), lambda p, t, i: float(i % 4 == 1))
    problems = made.data.problems(2)
    plain = made.roll(problems)
    led = made.roll(problems, prefixes=[np.array([7])] * 8)
    assert summary(plain)["reward"] == summary(plain + led[1:2])["reward"] == 0.25
    assert summary(led[1:2])["reward"] == 1.0  # where there are no others, they are what there is


def test_all_grades_failing_is_still_a_step(session: Sessions) -> None:
    made = with_grader(session("grpo", reward={"max_error_rate": 1.0}), lambda p, t, i: None)
    before = {n: t.clone() for n, t in made.policy.tensors().items()}
    metrics = loop.take_step(made)
    assert metrics["errors"] == 1.0
    assert metrics["loss/pg"] == metrics["grad_norm/theta"] == 0.0
    assert all((t == made.policy.tensors()[n]).all() for n, t in before.items())


def test_refill_replaces_groups_without_spread(session: Sessions) -> None:
    made = session("grpo", rollout={"refill": 3, "prompts": 6})
    asked: list[list[str]] = []

    def rule(problem: Any, text: str, i: int) -> float:  # every second problem is hopeless
        return float(i % 4 == 0) if int(problem.answer) % 2 else 0.0
    with_grader(made, rule)
    grade = made.roll.grader.grade
    made.roll.grader.grade = lambda p, t: (asked.append([x.id for x in p[::4]]), grade(p, t))[1]
    rows = made.roll.groups(made.data)
    assert group_sizes(rows) == [4] * 6, "as many groups as were wanted, and whole ones"
    problems = {p.id: p for p in made.data.splits.train}
    hopeless = [sum(int(problems[i].answer) % 2 == 0 for i in ids) for ids in asked]
    assert len(asked) > 1
    for before, after in zip(hopeless, asked[1:], strict=False):
        assert len(after) == before, "exactly the missing groups are drawn"
    assert len({i for ids in asked for i in ids}) == sum(map(len, asked)), "further problems, not the same again"
    spread = credit.spread(rows)
    assert sum(not good for good in spread.values()) == (hopeless[-1] if len(asked) == 4 else 0)
    assert made.data.state()["problems"]["taken"] == sum(map(len, asked)), "nothing is left over"
    assert made.policy.ledger.rollouts == 4 * sum(map(len, asked)), "what was thrown away was paid for"
    plain = session("grpo", rollout={"prompts": 6})
    with_grader(plain, rule)
    assert len(plain.roll.groups(plain.data)) == 24
    assert plain.data.state()["problems"]["taken"] == 6


def test_refill_stops_after_its_number_of_draws(session: Sessions) -> None:
    made = with_grader(session("grpo", rollout={"refill": 2}), lambda p, t, i: 0.0)
    assert group_sizes(made.roll.groups(made.data)) == [4] * 4
    assert made.data.state()["problems"]["taken"] == 12


def test_overlong_answers_can_be_left_out_of_the_loss(session: Sessions) -> None:
    for mask in (False, True):
        made = with_grader(session("grpo", rollout={"mask_overlong": mask}), lambda p, t, i: float(i % 2))
        rows = made.method.gather(made.data, made.roll, 0)
        cut = [row for row in rows if not row.finished]
        assert 0 < len(cut) < len(rows)
        assert all(len(row.ids) - int((~row.own).sum()) == 6 for row in cut)
        assert all(("pg" in row.streams) != mask for row in cut)
        assert all(abs(row.streams["pg"].weight[0]) == 0.5 for row in rows if row.finished), "the baseline is over all"


@pytest.mark.parametrize("method", ["grpo", "joint", "bridge"])
def test_several_updates_a_batch(session: Sessions, method: str) -> None:
    """Rollouts once, then one update a part: whole groups, a share of the demonstrations, one optimiser step."""
    made = session(method, rollout={"updates": 2})
    with_grader(made, lambda p, t, i: float(i % 2))
    batches: list[Any] = []
    update = made.method.update
    made.method.update = lambda policy, batch, step: (batches.append(batch), update(policy, batch, step))[1]
    metrics = loop.take_step(made)
    assert made.policy.ledger.rollouts == 16
    assert len(batches) == 2
    for batch in batches:
        assert group_sizes(batch.kind("rollout")) == [4, 4]
        assert len(batch.kind("demo")) == (0 if method == "grpo" else 6), "batch.demos is per update"
    assert {r.group for r in batches[0].kind("rollout")}.isdisjoint(r.group for r in batches[1].kind("rollout"))
    state = made.policy.optimisers["theta"].optimiser.state
    assert {int(s["step"]) for s in state.values()} == {2}
    assert made.step == 1
    assert np.isfinite(metrics["grad_norm/theta"])
    assert metrics["loss/pg"] != 0


def test_the_second_update_is_off_policy_and_clipped(session: Sessions) -> None:
    """Old log-probs are those of the rollouts, so the first update has ratio 1 and the second one has not."""
    made = session("grpo", rollout={"updates": 2}, optim={"lr": 5e-2})
    with_grader(made, lambda p, t, i: float(i % 2))
    ratios: list[float] = []
    grad = made.policy.grad

    def spy(terms: Any, batch: Any, coef: Any, **kwargs: Any) -> Any:
        found = grad(terms, batch, coef, **kwargs)
        ratios.append(max(float(np.abs(logp - batch.rows[i].old_logps)[batch.rows[i].own].max())
                          for i, logp in found.logps.items()))
        return found
    made.policy.grad = spy
    loop.take_step(made)
    assert ratios[0] < 1e-10
    assert ratios[1] > 1e-3


def test_each_draw_has_a_seed_of_its_own(session: Sessions) -> None:
    made = session("grpo")
    problems = made.data.problems(2)

    def draw(step: int, calls: int = 1) -> list[list[int]]:
        made.roll.begin(step)
        rows = [made.roll(problems) for _ in range(calls)][-1]
        return [row.ids.tolist() for row in rows]
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert draw(0, 2) != draw(0)
    assert len({tuple(ids) for ids in draw(0)}) > 2
    before = draw(0)
    made.roll.config = made.roll.config.model_copy(update={"seed": 1})
    assert draw(0) != before


def test_checkpoints_are_whole_and_the_last_two_are_kept(raw: Raw) -> None:
    run = bridgelm.train(raw("bridge", steps=5), quiet=True)
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == ["step-000004", "step-000005"]
    newest = checkpoint.newest(run.path)
    assert newest is not None
    assert {p.name for p in newest.iterdir()} == {checkpoint.MANIFEST, checkpoint.STATE, checkpoint.TENSORS}
    state = checkpoint.read_state(newest)
    assert state["data"]["problems"]["taken"] == 20
    assert json.loads((newest / checkpoint.STATE).read_text())["ledger"]["rollouts"] == 80


def test_what_a_user_keeps_among_the_checkpoints_stays(raw: Raw) -> None:
    path = bridgelm.train(raw("sft", steps=1, checkpoint_every=1), quiet=True).path / "checkpoints"
    kept = shutil.copytree(path / "step-000001", path / "step-000001-good")
    policy = SimpleNamespace(tensors=dict)
    checkpoint.save(path.parent, 2, policy, {})  # pyright: ignore[reportArgumentType]
    assert sorted(p.name for p in path.iterdir()) == ["step-000001", "step-000001-good", "step-000002"]
    assert (kept / checkpoint.STATE).exists() and checkpoint.newest(path.parent) == path / "step-000002"


def test_a_row_is_frozen(session: Sessions) -> None:
    made = session("grpo")
    made.roll.begin(0)
    row = made.roll(made.data.problems(1))[0]
    with pytest.raises(AttributeError):
        row.reward = 1.0
    assert replace(row, reward=2.0).reward == 2.0


def test_a_model_card_names_no_folder_of_this_machine(raw: Raw, tmp_path: Path) -> None:
    run = bridgelm.train(raw("sft"), quiet=True)
    card = (bridgelm.export(run.path, tmp_path / "out") / "README.md").read_text()
    assert "sft" in card and "test accuracy" in card
    assert str(tmp_path) not in card and "/" not in card.split("`")[1], card
