"""The momentum copy of a model (the update itself is the training step's)."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def make_ema(model: Model) -> Model:
    """An exact copy of ``model`` that shares no tensor with it, needs no gradient and is in training mode.

    Training mode, because the copy normalises with the statistics of the batch it sees. The process groups of its
    batch norms are the model's own: they are handles, not state.
    """
    groups = [getattr(module, "process_group", None) for module in model.modules()]
    handles: dict[int, Any] = {id(group): group for group in groups if group is not None}
    return copy.deepcopy(model, handles).requires_grad_(False).train()
