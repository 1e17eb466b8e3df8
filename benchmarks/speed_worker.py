"""One system of a speed measurement, alive in a process of its own: `python speed_worker.py SPEC` with a JSON object.

It says `{"ready": ...}` once it has warmed up; for each line it then reads it does its work once and answers with the
CPU seconds of all its threads and the tokens that it drew. Only the standard library is imported before a system needs
more: each runs in its own environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent)]
Found = dict[str, float]


def reward(prompts: Any, completions: list[Any], **columns: Any) -> list[float]:
    """Costs nothing and no two answers have the same: no group is flat, in no system."""
    return [zlib.crc32(str(c).encode()) % 9973 / 9973 for c in completions]


# -- whole steps -----------------------------------------------------------------------------------------------------

def our_step(spec: dict[str, Any]) -> Iterator[Found]:
    from bridgelm.config.run_config import make_config
    from bridgelm.training import loop
    from tiny import open_session

    folder = Path(spec["folder"])
    raw = {"name": f"{spec['name']}-{os.getpid()}", "out": f"{folder}/runs", "steps": 10**6, "checkpoint_every": 0,
           "threads": 1, "model": {"name_or_path": str(folder), "dtype": spec["dtype"]},
           "data": {key: f"{folder}/{key}.jsonl" for key in ("train", "validation", "test")},
           "method": spec["method"], "reward": {"verifier": "none", "functions": [f"{__file__}:reward"]},
           "rollout": {"prompts": spec["prompts"], "group": spec["group"], "max_new_tokens": spec["length"]},
           "batch": {"demos": spec.get("demos", 1), "micro_tokens": spec["micro_tokens"]},
           "eval": {"every": 0}, "log": {"samples": 0}}
    session = open_session(make_config(raw), exact=False)
    settle, at = session.roll.settle, [0.0]

    def settled(rows: Any) -> Any:
        at[0] = time.process_time()
        return settle(rows)

    session.roll.settle = settled
    while True:
        begun, before = time.process_time(), session.policy.ledger.state()
        session.event("step", **loop.take_step(session))
        after = session.policy.ledger.state()
        yield {"training": time.process_time() - at[0], "gathering": at[0] - begun,
               **{key: after[key] - before[key] for key in ("generate", "score", "train", "rollouts")}}


def trl_step(spec: dict[str, Any]) -> Iterator[Found]:
    """TRL's own loop, which is stopped between two steps: a generator cannot, so a callback waits."""
    import datasets
    import speed_model
    import torch
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    count = spec["prompts"] * spec["group"]
    lengths: list[int] = []

    def counted(prompts: Any, completions: Any, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return reward(prompts, completions)

    settings = {"num_generations": spec["group"], "per_device_train_batch_size": spec["micro_rows"],
                "gradient_accumulation_steps": count // spec["micro_rows"], "max_completion_length": spec["length"],
                "temperature": 1.0, "beta": 0.0, "loss_type": "dapo", "scale_rewards": "none", "epsilon": 0.2,
                "epsilon_high": 0.28, "learning_rate": 1e-6, "max_grad_norm": 1.0, "lr_scheduler_type": "constant",
                "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "report_to": "none",
                "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True, "max_steps": 10**6,
                "model_init_kwargs": {"dtype": spec["dtype"]}, "output_dir": f"{spec['folder']}/trl"}
    rows = [[{"role": "user", "content": prompt}] for prompt in speed_model.prompts(64)]
    transformers.logging.set_verbosity_error()
    # What AutoTokenizer makes of a word-level tokenizer beside a Qwen2 knows none of its words.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(spec["folder"])
    asked = tokenizer.apply_chat_template(rows[0], add_generation_prompt=True, return_dict=False)
    assert len(asked) == speed_model.PROMPT + 2
    assert tokenizer.unk_token_id not in asked

    class Pause(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **named: Any) -> None:
            seconds = time.process_time() - self.begun
            answer({"seconds": seconds, "generate": float(sum(lengths)), "rollouts": float(len(lengths))})
            lengths.clear()
            wait()
            self.begun = time.process_time()

    pause = Pause()
    trainer = GRPOTrainer(model=spec["folder"], reward_funcs=counted, args=GRPOConfig(**settings),
                          processing_class=tokenizer,
                          train_dataset=datasets.Dataset.from_dict({"prompt": rows}), callbacks=[pause])
    torch.set_num_threads(1)
    pause.begun = time.process_time()
    trainer.train()
    yield {}


# -- rollouts alone --------------------------------------------------------------------------------------------------

def prompt_ids(spec: dict[str, Any]) -> list[list[int]]:
    import speed_model

    known = {mark: i for i, mark in enumerate(speed_model.MARKS)}
    return [[known["<user>"], *(int(w[1:]) + len(known) for w in text.split()), known["<bot>"]]
            for text in speed_model.prompts(spec["prompts"])]


def loaded(spec: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=getattr(torch, spec["dtype"])).eval()


def our_rollouts(spec: dict[str, Any]) -> Iterator[Found]:
    import numpy as np

    from bridgelm.engine import NativeEngine, Origin, Request, Sampling

    model, ids = loaded(spec), [np.array(p, dtype=np.int64) for p in prompt_ids(spec)]
    engine = NativeEngine(frozenset({1}), 0, str, 10**6)
    for step in range(10**6):
        asked = [Request(p, (step, i, g)) for i, p in enumerate(ids) for g in range(spec["group"])]
        yield {"generate": sum(len(c.ids) for c in engine.generate(Origin(model), asked, Sampling(spec["length"])))}


def hf_rollouts(spec: dict[str, Any]) -> Iterator[Found]:
    import torch

    model, ids = loaded(spec), torch.tensor(prompt_ids(spec))
    torch.manual_seed(0)
    while True:
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0,
                                 top_p=1.0, max_new_tokens=spec["length"], num_return_sequences=spec["group"],
                                 eos_token_id=1, pad_token_id=0)[:, ids.shape[1]:]
        ended = (out == 1).long()
        yield {"generate": float(((ended.cumsum(1) - ended) == 0).sum())}


def vllm_rollouts(spec: dict[str, Any]) -> Iterator[Found]:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
                   "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    ids, count = prompt_ids(spec), spec["prompts"] * spec["group"]
    engine = LLM(spec["folder"], dtype=spec["dtype"], enforce_eager=True, max_model_len=len(ids[0]) + spec["length"],
                 max_num_seqs=count, disable_log_stats=True)
    params = SamplingParams(n=spec["group"], temperature=1.0, max_tokens=spec["length"], stop_token_ids=[1])
    while True:
        found = engine.generate([{"prompt_token_ids": p} for p in ids], params, use_tqdm=False)
        yield {"generate": float(sum(len(one.token_ids) for request in found for one in request.outputs))}


# -- the conversation --------------------------------------------------------------------------------------------------

SYSTEMS: dict[str, Callable[[dict[str, Any]], Iterator[Found]]] = {
    "bridgelm": our_step, "trl": trl_step, "native": our_rollouts, "generate": hf_rollouts, "vllm": vllm_rollouts}
OUT = os.fdopen(os.dup(1), "w")  # libraries may print to the usual one


def answer(record: dict[str, Any]) -> None:
    OUT.write(json.dumps(record) + "\n")
    OUT.flush()


def wait() -> None:
    """For the next turn; the process ends with the conversation."""
    if not sys.stdin.readline():
        os._exit(0)


def main() -> None:
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    spec = json.loads(sys.argv[1])
    work = SYSTEMS[spec["system"]](spec)
    import torch

    torch.set_num_threads(1)
    while True:
        begun = time.process_time()
        found = next(work)
        answer({"seconds": time.process_time() - begun, **found})
        wait()


if __name__ == "__main__":
    main()
