"""Runs work on several ranks: forks of this process, so that torch is loaded once."""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridgelm import dist
from bridgelm.errors import UserError


def on_ranks(count: int, work: Callable[[], Any], folder: Path) -> list[Any]:
    """What `work` returns (JSON) on each rank; a UserError's text as `error`, anything else as `crash`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    children = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            try:
                with dist.joined():
                    found = work()
            except UserError as error:
                found = {"error": str(error)}
            except KeyboardInterrupt as error:
                found = {"stopped": str(error)}
            except BaseException as error:
                traceback.print_exc()
                found = {"crash": f"{type(error).__name__}: {error}"}
            (folder / f"{rank}.json").write_text(json.dumps(found))
            sys.stderr.flush()
            os._exit(0)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * count
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
