"""Batch normalisation with an optional residual sum and ReLU as one layer, by one of three backends.

Parameters and buffers have the names and meanings of ``torch.nn.BatchNorm2d`` whatever computes them:

* ``fused``: the op ``batch_norm_act``, also over a process group.
* ``torch``: PyTorch's kernels one after the other, over a group its SyncBatchNorm (CUDA only).
* ``apex``: NVIDIA apex's ``groupbn`` for what that takes (fp16, [N, C, H, W], C a multiple of 4, training in one
  process), ``fused`` for the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm

import fastrex_kernels
from fastrex_kernels.batch_norm_act import batch_norm_act

from .. import apex
from ..errors import FastrexError
from .recompute import again

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BACKENDS = ("fused", "torch", "apex")


class BatchNormAct(nn.Module):
    """Normalise inputs [N, C] or [N, C, H, W], add a residual, apply the ReLU.

    Args:
        relu: whether the layer ends with a ReLU.
        backend: one of ``BACKENDS``, as :func:`resolve_bn` decides.

    Attributes:
        process_group: None for statistics of this rank's batch, or the group whose joined batch they are taken from.
    """

    process_group: ProcessGroup | None
    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        relu: bool = True,
        eps: float = 1e-5,
        momentum: float = 0.1,
        backend: str = "fused",
    ) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"BatchNormAct: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        self.num_features = num_features
        self.relu = relu
        self.eps = eps
        self.momentum = momentum
        self.backend = backend
        self.process_group = None
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self._groupbn: tuple[Any] | None = None  # in a tuple, so that it is no submodule with a state of its own

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_groupbn": None}  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise ``x``, add ``residual`` (same shape), apply the ReLU if this layer has one."""
        training = self.training
        tracking = training and not again()
        if tracking:
            self.num_batches_tracked.add_(1)
        if self.backend == "torch":
            return self._torch(x, residual, self.momentum if tracking else 0.0)
        if self.backend == "apex" and training and self._fits(x, residual):
            return self._apex(x, residual, self.momentum if tracking else 0.0)
        known = tracking or not training
        return batch_norm_act(
            x,
            self.weight,
            self.bias,
            self.running_mean if known else None,
            self.running_var if known else None,
            residual=residual,
            relu=self.relu,
            training=training,
            momentum=self.momentum,
            eps=self.eps,
            process_group=self.process_group,
        )

    def _torch(self, x: Tensor, residual: Tensor | None, momentum: float) -> Tensor:
        group = self.process_group
        vectors = self.running_mean, self.running_var, self.weight, self.bias
        if self.training and group is not None and (ranks := group.size()) > 1:
            mean, var, weight, bias = vectors
            out: Tensor = SyncBatchNorm.apply(  # type: ignore[no-untyped-call]
                x, weight, bias, mean, var, self.eps, momentum, group, ranks
            )
        else:
            out = F.batch_norm(x, *vectors, self.training, momentum, self.eps)
        # In place on a fresh tensor: batch normalisation keeps its input for the backward, not its output.
        if residual is not None:
            out = out.add_(residual)
        return out.relu_() if self.relu else out

    def _fits(self, x: Tensor, residual: Tensor | None) -> bool:
        return (
            x.dim() == 4
            and x.dtype == torch.float16
            and x.shape[1] % 4 == 0
            and (self.relu or residual is None)
            and self.process_group is None
        )

    def _apex(self, x: Tensor, residual: Tensor | None, momentum: float) -> Tensor:
        if self._groupbn is None:
            # Its blocks wait for one another: without multi_stream they may block those of another stream for ever.
            self._groupbn = (apex.groupbn()(self.num_features, fuse_relu=self.relu, multi_stream=True),)
        layer = self._groupbn[0]
        layer.weight, layer.bias = self.weight, self.bias
        layer.running_mean, layer.running_var = self.running_mean, self.running_var
        layer.momentum, layer.eps = momentum, self.eps
        # It writes a batch's statistics into these and keeps them for the backward: the pass of the other resolution
        # must not write into the same ones.
        layer.minibatch_mean, layer.minibatch_riv = torch.empty_like(self.weight), torch.empty_like(self.weight)
        rows = [None if t is None else t.contiguous(memory_format=torch.channels_last) for t in (x, residual)]
        out: Tensor = layer(*(t.permute(0, 2, 3, 1) for t in rows if t is not None)).permute(0, 3, 1, 2)
        if out.requires_grad:
            out.register_hook(_dense)  # type: ignore[no-untyped-call]
        return out

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, relu={self.relu}, eps={self.eps}, momentum={self.momentum}, backend={self.backend}"
        )


def _dense(grad: Tensor) -> Tensor:
    """The gradient as memory that kernels can walk through: a mean's is one value for many places."""
    return grad.contiguous(memory_format=torch.channels_last)


def resolve_bn(wanted: str, precision: str, device: torch.device, world_size: int) -> tuple[str, str]:
    """The backend for a run and a line for its log.

    Args:
        wanted: ``model.bn``. precision: the resolved one. world_size: ranks whose batches are joined.

    Raises:
        FastrexError: this machine cannot run what is wanted; the message names a setting that it can.
    """
    fused = f"fused ({fastrex_kernels.backend(device.type)})"
    if wanted == "torch":
        if world_size > 1:
            check_group(wanted, device)
            words = "PyTorch's SyncBatchNorm, whose layers wait for the host, sum and ReLU"
            return wanted, f"batch norm: torch ({words})"
        return wanted, "batch norm: torch (PyTorch's batch norm, sum and ReLU)"
    if wanted == "fused":
        return wanted, f"batch norm: {fused}"
    apex.groupbn()
    odd = ""
    if device.type != "cuda":
        odd = f"CUDA only, and this run is on the {device.type.upper()}"
    elif precision != "fp16":
        odd = f"fp16 only, and this run is in {precision} (optim.precision=fp16)"
    elif world_size > 1:
        odd = "used in a single process only, and this run has more"
    if odd:
        return "fused", f"batch norm: {fused}; apex's groupbn is {odd}"
    return wanted, f"batch norm: apex's groupbn; {fused} in the projector, in evaluation and for odd channels"


def check_group(backend: str, device: torch.device) -> None:
    """Refuse a backend that cannot join the batches of several ranks on ``device``."""
    if backend == "torch" and device.type == "cpu":
        raise FastrexError(
            "train: model.bn must be fused over several ranks on a CPU, got torch: PyTorch's SyncBatchNorm takes CUDA "
            "tensors only; set model.bn=fused"
        )
