"""What other ranks send is data of the wrong type until it was looked at: all of these raise ValueError. Standard
library only."""

from __future__ import annotations

from collections.abc import Mapping

from .verdict import Place, Verdict


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
    state = message.get("state")
    return state if isinstance(state, str) and state in ("diverged", "preempted") else "failed"


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
