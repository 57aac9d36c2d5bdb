"""Encoders against the real torchvision, projector, multi-crop forward, process groups, the momentum copy."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision_shim import import_timm, import_torchvision

from fastrex.config import ModelConfig, ProjectorConfig
from fastrex.errors import FastrexError
from fastrex.model.ema import make_ema
from fastrex.model.layers import attach_copies
from fastrex.model.multicrop import MultiCropModel, set_process_group
from fastrex.model.norm import BatchNormAct
from fastrex.model.projector import Projector
from fastrex.model.resnet import ARCHS, ResNet, build_encoder, infer_arch, match_channels


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("arch", ARCHS)
def test_state_dict_is_torchvisions_without_fc(arch: str) -> None:
    theirs = import_torchvision().models.get_model(arch).state_dict()
    ours = ResNet(arch).state_dict()
    wanted = {key: value.shape for key, value in theirs.items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in ours.items()} == wanted
    assert list(ours) == list(wanted)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("training", [False, True])
def test_outputs_gradients_and_buffers_equal_torchvision(arch: str, training: bool) -> None:
    torch.manual_seed(0)
    theirs = import_torchvision().models.get_model(arch).double().train(training)
    theirs.fc = nn.Identity()
    if not training:
        for module in theirs.modules():
            if (
                isinstance(module, nn.BatchNorm2d)
                and module.running_mean is not None
                and module.running_var is not None
            ):
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    ours = ResNet(arch).double().train(training)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(x) for model, x in zip((ours, theirs), inputs, strict=True)]
    upstream = torch.randn_like(outputs[0])
    for output in outputs:
        torch.autograd.backward(output, upstream)
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_initial_values_are_torchvisions() -> None:
    # One seed, one order of draws: every convolution must start from the very same numbers.
    torch.manual_seed(5)
    ours = ResNet("resnet18").state_dict()
    stds = {key: value.std().item() for key, value in ours.items() if key.endswith(("conv1.weight", "conv2.weight"))}
    for key, std in stds.items():
        fan_out = ours[key].shape[0] * ours[key].shape[2] * ours[key].shape[3]
        # sqrt(2 / fan_out), to five standard errors of a sample of at least 9408 weights.
        assert std == pytest.approx((2.0 / fan_out) ** 0.5, rel=5.0 / (2 * 9408) ** 0.5)
    assert all((value == 1).all() for key, value in ours.items() if ".bn" in key and key.endswith(".weight"))
    assert all((value == 0).all() for key, value in ours.items() if ".bn" in key and key.endswith(".bias"))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("width", [64, 16])
def test_infer_arch_reads_back_what_was_built(arch: str, stem: str, width: int) -> None:
    with torch.device("meta"):
        state = ResNet(arch, stem=stem, width=width).state_dict()
    assert infer_arch(state) == {"arch": arch, "stem": stem, "width": width}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "got none"),
        ({"conv1.weight": torch.zeros(8, 3, 5, 5)}, r"got \[8, 3, 5, 5\]"),
        ({"conv1.weight": torch.zeros(8, 4, 7, 7)}, r"got \[8, 4, 7, 7\]"),
        (
            {"conv1.weight": torch.zeros(8, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(1)},
            r"basic blocks \[1, 0, 0, 0\]",
        ),
    ],
)
def test_infer_arch_refuses_other_networks(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(FastrexError, match=f"^infer_arch: .*{message}"):
        infer_arch(state)


def test_parameter_counts_of_the_paper() -> None:
    with torch.device("meta"):
        assert count(ResNet("resnet50")) == 23_508_032
        for layers, parameters in enumerate([524_288, 4_724_736, 8_925_184, 13_125_632]):
            assert count(Projector(2048, ProjectorConfig(hidden_layers=layers))) == parameters


class Layouts(TorchDispatchMode):
    """Notes every 4-d result that is not channels-last, and every copy from one layout to another."""

    COPIES = ("aten::clone", "aten::copy_", "aten::_to_copy", "aten::contiguous")

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.wrong: list[str] = []

    @staticmethod
    def fits(tensor: Tensor) -> bool:
        # One value for many places (a mean's gradient) is no layout yet.
        broadcast = any(stride == 0 < size - 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return broadcast or tensor.is_contiguous(memory_format=torch.channels_last)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        tensors = [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]
        if name in self.COPIES:
            tensors += [t for t in args[:2] if isinstance(t, Tensor)]
        images = [t for t in tensors if t.dim() == 4]
        self.seen += len(images)
        self.wrong += [f"{name} {tuple(t.shape)} {t.stride()}" for t in images if not self.fits(t)]
        return out


@pytest.mark.parametrize("bn", ["fused", "torch"])
@pytest.mark.parametrize(
    ("arch", "stem", "recompute"),
    [
        *((arch, stem, "none") for arch in ("resnet18", "resnet50") for stem in ("imagenet", "small")),
        *(("resnet50", "imagenet", recompute) for recompute in ("blocks", "passes")),
    ],
)
def test_no_activation_is_ever_transposed(arch: str, stem: str, bn: str, recompute: str) -> None:
    encoder = ResNet(arch, stem=stem, width=8, bn=bn)
    projector = Projector(encoder.num_features, ProjectorConfig(hidden_layers=1, hidden_dim=8, out_dim=4), bn=bn)
    model = MultiCropModel(encoder, projector, recompute)
    attach_copies(model, torch.bfloat16)
    sizes = ((2, 64), (4, 32)) if stem == "imagenet" else ((2, 32), (4, 16))
    batch = [torch.randn(n, 3, s, s).contiguous(memory_format=torch.channels_last) for n, s in sizes]
    with Layouts() as layouts:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(batch)
        torch.autograd.backward(out.float().square().sum())
    assert layouts.wrong == []
    assert layouts.seen > (400 if arch == "resnet50" else 150)


def test_the_watch_over_layouts_sees_a_transpose() -> None:
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    with Layouts() as layouts:
        x.contiguous()
    assert any(note.startswith("aten::clone (2, 3, 4, 4) (48, 16, 4, 1)") for note in layouts.wrong)
    # What PyTorch's own pool hands back.
    y = x.clone().requires_grad_()
    with Layouts() as layouts:
        torch.autograd.backward(nn.functional.adaptive_avg_pool2d(y, 1).sum())
    assert layouts.wrong


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("channels_last_input", [False, True])
@pytest.mark.parametrize("channels", [3, 1])
def test_every_activation_is_channels_last(stem: str, channels_last_input: bool, channels: int) -> None:
    encoder = ResNet("resnet50", stem=stem, width=8, channels=channels)
    seen: list[str] = []
    wrong: list[str] = []

    def check(name: str, tensor: Tensor) -> None:
        if tensor.dim() == 4:
            seen.append(name)
            if not tensor.is_contiguous(memory_format=torch.channels_last):
                wrong.append(name)

    def watch(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            check(name, output)
            output.register_hook(partial(check, f"gradient of {name}"))  # type: ignore[no-untyped-call]

        module.register_forward_hook(hook)

    for name, module in encoder.named_modules():
        if name:
            watch(name, module)
    x = torch.randn(2, channels, 32, 32)
    output = encoder(x.contiguous(memory_format=torch.channels_last) if channels_last_input else x)
    torch.autograd.backward(output.square().sum())
    assert len(seen) > 150
    assert wrong == []
    weights = [module.weight for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert all(
        weight.grad.is_contiguous(memory_format=torch.channels_last) for weight in weights if weight.grad is not None
    )


@pytest.mark.parametrize(("stem", "width", "rows"), [("imagenet", 64, 4), ("small", 16, 16)])
def test_stem_and_width(stem: str, width: int, rows: int) -> None:
    encoder = ResNet("resnet18", stem=stem, width=width).eval()
    shapes: list[torch.Size] = []
    encoder.layer1.register_forward_hook(lambda _, inputs, out: shapes.append(out.shape))
    with torch.no_grad():
        features = encoder(torch.randn(2, 3, 16, 16))
    assert shapes == [torch.Size([2, width, rows, rows])]
    assert features.shape == (2, encoder.num_features)
    assert encoder.num_features == 8 * width


def test_wrong_encoder_arguments() -> None:
    with pytest.raises(ValueError, match=r"ResNet: arch must be one of resnet18, .* got 'resnet19'"):
        ResNet("resnet19")
    with pytest.raises(ValueError, match="ResNet: stem must be one of imagenet, small, got 'big'"):
        ResNet("resnet18", stem="big")
    with pytest.raises(ValueError, match="ResNet: width must be positive, got 0"):
        ResNet("resnet18", width=0)
    with pytest.raises(ValueError, match="ResNet: channels must be 1 or 3, got 2"):
        ResNet("resnet18", channels=2)


@pytest.mark.parametrize(("stem", "kernel"), [("imagenet", 7), ("small", 3)])
def test_grey_encoder(stem: str, kernel: int) -> None:
    encoder = build_encoder(ModelConfig(arch="resnet18", stem=stem, width=8), 1)
    state = encoder.state_dict()
    assert state["conv1.weight"].shape == (8, 1, kernel, kernel)
    assert infer_arch(state) == {"arch": "resnet18", "stem": stem, "width": 8}
    colour = ResNet("resnet18", stem=stem, width=8).state_dict()
    assert {k: v.shape for k, v in state.items() if k != "conv1.weight"} == {
        k: v.shape for k, v in colour.items() if k != "conv1.weight"
    }
    assert encoder(torch.randn(2, 1, 32, 32)).shape == (2, 64)


def test_channels_are_matched_so_that_a_grey_image_gives_the_same_features() -> None:
    torch.manual_seed(4)
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    for given, wanted in ((3, 1), (1, 3)):
        source, target = (ResNet("resnet18", width=8, channels=c).double().eval() for c in (given, wanted))
        state, words = match_channels(source.state_dict(), target.state_dict())
        target.load_state_dict(state)
        grey = [x.expand(2, channels, 32, 32) for channels in (given, wanted)]
        torch.testing.assert_close(target(grey[1]), source(grey[0]))
        assert "conv1.weight" in words
        assert ("summed" in words) == (wanted == 1)
        same, words = match_channels(source.state_dict(), source.state_dict())
        assert words == ""
        assert all(torch.equal(same[key], value) for key, value in source.state_dict().items())


def test_matching_channels_leaves_other_differences_alone() -> None:
    small, large = ResNet("resnet18", stem="small", width=8, channels=1), ResNet("resnet18", width=8)
    state, words = match_channels(large.state_dict(), small.state_dict())
    assert words == ""
    assert state["conv1.weight"].shape == (8, 3, 7, 7)


def test_batch_norm_settings_reach_every_layer() -> None:
    cfg = ModelConfig(arch="resnet18", width=8, bn_momentum=0.3, bn_eps=1e-3)
    layers = [module for module in build_encoder(cfg).modules() if isinstance(module, BatchNormAct)]
    assert len(layers) == 20
    assert {(layer.momentum, layer.eps) for layer in layers} == {(0.3, 1e-3)}


def test_num_batches_tracked_counts_training_forwards_only() -> None:
    layer = BatchNormAct(3)
    layer(torch.randn(4, 3))
    layer.eval()(torch.randn(4, 3))
    assert layer.num_batches_tracked.item() == 1


def test_projector_is_its_formula() -> None:
    torch.manual_seed(1)
    cfg = ProjectorConfig(hidden_layers=1, hidden_dim=6, out_dim=3)
    projector = Projector(5, cfg).double()
    x = torch.randn(7, 5, dtype=torch.float64) * 100
    x[2] = 0  # a zero row stays zero instead of becoming NaN
    first, _, _, last = projector.layers
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    assert last.bias is None
    unit = x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
    hidden = unit @ first.weight.T + first.bias
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(projector(x), hidden @ last.weight.T)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_projector_options_are_their_formulas(activation: str, batch_norm: bool) -> None:
    torch.manual_seed(3)
    cfg = ProjectorConfig(
        hidden_layers=2, hidden_dim=6, out_dim=3, input_norm=False, activation=activation, batch_norm=batch_norm
    )
    projector = Projector(5, cfg).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    wanted = [x]
    linears = [layer for layer in projector.layers if isinstance(layer, nn.Linear)]
    for linear in linears[:-1]:
        hidden = wanted[-1] @ linear.weight.T + linear.bias
        if batch_norm:
            hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()
        wanted.append(hidden.clamp(min=0) if activation == "relu" else nn.functional.gelu(hidden))
    wanted.append(wanted[-1] @ linears[-1].weight.T)
    torch.testing.assert_close(projector(x), wanted[-1])
    # Layer by layer too: the analysis reads what stands behind each.
    for stage, values in zip(projector.stages(), wanted[1:], strict=True):
        x = stage(x)
        torch.testing.assert_close(x, values)
    assert not any(isinstance(layer, BatchNormAct) for layer in projector.layers) or batch_norm


def test_projector_initialisation() -> None:
    torch.manual_seed(2)
    projector = Projector(256, ProjectorConfig(hidden_layers=2, hidden_dim=256, out_dim=64))
    linears = [layer for layer in projector.layers if isinstance(layer, nn.Linear)]
    assert [layer.bias is None for layer in linears] == [False, False, True]
    for layer in linears:
        # Five standard errors of the smallest layer's 16384 weights.
        assert layer.weight.std().item() == pytest.approx(0.02, rel=5 / (2 * 16384) ** 0.5)
        assert layer.bias is None or not layer.bias.any()


def test_projector_normalises_in_fp32_under_autocast() -> None:
    projector = Projector(8, ProjectorConfig(hidden_layers=0, out_dim=2))
    none = Projector(8, ProjectorConfig(enabled=False, hidden_layers=3, out_dim=2))
    x = torch.randn(3, 8)
    assert none.out_features == 8
    assert not list(none.parameters())
    assert none(x) is x
    seen: list[torch.dtype] = []
    projector.layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = projector(torch.randn(3, 8).bfloat16())
    assert seen == [torch.float32]
    assert out.dtype == torch.bfloat16


class Recorder(nn.Module):
    """An encoder whose feature is the first value of each image, and which remembers the shapes it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(tuple(x.shape))
        return x[:, :1, 0, 0]


def crops(rows: int, size: int, start: int) -> Tensor:
    return torch.arange(start, start + rows).float()[:, None, None, None].expand(rows, 3, size, size)


@pytest.mark.parametrize(
    ("local_size", "calls"), [(4, [(2, 3, 8, 8), (6, 3, 4, 4)]), (8, [(8, 3, 8, 8)])], ids=["two sizes", "one size"]
)
def test_one_encoder_pass_per_resolution_and_rows_in_order(local_size: int, calls: list[tuple[int, ...]]) -> None:
    encoder, projector = Recorder(), Recorder()
    projector.register_forward_pre_hook(lambda _, inputs: inputs[0][:, :, None, None])
    model = MultiCropModel(encoder, projector)
    out = model([crops(2, 8, 0), crops(6, local_size, 2)])
    assert encoder.calls == calls
    assert projector.calls == [(8, 1, 1, 1)]
    assert out[:, 0].tolist() == list(range(8))
    assert model.encode(crops(3, 8, 5))[:, 0].tolist() == [5, 6, 7]


def test_multicrop_needs_crops() -> None:
    with pytest.raises(ValueError, match="crops must hold at least one group"):
        MultiCropModel(Recorder(), nn.Identity())([])


class Group(ProcessGroup):
    """Stands for a process group: a handle that cannot be copied."""

    def __init__(self) -> None:
        super().__init__(0, 1)  # type: ignore[call-arg]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TypeError("cannot copy a process group")


def small_model() -> MultiCropModel:
    encoder = ResNet("resnet18", width=8)
    return MultiCropModel(encoder, Projector(64, ProjectorConfig(hidden_layers=1, hidden_dim=8, out_dim=4)))


def test_set_process_group_reaches_every_batch_norm() -> None:
    model, group = small_model(), Group()
    set_process_group(model, group)
    layers = [module for module in model.modules() if isinstance(module, BatchNormAct)]
    assert len(layers) == 21
    assert all(layer.process_group is group for layer in layers)
    set_process_group(model, None)
    assert all(layer.process_group is None for layer in layers)


def test_set_process_group_converts_plain_batch_norms_and_keeps_their_values() -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.2), nn.Sequential(nn.BatchNorm2d(4)))
    net(torch.randn(2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    wanted, keys = net.eval()(x), list(net.state_dict())
    parameters = list(net.parameters())
    set_process_group(net, None)
    assert isinstance(net[1], nn.BatchNorm2d)
    set_process_group(net, Group())
    assert isinstance(net[1], BatchNormAct)
    assert (net[1].eps, net[1].momentum, net[1].relu, net[1].training) == (1e-3, 0.2, False, False)
    assert list(net.state_dict()) == keys
    assert [id(parameter) for parameter in net.parameters()] == [id(parameter) for parameter in parameters]
    torch.testing.assert_close(net(x), wanted)


@pytest.mark.parametrize(
    "norm", [nn.SyncBatchNorm(4), nn.BatchNorm1d(4), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, momentum=None)]
)
def test_set_process_group_refuses_batch_norms_that_would_stay_local(norm: nn.Module) -> None:
    net = nn.Sequential(nn.Sequential(norm))
    with pytest.raises(FastrexError, match=r"the layer 0\.0 must be a plain nn\.BatchNorm2d"):
        set_process_group(net, Group())
    set_process_group(net, None)


def test_ema_is_a_separate_frozen_copy_in_training_mode() -> None:
    model, group = small_model().eval(), Group()
    set_process_group(model, group)
    ema = make_ema(model)
    ours, theirs = model.state_dict(), ema.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not {t.data_ptr() for t in ours.values()} & {t.data_ptr() for t in theirs.values()}
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert ema.training
    assert not model.training
    assert all(module.process_group is group for module in ema.modules() if isinstance(module, BatchNormAct))
    weights = [module.weight for module in ema.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_timm_encoders() -> None:
    import_timm()
    encoder = build_encoder(ModelConfig(arch="timm:resnet18"))
    x = torch.randn(2, 3, 32, 32)
    ours = ResNet("resnet18")
    ours.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(ours.eval()(x), encoder.eval()(x))
    set_process_group(encoder, Group())
    torch.testing.assert_close(encoder(x), ours(x))
    # This one widens the pooled vector after its num_features of 576.
    widened = build_encoder(ModelConfig(arch="timm:mobilenetv3_small_100")).eval()
    assert widened(x).shape == (2, widened.num_features)
    grey = build_encoder(ModelConfig(arch="timm:mobilenetv3_small_100"), 1).eval()
    assert grey(x[:, :1]).shape == (2, grey.num_features)
    state, words = match_channels(widened.state_dict(), grey.state_dict())
    grey.load_state_dict(state)
    assert "conv_stem.weight" in words
    torch.testing.assert_close(grey(x[:, :1]), widened(x[:, :1].expand(2, 3, 32, 32)), rtol=1e-4, atol=1e-5)


def test_timm_errors_name_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import_timm()
    with pytest.raises(FastrexError, match=r"knows .*resnet5.*, got 'resnet5000'"):
        build_encoder(ModelConfig(arch="timm:resnet5000"))
    with pytest.raises(FastrexError, match=r"model\.stem and model\.width must keep their defaults for timm:resnet18"):
        build_encoder(ModelConfig(arch="timm:resnet18", stem="small"))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(FastrexError, match="pip install timm"):
        build_encoder(ModelConfig(arch="timm:resnet18"))
