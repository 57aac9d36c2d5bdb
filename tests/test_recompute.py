"""Activations computed again in the backward: the bits of keeping them, in less memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed import torchrun
from torch import Tensor, nn

from fastrex.config import ProjectorConfig
from fastrex.errors import FastrexError
from fastrex.model.layers import attach_copies
from fastrex.model.multicrop import MultiCropModel
from fastrex.model.projector import Projector
from fastrex.model.resnet import ResNet

SIZES = ((4, 32), (8, 16))


def images(rows: int, side: int) -> Tensor:
    return torch.randn(rows, 3, side, side).contiguous(memory_format=torch.channels_last)


def network(recompute: str, bn: str = "fused", arch: str = "resnet50") -> MultiCropModel:
    torch.manual_seed(0)
    encoder = ResNet(arch, stem="small", width=8, bn=bn)
    projector = Projector(encoder.num_features, ProjectorConfig(hidden_layers=1, hidden_dim=16, out_dim=8), bn=bn)
    return MultiCropModel(encoder, projector, recompute)


def outcome(model: MultiCropModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, gradients and buffers after one step on two resolutions."""
    torch.manual_seed(1)
    crops = [images(rows, side) for rows, side in SIZES]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = model(crops)
    torch.autograd.backward(out.float().square().mean())
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), **gradients, **dict(model.named_buffers())}


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


@pytest.mark.parametrize("recompute", ["blocks", "passes"])
@pytest.mark.parametrize("bn", ["fused", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_gives_the_same_bits(recompute: str, bn: str, dtype: torch.dtype) -> None:
    models = network("none", bn), network(recompute, bn)
    for model in models:
        attach_copies(model, dtype)
    kept, again = (outcome(model, dtype) for model in models)
    assert len(kept) > 300
    assert_same_bits(again, kept)
    assert again["encoder.bn1.num_batches_tracked"].item() == 2


def test_a_pass_is_repeated_when_the_backward_comes_to_it() -> None:
    calls: list[tuple[int, str]] = []
    for recompute in ("passes", "blocks"):
        model = network(recompute, arch="resnet18")
        model.encoder.conv1.register_forward_hook(lambda _, inputs, __: calls.append((inputs[0].shape[-1], "stem")))
        model.encoder.layer1[0].conv1.register_forward_hook(lambda _, i, __: calls.append((i[0].shape[-1], "block")))
        outcome(model, torch.float32)
    # The last pass is kept: the backward begins with it.
    passes = [(32, "stem"), (32, "block"), (16, "stem"), (16, "block"), (32, "stem"), (32, "block")]
    blocks = [(32, "stem"), (32, "block"), (16, "stem"), (16, "block"), (16, "block"), (32, "block")]
    assert calls == passes + blocks


def test_nothing_is_repeated_where_nothing_is_kept() -> None:
    model = network("passes")
    with torch.no_grad():
        out = model([images(rows, side) for rows, side in SIZES])
    assert not out.requires_grad
    assert model.encoder.bn1.num_batches_tracked.item() == 2


class Foreign(nn.Module):
    """An encoder with plain batch norms that draws random numbers."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x).flatten(1)
        return out


def test_foreign_encoders_repeat_their_random_numbers_and_count_once() -> None:
    results = []
    for recompute in ("none", "passes"):
        torch.manual_seed(0)
        encoder = Foreign(nn.BatchNorm2d(8))
        model = MultiCropModel(encoder, nn.Linear(8, 4), recompute)
        keys = list(model.state_dict())
        results.append(outcome(model, torch.float32))
        assert list(model.state_dict()) == keys
    assert results[0].keys() == results[1].keys()
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, msg=name)


def test_encoders_that_cannot_be_repeated_are_refused() -> None:
    with pytest.raises(FastrexError, match=r"residual blocks .* got Foreign; set model\.recompute=passes"):
        MultiCropModel(Foreign(nn.BatchNorm2d(8)), nn.Linear(8, 4), "blocks")
    odd = nn.BatchNorm2d(8, momentum=None)
    with pytest.raises(
        FastrexError, match=r"layers\.1 must be a plain nn\.BatchNorm2d to be used with model\.recompute"
    ):
        MultiCropModel(Foreign(odd), nn.Linear(8, 4), "passes")
    MultiCropModel(Foreign(odd), nn.Linear(8, 4))


def test_two_ranks_repeat_their_collectives_in_one_order(tmp_path: Path) -> None:
    result = torchrun(2, __file__, tmp_path)
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        report: dict[str, Any] = json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8"))
        assert report == {"blocks": [], "passes": []}


def ranks(out: Path) -> None:
    """Run by torchrun: what differs from keeping everything, by name, for each way of recomputing."""
    from torch.nn.parallel import DistributedDataParallel

    from fastrex import distributed
    from fastrex.model.multicrop import set_process_group

    with distributed.world("cpu") as world:
        results = {}
        for recompute in ("none", "blocks", "passes"):
            model = network(recompute)
            set_process_group(model, world.group)
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
            torch.manual_seed(10 + world.rank)
            loss = wrapped([images(rows, side) for rows, side in SIZES]).square().mean()
            torch.autograd.backward(loss)
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            results[recompute] = {**gradients, **{f"buffer {name}": b for name, b in model.named_buffers()}}
        assert len(results["none"]) > 300
        report = {
            way: [name for name, t in results["none"].items() if not torch.equal(t, results[way][name])]
            for way in ("blocks", "passes")
        }
        (out / f"rank{world.rank}.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    import os

    torch.set_num_threads(1)
    ranks(Path(sys.argv[1]))
    os._exit(0)  # see fastrex.cli._leave
