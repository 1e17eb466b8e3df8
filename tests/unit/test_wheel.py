"""The built wheel gives the same as a checkout: toy models, starter file and commands travel inside."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, as pip would lay it down. Built without a network, with the tools that are installed."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("bridgelm-*.whl")
    assert wheel.stat().st_size < 8_000_000
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def inside(site: Path, *words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=cwd, check=False,
                          env={**os.environ, "PYTHONPATH": str(site)})


def test_every_file_of_the_package_is_in_it(unpacked: Path) -> None:
    package = ROOT / "src" / "bridgelm"
    files = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    expected = {path for path in files if "__pycache__" not in path.parts and path.suffix != ".pyc"}
    found = {path.relative_to(unpacked / "bridgelm") for path in (unpacked / "bridgelm").rglob("*") if path.is_file()}
    assert expected == found
    assert Path("data/toy/models/base/model.safetensors") in found


def test_the_commands_work_from_it(unpacked: Path, tmp_path: Path) -> None:
    where = inside(unpacked, "-c", "import bridgelm; print(bridgelm.__file__)", cwd=tmp_path)
    assert where.stdout.startswith(str(unpacked)), where.stdout + where.stderr
    for words in (["methods"], ["show", "bridge"], ["init", "my.toml"],
                  ["check", str(ROOT / "recipes" / "toy" / "bridge.toml"), "--data", "data.toy.train_size=20",
                   "data.toy.demo_size=10", "data.toy.eval_size=10"]):
        done = inside(unpacked, "-m", "bridgelm", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def test_the_console_script_and_the_licence_are_declared(unpacked: Path) -> None:
    (info,) = unpacked.glob("bridgelm-*.dist-info")
    assert "bridgelm = bridgelm.cli.main:main" in (info / "entry_points.txt").read_text()
    assert "Apache License" in (info / "licenses" / "LICENSE").read_text()
    metadata = (info / "METADATA").read_text()
    assert "Requires-Python: >=3.11" in metadata
    assert "Requires-Dist: torch" in metadata
