"""Wrong versions of BRIDGE and of what it is made of: each is seen by the check that is named for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checks import CHECKS, Code
from mutation import Mutant, mutants
from ratios import RATIO_CHECKS

from bridgelm.methods import bridge, bridge_controls, shadow
from bridgelm.objective import losses, shadow_diagnostics


def check(name: str) -> Callable[[], None]:
    return lambda: (CHECKS | RATIO_CHECKS)[name](Code())


MUTANTS = mutants(
    bridge,
    # (1), (2) and (3)
    Mutant("sign", "Bridge.update", 1, by=check("trace")),  # the shadow's part added
    Mutant("term", "Bridge.update", 3, by=check("fixed_points")),  # lambda for 1 - lambda, in (1)
    Mutant("term", "Bridge.update", 5, by=check("fixed_points")),  # and in (3)
    Mutant("drop", "Bridge.update", 20, by=check("trace")),  # without (2)
    Mutant("drop", "Bridge.update", 24, by=check("trace")),  # without (3)
    Mutant("snapshot", "Bridge.at_shadow", by=check("order")),  # the shadow's gradient at theta
    Mutant("sign", "Bridge.lam", by=check("every_option_of_the_step")),
    Mutant("drop", "shadow_setup", 12, by=check("every_option_of_the_step"), of=shadow),  # w at theta's rate
    # re-sync and rest
    Mutant("late", "Bridge.update", 10, by=check("every_option_of_the_step")),  # to the new theta
    Mutant("late", "Bridge.update", 13, by=check("resync")),  # after the gradient at the shadow
    Mutant("drop", "Bridge.update", 15, by=check("resync")),  # without the step
    Mutant("mask", "Bridge.update", 1, by=check("every_option_of_the_step")),  # stepped twice
    Mutant("compare", "Bridge.resyncs", 2, by=check("every_option_of_the_step")),
    Mutant("branch", "gradient_or_last", 3, by=check("resting_shadow"), of=shadow),  # never rests
    # warnings
    Mutant("branch", "Bridge.update", 10, by=check("vanished_warning")),  # never counted anew
    Mutant("clip", "vanishes", 0, by=check("vanished_warning")),
    Mutant("mask", "is_still", 0, by=check("still_shadow_warning"), of=shadow),
    Mutant("mask", "is_still", 1, by=check("still_shadow_warning"), of=shadow),
    Mutant("compare", "has_left", 1, by=check("ess_warning"), of=shadow),
    # ratios and the gain
    Mutant("clip", "pg_truncate", 0, by=check("one_token"), of=losses),
    Mutant("detach", "pg_truncate", by=check("one_token"), of=losses),
    Mutant("swap", "pg_truncate", by=check("one_token"), of=losses),
    Mutant("compare", "pg_taper", 1, by=check("one_token"), of=losses),
    Mutant("clip", "pg_taper", 0, by=check("one_token"), of=losses),
    Mutant("swap", "gain", 0, by=check("gap"), of=shadow_diagnostics),
    Mutant("instead", "gain", "leave_one_out", to="centre", by=check("gap"), of=shadow_diagnostics),
    Mutant("swap", "diagnose", 0, by=check("two_tokens"), of=shadow_diagnostics),
    # controls
    Mutant("branch", "Third.without_shadow", 0, by=check("controls_path"), of=bridge_controls),
    Mutant("branch", "Third.without_shadow", 1, by=check("controls_path"), of=bridge_controls),
    Mutant("branch", "shadow_setup", 0, by=check("controls_cost"), of=shadow),
    Mutant("branch", "shadow_setup", 2, by=check("controls_cost"), of=shadow),
    Mutant("mask", "sample_shadow", 2, by=check("shadow_reward"), of=shadow),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()
