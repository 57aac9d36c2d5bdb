"""Charts as SVG that needs nothing else: curves, points with error bars, bars. Standard library only.

A chart is drawn 420 units wide with text of 12, so that it can be read at 400 pixels; wider pages set several side by
side (``<div class="charts">``). Pages add :data:`STYLE`; :func:`standalone` makes a file of its own. Colours are CSS
variables for light and dark, told apart by the colour-blind (after Okabe and Ito), and never alone: lines have dashes
from the eighth on, points have shapes. What is no finite number is never drawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from . import drawing, scales
from .drawing import RIGHT, ROW, SIZE, WIDTH, key
from .markup import THEME, text
from .scales import Point, Scale

BUCKETS, FEWEST = 260, 30  # places at which a long curve keeps its lowest and highest point: alone, and among many
TOGETHER = 12  # curves of a chart that have all these places
SPARSE = 40  # points up to which each is marked
FAINT = 0.3  # opacity of a curve behind its running mean
NOTHING = "no numbers yet"

STYLE = """
:root { --c0: #0072b2; --c1: #d55e00; --c2: #00855f; --c3: #b5478a; --c4: #8a6d00; --c5: #3f8fc4; --c6: #5c6670; }
@media (prefers-color-scheme: dark) {
  :root { --c0: #56b4e9; --c1: #f28e4b; --c2: #2cc59b; --c3: #e59ac4; --c4: #e8c33d; --c5: #9db8ff; --c6: #a8b3bf; }
}
.charts { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
svg.chart { display: block; width: 100%; max-width: 36rem; height: auto; font: 12px system-ui, sans-serif; }
.chart text { fill: var(--dim); font-variant-numeric: tabular-nums; }
.chart .title { fill: var(--text); font-weight: 600; font-size: 13px; }
.chart .unit { fill: var(--dim); font-weight: 400; font-size: 12px; }
.chart .name { fill: var(--text); }
.chart .tag { paint-order: stroke; stroke: var(--back); stroke-width: 3px; stroke-linejoin: round; }
.chart .grid { stroke: var(--line); }
.chart .axis { stroke: var(--dim); }
.chart .lead { stroke: var(--dim); stroke-width: .75; }
.sign { display: inline-block; width: .95rem; height: .95rem; margin-right: .35rem; vertical-align: -.13rem; }
.sign .mark { fill: var(--k); }
.k0 { --k: var(--c0); } .k1 { --k: var(--c1); } .k2 { --k: var(--c2); }
.k3 { --k: var(--c3); } .k4 { --k: var(--c4); } .k5 { --k: var(--c5); }
.k6 { --k: var(--c6); }
.chart .line { fill: none; stroke: var(--k); stroke-width: 1.75; stroke-linejoin: round; stroke-linecap: round; }
.chart .mark { fill: var(--k); stroke: var(--back); }
.chart .bar { fill: var(--k); opacity: .85; }
.chart .error { fill: none; stroke: var(--k); stroke-width: 1.25; opacity: .8; }
.chart .over { fill: none; stroke: var(--text); stroke-width: 1.25; }
.chart .gone { fill: none; stroke: var(--bad); stroke-width: 1.5; }
.chart .band { fill: transparent; }
.chart .band:hover { fill: var(--line); opacity: .45; }
"""


@dataclass(frozen=True)
class Series:
    """A curve: ``points`` (x, y), y None or NaN where there is no number; ``colour``: place in the palette, by default
    the series' own place; ``behind``: curves that it is the mean of, drawn faint instead of its own points."""

    name: str
    points: Sequence[tuple[float, float | None]]
    colour: int | None = None
    behind: Sequence[Sequence[tuple[float, float | None]]] = ()


@dataclass(frozen=True)
class Dot:
    """A labelled point of a scatter plot, with an interval (low, high) along either axis where it is known.

    ``note`` is what the pointer finds besides the numbers; ``tag`` what stands at the point instead of the label; a
    point of ``size`` below 1 has neither.
    """

    label: str
    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    colour: int = 0
    note: str = ""
    tag: str = ""
    size: float = 1.0


@dataclass(frozen=True)
class Bar:
    """A horizontal bar; ``interval`` (low, high) is drawn over it, ``reference`` is a line across it (such as a
    published figure)."""

    label: str
    value: float
    interval: tuple[float, float] | None = None
    colour: int = 0
    reference: float | None = None


def lines(
    series: Sequence[Series],
    *,
    title: str,
    x: str = "step",
    unit: str = "",
    log_x: bool = False,
    log_y: bool = False,
    zero: bool = False,
    smooth: float = 0.0,
    legend: bool | None = None,
    height: int = 200,
) -> str:
    """Curves over a common x axis.

    Args:
        title: what y is. x: what x is. unit: of y, behind the title; "%": y are shares, shown as percentages.
        log_x, log_y: a logarithmic axis; values of 0 and below count as none there.
        zero: y begins at 0.
        smooth: above 0, a running mean over this share of the points, the points themselves faint behind it.
        legend: names above the plot; None: where there are several curves.
        height: of the plot, in the units of the drawing.

    Curves of few points have each of them marked; a cross at the foot marks where a value was no finite number.
    """
    factor = 100.0 if unit == "%" else 1.0
    raw = [_points(one.points, factor, log_x, log_y) for one in series]
    behind = [
        [
            scales.smooth(points, smooth) if smooth and len(points) > SPARSE else points
            for points in (_points(curve, factor, log_x, log_y) for curve in one.behind)
        ]
        for one in series
    ]
    colours = [i if one.colour is None else one.colour for i, one in enumerate(series)]
    means = [scales.smooth(points, smooth) if smooth and len(points) > SPARSE else points for points in raw]
    named = [(one.name, colour, "line") for one, colour in zip(series, colours, strict=True)]
    body, top = drawing.head(title, unit, named if len(series) > 1 or legend else [])
    ys = [y for points in (*means, *itertools.chain(*behind)) for _, y in points if y is not None]
    # The noise behind a mean may leave the plot, but only its extremes.
    noisy = [
        points for points, mean, one in zip(raw, means, series, strict=True) if mean is not points and not one.behind
    ]
    noise = sorted(y for points in noisy for _, y in points if y)
    ys += noise[len(noise) // 100 : len(noise) - len(noise) // 100 : max(len(noise) // 100, 1)]
    y_scale = scales.scale(ys, top + height, top, log=log_y, zero=zero, pad=0.05)
    xs = [p[0] for points in (*raw, *itertools.chain(*behind)) for p in points]
    # What begins near 0, as steps do, is shown from there.
    near = bool(xs) and not log_x and 0 < min(xs) < 0.1 * max(xs)
    x_scale, y_ticks = _plot([0.0, *xs] if near else xs, y_scale, log_x=log_x)
    body += drawing.axes(x_scale, y_scale, y_ticks, x, whole=all(value.is_integer() for value in xs))
    faint = [
        curves or ([points] if mean is not points else [])
        for curves, points, mean in zip(behind, raw, means, strict=True)
    ]
    body.append(_inside(faint, means, colours, x_scale, y_scale))
    body += _bands(series, raw, means, x_scale, (top, height), (x, unit))
    for one, points, colour in zip(series, raw, colours, strict=True):
        if len(points) <= SPARSE:
            marks = [(at, value) for at, value in points if value is not None]
            hints = [f"{one.name}, {x} {_figure(at)}: {_value(value, unit)}" for at, value in marks]
            body += [
                drawing.shape(colour, x_scale.place(at), y_scale.place(value), hint)
                for (at, value), hint in zip(marks, hints, strict=True)
            ]
        body.append(drawing.crosses(points, x_scale, top + height))
    if not ys:
        body.append(drawing.words(x_scale.start + 8, top + height / 2, NOTHING))
    last = [next((y for _, y in reversed(points) if y is not None), None) for points in means]
    ends = zip([one.name for one in series], last, strict=True)
    said = "; ".join(f"{name} ends at {_value(end, unit)}" for name, end in ends if end is not None)
    return drawing.svg(f"{title} over {x}: {said or NOTHING}", body, top + height + 2 * ROW + 2)


def scatter(
    dots: Sequence[Dot],
    *,
    title: str,
    x: str,
    y: str,
    unit_x: str = "",
    unit_y: str = "",
    groups: Sequence[str] = (),
    height: int = 260,
) -> str:
    """Labelled points with error bars.

    Args:
        x, y: what the axes are. unit_x, unit_y: "%" for shares, shown as percentages.
        groups: what the colours (``Dot.colour``) 0, 1, ... mean, for a legend.
    """
    body, top = drawing.head(title, "", [(name, i, "mark") for i, name in enumerate(groups)])
    body.append(drawing.words(2, top + 4, f"{y} ({unit_y})" if unit_y else y, "y-name"))
    top += ROW - 2
    known = [one for dot in dots if (one := _known(dot, unit_x, unit_y)) is not None]
    tall = [v for one in known for v in (one.y, *(one.y_interval or ()))]
    wide = [v for one in known for v in (one.x, *(one.x_interval or ()))]
    y_scale = scales.scale(tall, top + height, top, pad=0.1)
    x_scale, y_ticks = _plot(wide, y_scale, pad=0.1)
    body += drawing.axes(x_scale, y_scale, y_ticks, f"{x} ({unit_x})" if unit_x else x)
    places = [(x_scale.place(one.x), y_scale.place(one.y)) for one in known]
    taken = [
        (across - 6 * one.size, down - 6 * one.size, across + 6 * one.size, down + 6 * one.size)
        for one, (across, down) in zip(known, places, strict=True)
    ]
    whiskers = list[drawing.Box]()
    for one, (across, down) in zip(known, places, strict=True):
        for interval, along in ((one.x_interval, x_scale), (one.y_interval, y_scale)):
            if interval:
                ends = along.place(interval[0]), along.place(interval[1])
                low, high = min(ends), max(ends)
                whiskers.append(
                    (low, down - 4, high, down + 4) if along is x_scale else (across - 4, low, across + 4, high)
                )
                body.append(f'<path {key(one.colour, "error")} d="{_whisker(ends, across, down, along is x_scale)}"/>')
    within = (x_scale.start, float(top), float(WIDTH - 2), float(top + height))
    names = []
    for one, (across, down) in sorted(zip(known, places, strict=True), key=lambda pair: -pair[0].size):
        parts = [(x, one.x, one.x_interval, unit_x), (y, one.y, one.y_interval, unit_y)]
        hint = "; ".join(f"{name} {_value(value, unit)}{_span(span, unit)}" for name, value, span, unit in parts)
        more = f"; {one.note}" if one.note else ""
        body.append(drawing.shape(one.colour, across, down, f"{one.label}: {hint}{more}", one.size))
        if one.size >= 1:
            names.append(drawing.label(one.tag or one.label, across, down, taken, whiskers, within))
    # Names over everything, so that no point covers the line that leads to one.
    body += names
    if not known:
        body.append(drawing.words(x_scale.start + 8, top + height / 2, NOTHING))
    said = ", ".join(f"{one.label} ({_value(one.x, unit_x)}, {_value(one.y, unit_y)})" for one in known)
    return drawing.svg(f"{title}, {y} against {x}: {said or NOTHING}", body, top + height + 2 * ROW + 2)


def bars(rows: Sequence[Bar], *, title: str, unit: str = "", zero: bool = True) -> str:
    """Horizontal bars with their values, in the given order.

    Args:
        unit: "%" for shares, shown as percentages. zero: they start at 0, else a little below the smallest value.
    """
    factor = 100.0 if unit == "%" else 1.0
    body, y = drawing.head(title, unit, [])
    known = [replace(bar, value=value * factor) for bar in rows if (value := scales.number(bar.value)) is not None]
    names = [scales.shorten(bar.label, WIDTH * 0.36, SIZE) for bar in known]
    left = max([scales.width(name, SIZE) for name in names], default=0.0) + 8
    spans = [_interval(bar.interval, factor) for bar in known]
    references = [None if (r := scales.number(bar.reference)) is None else r * factor for bar in known]
    figures = [f"{bar.value:.1f}" if unit == "%" else _figure(bar.value) for bar in known]
    room = max([scales.width(figure, SIZE) for figure in figures], default=0.0) + 10
    ends = [bar.value for bar in known] + [v for span in spans for v in span or ()]
    axis = scales.scale([*ends, *(r for r in references if r is not None)], left, WIDTH - room, zero=zero, pad=0.03)
    origin = axis.place(0.0) if axis.low <= 0 <= axis.high else axis.start
    for bar, name, span, reference, figure in zip(known, names, spans, references, figures, strict=True):
        end, middle = axis.place(bar.value), y + 8.5
        tips = [origin, end]
        hint = f"{bar.label}: {_value(bar.value, unit)}{_span(span, unit)}"
        body.append(drawing.words(left - 8, y + 13, name, "name", "end", bar.label if name != bar.label else ""))
        body.append(
            f'<rect {key(bar.colour, "bar")} x="{min(origin, end):.1f}" y="{y + 2}" '
            f'width="{max(abs(end - origin), 0.5):.1f}" height="13"><title>{text(hint)}</title></rect>'
        )
        if span:
            whisker = axis.place(span[0]), axis.place(span[1])
            tips += whisker
            body.append(f'<path class="over" d="{_whisker(whisker, 0, middle, True)}"/>')
        if reference is not None:
            tips.append(axis.place(reference))
            said = text(f"{bar.label}: reference {_value(reference, unit)}")
            body.append(f'<path class="gone" d="M{tips[-1]:.1f} {y}v17"><title>{said}</title></path>')
        body.append(drawing.words(max(tips) + 5, y + 13, figure))
        y += 22
    if not known:
        body.append(drawing.words(8, y + 13, NOTHING))
        y += 22
    said = ", ".join(f"{bar.label} {figure}" for bar, figure in zip(known, figures, strict=True))
    return drawing.svg(f"{title}: {said or NOTHING}", body, y + 2)


def standalone(chart: str) -> str:
    """A chart as an SVG file of its own, with its colours and a background."""
    style = f"<style>{THEME}{STYLE}</style><rect width='100%' height='100%' fill='var(--back)'/>"
    opening, _, rest = chart.partition(">")
    return f'{opening} xmlns="http://www.w3.org/2000/svg" width="{WIDTH}">{style}{rest}\n'


def _points(curve: Sequence[tuple[float, float | None]], factor: float, log_x: bool, log_y: bool) -> list[Point]:
    """Sorted by x, with None for every y that cannot be drawn."""
    points: list[Point] = []
    for across, up in curve:
        place, value = scales.number(across), scales.number(up)
        if place is not None and (place > 0 or not log_x):
            points.append((place, None if value is None or (log_y and value <= 0) else value * factor))
    return sorted(points, key=lambda point: point[0])


def _plot(xs: Sequence[float], y: Scale, *, log_x: bool = False, pad: float = 0.0) -> tuple[Scale, list[float]]:
    """The x axis beside the numbers of the y axis, and these."""
    ticks = y.ticks(5)
    left = max([scales.width(scales.words(value, ticks), SIZE) for value in ticks], default=0.0) + 8
    return scales.scale(xs, left, WIDTH - RIGHT, log=log_x, pad=pad), ticks


def _inside(
    faint: Sequence[Sequence[Sequence[Point]]],
    means: Sequence[Sequence[Point]],
    colours: Sequence[int],
    x: Scale,
    y: Scale,
) -> str:
    """The curves and what is faint behind each, cut at the edges of the plot."""
    count = len(means) + sum(map(len, faint))
    # Many curves in one plot are looked at as a whole: their points are not worth more of the page than those of few.
    buckets = max(min(BUCKETS, BUCKETS * TOGETHER // max(count, 1)), FEWEST)
    paths = []
    for curves, mean, colour in zip(faint, means, colours, strict=True):
        for curve in curves:
            drawn = drawing.path(scales.thin(curve, buckets), x, y)
            paths.append(f'<path {key(colour, "line")} opacity="{FAINT}" d="{drawn}"/>')
        paths.append(f'<path {key(colour, "line")} d="{drawing.path(scales.thin(mean, buckets), x, y)}"/>')
    # The box is a little larger than the plot, so that a line along its edge is whole.
    left, top, wide, high = x.start, y.end - 2, x.end - x.start + 2, y.start - y.end + 4
    place = f'x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{high:.1f}"'
    box = f'viewBox="{left:.1f} {top:.1f} {wide:.1f} {high:.1f}"'
    return f'<svg {place} {box} overflow="hidden">{"".join(paths)}</svg>'


def _bands(
    series: Sequence[Series],
    raw: Sequence[Sequence[Point]],
    means: Sequence[Sequence[Point]],
    x: Scale,
    vertical: tuple[int, int],
    said: tuple[str, str],
) -> list[str]:
    """For long curves: what they are at the places that the pointer may be at."""
    if not any(len(points) > SPARSE for points in raw):
        return []
    name, unit = said
    hints = []
    for band in range(drawing.BANDS):
        at = x.low + (band + 0.5) / drawing.BANDS * (x.high - x.low)
        at = 10.0**at if x.log else at
        there = [
            f"{one.name}: {_value(value, unit)}"
            for one, points in zip(series, means, strict=True)
            if (value := scales.at(points, at)) is not None and points[-1][0] >= at
        ]
        more = [f"and {len(there) - TOGETHER} more"] if len(there) > TOGETHER else []
        hints.append("\n".join([f"{name} {_figure(at)}", *there[:TOGETHER], *more]) if there else "")
    return drawing.bands(hints, x, *vertical)


def _known(dot: Dot, unit_x: str, unit_y: str) -> Dot | None:
    across, up = (100.0 if unit == "%" else 1.0 for unit in (unit_x, unit_y))
    x, y = scales.number(dot.x), scales.number(dot.y)
    if x is None or y is None:
        return None
    spans = _interval(dot.x_interval, across), _interval(dot.y_interval, up)
    return replace(dot, x=x * across, y=y * up, x_interval=spans[0], y_interval=spans[1])


def _interval(interval: tuple[float, float] | None, factor: float) -> tuple[float, float] | None:
    if interval is None:
        return None
    low, high = scales.number(interval[0]), scales.number(interval[1])
    return None if low is None or high is None else (low * factor, high * factor)


def _whisker(ends: tuple[float, float], x: float, y: float, across: bool) -> str:
    a, b = ends
    if across:
        return f"M{a:.1f} {y:.1f}H{b:.1f}M{b:.1f} {y - 3:.1f}v6M{a:.1f} {y - 3:.1f}v6"
    return f"M{x:.1f} {a:.1f}V{b:.1f}M{x - 3:.1f} {b:.1f}h6M{x - 3:.1f} {a:.1f}h6"


def _figure(value: float) -> str:
    digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return (digits if abs(value) < 1e15 else f"{value:.4g}").replace("-", "−")


def _value(value: float, unit: str) -> str:
    return f"{value:.2f} %" if unit == "%" else f"{_figure(value)} {unit}".rstrip()


def _span(interval: tuple[float, float] | None, unit: str) -> str:
    return f" ({_value(interval[0], unit)} to {_value(interval[1], unit)})" if interval else ""
