"""From a plan to batches on the device: files are read, decoded, cut and augmented in the background, in order.

A batch depends on the plan alone, never on threads or on how far ahead they run: every loader can be iterated again
and gives the same bits.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastrex_kernels.augment import OFF, augment

from ..config import DataConfig
from ..distributed import own_cores
from ..errors import FastrexError
from . import dali
from .ahead import Ahead
from .index import Index
from .plan import BatchPlan, Plan

Item = TypeVar("Item")
Device = torch.device | str
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One rank's part of a micro-batch, on the device.

    ``step`` is global (``plan.step`` counts within the epoch). ``crops``: per group [K*B, 3, S, S], channels-last,
    crop-major (row k*B + b). ``target``: int64 [B]. ``samples``: int64 [B] index rows, on the host. ``last_micro``: the
    step's last.
    """

    epoch: int
    step: int
    micro: int
    crops: tuple[Tensor, ...]
    target: Tensor
    samples: Rows
    plan: BatchPlan
    last_micro: bool


class Reader:
    """Read the files of index rows with a few threads and check that they are still the indexed ones."""

    def __init__(self, index: Index, threads: int) -> None:
        self._index = index
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastrex-read")

    def start(self, rows: Rows) -> list[Future[dali.Bytes]]:
        return [self._pool.submit(self._read, int(row)) for row in rows]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, row: int) -> dali.Bytes:
        path, size = self._index.path(row), int(self._index.sizes[row])
        way_out = dali.way_out(self._index.root)
        try:
            content = np.fromfile(path, dtype=np.uint8)
        except OSError as error:
            raise FastrexError(f"cannot read {str(path)!r} ({error.strerror or error}); {way_out}") from error
        if len(content) != size:
            fact = f"{str(path)!r} has {len(content)} bytes, but had {size} when it was indexed"
            raise FastrexError(f"{fact}; {way_out}")
        return content


class _Loader(ABC, Generic[Item]):
    """What both loaders share: a background thread per iteration, the time waited for it, hand-over between streams."""

    def __init__(self, index: Index, data: DataConfig, device: Device, dtype: torch.dtype, threads: int) -> None:
        self.index, self.data, self.dtype = index, data, dtype
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.threads = threads or own_cores()
        self.wait_s = 0.0
        self._ahead: Ahead[tuple[Item, torch.cuda.Event | None]] | None = None

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop loading and wait for the threads; iterating afterwards starts anew."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def __iter__(self) -> Iterator[Item]:
        self.close()
        ahead = self._ahead = Ahead(self._events(), self.data.prefetch, "fastrex-load")
        try:
            while True:
                start = time.perf_counter()
                try:
                    item, event = next(ahead)
                except StopIteration:
                    return
                finally:
                    self.wait_s += time.perf_counter() - start
                if event is not None:
                    stream = torch.cuda.current_stream(self.device)
                    stream.wait_event(event)
                    for tensor in self._tensors(item):
                        tensor.record_stream(stream)
                yield item
        finally:
            ahead.close()

    def _events(self) -> Generator[tuple[Item, torch.cuda.Event | None], None, None]:
        """The items, made on a stream of this thread's own, each with the event that completes it."""
        if self.device.type != "cuda":
            for item in self._items():
                yield item, None
            return
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            for item in self._items():
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(stream)
                yield item, event

    @abstractmethod
    def _items(self) -> Iterator[Item]:
        """The batches in order, made in the background thread."""

    @abstractmethod
    def _tensors(self, item: Item) -> tuple[Tensor, ...]:
        """What of an item lies on the device."""

    def _augment(self, crops: Tensor, params: Tensor) -> Tensor:
        return augment(crops, self._pinned(params), mean=self.data.mean, std=self.data.std, dtype=self.dtype)

    def _target(self, rows: Rows) -> Tensor:
        labels = torch.from_numpy(self.index.labels[rows].astype(np.int64))
        return self._pinned(labels).to(self.device, non_blocking=True)

    def _pinned(self, values: Tensor) -> Tensor:
        return values.pin_memory() if self.device.type == "cuda" else values

    def _requests(self, reader: Reader, wanted: Iterator[tuple[Rows, list[NDArray[Any]]]]) -> Iterator[dali.Request]:
        """Requests whose files are read one batch ahead."""
        reading: deque[tuple[Rows, list[NDArray[Any]], list[Future[dali.Bytes]]]] = deque()
        more = True
        while more or reading:
            while more and len(reading) < 2:
                if following := next(wanted, None):
                    reading.append((*following, reader.start(following[0])))
                else:
                    more = False
            if reading:
                rows, arguments, futures = reading.popleft()
                names: list[Path] = [self.index.path(int(row)) for row in rows]
                yield dali.Request(names, [future.result() for future in futures], arguments)


class TrainLoader(_Loader[Batch]):
    """The augmented micro-batches of one rank for the global steps ``start`` to ``stop`` (exclusive), in order.

    Args:
        index: the images. plan: what each batch is made of. data: sizes, mean and std, prefetch, threads.
        device: where the crops are cut and augmented and where they arrive. dtype: of the crops.
        start, stop: global steps; step s is step ``s % steps_per_epoch`` of epoch ``s // steps_per_epoch``.
        micros: micro-batches per step. rank, world: this process among all.
        threads: of reader and decoder (0 = ``data.threads``, and if that is 0 this rank's share of the cores).

    Raises (while iterating):
        FastrexError: a file is gone, changed or cannot be decoded; it is named.
    """

    def __init__(
        self,
        index: Index,
        plan: Plan,
        data: DataConfig,
        *,
        device: Device,
        dtype: torch.dtype,
        start: int,
        stop: int,
        micros: int = 1,
        rank: int = 0,
        world: int = 1,
        threads: int = 0,
    ) -> None:
        super().__init__(index, data, device, dtype, threads or data.threads)
        if plan.batch_size % (world * micros):
            fact = f"got {plan.batch_size} for {world} x {micros}"
            raise ValueError(f"TrainLoader: plan.batch_size must be divisible by world x micros, {fact}")
        self.plan, self.start, self.stop = plan, start, stop
        self.micros, self.rank, self.world = micros, rank, world

    def _items(self) -> Iterator[Batch]:
        reader = Reader(self.index, self.threads)
        plans: deque[tuple[int, BatchPlan]] = deque()

        def wanted() -> Iterator[tuple[Rows, list[NDArray[Any]]]]:
            for step in range(self.start, self.stop):
                epoch, within = divmod(step, self.plan.steps_per_epoch)
                for micro in range(self.micros):
                    part = self.plan.batch(
                        epoch, within, rank=self.rank, world=self.world, micro=micro, micros=self.micros
                    )
                    plans.append((step, part))
                    yield part.samples, list(dali.crop_arguments([group.boxes for group in part.groups]))

        try:
            cut = dali.crops(
                self._requests(reader, wanted()),
                [(group.crops, group.size) for group in self.plan.groups],
                batch_size=self.plan.batch_size // (self.world * self.micros),
                threads=self.threads,
                device=self.device,
                root=self.index.root,
            )
            for _, pieces in cut:
                step, part = plans.popleft()
                crops = tuple(
                    self._augment(piece, torch.from_numpy(group.params.reshape(len(piece), -1)))
                    for piece, group in zip(pieces, part.groups, strict=True)
                )
                last = part.micro == self.micros - 1
                target = self._target(part.samples)
                yield Batch(part.epoch, step, part.micro, crops, target, part.samples, part, last)
        finally:
            reader.close()

    def _tensors(self, item: Batch) -> tuple[Tensor, ...]:
        return (*item.crops, item.target)


class EvalLoader(_Loader[tuple[Tensor, Tensor, Rows]]):
    """Centre crops of ``rows`` in order: images [b, 3, S, S] channels-last, target int64 [b], rows int64 [b].

    The last batch may be short. Arguments and errors as for :class:`TrainLoader`.
    """

    def __init__(
        self,
        index: Index,
        rows: Rows,
        data: DataConfig,
        *,
        batch_size: int,
        device: Device,
        dtype: torch.dtype,
        threads: int = 0,
    ) -> None:
        super().__init__(index, data, device, dtype, threads or data.threads)
        if batch_size < 1:
            raise ValueError(f"EvalLoader: batch_size must be positive, got {batch_size}")
        self.rows, self.batch_size = rows, batch_size

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.rows) // self.batch_size)

    def _items(self) -> Iterator[tuple[Tensor, Tensor, Rows]]:
        reader = Reader(self.index, self.threads)
        parts = [self.rows[i : i + self.batch_size] for i in range(0, len(self.rows), self.batch_size)]
        heights, widths = self.index.heights, self.index.widths
        resize, size = self.data.eval_resize, self.data.eval_size
        wanted = ((part, dali.centre_arguments(heights[part], widths[part], resize, size)) for part in parts)
        try:
            cut = dali.centre_crops(
                self._requests(reader, wanted),
                size,
                batch_size=self.batch_size,
                threads=self.threads,
                device=self.device,
                root=self.index.root,
            )
            for part, (_, images) in zip(parts, cut, strict=True):
                yield self._augment(images, torch.tensor(OFF).repeat(len(images), 1)), self._target(part), part
        finally:
            reader.close()

    def _tensors(self, item: tuple[Tensor, Tensor, Rows]) -> tuple[Tensor, ...]:
        return item[:2]
