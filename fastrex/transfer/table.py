"""Results as tables: one encoder's sets, and several encoders side by side with the published figures."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from .. import markup
from ..errors import one_line
from . import cells, results
from .cells import NO_ODDS, PARTIAL, PROBES, SIGN, Cell, Column, Grid, mean_title, title
from .comparison import Row, comparison, protocol
from .results import Result

WITHOUT = "Without a result"
INTERVALS = (
    "±: standard deviation over seeds. In brackets: 95 % interval of 1,000 bootstrap resamples of the test images. "
    "Log-odds: ln(p / (1 - p)) of the top-1 averaged over seeds."
)
STYLE = """
.scores th, .scores td { padding-right: 1rem; }
.scores small { color: var(--dim); display: block; }
.scores td:first-child { min-width: 6rem; overflow-wrap: anywhere; }
.scores td:first-child small { min-width: 12rem; }
"""


def markdown(result: Result, others: Sequence[Row] = ()) -> str:
    """The tables of ``result``, and beside ``others``, as Markdown."""
    lines = [f"# {cells.md(_title(result))}", "", cells.md(_facts(result)), ""]
    for grid in _grids(result, others):
        lines += [f"## {grid.title}", ""]
        lines += [cells.md_line(column.title for column in grid.columns)]
        lines += ["|" + "".join(" ---: |" if column.number else " --- |" for column in grid.columns)]
        lines += ["| " + " | ".join(map(cells.md_cell, row)) + " |" for row in grid.rows]
        lines += ["", *(f"* {cells.md(note)}" for note in grid.notes), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def page(result: Result, others: Sequence[Row] = ()) -> str:
    """The same as a page of HTML that needs nothing else."""
    parts = [f"<h1>{markup.text(_title(result))}</h1>", f'<p class="dim">{markup.text(_facts(result))}</p>']
    for grid in _grids(result, others):
        align = "".join("r" if column.number else "l" for column in grid.columns)
        headers = [column.title for column in grid.columns]
        parts += [f"<h2>{markup.text(grid.title)}</h2>"]
        parts += [
            markup.table(
                headers, [list(map(cells.html_cell, row)) for row in grid.rows], align=align, classes=("scores",)
            )
        ]
        parts += [f'<p class="dim">{markup.text(note)}</p>' for note in grid.notes]
    return markup.document(_title(result), "\n".join(parts), STYLE)


def plain(result: Result, others: Sequence[Row] = (), width: int = 100) -> str:
    """The same for a terminal of ``width`` characters: columns that do not fit are left out, the least needed first."""
    blocks = []
    for grid in _grids(result, others):
        if grid.title == WITHOUT:
            lines = [one_line(": ".join(cell.text for cell in row if cell.text)) for row in grid.rows]
            blocks.append(
                "\n".join([grid.title, *(textwrap.fill(line, width, subsequent_indent="  ") for line in lines)])
            )
            continue
        notes = [line for note in grid.notes for line in textwrap.wrap(one_line(note), width)]
        blocks.append("\n".join([grid.title, *cells.plain(grid, width), *notes]))
    return "\n\n".join([one_line(_title(result)), *blocks]) + "\n"


def _grids(result: Result, others: Sequence[Row]) -> list[Grid]:
    grids = [_sets(result)] if result["sets"] else []
    if result["means"]:
        grids.append(_means(result))
    if (beside := comparison(result, others)) is not None:
        grids.append(beside)
    if result["skipped"]:
        grids.append(_skipped(result))
    return grids


def _title(result: Result) -> str:
    return f"Transfer of {result['source']}"


def _facts(result: Result) -> str:
    encoder, how = result["encoder"], result["transform"]
    colours = "grey" if how["channels"] == 1 else "RGB"
    return (
        f"{encoder['arch']}, {encoder['features']} features, sha256 {encoder['identity'][:12]}; images of "
        f"{how['size']} px ({colours}, shorter side {how['resize']}, {how['interpolation']}); {protocol(result)}"
    )


def _sets(result: Result) -> Grid:
    beside = [p for p in PROBES if any(p in s["probes"] and p != s["headline"] for s in result["sets"])]
    columns = (
        Column("Set", number=False),
        Column("Top-1"),
        Column("Log-odds"),
        Column("Mean per class", 5),
        *(Column(PROBES[probe], 1) for probe in beside),
        Column("Probe", 2, number=False),
        Column("Classes", 3),
        Column("Train", 4),
        Column("Test", 4),
    )
    rows, moved = list[tuple[Cell, ...]](), False
    for entry in result["sets"]:
        figures, name = results.headline(entry), title(entry["name"], entry["shots"])
        moved |= bool(figures["log_odds"].get("moved"))
        rest = [entry["probes"].get(probe) if probe != entry["headline"] else None for probe in beside]
        rows.append(
            (
                Cell(name, partial=results.published(entry) is not None),
                cells.percent(figures["top1"]),
                cells.odds(figures["log_odds"]),
                cells.percent(figures["mean_per_class"]),
                *(Cell("") if other is None else cells.percent(other["top1"]) for other in rest),
                Cell(PROBES.get(entry["headline"], entry["headline"])),
                *(Cell(f"{entry[count]:,}") for count in ("classes", "train", "test")),
            )
        )
    notes = [INTERVALS]
    if moved:
        notes.append(f"{NO_ODDS}.")
    if out := [_left_out(entry) for entry in result["sets"] if entry.get("left_out") and entry["shots"] is None]:
        notes.append(f"Images that cannot be read or decoded are left out: {'; '.join(out)}.")
    odd = {entry["name"]: (entry, numbers) for entry in result["sets"] if (numbers := results.published(entry))}
    if odd:
        notes.append(f"{PARTIAL}: {'; '.join(_difference(*other) for other in odd.values())}.")
    return Grid("Sets", columns, tuple(rows), tuple(notes))


def _difference(entry: Mapping[str, Any], published: tuple[int, int, int]) -> str:
    """In what the copy of a set differs."""
    found = (entry["classes"], entry["train"], entry["test"])
    parts = [
        f"{count:,} instead of {wanted:,} {what}"
        for count, wanted, what in zip(found, published, ("classes", "training images", "test images"), strict=True)
        if count != wanted
    ]
    return f"{title(entry['name'], None)} ({', '.join(parts)})"


def _left_out(entry: Mapping[str, Any]) -> str:
    """How many images, and the classes that have nothing to be tested on for that."""
    gone = entry.get("untested", [])
    more = f", so that {', '.join(gone[:10])}{' and others' * (len(gone) > 10)} have no test image" if gone else ""
    return f"{entry['left_out']:,} of {title(entry['name'], None)}{more}"


def _means(result: Result) -> Grid:
    columns = (Column("Mean", number=False), Column("Sets"), Column("Log-odds"), Column("Top-1"))
    rows, notes, moved = [], [], set[str]()
    partial = results.partial(result)
    for key, mean in result["means"].items():
        name, count, published = mean_title(key), len(mean["sets"]), key.partition("@")[0]
        missing = published.isdigit() and count < int(published)
        by = f", {PROBES.get(mean['probe'], mean['probe'])}" if mean.get("probe") else ""
        moved |= {*mean.get("moved", [])}
        rows.append(
            (
                Cell(
                    f"{name}{by}: only {count}" if missing else f"{name}{by}", partial=bool(partial & {*mean["sets"]})
                ),
                Cell(str(count)),
                cells.odds(mean["log_odds"], 4, bool(mean.get("moved"))),
                Cell(f"{100 * mean['top1']:.1f}"),
            )
        )
        if missing:
            notes.append(f"{name} is not complete, it is the mean of {', '.join(mean['sets'])}.")
    if any(row[0].partial for row in rows):
        notes.append(f"{SIGN} Not of the published images in all sets, see the sets that are marked.")
    if moved:
        notes.append(f"{NO_ODDS}: {', '.join(title(name, None) for name in sorted(moved))}.")
    notes.append("Means are of the protocol's probe for each set, unless another is named.")
    return Grid("Means over sets", columns, tuple(rows), tuple(notes))


def _skipped(result: Result) -> Grid:
    columns = (Column("Set", number=False), Column("Why", number=False), Column("Where to get it", 1, number=False))
    rows = []
    for entry in result["skipped"]:
        probes = "".join(f", {PROBES.get(probe, probe)}" for probe in entry.get("probes", []))
        few = f", {entry['shots']} shots" if entry.get("shots") else ""
        rows.append((Cell(f"{entry['name']}{few}{probes}"), Cell(entry["reason"]), Cell(entry["get"])))
    return Grid(WITHOUT, columns, tuple(rows))
