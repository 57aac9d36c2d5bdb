"""Sizes at which the cosine cross-entropy is tested and measured, and its rival in eager PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._op import Call, Case, Cost, Op
from . import Stats, cosine_cross_entropy


def eager(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """The loss as its users write it, in the dtype of the tensors."""
    logits = F.normalize(input, dim=1) @ F.normalize(weight.to(input.dtype), dim=1).T / temperature
    if target.shape[0] != input.shape[0]:
        target = target.repeat(input.shape[0] // target.shape[0], *(1,) * (target.ndim - 1))
    if target.is_floating_point():
        target = target.to(logits.dtype)
    loss = F.cross_entropy(
        logits,
        target,
        weight=None if class_weight is None else class_weight.to(logits.dtype),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    if not return_stats:
        return loss
    detached = logits.detach()
    if target.is_floating_point():
        chosen, kept = target.argmax(dim=1), torch.ones_like(target[:, 0], dtype=torch.bool)
    else:
        kept = target != ignore_index
        chosen = torch.where(kept, target, 0)
    rank = (detached > detached.gather(1, chosen[:, None])).sum(dim=1)
    return loss, Stats(torch.logsumexp(detached, dim=1).float(), torch.where(kept, rank, -1))


def make(sizes: Mapping[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    """Features, classes and targets.

    ``sizes`` are rows, classes, dim, and what a case is about: ``share`` (crops per target), ``frozen``, ``soft``,
    ``weighted``, ``ignore`` ("some" or "all"), ``zero`` (zero rows and classes), ``strided``, ``twins`` (classes that
    are equal), ``scale`` of the features, ``temperature_tensor``, ``stats``; the rest are the function's own options.
    """
    options = dict(sizes)
    take = options.pop
    rows, classes, dim = take("rows"), take("classes"), take("dim")
    share, scale, ignore = take("share", 1), take("scale", 1.0), take("ignore", "")
    frozen, soft, weighted, twins = (take(word, False) for word in ("frozen", "soft", "weighted", "twins"))
    zero, strided, learnt = (take(word, False) for word in ("zero", "strided", "temperature_tensor"))
    options["return_stats"] = take("stats", True)

    g = torch.Generator().manual_seed(seed)
    width = 2 * dim + 3 if strided else dim
    x = (torch.randn(rows, width, generator=g) * scale).to(dtype)
    w = torch.randn(classes, width, generator=g).to(dtype)
    if strided:  # rows apart in x, elements of a row apart in w
        x, w = x[:, 3 : 3 + dim], w[:, 1 : 1 + 2 * dim : 2]
    if twins:
        w[1::2] = w[::2][: classes // 2]
    if zero:
        x[:: max(rows // 3, 1)] = 0
        w[:: max(classes // 3, 1)] = 0
    if soft:
        y = torch.softmax(torch.randn(rows // share, classes, generator=g), dim=1)
    else:
        y = torch.randint(classes, (rows // share,), generator=g)
        y[: {"": 0, "some": (len(y) + 2) // 3, "all": len(y)}[ignore]] = options.get("ignore_index", -100)
    tensors = {"input": x.to(device), "weight": w.to(device), "target": y.to(device)}
    if weighted:
        tensors["class_weight"] = torch.linspace(0.25, 2.0, classes).to(device)
    grads = ["input"] if frozen else ["input", "weight"]
    if learnt:
        tensors["temperature"] = torch.tensor(options.pop("temperature", 0.1), device=device)
        grads.append("temperature")
    return Call(tensors, options, grads=grads)


def cost(sizes: Mapping[str, Any], dtype: torch.dtype, direction: str) -> Cost:
    """Features and classes are read once, their gradients written once; the logits and each gradient are a product."""
    rows, classes, dim = sizes["rows"], sizes["classes"], sizes["dim"]
    gradients = 1 if sizes.get("frozen") else 2
    products = {"fwd": 1, "bwd": gradients, "fwd_bwd": 1 + gradients}[direction]
    numbers = 0 if direction == "bwd" else rows + classes
    if direction != "fwd":
        numbers += rows if gradients == 1 else rows + classes
    return Cost(bytes=numbers * dim * dtype.itemsize, flops=2 * products * rows * classes * dim)


def case(name: str, why: str, rows: int, classes: int, dim: int, **options: Any) -> Case:
    return Case(name, why, {"rows": rows, "classes": classes, "dim": dim, **options})


def bench(name: str, why: str, rows: int, classes: int, **options: Any) -> Case:
    return Case(name, why, {"rows": rows, "classes": classes, "dim": 256, "stats": False, **options}, bench=True)


CASES: tuple[Case, ...] = (
    case("plain", "sizes that fit vectors and tiles", 32, 64, 32),
    case("odd", "no size fits a vector, a tile or a pair", 37, 101, 33),
    case("tiny", "one row, two classes, two features", 1, 2, 2),
    case("two_classes", "fewer classes than a vector", 9, 2, 16),
    case("no_rows", "an empty batch: the sum is 0", 0, 5, 8, reduction="sum"),
    case("one_row", "fewer rows than a tile", 1, 300, 24),
    case("more_tiles", "several tiles of rows, the last one short", 203, 130, 20),
    case("many_classes", "few rows: the classes are split, and their sums added", 6, 4109, 16),
    case("wide", "more features than a block of classes", 20, 40, 515),
    case("crops", "nine crops share a target", 36, 50, 24, share=9),
    case("frozen", "prototypes: no gradient of the classes", 40, 70, 32, frozen=True),
    case("sum", "the gradient is not divided by the rows", 20, 30, 16, reduction="sum"),
    case("none", "rows with different upstream gradients", 50, 70, 33, reduction="none"),
    case("none_frozen", "the same without a gradient of the classes", 20, 30, 16, reduction="none", frozen=True),
    case("ignored", "ignored rows count nowhere", 30, 40, 16, ignore="some"),
    case("ignore_class", "ignore_index may be a class", 30, 4, 16, ignore="some", ignore_index=2),
    case("all_ignored", "the mean over no row is NaN, its gradient 0", 12, 7, 8, ignore="all"),
    case("smoothed", "every class has a share", 41, 60, 24, label_smoothing=0.1),
    case("weighted", "the mean divides by the targets' factors", 41, 60, 24, weighted=True),
    case("all_options", "crops, smoothing, factors and ignored rows at once", 42, 60, 24, share=3, label_smoothing=0.2,
         weighted=True, ignore="some"),
    case("soft", "probabilities as targets", 33, 61, 24, soft=True),
    case("soft_options", "probabilities over crops, smoothed, with factors", 36, 50, 20, soft=True, share=4,
         label_smoothing=0.1, weighted=True, reduction="none"),
    case("soft_frozen", "probabilities, prototypes", 20, 30, 16, soft=True, frozen=True),
    case("temperature", "a learnt temperature", 33, 47, 24, temperature_tensor=True, temperature=0.2),
    case("temperature_none", "its gradient from rows with different upstreams", 20, 30, 16, temperature_tensor=True,
         reduction="none", label_smoothing=0.1),
    case("cold", "exp(-2 / temperature) underflows", 40, 300, 16, temperature=0.01),
    case("colder", "logits of several hundreds", 20, 300, 8, temperature=0.003, label_smoothing=0.1),
    case("zero_rows", "a zero row or class has logit 0 and gradient 0", 31, 37, 16, zero=True),
    case("strided", "features and classes are slices", 30, 40, 17, strided=True),
    case("twins", "equal logits are not larger", 30, 40, 32, twins=True),
    case("large", "the norm's square leaves the range of half precision", 12, 16, 16, scale=3e3),
    bench("c1000", "ImageNet-1k with class weights, 256 images of nine crops", 2304, 1000, share=9),
    bench("c1000_frozen", "the same with prototypes", 2304, 1000, share=9, frozen=True),
    bench("c21841", "ImageNet-21k with class weights", 2304, 21841, share=9),
    bench("c21841_frozen", "the same with prototypes", 2304, 21841, share=9, frozen=True),
    bench("c1m", "a million classes: logits that do not fit", 256, 1_000_000),
)  # fmt: skip

OP = Op(
    name="cosine_cross_entropy",
    function=cosine_cross_entropy,
    eager=eager,
    make=make,
    cases=CASES,
    cost=cost,
)
