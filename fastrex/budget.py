"""How much memory a training step needs, before the first one: a forward on tensors that have shapes and no memory."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from .model.layers import Conv2d, Linear, attach_copies
from .model.multicrop import MultiCropModel, set_process_group
from .model.norm import BatchNormAct
from .model.resnet import Block

GIB = 2**30
# Two numbers of images give the line through all others, exactly where they are multiples of eight: the masks of ReLUs
# have a bit per value.
FEW, MORE = 8, 16


def activations(
    model: MultiCropModel, crops: Sequence[tuple[int, int]], images: int, channels: int, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes that a forward keeps for its backward, at the moment when they are most.

    Args:
        model: with its ``recompute``. Nothing in it is changed.
        crops: (crops per image, their side) by group, in the order in which the model sees them.
        images: source images in a batch of this rank. channels: of the images. dtype: that autocast computes in.

    Returns:
        By resolution (``"224"``), of the projector (``"head"``), and what is computed again on top of all that
        (``"recomputed"``); the peak is their sum.
    """
    few, more = (_Measurement(model, crops, n, channels, dtype) for n in (FEW, MORE))

    def scaled(a: int, b: int) -> int:
        return a + (b - a) * (images - FEW) // (MORE - FEW)

    sizes = few.kept.keys()
    kept = {size: scaled(few.kept[size], more.kept[size]) for size in sizes}
    again = {size: scaled(few.again[size], more.again[size]) for size in sizes}
    head = scaled(few.head, more.head)
    total = peak = sum(kept.values()) + head
    below = 0
    for size in sizes:  # when the backward comes to a resolution, all later ones are gone
        below += kept[size]
        peak = max(peak, below + again[size])
    return {**kept, "head": head, "recomputed": peak - total}


def state_bytes(module: nn.Module, ema: nn.Module | None = None) -> int:
    """Bytes of parameters, buffers and low-precision copies, of gradient and momentum of all that is trained, and of
    the momentum encoder."""
    trained = [p for p in module.parameters() if p.requires_grad]
    tensors = [*_tensors(module), *([] if ema is None else _tensors(ema)), *trained, *trained]
    return sum(tensor.nbytes for tensor in tensors)


def budget_line(kept: Mapping[str, int], images: int, state: int, available: int | None = None) -> str:
    """One line for the log: what :func:`activations` and :func:`state_bytes` found, of ``available`` bytes."""
    total = sum(kept.values())
    parts = ", ".join(f"{name}: {_size(size)}" for name, size in kept.items() if name != "recomputed" or size)
    line = (
        f"memory: {_size(total)} activations for {images} images ({parts}), {_size(state)} weights, momentum, EMA and "
        "gradients"
    )
    if available is None:
        return line
    hint = "; too much: set optim.accumulate higher or model.recompute=passes" if total + state > available else ""
    return f"{line}, of {_size(available)}{hint}"


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


class _Measurement:
    """One forward of ``images`` images.

    Attributes:
        kept: bytes that stay from the forward to the backward, by resolution. again: the most that the backward
            computes again at one time, by resolution. head: bytes that the projector keeps.
    """

    def __init__(
        self,
        model: MultiCropModel,
        crops: Sequence[tuple[int, int]],
        images: int,
        channels: int,
        dtype: torch.dtype,
    ) -> None:
        passes = [(side, sum(n for n, _ in group)) for side, group in groupby(crops, key=lambda crop: crop[1])]
        self.kept: dict[str, int] = {}
        self.again: dict[str, int] = {}
        with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
            twin = _twin(model, dtype)
            saved = _Saved(twin)
            features = []
            with saved, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                for number, (side, count) in enumerate(passes):
                    label = str(side) if str(side) not in self.kept else f"{side} ({number + 1})"
                    saved.bytes.clear()
                    x = torch.empty((images * count, channels, side, side), dtype=dtype)
                    x = x.contiguous(memory_format=torch.channels_last)
                    features.append(twin.encode(x))
                    last = number == len(passes) - 1
                    self.kept[label], self.again[label] = _split(saved.bytes, model.recompute, x.nbytes, last)
                saved.bytes.clear()
                twin.projector(torch.cat(features))
        self.head = sum(saved.bytes.values())


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters, buffers and copies."""
    layers = [layer for layer in module.modules() if isinstance(layer, Conv2d | Linear)]
    copies = [copy for layer in layers for copy in (layer.weight_copy, layer.bias_copy) if copy is not None]
    return [*module.parameters(), *module.buffers(), *copies]


def _split(saved: Mapping[Any, int], recompute: str, images: int, last: bool) -> tuple[int, int]:
    """Bytes of one pass that stay, and the most that is computed again at one time.

    ``saved``: bytes by block (None outside of them); the input of a block is part of it.
    """
    total = sum(saved.values())
    if recompute == "passes" and not last:
        return images, total - images
    if recompute != "blocks":
        return total, 0
    inside = {block: size for block, size in saved.items() if isinstance(block, tuple)}
    return total - sum(inside.values()), max(inside.values(), default=0)


def _twin(model: MultiCropModel, dtype: torch.dtype) -> MultiCropModel:
    """The model on a CPU and in one process, without memory: its operators keep the same tensors as on any device."""
    # What deepcopy takes for copied already: process groups as they are, tensors as others of the same layout.
    known: dict[int, Any] = {id(g): g for m in model.modules() if (g := getattr(m, "process_group", None)) is not None}
    for tensor in (*model.parameters(), *model.buffers()):
        bare = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        known[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
    twin = copy.deepcopy(model, known).train()
    set_process_group(twin, None)
    for module in twin.modules():
        if isinstance(module, Block):
            module.recompute = False
        if isinstance(module, BatchNormAct) and module.backend == "apex":
            module.backend = "fused"  # which keeps the same; apex's kernels run on a GPU only
    if any(isinstance(m, Conv2d | Linear) and m.weight_copy is not None for m in model.modules()):
        attach_copies(twin, dtype)
    return twin


class _Saved(saved_tensors_hooks):
    """Counts the storages that are saved for the backward, by the block they are saved in, without the model's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self.bytes: Counter[Any] = Counter()
        self.block: Any = None
        own = _tensors(model)
        # By storage: its tensor, so that no later one gets the address, and the block.
        self.seen: dict[int, tuple[Tensor, Any]] = {t.untyped_storage()._cdata: (t, None) for t in own}
        for module in model.modules():
            if isinstance(module, Block):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def _enter(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.block = (id(block),)
        # What stays when the inside of blocks does not; the block that made it may have saved it too. A frozen block
        # keeps nothing.
        if torch.is_grad_enabled():
            self._count(inputs[0], None)

    def _leave(self, block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.block = None

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in self.seen:
            self._count(tensor, self.block)
        return tensor

    def _count(self, tensor: Tensor, block: Any) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.seen:
            self.bytes[self.seen[storage._cdata][1]] -= storage.nbytes()
        self.seen[storage._cdata] = tensor, block
        self.bytes[block] += storage.nbytes()
