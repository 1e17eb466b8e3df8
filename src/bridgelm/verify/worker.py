"""A worker process: reads one JSON task a line, answers one JSON line (`python -m bridgelm.verify.worker ...`).

The kernel enforces the limits, so nothing in the task can outlast them: ITIMER_PROF counts this process's CPU time and
ends it by SIGPROF, in C code too; RLIMIT_AS makes allocation fail.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
from typing import Any


def main(target: str, cpu_seconds: float, memory_mb: int) -> None:
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)

    def say(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    module, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        warm_up = getattr(sys.modules[module], "warm_up", None)
        if warm_up:
            warm_up()
    except Exception as error:  # whatever it is, the parent must hear why there is no worker
        say(broken=f"{type(error).__name__}: {error}")
        return
    _limit_memory(memory_mb)
    say(ready=True)
    for line in sys.stdin:
        task = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            answer = {"result": function(task, lambda: say(good=True))}
        except Exception as error:  # a fault of the grader: reported as such, never as a wrong answer
            answer = {"exhausted": True} if _ran_out(error) else {"error": f"{type(error).__name__}: {error}"[:300]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        say(**answer)


def _ran_out(error: BaseException | None) -> bool:
    """Whether memory or stack was what failed, also where a library has raised an error of its own over it."""
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
