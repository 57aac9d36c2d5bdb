"""The comparison of the objectives: equal budgets, arms that exist, one real run with a second stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment
from test_tradeoff import run, write_archives

from benchmarks import experiment_data, experiment_report
from benchmarks.experiment import SIZES, Arm
from benchmarks.experiment_run import Work, conduct
from benchmarks.family import FAMILY
from benchmarks.tradeoff import TRADEOFF
from fastrex import config as c
from fastrex import objectives
from fastrex.errors import FastrexError


def work(arm: str, size: str = "laptop", seed: int = 0) -> Work:
    return Work(FAMILY, {}, Path("out"), SIZES[size], FAMILY.arm(arm), seed, "cpu")


def test_every_arm_is_a_configuration_of_an_objective_of_its_own() -> None:
    configs = {arm.name: objectives.resolve(c.load(FAMILY.recipe, arm.settings)) for arm in FAMILY.arms}
    assert {config.objective.name for config in configs.values()} == {kind.name for kind in objectives.OBJECTIVES}
    compared = {name: arm for name, arm in configs.items() if not FAMILY.arm(name).start and name != "pretrained"}
    assert len({c.to_toml(config) for config in compared.values()}) == len(compared)
    # What is not the objective's: the network that is kept, the images, the schedule.
    base = c.load(FAMILY.recipe)
    for name, config in compared.items():
        assert config.model == base.model, name
        assert config.optim == base.optim, name


def test_a_second_stage_has_the_same_rival() -> None:
    tuned, schane = (
        objectives.resolve(c.load(FAMILY.recipe, FAMILY.arm(name).settings)) for name in ("tuned", "schane")
    )
    assert {line.partition(":")[0].partition(".")[0] for line in c.diff(tuned, schane)} == {"objective"}


MULTI, TWO = {"data.local_crops"}, {"data.global_crops", "data.local_crops"}
HEAD = {"projector.input_norm", "projector.activation", "projector.batch_norm"}
# What a step compares, by section and key; "objective" where it is another one, whose options are its own.
DIFFERENCES: dict[tuple[str, str], set[str]] = {
    ("softmax_mc", "softmax"): MULTI,
    ("softmax_two", "softmax"): {"data.global_crops"},
    ("regularized", "softmax"): {"data.repeats", "augment.mixup", "augment.cutmix", "objective.loss"},
    ("sl_mlp", "softmax_mc"): {"projector.enabled", "projector.activation", "projector.input_norm"},
    ("ncm", "softmax_mc"): {"objective"},
    ("cosine", "softmax_mc"): {"projector.enabled", "objective"},
    ("cosine_two", "cosine"): TWO,
    ("cosface", "cosine"): {"objective.margin"},
    ("ocm", "cosine"): {"objective"},
    ("ocm", "softmax_mc"): {"projector.enabled", "objective"},
    ("supcon", "softmax_two"): {"projector.enabled", *HEAD, "objective"},
    ("supcon_trex", "supcon"): HEAD,
    ("supcon_trex", "cosine_two"): {"objective"},
    ("supcon_queue", "supcon"): {"objective.queue_size"},
    ("look", "cosine"): {"objective"},
    ("moco", "softmax_two"): {"projector.enabled", *HEAD, "objective"},
    ("mochi", "moco"): {"objective"},
    ("tuned", "softmax"): {"optim.lr", "optim.warmup_epochs"},
    ("schane", "tuned"): {"objective"},
}


def test_the_arms_of_every_step_differ_in_what_it_names() -> None:
    """Where a setting of an arm changes, the words of its steps have to be looked at again."""
    configs = {arm.name: work(arm.name).config for arm in FAMILY.arms}

    def differences(new: str, old: str) -> set[str]:
        keys = {line.partition(":")[0] for line in c.diff(configs[old], configs[new])}
        if "objective.name" in keys:
            keys = {key for key in keys if not key.startswith("objective.")} | {"objective"}
        return keys - {"optim.epochs"}  # a second stage has those that are left

    assert {(new, old): differences(new, old) for _, new, old in FAMILY.steps} == DIFFERENCES


def test_steps_and_arms_name_the_crops_where_these_are_two() -> None:
    for arm in FAMILY.arms:
        assert (work(arm.name).config.data.global_crops == 2) == ("two crops" in arm.title), arm.name
    for words, new, old in FAMILY.steps:
        crops = [work(name).config.data.crops for name in (new, old)]
        assert crops[0] == crops[1] or "crops" in words, words


def test_every_step_compares_arms_that_there_are() -> None:
    shown = {arm.name for arm in FAMILY.shown()}
    assert {name for _, new, old in FAMILY.steps for name in (new, old)} == shown
    assert "pretrained" not in shown
    assert [arm.name for arm in FAMILY.shown(("moco", "softmax"))] == ["softmax", "moco"]


@pytest.mark.parametrize("size", SIZES)
def test_two_stages_have_the_epochs_of_one(size: str) -> None:
    for arm in FAMILY.shown():
        one = work(arm.name, size)
        assert one.epochs + (one.before.epochs if one.before else 0) == SIZES[size].epochs
        assert one.epochs >= 1
    assert work("schane", seed=2).before == work("pretrained", seed=2)
    assert (work("pretrained").epochs, work("schane").epochs) == (3, 2)


def test_a_second_stage_needs_an_epoch() -> None:
    short = replace(work("schane"), size=replace(SIZES["quick"], epochs=1))
    with pytest.raises(FastrexError, match="family: --epochs must leave schane an epoch after pretrained, got 1"):
        conduct([short], 1, probe=False)


def test_experiments_do_not_share_runs() -> None:
    arm = Arm("base", "Base", ())
    places = {Work(one, {}, Path("out"), SIZES["quick"], arm, 0, "cpu").run for one in (FAMILY, TRADEOFF)}
    assert len(places) == 2


def moco_runs(commit: str = "abc") -> list[dict[str, Any]]:
    return [
        run(name, s, 0.5 + s / 100, (0.1, 0.2, 0.3)) | {"commits": [commit if name == "mochi" else "abc"]}
        for name in ("moco", "mochi")
        for s in range(3)
    ]


def test_the_table_has_its_arms() -> None:
    found = experiment_report.content(FAMILY, moco_runs(), {"seeds": 3, "epochs": 5}, "command")
    assert [step["step"] for step in found["steps"]] == ["MoCHi's mixtures of hard negatives"]
    assert "does not clearly move accuracy on the task (+0.00 ± 0.00 points" in found["conclusion"][0]
    lines = experiment_report.table(found).splitlines()
    assert lines[0].endswith("| mean transfer log-odds |")
    assert [line.split(" | ")[0] for line in lines[2:4]] == [
        "| MoCo v2, no labels, two crops",
        "| MoCHi, no labels, two crops",
    ]
    assert lines[2].endswith("| 0.200 ± 0.000 |")
    assert all(note in found["notes"] for note in FAMILY.notes)
    assert (found["commits"], found["stages"]) == (["abc"], {})
    assert any("0.1 of the 2 intervals would still be expected to leave out 0" in note for note in found["notes"])
    assert not any("commits" in note for note in found["notes"])


def test_the_notes_name_stages_and_commits() -> None:
    runs = [*moco_runs("def"), *(run(name, s, 0.5, (0.1, 0.2, 0.3)) for name in ("tuned", "schane") for s in range(2))]
    found = experiment_report.content(FAMILY, runs, {"seeds": 3, "epochs": 2}, "command")
    assert found["stages"] == {"tuned": [1, 1], "schane": [1, 1]}
    assert "schane: 1 of the 2 epochs are those of pretrained, 1 its own." in found["notes"]
    assert "The trainings are of 2 commits: abc, def." in found["notes"]
    assert any("0.2 of the 4 intervals" in note for note in found["notes"])


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Work, Work]:
    """A first and a second stage as two trainings leave them, as far as the choice to train again looks at it."""
    first, second = (replace(work(name), out=tmp_path) for name in ("pretrained", "schane"))
    for number, one in enumerate((first, second)):
        (one.run / "export").mkdir(parents=True)
        # As the machine resolves them.
        seen = c.override(one.config, ["data.path=elsewhere", "optim.precision=bf16"])
        (one.run / "config.toml").write_text(c.to_toml(seen), encoding="utf-8")
        (one.run / "status.json").write_text('{"state": "completed"}', encoding="utf-8")
        for name in ("index.npz", "export/model.safetensors"):
            (one.run / name).touch()
            os.utime(one.run / name, (100 + number, 100 + number))
    return first, second


def test_a_run_is_kept_only_as_what_would_be_trained_now(
    trained: tuple[Work, Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Work, "_fastrex", lambda *_: pytest.fail("nothing is to be trained"))
    conduct(trained, 1, probe=False)
    second = trained[1]
    other = Arm("schane", "SCHaNe", (*second.arm.settings, "objective.weight=0.5"), start="pretrained")
    changed = replace(second, arm=other)
    words = (
        r"schane seed 0 must have been trained as it is .*, got objective\.weight: 0\.9 -> 0\.5; remove .*schane-seed0"
    )
    with pytest.raises(FastrexError, match=words):
        conduct([changed], 1, probe=False)
    with pytest.raises(FastrexError, match=words):
        changed.train({0})


def test_a_second_stage_is_not_kept_after_another_first_one(trained: tuple[Work, Work]) -> None:
    first, second = trained
    os.utime(first.run / "export" / "model.safetensors", (200, 200))
    with pytest.raises(
        FastrexError, match=r"schane seed 0 must have started from pretrained .* again since; remove .*"
    ):
        conduct([second], 1, probe=False)
    first.check()


def test_a_real_run(tmp_path: Path) -> None:
    """A contrastive objective, and a second stage with what it starts from."""
    words = [
        "--data",
        str(write_archives(tmp_path)),
        "--out",
        str(tmp_path / "work"),
        "--size",
        "quick",
        "--seeds",
        "1",
    ]
    words += ["--arm", "supcon", "--arm", "schane", "--device", "cpu", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "family", *words],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    assert done.stdout.count(": trained in") == 3
    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["arm"] for one in found["runs"]] == ["supcon", "schane"]
    assert [one["steps"] for one in found["runs"]] == [12, 12]
    assert all(set(one["sets"]) == set(experiment_data.SETS) for one in found["runs"])
    runs = tmp_path / "work" / "family" / "quick-2-epochs"
    log = (runs / "schane-seed0" / "train.log").read_text(encoding="utf-8")
    assert f"encoder starts from {runs / 'pretrained-seed0'}: resnet18 (stem small, width 8)" in log
    assert not (runs / "pretrained-seed0" / "transfer").exists()
    assert (tmp_path / "found.md").read_text().count("\n| ") == 3  # the heads, and a line for each arm
    assert (tmp_path / "found.png").stat().st_size > 5000
