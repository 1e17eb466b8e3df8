"""Syncs files to disk, and computes their checksums."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import xxhash


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to disk. Windows cannot open a folder, and flushes its names itself."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flushes everything in a folder, before the folder is renamed into place."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def digest(path: Path) -> str:
    """The file's xxHash of 128 bits, which costs little beside reading the file, where SHA-256 and BLAKE2b cost more
    than most disks do. It detects accidental damage and changes, but not a forged file."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]


def digest_of(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))
