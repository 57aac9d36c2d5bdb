"""Files that somebody else has written: damaged at random, built to hurt, or of another kind than their name says.

What is read is good, or refused by our own error; nothing is executed, nothing large is allocated, nobody waits.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import SETTINGS
from PIL import Image
from test_foreign import Bomb, backbone, rewrite

from fastrex import checkpoint, export, foreign, health, layouts, metrics, objectives, rundir, tensorfile, untrusted
from fastrex import config as config_module
from fastrex.data import columns as stored_columns
from fastrex.data import index as index_module
from fastrex.data import reader, shards, tars
from fastrex.data.index import Index
from fastrex.data.lists import find_list
from fastrex.distributed import World
from fastrex.errors import FastrexError
from fastrex.model.resnet import ResNet

MEMORY = 200 << 20
SECONDS = 10  # of computing: a guard against what never ends, usual are a few milliseconds


class Late(BaseException):
    """No reader may take it for damage of the file."""


@contextlib.contextmanager
def bounded(memory: int = MEMORY, seconds: float = SECONDS) -> Iterator[None]:
    """At most ``memory`` bytes more than now, at most ``seconds`` of computing, and no waiting for ever."""

    def late(*_: object) -> None:
        raise Late(f"not read within {seconds} s")

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    kinds = ((signal.ITIMER_PROF, signal.SIGPROF, seconds), (signal.ITIMER_REAL, signal.SIGALRM, 20 * seconds))
    before = [signal.signal(number, late) for _, number, _ in kinds]
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + memory, hard))
    try:
        for timer, _, left in kinds:
            signal.setitimer(timer, left)
        yield
    finally:
        for (timer, number, _), handler in zip(kinds, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Target:
    """A reader, and good files for it: ``make(rng)`` writes a damaged one, ``read()`` reads it and checks the rest."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.setup()

    def setup(self) -> None:
        raise NotImplementedError

    def make(self, rng: random.Random) -> None:
        raise NotImplementedError

    def read(self) -> None:
        raise NotImplementedError


class SafeTensors(Target):
    def setup(self) -> None:
        tensors = {
            "encoder.conv1.weight": torch.arange(12.0).reshape(3, 4),
            "half": torch.ones(5, dtype=torch.bfloat16),
            "flags": torch.tensor([True, False, True]),
            "none": torch.empty(0, 3, dtype=torch.int64),
            "count": torch.tensor(7),
        }
        self.good = safetensors.torch.save(tensors, {"format": "pt"})
        self.length = int.from_bytes(self.good[:8], "little")
        self.header = json.loads(self.good[8 : 8 + self.length])
        self.path = self.folder / "x.safetensors"

    def make(self, rng: random.Random) -> None:
        if rng.random() < 0.5:
            header = fuzz.damaged_json(rng, self.header).encode("utf-8", "surrogatepass")
            data = len(header).to_bytes(8, "little") + header + self.good[8 + self.length :]
        elif rng.random() < 0.8:
            head = fuzz.damaged(rng, self.good[: 8 + self.length])
            if rng.random() < 0.7:
                head = (len(head) - 8).to_bytes(8, "little", signed=True) + head[8:] if len(head) > 8 else head
            data = head + self.good[8 + self.length :]
        else:
            data = fuzz.damaged(rng, self.good)
        self.path.write_bytes(data)

    def read(self) -> None:
        ours, data = tensorfile.load(self.path), self.path.read_bytes()
        # The one difference: its JSON reader refuses "-0", and halves of characters in the metadata.
        if b"-0" in data or b"\\ud800" in data:
            return
        theirs = safetensors.torch.load(data)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype
            assert ours[name].shape == value.shape
            assert (
                ours[name].contiguous().reshape(-1).view(torch.uint8).tolist()
                == value.reshape(-1).view(torch.uint8).tolist()
            )


class Manifest(Target):
    def setup(self) -> None:
        run = self.folder / "run"
        parts = {"model": {f"encoder.{k}": v for k, v in backbone().items()}, "optimizer": {"lr": torch.zeros(1)}}
        state = {"classes": ["a", "caf\udce9"], "seed": 1, "world_size": 2, "nested": {"x": [1, 2.5, None]}}
        self.path = checkpoint.save(run, 12, parts, state, keep_last=3)
        self.good = json.loads((self.path / "state.json").read_text())

    def make(self, rng: random.Random) -> None:
        if rng.random() < 0.3:
            data = fuzz.damaged(rng, json.dumps(self.good, indent=1).encode())
        else:
            text = fuzz.damaged_json(rng, self.good)
            with contextlib.suppress(ValueError, RecursionError, AttributeError):
                # Whoever forges a manifest forges its checksum.
                text = json.dumps(checkpoint.sealed(json.loads(text)))
            data = text.encode("utf-8", "surrogatepass")
        (self.path / "state.json").write_bytes(data)

    def read(self) -> None:
        state = checkpoint.read_state(self.path)
        assert state["step"] == 12
        assert all("/" not in name for name in state["files"])
        assert export.load_source(self.path).state.keys() == backbone().keys()
        checkpoint.load(self.path)


class StoredIndex(Target):
    def setup(self) -> None:
        images = self.folder / "images"
        for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "caf\udce9/1.jpg"):
            (images / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 9)).save(images / name)
        (self.folder / "shards").mkdir()
        for number in range(2):
            with tarfile.open(self.folder / "shards" / f"{number}.tar", "w") as file:
                for key in ("x", "y"):
                    add(file, f"{key}.png", jpeg())
                    add(file, f"{key}.cls", b"%d" % number)
        self.sources = [images, self.folder / "shards"]
        self.path = self.folder / "index.npz"
        self.indexes = [index_module.build(source) for source in self.sources]
        self.raw = []
        for built in self.indexes:
            index_module.save(built, self.path)
            self.raw.append(self.path.read_bytes())
        self.root = images

    def make(self, rng: random.Random) -> None:
        which = rng.randrange(2)
        self.root = self.sources[which]
        if rng.random() < 0.4:
            self.path.write_bytes(fuzz.damaged(rng, self.raw[which]))
            return
        built = self.indexes[which]
        meta = {"version": index_module.VERSION, "fingerprint": built.fingerprint} | built._meta()
        columns = built._columns() | {"blob": np.frombuffer(built.blob, np.uint8)}
        for _ in range(rng.randint(1, 2)):
            name = rng.choice([*columns, "meta"])
            if name == "meta":
                with contextlib.suppress(ValueError, RecursionError):
                    changed = json.loads(fuzz.damaged_json(rng, meta))
                    meta = changed if isinstance(changed, dict) else meta
            elif rng.random() < 0.1:
                columns[name] = rng.choice([columns[name][:-1], columns[name].astype(np.float64), columns[name][None]])
            elif columns[name].size:
                column = columns[name].copy()
                most = np.iinfo(column.dtype).max if column.dtype.kind in "iu" else 9
                column.flat[rng.randrange(column.size)] = rng.choice((0, 1, 46, 47, most, most // 2, most - 1))
                columns[name] = column
        with contextlib.suppress(Exception):
            # Whoever forges an index forges its fingerprint.
            forged = {key: column for key, column in columns.items() if key != "blob"}
            meta["fingerprint"] = index_module._assemble(meta, columns["blob"].tobytes(), forged).fingerprint
        stored_columns.write(self.path, meta, columns)

    def read(self) -> None:
        index = index_module.load(self.path)
        use(index, self.root)


def use(index: Index, root: Path) -> None:
    """Whatever training does with an index."""
    real = os.path.realpath(root)
    index = index_module.dataclasses.replace(index, root=root)
    for split in ("train", "val"):
        for row in index.rows(split, 0.1).tolist():
            assert os.path.realpath(index.locate(row)[0]).startswith(real)
            index.name(row).encode("utf-8", "surrogateescape")
            with contextlib.suppress(FastrexError):
                reader.read_bytes(index, row)
    index.bad()


class StoredConfig(Target):
    def setup(self) -> None:
        self.good = config_module.to_toml(config_module.load("trex", SETTINGS)).encode()
        self.path = self.folder / "config.toml"

    def make(self, rng: random.Random) -> None:
        data = fuzz.damaged(rng, self.good)
        if rng.random() < 0.3:
            lines = self.good.splitlines()
            place = rng.randrange(len(lines))
            odd = rng.choice(
                [b"[" * 3000, b"x = " + b"[" * 3000, b"a" + b".a" * 3000 + b" = 1", b"v = 0x" + b"f" * 9000,
                 b"v = " + b"9" * 5000, b"[data]", b"lr = 1e999", b"lr = nan", b"path = '\\u0000'", b"v = 1979-99-99"]
            )  # fmt: skip
            data = b"\n".join([*lines[:place], odd, *lines[place:]])
        self.path.write_bytes(data)

    def read(self) -> None:
        config = objectives.resolve(config_module.read(self.path))
        assert config_module.diff(config_module.from_toml(config_module.to_toml(config)), config) == []


class Export(Target):
    def setup(self) -> None:
        torch.manual_seed(0)
        torch.save(ResNet("resnet18", width=8).state_dict(), self.folder / "x.pth")
        self.path = export.export(self.folder / "x.pth", self.folder / "out", to="hf")
        self.good = json.loads((self.path / "config.json").read_text())
        timm = {"mean": [0.5] * 3, "std": [0.2] * 3, "crop_pct": 0.9, "input_size": [3, 32, 32]}
        self.foreign = {"architecture": "resnet18", "pretrained_cfg": timm}

    def make(self, rng: random.Random) -> None:
        good = rng.choice((self.good, self.foreign))
        if rng.random() < 0.2:
            data = fuzz.damaged(rng, json.dumps(good).encode())
        else:
            data = fuzz.damaged_json(rng, good).encode("utf-8", "surrogatepass")
        (self.path / "config.json").write_bytes(data)

    def read(self) -> None:
        source = export.load_source(self.path)
        assert source.arch["arch"] == "resnet18" or source.arch["arch"].startswith("timm:")
        source.settings()
        again = self.folder / "again"
        try:
            assert export.load_source(export.export(self.path, again, to="hf")).arch == source.arch
        finally:
            shutil.rmtree(again, ignore_errors=True)


def add(file: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    file.addfile(member, io.BytesIO(data))


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 9)).save(buffer, "PNG")
    return buffer.getvalue()


class Shard(Target):
    def setup(self) -> None:
        self.good = []
        for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w", format=format) as file:
                for name in ("a", "b", "d" * 90 + "/c", "é", *(["e" * 150] if format != tarfile.USTAR_FORMAT else [])):
                    add(file, f"{name}.png", jpeg())
                    add(file, f"{name}.cls", b"1") if name != "b" else add(file, "b.json", b'{"label": 2}')
            self.good.append(buffer.getvalue())
        self.path = self.folder / "x.tar"

    def make(self, rng: random.Random) -> None:
        data = bytearray(rng.choice(self.good))
        for _ in range(rng.randint(1, 2)):
            place = rng.randrange(len(data) // 512) * 512
            start, end = rng.choice(((0, 100), (100, 124), (124, 136), (136, 148), (156, 158), (157, 345), (345, 512)))
            field = fuzz.damaged(rng, bytes(data[place + start : place + end]))[: end - start].ljust(end - start, b"\0")
            data[place + start : place + end] = field
            if rng.random() < 0.8:  # a checksum that fits
                block = bytes(data[place : place + 148]) + b" " * 8 + bytes(data[place + 156 : place + 512])
                data[place + 148 : place + 156] = b"%06o\0 " % sum(block)
        self.path.write_bytes(fuzz.damaged(rng, bytes(data)) if rng.random() < 0.2 else data)

    def read(self) -> None:
        found = shards.find_shards(self.path)
        assert found is not None
        listing = found.listing(1)
        size = self.path.stat().st_size
        for row, path in enumerate(listing.paths):
            assert path.startswith(b"x.tar/")
            assert b"\0" not in path
            assert b".." not in path.split(b"/")
            if listing.given[row] == index_module.Status.OK:
                assert 0 <= listing.first[row] <= listing.first[row] + listing.lengths[row] <= size


class ImageList(Target):
    def setup(self) -> None:
        for name in ("1.jpg", "sub/2.jpg"):
            (self.folder / name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 9)).save(self.folder / name)
        (self.folder / "out").symlink_to("..")
        rows = [("1.jpg", "a", "train"), ("sub/2.jpg", "b", "train"), ("out/x.jpg", "b", "train")]
        self.good = {
            "x.csv": "path,label,split\n" + "".join(f'{p},"{label}",{split}\n' for p, label, split in rows[:2]),
            "x.tsv": "path\tlabel\n" + "".join(f"{p}\t{label}\n" for p, label, _ in rows[:2]),
        }
        self.objects = [{"path": path, "label": label, "split": split} for path, label, split in rows[:2]]
        self.path = self.folder / "x.csv"

    def make(self, rng: random.Random) -> None:
        name = rng.choice(("x.csv", "x.tsv", "x.jsonl"))
        self.path = self.folder / name
        if name == "x.jsonl":
            lines = [json.dumps(o) if rng.random() < 0.5 else fuzz.damaged_json(rng, o) for o in self.objects]
            data = "\n".join(lines).encode("utf-8", "surrogatepass")
        else:
            data = self.good[name].encode()
        data = data.replace(b"1.jpg", rng.choice((b"1.jpg", b"1.jpg", b"out/1.jpg", b"../1.jpg", b"/1.jpg")))
        self.path.write_bytes(fuzz.damaged(rng, data) if rng.random() < 0.8 else data)

    def read(self) -> None:
        listing = find_list(self.path).listing(1)
        real = os.path.realpath(self.folder)
        for path in listing.paths:
            there = os.path.realpath(os.path.join(os.fsencode(listing.root), path))
            assert os.fsdecode(there).startswith(real + "/")
        assert 0 <= listing.labels.min() <= listing.labels.max() < len(listing.classes)


class Pickled(Target):
    def setup(self) -> None:
        self.marker = self.folder / "marker"
        bombs = [Bomb(os.system, f"touch {self.marker}"), Bomb(open, str(self.marker), "w"), Bomb(exec, "1")]
        path = self.folder / "good.pth"
        small = {"x": torch.zeros(4), "y": torch.ones(2, 3).T, "epoch": 1, "t": (torch.zeros(1), [2, {"z": 3}])}
        torch.save({**small, "bombs": bombs}, path)
        self.good = path.read_bytes()
        with zipfile.ZipFile(path) as file:
            self.entries = {name: file.read(name) for name in file.namelist()}
        (self.data,) = (name for name in self.entries if name.endswith("data.pkl"))
        self.path = self.folder / "x.pth"

    def make(self, rng: random.Random) -> None:
        if rng.random() < 0.3:
            self.path.write_bytes(fuzz.damaged(rng, self.good))
            return
        entries = dict(self.entries)
        name = self.data if rng.random() < 0.9 else rng.choice(list(entries))
        entries[name] = fuzz.damaged(rng, entries[name])
        if rng.random() < 0.3:  # an opcode in the place of another
            content = bytearray(entries[self.data])
            content[rng.randrange(len(content))] = rng.choice(pickled_opcodes())
            entries[self.data] = bytes(content)
        with zipfile.ZipFile(self.path, "w") as file:
            for entry, content in entries.items():
                file.writestr(entry, content)

    def read(self) -> None:
        try:
            content = foreign.read(self.path)
            for value in content.values():
                assert not isinstance(value, foreign._Held)
                if isinstance(value, torch.Tensor):
                    value.contiguous()
            with contextlib.suppress(FastrexError):
                layouts.encoder_state(self.path)
        finally:
            assert not self.marker.exists()


def pickled_opcodes() -> list[int]:
    return [value[0] for name, value in vars(pickle).items() if name.isupper() and isinstance(value, bytes) and value]


class Records(Target):
    def setup(self) -> None:
        self.lines = [{"step": step, "time": 1.5, "eval/knn": 0.5, "train/loss": None} for step in range(3)]
        self.status = {"state": "running", "time": "x", "pid": 1, "host": rundir.socket.gethostname(), "step": 3}

    def make(self, rng: random.Random) -> None:
        (self.folder / "status.json").write_bytes(
            fuzz.damaged_json(rng, self.status).encode("utf-8", "surrogatepass")
            if rng.random() < 0.8
            else fuzz.damaged(rng, json.dumps(self.status).encode())
        )
        text = "\n".join(
            fuzz.damaged_json(rng, line) if rng.random() < 0.5 else json.dumps(line) for line in self.lines
        )
        data = text.encode("utf-8", "surrogatepass")
        (self.folder / "metrics.jsonl").write_bytes(fuzz.damaged(rng, data) if rng.random() < 0.5 else data)

    def read(self) -> None:
        metrics._drop_after(self.folder / "metrics.jsonl", 1)
        assert all(record["step"] <= 1 for _, record in metrics.records(self.folder / "metrics.jsonl"))
        assert isinstance(rundir.read_status(self.folder)["state"], str)


TARGETS = (
    SafeTensors,
    Manifest,
    StoredIndex,
    StoredConfig,
    Export,
    Shard,
    ImageList,
    Pickled,
    Records,
)


# A reading of these takes longer.
SLOW = (Manifest, Export, StoredConfig)


def checked_before(error: BaseException) -> None:
    """Not the limit on memory may have refused the file, but a look at what it claims."""
    chain: list[BaseException] = [error]
    for one in chain:
        assert not isinstance(one, MemoryError), error
        assert not (isinstance(one, RuntimeError) and "allocate" in str(one)), error
        chain += [other for other in (one.__cause__, one.__context__) if other is not None and other not in chain]


def attack(target: Target, seed: int, count: int) -> tuple[int, int]:
    """(refused, read) of ``count`` damaged files; anything but our own error is a failure that names its seed."""
    refused = 0
    for number in range(count):
        target.make(random.Random(f"{type(target).__name__}/{seed}/{number}"))
        try:
            target.read()
        except FastrexError as error:
            refused += 1
            try:
                checked_before(error)
            except AssertionError as late:
                late.add_note(f"{type(target).__name__}, seed {seed}, number {number}")
                raise
            if len(str(error)) > 100_000:
                raise AssertionError("an error of more than a screen") from error
        except BaseException as error:
            error.add_note(f"{type(target).__name__}, seed {seed}, number {number}")
            raise
    return refused, count - refused


@pytest.mark.parametrize("kind", TARGETS, ids=lambda kind: kind.__name__)
def test_a_few_damaged_files(kind: type[Target], tmp_path: Path) -> None:
    target, count = kind(tmp_path / "files"), 25 if kind in SLOW else 75
    with bounded(seconds=60):
        refused, read = attack(target, 0, count)
    assert refused
    assert refused + read == count


@pytest.mark.faults
@pytest.mark.parametrize("kind", TARGETS, ids=lambda kind: kind.__name__)
def test_ten_thousand_damaged_files(kind: type[Target], tmp_path: Path, report: Callable[..., None]) -> None:
    """More than ten thousand in all."""
    target, count = kind(tmp_path / "files"), 400 if kind in SLOW else 1500
    with bounded(seconds=300):
        refused, read = attack(target, 1, count)
    assert refused > count // 50
    report("T36", f"{kind.__name__}: random damage", injected=count, survived=refused + read, refused=refused)


def operations(*parts: bytes | int | str) -> bytes:
    """A pickle of protocol 2: bytes as they are, numbers and words as their opcodes."""

    def one(part: bytes | int | str) -> bytes:
        if isinstance(part, bytes):
            return part
        if isinstance(part, str):
            return b"X" + struct.pack("<I", len(part)) + part.encode()
        return b"J" + struct.pack("<i", part) if part < 2**31 else b"\x8a\x08" + part.to_bytes(8, "little")

    return b"\x80\x02" + b"".join(map(one, parts)) + b"."


def view(rows: int, columns: int, steps: tuple[int, int], count: int) -> bytes:
    """A tensor [rows, columns] over the storage 0 of ``count`` floats, as opcodes."""
    numbers = operations(0, rows, columns, b"\x86", *steps, b"\x86")[2:-1]
    storage = b"(" + operations("storage", b"ctorch\nFloatStorage\n", "0", "cpu", count, b"tQ")[2:-1]
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers + b"\x89}tR"


def crafted(path: Path, data: bytes, floats: int = 4) -> Path:
    torch.save({"x": torch.zeros(floats)}, path)
    return rewrite(path, lambda name, old: data if name == "data.pkl" else old)


def doubled_tuples(levels: int) -> bytes:
    """A tuple that holds one twice that holds one twice, and so on: 2^levels values in a few bytes."""
    return b")q\x000" + b"".join(b"h%ch%c\x86q%c0" % (n, n, n + 1) for n in range(levels)) + b"h%c" % levels


COLLIDING = b"".join(b"\x8a\x0b" + (k * (2**61 - 1)).to_bytes(11, "little") + b"N" for k in range(1, 40_000))


def downward_lists(levels: int) -> bytes:
    """A list that gets another twice, which then gets another twice, and so on: each is empty when it is put into the
    one before it, and the first has 2^levels values in the end."""
    lists = b"".join(b"]q%c0" % n for n in range(levels + 1))
    return lists + b"".join(b"h%c(h%ch%ce0" % (n, n + 1, n + 1) for n in range(levels)) + b"h\x00"


PICKLES: dict[str, tuple[bytes, int, str]] = {
    # The tensor's own methods would be called: set_ allocates what is asked for, add makes 100000 x 100000 sums.
    "BUILD on a tensor": (
        operations(view(1, 1, (1, 1), 4), b"(", view(1, 1, (1, 1), 4), 0, b"(", 2**40, b"t(", 1, b"ttb"),
        4,
        "UnpicklingError: state is not a dictionary",
    ),
    "ADDITEMS on a tensor": (
        operations(view(100_000, 1, (1, 1), 100_000), b"\x80\x04(", view(1, 100_000, (1, 1), 100_000), b"\x90"),
        100_000,
        "'_Held' object has no attribute 'add'",
    ),
    "a key of 2^60 values": (operations(b"}", doubled_tuples(60), b"Ns"), 4, "unfolds to more than 20000000 values"),
    "a storage's name of 2^60 values": (operations(downward_lists(60), b"Q"), 4, "refers to a list that is no storage"),
    "many dictionaries": (operations(b"(" + b"}" * 300_001 + b"t"), 4, "more than 300000 operations"),
    "many sets": (b"\x80\x04(" + b"\x8f" * 300_001 + b"t.", 4, "more than 300000 operations"),
    "many numbers": (operations(b"(" + b"N" * 3_000_001 + b"t"), 4, "more than 3000000 numbers and words"),
    "numbers that collide": (operations(b"}(" + COLLIDING + b"u"), 4, "keys that could collide"),
    "numbers that collide, one by one": (
        operations(b"}" + re.sub(rb"(?s)(.{13})N", rb"\1Ns", COLLIDING)), 4, "keys that could collide"
    ),
    "numbers that collide in a set": (
        operations(b"c__builtin__\nset\n(](" + COLLIDING + b"etR"), 4, "keys that could collide"
    ),
    "tuples that collide": (
        operations(b"}(", *(part for n in range(12_000) for part in (n, b"\x85N")), b"u"), 4, "keys that could collide"
    ),
    "a thousand copies of one storage": (
        operations(b"}(", *(part for n in range(1000) for part in (str(n), view(50, 100, (1, 50), 5000))), b"u"),
        5000,
        "repeat values so often that they have 8 times its size",
    ),
    "one value a billion times": (
        operations(b"}", "x", view(2**15, 2**15, (0, 0), 4), b"s"), 4, "repeat values so often"
    ),
    "a view past the end": (
        operations(b"}", "x", view(2, 2, (3, 2), 4), b"s"), 4, r"reaches past its storage of 4 elements"
    ),
    "a number of 36 million digits": (
        operations(b"}", b"\x8b" + struct.pack("<i", 15 << 20) + b"\x7f" * (15 << 20), b"Ns"),
        4,
        "a number of more than 1024 bits",
    ),
    "a text of 2^62 bytes": (
        operations(b"}", "x", b"\x8d" + (2**62).to_bytes(8, "little"), b"s"), 4, "expected 4611686018427387904 bytes"
    ),
    "a frame of 2^62 bytes": (
        b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"}.", 4, "pickle data was truncated"
    ),
    "a memo of 2^31 places": (operations(b"}r\xff\xff\xff\x7f"), 4, "a memo of 2147483647 places"),
    "something put into a number": (operations(1, b"Na"), 4, "puts something into a number"),
    "two types for one storage": (
        operations(b"}(", "a", view(1, 1, (1, 1), 4), "b", view(1, 1, (1, 1), 4).replace(b"Float", b"Int"), b"u"),
        4,
        "its storage 0 has two types",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_ask_for_more_than_they_hold(name: str, tmp_path: Path) -> None:
    data, floats, fault = PICKLES[name]
    path = crafted(tmp_path / "x.pth", data, floats)
    # Three million numbers take their time.
    with bounded(seconds=60), pytest.raises(FastrexError, match=rf"^foreign: .*x\.pth .*({fault})") as caught:
        foreign.read(path)
    checked_before(caught.value)


def test_a_list_gets_no_second_name(tmp_path: Path) -> None:
    """Under one it could grow where the scan does not see it, into a key of 2^60 values."""
    grown = b"".join(
        b"]q\x01ctorch._utils\n_rebuild_parameter\n(h\x01\x88}tR(h\x00h\x00e0c__builtin__\ntuple\n(h\x01tRq\x000"
        for _ in range(60)
    )
    path = crafted(tmp_path / "x.pth", operations(b")q\x000", grown, b"}h\x00Ns"))
    with bounded():
        assert foreign.read(path) == {(): None}


def test_large_honest_pickles_are_read(tmp_path: Path) -> None:
    content = {
        "loss": [step / 7 for step in range(310_000)],
        "order": list(range(310_000)),
        "ids": [2**40 + number for number in range(1500)],
        "rows": {2**40 + number for number in range(1500)},
        "by id": {2**40 + number: number for number in range(1500)},
    }
    one = torch.ones(1).expand(5)
    torch.save({**content, "one": one, "scale": torch.ones(3, 1).expand(3, 4)}, tmp_path / "x.pth")
    found = foreign.read(tmp_path / "x.pth")
    assert {key: found[key] for key in content} == content
    assert torch.equal(found["one"], one)
    assert torch.equal(found["scale"], torch.ones(3, 4))


def test_a_key_of_a_gigabyte_of_words_is_not_printed(tmp_path: Path) -> None:
    data = operations(b"}(", "x" * (4 << 20), b"q\x000", b"(" + b"h\x00" * 96 + b"tNu")
    with bounded(), pytest.raises(FastrexError, match="got the keys <tuple>") as caught:
        layouts.encoder_state(crafted(tmp_path / "x.pth", data))
    checked_before(caught.value)


def test_a_dictionary_that_holds_itself_is_searched_once(tmp_path: Path) -> None:
    names = b"".join(operations(f"k{n}")[2:-1] + b"h\x00" for n in range(2000))
    path = crafted(tmp_path / "x.pth", operations(b"}q\x00(", names, b"u"))
    with bounded(), pytest.raises(FastrexError, match="must hold the weights of a ResNet"):
        layouts.encoder_state(path)


def test_a_long_key_in_many_dictionaries_is_not_read_in_each(tmp_path: Path) -> None:
    key = operations("x" * (8 << 20))[2:-1] + b"q\x000"
    path = crafted(
        tmp_path / "x.pth", operations(key, b"}(", *(part for n in range(2000) for part in (n, b"}h\x00Ns")), b"u")
    )
    with bounded(), pytest.raises(FastrexError, match="unfolds to more than"):
        foreign.read(path)


def test_tensors_inside_of_containers_come_out(tmp_path: Path) -> None:
    shared = {"w": torch.arange(3.0)}
    content = {"t": (torch.ones(2), [torch.zeros(1), (shared, shared)]), "s": shared, "deep": [[{"x": torch.ones(1)}]]}
    torch.save(content, tmp_path / "x.pth")
    found = foreign.read(tmp_path / "x.pth")
    assert torch.equal(found["t"][0], torch.ones(2))
    assert found["t"][1][1][0] is found["t"][1][1][1] is found["s"]
    assert torch.equal(found["s"]["w"], torch.arange(3.0))
    assert torch.equal(found["deep"][0][0]["x"], torch.ones(1))


def stored_zip(path: Path, entries: int) -> Path:
    """A zip file whose directory has many empty entries, and nothing else."""
    directory = b"".join(
        b"PK\x01\x02" + struct.pack("<HHHHHHIIIHHHHHII", 20, 20, 0, 0, 0, 33, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0)
        + struct.pack("<I", number)
        for number in range(entries)
    )  # fmt: skip
    count = min(entries, 65535)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), 4, 0)
    path.write_bytes(b"PK\x03\x04" + directory + end)
    return path


def test_a_zip_file_of_too_many_entries_is_not_listed(tmp_path: Path) -> None:
    path = stored_zip(tmp_path / "x.pth", 200_000)
    with bounded(150 << 20), pytest.raises(FastrexError, match="its directory takes 10000000 bytes"):
        foreign.read(path)
    with bounded(150 << 20), pytest.raises(FastrexError, match="damaged index"):
        index_module.load(path.rename(tmp_path / "index.npz"))


def tensors(*entries: tuple[str, Any, Any, Any], data: int = 8, **more: Any) -> bytes:
    """A safetensors file of ``data`` bytes whose header has these (name, dtype, shape, offsets)."""
    header = {name: {"dtype": d, "shape": s, "data_offsets": o} for name, d, s, o in entries} | more
    return with_header(json.dumps(header).encode(), data)


def with_header(header: bytes, data: int = 8, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(data)


X = ("x", "F32", [2], [0, 8])
TENSOR_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "seven bytes": (bytes(7), "7 bytes"),
    "no header": (with_header(b"", 8), "header claims 0"),
    "header of 2^63 bytes": (with_header(b"{}", 0, 2**63), "header claims 9223372036854775808"),
    "header longer than the file": (with_header(b"{}", 0, 3), "header claims 3"),
    "a list": (with_header(b"[]"), "no JSON object"),
    "two objects": (with_header(b"{}{}", 0), "Extra data"),
    "not UTF-8": (with_header(b'{"\xff": 1}'), "utf-8"),
    "UTF-16": (with_header("{}".encode("utf-16"), 0), "no JSON object"),
    "nested": (with_header(b'{"x":' + b"[" * 100_000), "nested"),
    "a name twice": (with_header(b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
                                 b'"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "same name twice"),
    "a fact twice": (with_header(b'{"x":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}'), "twice"),
    "an unknown fact": (with_header(b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"y":1}}'), "must have"),
    "a missing fact": (with_header(b'{"x":{"dtype":"F32","shape":[2]}}'), "must have dtype"),
    "a number for a tensor": (with_header(b'{"x":1}'), "must have dtype"),
    "a hole": (tensors(X, ("y", "F32", [1], [12, 16]), data=16), "begin at 12, not where others end"),
    "an overlap": (tensors(X, ("y", "F32", [1], [4, 8])), "begin at 4, not where others end"),
    "the same bytes twice": (tensors(X, ("y", "F32", [2], [0, 8])), "begin at 0, not where others end"),
    "a rest": (tensors(X, data=9), "take 8 bytes, it holds 9"),
    "no tensor and a rest": (tensors(data=1), "take 0 bytes, it holds 1"),
    "cut off": (tensors(X, data=7), "take 8 bytes, it holds 7"),
    "backwards": (tensors(("x", "F32", [2], [8, 0])), "must take 8 bytes"),
    "negative offsets": (tensors(("x", "F32", [2], [-8, 0])), "impossible data_offsets"),
    "three offsets": (tensors(("x", "F32", [2], [0, 8, 8])), "impossible data_offsets"),
    "offsets that are truth values": (tensors(("x", "U8", [1], [False, True]), data=1), "impossible data_offsets"),
    "a shape that overflows": (tensors(("x", "F32", [2**32, 2**32], [0, 8])), "impossible shape"),
    "an empty shape that overflows": (tensors(("x", "F32", [0, 2**62, 2**62], [0, 0]), data=0), "impossible shape"),
    "a negative shape": (tensors(("x", "F32", [-1, -2], [0, 8])), "impossible shape"),
    "a broken shape": (tensors(("x", "F32", [2.0], [0, 8])), "impossible shape"),
    "a shape of words": (tensors(("x", "F32", "2", [0, 8])), "impossible shape"),
    "many dimensions": (tensors(("x", "F32", [2, *[1] * 40], [0, 8])), "impossible shape"),
    "too few bytes": (tensors(("x", "F32", [3], [0, 8])), "must take 12 bytes"),
    "an unknown type": (tensors(("x", "F33", [2], [0, 8])), "has the type 'F33'"),
    "a type that is a list": (tensors(("x", ["F32"], [2], [0, 8])), "has the type"),
    "no name": (tensors(("", *X[1:])), "no name of a tensor"),
    "a NUL in a name": (tensors(("x\0", *X[1:])), "no name of a tensor"),
    "a line break in a name": (tensors(("x\n", *X[1:])), "no name of a tensor"),
    "a long name": (tensors(("x" * 5000, *X[1:])), "no name of a tensor"),
    "half a character in a name": (tensors(("\ud800", *X[1:])), "no name of a tensor"),
    "numbers in the metadata": (tensors(X, __metadata__={"x": 1}), "must be words by name"),
    "metadata in a list": (tensors(X, __metadata__=["x"]), "must be words by name"),
    "a truth value of 2": (tensors(("x", "BOOL", [1], [0, 1]), data=0) + b"\x02", "neither 0 nor 1"),
    "many tensors": (tensors(*((f"{n}", "F32", [0], [0, 0]) for n in range(100_001)), data=0), "more than 100000"),
    "a .pt under this name": (b"PK\x03\x04" + bytes(100), "give it the ending .pth"),
    "a pickle under this name": (pickle.dumps({"x": 1}, 2), "it is a pickle"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSOR_FILES)
def test_headers_that_lie(name: str, tmp_path: Path) -> None:
    data, fault = TENSOR_FILES[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with bounded(), pytest.raises(tensorfile.BadTensors, match=re.escape(fault)):
        tensorfile.load(path)


def test_every_type_and_shape_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    wanted = {
        str(dtype): torch.randint(0, 2, shape).to(dtype)
        for dtype, shape in zip(
            tensorfile.DTYPES.values(), [(3,), (2, 3), (), (0,), (0, 4), (1, 1, 5)] * 4, strict=False
        )
    }
    assert len(wanted) == len(tensorfile.DTYPES)
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(wanted, path, {"format": "pt", "note": "é"})
    for found in (tensorfile.load(path), tensorfile.load(str(path), follow=False)):
        assert found.keys() == wanted.keys()
        for name, value in safetensors.torch.load_file(path).items():
            assert found[name].dtype == value.dtype
            assert found[name].shape == value.shape
            assert torch.equal(found[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))


def test_tensors_do_not_hang_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"x": torch.ones(100_000)}, path)
    found = tensorfile.load(path)
    path.write_bytes(b"")  # would kill a process that has it mapped
    assert found["x"].sum() == 100_000


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"x": torch.ones(9)}, path)
    monkeypatch.setattr(tensorfile.os, "preadv", lambda *_: 0)
    with pytest.raises(tensorfile.BadTensors, match="ends within 'x'"):
        tensorfile.load(path)


def test_a_file_larger_than_memory_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    size = 1 << 33
    path.write_bytes(tensors(("x", "U8", [size], [0, size]), data=0))
    os.truncate(path, path.stat().st_size + size)  # a hole, as cheap as it is large
    with bounded(), pytest.raises(tensorfile.BadTensors, match="more than this machine can hold"):
        tensorfile.load(path)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to itself", "socket"])
def test_what_is_no_file_keeps_nobody_waiting(kind: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    place = checkpoint.save(run, 1, {"model": {"x": torch.ones(1)}}, {"classes": []}, keep_last=1)
    readers: dict[str, Callable[[Path], object]] = {
        "x.safetensors": tensorfile.load,
        "x.pth": foreign.read,
        "x.npz": index_module.load,
        "x.toml": config_module.read,
        "status.json": lambda path: rundir.read_status(path.parent),
        "state.json": lambda path: checkpoint.read_state(path.parent),
        "model.safetensors": lambda path: checkpoint.load(path.parent),
    }
    with bounded(seconds=2):
        for name, read in readers.items():
            path = (place if name in ("state.json", "model.safetensors") else tmp_path) / name
            if path.exists():
                path.unlink()
            if kind == "pipe":
                os.mkfifo(path)
            elif kind == "device":
                path.symlink_to("/dev/zero")
            elif kind == "folder":
                path.mkdir()
            elif kind == "socket":
                # A path of more than 107 characters is none for a socket.
                with socket.socket(socket.AF_UNIX) as end, contextlib.chdir(path.parent):
                    end.bind(path.name)
            else:
                path.symlink_to(path.name)
            with pytest.raises(FastrexError):
                read(path)


def weights() -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in backbone().items()}


def test_files_larger_than_their_kind_are_not_read(tmp_path: Path) -> None:
    place = checkpoint.save(tmp_path / "run", 1, {"model": {"x": torch.ones(1)}}, {"classes": []}, keep_last=1)
    exported = tmp_path / "export"
    exported.mkdir()
    safetensors.torch.save_file(weights(), exported / "model.safetensors")
    readers: dict[Path, Callable[[Path], object]] = {
        tmp_path / "x.toml": config_module.read,
        tmp_path / "status.json": lambda path: rundir.read_status(path.parent),
        place / "state.json": lambda path: checkpoint.read_state(path.parent),
        exported / "config.json": lambda path: export.load_source(path.parent),
    }
    for path, read in readers.items():
        path.write_bytes(b"")
        os.truncate(path, 1 << 30)
        with bounded(100 << 20), pytest.raises(FastrexError):
            read(path)
    path = tmp_path / "x.safetensors"
    path.write_bytes((1 << 29).to_bytes(8, "little") + b"{")
    os.truncate(path, 1 << 30)
    with bounded(100 << 20), pytest.raises(FastrexError, match=f"at most {tensorfile.MAX_HEADER} are read"):
        tensorfile.load(path)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
@pytest.mark.parametrize("name", [rundir.LOCK, "train.log", "metrics.jsonl"])
def test_a_run_does_not_write_through_what_stands_in_its_place(kind: str, name: str, tmp_path: Path) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    run.mkdir()
    mine.write_text('{"step": 9}\nprecious\n')
    if kind == "link":
        (run / name).symlink_to(mine)
    else:
        (os.mkfifo if kind == "pipe" else os.mkdir)(run / name)
    config, world = config_module.load("trex", SETTINGS), World(0, 1, 0, 1, torch.device("cpu"))
    (run / ".metrics.jsonl").symlink_to(mine)
    start: Callable[[], object] = (
        (lambda: rundir.RunDir(run, world).open(config, facts={}, resuming=False))
        if name == rundir.LOCK
        else (lambda: metrics.Log(run, config, world, 1 if kind == "pipe" else None))
    )
    words = "Is a directory" if kind == "folder" else "is a link or no regular file|is no regular file"
    with bounded(seconds=2), pytest.raises(FastrexError, match=rf"^train: --out .*run .*({words})"):
        start()
    assert mine.read_text() == '{"step": 9}\nprecious\n'


def test_records_are_dropped_beside_links(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / ".metrics.jsonl").symlink_to("mine")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n' + "[" * 60_000 + "\n")
    metrics._drop_after(tmp_path / "metrics.jsonl", 1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("pipe", [True, False])
def test_what_a_run_says_of_itself_is_read_without_waiting(pipe: bool, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "completed"}')
    for name in ("env.json", "metrics.jsonl"):
        if pipe:
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / name).write_text('{"step": 1, "world_size": ' + "[" * 60_000)
    with bounded(seconds=2):
        facts = health.examine(tmp_path)
    assert facts["world_size"] is facts["logged_step"] is None


def test_a_link_to_a_pipe_among_shards(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.tar").symlink_to(tmp_path / "pipe")
    with bounded(seconds=2), pytest.raises(FastrexError, match=r"cannot read .*no regular file"):
        index_module.build(tmp_path / "data")


def test_names_full_of_commas_are_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ['a, "[{,' * 20, "b\\", 'c\\",,', ""]
    text = json.dumps({"x": names})
    assert untrusted.parse_json(text, items=6) == {"x": names}
    for items in (3, 4):
        with pytest.raises(ValueError, match=f"more than {items} values"):
            untrusted.parse_json(text, items=items)
    for cut in range(len(text)):
        with pytest.raises(ValueError):  # noqa: PT011
            untrusted.parse_json(text[:cut], items=6)
    # An open string full of quotes is looked through once.
    with bounded(seconds=2), pytest.raises(ValueError, match="Unterminated"):
        untrusted.parse_json('["' + '\\",' * 2_000_000)
    monkeypatch.setattr(checkpoint, "_MAX_ITEMS", 40)
    monkeypatch.setattr(stored_columns, "META_ITEMS", 40)
    parts = {"model": {"x": torch.ones(1)}}
    saved = checkpoint.save(tmp_path / "run", 1, parts, {"classes": names * 6}, keep_last=1)
    assert checkpoint.read_state(saved)["classes"] == names * 6
    with pytest.raises(checkpoint.WriteFailed, match=r"state\.json could not be read again .*more than 40 values"):
        checkpoint.save(tmp_path / "run", 2, parts, {"classes": names * 10}, keep_last=1)
    assert checkpoint.steps(tmp_path / "run") == [1]
    stored_columns.write(tmp_path / "x.npz", {"classes": names * 6}, {})
    assert stored_columns.read(tmp_path / "x.npz", lambda _: {})[0] == {"classes": names * 6}
    with pytest.raises(FastrexError, match=r"x\.npz.* must be readable again, it holds more than 40 values"):
        stored_columns.write(tmp_path / "x.npz", {"classes": names * 10}, {})
    assert stored_columns.read(tmp_path / "x.npz", lambda _: {})[0] == {"classes": names * 6}


def test_json_is_bounded_before_it_is_parsed() -> None:
    for text, fault in (
        ("[" + "[]," * 6_000_000 + "[]]", "more than 1000000 values"),
        ("[" * 65 + "]" * 65, "nested"),
        ("1e400", "out of range"),
        ("[NaN]", "no number in JSON"),
        ("[-Infinity]", "no number in JSON"),
        (str(2**63), "64 bits"),
        ("9" * 5000, "4300"),
        ('{"a": 1, "a": 1}', "same name twice"),
    ):
        with bounded(100 << 20), pytest.raises(ValueError, match=fault):
            untrusted.parse_json(text)
    deep = "[" * 64 + "]" * 64
    assert json.dumps(untrusted.parse_json(deep)) == deep
    assert untrusted.parse_json(f'{{"x": {2**63 - 1}, "y": [1.5, "\\udce9", null]}}')["x"] == 2**63 - 1


def test_links_are_not_followed_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("1")
    (tmp_path / "y").symlink_to("x")
    assert untrusted.read_json(tmp_path / "y", 10) == 1
    with pytest.raises(OSError, match="symbolic links"):
        untrusted.read_json(tmp_path / "y", 10, follow=False)


def test_a_first_layer_does_not_decide_how_much_is_allocated(tmp_path: Path) -> None:
    """A width of 20000 would make other layers of 14 GB each."""
    safetensors.torch.save_file(weights(), tmp_path / "x.safetensors")
    export.load_encoder(tmp_path / "x.safetensors")  # torch imports a good part of itself for it
    state = weights() | {"conv1.weight": torch.zeros(20_000, 3, 7, 7)}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    with bounded(), pytest.raises(FastrexError, match="must fit resnet18, it does not"):
        export.load_encoder(tmp_path / "x.safetensors")


def test_a_name_of_timm_does_not_decide_how_much_is_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of 40 GB beside a file of a few bytes: whatever timm's registry holds."""
    safetensors.torch.save_file({"weight": torch.ones(9, 4)}, tmp_path / "model.safetensors")
    facts = {"fastrex": {"arch": "timm:some"}}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    monkeypatch.setattr(export, "build_encoder", lambda *_: torch.nn.Linear(100_000, 100_000))
    with bounded(), pytest.raises(FastrexError, match="got 36, and the network takes more than twice") as caught:
        export.load_encoder(tmp_path)
    checked_before(caught.value)
    monkeypatch.setattr(export, "build_encoder", lambda *_: torch.nn.Linear(4, 9, bias=False))
    assert isinstance(export.load_encoder(tmp_path), torch.nn.Linear)


def test_half_a_character_in_the_words_of_a_source(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(ResNet("resnet18", width=8).state_dict(), tmp_path / "x.pth")
    first = export.export(tmp_path / "x.pth", tmp_path / "first", to="hf", facts={"recipe": "RECIPE"})
    config = (first / "config.json").read_text()
    (first / "config.json").write_text(config.replace("RECIPE", "a\\ud800b"))
    second = export.export(first, tmp_path / "second", to="hf")
    assert "with the recipe `a?b`" in (second / "README.md").read_text(encoding="utf-8")
    assert json.loads((second / "config.json").read_text())["fastrex"]["recipe"] == "a\ud800b"


def test_an_index_that_claims_a_gigabyte_is_not_believed(tmp_path: Path) -> None:
    target = StoredIndex(tmp_path / "files")
    built = target.indexes[1]
    sizes = built.sizes.copy()
    sizes[:] = 2**50
    forged = index_module._assemble(built._meta(), built.blob, built._columns() | {"sizes": sizes})
    with bounded(), pytest.raises(reader.BadSample, match=f"had {2**50} when it was indexed"):
        reader.read_bytes(forged, 0)
    columns = built._columns() | {"blob": np.frombuffer(built.blob, np.uint8)}
    header = "{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776,), }".ljust(117) + "\n"
    lie = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    stored_columns.write(target.path, {"version": index_module.VERSION, "fingerprint": ""} | built._meta(), columns)
    rewrite_plain(target.path, "sizes.npy", lie)
    with bounded(), pytest.raises(FastrexError, match="damaged index"):
        index_module.load(target.path)
    with zipfile.ZipFile(target.path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("meta.npy", bytes(1 << 26))
    with bounded(), pytest.raises(FastrexError, match="damaged index"):
        index_module.load(target.path)


def rewrite_plain(path: Path, name: str, data: bytes) -> None:
    with zipfile.ZipFile(path) as file:
        entries = {entry: file.read(entry) for entry in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for entry, content in (entries | {name: data}).items():
            file.writestr(entry, content)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("heights", -1),
        ("widths", 0),
        ("heights", 2**31 - 1),
        ("sizes", -1),
        ("split", 2),
        ("status", 99),
        ("labels", 9),
    ],
)
def test_an_index_whose_numbers_make_no_sense_is_refused(tmp_path: Path, name: str, value: int) -> None:
    built = StoredIndex(tmp_path / "files").indexes[0]
    column = built._columns()[name].copy()
    column[0] = value
    with pytest.raises(ValueError, match="index: "):
        index_module._assemble(built._meta(), built.blob, built._columns() | {name: column})


def test_an_index_is_not_written_through_a_link_in_somebodys_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("FASTREX_CACHE", str(tmp_path / "cache"))
    for name in ("data/a", "data/b", "mine"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data" / ".fastrex").symlink_to(tmp_path / "mine")
    assert index_module.default_path(tmp_path / "data").is_relative_to(tmp_path / "cache")


def test_shards_that_ask_for_more_than_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(*members: tuple[str, bytes]) -> Path:
        with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as file:
            for name, data in members:
                add(file, name, data)
        return tmp_path / "x.tar"

    good = [("a.png", jpeg()), ("a.cls", b"0"), ("b.png", jpeg()), ("b.cls", b"1")]
    assert len(index_module.build(written(*good))) == 2
    # Half a million parts, of which every number of last ones could be left out.
    with bounded(), pytest.raises(FastrexError, match="longer than 4096 bytes"):
        index_module.build(written(*good, ("a." * 500_000 + "png", jpeg())))
    monkeypatch.setattr(tars, "CONTENT_LIMIT", 100_000)
    with bounded(), pytest.raises(FastrexError, match="its labels take more than 100000 bytes"):
        index_module.build(
            written(*good, *((f"{n}.json", b'{"label": 1, "x": "%s"}' % (b"y" * 40_000)) for n in range(3)))
        )
    (tmp_path / "classes.json").write_text("[" + "[]," * 3_000_000 + "[]]")
    with bounded(), pytest.raises(FastrexError, match="more than 2097152 values"):
        index_module.build(written(*good))
