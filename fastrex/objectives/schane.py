"""Cross-entropy with a hardness-weighted supervised contrastive loss beside it (SCHaNe, Long et al., arXiv 2308.14893)
for fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastrex_kernels import contrastive_cross_entropy

from ..settings import setting
from .base import Context, Objective
from .gathering import all_crops
from .softmax import Softmax, SoftmaxOptions
from .supcon import check_classes, positive_metrics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class SCHaNeOptions:
    """Section ``[objective]`` with ``name = "schane"``. Weight and temperature are the paper's from memory: its text
    could not be checked."""

    weight: float = setting(0.9, "lambda: (1 - lambda) cross-entropy + lambda contrastive loss", low=0.0, high=1.0)
    temperature: float = setting(0.5, "temperature of the cosine logits of the contrastive loss", low=1e-4)
    hardness: float = setting(
        1.0, "a negative weighs as exp(hardness cosine / temperature), 1 on average (0 = SupCon)", low=0.0
    )
    detach_hardness: bool = setting(False, "the negatives' weights are constants to the gradient")
    label_smoothing: float = setting(
        0.0, "share of the cross-entropy's target that is spread over all classes", low=0.0, high=1.0
    )


class SCHaNe(Objective):
    """``(1 - weight) L_CE + weight L_SCHaNe``, both on the same features: a linear classifier as plain softmax has it,
    and SupCon over all crops of all ranks whose negatives are weighted by their own nearness to the query::

        L_n = -1/|P| sum_p log(e^{s_np} / (sum_P e^{s_np'} + sum_N b_nk e^{s_nk}))
        b_nk = |N| e^{a s_nk} / sum_N e^{a s_nk'}

    The formula is a reconstruction: the paper's could not be checked. Its weights are those of HCL's code (Robinson et
    al., ICLR 2021) with beta = a and tau_plus = 0. A row without a positive has the contrastive loss 0.
    """

    name: ClassVar[str] = "schane"
    Options: ClassVar[type[Any]] = SCHaNeOptions
    pairs_in_batch = True

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        options: SCHaNeOptions,
        *,
        seed: int,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, options, seed=seed, group=group)
        check_classes(self.name, num_classes)
        entropy = SoftmaxOptions(label_smoothing=options.label_smoothing)
        self.softmax = Softmax(in_features, num_classes, entropy, seed=seed)

    def forward(
        self, features: Tensor, target: Tensor, context: Context | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        options = self.options
        crops = all_crops(features, target, self.group)
        contrastive, stats = contrastive_cross_entropy(
            features, **crops._asdict(), temperature=options.temperature, hardness=options.hardness,
            detach_hardness=options.detach_hardness, reduction="none", return_stats=True,
        )  # fmt: skip
        entropy, hits = self.softmax(features, target)
        with torch.no_grad():
            nearest = positive_metrics(stats)
            metrics = {
                **hits, "cross_entropy": entropy.mean(), "contrastive": contrastive.mean(),
                "nearest": nearest["top1"], "without_positive": nearest["without_positive"],
            }  # fmt: skip
        return (1 - options.weight) * entropy + options.weight * contrastive, metrics

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        return self.softmax.predict(features)

    def class_vectors(self) -> Tensor:
        return self.softmax.class_vectors()
