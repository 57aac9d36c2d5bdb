"""Layers that compute with copies of their weights: no cast in a step, the bits of plain autocast, padded channels."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.utils._python_dispatch import TorchDispatchMode

from fastrex.config import ProjectorConfig
from fastrex.model import layers
from fastrex.model.ema import make_ema
from fastrex.model.layers import Conv2d, Linear, attach_copies, global_average, refresh_copies
from fastrex.model.multicrop import MultiCropModel
from fastrex.model.projector import Projector
from fastrex.model.resnet import ResNet
from fastrex_kernels import conv2d, sgd_ema_

BF16 = torch.bfloat16


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions by PyTorch, as on machines for which the op has nothing better."""
    monkeypatch.setattr(layers, "conv2d", partial(conv2d, impl="reference"))


@pytest.fixture
def padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels padded as on a GPU."""
    decide = layers.padded_channels
    monkeypatch.setattr(layers, "padded_channels", lambda channels, device: decide(channels, "cuda"))


def make_model(channels: int = 3) -> MultiCropModel:
    torch.manual_seed(0)
    encoder = ResNet("resnet18", width=8, channels=channels)
    projector = Projector(64, ProjectorConfig(hidden_layers=2, hidden_dim=16, out_dim=8))
    return MultiCropModel(encoder, projector)


def make_crops(channels: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = ((4, 64), (8, 32))
    crops = [torch.randn(n, channels, s, s, generator=generator) for n, s in sizes]
    return [crop.contiguous(memory_format=torch.channels_last) for crop in crops]


def step(model: nn.Module, crops: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of a step under autocast."""
    model.zero_grad()
    with torch.autocast("cpu", BF16):
        out = model(crops)
        loss = out.float().square().mean()
    torch.autograd.backward(loss)
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("library")
def test_copies_give_the_bits_of_plain_autocast() -> None:
    plain, ours = make_model(), make_model()
    attach_copies(ours, BF16)
    # One pass: autocast adds the gradients of two in bfloat16, where ours are added in float32.
    crops = make_crops()[:1]
    wanted, got = step(plain, crops), step(ours, crops)
    assert torch.equal(got[0], wanted[0])
    assert got[1].keys() == wanted[1].keys() == dict(plain.named_parameters()).keys()
    for name, gradient in got[1].items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, wanted[1][name]), name
        assert gradient.stride() == wanted[1][name].stride()
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_the_op_is_as_near_to_single_precision_as_plain_autocast() -> None:
    plain, ours, exact = make_model(), make_model(), make_model().double()
    attach_copies(ours, BF16)
    crops = make_crops()
    truth = exact([crop.double() for crop in crops])
    errors = [(step(model, crops)[0].double() - truth).abs().max().item() for model in (plain, ours)]
    assert errors[1] <= 2 * errors[0] + 1e-3


class Casts(TorchDispatchMode):
    """Counts the casts and copies of given tensors."""

    def __init__(self, tensors: Iterator[Tensor]) -> None:
        super().__init__()
        self.own = {t.untyped_storage().data_ptr() for t in tensors}
        self.casts: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("aten::_to_copy", "aten::copy_", "aten::clone"):
            source = args[1] if name == "aten::copy_" else args[0]
            if source.untyped_storage().data_ptr() in self.own:
                self.casts.append(f"{name} {tuple(source.shape)}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_casts_no_weight(channels: int, padded: bool, request: pytest.FixtureRequest) -> None:
    if padded:
        request.getfixturevalue("padding")
    model, crops = make_model(channels), make_crops(channels)
    with Casts(model.parameters()) as plain:
        step(model, crops)
    assert len(plain.casts) > 20
    copies = attach_copies(model, BF16)
    ema = make_ema(model)
    ema_copies = attach_copies(ema, BF16)
    own = [*model.parameters(), *ema.parameters(), *copies.values(), *ema_copies.values()]
    with Casts(iter(own)) as ours:
        step(model, crops)
        with torch.no_grad(), torch.autocast("cpu", BF16):
            ema(crops[:1])
    assert ours.casts == []


def test_copies_have_the_names_shapes_and_strides_of_their_parameters() -> None:
    model = make_model()
    copies = attach_copies(model, BF16)
    parameters = dict(model.named_parameters())
    wanted = {name for name, p in parameters.items() if p.dim() > 1}
    wanted |= {f"projector.layers.{number}.bias" for number in (0, 3)}
    assert copies.keys() == wanted
    for name, tensor in copies.items():
        assert tensor.dtype == BF16
        assert not tensor.requires_grad
        assert tensor.shape == parameters[name].shape
        assert tensor.stride() == parameters[name].stride()
        assert torch.equal(tensor, parameters[name].to(BF16))
    assert attach_copies(model, torch.float32) == {}
    assert all(m.weight_copy is None for m in model.modules() if isinstance(m, Conv2d | Linear))


@pytest.mark.parametrize("padded", [False, True])
def test_the_optimiser_keeps_the_copies(padded: bool, request: pytest.FixtureRequest) -> None:
    if padded:
        request.getfixturevalue("padding")
    model = make_model()
    ema = make_ema(model)
    copies, ema_copies = attach_copies(model, BF16), attach_copies(ema, BF16)
    step(model, make_crops())
    parameters, followers = dict(model.named_parameters()), dict(ema.named_parameters())
    sgd_ema_(
        list(parameters.values()),
        [p.grad for p in parameters.values()],  # type: ignore[misc]
        [torch.zeros_like(p) for p in parameters.values()],
        list(followers.values()),
        lr=torch.tensor(0.1),
        momentum=0.9,
        weight_decay=[1e-4] * len(parameters),
        ema_momentum=0.5,
        param_copies=[copies.get(name) for name in parameters],
        ema_copies=[ema_copies.get(name) for name in followers],
    )
    assert all(torch.equal(copy, parameters[name].to(BF16)) for name, copy in copies.items())
    assert all(torch.equal(copy, followers[name].to(BF16)) for name, copy in ema_copies.items())
    assert not torch.equal(copies["encoder.conv1.weight"], ema_copies["encoder.conv1.weight"])
    # In the masters' own layout, so that a kernel walks through both at once.
    assert all(
        (copy.shape, copy.stride()) == (p.shape, p.stride())
        for n, p in parameters.items()
        if (copy := copies.get(n)) is not None
    )


def test_refreshing_rounds_the_masters_again() -> None:
    model = make_model()
    copies = attach_copies(model, BF16)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    refresh_copies(model)
    assert all(
        torch.equal(copy, p.to(BF16)) for name, p in model.named_parameters() if (copy := copies.get(name)) is not None
    )


def test_copies_are_no_state() -> None:
    model = make_model()
    keys = list(model.state_dict())
    attach_copies(model, BF16)
    assert list(model.state_dict()) == keys
    assert all(m.weight_copy is None for m in copy.deepcopy(model).modules() if isinstance(m, Conv2d | Linear))
    assert model.encoder.conv1.weight_copy is not None
    model.double()
    assert all(m.weight_copy is None for m in model.modules() if isinstance(m, Conv2d | Linear))


@pytest.mark.parametrize("channels", [3, 1])
def test_padded_channels_change_nothing(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [layers.padded_channels(n, "cuda") for n in (1, 3, 4, 64)] == [4, 4, 4, 64]
    assert layers.padded_channels(3, "cpu") == 3
    conv, x = Conv2d(channels, 16, 7, 2), torch.randn(2, channels, 30, 30)
    convert_conv2d_weight_memory_format(conv, torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    results = []
    shapes: list[int] = []

    def watched(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes.append(input.shape[1])
        return conv2d(input, *args, **kwargs)

    monkeypatch.setattr(layers, "conv2d", watched)
    for padded in (channels, 4):
        monkeypatch.setattr(layers, "padded_channels", lambda n, device, padded=padded: padded)
        copies = attach_copies(conv, BF16)
        assert copies["weight"].shape == conv.weight.shape
        conv.weight.grad = None
        with torch.autocast("cpu", BF16):
            y = conv(x)
            with torch.no_grad():
                assert torch.equal(conv(x), y)
        assert shapes == [padded, padded]
        shapes.clear()
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.autograd.backward(y, torch.linspace(-1, 1, y.numel()).to(BF16).view_as(y))
        assert conv.weight.grad is not None
        results.append((y.detach(), conv.weight.grad))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-2, atol=1e-2)


def test_padding_keeps_images_channels_last() -> None:
    x = torch.randn(2, 3, 8, 8, dtype=BF16).contiguous(memory_format=torch.channels_last)
    wider = nn.functional.pad(x, (0, 0, 0, 0, 0, 1))
    assert wider.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(wider[:, :3], x)
    assert not wider[:, 3:].any()


def test_without_autocast_the_layers_are_pytorchs() -> None:
    torch.manual_seed(2)
    conv, linear = Conv2d(3, 4, 3, 2), Linear(5, 6)
    torch.manual_seed(2)
    plain = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.Linear(5, 6)
    attach_copies(nn.ModuleList([conv, linear]), BF16)
    images, rows = torch.randn(2, 3, 9, 9), torch.randn(7, 5)
    assert torch.equal(conv(images), plain[0](images))
    assert torch.equal(linear(rows), plain[1](rows))
    with torch.autocast("cpu", torch.float16):  # another dtype than the copies'
        assert torch.equal(conv(images), plain[0](images))
        assert torch.equal(linear(rows), plain[1](rows))


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_frozen_parameters_of_a_linear_layer(frozen: str) -> None:
    torch.manual_seed(3)
    linear, x = Linear(5, 6), torch.randn(7, 5)
    for name, parameter in linear.named_parameters():
        parameter.requires_grad_(frozen not in (name, "both"))
    gradients = []
    for dtype in (torch.float32, BF16):
        attach_copies(linear, dtype)
        linear.zero_grad()
        y = x.clone().requires_grad_()
        with torch.autocast("cpu", BF16):
            out = linear(y)
        torch.autograd.backward(out.float().square().sum())
        gradients.append((y.grad, linear.weight.grad, linear.bias.grad))
    for plain, ours in zip(*gradients, strict=True):
        assert (plain is None) == (ours is None)
        assert plain is None or ours is None or torch.equal(plain, ours)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing does it
def test_the_layers_compile() -> None:
    model = nn.Sequential(Conv2d(3, 8, 3), nn.Flatten(), Linear(8 * 16, 4))
    attach_copies(model, BF16)
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    results = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        with torch.autocast("cpu", BF16):
            out = run(x)
        torch.autograd.backward(out.float().square().sum())
        results.append([out.detach(), *(p.grad for p in model.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_global_average_is_pytorchs() -> None:
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    outputs = [global_average(inputs[0]), nn.functional.adaptive_avg_pool2d(inputs[1], 1).flatten(1)]
    upstream = torch.randn_like(outputs[0])
    torch.autograd.backward(outputs, [upstream, upstream])
    torch.testing.assert_close(outputs[0], outputs[1])
    assert inputs[0].grad is not None
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    assert inputs[0].grad.is_contiguous(memory_format=torch.channels_last)
