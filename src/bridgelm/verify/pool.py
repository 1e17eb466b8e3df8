"""A pool of killable worker processes for functions that may hang, eat memory or crash on hostile input.

Workers are plain subprocesses that exchange JSON lines: nothing is unpickled, and the user's script is not run again,
as it would be with multiprocessing's spawn. A worker gets one task at a time. If it dies, only that task is lost, and
the next worker is ready at once, as each is forked from a parent that has imported everything already.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridgelm.errors import UserError

CACHE_SIZE = 100_000
START_SECONDS = 120.0  # wall time for a worker's imports, on a busy machine
# CPU time is limited; wall time is limited too, generously, in case a worker sleeps or gets no CPU.
WALL_FACTOR, WALL_FLOOR = 30.0, 60.0
# How a process ends that ran out of CPU time or of stack.
GOLD_EXHAUSTS = "the gold answer alone exhausts time or memory"
EXHAUSTED = {-signal.SIGPROF, -signal.SIGSEGV}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Exactly one of three: a `result`; `exhausted`, if time or memory ran out after the gold was understood; an
    `error`."""

    result: Any = None
    exhausted: bool = False
    error: str = ""
    ms: float = field(default=0.0, compare=False)  # CPU time of the worker


class WorkerDied(Exception):
    """`good`: whether the worker had already said that the gold is good."""

    def __init__(self, code: int | None, good: bool):
        super().__init__(f"a worker ended with code {code}")
        self.code, self.good = code, good


class Replaced(WorkerDied):
    """The worker died on a task, and its parent has forked another one."""


class _Worker:
    def __init__(self, arguments: Sequence[str], environment: dict[str, str], wall: float):
        self._wall = wall
        self._rest = b""
        # The worker is in a session of its own, so that Ctrl-C reaches only the run, which then closes its workers. If
        # the run is killed, a worker sees the end of its input and exits.
        self._process = subprocess.Popen([sys.executable, "-m", "bridgelm.verify.worker", *arguments], env=environment,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                         start_new_session=True)
        try:
            first = self._read(time.monotonic() + START_SECONDS)
        except WorkerDied as death:
            self.kill()
            raise UserError(f"reward.verifier: its worker process does not start (code {death.code}); "
                            "try another verifier, or more memory") from None
        if "broken" in first:
            self.kill()
            raise UserError(f"reward.verifier: its worker process cannot start ({first['broken']}); "
                            "`pip install math-verify`, or choose another verifier")

    def run(self, task: dict[str, str]) -> Outcome:
        good, deadline = False, time.monotonic() + self._wall
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
            self._process.stdin.flush()
            while True:
                message = self._read(deadline)
                if "dead" in message:  # the process that had the task; its parent has forked another one already
                    raise Replaced(message["dead"], good)
                if "good" not in message:
                    break
                good = True
        except BrokenPipeError:
            raise WorkerDied(self._process.wait(), good) from None
        except Replaced:
            raise
        except WorkerDied as death:
            raise WorkerDied(death.code, good) from None
        ms = message.get("ms", 0.0)
        if message.get("exhausted"):
            return Outcome(exhausted=True, ms=ms) if good else Outcome(error=GOLD_EXHAUSTS, ms=ms)
        if "error" in message:
            return Outcome(error=message["error"], ms=ms)
        return Outcome(result=message["result"], ms=ms)

    def _read(self, deadline: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise WorkerDied(None, False)  # over the wall time, so it did not end by itself
            chunk = os.read(pipe, 65536)
            if not chunk:
                raise WorkerDied(self._process.wait(), False)
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def kill(self) -> None:
        """Tells the parent to end its child and then itself; if it does not, both are killed."""
        self._process.terminate()
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # unsent data for the killed worker
                    pipe.close()


class Pool:
    """`run(tasks)` returns one Outcome per task, in order. Workers start with the first task and are replaced when they
    die. `target` is module:function, called as `function(task, gold_is_good)`. Equal tasks are run once."""

    def __init__(self, target: str, cpu_seconds: float = 1.0, memory_mb: int = 2048, size: int | None = None,
                 paths: Sequence[str] = ()):
        self.size = size or max(1, min(8, os.cpu_count() or 1))
        self.counts: Counter[str] = Counter()
        self._arguments = [target, str(cpu_seconds), str(memory_mb)]
        self._limit = 1000 * cpu_seconds
        self._wall = WALL_FLOOR + WALL_FACTOR * cpu_seconds
        package = str(Path(__file__).resolve().parents[2])
        found = [*paths, package, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._environment = {**os.environ, "PYTHONPATH": os.pathsep.join(found), "OMP_NUM_THREADS": "1",
                             "OPENBLAS_NUM_THREADS": "1", "PYTHONUTF8": "1"}
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(self.size):
            self._idle.put(None)  # a slot for a worker, which is started when it is first used
        self._alive: set[_Worker] = set()
        self._cache: OrderedDict[str, Outcome] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False
        weakref.finalize(self, _kill_all, self._alive)

    def remember(self, tasks: Sequence[dict[str, str]]) -> None:
        """Runs tasks ahead of time, so that a later `run` finds their outcomes; the counts count them then."""
        self.run(tasks)
        with self._lock:
            self.counts["cached"] -= len(tasks)

    def run(self, tasks: Sequence[dict[str, str]]) -> list[Outcome]:
        assert not self._closed, "the pool is closed"
        keys = [json.dumps(task, sort_keys=True) for task in tasks]
        known: dict[str, Outcome] = {}
        with self._lock:
            for key in set(keys) & self._cache.keys():
                self._cache.move_to_end(key)
                known[key] = self._cache[key]
        todo = {key: task for key, task in zip(keys, tasks, strict=True) if key not in known}
        if todo:
            with ThreadPoolExecutor(min(self.size, len(todo))) as threads:
                known |= dict(zip(todo, threads.map(self._run_one, todo.values()), strict=True))
        self._remember({key: known[key] for key in todo}, len(tasks))
        return [known[key] for key in keys]

    def _remember(self, fresh: dict[str, Outcome], asked: int) -> None:
        with self._lock:
            self.counts["run"] += len(fresh)
            self.counts["cached"] += asked - len(fresh)
            for key, outcome in fresh.items():
                self.counts["exhausted"] += outcome.exhausted
                # An error may be a passing trouble of the machine, so it is not kept and the task is tried again.
                if not outcome.error:
                    self._cache[key] = outcome
            while len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)

    def _run_one(self, task: dict[str, str]) -> Outcome:
        worker = self._idle.get()
        try:
            for attempt in (1, 2):
                worker = worker or self._start()
                try:
                    return worker.run(task)
                except WorkerDied as death:
                    self._lost(worker, isinstance(death, Replaced))
                    worker = worker if isinstance(death, Replaced) else None
                    if death.code in EXHAUSTED:
                        return (Outcome(exhausted=True, ms=self._limit) if death.good
                                else Outcome(error=GOLD_EXHAUSTS, ms=self._limit))
                    if attempt == 2 or death.code is None:
                        return Outcome(error=str(death) if death.code is not None else "no answer within the wall time")
            raise AssertionError("unreachable")
        finally:
            self._idle.put(worker)

    def _start(self) -> _Worker:
        assert not self._closed, "the pool was closed while it worked"
        worker = _Worker(self._arguments, self._environment, self._wall)
        with self._lock:
            self._alive.add(worker)
            self.counts["started"] += 1
        return worker

    def _lost(self, worker: _Worker, replaced: bool) -> None:
        with self._lock:
            self.counts["killed"] += 1
            if replaced:
                return
            self._alive.discard(worker)
        worker.kill()

    def close(self) -> None:
        self._closed = True
        _kill_all(self._alive)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _kill_all(workers: set[_Worker]) -> None:
    while workers:
        workers.pop().kill()
