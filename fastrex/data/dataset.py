"""A data set as the training loop sees it: classes, steps per epoch, batches from any step on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..config import Config
from ..distributed import World, barrier
from ..errors import FastrexError
from .demo import write_digits
from .index import Index, open_or_build
from .loader import Batch, TrainLoader
from .plan import Plan
from .synthetic import SyntheticLoader

SYNTHETIC = "synthetic"
SYNTHETIC_CLASSES = 1000
SYNTHETIC_IMAGES = 1_281_167

__all__ = ["Batch", "Batches", "Dataset", "open_dataset"]


class Batches(Protocol):
    """Batches in order, and how long the consumer has waited for them."""

    wait_s: float

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Dataset:
    """What a run trains on. ``index`` and ``plan`` are None for synthetic data."""

    config: Config
    classes: tuple[str, ...]
    class_counts: np.ndarray[Any, Any]
    steps_per_epoch: int
    fingerprint: str
    held_out: int
    index: Index | None = None
    plan: Plan | None = None
    notices: list[str] = field(default_factory=list)

    def batches(self, start: int, stop: int, world: World) -> AbstractContextManager[Batches]:
        """The micro-batches of this rank for steps ``start`` to ``stop`` (exclusive)."""
        if self.index is None or self.plan is None:
            return SyntheticLoader(
                self.config.data,
                self.config.augment,
                len(self.classes),
                self.config.optim.batch_size,
                device=world.device,
                dtype=torch.float32,
                start=start,
                stop=stop,
                micros=self.config.optim.accumulate,
                rank=world.rank,
                world=world.size,
                seed=self.config.run.seed,
                steps_per_epoch=self.steps_per_epoch,
            )
        data = self.config.data
        return TrainLoader(
            self.index,
            self.plan,
            data,
            device=world.device,
            dtype=torch.float32,
            start=start,
            stop=stop,
            micros=self.config.optim.accumulate,
            rank=world.rank,
            world=world.size,
            threads=data.threads or world.threads,
        )


def open_dataset(config: Config, world: World) -> Dataset:
    """Find the images that ``data.path`` names, with an index that is built on first use.

    Raises:
        FastrexError: no path, an unusable folder, or a batch that the ranks or the images cannot fill.
    """
    batch, parts = config.optim.batch_size, world.size * config.optim.accumulate
    if batch % parts:
        raise FastrexError(
            f"train: optim.batch_size must be a multiple of ranks x optim.accumulate = {parts}, got {batch}; "
            f"set optim.batch_size={max(1, batch // parts) * parts}"
        )
    if config.data.path == SYNTHETIC:
        counts = np.full(SYNTHETIC_CLASSES, SYNTHETIC_IMAGES // SYNTHETIC_CLASSES)
        names = tuple(f"class-{c:04d}" for c in range(SYNTHETIC_CLASSES))
        steps = SYNTHETIC_IMAGES // batch
        return Dataset(config, names, counts, steps, SYNTHETIC, 0, notices=["synthetic data: nothing is learnt"])
    index = open_index(config, world)
    rows, held_out = index.rows("train", config.data.held_out), index.rows("val", config.data.held_out)
    plan = Plan(config.run.seed, batch, rows, index.heights, index.widths, config.data, config.augment)
    counts = np.bincount(index.labels[rows], minlength=len(index.classes))
    notices = []
    if bad := index.bad():
        names_of_bad = "; ".join(f"{name!r} ({reason})" for name, reason in bad[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        notices.append(f"left out {len(bad)} unreadable files: {names_of_bad}{more}")
    if not len(held_out):
        notices.append(
            "evaluation is off: there is no val/ or test/ folder and nothing to hold out "
            f"(data.held_out={config.data.held_out:g}; classes with fewer than 2 images stay in training)"
        )
    if (repeats := plan.steps_per_epoch * batch - len(rows)) > 0:
        notices.append(f"data.last_batch=pad repeats {repeats} images in every epoch")
    return Dataset(
        config, index.classes, counts, plan.steps_per_epoch, index.fingerprint, len(held_out), index, plan, notices
    )


def open_index(config: Config, world: World) -> Index:
    """The index of ``data.path``; rank 0 builds it, the others read what it wrote."""
    if not config.data.path and config.recipe != "demo":
        raise FastrexError(f"train: recipe {config.recipe!r} needs images; pass --data FOLDER (or --data synthetic)")
    if not world.main:
        barrier(world)
    index = open_or_build(
        Path(config.data.path) if config.data.path else write_digits(), empty_classes=config.data.empty_classes
    )
    if world.main:
        barrier(world)
    return index
