"""The text and tables of a diagnosis: definitions, findings, and what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from bridgelm.analysis.stats import Estimate
from bridgelm.diagnosis.facts import History, Subject, Switch
from bridgelm.reports.panels import signed
from bridgelm.reports.text import Table

DEFINITIONS = (
    "CE is the mean negative log-likelihood of a demonstration's token, in nats, over a fixed draw of them; dCE its "
    "change over a stage. Above 0 the demonstrations are fitted worse.",
    "Reward is the mean of fresh answers to a fixed part of the validation problems, drawn with the same random "
    "numbers at every probe; dR is what a stage took from it, its start minus its end: above 0 reward was lost.",
    "The cosine is that of the gradients of the two losses in theta, SFT on those demonstrations and RL on those "
    "answers. Noise in either shrinks it towards 0; “without noise” divides by norms from products of half-batches "
    "instead, is itself noisy, and is left out where noise drowns a norm.",
    "KL and distance are from the weights at the stage's own start: KL(live || start) a token, by the k3 estimate on "
    "the fresh answers; distance is |live - start| / |start| over all weights.",
    "A dip is the lowest of several looks, so some depth is to be expected from noise alone: it is called clear if it "
    "is over twice the standard error of the difference of two looks. Between looks nothing is known.",
    "Intervals are 95 %, Student's t over seeds; with one seed there is none, and nothing is claimed.",
)


def number(estimate: Estimate | None, digits: int = 3, sign: bool = False, scale: float = 1.0) -> str:
    """1.234 [1.2, 1.3]; the interval only where there are seeds to take it over."""
    if estimate is None:
        return "–"

    def write(value: float) -> str:
        return signed(scale * value, digits) if sign else f"{scale * value:.{digits}f}".replace("-", "−")

    text = write(estimate.value)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{write(estimate.low)}, {write(estimate.high)}]"


def change(start: Estimate | None, end: Estimate | None, digits: int, scale: float = 1.0) -> str:
    return "–" if start is None or end is None else " → ".join(f"{scale * e.value:.{digits}f}" for e in (start, end))


def name(subject: Subject) -> list[str]:
    stage = subject.stage
    what = stage.kind if stage.method == "all" else f"{stage.method} ({stage.kind})"
    return [subject.label, what, f"{stage.start}–{stage.end}"]


def coupling_table(found: Sequence[Subject], colours: Sequence[int]) -> Table:
    rows = []
    for subject in found:
        f = subject.figures()
        lost = f["reward_change"]
        dr = None if lost is None else Estimate(-lost.value, None if lost.high is None else -lost.high,
                                                None if lost.low is None else -lost.low, lost.n)
        rows.append([*name(subject), change(f["ce_start"], f["ce_end"], 3), number(f["ce_change"], 3, True),
                     change(f["reward_start"], f["reward_end"], 2), number(dr, 3, True),
                     change(f["accuracy_start"], f["accuracy_end"], 1, 100),
                     number(f["accuracy_change"], 1, True, 100)])
    headers = ["run", "stage", "steps", "CE", "dCE", "reward", "dR", "validation, %", "change, points"]
    return Table(headers, rows, colours, "From the start of each stage to its end; means over the seeds.")


def drift_table(found: Sequence[Subject], colours: Sequence[int]) -> Table:
    rows = []
    for subject in found:
        f = subject.figures()
        negative = f["cosine_negative"]
        rows.append([*name(subject), number(f["cosine"], 3, True), number(f["cosine_min"], 3, True),
                     "–" if negative is None else f"{100 * negative.value:.0f}%",
                     number(f["cosine_clean"], 2, True), number(f["kl"], 4), number(f["distance_share"], 4)])
    headers = ["run", "stage", "steps", "cosine, mean", "lowest", "below 0", "without noise", "KL from start",
               "distance from start"]
    caption = "Cosine of the SFT and the RL gradient over the stage's probes; drift at its end."
    return Table(headers, rows, colours, caption)


def switch_table(found: Sequence[Subject], colours: Sequence[int]) -> Table:
    rows, marks = [], []
    for subject, colour in zip(found, colours):
        switches = subject.switches()
        if not switches:
            continue
        marks.append(colour)
        points = [f"{100 * fmean([getattr(s, key) for s in switches]):.1f}" for key in ("before", "lowest", "depth")]
        rows.append([*name(subject)[:2], str(subject.stage.start), *points, f"{clear(switches)} of {len(switches)}",
                     _steps([s.steps_to_lowest for s in switches]),
                     _steps([s.steps_to_recover for s in switches]),
                     signed(100 * fmean([s.gain for s in switches]))])
    headers = ["run", "into", "at step", "before, %", "lowest, %", "depth, points", "clear dips", "steps to lowest",
               "steps to recover", "gain at the end, points"]
    caption = "Validation accuracy around each switch; means over the seeds, steps of each seed."
    return Table(headers, rows, marks, caption)


def clear(switches: Sequence[Switch]) -> int:
    return sum(s.depth > 2 * s.error for s in switches)


def _steps(values: Sequence[int | None]) -> str:
    return ", ".join("never" if value is None else str(value) for value in values)


def sentences(found: Sequence[Subject]) -> list[str]:
    """Do the two degradations of arXiv 2601.07389 show, and does a switch dip? Claimed only over seeds."""
    out = []
    for subject in found:
        stage, f = subject.stage, subject.figures()
        who = f"{subject.label}: {stage.kind} ({stage.method}, steps {stage.start}–{stage.end})"
        if stage.kind == "RL" and f["ce_change"]:
            out.append(f"{who} {_verdict(f['ce_change'], 'the CE of the demonstrations', 3, 1, 'nats a token')}.")
        if stage.kind == "SFT" and stage.start:
            out += [f"{who} {_verdict(f['reward_change'], 'reward', 3)}."] if f["reward_change"] else []
            out += [f"{who} {_verdict(f['accuracy_change'], 'validation accuracy', 1, 100, 'points')}."
                    ] if f["accuracy_change"] else []
        switches = subject.switches()
        if switches:
            dips = clear(switches)
            back = [s.steps_to_recover for s in switches if s.depth > 2 * s.error]
            what = ("no clear dip" if not dips else
                    f"a clear dip in {dips} of {len(switches)} seed{'s' * (len(switches) > 1)}, recovered after "
                    f"{_steps(back)} steps")
            depth = 100 * fmean([s.depth for s in switches])
            out.append(f"{subject.label}: at the switch into {stage.method} (step {stage.start}) validation accuracy "
                       f"has {what}; mean depth {depth:.1f} points.")
    return out


def _verdict(estimate: Estimate | None, what: str, digits: int, scale: float = 1.0, unit: str = "") -> str:
    assert estimate is not None
    size = " ".join(part for part in (number(estimate, digits, True, scale), unit) if part)
    verb = "raised" if estimate.value > 0 else "lowered"
    if estimate.low is None or estimate.high is None:
        return f"{verb} {what} ({size}; one seed, nothing is claimed)"
    if estimate.low <= 0 <= estimate.high:
        return f"is not shown to have changed {what} ({size})"
    return f"{verb} {what} ({size})"


def missing(histories: Sequence[History]) -> list[str]:
    """What could not be said, why, and what to do about it."""
    out = []
    for history in histories:
        run, stages = history.run, history.stages
        if not history.probes:
            out.append(f"{run.name} has no probes: nothing is known of CE, gradients and drift. Set diagnose.every in "
                       "its next training, or measure the models that it has kept with --measure.")
            continue
        if not history.probed:
            kept = ", ".join(str(step) for step in history.probes)
            out.append(f"{run.name} was measured after its training, at steps {kept}: the course between them is "
                       "not known.")
        lost = [str(stage.start) for stage in stages if stage.start and stage.start not in history.probes]
        if lost:
            out.append(f"{run.name} has kept no model of the switch at step {', '.join(lost)}: changes over single "
                       "stages are not known. diagnose.every > 0 keeps them.")
    open_runs = [history.run.name for history in histories if history.run.status != "finished"]
    if open_runs:
        out.append(f"Not finished: {', '.join(open_runs)}.")
    return out
