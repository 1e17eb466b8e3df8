"""Rewrites the golden files: `python tests/golden/record.py [--rollouts] [NAME ...]`. Look at the difference before
committing it: a trajectory that moved is a method that changed, and belongs in the changelog.

Without `--rollouts` the recorded completions stay, and only the trajectories on them are written again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402

import golden  # noqa: E402


def record_rollouts() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = golden.session(golden.METHODS["grpo"], Path(folder))
        made.roll.begin(0)
        rows = made.roll(made.data.problems(6), group=8)
        # Some log-probs are those of a policy that has since moved, so that ratios reach the clip and the cap.
        kept = [[row.ids[row.own].tolist(), [round(float(x) + 0.4 * ((i * 5 + j) % 3 - 1), 6)
                                            for j, x in enumerate(row.old_logps[row.own])], row.finished]
                for i, row in enumerate(rows)]
        made.folder.close()
    golden.ROLLOUTS.write_text("[\n" + ",\n".join(json.dumps(one) for one in kept) + "\n]\n", encoding="utf-8")


def main() -> None:
    torch.set_num_threads(1)
    if "--rollouts" in sys.argv or not golden.ROLLOUTS.exists():
        record_rollouts()
    completions = golden.load(golden.ROLLOUTS)
    wanted = [name for name in sys.argv[1:] if not name.startswith("-")] or list(golden.METHODS)
    golden.TRAJECTORIES.mkdir(exist_ok=True)
    for name in wanted:
        found = golden.run(golden.METHODS[name], completions)
        (golden.TRAJECTORIES / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
