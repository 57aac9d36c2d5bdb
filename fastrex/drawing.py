"""The parts of a chart as SVG: titles and legends, axes, curves, marks, labels that keep clear of one another. Standard
library only; see :mod:`fastrex.charts` for whole charts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from . import scales
from .markup import text
from .scales import Point, Scale

WIDTH, SIZE, ROW = 420, 12, 17  # of a drawing, its text, a line of its text
RIGHT = 14  # space beside the plot
ROOM = 130  # of a name at a point
MAX_CROSSES = 120
BANDS = 42  # places at which the pointer asks for values
COLOURS = 7
DASHES = ("", "7 3", "2 2.5", "9 3 2 3")  # each for a round of colours
# Outlines of points around where the pen stands: commands of a path and their lengths.
FORMS: tuple[tuple[str | float, ...], ...] = (
    ("m", -4.5, " ", 0, "a", 4.5, " ", 4.5, " 0 1 0 ", 9, " 0a", 4.5, " ", 4.5, " 0 1 0 ", -9, " 0z"),
    ("m", -4, " ", -4, "h", 8, "v", 8, "h", -8, "z"),
    ("m0 ", -5, "l", 5, " ", 9, "h", -10, "z"),
    ("m0 ", -5.5, "l", 5.5, " ", 5.5, "l", -5.5, " ", 5.5, "l", -5.5, " ", -5.5, "z"),
    ("m0 ", 5, "l", 5, " ", -9, "h", -10, "z"),
    ("m", -1.5, " ", -5, "h", 3, "v", 3.5, "h", 3.5, "v", 3, "h", -3.5, "v", 3.5, "h", -3, "v", -3.5, "h", -3.5,
     "v", -3, "h", 3.5, "z"),
    ("m", -2.5, " ", -4.5, "h", 5, "l", 2.5, " ", 4.5, "l", -2.5, " ", 4.5, "h", -5, "l", -2.5, " ", -4.5, "z"),
)  # fmt: skip
Box = tuple[float, float, float, float]  # left, top, right, bottom


def svg(label: str, body: Sequence[str], height: float) -> str:
    """The whole drawing; ``label`` says in words what it shows."""
    inside = "".join(body)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{text(label)}">{inside}</svg>'


def words(x: float, y: float, shown: str, kind: str = "", anchor: str = "", hint: str = "") -> str:
    """A line of text at its baseline; ``hint`` is what the pointer finds there."""
    named = f' class="{kind}"' if kind else ""
    placed = f' text-anchor="{anchor}"' if anchor else ""
    more = f"<title>{text(hint)}</title>" if hint else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}"{placed}>{text(shown)}{more}</text>'


def key(i: int, kind: str) -> str:
    """Class and dashes of the ``i``-th colour; the palette comes again with other dashes."""
    dash = DASHES[i // COLOURS % len(DASHES)] if kind == "line" else ""
    return f'class="{kind} k{i % COLOURS}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def head(title: str, unit: str, legend: Sequence[tuple[str, int, str]]) -> tuple[list[str], int]:
    """Title, unit and legend (name, colour, line or mark), and where the plot may begin below them."""
    # Bold letters are broader; the unit follows in the same line of text, wherever that ends.
    shown = scales.shorten(title, WIDTH - 4 - scales.width(unit, SIZE) - 12, SIZE + 3)
    more = f"<title>{text(title)}</title>" if shown != title else ""
    behind = f'<tspan class="unit" dx="7">{text(unit)}</tspan>' if unit else ""
    body = [f'<text class="title" x="2" y="14">{text(shown)}{behind}{more}</text>']
    x, y = 2.0, 14.0
    for i, (name, colour, kind) in enumerate(legend):
        short = scales.shorten(name, WIDTH / 2 - 40, SIZE)
        room = 22 + scales.width(short, SIZE) + 12
        if not i or x + room > WIDTH:
            x, y = 2.0, y + ROW
        sign = f'<path {key(colour, "line")} d="M{x:.1f} {y - 4:.1f}h17"/>' if kind == "line" else ""
        body.append(sign or shape(colour, x + 9, y - 4, name))
        body.append(words(x + 22, y, short, "name", "", name if short != name else ""))
        x += room
    return body, int(y) + 15


def axes(x: Scale, y: Scale, y_ticks: Sequence[float], name: str, whole: bool = False) -> list[str]:
    """Horizontal grid lines with their numbers, ticks below the plot, and what x is; ``whole``: of whole numbers."""
    left, right, bottom = x.start, x.end, y.start
    body = []
    for value in y_ticks:
        place = y.place(value)
        body.append(f'<path class="grid" d="M{left:.1f} {place:.1f}H{right:.1f}"/>')
        body.append(words(left - 6, place + 4, scales.words(value, y_ticks), "y", "end"))
    body.append(f'<path class="axis" d="M{left:.1f} {bottom:.1f}H{right:.1f}"/>')
    choices = [[t for t in x.ticks(count) if not whole or t == round(t)] for count in (7, 6, 5, 4, 3, 2)]
    ticks = next((choice for choice in choices if _fits(choice, x)), choices[0][:1])
    for value in ticks:
        place, shown = x.place(value), scales.words(value, ticks)
        half = scales.width(shown, SIZE) / 2
        # A number at the end of the axis stays within the drawing.
        middle = min(max(place, half), WIDTH - half)
        body.append(f'<path class="axis" d="M{place:.1f} {bottom:.1f}v4"/>')
        body.append(words(middle, bottom + ROW, shown, "x", "middle"))
    body.append(words(right, bottom + 2 * ROW - 2, name, "x-name", "end"))
    return body


def _fits(ticks: Sequence[float], x: Scale) -> bool:
    """Whether the numbers stand clear of one another; one alone says nothing of the scale."""
    if len(ticks) < 2:
        return False
    halves = [scales.width(scales.words(v, ticks), SIZE) / 2 for v in ticks]
    places = [min(max(x.place(v), half), WIDTH - half) for v, half in zip(ticks, halves, strict=True)]
    pairs = zip(places, places[1:], halves, halves[1:], strict=False)
    return all(after - before >= a + b + 8 for before, after, a, b in pairs)


def path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    """The curve's ``d``, interrupted at gaps; a point between two gaps is a dot."""
    parts, begun = [], False
    for i, (at, value) in enumerate(points):
        if value is not None:
            parts.append(f"{'L' if begun else 'M'}{x.place(at):.1f} {y.place(value):.1f}")
            if not begun and (i + 1 == len(points) or points[i + 1][1] is None):
                parts.append("h0")
        begun = value is not None
    return "".join(parts)


def crosses(points: Sequence[Point], x: Scale, y: float) -> str:
    """Where there is no number: crosses at the foot of the plot, no two at the same place."""
    places = {round(x.place(at)): at for at, value in points if value is None}
    return "".join(
        f'<path class="gone" d="M{place - 3} {y - 7:.0f}l6 6m0 -6l-6 6"><title>{scales.words(at)}: no number to show'
        "</title></path>"
        for place, at in sorted(places.items())[:MAX_CROSSES]
    )


def shape(i: int, x: float, y: float, hint: str, size: float = 1.0) -> str:
    """The ``i``-th point, whose form tells it too: circle, square, triangle, diamond and so on. When the palette comes
    again, the forms are one further, so that the first 49 are all different."""
    outline = FORMS[(i + i // COLOURS) % len(FORMS)]
    form = "".join(part if isinstance(part, str) else f"{part * size:.1f}".removesuffix(".0") for part in outline)
    hinted = f"<title>{text(hint)}</title>" if hint else ""
    return f'<path {key(i, "mark")} d="M{x:.1f} {y:.1f}{form}">{hinted}</path>'


def sign(i: int) -> str:
    """The ``i``-th point as a small picture for a line of text."""
    return f'<svg class="sign" viewBox="-7 -7 14 14" aria-hidden="true">{shape(i, 0, 0, "", 1.15)}</svg>'


def bands(hints: Sequence[str], x: Scale, top: float, height: float) -> list[str]:
    """Invisible columns over the plot that say what stands there to whoever points at them."""
    step = (x.end - x.start) / max(len(hints), 1)
    return [
        f'<rect class="band" x="{x.start + i * step:.1f}" y="{top}" width="{step:.1f}" height="{height}">'
        f"<title>{text(hint)}</title></rect>"
        for i, hint in enumerate(hints)
        if hint
    ]


def label(name: str, x: float, y: float, taken: list[Box], lines: Sequence[Box], within: Box) -> str:
    """A point's name where it covers nothing that is ``taken`` (what it takes is added) nor, where that can be, any of
    ``lines``; further away, with a line that leads to the point, where it has no place there. Left out, but for the
    hint at the point, where there is none at all."""
    left, top, right, bottom = within
    short = scales.shorten(name, ROOM, SIZE)
    wide = scales.width(short, SIZE)
    beside = [(9, 4), (-9 - wide, 4), (-wide / 2, -9), (-wide / 2, 18), (7, -7), (7, 15), (-7 - wide, -7)]
    beside += [(-7 - wide, 15), (-wide / 2, -22), (-wide / 2, 31), (9, -20), (9, 28), (-9 - wide, -20)]
    # Around the point, nearest first; the name's near side is at the end of the line.
    around = [
        (far * math.cos(turn) - wide / 2 + wide / 2 * math.cos(turn), far * math.sin(turn) + 4)
        for far in range(16, 130, 12)
        for turn in (step * math.pi / 8 for step in range(16))
    ]
    for places, avoided, leads in ((beside, lines, False), (beside, (), False), (around, (), True)):
        for dx, dy in places:
            box = (x + dx, y + dy - 10, x + dx + wide, y + dy + 3)
            inside = box[0] >= left and box[1] >= top and box[2] <= right and box[3] <= bottom
            if inside and not any(_overlap(box, other) for other in (*taken, *avoided)):
                taken.append(box)
                nearest = min(max(x, box[0]), box[2]), min(max(y, box[1] + 1), box[3] - 1)
                line = f'<path class="lead" d="M{x:.1f} {y:.1f}L{nearest[0]:.1f} {nearest[1]:.1f}"/>' if leads else ""
                return line + words(x + dx, y + dy, short, "name tag", "", name if short != name else "")
    return ""


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
