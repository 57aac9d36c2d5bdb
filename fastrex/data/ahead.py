"""A generator that runs in a thread of its own, a few items ahead of its consumer."""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Generator
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")
_setting = threading.Lock()


class Ahead(Generic[Item]):
    """Run a generator in a thread, at most ``depth`` items ahead; iterate in order; its errors come out here.

    :meth:`close` stops it after the item that it is working on and leaves no thread behind.
    """

    def __init__(self, items: Generator[Item, None, None], depth: int, name: str) -> None:
        self._items, self._depth = items, depth
        self._ready: deque[Item] = deque()
        self._error: BaseException | None = None
        self._done = self._stop = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a decoder must not run while the interpreter is torn down

    def __iter__(self) -> Ahead[Item]:
        return self

    def __next__(self) -> Item:
        with self._change:
            self._change.wait_for(lambda: self._ready or self._done)
            if self._ready:
                item = self._ready.popleft()
                self._change.notify_all()
                return item
        error = self._error
        self.close()
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        with self._change:
            self._stop = True
            self._ready.clear()
            self._change.notify_all()
        self._thread.join()
        self._error = None
        atexit.unregister(self.close)

    def _work(self) -> None:
        try:
            compute_alone()
            for item in self._items:
                with self._change:
                    if self._stop:
                        break
                    self._ready.append(item)
                    self._change.notify_all()
                    self._change.wait_for(lambda: self._stop or len(self._ready) < self._depth)
                    if self._stop:
                        break
        except BaseException as error:  # whatever it is, the consumer must not wait for ever
            self._error = error
        finally:
            self._items.close()
            with self._change:
                self._done = True
                self._change.notify_all()


def compute_alone() -> None:
    """Make torch use one core in this thread and its number of cores in all others, present and future.

    A second team of OpenMP threads beside the consumer's and the decoder's waits, spinning, for a core at the end of
    every operation: on two busy cores that made augmentation ten times slower. The setting belongs to the thread that
    makes it, but also becomes the default of new threads.
    """
    with _setting:  # or the 1 of one thread is the default that the next one finds
        default = torch.get_num_threads()
        torch.set_num_threads(1)
        restore = threading.Thread(target=torch.set_num_threads, args=(default,))
        restore.start()
        restore.join()
