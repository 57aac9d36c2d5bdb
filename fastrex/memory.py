"""Allocation of CPU memory."""

from __future__ import annotations

import ctypes

# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD = 256 * 2**20


def pool() -> bool:
    """Keep freed memory in the process instead of giving it back to the kernel; True where the C library can.

    By default glibc maps every large tensor afresh, and the page faults of writing to it for the first time cost more
    than many operators do: a training step on a CPU is about 1.5 times as fast with pooling.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all(
        mallopt(name, value) == 1
        for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, TOP_PAD))
    )
