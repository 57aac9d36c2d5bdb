"""Accidents for ``faulty.py``: stop signals at the worst moments."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastrex import checkpoint, evaluate
from fastrex.data import dataset

Words = dict[str, str]


def _send(words: Words) -> None:
    os.kill(os.getpid(), getattr(signal, words["signal"]))


def signal_at_start(words: Words) -> None:
    """While the images are looked for: before the run directory exists."""
    original = dataset.open_or_build

    def open_or_build(*arguments: Any, **named: Any) -> Any:
        _send(words)
        return original(*arguments, **named)

    dataset.open_or_build = open_or_build


def signal_in_save(words: Words) -> None:
    """Between the files of the first checkpoint, which takes ``seconds`` longer."""
    original, sent = checkpoint._seal, list[bool]()

    def seal(path: Path) -> dict[str, Any]:
        if not sent:
            sent.append(True)
            _send(words)
            time.sleep(float(words["seconds"]))
        return original(path)

    checkpoint._seal = seal


def signal_in_evaluation(words: Words) -> None:
    """After its first batch; every further one takes ``seconds``, and all say so."""
    original = evaluate.EvalLoader.__iter__

    def batches(self: Any) -> Iterator[Any]:
        for number, batch in enumerate(original(self)):
            print(f"evaluation batch {number}", file=sys.stderr, flush=True)
            if number == 0:
                _send(words)
            time.sleep(float(words["seconds"]))
            yield batch

    evaluate.EvalLoader.__iter__ = batches  # type: ignore[method-assign]


PATCHES: dict[str, Callable[[Words], None]] = {
    "signal-at-start": signal_at_start,
    "signal-in-save": signal_in_save,
    "signal-in-evaluation": signal_in_evaluation,
}
