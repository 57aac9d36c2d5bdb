"""Lists of images: CSV, TSV and JSON lines, odd names, and what a list may not name."""

from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastrex.data import index
from fastrex.errors import FastrexError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTREX_CACHE", str(tmp_path_factory.mktemp("cache")))


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


JPEG = jpeg()


def files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(JPEG)
    return root


def written(root: Path, text: str, name: str = "list.csv") -> Path:
    (root / name).write_text(text, encoding="utf-8", errors="surrogateescape", newline="")
    return root / name


def listed(built: index.Index) -> list[tuple[str, str, int]]:
    return [(built.name(i), built.classes[built.labels[i]], int(built.split[i])) for i in range(len(built))]


def refusal(path: Path) -> str:
    with pytest.raises(FastrexError) as caught:
        index.build(path)
    message = str(caught.value)
    assert "\n" not in message
    assert repr(str(path)) in message
    return message


def test_the_three_kinds_of_list_give_the_same_index(tmp_path):
    files(tmp_path, "a/1.jpg", "a/2.jpg", "b/3.jpg", "b/no_suffix")
    rows = [("b/3.jpg", "dog"), ("a/2.jpg", "cat"), ("./a//1.jpg", "cat"), ("b/no_suffix", "dog")]
    csv = written(tmp_path, "label,path,note\r\n" + "".join(f"{label},{path},x\r\n" for path, label in rows))
    tsv = written(tmp_path, "\ufeffpath\tlabel\n\n" + "".join(f"{path}\t{label}\n" for path, label in rows), "list.tsv")
    lines = [json.dumps({"path": path, "label": label, "note": 1}) for path, label in reversed(rows)]
    jsonl = written(tmp_path, "\n".join(lines) + "\n\n", "list.JSONL")
    built = [index.build(path) for path in (csv, tsv, jsonl)]
    assert listed(built[0]) == [
        ("a/1.jpg", "cat", 0),
        ("a/2.jpg", "cat", 0),
        ("b/3.jpg", "dog", 0),
        ("b/no_suffix", "dog", 0),
    ]
    assert len({one.fingerprint for one in built}) == 1
    assert (built[0].layout, built[0].root, built[0].bad()) == ("single", tmp_path, [])
    assert built[0].locate(3) == (str(tmp_path / "b" / "no_suffix"), 0, len(JPEG))
    assert set(built[0].heights) == {30}


def test_odd_names_survive(tmp_path):
    names = ["a,b.jpg", 'q"uote.jpg', "line\nbreak.jpg", "日本.jpg", "caf\udce9.jpg", " blank .jpg", ".hidden/x.jpg"]
    files(tmp_path, *names)
    quoted = "".join('"{}",{}\n'.format(name.replace('"', '""'), number % 2) for number, name in enumerate(names))
    built = index.build(written(tmp_path, "path,label\n" + quoted))
    assert sorted(name for name, _, _ in listed(built)) == sorted(names)
    assert built.bad() == []
    lines = "".join(json.dumps({"path": name, "label": number % 2}) + "\n" for number, name in enumerate(names))
    assert index.build(written(tmp_path, lines, "list.jsonl")).fingerprint == built.fingerprint


def test_numbers_are_sorted_by_value_and_names_by_letters(tmp_path):
    files(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    assert index.build(written(tmp_path, "path,label\n1.jpg,10\n2.jpg,9\n3.jpg,9\n")).classes == ("9", "10")
    assert index.build(written(tmp_path, "path,label\n1.jpg,10\n2.jpg,9\n3.jpg,x\n")).classes == ("10", "9", "x")
    built = index.build(
        written(tmp_path, '{"path": "1.jpg", "label": 10}\n{"path": "2.jpg", "label": "9"}\n', "l.jsonl")
    )
    assert built.classes == ("9", "10")


def test_splits(tmp_path):
    files(tmp_path, *(f"{number}.jpg" for number in range(6)))
    head = "path,label,split\n0.jpg,a,train\n1.jpg,b,train\n"
    built = index.build(written(tmp_path, head + "2.jpg,a,val\n3.jpg,b,validation\n4.jpg,b,test\n"))
    assert (built.layout, built.split.tolist(), built.ignored) == ("train+val", [0, 0, 1, 1], 1)
    built = index.build(written(tmp_path, head + "2.jpg,a,test\n"))
    assert (built.layout, built.split.tolist()) == ("train+test", [0, 0, 1])
    assert index.build(written(tmp_path, head)).layout == "single"
    assert "class 'c' not among the training images" in refusal(written(tmp_path, head + "2.jpg,c,val\n"))
    assert "but no train" in refusal(written(tmp_path, "path,label,split\n0.jpg,a,val\n"))
    assert "line 4: split 'dev' is none of" in refusal(written(tmp_path, head + "2.jpg,a,dev\n"))
    assert "line 4: split '' is none of" in refusal(written(tmp_path, head + "2.jpg,a,\n"))
    mixed = '{"path": "0.jpg", "label": "a", "split": "train"}\n{"path": "1.jpg", "label": "b"}\n'
    assert "some lines have a split" in refusal(written(tmp_path, mixed, "list.jsonl"))


def test_repeated_and_contradicting_lines(tmp_path):
    files(tmp_path, "1.jpg", "2.jpg")
    built = index.build(written(tmp_path, "path,label\n1.jpg,a\n2.jpg,b\n./1.jpg,a\n"))
    assert (len(built), built.ignored) == (2, 1)
    assert "line 4: '1.jpg' was 'a' before and is 'b' here" in refusal(
        written(tmp_path, "path,label\n1.jpg,a\n2.jpg,b\n1.jpg,b\n")
    )
    leak = "path,label,split\n1.jpg,a,train\n2.jpg,b,train\n1.jpg,a,val\n"
    assert "line 4: '1.jpg' was 'a in train' before and is 'a in val' here" in refusal(written(tmp_path, leak))


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("../x.jpg,a", "leads out of the list's folder by '..'"),
        ("a/../../x.jpg,a", "by '..'"),
        ("/etc/hostname,a", "is absolute"),
        ("x\0.jpg,a", "holds a NUL"),
        ("x.jpg,-1", "label -1 is out of range"),
        ("x.jpg,2147483648", "out of range"),
        ("x.jpg,99999999999999999999", "out of range"),
        ("x.jpg,", "the label is empty"),
        (f"x.jpg,{'y' * 2000}", "longer than 1024"),
        (",a", "no path"),
        (".,a", "is no file name"),
        ("x.jpg", "1 columns, the header has 2"),
        ("x.jpg,a,b", "3 columns, the header has 2"),
        ('"x.jpg"y,a', "expected after"),
        ("out/x.jpg,a", "leads out of the list's folder by a link"),
        ("link.jpg,a", "by a link"),
        ("y" * 70_000 + ",a", "longer than 65536 characters"),
        ("y" * 5000 + ".jpg,a", "is no file name"),
    ],
)
def test_what_a_list_may_not_name_is_refused_by_line(tmp_path, row, fault):
    files(tmp_path / "data", "1.jpg", "2.jpg")
    files(tmp_path / "elsewhere", "x.jpg")
    (tmp_path / "data" / "out").symlink_to("../elsewhere")
    (tmp_path / "data" / "link.jpg").symlink_to("../elsewhere/x.jpg")
    message = refusal(written(tmp_path / "data", f"path,label\n1.jpg,a\n2.jpg,b\n{row}\n1.jpg,a\n"))
    assert ", line 4: " in message
    assert fault in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "no JSON"),
        ("[" * 50_000, "no JSON"),
        ("[1, 2]", "expected {"),
        ('{"label": 1}', "no path"),
        ('{"path": 3, "label": 1}', "no path"),
        ('{"path": "2.jpg"}', "no label"),
        ('{"path": "2.jpg", "label": null}', "no label"),
        ('{"path": "2.jpg", "label": true}', "neither a name nor a whole number"),
        ('{"path": "2.jpg", "label": 1.5}', "neither a name nor a whole number"),
        ('{"path": "2.jpg", "label": "a\\u0000"}', "holds a NUL"),
        ('{"path": "2\\u0000.jpg", "label": 1}', "holds a NUL"),
        ('{"path": "\\ud800.jpg", "label": 1}', "is no file name"),
        ('{"path": "2.jpg", "label": 1, "split": 3}', "split 3 is none of"),
    ],
)
def test_json_lines_that_are_refused(tmp_path, line, fault):
    files(tmp_path, "1.jpg", "2.jpg")
    message = refusal(written(tmp_path, f'{{"path": "1.jpg", "label": 0}}\n{line}\n', "list.jsonl"))
    assert ", line 2: " in message
    assert fault in message


def test_headers_and_empty_lists(tmp_path):
    assert "line 1: no column 'label'" in refusal(written(tmp_path, "path,class\n1.jpg,a\n"))
    assert "line 1: more than one column 'path'" in refusal(written(tmp_path, "path,path,label\n1.jpg,2.jpg,a\n"))
    assert "line 1: no column 'path'" in refusal(written(tmp_path, ""))
    assert "names no image" in refusal(written(tmp_path, "path,label\n"))
    assert "line 2: " in refusal(written(tmp_path, 'path,label\n"1.jpg,a\n'))
    (tmp_path / "odd.txt").write_text("")
    with pytest.raises(FastrexError, match=r"is a file; give the folder.*\.csv"):
        index.build(tmp_path / "odd.txt")


def test_a_line_of_200_mb_takes_no_memory(tmp_path):
    path = written(tmp_path, "path,label\n")
    with open(path, "r+b") as file:
        file.seek(200_000_000)
        file.write(b"x")
    assert "line 2: longer than 65536 characters" in refusal(path)


def test_links_inside_of_the_folder_and_files_that_are_not_there(tmp_path):
    files(tmp_path, "1.jpg", "deep/2.jpg")
    (tmp_path / "link.jpg").symlink_to("deep/2.jpg")
    (tmp_path / "folder").symlink_to("deep")
    built = index.build(written(tmp_path, "path,label\n1.jpg,a\nlink.jpg,b\nfolder/2.jpg,b\ngone.jpg,b\ndeep,b\n"))
    assert [name for name, _ in built.bad()] == ["deep", "gone.jpg"]
    assert len(built) == 5


def test_a_list_is_indexed_in_the_cache_and_again_when_it_changed(tmp_path, monkeypatch):
    files(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    path = written(tmp_path, "path,label\n1.jpg,a\n2.jpg,b\n")
    built = index.open_or_build(path)
    assert index.default_path(path).parent == index.cache_dir() / "index"
    assert index.default_path(path).is_file()
    assert index.default_path(path) != index.default_path(tmp_path / "other.csv")
    with monkeypatch.context() as patch:
        patch.setattr(index, "build", lambda *args, **kwargs: pytest.fail("the stored index was not used"))
        assert index.open_or_build(path).fingerprint == built.fingerprint
        os.utime(path)
        assert index.open_or_build(path).fingerprint == built.fingerprint
    written(tmp_path, "path,label\n1.jpg,a\n3.jpg,b\n")
    assert index.open_or_build(path).name(1) == "3.jpg"


def test_no_list_makes_anything_but_our_error(tmp_path):
    files(tmp_path, "1.jpg", "2.jpg")
    good = {
        "list.csv": b'path,label,split\n1.jpg,a,train\n"2.jpg",b,train\n',
        "list.jsonl": b'{"path": "1.jpg", "label": 1}\n{"path": "2.jpg", "label": 2}\n',
    }
    rng = random.Random(0)
    for name, content in good.items():
        for _ in range(300):
            data = bytearray(content)
            for _ in range(rng.randrange(1, 4)):
                place = rng.randrange(len(data))
                data[place : place + rng.randrange(3)] = rng.choice(
                    [b"", b"\0", b"\xff", b'"', b"\n", b"..", b"/", b"-", b"9"]
                )
            (tmp_path / name).write_bytes(data)
            try:
                built = index.build(tmp_path / name)
            except FastrexError:
                continue
            assert all(not path.startswith(("/", "..")) for path in map(built.name, range(len(built))))
