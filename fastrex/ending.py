"""Last words, and the end of a process that cannot leave by itself. Whoever reads its output may be gone, or may have
stopped reading: nothing here fails or waits for that. Standard library only."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
from collections.abc import Callable
from typing import NoReturn

PREEMPTED = 75
# How long a reader may take for what is said last.
TELL_S = 1.0


def tell(text: str) -> None:
    """To stderr, past Python's buffers."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode("utf-8", "replace"))


def aside(work: Callable[[], object], patience_s: float) -> None:
    """Let a thread of its own do what may hang in the system for ever, and wait no longer for it than that. An error is
    only said."""

    def run() -> None:
        try:
            work()
        except Exception as error:
            tell(f"fastrex: {type(error).__name__}: {error}\n")

    thread = threading.Thread(target=run, name="fastrex-aside", daemon=True)
    with contextlib.suppress(RuntimeError):  # no more threads are admitted
        thread.start()
        thread.join(patience_s)


def stacks(title: str) -> None:
    """What all threads are doing, to stderr."""
    with contextlib.suppress(OSError):
        # By way of memory: faulthandler holds the interpreter while it writes, so a full pipe would stop all threads.
        with open(os.memfd_create("stacks"), "r+b", buffering=0) as box:
            faulthandler.dump_traceback(file=box.fileno(), all_threads=True)
            box.seek(0)
            text = box.read().decode("utf-8", "replace")
        aside(lambda: tell(title + text), TELL_S)


def end(text: str, code: int = 1) -> NoReturn:
    """End this process now, whatever its threads are in."""
    try:
        aside(lambda: tell(text), TELL_S)
    finally:
        os._exit(code)
