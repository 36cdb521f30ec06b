"""Small SVG pictures for the report: curves over time, bars against a goal, intervals. No plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["against_chance", "bullet", "histogram", "interval_bar", "line_plot", "time_bars"]

COLOURS = ("var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)")
MOST_POINTS = 400
Points = Sequence[tuple[float, float]]


def line_plot(
    series: Mapping[str, Points],
    *,
    title: str,
    log: bool = False,
    x_label: str = "minutes",
    x_ticks: Sequence[float] | None = None,
    y_range: tuple[float, float] | None = None,
    width: int = 440,
    height: int = 230,
) -> str:
    """Curves, against minutes unless `x_label` names something else.

    A curve of many points is drawn faintly, with a running mean on top.

    Args:
        series: name to (x, y); values that are not finite are left out (with `log`, also those not positive).
        x_ticks: the first and the last are the ends of the axis; round numbers from 0 to the last point if left out.
        y_range: as wide as the curves if left out; with `log`, powers of ten.
    """
    kept = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)]
        for name, points in series.items()
    }
    kept = {name: _thinned(points) for name, points in kept.items() if points}
    if not kept:
        return ""
    to_y = math.log10 if log else float
    xs = [x for points in kept.values() for x, _ in points]
    ys = [to_y(y) for points in kept.values() for _, y in points]
    x_lo, x_hi = (x_ticks[0], x_ticks[-1]) if x_ticks else (0.0, max(max(xs), 1e-6))
    y_lo, y_hi = y_range or _roomy(min(ys), max(ys))
    left, right, top, bottom = 46, 12, 30, 30

    def at(x: float, y: float) -> str:
        px = left + (x - x_lo) / (x_hi - x_lo) * (width - left - right)
        py = height - bottom - (to_y(y) - y_lo) / (y_hi - y_lo) * (height - top - bottom)
        return f"{px:.1f},{py:.1f}"

    parts = [f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text class="plot-title" x="{left}" y="14">{escape(title)}</text>')
    for tick in _log_ticks(y_lo, y_hi) if log else _ticks(y_lo, y_hi):
        value = 10**tick if log else tick
        y = at(x_lo, value).split(",")[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{float(y) + 3.5:.1f}" text-anchor="end">{value:.3g}</text>')
    for tick in x_ticks or _ticks(x_lo, x_hi):
        x = at(tick, 10**y_lo if log else y_lo).split(",")[0]
        parts.append(f'<text class="tick" x="{x}" y="{height - bottom + 15}" text-anchor="middle">{tick:.3g}</text>')
    parts.append(f'<text class="tick" x="{width - right}" y="{height - 3}" text-anchor="end">{escape(x_label)}</text>')
    legend_x = left + 16 + 8 * len(title)
    for (name, points), colour in zip(kept.items(), COLOURS * 9, strict=False):
        many = len(points) > 40
        drawn = " ".join(at(x, y) for x, y in points)
        parts.append(f'<polyline class="curve{" faint" if many else ""}" stroke="{colour}" points="{drawn}"/>')
        if many:
            smooth = " ".join(at(x, y) for x, y in _running_mean(points))
            parts.append(f'<polyline class="curve" stroke="{colour}" points="{smooth}"/>')
        if len(points) <= 40:
            parts += [
                '<circle r="2.2" fill="{}" cx="{}" cy="{}"/>'.format(colour, *at(x, y).split(",")) for x, y in points
            ]
        if len(kept) > 1:
            parts.append(f'<circle r="3.5" cx="{legend_x}" cy="10" fill="{colour}"/>')
            parts.append(f'<text class="tick" x="{legend_x + 7}" y="14">{escape(name)}</text>')
            legend_x += 20 + 6 * len(name)
    return "".join(parts) + "</svg>"


def bullet(value: float, gate: float, aim: float | None, *, higher_is_better: bool) -> str:
    """A bar of the value with marks at the gate and the aim; the scale starts at 0."""
    largest = max(value, gate, aim or 0.0) or 1.0
    scale = 1.0 if higher_is_better and largest <= 1 else largest * 1.1
    style = "good" if (value >= gate if higher_is_better else value <= gate) else "bad"
    width = 180

    def at(x: float) -> float:
        return min(x / scale, 1.0) * width

    marks = (
        f'<line class="gate" x1="{at(gate):.1f}" x2="{at(gate):.1f}" y1="0" y2="16"><title>gate {gate:g}</title></line>'
    )
    if aim is not None:
        marks += f'<circle class="aim" cx="{at(aim):.1f}" cy="8" r="3.5"><title>aim {aim:g}</title></circle>'
    return (
        f'<svg class="bullet" viewBox="-4 0 {width + 8} 16">'
        f'<rect class="track" width="{width}" height="8" y="4" rx="4"/>'
        f'<rect class="{style}" width="{max(at(value), 2):.1f}" height="8" y="4" rx="4"/>{marks}</svg>'
    )


def interval_bar(mean: float, lo: float, hi: float) -> str:
    """A dot at the mean and a line over the interval, on a scale of 0 to 1."""
    width = 120
    return (
        f'<svg class="interval" aria-hidden="true" viewBox="-4 0 {width + 8} 12">'
        f'<line class="axis" x1="0" x2="{width}" y1="6" y2="6"/>'
        f'<line class="span" x1="{lo * width:.1f}" x2="{hi * width:.1f}" y1="6" y2="6"/>'
        f'<circle class="dot" cx="{mean * width:.1f}" cy="6" r="3.5"/></svg>'
    )


def against_chance(intervals: Mapping[str, tuple[float, float, float]]) -> str:
    """One line a name of (mean, lo, hi) on a scale of 0 to 1, with a mark at 1/2; the first is the one that matters."""
    width, step = 160, 14
    height = step * len(intervals)
    middle = width / 2
    parts = [f'<line class="chance" x1="{middle}" x2="{middle}" y1="0" y2="{height}"/>']
    for place, (name, (mean, lo, hi)) in enumerate(intervals.items()):
        y = step * place + step / 2
        parts.append(
            f'<g class="{"first" if place == 0 else "other"}"><title>{escape(name)}</title>'
            f'<line class="axis" x1="0" x2="{width}" y1="{y}" y2="{y}"/>'
            f'<line class="span" x1="{lo * width:.1f}" x2="{hi * width:.1f}" y1="{y}" y2="{y}"/>'
            f'<circle class="dot" cx="{mean * width:.1f}" cy="{y}" r="3.5"/></g>'
        )
    return f'<svg class="against" aria-hidden="true" viewBox="-4 0 {width + 8} {height}">{"".join(parts)}</svg>'


def histogram(counts: Mapping[str, int], *, title: str, bad: str = "", width: int = 440, height: int = 230) -> str:
    """Upright bars with their counts.

    Args:
        bad: the bar that counts failures.
    """
    left, right, top, bottom = 12, 12, 44, 24
    tallest, step = max(counts.values(), default=0) or 1, (width - left - right) / max(len(counts), 1)
    label = f"{title}: " + ", ".join(f"{name} {count}" for name, count in counts.items())
    parts = [
        f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f'<text class="plot-title" x="{left}" y="14">{escape(title)}</text>'
        f'<line class="grid" x1="{left}" x2="{width - right}" y1="{height - bottom}" y2="{height - bottom}"/>'
    ]
    for place, (name, count) in enumerate(counts.items()):
        tall = count / tallest * (height - top - bottom)
        x, y = left + place * step, height - bottom - tall
        style = "bad" if name == bad else "time"
        parts.append(
            f'<rect class="{style}" x="{x + 0.1 * step:.1f}" y="{y:.1f}" width="{0.8 * step:.1f}" height="{tall:.1f}"/>'
            f'<text class="tick" x="{x + step / 2:.1f}" y="{y - 4:.1f}" text-anchor="middle">{count}</text>'
            f'<text class="tick" x="{x + step / 2:.1f}" y="{height - bottom + 15}" text-anchor="middle">'
            f"{escape(name)}</text>"
        )
    return "".join(parts) + "</svg>"


def time_bars(seconds: Mapping[str, float], *, width: int = 900) -> str:
    """Horizontal bars of where the time went, longest scale first to last as given."""
    longest = max(seconds.values(), default=0) or 1
    rows = []
    for place, (name, value) in enumerate(seconds.items()):
        y = place * 24
        bar = value / longest * (width - 290)
        rows.append(f'<text class="bar-name" x="0" y="{y + 15}">{escape(name)}</text>')
        rows.append(f'<rect class="time" x="200" y="{y + 4}" width="{max(bar, 1):.1f}" height="14" rx="3"/>')
        rows.append(f'<text class="tick" x="{206 + bar:.1f}" y="{y + 15}">{_duration(value)}</text>')
    return f'<svg class="times" viewBox="0 0 {width} {24 * len(seconds)}">{"".join(rows)}</svg>'


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _roomy(lo: float, hi: float) -> tuple[float, float]:
    """A little room above and below; never an empty range."""
    room = (hi - lo) * 0.06 or max(abs(hi) * 0.1, 1e-6)
    return lo - room, hi + room


def _ticks(lo: float, hi: float, about: int = 5) -> list[float]:
    """Round numbers within [lo, hi]."""
    step = 10 ** math.floor(math.log10((hi - lo) / about))
    step *= next(factor for factor in (1, 2, 5, 10) if (hi - lo) / (step * factor) <= about)
    first = math.ceil(lo / step - 1e-9)
    return [round(step * k, 12) for k in range(first, math.floor(hi / step + 1e-9) + 1)]


def _log_ticks(lo: float, hi: float) -> list[float]:
    """Logarithms of 1, 2 and 5 times powers of ten within [lo, hi]; plain round numbers where those are few."""
    found = [
        power + math.log10(digit)
        for power in range(math.floor(lo), math.ceil(hi) + 1)
        for digit in (1, 2, 5)
        if lo <= power + math.log10(digit) <= hi
    ]
    if len(found) > 6:
        found = [tick for tick in found if abs(tick - round(tick)) < 1e-9]
    return found if len(found) >= 2 else _ticks(lo, hi, 4)


def _thinned(points: Points) -> list[tuple[float, float]]:
    """At most `MOST_POINTS`, means of neighbours."""
    group = math.ceil(len(points) / MOST_POINTS)
    chunks = [points[i : i + group] for i in range(0, len(points), group)]
    return [(sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def _running_mean(points: Points) -> list[tuple[float, float]]:
    """Mean over a centred window of a twentieth of the curve, shrinking at both ends."""
    reach = max(1, len(points) // 40)
    smooth = []
    for place, (x, _) in enumerate(points):
        around = min(reach, place, len(points) - 1 - place)
        window = [y for _, y in points[place - around : place + around + 1]]
        smooth.append((x, sum(window) / len(window)))
    return smooth
