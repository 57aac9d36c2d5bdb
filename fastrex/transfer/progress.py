"""How far a long piece of work is, on stderr."""

from __future__ import annotations

import sys
import time


class Progress:
    """A line whenever ``every`` seconds have passed: how many of ``total`` images are done, how fast."""

    def __init__(self, name: str, total: int, every: float) -> None:
        self.name, self.total, self.every, self.done = name, total, every, 0
        self.start = self.last = time.monotonic()

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last > self.every:
            self.last = now
            rate = self.done / (now - self.start)
            print(f"{self.name}: {self.done} of {self.total} images, {rate:.0f}/s", file=sys.stderr, flush=True)
