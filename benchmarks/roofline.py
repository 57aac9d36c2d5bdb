"""The least that a training step computes and moves, kernel by kernel, and the speed that a machine allows it.

Every pass over a tensor is charged to memory, caches are not credited. Four levels say what is fused:

- L0, eager: convolution | statistics | normalisation | ReLU | sum, each a pass of its own.
- L1: batch norm, residual and ReLU are one operator with statistics in two passes.
- L2: and statistics come out of the convolutions, those of the backward out of their gradients.
- L3: and what is elementwise happens where the next convolution reads.

A convolution's gradients are the two that it has; the stem needs none of its input. What is computed again
(``model.recompute``) is not counted: it is no part of the least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from fastrex import objectives
from fastrex.config import Config
from fastrex.errors import FastrexError
from fastrex.model.resnet import ARCHS

OBJECTIVES = ("class_means", "cosine_softmax")  # whose head is known here, and in the steps to compare with
LEVELS = ("L0", "L1", "L2", "L3")
EMA, HEAD, BACKWARD, OPTIMISER = "EMA", "head", "backward", "optimiser"
FP32 = 4  # bytes


def forward_part(side: int) -> str:
    """Name of the forward of the crops of this side."""
    return f"forward {side}"


@dataclass(frozen=True)
class Kernel:
    """FLOPs and bytes of one kernel, per source image; ``part`` is the part of the step that it belongs to."""

    part: str
    kind: str
    flops: float
    bytes: float


@dataclass(frozen=True)
class Step:
    """A training step's kernels, per source image."""

    kernels: tuple[Kernel, ...]

    def parts(self) -> list[str]:
        return list(dict.fromkeys(k.part for k in self.kernels))

    def flops(self, part: str | None = None) -> float:
        return sum(k.flops for k in self.kernels if part in (None, k.part))

    def bytes(self, part: str | None = None) -> float:
        return sum(k.bytes for k in self.kernels if part in (None, k.part))

    def images_per_s(self, peak: float, bandwidth: float) -> float:
        """The most images per second where ``peak`` FLOP/s and ``bandwidth`` bytes/s are reached: each kernel takes the
        longer of its two times, and none runs beside another."""
        return 1 / sum(max(k.flops / peak, k.bytes / bandwidth) for k in self.kernels)


@dataclass(frozen=True)
class Conv:
    """A square convolution: channels, side of the kernel, stride, side of the picture before and after."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    before: int
    after: int

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * self.kernel**2

    @property
    def flops(self) -> int:
        return 2 * self.weights * self.after**2

    @property
    def whole(self) -> int:
        """Elements of the input."""
        return self.inputs * self.before**2

    @property
    def read(self) -> int:
        """Elements of the input that are read: a strided 1x1 touches every stride-th pixel only."""
        return self.inputs * self.after**2 if self.kernel == 1 else self.whole

    @property
    def written(self) -> int:
        return self.outputs * self.after**2


@dataclass(frozen=True)
class Block:
    """A residual block: its convolutions in order, and that of the shortcut."""

    convs: tuple[Conv, ...]
    shortcut: Conv | None

    def every(self) -> tuple[Conv, ...]:
        return self.convs if self.shortcut is None else (*self.convs, self.shortcut)


@dataclass(frozen=True)
class Network:
    """An encoder at one resolution; ``pooled`` is the side after the stem's max pool, None where there is none."""

    stem: Conv
    pooled: int | None
    blocks: tuple[Block, ...]

    @property
    def features(self) -> int:
        return self.blocks[-1].convs[-1].outputs

    @property
    def parameters(self) -> int:
        convs = [self.stem, *(conv for block in self.blocks for conv in block.every())]
        return sum(conv.weights + 2 * conv.outputs for conv in convs)


def network(config: Config, side: int) -> Network:
    """The encoder of ``config`` on crops of ``side`` pixels.

    Raises:
        FastrexError: it is none of ``ARCHS``.
    """
    model = config.model
    if model.arch not in ARCHS:
        raise FastrexError(f"roofline: model.arch must be one of {', '.join(ARCHS)}, got {model.arch!r}")
    bottleneck, depths = ARCHS[model.arch]
    halves = model.stem == "imagenet"
    at = -(-side // 2) if halves else side
    stem = Conv(config.data.channels, model.width, 7 if halves else 3, 2 if halves else 1, side, at)
    pooled = -(-at // 2) if halves else None
    blocks, inputs, at = [], model.width, pooled or at
    for stage, depth in enumerate(depths):
        planes = model.width << stage
        outputs = planes * 4 if bottleneck else planes
        for number in range(depth):
            stride = 2 if stage and not number else 1
            after = -(-at // stride)
            convs: tuple[Conv, ...]
            if bottleneck:
                convs = (
                    Conv(inputs, planes, 1, 1, at, at),
                    Conv(planes, planes, 3, stride, at, after),
                    Conv(planes, outputs, 1, 1, after, after),
                )
            else:
                convs = (Conv(inputs, planes, 3, stride, at, after), Conv(planes, planes, 3, 1, after, after))
            same = stride == 1 and inputs == outputs
            blocks.append(Block(convs, None if same else Conv(inputs, outputs, 1, stride, at, after)))
            inputs, at = outputs, after
    return Network(stem, pooled, tuple(blocks))


def step(config: Config, classes: int, batch: int, itemsize: int, level: int) -> Step:
    """The kernels of a step on ``batch`` images, with activations of ``itemsize`` bytes and what ``level`` fuses.

    Raises:
        FastrexError: an encoder or an objective whose kernels are not known here.
    """
    if config.objective.name not in OBJECTIVES:
        raise FastrexError(
            f"roofline: objective.name must be {' or '.join(OBJECTIVES)}, got {config.objective.name}; choose another "
            "configuration"
        )
    data = config.data
    # Neighbouring groups of one size share a pass.
    passes = [(side, sum(n for n, _ in group)) for side, group in groupby(data.crops, key=lambda c: c[1])]
    follows = objectives.lookup(config.objective.name).needs_ema
    ledger = _Ledger(itemsize, level)
    for side, count in passes:
        encoder = network(config, side)
        _forward(encoder, ledger.of(forward_part(side), count), train=True)
        _backward(encoder, ledger.of(BACKWARD, count))
    rows = data.global_crops + data.local_crops
    widths = [encoder.features, *[config.projector.hidden_dim] * config.projector.hidden_layers]
    out = config.projector.out_dim
    _projector(widths, out, ledger.of(HEAD, rows), ledger.of(BACKWARD, rows))
    pairs = out * classes
    ledger.of(HEAD, rows).add("cosine_head", out, flops=2 * pairs)
    # The logits are computed again, then the gradient of the features and, if they are learnt, of the class weights.
    ledger.of(BACKWARD, rows).add("cosine_head", 2 * out, flops=(4 if follows else 6) * pairs)
    if follows:
        _forward(network(config, data.global_size), ledger.of(EMA), train=False)
        _projector(widths, out, ledger.of(EMA), None)
    projector = sum(a * b + 3 * b for a, b in pairwise(widths)) + widths[-1] * out
    model = encoder.parameters + projector
    moved = _updates(model, follows, 0 if follows else pairs, len(passes), ledger)
    ledger.of(OPTIMISER).add("optimiser", 0, raw=moved / batch)
    return Step(tuple(ledger.kernels))


class _Ledger:
    """Where kernels are entered; :meth:`of` gives one that enters them for a part, ``times`` over."""

    def __init__(self, itemsize: int, level: int) -> None:
        self.itemsize, self.level = itemsize, level
        self.kernels: list[Kernel] = []
        self.part, self.times = "", 1
        # A bit per element, in elements.
        self.mask = 1 / (8 * itemsize)

    def of(self, part: str, times: int = 1) -> _Ledger:
        other = _Ledger(self.itemsize, self.level)
        other.kernels, other.part, other.times = self.kernels, part, times
        return other

    def add(self, kind: str, elements: float, *, flops: float = 0.0, raw: float = 0.0) -> None:
        """``elements`` are activations that are read or written, ``raw`` further bytes."""
        moved = elements * self.itemsize + raw
        self.kernels.append(Kernel(self.part, kind, self.times * flops, self.times * moved))

    def conv(self, conv: Conv) -> None:
        self.add("conv", conv.read + conv.written, flops=conv.flops)


def _forward(net: Network, to: _Ledger, *, train: bool) -> None:
    """One picture through the encoder. Without ``train`` nothing is kept for a backward."""
    level, stem = to.level, net.stem

    def normalise(elements: int, shortcut: int = 0) -> None:
        if level == 0:
            to.add("bn_stats", elements)
            to.add("bn_apply", 2 * elements)
            if shortcut:
                to.add("add", 3 * elements)
            to.add("relu", 2 * elements)
            return
        if level == 1:
            to.add("bn_stats", elements)
        to.add("bn_act", 2 * elements + shortcut)

    if level == 0 and to.itemsize != FP32:
        to.add("cast", 0, raw=stem.whole * (FP32 + to.itemsize))
    to.conv(stem)
    if level < 3:
        normalise(stem.written)
    if net.pooled is not None:
        pooled = stem.outputs * net.pooled**2
        to.add("maxpool", stem.written + pooled, raw=pooled * _index_bytes(level) if train else 0)
    for block in net.blocks:
        last = block.convs[-1].written
        for conv in block.every():
            to.conv(conv)
        if level == 3:
            # The sum at the end is written once; the next block's first convolution, counted by itself, reads it in
            # the same pass.
            to.add("tail", 3 * last - (0 if block is net.blocks[-1] else last))
            continue
        for conv in block.convs[:-1]:
            normalise(conv.written)
        if block.shortcut is not None and level < 2:
            to.add("bn_stats", last)
            if level == 0:
                to.add("bn_apply", 2 * last)
        normalise(last, shortcut=last)
    to.add("avgpool", net.blocks[-1].convs[-1].written)


def _index_bytes(level: int) -> int:
    """What the max pool keeps per output: eager code an int64, fused code a byte."""
    return 8 if level == 0 else 1


def _backward(net: Network, to: _Ledger) -> None:
    """The gradients of one picture."""
    level, stem = to.level, net.stem
    # At L3 the elementwise part of batch norm's backward happens where its gradient is read, from two tensors.
    gradient = 2.0 if level == 3 else 1.0

    def conv(one: Conv, *, to_input: bool = True) -> None:
        if to_input:
            written = one.whole if level < 2 else one.read
            to.add("dgrad", gradient * one.written + written, flops=one.flops)
        to.add("wgrad", gradient * one.written + one.read, flops=one.flops)

    def normalise(elements: int) -> None:
        if level == 0:
            to.add("relu_bwd", 3 * elements)
        to.add("bn_reduce" if level < 2 else "dgrad_epilogue", (2 if level < 2 else 1) * elements)
        if level < 3:
            to.add("bn_elementwise", 3 * elements)

    def tail(elements: int, shortcut: bool) -> None:
        more = elements if shortcut else 0
        if level == 0:
            to.add("relu_bwd", 3 * elements)
            for _ in range(2 if shortcut else 1):
                to.add("bn_reduce", 2 * elements)
                to.add("bn_elementwise", 3 * elements)
        elif level == 1:
            to.add("bn_reduce", (2 + to.mask) * elements + more)
            to.add("bn_elementwise", (4 + to.mask) * elements + more)
        else:
            to.add("dgrad_epilogue", (1 + to.mask) * elements + more)
            if level == 2:
                to.add("bn_elementwise", 3 * elements + 2 * more)

    to.add("avgpool_bwd", net.blocks[-1].convs[-1].written)
    for block in reversed(net.blocks):
        tail(block.convs[-1].written, block.shortcut is not None)
        for place in reversed(range(len(block.convs))):
            conv(block.convs[place])
            if place:
                normalise(block.convs[place - 1].written)
        if block.shortcut is not None:
            conv(block.shortcut)
        # Where the block begins, the gradients of its two ways are summed.
        to.add("grad_add", {0: 3, 1: 2}.get(level, 1) * block.convs[0].whole)
    if net.pooled is not None:
        pooled = stem.outputs * net.pooled**2
        to.add("maxpool_bwd", pooled + stem.written, raw=pooled * _index_bytes(level))
    normalise(stem.written)
    conv(stem, to_input=False)


def _projector(widths: Sequence[int], out: int, forward: _Ledger, backward: _Ledger | None) -> None:
    """One row through the projector, and back."""

    def linear(a: int, b: int) -> None:
        forward.add("linear", a + b, flops=2 * a * b)
        if backward is not None:
            backward.add("linear", 2 * a + 2 * b, flops=4 * a * b)

    for a, b in pairwise(widths):
        linear(a, b)
        forward.add("bn1d_gelu", 3 * b)
        if backward is not None:
            backward.add("bn1d_gelu", 5 * b)
    linear(widths[-1], out)


def _updates(model: int, follows: bool, weights: int, passes: int, to: _Ledger) -> float:
    """Bytes per step whatever the batch: SGD, EMA and casts of ``model`` parameters, whose gradients come from
    ``passes``, and SGD of ``weights`` of classes."""
    narrow = to.itemsize != FP32
    sgd = 5 * FP32  # parameter, gradient and momentum read, parameter and momentum written
    cast = FP32 + to.itemsize if narrow else 0
    # In place, or a product, a product and a sum.
    ema = ((3 if to.level else 7) * FP32 + cast) if follows else 0
    used = 3 * to.itemsize * passes  # read forward and backward, gradient written
    gathered = (to.itemsize + FP32 if narrow else 0) + 3 * FP32 * (passes - 1)
    return float(model * (sgd + cast + ema + used + gathered) + weights * sgd)


def bounds(config: Config, classes: int, batch: int, itemsize: int) -> dict[str, Step]:
    """The step at every level."""
    return {name: step(config, classes, batch, itemsize, level) for level, name in enumerate(LEVELS)}
