"""A vLLM server as the place where answers are drawn: weights go to it through files in a folder that both can read.

Of vLLM's ways between processes this is the one that needs no GPU on either side. It is served by its development
endpoints, which have no access control: keep the server's port away from others (docs/engines.md).
"""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridgelm.config import RunConfig
from bridgelm.engine.exchange import write_adapter, write_weights
from bridgelm.engine.vllm import Adapter, Answer, adapter_rank
from bridgelm.errors import UserError

AT_ONCE = 256  # requests that wait for their answer; the server batches them
START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs (docs/engines.md)"


class Server:
    elsewhere = True

    def __init__(self, config: RunConfig, folder: Path) -> None:
        assert config.rollout.server is not None
        self.url, self.folder = config.rollout.server.rstrip("/"), folder.absolute()
        self.rank, self.dtype = adapter_rank(config), getattr(torch, config.model.dtype)
        self.name, self.adapted, self.max_length = "", False, 0

    def wake(self, model: Any) -> None:
        """The first time looks whether the server is one that this engine can use."""
        if self.name:
            return
        models = self._call("/v1/models")["data"]
        settings = self._call("/server_info?config_format=json")["vllm_config"]["model_config"]
        if settings["logprobs_mode"] != "processed_logprobs":
            raise UserError(f"rollout.server: {self.url} gives {settings['logprobs_mode']}, which are not those of the "
                            f"sampling temperature; start it with {START}")
        dtype = str(settings["dtype"]).removeprefix("torch.")
        if dtype != str(self.dtype).removeprefix("torch."):
            raise UserError(f"rollout.server: {self.url} computes in {dtype}, and model.dtype is "
                            f"{str(self.dtype).removeprefix('torch.')}; start it with --dtype of the same")
        self.name, self.max_length = models[0]["id"], models[0]["max_model_len"]

    def load(self, named: Iterable[tuple[str, Tensor]]) -> None:
        write_weights(named, self.folder)
        self._call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}})
        if not self._call("/reset_prefix_cache", {})["success"]:  # keys and values of the old weights
            raise UserError(f"rollout.server: {self.url} is at work for somebody else while its weights are replaced; "
                            "a server serves one run")
        self.adapted = False

    def adapt(self, adapter: Adapter) -> None:
        write_adapter(adapter, self.rank, self.dtype, self.folder)
        self._call("/v1/load_lora_adapter", {"lora_name": "bridgelm", "lora_path": str(self.folder),
                                             "load_inplace": True})
        self._call("/reset_prefix_cache", {})
        self.adapted = True

    def complete(self, prompts: Sequence[list[int]], params: Sequence[dict[str, Any]]) -> list[Answer]:
        found = self._each([{"prompt": ids, "return_token_ids": True, **p}
                            for ids, p in zip(prompts, params, strict=True)])
        return [Answer(c["token_ids"], c["logprobs"]["token_logprobs"], c["finish_reason"] == "stop") for c in found]

    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        found = self._each([{"prompt": ids, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0}
                            for ids in sequences])
        return [[at[str(token)]["logprob"] for token, at in zip(ids[1:], c["prompt_logprobs"][1:], strict=True)]
                for ids, c in zip(sequences, found, strict=True)]

    def sleep(self) -> bool:
        """It has a device of its own."""
        return False

    def close(self) -> None:
        for file in self.folder.glob("*"):
            file.unlink()

    def _each(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        name = "bridgelm" if self.adapted else self.name

        def one(body: dict[str, Any]) -> dict[str, Any]:
            return self._call("/v1/completions", {"model": name, **body})["choices"][0]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(one, bodies))

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request) as answer:
                text = answer.read()
                kind = answer.headers.get_content_type()
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")[:300]
            missing = f"; start it with {START}" if error.code == 404 else ""
            raise UserError(f"rollout.server: {self.url}{path} answered {error.code} {reason}{missing}") from None
        except OSError as error:
            raise UserError(f"rollout.server: {self.url} cannot be reached ({error}); start it with {START}") from None
        return json.loads(text) if text and kind == "application/json" else None
