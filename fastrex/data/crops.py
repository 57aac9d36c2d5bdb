"""From decoded images, or from what DALI has cut of them, to the augmented crops of a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

import fastrex_kernels
from fastrex_kernels.augment import OFF, augment
from fastrex_kernels.crop_resize import crop_resize

from ..config import DataConfig
from .ahead import compute_alone
from .mixes import MixPlan
from .mixing import mix_, weights
from .plan import BatchPlan, GroupPlan

TASK_PIXELS = 1 << 17  # of crops that one thread makes at a time: stays in its cache, hides the cost of the calls
MIXED_PIXELS = 1 << 21  # of crops that a GPU mixes at a time: bounds the float32 copies that it takes


def cutter(data: DataConfig, device: torch.device) -> str:
    """Who cuts and resizes the crops, "dali" or "fastrex" (``crop_resize``), as ``data.resize`` says.

    By default our operator on a CPU, where it is several times as fast as DALI's resize (not its PyTorch reference).
    """
    if data.resize != "auto":
        return data.resize
    return "fastrex" if device.type == "cpu" and fastrex_kernels.backend("cpu") == "C++" else "dali"


def sent(values: Tensor, device: torch.device) -> Tensor:
    """``values`` of the CPU on ``device``, without waiting for a GPU."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


@dataclass(frozen=True)
class _Task:
    """Some rows of one group: all images of some crops, or some images, from ``first`` on, of one."""

    group: GroupPlan
    params: Tensor
    out: Tensor
    rows: slice
    crop: int
    first: int
    images: int


class CropMaker:
    """Cuts (unless DALI has), augments and collects the crops of batches, with ``threads`` threads on a CPU.

    :meth:`close` waits for the threads.
    """

    def __init__(self, data: DataConfig, device: torch.device, dtype: torch.dtype, threads: int) -> None:
        self.data, self.device, self.dtype = data, device, dtype
        self.cutter = cutter(data, device)
        # One torch thread in each: a team of them would wait, spinning, for cores that the decoder's threads have.
        self._pool = ThreadPoolExecutor(threads, "fastrex-make", initializer=compute_alone)
        self._held: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()

    def crops(self, part: BatchPlan, images: list[Tensor]) -> tuple[Tensor, ...]:
        """Per group [K*B, C, S, S], channels-last, crop-major.

        Args:
            images: B decoded images uint8 [H, W, 3], or with DALI as the cutter uint8 [B, S, S, 3] for crop after crop.
        """
        results, tasks, done = [], [], 0
        for group in part.groups:
            count, batch = group.boxes.shape[:2]
            shape = (count * batch, group.group.size, group.group.size, self.data.channels)
            out = torch.empty(shape, dtype=self.dtype, device=self.device).permute(0, 3, 1, 2)
            params = sent(torch.from_numpy(group.params.reshape(count * batch, -1)), self.device)
            tasks += [(task, done) for task in self._tasks(group, params, out)]
            results.append(out)
            done += count
        if self.device.type == "cuda":
            try:
                for task, before in tasks:
                    self._make(task, images, before)
            finally:
                self._hold(images)
        else:
            for future in [self._pool.submit(self._make, task, images, before) for task, before in tasks]:
                future.result()
        if part.mix is not None:
            self._mix(results, part.mix)
        return tuple(results)

    def centre(self, images: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] normalised, without augmentation: [B, C, S, S]."""
        out = self._augment(images, sent(torch.tensor(OFF).repeat(len(images), 1), self.device))
        if self.device.type == "cuda":
            self._hold([images])
        return out

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for event, _ in self._held:
            event.synchronize()
        self._held.clear()

    def _tasks(self, group: GroupPlan, params: Tensor, out: Tensor) -> Iterator[_Task]:
        """A GPU takes as much as it can in one launch: a whole group, or what DALI has cut, one crop of all images."""
        count, batch = group.boxes.shape[:2]
        most = count * batch if self.device.type == "cuda" else max(1, TASK_PIXELS // group.group.size**2)
        images = min(most, batch)
        at_once = max(1, most // batch) if self.cutter == "fastrex" else 1
        for crop in range(0, count, at_once):
            for first in range(0, batch, images):
                width = min(images, batch - first)
                start = crop * batch + first
                stop = start + width if at_once == 1 else min(crop + at_once, count) * batch
                yield _Task(group, params, out, slice(start, stop), crop, first, width)

    def _make(self, task: _Task, images: list[Tensor], before: int) -> None:
        some = slice(task.first, task.first + task.images)
        if self.cutter == "fastrex":
            boxes = torch.from_numpy(task.group.boxes.reshape(-1, 4)[task.rows])
            cut = crop_resize(images[some], boxes, task.group.group.size)
        else:
            cut = images[before + task.crop][some]
        self._augment(cut, task.params[task.rows], task.out[task.rows])

    def _mix(self, groups: list[Tensor], mix: MixPlan) -> None:
        """Mix what all tasks have made: an image and its partner may come from two of them."""
        on_gpu, pairs, tasks = self.device.type == "cuda", len(mix.shares), []
        for crops in groups:
            side = crops.shape[-1]
            shares, boxes = (sent(values, self.device) for values in weights(mix, side))
            pixels = 2 * (len(crops) // (2 * pairs)) * side**2 * mix.distance  # of a block of pairs
            step = mix.distance * max(1, (MIXED_PIXELS if on_gpu else TASK_PIXELS) // pixels)
            for first in range(0, pairs, step):
                tasks.append((crops, mix, shares, boxes, slice(first, min(first + step, pairs))))
        if on_gpu:
            for task in tasks:
                mix_(*task)
        else:
            for future in [self._pool.submit(mix_, *task) for task in tasks]:
                future.result()

    def _augment(self, crops: Tensor, params: Tensor, out: Tensor | None = None) -> Tensor:
        data = self.data
        return augment(crops, params, mean=data.mean, std=data.std, dtype=self.dtype, channels=data.channels, out=out)

    def _hold(self, images: list[Tensor]) -> None:
        """Keep DALI's memory until the kernels that read it have run: DALI knows nothing of this stream."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._held.append((event, images))
        if len(self._held) > 1:
            self._held.popleft()[0].synchronize()
