"""What the watch knows of a rank and what it concludes. Standard library only."""

from __future__ import annotations

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


class Interrupted(BaseException):
    """A stop signal, before there was anything to save."""


def failure(command: str, rank: int, place: Place, text: str, state: str) -> Verdict:
    """What a rank's error ends the job with."""
    how = "stopped" if state == "preempted" else "failed"
    return Verdict(f"{command}: rank {rank} {how} {place}: {text}", rank, place.step, state)


def first_line(error: BaseException) -> str:
    """An error in one line of bounded length, with its kind unless it explains itself."""
    text = (str(error).strip().splitlines() or ["no message"])[0][:1000]
    return text if isinstance(error, FastrexError | Interrupted) else f"{type(error).__name__}: {text}"
