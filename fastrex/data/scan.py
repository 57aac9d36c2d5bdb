"""Reading an image folder: which class folders it has, which files, and whether each file can be trained on.

Layouts: ``train/CLASS/..`` with ``val/`` (or ``validation/``, or ``test/``) beside it, ``train/`` alone, ``CLASS/..``.
Everything hidden (a leading dot) is ignored; files deeper inside a class folder belong to that class.
"""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import FastrexError

Progress = Callable[[int, int], None]

PIXEL_LIMIT = 178_956_970
SUFFIXES = frozenset([".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"])
FORMATS = frozenset(["JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000"])
SPLITS = frozenset(["train", "val", "validation", "test"])
END_MARKERS = {"JPEG": b"\xff\xd9", "JPEG2000": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
TAILS = (16, 1 << 16, 1 << 62)
EXIF_ORIENTATION = 0x0112
CHUNK = 64
LAYOUT_HELP = "expected CLASS/IMAGE.jpg, or train/CLASS/IMAGE.jpg and val/CLASS/IMAGE.jpg"


class Status(IntEnum):
    """Whether a file can be trained on, and if not, why."""

    OK = 0
    EMPTY = 1
    UNREADABLE = 2
    HEADER = 3
    FORMAT = 4
    TOO_LARGE = 5
    TRUNCATED = 6


REASONS = {
    Status.OK: "good",
    Status.EMPTY: "empty file",
    Status.UNREADABLE: "cannot be opened (no permission, a broken link, or not a regular file)",
    Status.HEADER: "no readable image header",
    Status.FORMAT: "an image format that the decoder does not read",
    Status.TOO_LARGE: f"more than {PIXEL_LIMIT} pixels",
    Status.TRUNCATED: "cut off or damaged: its end is missing",
}


@dataclass(frozen=True)
class ClassFolder:
    """One class folder: split 0 (train) or 1 (val), class name, path and modification time in ns."""

    split: int
    name: str
    path: str
    modified: int


@dataclass(frozen=True)
class Layout:
    """The class folders of ``root``, sorted by split and name. ``name``: "train+val", "train+test" or "single"."""

    root: Path
    name: str
    folders: tuple[ClassFolder, ...]

    @property
    def classes(self) -> list[str]:
        """Sorted class names of the training split."""
        return [folder.name for folder in self.folders if folder.split == 0]

    @property
    def stamp(self) -> str:
        """sha256 over class folders and modification times: changes when files or folders come, go or are renamed."""
        digest = hashlib.sha256(self.name.encode())
        for folder in self.folders:
            digest.update(os.fsencode(os.path.relpath(folder.path, self.root)) + b"\0%d\0" % folder.modified)
        return digest.hexdigest()


@dataclass(frozen=True)
class Listing:
    """The files of a layout in order: relative paths, label and split of each; ``ignored`` counts other extensions."""

    paths: list[bytes]
    labels: NDArray[np.int32]
    splits: NDArray[np.uint8]
    ignored: int


def find_layout(root: str | Path) -> Layout:
    """Layout of the folder ``root``; FastrexError where it is none that can be trained on."""
    root = Path(os.path.abspath(Path(root).expanduser()))
    if not root.exists():
        raise FastrexError(f"{str(root)!r} does not exist; give the folder with the images (--data PATH)")
    if not root.is_dir():
        raise FastrexError(f"{str(root)!r} is a file; give the folder with the images; {LAYOUT_HELP}")
    names = set(_subfolders(root))
    splits, layout = [root], "single"
    # A class may be called "train" (CIFAR-100 has one): a split holds folders, or stands among splits only.
    if "train" in names and (names <= SPLITS or _subfolders(root / "train")):
        splits = [root / "train"]
        if held_out := names & {"val", "validation"}:
            layout, splits = "train+val", [root / "train", root / min(held_out)]
        elif "test" in names and _subfolders(root / "test"):
            layout, splits = "train+test", [root / "train", root / "test"]
    elif names and names <= SPLITS:
        raise FastrexError(f"{str(root)!r}: found {'/, '.join(sorted(names))}/ but no train/; {LAYOUT_HELP}")
    folders = []
    for split, folder in enumerate(splits):
        classes = _subfolders(folder)
        if not classes:
            images = sum(_is_image(entry.name) for entry in _visible(str(folder)))
            fact = f"no class folders, {images} images directly in it"
            raise FastrexError(f"{str(folder)!r}: {fact}; {LAYOUT_HELP}: move the images into one folder per class")
        for name in classes:
            path = os.path.join(folder, name)
            folders.append(ClassFolder(split, name, path, os.stat(path).st_mtime_ns))
    known = {folder.name for folder in folders if folder.split == 0}
    if unknown := [folder.name for folder in folders if folder.name not in known]:
        way_out = "remove these folders, or add their classes to train/"
        raise FastrexError(f"{str(splits[-1])!r}: {quoted(unknown)} not in train/; {way_out}")
    return Layout(root, layout, tuple(folders))


def list_images(layout: Layout) -> Listing:
    """Every file with an image's extension, sorted by split, class and path. No file is opened."""
    number = {name: label for label, name in enumerate(layout.classes)}
    prefix = len(os.path.join(layout.root, ""))
    # A link back to a folder above would pour all other classes, or the whole disk, into this one.
    bases = {Path(os.path.dirname(folder.path)).resolve() for folder in layout.folders} | {layout.root.resolve()}
    above = {_identity(str(folder)) for base in bases for folder in (base, *base.parents)}
    paths: list[bytes] = []
    counts, ignored = [], 0
    for folder in layout.folders:
        found = _files(folder.path, set(above))
        images = sorted(path[prefix:] for path in found if _is_image(path))
        paths += map(os.fsencode, images)
        counts.append(len(images))
        ignored += len(found) - len(images)
    labels = np.array([number[folder.name] for folder in layout.folders], np.int32)
    splits = np.array([folder.split for folder in layout.folders], np.uint8)
    return Listing(paths, np.repeat(labels, counts), np.repeat(splits, counts), ignored)


def probe_files(root: Path, paths: Sequence[bytes], threads: int, progress: Progress | None) -> NDArray[np.int64]:
    """int64 [N, 4]: bytes, height, width and :class:`Status` of every file, read by a pool of threads."""
    result = np.empty((len(paths), 4), np.int64)
    base = os.fsencode(root)

    def chunk(start: int) -> list[tuple[int, int, int, int]]:
        return [_probe(os.path.join(base, path)) for path in paths[start : start + CHUNK]]

    Image.init()  # Pillow loads its rarer readers on demand, but not safely from several threads
    starts = range(0, len(paths), CHUNK)
    # Pillow warns about large images and odd metadata; what matters here is in the status.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads or 4 * (os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")
        try:
            for start, rows in zip(starts, pool.map(chunk, starts), strict=True):
                result[start : start + len(rows)] = rows
                if progress:
                    progress(start + len(rows), len(paths))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return result


def quoted(names: Sequence[str]) -> str:
    """``class 'a'`` or ``classes 'a', 'b' and 7 more``; never a line break or a byte that a terminal refuses."""
    shown = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{'class' if len(names) == 1 else 'classes'} {shown}"


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _is_dir(entry: os.DirEntry[str]) -> bool:
    # os.path.isdir, unlike DirEntry.is_dir, bears a symlink that points at itself.
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _visible(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise FastrexError(f"cannot list {folder!r} ({error.strerror}); make the folder readable") from error


def _subfolders(folder: Path) -> list[str]:
    return [entry.name for entry in _visible(str(folder)) if _is_dir(entry)]


def _files(folder: str, seen: set[tuple[int, int]]) -> list[str]:
    """Every visible file below ``folder``; a folder in ``seen`` is not entered (again), so that symlink loops end."""
    files: list[str] = []
    pending = [folder]
    while pending:
        current = pending.pop()
        identity = _identity(current)
        if identity not in seen:
            seen.add(identity)
            for entry in _visible(current):
                (pending if _is_dir(entry) else files).append(entry.path)
    return files


def _probe(path: bytes) -> tuple[int, int, int, int]:
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            return 0, 0, 0, Status.UNREADABLE
        if found.st_size == 0:
            return 0, 0, 0, Status.EMPTY
        with open(path, "rb") as file:
            return found.st_size, *_inspect(file, found.st_size)
    except OSError:
        return 0, 0, 0, Status.UNREADABLE


def _inspect(file: IO[bytes], size: int) -> tuple[int, int, int]:
    """Height, width and status of an open image. Whatever a damaged file makes Pillow raise is a status here."""
    try:
        image = Image.open(file)
    except Image.DecompressionBombError:
        return 0, 0, Status.TOO_LARGE
    except Exception:
        return 0, 0, Status.HEADER
    data = file.tell()
    width, height = image.size
    if image.format not in FORMATS:
        return 0, 0, Status.FORMAT
    if min(width, height) < 1:
        return 0, 0, Status.HEADER
    if width * height > PIXEL_LIMIT:
        return height, width, Status.TOO_LARGE
    if _turned(image):
        width, height = height, width
    try:
        whole = _has_end(file, size, data, image)
    except Exception:
        whole = False
    return height, width, Status.OK if whole else Status.TRUNCATED


def _turned(image: Image.Image) -> bool:
    """Whether the decoder will exchange height and width. (Pillow has done so in a TIFF's size already.)

    ``Image.getexif`` is not used: it decodes a whole PNG, and looks into XMP where the decoder does not.
    """
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        return exif.get(EXIF_ORIENTATION) in (5, 6, 7, 8)
    except Exception:
        return False


def _has_end(file: IO[bytes], size: int, data: int, image: Image.Image) -> bool:
    """Whether the image, whose coded data begin at byte ``data``, is complete.

    The marker is looked for in the last bytes, then further back (padding or a film may follow the image), never
    before ``data``: a thumbnail in the header has an end of its own. WebP was read whole by opening it; what has no
    such mark is rare enough to be decoded.
    """
    marker = END_MARKERS.get(image.format or "")
    if marker is None:
        if image.format != "WEBP":
            image.load()
        return True
    for tail in TAILS:
        file.seek(max(data, size - tail))
        if marker in file.read():
            return True
    return False
