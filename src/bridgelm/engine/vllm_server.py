"""Draws answers from a vLLM server; weights are sent to it through files in a folder that both programs can read.

Of the ways in which vLLM takes weights from another process, this one needs no GPU on either side. It uses the server's
development endpoints, which have no access control: keep others away from its port (docs/engines.md).

A server is another program, maybe on another machine. It may hang, restart, or not be what it seems. Therefore all
waits end, requests are repeated after faults that may pass, and every answer is checked against its request.
"""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from bridgelm.config.run_config import RunConfig
from bridgelm.engine.base import Caller, Lost
from bridgelm.engine.exchange import clear, write_adapter, write_weights
from bridgelm.engine.vllm import Adapter, Answer, adapter_rank
from bridgelm.errors import UserError

AT_ONCE = 256  # requests that wait for their answer; the server batches them
START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs (docs/engines.md)"
CONNECT = 10.0  # seconds
POLL = 0.2  # seconds between checks whether the run was told to stop
PAUSE, LONGEST = 1.0, 60.0  # seconds before the first retry, doubled for each further one; and the most
PER_TOKEN = 0.1  # seconds that a slow server may take per token of the longest answer
PER_SECOND = 50e6  # bytes of weights that a slow disk reads
ROOM = 2**20  # bytes of an answer besides those for its tokens
PER_ASKED = 2**10  # bytes of an answer per token of the prompt and of the limit, with log-probs and texts
ROUNDING = 1e-4  # by which the log of a probability next to 1 may exceed 0
BUSY = {429, 502, 503, 504}


# -- what is asked, and what comes back --------------------------------------------------------------------------------

class Reply(BaseModel):
    """A part of a reply of the server, checked. It may have further fields."""

    model_config = ConfigDict(strict=True)


LogProb = Annotated[float, Field(le=ROUNDING, allow_inf_nan=False)]


class Model(Reply):
    id: str
    max_model_len: Annotated[int, Field(gt=0)]


class Models(Reply):
    data: Annotated[list[Model], Field(min_length=1)]


class Settings(Reply):
    logprobs_mode: str
    dtype: str


class Config(Reply):
    of_model: Settings = Field(alias="model_config")


class Info(Reply):
    vllm_config: Config


class Reset(Reply):
    success: bool


class LogProbs(Reply):
    token_logprobs: list[LogProb]


class Choice(Reply):
    token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    logprobs: LogProbs
    finish_reason: Literal["stop", "length"]


class Answered(Reply):
    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]


class At(Reply):
    logprob: LogProb


class Scores(Reply):
    prompt_logprobs: list[dict[str, At] | None]


class Scored(Reply):
    choices: Annotated[list[Scores], Field(min_length=1, max_length=1)]


Kind = Literal["busy", "gone", "silent", "wrong"]
T = TypeVar("T", bound=Reply)


class Fault(Exception):
    """A fault that may pass, after which the request is repeated."""

    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(text)
        self.kind: Kind = kind


@dataclass(frozen=True)
class Ask:
    path: str
    body: dict[str, Any] | None = None  # None: GET
    read: Callable[[bytes], Any] = bytes  # checks and parses the reply
    room: int = ROOM  # the most bytes of the reply


def parsed(kind: type[T], text: bytes) -> T:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise Fault("wrong", f"{place + ': ' if place else ''}{first['msg']} (got {first['input']!r:.40})") from None


def read_reset(text: bytes) -> None:
    if not parsed(Reset, text).success:
        raise Fault("busy", "is at work for somebody else while its weights are replaced; a server serves one run")


def read_answer(limit: int, vocabulary: int, text: bytes) -> Answer:
    choice = parsed(Answered, text).choices[0]
    ids, logps = choice.token_ids, choice.logprobs.token_logprobs
    if len(ids) > limit:
        raise Fault("wrong", f"{len(ids)} tokens, and {limit} were asked for")
    if len(logps) != len(ids):
        raise Fault("wrong", f"{len(logps)} log-probs of {len(ids)} tokens")
    if max(ids) >= vocabulary:
        raise Fault("wrong", f"token {max(ids)} of a vocabulary of {vocabulary}")
    if choice.finish_reason == "length" and len(ids) < limit:
        raise Fault("wrong", f"{len(ids)} tokens of {limit}, said to have ended at the limit")
    return Answer(ids, logps, choice.finish_reason == "stop")


def read_scores(ids: Sequence[int], text: bytes) -> list[float]:
    found = parsed(Scored, text).choices[0].prompt_logprobs
    if len(found) != len(ids):
        raise Fault("wrong", f"{len(found)} log-probs of a prompt of {len(ids)} tokens")
    places = [(at or {}).get(str(token)) for token, at in zip(ids[1:], found[1:], strict=True)]
    if None in places:
        raise Fault("wrong", f"token {places.index(None) + 2} of a prompt has no log-prob")
    return [at.logprob for at in places if at is not None]


# -- one connection ----------------------------------------------------------------------------------------------------

class Line:
    """Sends one request after the other, in a thread of its own that can be abandoned."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.socket: socket.socket | None = None
        self.over = False

    def work(self, asks: SimpleQueue[tuple[int, Ask]], answers: SimpleQueue[tuple[int, Any]]) -> None:
        while not self.over:
            try:
                number, ask = asks.get_nowait()
            except Empty:
                return
            try:
                answers.put((number, self.ask(ask)))
            except Exception as error:  # handed to the thread that waits, which raises it
                answers.put((number, error))

    def hang_up(self) -> None:
        self.over = True
        if self.socket is not None:
            with suppress(OSError):  # the socket was closed already
                self.socket.shutdown(socket.SHUT_RDWR)

    def ask(self, ask: Ask) -> Any:
        parts = urlsplit(self.url)
        connection = (HTTPSConnection if parts.scheme == "https" else HTTPConnection)(parts.netloc, timeout=CONNECT)
        try:
            try:
                connection.connect()
            except OSError as error:
                raise Fault("gone", f"cannot be reached ({error}); start it with {START}") from None
            self.socket = connection.sock
            connection.sock.settimeout(None)  # the thread that waits for the answers keeps the time limit and hangs up
            if self.over:
                raise Fault("gone", "is no longer asked")
            data = None if ask.body is None else json.dumps(ask.body).encode()
            connection.request("GET" if data is None else "POST", ask.path, data, {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                text = self._read(response, ask)
        except (OSError, HTTPException) as error:
            raise Fault("gone", f"broke off its answer ({type(error).__name__}: {_line(str(error))})") from None
        finally:
            self.socket = None
            connection.close()
        return ask.read(text)

    def _read(self, response: HTTPResponse, ask: Ask) -> bytes:
        status = response.status
        if 300 <= status < 400:
            target = urlsplit(response.headers.get("Location", "")).netloc or "nowhere"
            raise Lost(f"rollout.server: {self.url} sends on to {_line(target)} ({status}), which is not followed; "
                       "name the server itself")
        if status != 200:
            said = f"answered {status} {_line(response.read(300).decode(errors='replace'))}"
            if status in BUSY:
                raise Fault("busy", said)
            missing = f"; start it with {START}" if status == 404 else ""
            raise Lost(f"rollout.server: {self.url}{ask.path} {said}{missing}")
        text = response.read(ask.room + 1)
        if len(text) > ask.room:
            raise Fault("wrong", f"more than {ask.room} bytes")
        if response.length:
            raise ConnectionError(f"{response.length} bytes are missing")
        return text


def _line(text: str) -> str:
    """The text of an unknown server, shortened and without control characters, for the user's terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:300]).split())


# -- the server --------------------------------------------------------------------------------------------------------

class Server:
    elsewhere = True

    def __init__(self, config: RunConfig, folder: Path, caller: Caller) -> None:
        rollout = config.rollout
        assert rollout.server is not None
        self.url, self.folder, self.caller = rollout.server.rstrip("/"), folder.absolute(), caller
        self.timeout, self.retries = rollout.server_timeout, rollout.server_retries
        self.rank, self.dtype = adapter_rank(config), getattr(torch, config.model.dtype)
        self.name, self.adapted, self.max_length, self.vocabulary = "", False, 0, 0
        self.awaited, self.closed = True, False
        self.given = False  # whether weights were sent to it

    def wake(self, model: Any) -> None:
        """Checks, the first time, whether the server is one that this engine can use."""
        if self.name:
            return
        first = self._ask(Ask("/v1/models", read=partial(parsed, Models))).data[0]
        settings = self._ask(Ask("/server_info?config_format=json", read=partial(parsed, Info))).vllm_config.of_model
        if settings.logprobs_mode != "processed_logprobs":
            raise UserError(f"rollout.server: {self.url} gives {settings.logprobs_mode}, which are not those of the "
                            f"sampling temperature; start it with {START}")
        dtype = settings.dtype.removeprefix("torch.")
        if dtype != str(self.dtype).removeprefix("torch."):
            raise UserError(f"rollout.server: {self.url} computes in {dtype}, and model.dtype is "
                            f"{str(self.dtype).removeprefix('torch.')}; start it with --dtype of the same")
        self.name, self.max_length = first.id, first.max_model_len
        self.vocabulary = model.get_input_embeddings().num_embeddings

    def load(self, named: Iterable[tuple[str, Tensor]]) -> None:
        write_weights(named, self.folder)
        self.adapted = False
        self._give()

    def adapt(self, adapter: Adapter) -> None:
        write_adapter(adapter, self.rank, self.dtype, self.folder)
        self.adapted = True
        self._give()

    def _give(self) -> None:
        """Has the server load the weights in the folder."""
        self.given = True
        if self.adapted:
            self._ask(Ask("/v1/load_lora_adapter", {"lora_name": "bridgelm", "lora_path": str(self.folder),
                                                    "load_inplace": True}), self._reading())
        else:
            self._ask(Ask("/collective_rpc", {"method": "reload_weights",
                                              "kwargs": {"weights_path": str(self.folder)}}), self._reading())
        # The cache holds keys and values of the old weights. Those of different adapters do not mix.
        self._ask(Ask("/reset_prefix_cache", {}, bytes if self.adapted else read_reset))

    def _reading(self) -> float:
        """The seconds that the server may take to read the files."""
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors")) / PER_SECOND

    def complete(self, prompts: Sequence[list[int]], params: Sequence[dict[str, Any]]) -> list[Answer]:
        return self._each([({"prompt": ids, "return_token_ids": True, **p},
                            partial(read_answer, p["max_tokens"], self.vocabulary))
                           for ids, p in zip(prompts, params, strict=True)])

    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        return self._each([({"prompt": ids, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0},
                            partial(read_scores, ids)) for ids in sequences])

    def sleep(self) -> bool:
        """There is nothing to free, as it has a device of its own."""
        return False

    def close(self) -> None:
        self.closed = True
        clear(self.folder)

    def _each(self, asked: Sequence[tuple[dict[str, Any], Callable[[bytes], Any]]]) -> list[Any]:
        name = "bridgelm" if self.adapted else self.name
        asks = [Ask("/v1/completions", {"model": name, **body}, read,
                    ROOM + PER_ASKED * (len(body["prompt"]) + body["max_tokens"])) for body, read in asked]
        return self._all(asks, PER_TOKEN * max((body["max_tokens"] for body, _ in asked), default=0), self._again)

    def _again(self) -> None:
        """Sends the weights again after a fault, as a server that was restarted does not have them."""
        if self.given:
            self._give()

    def _ask(self, ask: Ask, longer: float = 0.0) -> Any:
        return self._all([ask], longer)[0]

    def _all(self, asks: Sequence[Ask], longer: float, mend: Callable[[], None] = lambda: None) -> list[Any]:
        """The answers to all requests, in rounds: those that failed in one round are repeated in the next, up to a
        limit per kind of fault."""
        found: dict[int, Any] = {}
        allowed = {"busy": self.retries, "gone": self.retries, "silent": 1, "wrong": 1}
        met = Counter[str]()
        while len(found) < len(asks):
            faults = self._round({i: ask for i, ask in enumerate(asks) if i not in found}, found, self.timeout + longer)
            for kind in {fault.kind for fault in faults}:
                met[kind] += 1
            for fault in faults:
                if met[fault.kind] > allowed[fault.kind]:
                    raise Lost(f"rollout.server: {self.url} {_said(fault)}, at {met[fault.kind]} tries")
            if faults:
                pause = min(LONGEST, PAUSE * 2**(met.total() - 1))
                self.caller.say(f"rollout.server: {self.url} {_said(faults[0])}; {len(asks) - len(found)} of "
                                f"{len(asks)} requests again in {pause:g} s")
                self._pause(pause)
                if any(fault.kind in ("gone", "busy") for fault in faults):
                    mend()
        return [found[i] for i in range(len(asks))]

    def _round(self, asks: Mapping[int, Ask], found: dict[int, Any], limit: float) -> list[Fault]:
        """Sends each request once. The round ends if no answer is completed for `limit` seconds, so a long queue is no
        fault."""
        waiting, answers = SimpleQueue[tuple[int, Ask]](), SimpleQueue[tuple[int, Any]]()
        for item in asks.items():
            waiting.put(item)
        lines = [Line(self.url) for _ in range(min(AT_ONCE, len(asks)))]
        faults: list[Fault] = []
        try:
            for line in lines:
                # The threads are daemons, so that a connection that hangs does not keep the program from ending.
                Thread(target=line.work, args=(waiting, answers), name="vllm server", daemon=True).start()
            heard, missing = time.monotonic(), len(asks)
            while missing:
                self._heed()
                try:
                    number, answer = answers.get(timeout=POLL)
                except Empty:
                    if time.monotonic() - heard > limit:
                        return [*faults, Fault("silent", f"gave no answer in {limit:g} s")]
                    continue
                heard, missing = time.monotonic(), missing - 1
                if isinstance(answer, Fault):
                    faults.append(answer)
                elif isinstance(answer, Exception):
                    raise answer
                else:
                    found[number] = answer
        finally:
            for line in lines:
                line.hang_up()
        return faults

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._heed()
            time.sleep(min(POLL, left))

    def _heed(self) -> None:
        if self.closed or (self.awaited and self.caller.stopping()):
            raise Lost(f"rollout.server: {self.url} is no longer waited for")


def _said(fault: Fault) -> str:
    return f"gave a wrong answer: {fault}" if fault.kind == "wrong" else str(fault)
