"""The probes of frozen features: splits, logistic regression, the SGD probe, search, neighbours and class means."""

from __future__ import annotations

import builtins
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrex import neighbours
from fastrex.errors import FastrexError, UsageError
from fastrex.neighbours import knn_scores, mean_scores
from fastrex.transfer import linear, logistic, probes, search, splits
from fastrex.transfer.space import Space

CPU = torch.device("cpu")


def mixture(classes: int, rows: int, width: int, seed: int = 0, gap: float = 0.4) -> tuple[Tensor, Tensor]:
    """Rectified Gaussian mixtures with a decaying spectrum, as features of networks are: float32 [N, D], labels."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.arange(1, width + 1).double().pow(-0.7)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    means = torch.randn(classes, width, generator=generator, dtype=torch.float64) * gap
    labels = torch.arange(rows) % classes
    latent = (means[labels] + torch.randn(rows, width, generator=generator, dtype=torch.float64)) * spread
    return torch.relu(3 * latent @ turn + 0.2).float(), labels


def digits() -> tuple[Tensor, Tensor]:
    data = pytest.importorskip("sklearn.datasets").load_digits()
    return torch.from_numpy(data.data).float(), torch.from_numpy(data.target).long()


def sklearn_fit(features: Tensor, labels: Tensor, c: float, **options: Any) -> tuple[Any, float]:
    """scikit-learn's solution in float64 and the value of its objective."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = features.double().numpy(), labels.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = linear_model.LogisticRegression(C=c, max_iter=20000, **options).fit(x, y)
    own = model.predict_log_proba(x)[np.arange(len(y)), np.searchsorted(model.classes_, y)]
    return model, 0.5 * float((model.coef_**2).sum()) - c * float(own.sum())


def ours(
    features: Tensor, labels: Tensor, classes: int, strengths: Sequence[float], tolerance: float, **options: Any
) -> tuple[Space, logistic.Fits]:
    space = Space(features, torch.float64)
    rows = torch.arange(len(features))
    return space, logistic.solve(space, labels, classes, [rows], [strengths], tolerance=tolerance, **options)


@pytest.mark.parametrize("name", ["digits", "mixture", "fewer rows than columns"])
def test_logistic_equals_scikit_learn(name: str) -> None:
    """Both in float64, to a gradient of 1e-6 and less (at C = 1e-5 the margins themselves are not much larger): equal
    objectives, and predictions on rows that were not fitted as well."""
    if name == "digits":
        (features, labels), classes, strengths = digits(), 10, [1e-5, 1e-3, 1e-2]
        features = features / 4
    else:
        rows = 1400 if name == "mixture" else 300
        (features, labels), classes, strengths = mixture(10, rows, 160), 10, [1e-5, 1e-3, 1e-1, 1.0]
    fitted = len(features) // 2
    space, fits = ours(features[:fitted], labels[:fitted], classes, strengths, 1e-8)
    predictions = fits.predict(space.place(features))
    assert float(fits.gradients.max()) <= 1e-8
    for c, own, value in zip(strengths, predictions, fits.objectives, strict=True):
        model, objective = sklearn_fit(features[:fitted], labels[:fitted], c, tol=1e-8)
        assert (own == torch.from_numpy(model.predict(features.double().numpy()))).double().mean() >= 0.999
        assert float(value) == pytest.approx(objective, rel=1e-8)


def test_weak_regularisation_equals_newton() -> None:
    """C up to 1e6 on classes that overlap. The gradient that scikit-learn looks at is 1e9 times that of the objective
    there, so both are solved much further, and scikit-learn by Newton's method."""
    features, labels = mixture(4, 2400, 24, gap=0.5)
    features, labels = features[:1200], labels[:1200]
    strengths = [10.0, 1e3, 1e6]
    space, fits = ours(features, labels, 4, strengths, 1e-10)
    for c, own, value in zip(strengths, fits.predict(space.rows), fits.objectives, strict=True):
        model, objective = sklearn_fit(features, labels, c, tol=1e-10, solver="newton-cholesky")
        assert (own == torch.from_numpy(model.predict(features.double().numpy()))).double().mean() >= 0.999
        assert float(value) == pytest.approx(objective, rel=1e-8)


def test_two_classes_equal_the_binary_problem() -> None:
    """scikit-learn has one weight vector there, with another penalty."""
    features, labels = mixture(2, 900, 40, gap=0.2)
    strengths = [1e-4, 1e-2, 1.0]
    space, fits = ours(features[:500], labels[:500], 2, strengths, 1e-6)
    for c, own, value in zip(strengths, fits.predict(space.place(features)), fits.objectives, strict=True):
        model, objective = sklearn_fit(features[:500], labels[:500], c, tol=1e-6)
        assert torch.equal(own, torch.from_numpy(model.predict(features.double().numpy())))
        assert float(value) == pytest.approx(objective, rel=1e-8)


def test_weights_in_the_coordinates_of_the_features() -> None:
    features, labels = mixture(5, 200, 30)
    space, fits = ours(features, labels, 5, [0.1], 1e-8)
    weights, intercept = space.raw(fits.weights)
    model, _ = sklearn_fit(features, labels, 0.1, tol=1e-9)
    torch.testing.assert_close(weights[0], torch.from_numpy(model.coef_), rtol=1e-4, atol=1e-5)
    offset = intercept[0] - intercept[0].mean()
    torch.testing.assert_close(
        offset, torch.from_numpy(model.intercept_ - model.intercept_.mean()), rtol=1e-4, atol=1e-4
    )
    logits = features.double() @ weights[0].T + intercept[0]
    torch.testing.assert_close(logits, space.rows @ fits.weights[0].T)


def test_side_by_side_equals_one_by_one() -> None:
    """Whatever else is solved in the same wave, and whatever the memory budget cuts the waves into."""
    features, labels = mixture(6, 400, 50)
    space = Space(features, torch.float64)
    generator = torch.Generator().manual_seed(1)
    groups = [torch.randperm(400, generator=generator)[:count] for count in (320, 300, 120)]
    strengths = [[1e-3, 1.0, 100.0], [0.1], [1e-2, 10.0]]
    together = logistic.solve(space, labels, 6, groups, strengths, tolerance=1e-7)
    cut = logistic.solve(space, labels, 6, groups, strengths, tolerance=1e-7, budget=1)
    at = 0
    for rows, values in zip(groups, strengths, strict=True):
        for c in values:
            alone = logistic.solve(space, labels, 6, [rows], [[c]], tolerance=1e-7)
            for fits in (together, cut):
                torch.testing.assert_close(fits.objectives[at], alone.objectives[0], rtol=1e-6, atol=0)
                assert (fits.predict(space.rows)[at] == alone.predict(space.rows)[0]).double().mean() >= 0.995
            at += 1
    torch.testing.assert_close(cut.weights, torch.cat([
        logistic.solve(space, labels, 6, [rows], [[c]], tolerance=1e-7).weights
        for rows, values in zip(groups, strengths, strict=True) for c in values
    ]))  # fmt: skip


def test_float32_equals_scikit_learn() -> None:
    """What runs by default, both to a gradient of 1e-6, on rows that were not fitted."""
    features, labels = mixture(10, 2400, 64)
    space, rows = Space(features[:1200]), torch.arange(1200)
    strengths = [0.01, 1.0, 100.0]
    fits = logistic.solve(space, labels[:1200], 10, [rows], [strengths], tolerance=1e-6)
    assert float(fits.gradients.max()) <= 1e-6
    for c, own in zip(strengths, fits.predict(space.place(features[1200:])), strict=True):
        model, _ = sklearn_fit(features[:1200], labels[:1200], c, tol=1e-6)
        same = own == torch.from_numpy(model.predict(features[1200:].double().numpy()))
        assert float(same.double().mean()) >= 0.999


def test_separable_data_at_the_weakest_strength() -> None:
    features, labels = mixture(10, 100, 200)
    for dtype in (torch.float32, torch.float64):
        space = Space(features, dtype)
        fits = logistic.solve(space, labels, 10, [torch.arange(100)], [[1e6]])
        assert float(fits.gradients[0]) <= 1e-4
        assert bool(fits.weights.isfinite().all())
        assert torch.equal(fits.predict(space.rows)[0], labels)


def test_a_tolerance_beyond_its_precision_ends_as_well() -> None:
    """float32 cannot reach 1e-12: the problem leaves when nothing gets better, and tells the gradient that it has."""
    features, labels = mixture(5, 200, 30)
    space = Space(features)
    fits = logistic.solve(space, labels, 5, [torch.arange(200)], [[1.0, 1e6]], tolerance=1e-12)
    assert bool((fits.iterations < logistic.MAX_ITERATIONS).all())
    assert float(fits.gradients.max()) < 1e-4
    short = logistic.solve(space, labels, 5, [torch.arange(200)], [[1.0]], tolerance=1e-12, max_iterations=3)
    assert int(short.iterations[0]) == 3
    assert 1e-4 < float(short.gradients[0]) < 1


def test_classes_without_rows_are_never_predicted() -> None:
    features, labels = mixture(4, 200, 20)
    space = Space(features, torch.float64)
    lone, two = (labels == 2).nonzero().flatten(), (labels < 2).nonzero().flatten()
    fits = logistic.solve(space, labels, 4, [lone, two], [[1.0, 1e6], [1.0]], tolerance=1e-8)
    predictions = fits.predict(space.rows)
    assert predictions[:2].unique().tolist() == [2]
    assert predictions[2].unique().tolist() == [0, 1]


def test_duplicated_and_constant_columns() -> None:
    """Equal columns share what one would do with C times their number; a constant one does nothing."""
    features, labels = mixture(5, 300, 20)
    odd = torch.cat([features, features, torch.full((300, 3), 7.0)], 1)
    space, fits = ours(odd, labels, 5, [0.1], 1e-8)
    plain, wanted = ours(features, labels, 5, [0.2], 1e-8)
    torch.testing.assert_close(space.rows @ fits.weights[0].T, plain.rows @ wanted.weights[0].T, rtol=1e-4, atol=1e-4)
    assert float(space.raw(fits.weights)[0][0, :, -3:].abs().max()) < 1e-9


@pytest.mark.parametrize("rows", [3, 40])
def test_features_that_are_all_the_same(rows: int) -> None:
    labels = torch.arange(rows) % 3 % 2
    space = Space(torch.full((rows, 5), 2.5))
    fits = logistic.solve(space, labels, 2, [torch.arange(rows)], [[1.0]])
    # Nothing but the intercept is left: the more frequent class.
    assert fits.predict(space.rows)[0].unique().tolist() == [0]


def test_the_basis_is_exact() -> None:
    for rows in (40, 300):
        features, _ = mixture(5, rows, 60)
        space = Space(features, torch.float64)
        assert space.rank == min(rows - 1, 60)
        assert space.rows.shape[1] % 16 == 0
        torch.testing.assert_close(space.basis.T @ space.basis, torch.eye(space.rank, dtype=torch.float64))
        back = space.rows[:, : space.rank] @ space.basis.T + space.mean
        torch.testing.assert_close(back, features.double(), rtol=1e-9, atol=1e-9)


def test_validation_split() -> None:
    labels = np.repeat(np.arange(6), [2, 3, 5, 9, 10, 100])
    learn, choose = splits.validation(labels, 22)
    assert np.bincount(labels[choose]).tolist() == [1, 1, 1, 1, 2, 20]
    assert np.array_equal(np.sort(np.concatenate([learn, choose])), np.arange(len(labels)))
    assert not np.array_equal(choose, splits.validation(labels, 23)[1])
    # Another order of the classes in the file: the same rows of each class.
    order = np.argsort(-labels, kind="stable")
    turned = order[splits.validation(labels[order], 22)[1]]
    assert np.array_equal(np.sort(turned), choose)
    # A class more changes nothing for the others.
    more = splits.validation(np.concatenate([labels, np.full(7, 6)]), 22)[1]
    assert np.array_equal(more[more < len(labels)], choose)
    with pytest.raises(FastrexError, match="at least 2 training images for a validation split, got 1 of class 1"):
        splits.validation(np.array([0, 0, 1]), 0)


def test_few_shots() -> None:
    labels = np.repeat(np.arange(4), 25)
    learn, choose = splits.validation(labels, 37)
    rows = splits.few(labels, learn, 8, 37)
    assert np.bincount(labels[rows]).tolist() == [8] * 4
    assert not np.intersect1d(rows, choose).size
    assert np.array_equal(rows, splits.few(labels, learn, 8, 37))
    assert np.intersect1d(rows, splits.few(labels, learn, 4, 37)).size == 16
    with pytest.raises(FastrexError, match=r"at least 21 training images .*got 20 of class 0"):
        splits.few(labels, learn, 21, 37)


def torch_loop(
    features: Tensor, labels: Tensor, classes: int, pair: tuple[float, float], seed: int, epochs: int, batch: int
) -> Tensor:
    """The SGD probe as torch.optim and nn.Linear write it, on the same draws: logits."""
    generator = torch.Generator().manual_seed(seed)
    width = features.shape[1]
    drawn = (torch.rand(classes, width + 1, generator=generator, dtype=torch.float64) * 2 - 1) / math.sqrt(width)
    model = nn.Linear(width, classes, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(drawn[:, :-1])
        model.bias.copy_(drawn[:, -1])
    optimizer = torch.optim.SGD(model.parameters(), lr=pair[0], momentum=0.9, weight_decay=pair[1])
    lr = pair[0]
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for places in torch.randperm(len(features), generator=generator).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(features[places]), labels[places]).backward()
            optimizer.step()
        lr = pair[0] * 0.5 * (1 + math.cos(math.pi * epoch / epochs))  # after the epoch, with its number
    return model(features).detach()


def test_sgd_probe_equals_torch_and_side_by_side_one_by_one() -> None:
    features, labels = mixture(5, 230, 30)
    features = F.normalize(features.double(), dim=1)
    rows = linear.unit_rows(features)
    pairs = [(0.1, 1e-12), (3.0, 1e-2), (100.0, 1e-4)]
    weights, alive = linear.train(rows, labels, 5, 30, pairs, 22, epochs=6, batch=64)
    assert alive.tolist() == [True] * 3
    cut, _ = linear.train(rows, labels, 5, 30, pairs, 22, epochs=6, batch=64, budget=1)
    torch.testing.assert_close(cut, weights, rtol=1e-9, atol=1e-9)
    for pair, own in zip(pairs, weights, strict=True):
        wanted = torch_loop(features, labels, 5, pair, 22, 6, 64)
        torch.testing.assert_close(rows @ own.T, wanted, rtol=1e-8, atol=1e-8)
    assert torch.equal(linear.predict(rows, weights), (rows @ weights.mT).argmax(2))
    # A subset by its places, and as a copy of its own.
    places = torch.arange(229, -1, -3)
    subset, _ = linear.train(rows, labels, 5, 30, pairs, 22, places=places, epochs=6, batch=64)
    copied, _ = linear.train(rows[places], labels[places], 5, 30, pairs, 22, epochs=6, batch=64)
    assert torch.equal(subset, copied)
    assert torch.equal(linear.predict(rows, subset, places), linear.predict(rows[places], subset))


def test_a_diverged_pair_keeps_its_last_predictions() -> None:
    features, labels = mixture(3, 60, 10)
    rows = linear.unit_rows(features)
    pairs = [(1.0, 1e-6), (100.0, 1e4)]
    weights, alive = linear.train(rows, labels, 3, 10, pairs, 0, epochs=40, batch=20)
    assert alive.tolist() == [True, False]
    assert bool(weights.isfinite().all())
    alone, _ = linear.train(rows, labels, 3, 10, pairs[:1], 0, epochs=40, batch=20)
    torch.testing.assert_close(weights[:1], alone)


def test_weights_that_overflow_in_the_last_step_are_not_kept() -> None:
    """The loss of that epoch's only batch was finite."""
    features, labels = mixture(3, 60, 10)
    rows = linear.unit_rows(features)
    weights, alive = linear.train(rows, labels, 3, 10, [(1.0, 1e-6), (3e38, 1e4)], 0, epochs=1, batch=60)
    assert alive.tolist() == [True, False]
    assert bool(weights.isfinite().all())


def test_rows_of_the_sgd_probe() -> None:
    features, _ = mixture(3, linear.BLOCK + 5, 10)
    rows = linear.unit_rows(features)
    assert rows.shape == (len(features), 16)
    torch.testing.assert_close(rows[:, :10], F.normalize(features, dim=1))
    assert rows[:, 10].unique().tolist() == [1.0]
    assert not rows[:, 11:].any()


def test_published_schedule() -> None:
    assert [linear.rate(epoch) for epoch in (0, 1)] == [1.0, 1.0]
    assert linear.rate(2) == pytest.approx(0.5 * (1 + math.cos(math.pi / 100)))
    assert linear.rate(99) == pytest.approx(0.5 * (1 + math.cos(0.98 * math.pi)))


def example(classes: int = 5, rows: int = 200) -> probes.Features:
    features, labels = mixture(classes, 2 * rows, 40)
    return probes.Features(features[:rows], labels[:rows], features[rows:], labels[rows:], classes)


@pytest.mark.parametrize("shots", [None, 4])
@pytest.mark.parametrize("probe", probes.PROBES)
def test_probes(probe: str, shots: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "PAIRS", ((1.0, 1e-6), (10.0, 1e-6)))
    features = example()
    notes: list[str] = []
    outcomes = probes.run(probe, features, seeds=(22, 37), shots=shots, device=CPU, note=notes.append)
    assert [outcome.seed for outcome in outcomes] == [22, 37]
    for outcome in outcomes:
        assert outcome.predictions.dtype == torch.int64
        right = (outcome.predictions == features.test_labels).double().mean()
        assert right > (0.5 if shots is None else 0.3)
        assert (outcome.validation is None) == (probe in ("knn", "ncm"))
    names = {"logistic": {"C"}, "sgd": {"lr", "weight_decay"}, "knn": {"k", "temperature"}, "ncm": set()}
    assert set(outcomes[0].chosen) == names[probe]
    assert bool(notes) == (probe in ("logistic", "sgd"))
    again = probes.run(probe, features, seeds=(22, 37), shots=shots, device=CPU)
    assert all(torch.equal(a.predictions, b.predictions) for a, b in zip(outcomes, again, strict=True))
    if shots is None and probe in ("knn", "ncm"):
        assert torch.equal(outcomes[0].predictions, outcomes[1].predictions)


def test_the_grid_chooses_the_best_on_the_validation_rows() -> None:
    """Each fit of the grid, made again by scikit-learn on the same rows, chooses as well."""
    features = example(rows=250)
    (outcome,) = probes.run("logistic", features, seeds=(22,), device=CPU)
    learn, choose = splits.validation(features.train_labels.numpy(), 22)
    shares = {}
    for c in (*search.GRID[:8], outcome.chosen["C"]):
        model, _ = sklearn_fit(features.train[learn], features.train_labels[learn], c)
        wanted = features.train_labels[choose].numpy()
        shares[c] = float((model.predict(features.train[choose].double().numpy()) == wanted).mean())
    assert outcome.validation == pytest.approx(shares[outcome.chosen["C"]], abs=0.0201)
    assert outcome.validation >= max(shares.values()) - 0.0201
    final, _ = sklearn_fit(features.train, features.train_labels, outcome.chosen["C"], tol=1e-6)
    same = outcome.predictions.numpy() == final.predict(features.test.double().numpy())
    assert same.mean() >= 0.99


@pytest.mark.parametrize("protocol", probes.PROTOCOLS)
def test_scores_are_those_of_fits_alone(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With features on which weak strengths stop early, so that a fit begun at another would be returned as it is."""
    if protocol == "paper":
        pytest.importorskip("optuna")
    features = example(10, 400)
    before = search.Logistic.scores
    tried: list[tuple[float, float]] = []

    def logged(self: search.Logistic, strengths: Sequence[Sequence[float]]) -> list[list[float]]:
        shares = before(self, strengths)
        tried.extend(zip(strengths[0], shares[0], strict=True))
        return shares

    monkeypatch.setattr(search.Logistic, "scores", logged)
    probes.run("logistic", features, seeds=(22, 37), protocol=protocol, device=CPU)
    monkeypatch.undo()
    learn, choose = (torch.from_numpy(rows) for rows in splits.validation(features.train_labels.numpy(), 22))
    space = Space(features.train)
    wanted = features.train_labels[choose]
    for c, share in tried:
        alone = logistic.solve(space, features.train_labels, 10, [learn], [[c]])
        found = float((alone.predict(space.rows[choose])[0] == wanted).double().mean())
        # Rounding may turn one row.
        assert share == pytest.approx(found, abs=1.01 / len(choose))
    weak = [share for c, share in tried if c >= 1e3]
    assert len(tried) > 12
    assert len(set(weak)) > 1


def test_the_grid_chooses_the_same_whatever_the_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    features = example(10, 300)
    together = probes.run("logistic", features, seeds=(22, 37), device=CPU)
    alone = [probes.run("logistic", features, seeds=(seed,), device=CPU)[0] for seed in (22, 37)]
    monkeypatch.setattr(logistic, "BUDGET", 1)
    cut = probes.run("logistic", features, seeds=(22, 37), device=CPU)
    for first, *others in zip(together, alone, cut, strict=True):
        for other in others:
            assert other.chosen == first.chosen
            assert other.validation == first.validation
            assert (other.predictions == first.predictions).double().mean() >= 0.99


def test_of_equal_ones_the_strongest_regularisation_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "predict", lambda rows, weights, places=None: torch.zeros(
        len(weights), len(rows) if places is None else len(places), dtype=torch.int64
    ))  # fmt: skip
    original = linear.train
    monkeypatch.setattr(linear, "train", lambda *a, **k: original(*a, **{**k, "epochs": 1}))
    (outcome,) = probes.run("sgd", example(3, 60), seeds=(22,), device=CPU)
    assert outcome.chosen == {"lr": pytest.approx(0.1), "weight_decay": 1e-4}


def test_a_final_fit_that_has_not_converged_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    features = example(3, 60)
    probes.run("logistic", features, seeds=(22,), device=CPU, note=notes.append)
    assert len(notes) == 1
    monkeypatch.setattr(search, "FINAL_TOLERANCE", 1e-12)
    probes.run("logistic", features, seeds=(22,), device=CPU, note=notes.append)
    assert "seed 22" in notes[-1]
    assert "has not converged" in notes[-1]
    assert "scale the features" in notes[-1]


@pytest.mark.parametrize("probe", ["logistic", "sgd"])
def test_the_published_search(probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values tried are those that Optuna proposes when it is asked one at a time."""
    optuna = pytest.importorskip("optuna")
    features = example(3, 60)
    tried: list[Any] = []
    if probe == "logistic":
        before = search.Logistic.scores

        def logged(self: search.Logistic, strengths: Sequence[Sequence[float]]) -> list[list[float]]:
            shares = before(self, strengths)
            tried.extend(zip(strengths[0], shares[0], strict=True))
            return shares

        monkeypatch.setattr(search.Logistic, "scores", logged)
    else:
        original = linear.train
        monkeypatch.setattr(linear, "train", lambda *a, **k: original(*a, **{**k, "epochs": 3}))
    verbosity = optuna.logging.get_verbosity()
    (outcome,) = probes.run(probe, features, seeds=(22,), protocol="paper", device=CPU)
    assert optuna.logging.get_verbosity() == verbosity
    assert outcome.facts["trials"] == 30
    if probe == "sgd":
        assert 0.1 <= outcome.chosen["lr"] <= 100
        assert 1e-12 <= outcome.chosen["weight_decay"] <= 1e-4
        return
    assert len(tried) == 30
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=22, multivariate=False, constant_liar=False)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for c, share in tried:
        trial = study.ask()
        assert trial.suggest_float("C", 1e-5, 1e6, log=True) == c
        study.tell(trial, share)
    optuna.logging.set_verbosity(verbosity)
    assert outcome.chosen["C"] == study.best_params["C"]


def test_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "optuna":
            raise ModuleNotFoundError("No module named 'optuna'", name="optuna")
        return plain(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(FastrexError, match=r"pip install 'fastrex\[transfer\]'"):
        probes.run("logistic", example(3, 60), seeds=(22,), protocol="paper", device=CPU)


def with_(features: probes.Features, **changes: Any) -> probes.Features:
    return probes.Features(**{**features.__dict__, **changes})


def test_bad_features() -> None:
    good = example()

    def refused(words: str, **changes: Any) -> None:
        with pytest.raises(FastrexError, match=words):
            probes.run("ncm", with_(good, **changes), seeds=(0,), device=CPU)

    spoiled = good.test.clone()
    spoiled[7, 3] = float("nan")
    refused("test features must be finite, got nan in row 7", test=spoiled)
    spoiled = good.train.clone()
    spoiled[5, 0] = -float("inf")
    refused("training features must be finite, got -inf in row 5", train=spoiled)
    labels = good.train_labels.clone()
    labels[9] = 5
    refused(
        "training labels must be at least 0 and below the number of classes, 5, got 5 in row 9", train_labels=labels
    )
    refused("test labels must be one int64 number per row of the 200", test_labels=good.test_labels[:-1])
    refused("training labels must be one int64 number", train_labels=good.train_labels.float())
    refused("none of class 5 and 1 others", num_classes=7)
    refused("matrices of the same width", test=good.test[:, :-1])
    refused("test features must not be empty", test=good.test[:0], test_labels=good.test_labels[:0])
    with pytest.raises(UsageError, match="a probe must be one of"):
        probes.run("svm", good, seeds=(0,), device=CPU)
    with pytest.raises(UsageError, match="the protocol must be one of"):
        probes.run("sgd", good, seeds=(0,), protocol="random", device=CPU)
    with pytest.raises(FastrexError, match="at least 33 training images"):
        probes.run("logistic", good, seeds=(0,), shots=33, device=CPU)


def test_nearest_class_mean_and_neighbours_by_hand() -> None:
    train = torch.tensor([[1.0, 0.0], [10.0, 10.0], [0.0, 2.0]])
    labels = torch.tensor([0, 0, 1])
    features = probes.Features(train, labels, torch.tensor([[3.0, 2.0], [0.1, 0.5]]), torch.tensor([0, 1]), 2)
    # The mean of class 0 is at 22.5 degrees, since the rows are normalised first; class 1 at 90.
    for probe in ("ncm", "knn"):
        (outcome,) = probes.run(probe, features, seeds=(0,), device=CPU)
        assert outcome.predictions.tolist() == [0, 1]
    steep = torch.tensor([[math.cos(math.radians(57)), math.sin(math.radians(57))]])
    (outcome,) = probes.run("ncm", with_(features, test=steep, test_labels=torch.tensor([1])), seeds=(0,), device=CPU)
    assert outcome.predictions.tolist() == [1]


def test_neighbours_in_blocks_are_those_at_once() -> None:
    """Blocks of fewer rows than k, and a bank that is smaller than k."""
    features, labels = mixture(6, 300, 24)
    bank, queries = features[:240], features[240:]
    whole = knn_scores(bank, labels[:240], queries, 6, 20, 0.07)
    near, where = (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).topk(20, dim=1)
    wanted = torch.zeros(60, 6).scatter_add_(1, labels[where], ((near - near[:, :1]) / 0.07).exp())
    torch.testing.assert_close(whole, wanted)
    for budget in (1, 700, 9000):
        torch.testing.assert_close(knn_scores(bank, labels[:240], queries, 6, 20, 0.07, budget), whole)
    few = knn_scores(bank[:7], labels[:7], queries, 6, 20, 0.07, 300)
    torch.testing.assert_close(few, knn_scores(bank[:7], labels[:7], queries, 6, 7, 0.07))


def test_class_means_in_blocks_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = mixture(6, 300, 24)
    whole = mean_scores(features[:240], labels[:240], features[240:], 7)
    monkeypatch.setattr(neighbours, "ROWS", 17)
    torch.testing.assert_close(mean_scores(features[:240], labels[:240], features[240:], 7), whole)
    assert not whole[:, 6].any()
