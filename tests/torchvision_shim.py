"""Import the real torchvision and timm, also on a torch build that torchvision's compiled operators do not fit.

There torchvision's import fails on ``torchvision::nms`` and ``torchvision::qnms``, whose schemas its C++ library would
have defined; with the schemas defined here, its Python code and all its models work.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # the schemas live as long as this object


def import_torchvision() -> ModuleType:
    """The torchvision package, or a skip that names the reason."""
    way_out = "pip install --no-deps torchvision"
    try:
        return _import("torchvision", way_out)
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in ("nms", "qnms"):
        _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return _import("torchvision", way_out)


def import_timm() -> ModuleType:
    """The timm package, or a skip that names the reason; timm imports torchvision."""
    import_torchvision()
    return _import("timm", "pip install --no-deps timm, and huggingface_hub and pyyaml")


def _import(name: str, way_out: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported ({error}): {way_out}")
