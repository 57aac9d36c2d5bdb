"""What needs the images: crops as the model saw them, neighbours and the spectrum of held-out features."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps

from .. import distributed, export, rundir
from ..analysis import measures
from ..charts import Series
from ..config import Config
from ..data import dataset, show
from ..data.index import Index
from ..data.plan import Plan
from ..data.reader import read_bytes
from ..data.shots import training_rows
from ..distributed import World
from ..errors import FastrexError, explain, one_line
from ..markup import data_url, text
from ..transfer import features
from ..verdict import first_line
from .record import Record
from .scores import spectrum

Say = Callable[[str], None]
Rows = NDArray[np.int64]

SAMPLES, QUERIES, NEAREST = 4, 8, 5  # images with their crops; queries and their neighbours
CLASSES, PER_CLASS = 20, 12  # of the training images among which neighbours are looked for
HELD_OUT = 240  # images whose features the spectrum is of
THUMBNAIL, SOURCE, CROP = 96, 320, 112  # pixels: longest sides
SMALL = 64  # pixels: below that a crop is shown with hard edges


@dataclass(frozen=True)
class Pictures:
    """Markup of a run's crops and neighbours, the spectrum of its features, and why any of it is not there."""

    crops: str = ""
    neighbours: str = ""
    spectrum: Series | None = None
    omitted: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Chosen:
    """Index rows: queries, the training images that they meet, and those of the spectrum."""

    queries: Rows
    bank: Rows
    spread: Rows
    held_out: bool

    @property
    def rows(self) -> Rows:
        """All of them, each once."""
        return np.unique(np.concatenate([self.queries, self.bank, self.spread]))


def look(record: Record, i: int, several: bool, say: Say) -> Pictures:
    """The pictures of the ``i``-th run; whatever is missing is told in ``omitted``."""
    lost: list[str] = []
    # A run that goes on may need all the memory of its GPU.
    world = World(0, 1, 0, 1, distributed.pick_device("cpu" if record.status.get("state") == "running" else "auto"))
    crops = neighbours = ""
    line: Series | None = None
    config = record.config
    if config is None:
        return Pictures(omitted=(f"Crops and neighbours of {record.name}: its config.toml cannot be read.",))
    index: Index | None = None
    with _noting(f"Crops and neighbours of {record.name}", lost):
        index = _index(record, config, world)
    if index is not None:
        with _noting(f"Crops of {record.name}", lost):
            say(one_line(f"report: crops of {record.name}"))
            crops = _crops(record, config, index, SAMPLES // 2 if several else SAMPLES)
        with _noting(f"Neighbours and spectrum of {record.name}", lost):
            chosen = _choose(config, index, QUERIES // 2 if several else QUERIES)
            say(one_line(f"report: features of {len(chosen.rows)} images, {record.name}"))
            found, values = _features(record, index, chosen, world)
            neighbours = _neighbours(index, chosen, found)
            held = "held-out" if chosen.held_out else "training"
            name = f"{len(chosen.spread)} {held} images"
            line = spectrum(f"{record.name}, {name}" if several else name, values, i)
    return Pictures(crops, neighbours, line, tuple(lost))


@contextlib.contextmanager
def _noting(what: str, lost: list[str]) -> Iterator[None]:
    """A picture that cannot be made costs itself, and its reason is kept."""
    try:
        yield
    except OSError as error:
        lost.append(f"{what}: {explain(error)}.")
    except (RuntimeError, ValueError, ImportError) as error:  # also what PyTorch and DALI raise
        lost.append(f"{what}: {first_line(error)}.")


def _index(record: Record, config: Config, world: World) -> Index:
    if config.data.path == dataset.SYNTHETIC:
        raise FastrexError("synthetic data shows nothing")
    stored = record.path / rundir.INDEX
    return dataset.open_index(config, world, stored if stored.is_file() else None)


def _crops(record: Record, config: Config, index: Index, count: int) -> str:
    """The first images of the last batch on record."""
    rows = training_rows(index, config.data)
    plan = Plan(
        config.run.seed, config.optim.batch_size, rows, index.heights, index.widths, config.data, config.augment,
        labels=index.labels,
    )  # fmt: skip
    epoch, step = divmod(max((record.step or 1) - 1, 0), plan.steps_per_epoch)
    samples = show.of_batch(index, plan, config.data, epoch, step, count)
    parts = []
    for sample in samples:
        caption = f"{sample.label}: {sample.name}"
        crops = "".join(_crop(crop, sample) for crop in sample.crops)
        parts.append(
            f'<div class="sample"><figure>{_source(sample)}<figcaption>{text(caption)}</figcaption></figure>'
            f'<div class="strip">{crops}</div></div>'
        )
    where = f"Step {step} of epoch {epoch}, the first {len(samples)} images of the batch."
    return f'<p class="dim">{text(where)}</p><div class="samples">{"".join(parts)}</div>'


def _source(sample: show.Sample) -> str:
    inside = [f"<title>{text(sample.name)} and its crops</title>"]
    if sample.source is not None:
        picture = sample.source.copy()
        picture.thumbnail((SOURCE, SOURCE))
        place = f'width="{sample.width}" height="{sample.height}" preserveAspectRatio="none"'
        kind = 'class="pixels" ' if max(picture.size) < SMALL else ""
        inside.append(f'<image {kind}href="{_jpeg(picture)}" {place}/>')
    for crop in sample.crops:
        top, left, height, width = crop.box
        inside.append(f'<rect stroke="{crop.colour}" x="{left}" y="{top}" width="{width}" height="{height}"/>')
    label = text(f"{sample.name} with the boxes of its crops")
    box = f'viewBox="0 0 {sample.width} {sample.height}" preserveAspectRatio="xMinYMin"'
    return f'<svg {box} role="img" aria-label="{label}">{"".join(inside)}</svg>'


def _crop(crop: show.Crop, sample: show.Sample) -> str:
    side, name = crop.group.size, text(f"{crop.group.name} {crop.number} of {sample.name}")
    picture = crop.picture.copy()
    picture.thumbnail((CROP, CROP))
    # Large crops and small ones keep their proportion on the page.
    shown = 2 * side if side < CROP // 2 else min(side, CROP)
    # What has few pixels shows them, none of them made up by a codec.
    kind, data = (' class="pixels"', _png(picture)) if side < SMALL else ("", _jpeg(picture))
    return (
        f'<img{kind} src="{data}" width="{shown}" height="{shown}" alt="{name}" title="{name}" '
        f'style="border-color:{crop.colour}">'
    )


def _choose(config: Config, index: Index, queries: int) -> _Chosen:
    """The same images whatever the run, as long as the data set is the same."""
    train, held = training_rows(index, config.data), index.rows("val", config.data.held_out)
    ours = _shuffled(index, train)
    there = np.unique(index.labels[train])
    classes = there[np.linspace(0, len(there) - 1, min(CLASSES, len(there))).round().astype(int)]
    bank = np.concatenate([ours[index.labels[ours] == label][:PER_CLASS] for label in classes])
    others = _shuffled(index, held) if len(held) else ours[~np.isin(ours, bank)]
    if not len(others):
        raise FastrexError("no image is held out, and too few are left")
    # A query of each class in turn.
    apart = [others[index.labels[others] == label] for label in classes]
    turns = [part[turn] for turn in range(queries) for part in apart if turn < len(part)]
    if not turns:
        raise FastrexError("no image of the chosen classes is held out")
    return _Chosen(np.array(turns[:queries]), bank, others[:HELD_OUT], bool(len(held)))


def _shuffled(index: Index, rows: Rows) -> Rows:
    return rows[np.argsort(index.split_key[rows], kind="stable")]


def _features(
    record: Record, index: Index, chosen: _Chosen, world: World
) -> tuple[dict[int, torch.Tensor], list[float]]:
    """Normalised features by row, and the spectrum of the held-out ones."""
    source = export.load_source(record.path)
    encoder = export.load_encoder(record.path).to(world.device)
    # Not kept: while the run goes on, the weights that were read twice may not be the same.
    got = features.extract(
        encoder, "", index, chosen.rows, features.Transform.of(source), world, cache=None, note=lambda line: None
    )
    by_row = {int(row): feature for row, feature in zip(got.rows, got.features, strict=True)}
    spread = [by_row[int(row)] for row in chosen.spread if int(row) in by_row]
    if not spread:
        raise FastrexError("no image could be read")
    values = measures.spectrum(torch.stack(spread)).tolist()
    return {row: F.normalize(feature, dim=0) for row, feature in by_row.items()}, values


def _neighbours(index: Index, chosen: _Chosen, found: dict[int, torch.Tensor]) -> str:
    bank = [int(row) for row in chosen.bank if int(row) in found]
    if not bank:
        raise FastrexError("no training image could be read")
    stacked = torch.stack([found[row] for row in bank])
    parts, hits, total = [], 0, 0
    for query in (int(row) for row in chosen.queries if int(row) in found):
        near, places = (stacked @ found[query]).topk(min(NEAREST, len(bank)))
        figures = [_figure(index, query)]
        for cosine, place in zip(near.tolist(), places.tolist(), strict=True):
            right = bool(index.labels[bank[place]] == index.labels[query])
            hits, total = hits + right, total + 1
            figures.append(_figure(index, bank[place], right, cosine))
        parts.append(f'<div class="query">{figures[0]}<i></i>{"".join(figures[1:])}</div>')
    kind = "held-out images" if chosen.held_out else "training images (nothing is held out)"
    classes = len(np.unique(index.labels[np.array(bank)]))
    said = (
        f"Queries are {kind}, neighbours are looked for among {len(bank)} training images of {classes} classes: "
        f"{hits} of {total} are of the query's class."
    )
    return f'<p class="dim">{text(said)}</p><div class="queries">{"".join(parts)}</div>'


def _figure(index: Index, row: int, right: bool | None = None, cosine: float = 0.0) -> str:
    label, name = index.classes[index.labels[row]], index.name(row)
    hint = f"{label}: {name}" if right is None else f"{label}: {name}, cosine {cosine:.3f}"
    kind = "" if right is None else ' class="right"' if right else ' class="wrong"'
    mark = "" if right is None else '<b class="good">✓</b> ' if right else '<b class="bad">✗</b> '
    picture = _thumbnail(index, row)
    image = (
        f'<img src="{picture}" width="{THUMBNAIL}" height="{THUMBNAIL}" alt="{text(name)}">' if picture else "(gone)"
    )
    return f'<figure{kind} title="{text(hint)}">{image}<figcaption>{mark}{text(label)}</figcaption></figure>'


def _thumbnail(index: Index, row: int) -> str:
    """A data URL of the image's centre square; empty where Pillow cannot read it."""
    try:
        with Image.open(io.BytesIO(read_bytes(index, row).tobytes())) as file:
            upright = ImageOps.exif_transpose(file)
            if upright.mode.startswith("I;16"):
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return _jpeg(ImageOps.fit(upright.convert("RGB"), (THUMBNAIL, THUMBNAIL)))
    except Exception:  # Pillow raises nearly anything
        return ""


def _jpeg(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=82)
    return data_url(buffer.getvalue(), "jpeg")


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return data_url(buffer.getvalue(), "png")
