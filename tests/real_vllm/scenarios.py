"""What is tried with a real vLLM, each in a process of its own: `python tests/real_vllm/scenarios.py NAME ...`, with
`tests` and `tests/real_vllm` on the path. The last line of the output is what was found."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bridgelm import dist
from bridgelm.config.run_config import RunConfig, make_config
from bridgelm.data.chat import load_chat
from bridgelm.engine import NativeEngine, Origin, Request, Sampling, open_engine
from bridgelm.engine.vllm import VllmEngine
from bridgelm.ledger import Ledger
from bridgelm.model.loading import load_model
from bridgelm.model.policy import Policy
from bridgelm.types import Completion, Problem, Row

PROMPTS = [[3, 8, 9, 4], [3, 28, 7, 25, 9, 26, 4], [3, 4], [3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 4], [3, 8, 9, 4]]
EOS = frozenset({1, 12})


def config(folder: Path, **sections: Any) -> RunConfig:
    raw = {"name": "run", "steps": 4, "method": {"name": "bridge", "rank": 3}, "data": {"train": "toy:walk"},
           "reward": {"verifier": "toy"}, "model": {"name_or_path": str(folder), "device": "cpu"},
           "rollout": {"engine": "vllm", "max_new_tokens": 16, "vllm": {"memory": 0.05}}}
    for key, value in sections.items():
        raw[key] = {**raw.get(key, {}), **value}
    return make_config(raw)


def shake(policy: Policy, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for group in policy.groups.values():
            for t in group.flat().values():
                t.add_(0.05 * torch.randn(t.shape, generator=generator, dtype=t.dtype))
    policy.live.stale = True


def compare(policy: Policy, at: str, engine: VllmEngine, native: NativeEngine, found: dict[str, Any]) -> None:
    """One sync: greedy tokens and log-probs of the native engine, log-probs of samples by the trainer's own forward."""
    asked = [Request(np.array(p), (7, i)) for i, p in enumerate(PROMPTS)]
    with policy.origin(at) as origin:
        greedy = [e.generate(origin, asked, Sampling(16, 0.0)) for e in (native, engine)]
        for mine, theirs in zip(*greedy, strict=True):
            found["greedy"][1] += 1
            same = mine.ids.tolist() == theirs.ids.tolist()
            found["greedy"][0] += same
            if same:
                worst(found, mine.raw_logps - theirs.raw_logps)
        for temperature in (1.0, 0.7):
            for request, done in zip(asked, engine.generate(origin, asked, Sampling(16, temperature)), strict=True):
                worst(found, done.logps - trainers(policy, at, request, done, temperature))
                worst(found, done.raw_logps - trainers(policy, at, request, done, 1.0))
    found["verified"] += 1


def worst(found: dict[str, Any], gap: np.ndarray) -> None:
    found["logps"] = max(found["logps"], float(np.abs(gap).max(initial=0.0)))


def trainers(policy: Policy, at: str, request: Request, done: Completion, temperature: float) -> np.ndarray:
    ids = np.concatenate([request.prompt, done.ids])
    row = Row(ids, np.arange(len(ids)) >= len(request.prompt), "rollout", Problem("p", ({"role": "user",
              "content": ""},)), temperature=temperature)
    return policy.score([row], at)[0][len(request.prompt):]


def parity(model: str, lora: int, server: str | None = None) -> dict[str, Any]:
    """Several new sets of weights, and the shadow's beside them."""
    folder = Path(tempfile.mkdtemp())
    made = config(Path(model), model={"lora_rank": lora, "lora_modules": "q_proj|o_proj|down_proj" if lora else ""},
                  rollout={"server": server})
    policy = Policy(load_model(made.model), made.optim, Ledger(1), 4096, 0, (lora, 16.0, made.model.lora_modules)
                    if lora else None)
    policy.add_w(3, 3.0, "q_proj|up_proj")
    policy.fork("shadow")
    chat = load_chat(made.model)
    engine, native = open_engine(made, chat, folder / "exchange"), NativeEngine(EOS, 0, chat.text)
    assert isinstance(engine, VllmEngine)
    engine.eos_ids = EOS
    found: dict[str, Any] = {"greedy": [0, 0], "logps": 0.0, "verified": 0}
    for step in range(4):
        for at in ("live", "shadow"):
            compare(policy, at, engine, native, found)
        compare(policy, "live", engine, native, found)
        before = engine.syncs
        compare(policy, "live", engine, native, found)
        assert engine.syncs == before, "nothing changed"
        shake(policy, step)
    if lora:  # the end of a stage: the base itself is another one now
        policy.absorb()
        compare(policy, "live", engine, native, found)
    if Path(model).name != "toy":  # which ends at once where nothing is asked
        details(Origin(load_model(made.model)), engine, native)
    found["syncs"] = engine.syncs
    engine.close()
    return found


def details(origin: Origin, engine: VllmEngine, native: NativeEngine) -> None:
    """Rooms, end tokens, stop strings, seeds."""
    asked = [Request(np.array(p), (7, i), room) for i, (p, room) in enumerate(zip(PROMPTS, (0, 3, 16, 7, 16)))]
    ends = [e.generate(origin, asked, Sampling(16, 0.0)) for e in (native, engine)]
    assert [(c.ids.tolist(), c.finished) for c in ends[0]] == [(c.ids.tolist(), c.finished) for c in ends[1]]
    index, longest = max(enumerate(c.ids for c in ends[0]), key=lambda pair: len(pair[1]))
    stop = (next(filter(None, (native.text(longest[i:i + 1]).strip() for i in range(1, len(longest))))),)
    cut = [e.generate(origin, asked, Sampling(16, 0.0, stop)) for e in (native, engine)]
    assert [(c.ids.tolist(), c.finished) for c in cut[0]] == [(c.ids.tolist(), c.finished) for c in cut[1]]
    assert len(cut[0][index].ids) < len(longest), "the stop string was met"
    ledgers = Ledger(1), Ledger(1)
    for e, ledger in zip((native, engine), ledgers):
        e.generate(origin, asked, Sampling(16, 0.0), ledger)
    assert ledgers[0] == ledgers[1]
    drawn = [[c.ids.tolist() for c in engine.generate(origin, [Request(np.array(PROMPTS[1]), (seed, i))
              for i in range(8)], Sampling(16))] for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({tuple(ids) for ids in drawn[0]}) > 1


def train_toy(model: str, engine: str, seed: int, steps: int, lora: int = 0,
              server: str | None = None, ahead: bool = False, shard: bool = False) -> dict[str, Any]:
    """The embedded task with grpo: rewards a step; with vLLM each new set of weights is looked at before it is used."""
    from bridgelm.config.run_config import load_config
    from bridgelm.training.loop import train

    found: dict[str, Any] = {"greedy": [0, 0], "logps": 0.0, "verified": 0}
    sync = VllmEngine._sync

    def verified(self: VllmEngine, origin: Origin) -> None:
        before = self.syncs
        sync(self, origin)
        if self.syncs > before:
            verify(self, origin, found)
    VllmEngine._sync = verified  # type: ignore[method-assign]
    recipe = Path(__file__).parents[2] / "recipes" / "toy" / "grpo.toml"
    raw = load_config(recipe, [f"seed={seed}", f"steps={steps}", "optim.lr=3e-4", "threads=1"]).resolved()
    raw["out"] = os.environ.get("BRIDGELM_TEST_OUT") or tempfile.mkdtemp()  # several ranks have the same
    raw["model"] = {**raw["model"], "name_or_path": model, "dtype": "float32",
                    "device": "cpu", "lora_rank": lora}
    raw["shard"] = shard
    raw["eval"] |= {"every": steps, "problems": 50}
    raw["rollout"] |= {"engine": engine, "server": server, "ahead": ahead, "vllm": {"memory": 0.05}}
    run = train(make_config(raw), quiet=True)
    events = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    taken = [event for event in events if event["event"] == "step"]
    kept = ("engine/mismatch_mean", "engine/mismatch_max", "engine/mismatch_kl", "engine/truncated")
    stale = [event.get("engine/stale_steps", 0.0) for event in taken]
    return {**found, "reward": [event["reward"] for event in taken],
            "mismatch": {key: max(event[key] for event in taken) for key in kept if key in taken[0]},
            "stale": sum(stale),
            "warnings": [event["text"] for event in events if event["event"] == "warning"],
            "seconds": [round(event["time/rollout"], 3) for event in taken]}


def verify(engine: VllmEngine, origin: Origin, found: dict[str, Any]) -> None:
    """The engine, just given new weights, against the native one on the same."""
    native = NativeEngine(engine.eos_ids, 0, engine.text)
    asked = [Request(np.array(p)) for p in PROMPTS]
    both = [native.generate(origin, asked, Sampling(16, 0.0)), engine.generate(origin, asked, Sampling(16, 0.0))]
    for mine, theirs in zip(*both, strict=True):
        same = mine.ids.tolist() == theirs.ids.tolist()
        found["greedy"] = [found["greedy"][0] + same, found["greedy"][1] + 1]
        if same:
            worst(found, mine.raw_logps - theirs.raw_logps)
    found["verified"] += 1


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    with dist.joined():
        found = globals()[name](*(json.loads(word) for word in rest))
        if dist.first():
            print(json.dumps(found))
