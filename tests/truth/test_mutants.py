"""Each wrong version of the code is seen, by the check that it should be seen by."""

from __future__ import annotations

import pytest
from checks import Code
from exact import Quadratic, bridge_walk
from mutants import MUTANTS, failure, mutate, where_it_ends


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_seen(name: str) -> None:
    mutant = MUTANTS[name]
    code = mutant.code(name)
    said = failure(mutant.caught_by, code)
    assert said is not None, f"{name} passes {mutant.caught_by}"
    if mutant.ends:
        for found, wanted in zip(where_it_ends(code), mutant.ends):
            assert wanted is None or found == pytest.approx(wanted, abs=1e-9), said


def test_shadow_descent_diverges_when_it_should() -> None:
    """A pole of the descending shadow: past 1e12 at step 166 of test A."""
    code = MUTANTS["shadow_descends"].code("shadow_descends")
    path = bridge_walk(code.bridge, Quadratic(), 0.5, 400, limit=1e12)
    assert len(path.points) - 1 == 166
    assert len(bridge_walk(Code().bridge, Quadratic(), 0.5, 400, limit=1e12).points) - 1 == 400


def test_no_third_term_tends_to_d_over_c() -> None:
    code = MUTANTS["no_third_term"].code("no_third_term")
    for lam in (0.9, 0.99):
        end = bridge_walk(code.bridge, Quadratic(), lam, 1500, lr=0.3, settle=1e-14).end
        rest = 1 - lam  # (1 - l)(-w) + l (2 (1 - l)(3 - 2 w) - w + 1/2) = 0, which tends to w = 1/2 = d / c
        assert end[2] == pytest.approx((6 * lam * rest + 0.5 * lam) / (rest + 4 * lam * rest + lam), abs=1e-9)


def test_an_empty_mutation_is_the_shipped_code() -> None:
    """The machinery itself changes nothing: without replacements every check passes."""
    copy = mutate(Code().bridge, ())
    for name in ("trace", "order", "vanished_warning", "one_token"):
        assert failure(name, Code(bridge=copy)) is None


def test_a_text_that_is_gone_is_reported() -> None:
    with pytest.raises(AssertionError, match="found 0 times"):
        mutate(Code().bridge, (("this text is nowhere", ""),))
