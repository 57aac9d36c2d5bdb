"""The command line by hand: each command works, and every bad input is one clear line with the way out."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SETTINGS, write_stripes
from PIL import Image

from fastrex import cli, rundir

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """Run the command in this process; returns (exit code, stdout, stderr)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastrex", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def finished(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fastrex import config as c
    from fastrex import trainer

    out = tmp_path_factory.mktemp("cli") / "run with spaces é"
    config = c.load("demo", [*SETTINGS, f"data.path={json.dumps(str(stripes))}"])
    trainer.train(config, out=out, max_steps=4, device="cpu")
    return out


def one_line(err: str) -> str:
    assert "Traceback" not in err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("fastrex: error: ")
    return lines[0]


def test_help_of_every_command(main: Main) -> None:
    words = [[], ["train"], ["eval"], ["data"], ["data", "index"], ["data", "show"], ["data", "demo"], ["export"]]
    words += [["bench"], ["bench", "kernels"], ["bench", "curve"]]
    for command in [*words, ["config"], ["status"], ["env"]]:
        code, out, _ = main(*command, "--help")
        assert code == 0
        assert "Usage: fastrex" in out


def test_config_prints_every_field_with_help(main: Main) -> None:
    code, out, _ = main("config", "trex_star", "optim.batch_size=512")
    assert code == 0
    lines = [line for line in out.splitlines() if " = " in line]
    assert all(line.partition("#")[2].strip() for line in lines)
    assert any(line.startswith("batch_size = 512 ") for line in lines)
    assert any(line.startswith("bank_size = 8192 ") for line in lines)


def test_config_toml_is_a_recipe(main: Main, tmp_path: Path) -> None:
    _, out, _ = main("config", "trex", "optim.epochs=7", "optim.warmup_epochs=1", "--toml")
    mine = tmp_path / "mine.toml"
    mine.write_text(out, encoding="utf-8")
    code, again, _ = main("config", mine, "--toml")
    assert code == 0
    assert again == out


def test_env_is_json(main: Main) -> None:
    code, out, _ = main("env")
    assert code == 0
    assert {"fastrex", "python", "packages", "gpus"} <= json.loads(out).keys()


def test_status_of_a_run(main: Main, finished: Path) -> None:
    code, out, _ = main("status", finished, "--json")
    assert code == 0
    assert json.loads(out)["state"] == "completed"


@pytest.mark.parametrize("kind", ["run", "checkpoint", "export", "safetensors"])
def test_eval_of_every_kind_of_source(main: Main, finished: Path, stripes: Path, kind: str) -> None:
    source = {
        "run": finished,
        "checkpoint": finished / "checkpoints" / "step-00000004",
        "export": finished / "export",
        "safetensors": finished / "export" / "model.safetensors",
    }[kind]
    code, out, err = main("eval", source, "--data", stripes, "--device", "cpu")
    assert code == 0, err
    assert "eval/knn" in out
    assert ("eval/top1" in out) == (kind == "run")


def test_eval_writes_json(main: Main, finished: Path, tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    assert main("eval", finished, "--json", target)[0] == 0
    assert json.loads(target.read_text(encoding="utf-8"))["eval/images"] == 16


def test_data_commands(main: Main, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_stripes(data / "train", 3, seed=0)
    (data / "train" / "class-0" / "bad.jpg").write_text("no image", encoding="utf-8")
    (data / "train" / "class-0" / "readme.txt").write_text("-", encoding="utf-8")
    code, out, _ = main("data", "index", data)
    assert code == 0
    assert "12 images, 4 classes, layout single" in out
    assert "left out: 'train/class-0/bad.jpg'" in out
    assert "1 other files ignored" in out
    sheet = tmp_path / "sheet.png"
    code, _, err = main("data", "show", "demo", *SETTINGS, "--data", data, "optim.batch_size=4", "--out", sheet)
    assert code == 0, err
    with Image.open(sheet) as image:
        assert min(image.size) > 100


def test_export_and_load(main: Main, finished: Path, tmp_path: Path) -> None:
    import fastrex

    code, out, _ = main("export", finished, tmp_path / "encoder", "--to", "hf")
    assert code == 0
    assert "fastrex.load_encoder(" in out
    ours, theirs = fastrex.load_encoder(tmp_path / "encoder"), fastrex.load_encoder(finished)
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(ours(image), theirs(image))
    code, _, err = main("export", finished, tmp_path / "tv", "--to", "torchvision")
    assert code == 1
    assert "use --to hf" in one_line(err)


def bad_data(tmp_path: Path, how: str) -> Path:
    data = tmp_path / "data"
    if how == "missing":
        return data
    if how == "a file":
        data.write_text("-", encoding="utf-8")
        return data
    write_stripes(data / "train", 2, seed=0)
    if how == "one class":
        for label in (1, 2, 3):
            for path in (data / "train" / f"class-{label}").iterdir():
                path.unlink()
            (data / "train" / f"class-{label}").rmdir()
    elif how == "empty class":
        (data / "train" / "nothing").mkdir()
    elif how == "unknown class in val":
        write_stripes(data / "val", 1, seed=0)
        (data / "val" / "class-0").rename(data / "val" / "stranger")
    elif how == "no class folders":
        for path in sorted((data / "train").rglob("*.jpg")):
            path.rename(data / f"{path.parent.name}-{path.name}")
        for folder in (data / "train").iterdir():
            folder.rmdir()
        (data / "train").rmdir()
    elif how == "nothing readable":
        for path in (data / "train").rglob("*.jpg"):
            path.write_bytes(b"")
    return data


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "does not exist"),
        ("a file", "is a file; give the folder"),
        ("one class", "class"),
        ("empty class", "nothing.*data.empty_classes=skip"),
        ("unknown class in val", "stranger"),
        ("no class folders", "class folders"),
        ("nothing readable", "train"),
    ],
)
def test_bad_data_is_one_clear_line(main: Main, tmp_path: Path, how: str, message: str) -> None:
    data = bad_data(tmp_path, how)
    out = tmp_path / "run"
    code, _, err = main("train", "demo", *SETTINGS, "--data", data, "--out", out, "--device", "cpu")
    assert code == 1
    line = one_line(err)
    assert re.search(message, line), line
    assert not out.exists()


def test_bad_words_are_one_clear_line(main: Main, stripes: Path, tmp_path: Path) -> None:
    mine = ["demo", *SETTINGS, "--data", stripes]
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b"# caf\xe9\n")
    for words, expected, message in (
        (["trexx"], 2, "recipe must be one of"),
        ([latin], 2, "must be a TOML file in UTF-8"),
        (["demo", "optim.lrr=1"], 2, "did you mean 'lr'"),
        (["trex"], 2, "pass --data FOLDER"),
        ([*mine, "optim.batch_size=65"], 1, "optim.batch_size"),
        ([*mine, "optim.batch_size=1"], 1, "must be at least 2 for BatchNorm"),
        ([*mine, "optim.accumulate=16"], 1, "set a larger optim.batch_size"),
        ([*mine, "model.arch=resnet19"], 2, "did you mean 'resnet18'"),
        ([*mine, "--init-from", tmp_path / "none"], 1, "does not exist"),
        ([*mine, "--resume", "must"], 1, "--resume must needs a run"),
        ([*mine, "run.tensorboard=true"], 1, "pip install 'fastrex[tensorboard]'"),
    ):
        code, _, err = main("train", *words, "--out", tmp_path / "run", "--device", "cpu")
        assert code == expected, words
        assert message in one_line(err)
        assert not (tmp_path / "run").exists(), "a second try must not be refused because of the first"
    for words in (["train", "demo", "--max-steps", "0"], ["frain"], ["train", "--device", "tpu"]):
        code, _, err = main(*words)
        assert code == 2
        assert "--help')" in one_line(err)
    code, _, err = main("train", "--resume", "must")
    assert code == 1
    assert "pass --out RUN" in one_line(err)


def test_paths_may_hold_anything(main: Main, tmp_path: Path) -> None:
    data, out = tmp_path / 'emoji 😀 "quoted" é' / "data", tmp_path / "rün 漢"
    write_stripes(data / "train", 5, seed=0)
    code, _, err = main("train", "demo", *SETTINGS, "--data", data, "--out", out, "--device", "cpu", "--max-steps", "1")
    assert code == 0, err
    assert main("train", "--out", out, "--resume", "must", "--device", "cpu", "--max-steps", "1")[0] == 0


def test_cuda_without_a_gpu_is_said(main: Main, stripes: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, _, err = main("train", "demo", "--data", stripes, "--out", tmp_path / "run", "--device", "cuda")
    assert code == 1
    assert "use --device cpu" in one_line(err)


def test_a_directory_with_something_in_it_is_refused_and_untouched(main: Main, stripes: Path, finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    code, _, err = main("train", "demo", *SETTINGS, "--data", stripes, "--out", finished, "--device", "cpu")
    assert code == 1
    assert "--resume must" in one_line(err)
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def test_another_recipe_is_not_resumed(main: Main, stripes: Path, finished: Path) -> None:
    code, _, err = main("train", "trex", "--data", stripes, "--out", finished, "--resume", "must", "--device", "cpu")
    assert code == 1
    assert "differs in" in one_line(err)
    assert "--init-from" in err
    code, _, err = main("train", "optim.lr=0.3", "--out", finished, "--resume", "must", "--device", "cpu")
    assert code == 1
    assert "optim.lr: 0.8 -> 0.3" in one_line(err)
    assert rundir.read_status(finished)["state"] == "completed"


def test_a_place_that_cannot_be_written_is_said_before_training(main: Main, stripes: Path, tmp_path: Path) -> None:
    # A file where a folder should be stops even root, whom permissions do not.
    (tmp_path / "file").write_text("-", encoding="utf-8")
    place = tmp_path / "file" / "run"
    code, _, err = main("train", "demo", *SETTINGS, "--data", stripes, "--out", place, "--device", "cpu")
    assert code == 1
    assert "choose another --out" in one_line(err)


def test_a_second_writer_is_refused(main: Main, finished: Path) -> None:
    import fcntl

    with (finished / rundir.LOCK).open("a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        code, _, err = main("train", "--out", finished, "--resume", "must", "--device", "cpu")
    assert code == 1
    assert "is being written by another process" in one_line(err)
    assert rundir.read_status(finished)["state"] == "completed"


def test_a_missing_timm_names_the_install(
    main: Main, stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    arguments = ("--data", stripes, "--out", tmp_path / "run", "--device", "cpu", "--arch", "timm:resnet18")
    code, _, err = main("train", "trex", "optim.batch_size=16", *arguments)
    assert code == 1
    assert "pip install" in one_line(err)


def test_evaluation_without_held_out_images_is_said(main: Main, finished: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_stripes(data, 1, seed=0)
    code, _, err = main("eval", finished / "export", "--data", data)
    assert code == 1
    assert "must have held-out images" in one_line(err)
    code, _, err = main("eval", finished / "export")
    assert code == 2
    assert "pass --data FOLDER" in one_line(err)


def test_debug_shows_the_traceback(main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fastrex", "status", str(tmp_path), "--debug"])
    with pytest.raises(Exception, match="status: RUN must be a run directory"):
        cli.main()
