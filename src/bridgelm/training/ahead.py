"""One-step-ahead rollouts (`rollout.ahead`): an engine with its own device draws step t + 1's answers while t trains.

The answers are drawn with the weights that step t begins with, so they are off-policy by one update. This is measured
and corrected as the mismatch of an engine is: the trainer computes their log-probs when they are used.

To find out what step t + 1 will ask for, the method's `gather` is rehearsed up to the point where it draws; data and
method are then put back to where they were. If step t + 1 asks for something else after all, it is drawn anew.
"""

from __future__ import annotations

import json
from typing import Any

from bridgelm.data.cursors import Data
from bridgelm.engine.ahead import Rehearsed
from bridgelm.errors import UserError
from bridgelm.methods import Method
from bridgelm.rollout.roller import Roller
from bridgelm.runs.folder import clean


def ask_ahead(method: Method, data: Data, roll: Roller, step: int) -> None:
    """Asks for the answers of the step after `step`. It runs after the gather of `step` and before its update."""
    if not roll.config.rollout.ahead:
        return
    if roll.calls > 1:
        raise UserError(f"rollout.ahead: method {method.phase!r} draws {roll.calls} times in step {step + 1}, and the "
                        "later draws may depend on the earlier ones; set rollout.ahead = false")
    if step + 1 == roll.config.steps or step + 1 in method.starts():  # a new stage changes the weights as it begins
        return
    kept = data.state(), plain(method.state())
    roll.begin(step + 1)
    roll.rehearsing = True
    try:
        method.gather(data, roll, step + 1)
    except Rehearsed:
        pass
    finally:
        roll.rehearsing = False
        data.load(kept[0])
        method.load(kept[1])


def plain(state: Any) -> Any:
    """A deep copy of a state, as it would come back from a checkpoint: it shares nothing with the method."""
    return json.loads(json.dumps(clean(state)))
