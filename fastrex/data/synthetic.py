"""Random crops that are made once and served again and again: what a step costs when data costs nothing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch

from ..config import AugmentConfig, DataConfig
from .loader import Batch, Device
from .plan import BatchPlan, crop_groups


class SyntheticLoader:
    """The interface of :class:`~fastrex.data.loader.TrainLoader` over one set of normal crops and uniform targets,
    one-hot where images would be mixed.

    Args:
        data, augment: the crop groups' numbers and sizes. classes: C. batch_size: images of the global batch.
        device, dtype: of the crops. start, stop: global steps (exclusive). micros, rank, world: as for the real loader.
        seed: of the values; each rank has its own. steps_per_epoch: for the epoch's number.
    """

    def __init__(
        self,
        data: DataConfig,
        augment: AugmentConfig,
        classes: int,
        batch_size: int,
        *,
        device: Device,
        dtype: torch.dtype,
        start: int,
        stop: int,
        micros: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        steps_per_epoch: int = 1000,
    ) -> None:
        if batch_size % (world * micros):
            fact = f"got {batch_size} for {world} x {micros}"
            raise ValueError(f"SyntheticLoader: batch_size must be divisible by world x micros, {fact}")
        images = batch_size // (world * micros)
        # Drawn on the CPU, so that every device gets the same numbers.
        random = torch.Generator().manual_seed(seed * world + rank)
        self._crops = tuple(
            torch.randn(group.crops * images, data.channels, group.size, group.size, generator=random)
            .to(device, dtype)
            .contiguous(memory_format=torch.channels_last)
            for group in crop_groups(data, augment)
        )
        self._target = torch.randint(classes, (images,), generator=random).to(device)
        if augment.mixes:
            # What a step does with shares costs the same whatever they are; these crops have nothing to mix.
            self._target = torch.nn.functional.one_hot(self._target, classes).float()
        self._samples = np.arange(rank * images, (rank + 1) * images, dtype=np.int64)
        self._images = torch.from_numpy(self._samples).to(device)
        self._steps, self._micros, self._steps_per_epoch = range(start, stop), micros, steps_per_epoch
        self.wait_s = 0.0
        self.news: deque[str] = deque()  # no file can go bad

    def __enter__(self) -> SyntheticLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing runs in the background."""

    def __iter__(self) -> Iterator[Batch]:
        for step in self._steps:
            for micro in range(self._micros):
                start = time.perf_counter()
                epoch, within = divmod(step, self._steps_per_epoch)
                views = np.zeros_like(self._samples)
                plan = BatchPlan(epoch, within, micro, self._samples, 0, (), views, self._samples)
                last = micro == self._micros - 1
                shown = (self._target, self._images, self._samples)
                batch = Batch(epoch, step, micro, self._crops, *shown, plan, last)
                self.wait_s += time.perf_counter() - start
                yield batch
