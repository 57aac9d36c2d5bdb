"""What the watch knows of a rank and what it concludes, as words and as messages. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .errors import FastrexError


class Place(NamedTuple):
    """Where a rank is: progress counted, steps done, what it is doing, collectives issued (-1: not known)."""

    ticks: int = 0
    step: int = 0
    doing: str = "starting"
    collectives: int = -1

    def __str__(self) -> str:
        return f"at step {self.step} ({self.doing})"


@dataclass(frozen=True)
class Verdict:
    """Why the job ends. ``rank``: whose fault, -1 if none can be named; ``gone``: that rank cannot speak for itself;
    ``stalled``: nobody is gone, but nothing moves."""

    text: str
    rank: int
    step: int
    state: str = "failed"
    gone: bool = False
    stalled: bool = False


class RankLost(FastrexError):
    """The job has ended because of a verdict."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.text)
        self.verdict = verdict


class Stopped(Exception):
    """All ranks have agreed to stop in the middle of something that can be left."""


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


def first_line(error: BaseException) -> str:
    """An error in one line of bounded length, with its kind unless it explains itself."""
    text = (str(error).strip().splitlines() or ["no message"])[0][:1000]
    return text if isinstance(error, FastrexError) else f"{type(error).__name__}: {text}"


# What arrives over the network is data of the wrong type until it was looked at; all of these raise ValueError.


def read_place(fact: object) -> Place:
    """A place that a rank has sent."""
    if not isinstance(fact, list) or len(fact) != 4:
        raise ValueError("no place")
    return Place(whole(fact[0]), whole(fact[1]), words(fact[2])[:80], whole(fact[3]))


def read_verdict(fact: object) -> Verdict:
    """A verdict that rank 0 has sent."""
    if not isinstance(fact, dict):
        raise ValueError("no verdict")
    flags = {name: fact.get(name) is True for name in ("gone", "stalled")}
    return Verdict(words(fact.get("text")), whole(fact.get("rank")), whole(fact.get("step")), outcome(fact), **flags)


def outcome(message: Mapping[str, object]) -> str:
    """What a rank's error makes of the run."""
    return "diverged" if message.get("state") == "diverged" else "failed"


def whole(fact: object) -> int:
    """A whole number."""
    if type(fact) is not int:
        raise ValueError("no whole number")
    return fact


def words(fact: object) -> str:
    """Text for a terminal: nothing in it moves the cursor."""
    if not isinstance(fact, str):
        raise ValueError("no text")
    return "".join(c if c.isprintable() else " " for c in fact)
