"""The demo data set: scikit-learn's handwritten digits as an image folder."""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import FastrexError
from .index import cache_dir

IMAGES = 1797
SIZE = 32
HELD_OUT_EVERY = 5


def write_digits(folder: str | Path | None = None) -> Path:
    """Write the 1797 handwritten digits once as 32x32 grey JPEGs, ``train/DIGIT/``, ``val/DIGIT/``; return the folder.

    Source: ``sklearn.datasets.load_digits`` (UCI optdigits, 8x8, 17 grey levels), enlarged bicubically, JPEG quality
    95. Every fifth image of each digit is held out. ``folder`` (default ``cache_dir()/digits-v1``) appears complete, by
    one rename, and is used again; simultaneous writers do not disturb each other. FastrexError where scikit-learn is
    missing or the folder holds something else.
    """
    target = Path(folder) if folder is not None else cache_dir() / "digits-v1"
    if _complete(target):
        return target
    try:
        digits = importlib.import_module("sklearn.datasets").load_digits()
    except ImportError as error:
        raise FastrexError("the demo data need scikit-learn; run: pip install 'fastrex[train]'") from error
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            _write(temporary, digits.images, digits.target)
            with contextlib.suppress(OSError):  # another writer was first, or something else lies there: seen below
                os.rename(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        way_out = "free some space, or set FASTREX_CACHE to a folder that can be written"
        raise FastrexError(f"cannot write the demo data to {str(target)!r} ({error.strerror}); {way_out}") from error
    if not _complete(target):
        raise FastrexError(f"{str(target)!r} holds something else than the demo data; remove it or give another folder")
    return target


def _complete(folder: Path) -> bool:
    return sum(1 for _ in folder.glob("train/[0-9]/*.jpg")) + sum(1 for _ in folder.glob("val/[0-9]/*.jpg")) == IMAGES


def _write(folder: Path, images: np.ndarray, digits: np.ndarray) -> None:
    seen = [0] * 10
    for split in ("train", "val"):
        for digit in range(10):
            (folder / split / str(digit)).mkdir(parents=True)
    for number, (image, digit) in enumerate(zip(images, digits.tolist(), strict=True)):
        split = "val" if seen[digit] % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else "train"
        seen[digit] += 1
        grey = Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8))
        large = grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        large.save(folder / split / str(digit) / f"{number:04d}.jpg", quality=95)
