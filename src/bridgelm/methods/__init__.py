"""The training methods, one file each, and the registry that names them."""

from typing import Any

from bridgelm.config import plugins
from bridgelm.config.run_config import RunConfig
from bridgelm.methods.alternate import Alternate
from bridgelm.methods.amft import Amft
from bridgelm.methods.barrier import Barrier
from bridgelm.methods.base import Method
from bridgelm.methods.bread import Bread
from bridgelm.methods.bridge import Bridge
from bridgelm.methods.bridge_dial import BridgeDial
from bridgelm.methods.bridge_leaky import BridgeLeaky
from bridgelm.methods.chord import Chord
from bridgelm.methods.data_mixing import DataMixing
from bridgelm.methods.dft import Dft
from bridgelm.methods.fdiv_sft import FdivSft
from bridgelm.methods.gac import Gac
from bridgelm.methods.gift import Gift
from bridgelm.methods.grpo import Grpo
from bridgelm.methods.gta import Gta
from bridgelm.methods.guide import Guide
from bridgelm.methods.hpt import Hpt
from bridgelm.methods.interleaved import Interleaved
from bridgelm.methods.joint import Joint
from bridgelm.methods.kdrl import Kdrl
from bridgelm.methods.lspo import Lspo
from bridgelm.methods.luffy import Luffy
from bridgelm.methods.pear import Pear
from bridgelm.methods.prefix_rft import PrefixRft
from bridgelm.methods.relift import Relift
from bridgelm.methods.rft import Rft
from bridgelm.methods.sasr import Sasr
from bridgelm.methods.sequence import Sequence
from bridgelm.methods.sft import Sft
from bridgelm.methods.shuffle_r1 import ShuffleR1
from bridgelm.methods.srft import Srft
from bridgelm.methods.staged import Staged
from bridgelm.methods.token_lead import TokenLead
from bridgelm.methods.trapo import Trapo
from bridgelm.methods.uft import Uft

METHODS: dict[str, type[Method]] = {
    "sft": Sft,
    "grpo": Grpo,
    "sequence": Sequence,
    "alternate": Alternate,
    "joint": Joint,
    "barrier": Barrier,
    "bridge": Bridge,
    "bridge_leaky": BridgeLeaky,
    "bridge_dial": BridgeDial,
    "token_lead": TokenLead,
    "guide": Guide,
    "dft": Dft,
    "interleaved": Interleaved,
    "data_mixing": DataMixing,
    "shuffle_r1": ShuffleR1,
    "trapo": Trapo,
    "sasr": Sasr,
    "amft": Amft,
    "luffy": Luffy,
    "srft": Srft,
    "chord": Chord,
    "gac": Gac,
    "kdrl": Kdrl,
    "pear": Pear,
    "staged": Staged,
    "gta": Gta,
    "hpt": Hpt,
    "relift": Relift,
    "uft": Uft,
    "prefix_rft": PrefixRft,
    "bread": Bread,
    "lspo": Lspo,
    "rft": Rft,
    "fdiv_sft": FdivSft,
    "gift": Gift,
}



def build(options: Any, run: RunConfig) -> Method:
    """The method that options belong to: one of ours, or one's own (docs/own-method.md)."""
    cls = METHODS.get(options.name) or plugins.load_method(options.name)
    return cls(options, run)


__all__ = ["METHODS", "Method", "build"]
