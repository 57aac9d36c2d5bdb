"""What a training step's time goes to, what it launches and how long it talks to other ranks; seen from outside.

The parts are those of :mod:`.roofline` by name, and "other". Modules and methods are wrapped, so each part is what the
host does between two marks (CPU), or what the device does between two events (GPU). A backward begins where the loss
is known and ends where the gradients are first read.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fastrex import objectives, views
from fastrex.config import Config
from fastrex.step import Trainer

from . import measure
from .rivals.eager_step import EagerStep
from .roofline import BACKWARD, EMA, HEAD, OPTIMISER, forward_part

DATA_WAIT, OTHER = "data wait", "other"
# Names of the profiler's events while a collective is under way: gloo's on the host, NCCL's kernels on the device.
COLLECTIVES = ("gloo:", "nccl")
NO_KERNELS = ("Memcpy", "Memset")


def names(config: Config) -> list[str]:
    """The parts of a step on a batch that is there, in the order in which they are shown."""
    # Its options decide, so an instance is asked; how wide it is does not matter.
    objective = objectives.make(config, in_features=1, num_classes=2)
    sides = [side for _, side in views.model_groups(config, objective)]
    follows = [EMA] if objective.needs_ema else []
    return [*dict.fromkeys(map(forward_part, sides)), *follows, HEAD, BACKWARD, OPTIMISER]


class Clock:
    """Time by part: that on top of a stack of names is the one that is running.

    On a GPU each mark is an event that waits for the one before it, whatever stream it is recorded on, so that parts
    that would overlap run one after the other.
    """

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.steps: list[dict[str, float]] = []
        self._stack = [OTHER]
        self._marks: list[tuple[str, Any]] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one training step."""
        self._stack, self._marks = [OTHER], []
        self._mark()
        yield
        self._mark()
        if self.cuda:
            torch.cuda.synchronize()
        spent: dict[str, float] = {}
        for (name, start), (_, end) in pairwise(self._marks):
            taken = float(start.elapsed_time(end)) if self.cuda else 1e3 * (end - start)
            spent[name] = spent.get(name, 0.0) + taken
        self.steps.append(spent)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        self._stack.append(name)
        self._mark()

    def leave(self) -> None:
        self._stack.pop()
        self._mark()

    def base(self, name: str) -> None:
        """What runs where nothing else does, from here on."""
        self._stack[0] = name
        self._mark()

    @property
    def in_backward(self) -> bool:
        return self._stack[0] == BACKWARD

    def medians(self, parts: Sequence[str]) -> dict[str, float]:
        """Milliseconds of ``parts`` and of what else there is, each the median over the steps."""
        return {
            name: round(measure.quantile([step.get(name, 0.0) for step in self.steps], 0.5), 4)
            for name in (*parts, OTHER)
        }

    def _mark(self) -> None:
        if not self.cuda:
            self._marks.append((self._stack[-1], time.perf_counter()))
            return
        stream = torch.cuda.current_stream()
        if self._marks:
            stream.wait_event(self._marks[-1][1])
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        self._marks.append((self._stack[-1], event))


@contextlib.contextmanager
def trainer_parts(trainer: Trainer, clock: Clock) -> Iterator[None]:
    """Let ``clock`` see the parts of ``trainer``'s steps."""
    with contextlib.ExitStack() as stack:

        def around(module: nn.Module, name: Callable[[Any], str]) -> None:
            # What is computed again in the backward belongs to the backward.
            def before(_: nn.Module, inputs: Any) -> None:
                clock.enter(BACKWARD if clock.in_backward and module is not trainer.ema else name(inputs))

            def after(*_: Any) -> None:
                clock.leave()

            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after, always_call=True).remove)

        around(trainer.model.encoder, _forward_of)
        around(trainer.model.projector, lambda _: HEAD)
        around(trainer.objective, lambda _: HEAD)
        # After the one that leaves the head: what follows is the backward, but for what says otherwise.
        stack.callback(trainer.objective.register_forward_hook(lambda *_: clock.base(BACKWARD)).remove)
        if trainer.ema is not None:
            around(trainer.ema, lambda _: EMA)
        _wrap(stack, trainer.optimizer, "grad_norm", clock, OPTIMISER, ends_backward=True)
        _wrap(stack, trainer.optimizer, "step", clock, OPTIMISER)
        _wrap(stack, trainer.objective, "update_", clock, HEAD)
        yield


@contextlib.contextmanager
def eager_parts(rival: EagerStep, clock: Clock) -> Iterator[None]:
    """Let ``clock`` see the parts of ``rival``'s steps."""
    with contextlib.ExitStack() as stack:
        encoder = rival.model.encoder
        stack.callback(encoder.register_forward_pre_hook(lambda _, inputs: clock.enter(_forward_of(inputs))).remove)
        stack.callback(encoder.register_forward_hook(lambda *_: clock.leave(), always_call=True).remove)
        for method, name in (("loss", HEAD), ("follow", EMA), ("backward", BACKWARD), ("update", OPTIMISER)):
            _wrap(stack, rival, method, clock, name)
        yield


def _forward_of(inputs: Any) -> str:
    return forward_part(inputs[0].shape[-1])


def _wrap(
    stack: contextlib.ExitStack, owner: Any, method: str, clock: Clock, name: str, *, ends_backward: bool = False
) -> None:
    """Time a method of one object until ``stack`` ends."""
    real = getattr(owner, method)

    def timed(*args: Any, **kwargs: Any) -> Any:
        if ends_backward:
            clock.base(OTHER)
        with clock.part(name):
            return real(*args, **kwargs)

    object.__setattr__(owner, method, timed)
    stack.callback(object.__delattr__, owner, method)


def launched(run: Callable[[], object], cuda: bool) -> int:
    """How many kernels ``run`` has a GPU execute, copies not counted; on a CPU: how many operators it dispatches."""
    if not cuda:
        with _Counter() as counter:
            run()
        count: int = counter.count
        return count
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    return len([e for e in profiled.events() or () if _on_device(e) and not e.name.startswith(NO_KERNELS)])


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def communicating(run: Callable[[], object], cuda: bool) -> tuple[float, float]:
    """Milliseconds that a step has at least one collective under way, and those of the step.

    On this rank: the time includes waiting for slower ranks, and what goes on beside it, which with gradients in
    buckets is a part of the backward; a step without communication would be shorter by less.
    """
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        whole = 1e3 * (time.perf_counter() - start)
    events = [
        (event.time_range.start, event.time_range.end)
        for event in profiled.events() or ()
        if event.name.startswith(COLLECTIVES) and _on_device(event) == cuda
    ]
    return union(events) / 1e3, whole


def union(spans: Sequence[tuple[float, float]]) -> float:
    """Length of what the spans cover."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(end - max(start, until), 0.0)
        until = max(until, end)
    return covered


def _on_device(event: Any) -> bool:
    return bool(event.device_type == DeviceType.CUDA) and not getattr(event, "is_user_annotation", False)
