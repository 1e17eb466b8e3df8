"""`bridgelm diagnose --measure`: measures every saved model of a run, after training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bridgelm.config.run_config import ModelConfig, RunConfig, load_config
from bridgelm.data.chat import load_chat
from bridgelm.data.cursors import check_lengths, load_splits
from bridgelm.diagnosis.facts import AFTERWARDS, History
from bridgelm.engine import NativeEngine
from bridgelm.errors import UserError
from bridgelm.ledger import Ledger
from bridgelm.model.loading import load_model
from bridgelm.model.policy import Policy
from bridgelm.rollout.roller import Roller
from bridgelm.runs.folder import clean
from bridgelm.runs.reader import Run
from bridgelm.training.measurements import draw_sample, measure, start_folder
from bridgelm.verify import build_verifier


def models(run: Run) -> dict[int, str | None]:
    """Step -> folder of the model after so many updates; None is the model that the run began with."""
    found: dict[int, str | None] = {0: None}
    found |= {stage.start: str(start_folder(run.path, stage.start)) for stage in History(run).stages
              if stage.start and start_folder(run.path, stage.start).is_dir()}
    best = (run.result or {}).get("best", {}).get("step")
    for step, name in ((best, "best"), (run.steps, "final")):
        if isinstance(step, int) and (run.path / name / "config.json").is_file():
            found[step] = str(run.path / name)
    return dict(sorted(found.items()))


def measure_saved(run: Run) -> Path:
    """Writes what was found to the run folder, anew each time."""
    config, there = load_config(run.path / "config.json"), models(run)
    if len(there) < 2:
        raise UserError(f"{run.path}: no model of it is saved yet; finish it with `bridgelm train --resume {run.path}`")
    chat = load_chat(config.model)
    splits = check_lengths(load_splits(config), chat, config)
    sample, rows = draw_sample(splits, config), []
    with build_verifier(config.reward) as grader:
        for step in there:
            stages = [stage.start for stage in History(run).stages if stage.start < step and stage.start in there]
            start = max(stages, default=0)
            model = load_model(_named(config.model, there[step]))
            ledger = Ledger(sum(p.numel() for p in model.parameters()))
            policy = Policy(model, config.optim, ledger, config.batch.micro_tokens, config.seed)
            engine = NativeEngine(chat.eos_ids, chat.pad_id, chat.text, config.rollout.max_rows)
            found = measure(policy, Roller(policy, engine, chat, grader, config), sample, config.diagnose.group,
                            _start(config, there[start]))
            name = Path(folder).name if (folder := there[step]) else "start"
            rows.append({"step": step, "model": name, "start": start, "held": sample.held, **found})
    path = run.path / AFTERWARDS
    path.write_text("".join(json.dumps(clean(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def _named(model: ModelConfig, folder: str | None) -> ModelConfig:
    return model if folder is None else model.model_copy(update={"name_or_path": folder, "revision": None})


def _start(config: RunConfig, folder: str | None) -> Mapping[str, Tensor]:
    return {name: p.detach() for name, p in load_model(_named(config.model, folder)).named_parameters()}
