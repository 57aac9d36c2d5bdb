"""Encoder and projector over the crops of a batch, and the group of ranks that their batch norms share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import FastrexError
from .resnet import BatchNormAct

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MultiCropModel(nn.Module):
    """An encoder and a projector that see all crops of a batch.

    Args:
        encoder: module [B, C, H, W] -> [B, D].
        projector: module [N, D] -> [N, out_dim].
    """

    def __init__(self, encoder: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """Project all crops: groups of [K*B, C, S, S], crop-major, -> [N, out_dim] in the order of the groups.

        The encoder runs once per resolution (its batch statistics are those of one resolution; neighbouring groups of
        the same size share a pass), the projector once over all rows.
        """
        if not crops:
            raise ValueError("MultiCropModel: crops must hold at least one group, got none")
        passes = [list(group) for _, group in groupby(crops, key=lambda crop: crop.shape[-2:])]
        features = [self.encode(group[0] if len(group) == 1 else torch.cat(group)) for group in passes]
        out: Tensor = self.projector(features[0] if len(features) == 1 else torch.cat(features))
        return out

    def encode(self, x: Tensor) -> Tensor:
        """Features [B, D] of images [B, C, H, W]: what is kept after training."""
        features: Tensor = self.encoder(x)
        return features


def set_process_group(module: nn.Module, group: ProcessGroup | None) -> None:
    """Let every batch norm below ``module`` take its training statistics from the joined batch of ``group``.

    With a group, each plain ``nn.BatchNorm2d`` (of a timm encoder) becomes a :class:`BatchNormAct` of the same values.

    Raises:
        FastrexError: with a group, when another kind of batch norm stands in the module (its statistics would silently
            stay local).
    """
    replaced: dict[nn.Module, BatchNormAct] = {}
    for parent_name, parent in list(module.named_modules()):
        if isinstance(parent, BatchNormAct):
            parent.process_group = group
        if group is None:
            continue
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.modules.batchnorm._BatchNorm):
                continue
            if child not in replaced:
                replaced[child] = _convert(child, f"{parent_name}.{name}".removeprefix("."), group)
            setattr(parent, name, replaced[child])


def _convert(norm: nn.modules.batchnorm._BatchNorm, name: str, group: ProcessGroup) -> BatchNormAct:
    if type(norm) is not nn.BatchNorm2d or not norm.affine or not norm.track_running_stats or norm.momentum is None:
        raise FastrexError(
            f"set_process_group: {name} must be a plain nn.BatchNorm2d to be synchronised over ranks, got {norm}; "
            f"choose another encoder or train in one process"
        )
    new = BatchNormAct(norm.num_features, relu=False, eps=norm.eps, momentum=norm.momentum)
    # The very tensors, so that optimisers and state dicts that know them stay right.
    for tensor in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(new, tensor, getattr(norm, tensor))
    new.process_group = group
    return new.train(norm.training)
