"""From a plan to batches on the device: files are read, decoded, cut and augmented in the background, in order.

On a CPU DALI decodes while a pool of threads cuts and augments what has been decoded; on a GPU the whole way from the
decoder on happens there, on a stream of its own. A batch depends on the plan alone, never on threads or on how far
ahead they run: every loader can be iterated again and gives the same bits.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import DataConfig
from ..distributed import own_cores
from . import dali
from .ahead import Ahead
from .crops import CropMaker, cutter, sent
from .index import Index
from .mixing import mix_targets
from .plan import BatchPlan, Plan
from .reader import BadSample, BadSamples, Reader, Rows, read_image

Item = TypeVar("Item")
Device = torch.device | str


@dataclass(frozen=True)
class Batch:
    """One rank's part of a micro-batch, on the device.

    ``step`` is global (``plan.step`` counts within the epoch). ``crops``: per group [K*B, C, S, S] with C =
    ``data.channels``, channels-last, crop-major (row k*B + b). ``target``: int64 [B], or float32 [B, classes] where
    images are mixed. ``images``: int64 [B] index rows; ``samples``: the same on the host. ``last_micro``: the step's
    last.
    """

    epoch: int
    step: int
    micro: int
    crops: tuple[Tensor, ...]
    target: Tensor
    images: Tensor
    samples: Rows
    plan: BatchPlan
    last_micro: bool


@dataclass(frozen=True)
class _Wanted:
    """What one request is to bring: ``asked`` as it was planned, ``settled`` without the rows that went bad (both a
    :class:`BatchPlan` or rows), ``rows`` whose images are decoded, and ``places``: which of these each place of the
    batch shows."""

    asked: Any
    settled: Any
    rows: Rows
    places: NDArray[np.intp]


class _Loader(ABC, Generic[Item]):
    """What both loaders share: a background thread per iteration, the time waited for it, hand-over between streams.

    ``news`` are lines for the log about files that went bad, in the order in which they were found.
    """

    def __init__(self, index: Index, data: DataConfig, device: Device, dtype: torch.dtype, threads: int) -> None:
        self.index, self.data, self.dtype = index, data, dtype
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.threads = threads or own_cores()
        self.wait_s = 0.0
        self.bad = BadSamples(index, data.on_bad_sample, data.max_bad_samples)
        self._ahead: Ahead[tuple[Item, torch.cuda.Event | None]] | None = None

    @property
    def news(self) -> deque[str]:
        return self.bad.news

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

    def _target(self, rows: Rows) -> Tensor:
        return sent(torch.from_numpy(self.index.labels[rows].astype(np.int64)), self.device)

    def _decoder(self, batch_size: int) -> dali.Decoder:
        largest = (0, 0)
        if self.device.type == "cuda":
            # Not the very largest: one giant would reserve memory that no other image needs.
            largest = (int(np.quantile(self.index.heights, 0.99)), int(np.quantile(self.index.widths, 0.99)))
        return dali.Decoder(batch_size, self.threads, self.device, self._amend, self.data.hw_decoder_load, largest)

    def _requests(self, reader: Reader, planned: Iterator[Any]) -> Iterator[dali.Request]:
        """Requests whose files are read one batch ahead."""
        reading: deque[tuple[_Wanted, list[Future[dali.Bytes]]]] = deque()
        more = True
        while more or reading:
            while more and len(reading) < 2:
                if (asked := next(planned, None)) is not None:
                    wanted = self._settle(asked)
                    reading.append((wanted, reader.start(wanted.rows)))
                else:
                    more = False
            if reading:
                wanted, futures = reading.popleft()
                sources = dict(zip(wanted.rows.tolist(), futures, strict=True))
                yield self._request(wanted.asked, {row: future.result for row, future in sources.items()})

    def _request(self, asked: Any, sources: Mapping[int, Callable[[], dali.Bytes]]) -> dali.Request:
        """``asked`` with its bytes from ``sources``; rows that cannot be read are settled by policy, and the others
        that take their places are read here."""
        files: dict[int, dali.Bytes] = {}
        # Settled anew: an earlier batch may have shown by now that a row is bad.
        wanted = self._settle(asked)
        while missing := [row for row in wanted.rows.tolist() if row not in files]:
            for row in missing:
                try:
                    files[row] = sources[row]() if row in sources else read_image(self.index, row)
                except BadSample as error:
                    self.bad.add(row, error.reason)
            wanted = self._settle(asked)
        rows = wanted.rows
        shapes = np.stack((self.index.heights[rows], self.index.widths[rows]), axis=1)
        names = [self.index.name(int(row)) for row in rows]
        return dali.Request(names, [files[row] for row in rows.tolist()], shapes, self._arguments(wanted), wanted)

    def _amend(self, request: dali.Request, bad: dict[int, str]) -> dali.Request:
        """``request`` without the images that the decoder did not take."""
        wanted: _Wanted = request.token
        for place, reason in bad.items():
            self.bad.add(int(wanted.rows[place]), reason)
        good = zip(wanted.rows.tolist(), request.files, strict=True)
        return self._request(wanted.asked, {row: partial(_same, file) for row, file in good})

    @abstractmethod
    def _settle(self, asked: Any) -> _Wanted:
        """What of ``asked`` is wanted now that some rows are known to be bad."""

    @abstractmethod
    def _arguments(self, wanted: _Wanted) -> list[NDArray[Any]]:
        """Boxes or shapes for DALI."""


def _same(file: dali.Bytes) -> dali.Bytes:
    return file


class TrainLoader(_Loader[Batch]):
    """The augmented micro-batches of one rank for the global steps ``start`` to ``stop`` (exclusive), in order.

    A file that went bad since it was indexed stops the loader, or another image of its class takes its place
    (``data.on_bad_sample``): always the same one for the same (seed, epoch, file), so no rank needs to know of it and a
    resumed run does the same again.

    Args:
        index: the images. plan: what each batch is made of. data: sizes, mean and std, prefetch, threads, policy.
        device: where the crops are cut and augmented and where they arrive. dtype: of the crops.
        start, stop: global steps; step s is step ``s % steps_per_epoch`` of epoch ``s // steps_per_epoch``.
        micros: micro-batches per step. rank, world: this process among all.
        threads: of reader, decoder and augmentation each (0 = ``data.threads``, and if that is 0 this rank's share of
            the cores).

    Raises (while iterating):
        BadSample: a file is gone, changed or cannot be decoded; it is named.
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
        self.cutter = cutter(data, self.device)

    def _planned(self) -> Iterator[BatchPlan]:
        for step in range(self.start, self.stop):
            epoch, within = divmod(step, self.plan.steps_per_epoch)
            for micro in range(self.micros):
                yield self.plan.batch(epoch, within, rank=self.rank, world=self.world, micro=micro, micros=self.micros)

    def _settle(self, asked: BatchPlan) -> _Wanted:
        rows = self.bad.settle(asked.samples, lambda row, attempt: self.plan.substitute(row, asked.epoch, attempt))
        settled = asked if rows is asked.samples else self.plan.redraw(asked, rows)
        once, places = np.unique(rows, return_inverse=True)
        # Repeated augmentation shows an image several times: it is decoded once, unless DALI cuts, which cuts each
        # image it decodes into the same number of crops.
        if len(once) < len(rows) and self.cutter == "fastrex":
            return _Wanted(asked, settled, once, places)
        return _Wanted(asked, settled, rows, np.arange(len(rows)))

    def _arguments(self, wanted: _Wanted) -> list[NDArray[Any]]:
        if self.cutter == "fastrex":
            return []
        return list(dali.crop_arguments([group.boxes for group in wanted.settled.groups]))

    def _items(self) -> Iterator[Batch]:
        reader = Reader(self.index, self.threads)
        maker = CropMaker(self.data, self.device, self.dtype, self.threads)
        decoder = self._decoder(self.plan.batch_size // (self.world * self.micros))
        requests = self._requests(reader, self._planned())
        try:
            if self.cutter == "fastrex":
                made = dali.decoded(requests, decoder)
            else:
                made = dali.crops(requests, [g.size for g in self.plan.groups for _ in range(g.crops)], decoder)
            for request, images in made:
                part: BatchPlan = request.token.settled
                if self.cutter == "fastrex":
                    images = [images[place] for place in request.token.places]
                crops, target = maker.crops(part, images), self._target(part.samples)
                if part.mix is not None:
                    shares, partners = (
                        sent(torch.from_numpy(values), self.device)
                        for values in (part.mix.own_shares, part.mix.partners)
                    )
                    target = mix_targets(target, shares, partners, len(self.index.classes))
                rows = sent(torch.from_numpy(part.samples.astype(np.int64)), self.device)
                step = part.epoch * self.plan.steps_per_epoch + part.step
                last = part.micro == self.micros - 1
                yield Batch(part.epoch, step, part.micro, crops, target, rows, part.samples, part, last)
        finally:
            reader.close()
            maker.close()

    def _tensors(self, item: Batch) -> tuple[Tensor, ...]:
        return (*item.crops, item.target, item.images)


def one_batch(index: Index, plan: Plan, data: DataConfig, part: BatchPlan, device: Device = "cpu") -> Batch:
    """The batch of ``part``, whatever images it names: what training would get of it, in float32.

    Raises:
        BadSample: as :class:`TrainLoader`.
    """

    class One(TrainLoader):
        def _planned(self) -> Iterator[BatchPlan]:
            yield part

        def _decoder(self, batch_size: int) -> dali.Decoder:
            return super()._decoder(len(part.samples))

    with One(index, plan, data, device=device, dtype=torch.float32, start=0, stop=1) as loader:
        batches: Iterator[Batch] = iter(loader)
        return next(batches)


class EvalLoader(_Loader[tuple[Tensor, Tensor, Rows]]):
    """Centre crops of ``rows`` in order: images [b, C, S, S] channels-last, target int64 [b], rows int64 [b].

    The last batch may be short, and with ``data.on_bad_sample=replace`` so may be one that held a bad file: it is left
    out, nothing takes its place. Arguments and errors as for :class:`TrainLoader`.

    Args:
        interpolation: "bilinear" or "bicubic", antialiased.
        within: batches end at multiples of so many of ``rows``, so that what is computed of these does not depend on
            those before them; 0: only at the end.
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
        interpolation: str = "bilinear",
        within: int = 0,
    ) -> None:
        super().__init__(index, data, device, dtype, threads or data.threads)
        if batch_size < 1:
            raise ValueError(f"EvalLoader: batch_size must be positive, got {batch_size}")
        self.rows, self.batch_size = rows, batch_size
        self.interpolation, self.within = interpolation, within or max(1, len(rows))

    def __len__(self) -> int:
        """Number of batches, were no file to go bad."""
        return len(self._starts())

    def _starts(self) -> list[int]:
        blocks = range(0, len(self.rows), self.within)
        ends = [min(start + self.within, len(self.rows)) for start in blocks]
        return [i for start, end in zip(blocks, ends, strict=True) for i in range(start, end, self.batch_size)]

    def _settle(self, asked: Rows) -> _Wanted:
        kept = asked[~np.isin(asked, list(self.bad.rows))]
        return _Wanted(asked, kept, kept, np.arange(len(kept)))

    def _arguments(self, wanted: _Wanted) -> list[NDArray[Any]]:
        heights, widths = self.index.heights[wanted.rows], self.index.widths[wanted.rows]
        return dali.centre_arguments(heights, widths, self.data.eval_resize, self.data.eval_size)

    def _items(self) -> Iterator[tuple[Tensor, Tensor, Rows]]:
        reader = Reader(self.index, self.threads)
        starts = self._starts()
        parts = (self.rows[start:end] for start, end in itertools.pairwise([*starts, len(self.rows)]))
        maker = CropMaker(self.data, self.device, self.dtype, 1)
        decoder = self._decoder(self.batch_size)
        try:
            requests = self._requests(reader, parts)
            cut = dali.centre_crops(requests, self.data.eval_size, decoder, self.interpolation)
            for request, images in cut:
                rows = request.token.rows
                yield maker.centre(images), self._target(rows), rows
        finally:
            reader.close()
            maker.close()

    def _tensors(self, item: tuple[Tensor, Tensor, Rows]) -> tuple[Tensor, ...]:
        return item[:2]
