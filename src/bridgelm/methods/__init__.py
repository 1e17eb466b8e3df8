"""The registry: one line a method."""

from bridgelm.methods.alternate import Alternate
from bridgelm.methods.base import Method
from bridgelm.methods.bridge import Bridge
from bridgelm.methods.grpo import Grpo
from bridgelm.methods.joint import Joint
from bridgelm.methods.sequence import Sequence
from bridgelm.methods.sft import Sft

METHODS: dict[str, type[Method]] = {
    "sft": Sft,
    "grpo": Grpo,
    "sequence": Sequence,
    "alternate": Alternate,
    "joint": Joint,
    "bridge": Bridge,
}

__all__ = ["METHODS", "Method"]
