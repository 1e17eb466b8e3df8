"""One-step-ahead rollouts: the answers of step t + 1 are asked for with the weights that step t begins with, and an
engine with a device of its own draws them while step t trains. They are off-policy by one update, which is corrected
and measured as an engine's mismatch is: by the trainer's log-probs when they are used.

What step t + 1 will ask for is found by a rehearsal of the method's `gather`, which ends where it draws; then data and
method are put back to where they were. When step t + 1 asks for something else after all, it is drawn anew.
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
    """After the gather of `step`, before its update."""
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
    """As it comes back from a checkpoint, and sharing nothing with the method."""
    return json.loads(json.dumps(clean(state)))
