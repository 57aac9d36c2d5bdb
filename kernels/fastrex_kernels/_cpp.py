"""The C++ operators for CPU tensors: where their library is, and whether it fits this torch."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
STEM = "_C.torch-"


def library() -> tuple[Path | None, str]:
    """The library built for this torch, or None and the reason why there is none.

    Its file name carries the torch version that it was compiled against: loading it into another one would crash.
    """
    if os.environ.get("FASTREX_NO_CPP") == "1":
        return None, "FASTREX_NO_CPP=1 is set"
    version = torch.__version__.split("+")[0]
    built = sorted(FOLDER.glob(f"{STEM}*.so"))
    for path in built:
        if path.name == f"{STEM}{version}.so":
            return path, ""
    if built:
        others = ", ".join(path.name.removeprefix(STEM).removesuffix(".so") for path in built)
        return None, f"they were built for torch {others} and this is torch {version}; install fastrex again"
    return None, "they were not built; install fastrex with a C++ compiler and --no-build-isolation"


def _load() -> tuple[bool, str]:
    path, reason = library()
    if path is None:
        # Asked for by the environment is not worth a warning; anything else costs speed that nobody chose to lose.
        if os.environ.get("FASTREX_NO_CPP") != "1":
            warnings.warn(
                f"fastrex_kernels runs on CPUs without its C++ operators, slower: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
        return False, reason
    torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    return True, ""


# Known once per process, so that a traced program finds a constant.
LOADED, REASON = _load()
