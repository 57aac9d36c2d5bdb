"""``conv2d``: a worked example, all geometries against float64, who gets which gradient, and what is refused."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from conftest import environment
from torch import Tensor

from fastrex_kernels import _cpp, conv2d
from fastrex_kernels._op import in_cpp

NATIVE = _cpp.LOADED and in_cpp("conv_weight_grad")
native = pytest.mark.skipif(not NATIVE, reason="not built, or a CPU without AVX512-BF16 or with AMX")
IMPLS = ["reference", pytest.param("cpp", marks=native)]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def layer(
    shape: tuple[int, ...], outputs: int, kernel: int, stride: int = 1, padding: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A bfloat16 batch, a float32 weight whose numbers bfloat16 holds, and a gradient of the output."""
    g = torch.Generator().manual_seed(3)
    height, width = ((size + 2 * padding - kernel) // stride + 1 for size in shape[2:])
    weight = torch.randn(outputs, shape[1], kernel, kernel, generator=g) / math.sqrt(max(1, shape[1]) * kernel**2)
    grad = torch.randn(shape[0], outputs, height, width, generator=g)
    input = torch.randn(shape, generator=g)
    return last(input.bfloat16()), last(weight.bfloat16().float()), last(grad.bfloat16())


def weight_grad(input: Tensor, grad: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    shape = (grad.shape[1], input.shape[1], kernel, kernel)
    return torch.nn.grad.conv2d_weight(input.double(), shape, grad.double(), stride=stride, padding=padding)


def error(a: Tensor, truth: Tensor) -> float:
    return float((a.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("impl", IMPLS)
def test_worked_example(impl: str) -> None:
    """A 2 x 2 kernel over one image of 2 x 3 pixels."""
    input = last(torch.tensor([[[[1.0, 2, 3], [4, 5, 6]]]], dtype=torch.bfloat16)).requires_grad_()
    weight = torch.tensor([[[[1.0, 0], [2, -1]]]], requires_grad=True)
    output = conv2d(input, weight, impl=impl)
    # 1*1 + 4*2 - 5 and 2*1 + 5*2 - 6
    assert output.tolist() == [[[[4.0, 6.0]]]]
    output.backward(torch.tensor([[[[1.0, 10.0]]]], dtype=torch.bfloat16))
    assert weight.grad is not None
    assert weight.grad.tolist() == [[[[21.0, 32.0], [54.0, 65.0]]]]  # each tap: its left pixel + 10 times its right one
    assert weight.grad.dtype == torch.float32
    assert input.grad is not None
    assert input.grad.tolist() == [[[[1.0, 10.0, 0.0], [2.0, 19.0, -10.0]]]]


@native
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("channels", [3, 5, 24, 70])
@pytest.mark.parametrize("images", [1, 3])
def test_weight_gradient_in_all_geometries(kernel: int, stride: int, channels: int, images: int) -> None:
    """Its error is that of float32 sums: the usual way also rounds the result to bfloat16."""
    for size in ((1, 1), (2, 2), (3, 3), (5, 7)):
        for padding in range(kernel + 1):
            if min(size) + 2 * padding < kernel:
                continue
            input, _, grad = layer((images, channels, *size), 19, kernel, stride, padding)
            got = torch.ops.fastrex.conv_weight_grad(grad, input, kernel, stride, padding)
            assert got.is_contiguous(memory_format=torch.channels_last)
            truth = weight_grad(input, grad, kernel, stride, padding)
            assert error(got, truth) < 2e-6, (size, padding)


@native
@pytest.mark.parametrize(
    ("shape", "outputs", "kernel", "stride"),
    [
        ((64, 64, 6, 6), 48, 3, 1),  # several chunks of images
        ((5, 33, 23, 31), 40, 3, 2),  # several blocks of rows
        ((8, 16, 56, 56), 16, 1, 1),  # sixteen slices
        ((8, 3, 64, 60), 64, 7, 2),  # blocks of patches
        ((4, 520, 2, 3), 24, 1, 1),  # the channels are shared out
    ],
)
def test_threads_change_no_bit(shape: tuple[int, ...], outputs: int, kernel: int, stride: int, threads: None) -> None:
    input, _, grad = layer(shape, outputs, kernel, stride, kernel // 2)
    truth = weight_grad(input, grad, kernel, stride, kernel // 2)
    results = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        results.append(torch.ops.fastrex.conv_weight_grad(grad, input, kernel, stride, kernel // 2))
    assert error(results[0], truth) < 1e-5
    for other in results[1:]:
        assert torch.equal(results[0], other)


@native
def test_error_is_at_most_twice_that_of_eager() -> None:
    input, weight, grad = layer((3, 40, 9, 7), 24, 3, 2, 1)

    def run(impl: str | None, dtype: torch.dtype) -> list[Tensor]:
        x, w = input.to(dtype).requires_grad_(), weight.to(dtype if dtype == torch.float64 else weight.dtype)
        w.requires_grad_()
        y = F.conv2d(x, w.to(dtype), None, 2, 1) if impl is None else conv2d(x, w, stride=2, padding=1, impl=impl)
        return [y.detach(), *torch.autograd.grad(y, [x, w], grad.to(dtype))]

    truth, eager = run(None, torch.float64), run(None, torch.bfloat16)
    for ours, usual, exact in zip(run("cpp", torch.bfloat16), eager, truth, strict=True):
        assert error(ours, exact) <= 2 * error(usual, exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_copy_is_read_in_place_of_the_weight(impl: str) -> None:
    input, weight, grad = layer((2, 16, 5, 5), 8, 3, 1, 1)
    expected = weight.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(conv2d(input, expected, padding=1, impl=impl), [expected], grad)
    master = torch.full_like(weight, float("nan")).requires_grad_()
    output = conv2d(input, master, padding=1, weight_copy=weight.bfloat16(), impl=impl)
    assert torch.equal(output, conv2d(input, expected, padding=1, impl=impl))
    output.backward(grad)
    assert master.grad is not None
    assert master.grad.dtype == torch.float32
    assert torch.equal(master.grad, wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_only_the_gradients_that_are_wanted(impl: str) -> None:
    input, weight, grad = layer((2, 16, 5, 5), 8, 3, 1, 1)
    both = conv2d(input.clone().requires_grad_(), weight.clone().requires_grad_(), padding=1, impl=impl)
    assert both.requires_grad
    x = input.clone().requires_grad_()
    conv2d(x, weight, padding=1, impl=impl).backward(grad)
    assert x.grad is not None
    w = weight.clone().requires_grad_()
    conv2d(input, w, padding=1, impl=impl).backward(grad)
    assert w.grad is not None
    with torch.no_grad():
        assert not conv2d(x, w, padding=1, impl=impl).requires_grad
    assert not conv2d(input, weight, padding=1, impl=impl).requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_batch(impl: str) -> None:
    input, weight, grad = layer((0, 16, 5, 5), 8, 3, 1, 1)
    weight.requires_grad_()
    output = conv2d(input.requires_grad_(), weight, padding=1, impl=impl)
    assert output.shape == (0, 8, 5, 5)
    output.backward(grad)
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers_reach_the_gradient(impl: str, value: float) -> None:
    for images, channels, kernel in ((2, 16, 3), (3, 16, 1), (2, 3, 3), (1, 3, 3)):
        for which in range(2):
            input, weight, grad = layer((images, channels, 5, 5), 8, kernel, 1, kernel // 2)
            (input, grad)[which][-1, 1, 2, 2] = value
            weight.requires_grad_()
            conv2d(input, weight, padding=kernel // 2, impl=impl).backward(grad)
            assert weight.grad is not None
            row = weight.grad[1] if which else weight.grad[:, 1]
            assert not row.isfinite().any()
            assert int(weight.grad.isfinite().sum()) == weight.grad.numel() - row.numel()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_other_dtypes_are_torchs(dtype: torch.dtype) -> None:
    input, weight, _ = layer((2, 6, 5, 5), 8, 3, 2, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = conv2d(input.to(dtype), weight, stride=2, padding=1)
    assert output.dtype == dtype
    assert torch.equal(output, F.conv2d(input.to(dtype), weight.to(dtype), None, 2, 1))


@native
def test_other_layouts() -> None:
    input, weight, _ = layer((2, 16, 5, 7), 8, 3)
    torch.testing.assert_close(
        conv2d(input.contiguous(), weight.contiguous()), conv2d(input, weight, impl="cpp"), rtol=0.02, atol=0.02
    )
    with pytest.raises(ValueError, match=r"conv2d: input must be channels-last for impl='cpp', got strides \[560, 35"):
        conv2d(input.contiguous(), weight, impl="cpp")
    # A gradient of another layout comes from a mean, for example.
    w = weight.clone().requires_grad_()
    conv2d(input, w, impl="cpp").float().mean().backward()
    expected = torch.full((2, 8, 3, 5), 1 / 240).bfloat16()
    assert w.grad is not None
    assert error(w.grad, weight_grad(input, expected, 3, 1, 0)) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled(impl: str) -> None:
    input, weight, grad = layer((2, 16, 5, 5), 8, 3, 2, 1)
    copy = weight.bfloat16()

    def step(x: Tensor, w: Tensor) -> Tensor:
        return conv2d(x, w, stride=2, padding=1, weight_copy=copy, impl=impl)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x, w = input.clone().requires_grad_(), weight.clone().requires_grad_()
        y = function(x, w)
        assert y.is_contiguous(memory_format=torch.channels_last)
        results.append([y.detach(), *torch.autograd.grad(y, [x, w], grad)])
    for ours, compiled in zip(*results, strict=True):
        assert torch.equal(ours, compiled)


def test_what_is_refused() -> None:
    input, weight, _ = layer((2, 16, 5, 5), 8, 3)
    with pytest.raises(ValueError, match=r"conv2d: input must be \[N, I, H, W\], got shape \[16, 5, 5\]"):
        conv2d(input[0], weight)
    with pytest.raises(TypeError, match=r"conv2d: input must be floating point, got torch\.int64"):
        conv2d(input.long(), weight)
    with pytest.raises(ValueError, match=r"conv2d: weight must be \[O, I, k, k\] .* got shape \[8, 16, 3, 2\]"):
        conv2d(input, weight[..., :2])
    with pytest.raises(ValueError, match="conv2d: weight must have input's 16 channels"):
        conv2d(input, weight[:, :8])
    with pytest.raises(
        TypeError, match=r"conv2d: weight_copy must have input's dtype torch\.bfloat16, got torch\.float32"
    ):
        conv2d(input, weight, weight_copy=weight)
    with pytest.raises(ValueError, match=r"conv2d: weight_copy must have weight's shape \[8, 16, 3, 3\], got \[4, 16"):
        conv2d(input, weight, weight_copy=weight.bfloat16()[:4])
    with pytest.raises(ValueError, match="conv2d: stride must be an integer of at least 1, got 0"):
        conv2d(input, weight, stride=0)
    with pytest.raises(ValueError, match="conv2d: padding must be an integer of at least 0, got -1"):
        conv2d(input, weight, padding=-1)
    with pytest.raises(ValueError, match="conv2d: input must with its padding be at least as large as the kernel of 3"):
        conv2d(input[:, :, :2], weight)
    with pytest.raises(ValueError, match="conv2d: impl must be one of auto, reference, cpp for this op, got 'triton'"):
        conv2d(input, weight, impl="triton")


@native
def test_another_instruction_set_has_no_cpp() -> None:

    code = """
import torch
from fastrex_kernels import conv2d
x, w = torch.randn(1, 4, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last), torch.randn(4, 4, 1, 1)
print(conv2d(x, w).shape)
conv2d(x, w, impl="cpp")
"""
    env = {**environment(), "FASTREX_ISA": "avx2"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.stdout.strip() == "torch.Size([1, 4, 3, 3])"
    assert "RuntimeError: conv2d: impl='cpp' needs " in run.stderr
