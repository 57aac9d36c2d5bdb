"""Every image of a data set through the decoder that training uses, before training does it.

The index has looked at headers and ends only. A file that the decoder refuses, or takes for another shape, would end a
run or cost it a sample; it shows here. What decodes to wrong pixels stays: nothing but a checksum tells it.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..distributed import own_cores
from ..errors import FastrexError
from ..untrusted import OPEN_FLAGS
from . import codec, dali
from .headers import examine
from .index import Index, Progress, Status
from .reader import BadSample, Bytes, Reader, Rows, read_bytes
from .scan import REASONS, quoted

BATCH = 64  # images decoded together, and
MEMORY = 64 << 20  # bytes of them, encoded and decoded; a larger image is a batch of its own
AHEAD = 2  # batches read before they are decoded


@dataclass(frozen=True)
class BadImage:
    """An image that training leaves out: its name, its status and what exactly is wrong with it."""

    name: str
    status: Status
    reason: str


@dataclass(frozen=True)
class Checked:
    """What :func:`check` found.

    ``index``: the checked one, where the bad images have their status. ``bad``: all of them in order, also those that
    the index knew. ``decoded`` images of ``size`` encoded bytes together have reached the decoder, in ``seconds``.
    ``emptied``: classes that lost their last training image here.
    """

    index: Index
    bad: tuple[BadImage, ...]
    decoded: int
    size: int
    seconds: float
    emptied: tuple[str, ...]

    def refuse(self, empty_classes: str) -> None:
        """FastrexError where training would refuse the checked index, with ``data.empty_classes`` as given."""
        if self.emptied and empty_classes == "error":
            fact = f"{str(self.index.root)!r}: no readable training image left in {quoted(self.emptied)}"
            raise FastrexError(
                f"{fact}; restore the images, or set data.empty_classes=skip (here --empty-classes skip)"
            )

    def summary(self) -> dict[str, Any]:
        """The same as JSON."""
        return {
            "root": str(self.index.root),
            "fingerprint": self.index.fingerprint,
            "images": len(self.index),
            "good": len(self.index) - len(self.bad),
            "bad": dict(Counter(image.status.name.lower() for image in self.bad)),
            "decoded": self.decoded,
            "bytes": self.size,
            "seconds": round(self.seconds, 3),
            "images_per_s": round(self.decoded / max(self.seconds, 1e-9), 1),
            "classes_emptied": list(self.emptied),
            "classes_skipped": list(self.index.skipped),
            "files": [{"name": bad.name, "status": bad.status.name.lower(), "reason": bad.reason} for bad in self.bad],
        }


def check(index: Index, *, threads: int = 0, progress: Progress | None = None) -> Checked:
    """Decode every image that ``index`` holds for good, and compare its shape with the indexed one.

    What the index has refused, decompression bombs above all, is not touched; so give it a new index, not a stored one.
    Memory: a few batches of ``MEMORY`` bytes, or a few of the largest images.

    Args:
        threads: of reader and decoder (0 = this process's cores).
        progress: called with (images done, images to decode).

    Raises:
        FastrexError: DALI is missing.
    """
    threads = threads or own_cores()
    refused_before = ((int(row), Status(index.status[row])) for row in np.flatnonzero(index.status != Status.OK))
    found = {row: (status, REASONS[status]) for row, status in refused_before}
    rows = np.flatnonzero(index.status == Status.OK).astype(np.int64)
    decoded = size = 0
    start = time.perf_counter()
    reader = Reader(index, threads, read_bytes)
    try:
        inside: deque[tuple[Rows, int]] = deque()
        requests = _requests(index, rows, reader, found, inside)
        for refused in dali.decodable(requests, batch_size=BATCH, threads=threads):
            part, done = inside.popleft()
            for place, reason in refused.items():
                found[int(part[place])] = _verdict(index, int(part[place])), reason
            size += int(index.sizes[part].sum())
            decoded += len(part)
            if progress:
                progress(done, len(rows))
    finally:
        reader.close()
    seconds = time.perf_counter() - start
    order = sorted(found)
    bad = tuple(BadImage(index.name(row), *found[row]) for row in order)
    marked = index.with_status(order, [image.status for image in bad])
    trained = marked.labels[(marked.status == Status.OK) & (marked.split == 0)]
    emptied = np.flatnonzero(np.bincount(trained, minlength=len(index.classes)) == 0)
    return Checked(marked, bad, decoded, size, seconds, tuple(index.classes[label] for label in emptied))


def _requests(
    index: Index,
    rows: Rows,
    reader: Reader,
    found: dict[int, tuple[Status, str]],
    inside: deque[tuple[Rows, int]],
) -> Iterator[dali.Request]:
    """What the decoder takes of ``rows`` batch by batch, the rest is ``found``; ``inside`` gets the rows and the place
    in ``rows`` behind each batch."""
    pending: deque[tuple[Rows, list[Future[Bytes]]]] = deque()
    parts = _parts(index, rows)
    done = 0
    while True:
        while len(pending) < AHEAD and (part := next(parts, None)) is not None:
            pending.append((part, reader.start(part)))
        if not pending:
            return
        part, futures = pending.popleft()
        done += len(part)
        good, files = [], []
        for row, future in zip(part.tolist(), futures, strict=True):
            try:
                file = future.result()
            except BadSample as error:
                lost = isinstance(error.__cause__, OSError)
                found[row] = Status.UNREADABLE if lost else Status.CHANGED, error.reason
                continue
            if reason := codec.refusal(file, whole=True):
                found[row] = _verdict(index, row), reason
            else:
                files.append(file)
                good.append(row)
        if good:
            part = np.array(good, np.int64)
            inside.append((part, done))
            shapes = np.stack((index.heights[part], index.widths[part]), axis=1)
            yield dali.Request([index.name(row) for row in good], files, shapes)


def _parts(index: Index, rows: Rows) -> Iterator[Rows]:
    """``rows`` in turn, as many at a time as ``BATCH`` and ``MEMORY`` allow."""
    cost = 3 * index.heights[rows].astype(np.int64) * index.widths[rows] + index.sizes[rows]
    first, total = 0, 0
    for place, bytes_ in enumerate(cost.tolist()):
        if place > first and (total + bytes_ > MEMORY or place - first == BATCH):
            yield rows[first:place]
            first, total = place, 0
        total += bytes_
    if first < len(rows):
        yield rows[first:]


def _verdict(index: Index, row: int) -> Status:
    """The status of an image that the decoder refused: whether the index would still take it for what it says."""
    path, first, size = index.locate(row)
    try:
        handle = os.open(path, OPEN_FLAGS)
        try:
            seen = examine(handle, first, size)
        finally:
            os.close(handle)
    except OSError:
        return Status.CHANGED
    same = seen == (index.heights[row], index.widths[row], Status.OK)
    return Status.DECODE if same else Status.CHANGED


@contextmanager
def quiet_decoder() -> Iterator[None]:
    """Keep what the decoders' C libraries write to stderr (no file named, a line for every oddity) off the terminal;
    Python's own stderr stays."""
    sys.stderr.flush()
    shown = os.dup(2)
    with open(os.devnull, "wb") as sink, os.fdopen(shown, "w", buffering=1, errors="backslashreplace") as stream:
        os.dup2(sink.fileno(), 2)
        try:
            with redirect_stderr(stream):
                yield
        finally:
            os.dup2(shown, 2)
