"""Merged models: exact weights, an exact record, and models that do not fit are refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bridgelm
from bridgelm.cli.main import main
from bridgelm.errors import UserError
from bridgelm.training import merging
from tiny import save_model


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return save_model(folder / "a", seed=1), save_model(folder / "b", seed=2)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def retyped(source: Path, out: Path, dtype: torch.dtype, shards: int = 1) -> Path:
    """The model in another type, its weights dealt out to several files with an index."""
    import shutil

    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    found = {name: t.to(dtype) for name, t in tensors(source).items()}
    names = sorted(found)
    where = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({n: found[n] for n in names if where[n] == file}, out / file, metadata={"format": "pt"})
    (out / merging.INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return out


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_every_weight_is_the_mean(pair: tuple[Path, Path], weight: float, tmp_path: Path) -> None:
    out = bridgelm.merge(*pair, tmp_path / "out", weight=weight)
    one, other, found = map(tensors, (*pair, out))
    assert found.keys() == one.keys()
    for name, t in found.items():
        assert t.dtype == one[name].dtype == torch.float32
        exact = one[name].double() + weight * (other[name].double() - one[name].double())
        if weight in (0.0, 1.0):
            assert torch.equal(t, (one, other)[int(weight)][name]), "the ends are the models themselves"
        else:  # rounded once: half a unit in the last place of float32
            assert ((t.double() - exact).abs() <= 2.0**-24 * exact.abs() * (1 + 1e-9) + 1e-45).all()


def test_a_merged_model_opens_and_computes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = merging.merge(*pair, tmp_path / "out", 0.5)
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    one: Any = AutoModelForCausalLM.from_pretrained(pair[0])
    other: Any = AutoModelForCausalLM.from_pretrained(pair[1])
    with torch.no_grad():
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            p.copy_(((p.double() + q.double()) / 2).float())
    ids = torch.tensor([[3, 7, 9, 4]])
    torch.testing.assert_close(model(ids).logits, one(ids).logits, rtol=1e-6, atol=1e-6)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(pair[0]).get_vocab()
    assert not list(tmp_path.glob(".*draft*"))


def test_nobody_elses_folder_is_deleted(pair: tuple[Path, Path], tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    out, other = tmp_path / "out", tmp_path / ".out-draft"
    for folder in (out, other):
        folder.mkdir()
    (other / "theirs").write_text("")
    number = out.stat().st_ino
    merging.merge(*pair, out)
    assert (other / "theirs").exists() and out.stat().st_ino == number and (out / "merged.json").exists()
    late = tmp_path / "late"
    late.mkdir()
    monkeypatch.setattr(merging, "_settle", lambda *_: (late / "theirs").write_text(""))
    with pytest.raises(UserError, match="late: exists and is not empty"):
        merging.merge(*pair, late)
    assert [path.name for path in late.iterdir()] == ["theirs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out-draft", "late", "out"]


def test_the_wider_type_wins_and_shards_stay(pair: tuple[Path, Path], tmp_path: Path) -> None:
    narrow = retyped(pair[0], tmp_path / "narrow", torch.bfloat16, shards=3)
    out = merging.merge(narrow, pair[1], tmp_path / "out", 0.25)
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert files == sorted(file.name for file in narrow.glob("*.safetensors")) and len(files) == 3
    one, other, found = map(tensors, (narrow, pair[1], out))
    for name, t in found.items():
        assert t.dtype == torch.float32
        assert torch.equal(t, (0.75 * one[name].double() + 0.25 * other[name].double()).float())
    config = json.loads((out / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"
    size = sum(4 * t.numel() for t in found.values())
    assert json.loads((out / merging.INDEX).read_text())["metadata"]["total_size"] == size
    same = merging.merge(narrow, narrow, tmp_path / "same", 0.5)
    assert all(torch.equal(t, one[name]) and t.dtype == torch.bfloat16 for name, t in tensors(same).items())


def test_runs_are_merged_measured_and_recorded(raw: Callable[..., Any], tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for name, method in (("s", "sft"), ("r", "grpo")):
        config = raw(method, name=name, steps=2, eval={"every": 0, "problems": 2},
                     model={"dtype": "float32"})
        runs.append(bridgelm.train(config, quiet=True).path)
    out = tmp_path / "merged"
    assert main(["merge", str(runs[0]), str(runs[1]), str(out), "--weight", "0.25"]) == 0
    assert f"bridgelm eval {out}" in capsys.readouterr().out
    one, other, found = (tensors(folder) for folder in (runs[0] / "final", runs[1] / "final", out))
    for name, t in found.items():
        assert torch.equal(t, (0.75 * one[name].double() + 0.25 * other[name].double()).float())
    parts = json.loads((out / merging.RECORD).read_text())["parts"]
    made = [(p["weight"], p["method"], p["steps"], p["seed"]) for p in parts]
    assert made == [(0.75, "sft", 2, 0), (0.25, "grpo", 2, 0)]
    assert [p["source"] for p in parts] == [str(run) for run in runs]
    card = (out / "README.md").read_text()
    assert "0.75 x" in card and "grpo, 2 steps, seed 0" in card
    measured = bridgelm.evaluate(out, config=runs[0] / "config.json")
    assert measured["n"] == 10 and measured["model"] == str(out)
    # A model that was merged itself says so.
    again = merging.merge(out, runs[0], tmp_path / "again")
    assert json.loads((again / merging.RECORD).read_text())["parts"][0]["merged"] == parts


def test_what_does_not_fit_is_refused(pair: tuple[Path, Path], tmp_path: Path,
                                      tiny_folder: Callable[..., Path]) -> None:
    import shutil

    a, b = pair
    with pytest.raises(UserError, match="different architectures"):
        merging.merge(a, tiny_folder("llama"), tmp_path / "out")
    other = shutil.copytree(b, tmp_path / "words")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"sum"', '"product"'))
    with pytest.raises(UserError, match=r"different tokenizers: 2 tokens, 'product'"):
        merging.merge(a, other, tmp_path / "out")
    short = shutil.copytree(b, tmp_path / "short")
    found = tensors(short)
    name = sorted(found)[0]
    for file in short.glob("*.safetensors"):
        save_file({n: t for n, t in found.items() if n != name}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name}.* missing in"):
        merging.merge(a, short, tmp_path / "out")
    with pytest.raises(UserError, match="between 0 and 1"):
        merging.merge(a, b, tmp_path / "out", 1.5)
    with pytest.raises(UserError, match="neither a run nor a model folder"):
        merging.merge(a, "someone/model", tmp_path / "out")
    with pytest.raises(UserError, match="is not empty"):
        merging.merge(a, b, tmp_path)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*draft*"))
