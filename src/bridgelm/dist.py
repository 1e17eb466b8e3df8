"""Several processes of one run (`torchrun --nproc-per-node N -m bridgelm train FILE`).

Every rank reads the same data, draws the same numbers and runs the whole method; what costs time is dealt out, and what
comes of it is exchanged until all have all of it. A method so sees what it would see in one process, and no count is
summed over ranks. Weights may be in shards (`sharding.py`): sums over elements are then sums over ranks (`total`).
Collectives are here, and those of torch's FSDP in blocks of `moving_parts`. Before each the ranks meet: they make sure
that they are at the same one, and learn if one of them has failed, so that no rank waits for one that will not come.
"""

from __future__ import annotations

import importlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as td
from safetensors.numpy import load, save
from torch import Tensor
from torch.distributed import PrefixStore, rendezvous  # pyright: ignore[reportPrivateImportUsage]

from bridgelm.errors import UserError

BUCKET = 2**24  # elements of one all-reduce
PATIENCE = timedelta(hours=2)  # a rank may wait while another decodes or grades; a dead one is noticed at once
FINE, USER, STOPPED, CRASHED = range(4)


class PeerFailed(RuntimeError):
    """Another rank crashed; its own traceback says why."""


class _State:
    meetings = 0
    over = False  # whether no collective can be answered any more
    parted = False  # whether each rank holds a part of every weight


def world() -> int:
    return td.get_world_size() if td.is_available() and td.is_initialized() else 1


def rank() -> int:
    return td.get_rank() if world() > 1 else 0


def first() -> bool:
    """Whether this rank is the one that writes, prints and grades."""
    return rank() == 0


def launched() -> bool:
    """Whether torchrun, or something like it, started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def restarted() -> bool:
    """Whether torchrun started these processes anew after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def joined() -> Iterator[None]:
    """The processes that torchrun started as one group, for the length of the block; an error of one ends all."""
    if not launched() or td.is_initialized():
        yield
        return
    # Its functions have as a default the group that exists when it is first imported. That group would outlive the
    # block, and its threads abort when they end after Python.
    importlib.import_module("torch.distributed.nn.functional")
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    store, own, count = next(rendezvous("env://", timeout=PATIENCE))
    # torchrun keeps its store over restarts, and in it the addresses of processes that are gone. The launchers of
    # several machines count restarts apart; there it is to be told not to keep it (docs/distributed.md).
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT") if os.environ.get("GROUP_WORLD_SIZE", "1") == "1" else None
    td.init_process_group(backend, store=PrefixStore(f"attempt {attempt}", store), rank=own, world_size=count,
                          timeout=PATIENCE)
    _State.meetings, _State.over, _State.parted = 0, False, False
    try:
        yield
        wait()  # nobody leaves while another can still fail
    except BaseException as error:
        _tell(error)
        raise
    finally:
        td.destroy_process_group()


def share(count: int) -> range:
    """Which of `count` equal pieces of work are this rank's."""
    return range(rank(), count, world())


def bounds(count: int) -> tuple[int, int]:
    """Which of `count` rows are this rank's, where each has a part: the last ranks may have fewer, or none."""
    size = -(-count // world())
    return min(count, rank() * size), min(count, (rank() + 1) * size)


def wait() -> None:
    _meet("wait")


def agree(flag: bool) -> bool:
    """Whether it holds on any rank."""
    return flag if world() == 1 else any(table[3] for table in _meet("agree", int(flag)))


def from_first(make: Callable[[], Any]) -> Any:
    """A value of JSON that rank 0 alone makes."""
    if world() == 1:
        return make()
    return json.loads(_exchange("value", json.dumps(make()).encode() if first() else b"")[0])


def gather(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The named arrays of all ranks. No two ranks have the same name."""
    if world() == 1:
        return dict(arrays)
    parts = _exchange("arrays", save({name: np.asarray(a, order="C") for name, a in arrays.items()}))
    return {name: array for part in parts for name, array in load(part).items()}


def add(tensors: Sequence[Tensor]) -> None:
    """Sums over ranks, in place; to the bit the same on all of them."""
    if world() == 1:
        return
    _meet("add")
    buckets: dict[tuple[torch.dtype, torch.device], list[list[Tensor]]] = {}
    for t in tensors:
        open_ = buckets.setdefault((t.dtype, t.device), [[]])
        if open_[-1] and sum(x.numel() for x in open_[-1]) + t.numel() > BUCKET:
            open_.append([])
        open_[-1].append(t)
    for bucket in (bucket for open_ in buckets.values() for bucket in open_):
        flat = torch.cat([t.reshape(-1) for t in bucket])
        _guarded(td.all_reduce, flat)
        for t, found in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            t.copy_(found.view_as(t))


def part(parted: bool) -> bool:
    """Says whether each rank holds but a part of every weight from now on. In one process it never does."""
    _State.parted = parted and world() > 1
    return _State.parted


def parted() -> bool:
    return _State.parted


def total(value: float) -> float:
    """Of a sum over elements of weights, of which each rank has added up those that it holds."""
    if not parted():
        return value
    sums = torch.tensor([value], dtype=torch.float64)
    add([sums])
    return float(sums)


@contextmanager
def moving_parts() -> Iterator[None]:
    """A block in which torch moves parts of weights between ranks. All have to come through it alike: one that fails in
    it cannot tell the others, which wait for its parts. It leaves, and they fail when they lose it."""
    if not parted():
        yield
        return
    _meet("parts")
    try:
        yield
    except BaseException:
        _State.over = True
        raise


# -- meetings ----------------------------------------------------------------------------------------------------------

def _guarded(collective: Callable[..., Any], *args: Any) -> None:
    try:
        collective(*args)
    except RuntimeError:  # of the connection: a rank was killed
        _State.over = True
        raise


def _gathered(values: Tensor) -> list[Tensor]:
    found = [torch.empty_like(values) for _ in range(world())]
    _guarded(td.all_gather, found, values)
    return found


def _meet(what: str, size: int = 0, error: str = "", status: int = FINE) -> list[list[int]]:
    """(status, kind, number, size) of every rank."""
    if world() == 1:
        return []
    _State.meetings += 1
    kind = zlib.crc32(what.encode())
    size = len(error.encode()) if status else size
    table = [t.tolist() for t in _gathered(torch.tensor([status, kind, _State.meetings, size]))]
    failed = [r for r, row in enumerate(table) if row[0]]
    if failed:
        text = _payloads(error.encode(), [row[3] if row[0] else 0 for row in table])[failed[0]].decode()
        _State.over = True
        if status == FINE:
            raise {USER: UserError, STOPPED: KeyboardInterrupt, CRASHED: PeerFailed}[table[failed[0]][0]](text)
    elif len({(row[1], row[2]) for row in table}) > 1:
        raise AssertionError(f"the ranks are at different collectives: {table}")
    return table


def _payloads(mine: bytes, sizes: Sequence[int]) -> list[bytes]:
    padded = torch.zeros(max(1, *sizes), dtype=torch.uint8)
    if mine:
        padded[:len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    return [found[:size].numpy().tobytes() for found, size in zip(_gathered(padded), sizes, strict=True)]


def _exchange(what: str, mine: bytes) -> list[bytes]:
    return _payloads(mine, [row[3] for row in _meet(what, len(mine))])


def _tell(error: BaseException) -> None:
    """Lets the others know that this rank ends here, in place of the collective that they are at or come to."""
    if _State.over:
        return
    if isinstance(error, UserError):
        _meet("end", error=str(error), status=USER)
    elif isinstance(error, KeyboardInterrupt):
        _meet("end", error=str(error), status=STOPPED)
    else:
        _meet("end", error=f"rank {rank()} failed ({type(error).__name__}: {error})", status=CRASHED)
