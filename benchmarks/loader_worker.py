"""One loader in a process of its own, which answers questions: a line of JSON each on its standard input and output.

``{"do": "sample"}``: what its first batch is. ``{"do": "round", "seconds": s}``: images and seconds of one round.
``{"do": "stages", "seconds": s}``: seconds per image of each stage alone. Any answer may be ``{"absent": reason}``.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrex import config as config_module
from fastrex.config import Config
from fastrex.data import dali
from fastrex.data.crops import CropMaker
from fastrex.data.dataset import Dataset, open_dataset
from fastrex.data.index import Index
from fastrex.data.loader import TrainLoader
from fastrex.data.plan import BatchPlan, Plan
from fastrex.data.reader import Reader
from fastrex.distributed import World, world
from fastrex.errors import FastrexError
from fastrex.memory import pool
from fastrex_kernels.crop_resize import crop_resize

from . import machine, measure
from .rivals import Absent, pillow_loader

FASTREX = "fastrex"
IMPLS = (FASTREX, *pillow_loader.NAMES)
# Images whose crops are compared pixel by pixel.
COMPARED = 8
# Different batches that a stage is measured on, in turn.
PREPARED = 8
EPOCHS = 1 << 20
PACKAGES = ("pillow", "torchvision", "numpy", "nvidia-dali-cuda130")
Answer = dict[str, Any]


@dataclass(frozen=True)
class Spec:
    """What a worker is told at its start. ``settings`` make the configuration, ``folder`` takes pictures."""

    impl: str
    recipe: str
    settings: tuple[str, ...]
    device: str
    threads: int
    folder: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main() -> None:
    """Entry point."""
    spec = Spec(**json.loads(sys.argv[1]))
    # Answers go where nobody else writes: libraries print.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # Threads and worker processes inherit the cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec.threads])
    subject: Subject | None = None
    with world(spec.device) as alone:
        for line in sys.stdin:
            question = json.loads(line)
            try:
                if subject is None:
                    subject = open_subject(spec, alone)
                answer = getattr(subject, question.pop("do"))(**question)
            except Absent as reason:
                answer = {"absent": str(reason)}
            print(json.dumps(answer), file=answers, flush=True)
        if subject is not None:
            subject.close()


def open_subject(spec: Spec, alone: World) -> Subject:
    """The loader that ``spec`` names. Raises :class:`Absent`."""
    allocator = "pooled" if spec.impl == FASTREX and pool() else "default"
    config = config_module.load(spec.recipe, spec.settings)
    kind = Fastrex if spec.impl == FASTREX else Rival
    return kind(spec, config, alone, allocator)


def open_images(config: Config, alone: World) -> tuple[Dataset, Index, Plan]:
    """The data set of a configuration. FastrexError where it has no images."""
    dataset = open_dataset(config, alone)
    if dataset.index is None or dataset.plan is None:
        raise FastrexError("bench loader: --data must name images, got synthetic data, which nobody loads")
    return dataset, dataset.index, dataset.plan


class Subject(ABC):
    """A loader under measurement, asked for batch after batch.

    ``turn``: batches that come out together, so that only whole turns are counted. ``ahead``: most batches that are
    finished or begun when a round starts: a multiple of ``turn``, never counted.
    """

    turn: int = 1
    ahead: int

    def __init__(self, spec: Spec, config: Config, alone: World, allocator: str) -> None:
        self.spec, self.config, self.world, self.allocator = spec, config, alone, allocator
        self.cuda = alone.device.type == "cuda"
        self.dataset, self.index, self.plan = open_images(config, alone)
        self.open = contextlib.ExitStack()

    @functools.cached_property
    def batches(self) -> Iterator[list[Tensor]]:
        """Endless, on the device."""
        return self._batches()

    @abstractmethod
    def _batches(self) -> Iterator[list[Tensor]]: ...

    @abstractmethod
    def _by_group(self, batch: list[Tensor]) -> list[Tensor]:
        """A batch's crops as [K*B, 3, S, S] per group."""

    @abstractmethod
    def _planned(self, groups: list[Tensor]) -> list[Tensor] | None:
        """The first images' crops [K, n, 3, S, S] per group as the plan draws them; None where draws cannot be given.
        ``groups`` are those of the first batch."""

    @abstractmethod
    def stages(self, seconds: float) -> Answer:
        """Seconds per image, batch by batch, of each stage alone."""

    def close(self) -> None:
        self.open.close()

    def sample(self) -> Answer:
        """Facts of the first batch and, in a file, the crops of its first images as the plan draws them."""
        groups = self._by_group(next(self.batches))
        for _ in range(self.turn - 1):
            next(self.batches)
        facts = [
            {
                "shape": list(g.shape),
                "dtype": str(g.dtype).removeprefix("torch."),
                "mean": float(g.double().mean()),
                "std": float(g.double().std()),
            }
            for g in groups
        ]
        answer: Answer = {"groups": facts, "pictures": None, "facts": self._facts()}
        if (planned := self._planned(groups)) is not None:
            path = Path(self.spec.folder) / f"{self.spec.impl}.npz"
            np.savez(path, *(crops.cpu().contiguous().numpy() for crops in planned))
            answer["pictures"] = str(path)
        return answer

    def round(self, seconds: float) -> Answer:
        """Images and seconds of whole turns, once everything that was begun before is out of the way."""
        for _ in range(self.ahead):
            next(self.batches)
        self._sync()
        count, start, elapsed = 0, time.perf_counter(), 0.0
        while elapsed < seconds or not count:
            for _ in range(self.turn):
                next(self.batches)
            count += self.turn
            elapsed = time.perf_counter() - start
        self._sync()
        return {"images": count * self.plan.batch_size, "seconds": time.perf_counter() - start}

    def _by_size(self, crops: list[Tensor]) -> list[Tensor]:
        """Crop after crop [B, ...] as [K*B, ...] per group."""
        pieces = iter(crops)
        return [torch.cat(list(itertools.islice(pieces, group.crops))) for group in self.plan.groups]

    def _sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _facts(self) -> Answer:
        known = machine.facts(self.world.device.type, self.allocator)
        for name in PACKAGES:
            with contextlib.suppress(metadata.PackageNotFoundError):
                known[name] = metadata.version(name)
        return known


class _OnlyCut(CropMaker):
    """Cuts in the shares that the loader gives its threads, and leaves it at that."""

    def _augment(self, crops: Tensor, params: Tensor, out: Tensor | None = None) -> Tensor:
        return crops


class Fastrex(Subject):
    """The training loader, as a training run opens it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # What waits for the consumer, what is cut and augmented, what DALI works on, two that are read.
        self.ahead = self.config.data.prefetch + dali.DEPTH + 3

    def _batches(self) -> Iterator[list[Tensor]]:
        steps = EPOCHS * self.plan.steps_per_epoch
        loader = self.open.enter_context(self.dataset.batches(0, steps, self.world))
        return (list(batch.crops) for batch in loader)

    def _by_group(self, batch: list[Tensor]) -> list[Tensor]:
        return batch

    def _planned(self, groups: list[Tensor]) -> list[Tensor]:
        batch = self.plan.batch_size
        return [group.view(-1, batch, *group.shape[1:])[:, :COMPARED] for group in groups]

    def stages(self, seconds: float) -> Answer:
        """With the loader's own functions, each on as many threads as it has there."""
        loader = self.dataset.batches(0, EPOCHS, self.world)
        assert isinstance(loader, TrainLoader)
        parts = [self.plan.batch(0, step % self.plan.steps_per_epoch) for step in range(PREPARED)]
        reader = Reader(self.index, loader.threads)
        augmenter = CropMaker(self.config.data, loader.device, loader.dtype, loader.threads)
        # It is given crops that are cut already.
        augmenter.cutter = "dali"
        self.open.callback(reader.close)
        self.open.callback(augmenter.close)
        requests = list(loader._requests(reader, iter(parts)))
        decoder = loader._decoder(self.plan.batch_size)
        bare = [replace(request, arguments=()) for request in requests]
        reading, decoding = itertools.cycle(parts), dali.decoded(itertools.cycle(bare), decoder)
        runs: dict[str, Callable[[], object]] = {
            "read": lambda: [future.result() for future in reader.start(next(reading).samples)],
            "decode": lambda: next(decoding),
        }
        if loader.cutter == "dali":
            sides = [group.size for group in self.plan.groups for _ in range(group.crops)]
            cut = [crops for _, crops in dali.crops(iter(requests), sides, decoder)]
            cutting = dali.crops(itertools.cycle(requests), sides, decoder)
            runs["crop"] = lambda: next(cutting)
        else:
            images = [decoded for _, decoded in dali.decoded(iter(bare), decoder)]
            cut = [
                [
                    crop_resize(pictures, torch.from_numpy(boxes), group.group.size)
                    for group in part.groups
                    for boxes in group.boxes
                ]
                for part, pictures in zip(parts, images, strict=True)
            ]
            only = _OnlyCut(self.config.data, loader.device, loader.dtype, loader.threads)
            self.open.callback(only.close)
            runs["crop"] = self._in_turn(only, parts, images)
        runs["augment"] = self._in_turn(augmenter, parts, cut)
        spent = {stage: self._repeat(run, seconds / len(runs)) for stage, run in runs.items()}
        if loader.cutter == "dali":
            # DALI cuts where it decodes: both together, less the decoding.
            decode = measure.quantile(spent["decode"], 0.5)
            spent["crop"] = [max(both - decode, 0.0) for both in spent["crop"]]
        return {"stages": spent, "facts": self._facts()}

    def _in_turn(
        self, maker: CropMaker, parts: Sequence[BatchPlan], images: Sequence[list[Tensor]]
    ) -> Callable[[], None]:
        turns = itertools.cycle(list(zip(parts, images, strict=True)))

        def run() -> None:
            maker.crops(*next(turns))
            self._sync()

        return run

    def _repeat(self, run: Callable[[], object], seconds: float) -> list[float]:
        """Seconds per image of one batch after another, without those that were made ahead."""
        spent: list[float] = []
        begun = time.perf_counter()
        while len(spent) < 2 * self.ahead or time.perf_counter() - begun < seconds:
            start = time.perf_counter()
            run()
            spent.append((time.perf_counter() - start) / self.plan.batch_size)
        return spent[self.ahead :]


class Rival(Subject):
    """torch's DataLoader."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.loader = pillow_loader.open_loader(
            self.spec.impl, self.config, self.index, self.plan, self.world.device.type
        )
        # The workers take the batches in turn and begin together.
        self.turn = self.loader.num_workers
        self.ahead = self.turn * (self.loader.prefetch_factor or 1)

    def _batches(self) -> Iterator[list[Tensor]]:
        for crops, _ in self.loader:
            yield [crop.to(self.world.device, non_blocking=True) for crop in crops]

    def _by_group(self, batch: list[Tensor]) -> list[Tensor]:
        return self._by_size(batch)

    def _planned(self, groups: list[Tensor]) -> list[Tensor] | None:
        if self.spec.impl != pillow_loader.NAME:
            return None
        return pillow_loader.planned_crops(self.config, self.index, self.plan.batch(0, 0), COMPARED)

    def stages(self, seconds: float) -> Answer:
        """One worker's work, in this process alone."""
        if self.spec.impl != pillow_loader.NAME:
            raise Absent("its transforms are not taken apart")
        spent = pillow_loader.profile(self.config, self.index, self.plan, seconds)
        return {"stages": spent, "facts": self._facts()}


if __name__ == "__main__":
    main()
