"""Objectives that take shares of the classes: softmax in its forms and the cosine softmax, against PyTorch and by
hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import settings_for
from torch import Tensor

import fastrex
from fastrex import checkpoint, objectives
from fastrex import config as c
from fastrex.errors import UsageError


def make(name: str, classes: int = 5, dim: int = 4, augment: dict[str, float] | None = None, **options: object) -> Any:
    table = {"objective": {"name": name, **options}, "augment": augment or {}}
    return objectives.make(objectives.resolve(c.from_table(table)), dim, classes)


def logits_of(objective: Any, x: Tensor) -> Tensor:
    if objective.name == "softmax":
        return x @ objective.linear.weight.T + objective.linear.bias
    return F.normalize(x) @ F.normalize(objective.head.weight).T / 0.1


def shares() -> Tensor:
    return torch.tensor([[0.7, 0.0, 0.3, 0.0, 0.0], [0.0, 0.0, 0.0, 0.4, 0.6], [0.0, 1.0, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["softmax", "cosine_softmax"])
def test_cross_entropy_with_shares_and_with_ids_is_pytorchs(name: str, smoothing: float) -> None:
    torch.manual_seed(0)
    objective, x = make(name, label_smoothing=smoothing), torch.randn(6, 4)
    for target in (torch.tensor([0, 4, 1]), shares()):
        loss, metrics = objective(x, target)
        every = target.repeat(2, *(1,) * (target.ndim - 1))
        logits = logits_of(objective, x)
        wanted = F.cross_entropy(logits, every, reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
        # Right is the most probable class.
        right = torch.tensor([0, 4, 1]).repeat(2)
        assert metrics["top1"].item() == pytest.approx((logits.argmax(1) == right).float().mean().item())


@pytest.mark.parametrize("name", ["softmax", "cosine_softmax"])
def test_shares_that_are_all_one_class_are_its_id(name: str) -> None:
    objective, x, y = make(name), torch.randn(6, 4), torch.tensor([0, 4, 1])
    ids, one_hot = objective(x, y), objective(x, F.one_hot(y, 5).float())
    torch.testing.assert_close(one_hot[0], ids[0])
    assert one_hot[1] == ids[1]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        # Logits 0, log 3 and -log 3 have the probabilities 1/2, 3/4 and 1/4.
        ({}, [-math.log(1 / 2 * 3 / 4 * 3 / 4)]),
        (
            {"binary_targets": "share"},
            [-math.log(1 / 2) - 0.6 * math.log(3 / 4) - 0.4 * math.log(1 / 4) - math.log(3 / 4)],
        ),
        # Smoothed by 0.3: 0.8 for what is there, 0.1 for the rest.
        (
            {"label_smoothing": 0.3},
            [-math.log(1 / 2) - (0.8 + 0.9) * math.log(3 / 4) - (0.2 + 0.1) * math.log(1 / 4)],
        ),
    ],
    ids=["present", "share", "smoothed"],
)
def test_binary_loss_by_hand(options: dict[str, object], wanted: list[float]) -> None:
    objective = make("softmax", classes=3, dim=3, loss="binary", **options)
    with torch.no_grad():
        objective.linear.weight.copy_(torch.eye(3))
        objective.linear.bias.zero_()
    x = torch.tensor([[0.0, math.log(3), -math.log(3)]])
    loss, _ = objective(x, torch.tensor([[0.4, 0.6, 0.0]]))
    assert loss.tolist() == pytest.approx(wanted, rel=1e-5)


def test_binary_loss_of_ids_is_pytorchs_summed_over_the_classes() -> None:
    objective, x, y = make("softmax", loss="binary"), torch.randn(6, 4), torch.tensor([0, 4, 1])
    loss, metrics = objective(x, y)
    logits, wanted = logits_of(objective, x), F.one_hot(y, 5).float().repeat(2, 1)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(1))
    assert metrics["top1"].item() == pytest.approx((logits.argmax(1) == y.repeat(2)).float().mean().item())


@pytest.mark.parametrize("augment", [{"mixup": 0.2}, {"cutmix": 1.0}], ids=["mixup", "cutmix"])
def test_mixed_images_need_an_objective_that_takes_shares(augment: dict[str, float]) -> None:
    assert make("softmax", augment=augment).soft_targets
    assert make("softmax", augment=augment, loss="binary").soft_targets
    assert make("cosine_softmax", augment=augment).soft_targets
    for name, options in (
        ("class_means", {}),
        ("ncm", {}),
        ("cosine_softmax", {"margin": 0.3}),
        ("cosine_softmax", {"sharded": True}),
    ):
        with pytest.raises(
            UsageError, match=rf"augment.mixup and cutmix must go with .* \(softmax, .* got {name}; set"
        ):
            make(name, augment=augment, **options)


def test_every_objective_that_takes_no_shares_is_refused_mixed_images() -> None:
    for kind in objectives.OBJECTIVES:
        if kind.name not in ("softmax", "cosine_softmax"):
            with pytest.raises(UsageError, match=r"augment.mixup and cutmix must go with an objective"):
                make(kind.name, augment={"mixup": 0.2})


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("softmax", ("objective.label_smoothing=0.1",)),
        ("softmax", ("objective.loss=binary", "augment.mixup=0.2", "augment.cutmix=1.0")),
        ("cosine_softmax", ("objective.margin=0.35",)),
        ("cosine_softmax", ("objective.margin=0.5", "objective.margin_kind=arcface")),
    ],
    ids=["smoothed", "binary and mixed", "cosface", "arcface"],
)
def test_a_stopped_and_resumed_training_gives_the_same_bits(
    name: str, more: tuple[str, ...], stripes: Path, tmp_path: Path
) -> None:
    settings = [*settings_for(name), *more, "optim.epochs=2", f"data.path={json.dumps(str(stripes))}"]
    config = c.load("demo", settings)
    fastrex.train(config, out=tmp_path / "whole", device="cpu")
    fastrex.train(config, out=tmp_path / "parts", device="cpu", max_steps=5)
    fastrex.train(out=tmp_path / "parts", device="cpu", resume="must")
    hashes = []
    for run in (tmp_path / "whole", tmp_path / "parts"):
        hashes.append(checkpoint.state_hash(checkpoint.load(checkpoint.folder(run, checkpoint.steps(run)[-1]))[0]))
    assert hashes[0] == hashes[1]
