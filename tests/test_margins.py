"""CosFace and ArcFace margins of the cosine head: against plain PyTorch, by hand, and what they do not go with."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrex import config as c
from fastrex import objectives
from fastrex.errors import UsageError
from fastrex_kernels import CosineHead, Stats

KINDS = [("cosface", 0.35), ("arcface", 0.5), ("arcface", 2.0)]


def plain(x: Tensor, weight: Tensor, target: Tensor, kind: str, margin: float, temperature: float) -> Tensor:
    """The loss as the papers write it, with all logits, in the features' dtype."""
    cosine = F.normalize(x) @ F.normalize(weight).T
    own = cosine.gather(1, target[:, None])
    if kind == "cosface":
        turned = own - margin
    else:
        angle = own.acos() + margin
        turned = torch.where(angle > math.pi, own - margin * math.sin(margin), angle.cos())
    logits = cosine.scatter(1, target[:, None], turned) / temperature
    return F.cross_entropy(logits, target, reduction="none")


def head(kind: str, margin: float, dtype: torch.dtype = torch.float32, **options: object) -> CosineHead:
    words = {"reduction": "none", "generator": torch.Generator().manual_seed(3), **options}
    return CosineHead(16, 11, temperature=0.1, margin=margin, margin_kind=kind, dtype=dtype, **words)


def loss_of(module: CosineHead, x: Tensor, target: Tensor) -> Tensor:
    loss = module(x, target)
    assert isinstance(loss, Tensor)
    return loss


@pytest.mark.parametrize(("kind", "margin"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_gradients_are_those_of_the_formula(kind: str, margin: float, dtype: torch.dtype) -> None:
    module = head(kind, margin, dtype)
    torch.manual_seed(0)
    x = torch.randn(24, 16, dtype=dtype, requires_grad=True)
    target, upstream = torch.randint(11, (24,)), torch.rand(24, dtype=torch.float64)
    loss = loss_of(module, x, target)
    (loss * upstream.to(loss.dtype)).sum().backward()
    exact_x = x.detach().double().requires_grad_()
    exact_w = module.weight.detach().double().requires_grad_()
    exact = plain(exact_x, exact_w, target, kind, margin, 0.1)
    (exact * upstream).sum().backward()
    tolerance = {"rtol": 1e-7, "atol": 1e-8} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for found, wanted in ((loss, exact), (x.grad, exact_x.grad), (module.weight.grad, exact_w.grad)):
        assert found is not None
        assert wanted is not None
        torch.testing.assert_close(found.double(), wanted, **tolerance)


@pytest.mark.parametrize("kind", ["cosface", "arcface"])
def test_a_margin_of_nearly_nothing_is_the_head_without_one(kind: str) -> None:
    # The two are computed by different operators.
    x, target = torch.randn(24, 16), torch.randint(11, (8,))
    without, nearly = (loss_of(head(kind, margin), x, target) for margin in (0.0, 1e-7))
    torch.testing.assert_close(nearly, without, rtol=1e-5, atol=2e-5)


def test_worked_example() -> None:
    module = CosineHead(2, 2, temperature=0.5, margin=0.3, margin_kind="cosface", reduction="none")
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 5.0]]))
    # (3, 4) has the cosines 0.6 and 0.8. For class 0: (0.6 - 0.3) / 0.5 = 0.6 against 1.6.
    x, target = torch.tensor([[3.0, 4.0]]), torch.tensor([0])
    assert loss_of(module, x, target).item() == pytest.approx(math.log1p(math.exp(1.0)), rel=1e-6)
    module.margin, module.margin_kind = math.pi / 6, "arcface"
    # cos(acos 0.6 + 30 degrees) = 0.6 * 0.866025 - 0.8 * 0.5 = 0.119615.
    assert loss_of(module, x, target).item() == pytest.approx(math.log1p(math.exp((0.8 - 0.119615) / 0.5)), rel=1e-5)


@pytest.mark.parametrize(("kind", "margin"), KINDS)
def test_logits_and_statistics_know_nothing_of_the_margin(kind: str, margin: float) -> None:
    x, target = torch.randn(24, 16), torch.randint(11, (8,))
    with_margin, without = head(kind, margin), head(kind, 0.0)
    assert torch.equal(with_margin.logits(x), without.logits(x))
    _, found = with_margin(x, target, return_stats=True)
    _, wanted = without(x, target, return_stats=True)
    assert isinstance(found, Stats)
    assert torch.equal(found.rank, wanted.rank)
    assert torch.equal(found.lse, wanted.lse)


@pytest.mark.parametrize("ignore_index", [-100, 4, -1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_ignored_rows_count_for_nothing(ignore_index: int, reduction: str) -> None:
    """Also where the id is that of a class, which is still one of those that the others are told from."""
    module = head("cosface", 0.35, ignore_index=ignore_index, reduction=reduction)
    torch.manual_seed(0)
    x = torch.randn(12, 16, requires_grad=True)
    target = torch.tensor([0, ignore_index, 7, ignore_index])
    kept = (target != ignore_index).repeat(3)
    loss = loss_of(module, x, target)
    rows = plain(x.detach(), module.weight.detach(), target.clamp(min=0).repeat(3), "cosface", 0.35, 0.1)
    rows = torch.where(kept, rows, 0.0)
    wanted = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / 6}[reduction]
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    loss.sum().backward()
    assert x.grad is not None
    assert (x.grad[~kept] == 0).all()
    assert (x.grad[kept].abs().sum(1) > 0).all()


def test_what_is_no_class_is_refused() -> None:
    for bad in (11, -1):
        with pytest.raises(ValueError, match=rf"CosineHead: target must be in \[0, 11\) or -100, got {bad}"):
            head("cosface", 0.35)(torch.randn(2, 16), torch.tensor([0, bad]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine")
def test_what_is_no_class_makes_its_row_nan_on_a_gpu() -> None:
    module = head("arcface", 0.5).cuda()
    torch.manual_seed(0)
    x = torch.randn(4, 16)
    there, target = x.cuda().requires_grad_(), torch.tensor([3, 11, -1, -100])
    loss = loss_of(module, there, target.cuda())
    assert loss.isnan().tolist() == [False, True, True, False]
    wanted = plain(x[:1], module.weight.detach().cpu(), target[:1], "arcface", 0.5, 0.1)
    torch.testing.assert_close(loss[:1].cpu(), wanted, rtol=1e-3, atol=1e-3)
    loss[0].backward()
    assert there.grad is not None
    assert there.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"margin": -0.1}, r"margin must be in \[0, 2\) for cosface, got -0.1"),
        ({"margin": 2.0}, r"margin must be in \[0, 2\) for cosface, got 2.0"),
        ({"margin": 3.2, "margin_kind": "arcface"}, r"margin must be in \[0, 3.142\) for arcface, got 3.2"),
        ({"margin_kind": "sphereface"}, "margin_kind must be one of cosface, arcface, got 'sphereface'"),
        ({"margin": 0.3, "label_smoothing": 0.1}, "margin must be 0 with label_smoothing, got 0.3; leave one"),
        ({"margin": 0.3, "learnable_temperature": True}, "margin must be 0 with learnable_temperature, got 0.3"),
    ],
)
def test_what_a_margin_does_not_go_with(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=f"CosineHead: {words}"):
        CosineHead(4, 3, **options)  # type: ignore[arg-type]


def test_targets_that_are_no_ids_are_refused_in_the_heads_name() -> None:
    x = torch.randn(6, 16)
    with pytest.raises(TypeError, match=r"CosineHead: target must be int64 class ids, got torch\.int32; use"):
        head("cosface", 0.35)(x, torch.zeros(6, dtype=torch.int32))
    for shape in ((6, 1), (4,), (7,), (0,), ()):
        with pytest.raises(
            ValueError, match=r"CosineHead: target must be \[6\] class ids or a divisor of that, got \["
        ):
            head("cosface", 0.35)(x, torch.zeros(shape, dtype=torch.int64))


def test_shares_of_classes_have_no_margin() -> None:
    with pytest.raises(ValueError, match=r"target must be class ids with margin=0.35, got probabilities \[2, 11\]"):
        head("cosface", 0.35)(torch.randn(2, 16), torch.full((2, 11), 1 / 11))


def objective(**options: object) -> objectives.Objective:
    table = {"objective": {"name": "cosine_softmax", **options}}
    return objectives.make(objectives.resolve(c.from_table(table)), 16, 11)


@pytest.mark.parametrize(("kind", "margin"), KINDS)
def test_the_objective_has_the_heads_margin_in_training_alone(kind: str, margin: float) -> None:
    made, without = objective(margin=margin, margin_kind=kind), objective()
    made.load_state_dict(without.state_dict())
    x, target = torch.randn(24, 16), torch.randint(11, (8,))
    (loss, metrics), (easier, same) = made(x, target), without(x, target)
    weight = made.state_dict()["head.weight"]
    torch.testing.assert_close(loss, plain(x, weight, target.repeat(3), kind, margin, 0.1), rtol=1e-4, atol=1e-5)
    assert (loss > easier).all()
    assert metrics == same
    assert torch.equal(made.predict(x), without.predict(x))  # type: ignore[arg-type]


def test_the_objective_names_the_setting_to_change() -> None:
    with pytest.raises(
        UsageError, match=r"objective.margin must be below 2 for cosface, got 2; from memory, usual are 0.35"
    ):
        objective(margin=2.0)
    with pytest.raises(
        UsageError, match=r"objective.margin must be 0 with objective.sharded, got 0.3; set objective.s"
    ):
        objective(margin=0.3, sharded=True)
    with pytest.raises(UsageError, match=r"objective.margin must be 0 with objective.label_smoothing, got 0.3; set"):
        objective(margin=0.3, label_smoothing=0.1)
