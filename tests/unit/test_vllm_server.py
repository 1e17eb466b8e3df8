"""A vLLM server that misbehaves, on a real port: what is believed, tried again, given up; what it leaves."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from bridgelm.config.run_config import make_config
from bridgelm.engine import Caller, Lost, Request, Sampling, vllm_server
from bridgelm.engine.ranked import RankedEngine
from bridgelm.engine.vllm import Answer
from bridgelm.engine.vllm_server import Server
from bridgelm.errors import UserError
from bridgelm.runs.reader import Run
from bridgelm.training import checkpoint, loop

Raw = Callable[..., dict[str, Any]]
Fault = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]  # answers a request for tokens in its way
VOCABULARY = 20


class Served(ThreadingHTTPServer):
    """Answers as vLLM does, by what it is asked alone, but for the faults that are to come."""

    daemon_threads = True
    request_queue_size = 300

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: dict[int, Fault] = {}  # by the number of the request for tokens
        self.always: Fault | None = None
        self.count, self.paths, self.lock = 0, list[str](), threading.Lock()
        self.over = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def close(self) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *args: Any) -> None:
        """Its clients hang up."""

    def next(self, path: str) -> Fault | None:
        with self.lock:
            self.paths.append(path)
            if path != "/v1/completions":
                return None
            self.count += 1
            return self.faults.get(self.count) or self.always


class Handler(BaseHTTPRequestHandler):
    server: Served  # type: ignore[assignment]

    def do_GET(self) -> None:
        self.server.next(self.path)
        model = {"logprobs_mode": "processed_logprobs", "dtype": "torch.float32"}
        send(self, {"/v1/models": {"data": [{"id": "base", "max_model_len": 500}]},
                    "/server_info?config_format=json": {"vllm_config": {"model_config": model}}}[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.server.next(self.path)
        if fault is not None:
            fault(self, body)
        elif self.path == "/v1/completions":
            send(self, answer(body))
        else:
            send(self, {"success": True})

    def log_message(self, *args: Any) -> None:
        pass


def answer(body: dict[str, Any]) -> dict[str, Any]:
    random = np.random.default_rng([body["seed"], *body["prompt"]])
    ids = random.integers(3, VOCABULARY, body["max_tokens"]).tolist()
    return of(ids, random.uniform(-3, -1, len(ids)).tolist())


def of(ids: Any, logps: Any, reason: Any = "length") -> dict[str, Any]:
    return {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": logps}, "finish_reason": reason}]}


def send(handler: BaseHTTPRequestHandler, said: Any, status: int = 200, length: int | None = None,
         **headers: str) -> None:
    data = said if isinstance(said, bytes) else json.dumps(said).encode()
    handler.send_response(status)
    for key, value in {"Content-Type": "application/json", "Content-Length": str(length or len(data)),
                       **headers}.items():
        handler.send_header(key, value)
    handler.end_headers()
    handler.wfile.write(data)


def says(said: Any, status: int = 200, **given: Any) -> Fault:
    return lambda handler, _: send(handler, said, status, **given)


def hang(handler: Any, body: dict[str, Any]) -> None:
    handler.server.over.wait(60)


def drip(handler: Any, body: dict[str, Any]) -> None:
    send(handler, b"{", length=10_000)
    while not handler.server.over.wait(0.05):
        handler.wfile.write(b" ")


def hang_up(handler: Any, body: dict[str, Any]) -> None:
    handler.close_connection = True


def flood(handler: Any, body: dict[str, Any]) -> None:
    send(handler, b"[", length=1_500_000_000)
    for _ in range(1_500):
        handler.wfile.write(b"1," * 500_000)


@pytest.fixture
def served() -> Iterator[Callable[[], Served]]:
    running: list[Served] = []

    def start() -> Served:
        running.append(Served())
        return running[-1]
    yield start
    for one in running:
        one.close()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "PAUSE", 0.01)
    monkeypatch.setattr(vllm_server, "PER_TOKEN", 0.0)
    monkeypatch.setattr(vllm_server, "POLL", 0.02)


def config(raw: Raw, url: str, method: Any = "grpo", **changes: Any) -> Any:
    made = raw(method, **{**changes, "rollout": {"engine": "vllm", "server": url, "server_timeout": 0.3,
                                                 "server_retries": 2, **changes.get("rollout", {})}})
    return make_config({**made, "model": {**made["model"], "dtype": "float32"}})


@pytest.fixture
def client(raw: Raw, served: Any, tmp_path: Path) -> Any:
    """A server, the engine's side of it with weights that were given, and what it said."""
    server, said = served(), list[str]()
    made = Server(config(raw, server.url), tmp_path / "x", Caller(say=said.append))
    made.wake(SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(VOCABULARY, 2)))
    made.load([("weight", torch.zeros(2))])
    server.paths.clear()
    return server, made, said


def draw(made: Server, count: int = 1) -> list[Answer]:
    params: dict[str, Any] = {"max_tokens": 16, "seed": 1}
    return made.complete([[3, i] for i in range(count)], [params] * count)


GOOD = [5] * 16
WRONG = {
    "5,000 tokens": (of([5] * 5000, [-1.0] * 5000), "5000 tokens, and 16 were asked for"),
    "log-probs of 50": (of(GOOD, [50.0] * 16), r"choices.0.logprobs.token_logprobs.0: .* less than .* \(got 50.0\)"),
    "NaN": (of(GOOD, [math.nan] * 16), r"token_logprobs.0: .* finite number \(got nan\)"),
    "no log-prob": (of(GOOD, [None] * 16), r"token_logprobs.0: .* valid number \(got None\)"),
    "short list": (of(GOOD, [-1.0] * 9), "9 log-probs of 16 tokens"),
    "cut short": (of(GOOD[:9], [-1.0] * 9), "9 tokens of 16, said to have ended at the limit"),
    "no token": (of([], []), "choices.0.token_ids: .* at least 1 item"),
    "an id out of range": (of([VOCABULARY] * 16, [-1.0] * 16), "token 20 of a vocabulary of 20"),
    "a negative id": (of([-1] * 16, [-1.0] * 16), "token_ids.0: .* greater than or equal to 0"),
    "half a token": (of([5.5] * 16, [-1.0] * 16), "token_ids.0: .* valid integer"),
    "texts for ids": (of(["5"] * 16, [-1.0] * 16), "token_ids.0: .* valid integer"),
    "an unknown reason": (of(GOOD, [-1.0] * 16, "abort"), "finish_reason: .* 'stop' or 'length'"),
    "no choice": ({"choices": []}, "choices: .* at least 1 item"),
    "two choices": ({"choices": of(GOOD, [-1.0] * 16)["choices"] * 2}, "choices: .* at most 1 item"),
    "garbage": (b"\x1b[2J<html>\xff", "Invalid JSON"),
    "nothing": (b"", "Invalid JSON"),
    "a deep list": (b"[" * 100_000, "Invalid JSON: recursion limit"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_asked_for_once_more_and_then_refused(client: Any, name: str) -> None:
    server, made, said = client
    wrong, message = WRONG[name]
    server.faults = {2: says(wrong)}
    assert draw(made, 3) == draw(made, 3)
    assert server.count == 7
    assert len(said) == 1 and "gave a wrong answer" in said[0] and "1 of 3 requests again" in said[0]
    server.always = says(wrong)
    with pytest.raises(Lost, match=rf"rollout.server: {server.url} gave a wrong answer: .*{message}.* 2 tries") as f:
        draw(made)
    assert str(f.value).isprintable()


def test_a_body_without_an_end_is_not_read(client: Any) -> None:
    server, made, _ = client
    server.always = flood
    with pytest.raises(Lost, match=r"gave a wrong answer: more than \d{7} bytes, at 2 tries"):
        draw(made)


def test_rounding_is_no_fault(client: Any) -> None:
    server, made, _ = client
    server.always = says(of(GOOD, [1e-7] * 16))
    assert draw(made)[0].ids == GOOD


def test_scores_are_checked(client: Any) -> None:
    server, made, _ = client

    def scores(*at: Any) -> Fault:
        return says({"choices": [{"prompt_logprobs": [None, *at]}]})
    right = {"4": {"logprob": -1.0}}
    server.always = scores(right)
    assert made.score([[3, 4]]) == [[-1.0]]
    for wrong, message in (((), "1 log-probs of a prompt of 2 tokens"), ((None,), "token 2 of a prompt has no"),
                           (({"5": {"logprob": -1.0}},), "token 2 of a prompt has no"),
                           (({"4": {"logprob": 50.0}},), "less than or equal")):
        server.always = scores(*wrong)
        with pytest.raises(Lost, match=message):
            made.score([[3, 4]])


@pytest.mark.parametrize(("fault", "message", "again"), [
    (hang, "gave no answer in 0.3 s, at 2 tries", False), (drip, "gave no answer in 0.3 s, at 2 tries", False),
    (says({}, 503), "answered 503 {}, at 3 tries", True), (says({}, 429), "answered 429 {}, at 3 tries", True),
    (hang_up, r"broke off its answer \(RemoteDisconnected: .*\), at 3 tries", True),
    (says(b"{", length=90), r"broke off its answer \(ConnectionError: 89 bytes are missing\), at 3 tries", True)],
    ids=["hang", "drip", "503", "429", "hang up", "hang up within"])
def test_faults_that_pass_are_waited_out(client: Any, fault: Fault, message: str, again: bool) -> None:
    server, made, said = client
    whole = draw(made, 3)
    server.faults = {4: fault} | ({7: fault} if again else {})  # the second and third round have one request
    assert draw(made, 3) == whole
    assert len(said) == 1 + again
    assert all("1 of 3 requests again in 0.0" in line for line in said)
    weights = server.paths.count("/collective_rpc")
    assert weights == (2 if again else 0), "it may have been started anew: with other weights"
    server.always = fault
    with pytest.raises(Lost, match=f"rollout.server: {server.url} {message}"):
        draw(made)


def test_a_long_queue_is_no_fault(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server, made, said = client
    monkeypatch.setattr(vllm_server, "AT_ONCE", 1)

    def slow(handler: Any, body: dict[str, Any]) -> None:
        time.sleep(0.15)
        send(handler, answer(body))
    server.always = slow
    assert len(draw(made, 5)) == 5
    assert not said


def test_a_redirect_is_not_followed(client: Any, served: Any) -> None:
    server, made, said = client
    other = served()
    for status in (302, 307):
        server.always = says({}, status, Location=f"{other.url}/v1/completions")
        with pytest.raises(Lost, match=rf"{server.url} sends on to 127.0.0.1:{other.server_port} \({status}\), which "
                                       "is not followed; name the server itself"):
            draw(made)
    assert not other.paths
    assert not said


@pytest.mark.parametrize("fault", [hang, drip])
def test_the_end_of_a_run_ends_a_wait(client: Any, fault: Fault) -> None:
    server, made, _ = client
    server.always = fault
    made.timeout = 60.0
    threading.Timer(0.1, made.close).start()
    before = time.monotonic()
    with pytest.raises(Lost, match="no longer waited for"):
        draw(made)
    assert time.monotonic() - before < 1
    while left := [thread for thread in threading.enumerate() if thread.name == "vllm server"]:
        assert time.monotonic() - before < 2, f"threads that still wait: {left}"
        time.sleep(0.02)


def test_only_a_wait_that_a_run_stands_still_for_ends_with_a_stop(client: Any) -> None:
    """What was asked for ahead may come in time for the checkpoint."""
    _, made, _ = client
    made.caller = Caller(stopping=lambda: True)
    made.awaited = False
    assert len(draw(made)) == 1
    made.awaited = True
    with pytest.raises(Lost, match="no longer waited for"):
        draw(made)


def test_all_ranks_hear_of_a_lost_server() -> None:
    class Gone:
        exact = False

        def generate(self, *args: Any) -> Any:
            raise Lost("it is gone")

        def start(self, *args: Any) -> Any:
            raise Lost("it is gone")
    engine = RankedEngine(cast(Any, Gone()), served=True)
    request = Request(np.array([3]))
    with pytest.raises(Lost, match=r"^it is gone$"):
        engine.generate(cast(Any, None), [request], Sampling(3))
    take = engine.start(cast(Any, None), [request], Sampling(3))  # the others would not hear of it here
    with pytest.raises(Lost, match=r"^it is gone$"):
        take()


# -- whole runs --------------------------------------------------------------------------------------------------------

def course(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in event.items() if key != "seconds" and not key.startswith("time/")}
            for event in Run(run).events]


def final(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


STAGES = {"name": "sequence", "stages": [{"method": {"name": "grpo"}, "steps": 2}, {"method": {"name": "grpo"}}]}
PROBED = {"every": 1, "demos": 4, "problems": 2, "group": 4}


@pytest.mark.parametrize(("method", "changes", "at", "step"), [
    ("grpo", {}, 1, 0),  # 8 validation problems, then 16 answers a step, 8 for validation after each second step
    ("grpo", {}, 30, 1), ("grpo", {}, 45, 2), ("grpo", {}, 81, 4), ("grpo", {}, 91, 4),
    ("grpo", {"rollout": {"ahead": True}}, 30, 1),  # two steps have been asked for
    (STAGES, {"diagnose": PROBED}, 43, 1),  # the probe after the first step
    (STAGES, {"diagnose": PROBED}, 74, 2),  # that after the first stage
    (STAGES, {"diagnose": PROBED}, 82, 2)], ids=lambda x: str(x)[:8])  # and the first answers of the second
def test_a_run_goes_on_when_its_server_is_back(raw: Raw, served: Any, tmp_path: Path, method: Any, changes: Any,
                                               at: int, step: int) -> None:
    server = served()
    reward = tmp_path / "reward.py"
    reward.write_text("import random\n\ndef reward(prompts, completions, **columns):\n"
                      "    return [random.random() for _ in completions]\n")
    changes = {**changes, "reward": {"functions": [f"{reward}:reward"]}, "checkpoint_every": 0}
    whole = loop.train(config(raw, server.url, method, name="whole", **changes), quiet=True).path
    server.count = 0
    server.faults = {n: says({}, 503) for n in range(at, at + 1000)}
    with pytest.raises(UserError, match=r"answered 503 .*, at 3 tries; go on with: bridgelm train --resume .*/lost"):
        loop.train(config(raw, server.url, method, name="lost", **changes), quiet=True)
    lost = whole.with_name("lost")
    newest = checkpoint.newest(lost)
    assert (int(newest.name[-6:]) if newest else 0) == step
    server.faults = {}
    loop.resume(lost, quiet=True)
    if "rollout" not in changes:
        assert course(lost) == course(whole)
        assert final(lost) == final(whole)


def test_ctrl_c_ends_the_wait_for_a_server_that_hangs(raw: Raw, served: Any, tmp_path: Path) -> None:
    server = served()
    server.faults = dict.fromkeys(range(30, 1000), hang)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config(raw, server.url, name="run", rollout={"server_timeout": 600.0}).resolved()))
    command = [sys.executable, "-m", "bridgelm", "train", str(file), "--quiet"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + 60
        while server.count < 40 and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.count == 40, "all of the second step's, and the first of them hang"
        before = time.monotonic()
        run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=30)[1]
    assert time.monotonic() - before < 5
    folder = tmp_path / "runs" / "run"
    assert (run.returncode, said) == (130, f"interrupted; go on with: bridgelm train --resume {folder}\n")
    saved = checkpoint.newest(folder)
    assert saved is not None
    assert saved.name == "step-000001"
    server.faults = {}
    assert loop.resume(folder, quiet=True).status == "finished"
    whole = loop.train(config(raw, server.url, name="whole"), quiet=True).path
    assert final(folder) == final(whole)
