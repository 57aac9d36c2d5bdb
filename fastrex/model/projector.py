"""The projector between encoder and loss; thrown away after training (Sariyildiz et al. 2023, section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .layers import Linear
from .norm import BatchNormAct

if TYPE_CHECKING:
    from ..config import ProjectorConfig


class Projector(nn.Module):
    """Features [N, D] -> [N, out_features]: input l2 norm, L x [Linear -> BatchNorm -> GELU (erf) or ReLU], Linear
    without bias.

    Linear weights start from a truncated normal of std 0.02, biases from 0. The input norm (eps 1e-12) is computed in
    fp32 or better; the output is not normalised.

    Args:
        in_features: D.
        cfg: ``hidden_layers`` (L; 0 leaves the last layer alone), ``hidden_dim``, ``out_dim``, ``input_norm``,
            ``activation``, ``batch_norm`` (False leaves Linear and activation, as the heads of SupCon and MoCo v2).
            Without ``enabled`` nothing is done: ``out_features`` is D.
        bn_momentum: momentum of the running statistics.
        bn_eps: eps of the batch normalisation.
        bn: what computes the batch norms, see :mod:`fastrex.model.norm`.
    """

    def __init__(
        self,
        in_features: int,
        cfg: ProjectorConfig,
        *,
        bn_momentum: float = 0.1,
        bn_eps: float = 1e-5,
        bn: str = "fused",
    ) -> None:
        super().__init__()
        self.out_features = cfg.out_dim if cfg.enabled else in_features
        self.input_norm = cfg.input_norm and cfg.enabled
        layers: list[nn.Module] = []
        if not cfg.enabled:
            self.layers = nn.Sequential()
            return
        features = in_features
        for _ in range(cfg.hidden_layers):
            relu = cfg.activation == "relu"
            layers.append(Linear(features, cfg.hidden_dim))
            if cfg.batch_norm:
                layers.append(BatchNormAct(cfg.hidden_dim, relu=relu, eps=bn_eps, momentum=bn_momentum, backend=bn))
            if not relu:
                layers.append(nn.GELU())
            elif not cfg.batch_norm:
                layers.append(nn.ReLU())
            features = cfg.hidden_dim
        layers.append(Linear(features, cfg.out_dim, bias=False))
        self.layers = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_norm:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            x = nn.functional.normalize(wide, dim=1, eps=1e-12)
        out: Tensor = self.layers(x)
        return out

    def stages(self) -> list[nn.Sequential]:
        """The hidden layers, each with what follows its Linear, then the output layer; empty without a projector."""
        layers = list(self.layers)
        starts = [number for number, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
        ends = [*starts[1:], len(layers)]
        return [nn.Sequential(*layers[start:end]) for start, end in zip(starts, ends, strict=False)]
