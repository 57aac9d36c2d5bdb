"""Softmax over cosine logits with a margin on the target's: CosFace and ArcFace."""

from __future__ import annotations

import torch
from torch import Tensor

from ._op import readable
from .contrastive_ce import contrastive_cross_entropy
from .contrastive_ce.arguments import MARGINS, MOST_MARGIN, expand
from .cosine_ce import Stats, cosine_cross_entropy

# Class ids are 0 or more, so no class is meant by it; a user's ignore_index may be one.
IGNORED = -1


def check_margin(name: str, margin: float, margin_kind: str, **without: bool) -> None:
    """Refuse a margin out of its range, and ``without``, options that go with no margin, by their names."""
    if margin_kind not in MARGINS:
        raise ValueError(f"{name}: margin_kind must be one of {', '.join(MARGINS)}, got {margin_kind!r}")
    if not 0 <= margin < MOST_MARGIN[margin_kind]:
        raise ValueError(
            f"{name}: margin must be in [0, {MOST_MARGIN[margin_kind]:.4g}) for {margin_kind}, got {margin!r}"
        )
    for word, given in without.items():
        if margin and given:
            raise ValueError(f"{name}: margin must be 0 with {word}, got {margin!r}; leave one of them out")


def margin_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float,
    margin: float,
    margin_kind: str,
    ignore_index: int,
    reduction: str,
    return_stats: bool,
) -> Tensor | tuple[Tensor, Stats]:
    """Cross-entropy of cosine logits [N, C] whose target has a margin; arguments as for
    :class:`~fastrex_kernels.CosineHead`, class ids alone.

    A class is a key, and the target the one positive among them, so no [N, C] is in memory. Statistics are those of the
    logits without the margin, by a product of their own.

    Raises:
        ValueError, TypeError: ``target`` has probabilities, another shape or dtype than ids, or on a CPU an id that is
            no class.
    """
    name, classes = "CosineHead", weight.shape[0]
    if target.is_floating_point():
        raise ValueError(
            f"{name}: target must be class ids with margin={margin}, got probabilities {list(target.shape)}; leave "
            "out the margin, or what mixes the targets"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"{name}: target must be int64 class ids, got {target.dtype}; use target.long()")
    rows = input.shape[0]
    if target.ndim != 1 or (rows % target.shape[0] if target.shape[0] else rows):
        fact = f"[{rows}] class ids or a divisor of that, got {list(target.shape)}"
        raise ValueError(f"{name}: target must be {fact}; give one id per row, or one per image of crop-major rows")
    ignored, valid = target == ignore_index, (target >= 0) & (target < classes)
    if readable(target) and not bool((ignored | valid).all()):
        bad = target[~(ignored | valid)][0]
        raise ValueError(f"{name}: target must be in [0, {classes}) or {ignore_index}, got {int(bad)}")
    ids = torch.where(valid & ~ignored, target, IGNORED)
    key_ids = torch.arange(classes, device=target.device)
    losses = contrastive_cross_entropy(
        input, weight, ids, key_ids, temperature=temperature, positives="sum", margin=margin, margin_kind=margin_kind,
        ignore_index=IGNORED, reduction="none",
    )  # fmt: skip
    assert isinstance(losses, Tensor)
    kept, good = expand(~ignored, rows), expand(valid | ignored, rows)
    loss = torch.where(good, losses, torch.nan)
    if reduction != "none":
        loss = loss.sum() / kept.sum() if reduction == "mean" else loss.sum()
    if not return_stats:
        return loss
    with torch.no_grad():
        plain = cosine_cross_entropy(
            input, weight, target, temperature=temperature, ignore_index=ignore_index, reduction="none",
            return_stats=True,
        )  # fmt: skip
    return loss, plain[1]  # type: ignore[return-value]
