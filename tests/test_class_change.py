"""How far class weights and prototypes move in a step: by hand, as an outside observer sees it, resumed, over ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import launch
import pytest
import torch
import two_ranks
from conftest import ROOT, SETTINGS, settings_for
from torch import Tensor

from fastrex import checkpoint, objectives, trainer
from fastrex import config as c
from fastrex.data.dataset import open_dataset
from fastrex.data.loader import Batch
from fastrex.distributed import World
from fastrex.objectives import base
from fastrex.step import Trainer

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
WEIGHTS = {"cosine_softmax": "head.weight", "softmax": "linear.weight"}
NAMES = ("class_means", *WEIGHTS)


def configuration(objective: str, data: object, *more: str) -> c.Config:
    known = [s for s in settings_for(objective) if objective != "softmax" or "temperature" not in s]
    return objectives.resolve(c.load("demo", [*known, f"data.path={json.dumps(str(data))}", *more]))


def change(before: list[list[float]], after: list[list[float]]) -> float:
    """The definition, in plain loops."""

    def unit(row: list[float]) -> list[float]:
        norm = math.sqrt(sum(v * v for v in row))
        return [v / norm for v in row] if norm else row

    moved = [math.dist(unit(old), unit(new)) for old, new in zip(before, after, strict=True)]
    return sum(moved) / len(moved)


def vectors(state: dict[str, Tensor], objective: str, classes: int) -> list[list[float]]:
    """Class vectors as a checkpoint has them: the weights, or what the entries of the bank add up to."""
    if objective in WEIGHTS:
        rows: list[list[float]] = state[WEIGHTS[objective]].tolist()
        return rows
    features, labels = state["means.features"].double(), state["means.labels"]
    return [features[labels == number].sum(0).tolist() for number in range(classes)]


def make(name: str, classes: int, features: int, **options: Any) -> objectives.Objective:
    kind = objectives.lookup(name)
    return kind(features, classes, kind.Options(**options), seed=0)


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_weights_by_hand(name: str) -> None:
    objective = make(name, 4, 2)
    weight = objective.get_parameter(WEIGHTS[name])
    with torch.no_grad():
        weight.copy_(torch.tensor([[3.0, 0], [0, 2], [1, 1], [0, 0]]))
    before = objective.class_directions()
    with torch.no_grad():
        weight.copy_(torch.tensor([[0.0, 5], [0, 1], [-2, -2], [7, 0]]))
    # A quarter turn, none (the length does not count), half a turn, and out of nothing.
    got = objective.class_change(before)
    assert got.keys() == {"class_change"}
    assert got["class_change"].shape == ()
    assert not got["class_change"].requires_grad
    assert float(got["class_change"]) == pytest.approx((math.sqrt(2) + 0 + 2 + 1) / 4)
    assert float(objective.class_change(objective.class_directions())["class_change"]) == 0


def test_prototypes_by_hand() -> None:
    objective = make("class_means", 3, 2, bank_size=4)
    state = objective.state_dict()
    state["means.features"].copy_(torch.tensor([[2.0, 0], [0, 1], [0, 1], [0, 9]]))
    state["means.labels"].copy_(torch.tensor([0, 0, 1, 1]))
    before = objective.class_directions()
    # The two oldest entries fall out: class 0 loses all of its own, class 2 gets its first.
    objective.update_(torch.tensor([[3.0, 0], [5, 0]]), torch.tensor([2, 1]))
    one = math.dist((0, 1), (5 / math.hypot(5, 10), 10 / math.hypot(5, 10)))
    assert float(objective.class_change(before)["class_change"]) == pytest.approx((1 + one + 1) / 3)
    before = objective.class_directions()
    objective.update_(torch.full((2, 2), math.nan), torch.tensor([0, 1]), keep=torch.tensor(False))
    assert float(objective.class_change(before)["class_change"]) == 0


def test_nothing_is_logged_where_it_would_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "CHANGE_UP_TO", 4 * 16)
    assert make("cosine_softmax", 4, 16).class_directions() is not None
    large = make("cosine_softmax", 5, 16)
    assert large.class_directions() is None
    assert large.class_change(None) == {}
    config = configuration("class_means", "synthetic")
    data = open_dataset(config, ALONE)
    with data.batches(0, 1, ALONE) as loader:
        (batch,) = loader
    for limit, there in ((len(data.classes) * 16, True), (len(data.classes) * 16 - 1, False)):
        monkeypatch.setattr(base, "CHANGE_UP_TO", limit)
        assert ("class_change" in Trainer(config, len(data.classes), ALONE).step(0, [batch], 0.1)) is there


@pytest.mark.parametrize("objective", NAMES)
@pytest.mark.parametrize("more", [(), ("optim.accumulate=2", "optim.precision=bf16")], ids=["plain", "accumulated"])
def test_a_step_logs_what_an_observer_of_its_state_sees(objective: str, more: tuple[str, ...]) -> None:
    config = configuration(objective, "synthetic", *more)
    data = open_dataset(config, ALONE)
    run = Trainer(config, len(data.classes), ALONE)
    micros: list[Batch] = []
    seen = []
    with data.batches(0, 4, ALONE) as loader:
        for batch in loader:
            micros.append(batch)
            if batch.last_micro:
                before = vectors(run.objective.state_dict(), objective, len(data.classes))
                logged = float(run.step(batch.step, micros, 0.1)["class_change"])
                after = vectors(run.objective.state_dict(), objective, len(data.classes))
                assert logged == pytest.approx(change(before, after), rel=2e-5, abs=1e-6)
                seen.append(logged)
                micros = []
    assert len(seen) == 4
    assert min(seen) > 1e-5


@pytest.mark.parametrize("objective", ["class_means", "cosine_softmax"])
def test_a_step_that_is_left_out_moves_nothing(objective: str) -> None:
    config = configuration(objective, "synthetic")
    data = open_dataset(config, ALONE)
    run = Trainer(config, len(data.classes), ALONE)
    with data.batches(0, 1, ALONE) as loader:
        (batch,) = loader
    spoilt = Batch(**{**vars(batch), "crops": tuple(crop * math.nan for crop in batch.crops)})
    assert float(run.step(0, [spoilt], 0.1)["class_change"]) == 0


def logged(run: Path) -> dict[int, float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["train/class_change"] for record in records if "train/loss" in record}


@pytest.mark.parametrize("objective", ["class_means", "cosine_softmax"])
def test_the_log_of_a_run_agrees_with_its_checkpoints_and_a_resumed_run_repeats_it(
    stripes: Path, tmp_path: Path, objective: str
) -> None:
    config = configuration(objective, stripes, "checkpoint.every_steps=1", "checkpoint.keep_last=9")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trainer.train(config, out=whole, max_steps=4, device="cpu")
    trainer.train(config, out=cut, max_steps=2, device="cpu")
    trainer.train(None, out=cut, resume="must", max_steps=4, device="cpu")
    values = logged(whole)
    assert list(values) == [1, 2, 3, 4]
    assert logged(cut) == values
    states = {step: checkpoint.load(checkpoint.folder(whole, step))[0]["bank"] for step in values}
    for step in (2, 3, 4):
        seen = change(*(vectors(states[number], objective, 4) for number in (step - 1, step)))
        assert values[step] == pytest.approx(seen, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, SETTINGS),
        # 4 classes on 3 ranks: blocks of 2, 1 and 1, whose means are not the mean.
        (3, [*settings_for("cosine_softmax"), "objective.sharded=true"]),
    ],
    ids=["class_means", "sharded"],
)
def test_ranks_log_what_one_process_logs(stripes: Path, tmp_path: Path, ranks: int, settings: list[str]) -> None:
    words = [*settings, "optim.batch_size=12", "optim.lr=0.1", f"data.path={json.dumps(str(stripes))}"]
    one, several = tmp_path / "one", tmp_path / "several"
    one.mkdir()
    several.mkdir()
    try:
        two_ranks.main(one, "float64", 3, words, 0.0, None)
    finally:
        torch.set_default_dtype(torch.float32)
    program = [str(ROOT / "tests" / "two_ranks.py"), str(several), "float64", "3", "0.0", *words]
    with launch.ranks(several / "log", ranks, program) as job:
        assert job.wait(120) == [0] * ranks, job.output
    changes = json.loads((one / "rank0.json").read_text(encoding="utf-8"))["changes"]
    assert len(changes) == 3
    assert min(changes) > 1e-4
    for rank in range(ranks):
        log = json.loads((several / f"rank{rank}.json").read_text(encoding="utf-8"))
        assert log["changes"] == pytest.approx(changes, rel=1e-6)
