"""Reading an image folder: which class folders it has, and which files; and what every kind of source has in common.

Layouts: ``train/CLASS/..`` with ``val/`` (or ``validation/``, or ``test/``) beside it, ``train/`` alone, ``CLASS/..``.
Everything hidden (a leading dot) is ignored; files deeper inside a class folder belong to that class.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import FastrexError

Progress = Callable[[int, int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")

PIXEL_LIMIT = 178_956_970
SUFFIXES = frozenset([".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"])
SPLITS = frozenset(["train", "val", "validation", "test"])
LAYOUT_HELP = "expected CLASS/IMAGE.jpg, or train/CLASS/IMAGE.jpg and val/CLASS/IMAGE.jpg"
SOURCE_HELP = "give the folder with the images, a list of them (.csv, .tsv, .jsonl) or tar shards"
LABEL_LIMIT = 1024
BURST = 16  # items per thread between two looks at whether threads help


class Status(IntEnum):
    """Whether a file can be trained on, and if not, why."""

    OK = 0
    EMPTY = 1
    UNREADABLE = 2
    HEADER = 3
    FORMAT = 4
    TOO_LARGE = 5
    TRUNCATED = 6
    DECODE = 7
    CHANGED = 8


REASONS = {
    Status.OK: "good",
    Status.EMPTY: "empty file",
    Status.UNREADABLE: "cannot be opened (no permission, a broken link, or not a regular file)",
    Status.HEADER: "no readable image header",
    Status.FORMAT: "an image format that the decoder does not read",
    Status.TOO_LARGE: f"more than {PIXEL_LIMIT} pixels",
    Status.TRUNCATED: "cut off or damaged: its end is missing",
    Status.DECODE: "the decoder cannot read it",
    Status.CHANGED: "changed since it was indexed",
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

    def listing(self, threads: int) -> Listing:
        """The files of the class folders. ``threads`` is for sources that need them."""
        return list_images(self)

    @property
    def stamp(self) -> str:
        """sha256 over class folders and modification times: changes when files or folders come, go or are renamed."""
        digest = hashlib.sha256(self.name.encode())
        for folder in self.folders:
            digest.update(os.fsencode(os.path.relpath(folder.path, self.root)) + b"\0%d\0" % folder.modified)
        return digest.hexdigest()


@dataclass(frozen=True)
class Listing:
    """The images of a source, sorted by split, class and path; none has been opened.

    ``paths`` are relative to ``root``; ``ignored`` counts what is left out. Where there are ``shards`` (paths relative
    to ``root``), image i is the ``lengths[i]`` bytes from byte ``first[i]`` of ``shards[shard[i]]``, ``given[i]`` is
    the :class:`Status` that is known already, and ``paths[i]`` begins with the name of the shard.
    """

    root: Path
    layout: str
    classes: tuple[str, ...]
    paths: list[bytes]
    labels: NDArray[np.int32]
    splits: NDArray[np.uint8]
    ignored: int
    notices: tuple[str, ...] = ()
    shards: tuple[str, ...] = ()
    shard: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    first: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    given: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))

    def file(self, row: int) -> bytes:
        """Path of the file that holds the bytes of ``row``."""
        inside = os.fsencode(self.shards[self.shard[row]]) if self.shards else self.paths[row]
        return os.path.join(os.fsencode(self.root), inside)

    def hashed(self) -> list[bytes]:
        """What the held-out choice hangs on: the paths, without the shards' names, and one extension for every JPEG;
        so that a folder and the shards made from it hold the same images out."""
        if not self.shards:
            return [plain_suffix(path) for path in self.paths]
        lengths = [len(os.fsencode(name)) + 1 for name in self.shards]
        return [
            plain_suffix(path[lengths[shard] :]) for path, shard in zip(self.paths, self.shard.tolist(), strict=True)
        ]


def find_layout(root: str | Path) -> Layout:
    """Layout of the folder ``root``; FastrexError where it is none that can be trained on."""
    root = Path(os.path.abspath(Path(root).expanduser()))
    if not root.exists():
        raise FastrexError(f"{str(root)!r} does not exist; {SOURCE_HELP} (--data PATH)")
    if not root.is_dir():
        raise FastrexError(f"{str(root)!r} is a file; {SOURCE_HELP}; {LAYOUT_HELP}")
    names = set(subfolders(root))
    splits, layout = [root], "single"
    # A class may be called "train" (CIFAR-100 has one): a split holds folders, or stands among splits only.
    if "train" in names and (names <= SPLITS or subfolders(root / "train")):
        splits = [root / "train"]
        if held_out := names & {"val", "validation"}:
            layout, splits = "train+val", [root / "train", root / min(held_out)]
        elif "test" in names and subfolders(root / "test"):
            layout, splits = "train+test", [root / "train", root / "test"]
    elif names and names <= SPLITS:
        raise FastrexError(f"{str(root)!r}: found {'/, '.join(sorted(names))}/ but no train/; {LAYOUT_HELP}")
    folders = []
    for split, folder in enumerate(splits):
        classes = subfolders(folder)
        if not classes:
            images = sum(_is_image(entry.name) for entry in visible(str(folder)))
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
    labels, splits = np.repeat(labels, counts), np.repeat(splits, counts)
    return Listing(layout.root, layout.name, tuple(layout.classes), paths, labels, splits, ignored)


def name_splits(words: Iterable[str], place: str) -> tuple[str, dict[str, int]]:
    """Layout for the split ``words`` that occur at ``place``, and the split of each word; a word without one (test,
    where there is val) names images to leave out. Without any word: "single"."""
    found = set(words)
    if not found:
        return "single", {}
    if unknown := found - SPLITS:
        raise FastrexError(f"{place}: split {min(unknown)!r} is none of {', '.join(sorted(SPLITS))}")
    if "train" not in found:
        raise FastrexError(f"{place}: found {', '.join(sorted(found))} but no train; name the training images, too")
    if found & {"val", "validation"}:
        return "train+val", {"train": 0, "val": 1, "validation": 1}
    return ("train+test" if "test" in found else "single"), {"train": 0, "test": 1}


def label_text(value: object) -> str:
    """A label of a list or a shard as text: a class's name, or a number from 0 to 2^31 - 1 in its shortest form.

    ValueError says what is wrong with it.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"label {value!r:.50} is neither a name nor a whole number")
    text = value.strip()
    if re.fullmatch(r"-?[0-9]+", text) and (text.startswith("-") or len(text) > 10 or int(text) >= 1 << 31):
        raise ValueError(f"label {text[:50]} is out of range (0 to 2147483647)")
    if not text or len(text) > LABEL_LIMIT or "\0" in text:
        fault = f"longer than {LABEL_LIMIT} characters" if len(text) > LABEL_LIMIT else "empty or holds a NUL"
        raise ValueError(f"the label is {fault}")
    return text


def arrange(
    root: Path,
    place: str,
    layout: str,
    rows: tuple[list[bytes], list[str], list[int]],
    *,
    classes: Sequence[str] | None = None,
    names: Sequence[bytes] | None = None,
    **more: Any,
) -> Listing:
    """Sorted listing of ``rows`` (paths, label texts, splits); ``more`` are further fields, arrays by row among them.

    ``names`` sort the images of a class where that should not hang on their paths. Without ``classes`` the labels of
    the training images are the classes: by value if all are numbers, else by name.
    """
    paths, labels, splits = rows
    if classes is None:
        train = {label for label, split in zip(labels, splits, strict=True) if split == 0}
        if unknown := sorted(set(labels) - train):
            raise FastrexError(f"{place}: {quoted(unknown)} not among the training images; add or remove them")
        numbers = all(map(is_number, train))
        classes = sorted(train, key=lambda label: (int(label) if numbers else 0, label))
    number = {name: index for index, name in enumerate(classes)}
    codes = [number[label] for label in labels]
    names = names or paths
    ranks = sorted(range(len(paths)), key=lambda row: (splits[row], codes[row], names[row], paths[row]))
    order = np.array(ranks, np.int64)
    more = {name: value[order] if isinstance(value, np.ndarray) else value for name, value in more.items()}
    return Listing(
        root,
        layout,
        tuple(classes),
        [paths[row] for row in order.tolist()],
        np.array(codes, np.int32)[order],
        np.array(splits, np.uint8)[order],
        **more,
    )


def case_clashes(names: Sequence[str]) -> tuple[str, ...]:
    """A notice for every group of classes whose names differ in case only."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.casefold(), []).append(name)
    return tuple(f"{quoted(g)} differ in case only and are kept apart" for g in groups.values() if len(g) > 1)


def quoted(names: Sequence[str]) -> str:
    """``class 'a'`` or ``classes 'a', 'b' and 7 more``; never a line break or a byte that a terminal refuses."""
    shown = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{'class' if len(names) == 1 else 'classes'} {shown}"


def refuse_one_class(place: object, classes: Sequence[str], need: str, way_out: str = "") -> None:
    """Refuse ``classes``, those of the images at ``place``, where there is only one and ``need`` takes two.

    Raises:
        FastrexError: ``way_out`` is what helps beside another layout.
    """
    if len(classes) < 2:
        fact = f"only {quoted(classes)} holds images, {need} needs two classes"
        raise FastrexError(f"{str(place)!r}: {fact}; {LAYOUT_HELP}{way_out}")


def in_order(work: Callable[[Item], Result], items: Sequence[Item], threads: int) -> Generator[Result]:
    """``work(item)`` for every item in order, with up to ``threads`` (0 = four per core) of them under way.

    Threads help where files are waited for. Where all is in memory they only fight for the interpreter (a third of the
    speed of one), so now and then one item is worked on alone, to see which of the two it is.
    """
    threads = threads or 4 * (os.cpu_count() or 1)
    place = 0
    with ThreadPoolExecutor(threads) as pool:
        try:
            while place < len(items):
                began, worked = time.perf_counter(), time.thread_time()
                result = work(items[place])
                waiting = time.perf_counter() - began > 2 * (time.thread_time() - worked)
                yield result
                place += 1
                if waiting and threads > 1:
                    yield from pool.map(work, items[place : place + BURST * threads])
                    place += BURST * threads
        finally:
            pool.shutdown(cancel_futures=True)


def plain_suffix(path: bytes) -> bytes:
    """``path`` with its extension in small letters, and .jpg for .jpeg."""
    stem, suffix = os.path.splitext(path)
    suffix = suffix.lower()
    return stem + (b".jpg" if suffix in (b".jpeg", b".jpe") else suffix)


def is_number(label: str) -> bool:
    """Whether ``label`` is a whole number in its shortest form."""
    return re.fullmatch("0|[1-9][0-9]*", label) is not None


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def is_dir(entry: os.DirEntry[str]) -> bool:
    """Whether ``entry`` is a folder, or a link to one."""
    # os.path.isdir, unlike DirEntry.is_dir, bears a symlink that points at itself.
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def visible(folder: str) -> list[os.DirEntry[str]]:
    """What is in ``folder``, by name, without what is hidden."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise FastrexError(f"cannot list {folder!r} ({error.strerror}); make the folder readable") from error


def subfolders(folder: Path) -> list[str]:
    """Names of the visible folders in ``folder``."""
    return [entry.name for entry in visible(str(folder)) if is_dir(entry)]


def _files(folder: str, seen: set[tuple[int, int]]) -> list[str]:
    """Every visible file below ``folder``; a folder in ``seen`` is not entered (again), so that symlink loops end."""
    files: list[str] = []
    pending = [folder]
    while pending:
        current = pending.pop()
        identity = _identity(current)
        if identity not in seen:
            seen.add(identity)
            for entry in visible(current):
                (pending if is_dir(entry) else files).append(entry.path)
    return files
