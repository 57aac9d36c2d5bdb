"""``fastrex data check``: what it finds, leaves out, says and stores; ruined JPEGs from the file to the batch."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import odd_files as make
import pytest
from conftest import ROOT, environment
from odd_files import NOISE, encode

from fastrex.data import check as check_module
from fastrex.data import codec, index
from fastrex.data.check import check, quiet_decoder
from fastrex.data.index import Status
from fastrex.errors import FastrexError

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install 'fastrex[train]'")

JPEG = encode("JPEG", quality=90)
NO_HEADER = b"\xff\xd8\xff\0" + JPEG[4:]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTREX_CACHE", str(tmp_path_factory.mktemp("cache")))


def tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def sound(count: int = 3) -> dict[str, bytes]:
    return {f"{name}/{number}.jpg": JPEG for name in ("a", "b", "c") for number in range(count)}


def bad_of(result: check_module.Checked) -> dict[str, tuple[Status, str]]:
    return {image.name: (image.status, image.reason) for image in result.bad}


def run(*arguments: object, code: int) -> str:
    command = [sys.executable, "-m", "fastrex", "data", "check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == code, done.stdout + done.stderr
    # The decoders' remarks would name no file.
    assert all(line.startswith("fastrex: error: ") for line in done.stderr.splitlines()), done.stderr
    return done.stdout + done.stderr


def test_a_sound_folder_keeps_its_index(tmp_path: Path) -> None:
    built = index.build(tree(tmp_path, sound()))
    calls: list[tuple[int, int]] = []
    result = check(built, threads=1, progress=lambda done, total: calls.append((done, total)))
    assert (result.bad, result.decoded, result.size, result.emptied) == ((), 9, 9 * len(JPEG), ())
    assert result.index.fingerprint == built.fingerprint
    assert calls == [(9, 9)]


def test_what_the_index_found_is_named_too_and_not_decoded(tmp_path: Path) -> None:
    odd = {"a/cut.jpg": JPEG[:-2], "a/sum.png": make.wrong_checksum_png(), "b/short.bmp": make.short_bmp()}
    built = index.build(tree(tmp_path, sound() | odd))
    with quiet_decoder():
        result = check(built, threads=2)
    assert bad_of(result) == {
        "a/cut.jpg": (Status.TRUNCATED, "cut off or damaged: its end is missing"),
        "a/sum.png": (Status.DECODE, "cannot be decoded"),
        "b/short.bmp": (Status.DECODE, "cannot be decoded (no header that the decoder understands)"),
    }
    assert result.decoded == 10  # the short BMP stopped at its header
    assert len(result.index.rows("train", 0.0)) == 9
    assert {name for name, _ in result.index.bad()} == set(bad_of(result))


def test_files_that_changed_since_they_were_indexed(tmp_path: Path) -> None:
    built = index.build(tree(tmp_path, sound(5)))
    changed = {
        "a/0.jpg": JPEG + b"\0",
        "a/1.jpg": bytes(len(JPEG)),
        "b/0.jpg": encode("JPEG", NOISE.crop((0, 0, 16, 16)), quality=30)[: len(JPEG)].ljust(len(JPEG), b"\0"),
        "b/1.jpg": NO_HEADER,
    }
    tree(tmp_path, changed)
    (tmp_path / "c" / "0.jpg").unlink()
    with quiet_decoder():
        found = bad_of(check(built, threads=2))
    assert {name: status for name, (status, _) in found.items()} == {
        "a/0.jpg": Status.CHANGED,
        "a/1.jpg": Status.CHANGED,
        "b/0.jpg": Status.CHANGED,
        "b/1.jpg": Status.DECODE,  # the index, like Pillow, would take it
        "c/0.jpg": Status.UNREADABLE,
    }
    assert "No such file" in found["c/0.jpg"][1]
    assert "bytes, but had" in found["a/0.jpg"][1]
    assert found["b/0.jpg"][1] == "has 16x16 pixels, but had 50x30 when it was indexed"


def test_a_bomb_behind_a_stale_index_does_not_reach_the_decoder(tmp_path: Path) -> None:
    bomb = make.png(30000, 30000, 1, 0, bytes(30000))
    files = sound() | {"a/9.png": encode("PNG").ljust(5000, b"\0")}
    built = index.build(tree(tmp_path, files))
    tree(tmp_path, {"a/9.png": bomb.ljust(5000, b"\0")})
    result = check(built, threads=1)
    assert bad_of(result) == {"a/9.png": (Status.CHANGED, "has more than 178956970 pixels")}
    assert result.decoded == 9


def test_batches_are_bounded_by_number_and_by_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = index.build(tree(tmp_path, sound(4)))
    rows = np.arange(12)
    cost = 3 * make.HEIGHT * make.WIDTH + len(JPEG)

    def lengths() -> list[int]:
        return [len(part) for part in check_module._parts(built, rows)]

    assert lengths() == [12]
    monkeypatch.setattr(check_module, "BATCH", 5)
    assert lengths() == [5, 5, 2]
    monkeypatch.setattr(check_module, "MEMORY", 3 * cost)
    assert lengths() == [3, 3, 3, 3]
    monkeypatch.setattr(check_module, "MEMORY", 1)
    assert lengths() == [1] * 12
    calls: list[int] = []
    assert check(built, threads=2, progress=lambda done, _: calls.append(done)).bad == ()
    assert calls == list(range(1, 13))


def test_an_interrupt_leaves_no_thread(tmp_path: Path) -> None:
    built = index.build(tree(tmp_path, sound()))
    before = set(threading.enumerate())

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(built, threads=2, progress=interrupt)
    assert set(threading.enumerate()) <= before


def test_headers_are_parsed_before_dali_sees_them() -> None:
    """DALI 2.4 dies when it refuses a header in a batch."""
    damaged = {
        "no header": NO_HEADER,
        "no pixels": make.sized_jpeg(0, 0),
        "more than": make.sized_jpeg(65500, 65500),
        "int32": encode("TIFF", make.PICTURE.convert("I")),
        "grey with alpha": encode("TIFF", make.LA),
    }
    with quiet_decoder():
        for reason, data in damaged.items():
            assert reason in str(codec.refusal(np.frombuffer(data, np.uint8)))
        assert codec.refusal(np.empty(0, np.uint8)) is not None
        # Damage behind a sound header kills the decoder; Pillow bears it.
        film = bytearray(encode("JPEG2000"))
        film[len(film) // 2 : -2] = bytes(len(film) - len(film) // 2 - 2)
        damaged_film = np.frombuffer(bytes(film), np.uint8)
        assert codec.refusal(damaged_film) is None
        assert "JPEG 2000" in str(codec.refusal(damaged_film, whole=True))
    assert codec.refusal(np.frombuffer(JPEG, np.uint8)) is None


def test_the_command_quarantines_and_training_finds_it(tmp_path: Path) -> None:
    odd = {"a/cut.jpg": JPEG[:-2], "a/sum.png": make.wrong_checksum_png(), "b/line\nbreak.jpg": b"", "a/note.txt": b""}
    root = tree(tmp_path / "data", sound() | odd)
    said = run(root, "--json", tmp_path / "check.json", code=1)
    assert "9 of 12 images are good; 10 decoded" in said
    assert "left out: 'a/sum.png' (cannot be decoded)" in said
    assert r"left out: 'b/line\nbreak.jpg' (empty file)" in said
    assert "1 bad: the decoder cannot read it" in said
    assert f"index: {root / '.fastrex' / 'index.npz'}" in said
    result = json.loads((tmp_path / "check.json").read_text())
    assert (result["images"], result["good"], result["decoded"]) == (12, 9, 10)
    assert result["bad"] == {"truncated": 1, "decode": 1, "empty": 1}
    assert [file["name"] for file in result["files"]] == ["a/cut.jpg", "a/sum.png", "b/line\nbreak.jpg"]
    stored = index.open_or_build(root)
    assert stored.fingerprint == result["fingerprint"]
    assert ("a/sum.png", "the decoder cannot read it") in stored.bad()
    assert len(stored.rows("train", 0.0)) == 9
    for name in odd:
        (root / name).unlink()
    said = run(root, "--threads", 1, code=0)
    assert "9 of 9 images are good" in said
    assert "left out" not in said
    assert index.open_or_build(root).bad() == []


def test_a_list_and_a_tar_are_checked_like_a_folder(tmp_path: Path) -> None:
    root = tree(tmp_path, sound() | {"a/sum.png": make.wrong_checksum_png()})
    names = [str(path.relative_to(root)) for path in sorted(root.rglob("*.*g"))]
    (root / "list.csv").write_text("path,label\n" + "".join(f"{name},{name[0]}\n" for name in names))
    with tarfile.open(root / "shard.tar", "w") as shard:
        for number, name in enumerate(names):
            shard.add(root / name, f"{number}{Path(name).suffix}")
            label = tarfile.TarInfo(f"{number}.cls")
            label.size = 1
            shard.addfile(label, io.BytesIO(b"%d" % "abc".index(name[0])))
    for source, bad in (("list.csv", "a/sum.png"), ("shard.tar", "shard.tar/3.png")):
        said = run(root / source, code=1)
        assert "9 of 10 images are good" in said
        assert f"left out: '{bad}' (cannot be decoded)" in said
        assert len(index.open_or_build(root / source).rows("train", 0.0)) == 9


def test_training_takes_the_checked_index_also_where_an_older_one_cannot_be_replaced(tmp_path: Path) -> None:
    root = tree(tmp_path, sound() | {"a/wrong.png": make.wrong_checksum_png()})
    index.save(index.build(root), root / ".fastrex" / "index.npz")
    assert not index.open_or_build(root).bad()
    # A folder that nobody, root included, can write to is hard to make: the test pretends.
    code = (
        "import os, sys; os.access = lambda path, mode: not mode & os.W_OK\n"
        "from fastrex.cli import cli; sys.exit(cli(['data', 'check', sys.argv[1]], standalone_mode=False))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)], capture_output=True, text=True, timeout=60, env=environment()
    )
    assert done.returncode == 1
    assert f"index: {index.cache_dir()}" in done.stdout
    assert [name for name, _ in index.open_or_build(root).bad()] == ["a/wrong.png"]


def test_a_class_that_loses_its_last_image(tmp_path: Path) -> None:
    root = tree(tmp_path, sound() | {"d/0.png": make.wrong_checksum_png()})
    assert "no readable training image left in class 'd'; restore" in run(root, code=1)
    with pytest.raises(FastrexError, match=r"class 'd'.*data\.empty_classes=skip"):
        index.open_or_build(root)
    said = run(root, "--empty-classes", "skip", code=1)
    assert "left out: 'd/0.png'" in said
    assert index.open_or_build(root, empty_classes="skip").classes == ("a", "b", "c")


def test_the_remarks_of_c_libraries_are_kept_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet_decoder():
        os.write(2, b"remark\n")
        print("line", file=sys.stderr)
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "line\nafter\n"


def test_a_thousand_ruined_jpegs(tmp_path: Path) -> None:
    """Index, check, one epoch on what passed: no crash, no hang, no file that trains only by luck."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "fuzz_jpegs.py"), str(tmp_path), "1000"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["files"] == 1020
    assert result["good"] == result["trained"] == 1020 - sum(result["bad"].values())
    assert result["good"] > 300
    assert result["bad"]["DECODE"] > 200  # found by decoding only
    assert result["finite"]
    assert result["sound_refused"] == []
    # Mutated headers claim up to the pixel limit, and a few batches of decoded images are alive at a time.
    assert result["peak_mb"] < 4000
