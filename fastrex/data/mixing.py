"""mixup and CutMix of crops and targets on the device, as ``mixes.py`` has drawn them."""

from __future__ import annotations

import torch
from torch import Tensor

from .mixes import MixPlan, edges


def mix_(crops: Tensor, plan: MixPlan, shares: Tensor, boxes: Tensor, pairs: slice) -> None:
    """Mix the crops [K*B, C, S, S] (crop-major) of some pairs in place, computing in float32; nothing asks the host.

    Args:
        plan: distance of a pair's places; the rest of its draws is given on the crops' device:
        shares: float32 [P], of the image itself outside its box: 1 for CutMix (see :func:`weights`).
        boxes: int64 [P, 4], pixels of the crop that are the partner's alone; empty for mixup.
        pairs: which, as whole blocks of ``plan.distance``.
    """
    reach, side = plan.distance, crops.shape[-1]
    blocks = slice(pairs.start // reach, pairs.stop // reach)
    crop = crops.view(-1, len(plan.shares) // reach, 2, reach, *crops.shape[1:])
    one, other = crop[:, blocks, 0], crop[:, blocks, 1]
    line = torch.arange(side, device=crops.device)
    top, left, bottom, right = boxes[pairs].view(-1, reach, 4).unbind(-1)
    rows = (line >= top[..., None]) & (line < bottom[..., None])
    columns = (line >= left[..., None]) & (line < right[..., None])
    pasted = rows[..., :, None] & columns[..., None, :]
    share = shares[pairs].view(-1, reach, 1, 1).masked_fill(pasted, 0.0)[..., None, :, :]
    # lerp is exact where the share is 0 or 1, so what CutMix pastes keeps its bits.
    a, b = one.float(), other.float()
    mixed = torch.lerp(b, a, share), torch.lerp(a, b, share)
    one.copy_(mixed[0])
    other.copy_(mixed[1])


def weights(plan: MixPlan, side: int) -> tuple[Tensor, Tensor]:
    """``shares`` and ``boxes`` of :func:`mix_` for crops of ``side`` pixels, on the CPU."""
    shares = torch.from_numpy(plan.shares)
    return shares.masked_fill(torch.from_numpy(plan.cut), 1.0), torch.from_numpy(edges(plan.boxes, side))


def mix_targets(target: Tensor, shares: Tensor, partners: Tensor, classes: int) -> Tensor:
    """Target probabilities float32 [B, C]: class ids ``target`` int64 [B] have ``shares`` float32 [B], those of their
    ``partners`` int64 [B] the rest."""
    ids, share = torch.arange(classes, device=target.device), shares[:, None]
    own, other = target[:, None] == ids, target[partners][:, None] == ids
    return own * share + other * (1 - share)
