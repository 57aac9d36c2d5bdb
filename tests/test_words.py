"""Plain pickles of words (``foreign.read_words``): numpy's arrays come whole, nothing else is believed or executed."""

from __future__ import annotations

import os
import pickle
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_foreign import Bomb

from fastrex.errors import FastrexError
from fastrex.foreign import read_words

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
WORDS = ["/n1/n1_7.JPEG", "", "/ü/☃.JPEG"]


def stored(tmp_path: Path, content: object, protocol: int = 4) -> Path:
    return raw(tmp_path, pickle.dumps(content, protocol))


def raw(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "words.pkl"
    path.write_bytes(data)
    return path


def old_numpy(data: bytes) -> bytes:
    """As numpy 1 names its functions; protocols up to 3, where the length of a name is not written down."""
    return data.replace(b"numpy._core", b"numpy.core")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_content(tmp_path: Path, protocol: int) -> None:
    content: Any = {
        "levels": [["n1", "n2"], ["n3"]],
        "ordered": OrderedDict(a=1, b=(2, b"x")),
        3: {None: True, ("t", 1): 2.5},
        "set": {"a"},
        "bytes": b"\xff\0",
    }
    assert read_words(stored(tmp_path, content, protocol)) == content


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_words(tmp_path: Path, protocol: int) -> None:
    content = {
        "words": np.array(WORDS),
        "big-endian": np.array(WORDS, ">U20"),
        "bytes": np.array([b"/n1/a", b"", b"\xff\x01"]),
        "objects": np.array(WORDS, object),
        "grid": np.asfortranarray(np.array([["a", "b", "c"], ["d", "e", "f"]])),
        "none": np.array([], "U7"),
        "read-only": np.array(WORDS),
        "scalar": np.str_("n1"),
        np.str_("key"): [np.bytes_(b"n2")],
    }
    content["read-only"].setflags(write=False)
    found = read_words(stored(tmp_path, content, protocol))
    assert found.keys() == content.keys()
    assert [type(key) for key in found] == [str] * 9
    assert found["objects"] == WORDS
    for name in ("words", "big-endian", "bytes", "grid", "read-only"):
        assert isinstance(found[name], np.ndarray), name
        assert found[name].dtype.kind == content[name].dtype.kind, name
        assert found[name].tolist() == content[name].tolist(), name
    assert found["none"].tolist() == []
    assert (found["scalar"], found["key"], type(found["scalar"])) == ("n1", [b"n2"], str)


@pytest.mark.parametrize("protocol", [2, 3])
def test_arrays_of_numpy_1(tmp_path: Path, protocol: int) -> None:
    data = old_numpy(pickle.dumps({"n1": np.array(WORDS)}, protocol))
    assert b"numpy.core.multiarray" in data
    assert read_words(raw(tmp_path, data))["n1"].tolist() == WORDS


def test_one_array_in_two_places_is_one(tmp_path: Path) -> None:
    array = np.array(WORDS)
    found = read_words(stored(tmp_path, {"a": array, "b": [array]}))
    assert found["a"] is found["b"][0]


def test_nothing_is_executed(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for bomb in (
        Bomb(os.system, f"touch {marker}"),
        Bomb(exec, f"open({str(marker)!r}, 'w')"),
        Bomb(os.mkdir, str(marker)),
        Bomb(np.load, str(marker)),
    ):
        for protocol in PROTOCOLS:
            path = stored(tmp_path, {"n1": [bomb]}, protocol)
            with pytest.raises(FastrexError, match=r"words\.pkl cannot be read: it names [\w.]+, which lists of words"):
                read_words(path)
    assert not marker.exists()
    # The last kind but one is real: a reader that trusts the file makes the folder.
    pickle.loads(pickle.dumps(Bomb(os.mkdir, str(marker))))
    assert marker.exists()


def array_pickle(
    shape: bytes = b"K\x02\x85", kind: bytes = b"X\x02\x00\x00\x00U1", data: bytes = b"C\x08a\0\0\0b\0\0\0"
) -> bytes:
    """An array of two letters, as opcodes."""
    dtype = b"cnumpy\ndtype\n" + kind + b"\x89\x88\x87R(K\x03X\x01\x00\x00\x00<NNNK\x04K\x04K\x08tb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    return b"\x80\x04" + empty + b"(K\x01" + shape + dtype + b"\x89" + data + b"tb."


def test_crafted_array_is_read(tmp_path: Path) -> None:
    # The base of the cases below: without their one change, the pickle is good.
    assert read_words(raw(tmp_path, array_pickle())).tolist() == ["a", "b"]


HUGE = b"\x8a\x06\x00\x00\x00\x00\x00\x7f"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (array_pickle(shape=b"K\x03\x85"), "values must take 12 places, got 8"),
        (array_pickle(shape=HUGE + b"\x85"), "impossible shape"),
        (array_pickle(shape=b"J\x00\x00\x00\x70\x85"), "values must take 7516192768 places"),
        (array_pickle(shape=b"J\xff\xff\xff\xff\x85"), "impossible shape"),
        (array_pickle(shape=b"]"), "impossible shape"),
        (array_pickle(shape=b"G" + b"\0" * 8 + b"\x85"), "impossible shape"),
        (array_pickle(shape=b"J\x00\x00\x00\x70\x85", kind=b"X\x02\x00\x00\x00U0", data=b"C\x00"), "1879048192 words"),
        (array_pickle(shape=b"K\x02K\x00\x86", data=b"C\x00"), "without words that is no empty row"),
        (array_pickle(shape=b"K\x00K\x02\x86", data=b"C\x00"), "without words that is no empty row"),
        (array_pickle(kind=b"X\x02\x00\x00\x00f8"), "type 'f8'; only words"),
        (array_pickle(kind=b"X\x0c\x00\x00\x00U99999999999"), "only words"),
        (array_pickle(kind=b"K\x01"), "is damaged"),
        (array_pickle(kind=b"X\x02\x00\x00\x00O8"), "a bytes as values"),
        (array_pickle(kind=b"X\x02\x00\x00\x00O8", data=b"](K\x01K\x02e"), "no row of words"),
        (array_pickle(data=b"](X\x01\x00\x00\x00aK\x01e"), "a list as values"),
        (array_pickle(data=b"C\x08" + b"\xff" * 8), "a character that does not exist"),
        (array_pickle().replace(b"NNN", b"N}N"), "an array of records"),
        (array_pickle().replace(b"cnumpy\nndarray\n", b"cbuiltins\nlist\n"), "an array of a class of its own"),
        (b"\x80\x04cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R.", "without values"),
        (b"\x80\x04cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n\x85R}X\x01\x00\x00\x00aK\x01sb.", "damaged"),
        (b"\x80\x04cnumpy\nndarray\n)\x81.", "is damaged"),
        (b"\x80\x04c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00rot\x86R.", "encoding 'rot'"),
        (b"\x80\x04c_codecs\nencode\nN}X\x01\x00\x00\x00aK\x01s\x86b.", "a function's attribute is set"),
        (b"\x80\x04cnumpy\nload\n.", "it names numpy.load"),
        (b"\x80\x04cnumpy.core.multiarray\n_reconstruct.__globals__\n.", "it names"),
        (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".", "is damaged"),
        (b"\x80\x04B\xff\xff\xff\x7fab.", "is damaged"),
        (b"\x80\x02}K\x01r\xff\xff\xff\xff.", "memo of 4294967295 places"),
        (b"\x80\x02" + b"]" * 100 + b"a" * 99 + b".", "nested more than 64 deep"),
        (b"\x80\x02K\x05Q.", "uses BINPERSID"),
        (b"\x80\x02\x82\x01.", "uses EXT1"),
        (b"\x80\x02}", "is damaged"),
        (b"", "is damaged"),
        (b"<!DOCTYPE html>", "is damaged"),
    ],
)  # fmt: skip
def test_crafted_pickles_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(FastrexError, match=rf"^foreign: .*words\.pkl .*({message})") as caught:
        read_words(raw(tmp_path, data))
    assert "\n" not in str(caught.value)


def test_no_cut_of_a_good_file_is_read(tmp_path: Path) -> None:
    good = pickle.dumps({"n1": np.array(WORDS), "n2": np.array(WORDS, object)}, 4)
    for end in range(len(good)):
        with pytest.raises(FastrexError, match=r"^foreign: .*words\.pkl"):
            read_words(raw(tmp_path, good[:end]))


def test_values_named_many_times_are_limited(tmp_path: Path) -> None:
    """A megabyte of letters once, and a hundred thousand arrays of it: looking at them all would take minutes."""
    letters = b"a\0\0\0" * 250_000
    first = array_pickle(shape=b"J" + (250_000).to_bytes(4, "little") + b"\x85")
    data = b"B" + len(letters).to_bytes(4, "little") + letters
    head, tail = first[2:-1].split(b"C\x08a\0\0\0b\0\0\0")
    arrays = (head + b"h\x00" + tail) * 1000
    path = raw(tmp_path, b"\x80\x04" + data + b"q\x000(" + arrays + b"l.")
    with pytest.raises(FastrexError, match="the same values so often"):
        read_words(path)
    text = b"X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20)
    encoded = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R" * 1000
    with pytest.raises(FastrexError, match="the same values so often"):
        read_words(raw(tmp_path, b"\x80\x04" + text + b"q\x000(" + encoded + b"l."))


def test_no_change_of_a_good_file_does_harm(tmp_path: Path) -> None:
    rng = random.Random(0)
    content = {"n1": {"train": np.array(WORDS), "test": [np.str_("x")]}, "n2": np.array(WORDS, object)}
    good = [pickle.dumps(content, protocol) for protocol in PROTOCOLS]
    refused = 0
    for _ in range(1000):
        changed = bytearray(rng.choice(good))
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        try:
            read_words(raw(tmp_path, bytes(changed)))
        except FastrexError:
            refused += 1
    assert 300 < refused < 1000


def test_memo_bomb(tmp_path: Path) -> None:
    """Each tuple holds the one before it twice: forty lines would unfold to a million million values."""
    data = b"\x80\x04K\x00" + b"2\x86" * 40 + b"."
    with pytest.raises(FastrexError, match="unfolds to more than 200000000 values"):
        read_words(raw(tmp_path, data))


def test_too_large_and_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stored(tmp_path, ["n1"])
    monkeypatch.setattr("fastrex.foreign.MAX_WORDS", 5)
    with pytest.raises(FastrexError, match=r"words\.pkl cannot be read: it has \d+ bytes, more than 5"):
        read_words(path)
    with pytest.raises(FastrexError, match="No such file"):
        read_words(tmp_path / "absent.pkl")
    os.mkfifo(tmp_path / "pipe.pkl")
    with pytest.raises(FastrexError, match="no regular file"):
        read_words(tmp_path / "pipe.pkl")
