"""The four probes of frozen features behind one function: logistic regression, SGD, nearest neighbours, class means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import FastrexError, UsageError
from ..neighbours import knn_scores, mean_scores
from . import splits
from .search import Choice, Parts, logistic_search, sgd_search

PROBES = ("logistic", "sgd", "knn", "ncm")
PROTOCOLS = ("grid", "paper")
# Fixed, not chosen: DINO's k-NN with the k that it reports as best.
KNN_K, KNN_TEMPERATURE = 20, 0.07
BLOCK = 4096  # rows that are looked at together


@dataclass(frozen=True)
class Features:
    """Frozen features of one set.

    Attributes:
        train: [N, D] float32. train_labels: int64 [N]. test: [T, D] float32. test_labels: int64 [T].
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    num_classes: int


@dataclass(frozen=True)
class Outcome:
    """What one probe gave for one seed.

    Attributes:
        predictions: classes of the test rows, int64 [T], on the CPU. chosen: hyper-parameters by name.
        validation: share of the validation rows that the chosen ones get right; None where nothing is chosen.
        facts: further numbers, such as steps of the solver.
    """

    seed: int
    predictions: Tensor
    chosen: dict[str, float]
    validation: float | None
    facts: dict[str, float]


def run(
    probe: str,
    features: Features,
    *,
    seeds: Sequence[int],
    protocol: str = "grid",
    shots: int | None = None,
    device: torch.device,
    note: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
    """Fit ``probe`` on the training features and predict the test features, once per seed.

    ``logistic`` and ``sgd`` choose their hyper-parameters on 20 % of each class's training rows and are then fitted on
    all of them; ``knn`` (k = 20, temperature 0.07) and ``ncm`` choose nothing. ``logistic`` takes the features as they
    are, the others l2-normalise them. A seed decides the validation rows, the few shots and SGD's batches.

    Args:
        protocol: "grid" or "paper", see ``search``. shots: so many training rows per class; the validation rows are
            then held out of all training rows first, and the final fit draws from all of them (ImageNet-CoG).
        note: is told what was chosen.

    Raises:
        UsageError: an unknown probe or protocol.
        FastrexError: features or labels that do not fit together, that are not finite, or too few images in a class.
    """
    if probe not in PROBES:
        raise UsageError(f"transfer: a probe must be one of {', '.join(PROBES)}, got {probe!r}")
    if protocol not in PROTOCOLS:
        raise UsageError(f"transfer: the protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    check(features)
    train, labels, test, classes = features.train, features.train_labels, features.test, features.num_classes
    names = labels.cpu().numpy()
    with torch.no_grad():
        if probe == "sgd":
            # Block by block to the device: beside what it computes with, there is no room for these.
            parts = [_parts(names, seed, shots) for seed in seeds]
            choices = sgd_search(train, labels, test, classes, parts, protocol, note, device=device)
        else:
            train, labels, test = train.to(device), labels.to(device), test.to(device)
            if probe in ("knn", "ncm"):
                return _without_choice(probe, train, labels, test, names, classes, seeds, shots)
            parts = [_parts(names, seed, shots) for seed in seeds]
            choices = logistic_search(train, labels, test, classes, parts, protocol, note)
    return [_outcome(seed, choice) for seed, choice in zip(seeds, choices, strict=True)]


def check(features: Features) -> None:
    """Raise FastrexError where the features cannot be probed, naming the first row or class."""
    classes = features.num_classes
    if features.train.ndim != 2 or features.test.ndim != 2 or features.train.shape[1] != features.test.shape[1]:
        raise FastrexError(
            "transfer: training and test features must be matrices of the same width, got "
            f"{tuple(features.train.shape)} and {tuple(features.test.shape)}; extract both with the same encoder"
        )
    pairs = (
        ("training", features.train, features.train_labels),
        ("test", features.test, features.test_labels),
    )
    for name, rows, labels in pairs:
        if not len(rows) or not rows.shape[1]:
            raise FastrexError(f"transfer: {name} features must not be empty, got {tuple(rows.shape)}")
        if labels.shape != rows.shape[:1] or labels.dtype != torch.int64:
            raise FastrexError(
                f"transfer: {name} labels must be one int64 number per row of the {len(rows)} features, got "
                f"{str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}; extract the features again"
            )
        outside = ((labels < 0) | (labels >= classes)).nonzero().flatten()
        if len(outside):
            raise FastrexError(
                f"transfer: {name} labels must be at least 0 and below the number of classes, {classes}, got "
                f"{int(labels[outside[0]])} in row {int(outside[0])}; check the set's labels"
            )
        # Block by block: a mask of all of them, or a copy, would take as much memory again.
        blocks = (torch.isfinite(block).all(1) for block in torch.split(rows, BLOCK))
        for row in (~torch.cat(list(blocks))).nonzero().flatten().tolist()[:1]:
            bad = rows[row][~rows[row].isfinite()]
            raise FastrexError(
                f"transfer: {name} features must be finite, got {float(bad[0])} in row {row}; look at its image and at "
                "the encoder's weights"
            )
    missing = (torch.bincount(features.train_labels, minlength=classes) == 0).nonzero().flatten()
    if len(missing):
        raise FastrexError(
            f"transfer: each class must have a training image, got none of class {int(missing[0])}"
            f"{f' and {len(missing) - 1} others' if len(missing) > 1 else ''}; check the split, or leave the class out"
        )


def _parts(labels: np.ndarray[tuple[int], np.dtype[np.int64]], seed: int, shots: int | None) -> Parts:
    learn, choose = splits.validation(labels, seed)
    final = np.arange(len(labels), dtype=np.int64)
    if shots is not None:
        learn, final = splits.few(labels, learn, shots, seed), splits.few(labels, final, shots, seed)
    return Parts(seed, learn, choose, final)


def _without_choice(
    probe: str,
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    names: np.ndarray[tuple[int], np.dtype[np.int64]],
    classes: int,
    seeds: Sequence[int],
    shots: int | None,
) -> list[Outcome]:
    def predict(bank: Tensor, bank_labels: Tensor) -> Tensor:
        if probe == "knn":
            scores = knn_scores(bank, bank_labels, test, classes, KNN_K, KNN_TEMPERATURE)
        else:
            scores = mean_scores(bank, bank_labels, test, classes)
        return scores.argmax(1).cpu()

    values = {"k": float(KNN_K), "temperature": KNN_TEMPERATURE} if probe == "knn" else {}
    if shots is None:
        # No seed has a say.
        predictions = predict(train, labels)
        return [Outcome(seed, predictions, dict(values), None, {}) for seed in seeds]
    everything = np.arange(len(names), dtype=np.int64)
    outcomes = []
    for seed in seeds:
        rows = torch.from_numpy(splits.few(names, everything, shots, seed)).to(train.device)
        outcomes.append(Outcome(seed, predict(train[rows], labels[rows]), dict(values), None, {}))
    return outcomes


def _outcome(seed: int, choice: Choice) -> Outcome:
    return Outcome(seed, choice.predictions, choice.values, choice.validation, choice.facts)
