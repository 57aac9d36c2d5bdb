"""Ways through contrastive cross-entropy: higher and forward derivatives, vmap, autocast, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contrastive import built, data, each_impl, loss_of
from torch import Tensor
from torch.autograd import forward_ad

from benchmarks import measure
from fastrex_kernels import ContrastiveLoss, Mixtures, contrastive_cross_entropy
from fastrex_kernels.contrastive_ce import cases


@built
def test_second_derivatives_name_the_reference() -> None:
    x, k, ids, key_ids = data()
    a = x.requires_grad_()
    (g,) = torch.autograd.grad(loss_of(a, k, ids, key_ids, impl="cpp"), a, create_graph=True)
    with pytest.raises(RuntimeError, match="use impl='reference' to differentiate twice"):
        g.sum().backward()


# torch.func.jvp itself uses what torch has deprecated.
@built
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("words", [{}, {"nearest": 4}])
def test_forward_mode_is_refused_not_answered_with_zero(words: dict[str, Any]) -> None:
    x, k, ids, key_ids = data()
    refused = pytest.raises(RuntimeError, match="no forward-mode derivatives; use impl='reference'")
    with refused:
        torch.func.jvp(lambda a: loss_of(a, k, ids, key_ids, impl="cpp", **words), (x,), (x,))
    with forward_ad.dual_level(), refused:
        loss_of(x, forward_ad.make_dual(k, k), ids, key_ids, impl="cpp", **words)
    one = torch.ones_like(x)
    _, tangent = torch.func.jvp(lambda a: loss_of(a, k, ids, key_ids, impl="reference"), (x,), (one,))
    gradient = torch.func.grad(lambda a: loss_of(a, k, ids, key_ids, impl="cpp"))(x)
    torch.testing.assert_close(tangent, gradient.sum(), rtol=1e-4, atol=1e-6)


@built
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("words", [{}, {"nearest": 4, "mixtures": True}])
def test_vmap_of_a_gradient(words: dict[str, Any]) -> None:
    _, k, ids, key_ids = data()
    if words.get("mixtures"):
        second = torch.full((12, 2), 3)
        words = words | {"mixtures": Mixtures(torch.tensor([[0, -1]] * 12), second, torch.full((12, 2), 0.4))}
    samples = torch.randn(3, 12, 6, generator=torch.Generator().manual_seed(3))
    gradient = torch.func.grad(lambda a: loss_of(a, k, ids, key_ids, impl="cpp", **words))
    torch.testing.assert_close(torch.func.vmap(gradient)(samples), torch.stack([gradient(a) for a in samples]))


@each_impl
def test_backward_twice_and_functional_gradients(impl: str) -> None:
    x, k, ids, key_ids = data()
    a, b = x.clone().requires_grad_(), k.clone().requires_grad_()
    loss = loss_of(a, b, ids, key_ids, hardness=1.0, impl=impl)
    first = torch.autograd.grad(loss, [a, b], retain_graph=True)
    second = torch.autograd.grad(loss, [a, b], torch.tensor(2.0))
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(2 * one, two)
    functional = torch.func.grad(lambda p, q: loss_of(p, q, ids, key_ids, hardness=1.0, impl=impl), (0, 1))(x, k)
    for one, two in zip(first, functional, strict=True):
        torch.testing.assert_close(one, two)


@built
def test_autocast_keeps_what_is_listed_in_float32() -> None:
    x, k, ids, key_ids = data(40, 60, 16)
    a = x.requires_grad_()
    g = torch.Generator().manual_seed(2)
    mixtures = Mixtures(
        torch.randint(-1, 60, (40, 5), generator=g), torch.randint(60, (40, 5), generator=g), torch.full((40, 5), 0.3)
    )
    options: dict[str, Any] = {"nearest": 9, "mixtures": mixtures}
    truth = loss_of(a, k, ids, key_ids, impl="reference", **options)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(a, k, ids, key_ids, impl="cpp", **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(torch.autograd.grad(loss, a), torch.autograd.grad(truth, a), rtol=1e-4, atol=1e-5)


# Dynamo itself uses what torch has deprecated.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["nearest_all", "mixtures_learnt", "both"])
def test_compiled_equals_eager(name: str) -> None:
    torch._dynamo.reset()
    sizes = next(case.sizes for case in cases.CASES if case.name == name)
    call = measure.requiring(cases.make(sizes, torch.float32, "cpu", 0))
    plain = measure.outcome(contrastive_cross_entropy, call, gradients=True)
    compiled = torch.compile(contrastive_cross_entropy, fullgraph=True, backend="aot_eager")
    for name, value in measure.outcome(compiled, call, gradients=True).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-6, atol=1e-6)


def of_the_batch(**words: Any) -> Callable[[Tensor, Tensor], Any]:
    return lambda a, i: loss_of(a, a, i, i, **words)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [ContrastiveLoss(), of_the_batch(), of_the_batch(hardness=0.5)])
def test_compiled_where_the_batch_is_its_own_keys(function: Callable[..., Any], dynamic: bool) -> None:
    torch._dynamo.reset()
    x, _, ids, _ = data()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (12, 9):
        a, b = x[:rows].clone().requires_grad_(), x[:rows].clone().requires_grad_()
        mine, plain = compiled(a, ids[:rows]), function(b, ids[:rows])
        torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            torch.autograd.grad(mine, a), torch.autograd.grad(plain, b), rtol=1e-6, atol=1e-6
        )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_with_a_temperature_that_changes(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    x, k, ids, key_ids = data()

    def function(a: Tensor, temperature: float, hardness: float) -> Tensor:
        return loss_of(a, k, ids, key_ids, temperature=temperature, hardness=hardness)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for temperature, hardness in ((0.1, 0.5), (0.2, 0.7), (0.35, 0.9)):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        mine, plain = compiled(a, temperature, hardness), function(b, temperature, hardness)
        torch.testing.assert_close(mine, plain)
        torch.testing.assert_close(torch.autograd.grad(mine, a), torch.autograd.grad(plain, b))
