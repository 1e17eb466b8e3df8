"""Runs models on benchmark suites: draws, grades and keeps answers, and writes the results.

Every answer is kept with its verdict, so that an interrupted evaluation continues where it stopped and every figure can
be computed again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bridgelm.benchmarks import scores, suites, tables
from bridgelm.benchmarks.prompts import PromptFormat, prompt_format
from bridgelm.benchmarks.suites import Items, Suite
from bridgelm.config.run_config import ModelConfig, load_config
from bridgelm.data.chat import Chat, load_chat
from bridgelm.data.model_shapes import model_path
from bridgelm.engine import NativeEngine, Origin, Request, Sampling
from bridgelm.errors import UserError
from bridgelm.model.loading import load_model, pick_device
from bridgelm.runs.folder import git_commit, versions, write_json
from bridgelm.runs.reader import read_json
from bridgelm.training.checkpoint import model_folder
from bridgelm.types import Problem
from bridgelm.verify.base import Judge, build_grader

SALT = 104_729  # keeps benchmark draws apart from those of training and its own evaluation
Say = Callable[[str], None]


@dataclass(frozen=True)
class BenchmarkOptions:
    """The options of `bridgelm eval --suite`. None means the value in the record of the suite."""

    prompt: str | None = None
    samples: int | None = None
    temperature: float | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    limit: int | None = None  # use only so many items, the first; the result says so
    rows: int = 128  # answers decoded at once
    dtype: str | None = None  # default: the run's; else bfloat16 on a GPU and float32 without
    which: str = "final"


@dataclass(frozen=True)
class Opened:
    model: Any
    chat: Chat
    facts: dict[str, Any]


@dataclass(frozen=True)
class SuiteRun:
    """One model on one suite."""

    suite: Suite
    items: Items
    problems: tuple[Problem, ...]
    format: PromptFormat
    samples: int
    temperature: float
    max_new_tokens: int
    settings: dict[str, Any]


def run(models: Sequence[str], names: Sequence[str], out: Path | None = None,
        options: BenchmarkOptions | None = None, *, folder: Path | None = None, extra: Path | None = None,
        fixes: Path | None = None, force: bool = False, say: Say = lambda text: None) -> Path:
    """Every model on every suite, and the page about them; a model's own files lie in a folder of its own beside it."""
    chosen, labels = suites.choose(names, extra), _labels(models)
    single = len(models) == 1 and (Path(models[0]) / "run.json").is_file()
    root = out or (Path(models[0]) / "eval" if single else Path("eval"))
    options = options or BenchmarkOptions()
    results = {label: evaluate(model, chosen, root if single else root / label, options, folder, fixes, force,
                               lambda text, label=label: say(f"{label}: {text}"))
               for model, label in labels.items()}
    found = tables.combined(results)
    write_json(root / "results.json", {"models": results, **found})
    (root / "results.md").write_text(tables.page(results, found), encoding="utf-8")
    return root / "results.md"


def _labels(models: Sequence[str]) -> dict[str, str]:
    """A short name for each model, which is also the name of its folder."""
    labels = {model: model.rstrip("/").replace("toy:", "toy-").split("/")[-1] for model in models}
    if len(labels) < len(models) or len({*labels.values()}) < len(labels):
        raise UserError("eval: two of the models have the same name; evaluate them one by one, each with its own --out")
    return labels


def evaluate(name: str, chosen: dict[str, Suite], out: Path, options: BenchmarkOptions, folder: Path | None = None,
             fixes: Path | None = None, force: bool = False, say: Say = lambda text: None) -> dict[str, Any]:
    """Results by suite, each also in OUT/SUITE.json beside its answers in OUT/SUITE.samples.jsonl."""
    loaded = {key: suites.load(key, suite, folder, fixes) for key, suite in chosen.items()}
    formats = {key: prompt_format(options.prompt or suite.prompt) for key, suite in chosen.items()}
    opened = open_model(name, options)
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    for key, suite in chosen.items():
        job = _suite_run(suite, loaded[key], formats[key], options, opened, fixes)
        file = out / f"{key.replace(':', '-')}.samples.jsonl"
        answers = _answer(opened, job, file, options.rows, force, lambda done, of, key=key: say(f"{key} {done}/{of}"))
        results[key] = _result(key, job, opened, answers)
        write_json(out / f"{key.replace(':', '-')}.json", results[key])
    return results


def open_model(name: str, options: BenchmarkOptions) -> Opened:
    config, facts = resolve(name, options.which)
    if options.dtype:
        config = ModelConfig.model_validate(config.model_dump() | {"dtype": options.dtype})
    chat = load_chat(config)
    model = load_model(config)
    facts |= {"sha256": weights_digest(config), "dtype": config.dtype, "device": next(model.parameters()).device.type,
              "parameters": sum(p.numel() for p in model.parameters()), "engine": "native",
              "system_prompt": config.system_prompt}
    return Opened(model, chat, facts)


def resolve(name: str, which: str) -> tuple[ModelConfig, dict[str, Any]]:
    """How the model of a run is opened, or any other, and what is known of its origin."""
    path = Path(name)
    if not (path / "run.json").exists():
        default = "bfloat16" if pick_device("auto").type == "cuda" else "float32"
        return ModelConfig.model_validate({"name_or_path": name, "dtype": default}), {"name": name}
    config = load_config(path / "config.json").model
    config = config.model_copy(update={"name_or_path": str(model_folder(path, which)), "revision": None,
                                       "chat_template": None})  # the saved tokenizer has it
    return config, {"name": name, "run": str(path), "which": which,
                    "run_commit": (read_json(path / "run.json") or {})["commit"]}


def weights_digest(config: ModelConfig) -> str:
    """A digest of everything that decides what a model says: weights, configuration, tokenizer, chat template."""
    folder = Path(model_path(config.name_or_path))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(config.name_or_path, revision=config.revision, local_files_only=True))
    total = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in {".safetensors", ".json", ".jinja"}):
        total.update(path.name.encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    if config.chat_template is not None:
        total.update(Path(config.chat_template).read_bytes())
    return total.hexdigest()


def _suite_run(suite: Suite, items: Items, format: PromptFormat, options: BenchmarkOptions, opened: Opened,
               fixes: Path | None) -> SuiteRun:
    samples = suite.samples if options.samples is None else options.samples
    temperature = options.temperature or suite.temperature
    max_new_tokens = options.max_new_tokens or suite.max_new_tokens
    settings = {
        "model": {key: opened.facts[key] for key in ("sha256", "dtype", "engine", "device")},
        "items": items.sha256, "limit": options.limit, "label_fixes": str(fixes) if fixes else None,
        "prompt": format.model_dump(), "seed": options.seed,
        "sampling": {"greedy": 1, "samples": samples, "temperature": temperature, "max_new_tokens": max_new_tokens},
        "grading": {"verifier": suite.verifier, "extract": suite.extract, "tolerance": suite.tolerance}}
    problems = items.problems[:options.limit]
    return SuiteRun(suite, items, problems, format, samples, temperature, max_new_tokens, settings)


def _answer(opened: Opened, job: SuiteRun, file: Path, rows: int, force: bool,
            say: Callable[[int, int], None]) -> list[dict[str, Any]]:
    """All answers: those already in the file, and the missing ones, which are appended as they are drawn."""
    kept = [] if force else _kept(file, job.settings)
    have = {(one["id"], one["draw"]) for one in kept}
    total = len(job.problems) * (1 + job.samples)
    judge = build_grader(job.suite.reward())
    assert judge is not None
    try:
        with file.open("a" if kept else "w", encoding="utf-8") as sink, ThreadPoolExecutor(1) as grading:
            if not kept:
                _write(sink, [{"settings": job.settings}])
            pending: Future[list[dict[str, Any]]] | None = None
            for chunk in _chunks(job, have, rows):
                drawn = _generate(opened, job, chunk, rows)  # while the chunk before is graded
                if pending:
                    kept += _write(sink, pending.result())
                pending = grading.submit(_grade, judge, job, opened.chat, chunk, drawn)
                say(len(kept), total)
            if pending:
                kept += _write(sink, pending.result())
    finally:
        judge.close()
    say(len(kept), total)
    order = {problem.id: i for i, problem in enumerate(job.problems)}
    return sorted(kept, key=lambda one: (order[one["id"]], one["draw"]))


def _kept(file: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers of an earlier start with the same settings; a line that was cut off in writing is dropped."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        file.write_text("".join(whole), encoding="utf-8")
    if not whole:
        return []
    before = json.loads(whole[0])["settings"]
    changed = sorted(key for key in settings if settings[key] != before.get(key))
    if changed:
        raise UserError(f"eval: {file} holds answers under other settings ({', '.join(changed)}); give another --out, "
                        "or --force to throw them away")
    return [json.loads(line) for line in whole[1:]]


def _write(sink: IO[str], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    sink.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in found)
    sink.flush()
    return found


def _chunks(job: SuiteRun, have: set[tuple[str, int]], rows: int) -> Iterator[list[tuple[Problem, int]]]:
    """What is missing, greedy answers first; the samples of an item stay together, since they share its prompt."""
    for draws in (range(1), range(1, 1 + job.samples)):
        missing = [(problem, draw) for problem in job.problems for draw in draws if (problem.id, draw) not in have]
        yield from (missing[start:start + rows] for start in range(0, len(missing), rows))


def _generate(opened: Opened, job: SuiteRun, chunk: Sequence[tuple[Problem, int]], rows: int) -> list[Any]:
    chat = opened.chat
    engine = NativeEngine(chat.eos_ids, chat.pad_id, chat.text, rows)
    sampling = Sampling(job.max_new_tokens, job.temperature if chunk[0][1] else 0.0, tuple(job.format.stop))
    prompts = {problem.id: job.format.ids(chat, problem) for problem, _ in chunk}
    requests = [Request(prompts[problem.id], (job.settings["seed"], SALT, _number(problem.id), draw))
                for problem, draw in chunk]
    return engine.generate(Origin(opened.model), requests, sampling)


def _number(name: str) -> int:
    """The number of an item, which is the same whatever else is evaluated."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def _grade(judge: Judge, job: SuiteRun, chat: Chat, chunk: Sequence[tuple[Problem, int]],
           drawn: Sequence[Any]) -> list[dict[str, Any]]:
    texts = [job.format.read(chat, completion.ids) for completion in drawn]
    decisions = judge.judged([problem for problem, _ in chunk], texts)
    return [{"id": problem.id, "draw": draw, "tokens": len(completion.ids), "finished": bool(completion.finished),
             "verdict": decision.verdict.value, "extracted": decision.extracted, "how": decision.how,
             "rule": decision.rule, "ms": round(decision.ms, 3), "completion": text}
            for (problem, draw), completion, text, decision in zip(chunk, drawn, texts, decisions, strict=True)]


def _result(name: str, job: SuiteRun, opened: Opened, answers: list[dict[str, Any]]) -> dict[str, Any]:
    first = job.format.ids(opened.chat, job.problems[0])
    fixed = set(job.items.fixed) & {problem.id for problem in job.problems}
    return {
        "suite": name, "title": job.suite.title, "source": job.items.source, "items": len(job.problems),
        "published_items": job.suite.items, "limit": job.settings["limit"],
        "label_fixes": {"file": job.settings["label_fixes"], "applied": sorted(fixed)} if fixed or
        job.settings["label_fixes"] else None,
        "model": opened.facts, "settings": job.settings,
        "first_prompt": {"id": job.problems[0].id, "text": opened.chat.rendered(first), "tokens": len(first)},
        **scores.summary(job.suite, job.problems, answers, job.samples),
        "scores": scores.scores(answers, sampled=job.samples > 0),
        "versions": versions(), "commit": git_commit(),
    }
