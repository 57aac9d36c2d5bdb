"""The memory of a step as foretold, against the tensors that a real forward keeps."""

from __future__ import annotations

import time

import pytest
import torch
from test_recompute import images, network
from torch import Tensor

from fastrex.budget import activations, budget_line, state_bytes
from fastrex.config import ProjectorConfig
from fastrex.model.ema import make_ema
from fastrex.model.layers import attach_copies
from fastrex.model.multicrop import MultiCropModel
from fastrex.model.projector import Projector
from fastrex.model.resnet import ResNet

BF16 = torch.bfloat16
CROPS = [(1, 32), (3, 16)]


def kept(model: MultiCropModel, count: int, dtype: torch.dtype) -> int:
    """Bytes of all storages that a real forward saves, but for the model's own."""
    copies = [
        c for m in model.modules() for name in ("weight_copy", "bias_copy") if (c := getattr(m, name, None)) is not None
    ]
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *copies)}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own and tensor.untyped_storage().nbytes():
            seen.setdefault(address, tensor)
        return tensor

    crops = [images(count * n, side).to(dtype) for n, side in CROPS]
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model(crops)
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@pytest.mark.parametrize("bn", ["fused", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_activations_are_what_a_forward_keeps(bn: str, dtype: torch.dtype, arch: str) -> None:
    model = network("none", bn, arch)
    attach_copies(model, dtype)
    found = activations(model, CROPS, 24, 3, dtype)
    assert list(found) == ["32", "16", "head", "recomputed"]
    assert model.encoder.bn1.num_batches_tracked.item() == 0
    # Without memory, PyTorch's mixed-precision batch norm says bfloat16 of statistics that it keeps in float32.
    slack = 1e-3 if (bn, dtype) == ("torch", BF16) else 0
    assert sum(found.values()) == pytest.approx(kept(model, 24, dtype), rel=slack, abs=0)


@pytest.mark.parametrize("recompute", ["blocks", "passes"])
@pytest.mark.parametrize("bn", ["fused", "torch"])
def test_recomputing_keeps_what_is_foretold(recompute: str, bn: str) -> None:
    model = network(recompute, bn)
    attach_copies(model, BF16)
    found = activations(model, CROPS, 8, 3, BF16)
    whole = network("none", bn)
    attach_copies(whole, BF16)
    plain = activations(whole, CROPS, 8, 3, BF16)
    stays = found["32"] + found["16"] + found["head"]
    assert stays == pytest.approx(kept(model, 8, BF16), rel=2e-3 if bn == "torch" else 0, abs=0)
    if recompute == "blocks":
        assert 0 < found["recomputed"] < 0.5 * sum(plain.values())
        assert sum(found.values()) < 0.8 * sum(plain.values())
    else:
        # The images of the first resolution and all of the second, then all of the first.
        assert found["32"] == 8 * 3 * 32 * 32 * 2
        assert sum(found.values()) == max(plain["32"], stays)


@pytest.mark.parametrize("bn", ["fused", "torch"])
def test_a_batch_of_256_of_the_full_recipe_fits_80_gb(bn: str) -> None:
    projector = Projector(2048, ProjectorConfig(), bn=bn)
    model = MultiCropModel(ResNet("resnet50", bn=bn), projector).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = make_ema(model)
    attach_copies(model, BF16)
    attach_copies(ema, BF16)
    start = time.perf_counter()
    found = activations(model, [(1, 224), (8, 96)], 256, 3, BF16)
    assert time.perf_counter() - start < 10  # about one second where nothing else runs
    state = state_bytes(model, ema)
    weights = sum(p.numel() for p in model.parameters())
    # Weight, gradient, momentum, EMA in fp32, two copies in bf16, and little else.
    assert 0 < state - weights * (4 * 4) - 2 * 2 * weights < 0.02 * state
    assert sum(found.values()) + state < 80e9
    # By hand: outputs of the convolutions and inputs of the next ones, two bytes each, for 224 and eight times 96.
    assert 25e9 < sum(found.values()) < 32e9
    line = budget_line(found, 256, state, 80 * 10**9)
    sizes = "26.2 GiB activations for 256 images (224: 10.5 GiB, 96: 15.5 GiB, head: 108 MiB), 699 MiB weights"
    assert line.startswith(f"memory: {sizes}" if bn == "fused" else "memory: 25.9 GiB")
    assert line.endswith("MiB weights, momentum, EMA and gradients, of 74.5 GiB")
    assert "model.recompute=passes" in budget_line(found, 256, state, 20 * 10**9)
    assert budget_line(found, 256, state).endswith("EMA and gradients")


def test_grey_images_and_one_resolution() -> None:
    torch.manual_seed(0)
    model = MultiCropModel(ResNet("resnet18", width=8, channels=1), torch.nn.Linear(64, 4), "passes")
    found = activations(model, [(1, 32), (2, 32)], 16, 1, torch.float32)
    assert list(found) == ["32", "head", "recomputed"]
    assert found["recomputed"] == 0
