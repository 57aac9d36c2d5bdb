"""Features of frozen encoders: the protocol's images, chunks that survive kills and are never believed unseen."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import signal
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import launch
import numpy as np
import pytest
import safetensors.torch
import torch
from command import fastrex
from conftest import write_stripes
from PIL import Image
from torch import Tensor, nn
from torchvision_shim import import_timm

from fastrex.config import ModelConfig
from fastrex.data.index import Index, build
from fastrex.distributed import World
from fastrex.errors import FastrexError
from fastrex.export import Source, export, load_source
from fastrex.model.resnet import build_encoder
from fastrex.transfer import chunks, contents, features, keys
from fastrex.transfer.features import Extracted, Transform, extract

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
SMALL = ModelConfig(arch="resnet18", stem="small", width=4)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE_32 = Transform(32, 32, MEAN, STD, 3)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "CHUNK", 24)


class Pixels(nn.Module):
    """The image itself is the feature."""

    def __init__(self, size: int, channels: int = 3) -> None:
        super().__init__()
        self.num_features = channels * size * size
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images.flatten(1)


def encoder(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_encoder(SMALL, 3).eval()


def run(net: nn.Module, index: Index, cache: Path | None, said: list[str] | None = None, **more: Any) -> Extracted:
    rows = more.pop("rows", index.rows("train", 0.0))
    note = (said if said is not None else []).append
    options: dict[str, Any] = {"batch_size": 10, "threads": 1, "note": note, **more}
    return extract(net, "id", index, rows, options.pop("transform", SIZE_32), ALONE, cache=cache, **options)


def same(one: Extracted, two: Extracted) -> bool:
    equal = torch.equal(one.features, two.features) and torch.equal(one.labels, two.labels)
    return equal and np.array_equal(one.rows, two.rows)


def stored(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.safetensors"))


@pytest.mark.parametrize("channels", [3, 1])
def test_images_are_those_of_the_protocol(imagenet_sample: Path, channels: int) -> None:
    """Shorter side bicubic to the crop's own size, as Pillow does it: no 256 first, and not bilinear."""
    index = build(imagenet_sample)
    rows, size = np.arange(24), 96
    transform = Transform(size, size, MEAN, STD, channels)
    found = run(Pixels(size, channels), index, None, rows=rows, transform=transform, batch_size=8).features
    got = found.view(-1, channels, size, size)
    errors: dict[Any, list[float]] = {Image.Resampling.BICUBIC: [], Image.Resampling.BILINEAR: []}
    for row, pixels in zip(rows, got, strict=True):
        image = Image.open(index.path(int(row))).convert("RGB")
        width, height = image.size
        short = min(width, height)
        new = (size * width // short, size * height // short)
        left, top = (round((new[i] - size) / 2) for i in (0, 1))
        for filter_, values in errors.items():
            resized = image.resize(new, filter_).crop((left, top, left + size, top + size))
            wanted = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
            if channels == 1:
                wanted = (wanted * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
                means, deviations = torch.tensor([MEAN]), torch.tensor([STD])
                pixels_01 = pixels * deviations.mean() + means.mean()
            else:
                pixels_01 = pixels * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
            values.append(float((pixels_01 - wanted).abs().mean() * 255))
    bicubic, bilinear = (np.mean(values) for values in errors.values())
    assert bicubic < 1.0
    assert bicubic < 0.5 * bilinear


def test_features_are_the_encoders_in_the_order_asked_for(stripes: Path) -> None:
    index = build(stripes)
    rows = index.rows("train", 0.0)[::-1].copy()
    net = encoder()
    found = run(net, index, None, rows=rows)
    pixels = run(Pixels(32), index, None, rows=rows)
    with torch.inference_mode():
        wanted = net(pixels.features.view(-1, 3, 32, 32))
    torch.testing.assert_close(found.features, wanted, rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == index.labels[rows].tolist()
    assert found.rows.tolist() == rows.tolist()
    assert found.features.dtype == torch.float32
    with pytest.raises(ValueError, match="each image once"):
        run(net, index, None, rows=np.array([1, 1]))


def bitmaps(folder: Path, seed: int) -> Path:
    """64 uncompressed images of four classes: of equal size in bytes, whatever they show."""
    generator = np.random.default_rng(seed)
    for number in range(64):
        path = folder / "train" / f"class-{number % 4}" / f"{number:02d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    return folder


def test_other_images_of_the_same_names_and_sizes_are_not_taken_for_those_stored(tmp_path: Path) -> None:
    one, two = (build(bitmaps(tmp_path / name, seed)) for seed, name in enumerate(("one", "two")))
    assert one.fingerprint == two.fingerprint
    net, said = Pixels(32), list[str]()
    first = run(net, one, tmp_path / "cache")
    other = run(net, two, tmp_path / "cache", said)
    assert net.seen == 128
    assert not torch.equal(first.features, other.features)
    assert same(other, run(Pixels(32), two, None))
    assert first.images != other.images == features.images_of(two, other.rows, 2)
    assert len(said) == 1
    assert "3 of 3 parts are computed anew" in said[0]


def test_the_same_bytes_are_not_decoded_again(tmp_path: Path) -> None:
    index, net, said = build(bitmaps(tmp_path / "data", 0)), Pixels(32), list[str]()
    first = run(net, index, tmp_path / "cache")
    assert [path.name for path in stored(tmp_path / "cache")] == [f"0000{i}.safetensors" for i in range(3)]
    before = [path.stat().st_mtime_ns for path in stored(tmp_path / "cache")]
    assert same(run(net, index, tmp_path / "cache", said), first)
    assert [path.stat().st_mtime_ns for path in stored(tmp_path / "cache")] == before
    # Moved, copied, touched: the bytes are looked at, and remembered.
    (tmp_path / "data").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "copied")
    for place in ("moved", "copied"):
        assert same(run(net, build(tmp_path / place), tmp_path / "cache", said), first)
    build(tmp_path / "copied").path(30).touch()
    before = [path.stat().st_mtime_ns for path in stored(tmp_path / "cache")]
    assert same(run(net, build(tmp_path / "copied"), tmp_path / "cache", said), first)
    after = [path.stat().st_mtime_ns for path in stored(tmp_path / "cache")]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    assert net.seen == 64
    assert said == []


def test_an_image_that_is_changed_in_place_is_seen_anew(tmp_path: Path) -> None:
    index, net, said = build(bitmaps(tmp_path / "data", 0)), Pixels(32), list[str]()
    first = run(net, index, tmp_path / "cache")
    path = index.path(30)
    times = path.stat()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as copies that preserve times do
    again = run(net, index, tmp_path / "cache", said)
    assert net.seen == 64 + 24
    assert ((first.features != again.features).any(1).nonzero().flatten()).tolist() == [30]
    assert first.images != again.images
    assert "1 of 3 parts are computed anew" in said[0]


def test_members_of_shards_are_known_by_their_bytes(tmp_path: Path) -> None:
    def shards(folder: Path, value: int) -> Index:
        folder.mkdir(exist_ok=True)
        with tarfile.open(folder / "0.tar", "w") as archive:
            for number in range(8):
                image, box = io.BytesIO(), io.BytesIO(str(number % 2).encode())
                pixels = np.full((32, 32, 3), value if number == 5 else number, np.uint8)
                Image.fromarray(pixels).save(image, "bmp")
                for name, content in ((f"{number}.bmp", image), (f"{number}.cls", box)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content.getvalue())
                    archive.addfile(info, io.BytesIO(content.getvalue()))
        return build(folder)

    one, two = shards(tmp_path / "one", 90), shards(tmp_path / "two", 91)
    rows = np.arange(8)
    parts = [[contents.content(index, rows[i : i + 1]) for i in range(8)] for index in (one, two)]
    assert [a != b for a, b in zip(*parts, strict=True)].count(True) == 1
    assert all(whole for _, whole in parts[0])
    assert contents.stat(one, rows) == contents.stat(one, rows) != contents.stat(two, rows)


def test_a_change_while_features_are_computed_is_not_kept(tmp_path: Path) -> None:
    index = build(bitmaps(tmp_path / "data", 0))

    class Meddling(Pixels):
        def forward(self, images: Tensor) -> Tensor:
            if self.seen == 0:
                index.path(0).touch()
            return super().forward(images)

    run(Meddling(32), index, tmp_path / "cache")
    assert [path.name for path in stored(tmp_path / "cache")] == ["00001.safetensors", "00002.safetensors"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "GPU's memory"),
        (MemoryError(), "fit into memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "fit into memory"),
    ],
)
def test_too_little_memory_is_the_sets_own_error(stripes: Path, error: Exception, reason: str) -> None:
    class Large(Pixels):
        def forward(self, images: Tensor) -> Tensor:
            raise error

    with pytest.raises(FastrexError, match=rf"^transfer: mine, test images must .*{reason}.*; free some"):
        run(Large(32), build(stripes), None, name="mine, test images")


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    index = build(bitmaps(tmp_path / "data", 0))
    run(Pixels(32), index, tmp_path / "cache")
    folder = stored(tmp_path / "cache")[0].parent
    old, new = (folder / f".00001.safetensors.{pid}-0123abcd" for pid in (11, 12))
    for path, age in ((old, 2 * chunks.STALE_S), (new, 0.0)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    run(Pixels(32), index, tmp_path / "cache")
    assert not old.exists()
    assert new.exists()  # somebody may be writing it


def test_what_computes_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    import_timm()
    plain = (encoder(), torch.device("cpu"))
    foreign = (build_encoder(ModelConfig(arch="timm:test_vit"), 3), torch.device("cpu"))

    def key(net: nn.Module, device: torch.device) -> str:
        return keys.features("id", "ab", np.arange(3), {}, net, device)

    found = {key(*plain), key(plain[0], torch.device("cuda"))}
    assert len(found) == 2
    before = key(*foreign)
    versions = {"timm": "9.9", "nvidia-dali-cuda130": keys._version("nvidia-dali-cuda130")}
    monkeypatch.setattr(keys, "_version", versions.__getitem__)
    assert key(*plain) in found
    assert key(*foreign) != before
    versions["nvidia-dali-cuda130"] = "99.1.2"
    assert key(*plain) not in found


def test_a_long_extraction_says_how_far_it_is(
    stripes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(features, "PROGRESS_S", -1.0)
    run(Pixels(32), build(stripes), None, name="mine, test images")
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 3 + 3 + 2  # batches
    assert lines[-1].startswith("mine, test images: 64 of 64 images, ")


@pytest.mark.parametrize("change", ["identity", "size", "rows", "index"])
def test_whatever_features_depend_on_has_chunks_of_its_own(stripes: Path, tmp_path: Path, change: str) -> None:
    index, net = build(stripes), Pixels(32)
    run(net, index, tmp_path)
    rows, transform = index.rows("train", 0.0), SIZE_32
    if change == "size":
        transform = Transform(40, 32, MEAN, STD, 3)
    if change == "rows":
        rows = rows[:-1]
    if change == "index":
        index = index.with_status([len(index) - 1], [1])
    extract(net, "other" if change == "identity" else "id", index, rows, transform, ALONE, cache=tmp_path, note=print)
    assert net.seen == 64 + len(rows)
    assert len({path.parent for path in stored(tmp_path)}) == 2


def damaged(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[-9] ^= 1
    elif how == "truncated":
        content = content[:-100]
    elif how == "empty":
        content = bytearray()
    elif how == "other tensors":
        content = bytearray(safetensors.torch.save({"features": torch.zeros(24, 3)}))
    elif how == "another chunk":
        content = bytearray(path.with_name("00000.safetensors").read_bytes())
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "other tensors", "another chunk"])
def test_a_damaged_or_foreign_chunk_is_computed_anew_and_said(stripes: Path, tmp_path: Path, how: str) -> None:
    index, net, said = build(stripes), Pixels(32), list[str]()
    first = run(net, index, tmp_path)
    path = stored(tmp_path)[1]
    good = path.read_bytes()
    damaged(path, how)
    again = run(net, index, tmp_path, said)
    assert net.seen == 64 + 24
    assert same(first, again)
    assert len(said) == 1
    assert str(path) in said[0]
    assert "computed anew" in said[0]
    assert path.read_bytes() == good


def test_a_chunk_of_another_extraction_is_not_taken(stripes: Path, tmp_path: Path) -> None:
    index, said = build(stripes), list[str]()
    first = run(encoder(0), index, tmp_path)
    extract(encoder(1), "other", index, first.rows, SIZE_32, ALONE, cache=tmp_path, batch_size=10, note=said.append)
    one, two = sorted({path.parent for path in stored(tmp_path)}, key=lambda p: p.stat().st_mtime_ns)
    (two / "00001.safetensors").write_bytes((one / "00001.safetensors").read_bytes())
    other = run(encoder(1), index, None)
    again = extract(
        encoder(1), "other", index, first.rows, SIZE_32, ALONE, cache=tmp_path, batch_size=10, note=said.append
    )
    assert same(other, again)
    assert len(said) == 1
    assert "digest" in said[0]


def test_labels_that_are_not_the_indexs_are_an_error(stripes: Path, tmp_path: Path) -> None:
    index = build(stripes)
    first = run(Pixels(32), index, tmp_path)
    folder = stored(tmp_path)[0].parent
    store = chunks.Store(folder, folder.name, 3 * 32 * 32, print)
    chunk = chunks.Chunk(first.features[24:48], np.ones(24, bool), bytes(32), bytes(32))
    store.write(1, chunk, first.rows[24:48], (first.labels[24:48] + 1) % 4)
    with pytest.raises(FastrexError, match=r"labels in .*00001\.safetensors must be .*; remove the folder"):
        run(Pixels(32), index, tmp_path)


def test_features_that_are_not_finite_name_the_image(stripes: Path, tmp_path: Path) -> None:
    class Holed(Pixels):
        def forward(self, images: Tensor) -> Tensor:
            found = super().forward(images).clone()
            if self.seen == 44:
                found[3, 7] = torch.nan
            return found

    index = build(stripes)
    rows = index.rows("train", 0.0)
    # Chunks of 24 in batches of 10, 10 and 4: the fifth batch begins with the 35th image.
    name = index.name(int(rows[34 + 3]))
    with pytest.raises(FastrexError, match=r"finite features") as caught:
        run(Holed(32), index, tmp_path, batch_size=10, rows=rows)
    assert f"{name!r} of features and 0 more" in str(caught.value)
    assert "00001.safetensors" not in [path.name for path in stored(tmp_path)]


def test_images_gone_bad_are_left_out_by_name_and_may_come_back(tmp_path: Path) -> None:
    write_stripes(tmp_path / "data" / "train", 16, seed=0)
    index = build(tmp_path / "data")
    said: list[str] = []
    whole = run(Pixels(32), index, None)
    path = index.path(30)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    less = run(Pixels(32), index, tmp_path / "cache", said)
    assert less.rows.tolist() == [row for row in range(64) if row != 30]
    assert torch.equal(less.features, whole.features[less.rows])
    assert less.labels.tolist() == index.labels[less.rows].tolist()
    assert len(said) == 1
    assert repr(index.name(30)) in said[0]
    assert "left out" in said[0]
    # It is kept which one it was, as long as its bytes are the same.
    assert [p.name for p in stored(tmp_path / "cache")] == [f"0000{number}.safetensors" for number in range(3)]
    net = Pixels(32)
    assert same(run(net, index, tmp_path / "cache", said), less)
    assert net.seen == 0
    assert repr(index.name(30)) in said[1]
    path.write_bytes(content)
    assert same(run(Pixels(32), index, tmp_path / "cache"), whole)


def test_all_images_gone(tmp_path: Path) -> None:
    write_stripes(tmp_path / "data" / "train", 4, seed=0)
    index = build(tmp_path / "data")
    for row in range(len(index)):
        index.path(row).unlink()
    found = run(Pixels(32), index, tmp_path / "cache")
    assert found.features.shape == (0, 3 * 32 * 32)
    assert len(found.rows) == len(found.labels) == 0


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_cache_that_takes_no_more_does_not_cost_the_features(stripes: Path, tmp_path: Path) -> None:
    index, said = build(stripes), list[str]()
    with files_of_at_most(100_000):
        found = run(Pixels(32), index, tmp_path, said)
    assert same(found, run(Pixels(32), index, None))
    assert len(said) == 1
    assert "not kept" in said[0]
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob(".*"))


def test_a_cache_below_a_file_is_said(stripes: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    said: list[str] = []
    assert len(run(Pixels(32), build(stripes), tmp_path / "cache", said).features) == 64
    assert len(said) == 1
    assert "not kept" in said[0]


def test_identity_is_that_of_the_tensors_not_of_the_file(tmp_path: Path) -> None:
    net = encoder()
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, tmp_path / "a.pth")
    first = load_source(tmp_path / "a.pth")
    export(tmp_path / "a.pth", tmp_path / "b", "hf")
    assert keys.identity(first) == keys.identity(load_source(tmp_path / "b"))
    changed = {name: value.clone() for name, value in first.state.items()}
    changed["layer4.1.bn2.bias"][0] += 1e-7
    assert keys.identity(Source(changed, first.arch)) != keys.identity(first)
    assert keys.identity(Source(first.state, {**first.arch, "bn_eps": 1e-3})) != keys.identity(first)


def test_the_transform_of_a_source() -> None:
    plain = Source({}, {})
    assert Transform.of(plain) == Transform(224, 224, MEAN, STD, 3)
    assert Transform.of(plain, 64) == Transform(64, 64, MEAN, STD, 3)
    said = {"mean": (0.5, 0.5, 0.5), "std": (0.1, 0.1, 0.1), "eval_resize": 36, "eval_size": 32}
    assert Transform.of(Source({}, {}, said, channels=1)) == Transform(32, 32, (0.5,) * 3, (0.1,) * 3, 1)
    assert Transform.of(Source({}, {}, said), 48).size == 48


# The command with small chunks, and with a pause behind each when it is to be killed between two.
PROGRAM = """
import sys, time
from fastrex.transfer import chunks, contents, features, keys
from fastrex.cli import main
features.CHUNK = 8
pause, plain = float(sys.argv.pop(1)), chunks.Store.write
def write(self, number, *arguments, **more):
    plain(self, number, *arguments, **more)
    time.sleep(pause)
chunks.Store.write = write
main()
"""


def command(source: Path, data: Path, cache: Path, out: Path, pause: float = 0.0) -> list[str]:
    options = ["--probes", "ncm", "--cache", str(cache), "--out", str(out), "--size", "32", "--threads", "1"]
    return ["-c", PROGRAM, str(pause), "transfer", str(source), "--sets", f"mine={data}", *options, "--batch", "3"]


def test_a_killed_extraction_goes_on_also_on_two_ranks(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "encoder.pth"
    torch.save(encoder().state_dict(), source)
    cache, whole = tmp_path / "cache", tmp_path / "whole"
    with launch.one(tmp_path / "log", command(source, stripes, cache, tmp_path / "out", 0.3)) as job:
        job.until(lambda: len(stored(cache)) >= 2)
        job.send(signal.SIGKILL)
        job.wait()
    left = {path: path.stat().st_mtime_ns for path in stored(cache)}
    assert 2 <= len(left) < 8
    assert not (tmp_path / "out").exists()
    with launch.ranks(tmp_path / "log2", 2, command(source, stripes, cache, tmp_path / "out")) as job:
        assert job.wait() == [0, 0], job.output
    for path, written in left.items():
        assert path.stat().st_mtime_ns == written
    monkeypatch.setattr(features, "CHUNK", 8)
    assert fastrex(*command(source, stripes, whole, tmp_path / "other")[3:]).code == 0
    one, two = ({p.relative_to(folder): p.read_bytes() for p in stored(folder)} for folder in (cache, whole))
    assert len(one) == 8 + 2
    assert one == two


def test_an_error_on_one_of_two_ranks_ends_both_with_one_line(stripes: Path, tmp_path: Path) -> None:
    net = encoder()
    net.state_dict()["layer4.1.bn2.bias"].fill_(float("nan"))
    torch.save(net.state_dict(), tmp_path / "nan.pth")
    words = command(tmp_path / "nan.pth", stripes, tmp_path / "cache", tmp_path / "out")
    with launch.ranks(tmp_path / "log", 2, words) as job:
        assert job.wait() == [1, 1], job.output
    lines = [line for line in job.output.split("\n") if "no set gave a result" in line]
    assert len(lines) == 1
    assert "finite features" in lines[0]
    assert "class-0/00.jpg" in lines[0]
