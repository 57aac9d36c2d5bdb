"""How long nothing may happen before a rank is taken for hung. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

from .verdict import Place, Verdict

# What is done for the first time compiles, tunes and connects.
FIRST_S = 600.0
# On a GPU also the steps up to the capture of the graph, which distributed training puts off to the eleventh.
FIRST_STEPS_CUDA = 16
# A thread that looks several times a second and has not for so long was stopped, with its process or its machine.
FROZEN_S = 5.0
# A rank that says nothing has this much longer than one that says that it does not move.
SILENT_S = 10.0


class Clock:
    """One rank's view of the others: when any of them moved last, when each was heard last.

    Time in which this process itself was stopped does not count: the others may have been as well.

    Args:
        lost_s: silence of the network that is put up with.
    """

    def __init__(self, lost_s: float) -> None:
        self.first_steps = 1
        self._lost_s = lost_s
        self._limit_s, self._longest_s, self._first_step = 0.0, 0.0, 0
        self._doing, self._known, self._new = "", set[str](), True
        self._looked = self._moved = time.monotonic()
        self._seen: Mapping[int, Place] = {}
        self._heard: dict[int, float] = {}

    def guard(self, stall_s: float, first_step: int) -> None:
        """0: only silence counts from now on."""
        self._moved = time.monotonic()
        self._limit_s, self._first_step = stall_s, first_step
        self._longest_s = stall_s or self._longest_s

    def doing(self, what: str) -> None:
        """What this rank does now."""
        if what != self._doing:
            self._doing, self._new = what, what not in self._known
            self._known.add(what)

    def heard(self, rank: int) -> None:
        """A sign of life."""
        self._heard[rank] = time.monotonic()

    def looked(self, now: float) -> None:
        """Called several times a second."""
        if now - self._looked > FROZEN_S:
            self._moved = now
            self._heard = dict.fromkeys(self._heard, now)
        self._looked = now

    def judge(
        self, now: float, rank: int, places: Mapping[int, Place], done: Collection[int], command: str, rest: str
    ) -> Verdict | None:
        """Who has hung, if anybody. Who moves, only rank 0 knows; of it, the others know whether it speaks at all.

        Args:
            places: of all ranks that are not done, on ``rank`` 0; elsewhere those known. command, rest: the message
                around it.
        """
        own = places[rank]
        if rank == 0:
            if places != self._seen:
                self._seen, self._moved = dict(places), now
            limit = self._limit(own.step)
            if self._limit_s and now - self._moved > limit:
                return stall(places, f"{command}: no rank made progress for {limit:g} s; ", rest)
        limit = self._limit(own.step) if self._limit_s else max(self._longest_s, FIRST_S)
        limit = max(limit, self._lost_s) + SILENT_S
        for other, since in self._heard.items():
            if other not in done and now - since > limit:
                place = places.get(other, Place())
                text = f"{command}: rank {other} has given no sign of life for {limit:g} s {place}{rest}"
                return Verdict(text, other, place.step, gone=True, stalled=True)
        return None

    def _limit(self, step: int) -> float:
        first = self._new or step < self._first_step + self.first_steps
        return max(self._limit_s, FIRST_S) if first else self._limit_s


def stall(places: Mapping[int, Place], what: str, rest: str) -> Verdict:
    """Who is furthest behind: that is what the others wait for. ``what`` and ``rest``: the message around it."""
    order = {rank: (place.ticks, place.collectives) for rank, place in places.items()}
    behind = [rank for rank in sorted(order) if order[rank] == min(order.values())]
    place = places[behind[0]]
    if len(behind) == len(places):
        return Verdict(f"{what}all ranks wait for one another {place}{rest}", -1, place.step, stalled=True)
    names = ", ".join(f"rank {rank}" for rank in behind[:4]) + (", ..." if len(behind) > 4 else "")
    text = f"{what}{names} {'hangs' if len(behind) == 1 else 'hang'} {place} and the others wait{rest}"
    return Verdict(text, behind[0] if len(behind) == 1 else -1, place.step, stalled=True)
