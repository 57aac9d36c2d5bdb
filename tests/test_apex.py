"""NVIDIA apex is optional: what is installed is recognised, used where it fits, and its traps are handled.

The packages here are stand-ins. That of NVIDIA keeps a batch's statistics as the real one does: in buffers of the
module, written behind autograd's back by every forward and read by the backward.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from torch import Tensor

from fastrex import apex
from fastrex.config import ProjectorConfig
from fastrex.errors import FastrexError
from fastrex.model.ema import make_ema
from fastrex.model.multicrop import MultiCropModel
from fastrex.model.norm import BatchNormAct, resolve_bn
from fastrex.model.projector import Projector
from fastrex.model.resnet import ResNet

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

GROUPBN = """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, z, s, b, rm, rv, mini_m, mini_riv, momentum, epsilon, relu):
            assert x.dtype == torch.float16 and x.dim() == 4 and x.shape[3] % 4 == 0
            assert x.is_contiguous() and (z is None or z.is_contiguous())
            wide = x.float()
            var, mean = torch.var_mean(wide, (0, 1, 2), correction=0)
            # Through .data: a kernel that writes to an address leaves no version behind.
            mini_m.data.copy_(mean)
            mini_riv.data.copy_((var + epsilon).rsqrt())
            n = x.numel() // x.shape[3]
            rm.data.mul_(1 - momentum).add_(momentum * mean)
            rv.data.mul_(1 - momentum).add_(momentum * var * n / (n - 1))
            y = (wide - mean) * mini_riv * s + b
            y = y if z is None else y + z
            y = y.relu() if relu else y
            ctx.relu, ctx.residual = relu, z is not None
            ctx.save_for_backward(x, s, mini_m, mini_riv, y > 0)
            return y.half()

        @staticmethod
        def backward(ctx, grad):
            assert grad.is_contiguous()
            x, s, mean, riv, positive = ctx.saved_tensors
            g = grad.float() * positive if ctx.relu else grad.float()
            normed = (x.float() - mean) * riv
            dbias, dscale = g.sum((0, 1, 2)), (g * normed).sum((0, 1, 2))
            n = x.numel() // x.shape[3]
            dx = s * riv * (g - dbias / n - normed * dscale / n)
            return (dx.half(), g.half() if ctx.residual else None, dscale, dbias) + (None,) * 7

    class BatchNorm2d_NHWC(_BatchNorm):
        calls = 0

        def __init__(self, num_features, fuse_relu=False, bn_group=1, multi_stream=False):
            super().__init__(num_features)
            self.fuse_relu, self.multi_stream = fuse_relu, multi_stream
            self.minibatch_mean, self.minibatch_riv = torch.zeros(num_features), torch.zeros(num_features)

        def forward(self, x, z=None):
            BatchNorm2d_NHWC.calls += 1
            assert z is None or self.fuse_relu
            return Function.apply(x, z, self.weight, self.bias, self.running_mean, self.running_var,
                                  self.minibatch_mean, self.minibatch_riv, self.momentum, self.eps, self.fuse_relu)
"""


def package(root: Path, version: str, files: dict[str, str]) -> None:
    """A package ``apex`` and its metadata below ``root``."""
    meta = root / f"apex-{version}.dist-info"
    meta.mkdir(parents=True)
    (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: apex\nVersion: {version}\n", encoding="utf-8")
    for name, text in files.items():
        path = root / "apex" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages, and no apex but the one in it."""
    for name in [n for n in sys.modules if n == "apex" or n.startswith("apex.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [n for n in sys.modules if n == "apex" or n.startswith("apex.")]:
        del sys.modules[name]


@pytest.fixture
def nvidia(site: Path) -> Path:
    files = dict.fromkeys(("__init__.py", "contrib/__init__.py"), "")
    files["contrib/groupbn/__init__.py"] = "from .batch_norm import BatchNorm2d_NHWC\n"
    files["contrib/groupbn/batch_norm.py"] = GROUPBN
    files["optimizers/__init__.py"] = "class FusedSGD: ...\n"
    files["multi_tensor_apply/__init__.py"] = "class Applier:\n    available = True\nmulti_tensor_applier = Applier()\n"
    package(site, "0.1", files)
    return site / "apex"


def test_without_apex_the_message_names_the_way_out() -> None:
    if "not installed" not in apex.missing():
        pytest.skip(f"an apex is installed beside fastrex: {apex.missing() or 'NVIDIA apex'}")
    with pytest.raises(FastrexError, match=r"model\.bn=apex needs NVIDIA apex: it is not installed; .*APEX_BNP=1"):
        resolve_bn("apex", "fp16", CUDA, 1)
    with pytest.raises(FastrexError, match=r"optim\.impl=apex .* set optim\.impl=fused"):
        apex.fused_sgd()


def test_the_package_of_the_index_is_recognised(site: Path) -> None:
    package(site, "0.9.10.dev0", {"__init__.py": "from pyramid.session import SignedCookieSessionFactory\n"})
    assert "0.9.10.dev0 is not NVIDIA's but an authentication toolkit for Pyramid" in apex.missing()
    for wanted in (apex.groupbn, apex.fused_sgd, lambda: resolve_bn("apex", "fp16", CUDA, 1)):
        with pytest.raises(FastrexError, match=r"not NVIDIA's .* NVIDIA's PyTorch container image \(NGC\) or build"):
            wanted()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("", "no apex.optimizers"),
        ("from pyramid.session import SignedCookieSessionFactory", "ModuleNotFoundError: No module named 'pyramid'"),
        ("raise OSError('libcudart.so.12: cannot open\\nshared object')", "OSError: libcudart.so.12: cannot open)"),
    ],
)
def test_any_other_apex_that_does_not_work_is_not_there(site: Path, code: str, reason: str) -> None:
    package(site, "0.1", {"__init__.py": code})
    assert reason in apex.missing()
    with pytest.raises(FastrexError, match=r"model\.bn=apex needs NVIDIA apex"):
        apex.groupbn()


@pytest.mark.usefixtures("nvidia")
def test_nvidia_apex_is_found() -> None:
    assert apex.missing() == ""
    assert apex.groupbn().__name__ == "BatchNorm2d_NHWC"
    assert apex.fused_sgd().__name__ == "FusedSGD"


def test_parts_that_were_not_built_are_named(nvidia: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (nvidia / "contrib/groupbn/__init__.py").write_text("print('apex was installed without --bnp flag')\n")
    (nvidia / "contrib/groupbn/batch_norm.py").write_text("import bnp\n")
    (nvidia / "multi_tensor_apply/__init__.py").write_text("class multi_tensor_applier:\n    available = False\n")
    with pytest.raises(FastrexError, match=r"batch_norm\.BatchNorm2d_NHWC .* No module named 'bnp'.*APEX_BNP=1"):
        apex.groupbn()
    with pytest.raises(FastrexError, match="built without APEX_CUDA_EXT=1"):
        apex.fused_sgd()
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("nvidia")
def test_what_apex_cannot_do_is_done_by_our_kernels_and_said() -> None:
    assert resolve_bn("apex", "fp16", CUDA, 1)[0] == "apex"
    for precision, device, ranks, words in (
        ("bf16", CUDA, 1, r"fp16 only, and this run is in bf16 (optim.precision=fp16)"),
        ("fp32", CUDA, 1, "fp16 only, and this run is in fp32"),
        ("fp16", CPU, 1, "CUDA only, and this run is on the CPU"),
        ("fp16", CUDA, 2, "single process only"),
    ):
        backend, line = resolve_bn("apex", precision, device, ranks)
        assert backend == "fused"
        assert line.startswith("batch norm: fused (")
        assert words in line


def two_passes(norm: torch.nn.Module, *, nhwc: bool = False) -> list[Tensor]:
    """Outputs and gradients of a layer that two resolutions share."""
    torch.manual_seed(0)
    sizes = (4, 6, 6, 3.0), (8, 3, 3, 0.5)
    inputs = [(torch.randn(n, 8, h, w) * scale).half() for n, h, w, scale in sizes]
    inputs = [x.contiguous(memory_format=torch.channels_last).requires_grad_() for x in inputs]
    outputs = []
    for x in inputs:
        out = norm(x.permute(0, 2, 3, 1) if nhwc else x)
        if nhwc:
            out.register_hook(lambda grad: grad.contiguous())
        outputs.append(out.permute(0, 3, 1, 2) if nhwc else out)
    # Of means, whose gradients are no memory of their own.
    torch.autograd.backward(sum((out.float() ** 2).mean((2, 3)).sum() for out in outputs))
    gradients = [t.grad for t in (*inputs, *norm.parameters())]
    return [*(out.detach().float() for out in outputs), *(g.float() for g in gradients if g is not None)]


@pytest.mark.usefixtures("nvidia")
def test_two_resolutions_share_a_layer_but_not_its_statistics() -> None:
    wanted = two_passes(BatchNormAct(8, backend="fused"))
    norm = BatchNormAct(8, backend="apex")
    got = two_passes(norm)
    assert apex.groupbn().calls == 2
    for ours, truth in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-2, atol=1e-2)
    # The trap is there: the layer as it comes gives the first pass wrong gradients.
    trapped = two_passes(apex.groupbn()(8, fuse_relu=True), nhwc=True)
    torch.testing.assert_close(trapped[:2], wanted[:2], rtol=1e-2, atol=1e-2)
    assert (trapped[2] - wanted[2]).abs().max() > 0.1 * wanted[2].abs().max()


@pytest.mark.usefixtures("nvidia")
def test_a_network_with_apex_trains_like_one_without() -> None:
    results = []
    for backend in ("fused", "apex"):
        torch.manual_seed(1)
        encoder = ResNet("resnet18", stem="small", width=8, bn=backend)
        projector = Projector(64, ProjectorConfig(hidden_layers=1, hidden_dim=16, out_dim=4), bn=backend)
        model = MultiCropModel(encoder, projector)
        keys = list(model.state_dict())
        crops = [torch.randn(4, 3, 16, 16), torch.randn(8, 3, 8, 8)]
        with torch.autocast("cpu", torch.float16):
            out = model(crops)
        torch.autograd.backward(out.float().square().sum())
        assert list(model.state_dict()) == keys
        ema = make_ema(model)
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            followed = ema(crops[:1])
        norms = {n: m for n, m in model.named_modules() if isinstance(m, BatchNormAct)}
        assert not (set(map(id, model.parameters())) & set(map(id, ema.parameters())))
        gradients = [p.grad for p in model.parameters() if p.grad is not None and p.dim() == 4]
        tracked = [m.running_var for m in norms.values()]
        results.append([out.detach(), followed, *tracked, *gradients])
        assert {m.num_batches_tracked.item() for n, m in norms.items() if n.startswith("encoder")} == {2}
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).float().norm() <= 0.15 * theirs.float().norm()


@pytest.mark.usefixtures("nvidia")
@pytest.mark.parametrize(
    ("shape", "dtype", "relu", "summed", "training"),
    [
        ((4, 8), torch.float16, True, False, True),
        ((4, 8, 3, 3), torch.bfloat16, True, False, True),
        ((4, 6, 3, 3), torch.float16, True, False, True),
        ((4, 8, 3, 3), torch.float16, False, True, True),
        ((4, 8, 3, 3), torch.float16, True, False, False),
    ],
)
def test_calls_that_apex_does_not_take(
    shape: tuple[int, ...], dtype: torch.dtype, relu: bool, summed: bool, training: bool
) -> None:
    x = torch.randn(shape).to(dtype)
    arguments = (x, x) if summed else (x,)
    ours, fused = (BatchNormAct(shape[1], relu=relu, backend=b).train(training) for b in ("apex", "fused"))
    assert torch.equal(ours(*arguments), fused(*arguments))
    assert apex.groupbn().calls == 0
