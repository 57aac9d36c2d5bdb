"""Where the encoder stands in a checkpoint: the layouts of the released t-ReX files and whatever resembles them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import files, foreign
from .errors import FastrexError

MAX_DICTS = 4
MAX_KEY = 256  # characters of a key in the name of a place
_ENCODER = re.compile(
    r"(conv1|bn1|layer[1-4]\.\d+\.(conv[1-3]|bn[1-3]|downsample\.[01]))"
    r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"
)
_BODY = re.compile(r"(conv1|bn1|layer\d+)\.")
_MOMENTUM = re.compile(r"(^|[._])(ema|momentum|teacher|target|k)([._]|$)")


def encoder_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Find the ResNet encoder in a checkpoint; returns its state under torchvision's names, and where it came from.

    Known are the layouts of the released t-ReX models (the bare backbone; full checkpoints with ``model.*``,
    ``model_ema.*``, ``memory.*``) and whatever else keeps a ResNet under one prefix, also inside ``state_dict`` or
    ``model`` and behind ``module.``. The online model is preferred to a momentum copy.

    Raises:
        FastrexError: as :func:`read`, or there is no plain ResNet in the file.
    """
    path = Path(path)
    content, placeholders = foreign.load(path)
    found: list[tuple[str, str, dict[str, Tensor]]] = []
    dicts = list(_dicts(content))
    for place, mapping in dicts:
        tensors = {key: value for key, value in mapping.items() if isinstance(key, str) and isinstance(value, Tensor)}
        found += [(place, prefix, tensors) for prefix in encoder_prefixes(tensors)]
    if not found:
        raise FastrexError(
            f"foreign: {path} must hold the weights of a ResNet, got {_summary(content)}; {foreign.CONVERT}"
        )
    wheres = [f"{place}.{prefix}" for place, prefix, _ in found]
    best = min(range(len(found)), key=lambda i: (_MOMENTUM.search(wheres[i]) is not None, len(wheres[i])))
    place, prefix, tensors = found[best]
    try:
        state = select_encoder(tensors, prefix)
    except FastrexError as error:
        raise FastrexError(f"foreign: {path}: {error}") from None
    own = [part for part in wheres[best].split(".") if part]
    left_out = {_branch(other, _words(key, MAX_KEY), own) for other, mapping in dicts for key in mapping}
    provenance = {
        "file": path.name,
        "sha256": files.digest(path),
        "format": "torch.save",
        "dictionary": place or "(top)",
        "prefix": prefix or "(none)",
        "left_out": _list(left_out - {""}),
        "placeholders": _list(set(placeholders)),
    }
    return state, provenance


def encoder_prefixes(tensors: Mapping[str, Tensor]) -> list[str]:
    """The prefixes under which ``tensors`` hold a ResNet's keys."""
    starts = [key.removesuffix("conv1.weight") for key in tensors if re.search(r"(^|\.)conv1\.weight$", key)]
    return [p for p in starts if f"{p}bn1.weight" in tensors and f"{p}layer1.0.conv1.weight" in tensors]


def select_encoder(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The encoder's tensors under ``prefix``, renamed and contiguous; everything that is no part of it is left out.

    Raises:
        FastrexError: a layer of its body is none of a plain ResNet's, so that leaving it out would change the network.
    """
    state = {}
    for key, value in tensors.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or not _BODY.match(name):
            continue
        if not _ENCODER.fullmatch(name):
            raise FastrexError(
                f"{key} must belong to a plain ResNet, got another layer; only resnet18|34|50|101 are read"
            )
        state[name] = value.detach().contiguous()
    # Files from before torch 0.4.1 have no counters.
    for name in [name for name in state if name.endswith("running_mean")]:
        state.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    return state


def _dicts(content: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """The dictionary and those inside it, each once, with their places."""
    # Once: a few bytes of pickle make a dictionary that holds itself under a thousand names.
    seen = {id(content)}
    level: list[tuple[str, Mapping[Any, Any]]] = [("", content)]
    for _ in range(MAX_DICTS + 1):
        below: list[tuple[str, Mapping[Any, Any]]] = []
        for place, mapping in level:
            yield place, mapping
            for key, value in mapping.items():
                if isinstance(value, dict) and isinstance(key, str) and id(value) not in seen:
                    seen.add(id(value))
                    below.append((f"{place}.{key[:MAX_KEY]}".removeprefix("."), value))
        level = below


def _branch(place: str, key: str, own: list[str]) -> str:
    """Where the path of a key leaves the path to the encoder; empty for the encoder's own keys and those above it."""
    parts = [part for part in f"{place}.{key}".split(".") if part]
    shared = 0
    while shared < min(len(parts), len(own)) and parts[shared] == own[shared]:
        shared += 1
    body = shared == len(own) and _BODY.match(".".join(parts[shared:]))
    return "" if body else ".".join(parts[: shared + 1] if shared < len(parts) else [])


def _list(names: set[str]) -> str:
    """Up to twenty names in one line, without characters that could mean something in a document."""
    clean = sorted({re.sub(r"[^\w.\-]", "?", name)[:60] for name in names})
    return ", ".join(clean[:20]) + (f" and {len(clean) - 20} more" if len(clean) > 20 else "") or "(none)"


def _summary(content: Mapping[Any, Any]) -> str:
    keys = [_words(key, 40) for key in list(content)[:5]]
    return f"the keys {', '.join(keys)}{', ...' if len(content) > 5 else ''}" if keys else "an empty dictionary"


def _words(key: Any, length: int) -> str:
    """A key as words. Of a tuple only that it is one: a few bytes of pickle make one of a gigabyte of words."""
    if isinstance(key, str):
        return key[:length]
    return str(key)[:length] if isinstance(key, int | float | None) else f"<{type(key).__name__}>"
