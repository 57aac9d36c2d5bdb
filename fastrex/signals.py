"""Requests to stop, from a scheduler, a launcher or a person. Standard library only.

SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 are only noted, from the first moment of a training on. It leaves at the end of the
running step: all ranks at the same one, found by a message that takes milliseconds, so at most two steps after the
signal. Then it saves, whatever the settings for checkpoints say, and ends as ``preempted`` (exit code 75 of a single
process). A save under way is finished first; an evaluation under way is left at its next batch and made up for on
resume; before step 1 there is nothing to save. So the grace that a job needs is two steps and one save. More of the
same signals change nothing, except a second SIGINT: whoever presses Ctrl-C again wants to leave at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# Ctrl-C reaches a rank twice: from the terminal and, milliseconds later, from its launcher.
AGAIN_S = 1.0
# How long a rank whose launcher has died may take to save and leave.
ORPHAN_S = 120.0
_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """The stop signals that have come, as a list that grows; in any thread but the main one none ever come."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    first_interrupt = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first_interrupt
        now = time.monotonic()
        if number == signal.SIGINT:
            if first_interrupt and now - first_interrupt > AGAIN_S:
                raise KeyboardInterrupt
            first_interrupt = first_interrupt or now
            os.write(2, b"fastrex: stops after this step and saves; press Ctrl-C again to interrupt at once\n")
        asked.append(number)

    before = {number: signal.signal(number, note) for number in STOP}
    try:
        with _launcher_watched(asked):
            yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _launcher_watched(asked: list[int]) -> Iterator[None]:
    """Under torchrun: when it dies without a word to its ranks (a kill, SIGUSR1, which it does not handle), each is
    asked to stop, and is ended hard if it has not left ``ORPHAN_S`` later. Nobody else would end it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    launcher, done = os.getppid(), threading.Event()
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)

    def look() -> None:
        # Also sees a launcher that died right before the kernel was asked to tell.
        while os.getppid() == launcher:
            if done.wait(1.0):
                return
        asked.append(signal.SIGTERM)
        if not done.wait(ORPHAN_S):
            os.write(2, b"fastrex: error: train: the launcher is gone and this rank could not stop; it is ended\n")
            os._exit(1)

    thread = threading.Thread(target=look, name="fastrex-launcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)
