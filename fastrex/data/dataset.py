"""A data set as the training loop sees it: classes, steps per epoch, batches from any step on."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..config import Config
from ..distributed import World, gather_rows, main_first
from ..errors import FastrexError, UsageError
from .crops import cutter
from .demo import write_digits
from .index import Index, load, open_or_build
from .loader import Batch, TrainLoader
from .plan import Plan
from .plan import notices as plan_notices
from .scan import refuse_one_class
from .shots import training_rows
from .sources import find_source
from .synthetic import SyntheticLoader

# Crops arrive as the network computes (optim.precision): it would round them to that in its first layer.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SYNTHETIC = "synthetic"
SYNTHETIC_CLASSES = 1000
SYNTHETIC_IMAGES = 1_281_167

__all__ = ["Batch", "Batches", "Dataset", "open_dataset"]


class Batches(Protocol):
    """Batches in order, how long the consumer has waited for them, and lines for the log about files gone bad."""

    wait_s: float

    @property
    def news(self) -> deque[str]: ...

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

    @property
    def drawn_counts(self) -> np.ndarray[Any, Any]:
        """How often each class is drawn, up to a common factor."""
        return np.ones_like(self.class_counts) if self.config.data.sampling == "balanced" else self.class_counts

    def batches(self, start: int, stop: int, world: World) -> AbstractContextManager[Batches]:
        """The micro-batches of this rank for steps ``start`` to ``stop`` (exclusive)."""
        config = self.config
        share: dict[str, Any] = {
            "device": world.device,
            "dtype": DTYPES.get(config.optim.precision, torch.float32),
            "start": start,
            "stop": stop,
            "micros": config.optim.accumulate,
            "rank": world.rank,
            "world": world.size,
        }
        if self.index is None or self.plan is None:
            classes, batch, seed = len(self.classes), config.optim.batch_size, config.run.seed
            more: dict[str, Any] = {"seed": seed, "steps_per_epoch": self.steps_per_epoch}
            return SyntheticLoader(config.data, config.augment, classes, batch, **share, **more)
        threads = config.data.threads or world.threads
        return TrainLoader(self.index, self.plan, config.data, **share, threads=threads)


def open_dataset(config: Config, world: World, stored: Path | None = None, *, labelled: bool = True) -> Dataset:
    """Find the images that ``data.path`` names, with an index that is built on first use, or with the ``stored`` one if
    that is a file.

    Args:
        labelled: their labels are learnt from, which takes two classes. Without, one class will do; nothing of it is
            evaluated, since any model would be right about every image.

    Raises:
        FastrexError: no path, an unusable folder, or a batch that the ranks or the images cannot fill.
    """
    check_batch(config, world)
    batch = config.optim.batch_size
    if config.data.path == SYNTHETIC:
        if config.data.shots:
            raise UsageError(
                "config: data.shots must be 0 with data.path=synthetic, which has no images to choose from"
            )
        counts = np.full(SYNTHETIC_CLASSES, SYNTHETIC_IMAGES // SYNTHETIC_CLASSES)
        names = tuple(f"class-{c:04d}" for c in range(SYNTHETIC_CLASSES))
        steps = SYNTHETIC_IMAGES // batch
        lines = ["synthetic data: nothing is learnt", *plan_notices(config.data, config.augment)]
        return Dataset(config, names, counts, steps, SYNTHETIC, 0, notices=lines)
    index = open_index(config, world, stored)
    check_same_images(index, world)
    if labelled:
        way_out = "; without labels train objective.name=moco or mochi"
        refuse_one_class(index.root, index.classes, "training", way_out)
    rows, held_out = training_rows(index, config.data), index.rows("val", config.data.held_out)
    unlabelled = len(index.classes) < 2
    plan = Plan(
        config.run.seed, batch, rows, index.heights, index.widths, config.data, config.augment, labels=index.labels
    )
    counts = np.bincount(index.labels[rows], minlength=len(index.classes))
    notices = []
    if config.data.shots:
        every = len(index.rows("train", config.data.held_out))
        notices.append(
            f"data.shots={config.data.shots}: {len(rows)} of {every} training images (data.shots_seed="
            f"{config.data.shots_seed})"
        )
    if bad := index.bad():
        names_of_bad = "; ".join(f"{name!r} ({reason})" for name, reason in bad[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        notices.append(f"left out {len(bad)} unreadable files: {names_of_bad}{more}")
    if unlabelled:
        aside = f"; data.held_out=0 trains on the {len(held_out)} images held out as well" if len(held_out) else ""
        notices.append(f"evaluation is off: there is one class only, and accuracies need two{aside}")
    elif not len(held_out):
        notices.append(
            "evaluation is off: there is no val/ or test/ folder and nothing to hold out "
            f"(data.held_out={config.data.held_out:g}; classes with fewer than 2 images stay in training)"
        )
    notices += [*index.notices, *plan.notices()]
    who = {"fastrex": "fastrex", "dali": "DALI"}[cutter(config.data, world.device)]
    notices.append(f"images: decoded by DALI, cut by {who}")
    evaluated = 0 if unlabelled else len(held_out)
    return Dataset(
        config, index.classes, counts, plan.steps_per_epoch, index.fingerprint, evaluated, index, plan, notices
    )


def check_batch(config: Config, world: World) -> None:
    """Refuse a batch that the ranks cannot share, or that is too small for BatchNorm."""
    batch, parts = config.optim.batch_size, world.size * config.optim.accumulate
    if batch % parts:
        raise FastrexError(
            f"train: optim.batch_size must be a multiple of ranks x optim.accumulate = {parts}, got {batch}; "
            f"set optim.batch_size={max(1, batch // parts) * parts}"
        )
    if batch // config.optim.accumulate < 2:
        raise FastrexError(
            f"train: optim.batch_size / optim.accumulate must be at least 2 for BatchNorm, got {batch} / "
            f"{config.optim.accumulate}; set a larger optim.batch_size"
        )
    # Images are mixed within what one rank gets at a time, and no two views of one image.
    whole = parts * 2 * config.data.repeats
    if config.augment.mixes and batch % whole:
        raise FastrexError(
            "train: optim.batch_size must be a multiple of ranks x optim.accumulate x 2 x data.repeats = "
            f"{whole} for augment.mixup and cutmix, which mix pairs of images, got {batch}; set optim.batch_size="
            f"{max(1, batch // whole) * whole}, or augment.mixup=0 and augment.cutmix=0"
        )


def open_index(config: Config, world: World, stored: Path | None = None) -> Index:
    """The index of ``data.path``; rank 0 builds it where there is none, the others read what it wrote.

    A ``stored`` one is that of a run that is resumed. It holds whatever has become of the images since: those that are
    gone are for ``data.on_bad_sample`` to deal with, as if they had gone while the run was going on.
    """
    if not config.data.path and config.recipe != "demo":
        raise UsageError(f"config: data.path must name the images of recipe {config.recipe!r}; pass --data FOLDER")
    with main_first(world):
        folder = Path(config.data.path) if config.data.path else write_digits()
        if stored is not None and stored.is_file():
            return dataclasses.replace(load(stored), root=find_source(folder).root)
        return open_or_build(folder, empty_classes=config.data.empty_classes, progress=Looking(f"indexing {folder}:"))


def check_same_images(index: Index, world: World) -> None:
    """Refuse ranks that see other images than rank 0: hosts with copies of their own, one of which is not complete."""
    own = int.from_bytes(hashlib.sha256(index.fingerprint.encode()).digest()[:8], "big", signed=True)
    every = gather_rows(torch.tensor([own], device=world.device), world).tolist()
    if odd := [rank for rank, other in enumerate(every) if other != every[0]]:
        raise FastrexError(
            f"train: all ranks must see the same images, but those of rank {', '.join(map(str, odd[:8]))}"
            f"{', ...' if len(odd) > 8 else ''} differ from rank 0's; give every host the same files and run fastrex "
            "data index again where they have changed"
        )


class Looking:
    """A line on stderr every ten seconds of an index that takes long: ``words`` and how many files are done."""

    def __init__(self, words: str) -> None:
        self.words, self.last = words, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            print(f"{self.words} {done} of {total} files", file=sys.stderr, flush=True)
