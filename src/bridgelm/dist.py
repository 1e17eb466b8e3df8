"""Runs on several processes, started by `torchrun --nproc-per-node N -m bridgelm train FILE`: collectives and errors.

Every rank reads the same data, draws the same random numbers and runs the whole method. Only the expensive work is
divided among the ranks, and its results are exchanged, so that every rank has all of them. A method therefore sees what
it would see in a run of one process, and counts need not be summed over ranks. If weights are sharded, sums over their
elements are summed over ranks (`total`). All collectives are in this file, except those of torch's FSDP,
which run in blocks of `moving_parts`. Before each collective the ranks meet: they check that all are at the same one,
and learn if one of them has failed, so that no rank waits for one that will not come.
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
PATIENCE = timedelta(hours=2)  # how long a rank may wait while another decodes or grades; death is noticed at once
FINE, USER, STOPPED, CRASHED = range(4)


class PeerFailed(RuntimeError):
    """Another rank crashed; its own traceback says why."""


class _State:
    meetings = 0
    over = False  # whether collectives have become impossible
    parted = False  # whether weights are sharded over ranks


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
    """Joins the processes that torchrun started into one group for the block; an error in one of them ends all."""
    if not launched() or td.is_initialized():
        yield
        return
    # The functions of this module bind the group that exists when it is first imported as a default. Imported later,
    # it would keep our group alive beyond the block, and threads of a group that outlives Python abort.
    importlib.import_module("torch.distributed.nn.functional")
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    store, own, count = next(rendezvous("env://", timeout=PATIENCE))
    # torchrun keeps its store over restarts, with the addresses of processes that are gone, so each attempt has a
    # prefix of its own. On several machines the launchers count restarts separately, so there torchrun must be told
    # not to keep the store (docs/distributed.md).
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT") if os.environ.get("GROUP_WORLD_SIZE", "1") == "1" else None
    td.init_process_group(backend, store=PrefixStore(f"attempt {attempt}", store), rank=own, world_size=count,
                          timeout=PATIENCE)
    _State.meetings, _State.over, _State.parted = 0, False, False
    try:
        yield
        wait()  # no rank leaves while another one can still fail
    except BaseException as error:
        _tell(error)
        raise
    finally:
        td.destroy_process_group()


def share(count: int) -> range:
    """Which of `count` equal pieces of work are this rank's."""
    return range(rank(), count, world())


def bounds(count: int) -> tuple[int, int]:
    """The start and end of this rank's shard of `count` rows; the last ranks may have fewer rows, or none."""
    size = -(-count // world())
    return min(count, rank() * size), min(count, (rank() + 1) * size)


def wait() -> None:
    _meet("wait")


def agree(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return flag if world() == 1 else any(table[3] for table in _meet("agree", int(flag)))


def from_first(make: Callable[[], Any]) -> Any:
    """A JSON value that rank 0 alone computes and sends to all ranks."""
    if world() == 1:
        return make()
    return json.loads(_exchange("value", json.dumps(make()).encode() if first() else b"")[0])


def gather(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The named arrays of all ranks together. Names must differ between ranks."""
    if world() == 1:
        return dict(arrays)
    parts = _exchange("arrays", save({name: np.asarray(a, order="C") for name, a in arrays.items()}))
    return {name: array for part in parts for name, array in load(part).items()}


def add(tensors: Sequence[Tensor]) -> None:
    """Sums tensors over ranks, in place; the result is bitwise the same on all ranks."""
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
    """Sets whether weights are sharded over ranks from now on. In a run of one process they never are."""
    _State.parted = parted and world() > 1
    return _State.parted


def parted() -> bool:
    return _State.parted


def total(value: float) -> float:
    """The sum over all elements of weights, given the sum over those that this rank holds."""
    if not parted():
        return value
    sums = torch.tensor([value], dtype=torch.float64)
    add([sums])
    return float(sums)


@contextmanager
def moving_parts() -> Iterator[None]:
    """A block in which FSDP moves shards of weights between ranks. All ranks must pass through it alike. One that fails
    in it cannot tell the others, which wait for its shards; it leaves, and they fail when they lose the connection."""
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
    except RuntimeError:  # the connection is lost, as a rank was killed
        _State.over = True
        raise


def _gathered(values: Tensor) -> list[Tensor]:
    found = [torch.empty_like(values) for _ in range(world())]
    _guarded(td.all_gather, found, values)
    return found


def _meet(what: str, size: int = 0, error: str = "", status: int = FINE) -> list[list[int]]:
    """Exchanges (status, kind of collective, its number, size of the payload) with all ranks. If a rank has failed, its
    error is raised here too."""
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
    """Tells the other ranks, at the next collective, that this one has failed."""
    if _State.over:
        return
    if isinstance(error, UserError):
        _meet("end", error=str(error), status=USER)
    elif isinstance(error, KeyboardInterrupt):
        _meet("end", error=str(error), status=STOPPED)
    else:
        _meet("end", error=f"rank {rank()} failed ({type(error).__name__}: {error})", status=CRASHED)
