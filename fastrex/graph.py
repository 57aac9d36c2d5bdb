"""The training step as one CUDA graph: recorded once, then launched with one call.

A ResNet-50 step is more than a thousand kernels. Launched one by one they keep the host busy for milliseconds, which
shows as soon as the GPU is done earlier; a graph's launch costs next to nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .data.loader import Batch
from .errors import FastrexError

WARM_UP = 3
# DistributedDataParallel arranges its buckets in the first steps and takes eleven before it can be recorded.
WARM_UP_RANKS = 11

# Of each micro-batch: crops, target, and which images they are.
Inputs = list[tuple[tuple[Tensor, ...], Tensor, Tensor]]
Step = Callable[[Inputs], dict[str, Tensor]]


def inputs(micros: Sequence[Batch]) -> Inputs:
    """What of the batches a step reads on the device."""
    return [(batch.crops, batch.target, batch.images) for batch in micros]


class StepGraph:
    """Runs ``step`` on micro-batches: at first as it is, later as the graph recorded from it.

    The first steps are steps like all others, so nothing is lost or repeated: recording executes nothing. Everything
    that ``step`` reads or writes must keep its address (weights, gradients, state); the batches are copied to where the
    graph finds them, so that the loader may have its memory back.

    Args:
        stream: that the recording is made on; the steps before it run there too, since what kernels and autograd keep
            per stream must exist by then. must: whether a step that cannot be recorded is an error.

    Attributes:
        captured: whether steps are replayed by now. reason: why not, once that is known.
    """

    def __init__(
        self, step: Step, device: torch.device, stream: Any, *, warm_up: int = WARM_UP, must: bool = False
    ) -> None:
        self.step, self.device, self.stream, self.left, self.must = step, device, stream, warm_up, must
        self.captured, self.reason = False, ""
        self.graph: Any = None
        self.inputs: Inputs = []
        self.outputs: dict[str, Tensor] = {}

    def __call__(self, micros: Sequence[Batch]) -> dict[str, Tensor]:
        given = inputs(micros)
        if not self.inputs:
            self.inputs = [
                (tuple(map(torch.empty_like, crops)), torch.empty_like(target), torch.empty_like(images))
                for crops, target, images in given
            ]
        self._take(given)
        current = torch.cuda.current_stream(self.device)
        if self.captured:
            self.graph.replay()
            return self.outputs
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            if self.left or self.reason:
                self.left = max(0, self.left - 1)
                outputs = self.step(self.inputs)
            else:
                outputs = self._capture()
        current.wait_stream(self.stream)
        return outputs

    def _capture(self) -> dict[str, Tensor]:
        """Record the step and run it once; run it as it is where it cannot be recorded."""
        torch.cuda.synchronize(self.device)
        # The graph has memory of its own: what the first steps used is free for it.
        torch.cuda.empty_cache()
        self.graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        # Not only what CUDA forbids ends a recording, so any error does; run as it is, the step raises it again.
        error = self._record(pool)
        if error is None:
            self.captured = True
            self.graph.replay()
            return self.outputs
        self.reason = str(error).strip().partition("\n")[0] or type(error).__name__
        self.graph, self.outputs = None, {}
        _abandon(self.device, pool)
        if self.must:
            raise FastrexError(
                f"train: run.cuda_graph=on must be able to record the step, it cannot be: {self.reason}; "
                "use run.cuda_graph=off"
            ) from error
        del error  # with its traceback, which holds the activations of the recording
        return self.step(self.inputs)

    def _record(self, pool: Any) -> Exception | None:
        """What ended the recording, if something did."""
        first: Exception | None = None
        try:
            # Only this thread's calls count: the loader goes on in its own.
            with torch.cuda.graph(self.graph, pool, self.stream, capture_error_mode="thread_local"):
                try:
                    self.outputs = self.step(self.inputs)
                except Exception as error:
                    first = error
                    raise
        except Exception as error:
            # Ending a recording that went wrong raises an error of its own, which tells less.
            return first or error
        return None

    def _take(self, given: Inputs) -> None:
        """Copy the batches to where the step reads them."""
        if len(given) != len(self.inputs):
            raise ValueError(
                f"StepGraph: micros must be {len(self.inputs)} batches as in the first step, got {len(given)}"
            )
        for (crops, *rest), (own_crops, *own_rest) in zip(given, self.inputs, strict=True):
            for own, new in zip((*own_crops, *own_rest), (*crops, *rest), strict=True):
                if own.shape != new.shape:
                    shapes = f"{list(own.shape)} as in the first step, got {list(new.shape)}"
                    raise ValueError(f"StepGraph: crops and targets must keep their shapes, {shapes}")
                own.copy_(new, non_blocking=True)


def _abandon(device: torch.device, pool: Any) -> None:
    """After a recording that failed, let allocator and generator know that it is over: some versions of torch do not,
    and then never reuse memory that streams have shared, nor draw a random number."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with contextlib.suppress(AttributeError, RuntimeError):
        torch._C._cuda_endAllocateToPool(index, pool)
    with contextlib.suppress(AttributeError, RuntimeError, IndexError):
        fresh = torch.Generator(device)
        torch.cuda.default_generators[index].graphsafe_set_state(fresh.graphsafe_get_state())
