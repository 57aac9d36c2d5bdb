"""Choice of an implementation by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

IMPLS = ("auto", "reference", "cpp", "triton")


def resolve(op: str, impl: str, available: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Return the implementation of ``op`` that ``impl`` asks for.

    ``auto`` takes the last entry of ``available`` (they stand in order of speed); any other name runs or raises, it
    never falls back.

    Raises:
        ValueError: ``impl`` is no known name, or this op has no such implementation.
    """
    if impl not in IMPLS:
        raise ValueError(f"{op}: impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "auto":
        return list(available.values())[-1]
    if impl not in available:
        raise ValueError(f"{op}: impl must be one of auto, {', '.join(available)} for this op, got {impl!r}")
    return available[impl]
