"""Runs that belong together on a page of many: those that differ only in the seed at the end of their names."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .record import Record

FEW = 6  # runs that a page tells apart one by one
SEED = re.compile(r"(.*?[^\W_])[-_. ]*seed[-_= ]?\d+", re.DOTALL)


@dataclass(frozen=True)
class Group:
    """Runs under one name and one colour, ``place`` in the palette; a run that has no other like it is a group too."""

    name: str
    place: int
    records: tuple[Record, ...]


def groups(records: Sequence[Record]) -> list[Group]:
    """The runs in their order, each alone up to ``FEW`` of them."""
    found: dict[tuple[str, bool], list[Record]] = {}
    for record in records:
        seeded = SEED.fullmatch(record.name) if len(records) > FEW else None
        found.setdefault((seeded[1], True) if seeded else (record.name, False), []).append(record)
    alone = {members[0].name for members in found.values() if len(members) == 1}
    named = []
    for place, ((stem, _), members) in enumerate(found.items()):
        name = members[0].name if len(members) == 1 else f"{stem}, seeds" if stem in alone else stem
        named.append(Group(name, place, tuple(members)))
    return named


def places(records: Sequence[Record]) -> list[int]:
    """The colour of each run in every chart: its group's."""
    place = {member.name: group.place for group in groups(records) for member in group.records}
    return [place[record.name] for record in records]


def many(records: Sequence[Record]) -> bool:
    """Whether any runs are shown as a group."""
    return len(groups(records)) < len(records)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample; 0 of one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
