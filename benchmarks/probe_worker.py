"""One way of choosing and fitting the probe, in a process of its own; see :mod:`.probe`.

A line of JSON each: ``{"do": "warm"}``: the facts; the first calls of the libraries are over.
``{"do": "probe", "seeds": [..]}``: seconds, CPU seconds, accuracy and what was chosen, per seed.
``{"do": "sgd", "epochs": n, "side": bool}``: seconds of all pairs of the grid, side by side or one after the other.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch

from fastrex import tensorfile
from fastrex.errors import FastrexError
from fastrex.memory import pool
from fastrex.transfer import linear, probes, search, splits
from fastrex.transfer.probes import Features

from . import machine
from .probe import RIVAL
from .processes import Answer
from .rivals import Absent

PACKAGES = ("numpy", "scikit-learn", "scipy", "optuna")
NAMES = {"train", "train_labels", "test", "test_labels"}
WARM_ROWS = 8  # of each class


@dataclass(frozen=True)
class Spec:
    """What a worker is told at its start; ``features`` is a safetensors file."""

    impl: str
    features: str
    device: str
    threads: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main() -> None:
    """Entry point."""
    spec = Spec(**json.loads(sys.argv[1]))
    # Answers go where nobody else writes: libraries print.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec.threads])
    torch.set_num_threads(spec.threads)
    subject: Subject | None = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if subject is None:
                subject = Subject(spec)
            answer = getattr(subject, question.pop("do"))(**question)
        except Absent as reason:
            answer = {"absent": str(reason)}
        print(json.dumps(answer), file=answers, flush=True)


def read(path: str) -> Features:
    """The features of a file with train, train_labels, test and test_labels.

    Raises:
        FastrexError: the file has not these tensors, or they do not fit together.
    """
    found = tensorfile.load(path)
    if set(found) != NAMES:
        wanted = ", ".join(sorted(NAMES))
        raise FastrexError(
            f"bench probe: --features must hold the tensors {wanted}, got {', '.join(sorted(found)) or 'none'}"
        )
    labels = {name: found[name].long() for name in ("train_labels", "test_labels")}
    classes = int(labels["train_labels"].max()) + 1 if labels["train_labels"].numel() else 0
    features = Features(
        found["train"].float(), labels["train_labels"], found["test"].float(), labels["test_labels"], classes
    )
    probes.check(features)
    return features


class Subject:
    """Answers about one implementation."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.features = spec, read(spec.features)
        self.allocator = "pooled" if spec.impl != RIVAL and pool() else "default"
        if spec.impl != "grid":
            for package in ("sklearn", "optuna") if spec.impl == RIVAL else ("optuna",):
                if not machine.installed(package):
                    raise Absent(f"{package} is not installed: pip install 'fastrex[train,transfer]'")

    def warm(self) -> Answer:
        rows = np.flatnonzero(_places(self.features.train_labels.numpy()) < WARM_ROWS)
        few = torch.from_numpy(rows)
        small = Features(
            self.features.train[few], self.features.train_labels[few], self.features.test[:64],
            self.features.test_labels[:64], self.features.num_classes,
        )  # fmt: skip
        self._run(small, [0])
        versions = machine.facts(self.spec.device, self.allocator)
        return {"facts": versions | {name: metadata.version(name) for name in PACKAGES if _there(name)}}

    def probe(self, seeds: list[int]) -> Answer:
        wall, cpu, (predictions, chosen, validation) = self._timed(lambda: self._run(self.features, seeds))
        right = [float((one == self.features.test_labels).double().mean()) for one in predictions]
        return {"seconds": wall, "cpu_seconds": cpu, "top1": right, "chosen": chosen, "validation": validation}

    def sgd(self, epochs: int, side: bool) -> Answer:
        rows = linear.unit_rows(self.features.train, torch.device(self.spec.device))
        labels, pairs = self.features.train_labels.to(rows.device), search.PAIRS
        groups = [pairs] if side else [[pair] for pair in pairs]

        def run() -> None:
            for group in groups:
                linear.train(
                    rows, labels, self.features.num_classes, self.features.train.shape[1], group, 0, epochs=epochs
                )

        wall, cpu, _ = self._timed(run)
        return {"seconds": wall, "cpu_seconds": cpu, "pairs": len(pairs)}

    def _run(self, features: Features, seeds: Sequence[int]) -> tuple[list[Any], list[float], list[float]]:
        if self.spec.impl == RIVAL:
            done = [published(features, seed) for seed in seeds]
            return [torch.from_numpy(p) for p, _, _ in done], [c for _, c, _ in done], [v for _, _, v in done]
        device = torch.device(self.spec.device)
        outcomes = probes.run("logistic", features, seeds=seeds, protocol=self.spec.impl, device=device)
        chosen = [outcome.chosen["C"] for outcome in outcomes]
        return [o.predictions for o in outcomes], chosen, [float(o.validation or 0.0) for o in outcomes]

    def _timed(self, run: Callable[[], Any]) -> tuple[float, float, Any]:
        """Seconds by the clock, seconds that this process's threads computed, and the result."""
        if self.spec.device == "cuda":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        result = run()
        if self.spec.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - wall, time.process_time() - cpu, result


def published(features: Features, seed: int) -> tuple[Any, float, float]:
    """The published probe of the small sets: 30 trials of Optuna's TPE over C, each a fit of scikit-learn, and a last
    fit on everything. Predictions of the test rows, C, validation accuracy."""
    import optuna
    from sklearn.linear_model import LogisticRegression

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    train, labels = features.train.numpy(), features.train_labels.numpy()
    learn, choose = splits.validation(labels, seed)
    x, y, held, wanted = train[learn], labels[learn], train[choose], labels[choose]

    def objective(trial: Any) -> float:
        c = trial.suggest_float("C", search.LOWEST, search.HIGHEST, log=True)
        return float(LogisticRegression(C=c, max_iter=2000).fit(x, y).score(held, wanted))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fits that have not converged after 2000 steps
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=False, constant_liar=False)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.optimize(objective, n_trials=search.TRIALS)
        c = float(study.best_params["C"])
        final = LogisticRegression(C=c, max_iter=2000).fit(train, labels)
    return final.predict(features.test.numpy()), c, float(study.best_value)


def _places(labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The place of each row among those of its class."""
    order = np.argsort(labels, kind="stable")
    counted = labels[order]
    places = np.empty(len(labels), dtype=np.int64)
    places[order] = np.arange(len(labels)) - np.searchsorted(counted, counted, side="left")
    return places


def _there(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
