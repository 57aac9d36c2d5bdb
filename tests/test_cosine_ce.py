"""Cosine cross-entropy: definition by hand, PyTorch's edge cases, invariances, errors, and the C++ implementation."""

from __future__ import annotations

import functools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import environment
from torch.autograd import forward_ad

from fastrex_kernels import Stats, _cpp, cosine_cross_entropy
from fastrex_kernels.cosine_ce import cases

built = pytest.mark.skipif(not _cpp.LOADED, reason=f"no C++ operators: {_cpp.REASON}")
IMPLS = ["reference", pytest.param("cpp", marks=built)]
each_impl = pytest.mark.parametrize("impl", IMPLS)


def data(rows: int = 12, classes: int = 7, dim: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=g, dtype=torch.float64)
    w = torch.randn(classes, dim, generator=g, dtype=torch.float64)
    y = torch.randint(classes, (rows,), generator=g)
    return x.to(dtype), w.to(dtype), y


def kind(impl: str) -> torch.dtype:
    """The widest dtype of an implementation."""
    return torch.float64 if impl == "reference" else torch.float32


@each_impl
def test_worked_example(impl: str) -> None:
    # cos = (1, 0) and (0.6, 0.8) at temperature 0.5: logits (2, 0) and (1.2, 1.6).
    x = torch.tensor([[3.0, 0.0], [6.0, 8.0]])
    w = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    loss, stats = cosine_cross_entropy(
        x, w, torch.tensor([0, 0]), temperature=0.5, reduction="none", return_stats=True, impl=impl
    )
    expected = [math.log1p(math.exp(-2.0)), math.log1p(math.exp(0.4))]
    assert loss.tolist() == pytest.approx(expected, rel=1e-6)
    assert stats.rank.tolist() == [0, 1]
    assert stats.lse.tolist() == pytest.approx([expected[0] + 2.0, expected[1] + 1.2], rel=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target", ["ids", "ignored", "all ignored", "soft"])
@each_impl
def test_equals_torch(reduction: str, smoothing: float, weighted: bool, target: str, impl: str) -> None:
    x, w, y = data(dtype=kind(impl))
    cw = torch.linspace(0.5, 2.0, 7, dtype=kind(impl)) if weighted else None
    if target == "ignored":
        y[::3] = -100
    elif target == "all ignored":
        y[:] = -100
    elif target == "soft":
        y = torch.softmax(torch.randn(12, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 1).to(x)
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    mine = cosine_cross_entropy(
        a, b, y, temperature=0.3, class_weight=cw, label_smoothing=smoothing, reduction=reduction, impl=impl
    )
    c, d = x.clone().requires_grad_(), w.clone().requires_grad_()
    logits = F.normalize(c, dim=1) @ F.normalize(d, dim=1).T / 0.3
    theirs = F.cross_entropy(logits, y, weight=cw, label_smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(mine, theirs, equal_nan=True)
    if target != "all ignored":
        g = torch.randn(mine.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(x)
        mine.backward(g)
        theirs.backward(g)
        torch.testing.assert_close(a.grad, c.grad)
        torch.testing.assert_close(b.grad, d.grad)


@each_impl
def test_target_is_shared_over_crops(impl: str) -> None:
    loss_of = functools.partial(cosine_cross_entropy, impl=impl)
    x, w, _ = data(dtype=kind(impl))
    y = torch.tensor([1, 4, 6])
    mine = loss_of(x, w, y, reduction="none")
    torch.testing.assert_close(mine, loss_of(x, w, y.repeat(4), reduction="none"))


@each_impl
def test_zero_rows_and_empty_classes(impl: str) -> None:
    loss_of = functools.partial(cosine_cross_entropy, impl=impl)
    x, w, y = data(dtype=kind(impl))
    x[2] = 0
    w[5] = 0
    y[3] = 5
    a, b = x.requires_grad_(), w.requires_grad_()
    loss, stats = loss_of(a, b, y, reduction="none", return_stats=True)
    assert loss[2].item() == pytest.approx(math.log(7))
    loss.sum().backward()
    assert not a.grad[2].any()
    assert not b.grad[5].any()
    assert torch.isfinite(a.grad).all()
    # The logit of an empty class is exactly 0, so its loss is the log of the sum of exponentials.
    assert loss[3].item() == pytest.approx(stats.lse[3].item())


@each_impl
def test_a_nan_stays_a_nan(impl: str) -> None:
    loss_of = functools.partial(cosine_cross_entropy, impl=impl)
    # A feature gone bad must not pass for a zero row, whose loss is finite.
    x, w, y = data(dtype=kind(impl))
    x[4, 1] = math.nan
    assert loss_of(x, w, y, reduction="none").isnan().nonzero().flatten().tolist() == [4]
    x, w, y = data(dtype=kind(impl))
    w[5, 0] = math.nan
    assert loss_of(x, w, y, reduction="none").isnan().all()


@each_impl
def test_scale_invariance_and_orthogonal_gradient(impl: str) -> None:
    loss_of = functools.partial(cosine_cross_entropy, impl=impl)
    x, w, y = data(dtype=kind(impl))
    a = x.clone().requires_grad_()
    loss = loss_of(a, w, y)
    loss.backward()
    torch.testing.assert_close(loss_of(x * 7.5, w * 0.01, y), loss.detach())
    assert (a.grad * x).sum(1).abs().max() < (1e-12 if impl == "reference" else 1e-6)


@each_impl
def test_frozen_prototypes_and_learnable_temperature(impl: str) -> None:
    loss_of = functools.partial(cosine_cross_entropy, impl=impl)
    x, w, y = data(dtype=kind(impl))
    t = torch.tensor(0.2, dtype=kind(impl), requires_grad=True)
    a = x.requires_grad_()
    loss_of(a, w, y, temperature=t).backward()
    assert w.grad is None
    eps = 1e-6
    loss_of, x, w = cosine_cross_entropy, x.detach().double(), w.double()
    slope = (loss_of(x, w, y, temperature=0.2 + eps) - loss_of(x, w, y, temperature=0.2 - eps)) / (2 * eps)
    assert t.grad.item() == pytest.approx(slope.item(), rel=1e-5)


def test_gradcheck() -> None:
    x, w, y = data(rows=4, classes=3, dim=3)
    assert torch.autograd.gradcheck(
        lambda a, b: cosine_cross_entropy(a, b, y, label_smoothing=0.1), (x.requires_grad_(), w.requires_grad_())
    )


def test_low_precision_inputs_give_a_float32_loss() -> None:
    x, w, y = data()
    truth = cosine_cross_entropy(x, w, y)
    loss = cosine_cross_entropy(x.bfloat16(), w.bfloat16(), y)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(truth.item(), rel=2e-2)


def test_initial_loss_of_online_class_means() -> None:
    # recipes.md 1.5: about 7.1 with 1000 random unit prototypes of 256 dimensions at temperature 0.1.
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(512, 256, generator=g), torch.randn(1000, 256, generator=g)
    loss = cosine_cross_entropy(x, w, torch.randint(1000, (512,), generator=g))
    assert 7.05 < loss.item() < 7.2


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"input": torch.zeros(3)}, ValueError, r"input must have 2 dimensions, got shape \(3,\)"),
        ({"input": torch.zeros(12, 5, dtype=torch.int64)}, TypeError, "input must be floating point"),
        ({"weight": torch.zeros(7, 4)}, ValueError, r"weight must be \[C >= 1, 5\], got \(7, 4\)"),
        ({"weight": torch.zeros(0, 5)}, ValueError, r"weight must be \[C >= 1, 5\]"),
        ({"target": torch.zeros(12, dtype=torch.int32)}, TypeError, "target must be int64 class ids"),
        (
            {"target": torch.zeros(5, dtype=torch.int64)},
            ValueError,
            "target must have 12 rows or a divisor of that, got 5",
        ),
        ({"target": torch.full((12,), 7)}, ValueError, r"target must be in \[0, 7\) or -100, got 7"),
        ({"target": torch.zeros(12, 6)}, ValueError, r"target probabilities must be \[N or B, 7\]"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0"),
        ({"temperature": torch.ones(2)}, ValueError, "temperature must be a float or a 0-d floating point tensor"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing must be in"),
        ({"class_weight": torch.ones(3)}, ValueError, r"class_weight must be \[7\]"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of none, mean, sum"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
        ({"temperature": torch.tensor(-1.0)}, ValueError, "temperature must be above 0, got -1"),
        (
            {"input": torch.zeros(12, 5, dtype=torch.float64), "impl": "triton"},
            ValueError,
            "impl='triton' takes float32, bfloat16, float16, got torch.float64; use impl='reference'",
        ),
    ],
)
def test_bad_input_is_named(change: dict, kind: type, message: str) -> None:
    x, w, y = data()
    arguments = {"input": x.float(), "weight": w.float(), "target": y, **change}
    with pytest.raises(kind, match=message):
        cosine_cross_entropy(**arguments)


def gradients(loss: torch.Tensor, *tensors: torch.Tensor, upstream: torch.Tensor | None = None) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, tensors, upstream))


@built
@pytest.mark.parametrize(
    ("rows", "classes", "dim"),
    [(3, 4, 0), (1, 1, 1), (1, 3, 2), (50, 1, 7), (7, 2000, 3), (1000, 5, 17), (60_000, 3, 5)],
)
def test_sizes_far_from_any_tile(rows: int, classes: int, dim: int) -> None:
    x, w, y = data(rows, classes, dim, dtype=torch.float32)
    a, b = x.requires_grad_(), w.requires_grad_()
    mine = cosine_cross_entropy(a, b, y, impl="cpp")
    truth = cosine_cross_entropy(a.double(), b.double(), y)
    torch.testing.assert_close(mine.double(), truth, atol=3e-6, rtol=1e-6)
    for g, t in zip(gradients(mine, a, b), gradients(truth, a, b), strict=True):
        torch.testing.assert_close(g, t, atol=3e-6, rtol=1e-4)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        parts = []
        for rows, classes, dim in ((400, 700, 40), (10, 9000, 24)):
            x, w, y = data(rows, classes, dim, dtype=dtype)
            a, b = x.requires_grad_(), w.requires_grad_()
            loss = cosine_cross_entropy(a, b, y, impl="cpp", label_smoothing=0.1)
            parts += [loss.detach(), *gradients(loss, a, b)]
        results.append(parts)
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


PROGRAM = """
import torch
from fastrex_kernels.cosine_ce.cases import CASES, make
from fastrex_kernels import cosine_cross_entropy
for case in CASES:
    if case.bench or case.name in ("all_ignored", "no_rows"):
        continue
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        call = make(case.sizes, dtype, "cpu", 0)
        results = []
        for impl in ("reference", "cpp"):
            tensors = {k: v.clone() for k, v in call.tensors.items()}
            for name in call.grads:
                tensors[name].requires_grad_()
            loss = cosine_cross_entropy(**tensors, **call.options, impl=impl)[0]
            results.append([loss.detach(), *torch.autograd.grad(loss.sum(), [tensors[n] for n in call.grads])])
        for a, b in zip(*results):
            near = (a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-30)
            assert near <= (1e-5 if dtype == torch.float32 else 3e-2), (case.name, dtype, near)
print("all near")
"""


@built
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        env={**environment(), "FASTREX_ISA": isa}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "all near", done.stderr


@built
@pytest.mark.parametrize("temperature", [0.03, 0.02, 0.005, 0.001])
@pytest.mark.parametrize("learnt", [False, True])
def test_small_temperatures_neither_underflow_nor_overflow(temperature: float, learnt: bool) -> None:
    # The largest logit comes last, so that the running maximum has to rise, by up to 2 / temperature.
    g = torch.Generator().manual_seed(3)
    x = torch.randn(40, 16, generator=g)
    w = torch.cat((-x[:1] + 0.3 * torch.randn(900, 16, generator=g), x[:5]))
    y = torch.randint(905, (40,), generator=g)
    a, b = x.requires_grad_(), w.requires_grad_(learnt)
    both = (a, b) if learnt else (a,)
    loss, stats = cosine_cross_entropy(a, b, y, temperature=temperature, return_stats=True, impl="cpp")
    c, d = a.detach().double().requires_grad_(), b.detach().double().requires_grad_(learnt)
    truth, expected = cosine_cross_entropy(c, d, y, temperature=temperature, return_stats=True)
    torch.testing.assert_close(stats.lse.double(), expected.lse, rtol=1e-5, atol=1e-5)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    for mine, theirs in zip(
        gradients(loss, *both), gradients(truth, c, d) if learnt else gradients(truth, c), strict=True
    ):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=2e-7 / temperature * scale)


@built
@pytest.mark.parametrize("impl", ["cpp"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_backward_twice_and_gradients_that_are_not_needed(impl: str, reduction: str) -> None:
    x, w, y = data(dtype=torch.float32)
    t = torch.tensor(0.2, requires_grad=True)
    a, b = x.requires_grad_(), w.requires_grad_()
    loss = cosine_cross_entropy(a, b, y, temperature=t, reduction=reduction, impl=impl)
    up = torch.rand(loss.shape)
    first = torch.autograd.grad(loss, (a, b, t), up, retain_graph=True)
    second = torch.autograd.grad(loss, (a, b, t), 2 * up, retain_graph=True)
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(2 * one, two)
    for i, leaf in enumerate((a, b, t)):
        others = [v.detach() for v in (a, b, t)]
        others[i] = leaf
        alone = cosine_cross_entropy(others[0], others[1], y, temperature=others[2], reduction=reduction, impl=impl)
        torch.testing.assert_close(torch.autograd.grad(alone, leaf, up)[0], first[i])
    with torch.no_grad():
        torch.testing.assert_close(cosine_cross_entropy(a, b, y, temperature=t, reduction=reduction, impl=impl), loss)


@built
def test_rows_with_equal_and_with_different_upstream_gradients() -> None:
    x, w, y = data(50, 90, 12, dtype=torch.float32)
    a, b = x.requires_grad_(), w.requires_grad_()
    c, d = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    for up in (torch.full((50,), 0.3), torch.linspace(-1, 2, 50)):
        mine = gradients(cosine_cross_entropy(a, b, y, reduction="none", impl="cpp"), a, b, upstream=up)
        truth = gradients(cosine_cross_entropy(c, d, y, reduction="none"), c, d, upstream=up.double())
        for g, t in zip(mine, truth, strict=True):
            torch.testing.assert_close(g.double(), t, rtol=1e-4, atol=1e-5)


@built
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_large_weights_get_their_gradient_in_the_backward(smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastrex_kernels.cosine_ce as module

    x, w, y = data(60, 500, 24, dtype=torch.float32)
    a, b = x.requires_grad_(), w.requires_grad_()
    at_once = gradients(cosine_cross_entropy(a, b, y, label_smoothing=smoothing, impl="cpp"), a, b)
    monkeypatch.setitem(module.FORWARD_BYTES, "cpp", 0)
    later = gradients(cosine_cross_entropy(a, b, y, label_smoothing=smoothing, impl="cpp"), a, b)
    for one, two in zip(at_once, later, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)


@built
def test_more_classes_than_their_exponentials_are_kept_for() -> None:
    # 48 rows x 300,000 classes x 4 bytes are over the limit, so the classes are taken in ranges.
    x, w, y = data(30, 300_000, 8, dtype=torch.float32)
    a, b = x.requires_grad_(), w.requires_grad_()
    mine = gradients(cosine_cross_entropy(a, b, y, label_smoothing=0.1, impl="cpp"), a, b)
    truth = gradients(cosine_cross_entropy(a, b, y, label_smoothing=0.1, impl="reference"), a, b)
    for g, t in zip(mine, truth, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-3, atol=1e-6 * t.abs().max().item() * 8)


@built
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_two_blocks_of_classes_make_one_loss(smoothing: float, compute: torch.dtype) -> None:
    x, w, y = data(40, 120, 24, dtype=torch.float32)
    y[5] = -100
    cw = torch.linspace(0.5, 2.0, 120)
    whole = torch.ops.fastrex.cosine_ce(
        x, w, y, None, 0.1, cw, None, 0, 120, -100, smoothing, 1, compute, True, True
    )  # fmt: skip
    threshold = torch.zeros(40)
    blocks = []
    for first, block in ((0, w[:50]), (50, w[50:])):
        blocks.append((first, block))
    for first, block in blocks:
        mine = (y >= first) & (y < first + len(block))
        unit = F.normalize(x, dim=1), F.normalize(block, dim=1)
        own = (unit[0] * unit[1][torch.where(mine, y - first, 0)]).sum(1) / 0.1
        threshold = torch.where(mine, own, threshold)
    parts = [
        torch.ops.fastrex.cosine_ce(
            x, block, y, None, 0.1, cw, threshold, first, 120, -100, smoothing, 1, compute, False, False
        )
        for first, block in blocks
    ]  # fmt: skip
    lse = torch.logaddexp(parts[0][2], parts[1][2])
    near = {"rtol": 1e-4, "atol": 1e-5} if compute == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(lse, whole[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts[0][4] + parts[1][4], whole[4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts[0][1], whole[1])
    if compute == torch.float32:
        kept = y >= 0
        assert torch.equal((parts[0][3] + parts[1][3])[kept], whole[3][kept])
        assert parts[0][3][5] == -1
    up = torch.ones(40)
    back = [
        torch.ops.fastrex.cosine_ce_backward(
            x, block, y, None, 0.1, cw, first, 120, -100, smoothing, compute, lse, up, None, True, True
        )
        for first, block in blocks
    ]  # fmt: skip
    torch.testing.assert_close(back[0][0] + back[1][0], whole[5], **near)
    torch.testing.assert_close(torch.cat((back[0][1], back[1][1])), whole[6], **near)
    torch.testing.assert_close(back[0][2] + back[1][2], whole[7], rtol=1e-4, atol=1e-5)


@built
def test_a_bad_id_is_a_nan_row_of_the_raw_operator() -> None:
    x, w, y = data(6, 7, 5, dtype=torch.float32)
    y[2], y[4] = 7, -3
    out = torch.ops.fastrex.cosine_ce(x, w, y, None, 0.1, None, None, 0, 7, -100, 0.0, 0, x.dtype, True, True)
    assert out[0].isnan().nonzero().flatten().tolist() == [2, 4]


@built
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing does it
@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_equals_eager(frozen: bool) -> None:
    x, w, y = data(30, 40, 12, dtype=torch.float32)
    t = torch.tensor(0.2, requires_grad=True)
    a, b = x.requires_grad_(), w.requires_grad_(not frozen)
    leaves = (a, t) if frozen else (a, b, t)

    def step() -> tuple[torch.Tensor, Stats]:
        return cosine_cross_entropy(a * 1.0, b, y, temperature=t, label_smoothing=0.1, return_stats=True, impl="cpp")

    compiled, plain = torch.compile(step, fullgraph=True, backend="aot_eager")(), step()
    torch.testing.assert_close(compiled[0], plain[0], rtol=0, atol=0)
    assert torch.equal(compiled[1].rank, plain[1].rank)
    for one, two in zip(gradients(compiled[0], *leaves), gradients(plain[0], *leaves), strict=True):
        torch.testing.assert_close(one, two)


@built
def test_autocast_takes_its_dtype_for_the_products() -> None:
    x, w, y = data(64, 200, 48, dtype=torch.float32)
    a, b = x.requires_grad_(), w.requires_grad_()
    truth = gradients(cosine_cross_entropy(a, b, y, impl="reference"), a, b)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cosine_cross_entropy(a, b, y, impl="cpp")
        exact = cosine_cross_entropy(a, b, y, impl="reference")
    assert loss.dtype == exact.dtype == torch.float32
    for g, t in zip(gradients(loss, a, b), truth, strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, t, rtol=0, atol=0.02 * t.abs().max().item())


@built
def test_second_derivatives_name_the_reference() -> None:
    x, w, y = data(dtype=torch.float32)
    a, b = x.requires_grad_(), w.requires_grad_()
    (g,) = torch.autograd.grad(cosine_cross_entropy(a, b, y, impl="cpp"), a, create_graph=True)
    with pytest.raises(RuntimeError, match="use impl='reference' to differentiate twice"):
        g.sum().backward()


@each_impl
def test_functional_transforms(impl: str) -> None:
    x, w, y = data(dtype=torch.float32)

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return cosine_cross_entropy(a, b, y, impl=impl)

    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    for mine, theirs in zip(torch.func.grad(loss, (0, 1))(x, w), gradients(loss(a, b), a, b), strict=True):
        torch.testing.assert_close(mine, theirs)
    many = torch.stack((x, 2 * x, x.flip(0)))
    each = torch.func.vmap(torch.func.grad(loss), (0, None))(many, w)
    for mine, single in zip(each, many, strict=True):
        torch.testing.assert_close(mine, torch.func.grad(loss)(single, w))


@each_impl
def test_a_target_with_gradient_needs_the_reference(impl: str) -> None:
    x, w, _ = data(dtype=torch.float32)
    q = torch.softmax(torch.randn(12, 7, generator=torch.Generator().manual_seed(0)), 1).requires_grad_()
    if impl == "reference":
        for name in ("auto", "reference"):
            assert torch.autograd.grad(cosine_cross_entropy(x, w, q, impl=name), q)[0].abs().sum() > 0
    else:
        with pytest.raises(ValueError, match="target must not require a gradient for impl='cpp'"):
            cosine_cross_entropy(x, w, q, impl=impl)


def test_every_case_says_why() -> None:
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    assert all(case.why for case in cases.CASES)


@built
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_is_refused_not_answered_with_zero() -> None:
    x, w, y = data(dtype=torch.float32)
    refused = pytest.raises(RuntimeError, match="no forward-mode derivatives; use impl='reference'")
    with refused:
        torch.func.jvp(lambda a: cosine_cross_entropy(a, w, y, impl="cpp"), (x,), (x,))
    with forward_ad.dual_level(), refused:
        cosine_cross_entropy(x, forward_ad.make_dual(w, w), y, impl="cpp")
    one = torch.ones_like(x)
    _, tangent = torch.func.jvp(lambda a: cosine_cross_entropy(a, w, y, impl="reference"), (x,), (one,))
    gradient = torch.func.grad(lambda a: cosine_cross_entropy(a, w, y, impl="cpp"))(x)
    torch.testing.assert_close(tangent, gradient.sum(), rtol=1e-4, atol=1e-6)
