"""What a plan counts of a method's memory, against the method at work."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bridgelm.methods import METHODS, Method
from bridgelm.model import batching, grads
from bridgelm.model.groups import Group
from bridgelm.model.policy import Policy
from bridgelm.training import loop

from .variants import METHOD

SEVERAL = [name for name, method in METHODS.items() if method.gradients != Method.gradients]


class Buffers(dict[str, torch.Tensor]):
    __hash__ = object.__hash__  # type: ignore[assignment]  # so that a weak set can hold it


@pytest.mark.parametrize("name", ["grpo", "sft", "joint", "guide", "alternate", *SEVERAL])
def test_a_method_holds_as_many_gradients_of_theta_as_it_says(name: str, session: Callable[..., Any],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    one = session(METHOD[name])
    loop.take_step(one)
    theta = one.policy.groups["theta"].flat().keys()
    alive: weakref.WeakSet[Buffers] = weakref.WeakSet()
    most = dict.fromkeys(("demo", "rollout", "between"), 0)
    where, parked = ["between"], [0]

    def count() -> None:
        held = sum(len(buffers) == len(theta) for buffers in alive) + ("offset" in one.policy.groups)
        most[where[0]] = max(most[where[0]], held)

    def followed(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **named: Any) -> Any:
            found = make(*args, **named)
            if found.keys() != theta:
                return found
            found = Buffers(found)
            alive.add(found)
            count()
            return found
        return made

    def at_work(make: Callable[..., Any]) -> Callable[..., Any]:
        def passing(self: Policy, *args: Any, **named: Any) -> Any:
            try:
                return make(self, *args, **named)
            finally:
                where[0] = "between"
                count()
        return passing

    def of_kind(rows: Any, *args: Any) -> Any:
        where[0] = rows[0].kind if torch.is_grad_enabled() else "between"
        count()
        return collate(rows, *args)

    def park(self: Policy, gradient: Any) -> None:
        parked[0] = 1

    collate = batching.collate
    monkeypatch.setattr(batching, "collate", of_kind)
    monkeypatch.setattr(Group, "zeros", followed(Group.zeros))
    for name_of in ("mix", "blend"):
        monkeypatch.setattr(grads, name_of, followed(getattr(grads, name_of)))
    monkeypatch.setattr(Policy, "precondition", followed(Policy.precondition))
    monkeypatch.setattr(Policy, "grad", at_work(Policy.grad))
    monkeypatch.setattr(Policy, "park", park)
    for _ in range(2):
        loop.take_step(one)
    said = METHODS[name].gradients
    assert most == {key: getattr(said, key) if most[key] else 0 for key in most}
    assert parked[0] == said.parked
