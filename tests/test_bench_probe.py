"""The probe's benchmark: what a record holds, what is compared, what is refused. No timed assertion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click import UsageError
from click.testing import CliRunner
from safetensors.torch import save_file

from benchmarks import probe_rounds, probe_worker
from benchmarks.__main__ import main
from benchmarks.probe import IMPLS, RIVAL, _before
from fastrex.errors import FastrexError
from fastrex.transfer import probes

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'fastrex[train]'")
pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'fastrex[transfer]'")


def saved(folder: Path, **changes: torch.Tensor) -> Path:
    made = probe_rounds.generate(3, 60, 30, 12)
    tensors = {name: getattr(made, name) for name in probe_worker.NAMES} | changes
    save_file(tensors, folder / "toy.safetensors")
    return folder / "toy.safetensors"


def test_records(tmp_path: Path) -> None:
    """All three on the same features, through the command."""
    target = tmp_path / "probe.json"
    words = ["probe", "--features", str(saved(tmp_path)), "--seeds", "22,37", "--threads", "1", "--device", "cpu"]
    result = CliRunner().invoke(main, [*words, "--json", str(target)])
    assert result.exit_code == 0, result.output
    records = json.loads(target.read_text())
    assert all(tuple(record) == probe_rounds.KEYS for record in records)
    own = {record["impl"]: record for record in records if record["op"] == "probe"}
    assert tuple(own) == IMPLS
    for record in own.values():
        assert record["error"] is None
        assert (record["classes"], record["train"], record["test"], record["width"]) == (3, 60, 30, 12)
        assert len(record["top1"]) == len(record["chosen"]) == len(record["rounds"]) == 2
        assert record["seconds"] > 0
    assert own[RIVAL]["seconds"] == pytest.approx(sum(own[RIVAL]["rounds"]), abs=0.01)
    assert own[RIVAL]["ratio"] == 1
    assert [record["op"] for record in records].count("sgd probe") == 2
    assert "bar 5.00x" in result.output
    # Another set's figures go behind those that are there.
    assert _before(target) == records
    target.write_text("{}")
    with pytest.raises(UsageError, match="a new file or one of this command's"):
        _before(target)


def test_the_rival_is_the_published_probe(tmp_path: Path) -> None:
    """The same validation rows and nearly the same accuracy as our version of that search."""
    made = probe_rounds.generate(5, 200, 100, 16)
    predictions, c, share = probe_worker.published(made, 22)
    (ours,) = probes.run("logistic", made, seeds=(22,), protocol="paper", device=torch.device("cpu"))
    assert 1e-5 <= c <= 1e6
    assert ours.validation == pytest.approx(share, abs=0.051)
    assert np.mean(predictions == ours.predictions.numpy()) > 0.9


def test_verdict_counts_speed_and_accuracy() -> None:
    base: dict[str, Any] = {"op": "probe", "error": None, "ratio": 1.0, "top1": [0.80]}
    rival = {**base, "impl": RIVAL}

    def said(ratio: float, top1: float) -> str:
        (words,) = probe_rounds.verdicts([rival, {**base, "impl": "grid", "ratio": ratio, "top1": [top1]}])
        return words

    assert ": met, " in said(5.1, 0.799)
    assert ": met, " in said(5.1, 0.801)
    ahead = said(9.0, 0.85)
    assert ": met in speed only, " in ahead
    assert "+5.00 points, more than 0.2 ahead: sklearn stopped early or chose worse" in ahead
    assert "missed" in said(4.9, 0.85)
    assert "missed" in said(4.9, 0.80)
    assert "missed" in said(50.0, 0.797)
    assert probe_rounds.verdicts([{**base, "impl": "grid"}]) == []


def test_made_features_are_neither_easy_nor_hopeless() -> None:
    made = probe_rounds.generate(10, 1000, 500, 64)
    assert bool((made.train >= 0).all())
    assert float(made.train.mean()) > 0.1
    (outcome,) = probes.run("logistic", made, seeds=(22,), device=torch.device("cpu"))
    assert 0.3 < float((outcome.predictions == made.test_labels).double().mean()) < 0.98


def test_refused(tmp_path: Path) -> None:
    save_file({"train": torch.zeros(2, 2)}, tmp_path / "odd.safetensors")
    with pytest.raises(FastrexError, match=r"must hold the tensors .*, got train"):
        probe_worker.read(str(tmp_path / "odd.safetensors"))
    with pytest.raises(FastrexError, match="training features must be finite"):
        probe_worker.read(str(saved(tmp_path, train=torch.full((60, 12), torch.nan))))
    runner = CliRunner()
    assert "whole numbers" in runner.invoke(main, ["probe", "--seeds", "a"]).output
    words = ["probe", "--features", str(tmp_path / "odd.safetensors"), "--device", "cpu"]
    result = runner.invoke(main, words)
    assert result.exit_code == 1
    assert "bench probe: --features must hold" in result.output
