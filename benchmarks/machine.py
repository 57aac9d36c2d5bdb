"""The machine under the benchmark: what it is, what it can do at best, and how much memory a process has taken."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
LARGEST_COPY = 256 * MIB


def facts(device: str, allocator: str) -> dict[str, Any]:
    """Versions and hardware, for the record's ``versions``."""
    known: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "allocator": allocator}
    for name in ("triton", "liger-kernel", "cut-cross-entropy", "pytorch-metric-learning"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            known[name] = metadata.version(name)
    if device == "cuda":
        known |= {"cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name(), "clocks": _clocks()}
    else:
        known |= {"cpu": _cpu_name(), "capability": torch.backends.cpu.get_cpu_capability()}
    return known


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _clocks() -> str:
    """The GPU's clocks and their limits, for the reader: figures of a throttled card are no figures."""
    query = "clocks.sm,clocks.max.sm,clocks.mem,clocks_event_reasons.active"
    try:
        return subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _best(run: Callable[[], Any], device: str, seconds: float = 0.15) -> float:
    """Seconds of the fastest of several runs: what the machine can do, not what it usually does."""
    best, start = float("inf"), time.perf_counter()
    run()
    while time.perf_counter() - start < seconds or best == float("inf"):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best


def bandwidth(working_set: int, device: str) -> float:
    """Bytes per second, read and written, over ``working_set`` bytes (at most 256 MiB): of a copy, or of an update in
    place where that is faster (a CPU reads what a copy is going to overwrite).

    Of that size, because a call whose tensors fit into the caches is measured against the caches.
    """
    # Powers of two, so that cases of a similar size share a measurement.
    half = 1 << max(min(working_set, LARGEST_COPY).bit_length() - 2, 14)
    return _bandwidth(LARGEST_COPY // 2 if device == "cuda" else half, device)


@functools.cache
def _bandwidth(half: int, device: str) -> float:
    both = torch.ones(half // 2, device=device)
    source, target = both.chunk(2)
    return 2 * half / min(_best(lambda: target.copy_(source), device), _best(lambda: both.neg_(), device) / 2)


@functools.cache
def matmul_peak(dtype: torch.dtype, device: str) -> float:
    """Floating point operations per second of a large matrix product in ``dtype``, or in float32 where that is faster
    (a CPU without instructions for ``dtype``)."""
    size = 8192 if device == "cuda" else 512
    peak = 0.0
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        duration = _best(functools.partial(torch.mm, a, b), device)
        peak = max(peak, 2 * size**3 / duration)
        if device == "cuda" or size >= 2048 or duration > 0.02:
            break
        size *= 2
    return peak if dtype == torch.float32 or device == "cuda" else max(peak, matmul_peak(torch.float32, device))


def forget() -> None:
    """Measure the bandwidth and the peak anew when they are next asked for."""
    _bandwidth.cache_clear()
    matmul_peak.cache_clear()


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, such as VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def release() -> None:
    """Give freed memory back to the kernel, also what a pooled allocator keeps."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def reset_peak() -> bool:
    """Let VmHWM start again from VmRSS; False where the kernel does not permit it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def free_bytes() -> int:
    """Memory that this process may still take: what the machine has, and what its control group leaves."""
    found = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        found.append(limit - int((group / "memory.current").read_text(encoding="ascii")))
    return min(found, default=2**62)


def limit_memory(share: float = 0.92) -> int:
    """Make allocations beyond the free memory fail, as an exception, before the kernel kills a process; the limit."""
    limit = int(free_bytes() * share)
    with contextlib.suppress(OSError, ValueError):
        used = status_bytes("VmData")
        resource.setrlimit(resource.RLIMIT_DATA, (used + limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    return limit


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and ("allocate memory" in str(error) or "bad alloc" in str(error))


def compiler() -> str | None:
    """The C++ compiler that torch.compile calls on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++"))


def installed(module: str) -> bool:
    """Whether a package can be imported."""
    return util.find_spec(module) is not None
