"""Which training images a probe learns from and which it is chosen on: validation splits and few shots.

Each class has a random stream of its own, keyed by seed and class, so that its choice depends neither on the order of
the classes nor on how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FastrexError

SHARE = 0.2  # of each class, as published
Rows = NDArray[np.int64]


def validation(labels: NDArray[Any], seed: int) -> tuple[Rows, Rows]:
    """(rows to learn from, rows to choose on), ascending: int(0.2 n) of each class's n rows, at least 1, are for
    choosing.

    The published code, once a class has fewer than 5 images, holds out one image of each class after it as well; here
    every class stands for itself.

    Raises:
        FastrexError: a class has a single image, of which nothing would be left.
    """
    held = []
    for label, rows in _classes(labels):
        if len(rows) < 2:
            raise FastrexError(
                f"transfer: each class must have at least 2 training images for a validation split, got {len(rows)} of "
                f"class {label}; leave the class out, or use the probes knn and ncm, which choose nothing"
            )
        order = _stream(seed, label, 0).permutation(len(rows))
        held.append(rows[order[: max(int(SHARE * len(rows)), 1)]])
    chosen = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels), dtype=np.int64), chosen, assume_unique=True), chosen


def few(labels: NDArray[Any], rows: Rows, shots: int, seed: int) -> Rows:
    """``shots`` of ``rows`` of each class, ascending.

    Raises:
        FastrexError: a class has fewer.
    """
    taken = []
    for label, places in _classes(labels[rows]):
        if len(places) < shots:
            raise FastrexError(
                f"transfer: each class must have at least {shots} training images beside those held out for "
                f"{shots} shots, got {len(places)} of class {label}; give fewer shots"
            )
        order = _stream(seed, label, 1).permutation(len(places))
        taken.append(rows[places[order[:shots]]])
    return np.sort(np.concatenate(taken))


def _classes(labels: NDArray[Any]) -> Iterator[tuple[int, Rows]]:
    """Each label that occurs with its places, ascending."""
    order = np.argsort(labels, kind="stable").astype(np.int64)
    found, begin = np.unique(labels[order], return_index=True)
    yield from zip(found.tolist(), np.split(order, begin[1:]), strict=True)


def _stream(seed: int, label: int, purpose: int) -> np.random.Generator:
    # SeedSequence mixes the words: streams of neighbouring keys have nothing in common.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, label, purpose])))
