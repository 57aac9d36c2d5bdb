"""What an analysis found, as analysis.json, analysis.md and analysis.html."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import charts, files, markup, untrusted
from ..errors import FastrexError, one_line

VERSION = 1
NAME = "analysis"
FILES = (f"{NAME}.json", f"{NAME}.md", f"{NAME}.html")  # the first tells what the folder is, and is written first
MAX_BYTES = 64 * 2**20
MAX_SPECTRA = untrusted.MAX_ITEMS // 2  # singular values in a file; half of what fastrex would read of it
TITLE = "How features are spread"
# Names in the file, and as tables and charts have them.
MEASURES = {
    "coding_length": "Coding length",
    "effective_rank": "Effective rank",
    "sparsity": "Sparsity",
    "non_zeros": "Non-zeros",
    "intra_class_distance": "Intra-class distance",
    "class_separation": "Class separation",
    "alignment": "Alignment",
    "uniformity": "Uniformity",
}
BY_DEPTH = ("coding_length", "effective_rank", "intra_class_distance", "class_separation")
NOTES = (
    "Every row of the features is divided by its l2 norm first; they are not centred.",
    "Coding length: 1/2 log det(I + d / (N eps²) X'X) in nats, eps² = 0.5 (Yu et al. 2020); larger is more diverse. "
    "Effective rank: exp of the entropy of the singular values (Roy and Vetterli 2007). Both can be larger where there "
    "are more numbers per image (width).",
    "Sparsity: share of |x| below 1e-5. Non-zeros: mean number of entries that are not 0.",
    "Intra-class distance: mean l2 distance within a class, averaged over classes. Class separation: 1 - within / "
    "total mean cosine distance (Kornblith et al. 2021).",
    "Alignment: mean squared distance of two images of a class; uniformity: log mean exp(-2 d²) over pairs (Wang and "
    "Isola 2020; over 5,000 images drawn by a fixed seed where there are more).",
    "Which of these t-ReX shows is known, its formulas are not: eps, the bound of the sparsity, the averages and the "
    "positives of the alignment are this project's reading.",
)
FILTER_NOTES = (
    "Clusters per filter: greedy clusters of a convolution's filters from cosine 0.5 on, divided by their number; rank "
    "share: effective rank of the filters as a share of the largest possible; means over layers. Both are this "
    "project's reading of filter diversity, not the published measure of Nayman et al.",
)
CHANGE = "output − encoder"
_STYLE = ".scores td { white-space: nowrap; } .scores th { white-space: normal; vertical-align: bottom; }"

Result = Mapping[str, Any]


@dataclass(frozen=True)
class _Table:
    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    align: str
    notes: tuple[str, ...] = ()


def shorten(subjects: Sequence[Mapping[str, Any]], most: int = MAX_SPECTRA) -> bool:
    """Empty spectra where there are more than ``most`` singular values: those of the sets that the pooled images stand
    for, and all of them where that is not enough. Whether any was emptied."""
    single = [one for subject in subjects if "mean" in subject for one in subject["sets"][:-1]]
    every = [one for subject in subjects for one in subject["sets"]]
    shortened = False
    for sets in (single, every):
        if sum(len(layer["spectrum"]) for one in every for layer in one["layers"]) > most:
            shortened = True
            for layer in (layer for one in sets for layer in one["layers"]):
                layer["spectrum"] = []
    return shortened


def write(folder: Path, result: Result) -> None:
    """All three files, each whole.

    Raises:
        FastrexError: one of them cannot be written, or is larger than fastrex would read.
    """
    try:
        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        untrusted.check_json(text, MAX_BYTES, untrusted.MAX_ITEMS)
        for name, content in zip(FILES, (text, markdown(result), page(result)), strict=True):
            files.sweep(folder / name)
            files.write_text(folder / name, content)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise FastrexError(
            f"analyze: {folder} must take the result, it does not ({reason}); name another --out, fewer sources or sets"
        ) from None


def known(folder: Path) -> bool:
    """Whether ``folder`` holds what :func:`write` has written."""
    try:
        found = untrusted.read_json(folder / FILES[0], MAX_BYTES)
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and isinstance(found.get("subjects"), list) and "version" in found


def summary(result: Result) -> Iterator[str]:
    """A line per source: what stands for all its sets, from the encoder to the output of the projector."""
    for subject in result["subjects"]:
        view = _views(subject)[0]
        layers = view["layers"]
        steps = [
            f"{label.lower()} {' -> '.join(_figure(layer[key]) for layer in layers)}"
            for key, label in MEASURES.items()
            if key in BY_DEPTH
        ]
        count = subject["projector_layers"]
        depth = "no projector" if count is None else f"{count} hidden layer{'s' * (count != 1)}"
        yield f"{one_line(subject['name'])} ({depth}) on {view['name']}: {', '.join(steps)}"


def markdown(result: Result) -> str:
    """The tables as Markdown."""
    lines = [f"# {TITLE}", "", _md(_facts(result)), ""]
    for table in _tables(result):
        lines += [f"## {_md(table.title)}", "", _row(table.headers)]
        lines += ["|" + "".join(" ---: |" if side == "r" else " --- |" for side in table.align)]
        lines += [*map(_row, table.rows), "", *(f"* {_md(note)}" for note in table.notes), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def page(result: Result) -> str:
    """Charts and tables as a page of HTML that needs nothing else."""
    parts = [f"<h1>{TITLE}</h1>", f'<p class="dim">{markup.text(_facts(result))}</p>']
    parts += ['<div class="charts">', *(f"<figure>{chart}</figure>" for chart in _charts(result)), "</div>"]
    for table in _tables(result):
        parts += [f"<h2>{markup.text(table.title)}</h2>"]
        parts += [markup.table(table.headers, table.rows, align=table.align, classes=("scores",))]
        parts += [f'<p class="dim">{markup.text(note)}</p>' for note in table.notes]
    return markup.document(TITLE, "\n".join(parts), charts.STYLE + _STYLE)


def _facts(result: Result) -> str:
    first = result["subjects"][0]
    shown = {view["name"]: view["images"] for view in first["sets"]}
    parts = [f"held-out images of {', '.join(f'{name} ({count:,})' for name, count in shown.items())}"]
    if result["images"]:
        parts.append(f"at most {result['images']:,} of each set, evenly over its classes")
    parts += [f"{entry['name']} left out: {entry['reason']}" for entry in result["skipped"]]
    return "; ".join(parts)


def _views(subject: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Its sets, what stands for all of them first: all images pooled, then the mean."""
    sets = list(subject["sets"])
    if "mean" not in subject:
        return sets
    return [sets[-1], {"name": f"mean of {len(subject['mean']['sets'])} sets", **subject["mean"]}, *sets[:-1]]


def _tables(result: Result) -> Iterator[_Table]:
    subjects = result["subjects"]
    for number, view in enumerate(_views(subjects[0])):
        rows = [row for subject in subjects for row in _rows(subject, _views(subject)[number]["layers"])]
        headers = ("Encoder", "Hidden layers", "Layer", "Width", *MEASURES.values())
        notes = NOTES if number == 0 else ()
        yield _Table(
            f"Projector depth and spread: {view['name']}",
            headers,
            tuple(rows),
            "lrl" + "r" * (len(MEASURES) + 1),
            notes,
        )
    rows = [
        (
            subject["name"],
            str(found["layers"]),
            _figure(found["clusters_per_filter"]),
            _figure(found["rank_share"]),
            str(found["zero_filters"]),
        )
        for subject in subjects
        for found in (subject["filters"],)
    ]
    headers = ("Encoder", "Convolutions", "Clusters per filter", "Rank share", "Zero filters")
    yield _Table("Diversity of filters", headers, tuple(rows), "lrrrr", FILTER_NOTES)


def _rows(subject: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    count = subject["projector_layers"]
    start = subject["name"], "no projector" if count is None else str(count)
    for layer in layers:
        yield (*start, layer["layer"], str(layer["width"]), *(_figure(layer[key]) for key in MEASURES))
    if len(layers) > 1:
        ends = [(layers[0][key], layers[-1][key]) for key in ("width", *MEASURES)]
        moved = ["–" if None in pair else _figure(pair[1] - pair[0], "+") for pair in ends]
        yield (*start, CHANGE, *moved)


def _charts(result: Result) -> Iterator[str]:
    subjects = result["subjects"]
    views = [_views(subject)[0] for subject in subjects]
    name = views[0]["name"]
    # A lone encoder leaves room for the layers of its projector.
    spectra = [
        (f"{subject['name']}, {layer['layer']}" if len(subjects) > 1 else layer["layer"], layer["spectrum"])
        for subject, view in zip(subjects, views, strict=True)
        for layer in (view["layers"] if len(subjects) == 1 else view["layers"][:1])
    ]
    # Those of 0 have no place on a logarithmic axis.
    curves = [charts.Series(label, [(at, v) for at, v in enumerate(values, 1) if v]) for label, values in spectra]
    yield charts.lines(curves, title=f"Singular values / largest: {name}", x="singular value", log_y=True)
    deep = [(s["projector_layers"], v["layers"]) for s, v in zip(subjects, views, strict=True)]
    known = sorted({count for count, _ in deep if count is not None})
    if len(known) > 1:
        for key in BY_DEPTH:
            ends = [
                charts.Series(where, [(d, _average(layers[at][key] for c, layers in deep if c == d)) for d in known])
                for where, at in (("encoder", 0), ("projector output", -1))
            ]
            yield charts.lines(ends, title=f"{MEASURES[key]}: {name}", x="hidden layers of the projector")
    elif known:
        for key in BY_DEPTH:
            series = [
                charts.Series(subject["name"], [(at, layer[key]) for at, layer in enumerate(view["layers"])])
                for subject, view in zip(subjects, views, strict=True)
            ]
            yield charts.lines(series, title=f"{MEASURES[key]}: {name}", x="layer (0 = encoder, last = output)")


def _average(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _figure(value: float | None, sign: str = "-") -> str:
    if value is None:
        return "–"
    digits = 0 if isinstance(value, int) else 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 4
    return f"{value:{sign}.{digits}f}"


def _md(text: str) -> str:
    """Text as Markdown: a name cannot open a cell, a link or a tag."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", one_line(text))


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(_md, cells)) + " |"
