"""A training run under measurement: its real loader and its step, and the same step on one batch that stays.

It answers as :mod:`.step_worker` does: ``{"do": "start"}``: what the data are. ``{"do": "end_to_end", "seconds": s}``
and ``{"do": "kept", "seconds": s}``: images and seconds of one phase. ``{"do": "parts", "steps": n}``: what the time of
a step on fresh data goes to.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import torch

from fastrex import config as config_module
from fastrex.config import Config
from fastrex.data import dali
from fastrex.data.dataset import Batches, open_dataset
from fastrex.data.loader import Batch
from fastrex.distributed import World
from fastrex.graph import WARM_UP
from fastrex.step import Trainer
from fastrex.trainer import resolve

from . import machine, step_parts
from .processes import Answer
from .step_subjects import Loop, warm_up_lr
from .step_worker import PLAIN, WARM, answer_questions

EPOCHS = 1 << 20


@dataclass(frozen=True)
class Spec:
    """What the worker is told at its start."""

    recipe: str
    settings: tuple[str, ...]
    device: str
    threads: int
    allocator: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main() -> None:
    """Entry point."""
    spec = Spec(**json.loads(sys.argv[1]))
    answer_questions(lambda world, memory: Session(spec, world, memory), spec.device, spec.threads, spec.allocator)
    os._exit(0)


class Session:
    """Answers about one run."""

    def __init__(self, spec: Spec, world: World, allocator: str) -> None:
        self.spec, self.world, self.allocator = spec, world, allocator
        self.cuda = world.device.type == "cuda"
        self.config = resolve(config_module.load(spec.recipe, spec.settings), world)
        self.data = open_dataset(self.config, world)
        self.loop = self._loop(self.config)
        self.lr = warm_up_lr(self.config)
        self.kept_batch = self._first()
        # What waits for the step, what is cut and augmented, what DALI works on, two that are read: never counted.
        self.ahead = self.config.data.prefetch + dali.DEPTH + 3

    def start(self) -> Answer:
        """Facts, once the step has warmed up."""
        for _ in range(WARM + WARM_UP):
            self.loop.step(self.kept_batch, self.lr)
        trainer = self.loop.trainer
        return {
            "precision": trainer.precision, "bn": trainer.config.model.bn,
            "notices": [*trainer.notices, *trainer.news], "images": int(self.data.class_counts.sum()),
            "classes": len(self.data.classes), "facts": machine.facts(self.world.device.type, self.allocator),
        }  # fmt: skip

    def end_to_end(self, seconds: float) -> Answer:
        """Steps on what the loader brings, without those that were made while nobody trained."""
        with self._loader() as loader:
            batches = iter(loader)
            for _ in range(self.ahead):
                self.loop.step(next(batches), self.lr)
            self._sync()
            waited = loader.wait_s
            answer = self._phase(seconds, lambda: next(batches))
            return {**answer, "wait_s": loader.wait_s - waited}

    def kept(self, seconds: float) -> Answer:
        """Steps on the batch that is there."""
        return self._phase(seconds, lambda: self.kept_batch)

    def parts(self, steps: int) -> Answer:
        """Milliseconds by part, the wait for data among them, of steps that hide nothing from the host."""
        if self.cuda or self.config.run.compile:
            del self.loop
            machine.release()
            self.loop = self._loop(config_module.override(self.config, PLAIN))
        clock = step_parts.Clock(self.cuda)
        with self._loader() as loader, step_parts.trainer_parts(self.loop.trainer, clock):
            batches = iter(loader)
            for number in range(self.ahead + steps):
                with clock.step():
                    with clock.part(step_parts.DATA_WAIT):
                        batch = next(batches)
                    self.loop.step(batch, self.lr)
                if number < self.ahead:
                    clock.steps.clear()
        return {"parts": clock.medians([step_parts.DATA_WAIT, *step_parts.names(self.config)])}

    def rest(self) -> None:
        """It keeps everything: it is alone."""

    def _phase(self, seconds: float, batch: Callable[[], Batch]) -> Answer:
        count, start, elapsed = 0, time.perf_counter(), 0.0
        while elapsed < seconds:
            self.loop.step(batch(), self.lr)
            count += 1
            elapsed = time.perf_counter() - start
        self._sync()
        return {"images": count * self.config.optim.batch_size, "seconds": time.perf_counter() - start}

    def _loader(self) -> AbstractContextManager[Batches]:
        return self.data.batches(0, EPOCHS * self.data.steps_per_epoch, self.world)

    def _first(self) -> Batch:
        with self.data.batches(0, 1, self.world) as loader:
            (batch,) = loader
        return batch

    def _loop(self, config: Config) -> Loop:
        return Loop(Trainer(config, len(self.data.classes), self.world))

    def _sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
