"""Writing tar shards in WebDataset's layout: ``KEY.cls`` (number of the class), ``KEY.jpg``, and names in classes.json.

The same images give the same bytes. A run that was stopped goes on where it was; until the last shard is written
nothing appears under the name that was asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import tarfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO

import numpy as np

from .. import files, untrusted
from ..errors import FastrexError
from .index import Index, open_or_build
from .reader import BadSample, read_bytes
from .scan import SUFFIXES, Progress, Status, plain_suffix

RECORD = Path(".fastrex") / "shards.json"
RECORD_LIMIT = 1 << 16
MAGIC = {
    b"\xff\xd8": b".jpg",
    b"\x89PNG": b".png",
    b"RIFF": b".webp",
    b"BM": b".bmp",
    b"II*\0": b".tif",
    b"MM\0*": b".tif",
    b"II+\0": b".tif",
    b"P": b".ppm",
}
BLOCK = 512
HEADERS = 3 * BLOCK  # of an image and of its label, and the label
PIECE = 1 << 20
STEP = 64


@dataclass(frozen=True)
class Written:
    """What was written: names of the shards, number of images, and (name, reason) of those that were left out."""

    shards: tuple[str, ...]
    images: int
    left_out: list[tuple[str, str]]


def shard(
    path: str | Path,
    out: str | Path,
    *,
    max_bytes: int,
    seed: int | None = None,
    split: str = "all",
    empty_classes: str = "error",
    threads: int = 0,
    progress: Progress | None = None,
) -> Written:
    """Write the readable images of ``path`` (any source) as train-000000.tar, val-000000.tar, .. into the folder
    ``out``, which must not exist or be empty.

    max_bytes: largest shard (an image that is larger gets one of its own); seed: shuffles the images of a split, None
    keeps them by class and path; split: "train", "val" or "all"; threads: shards written at a time (0 = four);
    progress: called with (images done, images in all).
    FastrexError for a source or a folder that does not do, and for an image that changed since it was indexed.
    """
    if split not in ("train", "val", "all"):
        raise ValueError(f'shard: split must be "train", "val" or "all", got {split!r}')
    source, target = Path(path).expanduser(), find_target(path, out)
    index = open_or_build(path, threads=threads, empty_classes=empty_classes)
    wanted = (index.split == (split == "val")) | (split == "all")
    rows = np.flatnonzero(wanted & (index.status == Status.OK))
    if not len(rows):
        raise FastrexError(f"{str(source)!r}: no readable image in its {split} part; choose another --split")
    bad = np.flatnonzero(wanted & (index.status != Status.OK))
    reasons = dict(index.bad())
    left_out = [(name, reasons[name]) for name in map(index.name, bad.tolist())]
    try:
        options = {"fingerprint": index.fingerprint, "bytes": max_bytes, "seed": seed, "split": split}
        with _partial(target, options) as partial:
            in_splits = source.is_dir() and not index.shards and index.layout != "single"
            plan = _plan(index, rows.tolist(), in_splits, max_bytes, seed)
            _write_all(index, partial, plan, threads or 4, progress)
            # Names that are not UTF-8 survive as escapes.
            files.write_bytes(partial / "classes.json", json.dumps(index.classes, indent=0).encode() + b"\n")
            os.rename(partial, target)
    except OSError as error:
        reason = error.strerror or error
        fact = f"cannot write shards to {str(target)!r} ({reason})"
        raise FastrexError(f"{fact}; make room, and give the same command again: it goes on where it was") from error
    return Written(tuple(plan), len(rows), left_out)


def find_target(path: str | Path, out: str | Path) -> Path:
    """Absolute path of ``out``; FastrexError where shards of ``path`` may not be written to it."""
    source, target = (Path(os.path.abspath(Path(p).expanduser())) for p in (path, out))
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise FastrexError(f"{str(target)!r} lies inside of {str(source)!r}; write the shards to a place beside it")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FastrexError(f"{str(target)!r} exists; give a new or an empty folder for the shards")
    return target


@contextlib.contextmanager
def _partial(target: Path, options: dict[str, object]) -> Iterator[Path]:
    """The folder beside ``target`` in which shards are collected, new or left by a run with the same ``options``."""
    partial = target.with_name(f".{target.name}.partial")
    record = json.dumps({"format": 1, **options}, sort_keys=True).encode() + b"\n"
    try:
        known = untrusted.read(partial / RECORD, RECORD_LIMIT)
    except FileNotFoundError:
        (partial / RECORD.parent).mkdir(parents=True, exist_ok=True)
        files.write_bytes(partial / RECORD, record)
    else:
        if known != record:
            fact = f"{str(partial)!r} was left by a run that wrote other images or used other options"
            raise FastrexError(f"{fact}; remove this folder, or give the same command again")
    with open(partial / RECORD, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FastrexError(f"another process is writing {str(target)!r}; wait for it") from error
        # What a killed run left of a file that it was writing.
        for orphan in partial.glob(".*.*"):
            orphan.unlink()
        yield partial


def _plan(
    index: Index, rows: Sequence[int], in_splits: bool, max_bytes: int, seed: int | None
) -> dict[str, list[tuple[int, bytes]]]:
    """Rows and member names of each shard, in order; ``in_splits``: the paths begin with the folder of the split."""
    held = "test" if index.layout == "train+test" else "val"
    plan: dict[str, list[tuple[int, bytes]]] = {}
    for split, word in enumerate(("train", held)):
        items = list(_named(index, [row for row in rows if index.split[row] == split], in_splits))
        if seed is not None:
            # Not numpy's shuffle: the order should be the same in ten years.
            items.sort(key=lambda item: blake2b(b"%d/%s" % (seed, item[1]), digest_size=16).digest())
        number, total = -1, 0
        for row, name in items:
            size = HEADERS + int(index.sizes[row]) + BLOCK
            if number < 0 or total + size > max_bytes:
                number, total = number + 1, 0
            total += size
            plan.setdefault(f"{word}-{number:06d}.tar", []).append((row, name))
    return plan


def _named(index: Index, rows: Sequence[int], in_splits: bool) -> Iterator[tuple[int, bytes]]:
    """Rows with the names of their members: the paths, made fit for a key without dots, each name once."""
    taken: set[bytes] = set()
    for row in rows:
        path = os.fsencode(index.name(row))
        if index.shards:
            path = path[len(os.fsencode(index.shards[index.shard[row]])) + 1 :]
        elif in_splits:
            path = path.partition(b"/")[2]
        path = plain_suffix(path)
        folder, slash, base = path.rpartition(b"/")
        stem, suffix = os.path.splitext(base)
        if os.fsdecode(suffix) not in SUFFIXES:
            stem, suffix = base, _suffix(index, row)
        # A reader of WebDataset ends the key at the first dot, and skips names that begin with a dot or underscores.
        key = folder + slash + stem.replace(b".", b"_")
        key = b"/".join(b"-" + part[1:] if part.startswith((b".", b"__")) else part for part in key.split(b"/"))
        names = itertools.chain([key], (b"%s-%d" % (key, number) for number in itertools.count(1)))
        key = next(name for name in names if name not in taken)
        taken.add(key)
        yield row, key + suffix


def _suffix(index: Index, row: int) -> bytes:
    """The extension by the first bytes, for a name that has none that an image has."""
    path, first, _ = index.locate(row)
    with open(path, "rb", buffering=0) as file:
        file.seek(first)
        head = file.read(8)
    return next((suffix for magic, suffix in MAGIC.items() if head.startswith(magic)), b".jp2")


def _write_all(
    index: Index, folder: Path, plan: dict[str, list[tuple[int, bytes]]], threads: int, progress: Progress | None
) -> None:
    lock, total, stop = threading.Lock(), sum(map(len, plan.values())), threading.Event()
    done = 0

    def count(images: int) -> None:
        nonlocal done
        if stop.is_set():
            raise InterruptedError
        with lock:
            done += images
            if progress:
                progress(done, total)

    def write(name: str) -> None:
        if (folder / name).exists():  # by an earlier run; whole, because it was renamed
            count(len(plan[name]))
            return
        with files.replacing(folder / name) as temporary, open(temporary, "xb", buffering=PIECE) as file:
            for start in range(0, len(plan[name]), STEP):
                for row, member in plan[name][start : start + STEP]:
                    _append(file, index, row, member)
                count(min(STEP, len(plan[name]) - start))
            file.write(bytes(2 * BLOCK))

    with ThreadPoolExecutor(threads) as pool:
        try:
            for _ in pool.map(write, plan):
                pass
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _append(file: IO[bytes], index: Index, row: int, member: bytes) -> None:
    label = b"%d" % index.labels[row]
    file.write(_header(os.path.splitext(member)[0] + b".cls", len(label)))
    file.write(label.ljust(BLOCK, b"\0"))
    file.write(_header(member, int(index.sizes[row])))
    try:
        file.write(read_bytes(index, row).data)
    except BadSample as error:
        way_out = "index the source again, and remove the folder .NAME.partial beside the one asked for"
        raise FastrexError(f"{error.name!r} {error.reason}; {way_out}") from error
    file.write(bytes(-int(index.sizes[row]) % BLOCK))


def _header(name: bytes, size: int) -> bytes:
    """Of a regular file without owner or date, so that the same images give the same bytes."""
    member = tarfile.TarInfo(os.fsdecode(name))
    member.size = size
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
