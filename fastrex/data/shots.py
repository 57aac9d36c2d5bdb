"""Which images a run trains on: all of the training part, or a few of each class (few-shot learning)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..config import DataConfig
from ..errors import FastrexError
from .draws import random_keys
from .index import Index

_PURPOSE = 15  # of the counter-based draws; those of the batches are plan.py's


def training_rows(index: Index, data: DataConfig) -> NDArray[np.int64]:
    """Sorted int64 rows of the images that are trained on: ``Index.rows("train")``, or ``data.shots`` of each class.

    Whether an image is drawn is a matter of ``data.shots_seed``, of its path and of the other paths of its class: as
    :meth:`Listing.hashed` has them, relative to the data set with its split's folder (so ``images`` and
    ``images/train`` as ``data.path`` draw others), and the training images alone (where ``data.held_out`` decides which
    these are, it matters too). It is the same for any order of the index, on every rank and machine, for any batch size
    and ``run.seed``; and 5 shots are among the 10 of the same seed.

    Raises:
        FastrexError: a class has fewer images.
    """
    rows = index.rows("train", data.held_out)
    if not data.shots:
        return rows
    labels = index.labels[rows]
    counts = np.bincount(labels, minlength=len(index.classes))
    if (short := np.flatnonzero(counts < data.shots)).size:
        name, count = index.classes[short[0]], int(counts[short[0]])
        more = f" and fewer in {len(short) - 1} other classes" if len(short) > 1 else ""
        least = int(counts.min())
        way_out = f"set data.shots={least}" if least else "lower data.held_out or add images"
        raise FastrexError(
            f"train: data.shots must be at most the number of training images of each class, got {data.shots} with "
            f"{count} in {name!r}{more}; {way_out}"
        )
    # Paths with one split_key keep their order, which is that of the paths.
    order = np.lexsort((random_keys(data.shots_seed, index.split_key[rows].astype(np.int64), 0, 0, _PURPOSE), labels))
    place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(rows[order[place < data.shots]])
