"""The index of a data set: one row per image with its label, shape, place and status, built once, stored, checked.

A single broken file kills a decoding pipeline in mid-training without being named, so broken files are found here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FastrexError
from . import columns as stored_columns
from .headers import probe
from .places import cache_dir, default_path, stored_paths
from .scan import LAYOUT_HELP, PIXEL_LIMIT, REASONS, Listing, Progress, Status, case_clashes, quoted
from .sources import find_source

__all__ = [
    "Index",
    "Progress",
    "Status",
    "build",
    "cache_dir",
    "default_path",
    "from_listing",
    "load",
    "open_or_build",
    "save",
]

VERSION = 2
COLUMNS = {
    "labels": np.int32,
    "heights": np.int32,
    "widths": np.int32,
    "sizes": np.int64,
    "status": np.uint8,
    "split": np.uint8,
    "split_key": np.uint32,
    "offsets": np.int64,
}
PLACES = {"shard": np.int32, "first": np.int64}
META = ("layout", "classes", "skipped", "ignored", "notices", "shards", "stamp")
LAYOUTS = ("single", "train+val", "train+test")


@dataclass(frozen=True, eq=False)
class Index:
    """One row per image, sorted by split, class and relative path; N rows, C classes; the arrays are read-only.

    ``heights`` and ``widths`` are those of the decoded image (EXIF orientation applied), 0 where unknown. ``sizes``
    are bytes. ``split`` is 0 for train and 1 for val; ``split_key`` (blake2b of the path, see ``Listing.hashed``)
    ranks the held-out choice. The relative path of row i is ``blob[offsets[i]:offsets[i + 1]]`` in the file system's
    encoding. Where there are ``shards``, row i lies in ``shards[shard[i]]`` from byte ``first[i]`` on; else both are
    empty.
    ``fingerprint`` is a sha256 of all that, ``stamp`` one of what tells whether the source has changed. ``ignored``
    counts files and lines that name no image to train on, ``skipped`` names the classes left out for want of a readable
    training image, ``notices`` say what is odd about the source.
    """

    root: Path
    layout: str
    classes: tuple[str, ...]
    labels: NDArray[np.int32]
    heights: NDArray[np.int32]
    widths: NDArray[np.int32]
    sizes: NDArray[np.int64]
    status: NDArray[np.uint8]
    split: NDArray[np.uint8]
    split_key: NDArray[np.uint32]
    blob: bytes
    offsets: NDArray[np.int64]
    fingerprint: str
    stamp: str
    ignored: int
    skipped: tuple[str, ...]
    notices: tuple[str, ...]
    shards: tuple[str, ...]
    shard: NDArray[np.int32]
    first: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, row: int) -> str:
        """What errors and logs call ``row``: its path relative to the root. Bytes that are not UTF-8 are surrogate
        escapes; the path of an image in a shard begins with the shard, as if it were a folder.
        """
        return os.fsdecode(self.blob[self.offsets[row] : self.offsets[row + 1]])

    def path(self, row: int) -> Path:
        """Path of ``row``, where the images are files of their own."""
        return self.root / self.name(row)

    def locate(self, row: int) -> tuple[str, int, int]:
        """Where the bytes of ``row`` lie: absolute path of the file, first byte, number of bytes."""
        if self.shards:
            return os.path.join(self.root, self.shards[self.shard[row]]), int(self.first[row]), int(self.sizes[row])
        return os.path.join(self.root, self.name(row)), 0, int(self.sizes[row])

    def with_status(
        self, rows: Sequence[int] | NDArray[np.int64], statuses: Sequence[int] | NDArray[np.uint8]
    ) -> Index:
        """This index with other :class:`Status` for ``rows``, and so with another fingerprint."""
        status = self.status.copy()
        status[np.asarray(rows, np.int64)] = statuses
        return _assemble(self._meta(), self.blob, self._columns() | {"status": status})

    def held_apart(self, held_out: float) -> Index:
        """This index where ``rows("val", held_out)`` are its test images, with the layout "train+test"."""
        split = np.zeros(len(self), np.uint8)
        split[self.rows("val", held_out)] = 1
        meta = self._meta() | {"layout": "train+test"}
        return _rows_of(meta, self, np.argsort(split, kind="stable"), self._columns() | {"split": split})

    def _meta(self) -> dict[str, Any]:
        return {"root": str(self.root)} | {name: getattr(self, name) for name in META}

    def _columns(self) -> dict[str, NDArray[Any]]:
        return {name: getattr(self, name) for name in (COLUMNS | PLACES if self.shards else COLUMNS)}

    def rows(self, split: str, held_out: float) -> NDArray[np.int64]:
        """Sorted int64 rows of the readable images of ``split``, "train" or "val".

        With the layout "single" the ``round(held_out * n)`` images of a class with the smallest ``split_key`` are its
        val part: at least one, never all, none where ``held_out`` is 0 or the class has one image. Other layouts have
        their own val folder and ignore ``held_out``.
        """
        if split not in ("train", "val"):
            raise ValueError(f'Index.rows: split must be "train" or "val", got {split!r}')
        if not 0 <= held_out < 1:
            raise ValueError(f"Index.rows: held_out must lie in [0, 1), got {held_out}")
        good: NDArray[np.int64] = np.flatnonzero(self.status == Status.OK).astype(np.int64)
        if self.layout != "single":
            good = good[self.split[good] == (split == "val")]
            return good
        labels = self.labels[good]
        order = np.lexsort((self.split_key[good], labels))
        count = np.bincount(labels, minlength=len(self.classes))
        held = np.maximum(np.rint(held_out * count), held_out > 0).astype(np.int64)
        held = np.minimum(held, np.maximum(count - 1, 0))
        rank = np.arange(len(good)) - np.repeat(np.cumsum(count) - count, count)
        chosen: NDArray[np.int64] = good[order[(rank < np.repeat(held, count)) == (split == "val")]]
        return np.sort(chosen)

    def bad(self) -> list[tuple[str, str]]:
        """(relative path, reason) of every file that is left out."""
        return [(self.name(int(row)), REASONS[Status(self.status[row])]) for row in np.flatnonzero(self.status)]


def open_or_build(
    root: str | Path, *, threads: int = 0, progress: Progress | None = None, empty_classes: str = "error"
) -> Index:
    """The stored index of ``root`` if it is good and the source kept its shape, else a new one, which is stored in the
    cache folder.

    The shape of a folder is the set of class folders and their modification times: files added, removed or renamed
    directly in a class folder are noticed; files changed in place or inside a nested folder are not (``fastrex data
    index`` builds anew). That of shards is their names, sizes and modification times; that of a list, its bytes.
    Arguments and errors as for :func:`build`.
    """
    source = find_source(root)
    stamp = source.stamp
    # The newest first: what the check found since must not be hidden by an older index that could not be replaced.
    for path in sorted(stored_paths(root), key=_modified, reverse=True):
        try:
            index = load(path)
        except FastrexError:
            continue
        if index.stamp == stamp:
            if empty_classes == "error":
                _refuse_empty(_place(root), index.skipped)
            index = dataclasses.replace(index, root=source.root)
            # `fastrex data check` may have found the last images of a class bad.
            return _without_empty(_place(root), index, empty_classes)
    index = build(root, threads=threads, progress=progress, empty_classes=empty_classes)
    # Training never writes into a folder of images unasked; `fastrex data index` does, so that others find it there.
    save(index, stored_paths(root)[-1])
    return index


def build(
    root: str | Path, *, threads: int = 0, progress: Progress | None = None, empty_classes: str = "error"
) -> Index:
    """Index of ``root``: an image folder, a list of images (.csv, .tsv, .jsonl), a tar shard or a folder of them.

    threads: header readers (0 = four per core); progress: called with (files done, files in all); empty_classes:
    "error" refuses classes without a readable training image, "skip" leaves them out, with their val images.
    FastrexError for a source that cannot be trained on.
    """
    if empty_classes not in ("error", "skip"):
        raise ValueError(f'build: empty_classes must be "error" or "skip", got {empty_classes!r}')
    source = find_source(root)
    stamp = source.stamp
    listed = source.listing(threads)
    if not listed.paths:
        fact = f"no image in any {'shard' if listed.shards else 'class folder'}, {listed.ignored} other files"
        beside = list(source.root.glob("*.tar")) and not listed.shards
        hint = "; tar shards must not stand beside folders" if beside else ""
        raise FastrexError(f"{_place(root)}: {fact}; {LAYOUT_HELP}{hint}")
    return from_listing(
        listed, stamp, place=_place(root), threads=threads, progress=progress, empty_classes=empty_classes
    )


def from_listing(
    listed: Listing,
    stamp: str,
    *,
    place: str = "",
    threads: int = 0,
    progress: Progress | None = None,
    empty_classes: str = "error",
) -> Index:
    """Index of the images that are listed: each header is read. ``stamp`` is kept with it; ``place`` is what errors
    call the source, by default the listing's root; the others, and errors, as for :func:`build`."""
    place = place or _place(listed.root)
    # Before the scan, which may take minutes, what needs no file opened.
    if empty_classes == "error":
        named = np.bincount(listed.labels[listed.splits == 0], minlength=len(listed.classes)) > 0
        _refuse_empty(place, [name for name, there in zip(listed.classes, named, strict=True) if not there])
    probed = probe(listed, threads, progress)
    columns: dict[str, NDArray[Any]] = {
        "labels": listed.labels,
        "heights": probed[:, 1],
        "widths": probed[:, 2],
        "sizes": probed[:, 0],
        "status": probed[:, 3],
        "split": listed.splits,
        "split_key": np.frombuffer(
            b"".join(hashlib.blake2b(k, digest_size=4).digest() for k in listed.hashed()), "<u4"
        ),
        "offsets": np.concatenate(([0], np.cumsum([len(path) for path in listed.paths]))),
        "shard": listed.shard,
        "first": listed.first,
    }
    meta = {
        "root": str(listed.root),
        "layout": listed.layout,
        "classes": listed.classes,
        "skipped": (),
        "ignored": listed.ignored,
        "notices": listed.notices,
        "shards": listed.shards,
        "stamp": stamp,
    }
    kinds = COLUMNS | PLACES if listed.shards else COLUMNS
    index = _assemble(meta, b"".join(listed.paths), {name: columns[name].astype(kinds[name]) for name in kinds})
    index = _without_empty(place, index, empty_classes)
    return dataclasses.replace(index, notices=(*index.notices, *case_clashes(index.classes)))


def save(index: Index, path: str | Path) -> None:
    """Write ``index`` to ``path`` (npz, no pickle) by one atomic rename; a failure leaves what was there before."""
    path = Path(path)
    meta = {"version": VERSION, "fingerprint": index.fingerprint} | index._meta()
    try:
        stored_columns.write(path, meta, index._columns() | {"blob": np.frombuffer(index.blob, np.uint8)})
    except OSError as error:
        reason = error.strerror or error
        way_out = "free some space, or set FASTREX_CACHE to a folder that can be written"
        raise FastrexError(f"cannot write {str(path)!r} ({reason}); {way_out}") from error


def load(path: str | Path) -> Index:
    """Read what :func:`save` wrote, checked against its fingerprint. FastrexError if missing, damaged or of another
    version."""
    name, way_out = repr(str(path)), "run `fastrex data index PATH` again"

    def kinds(meta: dict[str, Any]) -> dict[str, Any]:
        if meta["version"] != VERSION:
            raise FastrexError(f"{name}: index format {meta['version']!r:.20}, this fastrex reads {VERSION}; {way_out}")
        _check_meta(meta)
        return COLUMNS | (PLACES if meta["shards"] else {}) | {"blob": np.uint8}

    try:
        meta, columns = stored_columns.read(path, kinds)
        index = _assemble(meta, columns.pop("blob").tobytes(), columns)
        if index.fingerprint != meta["fingerprint"]:
            raise ValueError("fingerprint")
    except FastrexError:
        raise
    except FileNotFoundError as error:
        raise FastrexError(f"{name}: no index here; {way_out}") from error
    except Exception as error:  # a damaged archive makes zipfile raise nearly anything
        raise FastrexError(f"{name}: damaged index ({type(error).__name__}); {way_out}") from error
    return index


def _check_meta(meta: dict[str, Any]) -> None:
    texts, lists = ("root", "layout", "stamp", "fingerprint"), ("classes", "skipped", "notices", "shards")
    good = all(isinstance(meta[key], str) for key in texts) and type(meta["ignored"]) is int
    good &= all(isinstance(meta[key], list) and all(isinstance(v, str) for v in meta[key]) for key in lists)
    if not good or meta["layout"] not in LAYOUTS or "\0" in meta["root"]:
        raise ValueError("index: what it says of itself must be words and lists of words")


def _without_empty(place: str, index: Index, empty_classes: str) -> Index:
    """``index`` without the classes that have no readable training image; FastrexError where there is one and
    ``empty_classes`` is "error", or where none is left."""
    names = index.classes
    readable = (index.split == 0) & (index.status == Status.OK)
    if not readable.any():
        first = int(np.argmin(index.split))
        fact = f"{index.name(first)!r}: {REASONS[Status(index.status[first])]}"
        raise FastrexError(f"{place}: no readable training image ({fact}); {LAYOUT_HELP}")
    filled = np.bincount(index.labels[readable], minlength=len(names)) > 0
    empty = [name for name, there in zip(names, filled, strict=True) if not there]
    if empty_classes == "error":
        _refuse_empty(place, empty)
    if not empty:
        return index
    kept = np.flatnonzero(filled[index.labels])
    columns = index._columns() | {"labels": (np.cumsum(filled) - 1)[index.labels].astype(np.int32)}
    classes = tuple(name for name, there in zip(names, filled, strict=True) if there)
    meta = index._meta() | {"classes": classes, "skipped": (*index.skipped, *empty)}
    return _rows_of(meta, index, kept, columns)


def _rows_of(meta: dict[str, Any], index: Index, rows: NDArray[np.int64], columns: dict[str, NDArray[Any]]) -> Index:
    """Index of ``rows`` of ``index``, in that order, with the ``columns`` of all its rows instead of its own."""
    paths = [index.blob[index.offsets[row] : index.offsets[row + 1]] for row in rows]
    columns = {name: column[rows] for name, column in columns.items() if name != "offsets"}
    columns["offsets"] = np.concatenate(([0], np.cumsum([len(path) for path in paths]))).astype(np.int64)
    return _assemble(meta, b"".join(paths), columns)


def _assemble(meta: dict[str, Any], blob: bytes, columns: dict[str, Any]) -> Index:
    """Index over ``columns``, whose shapes, types and ranges are checked; the fingerprint is computed."""
    digest = hashlib.sha256(json.dumps([meta["layout"], list(meta["classes"])]).encode())
    rows, shards = len(columns["labels"]), tuple(meta["shards"])

    def take(kinds: dict[str, Any]) -> None:
        for name, dtype in kinds.items():
            column = columns[name]
            if column.dtype != dtype or column.shape != (rows + (name == "offsets"),):
                raise ValueError(f"index: column {name} must be {np.dtype(dtype)}, got {column.dtype} {column.shape}")
            column.setflags(write=False)
            digest.update(column.astype(column.dtype.newbyteorder("<"), copy=False).data)

    take(COLUMNS)
    digest.update(blob)
    if shards:
        digest.update(json.dumps(shards).encode())
        take(PLACES)
        if columns["shard"].min() < 0 or columns["shard"].max() >= len(shards) or columns["first"].min() < 0:
            raise ValueError("index: an image lies outside of the shards")
    offsets, labels = columns["offsets"], columns["labels"]
    if offsets[0] != 0 or offsets[-1] != len(blob) or (np.diff(offsets) <= 0).any():
        raise ValueError("index: offsets must rise from 0 to the length of the paths")
    if labels.min() < 0 or labels.max() >= len(meta["classes"]) or columns["status"].max() > max(Status):
        raise ValueError("index: labels must name a class and status a reason")
    heights, widths, good = columns["heights"], columns["widths"], columns["status"] == Status.OK
    pixels = heights.astype(np.int64) * widths
    shaped = min(heights.min(), widths.min()) >= 0 and not (good & ((pixels < 1) | (pixels > PIXEL_LIMIT))).any()
    if not shaped or columns["sizes"].min() < 0 or columns["split"].max() > 1:
        raise ValueError("index: good images must have a shape that may be decoded, all of them a size and a split")
    stored_columns.refuse_outside(blob, offsets, shards)
    empty = {name: np.empty(0, dtype) for name, dtype in PLACES.items()}
    return Index(
        root=Path(meta["root"]),
        layout=meta["layout"],
        classes=tuple(meta["classes"]),
        skipped=tuple(meta["skipped"]),
        ignored=meta["ignored"],
        notices=tuple(meta["notices"]),
        stamp=meta["stamp"],
        shards=shards,
        blob=blob,
        fingerprint=digest.hexdigest(),
        **(empty | {name: columns[name] for name in (COLUMNS | PLACES if shards else COLUMNS)}),
    )


def _place(root: str | Path) -> str:
    return repr(os.path.abspath(Path(root).expanduser()))


def _modified(path: Path) -> float:
    return path.stat().st_mtime if path.is_file() else 0.0


def _refuse_empty(place: str, names: Sequence[str]) -> None:
    if names:
        way_out = "add images, remove the class, or set data.empty_classes=skip"
        raise FastrexError(f"{place}: no readable training image in {quoted(names)}; {way_out}")
