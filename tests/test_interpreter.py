"""What Triton's interpreter cannot do, as a test that fails on the day it can."""

from __future__ import annotations

import pytest
import torch

from fastrex_kernels._op import INTERPRETED

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language", reason="Triton is not installed")


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + offsets, tl.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)))


def product(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(32, 32)
    _dot[(1,)](a, b, out, 32)
    return out, a.float() @ b.float()


@pytest.mark.skipif(not INTERPRETED, reason="kernels run on a GPU here, not in Triton's interpreter")
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        pytest.param(
            torch.bfloat16, marks=pytest.mark.xfail(strict=True, reason="the interpreter's bfloat16 is wrong")
        ),
    ],
    ids=str,
)
def test_products(dtype: torch.dtype) -> None:
    torch.testing.assert_close(*product(dtype), rtol=1e-3, atol=1e-3)
