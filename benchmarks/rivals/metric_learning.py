"""pytorch-metric-learning's SupConLoss, which normalises and masks by itself, with the mean over all rows."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastrex_kernels._op import Call, Op

from .. import machine
from ._absent import Absent

NAME, OPS = "pytorch-metric-learning", ("contrastive_cross_entropy",)
# What it has no word for, and the value that says nothing.
NEUTRAL: dict[str, Any] = {
    "positives": "mean",
    "private": 0,
    "hardness": 0.0,
    "margin": 0.0,
    "nearest": 0,
    "mixtures": None,
    "learnt_keys": None,
    "return_stats": False,
    "reduction": "mean",
}


def build(op: Op, call: Call) -> Callable[..., Any]:
    if not machine.installed("pytorch_metric_learning"):
        raise Absent("pytorch-metric-learning is not installed")
    values = {**call.options, **call.tensors}
    for name, neutral in NEUTRAL.items():
        if values.get(name, neutral) != neutral:
            raise Absent(f"has no {name}={values[name]!r}" if name != "mixtures" else "has no mixtures")
    own, ids, key_ids = values.get("instance"), values["ids"], values["key_ids"]
    if own is not None and not (torch.equal(own, values["key_instance"]) and len(own) == len(values["input"])):
        raise Absent("leaves out a row's own key, no other one")
    ignored = values.get("ignore_index", -100)
    if bool((ids == ignored).any() | (key_ids == ignored).any()):
        raise Absent("has no ignore_index")
    losses, reducers = (import_module(f"pytorch_metric_learning.{part}") for part in ("losses", "reducers"))
    criterion = losses.SupConLoss(temperature=values.get("temperature", 0.1), reducer=reducers.MeanReducer())

    def run(input: Tensor, keys: Tensor, ids: Tensor, key_ids: Tensor, **unused: Any) -> Tensor:
        label = ids if len(ids) == len(input) else ids.repeat(len(input) // len(ids))
        # Given references, it would take a row's own copy for a positive: the pairs are handed over, as it lists them.
        pairs = None if own is None else _pairs(label, key_ids)
        loss: Tensor = criterion(input, label, indices_tuple=pairs, ref_emb=keys, ref_labels=key_ids)
        return loss

    return run


def _pairs(ids: Tensor, key_ids: Tensor) -> tuple[Tensor, ...]:
    """(anchors, positives, anchors, negatives) of a batch against itself."""
    same = ids[:, None] == key_ids
    positive = same & ~torch.eye(len(ids), dtype=torch.bool, device=ids.device)
    return (*torch.where(positive), *torch.where(~same))
