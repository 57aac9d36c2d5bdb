"""Reading a list of images: ``.csv`` and ``.tsv`` with a header line, ``.jsonl`` with one object per line.

Columns (or keys) are ``path``, ``label`` and, where wanted, ``split``; others are ignored. A list may come from
somebody else, so it can name nothing but files below its own folder.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .. import untrusted
from ..errors import FastrexError
from .scan import SPLITS, Listing, arrange, label_text, name_splits

SUFFIXES = (".csv", ".tsv", ".jsonl")
LINE_LIMIT = 1 << 16
PATH_LIMIT = 4096
COLUMNS = ("path", "label", "split")


@dataclass(frozen=True)
class FileList:
    """A list of images; ``root`` is its folder, ``stamp`` a sha256 of its bytes."""

    root: Path
    path: Path
    stamp: str

    def listing(self, threads: int) -> Listing:
        """The images that the list names; FastrexError by line number for a line that is refused."""
        return _read(self)


def find_list(path: Path) -> FileList:
    """The list at ``path``, an absolute path."""
    try:
        with untrusted.opened(path) as file:
            stamp = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise FastrexError(f"cannot read {str(path)!r} ({reason}); make the list readable") from error
    return FileList(path.parent, path, stamp)


def _read(source: FileList) -> Listing:
    name, jsonl = repr(str(source.path)), source.path.suffix.lower() == ".jsonl"
    rows: dict[bytes, tuple[str, str]] = {}
    bounds = _Bounds(source.root)
    lines = 0
    try:
        # Names that are not UTF-8 survive as surrogate escapes.
        with (
            untrusted.opened(source.path) as raw,
            io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
        ):
            delimiter = "\t" if source.path.suffix.lower() == ".tsv" else ","
            for line, record in _objects(file) if jsonl else _records(file, delimiter):
                try:
                    path, row = bounds.inside(record.get("path")), (_label(record), _split(record))
                    if rows.setdefault(path, row) != row:
                        before, now = (" in ".join(filter(None, given)) for given in (rows[path], row))
                        raise ValueError(f"{os.fsdecode(path)!r} was {before!r} before and is {now!r} here")
                except ValueError as error:
                    raise _Refused(f"line {line}: {error}") from error
                lines += 1
    except _Refused as error:
        raise FastrexError(f"{name}, {error}; correct the list") from error
    if not rows:
        raise FastrexError(f"{name}: the list names no image; it must have a line for each")
    return _arranged(source, name, rows, lines - len(rows))


def _arranged(source: FileList, name: str, rows: dict[bytes, tuple[str, str]], repeated: int) -> Listing:
    words = {split for _, split in rows.values()}
    if "" in words and len(words) > 1:
        raise FastrexError(f"{name}: some lines have a split and others have none; give one to all of them")
    layout, splits = name_splits(words - {""}, name)
    splits = splits or {"": 0}
    kept = [(path, label, splits[split]) for path, (label, split) in rows.items() if split in splits]
    columns = [row[0] for row in kept], [row[1] for row in kept], [row[2] for row in kept]
    return arrange(source.root, name, layout, columns, ignored=len(rows) - len(kept) + repeated)


class _Refused(Exception):
    """A refusal that knows its line."""


def _label(record: dict[str, Any]) -> str:
    if record.get("label") is None:
        raise ValueError("no label")
    return label_text(record["label"])


def _split(record: dict[str, Any]) -> str:
    split = record.get("split", "")
    if "split" in record and not (isinstance(split, str) and split in SPLITS):
        raise ValueError(f"split {split!r:.50} is none of {', '.join(sorted(SPLITS))}")
    return str(split)


def _lines(file: IO[str]) -> Iterator[str]:
    """Lines of bounded length without NUL."""
    number = 0
    while line := file.readline(LINE_LIMIT + 1):
        number += 1
        if len(line) > LINE_LIMIT:
            raise _Refused(f"line {number}: longer than {LINE_LIMIT} characters")
        if "\0" in line:
            raise _Refused(f"line {number}: holds a NUL")
        yield line


def _records(file: IO[str], delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(_lines(file), delimiter=delimiter, strict=True)
    line = 1
    try:
        header = [column.strip() for column in next(reader, [])]
        for column in COLUMNS:
            if header.count(column) > 1 or (column != "split" and column not in header):
                fault = "no" if column not in header else "more than one"
                raise _Refused(f"line 1: {fault} column {column!r}; the header must name path, label and maybe split")
        places = {column: header.index(column) for column in COLUMNS if column in header}
        # A name may hold line breaks: a record begins behind the last line of the one before it.
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                if len(cells) != len(header):
                    raise _Refused(f"line {line}: {len(cells)} columns, the header has {len(header)}")
                yield line, {column: cells[place] for column, place in places.items()}
            line = reader.line_num + 1
    except csv.Error as error:
        raise _Refused(f"line {line}: {error}") from error


def _objects(file: IO[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            try:
                record = untrusted.parse_json(line)
            except ValueError as error:
                raise _Refused(f"line {number}: no JSON ({error})") from error
            if not isinstance(record, dict):
                raise _Refused(f'line {number}: expected {{"path": ..., "label": ...}}')
            yield number, record


class _Bounds:
    """Keeps the paths of a list inside its folder, also through symbolic links."""

    def __init__(self, root: Path) -> None:
        self._root, self._real = str(root), os.path.realpath(root)
        self._folders: dict[str, bool] = {}

    def inside(self, value: object) -> bytes:
        """``value`` as a normal relative path; ValueError says what is wrong with it."""
        if not isinstance(value, str) or not value:
            raise ValueError("no path")
        if "\0" in value:
            raise ValueError("the path holds a NUL")
        if value.startswith("/"):
            raise ValueError(f"{value[:200]!r} is absolute; paths are relative to the list's folder")
        if ".." in value.split("/"):
            raise ValueError(f"{value[:200]!r} leads out of the list's folder by '..'")
        path = os.path.normpath(value)
        try:
            encoded = os.fsencode(path)
        except UnicodeEncodeError as error:
            raise ValueError(f"{value[:200]!r} is no file name") from error
        if path == "." or len(encoded) > PATH_LIMIT:
            raise ValueError(f"{value[:200]!r} is no file name")
        folder = os.path.dirname(path)
        if folder not in self._folders:
            self._folders[folder] = self._contains(folder)
        if not self._folders[folder] or (os.path.islink(os.path.join(self._root, path)) and not self._contains(path)):
            way_out = "put the list into the folder that holds the files"
            raise ValueError(f"{value[:200]!r} leads out of the list's folder by a link; {way_out}")
        return encoded

    def _contains(self, path: str) -> bool:
        real = os.path.realpath(os.path.join(self._root, path))
        return real == self._real or real.startswith(os.path.join(self._real, ""))
