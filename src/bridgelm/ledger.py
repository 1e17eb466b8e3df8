"""The compute ledger: what a run has spent, in FLOPs, whatever it spent them on.

A generated or scored token costs 2N and a trained one 6N, where N is the number of weights of the model (of the
teacher, for tokens that it scores). Padding is not counted, and the prompt of a group counts once. Evaluation is a
measurement and is not counted, for any method; the cost of `diagnose.every` is counted apart, as `flops/probe`. """

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
    probe: int = 0  # tokens of the measurements of `diagnose.every`, in forward passes; counted apart
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
