"""How ranks that were asked to stop leave at the same place, without a collective. Standard library only."""

from __future__ import annotations

import threading


class Agreement:
    """One rank's part. All ranks pass the same boundaries (the ends of steps, the parts of an evaluation) in the same
    order, though not at the same time.

    When one of them wants to stop, all are asked how many boundaries they have passed and from then on wait in front of
    the next one. One past the highest answer is where all will stop: nobody has passed it, and everybody learns of it
    before. Ranks that wait have not passed more than that, and those behind go on until they are there, so nobody waits
    for one that waits for it. The answers come from the watch's thread: the main thread may be deep in a step.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._passed, self._last = 0, 0
        self._held = self._over = False

    def hold(self) -> int:
        """Boundaries passed so far; from now on the next one waits for :meth:`settle`."""
        with self._changed:
            self._held = True
            return self._passed

    def settle(self, last: int) -> None:
        """The boundary with this number is the last."""
        with self._changed:
            self._last = last
            self._changed.notify_all()

    def give_up(self) -> None:
        """There will be no answer."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    @property
    def near(self) -> bool:
        """Whether the next boundary is the last: what leads up to it need not be finished."""
        with self._changed:
            return 0 < self._last <= self._passed + 1

    def boundary(self) -> bool:
        """Pass a boundary; True where all ranks stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._last or self._over or not self._held)
            self._passed += 1
            return 0 < self._last <= self._passed
