"""One rank of one implementation of the training step, which answers questions: a line of JSON each on its standard
input and output.

``{"do": "sample"}``: the losses of its first steps. ``{"do": "round", "steps": n}``: seconds of each of n steps.
``{"do": "peak"}``: the most memory so far. ``{"do": "parts", "steps": n}``: what the time goes to.
``{"do": "abilities", "dtypes": [...]}``: what this machine can do. ``{"do": "attempt"}``: whether a step fits into
memory. Any answer may be ``{"absent": reason}``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from fastrex import config as config_module
from fastrex.config import Config
from fastrex.data.dataset import DTYPES
from fastrex.distributed import World, world
from fastrex.graph import WARM_UP, WARM_UP_RANKS
from fastrex.memory import pool
from fastrex.trainer import resolve

from . import machine, step_parts
from .processes import Answer
from .rivals import Absent
from .step_subjects import FASTREX, Fastrex, Rival, Spec, Subject, timed_on_device, timed_on_host
from .worker import reason

# Steps whose losses are compared.
COMPARED = 3
# Before anything is timed on a GPU, after what a graph of the step is recorded from.
WARM = 3
# Of the split of a step, which is compared with nothing: as it runs without what hides its parts from the host.
PLAIN = ("run.cuda_graph=off", "run.compile=false")


def main() -> None:
    """Entry point."""
    spec = Spec(**json.loads(sys.argv[1]))
    answer_questions(lambda ranks, memory: Session(spec, ranks, memory), spec.device, spec.threads, spec.allocator)
    # Gloo's threads may abort an interpreter that takes itself down.
    os._exit(0)


class Answers(Protocol):
    """Has a method per question."""

    def rest(self) -> None:
        """After every answer: give back what the next one does not need."""


def answer_questions(open_answers: Callable[[World, str], Answers], device: str, threads: int, allocator: str) -> None:
    """Answer until the input ends. ``open_answers`` is given the world and the allocator that this process has."""
    # Answers go where nobody else writes: libraries print.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # Threads inherit the cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    if allocator == "pooled" and not pool():
        allocator = "default (this C library cannot pool)"
    with world(device) as ranks:
        if ranks.size == 1:
            torch.set_num_threads(threads)
        session: Answers | None = None
        for line in sys.stdin:
            question = json.loads(line)
            try:
                if session is None:
                    session = open_answers(ranks, allocator)
                answer = getattr(session, question.pop("do"))(**question)
                session.rest()
            except Absent as error:
                answer = {"absent": str(error)}
            except (MemoryError, RuntimeError) as error:
                if not machine.out_of_memory(error):
                    raise
                answer = {"absent": reason(error), "memory": True}
            print(json.dumps(answer), file=answers, flush=True)


class Session:
    """Answers about one implementation.

    On a GPU the subject does not outlive an answer: what one keeps would not be there for the others, since their
    processes are all alive.
    """

    def __init__(self, spec: Spec, ranks: World, allocator: str) -> None:
        self.spec, self.world, self.allocator = spec, ranks, allocator
        self.cuda = ranks.device.type == "cuda"
        self.config = resolve(config_module.load(spec.recipe, spec.settings), ranks)
        self.warm = WARM + (WARM_UP if ranks.size == 1 else WARM_UP_RANKS) if self.cuda else 0
        self.subject: Subject | None = None
        self.start = 0 if self.cuda else machine.status_bytes("VmRSS")
        self._limit()

    def sample(self) -> Answer:
        """The first losses, seconds of a step after them, and facts."""
        subject = self._open(self.config)
        losses, seconds = [], 0.0
        for _ in range(COMPARED):
            start = time.perf_counter()
            subject.step()
            losses.append(subject.loss())
            seconds = time.perf_counter() - start
        if self.cuda:
            (seconds,) = self._times(subject, 1, warm=self.warm)
        return {
            "losses": losses, "seconds": seconds, "precision": subject.precision, "bn": subject.bn,
            "notices": subject.notices(),
            "facts": machine.facts(self.world.device.type, self.allocator),
        }  # fmt: skip

    def attempt(self) -> Answer:
        """Whether a step fits into memory: its peak."""
        subject = self._open(self.config)
        for _ in range(self.warm or 1):
            subject.step()
        subject.loss()
        return self.peak()

    def round(self, steps: int) -> Answer:
        """Seconds of each step, and the loss of the last. The first one after a rest, which finds others' data in the
        caches, is not counted."""
        fresh = self.subject is None
        subject = self.subject or self._open(self.config)
        seconds = self._times(subject, steps, warm=max(self.warm, 1) if fresh else 1)
        return {"seconds": seconds, "loss": subject.loss()}

    def peak(self) -> Answer:
        """MiB beyond what the process had before its model, or of the GPU."""
        taken = torch.cuda.max_memory_allocated() if self.cuda else machine.status_bytes("VmHWM") - self.start
        return {"peak_mib": round(taken / machine.MIB, 1)}

    def parts(self, steps: int) -> Answer:
        """Milliseconds by part, kernels launched by a step, and the share of a step with a collective under way."""
        hidden = self.cuda or self.config.run.compile
        if hidden:
            self.subject = None
            machine.release()
        subject = self.subject or self._open(config_module.override(self.config, PLAIN))
        clock = step_parts.Clock(self.cuda)
        for _ in range(self.warm or 1 if hidden else 0):
            subject.step()
        with subject.parts(clock):
            for _ in range(steps):
                with clock.step():
                    subject.step()
        answer: Answer = {"parts": clock.medians(step_parts.names(self.config)), "communication": None}
        if self.world.size > 1:
            answer["communication"] = step_parts.communicating(subject.step, self.cuda)
        answer["kernels"] = step_parts.launched(subject.step, self.cuda)
        return answer

    def abilities(self, dtypes: Sequence[str]) -> Answer:
        """FLOP/s by dtype and bytes/s, of this rank while the others measure theirs."""
        device = self.world.device.type
        machine.forget()
        peaks = {name: machine.matmul_peak(DTYPES[name], device) for name in dtypes}
        return {"peaks": peaks, "bandwidth": machine.bandwidth(machine.LARGEST_COPY, device)}

    def rest(self) -> None:
        if self.cuda:
            self.subject = None
            machine.release()

    def _limit(self) -> None:
        """Make allocations fail before the host or the others suffer."""
        limit = self.spec.limit_mib * machine.MIB
        if not self.cuda:
            machine.limit_memory(*([limit / machine.free_bytes()] if limit else []))
        elif limit:
            total = torch.cuda.get_device_properties(self.world.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0))

    def _open(self, config: Config) -> Subject:
        kind = Fastrex if self.spec.impl == FASTREX else Rival
        self.subject = kind(self.spec, config, self.world)
        return self.subject

    def _times(self, subject: Subject, steps: int, warm: int) -> list[float]:
        """Seconds of each of ``steps``."""
        for _ in range(warm):
            subject.step()
        gc.collect()
        gc.disable()
        try:
            return timed_on_device(subject, steps) if self.cuda else timed_on_host(subject, steps)
        finally:
            gc.enable()


if __name__ == "__main__":
    main()
