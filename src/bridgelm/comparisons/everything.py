"""`compare --methods all`: configures every registered method on the same data, and says which are left out and why.

Fair means equal data: the embedded task is taken in the paired layout, since some methods need demonstrations of the
training problems themselves and none needs that they are of others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bridgelm.analysis.comparison import disagreement
from bridgelm.config import catalogue
from bridgelm.config.run_config import RunConfig, load_config
from bridgelm.data.cursors import with_teacher
from bridgelm.errors import UserError
from bridgelm.runs.preflight import check_static

ALL = "all"
LAYOUT = "data.toy.layout"
Find = Callable[[str, Path | None, Sequence[str]], RunConfig]


def with_layout(base: str | Path, overrides: Sequence[str]) -> list[str]:
    """The overrides, and the paired layout with them unless they name one."""
    named = any(item.partition("=")[0].strip() == LAYOUT for item in overrides)
    toy = load_config(base, overrides).data.train.startswith("toy:")
    return [*overrides, *([f"{LAYOUT}=paired"] if toy and not named else [])]


def label_of(name: str, beside: Path | None) -> str:
    """A recipe of the method's own name stands for it; stages one after the other are best known as cold start."""
    own = beside is not None and (beside / f"{name}.toml").is_file()
    return "cold_start" if name == "sequence" and not own else name


def everything(own: RunConfig, beside: Path | None, overrides: Sequence[str],
               find: Find) -> tuple[dict[str, RunConfig], list[str]]:
    """The configurations of all registered methods that can be compared with `own`, and a line for each other one."""
    facts, found, notes = data_facts(own), dict[str, RunConfig](), []
    for name in catalogue.option_classes():
        label = label_of(name, beside)
        try:
            try:
                config = find(label, beside, overrides)
            except UserError as error:  # stages that no longer add up to an overridden number of steps, say
                config = find(label, None, ())
                notes.append(f"{label}: its recipe does not fit these settings, so its defaults are taken ({error})")
            check(config, own, facts)
        except UserError as error:
            notes = [note for note in notes if not note.startswith(f"{label}: ")]
            notes.append(f"{label} is left out: {error}")
            continue
        found[label] = config
    return found, notes


def check(config: RunConfig, own: RunConfig, facts: frozenset[str]) -> None:
    key = disagreement(own.resolved(), config.resolved())
    if key:
        raise UserError(f"its recipe has another {key}")
    for need in sorted(catalogue.needs_of(config.method) - with_teacher(facts, config)):
        if (remedy := catalogue.remedy(need)) != need:  # what is no fact of the data is checked below
            raise UserError(f"the data lacks {remedy}")
    check_static(config)


def data_facts(config: RunConfig) -> frozenset[str]:
    from bridgelm.data.chat import load_chat
    from bridgelm.data.cursors import Data, check_lengths, load_splits

    check_static(config)
    return Data(check_lengths(load_splits(config), load_chat(config.model), config), config.seed).facts()
