"""Indexes of the sets to evaluate on: of what a reader has listed, stored and used again, and of folders of one's own.

Split 0 is trainval and 1 the test set, always.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data import index as stored
from ..data.headers import probe
from ..data.index import Index, Progress, Status, cache_dir
from ..data.scan import ClassFolder, Layout, Listing, list_images, quoted, refuse_one_class, subfolders
from ..data.sources import find_source
from ..errors import FastrexError

HELD_OUT = 0.1  # of a folder without a test set, as training does


def known(name: str, place: Path, stamp: str) -> Index | None:
    """The index that is stored for the set ``name`` at ``place``, if it bears ``stamp``: what another process on this
    machine has just listed and checked need not be listed again."""
    try:
        index = stored.load(_path(name, place))
    except FastrexError:
        return None
    return _noted(index) if index.stamp == stamp else None


def of_listing(
    name: str,
    place: Path,
    listed: Listing,
    *,
    threads: int = 0,
    progress: Progress | None = None,
    empty_classes: str = "skip",
) -> Index:
    """The index of ``listed``, the images of the set ``name`` at ``place``.

    It is stored in the cache folder and used again as long as the same images are listed, no folder of theirs has
    changed (a file that is written over in place does not change its folder) and what could not be read still cannot.

    Raises:
        FastrexError: no readable test image, or fewer than two classes with a readable training image.
    """
    path, stamp = _path(name, place), _stamp(listed)
    try:
        index = stored.load(path)
    except FastrexError:
        index = None
    if index is None or index.stamp != stamp or _repaired(index, listed, threads):
        index = stored.from_listing(listed, stamp, threads=threads, progress=progress, empty_classes=empty_classes)
        refuse_one_class(listed.root, index.classes, "transfer")
        if not len(index.rows("val", 0.0)):
            raise FastrexError(f"transfer: {str(listed.root)!r} must have readable test images, got none; get it again")
        stored.save(index, path)
    return dataclasses.replace(_noted(index), root=listed.root)


def own(name: str, place: Path, *, threads: int = 0, progress: Progress | None = None) -> Index:
    """A folder, list or shards of the user's, as training takes them; but where there are train/, val/ and test/, the
    protocol's split: the first two to learn from, the third to test on.

    Raises:
        FastrexError: it is none of them, has one class only, or nothing to test on.
    """
    if (listed := _with_test(place)) is not None:
        return of_listing(name, place, listed, threads=threads, progress=progress, empty_classes="error")
    index = stored.open_or_build(place, threads=threads, progress=progress)
    refuse_one_class(place, index.classes, "transfer")
    if index.layout != "single":
        if not len(index.rows("val", 0.0)):
            raise FastrexError(f"transfer: {str(place)!r} must have readable test images, got none; add some")
        return index
    if not len(index.rows("val", HELD_OUT)):
        raise FastrexError(
            f"transfer: {str(place)!r} must have a class of two images to hold one out, got none; add images"
        )
    notice = f"no test set: {HELD_OUT:.0%} of each class, chosen by file name, are held out as the test set"
    return dataclasses.replace(index.held_apart(HELD_OUT), notices=(*index.notices, notice))


def _with_test(place: Path) -> Listing | None:
    """train/, val/ and test/ of ``place``, if it has all three with class folders."""
    source = find_source(place)
    if not isinstance(source, Layout) or source.name != "train+val" or not (source.root / "test").is_dir():
        return None
    names = subfolders(source.root / "test")
    if not names:  # the images of a competition, whose classes nobody knows
        return None
    if unknown := sorted(set(names) - set(source.classes)):
        raise FastrexError(
            f"transfer: {str(source.root / 'test')!r} must have the classes of train/, got {quoted(unknown)}; remove "
            "these folders, or add their classes to train/"
        )
    # A layout has two splits; so each of the two is listed beside train/.
    train = tuple(folder for folder in source.folders if folder.split == 0)
    paths = [os.path.join(source.root, "test", name) for name in names]
    tests = (ClassFolder(1, name, path, os.stat(path).st_mtime_ns) for name, path in zip(names, paths, strict=True))
    first, second = list_images(source), list_images(Layout(source.root, "train+test", (*train, *tests)))
    rows = [(0, label, path) for label, path in zip(first.labels.tolist(), first.paths, strict=True)]
    rows += [row for row in zip(second.splits.tolist(), second.labels.tolist(), second.paths, strict=True) if row[0]]
    rows.sort()
    held = Path(next(folder.path for folder in source.folders if folder.split == 1)).parent.name
    return Listing(
        source.root,
        "train+test",
        first.classes,
        [row[2] for row in rows],
        np.array([row[1] for row in rows], np.int32),
        np.array([row[0] for row in rows], np.uint8),
        first.ignored + second.ignored,
        (f"train/ and {held}/ together are the training images, test/ is the test set",),
    )


def _path(name: str, place: Path) -> Path:
    key = hashlib.blake2b(os.fsencode(os.path.realpath(place)), digest_size=16).hexdigest()
    return cache_dir() / "transfer" / f"{name}-{key}.npz"


def _noted(index: Index) -> Index:
    """``index`` with a notice of the classes that it leaves out."""
    if not index.skipped:
        return index
    notice = f"without a readable training image, so left out: {quoted(index.skipped)}"
    return dataclasses.replace(index, notices=(*index.notices, notice))


def _stamp(listed: Listing) -> str:
    """sha256 over all that is listed, and over the modification times of the folders that hold it."""
    digest = hashlib.sha256(json.dumps([str(listed.root), listed.layout, listed.classes, listed.notices]).encode())
    digest.update(np.ascontiguousarray(listed.labels, "<i4").tobytes())
    digest.update(listed.splits.tobytes())
    digest.update(b"\0".join(listed.paths))
    root = os.fsencode(listed.root)
    for folder in sorted({os.path.dirname(path) for path in listed.paths}):
        digest.update(b"\0%d" % os.stat(os.path.join(root, folder)).st_mtime_ns)
    return digest.hexdigest()


def _repaired(index: Index, listed: Listing, threads: int) -> bool:
    """Whether an image that could not be read when ``index`` was made can be read now, written over in its place."""
    bad = {os.fsencode(index.name(int(row))) for row in np.flatnonzero(index.status)}
    # Classes that were left out are not in the index; one training image brings them back.
    gone = [label for label, name in enumerate(listed.classes) if name in set(index.skipped)]
    missing = np.isin(listed.labels, gone) & (listed.splits == 0)
    rows = [row for row, path in enumerate(listed.paths) if missing[row] or path in bad] if gone or bad else []
    return bool(rows) and bool((probe(_part(listed, rows), threads, None)[:, 3] == Status.OK).any())


def _part(listed: Listing, rows: Sequence[int]) -> Listing:
    paths = [listed.paths[row] for row in rows]
    return dataclasses.replace(listed, paths=paths, labels=listed.labels[rows], splits=listed.splits[rows])
