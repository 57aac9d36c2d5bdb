"""What the machine is and what can be measured on it, asked in a process of its own: the command itself keeps clear of
the GPU, which a part may break."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import warnings
from importlib import metadata, util
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
PACKAGES = ("torch", "triton", "numpy", "nvidia-dali-cuda130", "liger-kernel", "cut-cross-entropy", "pytest")


def collect(device: str) -> Facts:
    """Versions, GPU, and the cases of the kernels; a part of it that fails leaves its reason."""
    facts: Facts = {"device": device, "python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
    facts["packages"] = {name: _version(name) for name in PACKAGES}
    facts["dali"] = _found("nvidia.dali")
    facts["pytest"] = _found("pytest")
    facts["pillow"] = _found("PIL")
    for part in (commit, gpu, kernels):
        try:
            facts |= part(device)
        except Exception as error:
            facts[f"no_{part.__name__}"] = f"{type(error).__name__}: {str(error)[:300]}"
        if device == "cuda" and part is gpu and not facts.get("gpu"):
            break  # nothing else is going to be asked
    return facts


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _found(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ImportError:
        return False


def commit(device: str) -> Facts:
    """Of fastrex."""
    from fastrex import rundir

    return {"commit": rundir.commit(), "fastrex": rundir.version()}


def gpu(device: str) -> Facts:
    """The first GPU."""
    import torch

    if device != "cuda" or not torch.cuda.is_available():
        return {"gpu": None}
    about = torch.cuda.get_device_properties(0)
    return {
        "gpu": about.name, "capability": f"{about.major}.{about.minor}", "multiprocessors": about.multi_processor_count,
        "memory_gib": round(about.total_memory / 2**30, 1), "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "gpus": torch.cuda.device_count(),
        "driver": _smi("driver_version"), "clocks": _smi("clocks.sm,clocks.max.sm,clocks.mem,power.limit"),
    }  # fmt: skip


def _smi(query: str) -> str:
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def kernels(device: str) -> Facts:
    """``cases``: (operator, case, dtype, implementations, whether a bar is set). ``cpp``: whether the C++ operators fit
    this torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fastrex_kernels import _cpp

    from . import bars, worker
    from . import kernels as kernels_module

    wanted = kernels_module.Settings(device=device)
    judged = {(bar.op, bar.case, bar.dtype) for bar in bars.BARS if bar.device == device}
    cases = [
        (op.name, case.name, dtype)
        for op, case in kernels_module.discover(wanted)
        for dtype in wanted.dtype
        if worker.DTYPES[dtype] in op.dtypes
    ]
    work = {op: len(kernels_module.implementations(wanted, op)) for op, _, _ in cases}
    known = [(*case, work[case[0]], case in judged) for case in cases]
    return {"cpp": _cpp.library()[0] is not None, "cases": known}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(collect(sys.argv[2])), encoding="utf-8")
