"""Wrong versions of the shipped code, each of which a truth test must see.

A mutant is the module's own source text with a few replacements, compiled under another name. Each replaced text must
be found exactly once: a refactoring that moves it fails the mutant's test loudly, and the mutant is to be rewritten.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from types import ModuleType

Swaps = tuple[tuple[str, str], ...]


def mutate(module: ModuleType, swaps: Swaps, name: str = "mutant") -> ModuleType:
    assert module.__file__
    source = Path(module.__file__).read_text(encoding="utf-8")
    for old, new in swaps:
        assert source.count(old) == 1, f"found {source.count(old)} times in {module.__file__}: {old!r}"
        source = source.replace(old, new)
    copy = types.ModuleType(f"{module.__name__}__{name}")
    copy.__file__ = module.__file__
    sys.modules[copy.__name__] = copy  # dataclasses and annotations look their module up
    try:
        exec(compile(source, f"{module.__name__}:{name}", "exec"), copy.__dict__)
    finally:
        del sys.modules[copy.__name__]
    return copy
