"""The sections of a configuration: every setting with its default, its range and a line of help. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import UsageError
from .settings import setting

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")
"""The stages of a ResNet encoder, from the images on."""


@dataclass(frozen=True)
class DataConfig:
    """Where the images are, how they are cut, how they are delivered."""

    path: str = setting(
        "",
        "class folders (with train/+val/ or alone), a .csv/.tsv/.jsonl list, tar shards; synthetic = random data",
    )
    held_out: float = setting(
        0.1, "share of each class held out where the folder has no val/ or test/", low=0.0, high=0.9
    )
    last_batch: str = setting("drop", "what happens to the last, short batch of an epoch", choices=("drop", "pad"))
    empty_classes: str = setting("error", "class folders without an image", choices=("error", "skip"))
    sampling: str = setting(
        "uniform",
        "uniform = every image once per epoch; balanced = every class equally often, small ones by repetition",
        choices=("uniform", "balanced"),
    )
    repeats: int = setting(1, "views of each drawn image in a batch (repeated augmentation; 1 = off)", low=1)
    on_bad_sample: str = setting(
        "stop",
        "a file that goes bad during the run: stop, or replace it by another image of its class",
        choices=("stop", "replace"),
    )
    max_bad_samples: int = setting(100, "bad files that a rank replaces before the run stops", low=0)
    channels: int = setting(3, "3 = RGB, 1 = grey (colour augmentation has no effect then)", low=1, high=3)
    resize: str = setting(
        "auto",
        "who cuts and resizes the crops: auto = our operator in C++ on a CPU, DALI on a GPU",
        choices=("auto", "dali", "fastrex"),
    )
    hw_decoder_load: float = setting(
        0.65,
        "share of the JPEGs for the GPU's hardware decoder where it has one (0 = the same bits every time)",
        low=0.0,
        high=1.0,
    )
    threads: int = setting(0, "decoder threads per rank (0 = this rank's share of the cores)", low=0)
    prefetch: int = setting(2, "batches prepared ahead", low=1)
    global_crops: int = setting(1, "large crops per image; the first one feeds the momentum encoder", low=1)
    global_size: int = setting(224, "side of a global crop in pixels", low=1)
    global_scale: tuple[float, float] = setting(
        (0.25, 1.0), "area of a global crop as a share of the image", low=0.0, high=1.0
    )
    local_crops: int = setting(8, "small crops per image", low=0)
    local_size: int = setting(96, "side of a local crop in pixels", low=1)
    local_scale: tuple[float, float] = setting(
        (0.05, 0.25), "area of a local crop as a share of the image", low=0.0, high=1.0
    )
    ratio: tuple[float, float] = setting(
        (3 / 4, 4 / 3), "aspect ratio of a crop, width by height, log-uniform", low=0.01, high=100
    )
    eval_resize: int = setting(256, "shorter side before the centre crop in evaluation", low=1)
    eval_size: int = setting(224, "side of the centre crop in evaluation", low=1)
    mean: tuple[float, float, float] = setting(
        (0.485, 0.456, 0.406), "channel means subtracted after scaling to [0, 1]"
    )
    std: tuple[float, float, float] = setting((0.229, 0.224, 0.225), "channel deviations divided by", low=1e-6)
    shots: int = setting(0, "training images of each class, drawn once by shots_seed (0 = all)", low=0)
    shots_seed: int = setting(0, "which images shots draws, whatever run.seed is", low=0, high=2**63 - 1)

    @property
    def crops(self) -> tuple[tuple[int, int], ...]:
        """(crops per image, their side in pixels) of each group that has any, in the order of the batch."""
        groups = (self.global_crops, self.global_size), (self.local_crops, self.local_size)
        return tuple(group for group in groups if group[0])

    @property
    def crops_text(self) -> str:
        """Such as "1x224 + 8x96"."""
        return " + ".join(f"{count}x{side}" for count, side in self.crops)


@dataclass(frozen=True)
class AugmentConfig:
    """Photometric augmentation: probabilities and strengths (recipes of DINO and t-ReX)."""

    flip: float = setting(0.5, "probability of a horizontal flip", low=0.0, high=1.0)
    jitter: float = setting(0.8, "probability of the four colour jitters", low=0.0, high=1.0)
    brightness: float = setting(0.4, "brightness factor in [1 - x, 1 + x]", low=0.0)
    contrast: float = setting(0.4, "contrast factor in [1 - x, 1 + x]", low=0.0)
    saturation: float = setting(0.2, "saturation factor in [1 - x, 1 + x]", low=0.0)
    hue: float = setting(0.1, "hue shift in [-x, x] turns", low=0.0, high=0.5)
    grayscale: float = setting(0.2, "probability of greyscale", low=0.0, high=1.0)
    blur_radius: tuple[float, float] = setting(
        (0.1, 2.0), "standard deviation of the Gaussian blur in pixels, uniform", low=0.0, high=16.0
    )
    global_blur: float = setting(0.2, "probability of blur on a global crop", low=0.0, high=1.0)
    local_blur: float = setting(0.5, "probability of blur on a local crop", low=0.0, high=1.0)
    global_solarize: float = setting(0.2, "probability of solarisation on a global crop", low=0.0, high=1.0)
    local_solarize: float = setting(0.0, "probability of solarisation on a local crop", low=0.0, high=1.0)
    solarize_threshold: int = setting(128, "pixels at or above are inverted", low=0, high=256)
    mixup: float = setting(
        0.0,
        "mixup of pairs of images, share from Beta(x, x); the objective must take mixed targets (0 = off)",
        low=0.0,
        high=1.0,
    )
    cutmix: float = setting(
        0.0,
        "CutMix of pairs of images, share from Beta(x, x); the objective must take mixed targets (0 = off)",
        low=0.0,
        high=1.0,
    )
    mix_switch: float = setting(0.5, "probability of CutMix where mixup is on as well", low=0.0, high=1.0)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs, and so their targets."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class ModelConfig:
    """The encoder and its momentum copy."""

    arch: str = setting("resnet50", "resnet18, resnet34, resnet50, resnet101, or timm:NAME")
    stem: str = setting(
        "imagenet",
        "imagenet: 7x7 stride 2 + max pool; small: 3x3 stride 1 for images up to 64 px",
        choices=("imagenet", "small"),
    )
    width: int = setting(64, "channels of the first stage (64 = torchvision's)", low=1)
    bn: str = setting(
        "fused",
        "fused = one kernel for BatchNorm, residual and ReLU; torch = PyTorch's; apex = NVIDIA apex's groupbn (fp16)",
        choices=("fused", "torch", "apex"),
    )
    recompute: str = setting(
        "none",
        "activations computed again in the backward: blocks = those inside residual blocks, passes = one resolution "
        "at a time",
        choices=("none", "blocks", "passes"),
    )
    bn_momentum: float = setting(0.1, "momentum of the BatchNorm running statistics", low=0.0, high=1.0)
    bn_eps: float = setting(1e-5, "epsilon of BatchNorm", low=0.0)
    ema_momentum: float = setting(
        0.999, "momentum of the momentum encoder, where the objective needs one", low=0.0, high=1.0
    )
    frozen_stages: int = setting(
        0, "stages of a ResNet that stay as they start: 1 = stem, 2 = and layer1, ..., 5 = the encoder", low=0, high=5
    )


@dataclass(frozen=True)
class ProjectorConfig:
    """The expendable projector between encoder and loss."""

    enabled: bool = setting(True, "false = none: the encoder's features meet the class weights")
    hidden_layers: int = setting(3, "hidden layers: Linear + BatchNorm + activation (3 = t-ReX, 1 = t-ReX*)", low=0)
    hidden_dim: int = setting(2048, "width of the hidden layers", low=1)
    out_dim: int = setting(256, "width of the output, which meets the class weights", low=1)
    input_norm: bool = setting(True, "l2-normalise the encoder's feature before the projector")
    activation: str = setting("gelu", "non-linearity of the hidden layers", choices=("gelu", "relu"))
    batch_norm: bool = setting(True, "false = the hidden layers are Linear + activation")

    @property
    def text(self) -> str:
        """Such as "3 hidden layers", or "1 hidden layer, ReLU, no BatchNorm" where they are not t-ReX's."""
        if not self.enabled:
            return "no projector"
        words = [f"{self.hidden_layers} hidden layer{'s' * (self.hidden_layers != 1)}"]
        if self.hidden_layers and self.activation == "relu":
            words.append("ReLU")
        if self.hidden_layers and not self.batch_norm:
            words.append("no BatchNorm")
        return ", ".join(words)


@dataclass(frozen=True)
class ObjectiveConfig:
    """The objective's name and its options, which the objective's own ``Options`` dataclass defines."""

    name: str = setting(
        "class_means",
        "class_means (t-ReX's Eq. 2), cosine_softmax (its Eq. 1), softmax, supcon, schane, look, moco, mochi or ncm",
    )
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimConfig:
    """SGD and its schedule."""

    batch_size: int = setting(256, "source images in the global batch (all ranks, all micro-batches)", low=1)
    epochs: int = setting(100, "length of the schedule", low=1)
    lr: float = setting(0.1, "peak learning rate for 256 images; scaled by batch_size / 256", low=0.0)
    warmup_epochs: float = setting(10.0, "linear warm-up from 0", low=0.0)
    min_lr: float = setting(1e-6, "end of the cosine", low=0.0)
    momentum: float = setting(0.9, "SGD momentum", low=0.0, high=1.0)
    weight_decay: float = setting(1e-4, "on parameters with two or more dimensions", low=0.0)
    accumulate: int = setting(1, "micro-batches per step; BatchNorm works per micro-batch", low=1)
    precision: str = setting("auto", "auto = bf16 where the hardware has it", choices=("auto", "bf16", "fp16", "fp32"))
    impl: str = setting(
        "fused",
        "fused = SGD, EMA and casts in one kernel; torch = PyTorch's SGD and foreach; apex = NVIDIA apex's FusedSGD",
        choices=("fused", "torch", "apex"),
    )
    reduce_dtype: str = setting("fp32", "dtype of the gradients sent between ranks", choices=("fp32", "bf16"))
    layer_decay: float = setting(
        1.0,
        "factor on the learning rate of a ResNet's last stage, once more for each stage before it (stem: 5th power)",
        low=1e-6,
        high=1.0,
    )
    encoder_lr: float = setting(
        1.0,
        "factor on the learning rate of the whole encoder (to hold it fixed: model.frozen_stages=5)",
        low=1e-6,
        high=100.0,
    )


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training."""

    every_epochs: int = setting(1, "evaluate every so many epochs and at the end (0 = at the end only)", low=0)
    batch_size: int = setting(64, "images per batch and rank", low=1)
    knn_k: int = setting(20, "neighbours of the k-NN classifier", low=1)
    knn_temperature: float = setting(0.07, "temperature of the k-NN votes", low=1e-6)
    knn_per_class: int = setting(100, "training images per class in the k-NN bank (0 = all)", low=0)


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, how many to keep."""

    every_epochs: int = setting(1, "save every so many epochs and at the end (0 = by steps only)", low=0)
    every_steps: int = setting(0, "save every so many steps too (0 = off)", low=0)
    keep_last: int = setting(2, "newest checkpoints kept", low=1)
    keep_every: int = setting(0, "also keep, for good, those at multiples of so many steps (0 = none)", low=0)
    background: bool = setting(True, "write while training goes on; false = training waits for the disk")
    on_failure: str = setting(
        "continue",
        "a checkpoint that cannot be written (disk full): continue, say so and try at the next one, or stop",
        choices=("continue", "stop"),
    )


@dataclass(frozen=True)
class RunConfig:
    """Seed and logging."""

    seed: int = setting(0, "seed of everything random", low=0, high=2**63 - 1)
    log_every: int = setting(50, "steps between log lines; device values are read only there", low=1)
    tensorboard: bool = setting(False, "also write TensorBoard events")
    wandb: str = setting("", "also log to this Weights & Biases project")
    cuda_graph: str = setting(
        "auto", "replay the whole step as one CUDA graph (auto = on a single GPU)", choices=("auto", "on", "off")
    )
    compile: bool = setting(False, "torch.compile the encoders")
    stall_s: float = setting(
        600.0,
        "seconds without progress after which a job of several ranks ends and says who hangs (0 = never)",
        low=0.0,
    )


@dataclass(frozen=True)
class Config:
    """The whole configuration of one run. ``recipe`` is the name it started from."""

    recipe: str = "demo"
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.optim.warmup_epochs >= self.optim.epochs:
            raise UsageError(
                f"config: optim.warmup_epochs must be less than optim.epochs, got {self.optim.warmup_epochs:g} and "
                f"{self.optim.epochs}; set both"
            )
        if self.run.compile and self.model.recompute == "blocks":
            raise UsageError(
                "config: model.recompute must be none or passes with run.compile=true, got blocks: torch.compile "
                "cannot repeat a part of what it compiles; set model.recompute=passes"
            )
        if self.data.channels == 2:
            raise UsageError("config: data.channels must be 1 (grey) or 3 (RGB), got 2")
        for name in ("global_scale", "local_scale", "ratio"):
            low, high = getattr(self.data, name)
            if not 0 < low <= high:
                raise UsageError(f"config: data.{name} must be two rising numbers above 0, got [{low:g}, {high:g}]")
        low, high = self.augment.blur_radius
        if low > high:
            raise UsageError(f"config: augment.blur_radius must be two rising numbers, got [{low:g}, {high:g}]")
