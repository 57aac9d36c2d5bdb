"""The objectives behind their interface, with small numbers."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from objective_ranks import FORMS
from objective_ranks import make as make_form

from fastrex import config as c
from fastrex import objectives
from fastrex.errors import FastrexError
from fastrex.objectives.class_means import expected_empty_share
from fastrex_kernels import _sharded
from fastrex_kernels.cosine_ce.reference import unit_rows


def make(name: str, classes: int = 3, dim: int = 4, **options: object) -> objectives.Objective:
    table = {"objective": {"name": name, **options}}
    return objectives.make(objectives.resolve(c.from_table(table)), dim, classes)


def clustered(rows: int, classes: int = 3, dim: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(rows) % classes
    return torch.eye(dim)[y] * 3 + 0.1 * torch.randn(rows, dim, generator=g), y


def context_of(objective: objectives.Objective, x: torch.Tensor, start: int = 0) -> objectives.Context:
    """Images of their own, whose momentum features are ``x``."""
    return objectives.Context(torch.arange(start, start + len(x)), x.detach() if objective.keys_first else None)


def feed(objective: objectives.Objective, x: torch.Tensor, y: torch.Tensor, start: int = 0) -> None:
    objective.update_(x.detach(), y, images=torch.arange(start, start + len(x)))


# Where the toy loss cannot come near 0: the mean over the positives' logs is at least the log of their number.
FLOORS = {"supcon": math.log(9) / 0.7, "supcon_queue": math.log(20) / 0.7, "schane": 0.9 * math.log(9)}


@pytest.mark.parametrize("form", FORMS)
class TestContract:
    def test_gradient_reaches_the_features(self, form: str) -> None:
        objective = make_form(form)
        x, y = clustered(6)
        feed(objective, x, y, start=10)
        x.requires_grad_()
        loss, metrics = objective(torch.cat([x, x + 0.1]), y, context_of(objective, x))
        assert loss.shape == (12,)
        assert loss.dtype == torch.float32
        loss.mean().backward()
        assert x.grad is not None
        assert x.grad.abs().sum() > 0
        assert all(value.ndim == 0 for value in metrics.values())
        assert 0 <= metrics["top1"] <= 1
        # What has class vectors ranks all classes, what has pairs knows the nearest one only.
        assert (objective.class_vectors() is None) == ("top5" not in metrics)

    def test_state_round_trips(self, form: str) -> None:
        a, b = make_form(form), make_form(form)
        x, y = clustered(6)
        feed(a, x, y, start=10)
        b.check(a.state_dict())
        b.load_state_dict(a.state_dict())
        context = context_of(a, x)
        torch.testing.assert_close(a(x, y, context)[0], b(x, y, context)[0], rtol=0, atol=0)

    def test_a_copy_shares_nothing(self, form: str) -> None:
        a = make_form(form)
        b = copy.deepcopy(a)
        x, y = clustered(6)
        before = {n: t.clone() for n, t in b.state_dict().items()}
        feed(a, x, y)
        assert all(torch.equal(t, before[n]) for n, t in b.state_dict().items())

    def test_what_is_not_kept_changes_nothing(self, form: str) -> None:
        objective = make_form(form)
        x, y = clustered(6)
        feed(objective, x, y)
        before = {n: t.clone() for n, t in objective.state_dict().items()}
        images = torch.arange(6)
        objective.update_(x.flip(0) * 7, y, keep=torch.tensor(False), images=images)
        assert all(torch.equal(t, before[n]) for n, t in objective.state_dict().items())
        objective.update_(x.flip(0) * 7, y, keep=torch.tensor(True), images=images)
        changed = any(not torch.equal(t, before[n]) for n, t in objective.state_dict().items())
        assert changed == bool(objective.feeds)

    def test_same_seed_same_start(self, form: str) -> None:
        a, b = make_form(form).state_dict(), make_form(form).state_dict()
        assert all(torch.equal(a[n], b[n]) for n in a)

    def test_toy_loss_falls(self, form: str) -> None:
        objective = make_form(form)
        x, y = clustered(30)
        if form in ("moco", "mochi"):  # which tell every image from every other: four that can be told
            x, y = x[:3] + torch.eye(3, 4).roll(1, 1), y[:3]
        elif form == "look":  # whose neighbours agree from the start, unless something else is louder than the class
            x = torch.cat([0.3 * x[:, :3], 3 * torch.randn(30, 1, generator=torch.Generator().manual_seed(1))], 1)
        net = torch.nn.Linear(4, 4)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            net.weight.copy_(torch.randn(4, 4, generator=generator) * 0.1)
            net.bias.copy_(torch.ones(4))
        params = [*net.parameters(), *objective.parameters()]
        if objective.feeds:
            feed(objective, net(x), y)
        first = last = math.nan
        for step in range(100):
            loss = objective(net(x), y, context_of(objective, net(x)))[0].mean()
            for p in params:
                p.grad = None
            loss.backward()
            feed(objective, net(x), y)
            with torch.no_grad():
                for p in params:
                    p -= 0.1 * p.grad
            first, last = (loss.item() if step == 0 else first), loss.item()
        floor = FLOORS.get(form, 0.0)
        assert -1e-5 < last - floor < 0.2 * (first - floor)

    def test_prediction_agrees_with_the_loss(self, form: str) -> None:
        objective = make_form(form)
        x, y = clustered(30)
        feed(objective, x, y)
        scores = objective.predict(x)
        if scores is None:
            # Nothing scores classes: what was learnt is found by k-NN and probes.
            assert objective.class_vectors() is None
            return
        assert scores.shape == (30, 3)
        top1 = (scores.argmax(1) == y).float().mean()
        assert top1.item() == pytest.approx(objective(x, y, context_of(objective, x))[1]["top1"].item())


def test_the_batch_never_meets_its_own_entries() -> None:
    objective = make("class_means", bank_size=6)
    x, y = clustered(6)
    before = objective(x, y)[0]
    objective.update_(x, y)
    after = objective(x, y)[0]
    assert before.mean() > 2 * after.mean()


@pytest.mark.parametrize(
    ("name", "value", "end"), [("pointer", -1, 6), ("pointer", 6, 6), ("labels", 3, 3), ("labels", -1, 3)]
)
def test_a_bank_that_points_outside_is_refused_by_name(name: str, value: int, end: int) -> None:
    objective = make("class_means", bank_size=6)
    state = objective.state_dict()
    objective.check(state)
    state[f"means.{name}"][-1] = value
    with pytest.raises(FastrexError, match=rf"bank tensor 'means.{name}' must be in \[0, {end}\), got {value};"):
        objective.check(state)


def test_class_weights_are_drawn_once_from_the_runs_seed() -> None:
    before = torch.get_rng_state()
    objective = make("cosine_softmax", classes=7)
    # A second draw, from torch's own generator, would have moved it.
    assert torch.equal(torch.get_rng_state(), before)
    wanted = torch.empty(7, 4).uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(objective.state_dict()["head.weight"], wanted)


def test_softmax_is_torchs_linear_layer_and_cross_entropy() -> None:
    before = torch.get_rng_state()
    objective = make("softmax", classes=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(0.3 < p.abs().max() <= 0.5 for p in objective.parameters())
    x, y = torch.randn(6, 4), torch.tensor([3, 0, 6])
    loss, metrics = objective(x, y)
    logits = x @ objective.linear.weight.T + objective.linear.bias
    both = torch.cat([y, y])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, both, reduction="none"))
    assert metrics["top1"].item() == pytest.approx((logits.argmax(1) == both).float().mean().item())
    top5 = (logits.topk(5).indices == both[:, None]).any(1).float().mean()
    assert metrics["top5"].item() == pytest.approx(top5.item())


@pytest.mark.parametrize("rows", [torch.zeros(()), torch.zeros(4, 4)], ids=["no rows", "another number"])
def test_weights_of_other_classes_are_refused(rows: torch.Tensor) -> None:
    with pytest.raises(FastrexError, match=r"must be those of 3 classes, got \["):
        make("cosine_softmax").own(rows)


def test_class_weights_are_normalised_once_for_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make("cosine_softmax", classes=7)
    x = clustered(6)[0]
    wanted = objective.predict(x)
    normalised: list[int] = []

    def counting(rows: torch.Tensor) -> torch.Tensor:
        normalised.append(len(rows))
        return unit_rows(rows)

    monkeypatch.setattr(_sharded, "unit_rows", counting)
    classify = objective.classifier()
    scores = [classify(x) for _ in range(2)]
    assert normalised == [7, 6, 6]
    assert wanted is not None
    for found in scores:
        assert found is not None
        assert torch.equal(found, wanted)


def test_worked_example_of_equation_2() -> None:
    objective = make("class_means", classes=2, dim=2, bank_size=2, temperature=0.5)
    objective.update_(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 1]))
    # Prototypes (1, 0) and (0, 1); feature (0.6, 0.8): logits 1.2 and 1.6.
    loss, _ = objective(torch.tensor([[3.0, 4.0]]), torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log1p(math.exp(0.4)), rel=1e-6)


def test_empty_classes_are_counted() -> None:
    objective = make("class_means", classes=5, bank_size=4)
    objective.update_(torch.randn(4, 4), torch.tensor([0, 0, 1, 3]))
    _, metrics = objective(torch.randn(2, 4), torch.tensor([0, 2]))
    assert metrics["empty_classes"].item() == 2
    # Slots 3, 1 and 2 of the ring hold the newest entries of classes 3, 0 and 1: 0, 2 and 1 entries old.
    assert metrics["age"].item() == 1


def test_expected_empty_share() -> None:
    # features.md finding 12: exp(-M/C) in the balanced case.
    for classes, share in ((1000, 0.00028), (8142, 0.366), (21841, 0.687)):
        assert expected_empty_share(np.full(classes, 10), 8192) == pytest.approx(share, rel=0.02)


def test_a_bank_too_small_says_what_to_set() -> None:
    (line,) = make("class_means", classes=1000, dim=8, bank_size=100).notices(np.full(1000, 13))
    assert "90.5% of the classes" in line
    assert "objective.bank_size=4610" in line
    (line,) = make("class_means", classes=10, dim=8).notices(np.full(10, 13))
    assert "Set" not in line
