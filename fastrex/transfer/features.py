"""Features of a frozen encoder for the images of an index, sharded over ranks and kept in chunks between runs.

A chunk is the unit of work, of storage and of continuation: ranks take chunks in turn, each chunk is a file that
appears whole, and what is computed of one does not depend on any other, so an extraction that was killed goes on, on
any number of ranks, and gives the same bits on the same kind of device.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from ..config import DataConfig
from ..data.index import Index, cache_dir
from ..data.loader import EvalLoader
from ..distributed import World, main_first
from ..errors import FastrexError
from ..export import Source
from . import contents, keys
from .agree import agree, numbers_from_main, shortage
from .chunks import Chunk, Store
from .progress import Progress

Rows = NDArray[np.int64]

# Rows of a chunk: seconds of work on a GPU, so that a killed extraction loses little and small sets keep ranks busy.
CHUNK = 1024
INTERPOLATION = "bicubic"
VERSION = 2  # of what is computed and of how it is stored
PROGRESS_S = 10.0
TOLD = 20  # images that are named at most
# Nothing of an extraction takes so long but a rank that hangs.
STALL_S = 1800.0


@dataclass(frozen=True)
class Transform:
    """From a decoded image to what the encoder sees: shorter side to ``resize`` (bicubic, antialiased), centre crop of
    ``size``, scaled to [0, 1], ``mean`` subtracted, divided by ``std``; ``channels`` 3 (RGB) or 1 (grey)."""

    resize: int
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    channels: int

    @classmethod
    def of(cls, source: Source, size: int | None = None) -> Transform:
        """The protocol's for ``source``: resized to the crop's own size, which is ``size``, else the one that the
        source says, else 224."""
        known = source.preprocessing
        side = size or int(known.get("eval_size", DataConfig.eval_size))
        mean, std = tuple(known.get("mean", DataConfig.mean)), tuple(known.get("std", DataConfig.std))
        return cls(side, side, mean, std, source.channels)

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        mean, std = list(self.mean), list(self.std)
        return {**asdict(self), "mean": mean, "std": std, "interpolation": INTERPOLATION}


@dataclass(frozen=True, eq=False)
class Extracted:
    """Features float32 [n, D], labels int64 [n], both on the CPU, and the index rows int64 [n] that they are of, in the
    order that was asked for; images that have gone bad are left out. ``images``: digest, hex, of the bytes of all that
    were asked for (:func:`images_of`). Empty on every rank but the first."""

    features: Tensor
    labels: Tensor
    rows: Rows
    images: str


def images_of(index: Index, rows: Rows, threads: int) -> str:
    """Digest, hex, of the bytes of the images ``rows``, ``threads`` of them read at a time: that of their
    :class:`Extracted`."""
    parts = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    return contents.together([digest for digest, _ in contents.contents(index, parts, threads)])


def default_cache() -> Path:
    """Where features are kept unless the user says otherwise."""
    return cache_dir() / "features"


def extract(
    encoder: nn.Module,
    identity: str,
    index: Index,
    rows: Rows,
    transform: Transform,
    world: World,
    *,
    cache: Path | None,
    batch_size: int = 128,
    threads: int = 0,
    note: Callable[[str], None] = print,
    name: str = "features",
) -> Extracted:
    """Features of ``rows`` (each once) in fp32 as the published protocol has it; every rank calls this, the first gets
    them.

    On a GPU, TF32 is off, and so are the hardware JPEG decoder and the search for the fastest convolutions, whose
    results differ from run to run: the same features twice are worth more than the tenth that these bring.

    Args:
        encoder: images [B, C, S, S] -> features [B, D] in eval mode, ``num_features`` = D, on ``world.device``.
        identity: of the encoder (:func:`.keys.identity`). cache: where chunks are kept, None: nowhere.
        threads: decoder threads of this rank, 0 = its cores. note: is told of images that are left out, of chunks that
            are computed anew and of a cache that cannot be written. name: what the progress line calls the images.

    Raises:
        FastrexError: features that are not finite (names the image), or stored ones whose labels are not the index's;
            on every rank.
    """
    if len(np.unique(rows)) < len(rows):
        raise ValueError("extract: rows must name each image once")
    job = _Job(encoder, index, rows, transform, world, note, name, batch_size, threads)
    facts = {"version": VERSION, "chunk": CHUNK, "transform": transform.facts()}
    key = keys.features(identity, index.fingerprint, rows, facts, encoder, world.device)
    missing, error = list[int](), None
    store = Store(None if cache is None else cache / key, key, job.width, note)
    with main_first(world):
        if world.main:
            try:
                with shortage(name):
                    missing = job.stored(store)
            except FastrexError as problem:
                error = problem
    agree(error, world)
    missing = numbers_from_main(missing, world)
    try:
        with shortage(name):
            job.compute(store, missing)
    except FastrexError as problem:
        error = problem
    agree(error, world)
    job.collect(store, missing)
    found = None
    try:
        with shortage(name):
            found = job.extracted()
    except FastrexError as problem:
        error = problem
    agree(error, world)
    assert found is not None
    return found


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """fp32 that is fp32, and the same algorithms every time."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Job:
    """One extraction on one rank."""

    def __init__(
        self,
        encoder: nn.Module,
        index: Index,
        rows: Rows,
        transform: Transform,
        world: World,
        note: Callable[[str], None],
        name: str,
        batch_size: int,
        threads: int,
    ) -> None:
        self.encoder, self.index, self.rows, self.transform, self.world = encoder, index, rows, transform, world
        self.note, self.name, self.batch_size, self.threads = note, name, min(batch_size, CHUNK), threads
        self.width = int(encoder.num_features)  # type: ignore[arg-type]
        self.labels = torch.from_numpy(index.labels[rows].astype(np.int64))
        self.spans = [slice(start, min(start + CHUNK, len(rows))) for start in range(0, len(rows), CHUNK)]
        # The first rank puts everything in its place; another one keeps its chunks until they are asked for.
        self.features = torch.empty(0, self.width)
        self.kept = np.zeros(len(rows), bool)
        self.images = [contents.ABSENT] * len(self.spans)
        self.made: dict[int, Chunk] = {}

    def stored(self, store: Store) -> list[int]:
        """Take what is stored of the images as they are now; the numbers of the other chunks."""
        self.features = torch.empty(len(self.rows), self.width)
        missing, doubtful = list[int](), dict[int, tuple[Chunk, bytes]]()
        for number, span in enumerate(self.spans):
            chunk = store.read(number, self.rows[span], self.labels[span])
            if chunk is None:
                missing.append(number)
                continue
            self._take(number, chunk)
            if (now := contents.stat(self.index, self.rows[span])) != chunk.stat:
                doubtful[number] = chunk, now
        parts = [self.rows[self.spans[number]] for number in doubtful]
        changed = list[int]()
        digests = contents.contents(self.index, parts, self.threads or self.world.threads)
        for (number, (chunk, now)), (digest, _) in zip(doubtful.items(), digests, strict=True):
            if digest == chunk.content:
                store.write(
                    number, replace(chunk, stat=now), self.rows[self.spans[number]], self.labels[self.spans[number]]
                )
            else:
                changed.append(number)
        if changed:
            self.note(
                f"{self.name}: images are not those whose features are stored in {store.folder}; {len(changed)} of "
                f"{len(self.spans)} parts are computed anew"
            )
        missing = sorted([*missing, *changed])
        self._say_left_out(missing, store)
        return missing

    def _say_left_out(self, missing: Sequence[int], store: Store) -> None:
        """Of what is stored; what is computed is told by the loader."""
        again = np.zeros(len(self.rows), bool)
        for number in missing:
            again[self.spans[number]] = True
        for place in np.flatnonzero(~self.kept & ~again)[:TOLD]:
            name = self.index.name(int(self.rows[place]))
            self.note(f"{self.name}: {name!r} could not be decoded when features were stored; it is left out")

    def compute(self, store: Store, missing: Sequence[int]) -> None:
        """Compute this rank's share of the chunks ``missing`` and store those that are whole."""
        own, most, watch = missing[self.world.rank :: self.world.size], missing[:: self.world.size], self.world.watch
        # Before they are decoded: what changes from here on is noticed.
        self.before = {number: contents.stat(self.index, self.rows[self.spans[number]]) for number in own}
        watch.mark(watch.place.step, f"computing the features of {self.name}")
        watch.guard(STALL_S if self.world.size > 1 else 0)
        # A chunk is copied to the host, looked at and written while the next one is computed.
        with (
            torch.inference_mode(),
            exact(),
            ThreadPoolExecutor(1, "fastrex-keep") as keeper,
            contextlib.closing(self._batches(own)) as batches,
        ):
            pending: deque[tuple[int, Future[Chunk]]] = deque()
            for number, parts, rows in batches:
                pending.append((number, keeper.submit(self._finish, store, number, parts, rows)))
                while len(pending) > 2 or (pending and pending[0][1].done()):
                    self._take(pending[0][0], pending.popleft()[1].result())
            for number, future in pending:
                self._take(number, future.result())
        # Shares differ by a chunk: progress is counted equally on all ranks.
        for _ in range(self._steps(own), self._steps(most)):
            watch.again()
        watch.guard(0)

    def _steps(self, numbers: Sequence[int]) -> int:
        """Batches in these chunks."""
        spans = [self.spans[number] for number in numbers]
        return sum(-(-(span.stop - span.start) // self.batch_size) for span in spans)

    def _batches(self, own: Sequence[int]) -> Generator[tuple[int, list[Tensor], Rows], None, None]:
        """For each of the chunks ``own`` the features of its batches, on the device, and the rows that they are of."""
        if not own:
            return
        asked = np.concatenate([self.rows[self.spans[number]] for number in own])
        chunk_of = np.full(len(self.index), -1)
        chunk_of[self.rows] = np.arange(len(self.rows)) // CHUNK
        loader = EvalLoader(
            self.index,
            asked,
            self._data(),
            batch_size=self.batch_size,
            device=self.world.device,
            dtype=torch.float32,
            threads=self.threads or self.world.threads,
            interpolation=INTERPOLATION,
            within=CHUNK,
        )
        number, parts, rows = -1, list[Tensor](), list[Rows]()
        progress = Progress(self.name, len(asked), PROGRESS_S)
        with loader:
            try:
                for images, _, batch in loader:
                    self.world.watch.again()
                    if chunk_of[batch[0]] != number:
                        if parts:
                            yield number, parts, np.concatenate(rows)
                        number, parts, rows = int(chunk_of[batch[0]]), [], []
                    parts.append(self.encoder(images).float())
                    rows.append(batch)
                    progress(len(batch))
                if parts:
                    yield number, parts, np.concatenate(rows)
            finally:
                for line in loader.news:
                    self.note(f"{self.name}: {line.partition(': not used')[0]}; it is left out")

    def _finish(self, store: Store, number: int, parts: Sequence[Tensor], rows: Rows) -> Chunk:
        """The chunk of these parts, stored unless an image of it may come back."""
        features = torch.cat(list(parts)).cpu()
        if len(bad := (~torch.isfinite(features).all(1)).nonzero()):
            image = self.index.name(int(rows[int(bad[0])]))
            raise FastrexError(
                f"transfer: the encoder must give finite features, got others for {image!r} of {self.name} and "
                f"{len(bad) - 1} more; its training diverged, or its weights are damaged"
            )
        asked = self.rows[self.spans[number]]
        kept = np.isin(asked, rows)
        if not kept.all():
            spread = torch.zeros(len(kept), self.width)
            spread[torch.from_numpy(kept)] = features
            features = spread
        chunk = self._chunk(number, features, kept)
        store.write(number, chunk, asked, self.labels[self.spans[number]])
        return chunk

    def _chunk(self, number: int, features: Tensor, kept: NDArray[np.bool_]) -> Chunk:
        """With the digests of its images."""
        rows = self.rows[self.spans[number]]
        digest, whole = contents.content(self.index, rows)
        stat = contents.stat(self.index, rows)
        if stat != self.before[number]:
            # Nobody knows what was decoded: equal to nothing.
            digest, whole = os.urandom(contents.SIZE), False
        return Chunk(features, kept, digest, stat, whole)

    def _take(self, number: int, chunk: Chunk) -> None:
        if not self.world.main:
            self.made[number] = chunk
            return
        self.features[self.spans[number]], self.kept[self.spans[number]] = chunk.features, chunk.kept
        self.images[number] = chunk.content

    def collect(self, store: Store, missing: Sequence[int]) -> None:
        """Bring what the ranks have computed to the first one, which stores what it does not see: hosts need not share
        a cache."""
        world, size = self.world, contents.SIZE
        for place, number in enumerate(missing):
            owner, span = place % world.size, self.spans[number]
            count = span.stop - span.start
            if owner and world.rank == owner:
                chunk = self.made.pop(number, None)
                if chunk is None:  # none of its images could be decoded
                    chunk = self._chunk(number, torch.zeros(count, self.width), np.zeros(count, bool))
                words = bytes(chunk.kept.astype(np.uint8)) + chunk.content + chunk.stat + bytes([chunk.lasting])
                dist.send(torch.tensor(list(words), dtype=torch.uint8).to(world.device), 0)
                dist.send(chunk.features.to(world.device), 0)
            elif owner and world.main:
                box = torch.empty(count + 2 * size + 1, dtype=torch.uint8, device=world.device)
                features = torch.empty(count, self.width, device=world.device)
                dist.recv(box, owner)
                dist.recv(features, owner)
                words = box.cpu().numpy().tobytes()
                kept = np.frombuffer(words[:count], np.uint8).astype(bool)
                digest, stat = words[count : count + size], words[count + size : count + 2 * size]
                chunk = Chunk(features.cpu(), kept, digest, stat, bool(words[-1]))
                self._take(number, chunk)
                store.write(number, chunk, self.rows[span], self.labels[span], replace=False)

    def extracted(self) -> Extracted:
        if not self.world.main:
            return Extracted(self.features, self.labels[:0], self.rows[:0], "")
        images = contents.together(self.images)
        if self.kept.all():
            return Extracted(self.features, self.labels, self.rows, images)
        kept = torch.from_numpy(self.kept)
        return Extracted(self.features[kept], self.labels[kept], self.rows[self.kept], images)

    def _data(self) -> DataConfig:
        how = self.transform
        return DataConfig(
            channels=how.channels,
            eval_resize=how.resize,
            eval_size=how.size,
            mean=how.mean,
            std=how.std,
            on_bad_sample="replace",
            max_bad_samples=len(self.rows),
            hw_decoder_load=0.0,
        )
