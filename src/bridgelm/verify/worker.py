"""A worker process of the pool: reads one JSON task per line and answers each with one JSON line.

It is started as `python -m bridgelm.verify.worker ...`, imports and warms up once, then forks: the child works, and if
it dies on a task, the parent says so and forks the next one at once. The kernel enforces the limits, so nothing in the
task can outlast them: ITIMER_PROF counts the child's CPU time and ends it by SIGPROF, in C code too; RLIMIT_AS makes
allocation fail. """

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Say = Callable[..., None]


def main(target: str, cpu_seconds: float, memory_mb: int) -> None:
    # Answers have a file descriptor of their own, so that nothing that libraries print gets among them.
    answers = os.dup(1)
    os.dup2(2, 1)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)

    def say(**message: Any) -> None:
        os.write(answers, json.dumps(message).encode() + b"\n")

    module, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        warm_up = getattr(sys.modules[module], "warm_up", None)
        if warm_up:
            warm_up()
    except Exception as error:  # whatever it is, the parent process must learn why there is no worker
        say(broken=f"{type(error).__name__}: {error}")
        return
    say(ready=True)
    while (code := _supervise(lambda: _serve(function, say, cpu_seconds, memory_mb))) != 0:
        say(dead=code)


def _supervise(serve: Callable[[], None]) -> int:
    """Waits for a forked child and returns its exit code. If this process is told to end, it ends the child first."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(KeyboardInterrupt):
            serve()
        os._exit(0)

    def end(*_: Any) -> None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    _, status = os.waitpid(child, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return os.waitstatus_to_exitcode(status)


def _lines() -> Iterator[bytes]:
    """Lines of standard input, read without a buffer: lines that a child had buffered would be lost if it died."""
    rest = b""
    while chunk := os.read(0, 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


def _serve(function: Callable[..., Any], say: Say, cpu_seconds: float, memory_mb: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _limit_memory(memory_mb)
    for line in _lines():
        task = json.loads(line)
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            answer = {"result": function(task, lambda: say(good=True))}
        except Exception as error:  # a fault of the grader, which is reported as one and never as a wrong answer
            answer = {"exhausted": True} if _ran_out(error) else {"error": f"{type(error).__name__}: {error}"[:300]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        say(ms=1000 * (time.process_time() - start), **answer)


def _ran_out(error: BaseException | None) -> bool:
    """Whether memory or stack ran out, also where a library has raised an error of its own because of it."""
    while error is not None:
        if isinstance(error, MemoryError | RecursionError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _limit_memory(memory_mb: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # not every system can limit it; the time limit remains
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
