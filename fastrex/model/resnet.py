"""ResNet encoders (He et al. 2016, v1.5) with torchvision's parameter names, channels-last from end to end.

The network ends at the global average pool: there is no ``fc``. Its ``state_dict`` has exactly the keys of
torchvision's model without ``fc.*``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from ..config import STAGES
from ..errors import FastrexError, UsageError
from ..settings import nearest
from .layers import Conv2d, global_average
from .norm import BatchNormAct
from .recompute import recomputed

if TYPE_CHECKING:
    from ..config import ModelConfig

ARCHS: dict[str, tuple[bool, tuple[int, int, int, int]]] = {
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
}
"""Name -> (bottleneck blocks instead of basic ones, blocks per stage)."""

STEMS = ("imagenet", "small")


Norm = Callable[..., BatchNormAct]


class Block(nn.Module):
    """Residual block: 3x3, 3x3 (basic) or 1x1, 3x3, 1x1 (bottleneck); the first 3x3 carries the stride (v1.5).

    Attributes:
        recompute: keep only the input for the backward, and compute the rest again there.
    """

    recompute = False

    def __init__(self, inputs: int, planes: int, stride: int, bottleneck: bool, norm: Norm) -> None:
        super().__init__()
        outputs = planes * (4 if bottleneck else 1)
        if bottleneck:
            self.conv1 = Conv2d(inputs, planes, 1)
            self.bn1 = norm(planes)
            self.conv2 = Conv2d(planes, planes, 3, stride)
            self.bn2 = norm(planes)
            self.conv3: Conv2d | None = Conv2d(planes, outputs, 1)
            self.bn3: BatchNormAct | None = norm(outputs)
        else:
            self.conv1 = Conv2d(inputs, planes, 3, stride)
            self.bn1 = norm(planes)
            self.conv2 = Conv2d(planes, planes, 3)
            self.bn2 = norm(planes)
            self.conv3 = self.bn3 = None
        self.downsample = (
            nn.Sequential(Conv2d(inputs, outputs, 1, stride), norm(outputs, relu=False))
            if stride != 1 or inputs != outputs
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        return recomputed(self._compute, x) if self.recompute and torch.is_grad_enabled() else self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.conv2(self.bn1(self.conv1(x)))
        if self.conv3 is not None and self.bn3 is not None:
            y = self.conv3(self.bn2(y))
            out: Tensor = self.bn3(y, shortcut)
        else:
            out = self.bn2(y, shortcut)
        return out


class ResNet(nn.Module):
    """ResNet without a classifier: images [B, C, H, W] -> features [B, num_features] (global average pool).

    Args:
        arch: one of ``ARCHS``.
        stem: "imagenet" (7x7 convolution of stride 2, max pool) or "small" (3x3 of stride 1, no pool: up to 64 px).
        width: channels of the stem; 64 is the published network, every other layer scales with it.
        bn_momentum: momentum of the running statistics.
        bn_eps: eps of the batch normalisation.
        channels: C, of the images: 3, or 1 for grey ones.
        bn: what computes the batch norms, see :mod:`fastrex.model.norm`.

    Convolutions start from Kaiming's normal (fan-out, ReLU), batch norms from 1 and 0, also the last of each block.
    Weights are kept channels-last and inputs are brought to that format.

    Attributes:
        frozen: how many of ``STAGES``, from the stem on, :meth:`freeze` has frozen.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential
    frozen = 0

    def __init__(
        self,
        arch: str,
        *,
        stem: str = "imagenet",
        width: int = 64,
        bn_momentum: float = 0.1,
        bn_eps: float = 1e-5,
        channels: int = 3,
        bn: str = "fused",
    ) -> None:
        super().__init__()
        if arch not in ARCHS:
            raise ValueError(f"ResNet: arch must be one of {', '.join(ARCHS)}, got {arch!r}")
        if stem not in STEMS:
            raise ValueError(f"ResNet: stem must be one of {', '.join(STEMS)}, got {stem!r}")
        if width < 1:
            raise ValueError(f"ResNet: width must be positive, got {width}")
        if channels not in (1, 3):
            raise ValueError(f"ResNet: channels must be 1 or 3, got {channels}")
        bottleneck, depths = ARCHS[arch]
        norm = partial(BatchNormAct, eps=bn_eps, momentum=bn_momentum, backend=bn)
        self.conv1 = Conv2d(channels, width, 7, 2) if stem == "imagenet" else Conv2d(channels, width, 3)
        self.bn1 = norm(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        inputs = width
        for stage, depth in enumerate(depths):
            planes = width << stage
            blocks = []
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Block(inputs, planes, stride, bottleneck, norm))
                inputs = planes * (4 if bottleneck else 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.num_features = inputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        convert_conv2d_weight_memory_format(self, torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if self.frozen:
            with torch.no_grad():
                x = self._through(x, 0, self.frozen)
        return global_average(self._through(x, self.frozen, len(STAGES)))

    def freeze(self, stages: int) -> None:
        """Let the first ``stages`` of ``STAGES`` stay as they are: without gradients and without what a backward would
        need, their batch norms in eval mode whatever mode the network is in."""
        self.frozen = stages
        for stage in self._stages()[:stages]:
            for module in stage:
                module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> ResNet:
        super().train(mode)
        for stage in self._stages()[: self.frozen]:
            for module in stage:
                module.eval()
        return self

    def _stages(self) -> list[list[nn.Module]]:
        stem: list[nn.Module] = [self.conv1, self.bn1, self.maxpool]
        return [stem, [self.layer1], [self.layer2], [self.layer3], [self.layer4]]

    def _through(self, x: Tensor, start: int, stop: int) -> Tensor:
        for stage in self._stages()[start:stop]:
            for module in stage:
                x = module(x)
        return x


def build_encoder(model: ModelConfig, channels: int = 3) -> nn.Module:
    """The encoder that a configuration asks for: a module [B, channels, H, W] -> [B, D] with ``num_features`` = D.

    ``timm:NAME`` gives timm's model with fresh weights, pooled output and its own normalisation settings.

    Raises:
        FastrexError: timm is not installed, does not know NAME, or ``stem``, ``width`` or ``frozen_stages`` are set for
            a timm model.
        UsageError: unknown arch.
    """
    if not model.arch.startswith("timm:"):
        if model.arch not in ARCHS:
            raise UsageError(
                f"config: model.arch must be one of {', '.join(ARCHS)} or timm:NAME, got {model.arch!r}"
                f"{nearest(model.arch, list(ARCHS))}"
            )
        encoder = ResNet(
            model.arch,
            stem=model.stem,
            width=model.width,
            bn_momentum=model.bn_momentum,
            bn_eps=model.bn_eps,
            channels=channels,
            bn=model.bn,
        )
        encoder.freeze(model.frozen_stages)
        return encoder
    if model.stem != "imagenet" or model.width != 64:
        raise FastrexError(
            f"train: model.stem and model.width must keep their defaults for {model.arch}, got {model.stem!r} and "
            f"{model.width}; set model.stem=imagenet model.width=64"
        )
    if model.frozen_stages:
        raise FastrexError(
            f"train: model.frozen_stages must be 0 for {model.arch}, got {model.frozen_stages}: only the stages of "
            f"{', '.join(ARCHS)} are known; use optim.encoder_lr"
        )
    return timm_encoder(model.arch.removeprefix("timm:"), channels)


def timm_encoder(name: str, channels: int = 3) -> nn.Module:
    """timm's model ``name`` with fresh weights and no classifier; ``num_features`` is the length of its output."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        # A torchvision that was built for another torch fails with a RuntimeError of its operators.
        reason = str(error).splitlines()[0]
        raise FastrexError(
            f"model.arch timm:{name} needs timm and a torchvision that fits this torch ({reason}): pip install timm"
        ) from error
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "see timm.list_models()"
        raise FastrexError(
            f"model.arch must be timm: and a name that timm {timm.__version__} knows ({near}), got {name!r}"
        )
    encoder: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels)
    # Some of timm's models widen the pooled vector once more before their classifier.
    encoder.num_features = getattr(encoder, "head_hidden_size", None) or encoder.num_features
    convert_conv2d_weight_memory_format(encoder, torch.channels_last)
    return encoder


def infer_arch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Read ``dict(arch, stem, width)``, the arguments of :class:`ResNet`, from the keys and shapes of its state.

    Keys that are not the encoder's (``fc.*``) do not matter.

    Raises:
        FastrexError: the state is not that of a plain ResNet-18, 34, 50 or 101.
    """
    conv1 = state_dict.get("conv1.weight")
    if (
        not isinstance(conv1, Tensor)
        or conv1.dim() != 4
        or conv1.shape[1] not in (1, 3)
        or conv1.shape[2] not in (3, 7)
    ):
        got = "none" if conv1 is None else str(list(getattr(conv1, "shape", ())))
        raise FastrexError(
            f"infer_arch: state_dict must hold a ResNet's conv1.weight [width, 3 or 1, 7 or 3, ...], got {got}"
        )
    bottleneck = "layer1.0.conv3.weight" in state_dict
    blocks = {match.groups() for key in state_dict if (match := re.match(r"layer([1-4])\.(\d+)\.conv1\.weight$", key))}
    depths = tuple(sum(stage == str(number) for stage, _ in blocks) for number in range(1, 5))
    for arch, kind in ARCHS.items():
        if kind == (bottleneck, depths):
            stem = "imagenet" if conv1.shape[2] == 7 else "small"
            return {"arch": arch, "stem": stem, "width": int(conv1.shape[0])}
    block = "bottleneck" if bottleneck else "basic"
    raise FastrexError(f"infer_arch: state_dict must be that of {', '.join(ARCHS)}, got {block} blocks {list(depths)}")


def match_channels(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """``state`` for the image channels of ``wanted``, and a few words on what was changed ("" for nothing).

    The first layer of an encoder of colour images is summed over its three input channels for grey ones, that of a grey
    one is repeated and divided by 3: then grey images give the same response in either, but for the normalisation of
    the single channels (timm does the same).
    """
    result, words = dict(state), ""
    for name, own in wanted.items():
        given = state.get(name)
        if given is None or own.dim() != 4 or given.dim() != 4 or given.shape[2:] != own.shape[2:]:
            continue
        if (given.shape[1], own.shape[1]) == (3, 1):
            result[name] = given.sum(dim=1, keepdim=True)
            words = f"the three input channels of {name} are summed for grey images"
        elif (given.shape[1], own.shape[1]) == (1, 3):
            result[name] = given.repeat(1, 3, 1, 1) / 3
            words = f"the grey input channel of {name} is repeated, divided by 3, for colour images"
    return result, words
