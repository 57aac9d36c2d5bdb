"""Several encoders side by side, and with published figures, as far as they were measured in the same way."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import cells, results
from .cells import NO_ODDS, PARTIAL, PROBES, Cell, Column, Grid, mean_title, title
from .published import NOISE, PUBLISHED
from .results import Result

MEANS = -1  # where a set has its shots
SIZE = 224  # of the images of published figures
Key = tuple[str, int | None]


@dataclass(frozen=True)
class Row:
    """One encoder of the comparison: its cells by column, such as ("aircraft", None), ("pets", 4 shots), ("13", MEANS),
    and the digests of the images behind those that were measured. ``marks``: what tells it from another of its name,
    the nearest first."""

    name: str
    how: str
    measured: bool
    cells: Mapping[Key, Cell]
    images: Mapping[Key, str]
    marks: tuple[str, ...] = ()


def compare(paths: Sequence[Path], out: Path | None = None) -> list[Row]:
    """One row per stored result, each once.

    Args:
        paths: transfer.json, the folders that hold them, or runs. out: where the result is written that they are put
            beside; it is no other of its own.

    Raises:
        FastrexError: one of them is no result of this version.
    """
    seen = {os.path.realpath(results.find(out))} if out is not None else set()
    rows = []
    for path in paths:
        place = results.find(path)
        result = results.read(place)
        if (real := os.path.realpath(place)) not in seen:
            seen.add(real)
            rows.append(_row(result, str(path)))
    return rows


def protocol(result: Result) -> str:
    """How it was measured, in words."""
    seeds = result["seeds"]
    return f"protocol {result['protocol']}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def comparison(result: Result, others: Sequence[Row]) -> Grid | None:
    """``result`` beside ``others`` and the published figures of what it is of; None where there are neither."""
    rows = _named([_row(result), *others])
    keys = list(dict.fromkeys(key for row in rows for key in row.cells))
    comparable = {key for row in rows for key, cell in row.cells.items() if cell.value is not None}
    shown = [row for row in _published() if comparable & row.cells.keys()]
    return _grid([*rows, *shown], keys) if others or shown else None


def _row(result: Result, place: str = "") -> Row:
    partial, size = results.partial(result), result["transform"]["size"]
    pixels = f"images of {size} px" if size != SIZE else ""
    found: dict[Key, Cell] = {}
    other: dict[str, list[str]] = {}
    for entry in result["sets"]:
        figures, probe = results.headline(entry), PROBES.get(entry["headline"], entry["headline"])
        strange = entry["headline"] != results.usual(entry)
        if strange:
            other.setdefault(probe, []).append(title(*results.key(entry)))
        odd = "other images than published" if results.published(entry) or entry.get("left_out") else ""
        apart = [reason for reason in (odd, f"by {probe}" if strange else "", pixels) if reason]
        found[results.key(entry)] = replace(
            cells.percent(figures["top1"]),
            partial=results.published(entry) is not None,
            by=f"{probe}, {size} px",
            apart=", ".join(apart),
        )
    for name, mean in result["means"].items():
        known, probe = name.partition("@")[0], mean.get("probe", "")
        whole, count = mean["complete"] or not known.isdigit(), len(mean["sets"])
        said = f"{count} set{'s' * (count != 1)}" if whole else f"{count} of {known}"
        if probe:
            said += f", {PROBES.get(probe, probe)}"
        cell = cells.odds(mean["log_odds"], 4, bool(mean.get("moved")))
        found[name, MEANS] = replace(
            cell,
            detail=f"{cell.detail} {said}",
            # What is the mean of other sets is shown, but not compared.
            value=cell.value if whole else None,
            partial=bool(partial & {*mean["sets"]}),
            by=f"{probe}, {size} px",
            apart=pixels,
        )
    images = {results.key(entry): entry.get("images", entry["fingerprint"]) for entry in result["sets"]}
    instead = [f"{probe} instead of the protocol's probe for {', '.join(names)}" for probe, names in other.items()]
    how = ", ".join([f"images of {size} px", protocol(result), *instead])
    return Row(result["source"], how, True, found, images, (result["encoder"]["identity"][:8], place))


def _named(rows: Sequence[Row]) -> list[Row]:
    """With names that tell them apart."""
    found = list(rows)
    for mark in range(2):
        count = Counter(row.name for row in found)
        found = [
            replace(row, name=f"{row.name} ({row.marks[mark]})") if count[row.name] > 1 and row.marks[mark] else row
            for row in found
        ]
    return found


def _published() -> list[Row]:
    rows = []
    for figure in PUBLISHED:
        found: dict[Key, Cell] = {(results.IN1K, None): Cell(f"{100 * figure.top1:.1f}")}
        if figure.log_odds is not None:
            found["15", MEANS] = Cell(f"{figure.log_odds:.4f}")
        rows.append(Row(f"{figure.name} (published)", f"{figure.how}; {figure.source}", False, found, {}))
    return rows


def _grid(rows: Sequence[Row], keys: Sequence[Key]) -> Grid:
    """Rows are encoders; the best measured one of a column is marked where there are several."""
    measured = [row for row in rows if row.measured]
    # First what there are published figures of.
    first = [key for key in (*((name, MEANS) for name in cells.MEANS), (results.IN1K, None)) if key in keys]
    ordered = [*first, *(key for key in keys if key not in first)]
    best, unlike = dict[Key, float](), list[str]()
    for key in ordered:
        there = [row.cells[key] for row in measured if key in row.cells and row.cells[key].value is not None]
        if len(there) < 2:
            continue
        if len({found.by for found in there}) > 1:
            unlike.append(_title(key))
        elif key[1] != MEANS or not key[0].startswith("all") or len({_sets_of(row, key[0]) for row in measured}) == 1:
            best[key] = max(found.value for found in there if found.value is not None)

    def cell(row: Row, key: Key) -> Cell:
        found = row.cells.get(key, Cell("–"))
        return replace(found, best=row.measured and key in best and found.value == best[key])

    columns = (
        Column("Encoder", number=False),
        *(Column(_title(key), int(key not in first)) for key in ordered),
    )
    lines = tuple((Cell(row.name, row.how), *(cell(row, key) for key in ordered)) for row in rows)
    return Grid("Comparison", columns, lines, tuple(_notes(rows, ordered, unlike)))


def _notes(rows: Sequence[Row], keys: Sequence[Key], unlike: Sequence[str]) -> list[str]:
    notes = [
        "Top-1 in percent of each set's headline probe; means of log-odds over the 13 (small sets, CoG), the 15 (iNat "
        "as well) and all sets but the training task (IN1K, train). The best of a column is marked among those "
        "measured here."
    ]
    if unlike:
        notes.append(f"No best where probes or sizes of the images differ: {', '.join(unlike)}.")
    prints = {key: {row.images[key] for row in rows if key in row.images} for key in keys}
    if other := [_title(key) for key, found in prints.items() if len(found) > 1]:
        notes.append(f"Not of the same files for all encoders: {', '.join(other)}.")
    if _any(rows, lambda cell: cell.partial):
        notes.append(f"{PARTIAL}.")
    if _any(rows, lambda cell: cell.moved):
        notes.append(f"{NO_ODDS}.")
    public = [row for row in rows if not row.measured]
    if public:
        notes.append(f"Published figures are their authors', measured as they say; {NOISE}.")
    beside = {key for row in public for key in row.cells}
    apart = [
        f"{_title(key)} of {row.name} ({found.apart})"
        for row in rows
        for key, found in row.cells.items()
        if row.measured and key in beside and found.apart
    ]
    if apart:
        notes.append(f"Not comparable with the published figures: {'; '.join(apart)}.")
    return notes


def _any(rows: Sequence[Row], what: Callable[[Cell], bool]) -> bool:
    return any(what(cell) for row in rows for cell in row.cells.values())


def _title(key: Key) -> str:
    return mean_title(key[0]) if key[1] == MEANS else title(*key)


def _sets_of(row: Row, mean: str) -> frozenset[Key]:
    """What a row's mean over all sets is taken over."""
    shots = mean.partition("@")[2]
    wanted = int(shots) if shots else None
    return frozenset(key for key in row.cells if key[1] == wanted and key[0] not in results.TRAINING)
