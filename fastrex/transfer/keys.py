"""Keys of encoders, and of the features that are kept of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..export import Source


def identity(source: Source) -> str:
    """sha256, hex, of an encoder: its architecture and the names, types, shapes and bytes of its tensors, whatever
    file they come from."""
    digest = hashlib.sha256(json.dumps(source.arch, sort_keys=True).encode())
    for name in sorted(source.state):
        tensor = source.state[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def features(
    identity: str,
    fingerprint: str,
    rows: NDArray[np.int64],
    facts: Mapping[str, Any],
    encoder: nn.Module,
    device: torch.device,
) -> str:
    """sha256, hex, of everything that features depend on but the bytes of the images, which each chunk has a digest of.

    Args:
        identity: of ``encoder``. fingerprint: of the index that ``rows`` are of. facts: how images are shown.
    """
    foreign = any(type(module).__module__.partition(".")[0] == "timm" for module in encoder.modules())
    packages = {"torch": str(torch.__version__), "dali": _version("nvidia-dali-cuda130")}
    whole = {
        **facts,
        "encoder": identity,
        "index": fingerprint,
        "rows": hashlib.sha256(np.ascontiguousarray(rows, "<i8").tobytes()).hexdigest(),
        "device": device.type,
        # Another release may compute or decode in another way.
        **{name: ".".join(version.split(".")[:2]) for name, version in packages.items()},
        "timm": _version("timm") if foreign else "",
    }
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
