"""Tar shards: read by offset, written from every kind of source; what is cut, damaged or ambiguous."""

from __future__ import annotations

import io
import json
import os
import random
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fastrex import cli
from fastrex.data import index, sharding, tars
from fastrex.errors import FastrexError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTREX_CACHE", str(tmp_path_factory.mktemp("cache")))


def picture(number: int, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20 + number % 7, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


JPEG = picture(0)
PAIRS = [("x/1.jpg", JPEG), ("x/1.cls", b"0"), ("y/2.png", picture(1, "PNG")), ("y/2.cls", b"1\n")]


def tar(path: Path, members, format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format, errors="surrogateescape") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def content(built: index.Index, row: int) -> bytes:
    path, first, size = built.locate(row)
    with open(path, "rb") as file:
        file.seek(first)
        return file.read(size)


def listed(built: index.Index) -> list[tuple[str, str, int]]:
    return [(built.name(i), built.classes[built.labels[i]], int(built.split[i])) for i in range(len(built))]


def refusal(path: Path) -> str:
    with pytest.raises(FastrexError) as caught:
        index.build(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


LONG = "d" * 90 + "/" + "n" * 90
NAMES = [("1.jpg", "1.cls"), (f"{LONG}.jpg", f"{LONG}.cls"), (f"{LONG * 2}.jpg", f"{LONG * 2}.cls")]
NAMES += [("日本/é.JPG", "日本/é.cls"), ("caf\udce9.jpg", "caf\udce9.cls"), ("./a b/c.jpeg", "a b/c.CLS")]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar_is_read_by_offset(tmp_path, format):
    names = [pair for pair in NAMES if len(pair[0]) < 250 or format != tarfile.USTAR_FORMAT]
    members = [
        pair
        for number, (image, label) in enumerate(names)
        for pair in ((image, picture(number)), (label, b"%d" % (number % 2)))
    ]
    path = tar(tmp_path / "x.tar", members, format)
    built = index.build(path)
    found = {built.name(row): content(built, row) for row in range(len(built))}
    assert found == {"x.tar/" + image.removeprefix("./"): picture(number) for number, (image, _) in enumerate(names)}
    assert (built.root, built.shards, built.classes, built.notices, built.bad()) == (
        tmp_path,
        ("x.tar",),
        ("0", "1"),
        (),
        [],
    )
    with tarfile.open(path, errors="surrogateescape") as archive:
        places = {"x.tar/" + member.name.removeprefix("./"): member.offset_data for member in archive}
    assert all(places[built.name(row)] == built.locate(row)[1] for row in range(len(built)))
    heights = {built.name(row): int(built.heights[row]) for row in range(len(built))}
    assert heights == {"x.tar/" + image.removeprefix("./"): 20 + number for number, (image, _) in enumerate(names)}


def test_labels_from_cls_and_json_as_numbers_and_names(tmp_path):
    members = [(f"{number}.jpg", picture(number)) for number in range(6)]
    labels = [
        ("0.cls", b"cat"),
        ("1.json", b'{"label": "dog"}'),
        ("2.json", b'{"class": "cat", "x": 1}'),
        ("3.cls", b" dog\n"),
    ]
    labels += [("4.json", b'{"label": "cow"}'), ("4.cls", b"cat"), ("5.json", b'{"cls": "dog"}'), ("5.txt", b"a dog")]
    # The labels stand behind all images: the order of the members means nothing.
    built = index.build(tar(tmp_path / "x.tar", members + labels))
    assert [label for _, label, _ in sorted(listed(built))] == ["cat", "dog", "cat", "dog", "cat", "dog"]
    assert built.ignored == 1
    numbers = [
        pair
        for number, label in enumerate((10, 9, 10))
        for pair in ((f"{number}.jpg", JPEG), (f"{number}.cls", b"%d" % label))
    ]
    assert index.build(tar(tmp_path / "numbers.tar", numbers)).classes == ("9", "10")


def test_a_table_of_classes_gives_names_to_numbers(tmp_path):
    path = tar(tmp_path / "x.tar", PAIRS)
    (tmp_path / "classes.txt").write_text("zebra\nape\n")
    assert listed(index.build(path)) == [("x.tar/x/1.jpg", "zebra", 0), ("x.tar/y/2.png", "ape", 0)]
    (tmp_path / "classes.json").write_text(json.dumps({"ape": 1, "zoo": 0}))
    assert index.build(path).classes == ("zoo", "ape")
    (tmp_path / "classes.json").write_text(json.dumps(["a", "b", "c"]))
    assert "no readable training image in class 'c'" in refusal(path)
    assert index.build(path, empty_classes="skip").skipped == ("c",)
    (tmp_path / "classes.json").write_text(json.dumps(["a"]))
    assert re.search(r"x\.tar', sample 'y/2': label 1 is out of range.*names 1 classes", refusal(path))
    tar(tmp_path / "x.tar", [*PAIRS, ("z.jpg", JPEG), ("z.cls", b"cow")])
    (tmp_path / "classes.json").write_text(json.dumps(["a", "b"]))
    assert "sample 'z': class 'cow' is not in classes.json" in refusal(path)
    for wrong in ('["a", "a"]', '{"a": 1, "b": 2}', '["a", 3]', "{", '["a", ""]', "[" * 100_000):
        (tmp_path / "classes.json").write_text(wrong)
        assert "classes.json': " in refusal(path)


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (("train/1.tar", "val/1.tar"), "train+val"),
        (("train/1.tar", "validation/1.tar", "test/1.tar"), "train+val"),
        (("train/1.tar", "test/1.tar"), "train+test"),
        (("train-000.tar", "val-000.tar"), "train+val"),
        (("imagenet1k-train-0000.TAR", "imagenet1k-validation-00.tar"), "train+val"),
        (("train_0.tar", "test_0.tar"), "train+test"),
        (("train-0.tar", "train-1.tar"), "single"),
        (("shard-0.tar", "strain-1.tar"), "single"),
        (("train/1.tar",), "single"),
    ],
)
def test_splits_by_folder_and_by_name(tmp_path, names, layout):
    for name in names:
        tar(tmp_path / name, PAIRS)
    (tmp_path / ".hidden.tar").write_text("")
    built = index.build(tmp_path)
    used = [name for name in names if not (name.startswith("test") and "val" in layout)]
    assert (built.layout, len(built)) == (layout, 2 * len(used))
    assert {name.rsplit("/", 2)[0] for name, _, _ in listed(built)} == set(used)
    assert {name.rsplit("/", 2)[0] for name, _, split in listed(built) if split} == (
        set(used[1:]) if "+" in layout else set()
    )


def test_shards_that_say_no_split_and_folders_beside_tars(tmp_path):
    tar(tmp_path / "1" / "train-0.tar", PAIRS)
    tar(tmp_path / "1" / "other.tar", PAIRS)
    assert "is 'other.tar' for train or val?" in refusal(tmp_path / "1")
    tar(tmp_path / "2" / "val-0.tar", PAIRS)
    assert "found val but no train" in refusal(tmp_path / "2")
    # A folder of images in which the archives were left that it was unpacked from.
    for name in "ab":
        (tmp_path / "3" / "train" / name).mkdir(parents=True)
        (tmp_path / "3" / "train" / name / "1.jpg").write_bytes(JPEG)
    tar(tmp_path / "3" / "all.tar", PAIRS)
    tar(tmp_path / "3" / "train" / "a.tar", PAIRS)
    assert [name for name, _, _ in listed(index.build(tmp_path / "3"))] == ["train/a/1.jpg", "train/b/1.jpg"]
    tar(tmp_path / "4" / "all.tar", PAIRS)
    (tmp_path / "4" / "logs").mkdir()
    assert "tar shards must not stand beside folders" in refusal(tmp_path / "4")


def test_hidden_members_links_and_pictures_that_belong_to_others(tmp_path):
    path = tar(
        tmp_path / "x.tar", [*PAIRS, ("x/._1.jpg", b"mac"), (".git/3.jpg", JPEG), ("x/1.seg.png", picture(2, "PNG"))]
    )
    with tarfile.open(path, "a") as archive:
        for name, kind in (
            ("hard.jpg", tarfile.LNKTYPE),
            ("soft.jpg", tarfile.SYMTYPE),
            ("folder.jpg", tarfile.DIRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "x/1.jpg"
            archive.addfile(member)
        for name in ("hard.cls", "soft.cls", "v.left.jpg", "v.right.jpg", "v.cls", "empty.jpg", "empty.cls"):
            data = b"" if name == "empty.jpg" else JPEG if name.endswith("jpg") else b"0"
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    built = index.build(path)
    names = ["empty.jpg", "hard.jpg", "soft.jpg", "v.left.jpg", "v.right.jpg", "x/1.jpg", "y/2.png"]
    assert [name for name, _, _ in listed(built)] == [f"x.tar/{name}" for name in names]
    assert built.ignored == 1
    assert {name: reason.split()[0] for name, reason in built.bad()} == {
        "x.tar/empty.jpg": "empty",
        "x.tar/hard.jpg": "cannot",
        "x.tar/soft.jpg": "cannot",
    }


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ([("x/1.jpg", JPEG)], "two images called 'x/1'"),
        ([("x/1.png", JPEG)], "two images called 'x/1'"),
        ([("x/1.cls", b"1")], "two .cls files called 'x/1'"),
        ([("z.jpg", JPEG)], "'z.jpg' has no label; give every image"),
        ([("z.jpg", JPEG), ("z.cls", b"-1")], "sample 'z': label -1 is out of range"),
        ([("z.jpg", JPEG), ("z.cls", b"4294967296")], "sample 'z': label 4294967296 is out of range"),
        ([("z.jpg", JPEG), ("z.cls", b"")], "sample 'z': the label is empty"),
        ([("z.jpg", JPEG), ("z.cls", b"1" * 100_000)], "sample 'z': its label takes 100000 bytes"),
        ([("z.jpg", JPEG), ("z.json", b"{")], "sample 'z': "),
        ([("z.jpg", JPEG), ("z.json", b'{"caption": ""}')], "none of the keys label, cls, class"),
        ([("z.jpg", JPEG), ("z.json", b'{"label": [1]}')], "neither a name nor a whole number"),
    ],
)
def test_ambiguous_and_unlabelled_samples_are_refused_by_name(tmp_path, more, fault):
    message = refusal(tar(tmp_path / "x.tar", PAIRS + more))
    assert "x.tar'" in message
    assert fault in message


def test_the_same_key_in_two_shards_is_two_samples(tmp_path):
    tar(tmp_path / "0.tar", PAIRS)
    tar(tmp_path / "1.tar", PAIRS)
    built = index.build(tmp_path)
    expected = ["0.tar/x/1.jpg", "1.tar/x/1.jpg", "0.tar/y/2.png", "1.tar/y/2.png"]
    assert [name for name, _, _ in listed(built)] == expected
    assert [content(built, row) for row in range(4)] == [JPEG, JPEG, PAIRS[2][1], PAIRS[2][1]]


def test_a_cut_shard_keeps_what_is_whole_and_names_what_is_not(tmp_path):
    big = [pair for n in range(4) for pair in ((f"{n}.cls", b"%d" % (n % 2)), (f"{n}.jpg", picture(n)))]
    whole = tar(tmp_path / "whole.tar", big).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        ends = {member.name: member.offset_data + member.size for member in archive}
    path = tmp_path / "cut.tar"

    def cut(length: int) -> index.Index:
        path.write_bytes(whole[:length])
        return index.build(path)

    built = cut(ends["3.jpg"] - 10)
    assert built.bad() == [("cut.tar/3.jpg", "cut off or damaged: its end is missing")]
    assert built.labels[3] == 1
    assert "cut off inside '3.jpg'" in built.notices[0]
    built = cut(ends["3.jpg"])
    assert built.bad() == []
    assert "its end mark is missing" in built.notices[0]
    assert len(cut(ends["3.cls"])) == 3
    # The image came first, and its label is lost: it is named, and not used.
    reverse = [pair for n in range(4) for pair in ((f"{n}.jpg", picture(n)), (f"{n}.cls", b"%d" % (n % 2)))]
    whole = tar(tmp_path / "whole.tar", reverse).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        ends = {member.name: member.offset_data + member.size for member in archive}
    for length in (ends["3.jpg"] - 10, ends["3.jpg"], ends["3.cls"] - 1):
        built = cut(length)
        assert built.bad() == [("cut.tar/3.jpg", "cut off or damaged: its end is missing")]
        assert len(built) == 4
        assert len(built.rows("train", 0.0)) == 3


def test_archives_that_cannot_be_read_are_refused_with_a_way_out(tmp_path):
    for mode in ("gz", "bz2", "xz"):
        path = tmp_path / f"x.tar.{mode}"
        with tarfile.open(path, f"w:{mode}") as archive:
            member = tarfile.TarInfo("1.jpg")
            member.size = len(JPEG)
            archive.addfile(member, io.BytesIO(JPEG))
        for name in (path.name, "renamed.tar"):
            (tmp_path / name).write_bytes(path.read_bytes())
            assert "decompress it first" in refusal(tmp_path / name)
    (tmp_path / "x.tar").write_bytes(b"")
    assert "not a tar archive (0 bytes)" in refusal(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(JPEG)
    assert "not a tar archive (no tar header at its start)" in refusal(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(bytes(10240))
    assert "no image in any shard" in refusal(tmp_path / "x.tar")
    (tmp_path / "x.tar").unlink()
    (tmp_path / "x.tar").symlink_to("nowhere.tar")
    assert "does not exist" in refusal(tmp_path / "x.tar")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.tar").symlink_to("nowhere.tar")
    assert "cannot read" in refusal(tmp_path / "sub")
    os.mkfifo(tmp_path / "pipe.tar")
    os.mkfifo(tmp_path / "pipe.csv")
    for name in ("pipe.tar", "pipe.csv"):
        assert "is a file; give the folder" in refusal(tmp_path / name)


def test_sparse_members_are_refused(tmp_path):
    data = bytearray(tar(tmp_path / "x.tar", PAIRS).read_bytes())
    data[156:157] = b"S"
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 256)
    (tmp_path / "x.tar").write_bytes(data)
    assert "holds sparse files; write it without --sparse" in refusal(tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("1.jpg")
        member.pax_headers = {"GNU.sparse.major": "1"}
        archive.addfile(member)
    assert "holds sparse files" in refusal(tmp_path / "x.tar")


def test_large_numbers_and_old_headers():
    assert tars._number(b"\x80" + (1 << 40).to_bytes(11, "big")) == 1 << 40
    assert tars._number(b"00000001750\0") == 1000
    assert tars._number(b"   1750 \0\0\0\0") == 1000
    with pytest.raises(tars._Damaged):
        tars._number(b"\xff" * 12)


def test_damaged_headers_end_a_shard_and_never_the_process(tmp_path):
    members = [pair for n in range(5) for pair in ((f"{n}.cls", b"%d" % (n % 2)), (f"{n}.jpg", JPEG))]
    good = tar(tmp_path / "good.tar", [*members, (LONG * 2 + ".txt", b"")]).read_bytes()
    rng = random.Random(0)
    path = tmp_path / "x.tar"
    notices = 0
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            block = rng.randrange(len(data) // 512) * 512
            data[block + rng.randrange(512)] = rng.choice([0, 0x30, 0x37, 0x80, 0xFF, rng.randrange(256)])
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
        try:
            notices += bool(index.build(path).notices)
        except FastrexError:
            continue
    assert notices > 20


def test_a_pax_header_of_a_gigabyte_is_not_read(tmp_path):
    data = bytearray(tar(tmp_path / "x.tar", PAIRS).read_bytes())
    header = tarfile.TarInfo("x").tobuf()
    long = bytearray(header)
    long[156:157], long[124:136] = b"x", b"%011o\0" % (1 << 30)
    long[148:156] = b"%06o\0 " % (sum(long[:148]) + sum(long[156:512]) + 256)
    end = max(place for place in range(0, len(data), 512) if any(data[place : place + 512])) + 512
    data[end : end + 512] = long
    (tmp_path / "x.tar").write_bytes(data)
    assert "damaged at byte" in index.build(tmp_path / "x.tar").notices[0]


def test_shards_are_opened_again_when_one_changed(tmp_path, monkeypatch):
    root = tmp_path / "shards"
    tar(root / "0.tar", PAIRS)
    built = index.open_or_build(root)
    with monkeypatch.context() as patch:
        patch.setattr(index, "build", lambda *args, **kwargs: pytest.fail("the stored index was not used"))
        again = index.open_or_build(root)
        assert (again.fingerprint, again.locate(1)) == (built.fingerprint, built.locate(1))
        moved = root.rename(tmp_path / "moved")
        index.save(built, index.default_path(moved))
        assert index.open_or_build(moved).locate(0)[0] == str(moved / "0.tar")
        moved.rename(root)
    tar(root / "0.tar", [*PAIRS[:2], ("y/3.jpg", JPEG), ("y/3.cls", b"1")])
    assert index.open_or_build(root).name(1) == "0.tar/y/3.jpg"
    tar(root / "1.tar", PAIRS)
    assert len(index.open_or_build(root)) == 4
    (root / "classes.txt").write_text("a\nb\n")
    assert index.open_or_build(root).classes == ("a", "b")


def test_an_index_that_points_out_of_its_folder_is_refused(tmp_path):
    built = index.build(tar(tmp_path / "0.tar", PAIRS))
    meta, columns = built._meta(), built._columns()
    for change in ({"shards": ["../0.tar"]}, {"shards": ["/etc/x.tar"]}, {"shards": ["a\0.tar"]}):
        with pytest.raises(ValueError, match="leads out"):
            index._assemble(meta | change, built.blob, columns)
    for path in (b"../x", b"/etc/hos", b"a\0b"):
        blob = path + b"0.tar/y/2.png"
        offsets = np.array([0, len(path), len(blob)])
        with pytest.raises(ValueError, match="leads out"):
            index._assemble(meta, blob, columns | {"offsets": offsets})
    for change in ({"shard": np.array([0, 1], np.int32)}, {"first": np.array([0, -1])}):
        with pytest.raises(ValueError, match="outside of the shards"):
            index._assemble(meta, built.blob, columns | change)


def folder(root: Path, held: str | None = "val") -> Path:
    """Five kinds of odd names, a bad file, an empty one, and classes whose names need escapes."""
    names = ["b/1.JPEG", "b/a.b.c.jpg", "b/a_b_c.jpg", "b/__x.png", "caf\udce9/é.jpg", "caf\udce9/deep/1.jpg"]
    for number, name in enumerate([f"train/{n}" for n in names] + ([f"{held}/b/9.jpg"] if held else [])):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number, "PNG" if name.endswith("png") else "JPEG"))
    (root / "train" / "b" / "bad.jpg").write_bytes(JPEG[:-2])
    (root / "train" / "b" / "empty.jpg").write_bytes(b"")
    return root


def samples(built: index.Index, split: int | None = None) -> list[tuple[bytes, str, int, int, int, int]]:
    """What does not depend on where an image is stored."""
    good = [row for row in np.flatnonzero(built.status == 0) if split is None or built.split[row] == split]
    classes = [built.classes[label] for label in built.labels]
    columns = (built.sizes, built.heights, built.widths, built.split)
    return sorted((content(built, row), classes[row], *(int(column[row]) for column in columns)) for row in good)


@pytest.mark.parametrize("held", ["val", "test", None])
def test_shards_of_a_folder_hold_the_same_samples(tmp_path, held):
    root = folder(tmp_path / "data", held)
    written = sharding.shard(root, tmp_path / "out", max_bytes=5000)
    assert [name for name, _ in written.left_out] == ["train/b/bad.jpg", "train/b/empty.jpg"]
    one, two = index.build(root), index.build(tmp_path / "out")
    assert samples(one) == samples(two)
    assert (one.layout, one.classes, two.bad(), two.notices) == (two.layout, two.classes, [], ())
    assert set(written.shards) == {p.name for p in (tmp_path / "out").glob("*.tar")} == set(two.shards)
    assert len(written.shards) > 2
    assert written.images == len(two) == 6 + bool(held)
    sharding.shard(tmp_path / "out", tmp_path / "again", max_bytes=9000)
    assert samples(index.build(tmp_path / "again")) == samples(one)


def files_of(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}


def test_shards_of_a_list_and_of_a_single_tar(tmp_path):
    for number, name in enumerate(("1.jpg", "deep/2", ".hidden/3.webp", "4.JPE")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(number, ("JPEG", "PNG", "WEBP", "JPEG")[number]))
    (tmp_path / "list.csv").write_text("path,label\n1.jpg,dog\ndeep/2,cat\n.hidden/3.webp,dog\n4.JPE,cat\n")
    sharding.shard(tmp_path / "list.csv", tmp_path / "out", max_bytes=10**6)
    built = index.build(tmp_path / "out" / "train-000000.tar")
    assert samples(built) == samples(index.build(tmp_path / "list.csv"))
    assert sorted(name.split("/", 1)[1] for name, _, _ in listed(built)) == [
        "-hidden/3.webp",
        "1.jpg",
        "4.jpg",
        "deep/2.png",
    ]
    sharding.shard(tmp_path / "out" / "train-000000.tar", tmp_path / "again", max_bytes=10**6)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")


def test_the_layout_is_that_of_webdataset(tmp_path):
    """Read as WebDataset reads: members in turn, the key up to the first dot of the name, the rest is the field."""
    root = folder(tmp_path / "data")
    sharding.shard(root, tmp_path / "out", max_bytes=10**6)
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["b", "caf\udce9"]
    with tarfile.open(tmp_path / "out" / "train-000000.tar", errors="surrogateescape") as archive:
        members = archive.getmembers()
        assert all((m.isreg(), m.mtime, m.uid, m.gid, m.uname, m.mode) == (True, 0, 0, 0, "", 0o644) for m in members)
        fields: dict[str, dict[str, bytes]] = {}
        for member in members:
            key, field = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", member.name).groups()
            assert not key.startswith("__")
            fields.setdefault(key, {})[field] = archive.extractfile(member).read()
    keys = ["b/-_x", "b/1", "b/a_b_c", "b/a_b_c-1", "caf\udce9/deep/1", "caf\udce9/é"]
    assert sorted(fields) == sorted(keys)
    assert all(set(sample) in ({"cls", "jpg"}, {"cls", "png"}) for sample in fields.values())
    assert {key: int(sample["cls"]) for key, sample in fields.items()} == {key: int(key[0] == "c") for key in keys}
    assert len(members) == 2 * len(fields)


def test_the_held_out_choice_survives_sharding(tmp_path):
    for number in range(60):
        path = tmp_path / "data" / "ab"[number % 2] / f"{number}.{('JPEG', 'jpg', 'Png')[number % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    sharding.shard(tmp_path / "data", tmp_path / "out", max_bytes=20_000, seed=1)
    one, two = index.build(tmp_path / "data"), index.build(tmp_path / "out")
    # The order is the same, too, and with it every batch.
    assert [content(one, row) for row in range(60)] == [content(two, row) for row in range(60)]
    held = [{content(built, row) for row in built.rows("val", 0.2)} for built in (one, two)]
    assert held[0] == held[1]
    assert len(held[0]) == 12


def test_bytes_are_deterministic_and_the_seed_shuffles(tmp_path):
    root = folder(tmp_path / "data")
    for out, seed, threads in (("1", None, 1), ("2", None, 3), ("3", 5, 1), ("4", 5, 3), ("5", 6, 1)):
        sharding.shard(root, tmp_path / out, max_bytes=5000, seed=seed, threads=threads)
    one, two, three, four, five = (files_of(tmp_path / out) for out in "12345")
    assert one == two
    assert three == four
    assert len({tuple(sorted(found.items())) for found in (one, three, five)}) == 3
    assert samples(index.build(tmp_path / "1")) == samples(index.build(tmp_path / "5"))


def test_one_split_only(tmp_path):
    root = folder(tmp_path / "data")
    assert sharding.shard(root, tmp_path / "val", max_bytes=10**6, split="val").shards == ("val-000000.tar",)
    assert sharding.shard(root, tmp_path / "train", max_bytes=10**6, split="train").shards == ("train-000000.tar",)
    (tmp_path / "train" / "val-000000.tar").write_bytes((tmp_path / "val" / "val-000000.tar").read_bytes())
    assert samples(index.build(tmp_path / "train")) == samples(index.build(root))
    single = folder(tmp_path / "single", None)
    with pytest.raises(FastrexError, match="no readable image in its val part"):
        sharding.shard(single, tmp_path / "none", max_bytes=10**6, split="val")


def test_a_stopped_run_goes_on_and_shows_nothing_before_its_end(tmp_path, monkeypatch):
    root = folder(tmp_path / "data")
    sharding.shard(root, tmp_path / "whole", max_bytes=5000)
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sharding.shard(root, tmp_path / "out", max_bytes=5000, threads=1, progress=stop)
    partial = tmp_path / ".out.partial"
    assert not (tmp_path / "out").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.tar")}
    assert kept
    assert not list(partial.glob(".*.*"))
    with pytest.raises(FastrexError, match=r"out\.partial' was left by a run.*remove this folder"):
        sharding.shard(root, tmp_path / "out", max_bytes=6000)
    (partial / ".train-000000.tar.1-00c0ffee").write_bytes(b"killed")
    sharding.shard(root, tmp_path / "out", max_bytes=5000)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept
    assert not partial.exists()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharding.os, "fsync", full)
    with pytest.raises(FastrexError, match=r"No space left on device.*the same command again"):
        sharding.shard(root, tmp_path / "more", max_bytes=5000)


def test_targets_that_are_refused(tmp_path):
    root = folder(tmp_path / "data")
    for out in (root, root / "train", root / "new"):
        with pytest.raises(FastrexError, match=r"lies inside of"):
            sharding.shard(root, out, max_bytes=5000)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    for out in ("full", "full/x"):
        with pytest.raises(FastrexError, match="exists; give a new or an empty folder"):
            sharding.shard(root, tmp_path / out, max_bytes=5000)
    (tmp_path / "empty").mkdir()
    sharding.shard(root, tmp_path / "empty", max_bytes=5000)
    with pytest.raises(ValueError, match="split must be"):
        sharding.shard(root, tmp_path / "out", max_bytes=5000, split="test")


def test_an_image_that_changed_since_it_was_indexed_stops_the_writer(tmp_path):
    root = folder(tmp_path / "data")
    index.open_or_build(root)
    (root / "train" / "b" / "1.JPEG").write_bytes(JPEG + b"more")
    with pytest.raises(FastrexError, match=r"'train/b/1.JPEG' has \d+ bytes, but had \d+ when it was indexed; index"):
        sharding.shard(root, tmp_path / "out", max_bytes=5000)
    (root / "train" / "b" / "1.JPEG").write_bytes(picture(0))
    (root / "train" / "caf\udce9" / "deep" / "1.jpg").unlink()
    with pytest.raises(FastrexError, match=r"'train/caf.*/deep/1.jpg' cannot be read \(No such file"):
        sharding.shard(root, tmp_path / "out2", max_bytes=5000)


def test_the_commands(tmp_path):
    root = folder(tmp_path / "data")

    def run(*words: object) -> str:
        result = CliRunner().invoke(cli.cli, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result.output

    output = run("data", "shard", root, tmp_path / "out", "--size", 1, "--seed", 3)
    assert "left out: 'train/b/bad.jpg' (cut off" in output
    assert "7 images in 2 shards" in output
    output = run("data", "index", tmp_path / "out")
    assert "7 images, 2 classes, layout train+val" in output
    assert str(tmp_path / "out" / ".fastrex" / "index.npz") in output
    path = tmp_path / "out" / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:-1024])
    assert "its end mark is missing" in run("data", "index", tmp_path / "out")
