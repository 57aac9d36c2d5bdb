"""When the step becomes a CUDA graph, and what becomes of the steps before, of the graph, and of one that fails.

``torch.cuda`` is pretended here; what a real one does is in test_gpu.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import SETTINGS
from torch import Tensor

from fastrex import config as c
from fastrex import step as step_module
from fastrex.data.loader import Batch
from fastrex.distributed import World
from fastrex.errors import FastrexError
from fastrex.graph import Inputs, StepGraph


class Pretended:
    """``torch.cuda`` as far as :class:`StepGraph` needs it: recording keeps the function, replaying calls it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: Callable[[], None]) -> None:
        self.events: list[str] = []
        owner = self

        class Stream:
            def __init__(self, *_: Any) -> None: ...
            def wait_stream(self, other: Any) -> None: ...

        class Graph:
            def replay(self) -> None:
                owner.events.append("replay")
                step()

        @contextlib.contextmanager
        def graph(*_: Any, **__: Any) -> Iterator[None]:
            owner.events.append("record")
            yield

        @contextlib.contextmanager
        def stream(_: Any) -> Iterator[None]:
            yield

        nothing = lambda *_: None  # noqa: E731
        for name, value in {
            "Stream": Stream, "CUDAGraph": Graph, "graph": graph, "stream": stream, "synchronize": nothing,
            "empty_cache": nothing, "current_stream": Stream, "graph_pool_handle": nothing, "current_device": lambda: 0,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)


def batch_of(value: float, size: int = 2) -> Batch:
    crops = (torch.full((size, 3, 4, 4), value).contiguous(memory_format=torch.channels_last),)
    target = torch.full((size,), int(value))
    return Batch(0, 0, 0, crops, target, torch.arange(size), None, None, True)  # type: ignore[arg-type]


def test_the_graph_warms_up_records_once_and_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Inputs] = []
    total = torch.zeros(())

    def step(inputs: Inputs) -> dict[str, Tensor]:
        seen.append(inputs)
        return {"loss": total}

    fake = Pretended(monkeypatch, lambda: total.add_(graph.inputs[0][0][0].mean()))
    graph = StepGraph(step, torch.device("cpu"), torch.cuda.Stream(), warm_up=2)
    for value in range(1, 7):
        assert graph([batch_of(float(value))])["loss"] is total
        # It always works on its own memory, with this step's crops and targets.
        assert float(graph.inputs[0][0][0].mean()) == value
        assert graph.inputs[0][1].tolist() == [value] * 2
        assert graph.inputs[0][0][0].is_contiguous(memory_format=torch.channels_last)
    assert fake.events == ["record", *["replay"] * 4]
    assert len(seen) == 3  # two steps as they are, one recorded
    assert all(inputs is graph.inputs for inputs in seen)
    assert float(total) == 3 + 4 + 5 + 6
    assert graph.captured
    assert graph.reason == ""
    with pytest.raises(
        ValueError, match=r"crops and targets must keep their shapes, \[2, 3, 4, 4\].*got \[3, 3, 4, 4\]"
    ):
        graph([batch_of(1.0, size=3)])
    with pytest.raises(ValueError, match="micros must be 1 batches as in the first step, got 2"):
        graph([batch_of(1.0)] * 2)


def test_an_error_without_words_ends_the_recording_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(inputs: Inputs) -> dict[str, Tensor]:
        if fake.events == ["record"] and graph.reason == "":
            raise AssertionError
        return {"loss": torch.ones(())}

    fake = Pretended(monkeypatch, lambda: None)
    graph = StepGraph(step, torch.device("cpu"), torch.cuda.Stream(), warm_up=0)
    for value in (1.0, 2.0):
        graph([batch_of(value)])
    assert (graph.captured, graph.reason, fake.events) == (False, "AssertionError", ["record"])


@pytest.mark.parametrize("must", [False, True])
def test_a_step_that_cannot_be_recorded(monkeypatch: pytest.MonkeyPatch, must: bool) -> None:
    calls = []

    def step(inputs: Inputs) -> dict[str, Tensor]:
        calls.append(inputs)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return {"loss": torch.ones(())}

    Pretended(monkeypatch, lambda: None)
    graph = StepGraph(step, torch.device("cpu"), torch.cuda.Stream(), warm_up=1, must=must)
    graph([batch_of(1.0)])
    if must:
        with pytest.raises(FastrexError, match=r"run\.cuda_graph=on.*not permitted when stream is capturing; use"):
            graph([batch_of(2.0)])
        return
    assert float(graph([batch_of(2.0)])["loss"]) == 1
    assert (graph.captured, graph.reason) == (False, "operation not permitted when stream is capturing")
    graph([batch_of(3.0)])
    assert len(calls) == 4  # nothing is lost: the step that failed to record was run, and the next ones are


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("run.cuda_graph=on",), "this run is on the CPU"),
        (("run.cuda_graph=on", "run.compile=false"), "use auto or off"),
    ],
)
def test_a_graph_asked_for_where_there_is_none(words: tuple[str, ...], why: str) -> None:
    with pytest.raises(FastrexError, match=why):
        step_module.Trainer(c.load("demo", [*SETTINGS, *words]), 10, World(0, 1, 0, 1, torch.device("cpu")))


@pytest.mark.parametrize(
    ("words", "ranks", "own", "recorded", "line"),
    [
        ((), 1, True, True, "recorded after the first steps"),
        (("run.cuda_graph=off",), 1, True, False, ""),
        ((), 8, True, False, "off, over 8 ranks it is made on request (run.cuda_graph=on)"),
        (("run.cuda_graph=on",), 8, True, True, "recorded after the first steps"),
        (("optim.impl=apex",), 1, True, False, "off, optim.impl=apex takes the learning rate from the host"),
        (("model.recompute=passes",), 1, True, True, "recorded after the first steps"),
        (("model.recompute=passes",), 1, False, False, "off, model.recompute=passes repeats the random numbers"),
    ],
)
def test_which_steps_are_recorded(words: tuple[str, ...], ranks: int, own: bool, recorded: bool, line: str) -> None:
    done, lines = step_module._recorded(c.load("demo", words), torch.device("cuda"), ranks, own)
    assert done == recorded
    assert [text.startswith(f"CUDA graph: {line}") for text in lines] == [True] * bool(line)
