"""ImageNet-CoG: five levels of 1000 classes of ImageNet-21K each, as the two files of its authors name them.

cog_levels_mapping_file.pkl is a list of five lists of WordNet ids; cog_concepts_split_file.pkl (678 MB) gives the paths
of the training and test images of each id. Both are pickles, read without executing anything (:mod:`fastrex.foreign`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import foreign
from ..data.scan import Listing, subfolders
from ..errors import FastrexError
from .annotations import TEST, TRAINVAL, UNPACK, Row, contents, guarded, inside, listing, unpacked

LEVELS = 5
MAX_IMAGES = 4_000_000  # of a level; the largest has 1.2 million
MAPPING, SPLITS = "cog_levels_mapping_file.pkl", "cog_concepts_split_file.pkl"


def level(number: int) -> Callable[[Path], Listing]:
    """The reader of level ``number``, 1 to 5: labels by sorted WordNet id."""

    def read(place: Path) -> Listing:
        unpacked(place, (), (MAPPING, SPLITS))
        mapping = foreign.read_words(place / MAPPING)
        concepts = guarded(place / MAPPING, lambda: _concepts(mapping, number))
        path = place / SPLITS
        content = foreign.read_words(path)
        # Not collected before they are looked at: a small pickle can name the same paths for every class.
        rows = _rows(content, concepts)
        first = guarded(path, lambda: next(rows))
        root = _images(place, inside(first[0], path))
        return guarded(path, lambda: listing(root, path, concepts, itertools.chain((first,), rows)))

    return read


def _concepts(mapping: Any, number: int) -> list[str]:
    levels = _row(mapping)
    if len(levels) != LEVELS:
        raise ValueError(f"it has {len(levels)} levels")
    concepts = sorted(map(_text, _row(levels[number - 1])))
    if len(set(concepts)) < len(concepts) or not concepts:
        raise ValueError(f"level {number} names a class twice, or none")
    return concepts


def _rows(content: Any, concepts: list[str]) -> Iterator[Row]:
    """The images of one level; those of the others stay behind."""
    left = MAX_IMAGES
    for label, concept in enumerate(concepts):
        if concept not in content:
            raise ValueError(f"class {concept[:40]!r} is missing")
        parts = [(split, _row(content[concept][name])) for split, name in ((TRAINVAL, "train"), (TEST, "test"))]
        if not len(parts[0][1]):
            raise ValueError(f"class {concept[:40]!r} has no training image")
        left -= sum(len(paths) for _, paths in parts)
        if left < 0:
            raise ValueError(f"a level names more than {MAX_IMAGES} images")
        for split, paths in parts:
            for path in paths.tolist() if isinstance(paths, np.ndarray) else paths:
                yield _text(path).strip("/"), label, split


def _row(value: object) -> Sequence[Any] | np.ndarray[Any, Any]:
    """Words in a row; a word itself would be taken for its letters."""
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim == 1):
        return value
    shape = f" of {value.ndim} dimensions" if isinstance(value, np.ndarray) else ""
    raise ValueError(f"it has a {type(value).__name__}{shape} where a list must be")


def _text(word: object) -> str:
    """numpy's words are str or bytes, too."""
    if not isinstance(word, str | bytes):
        raise ValueError(f"it has a {type(word).__name__} where a word must be")
    return word.decode("utf-8") if isinstance(word, bytes) else str(word)


def _images(place: Path, first: str) -> Path:
    """The folder of ImageNet-21K: whichever in ``place``, or itself, has the first image."""
    for folder in (place / "imagenet21k", *(place / name for name in subfolders(place)), place):
        if (folder / first).is_file():
            return folder
    raise FastrexError(
        f"transfer: {str(place)!r} must have a folder imagenet21k with {first!r:.200}, got {contents(place)}; {UNPACK}"
    )
