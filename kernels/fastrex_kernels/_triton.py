"""What the kernels share: tile arithmetic, and the record of a kernel that is compiled ahead of time in the tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Compile:
    """One specialisation of a kernel as a user's GPU would compile it, and its budget.

    The tests compile it for sm_80, sm_90 and sm_100 without a GPU: a spill or too much shared memory shows there.

    Attributes:
        kernel: the ``@triton.jit`` function. signature: argument -> Triton type ("*bf16", "i32", "fp32").
        constants: values of the constexpr arguments.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int = 255
    max_spill_bytes: int = 0
    max_shared_bytes: int = 99 * 1024


def cdiv(a: int, b: int) -> int:
    """Ceiling of ``a / b``."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()
