"""A training step as researchers write it in PyTorch: modules of torch.nn with torchvision's names, EMA in a loop over
the parameters, prototypes by ``index_add_`` in every step, metrics by ``topk`` and ``.item()``.

``eager`` keeps pictures as [N, C, H, W] in memory and computes in float32 on a CPU, under autocast on a GPU;
``eager_cl`` is the same channels-last and always under autocast, with bfloat16 where the hardware has it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastrex import objectives
from fastrex.config import Config, ModelConfig, ProjectorConfig
from fastrex.data.dataset import DTYPES
from fastrex.distributed import World
from fastrex.step import resolve_precision

from ._absent import Absent

EAGER, CHANNELS_LAST = "eager", "eager_cl"
NAMES = (EAGER, CHANNELS_LAST)
DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Module | None, norm: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, planes, 3, stride), norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(planes, planes, 3), norm(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Module | None, norm: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, planes, 1), norm(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3, stride), norm(planes)
        self.conv3, self.bn3 = conv(planes, planes * 4, 1), norm(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()

        def norm(features: int) -> nn.BatchNorm2d:
            return nn.BatchNorm2d(features, eps=config.bn_eps, momentum=config.bn_momentum)

        block = BasicBlock if config.arch in ("resnet18", "resnet34") else Bottleneck
        large = config.stem == "imagenet"
        self.conv1, self.bn1 = conv(channels, config.width, 7 if large else 3, 2 if large else 1), norm(config.width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity()
        inputs, stages = config.width, []
        for stage, depth in enumerate(DEPTHS[config.arch]):
            planes, blocks = config.width << stage, []
            outputs = planes * block.expansion
            for number in range(depth):
                stride = 2 if stage and not number else 1
                same = stride == 1 and inputs == outputs
                downsample = None if same else nn.Sequential(conv(inputs, outputs, 1, stride), norm(outputs))
                blocks.append(block(inputs, planes, stride, downsample, norm))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.num_features = inputs

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(self.avgpool(x), 1)


class Projector(nn.Module):
    def __init__(self, features: int, config: ProjectorConfig, model: ModelConfig) -> None:
        super().__init__()
        self.input_norm = config.input_norm
        layers: list[nn.Module] = []
        for _ in range(config.hidden_layers):
            norm = nn.BatchNorm1d(config.hidden_dim, eps=model.bn_eps, momentum=model.bn_momentum)
            layers += [nn.Linear(features, config.hidden_dim), norm, nn.GELU()]
            features = config.hidden_dim
        layers.append(nn.Linear(features, config.out_dim, bias=False))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(F.normalize(x, dim=1) if self.input_norm else x)  # type: ignore[no-any-return]


class Model(nn.Module):
    """Encoder, one pass per resolution, projector over all rows, and the class weights where they are learnt."""

    def __init__(self, config: Config, classes: int) -> None:
        super().__init__()
        self.encoder = ResNet(config.model, config.data.channels)
        self.projector = Projector(self.encoder.num_features, config.projector, config.model)
        learnt = config.objective.name == "cosine_softmax"
        self.weight = nn.Parameter(torch.empty(classes, config.projector.out_dim)) if learnt else None

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        passes = [torch.cat(list(group)) for _, group in groupby(crops, key=lambda crop: crop.shape[-1])]
        return self.projector(torch.cat([self.encoder(pictures) for pictures in passes]))  # type: ignore[no-any-return]


class Memory(nn.Module):
    """The newest momentum features and their labels; class weights are the normalised sums per class."""

    features: Tensor
    labels: Tensor
    ptr: Tensor

    def __init__(self, size: int, dim: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.register_buffer("features", torch.randn(size, dim))
        self.register_buffer("labels", torch.randint(classes, (size,)))
        self.register_buffer("ptr", torch.zeros(1, dtype=torch.long))

    def class_weights(self) -> Tensor:
        sums = torch.zeros(self.classes, self.features.shape[1], device=self.features.device)
        return F.normalize(sums.index_add_(0, self.labels, self.features), dim=1)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        start = int(self.ptr)
        count = min(len(features), len(self.features) - start)
        self.features[start : start + count] = features[:count].to(self.features.dtype)
        self.labels[start : start + count] = labels[:count]
        self.ptr[0] = (start + count) % len(self.features)


class EagerStep:
    """One of ``NAMES``, from the weights in ``state`` (keys ``model.*`` and ``objective.*``, as fastrex names them).

    Raises:
        Absent: it cannot do what the configuration asks for.
    """

    def __init__(self, name: str, config: Config, classes: int, world: World, state: Mapping[str, Tensor]) -> None:
        if config.model.arch not in DEPTHS:
            raise Absent(f"it has model.arch={', '.join(DEPTHS)}, not {config.model.arch}")
        if world.size > 1 and world.device.type == "cpu":
            raise Absent("torch's SyncBatchNorm needs GPUs")
        self.config, self.world = config, world
        on_cpu = name == EAGER and world.device.type == "cpu"
        self.precision = "fp32" if on_cpu else resolve_precision("auto", world.device)
        self.layout = torch.channels_last if name == CHANNELS_LAST else torch.contiguous_format
        model = Model(config, classes)
        weights, own = _below("model.", state), _below("objective.", state)
        model.load_state_dict(weights if model.weight is None else {**weights, "weight": own["head.weight"]})
        model = model.to(world.device, memory_format=self.layout)  # type: ignore[call-overload]
        if world.size > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        self.model: Model = model
        self.memory: Memory | None = None
        self.ema: Model | None = None
        options: Any = objectives.options_of(config)
        self.temperature = options.temperature
        if self.model.weight is None:
            memory = Memory(options.bank_size, config.projector.out_dim, classes)
            memory.load_state_dict({name: own[f"means.{ours}"] for name, ours in MEMORY_NAMES.items()})
            self.memory = memory.to(world.device)
            self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.parallel: nn.Module = self.model
        if world.size > 1:
            self.parallel = DistributedDataParallel(self.model, device_ids=[world.device])
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.1, momentum=config.optim.momentum, weight_decay=config.optim.weight_decay
        )
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.precision == "fp16")

    def crops(self, crops: Sequence[Tensor]) -> list[Tensor]:
        """The same numbers in the layout that this step works with, in full precision as torch's loaders bring them."""
        dtype = torch.get_default_dtype()
        return [crop.to(dtype).contiguous(memory_format=self.layout) for crop in crops]

    def step(self, crops: Sequence[Tensor], target: Tensor, lr: float) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, logits, labels = self.loss(crops, target)
        self.follow(crops[0][: len(target)], target)
        found = metrics(loss, logits, labels)
        self.backward(loss)
        self.update()
        return found

    def loss(self, crops: Sequence[Tensor], target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, logits and labels of all rows."""
        with self.autocast():
            if self.memory is not None:
                weight = self.memory.class_weights()
            else:
                assert self.model.weight is not None
                weight = F.normalize(self.model.weight, dim=1)
            z = F.normalize(self.parallel(crops), dim=1)
            logits = z @ weight.T / self.temperature
            labels = target.repeat(len(z) // len(target))
            return F.cross_entropy(logits.float(), labels), logits, labels

    @torch.no_grad()
    def follow(self, pictures: Tensor, target: Tensor) -> None:
        """The momentum encoder follows, and its features enter the bank."""
        if self.ema is None or self.memory is None:
            return
        m = self.config.model.ema_momentum
        for e, p in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            e.copy_(e * m + p * (1 - m))
        with self.autocast():
            z = self.ema([pictures])
        if self.world.size > 1:
            z, target = gathered(z, self.world.size), gathered(target, self.world.size)
        self.memory.update(z, target)

    def backward(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = DTYPES[self.precision]
        return torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype != torch.float32)


# Ours of the same buffers.
MEMORY_NAMES = {"features": "features", "labels": "labels", "ptr": "pointer"}


def metrics(loss: Tensor, logits: Tensor, labels: Tensor) -> dict[str, float]:
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (best == labels[:, None]).float()
    return {"loss": loss.item(), "top1": hits[:, 0].mean().item(), "top5": hits.sum(1).mean().item()}


def gathered(x: Tensor, ranks: int) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(ranks)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
