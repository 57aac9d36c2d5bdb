"""Images known by their bytes: digests that tell whether features and results are still of the images that are there,
whatever their folder is called now."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from .. import untrusted
from ..data.index import Index

Rows = NDArray[np.int64]

SIZE = 32  # bytes of a digest
PIECE = 1 << 20  # bytes that are read at a time
ABSENT = bytes(SIZE)


def content(index: Index, rows: Rows) -> tuple[bytes, bool]:
    """blake2b over the bytes of the images ``rows``, in their order, and whether all of them could be read; one that
    could not counts as :data:`ABSENT`."""
    whole, digest = True, hashlib.blake2b(digest_size=SIZE)
    for row in rows.tolist():
        path, first, size = index.locate(row)
        try:
            digest.update(_image(path, first, size if index.shards else None))
        except OSError:
            whole = False
            digest.update(ABSENT)
    return digest.digest(), whole


def stat(index: Index, rows: Rows) -> bytes:
    """blake2b over what the file system says of the files that hold the images ``rows``: size, times and inode, for a
    member of a shard its place as well. As long as it is the same, so are the bytes; the reverse does not hold."""
    digest, known = hashlib.blake2b(digest_size=SIZE), dict[str, bytes]()
    for row in rows.tolist():
        path, first, size = index.locate(row)
        if path not in known:
            known = known if index.shards else {}
            known[path] = _facts(path)
        digest.update(known[path])
        if index.shards:
            digest.update(b"%d %d\n" % (first, size))
    return digest.digest()


def contents(index: Index, parts: Sequence[Rows], threads: int) -> list[tuple[bytes, bool]]:
    """:func:`content` of each of ``parts``, so many at a time."""
    with ThreadPoolExecutor(max(1, threads), "fastrex-digest") as pool:
        return list(pool.map(lambda rows: content(index, rows), parts))


def together(digests: Sequence[bytes]) -> str:
    """One digest, hex, over those of parts."""
    return hashlib.blake2b(b"".join(digests), digest_size=SIZE).hexdigest()


def _image(path: str, first: int, size: int | None) -> bytes:
    """Of the ``size`` bytes from ``first`` on, None: of all."""
    digest = hashlib.blake2b(digest_size=SIZE)
    with untrusted.opened(path) as file:
        file.seek(first)
        while piece := file.read(PIECE if size is None else min(PIECE, size)):
            digest.update(piece)
            size = None if size is None else size - len(piece)
    return digest.digest()


def _facts(path: str) -> bytes:
    # Also the time that the kernel keeps: a copy that preserves modification times is noticed by it.
    try:
        found = os.stat(path)
    except OSError:
        return b"absent\n"
    return b"%d %d %d %d\n" % (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
