"""The compute ledger: what a run has spent, in FLOPs, whatever it spent them on.

2N a generated or scored token and 6N a trained one, N the number of weights of the model (a teacher's own for what it
scores); padding is not counted, the prompt of a group is generated from once. Evaluation is a measurement and is left
out for every method alike; so are the probes of `diagnose.every`, whose cost is kept in a line of its own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class Ledger:
    parameters: int
    generate: int = 0  # tokens
    score: int = 0
    train: int = 0
    rollouts: int = 0
    seconds: float = 0.0
    probe: int = 0  # forward passes of a token, for measurements only: counted apart
    teacher: int = 0  # tokens that a teacher scored
    teacher_parameters: int = 0

    def totals(self) -> dict[str, float]:
        n = self.parameters
        parts = {"flops/generate": 2.0 * n * self.generate, "flops/score": 2.0 * n * self.score,
                 "flops/train": 6.0 * n * self.train}
        if self.teacher:
            parts["flops/teacher"] = 2.0 * self.teacher_parameters * self.teacher
        beside = {"flops/probe": 2.0 * n * self.probe} if self.probe else {}
        return {"seconds": self.seconds, "rollouts": self.rollouts, "flops": sum(parts.values()),
                "tokens": self.generate + self.score + self.train + self.teacher, **parts, **beside}

    def state(self) -> dict[str, float]:
        return asdict(self)

    def load(self, state: dict[str, float]) -> None:
        for key, value in state.items():
            setattr(self, key, value)
