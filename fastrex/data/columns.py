"""Arrays of one dimension and a JSON object about them in one file (npz, nothing compressed, no pickle), written whole
or not at all, and read without belief in what it claims."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import files, untrusted
from ..errors import FastrexError
from ..stored import StoredZip

META_LIMIT = 1 << 26  # bytes of the object, and values in it: room for the names of a million classes
META_ITEMS = 1 << 21
HEADER_LIMIT = 1 << 10
META = "meta"
UNUSED_S = 600.0  # a file that nobody has written to for so long was left by a killed writer


def write(path: Path, meta: Mapping[str, Any], columns: Mapping[str, NDArray[Any]]) -> None:
    """Replace the file at ``path``; OSError where that fails, and then it is as it was.

    Raises:
        FastrexError: :func:`read` would refuse ``meta``.
    """
    text = json.dumps(meta)
    try:
        untrusted.check_json(text, META_LIMIT, META_ITEMS)
    except ValueError as error:
        raise FastrexError(
            f"{str(path)!r}: what it says of the data set must be readable again, {error}; use fewer or shorter names"
        ) from None
    about = np.frombuffer(text.encode(), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.sweep(path, UNUSED_S)
    with files.replacing(path, ".npz") as temporary:
        np.savez(temporary, allow_pickle=False, **columns, **{META: about})


def read(
    path: str | Path, kinds: Callable[[dict[str, Any]], Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The object, and the columns whose types ``kinds(object)`` gives; the arrays are read-only.

    Nothing is allocated for what the file does not hold. A damaged file makes zipfile raise nearly anything; what is
    whole and yet no such file is a ValueError.
    """
    with untrusted.opened(path) as file:
        stored = StoredZip(file, os.fstat(file.fileno()).st_size)
        if stored.entries[f"{META}.npy"].file_size > META_LIMIT:
            raise ValueError(f"more than {META_LIMIT} bytes of {META}")
        meta = untrusted.parse_json(_array(stored, META, np.uint8).tobytes().decode("utf-8"), items=META_ITEMS)
        if not isinstance(meta, dict):
            raise ValueError(META)
        wanted = kinds(meta)
        if stored.entries.keys() != {f"{name}.npy" for name in (*wanted, META)}:
            raise ValueError("it has other columns")
        return meta, {name: _array(stored, name, dtype) for name, dtype in wanted.items()}


def _array(stored: StoredZip, name: str, dtype: Any) -> NDArray[Any]:
    """A column as numpy.savez writes it. Its header is compared, not evaluated, and what it claims must be there: numpy
    would allocate it first."""
    content = stored.read(f"{name}.npy")
    length = 10 + int.from_bytes(content[8:10], "little")
    shape = re.search(rb"\((\d{1,12}),\)", content[10 : min(length, HEADER_LIMIT)])
    count = int(shape[1]) if shape else -1
    header = f"{{'descr': {np.dtype(dtype).str!r}, 'fortran_order': False, 'shape': ({count},), }}".encode()
    if content[:8] != b"\x93NUMPY\x01\x00" or content[10:length].strip() != header:
        raise ValueError(f"column {name} must be a row of {np.dtype(dtype)}")
    if len(content) != length + count * np.dtype(dtype).itemsize:
        raise ValueError(f"column {name} must have {count} values")
    return np.frombuffer(content, dtype, offset=length)


def refuse_outside(blob: bytes, offsets: NDArray[np.int64], shards: Sequence[str]) -> None:
    """An index may come with somebody else's data: its paths (``blob[offsets[i]:offsets[i + 1]]``) and the names of its
    shards stay below the root; ValueError where one does not."""
    suspects = [os.fsencode(name) for name in shards]
    letters = np.frombuffer(blob, np.uint8)
    if b".." in blob:
        suspects += [blob[start:end] for start, end in itertools.pairwise(offsets.tolist())]
    if (
        b"\0" in blob
        or (letters[offsets[:-1]] == ord("/")).any()
        or any(path.startswith(b"/") or b"\0" in path or b".." in path.split(b"/") for path in suspects)
    ):
        raise ValueError("index: a path leads out of the folder")
