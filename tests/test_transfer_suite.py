"""The command ``fastrex transfer``: real runs, real checkpoints of other people, real processes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import launch
import layouts_of_sets
import numpy as np
import pytest
import safetensors.torch
import torch
from command import Outcome, fastrex
from conftest import SETTINGS, write_stripes
from PIL import Image
from torchvision_shim import import_timm

from fastrex import config as config_module
from fastrex.config import ModelConfig
from fastrex.errors import FastrexError
from fastrex.export import load_encoder
from fastrex.model.resnet import ResNet, build_encoder
from fastrex.transfer import folder, probes, results


@pytest.fixture(scope="module")
def trained(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs."""
    run = tmp_path_factory.mktemp("trained") / "run"
    done = fastrex("train", "trex", *SETTINGS[:-4], *SETTINGS[-3:], "optim.epochs=2", "--data", stripes, "--out", run)
    assert done.code == 0, done.err
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


def transfer(source: Path, *words: str | Path, cache: Path, seeds: str = "22,37") -> Outcome:
    return fastrex("transfer", source, *words, "--cache", cache, "--seeds", seeds, "--threads", "1")


def result(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = results.read(out / results.FILE)
    return found


def found_files(run: Path) -> set[str]:
    return {path.name for path in (run / "transfer").iterdir()}


def test_a_run_gets_its_tables(run: Path, stripes: Path, cache: Path) -> None:
    done = transfer(run, "--sets", f"mine={stripes}", "--shots", "1,4", cache=cache)
    assert done.code == 0, done.err
    assert found_files(run) == {"transfer.json", "transfer.md", "transfer.html"}
    found = result(run / "transfer")
    assert found["encoder"]["features"] == load_encoder(run).num_features
    assert found["transform"]["size"] == found["transform"]["resize"] == 32
    assert [(s["name"], s["shots"], s["headline"]) for s in found["sets"]] == [
        ("mine", None, "logistic"),
        ("mine", 1, "logistic"),
        ("mine", 4, "logistic"),
    ]
    for entry in found["sets"]:
        assert entry["probes"].keys() == {"logistic", "knn", "ncm"}
        assert (entry["classes"], entry["train"], entry["test"], entry["left_out"]) == (4, 64, 16, 0)
        for probe in entry["probes"].values():
            assert len(probe["top1"]["seeds"]) == len(probe["chosen"]) == 2
            assert probe["top1"]["low"] <= probe["top1"]["mean"] <= probe["top1"]["high"]
            assert sum(probe["right"]) == 16
    assert found["sets"][0]["probes"]["ncm"]["top1"]["mean"] > 0.5
    assert found["means"].keys() == {"all", "all@1", "all@4"}
    assert found["means"]["all"]["sets"] == ["mine"]
    markdown = (run / "transfer" / "transfer.md").read_text()
    assert "| mine, 4 shots | " in markdown
    assert "| Logistic | 4 | 64 | 16 |" in markdown
    assert "mine, 4 shots" in done.out
    page = (run / "transfer" / "transfer.html").read_text()
    assert "default-src 'none'" in page
    assert "<script" not in page


def test_what_is_there_is_not_done_again_and_more_is_added(
    run: Path, stripes: Path, tmp_path: Path, cache: Path
) -> None:
    write_stripes(tmp_path / "own" / "train", 6, seed=3)
    write_stripes(tmp_path / "own" / "test", 3, seed=4)
    first = transfer(run, "--sets", f"mine={stripes}", "--probes", "knn", cache=cache)
    assert first.code == 0, first.err
    before = result(run / "transfer")["sets"][0]
    assert before["headline"] == "knn"
    again = transfer(run, "--sets", f"mine={stripes}", "--probes", "knn", cache=cache)
    assert again.code == 0
    assert "mine: its result is already in" in again.out
    assert "knn" not in again.out.split("Transfer of")[0]
    assert result(run / "transfer")["sets"] == [before]
    more = transfer(run, "--sets", f"mine={stripes},own={tmp_path / 'own'}", "--probes", "ncm", cache=cache)
    assert more.code == 0
    sets = result(run / "transfer")["sets"]
    assert [(s["name"], sorted(s["probes"])) for s in sets] == [("mine", ["knn", "ncm"]), ("own", ["ncm"])]
    assert sets[0]["probes"]["knn"] == before["probes"]["knn"]
    # Other images under the same name: computed anew.
    write_stripes(tmp_path / "others" / "train", 8, seed=5)
    others = transfer(run, "--sets", f"mine={tmp_path / 'others'}", "--probes", "ncm", cache=cache)
    assert others.code == 0
    changed = result(run / "transfer")["sets"][0]
    assert (changed["name"], sorted(changed["probes"])) == ("mine", ["ncm"])
    assert changed["fingerprint"] != before["fingerprint"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--seeds", "1"], "the --seeds [22, 37], asked for is [1]"),
        (["--protocol", "paper"], "the --protocol grid, asked for is paper"),
        (["--size", "48"], "the transform "),
    ],
)
def test_results_that_were_measured_in_another_way_are_not_mixed(
    run: Path, stripes: Path, cache: Path, words: list[str], reason: str
) -> None:
    assert transfer(run, "--sets", f"mine={stripes}", "--probes", "ncm", cache=cache).code == 0
    before = (run / "transfer" / "transfer.json").read_bytes()
    done = fastrex("transfer", run, "--sets", f"mine={stripes}", "--seeds", "22,37", "--cache", cache, *words)
    assert done.code == 1
    assert reason in done.line
    assert "choose another --out" in done.line
    assert (run / "transfer" / "transfer.json").read_bytes() == before


def test_an_interrupted_suite_goes_on(trained: Path, stripes: Path, tmp_path: Path, cache: Path) -> None:
    """Killed while the second set is probed: the first one's result is on the disk and stays as it is."""
    program = (
        "import sys, time\n"
        "from fastrex.transfer import probes\n"
        "from fastrex.cli import main\n"
        "plain, calls = probes.run, []\n"
        "def run(*arguments, **more):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 1: print('WAITING', flush=True); time.sleep(600)\n"
        "    return plain(*arguments, **more)\n"
        "probes.run = run\n"
        "main()\n"
    )
    write_stripes(tmp_path / "own" / "train", 6, seed=3)
    out = tmp_path / "out"
    sets = f"mine={stripes},own={tmp_path / 'own'}"
    words = ["transfer", str(trained), "--sets", sets, "--probes", "ncm", "--cache", str(cache), "--out", str(out)]
    words += ["--seeds", "22,37", "--threads", "1"]
    with launch.one(tmp_path / "log", ["-c", program, *words]) as job:
        job.until(lambda: "WAITING" in job.output)
        job.kill()
    before = result(out)
    assert [entry["name"] for entry in before["sets"]] == ["mine"]
    assert not (out / "transfer.md").exists()
    done = fastrex(*words)
    assert done.code == 0, done.err
    assert "mine: its result is already in" in done.out
    after = result(out)
    assert [entry["name"] for entry in after["sets"]] == ["mine", "own"]
    assert after["sets"][0] == before["sets"][0]


def test_sets_that_are_missing_or_wrong_do_not_stop_the_others(
    run: Path, stripes: Path, tmp_path: Path, cache: Path
) -> None:
    root = tmp_path / "sets"
    (root / "aircraft" / "something").mkdir(parents=True)
    few = tmp_path / "few"
    write_stripes(few / "train", 2, seed=0)
    write_stripes(few / "val", 1, seed=1)
    sets = f"pets,aircraft,few={few},mine={stripes}"
    words = ["--sets", sets, "--root", str(root), "--probes", "ncm", "--shots", "3"]
    done = transfer(run, *words, cache=cache)
    assert done.code == 1
    found = result(run / "transfer")
    # Of the small set, what can be measured is.
    assert [(s["name"], s["shots"]) for s in found["sets"]] == [("few", None), ("mine", None), ("mine", 3)]
    skipped = {entry["name"]: entry for entry in found["skipped"]}
    assert skipped.keys() == {"pets", "aircraft", "few"}
    assert "Oxford-IIIT Pet" in skipped["pets"]["get"]
    assert "variants.txt" in skipped["aircraft"]["reason"]
    assert "3" in skipped["few"]["reason"]
    lines = done.out.split("\n")
    assert [line for line in lines if line.startswith("skipped: pets must be there")]
    assert len([line for line in lines if line.startswith("error: ")]) == 2
    (root / "aircraft" / "something").rmdir()
    shutil.rmtree(few)
    # What is only missing is no error.
    fine = transfer(run, "--sets", f"pets,mine={stripes}", "--root", root, "--probes", "ncm", cache=cache)
    assert fine.code == 0


def test_large_official_sets_are_probed_by_sgd(trained: Path, tmp_path: Path, cache: Path) -> None:
    layouts_of_sets.cog(tmp_path / "cog")
    sets = ["--sets", "cog-l5,cog-l1", "--root", str(tmp_path), "--out", str(tmp_path / "out")]
    done = transfer(trained, *sets, cache=cache, seeds="22")
    assert done.code == 0, done.out
    found = result(tmp_path / "out")
    assert [(s["name"], s["official"], s["headline"]) for s in found["sets"]] == [
        ("cog-l1", True, "sgd"),
        ("cog-l5", True, "sgd"),
    ]
    for entry in found["sets"]:
        assert any("so that the results cannot be compared" in notice for notice in entry["notices"])
    assert "CoG L1 †" in done.out
    assert "CoG L1 (3 instead of 1,000 classes, 6 instead of 1,118,804 training" in " ".join(done.out.split())
    assert found["means"]["13"]["sets"] == ["cog-l1", "cog-l5"]
    assert not found["means"]["13"]["complete"]
    assert "Mean of the 13: only 2" in done.out
    assert "published are 1000, 1118804 and 50000, so that the results cannot be compared" in done.out


def test_two_ranks_read_the_pickles_once(trained: Path, tmp_path: Path, cache: Path) -> None:
    """The second takes the index that the first has stored."""
    layouts_of_sets.cog(tmp_path / "cog")
    program = (
        "from fastrex import foreign\n"
        "real = foreign.read_words\n"
        "def read(path):\n"
        "    print('READ', path.name, flush=True)\n"
        "    return real(path)\n"
        "foreign.read_words = read\n"
        "from fastrex.cli import main\n"
        "main()\n"
    )
    words = ["transfer", str(trained), "--sets", "cog-l2,cog-l4", "--root", str(tmp_path), "--probes", "ncm"]
    words += ["--cache", str(cache), "--out", str(tmp_path / "out"), "--seeds", "22", "--threads", "1"]
    own = str(tmp_path / "indexes")
    with launch.ranks(tmp_path / "log", 2, ["-c", program, *words], FASTREX_CACHE=own) as job:
        assert job.wait() == [0, 0], job.output
    assert [entry["name"] for entry in result(tmp_path / "out")["sets"]] == ["cog-l2", "cog-l4"]
    assert job.output.count("READ cog_concepts_split_file.pkl") == 2


def test_no_set_at_all_is_an_error(run: Path, tmp_path: Path, cache: Path) -> None:
    done = transfer(run, "--sets", "pets,dtd", "--root", tmp_path, cache=cache)
    assert done.code == 1
    assert "transfer: no set gave a result: pets must be there" in done.line
    assert not (run / "transfer").exists()


def test_weights_that_are_not_finite_name_the_image(trained: Path, stripes: Path, tmp_path: Path, cache: Path) -> None:
    state = load_encoder(trained).state_dict()
    state["layer3.0.bn1.weight"].fill_(float("nan"))
    safetensors.torch.save_file(
        {name: value.contiguous() for name, value in state.items()}, tmp_path / "nan.safetensors"
    )
    words = ["--sets", f"mine={stripes}", "--size", "32", "--out", str(tmp_path / "out")]
    done = transfer(tmp_path / "nan.safetensors", *words, cache=cache)
    assert done.code == 1
    assert "finite features, got others for 'train/class-0/00.jpg' of mine, training images and 63 more" in done.line


def test_encoders_side_by_side(run: Path, stripes: Path, tmp_path: Path, cache: Path) -> None:
    model = ModelConfig(arch="resnet18", stem="small", width=4)
    torch.manual_seed(1)
    torch.save(build_encoder(model, 3).state_dict(), tmp_path / "random.pth")
    sets = f"mine={stripes}"
    assert transfer(run, "--sets", sets, "--probes", "ncm", cache=cache).code == 0
    words = ["--sets", sets, "--size", "32", "--probes", "ncm", "--out", str(tmp_path / "random")]
    done = transfer(tmp_path / "random.pth", *words, "--compare", run, cache=cache)
    assert done.code == 0, done.err
    markdown = (tmp_path / "random" / "transfer.md").read_text().split("## Comparison")[1]
    assert str(run) in markdown.replace("\\", "")
    assert "random.pth" in markdown
    assert markdown.count("**") == 4  # the best of the set, and of the mean
    assert "<b>" in (tmp_path / "random" / "transfer.html").read_text()
    missing = transfer(run, "--sets", sets, "--compare", tmp_path / "nowhere", cache=cache)
    assert missing.code == 1
    assert "must be a result of fastrex transfer (No such file or directory)" in missing.line


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["--sets", "aircaft", "--root", "."], 2, "did you mean aircraft?"),
        (["--sets", "aircraft"], 2, "--root"),
        (["--sets", "mine=x", "--probes", "svm"], 2, "--probes must be some of logistic, sgd, knn, ncm, got 'svm'"),
        (["--sets", "mine=x", "--shots", "0"], 2, "--shots must be numbers of images per class of at least 1"),
        (["--sets", "mine=x", "--seeds", "1,1"], 2, "--seeds must be whole numbers"),
        (["--sets", "mine=x", "--out", "FILE"], 1, "--out must be a folder, got the file"),
        (["--sets", "mine=x", "--out", "FILE/inside"], 1, "--out must be a folder, got the file"),
        (["--sets", "mine=x", "--out", "FULL"], 1, "must be new or hold the result of it, got 'notes.txt' in it"),
        (["--sets", "mine=x", "--out", "OTHER"], 1, "must be a result of fastrex transfer"),
    ],
)
def test_words_that_make_no_sense(run: Path, tmp_path: Path, words: list[str], code: int, reason: str) -> None:
    (tmp_path / "FILE").write_text("")
    for name, file in (("FULL", "notes.txt"), ("OTHER", "transfer.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    named = [str(tmp_path / word) if word.isupper() or word.startswith("FILE/") else word for word in words]
    done = fastrex("transfer", run, *named)
    assert done.code == code
    assert reason in done.line


def test_without_optuna_nothing_is_begun(run: Path, stripes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = fastrex("transfer", run, "--sets", f"mine={stripes}", "--protocol", "paper")
    assert done.code == 1
    assert "needs Optuna, which is not installed; pip install" in done.line
    assert not (run / "transfer").exists()


def test_a_size_that_the_encoder_does_not_take(tmp_path: Path, stripes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_timm()
    net = build_encoder(ModelConfig(arch="timm:test_vit"), 3).eval()
    folder = tmp_path / "export"
    folder.mkdir()
    safetensors.torch.save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"fastrex": {"arch": "timm:test_vit"}}))
    monkeypatch.chdir(tmp_path)
    done = fastrex("transfer", folder, "--sets", f"mine={stripes}", "--size", "40")
    assert done.code == 1
    assert "must take images of 40 px, it does not" in done.line
    assert "choose another --size" in done.line


def official(path: Path) -> Path:
    """A file as the t-ReX authors release them: a ResNet-50, its momentum copy, projector and memory, arguments."""
    torch.manual_seed(0)
    state = ResNet("resnet50").state_dict()
    model: OrderedDict[str, Any] = OrderedDict()
    for name in ("model", "model_ema"):
        model |= {f"module.{name}.encoder.{key}": value for key, value in state.items()}
        model[f"module.{name}.projector.0.weight"] = torch.randn(256, 2048)
    model["module.memory.features"] = torch.randn(8192, 256)
    content = {
        "model": model,
        "epoch": 99,
        "fp16_scaler": {"scale": 65536.0},
        "args": argparse.Namespace(arch="resnet50", crops=(0.25, 1.0)),
        "best": np.float64(0.78),
    }
    torch.save(content, path)
    return path


def test_an_official_checkpoint(tmp_path: Path, stripes: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = official(tmp_path / "trex.pth")
    done = transfer(source, "--sets", f"mine={stripes}", "--size", "64", "--probes", "knn,ncm", cache=cache)
    assert done.code == 0, done.err
    found = result(tmp_path / "transfer-trex")
    assert found["encoder"]["arch"] == "resnet50"
    assert found["encoder"]["features"] == 2048
    assert found["transform"] == {
        "resize": 64,
        "size": 64,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "channels": 3,
        "interpolation": "bicubic",
    }
    assert found["sets"][0]["headline"] == "knn"


def test_an_export_and_an_encoder_of_grey_images(tmp_path: Path, stripes: Path, cache: Path) -> None:
    grey = tmp_path / "grey"
    for path in sorted(stripes.rglob("*.jpg")):
        target = grey / path.relative_to(stripes)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("L").save(target)
    model = ModelConfig(arch="resnet18", stem="small", width=4)
    torch.manual_seed(0)
    torch.save(build_encoder(model, 1).state_dict(), tmp_path / "grey.pth")
    out = tmp_path / "exported"
    assert fastrex("export", tmp_path / "grey.pth", out, "--to", "hf").code == 0
    words = ["--sets", f"mine={grey}", "--size", "32", "--probes", "ncm"]
    for source, name in ((tmp_path / "grey.pth", "a"), (out, "b")):
        done = transfer(source, *words, "--out", tmp_path / name, cache=cache)
        assert done.code == 0, done.err
    one, two = result(tmp_path / "a"), result(tmp_path / "b")
    assert one["transform"]["channels"] == 1
    assert one["encoder"]["identity"] == two["encoder"]["identity"]
    right = [found["sets"][0]["probes"]["ncm"]["right"] for found in (one, two)]
    assert right[0] == right[1]


def test_a_timm_encoder(tmp_path: Path, stripes: Path, cache: Path) -> None:
    import_timm()
    config = config_module.load("trex", ["model.arch=timm:test_vit"])
    net = build_encoder(config.model, 3).eval()
    folder = tmp_path / "vit"
    folder.mkdir()
    safetensors.torch.save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"fastrex": {"arch": "timm:test_vit"}}))
    done = transfer(
        folder, "--sets", f"mine={stripes}", "--size", "160", "--probes", "ncm", "--out", tmp_path / "o", cache=cache
    )
    assert done.code == 0, done.err
    assert result(tmp_path / "o")["encoder"]["arch"] == "timm:test_vit"


def test_two_transfers_into_one_folder_lose_nothing(run: Path, stripes: Path, tmp_path: Path, cache: Path) -> None:
    """The second one begins after the first has read what is there, and ends before it writes."""
    program = (
        "import sys, time, pathlib\n"
        "from fastrex.transfer import probes\n"
        "from fastrex.cli import main\n"
        "plain, go = probes.run, pathlib.Path(sys.argv.pop(1))\n"
        "def run(*arguments, **more):\n"
        "    print('WAITING', flush=True)\n"
        "    while not go.exists(): time.sleep(0.05)\n"
        "    return plain(*arguments, **more)\n"
        "probes.run = run\n"
        "main()\n"
    )
    write_stripes(tmp_path / "own" / "train", 6, seed=3)
    go = tmp_path / "go"
    words = ["--probes", "ncm", "--cache", str(cache), "--seeds", "22,37", "--threads", "1"]
    first = ["transfer", str(run), "--sets", f"mine={stripes}", *words]
    with launch.one(tmp_path / "log", ["-c", program, str(go), *first]) as job:
        job.until(lambda: "WAITING" in job.output)
        second = fastrex("transfer", run, "--sets", f"own={tmp_path / 'own'},none={tmp_path / 'none'}", *words)
        assert second.code == 0, second.err
        go.touch()
        assert job.wait() == [0], job.output
    found = result(run / "transfer")
    assert [entry["name"] for entry in found["sets"]] == ["own", "mine"]
    assert found["means"]["all"]["sets"] == ["own", "mine"]
    assert [entry["name"] for entry in found["skipped"]] == ["none"]
    assert found_files(run) == {"transfer.json", "transfer.md", "transfer.html"}


def test_the_lock_names_who_has_it(tmp_path: Path) -> None:
    with folder.locked("transfer", tmp_path):
        own = (tmp_path / folder.LOCK).read_text()
        owner = rf"another process \(process {os.getpid()} on .*keeps it; end that one"
        with pytest.raises(FastrexError, match=owner), folder.locked("transfer", tmp_path, wait_s=0.1):
            raise AssertionError
        assert (tmp_path / folder.LOCK).read_text() == own
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError), folder.locked("transfer", tmp_path):
        raise FileNotFoundError


def test_one_probe_that_fails_costs_no_other(
    run: Path, stripes: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = probes.run

    def short(probe: str, data: Any, **more: Any) -> Any:
        if probe == "logistic":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if probe == "knn" and more["shots"]:
            raise np.linalg.LinAlgError("singular")
        if probe == "ncm" and more["shots"]:
            raise MemoryError
        return plain(probe, data, **more)

    monkeypatch.setattr(probes, "run", short)
    write_stripes(tmp_path / "own" / "train", 6, seed=3)
    sets = f"mine={stripes},own={tmp_path / 'own'}"
    done = transfer(run, "--sets", sets, "--shots", "2", cache=cache)
    assert done.code == 1
    found = result(run / "transfer")
    assert [(s["name"], s["shots"], sorted(s["probes"])) for s in found["sets"]] == [
        ("mine", None, ["knn", "ncm"]),
        ("own", None, ["knn", "ncm"]),
    ]
    failed = {(e["name"], e["shots"], *e["probes"]): e["reason"] for e in found["skipped"]}
    assert len(failed) == 2 * 4
    assert "GPU's memory" in failed["own", None, "logistic"]
    assert "singular" in failed["mine", 2, "knn"]
    assert "fit into memory" in failed["mine", 2, "ncm"]
    assert "| mine, 2 shots, k-NN |" in (run / "transfer" / "transfer.md").read_text()
    assert len([line for line in done.out.split("\n") if line.startswith("error: ")]) == 8
    # What is missing is computed, what is there stays.
    monkeypatch.setattr(probes, "run", plain)
    again = transfer(run, "--sets", sets, "--shots", "2", cache=cache)
    assert again.code == 0, again.err
    more = result(run / "transfer")
    assert more["skipped"] == []
    assert {entry["headline"] for entry in more["sets"]} == {"logistic"}
    assert more["sets"][0]["probes"]["knn"] == found["sets"][0]["probes"]["knn"]


def test_a_probe_without_validation_runs_where_classes_are_small(run: Path, tmp_path: Path, cache: Path) -> None:
    write_stripes(tmp_path / "few" / "train", 1, seed=0)
    write_stripes(tmp_path / "few" / "val", 2, seed=1)
    done = transfer(run, "--sets", f"few={tmp_path / 'few'}", cache=cache)
    assert done.code == 1
    found = result(run / "transfer")
    assert sorted(found["sets"][0]["probes"]) == ["knn", "ncm"]
    assert [(e["name"], e["probes"]) for e in found["skipped"]] == [("few", ["logistic"])]
    assert "error: few, logistic: " in done.out


def test_stored_results_are_of_the_bytes_of_the_images(run: Path, stripes: Path, tmp_path: Path, cache: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(stripes, data)
    for path in sorted(data.rglob("*.jpg")):
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    words = ["--sets", f"mine={data}", "--probes", "ncm", "--size", "32"]
    assert transfer(run, *words, cache=cache).code == 0
    before = result(run / "transfer")["sets"][0]
    data.rename(tmp_path / "moved")
    moved = ["--sets", f"mine={tmp_path / 'moved'}", *words[2:]]
    first = next((tmp_path / "moved").rglob("*.bmp"))
    first.touch()
    done = transfer(run, *moved, cache=cache)
    assert "mine: its result is already in" in done.out
    assert result(run / "transfer")["sets"][0] == before
    with Image.open(first) as image:
        size = image.size
    Image.new("RGB", size).save(first)
    done = transfer(run, *moved, cache=cache)
    assert done.code == 0
    assert "its images are not those of the stored result" in done.out
    after = result(run / "transfer")["sets"][0]
    assert after["fingerprint"] == before["fingerprint"]
    assert after["images"] != before["images"]


def test_images_that_are_left_out_are_in_the_tables(run: Path, stripes: Path, tmp_path: Path, cache: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(stripes, data)
    for path in sorted((data / "val" / "class-1").iterdir()):
        path.write_bytes(path.read_bytes()[:-200])
    done = transfer(run, "--sets", f"mine={data}", "--probes", "ncm", "--no-cache", cache=cache)
    assert done.code == 2  # with --cache
    done = fastrex("transfer", run, "--sets", f"mine={data}", "--probes", "ncm", "--no-cache", "--threads", "1")
    assert done.code == 0, done.err
    entry = result(run / "transfer")["sets"][0]
    assert (entry["left_out"], entry["untested"], entry["as_published"]) == (4, ["class-1"], False)
    assert "left out: 4 of mine, so that class-1 have no test image." in (run / "transfer" / "transfer.md").read_text()


def test_a_run_that_has_trained_on_says_what_to_remove(run: Path, stripes: Path, cache: Path) -> None:
    words = ["--sets", f"mine={stripes}", "--probes", "ncm"]
    assert transfer(run, *words, cache=cache).code == 0
    path = run / "transfer" / "transfer.json"
    held = json.loads(path.read_text())
    held["encoder"]["identity"] = "00" * 32
    path.write_text(json.dumps(held))
    done = transfer(run, *words, cache=cache)
    assert done.code == 1
    assert "holds results with the encoder 000000000000, asked for is" in done.line
    assert f"remove {path}" in done.line
    assert "or choose another --out" in done.line


def test_a_lone_failure_is_told_once(run: Path, tmp_path: Path, cache: Path) -> None:
    done = transfer(run, "--sets", f"mine={tmp_path / 'none'}", cache=cache)
    assert done.code == 1
    assert (done.out + done.err).count("must be there") == 1
    assert "mine: mine" not in done.err
