"""Files that somebody else may have put there: regular ones of bounded size, JSON and TOML without surprises.

Standard library only. What is refused is a ``ValueError`` (the caller knows what the file is for and what the way out
is), what the system refuses an ``OSError``; nothing else is raised.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

MAX_DEPTH = 64
MAX_ITEMS = 1_000_000
MAX_DOTS = 256
DEEP = f"its values are nested more than {MAX_DEPTH} deep"
# Opening a pipe to read would wait for a writer.
OPEN_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


def to_append(path: Path, mode: Literal["a", "a+"] = "a") -> IO[str]:
    """A text file (UTF-8), made if need be, to write at its end; never through a link, which could lead to any file of
    this user, and never a pipe or device.

    Raises:
        OSError: also where a link or something else than a file stands there; its words name the file.
    """
    try:
        return open(path, mode, encoding="utf-8", opener=_owned)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EINVAL):
            raise
        raise OSError(errno.EINVAL, f"its {path.name} is a link or no regular file", str(path)) from None


def _owned(path: str, flags: int) -> int:
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return handle


@contextlib.contextmanager
def opened(path: str | Path, *, follow: bool = True) -> Iterator[io.BufferedReader]:
    """A regular file, to read; never a pipe or a device, which could keep its reader waiting for ever.

    follow: also through a link in the last part of the path.
    """
    handle = os.open(path, OPEN_FLAGS | (0 if follow else os.O_NOFOLLOW))
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise (
            IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if stat.S_ISDIR(mode)
            else ValueError("it is no regular file")
        )
    with open(handle, "rb") as file:
        yield file


def read(path: str | Path, limit: int, *, follow: bool = True) -> bytes:
    """All of a regular file of at most ``limit`` bytes."""
    with opened(path, follow=follow) as file:
        if os.fstat(file.fileno()).st_size <= limit:
            content = file.read(limit + 1)
            if len(content) <= limit:
                return content
    raise ValueError(f"it has more than {limit} bytes")


def read_text(path: str | Path, limit: int, *, follow: bool = True) -> str:
    """A text file in UTF-8 of at most ``limit`` bytes."""
    return read(path, limit, follow=follow).decode("utf-8")


def read_json(path: str | Path, limit: int, *, items: int = MAX_ITEMS, follow: bool = True) -> Any:
    """The JSON in a file of at most ``limit`` bytes; see :func:`parse_json`."""
    return parse_json(read_text(path, limit, follow=follow), items=items)


def parse_json(text: str, *, items: int = MAX_ITEMS) -> Any:
    """JSON as the standard has it: no NaN, no infinity, no name twice in an object; whole numbers of 64 bits, at most
    ``MAX_DEPTH`` containers inside one another and ``items`` values in all.

    What passes can be compared, printed and converted without further care. Names may hold any character.
    """
    _check_items(text, items)
    try:
        content = _DECODER.decode(text)
    except RecursionError:
        raise ValueError(DEEP) from None
    _check(content)
    return content


def check_json(text: str, limit: int, items: int) -> None:
    """For whoever writes JSON: ValueError where :func:`read_json` with the same limits would find it too large."""
    if (size := len(text.encode("utf-8"))) > limit:
        raise ValueError(f"it has {size} bytes, more than {limit}")
    _check_items(text, items)


def _check_items(text: str, items: int) -> None:
    """Before the parser takes memory for the values."""
    # Every value but the first stands behind one of these. Names full of commas are rare: count them all first.
    if sum(map(text.count, _SIGNS)) <= items:
        return
    count = end = 0
    for number, string in enumerate(_STRING.finditer(text)):
        count += sum(text.count(sign, end, string.start()) for sign in _SIGNS)
        end = string.end()
        # Of an object's value and name each is a string.
        if count > items or number > 2 * items:
            raise ValueError(f"it holds more than {items} values")
    if count + sum(text.count(sign, end) for sign in _SIGNS) > items:
        raise ValueError(f"it holds more than {items} values")


def parse_toml(text: str) -> dict[str, Any]:
    """TOML with the same limits on depth and whole numbers. The caller limits the size: the parser is slow."""
    # The time for a key is the square of its parts.
    if any(line.count(".") > MAX_DOTS for line in text.split("\n")):
        raise ValueError(f"a line has more than {MAX_DOTS} dots")
    try:
        content = tomllib.loads(text)
    except RecursionError:
        raise ValueError(DEEP) from None
    _check(content)
    return content


def _check(content: Any) -> None:
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        if any(isinstance(value, int) and not -(2**63) <= value < 2**63 for value in level):
            raise ValueError("a number has more than 64 bits")
        containers = [value for value in level if isinstance(value, dict | list)]
        if not containers:
            return
        level = [inner for value in containers for inner in (value.values() if isinstance(value, dict) else value)]
    raise ValueError(DEEP)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("an object has the same name twice")
    return content


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:24]} is out of range")
    return number


def _constant(word: str) -> float:
    raise ValueError(f"{word} is no number in JSON")


_SIGNS = ",[{"
# To the end of the text where a string is not closed, so that no quote is looked at twice.
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)
