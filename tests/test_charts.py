"""Charts and markup: what is drawn is what was given, at round numbers, and nothing of a name can break out."""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
import random
import re
import time
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from fastrex import charts, drawing, markup, scales
from fastrex.charts import Bar, Dot, Series

HOSTILE = "</script><svg onload=alert(1)>\"'&\u202e\udce9"


def parse(chart: str) -> ElementTree.Element:
    root = ElementTree.fromstring(chart)
    for element in root.iter():
        for name, value in element.attrib.items():
            assert not name.startswith("on")
            if name in ("d", "x", "y", "width", "height", "viewBox"):
                assert not re.search(r"nan|inf|e[+-]?\d", value), (name, value)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"]
    return root


def texts(root: ElementTree.Element, kind: str) -> list[str]:
    return [element.text or "" for element in root.iter("text") if kind in element.get("class", "").split()]


def titles(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter("title")]


def paths(root: ElementTree.Element, kind: str = "line") -> list[str]:
    return [p.attrib["d"] for p in root.iter("path") if kind in p.get("class", "").split()]


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


def test_a_curve_is_where_its_numbers_are() -> None:
    root = parse(charts.lines([Series("a", [(0, 0), (50, 2), (100, 4)])], title="loss", unit="nats"))
    ((x0, y0), (x1, y1), (x2, y2)) = points(paths(root)[0])
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.11)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.11)
    assert x0 < x2
    assert y0 > y2
    assert texts(root, "title") == ["loss"]
    assert texts(root, "x") == ["0", "20", "40", "60", "80", "100"]
    assert texts(root, "y") == ["0", "1", "2", "3", "4"]
    assert "a, step 50: 2 nats" in titles(root)
    assert root.attrib["aria-label"] == "loss over step: a ends at 4 nats"
    assert texts(root, "name") == []  # one curve needs no legend


def test_gaps_interrupt_and_are_marked() -> None:
    curve = [(1.0, 1.0), (2.0, 2.0), (3.0, math.nan), (4.0, 3.0), (5.0, None), (6.0, 4.0), (7.0, 5.0), (8.0, math.inf)]
    root = parse(charts.lines([Series("a", curve)], title="loss"))
    (path,) = paths(root)
    assert path.count("M") == 3
    assert path.count("h0") == 1  # the lone point
    assert len(paths(root, "gone")) == 3
    assert len(points(path)) == 5


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        [], [math.nan], [None], [0.0], [5.0], [0.0, 0.0], [-1.0, -1.0], [1e-300, 2e-300], [1e149, -1e149], [1e300, 1.0],
        [1e-12, 1e12], [3.0, 3.0 + 1e-13], [-5.0, 0.0, 5.0], [math.inf, -math.inf, 1.0], [1e-7, 3e-7], [1e-320, 1.0],
    ],
)  # fmt: skip
def test_any_numbers_make_a_chart(values: list[float | None], log: bool) -> None:
    curve = [(float(i), y) for i, y in enumerate(values)]
    for smooth in (0.0, 0.5):
        parse(charts.lines([Series("a", curve), Series("b", [])], title="t", log_y=log, smooth=smooth))
        parse(charts.lines([Series("a", [(y or 0.0, 1.0) for y in values])], title="t", log_x=log, smooth=smooth))
    parse(charts.scatter([Dot("p", y or 0.0, y or 0.0, (0, y or 0)) for y in values], title="t", x="x", y="y"))
    parse(charts.bars([Bar("p", y or 0.0, (0, y or 0), reference=y) for y in values], title="t", zero=not log))


def test_long_curves_keep_their_extremes_and_make_small_pages() -> None:
    noise = random.Random(0)
    curve = [(float(step), 2 + noise.random()) for step in range(500_000)]
    curve[123_456] = (123_456.0, 40.0)
    curve[300_001] = (300_001.0, -7.0)
    start = time.perf_counter()
    chart = charts.lines([Series("a", curve)], title="loss", smooth=0.02)
    assert time.perf_counter() - start < 60
    assert len(chart.encode()) < 40_000
    parse(chart)
    thinned = scales.thin(curve, 260)
    assert len(thinned) <= 2 * 260 + 2
    assert {curve[0], curve[123_456], curve[300_001], curve[-1]} <= set(thinned)
    assert thinned == sorted(thinned)
    # A stretch without numbers stays one.
    gone = [(x, None if 100_000 <= x < 200_000 else y) for x, y in curve]
    assert any(y is None for _, y in scales.thin(gone, 260))


def test_running_means() -> None:
    flat = [(float(i), 3.0) for i in range(100)]
    assert all(y == pytest.approx(3.0) for _, y in scales.smooth(flat, 0.1))
    step = [(float(i), None if i == 50 else float(i >= 51)) for i in range(100)]
    smoothed = scales.smooth(step, 0.1)
    assert smoothed[50] == (50.0, None)
    keep, total, weight = 0.9, 0.0, 0.0
    for (_, given), (_, found) in zip(step, smoothed, strict=True):
        if given is not None:
            total, weight = keep * total + 0.1 * given, keep * weight + 0.1
            assert found == pytest.approx(total / weight)


def test_ticks_are_round_apart_and_within() -> None:
    draw = random.Random(1)
    for _ in range(2000):
        low = draw.choice([0.0, draw.uniform(-1, 1) * 10 ** draw.uniform(-8, 8)])
        values = [low, low + 10 ** draw.uniform(-6, 9)]
        scale = scales.scale(values, 0, 400)
        ticks = scale.ticks(5)
        assert 1 <= len(ticks) <= 6
        assert ticks == sorted(set(ticks))
        step = min((b - a for a, b in itertools.pairwise(ticks)), default=1.0)
        for tick in ticks:
            assert -0.5 <= scale.place(tick) <= 400.5
            if tick and abs(tick) < 1e6 * step:
                assert float(f"{tick / step:.9g}") == pytest.approx(round(tick / step), abs=1e-6)
        digits = f"{step:.3e}".partition("e")[0]
        assert len(ticks) < 2 or digits in ("1.000", "2.000", "5.000")


def test_logarithmic_ticks() -> None:
    assert scales.scale([1e-5, 10.0], 0, 1, log=True).ticks(4) == pytest.approx([1e-5, 1e-3, 1e-1, 10.0])
    assert scales.scale([1.0, 10.0], 0, 1, log=True).ticks(5) == pytest.approx([1, 2, 5, 10])
    assert scales.scale([2.1, 2.4], 0, 1, log=True).ticks(5)[0] >= 2.1
    middle = scales.scale([1.0, 100.0], 0.0, 200.0, log=True)
    assert middle.place(10.0) == pytest.approx(100.0)
    assert not scales.scale([0.0, -1.0], 0, 1, log=True).log


@pytest.mark.parametrize(
    ("value", "among", "shown"),
    [
        (0, [0, 1], "0"), (0.05, [0.05, 0.1], "0.05"), (1500, [500, 1000, 1500], "1500"), (20000, [20000], "20k"),
        (2_500_000, [500_000, 2_500_000], "2.5M"), (-0.2, [-0.2, 0], "−0.2"), (1e-5, [1e-5, 1], "10⁻⁵"),
        (2e-4, [1e-4, 2e-4], "2×10⁻⁴"), (5e9, [5e9], "5G"), (100, [0, 100], "100"),
    ],
)  # fmt: skip
def test_numbers_on_axes(value: float, among: list[float], shown: str) -> None:
    assert scales.words(value, among) == shown


def test_axis_labels_stand_clear_of_one_another() -> None:
    draw = random.Random(2)
    for _ in range(200):
        end = 10 ** draw.uniform(-5, 8)
        root = parse(charts.lines([Series("a", [(end * draw.random(), draw.random()), (end, 1.0)])], title="t"))
        across = [e for e in root.iter("text") if e.get("class") == "x"]
        spans = [(float(e.attrib["x"]), scales.width(e.text or "", drawing.SIZE)) for e in across]
        assert len(spans) >= 1
        for (a, wide_a), (b, wide_b) in itertools.pairwise(spans):
            assert b - a >= (wide_a + wide_b) / 2
        for place, wide in spans:
            assert place - wide / 2 >= -0.1
            assert place + wide / 2 <= drawing.WIDTH + 0.1
        for e in root.iter("text"):
            if e.get("class") == "y":
                assert float(e.attrib["x"]) >= scales.width(e.text or "", drawing.SIZE)


def test_shares_are_percentages() -> None:
    root = parse(charts.lines([Series("a", [(1, 0.25), (2, 0.75)])], title="top-1", unit="%", zero=True))
    assert texts(root, "y") == ["0", "20", "40", "60"]
    assert "a, step 2: 75.00 %" in titles(root)
    bars = parse(charts.bars([Bar("x", 0.5, (0.4, 0.6)), Bar("y", 0.25)], title="t", unit="%"))
    wide = [float(r.attrib["width"]) for r in bars.iter("rect")]
    assert wide[0] == pytest.approx(2 * wide[1], abs=0.11)
    assert "x: 50.00 % (40.00 % to 60.00 %)" in titles(bars)


def test_several_curves_differ_in_more_than_colour() -> None:
    series = [Series(f"run {i}", [(1, i), (2, i + 1)]) for i in range(16)]
    root = parse(charts.lines(series, title="t"))
    assert texts(root, "name") == [f"run {i}" for i in range(16)]
    drawn = [p for p in root.iter("path") if (p.get("class") or "").startswith("line") and "L" in p.attrib["d"]]
    assert len({(p.get("class"), p.get("stroke-dasharray")) for p in drawn}) == 16
    marks = {
        re.sub(r"[\d.]+ [\d.]+", "", p.attrib["d"], count=1) for p in root.iter("path") if "mark" in p.get("class", "")
    }
    assert len(marks) == drawing.COLOURS


@pytest.mark.parametrize("crowded", [False, True])
def test_scatter_labels_cover_nothing(crowded: bool) -> None:
    draw = random.Random(3)
    # In the crowd all but two points stand together: their names have lines to them.
    places = [(draw.random(), draw.gauss(0, 1)) for _ in range(12)]
    if crowded:
        places = [(draw.gauss(0.5, 0.01), draw.gauss(0, 0.01)) for _ in range(25)] + [(0.0, -1.0), (1.0, 1.0)]
    dots = [
        Dot(f"encoder {i}", *place, (0.2, 0.4) if i == 0 else None, (-0.5, 0.5), i, tag=str(i) if crowded else "")
        for i, place in enumerate(places)
    ]
    root = parse(charts.scatter(dots, title="trade-off", x="top-1", y="log-odds", unit_x="%"))
    boxes = []
    for element in root.iter("text"):
        if element.get("class") == "name tag":
            left, base = float(element.attrib["x"]), float(element.attrib["y"])
            boxes.append((left, base - 10, left + scales.width(element.text or "", drawing.SIZE), base + 3))
    assert len(boxes) == len(dots)
    assert (len(paths(root, "lead")) > 0) == crowded
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] + 0.2 or b[2] <= a[0] + 0.2 or a[3] <= b[1] + 0.2 or b[3] <= a[1] + 0.2
    assert len(paths(root, "error")) == len(dots) + 1
    hints = [t for t in titles(root) if t.startswith("encoder 0:")]
    assert len(hints) == 1
    assert "(20.00 % to 40.00 %)" in hints[0]


def test_points_are_told_apart_beyond_the_palette() -> None:
    drawn = [drawing.shape(i, 0, 0, "") for i in range(49)]
    assert len(set(drawn)) == 49
    assert len({shape.partition(" d=")[2] for shape in drawn}) == drawing.COLOURS


def test_points_of_different_size() -> None:
    dots = [Dot("mean", 0.5, 0.5, size=2), Dot("small", 0.5, 0.5, size=0.5), Dot("third", 1, 1, tag="3")]
    root = parse(charts.scatter(dots, title="t", x="x", y="y"))
    assert texts(root, "name") == ["mean", "3"]
    assert [t.partition(":")[0] for t in titles(root)] == ["mean", "third", "small"]  # none hides a smaller one


def test_a_mean_has_its_curves_behind_it() -> None:
    curves = [[(float(x), float(x + i)) for x in range(10)] for i in range(3)]
    root = parse(charts.lines([Series("m", curves[1], 3, curves)], title="t"))
    drawn = [p for p in root.iter("path") if (p.get("class") or "") == "line k3"]
    assert [p.get("opacity") for p in drawn] == ["0.3", "0.3", "0.3", None]
    assert drawn[1].get("d") == drawn[3].get("d")
    assert texts(root, "y")[-1] == "10"
    long = [[(float(x), math.sin(x * i)) for x in range(5000)] for i in range(40)]
    many = charts.lines([Series(str(i), curve) for i, curve in enumerate(long)], title="t")
    assert len(many) < 120_000
    assert "and 28 more" in many


@pytest.mark.parametrize(
    "draw",
    [
        lambda name: charts.lines([Series(name, [(1, 2), (2, 3)]), Series("b", [])], title=name, x=name, unit=name),
        lambda name: charts.scatter([Dot(name, 1, 2, note=name)], title=name, x=name, y=name, groups=[name, name]),
        lambda name: charts.bars([Bar(name, 1.0, reference=2.0)], title=name, unit=name),
        lambda name: charts.lines([Series(name, [(i, 2.0 * i) for i in range(99)])], title=name, smooth=0.1),
    ],
)
def test_names_cannot_become_markup(draw: Callable[[str], str]) -> None:
    chart = draw(HOSTILE)
    root = parse(chart)
    assert {element.tag for element in root.iter()} <= {"svg", "path", "text", "tspan", "title", "rect"}
    assert "</script" not in chart
    chart.encode("utf-8")
    assert any(HOSTILE[:9] in title for title in [*titles(root), root.attrib["aria-label"]])


def test_a_chart_as_a_file_of_its_own() -> None:
    whole = charts.standalone(charts.bars([Bar("a", 1.0)], title="t"))
    root = ElementTree.fromstring(whole)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in whole


def test_long_names_are_cut_in_the_middle() -> None:
    name = "runs/trex-20261122-160000-first/of-many-with-a-name-that-goes-on"
    short = scales.shorten(name, 120, 12)
    assert scales.width(short, 12) <= 120
    begin, _, end = short.partition("…")
    assert name.startswith(begin)
    assert name.endswith(end)
    assert min(len(begin), len(end)) >= 4
    assert scales.shorten("ab", 120, 12) == "ab"


def test_cells_are_escaped_and_aligned() -> None:
    table = markup.table(["a<", "n"], [["<b>", 1], [markup.Raw("<b>x</b>"), "y"]], align="lr", classes=("scores",))
    root = ElementTree.fromstring(table)
    assert [e.text for e in root.iter("th")] == ["a<", "n"]
    assert [e.get("class") for e in root.iter("td")] == [None, "number", None, "number"]
    assert [e.text for e in root.iter("b")] == ["x"]
    assert root.find("table").get("class") == "scores"  # type: ignore[union-attr]
    assert "<thead>" not in markup.table((), [["x"]])
    assert isinstance(table, markup.Raw)


def test_a_page_lets_its_own_script_run_and_nothing_else() -> None:
    page = markup.document("a <title>", "<p>x</p>", ".x { color: red; }", "let a = 1;", "fastrex test")
    digest = base64.b64encode(hashlib.sha256(b"let a = 1;").digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page
    assert "<title>a &lt;title&gt;</title>" in page
    assert ".x { color: red; }" in page
    assert markup.made_by(page, "fastrex test")
    assert not markup.made_by(page, "fastrex report")
    assert not markup.made_by("<!DOCTYPE html>\n<title>" + page, "fastrex test")
    without = markup.document("t", "")
    assert "<script" not in without
    assert "script-src" not in without
