"""`Panel`, which describes one figure, and `svg`, which draws it for the HTML page.

Colours are CSS variables, so that figures follow light and dark mode; `files.py` draws the same panels with matplotlib
as PNG and SVG files."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Okabe and Ito's colours, which stay apart for colour-blind eyes, darkened where white paper needs it.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b0479a", "#a87900", "#56a0d3", "#6a6a6a", "#7b5cc4")
DASHES = ("", "6 3", "2 3")  # after eight colours the lines are dashed
GREY = -1  # the colour of lines that are only the background of others


@dataclass(frozen=True)
class Series:
    """One line. `low` and `high` make a band, `hollow` marks points that are not to be trusted."""

    label: str
    colour: int
    xs: Sequence[float]
    ys: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    hollow: Sequence[bool] | None = None
    tips: Sequence[str] | None = None
    line: bool = True
    strong: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    xlabel: str
    series: Sequence[Series]
    x_format: Callable[[float], str] = lambda value: f"{value:g}"
    y_format: Callable[[float], str] = lambda value: f"{value:.3g}"
    marks: Sequence[tuple[float, str]] = ()  # horizontal lines, with what they mean
    log: bool = False  # the y axis
    clock: bool = False  # the x axis is a time
    note: str = ""
    floor: float | None = None  # a y value that the axis must show
    cuts: Sequence[float] = ()  # vertical lines: where one stage ends and the next begins


@dataclass(frozen=True)
class Bar:
    """One row of an interval chart: a mean, its interval, and the single seeds."""

    label: str
    colour: int
    value: float
    low: float | None
    high: float | None
    points: Sequence[float] = ()
    text: str = ""


CLOCK = (1, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)  # round spans of time


def ticks(low: float, high: float, count: int = 5, clock: bool = False) -> list[float]:
    """Round numbers (or round times) within [low, high], about `count` of them."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    raw = span / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    if clock:
        step = next((time for time in CLOCK if time >= raw), step)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class _Scale:
    """Maps data to pixels on one axis."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool = False, pad: float = 0.0) -> None:
        self.log = log
        data = [self._of(value) for value in values if math.isfinite(value) and (value > 0 or not log)] or [0.0, 1.0]
        low, high = min(data), max(data)
        if high - low < 1e-12 * max(1.0, abs(high)):
            low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (0.0, 1.0)
        pad *= high - low
        self.low, self.high, self.start, self.end = low - pad, high + pad, start, end

    def _of(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value

    def __call__(self, value: float) -> float:
        share = (self._of(value) - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, count: int, clock: bool = False) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high, count, clock)
        powers = range(math.ceil(self.low), math.floor(self.high) + 1)
        found = [10.0**power for power in powers][:: max(1, len(powers) // count)]
        return found if len(found) > 1 else [10.0**value for value in ticks(self.low, self.high, 3)]


def tone(colour: int) -> str:
    """The class of a colour in the page's style sheet."""
    return "sx" if colour == GREY else f"s{colour % len(PALETTE)}"


def svg(panel: Panel, width: int = 390, height: int = 250) -> str:
    """The panel as inline SVG. Every text that comes from data is escaped."""
    labels = [series for series in panel.series if series.label and len(series.xs) and series.colour != GREY]
    right = width - (min(118, 12 + max((6.1 * len(s.label) for s in labels), default=0)) if len(labels) > 1 else 14)
    left, top, bottom = 46, 10, height - 34
    xs = [x for series in panel.series for x in series.xs]
    ys = [y for s in panel.series for row in (s.ys, s.low or (), s.high or ()) for y in row]
    ys += [mark for mark, _ in panel.marks] + ([panel.floor] if panel.floor is not None else [])
    x, y = _Scale(xs, left, right), _Scale(ys, bottom, top, panel.log, 0.06)
    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{esc(panel.title)}">']
    for value in y.ticks(4):
        out.append(f'<line class="grid" x1="{left}" x2="{right:.0f}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
                   f'<text class="tick" x="{left - 6}" y="{y(value) + 3.5:.1f}" text-anchor="end">'
                   f"{esc(panel.y_format(value))}</text>")
    for value in x.ticks(max(3, int((right - left) / 70)), panel.clock):
        out.append(f'<text class="tick" x="{x(value):.1f}" y="{bottom + 15}" text-anchor="middle">'
                   f"{esc(panel.x_format(value))}</text>")
    out.append(f'<line class="axis" x1="{left}" x2="{right:.0f}" y1="{bottom}" y2="{bottom}"/>')
    out.append(f'<text class="name" x="{(left + right) / 2:.0f}" y="{height - 4}" text-anchor="middle">'
               f"{esc(panel.xlabel)}</text>")
    for mark, meaning in panel.marks:
        out.append(f'<line class="mark" x1="{left}" x2="{right:.0f}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>'
                   f'<text class="tick" x="{left + 4}" y="{y(mark) - 4:.1f}">{esc(meaning)}</text>')
    out += [f'<line class="mark" x1="{x(cut):.1f}" x2="{x(cut):.1f}" y1="{top}" y2="{bottom}"/>' for cut in panel.cuts]
    grey = [series for series in panel.series if series.colour == GREY]
    for series in [*grey, *(s for s in reversed(panel.series) if s.colour != GREY)]:  # the first one lies on top
        out += _series(series, x, y)
    if len(labels) > 1:
        out += _labels(labels, x, y, top, bottom)
    return "".join([*out, "</svg>"])


def _series(series: Series, x: _Scale, y: _Scale) -> list[str]:
    mark, dash = tone(series.colour), DASHES[max(0, series.colour) // len(PALETTE) % len(DASHES)]
    out = []
    if series.low is not None and series.high is not None and len(series.xs) > 1 and series.colour != GREY:
        upper = [f"{x(a):.1f},{y(b):.1f}" for a, b in zip(series.xs, series.high)]
        lower = [f"{x(a):.1f},{y(b):.1f}" for a, b in zip(series.xs, series.low)]
        out.append(f'<polygon class="band {mark}" points="{" ".join(upper + lower[::-1])}"/>')
    if series.line and len(series.xs) > 1:
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(series.xs, series.ys))
        style = f' stroke-dasharray="{dash}"' if dash else ""
        out.append(f'<polyline class="line {mark}{" strong" if series.strong else ""}" points="{points}"{style}/>')
    if series.hollow is not None or series.tips is not None or len(series.xs) == 1 or not series.line:
        size = 1.6 if series.colour == GREY else 2.4
        for i, (a, b) in enumerate(zip(series.xs, series.ys)):
            tip = f' data-tip="{esc(series.tips[i])}"' if series.tips else ""
            kind = "hollow" if series.hollow is not None and series.hollow[i] else "dot"
            out.append(f'<circle class="{kind} {mark}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="{size}"{tip}/>')
    return out


def _labels(series: Sequence[Series], x: _Scale, y: _Scale, top: float, bottom: float) -> list[str]:
    """Names beside the lines' ends. A name moves up or down until it covers no other name and, if it can, no line; a
    thin leader shows where it belongs."""
    lines = [[(x(a), y(b)) for a, b in zip(one.xs, one.ys)] for one in series]
    taken: list[tuple[float, float, float]] = []  # left, right, height
    out = []
    for one in sorted(series, key=lambda s: (-x(s.xs[-1]), y(s.ys[-1]), s.colour)):
        start, height = x(one.xs[-1]) + 7, y(one.ys[-1])
        end = start + 6.4 * len(one.label)
        moves = sorted((3.0 * i for i in range(-60, 61)), key=abs)
        free = [height + move for move in moves if top <= height + move <= bottom - 3
                and all(abs(height + move - at) >= 12 or end < left or start > right for left, right, at in taken)]
        clear = [place for place in free if abs(place - height) < 45 and not _crossed(lines, start, end, place)]
        place = [*clear, *free, height][0]
        taken.append((start, end, place))
        mark = tone(one.colour)
        if abs(place - height) > 7:
            out.append(f'<line class="leader {mark}" x1="{start - 4:.1f}" y1="{height:.1f}" '
                       f'x2="{start:.1f}" y2="{place:.1f}"/>')
        weight = " strong" if one.strong else ""
        out.append(f'<text class="label {mark}{weight}" x="{start + 1:.1f}" y="{place + 3.5:.1f}">'
                   f"{esc(one.label)}</text>")
    return out


def _crossed(lines: Sequence[Sequence[tuple[float, float]]], start: float, end: float, place: float) -> bool:
    """Whether any line runs through the text box from `start` to `end` around the height `place`."""
    for line in lines:
        for (x0, y0), (x1, y1) in itertools.pairwise(line):
            if x1 < start or x0 > end:
                continue
            share = [(min(max(at, x0), x1) - x0) / (x1 - x0) if x1 > x0 else 0.0 for at in (start, end)]
            heights = [y0 + part * (y1 - y0) for part in share]
            if min(heights) < place + 6 and max(heights) > place - 6:
                return True
    return False


def svg_bars(bars: Sequence[Bar], fmt: Callable[[float], str], zero: bool = False, width: int = 560) -> str:
    """Rows of mean, interval and single seeds; with `zero`, a line at zero to lie left or right of."""
    height, left = 24 * len(bars) + 34, 16 + min(170, max(6.3 * len(bar.label) for bar in bars))
    text = 10 + max(6.1 * len(bar.text) for bar in bars)
    values = [v for bar in bars for v in (bar.value, bar.low, bar.high, *bar.points) if v is not None] + [0.0] * zero
    x = _Scale(values, left, width - text, pad=0.04)
    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="intervals">']
    for value in x.ticks(5):
        out.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="4" y2="{height - 24}"/>'
                   f'<text class="tick" x="{x(value):.1f}" y="{height - 8}" text-anchor="middle">'
                   f"{esc(fmt(value))}</text>")
    if zero:
        out.append(f'<line class="mark" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="4" y2="{height - 24}"/>')
    for row, bar in enumerate(bars):
        y, mark = 18 + 24 * row, tone(bar.colour)
        out.append(f'<text class="label {mark}" x="{left - 10:.0f}" y="{y + 4}" text-anchor="end">'
                   f"{esc(bar.label)}</text>")
        if bar.low is not None and bar.high is not None:
            out.append(f'<line class="whisker {mark}" x1="{x(bar.low):.1f}" x2="{x(bar.high):.1f}" y1="{y}" y2="{y}"/>')
        out += [f'<circle class="seed {mark}" cx="{x(point):.1f}" cy="{y}" r="2.6"/>' for point in bar.points]
        out.append(f'<circle class="dot {mark}" cx="{x(bar.value):.1f}" cy="{y}" r="4.6"/>'
                   f'<text class="value" x="{width - 2}" y="{y + 4}" text-anchor="end">{esc(bar.text)}</text>')
    return "".join([*out, "</svg>"])


def esc(text: object) -> str:
    """Text made harmless in HTML, in and outside of quotes; control characters that HTML forbids are shown as �."""
    clean = "".join(c if c >= " " or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return html.escape(clean, quote=True)
