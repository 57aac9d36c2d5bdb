"""What an experiment of many small trainings is: arms that differ in a few settings, sizes, comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """One configuration: what a table calls it, the settings in which it differs from the recipe, its colour.

    Attributes:
        share: of the experiment's epochs; one that trains on is left out of the table.
        start: the arm whose encoder of the same seed this one trains on from, for the epochs that are left of it: both
            together have those of any other arm.
    """

    name: str
    title: str
    settings: tuple[str, ...]
    colour: str = "#6e7781"
    share: float = 1.0
    start: str = ""


@dataclass(frozen=True)
class Size:
    """What a preset trains: images per class, epochs, width of the network, images per class for the probes."""

    name: str
    per_class: int
    epochs: int
    width: int
    probe_per_class: int
    batch: int


SIZES = {
    # A training in one to three minutes on a core of a laptop.
    "laptop": Size("laptop", per_class=2000, epochs=5, width=16, probe_per_class=500, batch=128),
    "quick": Size("quick", per_class=32, epochs=2, width=8, probe_per_class=16, batch=32),
    "gpu": Size("gpu", per_class=5000, epochs=100, width=64, probe_per_class=5000, batch=256),
}


@dataclass(frozen=True)
class Experiment:
    """Arms of one recipe and the comparisons that are made of them.

    Attributes:
        steps: (what the one has and the other has not, the one, the other): arms by name, seeds pair by pair.
        notes: what a reader must know to judge the table.
        joined: arms that a line in the chart joins.
    """

    name: str
    title: str
    help: str
    recipe: str
    arms: tuple[Arm, ...]
    steps: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]
    joined: tuple[str, ...] = ()

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def epochs(self, arm: Arm, total: int) -> tuple[int, ...]:
        """Epochs of each stage of ``arm``, its own the last, where an arm of one stage has ``total``."""
        if not arm.start:
            return (max(1, round(arm.share * total)),)
        before = self.epochs(self.arm(arm.start), total)
        return (*before, total - sum(before))

    def shown(self, names: Sequence[str] = ()) -> list[Arm]:
        """The arms of the table, or those of them that are named."""
        return [arm for arm in self.arms if arm.share == 1 and (not names or arm.name in names)]
