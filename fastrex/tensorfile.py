"""Reading safetensors files that somebody else may have written: the header is checked before anything is allocated.

The tensors are read, never mapped: a file that shrinks under a mapping kills the process, and one that is overwritten
changes the tensors. The format's own library maps them, allows a name twice, and has no bound on their number.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from . import untrusted
from .errors import FastrexError

MAX_HEADER = 16 * 2**20
MAX_TENSORS = 100_000
MAX_NAME = 1024
MAX_DIMENSIONS = 16
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
METADATA = "__metadata__"
# How other files begin that are often given in the place of these.
OTHERS = {
    b"PK\x03\x04": "it is a zip file, as torch.save writes it; give it the ending .pth",
    b"\x80\x02": "it is a pickle; save its tensors with safetensors where you trust it",
    b"version ": "it is a git-lfs pointer, not the file itself; run git lfs pull",
}


class BadTensors(FastrexError):
    """A file that is no sound safetensors file; the message says why."""


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: bytes ``start`` to ``end`` behind the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def load(path: str | Path, *, follow: bool = True) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name, on the CPU; they share no memory with the file.

    Nothing is allocated for what the file does not hold.

    Args:
        path: a regular file. follow: also through a link in the last part of the path.

    Raises:
        BadTensors: it is missing or unreadable, its header is not sound (sizes, names, types, shapes, places without
            hole, overlap or rest), or it changes while it is read.
    """
    try:
        with untrusted.opened(path, follow=follow) as file:
            size = os.fstat(file.fileno()).st_size
            header = _header(file, size)
            entries = _entries(untrusted.parse_json(header.decode("utf-8")), size - 8 - len(header))
            return {entry.name: _tensor(file, entry, 8 + len(header)) for entry in entries}
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise BadTensors(f"safetensors: {path} must be a safetensors file, it cannot be read ({reason})") from None
    except MemoryError:
        raise BadTensors(f"safetensors: {path} has {size} bytes, more than this machine can hold") from None


def _header(file: IO[bytes], size: int) -> bytes:
    start = file.read(8)
    for first, words in OTHERS.items():
        if start.startswith(first):
            raise ValueError(words)
    length = int.from_bytes(start, "little")
    if size < 10 or not 2 <= length <= min(size - 8, MAX_HEADER):
        raise ValueError(f"it has {size} bytes, its header claims {length}; at most {MAX_HEADER} are read")
    header = file.read(length)
    if len(header) != length or not header.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    return header


def _entries(header: Any, held: int) -> list[Entry]:
    """What ``header`` describes, in the order of the file, which holds ``held`` bytes behind it."""
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"its {METADATA} must be words by name")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"it has {len(header)} tensors, more than {MAX_TENSORS}")
    entries = sorted((_entry(name, facts) for name, facts in header.items()), key=lambda e: (e.start, e.end))
    ends = [0, *(entry.end for entry in entries)]
    for entry, (before, _) in zip(entries, itertools.pairwise(ends), strict=True):
        if entry.start != before:
            raise ValueError(f"the bytes of {entry.name!r} begin at {entry.start}, not where others end ({before})")
    if ends[-1] != held:
        raise ValueError(f"its tensors take {ends[-1]} bytes, it holds {held}")
    return entries


def _entry(name: str, facts: Any) -> Entry:
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise ValueError(f"{name[:80]!r} is no name of a tensor")
    if not isinstance(facts, dict) or facts.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name!r} has the type {str(dtype)[:40]!r}, known are {', '.join(DTYPES)}")
    if not _numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name!r} has an impossible shape")
    if not _numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r} has impossible data_offsets")
    size = room = DTYPES[dtype].itemsize
    for length in shape:
        size *= length
        room *= max(length, 1)  # a tensor without elements has strides too
        if room >= 2**63:
            raise ValueError(f"{name!r} has an impossible shape")
    if offsets[1] - offsets[0] != size:
        raise ValueError(f"{name!r} must take {size} bytes, its data_offsets span {offsets[1] - offsets[0]}")
    return Entry(name, DTYPES[dtype], tuple(shape), *offsets)


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _tensor(file: IO[bytes], entry: Entry, start: int) -> Tensor:
    try:
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
    except RuntimeError as error:
        # The allocator's, whose own words fill a screen: the shape has been checked.
        raise MemoryError from error
    if entry.end == entry.start:
        return tensor
    raw = tensor.reshape(-1).view(torch.uint8)
    view, place = raw.numpy().data, start + entry.start
    while len(view):
        count = os.preadv(file.fileno(), [view], place)
        if not count:
            raise ValueError(f"it ends within {entry.name!r}")
        view, place = view[count:], place + count
    if entry.dtype == torch.bool and bool((raw > 1).any()):
        raise ValueError(f"{entry.name!r} has truth values that are neither 0 nor 1")
    return tensor
