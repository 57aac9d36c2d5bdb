"""Encoder and projector over the crops of a batch, what of it is computed again in the backward, and the group of ranks
that their batch norms share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import FastrexError
from .norm import BatchNormAct, check_group
from .recompute import recomputed
from .resnet import ARCHS, Block, ResNet

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MultiCropModel(nn.Module):
    """An encoder and a projector that see all crops of a batch.

    Args:
        encoder: module [B, C, H, W] -> [B, D].
        projector: module [N, D] -> [N, out_dim].
        recompute: ``none``; ``blocks``: of each residual block the backward keeps the input only; ``passes``: of each
            resolution but the last it keeps the images only. The backward comes to the last one first, so that what is
            kept is never more than the activations of one resolution. Plain ``nn.BatchNorm2d`` layers (of a timm
            encoder) become :class:`BatchNormAct`, which know a forward that is repeated.

    Raises:
        FastrexError: ``blocks`` with an encoder that has none, or a batch norm that would count a batch twice.
    """

    def __init__(self, encoder: nn.Module, projector: nn.Module, recompute: str = "none") -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.recompute = recompute
        blocks = [module for module in encoder.modules() if isinstance(module, Block)]
        for block in blocks:
            block.recompute = recompute == "blocks"
        if recompute == "blocks" and not blocks:
            raise FastrexError(
                f"train: model.recompute=blocks must have an encoder of residual blocks ({', '.join(ARCHS)}), got "
                f"{type(encoder).__name__}; set model.recompute=passes"
            )
        if recompute != "none":
            _replace_norms(encoder, "used with model.recompute", "set model.recompute=none")

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """Project all crops: groups of [K*B, C, S, S], crop-major, -> [N, out_dim] in the order of the groups.

        The encoder runs once per resolution (its batch statistics are those of one resolution; neighbouring groups of
        the same size share a pass), the projector once over all rows.
        """
        if not crops:
            raise ValueError("MultiCropModel: crops must hold at least one group, got none")
        groups = [list(group) for _, group in groupby(crops, key=lambda crop: crop.shape[-2:])]
        passes = [group[0] if len(group) == 1 else torch.cat(group) for group in groups]
        again = len(passes) - 1 if self.recompute == "passes" and torch.is_grad_enabled() else 0
        random = not isinstance(self.encoder, ResNet)
        features = [recomputed(self.encode, x, random=random) for x in passes[:again]]
        features += [self.encode(x) for x in passes[again:]]
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
            stay local), or a backend that cannot join batches on the module's device.
    """
    if group is not None:
        _replace_norms(module, "synchronised over ranks", "train in one process")
    for layer in module.modules():
        if isinstance(layer, BatchNormAct):
            if group is not None:
                check_group(layer.backend, layer.weight.device)
            layer.process_group = group


def _replace_norms(module: nn.Module, purpose: str, way_out: str) -> None:
    """Make a :class:`BatchNormAct` of every batch norm that is not ours."""
    replaced: dict[nn.Module, BatchNormAct] = {}
    for parent_name, parent in list(module.named_modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.modules.batchnorm._BatchNorm):
                continue
            if child not in replaced:
                path = f"{parent_name}.{name}".removeprefix(".")
                replaced[child] = _convert(child, f"{path} must be a plain nn.BatchNorm2d to be {purpose}", way_out)
            setattr(parent, name, replaced[child])


def _convert(norm: nn.modules.batchnorm._BatchNorm, requirement: str, way_out: str) -> BatchNormAct:
    if type(norm) is not nn.BatchNorm2d or not norm.affine or not norm.track_running_stats or norm.momentum is None:
        raise FastrexError(f"train: the layer {requirement}, got {norm}; choose another encoder or {way_out}")
    new = BatchNormAct(norm.num_features, relu=False, eps=norm.eps, momentum=norm.momentum)
    # The very tensors, so that optimisers and state dicts that know them stay right.
    for tensor in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(new, tensor, getattr(norm, tensor))
    return new.train(norm.training)
