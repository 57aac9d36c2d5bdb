"""How a probe's hyper-parameters are chosen on validation images: a grid, or the published search with Optuna.

``grid``: fixed values over the published ranges, for all seeds side by side; for logistic regression then two more on
either side of each seed's best, a third of a decade apart. ``paper``: 30 trials of Optuna's TPE; its first ten are
random, so they are drawn ahead and solved side by side. Every fit begins at zero: its score is its own, whatever was
solved before it or beside it. The highest validation accuracy wins, of equal ones the first (the grid: the strongest
regularisation, for SGD the largest weight decay, then the smallest learning rate).
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import FastrexError
from . import linear, logistic
from .space import Space

LOWEST, HIGHEST = 1e-5, 1e6  # of C, as published
GRID = tuple(10.0**power for power in range(-5, 7))
FINER = tuple(10 ** (thirds / 3) for thirds in (-2, -1, 1, 2))
# Of the fit that is tested. At scikit-learn's 1e-4 a weakly regularised fit is still some tenths of a point of accuracy
# away from where it would end.
FINAL_TOLERANCE = 1e-5
TRIALS, STARTUP = 30, 10
NO_OPTUNA = (
    "transfer: --protocol paper needs Optuna, which is not installed; pip install 'fastrex[transfer]', or use "
    "--protocol grid"
)
RATES, DECAYS = (0.1, 100.0), (1e-12, 1e-4)  # as published
PAIRS = tuple((10 ** (halves / 2), decay) for decay in (1e-4, 1e-5, 1e-6, 1e-12) for halves in range(-2, 5))

Rows = NDArray[np.int64]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Parts:
    """The rows of the training features that one seed learns from and chooses on, and those of its final fit."""

    seed: int
    learn: Rows
    choose: Rows
    final: Rows


@dataclass(frozen=True)
class Choice:
    """What was chosen for one seed, the share of its validation rows that it gets right, and the final predictions."""

    values: dict[str, float]
    validation: float
    predictions: Tensor
    facts: dict[str, float]


class Logistic:
    """All fits of logistic regression on one set, strengths and seeds side by side."""

    def __init__(self, train: Tensor, labels: Tensor, num_classes: int, parts: Sequence[Parts]) -> None:
        self.labels, self.classes, self.parts = labels, num_classes, parts
        used = np.unique(np.concatenate([rows for part in parts for rows in (part.learn, part.final)]))
        whole = len(used) == len(train)
        # Few shots span few directions.
        self.space = Space(train if whole else train[torch.from_numpy(used).to(train.device)])
        self.own = labels if whole else labels[torch.from_numpy(used).to(labels.device)]
        device = train.device
        self.learn = [torch.from_numpy(np.searchsorted(used, part.learn)).to(device) for part in parts]
        self.final = [torch.from_numpy(np.searchsorted(used, part.final)).to(device) for part in parts]
        self.choose = [torch.from_numpy(part.choose).to(device) for part in parts]
        self.placed = self.space.rows if whole else self.space.place(train)
        self.fits = self.iterations = 0

    def scores(self, strengths: Sequence[Sequence[float]]) -> list[list[float]]:
        """Validation accuracy for the strengths of each seed."""
        found = self._solve(self.learn, strengths)
        hits, at = [], 0
        for rows, values in zip(self.choose, strengths, strict=True):
            placed = self.placed[rows]
            for one in found.weights[at : at + len(values)]:
                hits.append(((placed @ one.T).argmax(1) == self.labels[rows]).double().mean())
            at += len(values)
        flat = torch.stack(hits).tolist() if hits else []
        ends = np.cumsum([len(values) for values in strengths])
        return [flat[end - len(values) : end] for values, end in zip(strengths, ends, strict=True)]

    def finish(self, strengths: Sequence[float], test: Tensor) -> tuple[list[Tensor], list[float], list[float]]:
        """Predictions of the final fit of each seed, with its largest gradient and its steps; equal fits once."""
        groups: dict[bytes, list[int]] = {}
        for number, part in enumerate(self.parts):
            groups.setdefault(part.final.tobytes(), []).append(number)
        members = list(groups.values())
        wanted = [sorted({strengths[number] for number in numbers}) for numbers in members]
        finals = [self.final[numbers[0]] for numbers in members]
        found = self._solve(finals, wanted, FINAL_TOLERANCE)
        rows, at = self.space.place(test), 0
        predictions = [rows.new_empty(0)] * len(self.parts)
        gradients, steps = [0.0] * len(self.parts), [0.0] * len(self.parts)
        for numbers, values in zip(members, wanted, strict=True):
            for number in numbers:
                place = at + values.index(strengths[number])
                predictions[number] = (rows @ found.weights[place].T).argmax(1).cpu()
                gradients[number] = float(found.gradients[place])
                steps[number] = float(found.iterations[place])
            at += len(values)
        return predictions, gradients, steps

    def _solve(
        self, groups: Sequence[Tensor], strengths: Sequence[Sequence[float]], tolerance: float = logistic.TOLERANCE
    ) -> logistic.Fits:
        found = logistic.solve(self.space, self.own, self.classes, groups, strengths, tolerance=tolerance)
        self.fits += len(found.weights)
        self.iterations += int(found.iterations.sum())
        return found


def logistic_search(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    num_classes: int,
    parts: Sequence[Parts],
    protocol: str,
    note: Note,
) -> list[Choice]:
    """Choose C for each seed, fit on its final rows and predict the test rows [T, D]."""
    fits = Logistic(train, labels, num_classes, parts)
    if protocol == "paper":
        tried = _logistic_trials(fits, note)
    else:
        tried = [[] for _ in parts]
        _try(fits, tried, [GRID] * len(parts))
        best = [_best(pairs)[0] for pairs in tried]
        finer = [[c * factor for factor in FINER if LOWEST <= c * factor <= HIGHEST] for c in best]
        _try(fits, tried, finer)
        for pairs in tried:
            pairs.sort()
    chosen = [_best(pairs) for pairs in tried]
    note(f"logistic: {fits.fits} fits, {fits.iterations} steps; C {', '.join(f'{c:.3g}' for c, _ in chosen)}")
    predictions, gradients, steps = fits.finish([c for c, _ in chosen], test)
    for part, (c, _), gradient, step in zip(parts, chosen, gradients, steps, strict=True):
        if gradient > FINAL_TOLERANCE:
            note(
                f"logistic: seed {part.seed}, C {c:.3g} has not converged: gradient {gradient:.1e} after {step:.0f} "
                f"steps, tolerance {FINAL_TOLERANCE:.0e}; scale the features to a deviation near 1"
            )
    return [
        Choice({"C": c}, share, found, {"trials": float(len(pairs)), "gradient": gradient, "iterations": step})
        for (c, share), found, gradient, step, pairs in zip(chosen, predictions, gradients, steps, tried, strict=True)
    ]


def sgd_search(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    num_classes: int,
    parts: Sequence[Parts],
    protocol: str,
    note: Note,
    *,
    device: torch.device,
    epochs: int = linear.EPOCHS,
) -> list[Choice]:
    """Choose learning rate and weight decay for each seed, train on its final rows and predict the test rows [T, D].

    The features may lie elsewhere than on ``device``: it holds one copy of them, l2-normalised, and no subset's.
    """
    width = train.shape[1]
    rows, placed, labels = linear.unit_rows(train, device), linear.unit_rows(test, device), labels.to(device)
    choices = []
    for part in parts:
        learn, choose, final = (torch.from_numpy(r).to(rows.device) for r in (part.learn, part.choose, part.final))

        def scores(pairs: Sequence[tuple[float, float]]) -> list[float]:
            seed, own, held = part.seed, learn, choose  # noqa: B023
            weights, _ = linear.train(rows, labels, num_classes, width, pairs, seed, places=own, epochs=epochs)
            right = linear.predict(rows, weights, held) == labels[held]
            return [float(share) for share in right.double().mean(1).tolist()]

        paper = protocol == "paper"
        tried = _sgd_trials(scores, part.seed) if paper else list(zip(PAIRS, scores(PAIRS), strict=True))
        pair, share = max(tried, key=lambda one: one[1])
        note(f"sgd: seed {part.seed}, lr {pair[0]:.3g}, weight decay {pair[1]:.3g}")
        weights, alive = linear.train(rows, labels, num_classes, width, [pair], part.seed, places=final, epochs=epochs)
        facts = {"trials": float(len(tried)), "diverged": float(not bool(alive[0]))}
        values = {"lr": pair[0], "weight_decay": pair[1]}
        choices.append(Choice(values, share, linear.predict(placed, weights)[0].cpu(), facts))
    return choices


def _try(fits: Logistic, tried: list[list[tuple[float, float]]], strengths: Sequence[Sequence[float]]) -> None:
    for pairs, values, shares in zip(tried, strengths, fits.scores(strengths), strict=True):
        pairs += zip(values, shares, strict=True)


def _best(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The first of the highest shares."""
    return max(pairs, key=lambda pair: pair[1])


def _logistic_trials(fits: Logistic, note: Note) -> list[list[tuple[float, float]]]:
    tried: list[list[tuple[float, float]]] = [[] for _ in fits.parts]
    with _optuna() as optuna:
        studies = [_study(optuna, part.seed, group=False) for part in fits.parts]
        for count in (STARTUP, *[1] * (TRIALS - STARTUP)):
            trials = [[study.ask() for _ in range(count)] for study in studies]
            values = [[trial.suggest_float("C", LOWEST, HIGHEST, log=True) for trial in row] for row in trials]
            shares = fits.scores(values)
            for study, row, scores in zip(studies, trials, shares, strict=True):
                for trial, score in zip(row, scores, strict=True):
                    study.tell(trial, score)
            for pairs, row_values, scores in zip(tried, values, shares, strict=True):
                pairs += zip(row_values, scores, strict=True)
    return tried


def _sgd_trials(
    scores: Callable[[Sequence[tuple[float, float]]], list[float]], seed: int
) -> list[tuple[tuple[float, float], float]]:
    tried: list[tuple[tuple[float, float], float]] = []
    with _optuna() as optuna:
        study = _study(optuna, seed, group=True)
        for count in (STARTUP, *[1] * (TRIALS - STARTUP)):
            trials = [study.ask() for _ in range(count)]
            pairs = [
                (trial.suggest_float("lr", *RATES, log=True), trial.suggest_float("weight_decay", *DECAYS, log=True))
                for trial in trials
            ]
            shares = scores(pairs)
            for trial, share in zip(trials, shares, strict=True):
                study.tell(trial, share)
            tried += zip(pairs, shares, strict=True)
    return tried


def _study(optuna: Any, seed: int, *, group: bool) -> Any:
    """The published sampler; what newer versions of Optuna do by default (liars, joint sampling) is left out."""
    sampler = optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=STARTUP, multivariate=group, group=group, constant_liar=False
    )
    return optuna.create_study(direction="maximize", sampler=sampler)


@contextlib.contextmanager
def _optuna() -> Iterator[Any]:
    """Optuna, silent: it warns of every option that it calls experimental and logs every trial.

    Raises:
        FastrexError: it is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            optuna: Any = importlib.import_module("optuna")
        except ImportError:
            raise FastrexError(NO_OPTUNA) from None
        before = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            yield optuna
        finally:
            optuna.logging.set_verbosity(before)
