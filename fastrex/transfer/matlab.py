"""Variables of MATLAB files (version 5), which some data sets are annotated with: numbers, words, cells and structures.

A reader of its own, since a damaged file makes scipy's end the process (a segmentation fault, within seconds of random
changes). The format is that of MathWorks' "MAT-File Format": elements of a type, a length and so many bytes, one inside
another.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import untrusted
from ..errors import FastrexError

FILE_LIMIT = 32 * 2**20
UNFOLDED_LIMIT = 64 * 2**20  # the largest official file has about 10 MB
MAX_DEPTH = 16
MAX_DIMENSIONS = 32
MAX_VALUES = 1_000_000  # cells and fields; the largest official file has about 130,000
MAX_FIELDS = 256
HEADER = 128
# Types of an element.
NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
WORDS = {1: "ascii", 2: "latin1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le", 18: "utf-32-le"}
MATRIX, PACKED = 14, 15
DIMENSIONS = 5
# Classes of an array; from the sixth to the fifteenth they are numbers.
CELL, STRUCTURE, WORD, FIRST_NUMBER, LAST_NUMBER = 1, 2, 4, 6, 15
CUT_OFF = "it is cut off"


def variables(path: Path, *names: str) -> dict[str, Any]:
    """The variables ``names``: numbers as an array with one dimension, words as str, a cell array as the list of what
    it holds, a structure array as a list of dictionaries; all by columns first.

    Raises:
        FastrexError: the file is missing, damaged, of another format or without one of them.
    """
    try:
        content = untrusted.read(path, FILE_LIMIT)
        room = _Room(MAX_VALUES)
        found = {
            name: _value(kind, shape, rest, room, 0) for name, kind, shape, rest in _arrays(content) if name in names
        }
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"it has no variable {missing[0]}")
    except OSError as error:
        raise FastrexError(
            f"transfer: {str(path)!r} cannot be read ({error.strerror or error}); get it again"
        ) from None
    except MemoryError:
        raise FastrexError(
            f"transfer: {str(path)!r} must fit the memory, its content does not; get it again, or free some memory"
        ) from None
    except (ValueError, zlib.error) as error:
        raise FastrexError(
            f"transfer: {str(path)!r} must be the official MATLAB file, got another ({str(error)[:120]}); get it again"
        ) from None
    return found


class _Room:
    """How many cells and fields a file may still have: each becomes an object a dozen times as large as its bytes."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise ValueError(f"it has more than {MAX_VALUES} cells and fields")


class _Elements:
    """The elements in some bytes, one after another."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.place = data, 0

    def left(self) -> int:
        return len(self.data) - self.place

    def next(self) -> tuple[int, memoryview]:
        """Type and content of the next one."""
        if self.left() < 8:
            raise ValueError(CUT_OFF)
        kind, length = (int.from_bytes(self.data[self.place + at : self.place + at + 4], "little") for at in (0, 4))
        start = self.place + 8
        if kind >> 16:  # a small one: its length beside its type, and its content behind both
            kind, length, start = kind & 0xFFFF, min(kind >> 16, 4), self.place + 4
            self.place += 8
        else:
            self.place = start + length + (0 if kind == PACKED else -length % 8)
        if start + length > len(self.data):
            raise ValueError(CUT_OFF)
        return kind, self.data[start : start + length]


def _arrays(content: bytes) -> Iterator[tuple[str, int, tuple[int, ...], _Elements]]:
    """The arrays of a file, unpacked within the limit."""
    if content[124:128] != b"\0\1IM":
        raise ValueError("it is no MATLAB 5 file")
    elements, room = _Elements(memoryview(content)[HEADER:]), UNFOLDED_LIMIT
    while elements.left() > 0:
        kind, body = elements.next()
        if kind == PACKED:
            stream = zlib.decompressobj()
            data = stream.decompress(body, room + 1)
            room -= len(data)
            if room < 0:
                raise ValueError(f"it unfolds to more than {UNFOLDED_LIMIT} bytes")
            if not stream.eof:
                raise ValueError(CUT_OFF)
            kind, body = _Elements(memoryview(data)).next()
        if kind == MATRIX:
            yield _opened(body)


def _opened(body: memoryview) -> tuple[str, int, tuple[int, ...], _Elements]:
    """Name, class, shape and the elements that hold the values of an array."""
    elements = _Elements(body)
    _, flags = elements.next()
    of_shape, numbers = elements.next()
    if of_shape != DIMENSIONS:
        raise ValueError("an array has an impossible shape")
    shape = tuple(_numbers(of_shape, numbers).tolist())
    if len(flags) != 8 or not 2 <= len(shape) <= MAX_DIMENSIONS or min(shape) < 0:
        raise ValueError("an array has an impossible shape")
    _, name = elements.next()
    return bytes(name).decode("latin1"), flags[0], shape, elements


def _value(kind: int, shape: tuple[int, ...], elements: _Elements, room: _Room, depth: int) -> Any:
    count = math.prod(shape)
    if kind == WORD:
        if shape[0] > 1:
            raise ValueError("it has words in several rows")
        letters, body = elements.next() if count else (1, memoryview(b""))
        if letters not in WORDS:
            raise ValueError(f"it has words of type {letters}")
        return bytes(body).decode(WORDS[letters])
    if FIRST_NUMBER <= kind <= LAST_NUMBER:
        values = _numbers(*elements.next()) if count else np.empty(0)
        if len(values) != count:
            raise ValueError(f"it has an array of {len(values)} numbers where {count} must be")
        return values
    if kind not in (CELL, STRUCTURE):
        raise ValueError(f"it has an array of class {kind}")
    if depth == MAX_DEPTH:
        raise ValueError(f"its arrays are nested more than {MAX_DEPTH} deep")
    fields = _fields(elements) if kind == STRUCTURE else ("",)
    # Each has eight bytes at least: nothing is made for what the file does not hold.
    if not fields or count * len(fields) > elements.left() // 8:
        raise ValueError(CUT_OFF)
    room.take(count * len(fields))
    rows = [{field: _inner(elements, room, depth + 1) for field in fields} for _ in range(count)]
    return rows if kind == STRUCTURE else [row[""] for row in rows]


def _fields(elements: _Elements) -> tuple[str, ...]:
    """The names of a structure's fields: words of one length, filled up with zeros."""
    length = _numbers(*elements.next())
    _, body = elements.next()
    if len(length) != 1 or not 1 <= length[0] <= 256:
        raise ValueError("a structure has fields without names")
    step = int(length[0])
    if len(body) > MAX_FIELDS * step:
        raise ValueError(f"a structure has more than {MAX_FIELDS} fields")
    names = [bytes(body[start : start + step]).rstrip(b"\0").decode("latin1") for start in range(0, len(body), step)]
    return tuple(names)


def _inner(elements: _Elements, room: _Room, depth: int) -> Any:
    kind, body = elements.next()
    if kind != MATRIX:
        raise ValueError(f"it has an element of type {kind} where an array must be")
    if not len(body):  # how an empty one may be written
        return np.empty(0)
    _, kind, shape, rest = _opened(body)
    return _value(kind, shape, rest, room, depth)


def _numbers(kind: int, body: memoryview) -> np.ndarray[Any, Any]:
    if kind not in NUMBERS:
        raise ValueError(f"it has numbers of type {kind}")
    return np.frombuffer(body, NUMBERS[kind])
