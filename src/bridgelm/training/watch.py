"""What a run warns of after some steps in which nothing can be learnt, whatever its method.

A step without rollouts, or without an update, says nothing about them and leaves a count as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from bridgelm.types import Metrics

PATIENCE = 20  # steps in a row


class Watch:
    def __init__(self) -> None:
        self.counts = {"flat": 0, "still": 0, "cut": 0}

    def warnings(self, metrics: Metrics, limit: int) -> list[str]:
        """What is to be said after a step, each once in a run. `limit` is that of an answer's new tokens."""
        norms = [value for key, value in metrics.items() if key.startswith("grad_norm/")]
        seen = {"flat": metrics["flat_groups"] == 1.0 if "flat_groups" in metrics else None,
                "still": not any(norms) if norms else None,
                "cut": metrics["truncated"] == 1.0 if "truncated" in metrics else None}
        due = []
        for name, found in seen.items():
            if found is None or self.counts[name] >= PATIENCE:  # said already
                continue
            self.counts[name] = self.counts[name] + 1 if found else 0
            if self.counts[name] == PATIENCE:
                due.append(name)
        texts = {"flat": _flat(metrics), "still": self._still(), "cut": _cut(limit)}
        return [f"for {PATIENCE} steps in a row {texts[name]}" for name in due]

    def _still(self) -> str:
        reasons = {"flat": "no group has differing rewards to learn from: see the warning about them",
                   "cut": "every answer is cut, which rollout.mask_overlong leaves out of the loss"}
        why = [reason for name, reason in reasons.items() if self.counts[name]]
        return "the gradient was exactly zero, so nothing is learnt: " + (why[0] if why else (
            "no token has a weight in the loss; look at the weights and masks that the settings of [method] give, and "
            "at loss/ in metrics.jsonl"))

    def state(self) -> dict[str, int]:
        return self.counts

    def load(self, state: Mapping[str, int]) -> None:
        self.counts = dict(state)


def _flat(metrics: Metrics) -> str:
    right = metrics.get("correct")
    if right == 0.0:
        why = ("no answer was right: look at samples.jsonl beside the gold answers, grade one with `bridgelm grade`, "
               "and run `bridgelm check FILE --data`; if the verdicts are right, the problems are too hard: take "
               "easier ones, a larger rollout.group, or a stage of sft first")
    elif right == 1.0:
        why = "every answer was right: the problems are too easy, or the reward is met by anything; take harder ones"
    else:
        why = ("each problem is always or never answered right: raise rollout.group or rollout.temperature, or take "
               "problems between")
    return f"all answers of each group had the same reward, so groups teach nothing; {why}"


def _cut(limit: int) -> str:
    return (f"every answer was cut at rollout.max_new_tokens = {limit}, before it ended: raise the limit, or see that "
            "the model ends its answers (its chat template and end tokens, rollout.stop, or a stage of sft)")
