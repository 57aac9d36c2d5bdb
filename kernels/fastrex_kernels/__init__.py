"""Fused operators for supervised representation learning, usable without the rest of fastrex.

Every operator has a reference in eager PyTorch that defines it; ``impl="auto"`` takes the fastest implementation that
this installation has for the tensors' device.
"""

from ._op import backend
from .augment import augment
from .bank import OnlineClassMeans
from .batch_norm_act import batch_norm_act
from .class_means import bank_update_, class_means
from .contrastive import ContrastiveLoss
from .contrastive_ce import ContrastiveStats, Mixtures, contrastive_cross_entropy, nearest_keys
from .conv2d import conv2d
from .cosine_ce import Stats, cosine_cross_entropy
from .crop_resize import crop_resize
from .modules import CosineCrossEntropyLoss, CosineHead
from .ops import OPS
from .sgd_ema import sgd_ema_

__all__ = [
    "OPS",
    "ContrastiveLoss",
    "ContrastiveStats",
    "CosineCrossEntropyLoss",
    "CosineHead",
    "Mixtures",
    "OnlineClassMeans",
    "Stats",
    "augment",
    "backend",
    "bank_update_",
    "batch_norm_act",
    "class_means",
    "contrastive_cross_entropy",
    "conv2d",
    "cosine_cross_entropy",
    "crop_resize",
    "nearest_keys",
    "sgd_ema_",
]
