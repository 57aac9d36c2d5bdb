"""A contact sheet of one batch: each image with its boxes, then its crops as the model gets them, with their draws."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from fastrex_kernels.augment import augment

from ..config import DataConfig
from ..distributed import own_cores
from ..errors import FastrexError
from . import dali
from .index import Index
from .loader import Reader, Rows
from .plan import BLUR, BRIGHTNESS, CONTRAST, FLIP, GRAY, HUE, ORDER, ORDERS, SATURATION, SOLARIZE, SOLARIZE_OFF, Plan

CELL, CAPTION, GAP = 160, 36, 6  # pixels: side of a picture, height of its text, space around both
COLOURS = ("#e6194b", "#3cb4ff", "#ffe119", "#3cb44b")  # of a group's boxes and frames


def contact_sheet(index: Index, plan: Plan, data: DataConfig, epoch: int, step: int, rows: int, out: Path) -> None:
    """Write a PNG with the first ``rows`` images of the global batch ``step`` (within ``epoch``), one per line.

    Raises:
        FastrexError: an image is gone, changed or cannot be decoded, or ``out`` cannot be written.
    """
    batch = plan.batch(epoch, step)
    samples = batch.samples[:rows]
    groups = [(group.group, group.boxes[:, : len(samples)], group.params[:, : len(samples)]) for group in batch.groups]
    threads = data.threads or own_cores()
    reader = Reader(index, threads)
    try:
        files = [future.result() for future in reader.start(samples)]
    finally:
        reader.close()
    request = dali.Request(
        [index.path(int(row)) for row in samples], files, dali.crop_arguments([g[1] for g in groups])
    )
    shapes = [(group.crops, group.size) for group, *_ in groups]
    cut = dali.crops(
        iter([request]), shapes, batch_size=len(samples), threads=threads, device=torch.device("cpu"), root=index.root
    )
    _, pieces = next(cut)
    columns = 1 + sum(group.crops for group, *_ in groups)
    sheet = Image.new("RGB", (columns * (CELL + GAP) + GAP, len(samples) * (CELL + CAPTION + GAP) + GAP), "white")
    _draw_sources(sheet, index, samples, [boxes for _, boxes, _ in groups])
    column = 1
    for colour, piece, (group, _, params) in zip(itertools.cycle(COLOURS), pieces, groups, strict=False):
        flat = torch.from_numpy(params.reshape(len(piece), -1))
        views = augment(piece, flat, mean=(0, 0, 0), std=(1, 1, 1)).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
        for crop, line in np.ndindex(group.crops, len(samples)):
            picture = Image.fromarray(views[crop * len(samples) + line])
            caption = f"{group.name} {crop}\n{describe(params[crop, line])}"
            _place(sheet, picture, line, column + crop, caption, colour)
        column += group.crops
    try:
        sheet.save(out, format="PNG")
    except OSError as error:
        raise FastrexError(f"cannot write {str(out)!r} ({error.strerror or error}); name another file") from error


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


def _draw_sources(sheet: Image.Image, index: Index, samples: Rows, boxes: list[NDArray[np.int32]]) -> None:
    for line, row in enumerate(samples):
        with Image.open(index.path(int(row))) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
        scale = CELL / max(picture.size)
        caption = f"{index.classes[index.labels[row]]}\n{picture.width}x{picture.height}\n{index.path(int(row)).name}"
        picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
        draw = ImageDraw.Draw(picture)
        for colour, group in zip(itertools.cycle(COLOURS), boxes, strict=False):
            for top, left, height, width in group[:, line].astype(float) * scale:
                draw.rectangle((left, top, left + width - 1, top + height - 1), outline=colour)
        _place(sheet, picture, line, 0, caption, "white")


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
