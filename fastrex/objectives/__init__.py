"""Objectives: what is minimised, and the state that it keeps. One file each, behind one interface."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..config import OBJECTIVE, Config
from ..errors import UsageError
from ..settings import build, nearest
from .base import Context, Objective
from .class_means import ClassMeans
from .cosine_softmax import CosineSoftmax
from .look import Look
from .moco import Mochi, Moco
from .ncm import Ncm
from .schane import SCHaNe
from .softmax import Softmax
from .supcon import SupCon

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OBJECTIVES: tuple[type[Objective], ...] = (CosineSoftmax, ClassMeans, Softmax, SupCon, SCHaNe, Look, Moco, Mochi, Ncm)

__all__ = ["OBJECTIVES", "Context", "Objective", "lookup", "make", "needs_labels", "option_help", "resolve"]


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


def needs_labels(config: Config) -> bool:
    """Whether the objective learns from class ids."""
    return lookup(config.objective.name).needs_labels


def make(config: Config, in_features: int, num_classes: int, group: ProcessGroup | None = None) -> Objective:
    """Build the objective that the configuration names, on the CPU, seeded by ``run.seed``, for the ranks of
    ``group``.

    Raises:
        FastrexError: it cannot be as the configuration says.
    """
    kind = lookup(config.objective.name)
    made = kind(in_features, num_classes, options_of(config), seed=config.run.seed, group=group)
    if config.augment.mixes and not made.soft_targets:
        raise UsageError(
            "train: augment.mixup and cutmix must go with an objective that takes mixed targets (softmax, "
            f"cosine_softmax without margin and not sharded), got {config.objective.name}; set both to 0"
        )
    return made
