"""BatchNorm with residual and ReLU: the backends compute one function, and the choice among them is spoken."""

from __future__ import annotations

import copy

import pytest
import torch
from test_model import Group, small_model
from torch import Tensor, nn

import fastrex_kernels
from fastrex.config import ModelConfig, ProjectorConfig
from fastrex.errors import FastrexError
from fastrex.model.multicrop import set_process_group
from fastrex.model.norm import BACKENDS, BatchNormAct, resolve_bn
from fastrex.model.projector import Projector
from fastrex.model.recompute import recomputed
from fastrex.model.resnet import build_encoder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def layer(backend: str, *, relu: bool = True, channels: int = 8) -> BatchNormAct:
    new = BatchNormAct(channels, relu=relu, momentum=0.3, eps=1e-3, backend=backend)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        new.weight.uniform_(0.5, 1.5, generator=generator)
        new.bias.uniform_(-0.5, 0.5, generator=generator)
        new.running_mean.uniform_(-0.5, 0.5, generator=generator)
    return new


def outcome(norm: BatchNormAct, x: Tensor, residual: Tensor | None) -> list[Tensor]:
    """Output, gradients and buffers of one call."""
    inputs = [t.clone().requires_grad_() for t in (x, residual) if t is not None]
    norm.zero_grad()
    y = norm(*inputs)
    torch.autograd.backward(y, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    gradients = [t.grad for t in (*inputs, norm.weight, norm.bias) if t.grad is not None]
    assert len(gradients) == len(inputs) + 2
    return [y.detach(), *gradients, *norm.buffers()]


@pytest.mark.parametrize("shape", [(6, 8, 4, 4), (16, 8)])
@pytest.mark.parametrize(("relu", "summed"), [(True, True), (True, False), (False, False), (False, True)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_compute_one_function(
    shape: tuple[int, ...], relu: bool, summed: bool, training: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(shape), torch.randn(shape) if summed else None
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
        residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    x, residual = x.to(dtype), None if residual is None else residual.to(dtype)
    results = [outcome(layer(backend, relu=relu).train(training), x, residual) for backend in BACKENDS]
    # Of norms: rounding shuts a ReLU here and there.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-1
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert ours.dtype == theirs.dtype
            assert (ours - theirs).float().norm() <= tolerance * theirs.float().norm()
    assert results[0][-1].item() == training


def test_the_torch_backend_is_pytorchs_own() -> None:
    torch.manual_seed(0)
    ours, plain = layer("torch"), nn.BatchNorm2d(8, momentum=0.3, eps=1e-3)
    plain.load_state_dict(ours.state_dict())
    x, residual = torch.randn(4, 8, 5, 5), torch.randn(4, 8, 5, 5)
    assert torch.equal(ours(x, residual), (plain(x) + residual).relu())
    assert torch.equal(ours(x), plain(x).relu())
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_state_is_that_of_batch_norm_whatever_computes_it() -> None:
    wanted = {name: t.shape for name, t in nn.BatchNorm2d(8).state_dict().items()}
    for backend in BACKENDS:
        assert {name: t.shape for name, t in BatchNormAct(8, backend=backend).state_dict().items()} == wanted
        assert backend in repr(BatchNormAct(8, backend=backend))
    with pytest.raises(ValueError, match="backend must be one of fused, torch, apex, got 'auto'"):
        BatchNormAct(8, backend="auto")


def test_the_setting_reaches_every_layer() -> None:
    for backend in BACKENDS:
        encoder = build_encoder(ModelConfig(arch="resnet18", width=8, bn=backend))
        projector = Projector(64, ProjectorConfig(hidden_layers=2, hidden_dim=8, out_dim=4), bn=backend)
        layers = [m for m in nn.ModuleList([encoder, projector]).modules() if isinstance(m, BatchNormAct)]
        assert len(layers) == 22
        assert {m.backend for m in layers} == {backend}


@pytest.mark.parametrize("backend", ["fused", "torch"])
def test_a_repeated_forward_leaves_no_trace(backend: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    norm = layer(backend)
    twin = copy.deepcopy(norm)
    results = []
    for one, again in ((norm, True), (twin, False)):
        y = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = recomputed(lambda t, one=one: one(t).square(), y) if again else one(y).square()
        torch.autograd.backward(out.sum())
        results.append([out.detach(), y.grad, one.weight.grad, one.bias.grad, *one.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert norm.num_batches_tracked.item() == 1


def test_pytorchs_kernels_cannot_join_batches_on_a_cpu() -> None:
    model = small_model()
    for module in model.modules():
        if isinstance(module, BatchNormAct):
            module.backend = "torch"
    with pytest.raises(FastrexError, match=r"model\.bn must be fused .* set model\.bn=fused"):
        set_process_group(model, Group())
    set_process_group(model, None)
    with pytest.raises(FastrexError, match=r"set model\.bn=fused"):
        resolve_bn("torch", "bf16", CPU, 2)


def test_the_choice_is_a_line_of_the_log() -> None:
    for device in (CPU, CUDA):
        kernels = fastrex_kernels.backend(device.type)
        assert resolve_bn("fused", "bf16", device, 4) == ("fused", f"batch norm: fused ({kernels})")
        assert resolve_bn("torch", "fp32", device, 1)[0] == "torch"
    backend, line = resolve_bn("torch", "bf16", CUDA, 8)
    assert (backend, "SyncBatchNorm" in line) == ("torch", True)
