"""Bytes of the images, checked against the index, and what happens when they are no longer what was indexed."""

from __future__ import annotations

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
from . import codec
from .index import Index

Bytes = NDArray[np.uint8]
Rows = NDArray[np.int64]

OPEN_SHARDS = 16  # files that each reading thread keeps open
TRIES = 1000  # other images that may be bad too before a bad one is given up


class BadSample(FastrexError):
    """An image that was good when it was indexed and is not any more."""

    def __init__(self, name: str, reason: str, root: Path) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"{os.path.join(root, name)!r} {reason}; {way_out(root)}")


def way_out(root: Path) -> str:
    """What a user can do about a file that went bad after it was indexed."""
    return (
        "resume this run after restoring it, or with data.on_bad_sample=replace; or run `fastrex data check "
        f"{shlex.quote(str(root))}` and start a new run with --init-from"
    )


def read_bytes(index: Index, row: int) -> Bytes:
    """The encoded image of ``row``, uint8.

    Read, never mapped: a file that shrinks under a mapping kills the process.

    Raises:
        BadSample: it cannot be read, or has another length than when it was indexed.
    """
    path, start, length = index.locate(row)
    try:
        if start:
            content = _read_part(path, start, length)
            size = len(content)
        else:
            # Not blocking: where a pipe has taken the file's place, opening it would wait for ever.
            with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                # A shard's first member starts behind its header, so a start of 0 is a file of its own.
                content = np.fromfile(file, np.uint8, length) if size == length else np.empty(0, np.uint8)
    except OSError as error:
        raise BadSample(index.name(row), f"cannot be read ({error.strerror or error})", index.root) from error
    if size != length or len(content) != length:
        fact = f"has {size} bytes, but had {length} when it was indexed"
        raise BadSample(index.name(row), fact, index.root)
    return content


def read_image(index: Index, row: int) -> Bytes:
    """:func:`read_bytes` of an image whose header the decoder takes: a batch with one that it does not may kill it.

    Raises:
        BadSample: as :func:`read_bytes`, or the decoder's parser refuses it.
    """
    content = read_bytes(index, row)
    if reason := codec.refusal(content, whole=True):
        raise BadSample(index.name(row), reason, index.root)
    return content


class _Shard:
    """An open file that is closed with its last reference: when it is crowded out, or its thread ends."""

    def __init__(self, path: str) -> None:
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)


class _Open(threading.local):
    def __init__(self) -> None:
        self.shards: OrderedDict[str, _Shard] = OrderedDict()


_open = _Open()


def _read_part(path: str, start: int, length: int) -> Bytes:
    """Part of a large file that is kept open: opening costs a round trip on a network file system."""
    shards = _open.shards
    if path not in shards:
        shards[path] = _Shard(path)
        if len(shards) > OPEN_SHARDS:
            shards.popitem(last=False)
    shards.move_to_end(path)
    content = np.empty(length, np.uint8)
    view, done = content.data, 0
    while done < length and (count := os.preadv(shards[path].handle, [view[done:]], start + done)):
        done += count
    return content[:done]


class Reader:
    """Read the images of index rows with a few threads, by ``read`` (see :func:`read_image`)."""

    def __init__(self, index: Index, threads: int, read: Callable[[Index, int], Bytes] = read_image) -> None:
        self._index, self._read = index, read
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastrex-read")

    def start(self, rows: Rows) -> list[Future[Bytes]]:
        return [self._pool.submit(self._read, self._index, int(row)) for row in rows]

    def close(self) -> None:
        """Wait for the threads; with them go the files that they kept open."""
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
            raise BadSample(name, more, self._index.root)

    def settle(self, rows: Rows, substitute: Callable[[int, int], int]) -> Rows:
        """``rows`` with ``substitute(row, attempt)`` for the bad ones; always the same for the same bad rows."""
        if not self.rows:
            return rows
        settled = rows.copy()
        for place in np.flatnonzero(np.isin(rows, list(self.rows))):
            row = int(rows[place])
            tried = (substitute(row, attempt) for attempt in range(TRIES))
            other = next((candidate for candidate in tried if candidate not in self.rows), None)
            if other is None:
                raise BadSample(
                    self._index.name(row), "is bad, and so is every image tried in its place", self._index.root
                )
            settled[place] = other
        return settled
