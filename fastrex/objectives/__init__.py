"""Objectives: what is minimised, and the state that it keeps. One file each, behind one interface."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..config import OBJECTIVE, Config
from ..errors import UsageError
from ..settings import build, nearest
from .base import Objective
from .class_means import ClassMeans
from .cosine_softmax import CosineSoftmax
from .softmax import Softmax

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OBJECTIVES: tuple[type[Objective], ...] = (CosineSoftmax, ClassMeans, Softmax)

__all__ = ["OBJECTIVES", "Objective", "lookup", "make", "option_help", "resolve"]


def lookup(name: str) -> type[Objective]:
    """The objective called ``name``; an unknown one is an error that names the nearest."""
    table = {kind.name: kind for kind in OBJECTIVES}
    if name not in table:
        known = list(table)
        raise UsageError(
            f"config: objective.name must be one of {', '.join(known)}, got {name!r}{nearest(name, known)}"
        )
    return table[name]


def resolve(config: Config) -> Config:
    """Fill in and check the objective's options, so that the written configuration names every one."""
    options = options_of(config)
    named = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    part = dataclasses.replace(config.objective, options=named)
    return dataclasses.replace(config, objective=part)


def options_of(config: Config) -> Any:
    """The objective's checked ``Options``."""
    kind = lookup(config.objective.name)
    return build(kind.Options, config.objective.options, OBJECTIVE)


def option_help(config: Config) -> dict[str, str]:
    """The line of help of each of the objective's options."""
    return {f.name: f.metadata["help"] for f in dataclasses.fields(lookup(config.objective.name).Options)}


def make(config: Config, in_features: int, num_classes: int, group: ProcessGroup | None = None) -> Objective:
    """Build the objective that the configuration names, on the CPU, seeded by ``run.seed``, for the ranks of
    ``group``."""
    kind = lookup(config.objective.name)
    return kind(in_features, num_classes, options_of(config), seed=config.run.seed, group=group)
