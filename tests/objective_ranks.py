"""Run as the ranks of a job: a few steps of every objective on this rank's part of each batch, for
test_contrastive_objectives.py, which runs the same steps in one process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from fastrex import config as c
from fastrex import distributed, objectives

IMAGES, CROPS, CLASSES, DIM, STEPS = 8, 3, 3, 4, 4

# Each objective in every form, at the sizes of a test; the table of the contract.
FORMS: dict[str, dict[str, Any]] = {
    **{kind.name: {"name": kind.name} for kind in objectives.OBJECTIVES},
    "class_means": {"name": "class_means", "bank_size": 30},
    "supcon_queue": {"name": "supcon", "queue_size": 30},
    "look": {"name": "look", "queue_size": 30, "neighbours": 7},
    "moco": {"name": "moco", "queue_size": 30},
    "mochi": {"name": "mochi", "queue_size": 30, "hardest": 6, "synthetic": 5, "harder": 4},
    "ncm_condensation": {"name": "ncm", "update": "condensation", "period": 2},
    "ncm_decay": {"name": "ncm", "update": "decay"},
    "softmax_binary": {"name": "softmax", "loss": "binary"},
    "cosine_cosface": {"name": "cosine_softmax", "margin": 0.35},
    "cosine_arcface": {"name": "cosine_softmax", "margin": 0.5, "margin_kind": "arcface"},
}


def make(form: str, group: dist.ProcessGroup | None = None) -> objectives.Objective:
    config = objectives.resolve(c.from_table({"objective": FORMS[form]}))
    return objectives.make(config, DIM, CLASSES, group)


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Crops [K, B, 6], class ids [B] and images [B]: some come back from the step before."""
    generator = torch.Generator().manual_seed(step)
    crops = torch.randn(CROPS, IMAGES, 6, generator=generator, dtype=torch.float64)
    images = (torch.arange(IMAGES) + 5 * step) % 20
    return crops, images % CLASSES, images


def steps(form: str, rank: int, ranks: int, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """What the steps leave: losses, weights and the objective's state, as the loop would have them."""

    def averaged(x: Tensor) -> Tensor:
        if ranks > 1:
            dist.all_reduce(x)
        return x / ranks

    def gathered(x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(ranks)]
        if ranks > 1:
            dist.all_gather(parts, x.contiguous())
        return torch.cat(parts) if ranks > 1 else x

    torch.manual_seed(0)
    objective = make(form, group)
    encoder = torch.nn.Linear(6, DIM)
    weights = {**dict(encoder.named_parameters()), **dict(objective.named_parameters())}
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        crops, target, images = (t.clone() for t in batch(step))
        own = slice(rank * IMAGES // ranks, (rank + 1) * IMAGES // ranks)
        crops, target, images = crops[:, own], target[own], images[own]
        with torch.no_grad():
            fed = encoder(crops[0])
        seen = crops[1:] if objective.separate_view else crops
        context = objectives.Context(images, fed if objective.keys_first else None)
        loss, _ = objective(encoder(seen.flatten(0, 1)), target, context)
        gradients = torch.autograd.grad(loss.mean(), list(weights.values()))
        found[f"loss.{step}"] = averaged(loss.detach().mean())
        with torch.no_grad():
            for weight, gradient in zip(weights.values(), gradients, strict=True):
                weight -= 0.5 * averaged(gradient.clone())
        if objective.feeds:
            objective.update_(gathered(fed), gathered(target), keep=torch.tensor(True), images=gathered(images))
    state = {name: t.detach().clone() for name, t in objective.state_dict().items()}
    return {**found, **{n: t.detach().clone() for n, t in weights.items()}, **state}


def main(out: Path) -> None:
    torch.set_default_dtype(torch.float64)
    with distributed.world("cpu") as world:
        for form in FORMS:
            found = steps(form, world.rank, world.size, world.group)
            safetensors.torch.save_file(found, out / f"{form}.{world.rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # see fastrex.cli._leave
