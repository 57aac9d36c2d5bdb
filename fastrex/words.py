"""numpy's arrays of words as pickles hold them, rebuilt without numpy's own loader, which would call what it is told.

What a file says of an array (shape, type, values) is only kept while its pickle runs, and looked at afterwards, when
nothing can change it any more. Refusals are ``FastrexError``; what makes no sense raises nearly anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import FastrexError

MAX_DIMENSIONS = 32
NDARRAY = "numpy.ndarray"  # the class, which a pickle names and hands on, but cannot call
LAST_CHARACTER = 0x10FFFF


class Kind:
    """A dtype: words of ``length`` characters ("U") or bytes ("S"), or objects ("O")."""

    __slots__ = ("length", "letter", "order")

    def __init__(self, text: str) -> None:
        match = re.fullmatch(r"[<>|=]?(?:([US])([0-9]{1,9})|(O)[48]?)", text)
        if not match:
            raise FastrexError(f"it has an array of type {text[:20]!r}; only words can be read")
        self.letter, self.length, self.order = match[1] or match[3], int(match[2] or 0), "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        # Version, byte order, subarray, names and fields; the sizes behind them follow from the type.
        _, order, *structure = state[:5]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in structure):
            raise FastrexError("it has an array of records; only words can be read")
        self.order = order

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(f"{self.order}{self.letter}{self.length}")


class Array:
    """An array while the pickle runs."""

    __slots__ = ("budget", "found", "state")

    def __init__(self, budget: Functions) -> None:
        self.budget = budget
        self.state: tuple[Any, ...] | None = None
        self.found: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, column_first, data = state
        self.state = shape, kind, bool(column_first), data

    def opened(self) -> Any:
        """The array (dtype U or S), or the list of words that an array of objects holds; the same for every call."""
        if self.found is None:
            if self.state is None:
                raise FastrexError("it has an array without values")
            self.found = self._opened(*self.state)
        return self.found

    def _opened(self, shape: Any, kind: Any, column_first: bool, data: Any) -> Any:
        if not isinstance(kind, Kind) or not isinstance(shape, tuple) or len(shape) > MAX_DIMENSIONS:
            raise FastrexError("it has an array of an impossible shape or type")
        if any(type(length) is not int or not 0 <= length < 2**40 for length in shape):
            raise FastrexError("it has an array of an impossible shape or type")
        count = math.prod(shape)
        objects = kind.letter == "O"
        if not isinstance(data, list | bytes | bytearray) or isinstance(data, list) != objects:
            raise FastrexError(f"it has an array of words with a {type(data).__name__} as values")
        need = count * (1 if objects else kind.dtype.itemsize)
        if len(data) != need or (count and not need):
            raise FastrexError(
                f"it has an array of {count} words whose values must take {need} places, got {len(data)}"
            )
        # Looked at value by value below: a short pickle could name the same long values many times.
        self.budget.take(len(data))
        if isinstance(data, list):
            if len(shape) != 1 or not all(isinstance(word, str | bytes) for word in data):
                raise FastrexError("it has an array of objects that are no row of words")
            return data
        if not count:
            # Of rows without words a few bytes would name more than any memory holds as lists.
            if shape != (0,):
                raise FastrexError("it has an array without words that is no empty row")
            return np.empty(0, f"{kind.letter}1")
        codes = f"{'<' if kind.order in '|=' else kind.order}u4"
        if kind.letter == "U" and int(np.frombuffer(data, codes).max()) > LAST_CHARACTER:
            raise FastrexError("it has a word with a character that does not exist")
        return np.frombuffer(data, kind.dtype).reshape(shape, order="F" if column_first else "C")


class Functions:
    """What pickles of such arrays call; ``left``: the bytes (or items) that all of them may look at together."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, amount: int) -> None:
        """Count ``amount`` against the budget."""
        self.left -= amount
        if self.left < 0:
            raise FastrexError("its arrays name the same values so often that they have more than its size")

    def known(self) -> dict[tuple[str, str], Callable[..., Any] | str]:
        """By module and name."""
        found: dict[tuple[str, str], Callable[..., Any] | str] = {
            ("numpy", "ndarray"): NDARRAY,
            ("numpy", "dtype"): lambda text, *_: Kind(text),
            ("_codecs", "encode"): self._encoded,
            ("builtins", "bytes"): lambda: b"",  # how protocol 2 writes them where there are none
            ("__builtin__", "bytes"): lambda: b"",
        }
        for core in ("numpy.core", "numpy._core"):
            found[f"{core}.multiarray", "_reconstruct"] = self._empty
            found[f"{core}.multiarray", "scalar"] = self._scalar
            found[f"{core}.numeric", "_frombuffer"] = self._filled
        return found

    def _empty(self, kind: object, *_: object) -> Array:
        if kind != NDARRAY:
            raise FastrexError("it has an array of a class of its own")
        return Array(self)

    def _filled(self, data: object, kind: object, shape: object, order: object) -> Array:
        array = Array(self)
        array.state = shape, kind, order == "F", data
        return array

    def _scalar(self, kind: object, data: object) -> str | bytes:
        array = self._filled(data, kind, (1,), "C").opened()
        word = array[0]
        return bytes(word) if isinstance(word, bytes) else str(word)

    def _encoded(self, text: str, encoding: str) -> bytes:
        """How protocol 2 writes bytes."""
        if encoding != "latin1":
            raise FastrexError(f"it has bytes in the encoding {encoding[:20]!r}")
        self.take(len(text))
        return text.encode("latin1")
