"""Methods, verifiers and engines of the user: docs/own-method.md does what it says, and mistakes are one line."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import bridgelm
from bridgelm.cli.main import main
from bridgelm.comparisons.compare import resolve
from bridgelm.config import plugins
from bridgelm.config.run_config import load_config
from bridgelm.errors import UserError
from bridgelm.testing.__main__ import main as put_to_test

PAGE = Path(__file__).parents[2] / "docs" / "own-method.md"
SMALL = ["steps=2", "threads=1", "data.max_prompt_tokens=64", "data.max_demo_tokens=64", "data.toy.train_size=24",
         "data.toy.demo_size=8", "data.toy.eval_size=8", "rollout.prompts=4", "rollout.group=4",
         "rollout.max_new_tokens=12", "batch.demos=4", "eval.problems=4"]
OWN = "cosine.py:Cosine"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of the page, in which commands are run."""
    monkeypatch.chdir(tmp_path)
    for name, text in re.findall(r"`(\w+\.(?:py|toml))`[^`]*?:\n\n```\w+\n(.*?)```", PAGE.read_text(), re.DOTALL):
        (tmp_path / name).write_text(text)
    assert {path.name for path in tmp_path.iterdir()} == {"cosine.py", "cosine.toml", "words.py", "counted.py"}
    return tmp_path


def test_the_page_s_method_is_checked_shown_and_trained(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "cosine.toml"]) == 0
    assert main(["show", OWN]) == 0
    shown = capsys.readouterr().out
    assert "mixed along a cosine" in shown
    assert "start = 0.9" in shown
    assert "# weight of the demonstrations in the first step" in shown
    assert "Needs of the data: demos" in shown
    assert main(["train", "cosine.toml", *SMALL, "--quiet"]) == 0
    run = bridgelm.Run("runs/cosine")
    assert (run.method, run.status) == ("Cosine", "finished")
    assert [mu for _, mu in run.series("cosine/mu")] == pytest.approx([0.8, 0.4])
    assert bridgelm.load_config("runs/cosine/config.json").method.name == f"{here}/cosine.py:Cosine"


def test_it_keeps_what_a_method_promises_and_one_that_does_not_is_found(
        here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert put_to_test([OWN, "method.start=0.5"]) == 0
    assert "ok      micro-batches" in capsys.readouterr().out
    text = (here / "cosine.py").read_text()
    own = "rl_terms(batch, live, self.options.rl) | sft_terms(batch, live)"
    assert own in text
    wrong = {"micro-batches": text.replace(own, "{name: t / len(t) for name, t in (" + own + ").items()}"),
             "terms": text.replace(own, own + " | {'new': live.logp_BT}"),
             "the same bits over interruptions": text.replace("step / self.run.steps", "self.count() / 9") +
             "\n    seen = 0\n\n    def count(self):\n        self.seen += 1\n        return self.seen\n"}
    for what, source in wrong.items():
        (here / "wrong.py").write_text(source)
        assert put_to_test(["wrong.py:Cosine"]) == 1
        assert f"FAILED  {what}: " in capsys.readouterr().out


def test_it_is_an_arm_a_stage_and_a_plan(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy("cosine.py", "other.py")
    (here / "other.py").write_text((here / "other.py").read_text().replace("class Cosine", "class Other"))
    arms = ["compare", "cosine.toml", *SMALL, "--methods", "joint,other.py:Other"]
    assert main([*arms, "--dry-run"]) == 0
    assert list(resolve("cosine.toml", ["joint", "other.py:Other"], SMALL)) == ["cosine", "joint", "Other"]
    assert main([*arms, "--seeds", "1", "--jobs", "1", "--quiet", "--out", "out"]) == 0
    assert {path.name for path in (here / "out").glob("*-seed0")} == {"cosine-seed0", "joint-seed0", "Other-seed0"}
    stages = f'name = "sequence"\nstages = [{{method = {{name = "sft"}}, steps = 1}}, {{method = {{name = "{OWN}"}}}}]'
    toml = (here / "cosine.toml").read_text()
    (here / "staged.toml").write_text(toml.replace(f'name = "{OWN}"\nstart = 0.8', stages))
    assert main(["train", "staged.toml", *SMALL, "--quiet"]) == 0
    assert [event["phase"] for event in bridgelm.Run("runs/staged").metrics] == ["sft", "Cosine"]
    assert main(["plan", "staged.toml", *SMALL]) == 0
    assert main(["report", "runs/staged", "out/Other-seed0", "--share"]) == 0
    assert str(here) not in (here / "share.json").read_text()


@pytest.mark.parametrize(("key", "file", "cls", "allowed"), [
    ("method.name", "cosine.py", "Cosine", "code"), ("rollout.engine", "counted.py", "Counted", "code"),
    ("reward.verifier", "words.py", "Words", "reward")])
def test_a_changed_file_is_refused_on_resume(here: Path, key: str, file: str, cls: str, allowed: str) -> None:
    from bridgelm.testing.bench import stopping
    from bridgelm.training import loop

    with stopping(), pytest.raises(loop.Interrupted):
        bridgelm.train(load_config("cosine.toml", [*SMALL, f"{key}={file}:{cls}"]), quiet=True)
    (here / file).write_text((here / file).read_text() + "\n# changed\n")
    with pytest.raises(UserError, match=rf"{allowed}: .*{file} changed"):
        bridgelm.train(resume="runs/cosine", quiet=True)
    assert bridgelm.train(resume="runs/cosine", quiet=True, allow_change=[allowed]).status == "finished"


def test_a_verifier_of_one_s_own(here: Path) -> None:
    from bridgelm.config.options.reward import RewardConfig
    from bridgelm.types import Problem, Verdict
    from bridgelm.verify import build_verifier

    problem = Problem("1", ({"role": "user", "content": "say it briefly"},))
    with build_verifier(RewardConfig.model_validate({"verifier": "words.py:Words"})) as verifier:
        found = verifier.grade([problem] * 2, ["in few words", "a b c d e f g h i"])
    assert [(grade.reward, grade.verdict) for grade in found] == [(1.0, Verdict.CORRECT), (0.0, Verdict.WRONG)]
    for body, said in (("return 0.5", "TypeError: it returned 0.5 (float), not True or False"),
                       ("raise SystemExit(3)", "SystemExit: 3")):
        (here / "wrong.py").write_text(f"class Wrong:\n    def grade(self, problem, text):\n        {body}\n")
        with build_verifier(RewardConfig.model_validate({"verifier": "wrong.py:Wrong"})) as verifier:
            assert verifier.grade([problem], ["x"])[0].verdict is Verdict.ERROR
            assert said in verifier.last_error


def test_an_installed_package_gives_names(here: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    (here / "own_package.py").write_text((here / "cosine.py").read_text())
    info = here / "own_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bridgelm.methods]\ncosine = own_package:Cosine\njoint = own_package:No\n")
    monkeypatch.syspath_prepend(str(here))
    plugins.installed.cache_clear()
    try:
        assert main(["methods"]) == 0
        assert re.search(r"^cosine +installed +own_package:Cosine$", capsys.readouterr().out, re.MULTILINE)
        assert main(["show", "cosine"]) == 0
        assert main(["check", "cosine.toml", "method.name=joint", "method.start=1"]) == 2, "ours is not replaced"
        assert main(["train", "cosine.toml", *SMALL, "method.name=cosine", "--quiet"]) == 0
    finally:
        plugins.installed.cache_clear()


@pytest.mark.parametrize(("item", "said"), [
    ("method.name=none.py:Cosine", "none.py does not exist; paths start where the command is run"),
    ("method.name=cosine.py:Sine", "cosine.py has no class 'Sine'; it has Options, Cosine"),
    ("method.name=cosine.py:Strict", "Strict is no method; derive it from bridgelm.methods.base.Method"),
    ("method.name=cosine.py:Method", "Method lacks gather, terms, update"),
    ("method.name=cosine.py:", "write it as path/to/file.py:Class or package.module:Class"),
    ("method.name=no_such.module:Cosine", "no_such.module cannot be imported (ModuleNotFoundError"),
    ("method.name=broken.py:Cosine", "broken.py, line 1 cannot be loaded: SyntaxError"),
    ("method.name=cosine", "'cosine' is not a method"),
    ("method.strat=1", "unknown key 'strat' of cosine.py:Cosine; did you mean 'start'?"),
    ("method.start=2", "method.start: Input should be less than or equal to 1 (got 2)"),
    ("method.rl.clip=1", "unknown key 'method.rl.clip'; did you mean 'clip_low'?"),
    ("reward.verifier=cosine.py:Cosine", "it has no method 'grade', so it is no verifier"),
    ("rollout.engine=words.py:Words", "it has no method 'generate', so it is no engine")])
def test_mistakes_are_one_line(here: Path, item: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "broken.py").write_text("class\n")
    assert main(["check", "cosine.toml", item]) == 2
    error: Any = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: cosine.toml: ")
    assert error.count("\n") == 1
