"""The index of an image folder: one row per file with its label, shape and status, built once, stored, checked.

A single broken file kills a decoding pipeline in mid-training without being named, so broken files are found here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FastrexError
from .scan import LAYOUT_HELP, REASONS, Progress, Status, find_layout, list_images, probe_files, quoted

__all__ = ["Index", "Progress", "Status", "build", "cache_dir", "default_path", "load", "open_or_build", "save"]

VERSION = 1
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


@dataclass(frozen=True, eq=False)
class Index:
    """One row per file, sorted by split, class and relative path; N rows, C classes; the arrays are read-only.

    ``heights`` and ``widths`` are those of the decoded image (EXIF orientation applied), 0 where unknown. ``sizes``
    are bytes. ``split`` is 0 for train and 1 for val; ``split_key`` (blake2b of the relative path) ranks the held-out
    choice. The relative path of row i is ``blob[offsets[i]:offsets[i + 1]]`` in the file system's encoding.
    ``fingerprint`` is a sha256 of all that, ``stamp`` one of the class folders' modification times. ``ignored`` counts
    files with other extensions, ``skipped`` names the classes left out for want of a readable training image.
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

    def __len__(self) -> int:
        return len(self.labels)

    def relative(self, row: int) -> str:
        """Path of ``row`` relative to the root; bytes that are not UTF-8 appear as surrogate escapes."""
        return os.fsdecode(self.blob[self.offsets[row] : self.offsets[row + 1]])

    def path(self, row: int) -> Path:
        """Path of ``row``."""
        return self.root / self.relative(row)

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
        return [(self.relative(int(row)), REASONS[Status(self.status[row])]) for row in np.flatnonzero(self.status)]


def cache_dir() -> Path:
    """Folder for what fastrex keeps between runs: ``FASTREX_CACHE``, or ``~/.cache/fastrex``. It may not exist yet."""
    return Path(os.environ.get("FASTREX_CACHE") or "~/.cache/fastrex").expanduser()


def default_path(root: str | Path) -> Path:
    """Where ``fastrex data index`` puts the index of ``root``: ``.fastrex/index.npz`` in it, or the cache folder if it
    is read-only."""
    inside, cached = _stored_paths(root)
    folder = inside.parent
    writable = os.access(folder if folder.exists() else folder.parent, os.W_OK | os.X_OK)
    return inside if writable and (folder.is_dir() or not folder.exists()) else cached


def open_or_build(
    root: str | Path, *, threads: int = 0, progress: Progress | None = None, empty_classes: str = "error"
) -> Index:
    """The stored index of ``root`` if it is good and the folder kept its shape, else a new one, which is stored in the
    cache folder.

    The shape is the set of class folders and their modification times: files added, removed or renamed directly in a
    class folder are noticed; files changed in place or inside a nested folder are not (``fastrex data index`` builds
    anew). Arguments and errors as for :func:`build`.
    """
    layout = find_layout(root)
    for path in _stored_paths(layout.root):
        try:
            index = load(path)
        except FastrexError:
            continue
        if index.stamp == layout.stamp:
            if empty_classes == "error":
                _refuse_empty(layout.root, index.skipped)
            return dataclasses.replace(index, root=layout.root)
    index = build(root, threads=threads, progress=progress, empty_classes=empty_classes)
    # Training never writes into a folder of images unasked; `fastrex data index` does, so that others find it there.
    save(index, _stored_paths(layout.root)[1])
    return index


def build(
    root: str | Path, *, threads: int = 0, progress: Progress | None = None, empty_classes: str = "error"
) -> Index:
    """Index of the image folder ``root``.

    threads: header readers (0 = four per core); progress: called with (files done, files in all); empty_classes:
    "error" refuses classes without a readable training image, "skip" leaves them out, with their val folder.
    FastrexError for a folder that cannot be trained on.
    """
    if empty_classes not in ("error", "skip"):
        raise ValueError(f'build: empty_classes must be "error" or "skip", got {empty_classes!r}')
    layout = find_layout(root)
    files = list_images(layout)
    if not files.paths:
        fact = f"no image in any class folder, {files.ignored} other files"
        raise FastrexError(f"{str(layout.root)!r}: {fact}; {LAYOUT_HELP}")
    train = files.splits == 0
    names = np.array(layout.classes, object)
    # Before the scan, which may take minutes, what needs no file opened.
    if empty_classes == "error":
        _refuse_empty(layout.root, names[np.bincount(files.labels[train], minlength=len(names)) == 0])
    probed = probe_files(layout.root, files.paths, threads, progress)
    readable = train & (probed[:, 3] == Status.OK)
    if not readable.any():
        first = int(np.argmax(train))
        fact = f"{os.fsdecode(files.paths[first])!r}: {REASONS[Status(probed[first, 3])]}"
        raise FastrexError(f"{str(layout.root)!r}: no readable training image ({fact}); {LAYOUT_HELP}")
    filled = np.bincount(files.labels[readable], minlength=len(names)) > 0
    if empty_classes == "error":
        _refuse_empty(layout.root, names[~filled])
    if filled.sum() < 2:
        fact = f"only {quoted(list(names[filled]))} holds images, training needs two classes"
        raise FastrexError(f"{str(layout.root)!r}: {fact}; {LAYOUT_HELP}")
    kept = np.flatnonzero(filled[files.labels])
    paths = [files.paths[row] for row in kept]
    columns = {
        "labels": (np.cumsum(filled) - 1)[files.labels[kept]],
        "heights": probed[kept, 1],
        "widths": probed[kept, 2],
        "sizes": probed[kept, 0],
        "status": probed[kept, 3],
        "split": files.splits[kept],
        "split_key": np.frombuffer(b"".join(hashlib.blake2b(p, digest_size=4).digest() for p in paths), "<u4"),
        "offsets": np.concatenate(([0], np.cumsum([len(path) for path in paths]))),
    }
    meta = {
        "root": str(layout.root),
        "layout": layout.name,
        "classes": list(names[filled]),
        "skipped": list(names[~filled]),
        "ignored": files.ignored,
        "stamp": layout.stamp,
    }
    return _assemble(meta, b"".join(paths), {name: columns[name].astype(dtype) for name, dtype in COLUMNS.items()})


def save(index: Index, path: str | Path) -> None:
    """Write ``index`` to ``path`` (npz, no pickle) by one atomic rename; a failure leaves what was there before."""
    path = Path(path)
    meta = {"version": VERSION, "root": str(index.root)}
    meta |= {name: getattr(index, name) for name in ("layout", "classes", "skipped", "ignored", "stamp", "fingerprint")}
    arrays = {name: getattr(index, name) for name in COLUMNS}
    arrays |= {"blob": np.frombuffer(index.blob, np.uint8), "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        way_out = "free some space, or set FASTREX_CACHE to a folder that can be written"
        raise FastrexError(f"cannot write {str(path)!r} ({reason}); {way_out}") from error


def load(path: str | Path) -> Index:
    """Read what :func:`save` wrote, checked against its fingerprint. FastrexError if missing, damaged or newer."""
    name, way_out = repr(str(path)), "run `fastrex data index PATH` again"
    try:
        # numpy leaves a file that it opened itself open when the archive is damaged.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        meta = json.loads(arrays.pop("meta").tobytes())
        if meta["version"] > VERSION:
            raise FastrexError(f"{name}: index format {meta['version']}, this fastrex reads {VERSION}; {way_out}")
        index = _assemble(meta, arrays.pop("blob").tobytes(), arrays)
        if index.fingerprint != meta["fingerprint"]:
            raise ValueError("fingerprint")
    except FastrexError:
        raise
    except FileNotFoundError as error:
        raise FastrexError(f"{name}: no index here; {way_out}") from error
    except Exception as error:  # a damaged archive makes numpy and zipfile raise nearly anything
        raise FastrexError(f"{name}: damaged index ({type(error).__name__}); {way_out}") from error
    return index


def _assemble(meta: dict[str, Any], blob: bytes, columns: dict[str, Any]) -> Index:
    """Index over ``columns``, whose shapes, types and ranges are checked; the fingerprint is computed."""
    digest = hashlib.sha256(json.dumps([meta["layout"], meta["classes"]]).encode())
    rows = len(columns["labels"])
    for name, dtype in COLUMNS.items():
        column = columns[name]
        if column.dtype != dtype or column.shape != (rows + (name == "offsets"),):
            raise ValueError(f"index: column {name} must be {np.dtype(dtype)}, got {column.dtype} {column.shape}")
        column.setflags(write=False)
        digest.update(column.astype(column.dtype.newbyteorder("<"), copy=False).data)
    digest.update(blob)
    offsets, labels = columns["offsets"], columns["labels"]
    if offsets[0] != 0 or offsets[-1] != len(blob) or (np.diff(offsets) <= 0).any():
        raise ValueError("index: offsets must rise from 0 to the length of the paths")
    if labels.min() < 0 or labels.max() >= len(meta["classes"]) or columns["status"].max() > max(Status):
        raise ValueError("index: labels must name a class and status a reason")
    return Index(
        root=Path(meta["root"]),
        layout=meta["layout"],
        classes=tuple(meta["classes"]),
        skipped=tuple(meta["skipped"]),
        ignored=meta["ignored"],
        stamp=meta["stamp"],
        blob=blob,
        fingerprint=digest.hexdigest(),
        **{name: columns[name] for name in COLUMNS},
    )


def _stored_paths(root: str | Path) -> tuple[Path, Path]:
    root = Path(root).expanduser()
    key = hashlib.blake2b(os.fsencode(root.resolve()), digest_size=16).hexdigest()
    return root / ".fastrex" / "index.npz", cache_dir() / "index" / f"{key}.npz"


def _refuse_empty(root: Path, names: Sequence[str] | NDArray[Any]) -> None:
    if len(names):
        way_out = "add images, remove the folder, or set data.empty_classes=skip"
        raise FastrexError(f"{str(root)!r}: no readable training image in {quoted(list(names))}; {way_out}")
