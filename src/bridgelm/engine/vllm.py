"""vLLM as the rollout engine, in this process or on a server: sends it the policy's weights when they have changed.

In full training all merged weights are copied to it, in low-rank training one adapter. The policy merges into tensors
of its own; nothing is merged in place here. The log-probs of vLLM differ a little from those of the trainer.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bridgelm import dist
from bridgelm.config.options import parts
from bridgelm.config.run_config import RunConfig
from bridgelm.data.chat import Chat
from bridgelm.data.model_shapes import model_path
from bridgelm.engine.base import Done, Origin, Request, Sampling, spent, stopped
from bridgelm.engine.exchange import write_adapter
from bridgelm.errors import UserError
from bridgelm.ledger import Ledger
from bridgelm.types import Completion

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the adapter ranks that vLLM supports


@dataclass(frozen=True)
class Answer:
    ids: list[int]
    logps: list[float]  # at the sampling temperature
    stopped: bool  # whether it ended at an end token or a stop string, not at its limit


Adapter = Mapping[str, tuple[Tensor, Tensor]]


class Backend(Protocol):
    """A place where vLLM runs: in this process, or as a server. Sampling parameters have the names that vLLM uses."""

    max_length: int  # the most tokens of a prompt and its answer
    elsewhere: bool  # whether it has a device of its own
    awaited: bool  # whether the run waits for its answers now

    def wake(self, model: Any) -> None:
        """Makes it ready; `model` has the architecture that it will draw from."""
        ...

    def load(self, named: Iterable[tuple[str, Tensor]]) -> None: ...
    def adapt(self, adapter: Adapter) -> None: ...
    def complete(self, prompts: Sequence[list[int]], params: Sequence[dict[str, Any]]) -> list[Answer]: ...
    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """The log-probs at temperature 1 of all tokens but the first."""
        ...

    def sleep(self) -> bool:
        """Frees device memory; returns whether the weights must be sent again afterwards."""
        ...

    def close(self) -> None: ...


class VllmEngine:
    exact = False

    def __init__(self, backend: Backend, chat: Chat, low_rank: bool) -> None:
        self.backend, self.eos_ids, self.text = backend, chat.eos_ids, chat.text
        self.held: tuple[int, int] | None = None  # the version of its weights
        self.base = low_rank  # whether its weights, apart from an adapter, are those of the model's folder
        self.syncs = 0
        self.workers = ThreadPoolExecutor(1)
        self.running: Future[list[Completion]] | None = None

    def generate(self, origin: Origin, requests: Sequence[Request], sampling: Sampling, ledger: Ledger | None = None,
                 done: Done | None = None) -> list[Completion]:
        found = self.start(origin, requests, sampling)()
        if ledger is not None:
            ledger.generate += spent(requests, found)
        return found

    def start(self, origin: Origin, requests: Sequence[Request],
              sampling: Sampling) -> Callable[[], list[Completion]]:
        self._join()
        self.backend.wake(origin.model)
        self._sync(origin)
        if not self.backend.elsewhere:  # it shares the trainer's device
            found = self._draw(requests, sampling)
            return lambda: found
        self.backend.awaited = False
        self.running = running = self.workers.submit(self._draw, requests, sampling)
        return lambda: self._wait(running)

    def _wait(self, running: Future[list[Completion]]) -> list[Completion]:
        self.backend.awaited = True
        return running.result()

    def _join(self) -> None:
        """Waits for answers that are being drawn, as weights are replaced only between draws."""
        if self.running is not None:
            self._wait(self.running)

    def _draw(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        rooms = [sampling.max_new_tokens if r.room is None else r.room for r in requests]
        asked = [i for i, room in enumerate(rooms) if room > 0]
        prompts = [requests[i].prompt.tolist() for i in asked]
        needed = max((len(prompt) + rooms[i] for prompt, i in zip(prompts, asked, strict=True)), default=0)
        if needed > self.backend.max_length:
            raise UserError(f"rollout.vllm.max_length: a prompt and its answer may need {needed} tokens, over vLLM's "
                            f"{self.backend.max_length}; raise it (on a server: --max-model-len), or lower "
                            "rollout.max_new_tokens")
        answers = self.backend.complete(prompts, [self._params(requests[i], rooms[i], sampling) for i in asked])
        answers = [self._cut(answer, sampling.stop) for answer in answers]
        raw = self._raw(prompts, answers, sampling)
        made = {i: _completion(answer, logps, sampling) for i, answer, logps in zip(asked, answers, raw, strict=True)}
        empty = Completion(np.empty(0, np.int64), np.empty(0), np.empty(0), False)
        return [made.get(i, empty) for i in range(len(requests))]

    def sleep(self) -> None:
        if self.backend.sleep():
            self.held = None

    def close(self) -> None:
        self.backend.close()  # first, as it ends a wait for answers that are no longer needed
        self.workers.shutdown()

    def _sync(self, origin: Origin) -> None:
        if origin.version is not None and origin.version == self.held:
            return
        if self.base and origin.adapter is not None:
            self.backend.adapt(origin.adapter)
        else:
            # Tied weights are given under each of their names, as vLLM may hold them separately.
            self.backend.load(origin.model.named_parameters(remove_duplicate=False))
            self.base = False
        self.held = origin.version
        self.syncs += 1

    def _params(self, request: Request, room: int, sampling: Sampling) -> dict[str, Any]:
        seed = int(np.random.SeedSequence(request.seed).generate_state(1, np.uint64)[0] >> 1)
        # End tokens are named here, as those that vLLM reads from the model's folder may differ.
        return {"temperature": sampling.temperature, "seed": seed, "max_tokens": room, "logprobs": 0,
                "ignore_eos": True, "stop_token_ids": sorted(self.eos_ids),
                **({"stop": list(sampling.stop)} if sampling.stop else {})}

    def _cut(self, answer: Answer, stop: tuple[str, ...]) -> Answer:
        """Cuts an answer where the native engine would have ended it, as vLLM detokenizes differently."""
        end = next((n for n in range(1, len(answer.ids)) if stopped(answer.ids[:n], stop, self.text)), None)
        return answer if end is None else Answer(answer.ids[:end], answer.logps[:end], True)

    def _raw(self, prompts: Sequence[list[int]], answers: Sequence[Answer], sampling: Sampling) -> list[list[float]]:
        """The log-probs at temperature 1. vLLM gives only those at the sampling temperature, so these take a further
        pass."""
        if sampling.temperature in (0.0, 1.0):
            return [answer.logps for answer in answers]
        scored = self.backend.score([prompt + answer.ids for prompt, answer in zip(prompts, answers, strict=True)])
        return [logps[len(prompt) - 1:] for prompt, logps in zip(prompts, scored, strict=True)]


def _completion(answer: Answer, raw: list[float], sampling: Sampling) -> Completion:
    logps = np.array(answer.logps) if sampling.temperature > 0 else np.zeros(len(answer.ids))
    if not (np.isfinite(raw).all() and np.isfinite(logps).all()):
        raise FloatingPointError("vLLM's log-probs are not finite")
    return Completion(np.array(answer.ids, dtype=np.int64), np.array(raw), logps, answer.stopped)


def adapter_rank(config: RunConfig) -> int:
    """The rank of the one adapter that stands for theta's and, if the method has a w, also for that of w."""
    return config.model.lora_rank and config.model.lora_rank + max(getattr(p, "rank", 0) for p in parts(config.method))


def _linear(model: Any) -> list[str]:
    """The names of the model's linear layers, without their paths and without the output head."""
    head = model.get_output_embeddings()
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules()
                   if isinstance(module, torch.nn.Linear) and module is not head})


class InProcess:
    """vLLM in this process, on the trainer's device; it is opened when it is first needed."""

    elsewhere = False
    awaited = True

    def __init__(self, config: RunConfig) -> None:
        self.config, self.rank = config, adapter_rank(config)
        self.folder = Path(tempfile.mkdtemp(prefix="bridgelm-adapter-"))
        self.adapters = self.max_length = 0
        self.vllm: Any = None
        self.llm: Any = None
        self.asleep = False
        self.can_sleep = config.rollout.vllm.sleep and torch.cuda.is_available()

    def wake(self, model: Any) -> None:
        if self.llm is None:
            self.llm = self._open(model)
            self.max_length = self.llm.model_config.max_model_len
        elif self.asleep:
            gc.collect()
            torch.cuda.empty_cache()  # memory that the trainer's allocator caches would be missing for vLLM
            self.llm.wake_up()
            self.asleep = False

    def _open(self, trained: Any) -> Any:
        # vLLM must run in this process, as the weights come from an iterator; and no usage statistics are sent.
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # VLLM must not pin the threads, which are the trainer's too.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        self.vllm = import_module("vllm")
        model, rollout, own = self.config.model, self.config.rollout, self.config.rollout.vllm
        lora = {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1,
                # No adapter is on the output head, and an adapter there makes vLLM fail where prompts are scored.
                "lora_target_modules": _linear(trained),
                "max_lora_rank": next((r for r in RANKS if r >= self.rank), self.rank)} if self.rank else {}
        group = {}
        if dist.world() > 1:  # each rank has an engine of its own, which joins the existing process group
            group = {"distributed_executor_backend": "external_launcher"}
            # Closing vLLM would destroy that group, which is ours.
            vars(import_module("vllm.distributed.parallel_state"))["destroy_distributed_environment"] = lambda: None
        try:
            return self.vllm.LLM(
                model_path(model.name_or_path), revision=model.revision, dtype=model.dtype, seed=0,
                # In full training all weights are sent before it draws; adapters need the weights of the folder.
                load_format="auto" if self.rank else "dummy", max_model_len=self._longest(),
                logprobs_mode="processed_logprobs", gpu_memory_utilization=own.memory, enable_prefix_caching=True,
                enforce_eager=own.eager or not torch.cuda.is_available(), enable_sleep_mode=self.can_sleep,
                max_num_seqs=min(1024, rollout.prompts * rollout.group), disable_log_stats=True, **lora, **group)
        except (ValueError, RuntimeError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(f"rollout.engine: vLLM cannot open {model.name_or_path!r} ({reason}); see rollout.vllm, or "
                            "set rollout.engine = 'native'") from error

    def _longest(self) -> int:
        """The length limit to open vLLM with, which it refuses if the model has fewer positions."""
        from transformers import AutoConfig

        config, model = self.config, self.config.model
        limit = max(config.rollout.max_new_tokens, config.eval.max_new_tokens or 0)
        wanted = config.rollout.vllm.max_length or config.data.max_prompt_tokens + limit
        found = AutoConfig.from_pretrained(model_path(model.name_or_path), revision=model.revision)
        return min(wanted, getattr(found, "max_position_embeddings", wanted))

    def load(self, named: Iterable[tuple[str, Tensor]]) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": ((n, p.detach()) for n, p in named)})
        self.llm.reset_prefix_cache()  # keys and values of the old weights
        self.adapters = 0

    def adapt(self, adapter: Adapter) -> None:
        self.adapters += 1
        write_adapter(adapter, self.rank, getattr(torch, self.config.model.dtype), self.folder)

    def complete(self, prompts: Sequence[list[int]], params: Sequence[dict[str, Any]]) -> list[Answer]:
        made = [self.vllm.SamplingParams(**p, detokenize="stop" in p) for p in params]
        out = []
        for done in self._run(prompts, made):
            found = done.outputs[0]
            logps = [at[token].logprob for token, at in zip(found.token_ids, found.logprobs, strict=True)]
            out.append(Answer(list(found.token_ids), logps, found.finish_reason == "stop"))
        return out

    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        made = self.vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        return [[at[token].logprob for token, at in zip(ids[1:], done.prompt_logprobs[1:], strict=True)]
                for ids, done in zip(sequences, self._run(sequences, made), strict=True)]

    def _run(self, prompts: Sequence[list[int]], params: Any) -> list[Any]:
        lora = None
        if self.adapters:
            request = import_module("vllm.lora.request").LoRARequest
            lora = request(f"adapter-{self.adapters}", self.adapters, str(self.folder))
        return self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False,
                                 lora_request=lora)

    def sleep(self) -> bool:
        if self.llm is None or self.asleep or not self.can_sleep:
            return False
        # Weights that are sent again can be dropped; those under an adapter are moved to main memory.
        whole = not self.rank
        self.llm.sleep(level=2 if whole else 1)
        self.asleep = True
        return whole

    def close(self) -> None:
        self.llm = None
        gc.collect()
        shutil.rmtree(self.folder, ignore_errors=True)
