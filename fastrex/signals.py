"""Requests to stop, from a scheduler, a launcher or a person. Standard library only.

SIGTERM, SIGINT, SIGHUP (unless nohup has it ignored), SIGUSR1 and SIGUSR2 end a training at once as long as it has
nothing to save, which is until it opens its run directory. From then on they are only noted. It leaves at the end of
the running step: all ranks at the same one, found by a message that takes milliseconds, so at most two steps after the
signal. Then it saves, whatever the settings for checkpoints say, and ends as ``preempted`` (exit code 75 of a single
process). A save under way is finished first; an evaluation under way is left at its next batch and made up for on
resume. So the grace that a job needs is two steps and one save. More of the same signals change nothing, except a
second SIGINT: whoever presses Ctrl-C again wants to leave at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType

from . import ending
from .verdict import Interrupted

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Ctrl-C reaches a rank twice: from the terminal and, milliseconds later, from its launcher.
AGAIN_S = 1.0
# How long a rank whose launcher has died may take to save and leave.
ORPHAN_S = 120.0
# How long the main thread may take to come back from a call of the system or of a library, before it is at a save.
STUCK_S = 3.0
_PR_SET_PDEATHSIG = 1


class Asked(list[int]):
    """The stop signals that have come. ``at_once``: they are not waited with, there is nothing to save yet; the owner
    sets it to False as soon as there is."""

    def __init__(self, at_once: bool) -> None:
        super().__init__()
        self.at_once = at_once


@contextlib.contextmanager
def noted(at_once: bool = False) -> Iterator[Asked]:
    """The stop signals that have come, as a list that grows; in any thread but the main one none ever come.

    Raises:
        Interrupted: one has come while ``at_once`` held.
    """
    asked = Asked(at_once)
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
            if not asked.at_once:
                ending.tell("fastrex: stops after this step and saves; press Ctrl-C again to interrupt at once\n")
        asked.append(number)
        if asked.at_once:
            asked.at_once = False
            raise Interrupted(_early(number))

    numbers = [n for n in STOP if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        with _never_stuck(asked), _launcher_watched(asked):
            yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _early(number: int) -> str:
    return f"stopped by {signal.Signals(number).name} before there was anything to save; start it again"


@contextlib.contextmanager
def _never_stuck(asked: Asked) -> Iterator[None]:
    """Python's handlers wait for the main thread, which may wait in a library for ranks or a disk: for minutes, while
    they start. This thread learns of a signal from the kernel, and ends a process that has nothing to save."""
    if not asked.at_once:
        yield
        return
    hearing, ringing = socket.socketpair()
    ringing.setblocking(False)

    def listen() -> None:
        with hearing:
            while numbers := hearing.recv(64):
                if found := [number for number in numbers if number in STOP]:
                    time.sleep(STUCK_S)
                    if asked.at_once:
                        ending.end(f"fastrex: train: {_early(found[0])}\n", ending.PREEMPTED)

    thread = threading.Thread(target=listen, name="fastrex-signals", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(ringing.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        ringing.close()
        # It may be waiting for a main thread that is here meanwhile.
        asked.at_once = False


@contextlib.contextmanager
def _launcher_watched(asked: Asked) -> Iterator[None]:
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
            ending.end("fastrex: error: train: the launcher is gone and this rank could not stop; it is ended\n")

    thread = threading.Thread(target=look, name="fastrex-launcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)
