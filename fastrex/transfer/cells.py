"""Tables as rows of cells, and how a cell is written in Markdown, in HTML and on a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import markup
from ..errors import one_line
from . import catalog

MEANS = {"13": "Mean of the 13", "15": "Mean of the 15", "all": "Mean of all"}
PROBES = {"logistic": "Logistic", "sgd": "SGD", "knn": "k-NN", "ncm": "NCM"}
SIGN = "†"
PARTIAL = (
    f"{SIGN} Other numbers of classes, training or test images than published, not comparable with published figures"
)
MOVED = "‡"
NO_ODDS = (
    f"{MOVED} Every test image right, or none, has no finite log-odds: moved by half an image, so that it tells how "
    "many test images there are"
)


@dataclass(frozen=True)
class Cell:
    """``text`` as it is shown, ``detail`` in small print, ``value`` what the best of a column is found by, ``partial``
    where it is of other images than published, ``moved`` where a log-odds has no finite value of its own. ``by``: how
    it was measured, and only what was in the same way is compared. ``apart``: why it is not comparable with published
    figures, if so."""

    text: str
    detail: str = ""
    value: float | None = None
    best: bool = False
    partial: bool = False
    moved: bool = False
    by: str = ""
    apart: str = ""


@dataclass(frozen=True)
class Column:
    """``rank``: the columns of the highest rank are left out first where there is no room."""

    title: str
    rank: int = 0
    number: bool = True


@dataclass(frozen=True)
class Grid:
    """A table with what has to be said below it."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


def title(name: str, shots: int | None) -> str:
    """Of a set."""
    known = catalog.BY_NAME.get(name)
    whole = known.title if known is not None else name
    return whole if shots is None else f"{whole}, {_shots(shots)}"


def mean_title(key: str) -> str:
    """Of a mean, such as "13" or, of 8 images per class, "13@8"."""
    name, _, shots = key.partition("@")
    return MEANS.get(name, name) + (f", {_shots(shots)}" if shots else "")


def _shots(count: object) -> str:
    return f"{count} shot{'s' * (str(count) != '1')}"


def percent(spread: Mapping[str, Any]) -> Cell:
    text = f"{100 * spread['mean']:.1f}" + (f" ± {100 * spread['std']:.1f}" if len(spread["seeds"]) > 1 else "")
    return Cell(text, f"[{100 * spread['low']:.1f}, {100 * spread['high']:.1f}]", spread["mean"])


def odds(found: Mapping[str, Any], digits: int = 2, moved: bool = False) -> Cell:
    text, detail = f"{found['value']:.{digits}f}", f"[{found['low']:.2f}, {found['high']:.2f}]"
    return Cell(text, detail, found["value"], moved=moved or bool(found.get("moved")))


def md(text: str) -> str:
    """Text as Markdown: a name cannot open a cell, a link or a tag."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", one_line(text))


def md_line(texts: Iterable[str]) -> str:
    return "| " + " | ".join(map(md, texts)) + " |"


def _signed(cell: Cell) -> str:
    return " ".join([cell.text, *([SIGN] if cell.partial else []), *([MOVED] if cell.moved else [])])


def md_cell(cell: Cell) -> str:
    text = f"**{md(_signed(cell))}**" if cell.best else md(_signed(cell))
    return f"{text} {md(cell.detail)}".strip()


def html_cell(cell: Cell) -> markup.Raw:
    text = f"<b>{markup.text(_signed(cell))}</b>" if cell.best else markup.text(_signed(cell))
    return markup.Raw(text + (f"<small>{markup.text(cell.detail)}</small>" if cell.detail else ""))


def plain(grid: Grid, width: int) -> list[str]:
    """Rows of equal columns. Where there is no room, the small print of the less needed columns goes first, then these
    columns, then the other small print."""
    shown, detailed = list(range(len(grid.columns))), 9
    while True:
        columns = [grid.columns[i] for i in shown]
        texts = [[_plain_cell(row[i], grid.columns[i].rank <= detailed) for i in shown] for row in grid.rows]
        ranks = [column.rank for column in columns]
        if _width(columns, texts) <= width or (detailed < 0 and not any(ranks)):
            break
        if detailed > 0 or not any(ranks):
            detailed = 0 if detailed > 0 else -1
        else:
            shown.remove(max(shown, key=lambda i: (grid.columns[i].rank, i)))
    left_out = [column.title for i, column in enumerate(grid.columns) if i not in shown]
    return [*_lines(columns, texts), *([f"(no room for {', '.join(left_out)})"] if left_out else [])]


def _plain_cell(cell: Cell, detailed: bool) -> str:
    text = f"{one_line(_signed(cell))}{' *' if cell.best else ''}"
    return f"{text} {one_line(cell.detail)}".strip() if detailed else text


def _widths(columns: Sequence[Column], texts: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(column.title), *(len(row[i]) for row in texts)) for i, column in enumerate(columns)]


def _width(columns: Sequence[Column], texts: Sequence[Sequence[str]]) -> int:
    return sum(_widths(columns, texts)) + 2 * (len(columns) - 1)


def _lines(columns: Sequence[Column], texts: Sequence[Sequence[str]]) -> list[str]:
    widths = _widths(columns, texts)
    rows = [[column.title for column in columns], *texts]
    return [
        "  ".join(
            cell.rjust(width) if column.number else cell.ljust(width)
            for column, width, cell in zip(columns, widths, row, strict=True)
        ).rstrip()
        for row in rows
    ]
