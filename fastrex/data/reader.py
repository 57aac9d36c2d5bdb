"""Bytes of the images, checked against the index, and what happens when they are no longer what was indexed."""

from __future__ import annotations

import errno
import os
import shlex
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import FastrexError
from ..untrusted import OPEN_FLAGS
from . import codec
from .index import Index

Bytes = NDArray[np.uint8]
Rows = NDArray[np.int64]

OPEN_SHARDS = 64  # files that a reader keeps open
TRIES = 1000  # other images that may be bad too before a bad one is given up
# What says nothing about the file: the machine has run out of something.
MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class BadSample(FastrexError):
    """An image that was good when it was indexed and is not any more."""

    def __init__(self, name: str, reason: str, root: Path, way_out: str = "") -> None:
        self.name, self.reason = name, reason
        check = f"run `fastrex data check {shlex.quote(str(root))}` and start a new run with --init-from"
        way_out = way_out or "resume this run after restoring it, or with data.on_bad_sample=replace"
        super().__init__(f"{os.path.join(root, name)!r} {reason}; {way_out}; or {check}")


def read_bytes(index: Index, row: int, shards: Shards | None = None) -> Bytes:
    """The encoded image of ``row``, uint8; a shard is taken from ``shards`` where they are given.

    Read, never mapped: a file that shrinks under a mapping kills the process.

    Raises:
        BadSample: it cannot be read, or has another length than when it was indexed.
        FastrexError: this process may not open or hold any more.
    """
    path, first, length = index.locate(row)
    # A shard's first member stands behind its header: what begins at 0 is a file of its own.
    whole = not first
    try:
        file = shards.file(path) if shards is not None and not whole else _File(path)
        try:
            # Nothing is allocated for what an index only claims.
            there = file.size == length if whole else first + length <= file.size
            content = file.read(first, length) if there else np.empty(0, np.uint8)
            size = file.size if whole else max(0, min(length, file.size - first))
        finally:
            if whole:  # now, not with the traceback of an error that somebody keeps
                file.close()
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
        if error.errno in MACHINE:
            way_out = "raise the limit on open files (ulimit -n) or lower data.threads"
            raise FastrexError(f"{os.path.join(index.root, index.name(row))!r} {reason}; {way_out}") from error
        raise BadSample(index.name(row), reason, index.root) from error
    if len(content) != length:
        fact = f"has {size} bytes, but had {length} when it was indexed"
        raise BadSample(index.name(row), fact, index.root)
    return content


def read_image(index: Index, row: int, shards: Shards | None = None) -> Bytes:
    """:func:`read_bytes` of an image whose header the decoder takes: a batch with one that it does not may kill it.

    Raises:
        BadSample: as :func:`read_bytes`, or the decoder's parser refuses it.
    """
    content = read_bytes(index, row, shards)
    if reason := codec.refusal(content, whole=True):
        raise BadSample(index.name(row), reason, index.root)
    return content


class _File:
    """An open file, closed at the latest with its last reference."""

    def __init__(self, path: str) -> None:
        self.handle = -1
        self.handle = os.open(path, OPEN_FLAGS)
        self.size = os.fstat(self.handle).st_size

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1

    def read(self, first: int, length: int) -> Bytes:
        """``length`` bytes from ``first`` on, or as many as there are."""
        content = np.empty(length, np.uint8)
        view, done = content.data, 0
        while done < length and (count := os.preadv(self.handle, [view[done:]], first + done)):
            done += count
        return content[:done]


class Shards:
    """Shards that stay open, the last used ones, for all threads: opening costs a round trip on a network file system.

    They belong to one reader, so that a shard written anew is not read through the old one's handle for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _File] = OrderedDict()

    def file(self, path: str) -> _File:
        with self._lock:
            if path not in self._files:
                self._files[path] = _File(path)
                if len(self._files) > OPEN_SHARDS:
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
            return self._files[path]


class Reader:
    """Read the images of index rows with a few threads, by ``read`` (see :func:`read_image`)."""

    def __init__(self, index: Index, threads: int, read: Callable[[Index, int, Shards], Bytes] = read_image) -> None:
        self._index, self._read, self._shards = index, read, Shards()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastrex-read")

    def start(self, rows: Rows) -> list[Future[Bytes]]:
        return [self._pool.submit(self._read, self._index, int(row), self._shards) for row in rows]

    def close(self) -> None:
        """Wait for the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class BadSamples:
    """The rows that went bad during the run, by policy: the first one stops it, or up to ``budget`` are replaced.

    ``rows`` only grows. ``news`` are lines for the log, appended in the loader's thread and taken out by the consumer.
    """

    def __init__(self, index: Index, policy: str, budget: int) -> None:
        self._index, self._policy, self._budget = index, policy, budget
        self.rows: dict[int, str] = {}
        self.news: deque[str] = deque()

    def add(self, row: int, reason: str) -> None:
        """Raises:
        BadSample: by policy, or because the budget is spent.
        """
        if row in self.rows:
            return
        name = self._index.name(row)
        if self._policy == "stop":
            raise BadSample(name, reason, self._index.root)
        self.rows[row] = reason
        self.news.append(f"bad file {name!r} {reason}: not used any more ({len(self.rows)} of {self._budget} allowed)")
        if len(self.rows) > self._budget:
            more = f"{reason}, and data.max_bad_samples={self._budget} others were bad before it"
            raise BadSample(name, more, self._index.root, "resume this run with a larger data.max_bad_samples")

    def settle(self, rows: Rows, substitute: Callable[[int, int], int]) -> Rows:
        """``rows`` with ``substitute(row, attempt)`` for the bad ones; always the same for the same bad rows."""
        places = np.flatnonzero(np.isin(rows, list(self.rows)))
        if not len(places):
            return rows
        settled = rows.copy()
        for place in places:
            row = int(rows[place])
            tried = (substitute(row, attempt) for attempt in range(TRIES))
            other = next((candidate for candidate in tried if candidate not in self.rows), None)
            if other is None:
                fact = f"is bad, and so are {TRIES} images tried in its place"
                raise BadSample(self._index.name(row), fact, self._index.root, "resume this run after restoring them")
            settled[place] = other
        return settled
