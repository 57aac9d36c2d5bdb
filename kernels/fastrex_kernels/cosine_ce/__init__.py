"""Cosine cross-entropy: the softmax loss over normalised logits of t-ReX (Sariyildiz et al., ICLR 2023, Eq. 1 and
2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._once import once, refuse_tangents
from .._op import choose, compute_dtype, define, raw, readable
from .reference import cosine_cross_entropy_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "mean", "sum")
ONCE = "cosine_cross_entropy: the kernels have no {}; use impl='reference' to differentiate twice or in forward mode"
# The gradient of the classes is made by the forward, beside that of the features, unless it is larger than this: then
# the backward makes it, so that many classes never have both their gradient and a scaled copy of it. In C++ that costs
# one more product of matrices; in Triton, which computes the logits again in either case, a launch.
FORWARD_BYTES = {"cpp": 64 * 2**20, "triton": 4 * 2**20}

# ``weight`` holds the classes first_class .. of num_classes (all of them, unless it is one shard of a head); ``target``
# and ``class_weight`` count over all. ``lse``, ``rank`` and ``target_logit`` are of this block, ``rank`` against
# ``threshold`` if given. Gradients have unit upstream for every row, ``scale`` turns that of the loss into the rows',
# ``radial`` is the share along x_hat that the projection removes.
FORWARD = (
    "cosine_ce(Tensor input, Tensor weight, Tensor target, Tensor? temperature, float temperature_value, "
    "Tensor? class_weight, Tensor? threshold, int first_class, int num_classes, int ignore_index, "
    "float label_smoothing, int reduction, ScalarType compute, bool input_grad, bool weight_grad) -> (Tensor loss, "
    "Tensor scale, Tensor lse, Tensor rank, Tensor target_logit, Tensor grad_input, Tensor grad_weight, Tensor radial)"
)
# The same from the ``lse`` over all blocks and the rows' upstream gradients. ``uniform_grad_weight``: that of the
# forward, which serves if all rows have the same upstream gradient.
BACKWARD = (
    "cosine_ce_backward(Tensor input, Tensor weight, Tensor target, Tensor? temperature, float temperature_value, "
    "Tensor? class_weight, int first_class, int num_classes, int ignore_index, float label_smoothing, "
    "ScalarType compute, Tensor lse, Tensor grad_rows, Tensor? uniform_grad_weight, bool input_grad, "
    "bool weight_grad) -> (Tensor grad_input, Tensor grad_weight, Tensor radial)"
)


class Stats(NamedTuple):
    """What the loss knows of each row: ``lse`` [N] float32, log of the sum of exponentials; ``rank`` [N] int64, the
    number of classes with a larger logit than the target's (0 = top-1 hit, -1 = ignored row)."""

    lse: Tensor
    rank: Tensor


def cosine_cross_entropy(
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
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Stats]:
    """Cross-entropy of cosine logits, ``F.cross_entropy(normalize(input) @ normalize(weight).T / temperature,
    target)``.

    Args:
        input: features [N, D], any floating dtype; rows are crop-major when the target is shared.
        weight: class weights or prototypes [C, D]. With ``requires_grad=False`` no gradient is computed for them.
        target: class ids int64 [N], or [B] with N a multiple of B (row n uses ``target[n % B]``), or probabilities
            [N, C] or [B, C].
        temperature: float or 0-d tensor above 0, which may require a gradient.
        class_weight: per-class factor [C]; the mean divides by the sum of the targets' factors, as PyTorch does.
        ignore_index: rows with this id have loss 0, no gradient and rank -1.
        label_smoothing: share of the target spread over all classes, in [0, 1].
        reduction: "none", "mean" (NaN when every row is ignored) or "sum".
        return_stats: also return :class:`Stats`.
        impl: "auto", "reference", "cpp" or "triton"; asked for by name it runs or raises.

    Returns:
        The loss in float32 (float64 for float64 inputs), or ``(loss, Stats)``.

    A row or class whose l2 norm is at most 1e-12 has logit 0 and gradient 0 (an empty class of Online Class Means).
    A class id out of range raises on a CPU; on a GPU it makes that row's loss NaN, without a device assert or a sync.

    Raises:
        ValueError, TypeError: naming the argument and the fact.
    """
    _check(input, weight, target, temperature, class_weight, ignore_index, label_smoothing, reduction)
    impl = _implementation(impl, input, weight, target)
    if impl == "reference":
        loss, lse, rank = cosine_cross_entropy_reference(
            input, weight, target, temperature, class_weight, ignore_index, label_smoothing, reduction
        )
        return (loss, Stats(lse, rank)) if return_stats else loss
    refuse_tangents(
        ONCE.format("forward-mode derivatives"), input, weight, temperature if isinstance(temperature, Tensor) else None
    )
    tensor, value = (temperature, 1.0) if isinstance(temperature, Tensor) else (None, float(temperature))
    grad = torch.is_grad_enabled()
    along = grad and (input.requires_grad or (tensor is not None and tensor.requires_grad))
    learnt = grad and weight.requires_grad
    forward_weight = (
        learnt
        and weight.numel() * 4 <= FORWARD_BYTES[impl]
        # Rows may then differ in their upstream gradient; C++ sees at no cost whether they do.
        and (impl == "cpp" or reduction != "none")
    )
    arguments = (
        input, weight, target, tensor, value, class_weight, None, 0, weight.shape[0], ignore_index, label_smoothing,
        REDUCTIONS.index(reduction), compute_dtype(input, weight), along, forward_weight,
    )  # fmt: skip
    differentiable: Any = _CosineCE.apply
    outputs = differentiable(impl, *arguments) if along or learnt else raw(__name__, "cosine_ce", impl)(*arguments)
    loss, lse, rank = outputs[0], outputs[2], outputs[3]
    return (loss, Stats(lse, rank)) if return_stats else loss


def _implementation(impl: str, input: Tensor, weight: Tensor, target: Tensor) -> str:
    name = "cosine_cross_entropy"
    like = weight if input.dtype in DTYPES else input
    if target.requires_grad and impl in ("auto", "cpp", "triton"):
        if impl != "auto":
            raise ValueError(f"{name}: target must not require a gradient for impl={impl!r}; use impl='reference'")
        return "reference"
    return choose(name, impl, like, dtypes=DTYPES)


class _CosineCE(torch.autograd.Function):
    """Gradients at unit upstream are made by the forward; the backward scales them."""

    @staticmethod
    def forward(impl: str, *arguments: Any) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = raw(__name__, "cosine_ce", impl)(*arguments)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.impl, input, weight, target, temperature, value, class_weight, _, *rest = inputs
        first_class, num_classes, ignore_index, smoothing, ctx.reduction, compute, along, _ = rest
        loss, scale, lse, _, _, grad_input, grad_weight, radial = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        learnt = ctx.needs_input_grad[2]
        again = learnt and (not grad_weight.numel() or ctx.reduction == 0)
        ctx.options = (value, first_class, num_classes, ignore_index, smoothing, compute)
        ctx.dtypes = (input.dtype, weight.dtype)
        ctx.save_for_backward(
            loss, scale, temperature, grad_input if along else None, radial if along else None,
            grad_weight if grad_weight.numel() else None,
            *((input, weight, target, class_weight, lse) if again else (None,) * 5),
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing: tuple[Tensor | None, ...] = (None,) * 16
        if grad is None:
            return nothing
        loss, scale, temperature, grad_input, radial, grad_weight, *again = ctx.saved_tensors
        input, weight, target, class_weight, lse = again
        value, first_class, num_classes, ignore_index, smoothing, compute = ctx.options
        rows = grad if ctx.reduction == 0 else grad * scale
        dx = dw = dt = None
        if ctx.needs_input_grad[1]:
            dx = (grad_input * (rows[:, None] if rows.ndim else rows)).to(ctx.dtypes[0])
        if ctx.needs_input_grad[4]:
            along = rows @ radial if rows.ndim else rows * radial.sum()
            dt = -along / temperature
        if ctx.needs_input_grad[2]:
            if input is None:
                dw = (grad_weight * rows).to(ctx.dtypes[1])
            else:
                each = rows if rows.ndim else rows.expand(input.shape[0]).contiguous()
                dw = raw(__name__, "cosine_ce_backward", ctx.impl)(
                    input, weight, target, temperature, value, class_weight, first_class, num_classes, ignore_index,
                    smoothing, compute, lse, each, grad_weight, False, True,
                )[1]  # fmt: skip
        if torch.is_grad_enabled():
            refusal = ONCE.format("second derivatives")
            dx, dw, dt = (None if g is None else once(g, loss, refusal) for g in (dx, dw, dt))
        return (None, dx, dw, None, dt, *nothing[5:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        calls = (
            [a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)]
            for i in range(info.batch_size)
        )
        apply: Any = _CosineCE.apply
        outputs = zip(*(apply(*call) for call in calls), strict=True)
        return tuple(torch.stack(o) for o in outputs), (0,) * 8


def _fake_forward(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    class_weight: Tensor | None,
    threshold: Tensor | None,
    first_class: int,
    num_classes: int,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    compute: torch.dtype,
    input_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, ...]:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return input.new_empty(shape, dtype=dtype)

    rows = input.shape[0]
    kind = torch.float32 if input.dtype == torch.float16 else input.dtype
    return (
        empty(rows) if reduction == 0 else empty(),
        empty(),
        empty(rows),
        empty(rows, dtype=torch.int64),
        empty(rows),
        empty(*(input.shape if input_grad else (0,)), dtype=kind),
        empty(*(weight.shape if weight_grad else (0,))),
        empty(rows),
    )


def _fake_backward(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: Tensor | None,
    temperature_value: float,
    class_weight: Tensor | None,
    first_class: int,
    num_classes: int,
    ignore_index: int,
    label_smoothing: float,
    compute: torch.dtype,
    lse: Tensor,
    grad_rows: Tensor,
    uniform_grad_weight: Tensor | None,
    input_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, ...]:
    return (
        input.new_empty(input.shape if input_grad else (0,)),
        weight.new_empty(weight.shape if weight_grad else (0,)),
        input.new_empty(input.shape[:1], dtype=torch.float32),
    )


define(__name__, FORWARD, _fake_forward)
define(__name__, BACKWARD, _fake_backward)


def _check(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> None:
    name = "cosine_cross_entropy"
    for word, tensor in (("input", input), ("weight", weight)):
        if tensor.ndim != 2:
            raise ValueError(f"{name}: {word} must have 2 dimensions, got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: {word} must be floating point, got {tensor.dtype}")
    if weight.shape[0] < 1 or weight.shape[1] != input.shape[1]:
        raise ValueError(f"{name}: weight must be [C >= 1, {input.shape[1]}], got {tuple(weight.shape)}")
    learnt = temperature if isinstance(temperature, Tensor) else None
    others = {"weight": weight, "target": target, "class_weight": class_weight, "temperature": learnt}
    for word, other in others.items():
        if other is not None and other.device != input.device:
            raise ValueError(f"{name}: {word} must be on {input.device} like input, got {other.device}")
    classes = weight.shape[0]
    if target.is_floating_point():
        if target.ndim != 2 or target.shape[1] != classes:
            raise ValueError(f"{name}: target probabilities must be [N or B, {classes}], got {tuple(target.shape)}")
    elif target.dtype != torch.int64:
        raise TypeError(f"{name}: target must be int64 class ids or floating point probabilities, got {target.dtype}")
    elif target.ndim != 1:
        raise ValueError(f"{name}: target ids must have 1 dimension, got shape {tuple(target.shape)}")
    rows, given = input.shape[0], target.shape[0]
    if given != rows and (given == 0 or rows % given):
        raise ValueError(f"{name}: target must have {rows} rows or a divisor of that, got {given}")
    if class_weight is not None and class_weight.shape != (classes,):
        raise ValueError(f"{name}: class_weight must be [{classes}], got {tuple(class_weight.shape)}")
    if isinstance(temperature, Tensor):
        if temperature.ndim or not temperature.is_floating_point():
            kind = f"{temperature.dtype} of shape {tuple(temperature.shape)}"
            raise ValueError(f"{name}: temperature must be a float or a 0-d floating point tensor, got {kind}")
        if readable(temperature) and not temperature.item() > 0:
            raise ValueError(f"{name}: temperature must be above 0, got {temperature.item()}")
    elif not temperature > 0:
        raise ValueError(f"{name}: temperature must be above 0, got {temperature}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if target.dtype == torch.int64 and target.numel() and readable(target):
        low, high = target.aminmax()
        if low.item() < 0 or high.item() >= classes:
            bad = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
            if bad.numel():
                raise ValueError(f"{name}: target must be in [0, {classes}) or {ignore_index}, got {int(bad[0])}")
