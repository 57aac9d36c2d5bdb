"""DeepNCM: its three ways to keep class means by hand, its distances far from the origin, what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import settings_for
from torch import Tensor

import fastrex
from fastrex import checkpoint, objectives
from fastrex import config as c
from fastrex.errors import FastrexError, UsageError
from fastrex.objectives.ncm import TF32_BITS, Ncm, class_sums, halves, split_product


def make(classes: int = 2, dim: int = 2, **options: object) -> Ncm:
    table = {"objective": {"name": "ncm", **options}}
    made = objectives.make(objectives.resolve(c.from_table(table)), dim, classes)
    assert isinstance(made, Ncm)
    return made


def feed(objective: Ncm, *rows: tuple[int, float, float], keep: bool | None = None) -> None:
    """One update with rows (class, x, y)."""
    features = torch.tensor([row[1:] for row in rows])
    target = torch.tensor([row[0] for row in rows])
    objective.update_(features, target, keep=None if keep is None else torch.tensor(keep))


def three_steps(**options: object) -> tuple[Ncm, list[list[list[float]]]]:
    """The objective after three batches, and its means after each."""
    objective, means = make(**options), []
    batches = [[(0, 1.0, 0.0), (0, 3.0, 0.0)], [(0, 5.0, 3.0), (1, 0.0, 2.0)], [(0, 1.0, 1.0)]]
    for rows in batches:
        feed(objective, *rows)
        means.append(objective.means.tolist())
    return objective, means


def test_online_means_by_hand() -> None:
    objective, means = three_steps(update="online")
    assert means == [[[2, 0], [0, 0]], [[3, 1], [0, 2]], [[2.5, 1], [0, 2]]]
    assert objective.totals.tolist() == [[10, 4], [0, 2]]
    assert objective.counts.tolist() == [4, 1]


def test_condensed_means_by_hand() -> None:
    # After the second update all that came before weighs as much as one feature.
    objective, means = three_steps(update="condensation", period=2)
    assert means == [[[2, 0], [0, 0]], [[3, 1], [0, 2]], [[2, 1], [0, 2]]]
    assert objective.totals.tolist() == [[4, 2], [0, 2]]
    assert objective.counts.tolist() == [2, 1]


def test_a_class_that_was_never_seen_stays_empty_when_means_are_condensed() -> None:
    objective = make(update="condensation", period=1)
    feed(objective, (0, 4.0, 0.0), (0, 2.0, 0.0))
    assert objective.counts.tolist() == [1, 0]
    feed(objective, (1, 7.0, 1.0))
    assert objective.means.tolist() == [[3, 0], [7, 1]]


def test_decaying_means_by_hand() -> None:
    objective, means = three_steps(update="decay", decay=0.5)
    assert means == [[[1, 0], [0, 0]], [[3, 1.5], [0, 1]], [[2, 1.25], [0, 1]]]
    assert "totals" not in objective.state_dict()


def test_loss_and_scores_by_hand() -> None:
    objective = make()
    feed(objective, (0, 2.0, 0.0), (1, 0.0, 0.0))
    # Squared distances of (2, 1) are 1 and 5, those of (0, 1) are 5 and 1.
    x, y = torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0])
    loss, metrics = objective(x, y)
    assert loss.tolist() == pytest.approx([0.01814993, 4.01814993], rel=1e-5)
    assert metrics["top1"] == 0.5
    assert metrics["empty_classes"] == 0
    assert objective.predict(x).tolist() == [[-1, -5], [-5, -1]]


def test_the_batch_meets_the_means_from_before_it() -> None:
    objective = make()
    feed(objective, (0, 2.0, 0.0), (1, 0.0, 2.0))
    x, y = torch.tensor([[9.0, 9.0]]), torch.tensor([1])
    before = objective(x, y)[0]
    objective.update_(x, y)
    assert objective(x, y)[0] < 0.01 < before


def test_relative_distance_of_the_batch_means_by_hand() -> None:
    objective = make(classes=3)
    assert objective(torch.ones(1, 2), torch.tensor([0]))[1]["mean_distance"] == 0
    feed(objective, (0, 2.0, 0.0))
    assert objective.mean_distance == 0  # no class had a mean
    feed(objective, (0, 5.0, 3.0), (1, 0.0, 2.0))
    # Class 0 alone had one: ||(5, 3) - (2, 0)||^2 / ||(5, 3)||^2.
    assert objective(torch.ones(1, 2), torch.tensor([0]))[1]["mean_distance"] == pytest.approx(18 / 34)


def test_all_crops_of_an_image_have_its_class() -> None:
    objective = make()
    feed(objective, (0, 2.0, 0.0), (1, 0.0, 2.0))
    crops, y = torch.randn(6, 2), torch.tensor([0, 1])
    torch.testing.assert_close(objective(crops, y)[0], objective(crops, y.repeat(3))[0])


def in_double(objective: Ncm, x: Tensor, y: Tensor) -> Tensor:
    distance = (x[:, None] - objective.means.double()[None]).square().sum(2)
    return torch.nn.functional.cross_entropy(-distance, y, reduction="none")


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_loss_and_gradient_are_those_of_double_precision(offset: float) -> None:
    # Penultimate features lie far from the origin, on one side of it: there ||x||^2 is 10^4 times their distances.
    torch.manual_seed(0)
    objective = make(classes=5, dim=8)
    objective.update_(torch.randn(40, 8) * 0.3 + offset, torch.arange(40) % 5)
    x = (torch.randn(20, 8) * 0.3 + offset).requires_grad_()
    y = torch.arange(20) % 5
    loss, _ = objective(x, y)
    loss.sum().backward()
    exact_x = x.detach().double().requires_grad_()
    exact = in_double(objective, exact_x, y)
    exact.sum().backward()
    assert x.grad is not None
    assert exact_x.grad is not None
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-4, atol=2e-5)


def test_half_features_are_compared_in_single_precision() -> None:
    objective = make(classes=5, dim=8)
    objective.update_(torch.randn(40, 8).bfloat16(), torch.arange(40) % 5)
    assert objective.means.dtype == torch.float32
    x = torch.randn(20, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = objective(x, torch.arange(20) % 5)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), in_double(objective, x.double(), torch.arange(20) % 5))


def rounded(x: Tensor) -> Tensor:
    """What a product in TF32 sees of float32 numbers (cut off, which is worse than rounding)."""
    return (x.detach().view(torch.int32) & TF32_BITS).view(torch.float32)


def test_three_products_in_tf32_make_one_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(30, 64, requires_grad=True), torch.randn(7, 64)
    high, low = halves(x)
    assert torch.equal(high, rounded(x))
    assert torch.equal(high + low, x)
    exact = x.detach().double() @ w.double().T
    scale = x.detach().norm(dim=1, keepdim=True) * w.norm(dim=1)
    plain = (rounded(x) @ rounded(w).T - exact).abs() / scale
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: product(rounded(a.contiguous()), rounded(b.T).T))
    with torch.no_grad():
        split = (split_product(x, w) - exact).abs() / scale
    monkeypatch.undo()
    assert plain.max() > 1e-5
    assert split.max() < 3e-7
    (gradient,) = torch.autograd.grad(split_product(x, w).sum(), x)
    torch.testing.assert_close(gradient, rounded(w).sum(0).expand_as(x))


def test_sums_take_the_rows_in_their_order() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(500, 9), torch.randint(7, (500,))
    sums, counts = class_sums(x, y, 9)
    assert torch.equal(sums, torch.zeros(9, 9).index_add_(0, y, x))
    assert torch.equal(counts, torch.bincount(y, minlength=9))
    # No class: such labels pass on a GPU only.
    bad = torch.where(torch.arange(500) % 2 == 0, y, torch.tensor([-1, 9]).repeat(250))
    sums, counts = class_sums(x, bad, 9)
    assert torch.equal(sums, torch.zeros(9, 9).index_add_(0, y[::2], x[::2]))
    assert counts.sum() == 250


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
@pytest.mark.filterwarnings("ignore:Please use the new API settings to control TF32:UserWarning")
def test_a_gpu_gives_the_numbers_of_a_cpu_without_asking_the_host() -> None:
    torch.manual_seed(0)
    on_cpu = make(classes=50, dim=64)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    again = copy.deepcopy(on_gpu)
    x, y = torch.randn(300, 64) * 0.2 + 20, torch.randint(50, (300,))
    there = x.cuda(), y.cuda()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for objective in (on_gpu, again):
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(2):
                    loss, _ = objective(*there)
                    objective.update_(*there)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.set_float32_matmul_precision(before)
    for _ in range(2):
        wanted, _ = on_cpu(x, y)
        on_cpu.update_(x, y)
    torch.testing.assert_close(loss.cpu(), wanted, rtol=1e-3, atol=1e-3)
    for name, value in on_gpu.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        torch.testing.assert_close(value.cpu(), on_cpu.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("update", ["online", "condensation", "decay"])
def test_a_batch_that_is_not_kept_changes_nothing(update: str) -> None:
    objective = make(update=update, period=1)
    feed(objective, (0, 2.0, 1.0), (1, 0.0, 3.0))
    before = {name: t.clone() for name, t in objective.state_dict().items()}
    feed(objective, (0, float("nan"), 1.0), keep=False)
    assert all(torch.equal(t, before[name]) for name, t in objective.state_dict().items())
    feed(objective, (0, 5.0, 1.0), keep=True)
    assert not torch.equal(objective.means, before["means"])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("counts", -1, "'counts' must be at least 0, got -1"),
        ("updates", -7, "'updates' must be at least 0, got -7"),
        ("means", float("nan"), "'means' must be finite"),
        ("totals", float("inf"), "'totals' must be finite"),
    ],
)
def test_a_state_that_cannot_be_is_refused_by_name(name: str, value: float, words: str) -> None:
    objective = make()
    state = objective.state_dict()
    objective.check(state)
    state[name].view(-1)[-1] = value
    with pytest.raises(FastrexError, match=f"resume: bank tensor {words}"):
        objective.check(state)


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match=r"objective.update must be one of online, condensation, decay"):
        make(update="often")
    with pytest.raises(UsageError, match=r"objective.period must be at least 1"):
        make(period=0)
    with pytest.raises(UsageError, match=r"objective.decay must be below 1, got 1"):
        make(update="decay", decay=1.0)


@pytest.mark.parametrize("update", ["online", "condensation", "decay"])
def test_a_class_whose_features_are_all_0_leaves_the_diagnostic_finite(update: str) -> None:
    objective = make(classes=3, update=update)
    feed(objective, (0, 2.0, 0.0), (1, 0.0, 2.0))
    mean = objective.means[1, 1].item()
    # As a batch behind a ReLU may have it.
    feed(objective, (0, 0.0, 0.0), (0, 0.0, 0.0), (1, 0.0, 4.0))
    assert objective.mean_distance.item() == pytest.approx((4 - mean) ** 2 / 16)
    feed(objective, (0, 0.0, 0.0))
    assert objective.mean_distance == 0
    # Not 0, but so short that the quotient has no number.
    feed(objective, *((label, 1e-19, 0.0) for label in range(2)))
    assert objective.mean_distance.isfinite()
    assert objective.mean_distance > 1e30


def test_the_diagnostic_alone_refuses_no_checkpoint() -> None:
    objective = make()
    state = objective.state_dict()
    state["mean_distance"].fill_(float("inf"))
    objective.check(state)


@pytest.mark.parametrize("update", ["online", "condensation", "decay"])
def test_means_of_a_class_that_was_never_seen_are_refused(update: str) -> None:
    objective = make(classes=3, update=update, period=1)
    feed(objective, (1, 2.0, 0.0))
    good = objective.state_dict()
    objective.check(good)
    for name in {"means", "totals"} & good.keys():
        state = {key: tensor.clone() for key, tensor in good.items()}
        state[name][2, 1] = 0.5
        with pytest.raises(FastrexError, match=f"'{name}' must be 0 for a class that was never seen, .* class 2;"):
            objective.check(state)


@pytest.mark.parametrize("update", ["online", "condensation", "decay"])
def test_a_stopped_and_resumed_training_gives_the_same_bits(update: str, stripes: Path, tmp_path: Path) -> None:
    settings = [
        *settings_for("ncm"), "projector.enabled=false", "optim.lr=0.01", "optim.epochs=2",
        f"objective.update={update}", "objective.period=3", f"data.path={json.dumps(str(stripes))}",
    ]  # fmt: skip
    config = c.load("demo", settings)
    fastrex.train(config, out=tmp_path / "whole", device="cpu")
    # Between two condensations.
    fastrex.train(config, out=tmp_path / "parts", device="cpu", max_steps=5)
    fastrex.train(out=tmp_path / "parts", device="cpu", resume="must")
    found = []
    for name in ("whole", "parts"):
        last = checkpoint.folder(tmp_path / name, checkpoint.steps(tmp_path / name)[-1])
        found.append(checkpoint.load(last)[0])
    assert found[0]["bank"]["updates"] == 8
    assert checkpoint.state_hash(found[0]) == checkpoint.state_hash(found[1])


def test_a_training_sees_every_image(stripes: Path, tmp_path: Path) -> None:
    settings = [
        *settings_for("ncm"),
        "projector.enabled=false",
        "optim.lr=0.01",
        f"data.path={json.dumps(str(stripes))}",
    ]
    result = fastrex.train(c.load("demo", settings), out=tmp_path / "run", device="cpu")
    assert result.state == "completed"
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if "train/loss" in record]
    assert train[0]["train/loss"] == pytest.approx(1.3862944)  # log 4: all means are 0
    assert train[0]["train/top1"] == 0  # and a tie is no hit
    losses = [record["train/loss"] for record in train]
    assert sum(losses[-4:]) < 0.8 * sum(losses[1:5])
    parts, _ = fastrex.checkpoint.load(fastrex.checkpoint.folder(tmp_path / "run", 16))
    assert parts["bank"]["counts"].tolist() == [64, 64, 64, 64]
    assert parts["bank"]["updates"] == 16
