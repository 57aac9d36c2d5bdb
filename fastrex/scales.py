"""Numbers as places and words on a chart's axes: scales, round ticks, running means, thinning.
Standard library only."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Point = tuple[float, float | None]  # x, and y or None where there is no number

LIMIT = 1e150  # beyond it a span or a square is no number any more; such a value counts as none
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Letters much narrower and broader than the rest.
NARROW, BROAD = frozenset("iljtfr.,:;|!'()[] I·-"), frozenset("mwMW@%—…<>=+~#&")


@dataclass(frozen=True)
class Scale:
    """Values from ``low`` to ``high`` (base-10 logarithms of them where ``log``) between two places in the drawing."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    def place(self, value: float) -> float:
        share = ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)
        return self.start + min(max(share, -1.0), 2.0) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """At most ``count`` round values within the scale."""
        if not self.log:
            return _even(self.low, self.high, count)
        first, last = math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9)
        if last - first >= 2:
            every = -(-(last - first + 1) // max(count, 1))
            return [10.0**power for power in range(first, last + 1, every)]
        for digits in ((1, 2, 5), (1, 3), (1,)):
            values = [digit * 10.0**power for power in range(first - 1, last + 1) for digit in digits]
            inside = [v for v in values if self.low - 1e-9 <= math.log10(v) <= self.high + 1e-9]
            if 2 <= len(inside) <= count + 1:
                return inside
        return _even(10.0**self.low, 10.0**self.high, count)


def number(value: object) -> float | None:
    """A number that a chart can show; None for what is none, not finite or beyond ``LIMIT``, 0 for what is nearer to it
    than its inverse."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LIMIT < value < LIMIT:
        return None
    return float(value) if abs(value) > 1 / LIMIT else 0.0


def scale(
    values: Iterable[float], start: float, end: float, *, log: bool = False, zero: bool = False, pad: float = 0.0
) -> Scale:
    """The scale that holds all ``values``, with ``pad`` of its length left over at both ends.

    ``log`` needs a value above 0, the others do not count; without one the scale is linear. ``zero``: a linear one
    begins (or ends) at 0.
    """
    numbers = [value for value in values if not log or value > 0]
    if log and not numbers:
        return Scale(0.0, 1.0, False, start, end)
    low, high = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)
    if log:
        low, high = math.log10(low), math.log10(high)
    elif zero:
        low, high = min(low, 0.0), max(high, 0.0)
        high = high if high > low else 1.0
    least = max(abs(low), abs(high)) * 1e-6
    if high - low <= max(least, 1e-150):
        # Of one value: as much around it as shows its digits.
        half = max(abs(low), abs(high)) * 0.05 or 0.5
        low, high = low - half, high + half
    over = (high - low) * pad
    from_zero = zero and not log
    return Scale(
        low if from_zero and low == 0 else low - over, high if from_zero and high == 0 else high + over, log, start, end
    )


def _even(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10, 20) if m * power >= rough * (1 - 1e-9))
    # From whole multiples, so that no rounding error adds up.
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)][: count + 1]


def words(value: float, among: Sequence[float] = ()) -> str:
    """A number as an axis shows it: with the digits that tell the ticks ``among`` which it stands apart, or four of
    them; thousands as k, M, G, what is smaller or larger as a power of ten."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "no number"
    largest = max((abs(v) for v in among), default=abs(value))
    if largest < 1e-3 or largest >= 1e13 or abs(value) < min(1e-3, largest / 20):
        power = math.floor(math.log10(abs(value)) + 1e-9)
        digits = f"{value / 10.0**power:.3g}"
        tens = f"10{str(power).translate(SUPERSCRIPTS)}"
        return tens if digits == "1" else f"{digits}×{tens}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= 10 * size or (letter != "k" and largest >= size):
            return f"{_plain(value / size)}{letter}".replace("-", "−")
    return _plain(value).replace("-", "−")


def _plain(value: float) -> str:
    digits = f"{value:.4g}"
    return f"{value:.0f}" if "e" in digits else digits


def smooth(points: Sequence[Point], share: float) -> list[Point]:
    """Running means of a curve, over about ``share`` of its points; a gap stays one and starts no new mean.

    The mean is exponential and without bias at its beginning.
    """
    keep = 1 - 1 / max(1.0, len(points) * share)
    total, weight, out = 0.0, 0.0, list[Point]()
    for x, y in points:
        if y is not None:
            total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        out.append((x, None if y is None else total / weight))
    return out


def thin(points: Sequence[Point], buckets: int) -> list[Point]:
    """A curve that looks the same at ``buckets`` places: the lowest and the highest point of each, in their order.

    ``points`` are sorted by x. A place of gaps alone stays a gap; few points are all kept.
    """
    if len(points) <= 2 * buckets:
        return list(points)
    first, last = points[0][0], points[-1][0]
    span = (last - first) or 1.0
    groups: dict[int, list[Point]] = {}
    for point in points:
        groups.setdefault(min(int((point[0] - first) / span * buckets), buckets - 1), []).append(point)
    out: list[Point] = []
    for group in groups.values():
        there = [(y, i) for i, (_, y) in enumerate(group) if y is not None]
        chosen = sorted({min(there)[1], max(there)[1]}) if there else [0]
        out += [group[i] for i in chosen]
    # The ends are what a reader looks for.
    return [points[0], *(p for p in out if p not in (points[0], points[-1])), points[-1]]


def at(points: Sequence[Point], x: float) -> float | None:
    """The y of the last point at or before ``x``; None before the first one and in a gap."""
    place = bisect.bisect_right(points, x, key=lambda point: point[0])
    return points[place - 1][1] if place else None


def width(words: str, size: float) -> float:
    """About how wide a line of text is in a font of ``size``; rather too much than too little."""
    return size * sum(0.36 if c in NARROW else 0.92 if c in BROAD or ord(c) > 0x2E7F else 0.64 for c in words)


def shorten(words: str, room: float, size: float) -> str:
    """``words`` cut to ``room`` with an ellipsis in the middle: names of runs differ at both ends."""
    if width(words, size) <= room:
        return words
    keep = len(words)
    while keep > 1 and width(f"{words[:keep]}…", size) > room:
        keep -= 1
    return f"{words[: keep - keep // 2]}…{words[len(words) - keep // 2 :] if keep // 2 else ''}"
