"""Benchmarks of contrastive cross-entropy: the truth of large cases, the rival, and the cases themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import machine, measure, truth
from benchmarks.rivals import Absent, metric_learning
from fastrex_kernels.contrastive_ce import cases


class TestBenchmarks:
    """The rival and the truth of a large case give the loss that is measured."""

    SIZES = ({"views": 2, "rows": 30, "keys": 30}, {"rows": 30, "keys": 50, "frozen": True})

    @pytest.mark.parametrize("sizes", SIZES)
    def test_the_truth_by_blocks_of_rows(self, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        call = cases.make({**sizes, "dim": 8, "stats": False, "entries": 4}, torch.float32, "cpu", 0)
        whole = truth.truth(cases.OP, call, True)
        monkeypatch.setattr(truth, "STORED_BYTES", 1)
        monkeypatch.setattr(truth, "ROWS", 7)
        blocks = truth.truth(cases.OP, call, True)
        for name, value in whole.items():
            torch.testing.assert_close(blocks[name], value)

    @pytest.mark.parametrize("sizes", SIZES)
    def test_pytorch_metric_learning(self, sizes: dict[str, Any]) -> None:
        call = measure.requiring(cases.make({**sizes, "dim": 8, "stats": False}, torch.float32, "cpu", 0))
        if not machine.installed("pytorch_metric_learning"):
            pytest.skip("pytorch-metric-learning is not installed")
        theirs = measure.outcome(metric_learning.build(cases.OP, call), call, gradients=True)
        for name, value in truth.truth(cases.OP, call, True).items():
            torch.testing.assert_close(theirs[name].double(), value, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"share": 2}, "ids must be one per row"),
            ({"ignored": True}, "a mean over all rows"),
            ({"reduction": "sum"}, "a mean over all rows"),
        ],
    )
    def test_the_truth_by_blocks_says_what_it_has_not(
        self, sizes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(truth, "STORED_BYTES", 1)
        call = cases.make({"rows": 30, "keys": 30, "dim": 4, "stats": False, **sizes}, torch.float32, "cpu", 0)
        with pytest.raises(ValueError, match=f"contrastive_cross_entropy: .*{message}"):
            truth.truth(cases.OP, call, True)

    def test_a_rival_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "installed", lambda module: False)
        call = cases.make({**self.SIZES[0], "dim": 8, "stats": False}, torch.float32, "cpu", 0)
        with pytest.raises(Absent, match="pytorch-metric-learning is not installed"):
            metric_learning.build(cases.OP, call)

    def test_a_rival_names_what_it_has_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "installed", lambda module: True)
        for words, message in (
            ({"entries": 3}, "has no mixtures"),
            ({"hardness": 1.0}, "has no hardness=1.0"),
            ({"images": True}, "leaves out a row's own key, no other one"),
            ({"ignored": True}, "has no ignore_index"),
        ):
            call = cases.make({"rows": 9, "keys": 9, "dim": 4, "stats": False, **words}, torch.float32, "cpu", 0)
            with pytest.raises(Absent, match=message):
                metric_learning.build(cases.OP, call)


def test_every_case_says_why() -> None:
    for group in (cases.CASES, cases.NEAREST_CASES):
        names = [case.name for case in group]
        assert len(set(names)) == len(names)
        assert all(case.why for case in group)
