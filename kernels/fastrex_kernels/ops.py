"""All operators, as the contract test and the benchmarks go through them."""

from __future__ import annotations

from .augment.cases import OP as _AUGMENT
from .batch_norm_act.cases import OP as _BATCH_NORM_ACT
from .class_means.cases import BANK_OP as _BANK_UPDATE
from .class_means.cases import OP as _CLASS_MEANS
from .contrastive_ce.cases import NEAREST_OP as _NEAREST_KEYS
from .contrastive_ce.cases import OP as _CONTRASTIVE_CE
from .conv2d.cases import OP as _CONV2D
from .cosine_ce.cases import OP as _COSINE_CE
from .crop_resize.cases import OP as _CROP_RESIZE
from .sgd_ema.cases import OP as _SGD_EMA

OPS = (
    _COSINE_CE,
    _CONTRASTIVE_CE,
    _NEAREST_KEYS,
    _CLASS_MEANS,
    _BANK_UPDATE,
    _BATCH_NORM_ACT,
    _CONV2D,
    _SGD_EMA,
    _CROP_RESIZE,
    _AUGMENT,
)
