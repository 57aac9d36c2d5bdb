"""One HTML page about a run, or about several side by side: everything inside, nothing loaded, nothing run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import charts, files, untrusted
from ..charts import Series
from ..errors import FastrexError, explain
from ..markup import document, made_by, text
from ..rundir import STATUS, version
from . import curves, scores, tables
from .groups import FEW, places
from .page import STYLE, Section, grid, titled
from .record import Record, names, read
from .tradeoff import tradeoff

GENERATOR = "fastrex report"
NAME = "report.html"
MAX_OMITTED = 12  # lines of a section about what it does not show
HEAD = 4096  # bytes of a page that tell whose it is
NEIGHBOURS = (
    "Each image on the left with its nearest by the cosine of the encoder's features. ✓, solid frame: of the same "
    "class; ✗, dashed frame: of another."
)


def run(runs: Sequence[Path], *, out: Path | None, images: bool, say: Callable[[str], None]) -> Path:
    """Write the page about ``runs``.

    Args:
        runs: run directories, also of runs that go on. out: the page; None: ``report.html`` in a lone run, else in the
            working directory. images: also crops, neighbours and spectrum, for which images are read and the encoder
            runs. say: is told what takes time.

    Returns:
        Where the page is.

    Raises:
        FastrexError: a folder is no run, or ``out`` is something else than a report or cannot be written.
    """
    if not runs:
        raise FastrexError("report: RUN must name at least one run")
    place = out if out is not None else (runs[0] / NAME if len(runs) == 1 else Path(NAME))
    records = [read(path, name) for path, name in zip(runs, names(runs), strict=True)]
    _check(place)
    page = compose(records, images=images, say=say)
    try:
        if out is None:
            # A link in the run's own folder is replaced: it may be somebody else's and lead anywhere.
            files.write_text(place, page)
        else:
            files.write_output(place, page)
    except OSError as error:
        raise FastrexError(f"report: {place} cannot be written ({explain(error)}); choose another --out") from None
    return place


def compose(records: Sequence[Record], *, images: bool, say: Callable[[str], None]) -> str:
    """The page as HTML."""
    several = len(records) > 1
    sections = [curves.training(records), curves.bank(records)]
    sections += _pictured(records, images, say)
    sections += [scores.transfer(records), tradeoff(records)]
    sections += [tables.settings(records), tables.environment(records), tables.events(records)]
    shown = [section for section in sections if section.body]
    omitted = [f"State of {r.name}: {r.missing[STATUS]}." for r in records if STATUS in r.missing]
    for section in sections:
        # Of many runs the first say enough.
        more = len(section.omitted) - MAX_OMITTED
        omitted += section.omitted[:MAX_OMITTED]
        omitted += [f"{section.title}: {more} more lines of this kind."] if more > 0 else []
    title = f"{len(records)} runs" if several else records[0].name
    links = "".join(f'<a href="#{section.key}">{text(section.title)}</a>' for section in shown)
    made = f"Made by fastrex {version()}, {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}. Nothing is loaded."
    left_out = "".join(f"<li>{text(line)}</li>" for line in omitted)
    body = [
        f"<header><h1>{text(title)}</h1>{tables.overview(records)}<nav>{links}</nav></header>",
        "<main>",
        *(section.html() for section in shown),
        *(
            [f'<section id="omitted"><h2>Not shown</h2><ul class="omitted">{left_out}</ul></section>']
            if omitted
            else []
        ),
        "</main>",
        f"<footer>{text(made)}</footer>",
    ]
    return document(f"{title} · fastrex report", "\n".join(body), STYLE, generator=GENERATOR)


def _pictured(records: Sequence[Record], images: bool, say: Callable[[str], None]) -> list[Section]:
    """Crops, neighbours, spectrum and the analyses."""
    analysed, lines = scores.analyses(records)
    crops, neighbours, omitted = [], [], list[str]()
    if images:
        from . import pictures  # PyTorch, DALI and Pillow, which --no-images does without

        several = len(records) > 1
        # Spectra of other images cannot be compared: either all of them come from fastrex analyze, or none.
        own = len(lines) < len(records)
        lines = [] if own else lines
        for i, record in zip(places(records), records[:FEW], strict=False):
            found = pictures.look(record, i, several, say)
            heading = f"<h3>{titled(record.name, i)}</h3>" if several else ""
            crops += [heading + found.crops] if found.crops else []
            neighbours += [heading + found.neighbours] if found.neighbours else []
            omitted += found.omitted
            if own and found.spectrum is not None:
                lines.append(found.spectrum if several else Series(found.spectrum.name, found.spectrum.points))
        # The page stays one that can be sent.
        if len(records) > FEW:
            omitted.append(f"Crops and neighbours of all runs but the first {FEW}.")
    else:
        omitted.append(f"{'Crops and neighbours' if lines else 'Crops, neighbours and spectrum'}: --no-images.")
    drawn = ""
    if lines:
        drawn = grid([
            charts.lines(lines, title="Singular values", unit="of the largest", x="index", log_x=True, log_y=True,
                         legend=True)
        ])  # fmt: skip
    note = (
        "Of l2-normalised features, not centred, each divided by the largest; flatter is less redundant. "
        "The formulas are this project's reading of the method's analyses."
    )
    return [
        Section("crops", "Crops as the model saw them", "".join(crops)),
        Section("neighbours", "Nearest neighbours", "".join(neighbours), NEIGHBOURS, tuple(omitted)),
        Section("spectrum", "Spread of the features", drawn + analysed, note if drawn or analysed else ""),
    ]


def _check(place: Path) -> None:
    """Refuse to replace what is no report."""
    if not place.is_file() and not place.is_dir():
        return
    try:
        with untrusted.opened(place) as file:
            if made_by(file.read(HEAD).decode("utf-8", "replace"), GENERATOR):
                return
    except (OSError, ValueError):
        pass
    raise FastrexError(f"report: --out must be a new file or a report of fastrex, got {place}; choose another --out")
