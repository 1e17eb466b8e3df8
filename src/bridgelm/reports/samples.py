"""Sample rollouts in the report: selects them, embeds them as inert JSON, and shows them with a small viewer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from bridgelm.runs.reader import Run

SAMPLE_BYTES = 1_500_000  # the most sample rollouts on a page; more are thinned out, evenly over the steps


def samples_section(runs: Sequence[Run]) -> str:
    """The viewer's controls and its data; report.js does the rest. Nothing if no run kept a sample."""
    data = sample_data(runs)
    if not data["rows"]:
        return ""
    kept, total = len(data["rows"]), data["total"]
    thinned = f" {kept:,} of the {total:,} that were kept are on this page." if total > kept else ""
    return (
        '<div class="controls"><label>run <select id="v-run"></select></label>'
        '<label><button id="v-earlier" type="button" aria-label="earlier step">◀</button>'
        '<select id="v-step" aria-label="step"></select>'
        '<button id="v-later" type="button" aria-label="later step">▶</button></label>'
        '<label>show <select id="v-verdict"><option value="">all</option>'
        '<option value="correct">right</option><option value="wrong">wrong</option>'
        '<option value="error">grader error</option></select></label>'
        '<input id="v-search" type="search" placeholder="search text" aria-label="search text">'
        '<button id="v-back" type="button">back</button><button id="v-next" type="button">next</button>'
        '<span id="v-count" class="soft"></span></div><div id="v-list" class="grid cols2"></div>'
        "<noscript><p>The viewer needs JavaScript.</p></noscript>"
        f'<p class="caption">Rollouts drawn in training.{thinned}</p>'
        f'<script type="application/json" id="samples">{script_json(data)}</script>'
    )


def sample_data(runs: Sequence[Run]) -> dict[str, Any]:
    """The samples as rows, prompts kept once; where there are too many, steps are left out evenly over each run."""
    keys = ("problem_id", "completion", "answer", "reward", "verdict", "difficulty")
    each = SAMPLE_BYTES / max(1, len(runs))
    prompts: dict[str, int] = {}
    rows, total, named = [], 0, []
    for run in runs:
        samples = run.samples()
        total += len(samples)
        steps = sorted({row.get("step", 0) for row in samples})
        size = sum(len(str(row.get("completion"))) + len(str(row.get("prompt"))) + 80 for row in samples)
        stride = max(1, -(-size // int(each)))
        kept = {*steps[::-1][::stride]}  # from the end, so that the last step is always there
        if samples:
            named.append(run.name)
        for row in samples:
            if row.get("step", 0) in kept:
                prompt = prompts.setdefault(str(row.get("prompt", "")), len(prompts))
                first, *rest = (row.get(key) for key in keys)
                rows.append([len(named) - 1, row.get("step", 0), prompt, first, *rest])
    return {"runs": named, "prompts": list(prompts), "rows": rows, "total": total}


def script_json(data: Any) -> str:
    """JSON that cannot end, or break out of, the <script> element that it lies in."""
    dumped = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        dumped = dumped.replace(sign, f"\\u{ord(sign):04x}")
    return dumped.encode("utf-8", "replace").decode()  # lone surrogates, which no file can hold
