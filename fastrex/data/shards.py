"""Reading tar shards in WebDataset's layout: images by their offset, labels from the ``.cls`` or ``.json`` beside them.

Members that share a name up to the last dot are one sample: ``a.jpg`` and ``a.cls``. Of ``a.jpg`` and ``a.seg.png``
only the first is an image to train on; ``a.left.jpg`` takes the label of ``a`` where it has none of its own. A shard
belongs to train or val by its folder, or by that word in its name.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import untrusted
from ..errors import FastrexError
from .scan import (
    SPLITS,
    SUFFIXES,
    Listing,
    Status,
    arrange,
    in_order,
    is_dir,
    is_number,
    label_text,
    name_splits,
    subfolders,
    visible,
)
from .tars import Member, read_members

TABLES = ("classes.json", "classes.txt")
TABLE_LIMIT = 1 << 26  # bytes of the table of classes, and values in it
TABLE_ITEMS = 1 << 21
LABEL_LIMIT = 1 << 16
LABELS = (b"cls", b"json")
JSON_LABELS = ("label", "cls", "class")
SPLIT_WORD = re.compile(r"(?<![a-z])(train|val|validation|test)(?![a-z])")
IMAGES = frozenset(os.fsencode(suffix[1:]) for suffix in SUFFIXES)
UNLABELLED = (
    "give every image a .cls or .json with its label, or unpack a tar of class folders and write shards with "
    "`fastrex data shard FOLDER OUT`"
)


@dataclass(frozen=True)
class Shards:
    """Tar files below ``root``, by path relative to it, with the split word of each ("" for none)."""

    root: Path
    names: tuple[str, ...]
    words: tuple[str, ...]

    @property
    def stamp(self) -> str:
        """sha256 over names, sizes and modification times of the shards, and the table of classes."""
        digest = hashlib.sha256(b"shards")
        for name in self.names:
            found = _stat(self.root / name)
            digest.update(os.fsencode(name) + b"\0%d %d\0" % (found.st_size, found.st_mtime_ns))
        for table in TABLES:
            if (self.root / table).is_file():
                digest.update(table.encode() + _table_bytes(self.root / table))
        return digest.hexdigest()

    def listing(self, threads: int) -> Listing:
        """Every image in the shards, whose headers are read by a pool of threads."""
        return _list(self, threads)


def find_shards(path: Path) -> Shards | None:
    """The shards at ``path``, a tar or a folder of them; None where it is another kind of folder.

    A folder of tars has no folder beside them, or is called train/, with val/ (validation/, test/) beside it.
    """
    if not path.is_dir():
        return Shards(path.parent, (path.name,), ("",))
    folders = subfolders(path)
    if "train" in folders and _tars(path / "train"):
        inside = [(word, tar) for word in sorted(SPLITS & set(folders)) for tar in _tars(path / word)]
        return Shards(path, tuple(os.path.join(*pair) for pair in inside), tuple(word for word, _ in inside))
    names = _tars(path)
    if not names:
        return None
    found = [set(SPLIT_WORD.findall(name.lower())) for name in names]
    if any(found) and not all(len(words) == 1 for words in found):
        odd = next(name for name, words in zip(names, found, strict=True) if len(words) != 1)
        fact = f"is {odd!r} for train or val? The names of the other shards say it"
        raise FastrexError(f"{str(path)!r}: {fact}; rename the shards like train-000000.tar and val-000000.tar")
    return Shards(path, tuple(names), tuple(min(words, default="") for words in found))


def _tars(folder: Path) -> list[str]:
    """Names of the tar files in ``folder``; none where they stand beside folders, which then hold the images."""
    entries = visible(str(folder))
    if any(is_dir(entry) for entry in entries):
        return []
    # A link that leads nowhere is kept, so that it is named; opening a pipe would wait for ever.
    return [e.name for e in entries if e.name.lower().endswith(".tar") and (e.is_file() or e.is_symlink())]


class _Table(dict[str, int]):
    """Number of each class, in order."""

    def __init__(self, names: list[str]) -> None:
        super().__init__((name, number) for number, name in enumerate(names))
        self.names = names

    def named(self, label: str) -> str:
        """The class that ``label``, a number or a name, means; ValueError for none."""
        if is_number(label):
            if int(label) >= len(self.names):
                raise ValueError(f"label {label} is out of range: {' or '.join(TABLES)} names {len(self)} classes")
            return self.names[int(label)]
        if label not in self:
            raise ValueError(f"class {label!r} is not in {' or '.join(TABLES)}")
        return label


class _Sample(NamedTuple):
    """An image; its label is None where the shard was cut off before it."""

    name: bytes
    label: str | None
    first: int
    length: int
    status: int


class _Content(NamedTuple):
    samples: list[_Sample]
    ignored: int
    notice: str


def _list(source: Shards, threads: int) -> Listing:
    place = repr(str(source.root))
    layout, splits = name_splits([word for word in source.words if word], place)
    table = _table(source.root)
    used = [number for number, word in enumerate(source.words) if not word or word in splits]
    contents = list(in_order(lambda number: _content(source.root, source.names[number], table), used, threads))
    paths: list[bytes] = []
    labels: list[str] = []
    codes: list[int] = []
    # A shard may have been cut off before the label of its last image. That image is never used, but it is named.
    anything = next((s.label for c in contents for s in c.samples if s.label), table.names[0] if table else "")
    for number, content in zip(used, contents, strict=True):
        prefix, word = os.fsencode(source.names[number]) + b"/", source.words[number]
        paths += [prefix + sample.name for sample in content.samples]
        labels += [anything if sample.label is None else sample.label for sample in content.samples]
        codes += [splits[word] if word else 0] * len(content.samples)
    samples = [sample for content in contents for sample in content.samples]
    return arrange(
        source.root,
        place,
        layout,
        (paths, labels, codes),
        classes=table.names if table else None,
        # Not by shard: however often they are written anew, the images have the order that they have in a folder.
        names=[sample.name for sample in samples],
        ignored=sum(content.ignored for content in contents),
        notices=tuple(content.notice for content in contents if content.notice),
        shards=source.names,
        shard=np.repeat(np.array(used, np.int32), [len(content.samples) for content in contents]),
        first=np.array([sample.first for sample in samples], np.int64),
        lengths=np.array([sample.length for sample in samples], np.int64),
        given=np.array([sample.status for sample in samples], np.uint8),
    )


def _content(root: Path, name: str, table: _Table | None) -> _Content:
    """Images and labels of one shard, in the order of its images."""
    file = os.path.join(root, name)
    place = repr(file)
    members, notice = read_members(file, place, lambda name, size: _kind(name) in LABELS and size <= LABEL_LIMIT)
    images: dict[bytes, tuple[bytes, Member]] = {}
    texts: dict[tuple[bytes, bytes], Member] = {}
    ignored = 0
    for member in members:
        path = b"/".join(part for part in member.name.split(b"/") if part not in (b"", b"."))
        if b"/." in b"/" + path:
            continue  # hidden
        kind = _kind(path)
        key = path[: len(path) - len(kind) - 1]
        if kind in IMAGES:
            if key in images:
                raise _doubled(place, key, "images")
            images[key] = path, member
        elif kind in LABELS and member.whole and not member.link:
            if (key, kind) in texts:
                raise _doubled(place, key, f".{kind.decode()} files")
            texts[key, kind] = member
        else:
            ignored += 1
    samples = []
    for key, (path, member) in images.items():
        label = None
        whose = (
            o for o in _shorter(key) if (o, b"cls") in texts or (o, b"json") in texts or (o in images and o != key)
        )
        owner = next(whose, None)
        if owner not in (None, key) and owner in images:
            ignored += 1  # a mask, or another picture that belongs to the sample
            continue
        if owner is not None:
            label = _label(place, owner, texts.get((owner, b"cls")) or texts[owner, b"json"], table)
        elif not notice:
            raise FastrexError(f"{place}: {os.fsdecode(path)!r} has no label; {UNLABELLED}")
        broken = label is None or not member.whole
        status = Status.UNREADABLE if member.link else Status.TRUNCATED if broken else Status.OK
        samples.append(_Sample(path, label, member.first, member.size, status))
    return _Content(samples, ignored, notice)


def _kind(path: bytes) -> bytes:
    """The extension, in small letters; b"" for a name without one."""
    return os.path.splitext(path)[1][1:].lower()


def _shorter(key: bytes) -> Iterator[bytes]:
    """``key``, then without its last part behind a dot, and so on."""
    folder, slash, stem = key.rpartition(b"/")
    while stem:
        yield folder + slash + stem
        stem = stem.rpartition(b".")[0]


def _doubled(place: str, key: bytes, what: str) -> FastrexError:
    return FastrexError(
        f"{place}: two {what} called {os.fsdecode(key)!r}; write this shard again with one name for each"
    )


def _label(place: str, key: bytes, member: Member, table: _Table | None) -> str:
    try:
        if len(member.content) != member.size:
            raise ValueError(f"its label takes {member.size} bytes")
        text = member.content.decode("utf-8", "surrogateescape")
        if _kind(member.name) == b"cls":
            label = label_text(text)
        else:
            record = untrusted.parse_json(text)
            given = [record[name] for name in JSON_LABELS if name in record] if isinstance(record, dict) else []
            if not given:
                raise ValueError(f"its .json has none of the keys {', '.join(JSON_LABELS)}")
            label = label_text(given[0])
        return label if table is None else table.named(label)
    except ValueError as error:
        raise FastrexError(f"{place}, sample {os.fsdecode(key)!r}: {error}; correct the label") from error


def _stat(path: Path) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise FastrexError(f"cannot read {str(path)!r} ({error.strerror}); make it readable, or remove it") from error


def _table_bytes(path: Path) -> bytes:
    try:
        return untrusted.read(path, TABLE_LIMIT)
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise FastrexError(f"cannot read {str(path)!r} ({reason}); make it readable, or remove it") from error


def _table(root: Path) -> _Table | None:
    """The names of the classes in order: classes.json (a list, or {name: number}) or classes.txt (one per line)."""
    for table in TABLES:
        path = root / table
        if path.is_file():
            try:
                text = _table_bytes(path).decode("utf-8", "surrogateescape").removeprefix("\ufeff")
                if table.endswith("json"):
                    names = untrusted.parse_json(text, items=TABLE_ITEMS)
                else:
                    names = text.rstrip("\r\n").split("\n")
                if isinstance(names, dict) and sorted(names.values()) == list(range(len(names))):
                    names = sorted(names, key=names.__getitem__)
                if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                    raise ValueError("expected a list of names, or names with their numbers from 0 on")
                names = names if table.endswith("json") else [name.rstrip("\r") for name in names]
                if len(set(names)) < len(names) or not all(name and "\0" not in name for name in names):
                    raise ValueError("a name stands in it twice, is empty or holds a NUL")
            except (ValueError, TypeError) as error:
                raise FastrexError(f"{str(path)!r}: {error}; correct the table of the classes") from error
            return _Table(names)
    return None
