"""What the kernels share: arithmetic of tiles and programs, and the record of a kernel that is compiled ahead of time
in the tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


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


def persistent_programs(share: int, scratch: int, per_sm: int, device: torch.device) -> int:
    """How many programs, with ``share`` bytes of scratch memory each, of which ``scratch`` bytes may be taken in all: a
    whole number per SM up to ``per_sm``, where that many fit."""
    fit = max(1, scratch // share)
    if device.type != "cuda":
        return min(fit, per_sm)  # Triton's interpreter runs one after another
    units = torch.cuda.get_device_properties(device).multi_processor_count
    return fit if fit < units else units * min(per_sm, fit // units)
