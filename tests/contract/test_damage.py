"""A damaged checkpoint is never trusted: the older one takes its place, or the run is refused and left as it is."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from bridgelm.config.run_config import make_config
from bridgelm.errors import UserError
from bridgelm.runs import disk
from bridgelm.runs import folder as metrics
from bridgelm.training import checkpoint, loop

Make = Callable[..., dict[str, Any]]
STEPS, STOP = 6, 4


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "git_commit", lambda: None)


@pytest.fixture
def stopped(raw: Make, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped after step 4, with checkpoints of steps 2 and 4."""
    config, take_step = make_config(raw("grpo", steps=STEPS)), loop.take_step

    def step(session: Any) -> Any:
        if session.step == STOP - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(session)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", step)
        with pytest.raises(loop.Interrupted):
            loop.train(config, quiet=True)
    run = Path(config.out) / config.name
    assert [path.name for path in checkpoint.kept(run)] == ["step-000004", "step-000002"]
    return run


def flip(path: Path) -> None:
    found = bytearray(path.read_bytes())
    middle = len(found) // 2
    found[middle:middle + 64] = bytes(byte ^ 0xFF for byte in found[middle:middle + 64])
    path.write_bytes(found)


def set_step(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 400}))


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "bytes flipped": (checkpoint.TENSORS, flip),
    "tensors truncated": (checkpoint.TENSORS, lambda p: os.truncate(p, 1000)),
    "tensors gone": (checkpoint.TENSORS, Path.unlink), "state gone": (checkpoint.STATE, Path.unlink),
    "state empty": (checkpoint.STATE, lambda p: p.write_text("{}")), "another step": (checkpoint.STATE, set_step),
    "state torn": (checkpoint.STATE, lambda p: p.write_text('{"step": 4, ')),
    "manifest gone": (checkpoint.MANIFEST, Path.unlink),
    "manifest torn": (checkpoint.MANIFEST, lambda p: p.write_text("{")),
    "manifest of another kind": (checkpoint.MANIFEST, lambda p: p.write_text("[1]")),
    "manifest without state": (checkpoint.MANIFEST, lambda p: p.write_text('{"xxh3_128": {}}')),
}


def final(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_older_checkpoint_takes_the_place_of_a_damaged_one(kind: str, stopped: Path, raw: Make,
                                                               tmp_path: Path) -> None:
    name, act = DAMAGE[kind]
    act(stopped / "checkpoints/step-000004" / name)
    run = loop.resume(stopped, quiet=True)
    (warning,) = run.warnings
    assert warning["step"] == 2
    for part in ("step-000004", name, "goes on from step-000002", "steps 3 to 4"):
        assert part in warning["text"]
    assert [event["step"] for event in run.metrics] == [*range(1, STEPS + 1)]
    whole = loop.train(make_config(raw("grpo", name="whole", steps=STEPS)), quiet=True)
    assert final(run.path) == final(whole.path)


def ways_to_refuse(run: Path) -> dict[str, Callable[[], object]]:
    return {"both damaged": lambda: [flip(path / checkpoint.TENSORS) for path in checkpoint.kept(run)],
            "no state": lambda: [(path / checkpoint.STATE).unlink() for path in checkpoint.kept(run)],
            "no checkpoints": lambda: shutil.rmtree(run / "checkpoints"),
            "nor run.json": lambda: [shutil.rmtree(run / "checkpoints"), (run / "run.json").unlink()]}


@pytest.mark.parametrize("kind", ways_to_refuse(Path()))
def test_a_history_is_not_wiped(kind: str, stopped: Path) -> None:
    ways_to_refuse(stopped)[kind]()
    before = (stopped / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=rf"{stopped}: .*from a copy, or remove the run folder") as error:
        loop.resume(stopped, quiet=True)
    assert "\n" not in str(error.value)
    assert (stopped / "metrics.jsonl").read_bytes() == before


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Other tensors with a checksum that is right."""
    tensors = load_file(folder / checkpoint.TENSORS)
    change(tensors)
    save_file(tensors, folder / checkpoint.TENSORS)
    sums = json.loads((folder / checkpoint.MANIFEST).read_text())
    sums[checkpoint.CHECKSUM][checkpoint.TENSORS] = disk.digest(folder / checkpoint.TENSORS)
    (folder / checkpoint.MANIFEST).write_text(json.dumps(sums))


NAME = "group/theta/model.norm.weight"
MOMENT = "optim/theta/model.norm.weight|exp_avg"


@pytest.mark.parametrize(("change", "says"), [
    (lambda t: t.pop(NAME), f"{NAME} is missing"),
    (lambda t: t.update({NAME: t[NAME][:1].clone()}), rf"{NAME} has the shape \[1\] in place of \[16\]"),
    (lambda t: t.update({MOMENT: t[MOMENT][:1].clone()}), r"exp_avg has the shape \[1\] in place of \[16\]"),
    (lambda t: t.update({"optim/theta/nothing|exp_avg": t[MOMENT].clone()}), "belongs to no weight of the run"),
], ids=["missing", "shape", "moment", "stray"])
def test_tensors_that_do_not_fit_are_named(change: Any, says: str, stopped: Path) -> None:
    rewrite(stopped / "checkpoints/step-000004", change)
    with pytest.raises(UserError, match=says.replace("|", r"\|")):
        loop.resume(stopped, quiet=True)


@pytest.mark.parametrize("lose", [shutil.rmtree, lambda best: flip(best / "model.safetensors")],
                         ids=["gone", "damaged"])
def test_best_weights_are_chosen_anew_where_they_are_lost(lose: Callable[[Path], object], stopped: Path) -> None:
    lose(stopped / "best")
    run = loop.resume(stopped, quiet=True)
    assert (run.result or {})["best"]["step"] == STEPS
    state = checkpoint.read_state(checkpoint.kept(stopped)[0])
    assert checkpoint.weights_of(stopped / "best") == state["best"]["weights"]


def test_lost_best_weights_leave_the_final_ones(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = loop.finish_run

    def lost(session: Any) -> None:
        session.best = {**session.best, "step": 2}  # not those of the last step
        flip(stopped / "best/model.safetensors")
        finish(session)
    monkeypatch.setattr(loop, "finish_run", lost)
    run = loop.resume(stopped, quiet=True)
    assert (run.result or {}).keys() == {"final"}
    assert "best is damaged or missing" in run.warnings[-1]["text"]


def test_drafts_of_a_killed_run_are_removed(stopped: Path) -> None:
    left = [stopped / name for name in (".best-draft/a", ".config.json.17.tmp", ".best-draft-old/a",
                                        "checkpoints/.draft-000006/a", "starts/.step-000002-draft/a")]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    with metrics.RunFolder.open(stopped):
        assert not [path for path in left if path.exists()]
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == ["step-000002", "step-000004"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what a file descriptor is open on")
def test_everything_is_on_disk_before_it_counts(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and their folder before the rename, the folder of the new name after it, and only then older ones go."""
    done: list[tuple[str, Path]] = []
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree

    def synced(fd: int) -> None:
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{fd}"))))
        fsync(fd)

    def renamed(self: Path, target: Path) -> Path:
        done.append(("rename", Path(target)))
        return rename(self, target)

    def removed(path: Any, **options: Any) -> None:
        done.extend([("remove", Path(path))] * Path(path).exists())
        rmtree(path, **options)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(shutil, "rmtree", removed)
    loop.resume(stopped, quiet=True)
    for target, draft, old in ((stopped / "checkpoints/step-000006", stopped / "checkpoints/.draft-000006",
                                stopped / "checkpoints/step-000002"),
                               (stopped / "final", stopped / ".final-draft", None)):
        at = done.index(("rename", target))
        before, after = done[:at], done[at:]
        for path in [draft, *(draft / file.name for file in target.iterdir())]:
            assert ("sync", path) in before, path
        assert ("sync", target.parent) in after
        if old is not None:
            assert after.index(("sync", target.parent)) < after.index(("remove", old))
            assert ("sync", stopped / "metrics.jsonl") in before
