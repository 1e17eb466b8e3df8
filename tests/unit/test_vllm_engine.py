"""The vLLM engine without vLLM: what it asks for and when it copies weights. With a real one: tests/real_vllm."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bridgelm.config.run_config import ModelConfig, OptimConfig, RunConfig, make_config
from bridgelm.data.chat import load_chat
from bridgelm.engine import Caller, Request, Sampling, exchange, vllm
from bridgelm.engine.vllm import Answer, InProcess, VllmEngine, adapter_rank
from bridgelm.engine.vllm_server import Server
from bridgelm.errors import UserError
from bridgelm.ledger import Ledger
from bridgelm.model.loading import load_model
from bridgelm.model.policy import Policy
from bridgelm.runs import preflight

Raw = Callable[..., dict[str, Any]]


class Recorder:
    """A backend that answers 5, 6, 7, ... and remembers what it was asked."""

    max_length = 64
    elsewhere = False
    awaited = True

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.asked: list[tuple[list[int], dict[str, Any]]] = []
        self.forgets, self.logp = False, -0.5

    def wake(self, model: Any) -> None:
        self.calls.append("wake")

    def load(self, named: Any) -> None:
        self.calls.append("load")
        self.weights = {name: weight.detach().clone() for name, weight in named}

    def adapt(self, adapter: Any) -> None:
        self.calls.append("adapt")

    def complete(self, prompts: Any, params: Any) -> list[Answer]:
        self.calls.append("complete")
        self.asked = list(zip(prompts, params, strict=True))
        return [Answer(list(range(5, 5 + p["max_tokens"])), [self.logp] * p["max_tokens"], False) for p in params]

    def score(self, sequences: Any) -> list[list[float]]:
        self.calls.append("score")
        return [[float(-i) for i in ids[1:]] for ids in sequences]

    def sleep(self) -> bool:
        return self.forgets

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def policy(tiny_folder: Callable[[], Path]) -> Callable[..., Policy]:
    def make(lora: tuple[int, float, str] | None = None) -> Policy:
        model = load_model(ModelConfig(name_or_path=str(tiny_folder()), device="cpu"))
        made = Policy(model, OptimConfig(lr=1e-2), Ledger(1), 64, 0, lora)
        made.fork("shadow")
        return made
    return make


@pytest.fixture
def engine(tiny_folder: Callable[[], Path]) -> Callable[..., tuple[VllmEngine, Recorder]]:
    def make(low_rank: bool = False) -> tuple[VllmEngine, Recorder]:
        chat = load_chat(ModelConfig(name_or_path=str(tiny_folder())))
        backend = Recorder()
        return VllmEngine(backend, chat, low_rank), backend
    return make


SHORT = Sampling(3)


def ask(engine: VllmEngine, policy: Policy, at: str = "live", sampling: Sampling = SHORT,
        rooms: tuple[int | None, ...] = (None,), ledger: Ledger | None = None) -> list[Any]:
    asked = [Request(np.array([3, 8, 4]), (7, i), room) for i, room in enumerate(rooms)]
    with policy.origin(at) as origin:
        return engine.generate(origin, asked, sampling, ledger)


def test_weights_are_copied_when_they_have_changed(policy: Any, engine: Any) -> None:
    (made, backend), trained = engine(), policy()

    def loads(at: str = "live") -> int:
        before = backend.calls.count("load")
        ask(made, trained, at)
        return backend.calls.count("load") - before
    assert loads() == 1
    for name, weight in trained.model.named_parameters(remove_duplicate=False):
        torch.testing.assert_close(backend.weights[name], weight, rtol=0, atol=0)
    assert "lm_head.weight" in backend.weights, "tied, and still under its own name"
    assert loads() == 0
    trained.live.stale = True
    assert loads() == 1
    assert [loads("shadow"), loads("shadow"), loads(), loads()] == [1, 1, 1, 0], "of a shadow it cannot know"
    made.sleep()
    assert loads() == 0, "it slept and kept them"
    backend.forgets = True
    made.sleep()
    assert loads() == 1
    assert made.syncs == backend.calls.count("load") == 6


def test_low_rank_training_copies_an_adapter_until_the_base_moves(policy: Any, engine: Any) -> None:
    (made, backend), trained = engine(True), policy((2, 4.0, "q_proj"))
    trained.add_w(2, 4.0, "q_proj")
    ask(made, trained)
    ask(made, trained, "shadow")
    ask(made, trained)
    assert (backend.calls.count("adapt"), backend.calls.count("load")) == (3, 0)
    trained.absorb()
    ask(made, trained)
    ask(made, trained)
    assert (backend.calls.count("adapt"), backend.calls.count("load")) == (3, 1)
    ask(made, policy((2, 4.0, "q_proj")))
    assert backend.calls.count("load") == 2, "its base is no more the folder's: no adapter of another fits"


def test_what_is_asked_for(policy: Any, engine: Any) -> None:
    made, backend = engine()
    made.eos_ids = frozenset({9, 1})
    ledger = Ledger(1)
    found = ask(made, policy(), rooms=(None, 0, 2), ledger=ledger)
    assert [c.ids.tolist() for c in found] == [[5, 6, 7], [], [5, 6]]
    assert not any(c.finished for c in found)
    assert [ids for ids, _ in backend.asked] == [[3, 8, 4]] * 2
    first, second = (params for _, params in backend.asked)
    assert first == {"temperature": 1.0, "max_tokens": 3, "logprobs": 0, "ignore_eos": True, "stop_token_ids": [1, 9],
                     "seed": first["seed"]}
    assert second["max_tokens"] == 2
    assert first["seed"] != second["seed"]
    assert 0 <= first["seed"] < 2**63
    assert ledger.generate == 3 + 5, "a prompt once"
    ask(made, policy(), rooms=(None, 0, 2))
    assert [params for _, params in backend.asked] == [first, second]
    assert ask(made, policy(), rooms=(0,))[0].ids.size == 0


def test_both_kinds_of_log_probs(policy: Any, engine: Any) -> None:
    made, backend = engine()
    for temperature, raw, logp in ((1.0, -0.5, -0.5), (0.0, -0.5, 0.0)):
        found = ask(made, policy(), sampling=Sampling(3, temperature))[0]
        assert (found.raw_logps.tolist(), found.logps.tolist()) == ([raw] * 3, [logp] * 3)
    assert "score" not in backend.calls
    found = ask(made, policy(), sampling=Sampling(3, 0.5))[0]
    assert found.raw_logps.tolist() == [-5, -6, -7], "of the answer, not of the prompt"
    assert found.logps.tolist() == [-0.5] * 3
    backend.logp = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        ask(made, policy())


def test_an_answer_ends_where_the_native_engine_would_end_it(policy: Any, engine: Any) -> None:
    made, backend = engine()
    stop = made.text([6, 7])
    found = ask(made, policy(), sampling=Sampling(5, 0.5, (stop,)))[0]
    assert found.ids.tolist() == [5, 6, 7]
    assert found.finished
    assert found.raw_logps.tolist() == [-5, -6, -7]
    assert backend.asked[0][1]["stop"] == [stop]


def test_an_answer_that_cannot_fit_is_refused(policy: Any, engine: Any) -> None:
    made, _ = engine()
    with pytest.raises(UserError, match=r"rollout.vllm.max_length: .* 103 tokens, over vLLM's 64"):
        ask(made, policy(), sampling=Sampling(100))


# -- in this process ---------------------------------------------------------------------------------------------------

class FakeLLM:
    def __init__(self, path: str, **settings: Any) -> None:
        self.path, self.settings, self.calls = path, settings, list[Any]()
        self.model_config = SimpleNamespace(max_model_len=settings["max_model_len"])

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))

    def wake_up(self) -> None:
        self.calls.append("wake_up")

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append((method, [name for name, _ in kwargs["weights_iterator"]]))

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset_prefix_cache")

    def generate(self, prompts: Any, params: Any, use_tqdm: bool, lora_request: Any) -> list[Any]:
        self.calls.append(("generate", lora_request))
        done = SimpleNamespace(token_ids=[5], logprobs=[{5: SimpleNamespace(logprob=-1.0)}], finish_reason="length")
        return [SimpleNamespace(outputs=[done]) for _ in prompts]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"vllm": SimpleNamespace(LLM=FakeLLM, SamplingParams=lambda **params: params),
               "vllm.lora.request": SimpleNamespace(LoRARequest=lambda *parts: parts)}
    monkeypatch.setattr(vllm, "import_module", modules.__getitem__)


def config(raw: Raw, lora: int = 0, **rollout: Any) -> RunConfig:
    made = raw(rollout={"engine": "vllm", "max_new_tokens": 6, **rollout})
    return make_config({**made, "model": {**made["model"], "dtype": "float32", "lora_rank": lora}})


def test_it_sleeps_while_the_trainer_works(raw: Raw, policy: Any, fake: None) -> None:
    """On one GPU: wake, weights, the old cache away, then draw; asleep, only the waking and the weights bring it
    back. Without a GPU it never sleeps."""
    made = config(raw)
    chat = load_chat(made.model)
    backend = InProcess(made)
    assert not backend.can_sleep
    backend.can_sleep = True
    engine, trained = VllmEngine(backend, chat, False), policy()
    engine.sleep()  # not open yet
    ask(engine, trained)
    llm = backend.llm
    assert llm.settings["load_format"] == "dummy"
    assert llm.settings["enable_sleep_mode"]
    weights = ("reload_weights", [name for name, _ in trained.model.named_parameters(remove_duplicate=False)])
    drawn = [weights, "reset_prefix_cache", ("generate", None)]
    assert llm.calls == drawn
    engine.sleep()
    engine.sleep()
    assert llm.calls[3:] == [("sleep", 2)]
    ask(engine, trained)
    assert llm.calls[4:] == ["wake_up", *drawn], "though no weight had changed"


def test_under_an_adapter_the_base_is_kept_in_sleep(raw: Raw, policy: Any, fake: None) -> None:
    made = config(raw, lora=2)
    backend = InProcess(made)
    backend.can_sleep = True
    engine, trained = VllmEngine(backend, load_chat(made.model), True), policy((2, 4.0, "q_proj"))
    ask(engine, trained)
    assert backend.llm.settings["load_format"] == "auto"
    assert backend.llm.settings["max_lora_rank"] == 8
    assert backend.llm.settings["lora_target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj",
                                                           "up_proj", "v_proj"]
    engine.sleep()
    ask(engine, trained)
    trained.live.stale = True
    ask(engine, trained)
    asked = [("generate", (f"adapter-{n}", n, str(backend.folder))) for n in (1, 2)]
    assert backend.llm.calls == [asked[0], ("sleep", 1), "wake_up", asked[0], asked[1]]
    folder = backend.folder
    assert (folder / "adapter_config.json").exists()
    engine.close()
    assert not folder.exists()


def test_its_length_is_within_the_models(raw: Raw, fake: None) -> None:
    model = SimpleNamespace(named_modules=dict, get_output_embeddings=lambda: None)
    for given, length in (({}, 128), ({"vllm": {"max_length": 77}}, 77)):
        backend = InProcess(config(raw, **given))  # 1024 + 6, and the model has 128 positions
        backend.wake(model)
        assert backend.max_length == length


def test_the_rank_is_that_of_both_parts(raw: Raw) -> None:
    def rank(lora: int, method: dict[str, Any]) -> int:
        made = raw(method)
        return adapter_rank(make_config({**made, "model": {**made["model"], "lora_rank": lora}}))
    assert rank(0, {"name": "bridge", "rank": 3}) == 0
    assert rank(4, {"name": "grpo"}) == 4
    assert rank(4, {"name": "bridge", "rank": 3}) == 7


# -- files and servers -------------------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_is_what_peft_reads(policy: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    trained = policy((2, 4.0, "q_proj|down_proj"))
    trained.add_w(3, 9.0, "q_proj|o_proj")
    with torch.no_grad():
        for group in ("theta", "w"):
            for t in trained.groups[group].flat().values():
                t.add_(0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(3)))
    base = load_model(ModelConfig(name_or_path=trained.model.config._name_or_path, device="cpu"))
    trained.live.stale = True
    ids = torch.arange(3, 15)[None]
    with trained.origin() as origin, torch.no_grad():
        exchange.write_adapter(origin.adapter, 5, torch.float32, tmp_path)
        mine = origin.model(ids).logits
        alone = base(ids).logits
        theirs = PeftModel.from_pretrained(base, tmp_path)(ids).logits
    assert (mine - alone).abs().max() > 0.1
    torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-5)


def test_weights_are_written_in_parts(policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = policy().model
    named = list(model.named_parameters(remove_duplicate=False))
    exchange.write_weights(named, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    monkeypatch.setattr(exchange, "PART", 4000)
    for _ in range(2):
        exchange.write_weights(named, tmp_path)
        parts = sorted(tmp_path.glob("*.safetensors"))
        assert len(parts) > 2
        found = {name: t for part in parts for name, t in load_file(part).items()}
        assert found.keys() == dict(named).keys()
        for name, weight in named:
            torch.testing.assert_close(found[name], weight.detach(), rtol=0, atol=0)
    exchange.write_weights(named[:1], tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1, "none of the last time is left"
    (tmp_path / "theirs.safetensors").write_text("")
    exchange.write_weights(named[:1], tmp_path)
    exchange.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.safetensors"], "only what was written here goes"


Serve = Callable[[dict[str, Any]], tuple[str, list[tuple[str, Any]]]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A server that gives fixed answers by path, 404 for others; and what it was sent."""
    running: list[HTTPServer] = []

    def start(answers: dict[str, Any]) -> tuple[str, list[tuple[str, Any]]]:
        sent: list[tuple[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer = answers.get(self.path)
                body = json.dumps(answer).encode()
                self.send_response(404 if answer is None else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                sent.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
                self.do_GET()

            def log_message(self, *args: Any) -> None:
                pass
        server = HTTPServer(("127.0.0.1", 0), Handler)
        running.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}", sent
    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def answers(logprobs: str = "processed_logprobs", dtype: str = "torch.float32") -> dict[str, Any]:
    model = {"logprobs_mode": logprobs, "dtype": dtype}
    choice = {"token_ids": [5, 1], "logprobs": {"token_logprobs": [-1.0, -2.0]}, "finish_reason": "stop",
              "prompt_logprobs": [None, {"8": {"logprob": -3.0}}, {"4": {"logprob": -4.0}}]}
    return {"/v1/models": {"data": [{"id": "base", "max_model_len": 50}]},
            "/server_info?config_format=json": {"vllm_config": {"model_config": model}},
            "/collective_rpc": {"results": [None]}, "/reset_prefix_cache": {"success": True},
            "/v1/load_lora_adapter": {}, "/v1/completions": {"choices": [choice]}}


def test_a_server_is_given_files_and_asked_for_tokens(raw: Raw, policy: Any, serve: Serve, tmp_path: Path) -> None:
    url, sent = serve(answers())
    made = config(raw, server=url)
    engine = VllmEngine(Server(made, tmp_path / "x", Caller()), load_chat(made.model), False)
    found = ask(engine, policy(), rooms=(None, None))
    assert [c.ids.tolist() for c in found] == [[5, 1]] * 2
    assert found[0].finished
    assert found[0].logps.tolist() == [-1.0, -2.0]
    folder = str(tmp_path / "x")
    assert sent[:2] == [("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}}),
                        ("/reset_prefix_cache", {})]
    assert [body["model"] for path, body in sent[2:]] == ["base"] * 2
    assert all(body["return_token_ids"] and body["prompt"] == [3, 8, 4] for path, body in sent[2:])
    assert engine.backend.score([[3, 8, 4]]) == [[-3.0, -4.0]]
    assert list(Path(folder).glob("*.safetensors"))
    engine.close()
    assert not list(Path(folder).glob("*"))


def test_a_server_is_given_an_adapter(raw: Raw, policy: Any, serve: Serve, tmp_path: Path) -> None:
    url, sent = serve(answers())
    made = config(raw, lora=2, server=url)
    engine = VllmEngine(Server(made, tmp_path, Caller()), load_chat(made.model), True)
    ask(engine, policy((2, 4.0, "q_proj")))
    assert sent[0] == ("/v1/load_lora_adapter", {"lora_name": "bridgelm", "lora_path": str(tmp_path),
                                                 "load_inplace": True})
    assert sent[-1][1]["model"] == "bridgelm"


@pytest.mark.parametrize(("change", "message"), [
    ({"/server_info?config_format=json": None}, "answered 404 .*; start it with VLLM_SERVER_DEV_MODE=1"),
    (answers("raw_logprobs"), "gives raw_logprobs, .*--logprobs-mode processed_logprobs"),
    (answers(dtype="torch.bfloat16"), "computes in bfloat16, and model.dtype is float32"),
    ({"/reset_prefix_cache": {"success": False}}, "a server serves one run")])
def test_servers_that_cannot_be_used(raw: Raw, policy: Any, serve: Serve, tmp_path: Path, change: dict[str, Any],
                                     message: str) -> None:
    url, _ = serve({**answers(), **change})
    made = config(raw, server=url, server_retries=0)
    with pytest.raises(UserError, match=rf"rollout.server: {url}.*{message}"):
        ask(VllmEngine(Server(made, tmp_path, Caller()), load_chat(made.model), False), policy())


def test_no_server(raw: Raw, policy: Any, tmp_path: Path) -> None:
    made = config(raw, server="http://127.0.0.1:9", server_retries=0)
    with pytest.raises(UserError, match=r"rollout.server: http://127.0.0.1:9 cannot be reached .*; start it with"):
        ask(VllmEngine(Server(made, tmp_path, Caller()), load_chat(made.model), False), policy())


# -- what is refused before a model is loaded --------------------------------------------------------------------------

@pytest.mark.parametrize(("there", "model", "rollout", "message"), [
    (False, {}, {}, r"rollout.engine: vLLM is not installed here; install bridgelm\[vllm\] .*rollout.server"),
    (True, {"dtype": "float64"}, {}, "rollout.engine: vLLM knows no float64; set model.dtype"),
    (True, {"device": "cuda:1"}, {}, "CUDA_VISIBLE_DEVICES=1 and model.device = 'cuda'"),
    (False, {}, {"server": "localhost:8000"}, "rollout.server: 'localhost:8000': write it as http://host:port"),
    (False, {}, {"server": "http://gpu7:port"}, "rollout.server: 'http://gpu7:port': write it as http://host:port"),
    (False, {"device": "cuda:1"}, {"server": "http://gpu7:8000"}, None),
    (False, {}, {"server": "https://[::1]:8000/"}, None),
    (True, {"device": "cuda:0"}, {}, None)])
def test_static_checks(raw: Raw, monkeypatch: pytest.MonkeyPatch, there: bool, model: dict[str, Any],
                       rollout: dict[str, Any], message: str | None) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: SimpleNamespace() if there else None)
    made = raw(rollout={"engine": "vllm", **rollout})
    made = make_config({**made, "model": {**made["model"], "dtype": "float32", **model}})
    if message is None:
        preflight.check_static(made)
        return
    with pytest.raises(UserError, match=message):
        preflight.check_static(made)


def test_a_server_without_its_engine(raw: Raw) -> None:
    with pytest.raises(UserError, match=r"rollout: server: it is a vLLM server; set rollout.engine = 'vllm'"):
        make_config(raw(rollout={"server": "http://localhost:8000"}))
