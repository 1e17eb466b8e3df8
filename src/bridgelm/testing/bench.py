"""One update taken again and again, and two runs compared to the bit: what the checks of a method are made of."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bridgelm.config.run_config import RunConfig
from bridgelm.data.chat import load_chat
from bridgelm.data.cursors import Data, check_lengths, load_splits
from bridgelm.methods import build
from bridgelm.methods.base import check_needs
from bridgelm.model import batching, grads
from bridgelm.runs.folder import RunFolder
from bridgelm.runs.progress import Progress
from bridgelm.training import checkpoint, loop
from bridgelm.types import Grade, Live, Micro, Problem, Row, Verdict
from bridgelm.verify import build_verifier

ONCE = {"bridge/gain_honest"}  # said by the first update after a probe
UNKNOWN = {"bridge/gain_se"}  # has no value where nothing differs


def exact_norms(model: Any) -> Any:
    """Hugging Face's RMS norms compute in float32 whatever the model's dtype; these compute in the input's own."""
    def patched(module: Any) -> None:
        eps: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        shift = 1.0 if type(module).__name__.startswith("Gemma") else 0.0

        def forward(x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (shift + module.weight)
        module.forward = forward

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            patched(module)
    return model


def open_session(config: RunConfig, exact: bool = True) -> Any:
    """What `bridgelm train` builds before its first step, in a new run folder."""
    chat = load_chat(config.model)
    data = Data(check_lengths(load_splits(config), chat, config), config.seed)
    method = build(config.method, config)
    check_needs(method, data)
    folder = RunFolder.create(Path(config.out) / config.name, config)
    session = loop._session(config, data, chat, method, build_verifier(config.reward), folder,
                            Progress(config.name, config.steps, quiet=True))
    if exact:
        exact_norms(session.policy.model)
        if session.roll.teacher is not None:
            exact_norms(session.roll.teacher.model)
    return session


class Constant:
    """A grader with one reward for all."""

    def __init__(self, reward: float) -> None:
        self.reward = reward

    def grade(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Grade]:
        return [Grade(self.reward, Verdict.CORRECT if self.reward > 0.5 else Verdict.WRONG)] * len(texts)

    def close(self) -> None:
        pass


@dataclass
class Update:
    """What an update did: the gradients handed to each optimiser, its metrics, and the weights after it."""

    gradients: list[tuple[str, grads.Gradient]]
    metrics: dict[str, float]
    weights: dict[str, torch.Tensor]


class Bench:
    """A session some steps into training, on whose next batch one update can be taken again and again."""

    def __init__(self, session: Any, steps: int = 2) -> None:
        self.session = session
        for _ in range(steps):
            loop.take_step(session)
        session.roll.begin(steps)
        self.rows: list[Row] = session.method.gather(session.data, session.roll, steps)
        session.policy.factor = 1.0
        self._saved = {name: t.clone() for name, t in session.policy.tensors().items()}
        self._state = session.method.state()

    def update(self, rows: list[Row], micro_tokens: int = 64) -> Update:
        session, policy, seen = self.session, self.session.policy, []
        for named in policy.optimisers.values():
            named.optimiser.state.clear()
        policy.load({name: t.clone() for name, t in self._saved.items()})
        session.method.load(self._state)
        policy.micro_tokens = micro_tokens
        with watched(policy, seen):
            batch = batching.make_batch(rows)
            metrics = session.method.update(policy, replace(batch, stats=session.method.probe(batch)), 2)
        return Update(seen, {key: value for key, value in metrics.items() if key not in ONCE},
                      {name: t.clone() for name, t in policy.tensors().items()})


@contextmanager
def watched(policy: Any, seen: list[tuple[str, grads.Gradient]]) -> Iterator[None]:
    """What is handed to the optimisers within."""
    apply = type(policy).apply

    def spy(name: str, gradient: grads.Gradient, **options: Any) -> float:
        seen.append((name, {key: g.clone() for key, g in gradient.items()}))
        return apply(policy, name, gradient, **options)
    policy.apply = spy
    try:
        yield
    finally:
        del policy.apply


def difference(one: Update, two: Update) -> str:
    """What two updates differ in beyond rounding; empty if nothing."""
    if one.metrics.keys() != two.metrics.keys():
        return f"the metrics {sorted(one.metrics.keys() ^ two.metrics.keys())} are there only once"
    for key, value in one.metrics.items():
        if not torch.isclose(torch.tensor(two.metrics[key]), torch.tensor(value), rtol=1e-8, atol=1e-12):
            return f"{key} is {two.metrics[key]!r}, was {value!r}"
    if [name for name, _ in one.gradients] != [name for name, _ in two.gradients]:
        return "other optimisers stepped"
    for (name, g), (_, h) in zip(one.gradients, two.gradients, strict=True):
        off = grads.norm(grads.mix((1.0, g), (-1.0, h)))
        if not off <= 1e-9 * grads.norm(g) + 1e-13:
            return f"the gradient of {name} is off by {off:.2g} of {grads.norm(g):.2g}"
    wrong = [name for name, t in one.weights.items() if not torch.allclose(two.weights[name], t, rtol=1e-7, atol=1e-9)]
    return f"other weights in {wrong[0]}" if wrong else ""


@contextmanager
def padding(columns: int = 5) -> Iterator[None]:
    """Micro-batches have so many columns of padding more."""
    collate = batching.collate

    def padded(*args: Any) -> Micro:
        micro = collate(*args)

        def widen(x: torch.Tensor, value: float = 0) -> torch.Tensor:
            return torch.nn.functional.pad(x, (0, columns), value=value) if x.dim() == 2 else x
        return replace(micro, ids_BT=widen(micro.ids_BT, 7), pad_BT=widen(micro.pad_BT), own_BT=widen(micro.own_BT),
                       old_BT=widen(micro.old_BT), ref_BT=widen(micro.ref_BT), teacher_BT=widen(micro.teacher_BT),
                       taught_BT=widen(micro.taught_BT),
                       weight={k: widen(v) for k, v in micro.weight.items()},
                       scale={k: widen(v) for k, v in micro.scale.items()})
    with patch.object(batching, "collate", padded):
        yield


def wrong_terms(method: Any, rows: Sequence[Row]) -> str:
    """What is wrong with the terms of a method on rows with their streams and without; empty if nothing."""
    inner = getattr(method, "stage", method)
    readers = [inner.terms, *([inner.shadow_terms] if hasattr(inner, "shadow_terms") else [])]
    for kind in ("demo", "rollout"):
        some = [row for row in rows if row.kind == kind][:3]
        for chosen in (some, [replace(row, streams={}) for row in some]):
            if not chosen:
                continue
            micro = batching.collate(chosen, torch.float64, torch.device("cpu"), {})
            constants = [micro.old_BT, micro.ref_BT, micro.teacher_BT, *micro.weight.values(), *micro.scale.values()]
            if any(t.requires_grad for t in constants):
                return "a weight has a gradient"
            for t in constants:
                t.requires_grad_()
            for terms in readers:
                leaf = (micro.old_BT.detach() + 0.1).requires_grad_()
                found = terms(micro, Live(leaf, 0.3 * micro.own_BT.double(), 0.1 - leaf))
                if said := _wrong(micro, found):
                    return said
    return ""


def _wrong(micro: Micro, found: dict[str, torch.Tensor]) -> str:
    for name, value in found.items():
        if name not in micro.weight:
            return f"terms gives {name!r}, a stream that no row of the micro-batch has"
        if value.shape != micro.ids_BT.shape:
            return f"the term {name!r} has the shape {tuple(value.shape)}, not one number a token"
        if not value.isfinite().all():
            return f"the term {name!r} is not finite"
        if (value.detach() * micro.scale[name])[~micro.own_BT].any():
            return f"the term {name!r} counts tokens outside of the answer"
    return ""


# -- whole runs --------------------------------------------------------------------------------------------------------

@contextmanager
def stopping() -> Iterator[None]:
    """Ctrl-C during every step."""
    take_step = loop.take_step

    def step(session: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return take_step(session)
    with patch.object(loop, "take_step", step):
        yield


def bits(run: Path) -> dict[str, Any]:
    """Everything that a run leaves, to the bit, but for clocks."""
    newest = checkpoint.newest(run)
    assert newest is not None
    state = json.loads((newest / checkpoint.STATE).read_text())
    state["ledger"].pop("seconds")
    events = [without_time(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = without_time(json.loads((run / "result.json").read_text()))
    return {"checkpoint": newest.name, "state": state, "tensors": (newest / checkpoint.TENSORS).read_bytes(),
            "metrics": [json.dumps(event) for event in events], "samples": (run / "samples.jsonl").read_text()
            if (run / "samples.jsonl").exists() else None, "result": result,
            "final": (run / "final" / "model.safetensors").read_bytes(),
            "best": (run / "best" / "model.safetensors").read_bytes()}


def without_time(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "seconds" and not key.startswith("time/")}
