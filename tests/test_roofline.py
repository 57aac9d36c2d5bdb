"""The model of the roofline against the figures that were published of it, and against networks that exist."""

from __future__ import annotations

import pytest
import torch
from conftest import SETTINGS

from benchmarks import roofline
from fastrex import config as c
from fastrex.distributed import World
from fastrex.errors import FastrexError
from fastrex.model.resnet import ARCHS
from fastrex.step import Trainer

PEAK, BANDWIDTH = 790e12, 4.3e12


def test_the_published_figures() -> None:
    bounds = roofline.bounds(c.load("trex"), classes=1000, batch=256, itemsize=2)
    assert list(bounds) == list(roofline.LEVELS)
    assert [round(b.images_per_s(PEAK, BANDWIDTH)) for b in bounds.values()] == [2835, 3868, 4601, 5624]
    assert [b.flops() / 1e9 for b in bounds.values()] == pytest.approx([68.90] * 4, abs=0.005)
    assert [b.bytes() / 1e6 for b in bounds.values()] == pytest.approx([1367, 963, 783, 638], abs=0.6)
    assert [b.bytes("optimiser") / 1e6 for b in bounds.values()] == pytest.approx([12.88, *[10.59] * 3], abs=0.005)
    assert [b.bytes("EMA") / 1e6 for b in bounds.values()] == pytest.approx([182.8, 115.4, 93.1, 65.9], abs=0.3)


def test_shares_of_the_parts() -> None:
    step = roofline.step(c.load("trex"), 1000, 256, 2, 0)
    assert step.parts() == ["forward 224", "backward", "forward 96", "head", "EMA", "optimiser"]
    assert sum(step.flops(part) for part in step.parts()) == pytest.approx(step.flops())
    assert sum(step.bytes(part) for part in step.parts()) == pytest.approx(step.bytes())
    assert step.flops("EMA") / step.flops() == pytest.approx(0.119, abs=0.001)
    # Forward and backward of the large crops are 35.3 % of the whole, of the small ones 51.8 %.
    assert step.flops("forward 224") / step.flops() == pytest.approx(0.353 / 3, abs=0.002)
    assert step.flops("forward 96") / step.flops() == pytest.approx(0.518 / 3, abs=0.002)


@pytest.mark.parametrize("arch", list(ARCHS))
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_layers_are_those_of_the_network(arch: str, stem: str) -> None:
    config = c.load("demo", [*SETTINGS, f"model.arch={arch}", f"model.stem={stem}", "data.channels=1"])
    trainer = Trainer(config, 3, World(0, 1, 0, 1, torch.device("cpu")))
    seen: list[tuple[int, ...]] = []

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor], out: torch.Tensor) -> None:
        assert isinstance(module, torch.nn.Conv2d)
        strides, kernel = module.stride[0], module.kernel_size[0]
        seen.append((module.in_channels, module.out_channels, kernel, strides, inputs[0].shape[-1], out.shape[-1]))

    for module in trainer.model.encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        trainer.model.encoder(torch.zeros(2, 1, 39, 39))
    net = roofline.network(config, 39)
    convs = [net.stem, *(conv for block in net.blocks for conv in block.every())]
    mine = [(k.inputs, k.outputs, k.kernel, k.stride, k.before, k.after) for k in convs]
    assert sorted(mine) == sorted(seen)
    assert net.parameters == sum(p.numel() for p in trainer.model.encoder.parameters())
    assert net.features == trainer.model.encoder.num_features


def test_what_the_configuration_changes() -> None:
    base = roofline.step(c.load("trex"), 1000, 256, 2, 1)

    def other(*words: str, classes: int = 1000, batch: int = 256, itemsize: int = 2) -> roofline.Step:
        return roofline.step(c.load("trex", words), classes, batch, itemsize, 1)

    learnt = other("objective.name=cosine_softmax")
    assert "EMA" not in learnt.parts()
    assert learnt.flops("backward") - base.flops("backward") == 9 * 2 * 256 * 1000  # the weights' gradient
    assert other(classes=2000).flops("head") > base.flops("head")
    assert other(batch=64).bytes("optimiser") == pytest.approx(4 * base.bytes("optimiser"))
    assert other("data.local_crops=0").parts() == ["forward 224", "backward", "head", "EMA", "optimiser"]
    twice = other("data.global_crops=2")
    assert twice.flops("forward 224") == 2 * base.flops("forward 224")
    assert twice.flops("EMA") == base.flops("EMA")  # which sees the first one only
    assert other(itemsize=4).bytes("forward 224") == pytest.approx(2 * base.bytes("forward 224"), rel=0.01)
    assert other("model.width=32").flops() < base.flops() / 3
    with pytest.raises(FastrexError, match=r"model\.arch must be one of resnet18, .*'timm:vit'"):
        other("model.arch=timm:vit")


@pytest.mark.parametrize("itemsize", [2, 4])
def test_levels_only_save(itemsize: int) -> None:
    speeds = [
        bound.images_per_s(PEAK, BANDWIDTH)
        for bound in roofline.bounds(c.load("demo", ["model.arch=resnet34"]), 10, 64, itemsize).values()
    ]
    assert speeds == sorted(speeds)
    assert speeds[0] < speeds[-1]
