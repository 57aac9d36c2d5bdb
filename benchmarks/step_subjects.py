"""The training steps under measurement: ours as a run has it, and the rivals, on one batch that stays on the device."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from itertools import pairwise

import safetensors.torch
import torch

from fastrex import config as config_module
from fastrex.config import Config
from fastrex.data.dataset import open_dataset
from fastrex.data.loader import Batch
from fastrex.distributed import World
from fastrex.metrics import Meter, Reading
from fastrex.step import Trainer

from . import step_parts
from .rivals.eager_step import NAMES, EagerStep

FASTREX = "fastrex"
IMPLS = (FASTREX, *NAMES)


@dataclass(frozen=True)
class Spec:
    """What a worker is told at its start. ``settings`` make the configuration, ``state`` is the file of the first
    weights, ``limit_mib`` what it may take (0: what is free)."""

    impl: str
    recipe: str
    settings: tuple[str, ...]
    device: str
    threads: int
    allocator: str
    classes: int
    state: str
    limit_mib: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def warm_up_lr(config: Config) -> float:
    """As early in a schedule: a hundredth of its peak. With the peak from the first step on the roundings of two
    implementations grow apart, and many steps on one batch may diverge."""
    return 0.01 * config.optim.lr * config.optim.batch_size / 256


class Subject(ABC):
    """A training step under measurement on one batch that stays on the device."""

    precision: str
    bn: str = "torch"

    def __init__(self, spec: Spec, config: Config, ranks: World) -> None:
        synthetic = open_dataset(config_module.override(config, ["data.path=synthetic"]), ranks)
        classes = tuple(str(number) for number in range(spec.classes))
        with dataclasses.replace(synthetic, classes=classes).batches(0, 1, ranks) as loader:
            (self.batch,) = loader
        self.lr = warm_up_lr(config)

    @abstractmethod
    def step(self) -> None: ...

    @abstractmethod
    def loss(self) -> float:
        """Of the last step."""

    def notices(self) -> list[str]:
        """What it says of itself."""
        return []

    @abstractmethod
    def parts(self, clock: step_parts.Clock) -> contextlib.AbstractContextManager[None]:
        """Let ``clock`` see the parts of the steps inside."""


class Loop:
    """Steps of a trainer, and their metrics as the training loop reads them."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.meter, self.number = trainer, Meter(), 0
        self.reading: Reading | None = None

    def step(self, batch: Batch, lr: float) -> dict[str, torch.Tensor]:
        values = self.trainer.step(self.number, [batch], lr)
        self.meter.add(values)
        self.number += 1
        if self.number % self.trainer.config.run.log_every == 0:
            if self.reading is not None:
                self.reading.values()
            self.reading = Reading(self.meter.take(self.trainer.world), self.number, {}, 0.0)
        return values


class Fastrex(Subject):
    """The training step of a run, and its metrics as the loop reads them."""

    def __init__(self, spec: Spec, config: Config, ranks: World) -> None:
        super().__init__(spec, config, ranks)
        self.trainer = Trainer(config, spec.classes, ranks)
        self.precision, self.bn = self.trainer.precision, self.trainer.config.model.bn
        self.loop = Loop(self.trainer)
        self.values: dict[str, torch.Tensor] = {}

    def step(self) -> None:
        self.values = self.loop.step(self.batch, self.lr)

    def loss(self) -> float:
        return float(self.values["loss"])

    def notices(self) -> list[str]:
        return [*self.trainer.notices, *self.trainer.news]

    def parts(self, clock: step_parts.Clock) -> contextlib.AbstractContextManager[None]:
        return step_parts.trainer_parts(self.trainer, clock)


class Rival(Subject):
    """The step as researchers write it."""

    def __init__(self, spec: Spec, config: Config, ranks: World) -> None:
        super().__init__(spec, config, ranks)
        state = safetensors.torch.load_file(spec.state)
        self.rival = EagerStep(spec.impl, config, spec.classes, ranks, state)
        self.precision = self.rival.precision
        self.crops = self.rival.crops(self.batch.crops)
        self.values: dict[str, float] = {}

    def step(self) -> None:
        self.values = self.rival.step(self.crops, self.batch.target, self.lr)

    def loss(self) -> float:
        return self.values["loss"]

    def parts(self, clock: step_parts.Clock) -> contextlib.AbstractContextManager[None]:
        return step_parts.eager_parts(self.rival, clock)


def timed_on_host(subject: Subject, steps: int) -> list[float]:
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        subject.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def timed_on_device(subject: Subject, steps: int) -> list[float]:
    """Between events, so that the host may run ahead as it does in a run."""
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        subject.step()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]
