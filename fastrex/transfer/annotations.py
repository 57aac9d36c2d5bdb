"""Annotation files of data sets as others made them: found, read within limits, and turned into a listing.

Such a file comes with somebody else's data: it can name nothing but files below its own folder. Links that stand in the
folder are followed, as in any image folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .. import untrusted
from ..data.scan import Listing, visible
from ..errors import FastrexError, explain

Content = TypeVar("Content")

TEXT_LIMIT = 64 * 2**20
JSON_LIMIT = 2**30  # iNat 2018: about 120 MB of JSON, 4.5 million values
JSON_ITEMS = 40_000_000
PATH_LIMIT = 4096
UNPACK = "unpack the official archives there"
SHOWN = 8  # names that an error lists
SHOWN_LAYOUTS = 3
TRAINVAL, TEST = 0, 1
MARK = "\ufeff"  # with which some editors let a text in UTF-8 begin

Row = tuple[str, int, int]  # path below the root, label, split


def unpacked(place: Path, tops: Sequence[str], *wanted: Sequence[str]) -> tuple[Path, int]:
    """The folder at ``place``, or at the first of ``tops`` (what an archive unpacks to) below it, that holds all names
    of one of the layouts ``wanted``; and the number of that layout.

    Raises:
        FastrexError: there is none; it says what was expected and what is there.
    """
    folders = [place, *(place / top for top in tops)]
    for folder in folders:
        for number, names in enumerate(wanted):
            if all((folder / name).exists() for name in names):
                return folder, number
    # The one that comes nearest is the one that was meant.
    folder = max(folders, key=lambda folder: max(sum((folder / n).exists() for n in names) for names in wanted))
    folder = folder if folder.is_dir() else place
    layouts = ", or ".join(", ".join(names) for names in wanted[:SHOWN_LAYOUTS])
    raise FastrexError(f"transfer: {str(folder)!r} must hold {layouts}, got {contents(folder)}; {UNPACK}")


def contents(folder: Path) -> str:
    """A few of the names in ``folder``, for an error."""
    found = [entry.name + "/" * entry.is_dir() for entry in visible(str(folder))]
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return (", ".join(map(repr, found[:SHOWN])) + more) or "nothing"


def guarded(path: Path, read: Callable[[], Content]) -> Content:
    """What ``read`` finds in the file ``path``; all that can be wrong with it is one FastrexError."""
    try:
        return read()
    except OSError as error:
        raise FastrexError(f"transfer: {explain(error)}") from error
    except FastrexError:
        raise
    except MemoryError as error:
        raise FastrexError(
            f"transfer: {str(path)!r} must fit the memory, its content does not; get it again, or free some memory"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)[:200]
        raise FastrexError(
            f"transfer: {str(path)!r} must be the official file, got another ({reason}); get it again"
        ) from error


def lines(path: Path) -> list[str]:
    """The lines of a text file, without those that are empty or begin with "#"."""
    text = guarded(path, lambda: untrusted.read_text(path, TEXT_LIMIT)).removeprefix(MARK)
    return [line for raw in text.splitlines() if (line := raw.strip()) and not line.startswith("#")]


def words(path: Path, count: int) -> list[list[str]]:
    """Each line of a text file as ``count`` words; what follows is one with the last."""
    found = [line.split(maxsplit=count - 1) for line in lines(path)]
    for number, row in enumerate(found, 1):
        if len(row) < count:
            raise FastrexError(
                f"transfer: {str(path)!r} must have {count} words in each line, got {len(row)} in line {number}; "
                "get it again"
            )
    return found


def json_mapping(path: Path) -> dict[str, Any]:
    """The object in a large JSON file."""
    content = guarded(path, lambda: untrusted.read_json(path, JSON_LIMIT, items=JSON_ITEMS))
    if not isinstance(content, dict):
        raise FastrexError(f"transfer: {str(path)!r} must hold an object, got a {type(content).__name__}; get it again")
    return content


def position(path: Path, names: Sequence[str]) -> dict[str, int]:
    """The label of each class in ``names``, which ``path`` lists; each once."""
    found = {name: label for label, name in enumerate(names)}
    if len(found) < len(names):
        raise FastrexError(f"transfer: {str(path)!r} must name each class once, got one twice; get it again")
    return found


def label_of(path: Path, labels: dict[str, int], name: str) -> int:
    """The label of a class that the file ``path`` names."""
    if name not in labels:
        raise FastrexError(f"transfer: {str(path)!r} must name known classes, got {name[:80]!r}; get it again")
    return labels[name]


def listing(root: Path, place: Path, classes: Sequence[str], rows: Iterable[Row]) -> Listing:
    """The images in ``rows``, whose paths are relative to ``root``; ``place``: the annotation that named them.

    Every file must be there; a path may not lead out of ``root`` nor stand in two splits or classes.
    """
    known: dict[str, tuple[int, int]] = {}
    named = 0
    for path, label, split in rows:
        named += 1
        clean = inside(path, place)
        if not 0 <= label < len(classes):
            fact = f"label {label} of {len(classes)} classes for {path!r:.200}"
            raise FastrexError(f"transfer: {str(place)!r} must give each image a class that is named, got {fact}")
        if known.setdefault(clean, (label, split)) != (label, split):
            raise FastrexError(
                f"transfer: {str(place)!r} must give each image one class and split, got two for {path!r:.200}; "
                "get it again"
            )
    _refuse_missing(root, place, known)
    refuse_none(place, [split for _, split in known.values()])
    found = sorted((split, label, os.fsencode(path)) for path, (label, split) in known.items())
    labels, splits = np.array([row[1] for row in found], np.int32), np.array([row[0] for row in found], np.uint8)
    paths = [row[2] for row in found]
    notices = (f"{place.name} names {named - len(known)} images twice",) if named > len(known) else ()
    return Listing(root, "train+test", tuple(classes), paths, labels, splits, named - len(known), notices)


def refuse_none(place: Path, splits: Sequence[int]) -> None:
    """FastrexError where one of the two splits has no image."""
    for split, name in ((TRAINVAL, "training"), (TEST, "test")):
        if split not in splits:
            raise FastrexError(f"transfer: {str(place)!r} must have {name} images, got none; {UNPACK}")


def inside(path: str, place: Path) -> str:
    """``path`` in its normal form; FastrexError where it leads out of the folder, or is no file name."""
    parts = path.split("/")
    if "" in parts or ".." in parts:  # the first: a second "/", behind which a path begins at the root
        raise FastrexError(
            f"transfer: {str(place)!r} must name images below its folder, got {path!r:.200}; do not use this copy"
        )
    clean = "/".join(part for part in parts if part != ".")
    try:
        good = 0 < len(os.fsencode(clean)) <= PATH_LIMIT and "\0" not in clean
    except UnicodeEncodeError:
        good = False
    if not good:
        raise FastrexError(f"transfer: {str(place)!r} must name image files, got {path!r:.200}; get it again")
    return clean


def _refuse_missing(root: Path, place: Path, paths: Iterable[str]) -> None:
    """One look at each folder instead of one at each of a million files."""
    there: dict[str, set[str]] = {}
    missing: list[str] = []
    for path in paths:
        folder, _, name = path.rpartition("/")
        if folder not in there:
            try:
                there[folder] = set(os.listdir(root / folder))
            except (FileNotFoundError, NotADirectoryError):
                there[folder] = set()
            except OSError as error:
                raise FastrexError(f"transfer: {explain(error)}") from error
        if name not in there[folder]:
            missing.append(path)
    if missing:
        raise FastrexError(
            f"transfer: {str(root)!r} must hold every image that {place.name} names, got {len(missing)} missing, "
            f"the first {missing[0]!r}; {UNPACK}"
        )
