"""``foreign.py``: files as the released t-ReX trainer writes them are read, hostile and damaged ones are refused."""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastrex.errors import FastrexError
from fastrex.foreign import read
from fastrex.layouts import encoder_state
from fastrex.model.resnet import ResNet


def backbone(seed: int = 0) -> OrderedDict[str, Tensor]:
    torch.manual_seed(seed)
    return OrderedDict(ResNet("resnet18", width=8).state_dict())


def full_checkpoint(seed: int = 0, wrap: str = "module.") -> dict[str, Any]:
    """The kinds of things that the released full checkpoints hold, small."""
    model: OrderedDict[str, Any] = OrderedDict()
    for name, offset in (("model", 0), ("model_ema", 1)):
        model |= {f"{wrap}{name}.encoder.{key}": value for key, value in backbone(seed + offset).items()}
        model[f"{wrap}{name}.projector.0.weight"] = torch.randn(4, 64)
    model[f"{wrap}memory.features"] = torch.randn(16, 4)
    model[f"{wrap}memory.labels"] = torch.randint(0, 10, (16,))
    model[f"{wrap}memory.ptr"] = torch.zeros(1, dtype=torch.long)
    parameter = nn.Parameter(torch.randn(3, requires_grad=True))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones(3)
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer.state_dict(),
        "fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
        "epoch": 99,
        "args": argparse.Namespace(arch="resnet50", seed=22, crops=(0.25, 1.0)),
        "best": np.float64(0.78),
        "losses": np.arange(4.0),
        "parameter": parameter,
    }


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def assert_same(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert state.keys() == wanted.keys()
    for key, value in state.items():
        assert torch.equal(value, wanted[key]), key


def test_bare_backbone(tmp_path: Path) -> None:
    state, provenance = encoder_state(save(backbone(), tmp_path / "backbone.pth"))
    assert_same(state, backbone())
    assert all(value.is_contiguous() for value in state.values())
    assert provenance["file"] == "backbone.pth"
    assert provenance["prefix"] == provenance["left_out"] == "(none)"


@pytest.mark.parametrize("wrap", ["module.", ""])
def test_full_checkpoint_gives_the_online_encoder(tmp_path: Path, wrap: str) -> None:
    path = save(full_checkpoint(wrap=wrap), tmp_path / "full.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    state, provenance = encoder_state(path)
    assert_same(state, backbone(0))
    assert provenance["dictionary"] == "model"
    assert provenance["prefix"] == f"{wrap}model.encoder."
    left_out = provenance["left_out"].split(", ")
    where = f"model.{wrap}"
    for name in (f"{where}model.projector", f"{where}model_ema", f"{where}memory", "optimizer", "args", "epoch"):
        assert name in left_out
    assert "argparse.Namespace" in provenance["placeholders"]


def test_momentum_encoder_is_taken_where_there_is_no_other(tmp_path: Path) -> None:
    content = {f"teacher.{key}": value for key, value in backbone().items()}
    state, provenance = encoder_state(save({"state_dict": content}, tmp_path / "teacher.pth"))
    assert_same(state, backbone())
    assert (provenance["dictionary"], provenance["prefix"]) == ("state_dict", "teacher.")


def test_classifier_is_left_out_and_old_files_get_counters(tmp_path: Path) -> None:
    content = {key: value for key, value in backbone().items() if not key.endswith("num_batches_tracked")}
    content |= {"fc.weight": torch.zeros(2, 64), "fc.bias": torch.zeros(2)}
    state, provenance = encoder_state(save(content, tmp_path / "a.pth"))
    assert_same(state, {**backbone()})
    assert provenance["left_out"] == "fc"


def test_read_keeps_tensors_and_containers_and_makes_the_rest_inert(tmp_path: Path) -> None:
    content = full_checkpoint()
    found = read(save(content, tmp_path / "full.pth"))
    assert found.keys() == content.keys()
    assert_same(found["model"], content["model"])
    assert found["epoch"] == 99
    assert found["fp16_scaler"] == content["fp16_scaler"]
    assert found["optimizer"]["param_groups"][0]["momentum"] == 0.9
    assert torch.equal(found["optimizer"]["state"][0]["momentum_buffer"], torch.ones(3))
    assert torch.equal(found["parameter"], content["parameter"])
    assert not hasattr(found["args"], "seed")
    assert repr(found["args"]) == "<argparse.Namespace>"
    assert not isinstance(found["losses"], np.ndarray)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_dtypes_views_and_shared_storages(tmp_path: Path, dtype: torch.dtype) -> None:
    base = (torch.arange(24).reshape(4, 6) % 2).to(dtype)
    views = {"whole": base, "column": base[:, 1], "turned": base.T, "scalar": base[2, 3], "empty": base[:0]}
    found = read(save(views, tmp_path / "views.pth"))
    for name, value in views.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], value)
    assert found["whole"].untyped_storage().data_ptr() == found["turned"].untyped_storage().data_ptr()


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive with its entries changed; None drops one."""
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in entries.items():
            changed = change(name.partition("/")[2], data)
            if changed is not None:
                file.writestr(name, changed)
    return path


def test_big_endian_files(tmp_path: Path) -> None:
    path = save({"x": torch.arange(6, dtype=torch.int32)}, tmp_path / "big.pth")

    def swap(name: str, data: bytes) -> bytes:
        if name == "byteorder":
            return b"big"
        return np.frombuffer(data, "<i4").astype(">i4").tobytes() if name == "data/0" else data

    assert read(rewrite(path, swap))["x"].tolist() == list(range(6))


class Bomb:
    """Pickles to a call of ``function`` with ``args``, wherever it stands."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def test_pickle_bomb_does_not_go_off(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    bombs = [
        Bomb(os.system, f"touch {marker}"),
        Bomb(exec, f"open({str(marker)!r}, 'w')"),
        Bomb(eval, f"open({str(marker)!r}, 'w')"),
        Bomb(open, str(marker), "w"),
        Bomb(os.mkdir, str(marker)),
    ]
    path = save({"bombs": bombs, **backbone()}, tmp_path / "bomb.pth")
    assert_same(encoder_state(path)[0], backbone())
    assert not marker.exists()
    # The very same file goes off in a reader that trusts it: the bomb is real.
    torch.load(save({"bomb": Bomb(os.mkdir, str(marker))}, path), weights_only=False)
    assert marker.exists()


def with_pickle(tmp_path: Path, data: bytes) -> Path:
    """A torch archive with one storage of four floats, whose pickle is ``data``."""
    path = save({"x": torch.zeros(4)}, tmp_path / "crafted.pth")
    return rewrite(path, lambda name, old: data if name == "data.pkl" else old)


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK%ctQ"
TENSOR = b"\x80\x02}X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE


def tensor_pickle(
    count: int = 4, offset: bytes = b"K\x00", size: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85"
) -> bytes:
    return TENSOR.replace(b"%c", bytes([count])) + offset + size + stride + b"\x89}tRs."


def test_crafted_tensor_is_read(tmp_path: Path) -> None:
    # The base of the cases below: without their one change, the pickle is good.
    assert torch.equal(read(with_pickle(tmp_path, tensor_pickle()))["x"], torch.zeros(4))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tensor_pickle(count=5), "storage 0 must have 20 bytes, the archive has 16"),
        (tensor_pickle(offset=b"K\x01"), "reaches past its storage of 4 elements"),
        (tensor_pickle(stride=b"K\x02\x85"), "reaches past its storage"),
        (tensor_pickle(size=b"J\x00\x00\x00\x70\x85", stride=b"K\x00\x85"), "repeat values so often"),
        (tensor_pickle(offset=b"J\xff\xff\xff\xff"), "a tensor has an impossible shape"),
        (tensor_pickle(stride=b"K\x01K\x01\x86"), "a tensor has an impossible shape"),
        (tensor_pickle().replace(b"X\x01\x00\x00\x000", b"X\x04\x00\x00\x00../0"), "it names a storage '../0'"),
        (b"\x80\x02}K\x01r\xff\xff\xff\xff.", "memo of 4294967295 places"),
        (b"\x80\x02)" + b"\x85" * 100 + b".", "nested more than 64 deep"),
        (b"\x80\x02" + b"]" * 100 + b"a" * 99 + b".", "nested more than 64 deep"),
        (b"\x80\x04\x96" + (2**40).to_bytes(8, "little") + b".", "is damaged"),
        (b"\x80\x02\x82\x01.", "uses EXT1"),
        (b"\x80\x02ccollections\nOrderedDict\nN}X\x01\x00\x00\x00aK\x01s\x86b.", "a function's attribute is set"),
        (b"\x80\x02cos\nsystem\n.", "must hold a dict of tensors, got type"),
        (b"\x80\x02cos\nsystem\n)R.", "must hold a dict of tensors, got os.system"),
        (b"\x80\x02K\x05.", "must hold a dict of tensors, got int"),
        (b"\x80\x020.", "takes more from the stack than is there"),
        (b"\x80\x02}", "is damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_crafted_pickles_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(FastrexError, match=f"^foreign: .*crafted.pth .*({message})"):
        read(with_pickle(tmp_path, data))


def test_copies_are_limited(tmp_path: Path) -> None:
    # One list of 100000 items, copied twenty times: a few bytes of pickle per copy.
    listing = b"(" + b"K\x00" * 100_000 + b"lq\x00"
    copies = b"".join(b"0c__builtin__\nset\nh\x00\x85R" for _ in range(20))
    with pytest.raises(FastrexError, match="copies more than 1000000 items"):
        read(with_pickle(tmp_path, b"\x80\x02" + listing + copies + b"."))


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    x = torch.rand(64)
    good = save({"x": x}, tmp_path / "good.pth").read_bytes()
    path = tmp_path / "bad.pth"
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(FastrexError, match=r"bad\.pth is damaged .*get it again"):
        read(path)
    flipped = bytearray(good)
    flipped[good.index(x.numpy().tobytes()) + 50] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(FastrexError, match=r"bad\.pth is damaged"):
        read(path)


def test_archives_that_torch_did_not_write_are_refused(tmp_path: Path) -> None:
    def saved() -> Path:
        return save({"x": torch.zeros(4)}, tmp_path / "odd.pth")

    with pytest.raises(FastrexError, match="compressed or encrypted entries"):
        read(rewrite(saved(), lambda name, data: data, zipfile.ZIP_DEFLATED))
    with pytest.raises(FastrexError, match="storage 0 must have 16 bytes, the archive has 0"):
        read(rewrite(saved(), lambda name, data: None if name == "data/0" else data))
    with pytest.raises(FastrexError, match=r"none that torch\.save wrote"):
        read(rewrite(saved(), lambda name, data: None if name == "data.pkl" else data))
    with zipfile.ZipFile(saved(), "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("odd/data/0", b"\0" * 16)
    with pytest.raises(FastrexError, match="two of its entries have the same name"):
        read(tmp_path / "odd.pth")
    with zipfile.ZipFile(saved(), "a") as file:
        file.writestr("odd/constants.pkl", b"")
    with pytest.raises(FastrexError, match="TorchScript"):
        read(tmp_path / "odd.pth")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html></html>", "no torch file .it begins with b'<!DOCTYPE"),
        (pickle.dumps({"x": 1}), "bare pickle"),
        (b"\x10\0\0\0\0\0\0\0{\"a\":{}}", "looks like safetensors"),
    ],
)  # fmt: skip
def test_other_files_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "other.pth"
    path.write_bytes(data)
    with pytest.raises(FastrexError, match=rf"^foreign: .*other\.pth cannot be read: .*{message}"):
        read(path)


def test_legacy_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "legacy.pth"
    torch.save({"x": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(FastrexError, match=r"before version 1\.6; load it where you trust it and save its state_dict"):
        read(path)
    with pytest.raises(FastrexError, match=r"absent\.pth cannot be read \(No such file"):
        read(tmp_path / "absent.pth")
    with pytest.raises(FastrexError, match="Is a directory"):
        read(tmp_path)


def test_files_without_a_plain_resnet(tmp_path: Path) -> None:
    with pytest.raises(FastrexError, match="must hold the weights of a ResNet, got the keys patch_embed"):
        encoder_state(save({"patch_embed": torch.zeros(2)}, tmp_path / "vit.pth"))
    with pytest.raises(FastrexError, match="got an empty dictionary"):
        encoder_state(save({}, tmp_path / "empty.pth"))
    content = {**backbone(), "layer1.0.se.fc1.weight": torch.zeros(2)}
    with pytest.raises(FastrexError, match=r"layer1\.0\.se\.fc1\.weight must belong to a plain ResNet"):
        encoder_state(save(content, tmp_path / "se.pth"))
