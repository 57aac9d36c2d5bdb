"""Sources of every kind are read, and exports load in fastrex, in the real torchvision and in the real timm."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torchvision_shim import import_timm, import_torchvision

from fastrex import checkpoint
from fastrex import config as config_module
from fastrex.config import Config, DataConfig, ModelConfig
from fastrex.errors import FastrexError
from fastrex.export import export, load_encoder, load_source
from fastrex.model.resnet import ResNet, build_encoder

SMALL = ModelConfig(arch="resnet18", stem="small", width=8, bn_eps=1e-3)
DATA = DataConfig(eval_resize=36, eval_size=32, mean=(0.5, 0.25, 0.125), std=(0.2, 0.3, 0.4))


def encoder(model: ModelConfig, seed: int = 0, channels: int = 3) -> nn.Module:
    """An encoder whose running statistics are not at their start."""
    torch.manual_seed(seed)
    net = build_encoder(model, channels)
    with torch.no_grad():
        net(torch.randn(8, channels, 32, 32))
    return net.eval()


def contiguous(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    return {prefix + key: value.contiguous() for key, value in state.items()}


def make_run(path: Path, model: ModelConfig, steps: tuple[int, ...] = (1, 2), channels: int = 3) -> nn.Module:
    """A run directory with checkpoints of different weights; returns the newest encoder."""
    path.mkdir()
    config = Config(recipe="trex", data=dataclasses.replace(DATA, channels=channels), model=model)
    (path / "config.toml").write_text(config_module.to_toml(config))
    for step in steps:
        net = encoder(model, seed=step, channels=channels)
        tensors = {**contiguous(net.state_dict(), "encoder."), "projector.layers.0.weight": torch.zeros(2, 2)}
        checkpoint.save(
            path, step, {"model": tensors, "optimizer": {"lr": torch.zeros(1)}}, {"classes": []}, keep_last=5
        )
    return net


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(9))


def assert_same_features(net: nn.Module, wanted: nn.Module) -> None:
    assert not net.training
    with torch.no_grad():
        assert torch.equal(net(images()), wanted(images()))


def test_run_gives_its_newest_checkpoint_and_its_settings(tmp_path: Path) -> None:
    net = make_run(tmp_path / "run", SMALL)
    source = load_source(tmp_path / "run")
    assert source.arch == {"arch": "resnet18", "stem": "small", "width": 8, "bn_eps": 1e-3}
    assert source.preprocessing == {"mean": DATA.mean, "std": DATA.std, "eval_resize": 36, "eval_size": 32}
    assert source.facts == {"recipe": "trex"}
    assert (source.provenance["run"], source.provenance["step"]) == ("run", "2")
    assert_same_features(load_encoder(tmp_path / "run"), net)
    assert config_module.override(Config(), source.settings()).data == DATA


def test_damaged_checkpoints_are_passed_over_but_refused_by_name(tmp_path: Path) -> None:
    make_run(tmp_path / "run", SMALL)
    newest = checkpoint.folder(tmp_path / "run", 2)
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "model.safetensors").write_bytes(data)
    assert load_source(tmp_path / "run").provenance["step"] == "1"
    with pytest.raises(FastrexError, match="must match its checksum"):
        load_source(newest)
    assert newest.is_dir()  # reading moves nothing


def test_every_kind_of_source_gives_the_same_encoder(tmp_path: Path) -> None:
    net = make_run(tmp_path / "run", SMALL)
    folder = checkpoint.folder(tmp_path / "run", 2)
    exported = export(tmp_path / "run", tmp_path / "out", "hf")
    again = export(exported, tmp_path / "again", "hf")
    for source in (
        tmp_path / "run",
        folder,
        folder / "model.safetensors",
        exported,
        exported / "model.safetensors",
        again,
    ):
        assert_same_features(load_encoder(source), net)
        assert load_source(source).preprocessing == load_source(tmp_path / "run").preprocessing
    assert (exported / "config.json").read_text() == (again / "config.json").read_text()


def test_a_run_gives_its_newest_weights_and_its_export_when_nothing_else_is_left(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, SMALL)
    older = export(checkpoint.folder(run, 1), run / "export", "hf")
    newest = checkpoint.steps(run)[-1]
    assert newest > 1
    assert load_source(run).provenance["step"] == str(newest)
    assert_same_features(load_encoder(run), load_encoder(checkpoint.folder(run, newest)))
    shutil.rmtree(run / "checkpoints")
    assert load_source(run).provenance["step"] == "1"
    assert_same_features(load_encoder(run), load_encoder(older))


@pytest.mark.parametrize("prefix", ["", "encoder.", "module.model.encoder."])
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_files_of_weights(tmp_path: Path, prefix: str, ending: str) -> None:
    net = encoder(ModelConfig(arch="resnet18", width=8))
    state = contiguous(net.state_dict(), prefix) | {"fc.weight": torch.zeros(2, 64)}
    path = tmp_path / f"weights{ending}"
    save_file(state, path) if ending == ".safetensors" else torch.save(state, path)
    assert load_source(path).arch == {"arch": "resnet18", "stem": "imagenet", "width": 8, "bn_eps": 1e-5}
    assert load_source(path).settings() == []
    assert_same_features(load_encoder(path), net)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A full checkpoint with the keys and kinds of the released ones, and its online encoder (a ResNet-50)."""
    net, ema = encoder(ModelConfig(), seed=1), encoder(ModelConfig(), seed=2)
    model = {
        **{f"module.model.encoder.{key}": value for key, value in net.state_dict().items()},
        "module.model.projector.0.weight": torch.zeros(4, 4),
        **{f"module.model_ema.encoder.{key}": value for key, value in ema.state_dict().items()},
        "module.memory.features": torch.zeros(4, 4),
        "module.memory.labels": torch.zeros(4, dtype=torch.long),
        "module.memory.ptr": torch.zeros(1, dtype=torch.long),
    }
    path = tmp_path_factory.mktemp("official") / "checkpoint.pth"
    torch.save({"model": model, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.8), "epoch": 100}, path)
    return path, net


def test_official_checkpoint_loads_everywhere_after_export(tmp_path: Path, official: tuple[Path, nn.Module]) -> None:
    path, net = official
    out = export(path, tmp_path / "out", "timm", facts={"license": "cc-by-nc-sa-4.0", "in1k top-1": 0.78})
    state = load_file(out / "model.safetensors")
    vision = import_torchvision().models.resnet50()
    missing = vision.load_state_dict(state, strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    vision.fc = nn.Identity()
    vision.load_state_dict(state)
    timm = import_timm()
    plain = timm.create_model("resnet50", num_classes=0)
    plain.load_state_dict(state)
    from_folder = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0)
    fine_tuned = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=7).eval()
    with torch.no_grad():
        wanted = net(images(64))
        for other in (vision, plain, from_folder):
            torch.testing.assert_close(other.eval()(images(64)), wanted, rtol=1e-4, atol=1e-5)
        assert fine_tuned(images(64)).shape == (2, 7)
    config = json.loads((out / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["num_features"]) == ("resnet50", 0, 2048)
    assert config["fastrex"]["provenance"]["prefix"] == "module.model.encoder."
    assert "model.module.model_ema" in config["fastrex"]["provenance"]["left_out"]
    assert config["fastrex"]["metrics"] == {"in1k top-1": 0.78}
    data = timm.data.resolve_model_data_config(from_folder)
    assert (data["input_size"], data["crop_pct"], data["interpolation"]) == ([3, 224, 224], 0.875, "bilinear")
    card = (out / "README.md").read_text()
    assert card.startswith(
        "---\nlicense: cc-by-nc-sa-4.0\nlibrary_name: timm\npipeline_tag: image-feature-extraction\n"
    )
    for text in (
        "checkpoint.pth",
        "| in1k top-1 | 0.78 |",
        "fastrex.load_encoder",
        "torchvision.models.resnet50()",
        "timm.create_model",
    ):
        assert text in card
    assert "assumed: the source does not say" in card


@pytest.mark.parametrize(
    "model", [SMALL, ModelConfig(arch="resnet18", width=8), ModelConfig(arch="resnet18", bn_eps=1e-3)]
)
@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_networks_without_a_counterpart_are_refused(tmp_path: Path, model: ModelConfig, to: str) -> None:
    make_run(tmp_path / "run", model, steps=(1,))
    with pytest.raises(FastrexError, match=rf"{to} has no counterpart .*use --to hf .*fastrex\.load_encoder"):
        export(tmp_path / "run", tmp_path / "out", to)
    assert not (tmp_path / "out").exists()
    card = (export(tmp_path / "run", tmp_path / "out", "hf") / "README.md").read_text()
    assert "torchvision.models" not in card
    assert "timm" not in card
    assert "assumed" not in card
    assert "shorter side to 36" in card


def test_timm_encoders(tmp_path: Path) -> None:
    timm = import_timm()
    model = ModelConfig(arch="timm:mobilenetv3_small_050")
    net = make_run(tmp_path / "run", model, steps=(1,))
    with pytest.raises(FastrexError, match="torchvision has no counterpart"):
        export(tmp_path / "run", tmp_path / "out", "torchvision")
    out = export(tmp_path / "run", tmp_path / "out", "timm")
    assert_same_features(load_encoder(out), net)
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(theirs(images()), net(images()))
    assert timm.data.resolve_model_data_config(theirs)["mean"] == list(DATA.mean)


@pytest.mark.parametrize("arch", ["resnet18", "timm:mobilenetv3_small_050"])
def test_grey_encoders(tmp_path: Path, arch: str) -> None:
    timm = import_timm()
    net = make_run(tmp_path / "run", ModelConfig(arch=arch), steps=(1,), channels=1)
    x = images()[:, :1]
    with pytest.raises(FastrexError, match=r"torchvision has no counterpart .*channels=1\); use --to timm, or --to hf"):
        export(tmp_path / "run", tmp_path / "out", "torchvision")
    out = export(tmp_path / "run", tmp_path / "out", "timm")
    again = export(out, tmp_path / "again", "hf")
    assert (out / "config.json").read_text() == (again / "config.json").read_text()
    for source in (tmp_path / "run", out, again):
        assert load_source(source).channels == 1
        assert "data.channels=1" in load_source(source).settings()
        with torch.no_grad():
            assert torch.equal(load_encoder(source)(x), net(x))
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), net(x), rtol=1e-4, atol=1e-5)
        colour = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0, in_chans=3).eval()
        torch.testing.assert_close(colour(x.expand(2, 3, 32, 32)), net(x), rtol=1e-4, atol=1e-5)
    data = timm.data.resolve_model_data_config(theirs)
    assert data["input_size"] == (1, 32, 32)
    assert data["mean"] == pytest.approx([sum(DATA.mean) / 3])
    assert data["std"] == pytest.approx([sum(DATA.std) / 3])
    card = (out / "README.md").read_text()
    for text in ("grey (one channel, 0.299 R + 0.587 G + 0.114 B) images", "mean 0.2917, standard deviation 0.3."):
        assert text in card
    assert "torchvision.models" not in card
    if arch == "resnet18":
        save_file(contiguous(net.state_dict(), "encoder."), tmp_path / "grey.safetensors")
        torch.save(net.state_dict(), tmp_path / "grey.pth")
        for name in ("grey.safetensors", "grey.pth"):
            assert load_source(tmp_path / name).channels == 1
            with torch.no_grad():
                assert torch.equal(load_encoder(tmp_path / name)(x), net(x))


def test_preprocessing_of_a_grey_timm_folder_is_taken(tmp_path: Path) -> None:
    save_file(contiguous(ResNet("resnet18", channels=1).state_dict()), tmp_path / "model.safetensors")
    cfg = {"mean": [0.5], "std": [0.25], "crop_pct": 0.875, "input_size": [1, 224, 224]}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": cfg}))
    source = load_source(tmp_path)
    assert (source.preprocessing["mean"], source.preprocessing["std"]) == ((0.5,) * 3, (0.25,) * 3)
    assert source.settings()[0] == "data.channels=1"


def test_files_are_ordinary_and_nothing_else_is_left(tmp_path: Path) -> None:
    make_run(tmp_path / "run", SMALL, steps=(1,))
    old = os.umask(0o027)
    try:
        out = export(tmp_path / "run", tmp_path / "deep" / "out", "hf")
    finally:
        os.umask(old)
    assert sorted(entry.name for entry in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert {entry.stat().st_mode & 0o777 for entry in out.iterdir()} == {0o640}
    assert out.stat().st_mode & 0o777 == 0o750
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


def test_every_target_writes_the_same_weights(tmp_path: Path) -> None:
    make_run(tmp_path / "run", ModelConfig(arch="resnet18"), steps=(1,))
    folders = [export(tmp_path / "run", tmp_path / to, to) for to in ("torchvision", "timm", "hf")]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1


def flip_last_bit(path: Path, data: bytes) -> None:
    """A disk that changes one bit of the weights."""
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if path.name == "model.safetensors" else data)


def change_one_weight(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A serialiser that gets one number wrong."""
    tensors["conv1.weight"][0, 0, 0, 0] += 1
    return to_bytes(tensors, metadata)


@pytest.mark.parametrize(
    ("where", "wrong", "message"),
    [
        ("_write_file", flip_last_bit, "must match its checksum"),
        ("safetensors.torch.save", change_one_weight, "must give the source's features"),
    ],
)
def test_bad_write_is_found_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, wrong: Any, message: str
) -> None:
    make_run(tmp_path / "run", SMALL, steps=(1,))
    monkeypatch.setattr(f"fastrex.export.{where}", wrong)
    with pytest.raises(FastrexError, match=message):
        export(tmp_path / "run", tmp_path / "out", "hf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_encoder_with_numbers_gone_bad_is_not_exported(tmp_path: Path) -> None:
    net = encoder(ModelConfig(arch="resnet18", width=8))
    state = contiguous(net.state_dict())
    state["layer4.1.bn2.weight"][3] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(FastrexError, match="must give finite features"):
        export(tmp_path / "nan.safetensors", tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


def test_out_is_never_overwritten_by_accident(tmp_path: Path) -> None:
    make_run(tmp_path / "run", SMALL)
    older = checkpoint.folder(tmp_path / "run", 1)
    out = export(older, tmp_path / "out", "hf")
    for folder in (out, tmp_path / "run"):
        with pytest.raises(FastrexError, match="OUT must be a new or empty folder"):
            export(older, folder, "hf")
    export(tmp_path / "run", out, "hf", overwrite=True)
    assert load_source(out).provenance["step"] == "2"
    (out / "mine.txt").write_text("notes")
    with pytest.raises(FastrexError, match="OUT must be a new or empty folder"):
        export(older, out, "hf", overwrite=True)
    (tmp_path / "empty").mkdir()
    export(older, tmp_path / "empty", "hf")
    (tmp_path / "file").write_text("")
    with pytest.raises(FastrexError, match="OUT must be a folder, got the file"):
        export(older, tmp_path / "file", "hf")
    with pytest.raises(ValueError, match="to must be one of torchvision, timm, hf, got 'onnx'"):
        export(older, tmp_path / "x", "onnx")
    with pytest.raises(ValueError, match="facts must be plain numbers and words"):
        export(older, tmp_path / "x", "hf", facts={"accuracy": float("nan")})
    assert not (tmp_path / "x").exists()


def test_wrong_sources(tmp_path: Path) -> None:
    def refuse(source: Path, message: str) -> None:
        with pytest.raises(FastrexError, match=message):
            load_source(source)

    refuse(tmp_path / "absent", "does not exist; give a run")
    refuse(tmp_path, "must be a run, a checkpoint or an export")
    (tmp_path / "notes.txt").write_text("")
    refuse(tmp_path / "notes.txt", r"must end in \.safetensors, \.pth or \.pt")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 20)
    refuse(tmp_path / "bad.safetensors", "must be a safetensors file, it cannot be read")
    save_file({"blocks.0.attn.qkv.weight": torch.zeros(2)}, tmp_path / "vit.safetensors")
    refuse(tmp_path / "vit.safetensors", "must hold the weights of a ResNet, got blocks.0.attn")
    state = contiguous(ResNet("resnet18", width=8).state_dict())
    del state["layer3.1.conv1.weight"]
    save_file(state, tmp_path / "cut.safetensors")
    refuse(tmp_path / "cut.safetensors", r"no encoder that fastrex knows: .*basic blocks \[2, 2, 1, 2\]")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    refuse(tmp_path / "run", "must hold an export or a good checkpoint: there is none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("not json", "must be a model's JSON description"),
        ({"fastrex": {"bn_eps": "tiny"}}, r"model\.bn_eps must be a number"),
        ({"fastrex": {"preprocessing": {"mean": [0.5]}}}, r"data\.mean must be a list of 3 numbers"),
        ({"fastrex": {"sha256": "0"}}, "must match its checksum"),
        ({"pretrained_cfg": {"mean": [0] * 3, "std": [1] * 3, "crop_pct": 0, "input_size": [3, 32, 32]}}, "unusable"),
    ],
)  # fmt: skip
def test_wrong_descriptions_beside_the_weights(tmp_path: Path, change: Any, message: str) -> None:
    save_file(contiguous(ResNet("resnet18", width=8).state_dict()), tmp_path / "model.safetensors")
    assert load_source(tmp_path).preprocessing == {}
    (tmp_path / "config.json").write_text(change if isinstance(change, str) else json.dumps(change))
    with pytest.raises(FastrexError, match=message):
        load_source(tmp_path)


def test_preprocessing_of_a_timm_folder_is_taken(tmp_path: Path) -> None:
    save_file(contiguous(ResNet("resnet18").state_dict()), tmp_path / "model.safetensors")
    cfg = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "crop_pct": 0.95, "input_size": [3, 224, 224]}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": cfg}))
    found = load_source(tmp_path).preprocessing
    assert found == {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "eval_resize": 235, "eval_size": 224}
