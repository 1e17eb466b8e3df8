"""What a plan counts of a method's memory, against the method at work."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bridgelm import training
from bridgelm.groups import Group
from bridgelm.methods import METHODS
from bridgelm.policy import Policy

from .variants import METHOD

SEVERAL = [name for name, method in METHODS.items() if method.gradients > 1]


class Buffers(dict[str, torch.Tensor]):
    __hash__ = object.__hash__  # type: ignore[assignment]  # so that a weak set can hold it


@pytest.mark.parametrize("name", ["grpo", "sft", "joint", *SEVERAL])
def test_a_method_holds_as_many_gradients_of_theta_as_it_says(name: str, session: Callable[..., Any],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Buffers] = weakref.WeakSet()
    most, zeros, drain = [0], Group.zeros, Policy._drain

    def followed(self: Group) -> Any:
        made = Buffers(zeros(self))
        if self.full:
            alive.add(made)
        return made

    def counted(self: Policy, into: Any) -> None:
        most[0] = max(most[0], sum(bool(buffers) for buffers in alive))
        drain(self, into)

    monkeypatch.setattr(Group, "zeros", followed)
    monkeypatch.setattr(Policy, "_drain", counted)
    one = session(METHOD[name])
    for _ in range(3):
        training.take_step(one)
    assert most[0] == METHODS[name].gradients
