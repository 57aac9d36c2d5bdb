"""The modules: what they compute and how they behave in a loop of somebody else's, in one process."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrex_kernels import CosineCrossEntropyLoss, CosineHead, OnlineClassMeans, cosine_cross_entropy, modules

DIM, CLASSES, ROWS = 6, 11, 12


def data(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, DIM, generator=g).to(dtype), torch.randint(CLASSES, (ROWS,), generator=g)


def filled(**options: Any) -> OnlineClassMeans:
    means = OnlineClassMeans(DIM, CLASSES, bank_size=40, **options)
    means.update_(*data(seed=1))
    return means


def with_gradient(means: OnlineClassMeans) -> OnlineClassMeans:
    means.features.requires_grad_()
    return means


BUILD: dict[str, Callable[..., nn.Module]] = {
    "head": lambda **words: CosineHead(DIM, CLASSES, learnable_temperature=True, **words),
    "means": lambda **words: OnlineClassMeans(DIM, CLASSES, bank_size=40, **words),
}


class TestCosineHead:
    def test_loss_logits_and_statistics_are_torchs(self) -> None:
        x, target = data(torch.float64)
        head = CosineHead(DIM, CLASSES, temperature=0.2, label_smoothing=0.1, ignore_index=3, dtype=torch.float64)
        loss, stats = head(x, target, return_stats=True)
        logits = F.normalize(x, dim=1) @ F.normalize(head.weight, dim=1).T / 0.2
        wanted = F.cross_entropy(logits, target, label_smoothing=0.1, ignore_index=3)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(head.logits(x), logits)
        kept = target != 3
        hits = (logits.argmax(1) == target)[kept]
        assert torch.equal((stats.rank == 0)[kept], hits)
        assert (stats.rank[~kept] == -1).all()

    def test_starts_as_linear_does(self) -> None:
        torch.manual_seed(0)
        weight = CosineHead(64, 500).weight
        assert weight.abs().max().item() <= 1 / 8
        assert weight.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.02)

    def test_a_generator_makes_the_start_repeatable(self) -> None:
        head = CosineHead(DIM, CLASSES)
        head.reset_parameters(torch.Generator().manual_seed(7))
        before = head.weight.clone()
        head.reset_parameters(torch.Generator().manual_seed(7))
        assert torch.equal(head.weight, before)

    def test_many_classes_are_drawn_in_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(modules, "_DRAWN_AT_ONCE", 4)
        head = CosineHead(DIM, CLASSES)
        assert len(head.weight.unique()) == head.weight.numel()

    def test_a_learnt_temperature_is_trained_and_stays_positive(self) -> None:
        x, target = data()
        head = CosineHead(DIM, CLASSES, temperature=0.5, learnable_temperature=True)
        assert head.temperature.item() == pytest.approx(0.5)
        optimizer = torch.optim.SGD([head.log_temperature], lr=10.0)
        for _ in range(5):
            optimizer.zero_grad()
            head(x, target).backward()
            optimizer.step()
        assert head.temperature.item() != pytest.approx(0.5)
        assert head.temperature.item() > 0

    def test_gradient_of_the_temperature(self) -> None:
        x, target = data(torch.float64)
        head = CosineHead(DIM, CLASSES, temperature=0.5, learnable_temperature=True, dtype=torch.float64)
        head(x, target).backward()
        tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        cosine_cross_entropy(x, head.weight.detach(), target, temperature=tau).backward()
        torch.testing.assert_close(head.log_temperature.grad, tau.grad * 0.5)

    def test_soft_and_shared_targets(self) -> None:
        x, target = data()
        head = CosineHead(DIM, CLASSES)
        torch.testing.assert_close(head(x, F.one_hot(target, CLASSES).float()), head(x, target))
        assert torch.equal(head(x, target[:4]), head(x, target[:4].repeat(3)))

    def test_full_weight_of_one_process(self) -> None:
        a, b = CosineHead(DIM, CLASSES), CosineHead(DIM, CLASSES)
        b.load_full_weight(a.full_weight())
        assert torch.equal(a.weight, b.weight)
        assert a.full_weight().data_ptr() != a.weight.data_ptr()


class TestOnlineClassMeans:
    def test_worked_example(self) -> None:
        means = OnlineClassMeans(2, 2, bank_size=2, temperature=0.5)
        means.update_(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 1]))
        # Prototypes (1, 0) and (0, 1); feature (0.6, 0.8): logits 1.2 and 1.6.
        assert means(torch.tensor([[3.0, 4.0]]), torch.tensor([0])).item() == pytest.approx(math.log1p(math.exp(0.4)))
        assert torch.equal(means.prototypes(), torch.eye(2))

    def test_starts_with_normal_features_and_uniform_labels(self) -> None:
        means = OnlineClassMeans(16, 10, bank_size=5000)
        assert means.features.std().item() == pytest.approx(1, rel=0.02)
        assert means.labels.bincount(minlength=10).min() > 400
        assert torch.equal(means.features, OnlineClassMeans(16, 10, bank_size=5000).features)
        assert not torch.equal(means.features, OnlineClassMeans(16, 10, bank_size=5000, seed=1).features)

    def test_no_gradient_but_that_of_the_features(self) -> None:
        x, target = data()
        means = filled()
        x.requires_grad_()
        loss = means(x, target)
        # The usual order in a step: the bank is written before the backward.
        means.update_(x.detach(), target)
        loss.backward()
        assert x.grad is not None
        assert not any(buffer.requires_grad for buffer in means.buffers())

    def test_keep_false_changes_nothing(self) -> None:
        means = filled()
        before = {key: value.clone() for key, value in means.state_dict().items()}
        means.update_(*data(seed=2), keep=torch.tensor(False))
        assert all(torch.equal(value, before[key]) for key, value in means.state_dict().items())

    def test_state_is_complete(self) -> None:
        a, b = filled(), OnlineClassMeans(DIM, CLASSES, bank_size=40, seed=5)
        b.load_state_dict(a.state_dict())
        assert set(a.state_dict()) == {"features", "labels", "pointer"}
        x, target = data()
        for _ in range(5):  # wraps around
            assert torch.equal(a(x, target), b(x, target))
            a.update_(x, target)
            b.update_(x, target)

    def test_a_bank_in_16_bits(self) -> None:
        x, target = data()
        means = filled(dtype=torch.bfloat16)
        assert means.features.dtype == torch.bfloat16
        assert means.prototypes().dtype == means(x.bfloat16(), target).dtype == torch.float32

    def test_health(self) -> None:
        means = OnlineClassMeans(2, 4, bank_size=6)
        means.update_(torch.eye(2).repeat(3, 1), torch.tensor([0, 1, 0, 1, 0, 1]))
        first = means.health()
        # Slot 5 is the newest and of class 1, slot 4 before it of class 0.
        assert first["empty_classes"].item() == 2
        assert first["age"].item() == 0.5
        assert first["bad_labels"].item() == 0
        assert first["drift"].isnan()
        means.update_(torch.tensor([[0.0, 4.0]]), torch.tensor([0]))  # class 0: (2, 4), 1 - cosine 1 - 4 / sqrt(20)
        assert "drift" not in means.health(drift=False)
        second = means.health()
        assert second["drift"].item() == pytest.approx((1 - 2 / math.sqrt(20)) / 2)
        assert second["age"].item() == 0.5
        assert means.health()["drift"].item() == pytest.approx(0, abs=1e-6)
        assert all(value.ndim == 0 for value in second.values())

    def test_labels_that_only_a_gpu_lets_in_count_nowhere(self) -> None:
        means = OnlineClassMeans(2, 3, bank_size=4)
        means.update_(torch.ones(4, 2), torch.tensor([0, 1, 2, 2]))
        means.labels[3] = 17
        values = means.health(drift=False)
        assert values["bad_labels"].item() == 1
        assert values["empty_classes"].item() == 0


class TestCosineCrossEntropyLoss:
    def test_passes_every_option_on(self) -> None:
        x, target = data()
        w, factors = torch.randn(CLASSES, DIM), torch.rand(CLASSES) + 0.5
        options: dict[str, Any] = {"temperature": 0.3, "ignore_index": 2, "label_smoothing": 0.2, "reduction": "sum"}
        loss, stats = CosineCrossEntropyLoss(class_weight=factors, **options)(x, w, target, return_stats=True)
        wanted, wanted_stats = cosine_cross_entropy(x, w, target, class_weight=factors, return_stats=True, **options)
        assert torch.equal(loss, wanted)
        assert torch.equal(stats.rank, wanted_stats.rank)

    def test_class_weights_move_with_the_module(self) -> None:
        loss = CosineCrossEntropyLoss(class_weight=torch.ones(3))
        assert loss.double().class_weight.dtype == torch.float64
        assert set(loss.state_dict()) == {"class_weight"}

    def test_a_parameter_is_learnt(self) -> None:
        x, target = data()
        loss = CosineCrossEntropyLoss(nn.Parameter(torch.tensor(0.5)))
        loss(x, torch.randn(CLASSES, DIM), target).backward()
        assert [name for name, _ in loss.named_parameters()] == ["temperature"]
        assert loss.temperature.grad is not None


@pytest.mark.parametrize("kind", BUILD)
class TestInOtherPeoplesLoops:
    def test_meta_device(self, kind: str) -> None:
        empty = BUILD[kind](device="meta")
        assert all(t.is_meta for t in empty.state_dict().values())
        torch.manual_seed(0)
        made = empty.to_empty(device="cpu")
        made.reset_parameters()
        torch.manual_seed(0)
        usual = BUILD[kind]()
        assert all(
            torch.equal(a, b) for a, b in zip(made.state_dict().values(), usual.state_dict().values(), strict=True)
        )

    def test_under_another_default_device(self, kind: str) -> None:
        with torch.device("meta"):
            assert all(t.is_meta for t in BUILD[kind]().state_dict().values())

    def test_a_copy_shares_nothing(self, kind: str) -> None:
        module = BUILD[kind]()
        copied = copy.deepcopy(module)
        for a, b in zip(module.state_dict().values(), copied.state_dict().values(), strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()

    def test_state_round_trips(self, kind: str, tmp_path: Any) -> None:
        a, b = BUILD[kind](), BUILD[kind]()
        with torch.no_grad():
            for t in a.state_dict().values():
                t.add_(1) if t.is_floating_point() else None
        torch.save(a.state_dict(), tmp_path / "state.pt")
        b.load_state_dict(torch.load(tmp_path / "state.pt"))
        x, target = data()
        assert torch.equal(a(x, target), b(x, target))

    def test_double(self, kind: str) -> None:
        x, target = data(torch.float64)
        assert BUILD[kind]().double()(x, target).dtype == torch.float64

    def test_autocast_leaves_every_dtype_alone(self, kind: str) -> None:
        module = BUILD[kind]()
        before = [t.dtype for t in module.state_dict().values()]
        x, target = data()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = nn.Linear(DIM, DIM)(x)
            loss = module(features, target)
        assert features.dtype == torch.bfloat16
        assert loss.dtype == torch.float32
        loss.backward()
        assert [t.dtype for t in module.state_dict().values()] == before
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in module.parameters())

    # Dynamo itself makes instances of autograd Functions while it traces them.
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_compile_without_a_graph_break(self, kind: str) -> None:
        module = BUILD[kind]()
        x, target = data()
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        wanted = module(a, target)
        wanted.backward()
        gradients = [p.grad.clone() for p in module.parameters()]
        module.zero_grad()
        torch.compiler.reset()
        loss = torch.compile(module, fullgraph=True, backend="aot_eager")(b, target)
        loss.backward()
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(a.grad, b.grad)
        torch.testing.assert_close([p.grad for p in module.parameters()], gradients)

    def test_functional_call_and_grad(self, kind: str) -> None:
        module = BUILD[kind]()
        x, target = data()

        def loss(parameters: dict[str, Tensor], features: Tensor) -> Tensor:
            return torch.func.functional_call(module, parameters, (features, target))

        by_name, by_features = torch.func.grad(loss, argnums=(0, 1))(dict(module.named_parameters()), x)
        x.requires_grad_()
        module(x, target).backward()
        torch.testing.assert_close(by_features, x.grad)
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(by_name[name], parameter.grad)

    def test_repr_is_one_line(self, kind: str) -> None:
        assert f"in_features={DIM}, num_classes={CLASSES}" in repr(BUILD[kind]())
        assert "\n" not in repr(BUILD[kind]())


def test_update_compiles_without_a_graph_break() -> None:
    a, b = filled(), filled()
    x, target = data()
    a.update_(x, target)
    torch.compiler.reset()
    torch.compile(b.update_, fullgraph=True, backend="aot_eager")(x, target)
    assert all(torch.equal(s, t) for s, t in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


X, Y = data()
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: CosineHead(DIM, 0), ValueError, "CosineHead: num_classes must be at least 1, got 0"),
    (lambda: CosineHead(0, 3), ValueError, "CosineHead: in_features must be at least 1, got 0"),
    (lambda: CosineHead(DIM, 3, temperature=0), ValueError, "CosineHead: temperature must be above 0, got 0"),
    (lambda: CosineHead(DIM, 3, temperature=math.nan), ValueError, "temperature must be above 0, got nan"),
    (lambda: CosineHead(DIM, 3, label_smoothing=2), ValueError, r"label_smoothing must be in \[0, 1\], got 2"),
    (lambda: CosineHead(DIM, 3, reduction="avg"), ValueError, "reduction must be one of none, mean, sum, got 'avg'"),
    (lambda: CosineHead(DIM, CLASSES)(X[:, 1:], Y), ValueError, r"input must be \[N, 6\], got \[12, 5\]"),
    (lambda: CosineHead(DIM, CLASSES)(X[0], Y), ValueError, r"input must be \[N, 6\], got \[6\]"),
    (lambda: CosineHead(DIM, CLASSES).logits(X[0]), ValueError, r"input must be \[N, 6\], got \[6\]"),
    (lambda: CosineHead(DIM, CLASSES)(X, Y.int()), TypeError, "target must be int64"),
    (lambda: CosineHead(DIM, CLASSES)(X.long(), Y), TypeError, "input must be floating point, got torch.int64"),
    (lambda: CosineHead(DIM, CLASSES)(X, Y.to("meta")), ValueError, "target must be on cpu like input, got meta"),
    (lambda: CosineHead(DIM, CLASSES)(X, Y + 11), ValueError, r"target must be in \[0, 11\) or -100, got"),
    (
        lambda: CosineHead(DIM, 3).load_full_weight(X),
        ValueError,
        r"load_full_weight: weight must be \[3, 6\], got \[12, 6\]",
    ),
    (lambda: OnlineClassMeans(DIM, 0), ValueError, "OnlineClassMeans: num_classes must be at least 1, got 0"),
    (lambda: OnlineClassMeans(DIM, 3, 0), ValueError, "OnlineClassMeans: bank_size must be at least 1, got 0"),
    (lambda: OnlineClassMeans(DIM, 3, temperature=-1), ValueError, "temperature must be above 0, got -1"),
    (lambda: filled()(X[:, 1:], Y), ValueError, r"OnlineClassMeans: input must be \[N, 6\], got \[12, 5\]"),
    (
        lambda: filled().update_(X.clone().requires_grad_(), Y),
        ValueError,
        "OnlineClassMeans.update_: features must not require a gradient, got a tensor that does; detach",
    ),
    (lambda: filled().update_(X, Y + 11), ValueError, r"update_: labels must be in \[0, 11\), got"),
    (lambda: filled().update_(X, Y - 11), ValueError, r"update_: labels must be in \[0, 11\), got -"),
    (lambda: filled().update_(X, Y.float()), TypeError, "labels must be int64, got torch.float32"),
    (lambda: filled().update_(X[:, 1:], Y), ValueError, r"features must be \[B, 6\]"),
    (lambda: filled().update_(X[1:], Y), ValueError, r"labels must be \[11\] like the rows, got"),
    (
        lambda: with_gradient(filled())(X, Y),
        ValueError,
        "OnlineClassMeans: the bank's features must not require a gradient",
    ),
    (
        lambda: CosineCrossEntropyLoss(torch.tensor(0.1)),
        TypeError,
        "CosineCrossEntropyLoss: temperature must be a float or a 0-d nn.Parameter, got a Tensor",
    ),
    (lambda: CosineCrossEntropyLoss(0.0), ValueError, "temperature must be above 0, got 0.0"),
    (lambda: CosineCrossEntropyLoss(reduction="x"), ValueError, "reduction must be one of none, mean, sum, got 'x'"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message[:60] for _, _, message in BAD])
def test_bad_input_is_named(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
