"""The index of an image folder: layouts, odd files, held-out rows, storage, staleness."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import environment
from PIL import Image

from fastrex.data import headers, index, scan
from fastrex.data.index import Status
from fastrex.errors import FastrexError

NOISE = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTREX_CACHE", str(tmp_path_factory.mktemp("cache")))


def encoded(format: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    """A picture 30 high and 50 wide."""
    buffer = io.BytesIO()
    Image.fromarray(NOISE).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


JPEG = encoded(quality=60)


def tree(root: Path, *names: str) -> Path:
    """Write a small JPEG at every name below ``root``; a name that ends in "/" becomes an empty folder."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (root / name).mkdir(exist_ok=True)
        else:
            (root / name).write_bytes(JPEG)
    return root


def listed(built: index.Index) -> list[tuple[str, str, int]]:
    return [(built.name(i), built.classes[built.labels[i]], int(built.split[i])) for i in range(len(built))]


def refusal(root: Path, **options) -> str:
    """The one line of the error."""
    with pytest.raises(FastrexError) as caught:
        index.build(root, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_single_folder_with_hidden_nested_and_foreign_files(tmp_path):
    tree(tmp_path, "b/2.jpg", "b/1.JPEG", "b/deep/er/0.png", "a/x.webp", "a/._x.webp", ".git/c.jpg", "b/.thumbs/t.jpg")
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "readme.md").write_text("no image")
    built = index.build(tmp_path)
    assert (built.layout, built.classes, built.ignored, built.skipped) == ("single", ("a", "b"), 1, ())
    # Sorted by name as bytes: the folder "deep" follows the digits.
    expected = [("a/x.webp", "a", 0), ("b/1.JPEG", "b", 0), ("b/2.jpg", "b", 0), ("b/deep/er/0.png", "b", 0)]
    assert listed(built) == expected
    assert built.path(2) == tmp_path / "b" / "2.jpg"
    assert built.root == tmp_path
    assert (set(built.heights), set(built.widths), set(built.sizes)) == ({30}, {50}, {len(JPEG)})


@pytest.mark.parametrize(
    ("held_out", "layout"), [("val", "train+val"), ("validation", "train+val"), ("test", "train+test")]
)
def test_train_with_a_held_out_folder(tmp_path, held_out, layout):
    built = index.build(tree(tmp_path, "train/a/1.jpg", "train/b/2.jpg", f"{held_out}/a/3.jpg", "extra/z/9.jpg"))
    assert built.layout == layout
    assert listed(built) == [("train/a/1.jpg", "a", 0), ("train/b/2.jpg", "b", 0), (f"{held_out}/a/3.jpg", "a", 1)]
    assert built.rows("train", 0.5).tolist() == [0, 1]
    assert built.rows("val", 0.5).tolist() == [2]


def test_val_wins_over_test_and_unlabelled_test_images_are_no_split(tmp_path):
    built = index.build(tree(tmp_path / "1", "train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "test/a/4.jpg"))
    assert (built.layout, len(built)) == ("train+val", 3)
    built = index.build(tree(tmp_path / "2", "train/a/1.jpg", "train/b/2.jpg", "test/1.jpg"))
    assert (built.layout, len(built)) == ("single", 2)


def test_train_alone_is_a_single_folder(tmp_path):
    built = index.build(tree(tmp_path, "train/a/1.jpg", "train/b/2.jpg"))
    assert (built.layout, built.classes) == ("single", ("a", "b"))
    assert built.name(0) == "train/a/1.jpg"


def test_a_class_may_be_called_train_and_names_may_differ_in_case_only(tmp_path):
    built = index.build(tree(tmp_path, "train/1.jpg", "tractor/2.jpg", "Tractor/3.jpg"))
    assert (built.layout, built.classes) == ("single", ("Tractor", "tractor", "train"))


def test_names_that_are_not_utf8_survive_storage(tmp_path):
    folder = os.fsencode(tmp_path / "data")
    for name in (b"caf\xe9/\xff.jpg", "日本/é 1.jpg".encode(), b"line\nbreak/1.jpg"):
        os.makedirs(os.path.dirname(os.path.join(folder, name)))
        Path(os.fsdecode(os.path.join(folder, name))).write_bytes(JPEG)
    built = index.build(tmp_path / "data")
    index.save(built, tmp_path / "index.npz")
    loaded = index.load(tmp_path / "index.npz")
    assert loaded.classes == ("caf\udce9", "line\nbreak", "日本")
    assert os.fsencode(loaded.name(0)) == b"caf\xe9/\xff.jpg"
    assert all(loaded.path(row).read_bytes() == JPEG for row in range(3))


def test_classes_that_differ_in_case_only_are_kept_apart_with_a_notice(tmp_path):
    root = tree(tmp_path, "Dog/1.jpg", "dog/1.jpg", "DOG/1.jpg", "cat/1.jpg")
    built = index.build(root)
    assert built.classes == ("DOG", "Dog", "cat", "dog")
    assert built.notices == ("classes 'DOG', 'Dog', 'dog' differ in case only and are kept apart",)
    index.save(built, tmp_path / "index.npz")
    assert index.load(tmp_path / "index.npz").notices == built.notices


def test_symlinks_out_of_the_folder_are_followed(tmp_path):
    tree(tmp_path / "data", "a/1.jpg", "b/2.jpg")
    tree(tmp_path / "elsewhere", "3.jpg", "deep/4.jpg")
    (tmp_path / "data" / "b" / "file.jpg").symlink_to(tmp_path / "elsewhere" / "3.jpg")
    (tmp_path / "data" / "b" / "folder").symlink_to(tmp_path / "elsewhere" / "deep")
    built = index.build(tmp_path / "data")
    assert [name for name, _, _ in listed(built)] == ["a/1.jpg", "b/2.jpg", "b/file.jpg", "b/folder/4.jpg"]
    assert built.bad() == []


def test_symlink_loops_end_and_bring_no_other_class_in(tmp_path):
    tree(tmp_path / "data", "a/1.jpg", "b/2.jpg", "b/deep/3.jpg")
    for link, target in (("a/self", "."), ("a/up", "../.."), ("a/root", ".."), ("b/deep/back", "..")):
        (tmp_path / "data" / link).symlink_to(target)
    (tmp_path / "data" / "loop").symlink_to("loop")
    (tmp_path / "data" / "b" / "loop.jpg").symlink_to("loop.jpg")
    tree(tmp_path / "elsewhere", "4.jpg")
    (tmp_path / "data" / "c").symlink_to("../elsewhere")
    built = index.build(tmp_path / "data")
    assert [name for name, _, _ in listed(built)] == ["a/1.jpg", "b/2.jpg", "b/deep/3.jpg", "b/loop.jpg", "c/4.jpg"]
    assert built.bad() == [("b/loop.jpg", scan.REASONS[Status.UNREADABLE])]


def with_thumbnail() -> bytes:
    """A JPEG whose header holds an end marker, as that of an embedded thumbnail."""
    return encoded(quality=60, comment=b"thumbnail" + JPEG[-2:] * 20)


TWO = encoded("MPO", save_all=True, append_images=[Image.fromarray(NOISE)])
ODD = {
    "good.jpg": (JPEG, Status.OK, (30, 50)),
    "grey.jpg": (encoded(mode="L"), Status.OK, (30, 50)),
    "cmyk.jpg": (encoded(mode="CMYK"), Status.OK, (30, 50)),
    "progressive.jpg": (encoded(progressive=True), Status.OK, (30, 50)),
    "padded.jpg": (JPEG + bytes(5000), Status.OK, (30, 50)),
    "film_behind.jpg": (JPEG + b"\xffx" * 100_000, Status.OK, (30, 50)),
    "turned.jpg": (encoded(exif=TURNED), Status.OK, (50, 30)),
    "turned.png": (encoded("PNG", exif=TURNED), Status.OK, (50, 30)),
    "turned.webp": (encoded("WEBP", exif=TURNED), Status.OK, (50, 30)),
    "turned.tif": (encoded("TIFF", exif=TURNED), Status.OK, (50, 30)),
    "bad_exif.jpg": (encoded(exif=b"Exif\0\0garbage"), Status.OK, (30, 50)),
    "two.jpg": (TWO, Status.OK, (30, 50)),
    "alpha.png": (encoded("PNG", mode="RGBA"), Status.OK, (30, 50)),
    "behind.png": (encoded("PNG") + b"x" * 500, Status.OK, (30, 50)),
    "png_named.jpg": (encoded("PNG"), Status.OK, (30, 50)),
    "raw.bmp": (encoded("BMP"), Status.OK, (30, 50)),
    "raw.ppm": (encoded("PPM"), Status.OK, (30, 50)),
    "grey.pgm": (encoded("PPM", mode="L"), Status.OK, (30, 50)),
    "wavelet.jp2": (encoded("JPEG2000"), Status.OK, (30, 50)),
    "lossless.webp": (encoded("WEBP", lossless=True), Status.OK, (30, 50)),
    "empty.jpg": (b"", Status.EMPTY, (0, 0)),
    "text.jpg": (b"<html>404</html>", Status.HEADER, (0, 0)),
    "cut_header.jpg": (JPEG[:100], Status.HEADER, (0, 0)),
    "animated.jpg": (encoded("GIF", mode="P"), Status.FORMAT, (0, 0)),
    "cut.jpg": (JPEG[: len(JPEG) // 2], Status.TRUNCATED, (30, 50)),
    "cut_end.jpg": (JPEG[:-2], Status.TRUNCATED, (30, 50)),
    "cut_behind_thumbnail.jpg": (with_thumbnail()[:-100], Status.TRUNCATED, (30, 50)),
    "cut_two.jpg": (TWO[: len(TWO) // 3], Status.TRUNCATED, (30, 50)),
    "cut.png": (encoded("PNG")[:-5], Status.TRUNCATED, (30, 50)),
    "cut.bmp": (encoded("BMP")[:2000], Status.TRUNCATED, (30, 50)),
    "cut.ppm": (encoded("PPM")[:-50], Status.TRUNCATED, (30, 50)),
    "cut.tif": (encoded("TIFF", exif=TURNED)[:-50], Status.TRUNCATED, (50, 30)),
    "cut.jp2": (encoded("JPEG2000")[:-5], Status.TRUNCATED, (30, 50)),
    "cut.webp": (encoded("WEBP")[:-5], Status.HEADER, (0, 0)),
}


def huge_png() -> bytes:
    """A PNG header that claims 30000 x 30000 pixels."""
    data = bytearray(encoded("PNG"))
    data[16:24] = (30000).to_bytes(4, "big") * 2
    data[29:33] = __import__("zlib").crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_every_odd_file_gets_its_status_and_its_decoded_shape(tmp_path):
    odd = ODD | {"bomb.png": (huge_png(), Status.TOO_LARGE, (0, 0))}
    tree(tmp_path, "a/good.jpg")
    (tmp_path / "b").mkdir()
    for name, (data, _, _) in odd.items():
        (tmp_path / "b" / name).write_bytes(data)
    (tmp_path / "b" / "dangling.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(tmp_path / "b" / "pipe.jpg")
    (tmp_path / "b" / "folder.jpg").mkdir()
    assert JPEG[-2:] in with_thumbnail()[:-100]
    built = index.build(tmp_path)
    found = {}
    for row in range(1, len(built)):
        shape = int(built.heights[row]), int(built.widths[row])
        found[built.name(row)[2:]] = Status(built.status[row]), shape
    expected = {name: (status, shape) for name, (_, status, shape) in odd.items()}
    assert found == expected | dict.fromkeys(("dangling.jpg", "pipe.jpg"), (Status.UNREADABLE, (0, 0)))
    bad = dict(built.bad())
    assert bad["b/empty.jpg"] == "empty file"
    assert "cut off" in bad["b/cut.jpg"]
    assert len(bad) == sum(status != Status.OK for status, _ in found.values())
    good = built.rows("train", 0.0)
    assert len(good) == len(built) - len(bad)
    assert (built.status[good] == Status.OK).all()


def by_pillow(path: Path) -> tuple[int, int, int]:
    with open(path, "rb") as file:
        return headers._examine_by_pillow(file.fileno(), 0, path.stat().st_size)


@pytest.mark.filterwarnings("ignore")
def test_the_quick_look_at_a_header_says_what_pillow_says(tmp_path):
    path, rng = tmp_path / "x", random.Random(0)
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x011A] = "maker", 8, 72.0
    more = [encoded(exif=exif, icc_profile=b"x" * 3000), encoded("PNG", dpi=(72, 72)), encoded("PNG", mode="P")]
    seeds = [data for data, _, _ in ODD.values() if data[:3] in (b"\xff\xd8\xff", b"\x89PN") and len(data) < 10_000]
    quick = 0
    for turn in range(3000):
        data = bytearray(rng.choice([*seeds, *more]))
        if turn > 100:
            for _ in range(rng.choice([1, 1, 3])):
                place = rng.randrange(min(len(data), 700))
                new = [b"", b"\0", b"\xff", b"\xff\xd9", bytes([rng.randrange(256)]), b"\xe1", b"\0\x08"]
                data[place : place + rng.randrange(3)] = rng.choice(new)
        path.write_bytes(data)
        with open(path, "rb") as file, pytest.MonkeyPatch.context() as patch:
            patch.setattr(headers, "_examine_by_pillow", lambda *place: None)
            found = headers.examine(file.fileno(), 0, len(data))
        if found is not None:
            quick += 1
            assert found == by_pillow(path), bytes(data)
    assert quick > 500


def test_the_training_decoder_sees_the_same_shapes_and_refuses_what_is_bad():
    dali = pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")

    def decode(data: bytes) -> tuple[int, ...]:
        pipeline = dali.Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
        with pipeline:
            image = dali.fn.decoders.image(dali.fn.external_source(name="file", ndim=1), output_type=dali.types.RGB)
            pipeline.set_outputs(image)
        pipeline.build()
        pipeline.feed_input("file", [np.frombuffer(data, np.uint8)])
        return np.array(pipeline.run()[0][0]).shape

    for name, (data, status, shape) in ODD.items():
        if status == Status.OK:
            assert decode(data) == (*shape, 3), name
        elif data:
            with pytest.raises(RuntimeError, match=r"decoders\.image"):
                decode(data)


def test_a_limit_between_warning_and_refusal_of_pillow_passes_silently(tmp_path, monkeypatch):
    # Pillow warns above MAX_IMAGE_PIXELS and refuses above twice that; 1500 pixels lie between.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert index.build(tree(tmp_path, "a/1.jpg", "b/2.jpg")).bad() == []


def test_every_status_has_a_reason():
    assert set(scan.REASONS) == set(Status)


def held_out_tree(root: Path) -> index.Index:
    """Classes of 1, 2, 3, 10 and 25 images."""
    sizes = {"one": 1, "two": 2, "three": 3, "ten": 10, "twenty-five": 25}
    return index.build(tree(root, *(f"{name}/{i:02d}.jpg" for name, n in sizes.items() for i in range(n))))


@pytest.mark.parametrize(
    ("held_out", "expected"),
    [
        (0.0, {"one": 0, "two": 0, "three": 0, "ten": 0, "twenty-five": 0}),
        (0.1, {"one": 0, "two": 1, "three": 1, "ten": 1, "twenty-five": 2}),
        (0.3, {"one": 0, "two": 1, "three": 1, "ten": 3, "twenty-five": 8}),
        (0.9, {"one": 0, "two": 1, "three": 2, "ten": 9, "twenty-five": 22}),
    ],
)
def test_held_out_part_of_each_class(tmp_path, held_out, expected):
    built = held_out_tree(tmp_path)
    train, val = built.rows("train", held_out), built.rows("val", held_out)
    assert sorted(np.concatenate((train, val)).tolist()) == list(range(41))
    assert (np.diff(train) > 0).all()
    assert (np.diff(val) > 0).all()
    counts = np.bincount(built.labels[val], minlength=5)
    assert dict(zip(built.classes, counts.tolist(), strict=True)) == expected
    for label in range(5):
        held, kept = (built.split_key[rows[built.labels[rows] == label]] for rows in (val, train))
        assert len(held) == 0 or held.max() < kept.min()


def test_the_held_out_choice_hangs_on_the_names_only(tmp_path):
    first = held_out_tree(tmp_path / "first")
    held = {first.name(row) for row in first.rows("val", 0.2)}
    # Other classes and unreadable neighbours come in, files are written in another order.
    tree(tmp_path / "second", "aaa/1.jpg", *reversed([first.name(row) for row in range(len(first))]))
    (tmp_path / "second" / "ten" / "zz.jpg").write_bytes(b"")
    second = index.build(tmp_path / "second", threads=1)
    assert {second.name(row) for row in second.rows("val", 0.2)} == held
    assert second.rows("val", 0.2).dtype == np.int64
    # About a fifth, wherever the name stands in the alphabet: a choice of the first names would hold 00 out.
    assert {name[-6:] for name in held} != {f"{i:02d}.jpg" for i in range(len({name[-6:] for name in held}))}
    with pytest.raises(ValueError, match="held_out must"):
        second.rows("train", 1.0)
    with pytest.raises(ValueError, match="split must"):
        second.rows("test", 0.1)


def test_unusable_folders_are_refused_with_a_way_out(tmp_path):
    assert "does not exist; give the folder" in refusal(tmp_path / "missing")
    assert "is a file; give the folder" in refusal(tree(tmp_path, "file.jpg") / "file.jpg")
    assert "no class folders, 2 images directly in it; expected CLASS/" in refusal(
        tree(tmp_path / "flat", "1.jpg", "2.jpg")
    )
    flat_val = tree(tmp_path / "flat_val", "train/a/1.jpg", "train/b/1.jpg", "val/1.jpg")
    assert "flat_val/val': no class folders, 1 images directly" in refusal(flat_val)
    assert "found test/, val/ but no train/" in refusal(tree(tmp_path / "no_train", "val/a/1.jpg", "test/b/1.jpg"))
    unknown = tree(tmp_path / "unknown", "train/a/1.jpg", "train/b/1.jpg", "val/c\n/1.jpg")
    assert "unknown/val': class 'c\\n' not in train/" in refusal(unknown)
    # One class is for those to refuse who need two.
    assert index.build(tree(tmp_path / "one", "a/1.jpg")).classes == ("a",)
    (tmp_path / "texts" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "a" / "1.txt").write_text("")
    assert "no image in any class folder, 1 other files" in refusal(tmp_path / "texts")
    (tmp_path / "broken" / "a").mkdir(parents=True)
    (tmp_path / "broken" / "a" / "1.jpg").write_text("")
    assert "no readable training image ('a/1.jpg': empty file)" in refusal(tmp_path / "broken", empty_classes="skip")
    with pytest.raises(ValueError, match="empty_classes must"):
        index.build(tmp_path, empty_classes="ignore")


def test_empty_classes_are_refused_or_skipped(tmp_path):
    tree(tmp_path, "train/a/1.jpg", "train/b/", "train/c/1.jpg", "train/d/1.jpg", "val/b/2.jpg", "val/c/2.jpg")
    (tmp_path / "train" / "d" / "1.jpg").write_bytes(JPEG[:-2])
    message = refusal(tmp_path)
    assert "no readable training image in class 'b'" in message
    assert "data.empty_classes=skip" in message
    built = index.build(tmp_path, empty_classes="skip")
    assert (built.classes, built.skipped) == (("a", "c"), ("b", "d"))
    assert listed(built) == [("train/a/1.jpg", "a", 0), ("train/c/1.jpg", "c", 0), ("val/c/2.jpg", "c", 1)]
    (tmp_path / "train" / "b" / "1.jpg").write_bytes(JPEG)
    assert "class 'd'" in refusal(tmp_path)


def test_progress_counts_every_file_up_to_all(tmp_path):
    tree(tmp_path, *(f"{name}/{i}.jpg" for name in "ab" for i in range(70)))
    calls = []
    index.build(tmp_path, threads=2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(64, 140), (128, 140), (140, 140)]


def test_files_that_are_waited_for_are_read_by_several_threads():
    users: set[str] = set()

    def wait(number: int) -> int:
        users.add(threading.current_thread().name)
        time.sleep(0.002)
        return number

    assert list(scan.in_order(wait, range(100), threads=4)) == list(range(100))
    assert len(users) == 5
    users.clear()
    assert list(scan.in_order(wait, range(20), threads=1)) == list(range(20))
    assert len(users) == 1


def test_an_interrupt_stops_the_scan(tmp_path):
    tree(tmp_path, *(f"{name}/{i}.jpg" for name in "ab" for i in range(70)))

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index.build(tmp_path, progress=interrupt)
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def same(one: index.Index, two: index.Index) -> bool:
    pairs = [(getattr(one, field.name), getattr(two, field.name)) for field in dataclasses.fields(index.Index)]
    return all(np.array_equal(a, b) and type(a) is type(b) for a, b in pairs)


def test_storage_keeps_everything_and_threads_change_nothing(tmp_path):
    tree(tmp_path / "data", *(f"train/{name}/{i}.jpg" for name in "abc" for i in range(40)), "val/a/1.jpg")
    (tmp_path / "data" / "train" / "c" / "bad.jpg").write_bytes(JPEG[:200])
    built = index.build(tmp_path / "data", threads=1)
    index.save(built, tmp_path / "kept" / "index.npz")
    loaded = index.load(tmp_path / "kept" / "index.npz")
    assert same(built, loaded)
    assert same(built, index.build(tmp_path / "data", threads=5))
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["index.npz"]
    for field in ("labels", "heights", "offsets"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(loaded, field)[0] = 1


def test_the_fingerprint_follows_the_content_not_the_place(tmp_path):
    one, two = (index.build(tree(tmp_path / name, "a/1.jpg", "b/2.jpg")) for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    (tmp_path / "two" / "b" / "2.jpg").write_bytes(JPEG + b"\0")
    changed = index.build(tmp_path / "two").fingerprint
    (tmp_path / "two" / "b" / "2.jpg").write_bytes(JPEG)
    (tmp_path / "two" / "b" / "2.jpg").rename(tmp_path / "two" / "b" / "3.jpg")
    renamed = index.build(tmp_path / "two").fingerprint
    assert len({one.fingerprint, changed, renamed}) == 3


def test_a_failed_save_keeps_the_old_index(tmp_path, monkeypatch):
    built = index.build(tree(tmp_path / "data", "a/1.jpg", "b/2.jpg"))
    index.save(built, tmp_path / "index.npz")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FastrexError, match=r"No space left on device.*FASTREX_CACHE"):
        index.save(built, tmp_path / "index.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "index.npz"]
    assert same(built, index.load(tmp_path / "index.npz"))


def test_damaged_missing_and_newer_indexes_are_refused(tmp_path, monkeypatch):
    built = index.build(tree(tmp_path / "data", "a/1.jpg", "b/2.jpg"))
    path = tmp_path / "index.npz"
    with pytest.raises(FastrexError, match="no index here; run `fastrex data index PATH` again"):
        index.load(path)
    index.save(built, path)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    survived = 0
    for place in rng.integers(0, len(good), 150).tolist():
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
        # A bit in a date or a permission of the archive changes nothing that is read.
        with contextlib.suppress(FastrexError):
            assert same(index.load(path), built)
            survived += 1
    assert survived < 75
    for length in (0, 1, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(FastrexError, match="damaged index"):
            index.load(path)
    monkeypatch.setattr(index, "VERSION", index.VERSION + 1)
    index.save(built, path)
    monkeypatch.undo()
    with pytest.raises(
        FastrexError, match=f"index format {index.VERSION + 1}, this fastrex reads {index.VERSION}; run"
    ):
        index.load(path)


def test_an_index_of_the_first_format_is_built_anew(tmp_path, monkeypatch):
    root = tree(tmp_path / "data", "a/1.jpg", "b/2.jpg")
    with monkeypatch.context() as patch:
        patch.setattr(index, "VERSION", 1)
        index.save(index.build(root), index.default_path(root))
    with pytest.raises(FastrexError, match="index format 1, this fastrex reads"):
        index.load(index.default_path(root))
    assert len(index.open_or_build(root)) == 2


def test_other_statuses_make_another_index(tmp_path):
    root = tree(tmp_path / "data", "a/1.jpg", "a/2.jpg", "b/3.jpg", "c/4.jpg")
    built = index.build(root)
    changed = built.with_status([1, 2], [Status.DECODE, Status.CHANGED])
    assert [name for name, _ in changed.bad()] == ["a/2.jpg", "b/3.jpg"]
    assert changed.fingerprint != built.fingerprint
    assert built.bad() == []
    assert same(changed.with_status([1, 2], [Status.OK, Status.OK]), built)
    # What was found bad stays bad until the index is built anew; a class may end with it.
    index.save(built.with_status([1], [Status.DECODE]), index.default_path(root))
    assert len(index.open_or_build(root).bad()) == 1
    index.save(changed, index.default_path(root))
    with pytest.raises(FastrexError, match=r"no readable training image in class 'b'.*data\.empty_classes=skip"):
        index.open_or_build(root)
    skipped = index.open_or_build(root, empty_classes="skip")
    assert (skipped.classes, skipped.skipped) == (("a", "c"), ("b",))
    assert listed(skipped) == [("a/1.jpg", "a", 0), ("a/2.jpg", "a", 0), ("c/4.jpg", "c", 0)]


def test_an_index_as_large_as_imagenet_is_loaded_in_300_mb(tmp_path):
    rows = 1_281_167
    labels = np.sort(np.arange(rows) % 1000).astype(np.int32)
    paths = [b"train/n%08d/n%08d_%d.JPEG" % (label, label, row) for row, label in enumerate(labels.tolist())]
    columns = {name: np.ones(rows, dtype) for name, dtype in (index.COLUMNS | index.PLACES).items()}
    columns |= {"labels": labels, "status": np.zeros(rows, np.uint8), "shard": (labels % 99).astype(np.int32)}
    columns["offsets"] = np.concatenate(([0], np.cumsum([len(path) for path in paths])))
    meta = {"root": "/data", "layout": "single", "classes": [str(label) for label in range(1000)], "skipped": []}
    meta |= {"ignored": 0, "notices": [], "shards": [f"{number}.tar" for number in range(99)], "stamp": ""}
    index.save(index._assemble(meta, b"".join(paths), columns), tmp_path / "index.npz")
    del paths, columns, labels
    # Not getrusage: its peak is that of the process which started this one, too.
    code = (
        "import re, sys; from fastrex.data import index; built = index.load(sys.argv[1]); "
        "print(len(built), *re.findall(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read()))"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "index.npz")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment())
    loaded, kilobytes = map(int, done.stdout.split())
    assert loaded == rows
    assert kilobytes < 300_000


@pytest.mark.parametrize("labels", [[0, 2], [-1, 0], [1, 0]])
def test_an_index_with_other_labels_is_refused(tmp_path, labels):
    built = index.build(tree(tmp_path / "data", "a/1.jpg", "b/2.jpg"))
    index.save(dataclasses.replace(built, labels=np.array(labels, np.int32)), tmp_path / "index.npz")
    with pytest.raises(FastrexError, match="damaged index"):
        index.load(tmp_path / "index.npz")


def test_open_or_build_builds_once_and_again_when_the_folder_changed(tmp_path, monkeypatch):
    root = tree(tmp_path / "data", "a/1.jpg", "b/2.jpg")
    built = index.open_or_build(root)
    # Nothing is written into a folder of images unasked.
    assert {p.name for p in root.iterdir()} == {"a", "b"}
    assert list((index.cache_dir() / "index").iterdir())

    def fail(*args, **kwargs):
        raise AssertionError("the stored index was not used")

    with monkeypatch.context() as patch:
        patch.setattr(index, "build", fail)
        assert same(index.open_or_build(root), built)
        (root / "notes.txt").write_text("files beside the class folders do not matter")
        assert same(index.open_or_build(root), built)
        # What `fastrex data index` writes goes with the folder.
        assert index.default_path(root) == root / ".fastrex" / "index.npz"
        index.save(built, index.default_path(root))
        moved = root.rename(tmp_path / "moved")
        assert index.open_or_build(moved).path(0) == moved / "a" / "1.jpg"
        moved.rename(root)
    tree(root, "a/3.jpg")
    assert len(index.open_or_build(root)) == 3
    tree(root, "c/1.jpg")
    assert index.open_or_build(root).classes == ("a", "b", "c")
    (root / "c" / "1.jpg").unlink()
    (root / "c").rmdir()
    assert index.open_or_build(root).classes == ("a", "b")
    for stored in (index.default_path(root), *(index.cache_dir() / "index").iterdir()):
        stored.write_bytes(b"damaged")
    assert index.open_or_build(root).classes == ("a", "b")


def test_an_index_that_skipped_classes_does_not_hide_them(tmp_path):
    root = tree(tmp_path, "a/1.jpg", "b/2.jpg", "c/")
    assert index.open_or_build(root, empty_classes="skip").skipped == ("c",)
    assert index.open_or_build(root, empty_classes="skip").skipped == ("c",)
    with pytest.raises(FastrexError, match=r"class 'c'.*data\.empty_classes=skip"):
        index.open_or_build(root)


def test_a_folder_that_cannot_be_written_is_indexed_in_the_cache(tmp_path, monkeypatch):
    root = tree(tmp_path / "data", "a/1.jpg", "b/2.jpg")
    # A file in the place of the folder: true for every user, while root may write into a read-only one.
    (root / ".fastrex").write_text("")
    stored = index.default_path(root)
    assert stored.parent == index.cache_dir() / "index"
    built = index.open_or_build(root)
    assert stored.is_file()
    monkeypatch.setattr(index, "build", lambda *args, **kwargs: pytest.fail("the cached index was not used"))
    assert same(index.open_or_build(root), built)


def test_a_read_only_folder_is_indexed_in_the_cache(tmp_path, monkeypatch):
    root = tree(tmp_path / "data", "a/1.jpg", "b/2.jpg")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert index.default_path(root).parent == index.cache_dir() / "index"


def test_imagenet_sample():
    data = os.environ.get("FASTREX_TEST_DATA")
    if not data or not (Path(data) / "imagenet-sample").is_dir():
        pytest.skip("FASTREX_TEST_DATA names no folder with imagenet-sample")
    built = index.build(Path(data) / "imagenet-sample")
    assert (built.layout, len(built), len(built.classes), built.bad()) == ("single", 400, 400, [])
    assert len(built.rows("train", 0.1)) == 400
    assert len(built.rows("val", 0.1)) == 0
    for row in range(0, 400, 40):
        with Image.open(built.path(row)) as image:
            assert image.size == (built.widths[row], built.heights[row])
