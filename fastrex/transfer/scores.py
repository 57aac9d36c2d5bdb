"""Scores of predictions: top-1, mean per class accuracy, log-odds, their bootstrap intervals, and means over sets.

Everything is computed from one small table, how many test images of each class k of the seeds got right: resampling
images is drawing from its multinomial, so a thousand resamples of a large set take no longer than those of a small one.
All accuracies are shares in [0, 1].
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
PERCENTILES = (2.5, 97.5)
BLOCK = 1 << 22  # numbers of a stratified resample that are held at a time

Counts = NDArray[np.int64]


def tally(predictions: Sequence[NDArray[Any]], labels: NDArray[Any], num_classes: int) -> Counts:
    """Table [C, S + 1]: test images of each class that 0, 1, ..., S of the S seeds got right.

    Args:
        predictions: int [T] per seed. labels: int [T].
    """
    right = np.sum([np.asarray(p) == labels for p in predictions], axis=0)
    seeds = len(predictions)
    counts = np.bincount(np.asarray(labels) * (seeds + 1) + right, minlength=num_classes * (seeds + 1))
    return counts.reshape(num_classes, seeds + 1).astype(np.int64)


def scored(predictions: Sequence[NDArray[Any]], labels: NDArray[Any], num_classes: int, name: str) -> dict[str, Any]:
    """``top1``, ``mean_per_class``, ``log_odds`` and ``right`` of one probe on the set ``name``.

    top1 and mean_per_class: mean, std (ddof 1; 0 with one seed), low, high, seeds. Mean per class leaves classes
    without a test image out. ``right`` (S + 1 numbers: images that k of the seeds got right) is what :func:`mean`
    resamples again. Intervals are 2.5 and 97.5 percentiles over resamples of the test images, the same ones for all
    seeds, for mean per class within each class; drawn from Philox with a key made of ``name``, so that a set's interval
    does not depend on the others.
    """
    truth = np.asarray(labels)
    table = tally(predictions, truth, num_classes)
    right, images = table.sum(0), table.sum(1)
    there = images > 0
    hits = [np.asarray(p) == truth for p in predictions]
    per_class = [float((np.bincount(truth[h], minlength=num_classes)[there] / images[there]).mean()) for h in hits]
    top1 = {**_spread([float(h.mean()) for h in hits]), **_interval(resampled(right, name))}
    return {
        "top1": top1,
        "mean_per_class": {**_spread(per_class), **_interval(_resampled_per_class(table[there], name))},
        "log_odds": _log_odds(right, name),
        "right": right.tolist(),
    }


def mean(rights: Mapping[str, Sequence[int]], wanted: Sequence[str]) -> dict[str, Any] | None:
    """Mean log-odds, with its interval, and mean top-1 over the sets of ``wanted`` that have a result.

    Top-1 is averaged over seeds first, log-odds are averaged over sets (recipes of t-ReX). The sets are resampled
    independently of one another.

    Args:
        rights: ``right`` of each set that has a result, by its name.

    Returns:
        ``log_odds`` (value, low, high), ``top1``, ``sets``, ``complete``, and ``moved``: the sets whose top-1 was moved
        away from 0 or 1 (:func:`log_odds`), where there are any; None where no set has a result.
    """
    names = [name for name in wanted if name in rights]
    if not names:
        return None
    tables = {name: np.asarray(rights[name], np.int64) for name in names}
    odds = {name: _log_odds(tables[name], name) for name in names}
    values = [found["value"] for found in odds.values()]
    moved = [name for name, found in odds.items() if found.get("moved")]
    drawn = np.mean([log_odds(resampled(tables[name], name), int(tables[name].sum())) for name in names], axis=0)
    return {
        "log_odds": {"value": float(np.mean(values)), **_interval(drawn)},
        "top1": float(np.mean([_share(tables[name]) for name in names])),
        "sets": names,
        "complete": len(names) == len(wanted),
        **({"moved": moved} if moved else {}),
    }


def log_odds(share: Any, images: int) -> Any:
    """ln(p / (1 - p)), elementwise; p nearer to 0 or 1 than half of ``images`` test images is moved to there, where its
    logarithm is finite."""
    least = 0.5 / images
    p = np.clip(share, least, 1 - least)
    return np.log(p / (1 - p))


def resampled(right: Counts, name: str) -> NDArray[np.float64]:
    """Top-1, mean over seeds, of each of ``RESAMPLES`` resamples: images [S + 1] that k of S seeds got right."""
    images, seeds = int(right.sum()), len(right) - 1
    drawn = _random(name, "images").multinomial(images, right / images, size=RESAMPLES)
    shares: NDArray[np.float64] = drawn @ (np.arange(seeds + 1) / seeds) / images
    return shares


def _resampled_per_class(table: Counts, name: str) -> NDArray[np.float64]:
    """Mean over classes of each resample within classes; table [C, S + 1] of classes that have images."""
    classes, seeds = len(table), table.shape[1] - 1
    images = table.sum(1)
    random = _random(name, "classes")
    total = np.zeros(RESAMPLES)
    for part in _blocks(classes, max(1, BLOCK // (RESAMPLES * (seeds + 1)))):
        count = images[part]
        drawn = random.multinomial(count, table[part] / count[:, None], size=(RESAMPLES, len(count)))
        total += (drawn @ (np.arange(seeds + 1) / seeds) / count).sum(1)
    return total / classes


def _blocks(count: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, count, step))


def _random(name: str, what: str) -> np.random.Generator:
    key = hashlib.sha256(f"fastrex transfer {what} {name}".encode("utf-8", "surrogateescape")).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))


def _share(right: Counts) -> float:
    return float(right @ np.arange(len(right)) / (right.sum() * (len(right) - 1)))


def _log_odds(right: Counts, name: str) -> dict[str, Any]:
    images, share = int(right.sum()), _share(right)
    least = 0.5 / images
    found = {"value": float(log_odds(share, images)), **_interval(log_odds(resampled(right, name), images))}
    # Said where it matters: such a value tells how many test images there are, not how good the encoder is.
    return {**found, "moved": True} if not least <= share <= 1 - least else found


def _spread(values: Sequence[float]) -> dict[str, Any]:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": math.fsum(values) / len(values), "std": deviation, "seeds": list(values)}


def _interval(drawn: NDArray[Any]) -> dict[str, float]:
    low, high = np.percentile(drawn, PERCENTILES)
    return {"low": float(low), "high": float(high)}
