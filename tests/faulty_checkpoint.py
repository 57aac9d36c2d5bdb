"""Checkpoints in trouble, for faulty.py.

``nudge:step=S``: after step S this rank's first weight is its next floating-point neighbour, as after a flipped bit.
``blind``: this rank must not look at any checkpoint. ``full``: no disk has room; with ``until=FILE`` until that exists.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastrex import checkpoint
from fastrex import step as step_module

Words = dict[str, str]


def nudge(words: Words) -> None:
    original = step_module.Trainer.step

    def step(self: Any, number: int, *arguments: Any, **named: Any) -> Any:
        logged = original(self, number, *arguments, **named)
        if number == int(words["step"]):
            first = self.model.encoder.conv1.weight.detach()[0, 0, 0, 0]
            first.copy_(torch.nextafter(first, first + 1))
        return logged

    step_module.Trainer.step = step  # type: ignore[method-assign]


def blind(words: Words) -> None:
    def look(*arguments: Any) -> Any:
        raise AssertionError("this rank looked at a checkpoint")

    for name in ("newest_good", "load", "verify", "read_state", "save"):
        setattr(checkpoint, name, look)


def full(words: Words) -> None:
    original = checkpoint.free_bytes

    def free_bytes(path: Path) -> int:
        return original(path) if "until" in words and Path(words["until"]).exists() else 0

    checkpoint.free_bytes = free_bytes


PATCHES: dict[str, Callable[[Words], None]] = {"nudge": nudge, "blind": blind, "full": full}
