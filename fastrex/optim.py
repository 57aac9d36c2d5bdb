"""Gradients, learning rate and momentum of the optimiser step, loss scaling, and the guard against numbers gone bad.

Everything that a step decides stays on the device; the loop reads it on logging steps only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from . import distributed
from .config import STAGES, OptimConfig
from .distributed import World
from .errors import FastrexError
from .sgd import IMPLS

GROWTH_INTERVAL = 2000  # steps without overflow before the scale doubles, as torch.amp.GradScaler
MAX_SKIPPED = 20  # overflows in a row before the run stops
# Below 1 a scale would make small gradients vanish, which it is there to prevent; gradients of exactly 0 would let it
# grow to infinity, from where it never comes back.
SCALES = (1.0, 2.0**32)
ENCODER = "model.encoder."  # how the names of the encoder's parameters begin


class Optimizer:
    """SGD with momentum over named parameters, the EMA copies that follow them, and low-precision copies of both.

    Weight decay goes to parameters with two or more dimensions: biases and BatchNorm's affine have one.

    A parameter whose learning rate carries a factor s (:func:`rate_factors`) has its gradient and its weight decay
    multiplied by s instead. SGD with momentum is linear in both, so that its buffer then holds s times what it would,
    and the update is the same whatever the schedule does; one multiplication of the gradients of each factor but 1, on
    the device, serves every implementation of the update alike. The norm that is logged is that of the gradients as
    they came.

    Args:
        parameters: name -> parameter. ema: name -> EMA copy, for the parameters that have one.
        copies, ema_copies: name -> low-precision tensor that a parameter or its EMA is rounded into in every step.
        gradients: where ``.grad`` lives. "fresh": a new tensor in every step, which the backward hands over without a
            copy. "flat": from the second step on views into one buffer, whose addresses stay (for a CUDA graph) and
            which one kernel clears and one measures. Parameters without a gradient after the first backward stay out,
            and so stay as they are. "kept": whatever stands there is cleared (the buckets of DistributedDataParallel).
        split: names of parameters of which each rank of ``world`` holds other rows.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        ema: Mapping[str, Tensor],
        config: OptimConfig,
        ema_momentum: float,
        *,
        copies: Mapping[str, Tensor] | None = None,
        ema_copies: Mapping[str, Tensor] | None = None,
        gradients: str = "fresh",
        split: Collection[str] = (),
        world: World | None = None,
    ) -> None:
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        if not self.parameters:
            raise FastrexError(
                "train: a run must have a weight to train, got none: the whole encoder is frozen, and neither a "
                "projector nor the objective has weights; lower model.frozen_stages"
            )
        self.factors = rate_factors(self.parameters, config)
        self.ema, self.copies, self.ema_copies = ema, copies or {}, ema_copies or {}
        decayed = {name: config.weight_decay if p.ndim > 1 else 0.0 for name, p in self.parameters.items()}
        self.decay = {name: decay * self.factors.get(name, 1.0) for name, decay in decayed.items()}
        self.buffers = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.parameters.items()}
        self.host_lr = 0.0
        self.lr = torch.zeros((), device=next(iter(self.parameters.values())).device)
        self.gradients, self.split, self.world = gradients, frozenset(split), world
        self.flat: Tensor | None = None
        self.update = IMPLS[config.impl](self, config.momentum, ema_momentum)

    def zero_grad(self) -> None:
        if self.flat is not None:
            self.flat.zero_()
        elif self.gradients == "kept":
            if grads := self._grads():  # none before the first backward
                torch._foreach_zero_(grads)
        else:
            for p in self.parameters.values():
                p.grad = None

    def grad_norm(self, inv_scale: Tensor | None = None) -> Tensor:
        """Euclidean norm of all (unscaled) gradients, 0-d, the same on every rank; not finite when any gradient is
        not, on whatever rank."""
        if self.gradients == "flat" and self.flat is None:
            self.flat = _flattened([p for p in self.parameters.values() if p.grad is not None])
        if self.flat is not None:
            norm: Tensor = torch.linalg.vector_norm(self.flat)
        else:
            norms = torch.stack(torch._foreach_norm(self._grads(self.parameters.keys() - self.split)))
            if self.split and self.world is not None:
                # Summed in the order of the ranks, not in that of a reduction: equal bits everywhere.
                own = torch.stack(torch._foreach_norm(self._grads(self.split)))
                norms = torch.cat([norms, distributed.gather_rows(own, self.world)])
            norm = torch.linalg.vector_norm(norms)
        return norm if inv_scale is None else norm * inv_scale

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step. It lives on the device, where a captured step finds it."""
        self.host_lr = lr
        self.lr.fill_(lr)

    def step(self, skip: Tensor, inv_scale: Tensor | None) -> None:
        """Update every parameter that has a gradient; leave everything where ``skip`` (0-d bool) is True."""
        for factor in dict.fromkeys(self.factors.values()):
            if grads := self._grads([name for name, own in self.factors.items() if own == factor]):
                torch._foreach_mul_(grads, factor)
        self.update(skip, inv_scale)

    def state(self) -> dict[str, Tensor]:
        return {f"momentum.{name}": buffer for name, buffer in self.buffers.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        load_tensors(self.state(), state, "optimizer")

    def _grads(self, names: Collection[str] | None = None) -> list[Tensor]:
        chosen = ((name, p.grad) for name, p in self.parameters.items() if names is None or name in names)
        return [grad for _, grad in chosen if grad is not None]


def rate_factors(names: Iterable[str], config: OptimConfig) -> dict[str, float]:
    """Factors on the learning rate, by parameter; those of 1 are left out.

    ``optim.encoder_lr`` stands on all of the encoder's; ``optim.layer_decay`` = d puts d on its last stage, d^2 on the
    one before, and so on to its stem (layer-wise learning rates, Howard & Ruder, "Universal language model fine-tuning
    for text classification", ACL 2018).

    Args:
        names: of the training method's parameters: the encoder's begin with ``model.encoder.``.

    Raises:
        FastrexError: a decay for an encoder whose stages are not a ResNet's.
    """
    factors: dict[str, float] = {}
    for name in names:
        if not name.startswith(ENCODER):
            continue
        factors[name] = config.encoder_lr
        if config.layer_decay != 1:
            layer = name.removeprefix(ENCODER).split(".")[0]
            stage = "stem" if layer in ("conv1", "bn1") else layer
            if stage not in STAGES:
                raise FastrexError(
                    "train: optim.layer_decay must be 1 for an encoder whose stages are not a ResNet's "
                    f"({', '.join(STAGES)}), got {config.layer_decay:g} with a layer {layer!r}; use optim.encoder_lr"
                )
            factors[name] *= config.layer_decay ** (len(STAGES) - STAGES.index(stage))
    return {name: factor for name, factor in factors.items() if factor != 1}


def _flattened(parameters: Sequence[nn.Parameter]) -> Tensor:
    """One buffer with the gradients of ``parameters``, which become views of it in the parameters' own layouts."""
    # Each starts at 256 bytes, as torch's allocators align tensors.
    starts = [0]
    for p in parameters:
        starts.append(starts[-1] + -(-p.numel() // 64) * 64)
    flat = parameters[0].new_zeros(starts[-1], requires_grad=False)
    for p, start in zip(parameters, starts, strict=False):
        own = p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)
        view = flat.as_strided(p.shape, p.stride(), start) if own else flat[start : start + p.numel()].view(p.shape)
        p.grad = view.copy_(p.grad)  # type: ignore[arg-type]
    return flat


class Guard(nn.Module):
    """Loss scale and the record of bad numbers, all of it 0-d device tensors.

    A loss or feature that is not finite (or, without fp16, a gradient) marks the run as diverged at that step: from
    then on neither weights nor momentum, EMA, bank or scale change (BatchNorm's running statistics do, in the forward),
    until the loop reads the mark and stops, before it saves anything. With fp16 a gradient that overflows skips the
    step and halves the scale. ``MAX_SKIPPED`` of them in a row mark the run as diverged too, and so does one at the
    lowest scale, which no halving helps.
    """

    scale: Tensor
    growth: Tensor
    skipped: Tensor
    diverged: Tensor

    def __init__(self, fp16: bool) -> None:
        super().__init__()
        self.fp16 = fp16
        self.register_buffer("scale", torch.tensor(65536.0 if fp16 else 1.0))
        self.register_buffer("growth", torch.zeros((), dtype=torch.int64))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))
        self.register_buffer("diverged", torch.full((), -1, dtype=torch.int64))

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * self.scale if self.fp16 else loss

    @property
    def inv_scale(self) -> Tensor | None:
        return 1 / self.scale if self.fp16 else None

    def report(self) -> dict[str, Tensor]:
        """What the log should know, as 0-d tensors that the next steps change."""
        scale = {"loss_scale": self.scale} if self.fp16 else {}
        return {**scale, "skipped_in_a_row": self.skipped, "diverged": self.diverged}

    @torch.no_grad()
    def judge(self, step: Tensor, values_ok: Tensor, grads_ok: Tensor) -> tuple[Tensor, Tensor]:
        """Decide this step (its number, a 0-d tensor) from two 0-d bools that agree on all ranks; return (skip the
        update, keep the bank's features)."""
        overflow = (values_ok & ~grads_ok) if self.fp16 else torch.zeros_like(grads_ok)
        bad = ~values_ok if self.fp16 else ~(values_ok & grads_ok)
        live = self.diverged < 0
        if self.fp16:
            self.skipped.copy_(torch.where(live, torch.where(overflow, self.skipped + 1, 0), self.skipped))
            bad = bad | (self.skipped >= MAX_SKIPPED) | (overflow & (self.scale <= SCALES[0]))
        self.diverged.copy_(torch.where(live & bad, step, self.diverged))
        keep = self.diverged < 0
        skip = overflow | ~keep
        if self.fp16:
            growth = torch.where(overflow, 0, self.growth + 1)
            grow = growth >= GROWTH_INTERVAL
            factor = torch.where(overflow, 0.5, torch.where(grow, 2.0, 1.0))
            self.scale.copy_(torch.where(keep, (self.scale * factor).clamp(*SCALES), self.scale))
            self.growth.copy_(torch.where(keep, torch.where(grow, 0, growth), self.growth))
        return skip, keep


def check_tensors(target: Mapping[str, Tensor], source: Mapping[str, Tensor], what: str) -> None:
    """Refuse a missing or surplus tensor, or one of another shape or dtype, by name."""
    missing, surplus = sorted(target.keys() - source.keys()), sorted(source.keys() - target.keys())
    if missing or surplus:
        name, fact = (missing[0], "lacks") if missing else (surplus[0], "has an unknown")
        raise FastrexError(f"resume: checkpoint {fact} {what} tensor {name!r}; it belongs to another configuration")
    for name, tensor in target.items():
        if tensor.shape != source[name].shape:
            raise FastrexError(
                f"resume: {what} tensor {name!r} must be {tuple(tensor.shape)}, got {tuple(source[name].shape)}; "
                "the checkpoint belongs to another configuration"
            )
        if tensor.dtype != source[name].dtype:
            raise FastrexError(
                f"resume: {what} tensor {name!r} must be {tensor.dtype}, got {source[name].dtype}; "
                "the checkpoint belongs to another configuration"
            )


def load_tensors(target: Mapping[str, Tensor], source: Mapping[str, Tensor], what: str) -> None:
    """Copy every tensor in place, once :func:`check_tensors` has found no fault."""
    check_tensors(target, source, what)
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])
