"""SFT with another loss or other data: stages before RL, and baselines by themselves."""

from __future__ import annotations

from typing import Literal

from bridgelm.options.base import Strict


class DftOptions(Strict):
    """SFT whose tokens weigh their own probability. The paper has nothing to set."""

    name: Literal["dft"] = "dft"
    # Whose probability weighs: the policy's (DFT), or that of a frozen copy of the start (PriFT, 2606.09396).
    weights_of: Literal["live", "reference"] = "live"
