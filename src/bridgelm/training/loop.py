"""The training loop: gather rows, update the weights, validate, save checkpoints; at the end, test and write `final/`.

Everything is built from one RunConfig. The learning rate of a step is `optim.lr` times the method's `rate`."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bridgelm import dist
from bridgelm.config.run_config import RunConfig, load_config
from bridgelm.data.chat import Chat, load_chat
from bridgelm.data.cursors import Data, check_lengths, load_splits
from bridgelm.engine import Caller, Lost, Origin, open_engine
from bridgelm.engine.ahead import Pending
from bridgelm.engine.decoders import check_cache
from bridgelm.errors import UserError
from bridgelm.ledger import Ledger
from bridgelm.methods import Method, build
from bridgelm.methods.base import check_needs
from bridgelm.model.batching import make_batch, split_rows
from bridgelm.model.loading import load_model, peak_device_memory
from bridgelm.model.policy import Policy
from bridgelm.model.sharding import Sharded, Whole
from bridgelm.objective import mismatch
from bridgelm.rollout.roller import Roller, summary
from bridgelm.rollout.teacher import Teacher
from bridgelm.runs import inputs
from bridgelm.runs.folder import Follower, RunFolder, clean
from bridgelm.runs.progress import Progress
from bridgelm.runs.reader import Run
from bridgelm.training import checkpoint
from bridgelm.training.ahead import ask_ahead, plain
from bridgelm.training.evaluation import measure
from bridgelm.training.measurements import Measurements
from bridgelm.training.signals import Interrupted, stoppable
from bridgelm.training.watch import Watch
from bridgelm.types import Metrics, Problem, Row
from bridgelm.verify.ranked import shared_verifier


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint of the last completed step holds besides tensors. While the next step waits for answers,
    the weights are still those of the completed step, so it can be saved then."""

    step: int
    state: dict[str, Any]
    pending: Pending | None
    generators: tuple[Any, ...]


@dataclass
class Session:
    """What a run is made of, and what changes from step to step."""

    config: RunConfig
    data: Data
    chat: Chat
    method: Method
    policy: Policy
    roll: Roller
    folder: RunFolder
    display: Progress
    step: int = 0  # completed
    best: dict[str, Any] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)
    watch: Watch = field(default_factory=Watch)
    stop: bool = False
    measurements: Measurements | None = None
    due: list[str] = field(default_factory=lambda: ["validate", "measure"])  # yet to do after the last step
    snapshot: Snapshot | None = None  # lets the last step be saved while the next one waits for a server
    saved: tuple[int, list[str]] | None = None  # step and `due` of the newest checkpoint

    @property
    def path(self) -> Path:
        return self.folder.path

    def event(self, event: str, **values: Any) -> None:
        totals = self.policy.ledger.totals() if event != "warning" else {}
        record = {"event": event, "step": self.step, **values, **totals}
        self.folder.append(record)
        self.display.update(record)


def train(config: RunConfig, quiet: bool = False) -> Run:
    """Trains as the configuration says and returns the run."""
    path = Path(config.out) / config.name
    with dist.joined():
        if dist.restarted() and dist.from_first(lambda: _begun(config, path)):
            return resume(path, quiet)
        dist.wait()  # every rank has looked for the run folder before one makes it
        return _train(config, path, False, quiet)


def _begun(config: RunConfig, path: Path) -> bool:
    """Whether the run folder was left by an earlier attempt at this very run, whose processes died."""
    return (path / "config.json").exists() and Run(path).config == clean(config.resolved())


def resume(path: Path, quiet: bool = False, allow_change: Collection[str] = ()) -> Run:
    """Resumes a run from its newest undamaged checkpoint; a finished run is returned as it is. Configuration, data,
    model and the rest of `inputs.KEYS` must be unchanged, except those that `allow_change` names."""
    inputs.check_keys(allow_change)
    with dist.joined():
        if dist.from_first(lambda: Run(path).status) == "finished":
            return Run(path)
        return _train(load_config(Path(path) / "config.json"), Path(path), True, quiet, allow_change)


def _train(config: RunConfig, path: Path, resumed: bool, quiet: bool, allow_change: Collection[str] = ()) -> Run:
    if config.threads:
        torch.set_num_threads(config.threads)
    with Progress(config.name, config.steps, quiet=quiet or not dist.first()) as display:
        display.state("reading the data")
        chat = load_chat(config.model)
        splits = check_lengths(load_splits(config), chat, config)
        method = build(config.method, config)
        data = Data(splits, config.seed)
        check_needs(method, data)
        for note in splits.notes:
            display.say(note)
        with shared_verifier(config.reward) as grader, _open_folder(path, config, resumed) as folder:
            display.state("comparing with what the run was made of" if resumed else "noting what the run is made of")
            try:
                made_of = inputs.take(config, splits, chat) if dist.first() else {}
                changed = _changed(path, config, made_of, allow_change, display) if resumed else {}
                display.state("loading the model")
                session = _session(config, data, chat, method, grader, folder, display)
                if dist.first():
                    inputs.keep(folder, made_of, changed, session.step)
            except BaseException:
                folder.discard()  # nothing was trained, so the name stays free
                raise
            try:
                _run(session)
            except BaseException as error:
                folder.set_status("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
                raise
            finally:
                session.roll.engine.close()
            folder.set_status("finished", verdicts=dict(grader.counts), **peak_device_memory())
        dist.wait()  # no rank reads the status before the first one has written it
    return Run(path)


def _open_folder(path: Path, config: RunConfig, resumed: bool) -> RunFolder:
    folder = Follower(path)
    if dist.first():
        folder = RunFolder.open(path) if resumed else RunFolder.create(path, config)
    dist.wait()
    return folder


def _session(config: RunConfig, data: Data, chat: Chat, method: Method, grader: Any, folder: RunFolder,
             display: Progress) -> Session:
    saved, state, damaged = _checkpoint(folder.path, config, display)
    teacher = Teacher.of(config, chat)  # a teacher with another tokenizer is refused before any model is loaded
    model = load_model(config.model)
    if config.rollout.engine == "native":
        check_cache(model)
    ledger = Ledger(sum(p.numel() for p in model.parameters()))
    lora = (config.model.lora_rank, config.model.lora_alpha, config.model.lora_modules)
    policy = Policy(model, config.optim, ledger, config.batch.micro_tokens, config.seed,
                    lora if config.model.lora_rank else None, Sharded if dist.part(config.shard) else Whole)
    caller = Caller(lambda: session.stop, display.say)
    engine = open_engine(config, chat, folder.path / "engine", caller)
    if teacher is not None:
        teacher.keep(folder.path / "teacher", state["step"] if state else 0)
    roll = Roller(policy, engine, chat, grader, config, teacher, grader.early)
    session = Session(config, data, chat, method, policy, roll, folder, display)
    if state:
        method.load(state["method"])
    method.setup(policy)
    folder.truncate_after(state["step"] if state else -1)
    checkpoint.seed_generators(config.seed)
    if saved and state:
        checkpoint.load_tensors(saved, policy, state)
        data.load(state["data"])
        ledger.load(state["ledger"])
        session.step, session.best, session.said = state["step"], state["best"], set(state["said"])
        session.due, session.saved = state["due"], (state["step"], list(state["due"]))
        session.watch.load(state["watch"])
        roll.load(state.get("ahead"))
        _check_best(session)
    if damaged:
        session.event("warning", text=damaged)
    if config.diagnose.every:
        session.measurements = Measurements(session.roll, data.splits, method.starts(), folder.path, session.step,
                              "measure" not in session.due)
    folder.write_run_info(device=str(policy.device), threads=torch.get_num_threads(), parameters=ledger.parameters,
                          ranks=dist.world(), accelerator=_accelerator(policy.device))
    dist.wait()
    return session


def _checkpoint(path: Path, config: RunConfig, display: Progress) -> tuple[Path | None, dict[str, Any] | None, str]:
    """The checkpoint to resume from, its state, and a warning if it is not the newest. A run that had checkpoints never
    silently starts from the beginning."""
    found = checkpoint.open_whole(path)
    reached, last = dist.from_first(lambda: (Run(path).steps, Run(path).info.get("checkpoint", 0)))
    if found is None:
        if last or 0 < config.checkpoint_every < reached:
            raise UserError(f"{path}: its checkpoints are gone, but the run was at step {max(reached, last)}; put one "
                            f"back into {path}/checkpoints from a copy, or remove the run folder to train anew")
        if reached:
            display.say(f"stopped at step {reached}, before its first checkpoint: the run starts from the beginning")
        return None, None, ""
    folder, state, damaged = found
    if state["step"] > config.steps:
        raise UserError(f"{path}: steps = {config.steps}, but the run is at step {state['step']} already; raise steps")
    if damaged:
        first = state["step"] + 1
        redone = ("no step is taken again" if reached < first else f"step {first} is taken again" if reached == first
                  else f"steps {first} to {reached} are taken again")
        damaged = f"a damaged checkpoint is passed over ({damaged}); the run goes on from {folder.name}, {redone}"
    return folder, state, damaged


def _changed(path: Path, config: RunConfig, made_of: dict[str, Any], allowed: Collection[str],
             display: Progress) -> dict[str, str]:
    """What has changed since the run began and was allowed to, in words; any other change is refused."""
    changed = dist.from_first(lambda: inputs.compare(path, made_of, allowed))
    versions = dist.from_first(lambda: inputs.other_versions(path, made_of))
    if versions:
        display.say(f"note: {versions}")
    for text in changed.values():
        display.say(f"allowed: {text}")
    return changed


def _check_best(session: Session) -> None:
    """Forgets the best weights if `best/` is gone, damaged, or newer than the checkpoint that the run resumes from."""
    if session.best and not _best_is_there(session):
        session.display.say(f"{session.path}/best is not the model of step {session.best['step']} (it is newer, "
                            "damaged or missing): the best weights are chosen anew from here on")
        session.best = {}


def _best_is_there(session: Session) -> bool:
    return dist.from_first(lambda: checkpoint.weights_of(session.path / "best") == session.best["weights"])


def _accelerator(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def _run(session: Session) -> None:
    with stoppable(session):
        try:
            _steps(session)
            finish_run(session)
        except Lost as lost:
            _save_snapshot(session)
            if session.stop:
                raise Interrupted(session.path) from None
            raise UserError(f"{lost}; go on with: bridgelm train --resume {session.path}") from None


def _steps(session: Session) -> None:
    config = session.config
    _do_what_is_due(session)
    while session.step < config.steps:
        if config.rollout.server and session.step and session.step in session.method.starts():
            # A new stage changes the weights before it draws, so a snapshot of this step would be wrong.
            _save_once(session)
            session.snapshot = None
        started = time.perf_counter()
        step_metrics = take_step(session)
        session.policy.ledger.seconds += time.perf_counter() - started
        validate_now = session.step == config.steps or (config.eval.every and session.step % config.eval.every == 0)
        session.due = ["validate", "measure"] if validate_now else ["measure"]
        session.event("step", **step_metrics)
        _do_what_is_due(session)
        session.stop = dist.agree(session.stop)
        due = config.checkpoint_every and session.step % config.checkpoint_every == 0
        if session.stop or due:
            save(session)
        if session.stop and session.step < config.steps:
            raise Interrupted(session.path)
    _save_once(session)


def _do_what_is_due(session: Session) -> None:
    """Validates and measures, if that is due after the last step and was not done before an interruption."""
    while session.due:
        _take_snapshot(session)
        {"validate": validate, "measure": take_measurements}[session.due[0]](session)
        del session.due[0]
    _take_snapshot(session)


def _take_snapshot(session: Session) -> None:
    if session.config.rollout.server:
        session.snapshot = Snapshot(session.step, plain(_state(session)), session.roll.pending, checkpoint.generators())


def _save_snapshot(session: Session) -> None:
    """Saves a checkpoint of the last completed step when the step under way lost the server that it waited for."""
    session.stop, snapshot = dist.agree(session.stop), session.snapshot
    if snapshot is None or not snapshot.step or session.saved == (snapshot.step, snapshot.state["due"]):
        return  # that step is on disk already
    try:
        ahead = snapshot.pending.state() if snapshot.pending else None
    except Lost:
        ahead = None  # the next step will ask for its answers itself
    checkpoint.set_generators(snapshot.generators)  # a reward function may have drawn from them in the meantime
    _write(session, snapshot.step, {**snapshot.state, "ahead": ahead})


def take_step(session: Session) -> Metrics | dict[str, Any]:
    """One training step: gathers rows once, then takes `rollout.updates` updates on them."""
    method, policy, roll, config = session.method, session.policy, session.roll, session.config
    roll.begin(session.step)
    clock = time.perf_counter()
    found: list[Metrics] = []
    try:
        rows = method.gather(session.data, roll, session.step)
        ask_ahead(method, session.data, roll, session.step)
        rows, drift = roll.settle(rows)
        policy.factor = method.rate(session.step)
        gathered = time.perf_counter()
        for part in split_rows(rows, config.rollout.updates):
            batch = make_batch(part)
            found.append(method.update(policy, replace(batch, stats=method.probe(batch)), session.step))
    except FloatingPointError as error:
        raise UserError(f"step {session.step + 1}: {error}; lower optim.lr, or look at {session.path}/metrics.jsonl "
                        "for what grew before it") from None
    session.step += 1
    metrics = {key: float(np.mean([m[key] for m in found if key in m])) for key in {k for m in found for k in m}}
    rolled = summary(rows)
    _warn(session, [*method.warnings(metrics), *mismatch.warnings(drift, config.rollout.mismatch_warning),
                    *session.watch.warnings({**rolled, **metrics}, roll.sampling.max_new_tokens)])
    _keep_samples(session, rows)
    return {"phase": method.phase, **rolled, **drift, **dict(sorted(metrics.items())),
            "lr": session.policy.optimisers["theta"].lr * policy.factor,
            "time/rollout": gathered - clock, "time/update": time.perf_counter() - gathered}


def _keep_samples(session: Session, rows: list[Row]) -> None:
    log = session.config.log
    if not log.samples or (session.step - 1) % log.samples_every:
        return
    for row in [row for row in rows if row.kind == "rollout" and row.at == "live"][:log.samples]:
        problem = row.problem
        session.folder.sample({"step": session.step, "problem_id": problem.id, "prompt": problem.prompt,
                               "answer": problem.answer, "difficulty": problem.difficulty, "completion": row.text,
                               "reward": row.reward, "verdict": row.verdict.value if row.verdict else None})


def _warn(session: Session, texts: list[str]) -> None:
    for text in texts:
        if text not in session.said:
            session.said.add(text)
            session.event("warning", text=text)


def validate(session: Session) -> None:
    """Measures accuracy on the validation set, and keeps the weights in `best/` if they are the best so far."""
    session.display.state("validating")
    problems = session.data.splits.validation[:session.config.eval.problems]
    found = _evaluate(session, problems, 0)
    found.pop("correct")
    session.event("eval", split="validation", **found)
    if session.step and found["accuracy"] > session.best.get("accuracy", -1.0):
        folder = session.path / "best"
        checkpoint.save_model(session.policy, session.chat, folder)
        session.best = {"step": session.step, "accuracy": found["accuracy"],
                        "weights": dist.from_first(lambda: checkpoint.weights_of(folder))}


def take_measurements(session: Session) -> None:
    if session.measurements and session.measurements.due(session.step):
        session.display.state("probing")
        session.event("probe", phase=session.method.phase, **session.measurements.take(session.step))


def _evaluate(session: Session, problems: tuple[Problem, ...], samples: int, model: Any = None) -> dict[str, Any]:
    with session.policy.origin("live") as live:
        return measure(live if model is None else Origin(model), session.roll.engine, session.chat,
                       session.roll.grader, problems, session.config, samples)


def _state(session: Session) -> dict[str, Any]:
    return {"method": session.method.state(), "data": session.data.state(), "ledger": session.policy.ledger.state(),
            "best": session.best, "said": sorted(session.said), "watch": session.watch.state(), "due": session.due}


def save(session: Session) -> None:
    _write(session, session.step, {**_state(session), "ahead": session.roll.state()})
    session.saved = session.step, list(session.due)


def _write(session: Session, step: int, state: dict[str, Any]) -> None:
    session.display.state("saving")
    session.folder.sync()
    checkpoint.save(session.path, step, session.policy, state)
    session.folder.set_status("running", checkpoint=step, **peak_device_memory())


def _save_once(session: Session) -> None:
    if session.saved != (session.step, []):
        save(session)


def finish_run(session: Session) -> None:
    """Saves the final weights, and measures the final and the best weights on the test set."""
    session.display.state("testing")
    validation = session.data.splits.validation[:session.config.eval.problems]
    found = session.method.deploy(session.policy, lambda: _evaluate(session, validation, 0)["accuracy"])
    if found:
        session.event("deploy", **found)
    for name, rows in session.method.tables().items():
        session.folder.write_table(name, rows)
    checkpoint.save_model(session.policy, session.chat, session.path / "final")
    result = {"final": {"step": session.step, **_test(session)}}
    best = session.best.get("step")
    if best == session.step:
        result["best"] = result["final"]
    elif best is not None and not _best_is_there(session):
        session.event("warning", text=f"{session.path}/best is damaged or missing: only the final weights are measured")
    elif best is not None:
        named = session.config.model.model_copy(update={"name_or_path": str(session.path / "best"), "revision": None})
        result["best"] = {"step": best, **_test(session, load_model(named))}
    session.folder.write_result(result)


def _test(session: Session, model: Any = None) -> dict[str, Any]:
    splits, samples = session.data.splits, session.config.eval.samples
    found = _evaluate(session, splits.test, samples, model)
    if splits.hard:
        hard = _evaluate(session, splits.hard, samples, model)
        found["hard"] = {key: value for key, value in hard.items() if key != "correct"}
    return found
