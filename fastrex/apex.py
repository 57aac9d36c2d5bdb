"""What of NVIDIA apex is installed. Nothing here imports it before it is asked for by name.

The package of that name on the package index is something else; NVIDIA publishes apex in its container images and as
source.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

from .errors import FastrexError

IMPOSTOR = "0.9.10"  # of the Pyramid toolkit; NVIDIA's is at 0.1
WAY_OUT = (
    "use NVIDIA's PyTorch container image (NGC) or build it from https://github.com/NVIDIA/apex with "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_BNP=1 pip install --no-build-isolation ."
)


def missing() -> str:
    """Why NVIDIA apex cannot be used, or "" where it is installed."""
    try:
        version = importlib.metadata.version("apex")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if version.startswith(IMPOSTOR):
        return f"the installed apex {version} is not NVIDIA's but an authentication toolkit for Pyramid"
    try:
        if importlib.util.find_spec("apex") is None:
            return "it is not installed"
        if importlib.util.find_spec("apex.optimizers") is None:
            return "the installed apex is not NVIDIA's, it has no apex.optimizers"
    except Exception as error:  # its own imports can fail in any way
        return f"the installed apex cannot be imported ({_first_line(error)})"
    return ""


def groupbn() -> Any:
    """The class ``BatchNorm2d_NHWC`` of ``apex.contrib.groupbn``.

    Raises:
        FastrexError: it is not there; the message says why, and the way out.
    """
    return _load("apex.contrib.groupbn.batch_norm", "BatchNorm2d_NHWC", "model.bn")


def fused_sgd() -> Any:
    """The class ``FusedSGD`` of ``apex.optimizers``.

    Raises:
        FastrexError: it is not there, or apex was built without its CUDA kernels.
    """
    found = _load("apex.optimizers", "FusedSGD", "optim.impl")
    if not _load("apex.multi_tensor_apply", "multi_tensor_applier", "optim.impl").available:
        raise _error("optim.impl", "the installed one was built without APEX_CUDA_EXT=1")
    return found


def _load(module: str, name: str, setting: str) -> Any:
    reason = missing()
    if not reason:
        try:
            with redirect_stdout(io.StringIO()):  # where apex says that a part was not built
                return getattr(import_module(module), name)
        except Exception as error:
            reason = f"{module}.{name} of the installed one cannot be imported ({_first_line(error)})"
    raise _error(setting, reason)


def _error(setting: str, reason: str) -> FastrexError:
    return FastrexError(f"train: {setting}=apex needs NVIDIA apex: {reason}; {WAY_OUT}, or set {setting}=fused")


def _first_line(error: Exception) -> str:
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
