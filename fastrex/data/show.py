"""What the model gets of some images: each with its crop boxes, then its crops with their draws; the contact sheet."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from .. import files
from ..config import DataConfig
from ..errors import FastrexError
from .index import Index, Status
from .loader import one_batch
from .mixes import MixPlan
from .plan import (
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GRAY,
    HUE,
    ORDER,
    ORDERS,
    SATURATION,
    SOLARIZE,
    SOLARIZE_OFF,
    BatchPlan,
    CropGroup,
    Plan,
)
from .reader import BadSample, read_bytes
from .scan import REASONS

CELL, CAPTION, GAP = 160, 36, 6  # pixels: side of a picture, height of its text, space around both
COLOURS = ("#e6194b", "#3cb4ff", "#ffe119", "#3cb44b")  # of a group's boxes and frames
SOURCE = 800  # pixels: longest side that is kept of an image
NEAREST = 3  # names that an error suggests


@dataclass(frozen=True)
class Crop:
    """One crop as the model gets it before it is normalised: ``box`` (top, left, height, width), ``params`` [9]."""

    group: CropGroup
    number: int
    colour: str
    picture: Image.Image
    box: tuple[int, int, int, int]
    params: NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """One image and its crops. ``source`` is None where Pillow cannot read the file; ``note`` says where it occurs."""

    row: int
    name: str
    label: str
    width: int
    height: int
    note: str
    source: Image.Image | None
    crops: tuple[Crop, ...]


def of_batch(index: Index, plan: Plan, data: DataConfig, epoch: int, step: int, rows: int) -> list[Sample]:
    """The first ``rows`` images of the global batch ``step`` (within ``epoch``).

    Raises:
        FastrexError: an image is gone, changed or cannot be decoded.
    """
    whole = plan.batch(epoch, step)
    # Those that they are mixed with are needed too.
    count, mix = rows, whole.mix
    if mix is not None:
        count = -(-rows // (2 * mix.distance)) * 2 * mix.distance
        mix = mix.first(count)
    groups = tuple(
        dataclasses.replace(group, boxes=group.boxes[:, :count], params=group.params[:, :count])
        for group in whole.groups
    )
    samples, views, planned = whole.samples[:count], whole.views[:count], whole.planned[:count]
    part = dataclasses.replace(whole, samples=samples, views=views, planned=planned, groups=groups, mix=mix)
    notes = [f"place {place} of the batch{_view(int(view))}{_mixed(mix, place)}" for place, view in enumerate(views)]
    return _collect(index, plan, data, part, notes)[:rows]


def of_names(index: Index, plan: Plan, data: DataConfig, epoch: int, names: Sequence[str]) -> list[Sample]:
    """The images that ``names`` mean (see :func:`find`), each with all views of one draw in ``epoch``.

    Raises:
        FastrexError: a name means no image or one that was left out, or an image is gone or changed.
    """
    repeats = plan.data.repeats
    rows = np.repeat(np.array([find(index, name) for name in names], np.int64), repeats)
    views = np.tile(np.arange(repeats), len(names))
    trained = np.isin(rows, plan.samples)
    notes = []
    for row, view, train in zip(rows, views, trained, strict=True):
        places, there = plan.occurrences(int(row), epoch)
        now = places[there == view]
        if len(now):
            step, place = divmod(int(now[0]), plan.batch_size)
            where = f"place {place} of step {step} in epoch {epoch}"
        else:
            where = f"not drawn in epoch {epoch}" if train else "held out: no image of the training"
        # Its partner belongs to a batch; asked for by itself it has none.
        notes.append(where + _view(int(view)) + (", not mixed here" if plan.augment.mixes else ""))
    part = BatchPlan(epoch, 0, 0, rows, 0, plan.draw(rows, views, epoch), views, rows)
    # A substitute would not be what was asked for.
    return _collect(index, plan, dataclasses.replace(data, on_bad_sample="stop"), part, notes)


def find(index: Index, name: str) -> int:
    """The row that ``name`` means: a row number, or the path as errors and logs write it, relative to the root.

    Raises:
        FastrexError: there is none, with names that contain ``name``, or it was left out, with the reason.
    """
    wanted = os.path.relpath(name, index.root) if os.path.isabs(name) else name
    row = int(name) if name.isascii() and name.isdigit() else -1
    if row < 0:
        row = next((row for row in range(len(index)) if index.name(row) == wanted), -1)
    if not 0 <= row < len(index):
        near = itertools.islice((found for row in range(len(index)) if name in (found := index.name(row))), NEAREST)
        hint = ", ".join(map(repr, near))
        fact = f"a row below {len(index)} or a path relative to {str(index.root)!r}, got {name!r}"
        raise FastrexError(f"data show: --sample must be {fact}{f' (did you mean {hint}?)' if hint else ''}")
    if index.status[row] != Status.OK:
        raise FastrexError(
            f"data show: {index.name(row)!r} was left out ({REASONS[Status(index.status[row])]}); choose another image"
        )
    return row


def _view(view: int) -> str:
    return f", view {view}" if view else ""


def _mixed(mix: MixPlan | None, place: int) -> str:
    if mix is None:
        return ""
    kind = "CutMix" if mix.own_cuts[place] else "mixup"
    return f", {mix.own_shares[place]:.0%} of it in a {kind} with place {mix.partners[place]}"


def _collect(index: Index, plan: Plan, data: DataConfig, part: BatchPlan, notes: Sequence[str]) -> list[Sample]:
    batch = one_batch(index, plan, data, part)
    part, count = batch.plan, len(batch.samples)
    crops: list[list[Crop]] = [[] for _ in range(count)]
    for colour, piece, group in zip(itertools.cycle(COLOURS), batch.crops, part.groups, strict=False):
        pictures = _pictures(piece, data)
        for number, place in np.ndindex(group.boxes.shape[:2]):
            top, left, height, width = (int(side) for side in group.boxes[number, place])
            picture, params = pictures[number * count + place], group.params[number, place]
            crops[place].append(Crop(group.group, number, colour, picture, (top, left, height, width), params))
    samples = []
    for row, planned, note, own in zip(batch.samples.tolist(), part.planned.tolist(), notes, crops, strict=True):
        if row != planned:
            note = f"{note}, in place of {index.name(planned)}, which is bad"
        label, width, height = index.classes[index.labels[row]], int(index.widths[row]), int(index.heights[row])
        samples.append(Sample(row, index.name(row), label, width, height, note, _source(index, row), tuple(own)))
    return samples


def _pictures(crops: Tensor, data: DataConfig) -> list[Image.Image]:
    """Crops [N, C, S, S] before their normalisation."""
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    if data.channels == 1:
        mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
    levels = (crops * std.view(-1, 1, 1) + mean.view(-1, 1, 1)).mul(255).round().clamp(0, 255).byte()
    arrays = levels.permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array[..., 0] if data.channels == 1 else array) for array in arrays]


def _source(index: Index, row: int) -> Image.Image | None:
    """The file as Pillow shows it; the training has a decoder of its own, which reads a little more."""
    try:
        with Image.open(io.BytesIO(read_bytes(index, row).tobytes())) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I;16"):
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            picture = picture.convert("RGB")
            picture.thumbnail((SOURCE, SOURCE))
            return picture
    except BadSample:
        raise
    except Exception:  # Pillow raises nearly anything; the crops are there all the same
        return None


def describe(params: NDArray[np.float32]) -> str:
    """The draws of one crop [9] in two short lines; jitters in their order, what is off left out."""
    names = ((BRIGHTNESS, "b", 1), (CONTRAST, "c", 1), (SATURATION, "s", 1), (HUE, "h", 0))
    jitters = [names[op] for op in ORDERS[int(params[ORDER])]]
    first = [f"{name}{params[column]:.2f}" for column, name, off in jitters if params[column] != off]
    second = [name for column, name in ((FLIP, "flip"), (GRAY, "grey")) if params[column]]
    if params[BLUR]:
        second.append(f"blur{params[BLUR]:.1f}")
    if params[SOLARIZE] < SOLARIZE_OFF:
        second.append(f"sol{params[SOLARIZE]:.0f}")
    return f"{' '.join(first)}\n{' '.join(second)}"


def contact_sheet(samples: Sequence[Sample], out: Path) -> None:
    """Write a PNG with one line per sample.

    Raises:
        FastrexError: ``out`` cannot be written.
    """
    columns = 1 + max(len(sample.crops) for sample in samples)
    sheet = Image.new("RGB", (columns * (CELL + GAP) + GAP, len(samples) * (CELL + CAPTION + GAP) + GAP), "white")
    for line, sample in enumerate(samples):
        caption = f"{sample.label}\n{sample.width}x{sample.height}\n{sample.name.rpartition('/')[2]}"
        _place(sheet, _with_boxes(sample), line, 0, caption, "white")
        for column, crop in enumerate(sample.crops):
            caption = f"{crop.group.name} {crop.number}\n{describe(crop.params)}"
            _place(sheet, crop.picture, line, column + 1, caption, crop.colour)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    try:
        files.write_output(out, buffer.getvalue())
    except OSError as error:
        raise FastrexError(f"cannot write {str(out)!r} ({error.strerror or error}); name another file") from error


def _with_boxes(sample: Sample) -> Image.Image:
    scale = CELL / max(sample.width, sample.height)
    size = max(1, round(sample.width * scale)), max(1, round(sample.height * scale))
    picture = sample.source.resize(size) if sample.source else Image.new("RGB", size, "grey")
    draw = ImageDraw.Draw(picture)
    for crop in sample.crops:
        top, left, height, width = (side * scale for side in crop.box)
        # A box of less than a pixel would end before it begins.
        draw.rectangle((left, top, max(left, left + width - 1), max(top, top + height - 1)), outline=crop.colour)
    return picture


def _place(sheet: Image.Image, picture: Image.Image, line: int, column: int, caption: str, colour: str) -> None:
    """Put ``picture``, at most CELL wide and high, and its caption into a cell of the sheet, framed in ``colour``."""
    left, top = GAP + column * (CELL + GAP), GAP + line * (CELL + CAPTION + GAP)
    if max(picture.size) > CELL:
        picture = ImageOps.contain(picture, (CELL, CELL))
    else:  # small crops by whole factors, so that their pixels show
        factor = CELL // max(picture.size)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((left - 2, top - 2, left + picture.width + 1, top + picture.height + 1), fill=colour)
    sheet.paste(picture, (left, top))
    # The built-in font knows Latin letters only; a narrow cell keeps about 26 of them.
    text = "\n".join(part[:26] for part in caption.encode("latin-1", "replace").decode("latin-1").split("\n"))
    draw.multiline_text((left, top + CELL + 1), text, fill="black", spacing=0)
